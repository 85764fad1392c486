"""Signals, kills and hangs of real processes: what is saved, what is said, how soon it is over, and going on after it."""

import dataclasses
import os
import pathlib
import random
import signal
import time

import pytest
import ranks
import torch
from shrink import shrink

from jepa_fast import cli, recipes
from jepa_fast.train import checkpoint, distributed
from jepa_fast.train.preemption import Preemption
from jepa_fast.train.run import read_metrics

RECIPE = shrink(recipes.get_recipe("ijepa_mnist"))


@pytest.fixture(autouse=True)
def leave_nothing():
    yield
    ranks.kill_all()


def run_training(folder: pathlib.Path, resume: bool, changes: dict) -> int:
    """`jepa-fast train`, of a recipe for which there is no name."""
    settings = {"max_steps": None, "epochs": 1000.0, "steps_per_epoch": 10, "checkpoint_every": 0.2, **changes}
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, **settings))
    cli.chosen_recipe = lambda arguments: recipe
    cli.tyro.cli = lambda *_, default, **__: default
    return cli.main(["train", "--run-dir", str(folder), *(["--resume"] if resume else [])])


def steps_of(folder: pathlib.Path) -> int:
    rows = read_metrics(folder / "metrics.csv")
    return int(rows[-1]["step"]) if rows else 0


def until(condition, timeout_s: float = 60.0) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, "nothing happened"
        time.sleep(0.05)
    return time.monotonic() - begin


def start(folder, num_ranks, resume=False, at_step=0, **changes) -> list:
    """Processes that train, some steps on."""
    processes = ranks.start(run_training, num_ranks, folder / "run", resume, changes, folder=folder / "said")
    until(lambda: steps_of(folder / "run") >= at_step or not processes[0].is_alive())
    return processes


def exit_codes(processes: list, timeout_s: float = 60.0) -> list[int]:
    for process in processes:
        process.join(timeout_s)
    return [process.exitcode for process in processes]


def assert_goes_on(folder: pathlib.Path, num_ranks: int, **changes) -> None:
    """Three steps more than the run has, and the same from the beginning without a break: the same bits."""
    path = folder / "run" / "checkpoints" / "last.pt"
    last = checkpoint.load(path)["step"] + 3
    for name, resume in (("run", True), ("whole", False)):
        ranks.run(run_training, num_ranks, folder / name, resume, {"max_steps": last, **changes}, folder=folder / "again")
    rows, whole = (read_metrics(folder / name / "metrics.csv") for name in ("run", "whole"))
    assert [row["step"] for row in rows] == [row["step"] for row in whole] == [str(i) for i in range(1, last + 1)]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    ours, theirs = (checkpoint.load(folder / name / "checkpoints" / "last.pt")["objective"] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("name", "num_ranks", "whom"), [("SIGUSR1", 1, 0), ("SIGTERM", 2, 1)])
def test_a_signal_saves_and_asks_for_a_requeue(name, num_ranks, whom, tmp_path):
    """One rank alone is told; all stop after one step, save it, and exit with 75; only the first says so."""
    changes = {"shard_ranks": num_ranks, "checkpoint_every": 100.0}
    processes = start(tmp_path, num_ranks, at_step=4, **changes)
    os.kill(processes[whom].pid, getattr(signal, name))
    assert exit_codes(processes) == [75] * num_ranks
    step = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"]
    assert step == steps_of(tmp_path / "run")
    said = ranks.output(tmp_path / "said", num_ranks)
    assert said[0].count("jepa-fast: stopped by a signal") == 1
    assert f"after step {step}, saved in {tmp_path}/run/checkpoints/last.pt; go on with: jepa-fast train --run-dir " \
           f"{tmp_path}/run --resume" in said[0]
    assert not any(said[1:])
    if num_ranks == 1:  # of two, see below
        assert_goes_on(tmp_path, 1)


@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_run_in_seconds_and_is_named(dead, tmp_path):
    processes = start(tmp_path, 2, at_step=random.Random(dead).randint(3, 6), shard_ranks=2)
    until((tmp_path / "run" / "checkpoints" / "last.pt").exists)
    step = steps_of(tmp_path / "run")
    processes[dead].kill()
    assert until(lambda: not processes[1 - dead].is_alive()) < 10
    assert exit_codes(processes)[1 - dead] == 1
    said = ranks.output(tmp_path / "said", 2)[1 - dead]
    assert said.count("error") == 1
    assert f"jepa-fast: error: rank {dead} died" in said and "--resume" in said
    # written every 2 steps, and one may have been under way
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"] >= step - 4
    if dead:
        assert_goes_on(tmp_path, 2, shard_ranks=2)


@pytest.mark.slow
def test_a_hanging_rank_ends_the_run_after_the_timeout(tmp_path):
    processes = start(tmp_path, 2, at_step=2, timeout_s=3.0)
    os.kill(processes[1].pid, signal.SIGSTOP)
    assert until(lambda: not processes[0].is_alive()) < 20
    os.kill(processes[1].pid, signal.SIGCONT)
    assert exit_codes(processes)[0] == 1
    assert "a rank did not answer in time (train.timeout_s)" in ranks.output(tmp_path / "said", 2)[0]


def test_a_second_signal_ends_at_once(monkeypatch, capsys):
    now, codes = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", codes.append)
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(distributed.World(0, 1, torch.device("cpu"))) as preemption:
        assert not preemption.requested()
        signal.raise_signal(signal.SIGTERM)
        assert preemption.requested()
        # a launcher passes on what its children got as well
        now[0] += 1.0
        signal.raise_signal(signal.SIGTERM)
        assert not codes
        now[0] += 10.0
        signal.raise_signal(signal.SIGTERM)
        assert codes == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.count("saving after this step") == 1
