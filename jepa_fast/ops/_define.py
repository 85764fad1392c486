"""How an op is defined, and the one table that says which code runs.

`TABLE[op][backend]` is an `Implementation`; `ORDER[device]` is the order in which they are tried. The same table feeds
`jepa-fast info`, the tests' backend parameter and the benches' providers.
"""

import contextlib
import functools
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("plain", "cpp", "torch", "triton", "cuda", "flash_attn", "xformers")
ORDER = {"cpu": ("cpp", "torch", "plain"), "cuda": ("cuda", "triton", "flash_attn", "xformers", "torch", "plain")}
TABLE: dict[str, dict[str, "Implementation | Missing"]] = {}

_LIBRARY = torch.library.Library("jepa_fast", "DEF")
_EMULATED: dict[str, object] = {}  # "cuda" -> the library that runs csrc/cuda on the host: tests only
_CHECKED_ON_DEVICE: list[None] = []  # one entry per open checks_on_device()
_FORCED: list[tuple[str, str | None]] = []  # (backend, op or None for all), innermost last


@dataclass(frozen=True)
class Slower:
    """Where the automatic choice passes over an implementation that could run: `holds(*args)`, described by `when`."""

    when: str
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: `supports(*args)` is None where it can, else the reason why it cannot."""

    function: Callable
    devices: tuple[str, ...] = ("cpu", "cuda")
    supports: Callable[..., str | None] = lambda *args: None
    slower: Slower | None = None  # measured; a forced backend does not ask
    missing: Callable[[str], str | None] = lambda device: None  # what this machine lacks to run it on a device


@dataclass(frozen=True)
class Missing:
    """A backend that is not here, and why."""

    reason: str


def _load_compiled() -> str | None:
    """Load the C++ ops; None, or the reason why they are not available."""
    path = pathlib.Path(__file__).parent.parent / "_C.so"
    if not path.exists():
        return "the C++ extension was not built (no C++ compiler or no torch when jepa_fast was installed)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    return None


COMPILED_MISSING: str | None = _load_compiled()


def compiled(name: str, dtypes=(torch.float32, torch.bfloat16), call: Callable | None = None,
             supports: Callable[..., str | None] | None = None,
             slower: Slower | None = None) -> Implementation | Missing:
    """The C++ version of an op for CPU tensors.

    `call(raw, *args)` makes one or more calls of the raw ops `raw.<name>`; by default the one of that name.
    """
    if COMPILED_MISSING:
        return Missing(COMPILED_MISSING)
    raw = torch.ops.jepa_fast_C
    function = functools.partial(call, raw) if call else getattr(raw, name)
    return Implementation(function, ("cpu",), _only(dtypes, "C++", supports), slower)


def cuda(name: str, dtypes=(torch.float32, torch.bfloat16, torch.float16), call: Callable | None = None,
         supports: Callable[..., str | None] | None = None, slower: Slower | None = None) -> Implementation:
    """The CUDA version of an op: the raw ops of the same names and schemas, `call` as for `compiled`."""
    def function(*args):
        raw = _EMULATED.get("cuda", torch.ops.jepa_fast_C)
        return call(raw, *args) if call else getattr(raw, name)(*args)

    return Implementation(function, ("cpu", "cuda"), _only(dtypes, "CUDA", supports), slower, _cuda_missing)


def triton(name: str, dtypes=(torch.float32, torch.bfloat16, torch.float16),
           supports: Callable[..., str | None] | None = None, slower: Slower | None = None) -> Implementation:
    """The Triton version of an op: the launcher `name`, "<file in kernels/>.<function>", imported when first called."""
    module, _, launcher = name.partition(".")

    def function(*args):
        launch = getattr(importlib.import_module(f"jepa_fast.kernels.{module}"), launcher or module)
        first = next(_tensors(args), None)
        if first is None or not first.is_cuda:
            return launch(*args)
        with torch.cuda.device(first.device):
            return launch(*args)

    return Implementation(function, ("cpu", "cuda"), _only(dtypes, "Triton", supports), slower, _triton_missing)


def _only(dtypes, language: str, supports: Callable[..., str | None] | None) -> Callable[..., str | None]:
    def check(*args) -> str | None:
        for arg in _tensors(args):
            if arg.is_floating_point() and arg.dtype not in dtypes:
                return f"no {language} version for {str(arg.dtype).removeprefix('torch.')}"
        return supports(*args) if supports else None
    return check


@functools.cache
def _too_old(language: str) -> str | None:
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if major < 8:
            return f"{language} kernels need sm_80 or newer, cuda:{i} is sm_{major}{minor}"
    return None


def _cuda_missing(device: str) -> str | None:
    if device == "cpu":
        return None if "cuda" in _EMULATED else "not for cpu tensors"
    if COMPILED_MISSING:
        return COMPILED_MISSING
    if not hasattr(torch.ops.jepa_fast_C, "cuda_architectures"):
        return "the extension was built without CUDA (no nvcc, or PyTorch without CUDA, when jepa_fast was installed)"
    return _too_old("CUDA")


def _triton_missing(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu":  # only what tests and the compile gate do: the interpreter, or compiling without launching
        is_emulated = "triton" in _EMULATED or ("triton" in sys.modules and sys.modules["triton"].knobs.runtime.interpret)
        return None if is_emulated else "not for cpu tensors"
    return _too_old("Triton")


def emulate(backend: str, library: object = None) -> None:
    """Let `backend` ("cuda" or "triton") take CPU tensors in this process: for tests and the compile gate only.

    For "cuda", `library` has the raw ops, csrc/cuda built for the host.
    """
    _EMULATED[backend] = library


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
    TABLE[name] = {key: row.get(key, Missing("not written yet")) for key in BACKENDS}
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args):
        device = next((arg.device.type for arg in _tensors(args)), "cpu")
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
    able = [row[backend] for backend in ORDER.get(device, ("plain",)) if why_not(row[backend], device, args) is None]
    for implementation in able[:-1]:  # the last one is plain, which is not what a faster one is passed over for
        if implementation.slower is None or not implementation.slower.holds(*args):
            return implementation
    return able[0]


def why_not(implementation: Implementation | Missing, device: str, args: tuple | None = None) -> str | None:
    """Why an implementation cannot run on a device (and with these arguments); None where it can."""
    if isinstance(implementation, Missing):
        return implementation.reason
    if device not in implementation.devices:
        return f"not for {device} tensors"
    reason = implementation.missing(device)
    return reason or (implementation.supports(*args) if args is not None else None)


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

    A value that does not fit fails an assertion on the device, which ends its context: for debugging. Elsewhere what an op
    does with such a value on a GPU is undefined.
    """
    _CHECKED_ON_DEVICE.append(None)
    try:
        yield
    finally:
        _CHECKED_ON_DEVICE.pop()


def info(device: str) -> list[tuple[str, str, dict[str, str]]]:
    """For each op: its name, the backend that would run on `device`, and why the others would not."""
    rows = []
    for name, row in TABLE.items():
        reasons = {backend: why_not(row[backend], device) for backend in BACKENDS}
        order = ORDER.get(device, ("plain",))
        chosen = next(backend for backend in order if reasons[backend] is None)
        others = {backend: reason or ("slower here" if backend in order else "not tried on this device")
                  for backend, reason in reasons.items() if backend != chosen}
        slower = getattr(row[chosen], "slower", None)
        second = next((b for b in order if b in others and reasons[b] is None and b != "plain"), None)
        if slower and second:
            others[second] = f"used for {slower.when}, slower otherwise"
        rows.append((name, chosen, others))
    return rows


def _tensors(args: tuple) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))
