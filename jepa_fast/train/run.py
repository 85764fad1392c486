"""The run folder: recipe.yaml, metrics.csv, summary.json, checkpoints/last.pt; and what the terminal shows."""

import json
import pathlib
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from .. import recipes
from ..models.flops import Work
from . import checkpoint
from .distributed import World, advise, barrier
from .meters import SHORT, Meters
from .metrics_file import MetricsFile, open_writers, read_metrics
from .saver import Saver
from .statistics import NotFinite, Row, Statistics

__all__ = ["NotFinite", "Run", "read_metrics"]


class Run:
    """One folder of one run. Only the main process writes; the other ranks make the same calls."""

    def __init__(self, folder: pathlib.Path, recipe: "recipes.Recipe", world: World):
        if recipe.train.log_every < 1:
            raise ValueError(f"train.log_every must be at least 1, got {recipe.train.log_every}")
        self.folder, self.recipe, self.world = folder, recipe, world
        self.saver = Saver(folder / "checkpoints", world)
        self.checkpoint_path = self.saver.path
        self.metrics_path = folder / "metrics.csv"
        self.meters = Meters(recipe, world)
        self.statistics = Statistics(world, recipe.train.log_every, self._last_words)
        self.summary: dict = {}
        self._metrics = MetricsFile(self.metrics_path)
        self._writers: list = []
        self._bar: tqdm | None = None

    def start(self, step: int, num_steps: int) -> None:
        """Open the folder at `step`; rows of a previous, longer life are cut off so that each step stands once."""
        self.meters.start(step)
        advise(f"; go on with: {self.how_to_resume()}")
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        recipes.save(self.recipe, self.folder / "recipe.yaml")
        self._metrics.start(step)
        self._writers = open_writers(self.recipe, self.folder)
        # a log file wants a line now and then, a terminal a moving bar
        self._bar = tqdm(total=num_steps, initial=step, unit="step", desc=self.recipe.name, dynamic_ncols=True,
                         mininterval=0.2 if sys.stderr.isatty() else 15.0)

    def record(self, step: int, epoch: float, losses: dict[str, Tensor], settings: dict[str, float], work: Work, *,
               is_log_step: bool) -> None:
        """What a step gave, what was set for it and what it did. Rows of log steps are written when they have arrived.

        Raises NotFinite where a term stopped being a number: in that step on a CPU, on a GPU when it is read.
        """
        self.meters.step(step, work)
        self.statistics.record(step, {name: value for name, value in losses.items() if name != "features"})
        if is_log_step:
            self.statistics.send(({"epoch": round(epoch, 6)}, settings, self.meters.note()), losses.get("features"))
        for row in self.statistics.arrived():
            self._write(row)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Wait for all rows and write them; every step is then known to be finite."""
        for row in self.statistics.flush():
            self._write(row)

    def finish(self) -> None:
        """Write what is left, and summary.json; wait until the last checkpoint is on the disk. Every rank calls it."""
        self.flush()
        self.saver.wait()
        barrier(self.world)
        self.summary = self.meters.summary()
        if self.world.is_main:
            (self.folder / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")

    def _write(self, row: Row) -> None:
        epoch, settings, noted = row.host
        speed = self.meters.read(row.step, noted)
        if not self.world.is_main:
            return
        cells = {"step": row.step, **epoch, **row.values, **settings, **speed}
        self._metrics.append(cells)
        for write in self._writers:
            write(row.step, cells)
        shown = {SHORT[self.meters.noun]: f"{speed[f'{self.meters.noun}_per_s']:.0f}"}
        if "mfu_percent" in speed:
            shown["MFU"] = f"{speed['mfu_percent']:.0f}%"
        shown["wait"] = f"{speed['data_wait_percent']:.0f}%"
        self._bar.set_postfix(loss=f"{row.values['loss']:.4f}", **shown, refresh=False)

    def _last_words(self) -> str:
        self.saver.wait()
        return f"the last good checkpoint is {self.checkpoint_path}" if self.checkpoint_path.exists() \
            else "there is no checkpoint yet"

    def save(self, step: int, objective: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint in the background. Every rank calls it."""
        self.flush()
        self.saver.save(step, recipes.to_yaml(self.recipe), objective, optimizer)

    def resume(self, objective: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the last checkpoint back; the step it was taken after."""
        return self.start_from(self.checkpoint_path, objective, optimizer)

    def start_from(self, path: pathlib.Path, objective: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Take weights and optimizer state of any run's checkpoint; the step it was taken after."""
        return checkpoint.restore(path, objective, optimizer)

    def how_to_resume(self) -> str:
        return f"jepa-fast train --run-dir {self.folder} --resume"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
