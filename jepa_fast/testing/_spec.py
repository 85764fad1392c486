"""What tests and benches need to know of an op, and the error rule.

An op is described once, in `testing/<op>.py`, by an `OpSpec`: its public function, cases, and how to make a random one.
tests/test_ops.py and bench/ find it in `testing.OPS`.
"""

import dataclasses
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .. import ops

Draw = Callable[[int, int], int]  # draw(low, high): an integer in [low, high], both included


@dataclass(frozen=True)
class Case:
    """Arguments for one call: `make(generator)` returns keyword arguments with float32 tensors."""

    name: str
    make: Callable[[torch.Generator], dict]
    is_large: bool = False  # too large for a GPU kernel that is interpreted on the CPU

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    function: Callable                        # the public function, called with keyword arguments
    ops: tuple[str, ...]                      # torch ops behind it, as in ops.TABLE; the first decides about backends
    cases: list[Case]                         # edges first, then sizes of real runs
    random_case: Callable[[Draw], Case]       # for the fuzz tests
    gradients: tuple[str, ...] = ()           # arguments that get a gradient
    mutates: tuple[str, ...] = ()             # arguments that the function changes in place
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    keep_dtype: tuple[str, ...] = ()          # arguments that stay as made (master weights, optimizer state, shadows)
    copies: bool = False                      # results must be bit-equal to plain, not only within the error rule
    floor: float = 1.0                        # errors below so many roundings count as none; more for differences
    bench: list[Case] = field(default_factory=list)  # shapes of official runs, to be timed
    gate: list[Case] = field(default_factory=list)   # small cases that reach every shipped configuration: compiled

    @property
    def name(self) -> str:
        return self.ops[0]

    def backends(self, device: str = "cpu") -> list[str]:
        """Backends that can run on a device; `plain` first."""
        row = ops.TABLE[self.name]
        return [backend for backend in ops.BACKENDS if ops.why_not(row[backend], device) is None]


def make(spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu") -> dict:
    """The arguments of a case in a dtype; the same numbers every time."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    arguments = case.make(generator)
    return {name: cast(value, None if name in spec.keep_dtype else dtype, device)
            for name, value in arguments.items()}


def cast(value, dtype: torch.dtype | None, device: str = "cpu"):
    """Floating tensors, alone or in a list, in another dtype (None: in theirs); always a copy. Else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(device, dtype if dtype and value.is_floating_point() else value.dtype)
    if isinstance(value, list):
        return [cast(item, dtype, device) for item in value]
    return value


def run(spec: OpSpec, arguments: dict, backend: str) -> dict[str, Tensor]:
    """Call the op on a backend; every output, every gradient and every tensor it changed, by name."""
    arguments = dict(arguments)
    inputs = {name: arguments[name].detach().requires_grad_() for name in spec.gradients
              if isinstance(arguments.get(name), Tensor)}
    arguments |= inputs
    with ops.use_backend(backend):
        out = spec.function(**arguments)
        outputs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        results = {f"out{i}": t for i, t in enumerate(outputs)}
        roots = [t for t in outputs if t.requires_grad]
        if roots and inputs:
            upstream = [_upstream(t) for t in roots]
            grads = torch.autograd.grad(roots, list(inputs.values()), upstream, allow_unused=True)
            results |= {f"grad {name}": g for name, g in zip(inputs, grads, strict=True) if g is not None}
    for name in spec.mutates:
        value = arguments.get(name)
        for i, t in enumerate(value if isinstance(value, list) else [value]):
            if t is not None:
                results[f"{name}[{i}]"] = t
    return {name: t.detach() for name, t in results.items()}


def _upstream(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, generator=generator).to(out.device, out.dtype)


def run_three_ways(spec: OpSpec, case: Case, backend: str, dtype: torch.dtype, device: str = "cpu"):
    """(ours, plain in the same dtype, plain in float64 on the same rounded numbers), each a dict of results."""
    arguments = make(spec, case, dtype, device)
    exact_arguments = {name: cast(value, torch.float64, device) for name, value in arguments.items()}
    copies = [{name: _copy(value) for name, value in arguments.items()} for _ in range(2)]
    ours, plain = run(spec, copies[0], backend), run(spec, copies[1], "plain")
    return ours, plain, run(spec, exact_arguments, "plain")


def _copy(value):
    if isinstance(value, Tensor):
        return value.clone()
    return [_copy(item) for item in value] if isinstance(value, list) else value


def error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, both in float64; infinite where either is not finite and the other is."""
    if not torch.equal(value.isfinite(), exact.isfinite()):
        return float("inf")
    value, exact = value.detach(), exact.detach()
    difference = torch.nan_to_num(value.double() - exact.double()).norm()
    scale = torch.nan_to_num(exact.double(), posinf=0.0, neginf=0.0).norm()
    return float(difference / scale if scale > 0 else difference)


def assert_within_error_rule(ours: dict, plain: dict, exact: dict, roundings: float = 1.0) -> None:
    """err(ours, float64) <= 2 * err(plain in the same dtype, float64) + a rounding (or more) of that dtype."""
    assert ours.keys() == plain.keys() == exact.keys()
    for name in ours:
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == plain[name].shape, name
        ours_error, plain_error = error(ours[name], exact[name]), error(plain[name], exact[name])
        floor = roundings * torch.finfo(ours[name].dtype).eps if ours[name].is_floating_point() else 0.0
        assert ours_error <= 2 * plain_error + floor, f"{name}: error {ours_error:.3e}, plain {plain_error:.3e}"


def random_draw(seed: int) -> Draw:
    return random.Random(seed).randint


def _copy_with_grad(value):
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


def replace_function(spec: OpSpec, function: Callable) -> OpSpec:
    return dataclasses.replace(spec, function=function)


def record_calls(spec: OpSpec, case: Case) -> list[tuple]:
    """The calls `(op, args, kwargs)` of jepa_fast ops that running a case makes, forward and backward."""
    calls: dict[str, tuple] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "jepa_fast":
                calls.setdefault(func.name(), (func, tree_map(_copy_with_grad, args), kwargs or {}))
            return func(*args, **(kwargs or {}))

    arguments = make(spec, case, torch.float32)
    with Recorder():
        run(spec, arguments, "plain")
    return list(calls.values())
