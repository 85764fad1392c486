"""The run folder: recipe.yaml, metrics.csv, checkpoints/last.pt; and what the terminal shows."""

import csv
import math
import pathlib
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .. import recipes
from ..eval.collapse import collapse_monitors, feature_moments, monitors_of_moments
from . import checkpoint
from .distributed import World, advise, barrier
from .saver import Saver


class NotFinite(RuntimeError):
    """A loss term became NaN or infinite."""


class Run:
    """One folder of one run. Only the main process writes; the other ranks' calls do nothing."""

    def __init__(self, folder: pathlib.Path, recipe: "recipes.Recipe", world: World):
        self.folder, self.recipe, self.world = folder, recipe, world
        self.saver = Saver(folder / "checkpoints", world)
        self.checkpoint_path = self.saver.path
        self.metrics_path = folder / "metrics.csv"
        self._columns: list[str] | None = None
        self._writers: list = []
        self._bar: tqdm | None = None

    def start(self, step: int, num_steps: int) -> None:
        """Open the folder at `step`; rows of a previous, longer life are cut off so that each step stands once."""
        self._since, self._since_step = time.perf_counter(), step
        self._first_bad: Tensor | None = None
        advise(f"; go on with: {self.how_to_resume()}")
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        recipes.save(self.recipe, self.folder / "recipe.yaml")
        rows = read_metrics(self.metrics_path) if step else []
        self.metrics_path.unlink(missing_ok=True)
        for row in rows:
            if int(row["step"]) <= step:
                self._append(row)
        self._writers = open_writers(self.recipe, self.folder)
        # a log file wants a line now and then, a terminal a moving bar
        self._bar = tqdm(total=num_steps, initial=step, unit="step", desc=self.recipe.name, dynamic_ncols=True,
                         mininterval=0.2 if sys.stderr.isatty() else 15.0)

    def check(self, step: int, losses: dict[str, Tensor]) -> None:
        """Stop where a term is not finite. On a GPU the first bad step is noted there and read at the next `log`."""
        terms = {name: value for name, value in losses.items() if value.dim() == 0}
        if self.world.device.type == "cpu":
            for name, value in terms.items():
                if not math.isfinite(float(value)):
                    self._stop(step, name)
            return
        bad = ~torch.stack([value.float() for value in terms.values()]).isfinite()
        number = torch.where(bad, step, torch.iinfo(torch.int64).max)
        self._first_bad = number if self._first_bad is None else torch.minimum(self._first_bad, number)
        self._terms = list(terms)

    def _read_bad(self) -> None:
        if self._first_bad is not None:
            steps = self._first_bad.tolist()
            if min(steps) < torch.iinfo(torch.int64).max:
                self._stop(min(steps), self._terms[steps.index(min(steps))])

    def _stop(self, step: int, term: str) -> None:
        self.saver.wait()
        last = f"the last good checkpoint is {self.checkpoint_path}" if self.checkpoint_path.exists() \
            else "there is no checkpoint yet"
        raise NotFinite(f"{term} is not finite at step {step}; {last}")

    def log(self, step: int, epoch: float, losses: dict[str, Tensor], settings: dict[str, float]) -> None:
        """Write and show one row: means over ranks, monitors of the global batch. Reads the device here and nowhere else."""
        self._read_bad()
        features = losses.pop("features", None)
        values = mean_over_ranks(losses, self.world)
        if features is not None:
            values |= {name: float(value) for name, value in monitors_over_ranks(features, self.world).items()}
        now = time.perf_counter()
        speed = (step - self._since_step) * self.recipe.train.batch_size / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        if not self.world.is_main:
            return
        row = {"step": step, "epoch": round(epoch, 6), **values, **settings, "images_per_s": round(speed, 3)}
        self._append(row)
        for write in self._writers:
            write(step, row)
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", **{"img/s": f"{speed:.0f}"}, refresh=False)

    def tick(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def save(self, step: int, objective: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint in the background. Every rank calls it."""
        self._read_bad()
        self.saver.save(step, recipes.to_yaml(self.recipe), objective, optimizer)

    def resume(self, objective: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the last checkpoint back; the step it was taken after."""
        return self.start_from(self.checkpoint_path, objective, optimizer)

    def start_from(self, path: pathlib.Path, objective: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Take weights and optimizer state of any run's checkpoint; the step it was taken after."""
        return checkpoint.restore(path, objective, optimizer)

    def how_to_resume(self) -> str:
        return f"jepa-fast train --run-dir {self.folder} --resume"

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        self.saver.wait()
        barrier(self.world)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _append(self, row: dict[str, Any]) -> None:
        if self._columns is None:
            self._columns = list(row)
        with open(self.metrics_path, "a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def mean_over_ranks(losses: dict[str, Tensor], world: World) -> dict[str, float]:
    if world.size > 1:
        stacked = torch.stack([value.double() for value in losses.values()])
        dist.all_reduce(stacked)
        return dict(zip(losses, (stacked / world.size).tolist(), strict=True))
    return {name: float(value) for name, value in losses.items()}


def monitors_over_ranks(features: Tensor, world: World) -> dict[str, Tensor]:
    if world.size == 1:
        return collapse_monitors(features)
    moments = feature_moments(features)
    dist.all_reduce(moments)
    return monitors_of_moments(moments)


def read_metrics(path: pathlib.Path) -> list[dict[str, str]]:
    """Rows of metrics.csv; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and None not in row]


def open_writers(recipe: "recipes.Recipe", folder: pathlib.Path) -> list:
    """Functions (step, row) for the trackers that were asked for."""
    writers = []
    if recipe.train.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError('train.tensorboard needs pip install "jepa_fast[tensorboard]"') from error
        board = SummaryWriter(str(folder / "tensorboard"))
        writers.append(lambda step, row: [board.add_scalar(name, value, step) for name, value in row.items()])
    if recipe.train.wandb:
        try:
            import wandb
        except ImportError as error:
            raise ValueError('train.wandb needs pip install "jepa_fast[wandb]"') from error
        wandb.init(project="jepa_fast", name=folder.name, dir=str(folder), config={"recipe": recipes.to_yaml(recipe)})
        writers.append(lambda step, row: wandb.log(row, step=step))
    return writers
