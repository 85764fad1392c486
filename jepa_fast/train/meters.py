"""What a run costs: samples and tokens per second, utilisation, waiting for data, memory, energy, compilations.

MFU and HFU are the operations of models/flops.py per second and device, over what the data sheet promises for the
precision (a float8 target encoder counts at bf16's rate). A CPU has no data sheet of that kind: there is no MFU on it, but
TFLOP/s.
"""

import dataclasses
import resource
import statistics
import time
from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..models.flops import Work
from ..recipes import Recipe
from .distributed import World
from .energy import EnergyCounter
from .peaks import device_peak
from .recompiles import Recompilations

SHORT = {"images": "img/s", "clips": "clips/s", "samples": "samples/s"}


class Clock:
    """When steps ended. On a GPU these are events, to be read once rows that were sent after them have arrived."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"

    def mark(self):
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin


class Meters:
    """The meters of one rank. `step` and `note` never wait for the device."""

    def __init__(self, recipe: Recipe, world: World, clock: Clock | None = None, energy: EnergyCounter | None = None):
        self.recipe, self.world = recipe, world
        self.noun = "samples"
        self.recompilations = Recompilations()
        self.peak = device_peak(world.device, recipe.train.precision)
        self._clock = clock or Clock(world.device)
        self._energy = energy or EnergyCounter(world.device)
        self._marks: deque[tuple[int, object, Work]] = deque()
        self._durations: list[float] = []
        self._waited_s, self._prefetcher = 0.0, None
        # steps up to the first log step start workers, compile and autotune: they count only where there are no others
        self._warmup: tuple[float, int, Work] | None = None
        self._steady = (0.0, 0, Work())

    def start(self, step: int) -> None:
        self._begin_step = self._step = step
        self._last_mark = self._clock.mark()
        self._begin = self._noted = self._now()
        self._warm: tuple | None = None

    def _now(self) -> tuple[float, float, float | None]:
        return time.perf_counter(), self._waited(), self._energy.joules()

    def watch(self, batches) -> Iterator[dict]:
        """The batches, with the time that each is waited for; a prefetcher says itself how long that was (`waited_s`)."""
        self._prefetcher = batches if hasattr(batches, "waited_s") else None
        batches = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - begin
            self.noun = next((noun for noun, key in (("clips", "clips"), ("clips", "features"), ("images", "images"))
                              if key in batch), "samples")
            yield batch

    def _waited(self) -> float:
        return self._waited_s if self._prefetcher is None else self._prefetcher.waited_s

    def step(self, step: int, work: Work) -> None:
        """A step was launched."""
        self._marks.append((step, self._clock.mark(), work))

    def note(self) -> dict[str, float]:
        """What only the host knows at a log step, since the last one."""
        now = self._now()
        wall, waited, joules = _since(self._noted, now)
        noted = {"data_wait_percent": 100 * waited / wall, "peak_memory_mib": peak_memory_mib(self.world.device)}
        if joules is not None:
            noted["joules"] = joules
        self._noted = now
        if self._warm is None:
            self._warm = now
            self.recompilations.warmed_up()
        return noted

    def read(self, step: int, noted: dict[str, float]) -> dict[str, float]:
        """The columns of a log step that has arrived."""
        window = self._settle(step)
        row = self._rates(window)
        row["step_ms"] = 1e3 * statistics.median(self._durations[-window[1]:])
        joules = noted.pop("joules", None)
        if joules is not None:
            row["energy_j_per_sample"] = joules * self.world.size / (window[1] * self.recipe.train.batch_size)
        return {name: round(value, 3) for name, value in (row | noted).items()}

    def _settle(self, step: int) -> tuple[float, int, Work]:
        """Seconds, number and work of the steps up to `step` that were not read yet."""
        window = (0.0, 0, Work())
        while self._marks and self._marks[0][0] <= step:
            self._step, mark, work = self._marks.popleft()
            self._durations.append(self._clock.seconds(self._last_mark, mark))
            self._last_mark = mark
            window = _add(window, (self._durations[-1], 1, work))
        if self._warmup is None:
            self._warmup = window
        else:
            self._steady = _add(self._steady, window)
        return window

    def _rates(self, window: tuple[float, int, Work]) -> dict[str, float]:
        """Of the whole job, were all ranks as busy as this one; operations per device."""
        seconds, steps, work = max(window[0], 1e-9), *window[1:]
        rates = {f"{self.noun}_per_s": steps * self.recipe.train.batch_size / seconds}
        if work.tokens:
            rates["tokens_per_s"] = work.tokens * self.world.size / seconds
        if self.peak is not None:
            rates |= {"mfu_percent": 100 * work.model_flops / seconds / self.peak,
                      "hfu_percent": 100 * work.hardware_flops / seconds / self.peak}
        return rates

    def summary(self) -> dict:
        """The run so far, from this start on. Every rank must call it: waiting, memory and energy are of all of them."""
        if self._marks:
            self._settle(self._marks[-1][0])
        now, is_steady = self._now(), self._steady[1] > 0
        window = self._steady if is_steady else self._warmup or self._steady
        wall, _, joules = _since(self._begin, now)
        steady_wall, waited, _ = _since(self._warm if is_steady else self._begin, now)
        wait, memory, joules = self._over_ranks(100 * waited / steady_wall, peak_memory_mib(self.world.device), joules)
        samples = (self._step - self._begin_step) * self.recipe.train.batch_size
        times = sorted(self._durations[-window[1]:])
        summary = {
            "recipe": self.recipe.name, "device": device_name(self.world.device), "ranks": self.world.size,
            "precision": self.recipe.train.precision, "first_step": self._begin_step, "last_step": self._step,
            self.noun: samples, "wall_s": wall, "steady_steps": window[1], **self._rates(window),
            "step_ms_p50": 1e3 * percentile(times, 0.5), "step_ms_p99": 1e3 * percentile(times, 0.99),
            "model_tflop_per_step": window[2].model_flops / max(window[1], 1) / 1e12,
            "model_tflop_per_s": window[2].model_flops / max(window[0], 1e-9) / 1e12,
            "peak_tflop_per_s": None if self.peak is None else self.peak / 1e12,
            "padding_percent": 100 * window[2].padding_tokens / max(window[2].tokens, 1),
            "data_wait_percent": wait, "peak_memory_mib": memory,
            "energy_j": joules, "energy_j_per_sample": None if joules is None else joules / max(samples, 1),
            "energy": self._energy.reason or "of all ranks' devices, from NVML",
            "recompilations": self.recompilations.count}
        return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in summary.items()}

    def _over_ranks(self, wait: float, memory: float, joules: float | None) -> tuple[float, float, float | None]:
        """The longest waiting, the largest memory, the sum of the energy."""
        if self.world.size == 1:
            return wait, memory, joules
        mine = torch.tensor([wait, memory, float("nan") if joules is None else joules], dtype=torch.float64,
                            device=self.world.device)
        ranks = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(ranks, mine)
        wait, memory, joules = torch.stack(ranks).cpu().unbind(1)
        return float(wait.max()), float(memory.max()), None if bool(joules.isnan().any()) else float(joules.sum())


def _add(a: tuple[float, int, Work], b: tuple[float, int, Work]) -> tuple[float, int, Work]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _since(a: tuple, b: tuple) -> tuple[float, float, float | None]:
    """Wall seconds, waited seconds and joules between two moments."""
    return max(b[0] - a[0], 1e-9), b[1] - a[1], None if b[2] is None else b[2] - a[2]


def percentile(ordered: list[float], fraction: float) -> float:
    """Of values in rising order, the nearest rank; 0 where there are none."""
    return ordered[round(fraction * (len(ordered) - 1))] if ordered else 0.0


def peak_memory_mib(device: torch.device) -> float:
    """Most memory so far: of tensors on a GPU, of the whole process on a CPU (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def describe(summary: dict, recipe: Recipe) -> list[str]:
    """The end of a run in words: one line, and one that says what to change where the device waited for data."""
    if summary["last_step"] == summary["first_step"]:
        return [f"{summary['recipe']}: no step was left at {summary['first_step']}"]
    noun = next(noun for noun in SHORT if noun in summary)
    parts = [f"{summary[f'{noun}_per_s']:.4g} {noun}/s",
             *([f"{summary['tokens_per_s']:.3g} tokens/s"] if "tokens_per_s" in summary else []),
             f"{summary['step_ms_p50']:.4g} ms a step (99 %: {summary['step_ms_p99']:.4g})"]
    if summary["peak_tflop_per_s"] is None:
        parts.append(f"{summary['model_tflop_per_s']:.3g} TFLOP/s")
    else:
        parts.append(f"MFU {summary['mfu_percent']:.1f} %, HFU {summary['hfu_percent']:.1f} %")
    if summary["padding_percent"]:
        parts.append(f"{summary['padding_percent']:.1f} % padding")
    parts += [f"{summary['data_wait_percent']:.0f} % waiting for data", f"{summary['peak_memory_mib']:.0f} MiB"]
    if summary["energy_j"] is not None:
        parts.append(f"{summary['energy_j_per_sample']:.3g} J per {noun[:-1]}")
    if summary["recompilations"]:
        parts.append(f"{summary['recompilations']} recompilations after warm-up")
    lines = [f"{summary['recipe']}, steps {summary['first_step']} to {summary['last_step']}: {', '.join(parts)}"]
    if summary["data_wait_percent"] > 10:
        lines.append(data_hint(recipe))
    return lines


def data_hint(recipe: Recipe) -> str:
    """Which fields to change where training waits for data."""
    sources = {"data": recipe.data} if not hasattr(recipe.data, "videos") else \
        {"data.videos": recipe.data.videos, "data.images": recipe.data.images}
    workers = {name: source.num_workers for name, source in sources.items()
               if any(field.name == "num_workers" for field in dataclasses.fields(source))}
    fields = " and ".join(f"{name}.num_workers (now {count})" for name, count in workers.items())
    advice = f"raise {fields}" if workers else "its data is made in the training process"
    if 0 in workers.values():
        advice += ": 0 loads in the training process"
    return f"training waited for data: {advice}; smaller or transcoded files and crops on the device help too"
