"""A model of somebody else's at work, and the same after its patch."""

import contextlib
import copy
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jepa_fast.patches import Report

from ..checkouts import allow_torchvision
from ..measure import agree, interleaved, peak_memory_bytes

TOLERANCE = 1e-3  # relative to the size of what is compared: losses, outputs, and all gradients as one vector

Call = Callable[[], list[Tensor]]
Start = Callable[[nn.Module, Callable], Call]


class Disagreement(AssertionError):
    """A patched model computes something else."""


class Task(NamedTuple):
    """start(model, autocast) makes what is timed, a function that returns what must agree; it computes within autocast()."""

    model: nn.Module
    start: Start
    apply: Callable[[nn.Module], Report]
    more: tuple[tuple[str, Callable[[nn.Module], Report], Start], ...] = ()  # (what is added, apply, start): with pieces of
    #                                        ours where a patch cannot reach, or with options of the patch


@dataclasses.dataclass(frozen=True)
class Case:
    patch: str                             # module of jepa_fast.patches
    name: str                              # model, input size, batch size
    what: str                              # inference, training step, ...
    make: Callable                         # () or (checkout) -> context manager of a Task
    goal: float | None = None              # times faster, in float32
    checkout: str = ""                     # folder below --official that it needs
    packages: tuple[str, ...] = ()         # whose versions belong to the row
    precisions: tuple[str, ...] = ("fp32", "bf16")


class Switch:
    """A report's replacements, put in place and taken back again and again, with whatever they have cached."""

    def __init__(self, report: Report):
        self.replacements = list(report._replacements)
        self._take_back()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        for replacement in self.replacements:
            if isinstance(replacement.owner, dict):
                replacement.owner[replacement.name] = replacement.new
            else:
                setattr(replacement.owner, replacement.name, replacement.new)
        try:
            yield
        finally:
            self._take_back()

    def _take_back(self) -> None:
        for replacement in reversed(self.replacements):
            replacement.put_back()


def measure(case: Case, precision: str, official: pathlib.Path | None, repeats: int) -> list[dict]:
    """Rows "before", "after" and, where a task has more, "after, <what is added>"."""
    allow_torchvision()
    with case.make(*([official / case.checkout] if case.checkout else [])) as task:
        calls = dict(_calls(task, precision))
        results = {name: _results(call) for name, call in calls.items()}
        if precision == "fp32":
            try:
                agree(results, TOLERANCE)
            except AssertionError as error:
                raise Disagreement(*error.args) from None
        else:
            _, exact = next(_calls(task, "fp32"))
            _err_as_little(results, _results(exact))
        timings = interleaved(calls, repeats=repeats, warmup=0)  # all have run once
        peaks = {name: peak_memory_bytes(call) for name, call in calls.items()}
    rows = []
    for name, timing in timings.items():
        rows.append({"bench": case.patch, "case": f"{case.name}, {case.what}, {precision}", "provider": name,
                     "ms": 1e3 * timing.median, "p20_ms": 1e3 * timing.p20, "p80_ms": 1e3 * timing.p80,
                     "ratio": timings["before"].median / timing.median, "peak_mb": peaks[name] / 1e6})
        if case.goal and precision == "fp32" and name == "after":
            rows[-1]["goal"] = case.goal
    return rows


def _results(call: Call) -> list[Tensor]:
    torch.manual_seed(0)
    return [x.detach().clone() for x in call()]


def _err_as_little(results: dict[str, list[Tensor]], exact: list[Tensor]) -> None:
    """In half precision a patched model is as near to the original in float32 as the original is, or twice as far."""
    def error(x: Tensor, reference: Tensor) -> float:
        return float((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))

    for name, values in results.items():
        for i, (ours, theirs, reference) in enumerate(zip(values, results["before"], exact, strict=True)):
            if not error(ours, reference) <= 2 * error(theirs, reference) + TOLERANCE:
                raise Disagreement(f"{name} is further from float32 than before on result {i}: "
                                   f"{error(ours, reference):.2e}, before {error(theirs, reference):.2e}")


def _calls(task: Task, precision: str) -> Iterator[tuple[str, Call]]:
    """Each on a copy of the model of its own; patches are in place only while their calls run."""
    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")

    before = copy.deepcopy(task.model)
    yield "before", task.start(before, autocast)
    for name, apply, start in (("after", task.apply, task.start), *task.more):
        model = copy.deepcopy(task.model)
        switch = Switch(apply(model))
        yield (name if name == "after" else f"after, {name}"), _switched(switch, start(model, autocast))


def _switched(switch: Switch, call: Call) -> Call:
    def switched():
        with switch.on():
            return call()
    return switched


def gradients(model: nn.Module) -> Tensor:
    """All of them as one vector: some are 0 but for rounding."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def inference(forward: Callable[[nn.Module], Tensor | list[Tensor]]) -> Start:
    """forward(model) without gradients."""
    def start(model, autocast):
        model.eval()

        @torch.no_grad()
        def call():
            with autocast():
                out = forward(model)
            return list(out) if isinstance(out, (list, tuple)) else [out]
        return call
    return start


def training(loss_of: Callable[[nn.Module], Tensor], *, trained: Callable[[nn.Module], nn.Module] = lambda model: model,
             optimizer: Callable | None = None, after_step: Callable[[nn.Module], None] | None = None) -> Start:
    """Forward and backward of loss_of(model); with an optimizer(model), its step and after_step(model) too."""
    def start(model, autocast):
        model.train()
        steps = optimizer(model) if optimizer else None

        def call():
            with autocast():
                loss = loss_of(model)
            loss.backward()
            results = [loss, gradients(trained(model))] if first else [loss]
            first.clear()
            if steps is not None:
                steps.step()
                if after_step is not None:
                    after_step(model)
            model.zero_grad()
            return results

        first = [True]  # gradients are compared once; gathering them would be timed
        return call
    return start
