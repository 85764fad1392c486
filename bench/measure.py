"""Timing that can be trusted: providers checked against each other, interleaved, in one process, medians with spread."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider: median, and the 20th and 80th percentile of the repeats."""

    median: float
    p20: float
    p80: float


def interleaved(providers: dict[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 2,
                at_least_s: float = 0.05) -> dict[str, Timing]:
    """Time every provider in turn, `repeats` times round; a short call is repeated until it fills `at_least_s`."""
    calls = {}
    for name, call in providers.items():
        for _ in range(warmup):
            call()
        start = time.perf_counter()
        call()
        calls[name] = max(1, round(at_least_s / max(time.perf_counter() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, call in providers.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: Timing(statistics.median(values), _percentile(values, 0.2), _percentile(values, 0.8))
            for name, values in seconds.items()}


def _percentile(values: list[float], fraction: float) -> float:
    return sorted(values)[round(fraction * (len(values) - 1))]


def agree(results: dict[str, list[Tensor]], rtol: float) -> None:
    """Raise unless all providers computed the same, relative to the size of each tensor: timing liars is worthless."""
    names = list(results)
    for name in names[1:]:
        for i, (ours, theirs) in enumerate(zip(results[name], results[names[0]], strict=True)):
            difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))
            if not difference <= rtol:
                raise AssertionError(f"{name} and {names[0]} disagree on result {i}: {difference:.2e} > {rtol:.0e}")


def peak_memory_bytes(call: Callable[[], object]) -> int:
    """Most memory that live tensors took during a call, above what was there before: from PyTorch's own allocator log."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def commit() -> str:
    """The commit that is checked out, with a plus where the tree differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict[str, str]:
    """What every row of results carries: device, versions, commit."""
    from jepa_fast.info import devices

    return {"device": devices()[-1], "torch": torch.__version__, "python": sys.version.split()[0], "commit": commit()}
