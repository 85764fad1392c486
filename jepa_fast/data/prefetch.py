"""Batches one step ahead of the trainer: read, prepared and copied while the device computes the step before.

    host batch (page-locked)  --copy stream-->  the same on the device  --main stream-->  finish: crop, normalise

What is copied is what the loader's processes made, mostly uint8: a fourth of the float32 that the model reads.
"""

import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
Prepare = Callable[[Batch, int], Batch]

# entries that are read on the CPU
_ON_CPU = ("index", "image_index")
_END = object()


class Prefetcher:
    """An iterator over `batches` on a device; `waited_s` counts the seconds that its user has waited in it.

    `prepare(batch, step)` returns entries to add (masks); it runs ahead of time, on the host batch, and must be a function
    of its arguments. `finish(batch, step)` makes the batch that the trainer sees, on its stream. For a GPU reading and
    `prepare` run in a thread, one batch ready and one on its way; else in turn, when a batch is asked for.
    A Prefetcher that has not begun may be given as `batches`, to add `prepare`.
    """

    def __init__(self, batches: "Iterable[Batch] | Prefetcher", device: torch.device | str = "cpu", *,
                 prepare: Prepare | None = None, finish: Callable[[Batch, int], Batch] | None = None,
                 start_step: int = 0):
        if isinstance(batches, Prefetcher):
            if batches._source is not None or batches.prepare or finish:
                raise ValueError("batches must be a Prefetcher that has not begun and has no `prepare`, without another "
                                 "`finish`, got one that has")
            batches, finish, start_step = batches.batches, batches.finish, batches.start_step
        self.batches, self.device = batches, torch.device(device)
        self.prepare, self.finish, self.start_step = prepare, finish, start_step
        self.waited_s = 0.0
        self._source: Iterator[tuple[int, Batch, Batch]] | None = None
        self._copies = CopyStream(self.device) if self.device.type == "cuda" else None
        self._ahead: queue.Queue = queue.Queue(maxsize=1)
        self._stop, self._thread = threading.Event(), None
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            step, batch, added = self._next()
            return (self.finish(batch, step) if self.finish else batch) | added
        finally:
            self.waited_s += time.perf_counter() - start

    def _next(self) -> tuple[int, Batch, Batch]:
        if self._stop.is_set():
            raise StopIteration
        if self._source is None:
            self._source = _prepared(self.batches, self.prepare, self.start_step)
            if self._copies is not None:
                return self._begin()
        if self._copies is None:
            return next(self._source)
        item = self._ahead.get()
        if item is _END or isinstance(item, BaseException):
            self._stop.set()
            raise StopIteration if item is _END else item
        return self._copies.take(*item)

    def _begin(self) -> tuple[int, Batch, Batch]:
        """The first batch is read here: the processes that this starts are watched only in the main thread."""
        try:
            item = self._copies.start(next(self._source))
        except BaseException:
            self._stop.set()
            raise
        # the thread knows nothing of self, which would then never be collected
        self._thread = threading.Thread(target=_run_ahead, args=(self._source, self._copies, self._ahead, self._stop),
                                        daemon=True, name="prefetch")
        self._thread.start()
        return self._copies.take(*item)

    def close(self) -> None:
        """Stop reading; the loader's processes end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            if self._thread.is_alive():  # it waits for a process that hangs; both end with this one
                return
        for source in (self._source, self.batches):
            if hasattr(source, "close"):
                source.close()


def _prepared(batches: Iterable[Batch], prepare: Prepare | None, start_step: int) -> Iterator[tuple[int, Batch, Batch]]:
    for step, batch in enumerate(batches, start_step):
        yield step, batch, prepare(batch, step) if prepare else {}


def _run_ahead(source: Iterator, copies: "CopyStream", ahead: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in source:
            if not _put(ahead, copies.start(item), stop):
                return
        _put(ahead, _END, stop)
    except BaseException as error:  # raised where the batch is asked for
        _put(ahead, error, stop)


def _put(ahead: queue.Queue, item: object, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ahead.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


class CopyStream:
    """Copies to a GPU on a stream of their own, beside what the main stream computes."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, value: Any) -> tuple[Any, torch.cuda.Event]:
        """All tensors of `value` on the device, once the event has happened."""
        with torch.cuda.stream(self.stream):
            copies = map_tensors(self._copy, value)
            return copies, self.stream.record_event()

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        # from pageable memory the host would wait for the copy
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def take(self, value: Any, event: torch.cuda.Event) -> Any:
        """`value`, for use on the current stream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)

        def keep(tensor: Tensor) -> Tensor:
            # else its memory goes back to the copy stream while the main one still reads it
            if tensor.device.type != "cpu":
                tensor.record_stream(current)
            return tensor

        return map_tensors(keep, value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` of every tensor within dictionaries, lists, tuples and dataclasses; the indices of samples stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: item if key in _ON_CPU else map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map_tensors(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: map_tensors(function, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
