"""The stages of `python -m bench.on_gpu`, each run in a process of its own."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jepa_fast import ops, testing
from jepa_fast.info import versions

from .gpu_cases import GpuCase, all_cases, arguments_of
from .gpu_timing import Timer, measure_ceilings
from .measure import provenance
from .on_gpu import PART, Rows

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)  # what is cut off by a time limit comes last
OURS = {"cuda": ("cuda", "triton"), "cpu": ("cpp",)}


def device_of(arguments: argparse.Namespace) -> str:
    return "cpu" if arguments.rehearse else "cuda"


def ceilings(arguments: argparse.Namespace) -> None:
    def measured() -> dict:
        return provenance() | {"versions": versions(), "cuda": torch.version.cuda} | measure_ceilings(device_of(arguments))

    Rows(arguments.out / "ceilings.jsonl").measure("ceilings", measured)


def prove(arguments: argparse.Namespace) -> None:
    """Some cases of one op x backend x dtype against float64; with the first of them, the shapes to be timed, once, so that
    they compile."""
    name, _, first = arguments.op.rpartition("-")
    device, spec = device_of(arguments), testing.OPS[name]
    rows = Rows(arguments.out / f"prove-{arguments.op}.jsonl")
    cases = spec.cases[int(first):int(first) + (2 if arguments.rehearse else PART)]
    for dtype in sorted({*spec.dtypes, torch.float16}, key=DTYPES.index):
        for backend in [backend for backend in spec.backends(device) if backend != "plain"]:
            for case in cases:
                key = f"{spec.name} {case} {backend} {str(dtype).removeprefix('torch.')}"
                rows.measure(key, partial(_prove, spec, case, backend, dtype, device))
    if int(first) == 0 and not arguments.rehearse:
        for case in [case for case in all_cases() if case.op == spec.name]:
            rows.measure(f"compile {case.name}", partial(_compile, case, device))


def _prove(spec: testing.OpSpec, case: testing.Case, backend: str, dtype: torch.dtype, device: str) -> dict:
    try:
        ours, plain, exact = testing.run_three_ways(spec, case, backend, dtype, device)
    except RuntimeError as error:
        if "asked for, but" in str(error):
            return {"skipped": str(error).split(": ", 1)[-1]}
        raise
    row = {"error_ours": max((testing.error(ours[name], exact[name]) for name in ours), default=0.0),
           "error_plain": max((testing.error(plain[name], exact[name]) for name in ours), default=0.0)}
    try:
        testing.assert_within_error_rule(ours, plain, exact, spec.floor)
        assert not spec.copies or all(_same(ours[name], plain[name]) for name in ours), "a copy is not bit-equal"
        again = testing.run(spec, testing.make(spec, case, dtype, device), backend)
        assert all(_same(again[name], ours[name]) for name in ours), "two runs are not bit-equal"
    except AssertionError as error:
        row["error"] = str(error)
    return row


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _compile(case: GpuCase, device: str) -> dict:
    arguments = arguments_of(case, device)
    failed = {}
    for provider in providers_of(case, arguments):
        try:
            provider.with_gradients(case, arguments)
        except Exception as error:  # a peer that cannot is a row, not the end of the others
            failed[provider.name] = str(error)[:200]
    return {"failed": failed}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case."""

    name: str
    call: Callable[[], object]
    backend: str | None  # of ours: forced, in the backward pass too

    def results(self) -> list[Tensor]:
        """Without gradients."""
        with torch.no_grad():
            return self._run()

    def with_gradients(self, case: GpuCase, arguments: dict) -> list[Tensor]:
        """Results, then the gradients of the case's arguments, for the same random upstream gradient every time."""
        out = self._run()
        roots = [t for t in out if t.requires_grad]
        if not case.gradients or not roots:
            return out
        inputs = [arguments[name] for name in case.gradients]
        if self.backend is None:
            grads = torch.autograd.grad(roots, inputs, [upstream(t) for t in roots], allow_unused=True)
        else:
            with ops.use_backend(self.backend):
                grads = torch.autograd.grad(roots, inputs, [upstream(t) for t in roots], allow_unused=True)
        return [*out, *(grad for grad in grads if grad is not None)]

    def _run(self) -> list[Tensor]:
        if self.backend is None:
            out = self.call()
        else:
            with ops.use_backend(self.backend):
                out = self.call()
        return [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]


def providers_of(case: GpuCase, arguments: dict) -> list[Provider]:
    """Ours by backend, then whichever peers there are."""
    function, row = testing.OPS[case.op].function, ops.TABLE[case.op]
    device = next(t.device.type for t in _tensors(arguments))
    found = [Provider(name, partial(function, **arguments), name) for name in OURS[device]
             if ops.why_not(row[name], device) is None]
    peers = [(name, build(arguments)) for name, build in case.peers.items()]
    return found + [Provider(name, call, None) for name, call in peers if call is not None]


def _tensors(arguments: dict) -> list[Tensor]:
    values = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return [item for value in values for item in value if isinstance(item, Tensor)]


_upstream: dict[tuple, Tensor] = {}


