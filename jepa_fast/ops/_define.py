"""How an op is defined, and the one table that says which code runs.

`TABLE[op][backend]` is an `Implementation`; `ORDER[device]` is the order in which they are tried. The same table feeds
`jepa-fast info`, the tests' backend parameter and the benches' providers.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch

from ._backends import Implementation, Missing, tensors_of, why_not

BACKENDS = ("plain", "cpp", "torch", "triton", "cuda", "flash_attn", "xformers")
ORDER = {"cpu": ("cpp", "torch", "plain"), "cuda": ("cuda", "triton", "flash_attn", "xformers", "torch", "plain")}
_LIBRARIES = ("torch", "flash_attn", "xformers")  # others' code: it has an op or has not
TABLE: dict[str, dict[str, Implementation | Missing]] = {}

_LIBRARY = torch.library.Library("jepa_fast", "DEF")
_CHECKED_ON_DEVICE: list[None] = []  # one entry per open checks_on_device()
_FORCED: list[tuple[str, str | None]] = []  # (backend, op or None for all), innermost last


def define(schema: str, *, plain: Callable, check: Callable[..., None] | None = None,
           **backends: Implementation | Missing | None) -> str:
    """Register `jepa_fast::<schema>`; returns its qualified name.

    `plain` always exists. `check(*args)` looks at values (index ranges, ...): on CPU tensors it raises; on a device, where
    that would wait for it, it asserts there, and only within `checks_on_device()`.
    """
    name = schema.split("(")[0]
    unknown = set(backends) - set(BACKENDS)
    assert not unknown, f"{name}: unknown backends {unknown}"
    row = {"plain": Implementation(plain)}
    row |= {key: value or Missing("not written yet") for key, value in backends.items()}
    TABLE[name] = {key: row.get(key, Missing(f"{key} has no such op" if key in _LIBRARIES else "not written yet"))
                   for key in BACKENDS}
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args):
        device = next((arg.device.type for arg in tensors_of(args)), "cpu")
        if check is not None and (device == "cpu" or _CHECKED_ON_DEVICE):
            check(*args)
        function = choose(name, device, args).function
        if torch.is_autocast_enabled(device):  # an op computes in the precision it says, whatever surrounds it
            with torch.autocast(device, enabled=False):
                return function(*args)
        return function(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return f"jepa_fast::{name}"


def choose(name: str, device: str, args: tuple) -> Implementation:
    """The implementation that runs: the forced one, or the first of the device's order that can and is not slower."""
    row = TABLE[name]
    forced = forced_backend(name)
    if forced is not None:
        reason = why_not(row[forced], device, args)
        if reason:
            raise RuntimeError(f"backend {forced!r} asked for, but {name} cannot use it: {reason}")
        return row[forced]
    passed_over = None
    for backend in ORDER.get(device, ("plain",)):
        implementation = row[backend]
        if why_not(implementation, device, args) is not None:
            continue
        if implementation.slower is None or not implementation.slower.holds(*args):
            # plain is not what a faster one is passed over for
            return passed_over if backend == "plain" and passed_over is not None else implementation
        passed_over = passed_over or implementation
    return passed_over


def forced_backend(name: str) -> str | None:
    for backend, op in reversed(_FORCED):
        if op is None or op == name:
            return backend
    return None


@contextlib.contextmanager
def use_backend(backend: str, op: str | None = None) -> Iterator[None]:
    """Within the block every op (or only `op`) runs on `backend`; one that cannot raises RuntimeError and says why.

    Process-wide, not per thread, because backward passes may run on other threads.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if op is not None and op not in TABLE:
        raise ValueError(f"op must be one of {', '.join(sorted(TABLE))}, got {op!r}")
    _FORCED.append((backend, op))
    try:
        yield
    finally:
        _FORCED.remove((backend, op))


@contextlib.contextmanager
def checks_on_device() -> Iterator[None]:
    """Within the block ops check values on a GPU too (index ranges, cu_seqlens), without waiting for it.

    A value that does not fit fails an assertion on the device, which ends its context: for debugging, with
    CUDA_LAUNCH_BLOCKING=1 to see in which call. Elsewhere what an op does with such a value on a GPU is undefined.
    """
    _CHECKED_ON_DEVICE.append(None)
    try:
        yield
    finally:
        _CHECKED_ON_DEVICE.pop()


def info(device: str) -> list[tuple[str, str, dict[str, str]]]:
    """For each op: its name, the backend that would run on `device`, and why the others would not."""
    rows, order = [], ORDER.get(device, ("plain",))
    for name, row in TABLE.items():
        reasons = {backend: why_not(row[backend], device) or _only_asked_for(row[backend], device) for backend in BACKENDS}
        chosen = next(backend for backend in order if reasons[backend] is None)
        others = {backend: reason or ("slower here" if backend in order else "not tried on this device")
                  for backend, reason in reasons.items() if backend != chosen}
        slower = getattr(row[chosen], "slower", None)
        second = next((b for b in order if b in others and reasons[b] is None and b != "plain"), None)
        if slower and second:
            others[second] = f"used for {slower.when}, slower otherwise"
        rows.append((name, chosen, others))
    return rows


def _only_asked_for(implementation: Implementation | Missing, device: str) -> str | None:
    slower = getattr(implementation, "slower", None)
    return f"only where asked for by name: {slower.when}" if slower and device in slower.always else None
