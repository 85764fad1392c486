"""What every Triton kernel takes of every GPU it is shipped for, without having one:

    python -m bench.resources [--op gather_tokens] [--arch 80 90 100] [--out bench/results/resources.json]

Compiles each op's `gate` cases for sm_80, sm_90 and sm_100, reads registers, spills, shared
memory and tensor-core instructions, and ends with status 1 if a kernel spills, cannot fit, or does not use the tensor
cores that it should.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated

import torch
import tyro

from jepa_fast import ops, testing
from jepa_fast.ops._backends import Implementation, emulate

ARCHS = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Arguments:
    op: Annotated[str, tyro.conf.arg(help="this one; all where empty")] = ""
    arch: tuple[int, ...] = ARCHS
    out: Annotated[pathlib.Path | None, tyro.conf.arg(help="write the rows here, and a table beside it")] = None


def compiled_rows(spec: testing.OpSpec, arch: int) -> list[dict]:
    """One row per compiled variant of the kernels behind an op, and one for variants that take the same."""
    from .compile_only import compile_only, resources

    rows: dict[tuple, dict] = {}
    seen: set[str] = set()
    gate = spec.gate or {dtype: spec.cases[-1:] for dtype in DTYPES if dtype in spec.dtypes}
    for dtype, case in [(dtype, case) for dtype, cases in gate.items() for case in cases]:
        with compile_only(arch) as compiled:
            testing.run(spec, testing.make(spec, case, dtype), "triton")
        for key, (name, kernel) in compiled.items():
            if key not in seen:
                seen.add(key)
                taken = resources(name, kernel, arch)
                rows.setdefault((dtype, taken), {
                    "op": spec.name, "case": str(case), "dtype": str(dtype).removeprefix("torch."),
                    **dataclasses.asdict(taken), "problems": taken.problems()})
    return list(rows.values())


def gated_specs() -> list[testing.OpSpec]:
    return [spec for spec in testing.OPS.values() if isinstance(ops.TABLE[spec.name]["triton"], Implementation)]


def markdown(rows: list[dict], title: str) -> str:
    columns = ("kernel", "case", "dtype", "GPU", "registers", "spills", "shared memory", "warps", "stages", "tensor core")
    lines = [title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {row['kernel']} | {row['case']} | {row['dtype']} | sm_{row['arch']} | {row['registers']} | "
              f"{row['spill_bytes']} | {row['shared_bytes'] / 1024:.1f} KiB | {row['num_warps']} | {row['num_stages']} | "
              f"{row['tensor_core'] or ''} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, prog="python -m bench.resources", args=argv)
    import triton

    emulate("triton")
    specs = [spec for spec in gated_specs() if arguments.op in ("", spec.name)]
    if not specs:
        sys.exit(f"--op must be one of {', '.join(spec.name for spec in gated_specs())}, got {arguments.op!r}")
    rows = [row for spec in specs for arch in arguments.arch for row in compiled_rows(spec, arch)]
    title = f"{len(rows)} compiled kernels, triton {triton.__version__}, torch {torch.__version__}"
    print(markdown(rows, title))
    if arguments.out:
        arguments.out.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(markdown(rows, title))
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"{row['kernel']} ({row['case']}, {row['dtype']}) on sm_{row['arch']}: {'; '.join(row['problems'])}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
