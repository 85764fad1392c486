"""Write the tables of results:  python -m bench.report

Demos, whole steps and GPUs into the README, everything else into bench/results/tables.md.

Reads bench/results/*.json, bench/results/step/*/*/result.json and bench/results/gpu/*/; no number in those tables is typed
by hand.
"""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
BEGIN, END = "<!-- results: {} -->", "<!-- end of results: {} -->"


def bench_table() -> str:
    parts = []
    for path in sorted((ROOT / "bench/results").glob("*.json")):
        data = json.loads(path.read_text())
        if "rows" not in data or "provenance" not in data or path.stem == "patches-cpu":  # has a table of its own
            continue
        where = data["provenance"]
        parts.append(f"{path.stem}: {where['device']}, torch {where['torch']}, commit {where['commit']}\n")
        lines = ["| bench | case | code | ms (p20 – p80) | × faster | GB/s | peak MB |", "|---|---|---|---|---|---|---|"]
        for row in data["rows"]:
            rate, memory = (f"{row[key]:.1f}" if row.get(key) is not None else "" for key in ("gb_per_s", "peak_mb"))
            spread = f" ({row['p20_ms']:.3f} – {row['p80_ms']:.3f})" if "p20_ms" in row else ""
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            lines.append(f"| {row['bench']} | {row['case']} | {row['provider']} | {row['ms']:.3f}{spread} | {ratio} "
                         f"| {rate} | {memory} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def step_table() -> str:
    """Whole steps: bench/results/step/<device>/<case>/result.json."""
    from .step.page import ratios

    parts = []
    results = ROOT / "bench/results"
    for path in sorted([*results.glob("step/*/*/result.json"), *results.glob("gpu/*/step/*/result.json")]):
        result = json.loads(path.read_text())
        where, official = result["provenance"], result["official_commit"]
        peak = "PyTorch's product of this run" if result["device"] == "cpu" else result["peak_is"]
        lines = [(row["provider"], f"{row['ms']:.0f} ({row['p20_ms']:.0f} – {row['p80_ms']:.0f})",
                  f"{row['samples_per_s']:.2f}", *(_cell(row[key], ".2f") for key in ("x_official", "x_tuned")),
                  *(_cell(row[key] and 100 * row[key], ".0f") for key in ("mfu", "hfu")), row.get("launches", ""),
                  f"{row['peak_bytes'] / 1e6:.0f}") for row in ratios(result)]
        parts.append(f"step {result['case']}: {where['device']}, torch {where['torch']}, commit {where['commit']}"
                     f"{f', official at {official}' if official else ''}; MFU against "
                     f"{result['peak_flop_per_s'] / 1e12:.2f} TFLOP/s, {peak}\n")
        operators = "operators" if result["device"] == "cpu" else "launches"
        parts.append(markdown(("code", "ms (p20 – p80)", "samples/s", "× official", "× tuned", "MFU %", "HFU %", operators,
                               "peak MB"), lines))
    return "\n".join(parts)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def demo_table() -> str:
    """The tables of every demo: eval.json or plan.json of its run, kept under the recipe's name."""
    parts = []
    for path in sorted((ROOT / "bench/results/demo").glob("*.json")):
        data = json.loads(path.read_text())
        parts += [f"{table['title']}\n\n" + markdown(tuple(table["header"]), table["rows"])
                  for table in (data, *data.get("more", []))]
    return "\n".join(parts)


def patches_table() -> str:
    """bench/results/patches-cpu.json: one line per case; a ratio below 1 is a patch that loses."""
    path = ROOT / "bench/results/patches-cpu.json"
    if not path.exists():
        return "Not measured yet: `jepa-fast bench patches --official FOLDER --out bench/results/patches-cpu.json`.\n"
    data = json.loads(path.read_text())
    cases: dict[tuple, dict] = {}
    for row in data["rows"]:
        cases.setdefault((row["bench"], row["case"]), {})[row["provider"]] = row
    lines = [patch_cells(*key, providers) for key, providers in cases.items()]
    where = dict(data["provenance"])
    known = {key: where.pop(key) for key in ("device", "torch", "python", "commit")}
    return (f"{known['device']}, torch {known['torch']}, commit {known['commit']}; patched: "
            f"{', '.join(f'{name} {version}' for name, version in where.items())}\n\n"
            + markdown(("patch", "case", "before, ms (p20 – p80)", "after, ms (p20 – p80)", "× faster", "goal",
                        "peak MB before", "after", "× faster with"), lines))


def patch_cells(patch: str, case: str, providers: dict[str, dict]) -> tuple:
    before, after = providers["before"], providers["after"]
    more = "; ".join(f"{name.removeprefix('after, ')} {row['ratio']:.2f} ({row['peak_mb']:.0f} MB)"
                     for name, row in providers.items() if name not in ("before", "after"))
    digits = 0 if before["ms"] >= 100 else 1
    times = [f"{row['ms']:.{digits}f} ({row['p20_ms']:.{digits}f} – {row['p80_ms']:.{digits}f})" for row in (before, after)]
    goal = f"{after['goal']:g}{'' if after['ratio'] >= after['goal'] else ' (missed)'}" if "goal" in after else ""
    return (patch, case, *times, f"{after['ratio']:.2f}{' (slower)' if after['ratio'] < 1 else ''}", goal,
            f"{before['peak_mb']:.0f}", f"{after['peak_mb']:.0f}", more)


def gpu_table() -> str:
    """Goals and times of every bench/results/gpu/<device>/results.json; or that there are none."""
    from .gpu_page import TIME_COLUMNS, time_cells

    parts = []
    for path in sorted((ROOT / "bench/results/gpu").glob("*/results.json")):
        data = json.loads(path.read_text())
        where = data["provenance"]
        parts.append(f"{where['device']}, torch {where['torch']}, commit {where['commit']}; copy "
                     f"{where['copy_bytes_per_s'] / 1e12:.2f} TB/s, product {where['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s\n")
        goals = [(g["op"], g["case"], g["what"], f"{g['asked']:.2f}× {g['against']}",
                  "not measured" if g["measured"] is None else f"{g['measured']:.2f}×{'' if g['met'] else ' (missed)'}")
                 for g in data["goals"]]
        parts += [markdown(("op", "case", "pass", "goal", "measured"), goals),
                  markdown(TIME_COLUMNS, [time_cells(row) for row in data["times"]])]
    return "\n".join(parts) or "Not measured: no GPU was available yet. `python -m bench.on_gpu` measures it all.\n"


def markdown(columns: tuple, rows: list[tuple]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def put(text: str, name: str, table: str) -> str:
    """Replace what stands between the marks of `name`."""
    begin, end = BEGIN.format(name), END.format(name)
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}{end}", text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in (("demo", demo_table), ("steps", step_table), ("patches", patches_table), ("gpu", gpu_table)):
        text = put(text, name, table())
    readme.write_text(text)
    (ROOT / "bench/results/tables.md").write_text("# Ops, masks, planning, memory\n\nMeasured in one run each; "
                                                  "`× faster` than the first line of a case.\n\n" + bench_table())


if __name__ == "__main__":
    main()
