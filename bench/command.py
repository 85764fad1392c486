"""`jepa-fast bench ...`: measure, print, and keep the rows with device, versions and commit."""

import dataclasses
import json
import pathlib
from typing import Annotated, Literal

import torch
import tyro

from jepa_fast.eval.page import Table

from .measure import provenance

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Arguments:
    what: Annotated[Literal["ops", "blocks", "video-memory", "plan"], tyro.conf.Positional]
    repeats: int = 5                       # rounds over all providers
    only: str = ""                         # benches whose name contains this
    out: pathlib.Path | None = None        # also write the rows as JSON here


def main(argv: list[str]) -> None:
    if argv[:1] == ["step"]:
        from .step.command import main as bench_step

        bench_step(argv[1:])
        return
    if argv[:1] == ["scale"]:
        from .scale_command import main as bench_scale

        bench_scale(argv[1:])
        return
    if argv[:1] == ["patches"]:
        from .patches.command import main as bench_patches

        bench_patches(argv[1:])
        return
    arguments = tyro.cli(Arguments, prog="jepa-fast bench", args=argv)
    measure_rows = {"ops": ops_rows, "blocks": blocks_rows, "video-memory": video_memory_rows,
                    "plan": plan_rows}[arguments.what]
    rows = measure_rows(arguments)
    where = provenance()
    print(table(rows, f"{arguments.what} · {where['device']} · torch {where['torch']} · commit {where['commit']}"))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"provenance": where, "rows": rows}, indent=1) + "\n")
        print(f"rows: {arguments.out}")


def ops_rows(arguments: Arguments) -> list[dict]:
    from .ops import all_benches, measure

    torch.manual_seed(0)
    rows = []
    for make in all_benches():
        bench = make()
        if arguments.only in bench.name:
            rows += measure(bench, arguments.repeats)
    return rows


def blocks_rows(arguments: Arguments) -> list[dict]:
    from .blocks import bench_blocks

    if torch.cuda.is_available():
        return bench_blocks("cuda", "bf16", arguments.repeats, arguments.only)
    return bench_blocks("cpu", "fp32", arguments.repeats, arguments.only, max_tokens=2000)


def video_memory_rows(arguments: Arguments) -> list[dict]:
    from .video_memory import bench_video_memory

    return bench_video_memory()


def plan_rows(arguments: Arguments) -> list[dict]:
    from .planning import bench_planning

    return bench_planning(arguments.repeats, arguments.only)


def table(rows: list[dict], title: str) -> Table:
    def cell(row, key, form):
        return format(row[key], form) if row.get(key) is not None else ""

    body = [[row["bench"], row["case"], row["provider"], cell(row, "ms", ".3f"),
             f"{cell(row, 'p20_ms', '.3f')} – {cell(row, 'p80_ms', '.3f')}", cell(row, "ratio", ".2f"),
             cell(row, "gb_per_s", ".1f"), cell(row, "peak_mb", ".1f")] for row in rows]
    return Table(title, ["bench", "case", "provider", "ms", "p20 – p80", "× faster", "GB/s", "peak MB"], body)