def upstream(result: Tensor) -> Tensor:
    """A random gradient of a result, kept so that it is not part of what is timed."""
    key = (tuple(result.shape), result.dtype, result.device)
    if key not in _upstream:
        generator = torch.Generator(result.device).manual_seed(1)
        _upstream[key] = torch.randn(result.shape, device=result.device, generator=generator).to(result.dtype)
    return _upstream[key]


def time(arguments: argparse.Namespace) -> None:
    """Every op against every peer on the shapes of official runs."""
    device = device_of(arguments)
    rows, timer = Rows(arguments.out / "time.jsonl"), Timer(device)
    for case in all_cases():
        if arguments.op in case.op and not (arguments.rehearse and case.op != "gather_tokens"):
            _time_case(rows, timer, case, device)
            _upstream.clear()
            if device == "cuda":
                torch.cuda.empty_cache()


def _time_case(rows: Rows, timer: Timer, case: GpuCase, device: str) -> None:
    if f"{case.op} {case.name} timed" in rows.done:
        return
    arguments = arguments_of(case, device)
    agreed: dict[Provider, list[Tensor]] = {}
    for provider in providers_of(case, arguments):
        rows.measure(f"{case.op} {case.name} {provider.name} agrees", partial(_agree, case, arguments, provider, agreed))
    calls = {"forward": {provider.name: provider.results for provider in agreed}}
    if case.gradients:
        calls["forward and backward"] = {provider.name: partial(provider.with_gradients, case, arguments)
                                         for provider in agreed}
    agreed.clear()
    for what, named in calls.items():
        if named:
            rows.measure(f"{case.op} {case.name} {what}", partial(_timed, rows, timer, case, what, named))
    rows.add(f"{case.op} {case.name} timed")


def _agree(case: GpuCase, arguments: dict, provider: Provider, agreed: dict[Provider, list[Tensor]]) -> dict:
    """Adds a provider to those that are timed, if it computes what the first one does."""
    results = [t.detach() for t in provider.with_gradients(case, arguments)]
    if agreed and case.rtol is not None:
        difference = agree_with(results, next(iter(agreed.values())), case.rtol)
        if difference is not None:
            return {"error": f"differs from {next(iter(agreed)).name} by {difference:.1e}: not timed"}
    agreed[provider] = results if not agreed else []
    return {}


def agree_with(results: list[Tensor], expected: list[Tensor], rtol: float) -> float | None:
    """None where results are the same up to rtol, else how far apart they are."""
    errors = [testing.error(ours.float(), theirs.float()) for ours, theirs in zip(results, expected, strict=True)]
    return max(errors) if errors and max(errors) > rtol else None


def _timed(rows: Rows, timer: Timer, case: GpuCase, what: str, calls: dict[str, Callable]) -> dict:
    moved, flops = case.forward
    exponentials = case.exponentials
    if what != "forward":
        moved, flops, exponentials = moved + case.backward[0], flops + case.backward[1], 2 * exponentials
    for name, spent in timer.interleaved(calls).items():
        peak_mb = _peak_mb(calls[name]) if timer.is_cuda else None
        rows.add(f"{case.op} {case.name} {what} {name}", op=case.op, case=case.name, what=what, provider=name,
                 us=spent.cold, p20=spent.p20, p80=spent.p80, warm_us=spent.warm, graph_us=spent.graph, bytes=moved,
                 flops=flops, exponentials=exponentials, peak_mb=peak_mb)
    return {}


def _peak_mb(call: Callable) -> float:
    """Most memory that a call took, above what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def sanitized(arguments: argparse.Namespace) -> None:
    """Small cases of every CUDA op, for a checker that watches."""
    for spec in testing.OPS.values():
        if "cuda" in spec.backends("cuda"):
            small = [case for case in spec.cases if not case.is_large]
            for case in small[:4] + small[4:][-4:]:
                for dtype in (torch.float32, torch.bfloat16):
                    try:
                        testing.run(spec, testing.make(spec, case, dtype, "cuda"), "cuda")
                    except RuntimeError as error:
                        if "asked for, but" not in str(error):
                            raise
    torch.cuda.synchronize()


def compile_part(arguments: argparse.Namespace) -> None:
    from . import gpu_sweep
    gpu_sweep.compile_part(arguments)


def sweep(arguments: argparse.Namespace) -> None:
    from . import gpu_sweep
    gpu_sweep.sweep(arguments)


def page(arguments: argparse.Namespace) -> None:
    from .gpu_page import write
    write(arguments.out)


def blocks(arguments: argparse.Namespace) -> None:
    """Blocks by our ops and by torch.compile at the official widths; DIR/block_table.json names the faster ones."""
    from jepa_fast.train.step import architecture

    from .blocks import MANNERS, SHAPES, bench_blocks, write_table

    rows = Rows(arguments.out / "blocks.jsonl")
    if arguments.rehearse:  # without the compiler, which takes longer than all the rest
        manners = {name: how for name, how in MANNERS.items() if how[0] == "ops"}
        rows.measure("rehearsal", lambda: {"rows": bench_blocks(only="predictor", repeats=1, max_tokens=600,
                                                                manners=manners)})
        return
    for name in SHAPES:
        def measured(name: str = name) -> dict:
            found = bench_blocks("cuda", "bf16", only=name)
            write_table(found, architecture(torch.device("cuda")), arguments.out / "block_table.json")
            return {"rows": found}
        rows.measure(name, measured)
