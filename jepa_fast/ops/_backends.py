"""The ways to compute an op, and what this machine lacks for each: C++, CUDA, Triton, others' code, plain PyTorch."""

import functools
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_EMULATED: dict[str, object] = {}  # "cuda" -> the library that runs csrc/cuda on the host: tests only


@dataclass(frozen=True)
class Slower:
    """Where the automatic choice passes over an implementation that could run: `holds(*args)`, described by `when`.

    On the devices of `always` it does so whatever the arguments are, and `when` says why.
    """

    when: str
    holds: Callable[..., bool]
    always: tuple[str, ...] = ()


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


def why_not(implementation: Implementation | Missing, device: str, args: tuple | None = None) -> str | None:
    """Why an implementation cannot run on a device (and with these arguments); None where it can."""
    if isinstance(implementation, Missing):
        return implementation.reason
    if device not in implementation.devices:
        return f"not for {device} tensors"
    reason = implementation.missing(device)
    return reason or (implementation.supports(*args) if args is not None else None)


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
    if not hasattr(raw, name):
        return Missing("the C++ extension was built from older sources: build it again")
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
        first = next(tensors_of(args), None)
        if first is None or not first.is_cuda:
            return launch(*args)
        with torch.cuda.device(first.device):
            return launch(*args)

    return Implementation(function, ("cpu", "cuda"), _only(dtypes, "Triton", supports), slower, _triton_missing)


def _only(dtypes, language: str, supports: Callable[..., str | None] | None) -> Callable[..., str | None]:
    def check(*args) -> str | None:
        for arg in tensors_of(args):
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


@functools.cache
def not_installed(module: str) -> str | None:
    """Why a module cannot be imported; None where it can."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def _triton_missing(device: str) -> str | None:
    if not_installed("triton"):
        return not_installed("triton")
    if device == "cpu":  # only what tests and the compile gate do: the interpreter, or compiling without launching
        is_emulated = "triton" in _EMULATED or ("triton" in sys.modules and sys.modules["triton"].knobs.runtime.interpret)
        return None if is_emulated else "not for cpu tensors"
    return _too_old("Triton")


def emulate(backend: str, library: object = None) -> None:
    """Let `backend` ("cuda" or "triton") take CPU tensors in this process: for tests and the compile gate only.

    For "cuda", `library` has the raw ops, csrc/cuda built for the host.
    """
    _EMULATED[backend] = library


def tensors_of(args: tuple) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))
