"""Which configuration of a kernel is the fastest on this GPU: compiled by several processes, timed by one.

The winners are written to DIR/tuned.json, in the form that the kernels load from kernels/tuned.json.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial

from jepa_fast.kernels import _tuned

from .gpu_cases import GpuCase, all_cases, arguments_of
from .gpu_stages import Provider, agree_with, device_of, providers_of
from .gpu_timing import Timer
from .on_gpu import WORKERS, Rows

# constants to try, by part of the key; the others of a kernel stay as they are
SPACES = {
    "backward": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    "short": {"BLOCK_M": (32, 64, 128), "num_warps": (2, 4, 8), "POLYNOMIAL": (0, 2, 4)},
    "long": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
}
KEEP = 1.03  # a winner is this much faster than what the kernel takes by itself


def trials(case: GpuCase, arguments: dict, provider: Provider) -> Iterator[tuple[str, str, dict]]:
    """(op, key, constants) for every kernel that the case runs."""
    with _tuned.asked() as found:
        provider.with_gradients(case, arguments)
    for op, key in found:
        kind = next(kind for kind in SPACES if kind in key)
        space = {name: values for name, values in SPACES[kind].items()
                 if not (kind == "backward" and "short" in key and name == "BLOCK_N")}
        for values in itertools.product(*space.values()):
            yield op, key, dict(zip(space, values, strict=True))


def swept_cases() -> list[GpuCase]:
    """The heads of the official runs, one case for each configuration that a kernel chooses."""
    return [case for case in all_cases() if case.op == "varlen_attention_qkv" and "64f" not in case.name]


def triton_of(case: GpuCase, arguments: dict) -> Provider | None:
    return next((provider for provider in providers_of(case, arguments) if provider.name == "triton"), None)


def compile_part(arguments: argparse.Namespace) -> None:
    """Every WORKERS-th trial, run once: compiled, and failures known."""
    part, device = int(arguments.op), device_of(arguments)
    rows, number = Rows(arguments.out / f"sweep-compile-{part}.jsonl"), 0
    for case in swept_cases():
        given = arguments_of(case, device)
        provider = triton_of(case, given)
        if provider is None:
            return
        for op, key, constants in list(trials(case, given, provider)):
            number += 1
            if number % WORKERS == part:
                rows.measure(_name(case, key, constants), partial(_run_once, case, given, provider, op, key, constants))


def _run_once(case: GpuCase, given: dict, provider: Provider, op: str, key: str, constants: dict) -> dict:
    with _tuned.trying(op, key, constants):
        provider.with_gradients(case, given)
    return {}


def _name(case: GpuCase, key: str, constants: dict) -> str:
    return f"{case.name} {key} {' '.join(f'{name}={value}' for name, value in constants.items())}"


def sweep(arguments: argparse.Namespace) -> None:
    device = device_of(arguments)
    rows, timer = Rows(arguments.out / "sweep.jsonl"), Timer(device, repeats=7)
    failed = set()
    for path in arguments.out.glob("sweep-compile-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        failed |= {line["key"] for line in lines if line.get("error")}
        failed |= {line["began"] for line in lines if "began" in line} - {line["key"] for line in lines if "key" in line}
    for case in swept_cases():
        given = arguments_of(case, device)
        provider = triton_of(case, given)
        if provider is None:
            rows.add("sweep", error="there is no Triton version here to sweep")
            return
        expected = provider.with_gradients(case, given)
        by_key: dict[tuple[str, str], list[dict]] = {}
        for op, key, constants in trials(case, given, provider):
            if _name(case, key, constants) not in failed:
                by_key.setdefault((op, key), []).append(constants)
        for (op, key), candidates in by_key.items():
            rows.measure(f"{case.name} {key}",
                         partial(_fastest, timer, case, given, provider, expected, op, key, candidates))
        write_winners(arguments)


def _fastest(timer: Timer, case: GpuCase, given: dict, provider: Provider, expected: list, op: str, key: str,
             candidates: list[dict]) -> dict:
    call = partial(provider.with_gradients, case, given) if "backward" in key else provider.results
    default = timer.interleaved({"": call})[""].cold
    best, fastest = {}, default
    for constants in candidates:
        with _tuned.trying(op, key, constants):
            if agree_with(provider.with_gradients(case, given), expected, case.rtol) is None:
                spent = timer.interleaved({"": call})[""].cold
                if spent < fastest:
                    best, fastest = constants, spent
    return {"op": op, "tuned": key, "default_us": default, "us": fastest, "constants": best}


def write_winners(arguments: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in (arguments.out / "sweep.jsonl").read_text().splitlines()]
    winners: dict = {}
    for row in rows:
        if row.get("constants") and row["default_us"] / row["us"] >= KEEP:
            winners.setdefault(row["op"], {}).setdefault(_tuned.architecture(), {})[row["tuned"]] = row["constants"]
    (arguments.out / "tuned.json").write_text(json.dumps(winners, indent=1, sort_keys=True) + "\n")
