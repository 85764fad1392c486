"""Numbers of every step, kept where they are made and read late, so that no run waits for its log.

Each step puts one row into a ring on the device. At a log step the rows since the last one are averaged over the ranks
(one all-reduce for all of them), and a copy to pinned memory is enqueued with an event behind it; they are handed out
once that event has passed, at the latest when the next ones are sent. On a CPU everything is there at once.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..eval.collapse import feature_moments, gram_of_rows, monitors_of_moments, rank_of_gram, standard_deviations
from .distributed import World


class NotFinite(RuntimeError):
    """A loss term became NaN or infinite."""


class LateCopy:
    """A tensor on its way to the host: `is_there` never waits, `get` does. On a CPU it is there."""

    def __init__(self, tensor: Tensor):
        self._event = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def is_there(self) -> bool:
        return self._event is None or self._event.query()

    def get(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


def monitors(features: Tensor, world: World, copy: type[LateCopy] = LateCopy) -> Callable[[], dict[str, float]]:
    """Collapse monitors of features [n, D] of all ranks, under way: products on the device, eigenvalues where it is called.

    Several ranks add up their moments; only the main one calls.
    """
    if world.size > 1:
        moments = feature_moments(features)
        dist.all_reduce(moments)
        late = copy(moments) if world.is_main else None
        return lambda: {} if late is None else _floats(monitors_of_moments(late.get()))
    gram, deviations = copy(gram_of_rows(features)), standard_deviations(features)
    late = copy(torch.stack(list(deviations.values())))
    return lambda: _floats(dict(zip(deviations, late.get(), strict=True)) | {"effective_rank": rank_of_gram(gram.get())})


def _floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


@dataclass(frozen=True)
class Row:
    """A log step: means over ranks, and what the host knew."""

    step: int
    values: dict[str, float]
    host: Any                   # as it was sent


@dataclass
class _Sent:
    """Rows under way; the last of them is a log step or not."""

    steps: list[int]
    names: list[str]
    copy: LateCopy
    is_log_step: bool
    host: Any = None
    monitors: Future | Callable[[], dict[str, float]] | None = None


class Statistics:
    """The ring of one run.

    last_words: what the message of NotFinite ends with. Every rank must call `send` and `flush` at the same steps.
    """

    def __init__(self, world: World, capacity: int, last_words: Callable[[], str] = str, copy: type[LateCopy] = LateCopy):
        self.world, self.capacity, self.last_words, self._copy = world, capacity, last_words, copy
        self._is_direct = world.device.type == "cpu" and copy is LateCopy
        self._ring: Tensor | None = None
        self._names: list[str] = []
        self._steps: list[int] = []
        self._sent: deque[_Sent] = deque()
        self._eigenvalues: ThreadPoolExecutor | None = None

    def record(self, step: int, values: dict[str, Tensor]) -> None:
        """The 0-dim tensors of a step. On a CPU a term that is not finite stops the run here, else where it is read."""
        if list(values) != self._names or len(self._steps) == self.capacity:
            # a term came or went, as gradient norms do, or there were many steps without a log step
            self._send(is_log_step=False)
            self._names, self._ring = list(values), None
        tensors = list(values.values())
        if self._ring is None:
            self._ring = torch.empty(self.capacity, len(tensors), dtype=torch.float64, device=self.world.device)
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        row = self._ring[len(self._steps)].copy_(torch.stack([tensor.detach().to(dtype) for tensor in tensors]))
        self._steps.append(step)
        if self._is_direct:
            self._check(step, row.tolist(), self._names)

    def send(self, host: Any, features: Tensor | None = None) -> None:
        """The last step recorded is a log step: start its way, with what the host knows of it and features to watch."""
        under_way = None if features is None else monitors(features, self.world, self._copy)
        self._send(is_log_step=True, host=host, monitors=under_way)

    def _send(self, **log_step) -> None:
        if not self._steps:
            return
        rows = self._ring[:len(self._steps)]
        if self.world.size > 1:
            dist.all_reduce(rows)
            rows /= self.world.size
        self._sent.append(_Sent(self._steps, self._names, self._copy(rows), **log_step))
        self._steps = []

    def arrived(self) -> Iterator[Row]:
        """Log steps that are here and were not handed out; waits for all but the newest ones sent."""
        while self._sent and (len(self._sent) > 1 or self._is_there(self._sent[0])):
            yield from self._hand_out()

    def flush(self) -> Iterator[Row]:
        """All log steps, waiting for them; steps after the last one are checked too."""
        self._send(is_log_step=False)
        while self._sent:
            yield from self._hand_out()

    def _is_there(self, sent: _Sent) -> bool:
        if self._is_direct or not sent.copy.is_there():
            return self._is_direct
        if callable(sent.monitors):
            # eigenvalues take the host a while, which must go on launching
            self._eigenvalues = self._eigenvalues or ThreadPoolExecutor(1, "eigenvalues")
            sent.monitors = self._eigenvalues.submit(sent.monitors)
        return not isinstance(sent.monitors, Future) or sent.monitors.done()

    def _hand_out(self) -> Iterator[Row]:
        sent = self._sent.popleft()
        rows = sent.copy.get().tolist()
        for step, row in zip(sent.steps, rows, strict=True):
            self._check(step, row, sent.names)
        if sent.is_log_step:
            watched = sent.monitors.result() if isinstance(sent.monitors, Future) else sent.monitors and sent.monitors()
            yield Row(sent.steps[-1], dict(zip(sent.names, rows[-1], strict=True)) | (watched or {}), sent.host)

    def _check(self, step: int, row: list[float], names: list[str]) -> None:
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                raise NotFinite(f"{name} is not finite at step {step}; {self.last_words()}")
