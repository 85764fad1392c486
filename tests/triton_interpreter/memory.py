"""A memory checker: loads, stores and atomics stay inside the tensors a kernel was given, and no two programs plainly
store to the same element.

An address outside one tensor that happens to lie in another argument is not noticed.
"""

import contextlib
from collections.abc import Iterator

import numpy
from triton.runtime import interpreter

_spans: list[tuple[int, int]] = []
_writers: dict[int, tuple] = {}


@contextlib.contextmanager
def check_memory(*addressed) -> Iterator[None]:
    """Kernels interpreted within the block raise IndexError or RuntimeError where they touch what they must not.

    addressed: tensors, or lists of them, that kernels reach by an address in a table.
    """
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    originals = {(executor, "_init_args_hst"): executor._init_args_hst}
    originals |= {(builder, name): getattr(builder, name)
                  for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")}
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic, begin = builder.create_atomic_rmw, executor._init_args_hst

    def begin_checked(self, args, kwargs):
        on_host, kwargs_on_host = begin(self, args, kwargs)
        _spans[:] = sorted({_span(t) for t in _tensors([*on_host, *kwargs_on_host.values(), *addressed]) if t.numel()})
        _writers.clear()
        return on_host, kwargs_on_host

    def checked_load(self, pointers, mask, *args, **kwargs):
        _check(pointers, mask, "load")
        return load(self, pointers, mask, *args, **kwargs)

    def checked_store(self, pointers, value, mask, *args, **kwargs):
        addresses, program = _check(pointers, mask, "store"), tuple(self.grid_idx)
        if numpy.unique(addresses).size != addresses.size:
            raise RuntimeError(f"race: one store of program {program} writes an element twice")
        for address in addresses.tolist():
            if _writers.setdefault(address, program) != program:
                raise RuntimeError(f"race: programs {_writers[address]} and {program} both store one element")
        return store(self, pointers, value, mask, *args, **kwargs)

    def checked_atomic(self, operation, pointers, value, mask, *args, **kwargs):
        _check(pointers, mask, "atomic")
        return atomic(self, operation, pointers, value, mask, *args, **kwargs)

    executor._init_args_hst = begin_checked
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = checked_atomic
    try:
        yield
    finally:
        for (owner, name), function in originals.items():
            setattr(owner, name, function)


def _tensors(values) -> Iterator:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif hasattr(value, "base") and hasattr(value, "block_shape"):
            yield value.base
        elif hasattr(value, "untyped_storage"):
            yield value


def _span(t) -> tuple[int, int]:
    """First and past-the-last byte of a view, not of the storage behind it: reading past a slice shows too."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _check(pointers, mask, what: str) -> numpy.ndarray:
    """The addresses that are touched; IndexError where one is in no argument."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    shape = numpy.broadcast_shapes(pointers.data.shape, mask.data.shape)
    touched = numpy.broadcast_to(mask.data, shape).astype(bool)
    addresses = numpy.broadcast_to(pointers.data, shape)[touched].astype(numpy.uint64)
    lows, highs = numpy.array(_spans or [(0, 0)], numpy.uint64).T
    furthest = numpy.maximum.accumulate(highs)  # spans are sorted by where they begin, and may overlap
    last = numpy.searchsorted(lows, addresses, side="right") - 1
    inside = (last >= 0) & (addresses + size <= furthest[numpy.maximum(last, 0)])
    if not inside.all():
        bad = int(addresses[~inside][0])
        low, high = min(_spans, key=lambda span: min(abs(bad - span[0]), abs(bad - span[1])), default=(0, 0))
        raise IndexError(f"out-of-bounds {what}: {int((~inside).sum())} lanes, program "
                         f"{interpreter.interpreter_builder.grid_idx}, byte {bad - low} of a {high - low}-byte tensor")
    return addresses
