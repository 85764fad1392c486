"""Write the tables of results into the README:  python -m bench.report

Reads bench/results/*.json; no number in those tables is typed by hand.
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
        if "rows" not in data or "provenance" not in data:
            continue
        where = data["provenance"]
        parts.append(f"{path.stem}: {where['device']}, torch {where['torch']}, commit {where['commit']}\n")
        lines = ["| bench | case | code | ms (p20 – p80) | × faster | GB/s | peak MB |", "|---|---|---|---|---|---|---|"]
        for row in data["rows"]:
            rate, memory = (f"{row[key]:.1f}" if row.get(key) is not None else "" for key in ("gb_per_s", "peak_mb"))
            lines.append(f"| {row['bench']} | {row['case']} | {row['provider']} | {row['ms']:.3f} ({row['p20_ms']:.3f} – "
                         f"{row['p80_ms']:.3f}) | {row['ratio']:.2f} | {rate} | {memory} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def demo_table() -> str:
    data = json.loads((ROOT / "bench/results/demo/eval.json").read_text())
    header = "| " + " | ".join(data["header"]) + " |\n|" + "---|" * len(data["header"])
    return f"`make demo`: {data['title']}\n\n" + header + "\n" + "\n".join("| " + " | ".join(row) + " |"
                                                                          for row in data["rows"]) + "\n"


def put(text: str, name: str, table: str) -> str:
    """Replace what stands between the marks of `name`."""
    begin, end = BEGIN.format(name), END.format(name)
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}{end}", text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    text = put(put(readme.read_text(), "demo", demo_table()), "bench", bench_table())
    readme.write_text(text)


if __name__ == "__main__":
    main()
