"""Learning curves: every column of a run's metrics file against its steps."""

import csv
import math
from pathlib import Path

import numpy as np

from ._style import ACCENT, MUTED, drawing

# what the ending of a column's name says about its unit; the longest that fits counts
_UNITS = {"_per_s": "per second", "_s": "seconds", "_ms": "milliseconds", "_bytes": "bytes", "_mib": "MiB",
          "_gib": "GiB", "_percent": "%"}


def read_curves(metrics_csv_path: Path | str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [n] in rising order and each column that holds a finite number, float64 [n], empty cells NaN.

    A step written twice (a resumed run) counts once, as last written. Raises ValueError, naming file and line, for a
    missing `step` column, a file without rows, and a cell that is no number.
    """
    rows: dict[float, dict[str, float]] = {}
    with open(metrics_csv_path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        if "step" not in names:
            raise ValueError(f"{metrics_csv_path} must have a column named step, got {names}")
        for cells in reader:
            row = {name: _number(cells.get(name), name, metrics_csv_path, reader.line_num) for name in names}
            if math.isnan(row["step"]):
                raise ValueError(f"{metrics_csv_path} line {reader.line_num}: step must be a number, got none")
            rows[row["step"]] = row
    if not rows:
        raise ValueError(f"{metrics_csv_path} must have at least one row below its header, got none")
    steps = np.array(sorted(rows))
    columns = {name: np.array([rows[step][name] for step in steps]) for name in names if name != "step"}
    return steps, {name: values for name, values in columns.items() if np.isfinite(values).any()}


def learning_curves(metrics_csv_path: Path | str, out_png: Path | str) -> Path:
    """Draw each metric of a CSV file with a `step` column as a small panel of its own; returns the path of the picture.

    Empty cells, NaN and infinity are skipped; the number beside a title is the last value. The axis is logarithmic
    where all values are positive and most are small beside the largest (over 20 times the median). A noisy metric of
    more than 150 points is drawn pale under its running mean over a fortieth of them.
    """
    steps, columns = read_curves(metrics_csv_path)
    if not columns:
        raise ValueError(f"{metrics_csv_path} must have a column of numbers besides step, got none")
    num_columns = min(3, len(columns))
    num_rows = -(-len(columns) // num_columns)
    with drawing(out_png, 0.4 + 3.2 * num_columns, 0.5 + 2.0 * num_rows) as figure:
        figure.get_layout_engine().set(w_pad=0.08)
        axes = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True)
        for ax, (name, values) in zip(axes.flat, columns.items(), strict=False):   # a last row may have room left
            _panel(ax, name, steps, values)
        for spare in axes.flat[len(columns):]:
            spare.set_axis_off()
        for column in range(num_columns):   # the lowest panel of each column carries the steps
            lowest = axes[(len(columns) - 1 - column) // num_columns, column]
            lowest.set_xlabel("step")
            lowest.tick_params(labelbottom=True)
        figure.suptitle("Learning curves", x=0.01, ha="left")
    return Path(out_png)


def _panel(ax, name: str, steps: np.ndarray, values: np.ndarray) -> None:
    is_there = np.isfinite(values)
    steps, values = steps[is_there], values[is_there]
    # a curve that rises once and falls once is twice its range long, noise many times
    is_noisy = len(values) > 150 and np.abs(np.diff(values)).sum() > 4 * np.ptp(values)
    ax.plot(steps, values, color=ACCENT, alpha=0.3 if is_noisy else 1.0, linewidth=0.8 if is_noisy else 1.5,
            marker="o" if len(values) <= 30 else None, markersize=3)
    if is_noisy:
        ax.plot(steps, _running_mean(values, len(values) // 40), color=ACCENT)
    if values.min() > 0 and values.max() > 20 * np.median(values):
        ax.set_yscale("log")
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    ax.set(title=name, ylabel=unit)
    ax.annotate(f"{values[-1]:.4g}", (1.0, 1.0), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
                ha="right", va="bottom", fontsize=8, color=MUTED)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the `width` values around each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    begin, end = np.maximum(middle - width // 2, 0), np.minimum(middle + width - width // 2, len(values))
    return (sums[end] - sums[begin]) / (end - begin)


def _number(cell: str | None, name: str, path: Path | str, line: int) -> float:
    if cell is None or not cell.strip():
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{path} line {line}: {name} must be a number or empty, got {cell!r}") from None
