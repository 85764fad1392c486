"""metrics.csv and the trackers: one row per log step, in order."""

import csv
import os
import pathlib
from collections.abc import Callable
from typing import Any

from .. import recipes

Row = dict[str, Any]


class MetricsFile:
    """A CSV file that grows by rows, and by columns where a later row has more (gradient norms, say)."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._columns: list[str] = []

    def start(self, step: int) -> None:
        """Keep the rows of a previous life up to `step`, so that each step stands once; without any, begin anew."""
        rows = [row for row in read_metrics(self.path) if int(row["step"]) <= step] if step else []
        self._columns = list(rows[0]) if rows else []
        if rows:
            self._rewrite(rows)
        else:
            self.path.unlink(missing_ok=True)

    def append(self, row: Row) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            rows = read_metrics(self.path)
            self._columns += new
            self._rewrite([*rows, row])
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: list[Row]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def read_metrics(path: pathlib.Path) -> list[dict[str, str]]:
    """Rows of metrics.csv; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and None not in row]


def open_writers(recipe: "recipes.Recipe", folder: pathlib.Path) -> list[Callable[[int, Row], Any]]:
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
