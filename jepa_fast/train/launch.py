"""Training as a SLURM job that comes back after every pre-emption and time limit: one process per GPU, through submitit."""

import os
import pathlib
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any, Literal

from ..recipes import Recipe
from . import distributed
from .loop import train
from .preemption import EXIT_CODE, Preempted


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    nodes: int = 1
    gpus: int = 8                # per node, each with a process
    processes: int | None = None  # per node; None: one per GPU
    cpus: int = 12               # per process: the loader's workers and the trainer
    minutes: int = 1440          # of one job; the run goes on in the next one
    partition: str = ""
    account: str = ""
    qos: str = ""
    setup: tuple[str, ...] = ()  # shell commands before the run, such as "module load cuda"
    signal_s: int = 120          # seconds before the end of a job in which a step and a checkpoint must fit
    restarts: int = 100          # after time limits; pre-emptions do not count
    cluster: Literal["slurm", "local"] = "slurm"  # local: processes on this machine

    def __post_init__(self):
        for name in ("nodes", "cpus", "minutes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tasks < 1:
            raise ValueError(f"gpus or processes must be at least 1, got {self.gpus} and {self.processes}")
        if self.signal_s >= 60 * self.minutes:
            raise ValueError(f"signal_s must be below the {60 * self.minutes} s of the job, got {self.signal_s}")

    @property
    def tasks(self) -> int:
        return self.gpus if self.processes is None else self.processes


@dataclass(frozen=True)
class Training:
    """What every process of the job runs, in each of the job's lives."""

    recipe: Recipe
    folder: pathlib.Path

    def __call__(self) -> None:
        import submitit

        here = submitit.JobEnvironment()
        os.environ |= {"RANK": str(here.global_rank), "LOCAL_RANK": str(here.local_rank), "WORLD_SIZE": str(here.num_tasks),
                       "MASTER_ADDR": here.hostnames[0], "MASTER_PORT": str(20_000 + int(here.raw_job_id) % 20_000)}
        try:
            train(self.recipe, self.folder, resume=(self.folder / "checkpoints" / "last.pt").exists())
            distributed.stop()
        except Preempted as stop:
            distributed.stop()
            if here.global_rank:
                time.sleep(5.0)  # the first process asks for the next job; this one's end must not end it before
                sys.exit(EXIT_CODE)
            print(f"jepa-fast: {stop}", file=sys.stderr, flush=True)
            # what submitit does on its signal: put `checkpoint()` in place of this job, and requeue it
            signal.raise_signal(here._usr_sig())
        except BaseException:
            traceback.print_exc()
            distributed.give_up()
            raise

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def launch(recipe: Recipe, folder: pathlib.Path, config: LaunchConfig) -> Any:
    """Submit the training of a recipe in a folder; submitit's job, whose logs are in FOLDER/jobs."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError('launch needs pip install "jepa_fast[slurm]"') from error
    try:
        executor = submitit.AutoExecutor(folder / "jobs", cluster=config.cluster, slurm_max_num_timeout=config.restarts,
                                         local_max_num_timeout=config.restarts)
    except RuntimeError as error:
        raise ValueError(f"cluster {config.cluster}: {error}; sbatch and srun must be on the path") from error
    options = {name: getattr(config, name) for name in ("partition", "account", "qos") if getattr(config, name)}
    setup = {f"{config.cluster}_setup": list(config.setup)} if config.setup else {}
    executor.update_parameters(
        name=folder.name, nodes=config.nodes, tasks_per_node=config.tasks, gpus_per_node=config.gpus,
        cpus_per_task=config.cpus, timeout_min=config.minutes, **setup, slurm_signal_delay_s=config.signal_s,
        slurm_additional_parameters={"requeue": True} | options)
    return executor.submit(Training(recipe, folder.absolute()))
