"""Learning rate, weight decay and momentum as functions of the step, to the bit of the official ones.

A schedule is called `schedule(step, horizon)`, where `step` is the number of optimizer steps already made: 0 gives the
value for the first one. The official code counts learning rate and weight decay from 1 (its schedulers step before the
first optimizer step) and momentum from 0; that difference lives here and nowhere else. Values past the end are the
official ones too: the learning rate of `WarmupCosine` stays at `final` or above but comes back up, `Linear` goes on.

Sources: I-JEPA arXiv:2301.08243, appendix A.1; V-JEPA arXiv:2404.08471; V-JEPA 2 arXiv:2506.09985, section 2.2.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Horizon:
    """How long a run is. `scale` stretches the schedules beyond the end of training (V-JEPA: 1.25), or is 1."""

    steps_per_epoch: int
    epochs: float
    scale: float = 1.0

    def __post_init__(self):
        if self.steps_per_epoch < 1 or not self.epochs > 0 or not self.scale > 0:
            raise ValueError(f"steps_per_epoch must be at least 1, epochs and scale above 0, got {self}")

    @property
    def total_steps(self) -> int:
        return int(self.scale * self.epochs * self.steps_per_epoch)

    def steps(self, epochs: float) -> int:
        return int(epochs * self.steps_per_epoch)


@dataclass(frozen=True, kw_only=True)
class Constant:
    value: float

    def __call__(self, step: int, horizon: Horizon) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Learning rate of I-JEPA and V-JEPA: linear from `start` to `peak`, then a cosine to `final`."""

    start: float
    peak: float
    final: float
    warmup_epochs: float
    first_count: int = 1  # the official counter in the first step; 0: as PyTorch's LinearLR, then CosineAnnealingLR

    def __call__(self, step: int, horizon: Horizon) -> float:
        count, warmup = step + self.first_count, horizon.steps(self.warmup_epochs)
        if count < warmup:
            return _warm_up(self.start, self.peak, count, warmup)
        progress = (count - warmup) / max(1, horizon.total_steps - warmup)
        return max(self.final, _cosine(self.peak, self.final, progress))


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Weight decay: a cosine from `start` to `final`, never past `final`."""

    start: float
    final: float

    def __call__(self, step: int, horizon: Horizon) -> float:
        value = _cosine(self.start, self.final, (step + 1) / max(1, horizon.total_steps))
        return max(self.final, value) if self.final <= self.start else min(self.final, value)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """EMA momentum: `start` in the first step, `final` after the last; the length is not rounded to whole steps."""

    start: float
    final: float

    def __call__(self, step: int, horizon: Horizon) -> float:
        length = horizon.steps_per_epoch * horizon.epochs * horizon.scale
        return self.start + step * (self.final - self.start) / length


@dataclass(frozen=True, kw_only=True)
class WarmupConstantLinear:
    """Learning rate of V-JEPA 2: linear from `start` to `peak`, constant, linear to `final` in the last epochs.

    `anneal_epochs` None anneals from the end of the warm-up on; with no warm-up this is V-JEPA 2's cool-down.
    """

    start: float
    peak: float
    final: float
    warmup_epochs: float
    anneal_epochs: float | None

    def __call__(self, step: int, horizon: Horizon) -> float:
        count, warmup, total = step + 1, horizon.steps(self.warmup_epochs), horizon.total_steps
        if count < warmup:
            return _warm_up(self.start, self.peak, count, warmup)
        anneal = total - warmup if self.anneal_epochs is None else horizon.steps(self.anneal_epochs)
        if count < total - anneal:
            return self.peak
        return self.peak + (count - (total - anneal)) / max(1, anneal) * (self.final - self.peak)


Schedule = Constant | WarmupCosine | Cosine | Linear | WarmupConstantLinear


def _warm_up(start: float, peak: float, count: int, warmup: int) -> float:
    return start + count / warmup * (peak - start)


def _cosine(start: float, final: float, progress: float) -> float:
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
