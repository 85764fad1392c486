"""What a bench of steps leaves: tables for the terminal, result.json, result.csv and a picture."""

import csv
import json
import pathlib

from jepa_fast.eval.table import Table, Tables

from .predictions import CPU_GOALS, GOALS, MODEL_BATCH, MODEL_MS
from .profile import COMPONENTS

COLORS = ("#1b4f8a", "#3f7fbf", "#8db8de", "#c8553d", "#e8b04b", "#8a9a5b", "#7d5ba6", "#b9bec4")


def ratios(result: dict) -> list[dict]:
    """Rows with how many times as fast each is as the official code, and as the faster tuned one; and utilisation."""
    rows = {row["provider"]: row for row in result["rows"]}
    official = next((rows[name]["ms"] for name in ("official", "official style") if name in rows), None)
    tuned = min((row["ms"] for name, row in rows.items() if name.startswith("tuned")), default=None)
    peak, flops = result["peak_flop_per_s"], result["model_flops"]
    out = []
    for row in result["rows"]:
        seconds = row["ms"] / 1e3
        done = row.get("flops")
        out.append(row | {"x_official": official and official / row["ms"], "x_tuned": tuned and tuned / row["ms"],
                          "mfu": flops and flops / seconds / peak, "hfu": done and done / seconds / peak})
    return out


def tables(result: dict) -> Tables:
    where, is_cpu = result["provenance"], result["device"] == "cpu"
    title = (f"{result['case']} · {where['device']} · torch {where['torch']} · commit {where['commit']}\n"
             f"product {result['ceilings']['flop_per_s'] / 1e12:.2f} TFLOP/s, copy "
             f"{result['ceilings']['copy_bytes_per_s'] / 1e9:.0f} GB/s; MFU and HFU are of {result['peak_is']}")
    header = ["code", "ms", "p20 – p80", "samples/s", "× official", "× tuned", "MFU %", "HFU %",
              "operators" if is_cpu else "launches", "host reads" if is_cpu else "stops", "host ms", "idle ms", "peak MB"]
    body = [[row["provider"], f"{row['ms']:.1f}", f"{row['p20_ms']:.1f} – {row['p80_ms']:.1f}",
             f"{row['samples_per_s']:.2f}", _number(row["x_official"], ".2f"),
             _number(row["x_tuned"], ".2f"), _number(row["mfu"], ".1f", 100),
             _number(row["hfu"], ".1f", 100), _number(row.get("launches"), "d"),
             _number(row.get("stops"), "d"),
             _number(row.get("host_ms"), ".1f"), _number(row.get("idle_ms"), ".1f"), f"{row['peak_bytes'] / 1e6:.0f}"]
            for row in ratios(result)]
    parts = [(row["provider"], row["components"]) for row in result["rows"] if "components" in row] + model_bars(result)
    split = [[name, *(f"{components[part]:.1f}" for part in COMPONENTS), f"{sum(components.values()):.1f}"]
             for name, components in parts]
    found = [Table(title, header, body), Table("ms of one profiled step", ["code", *COMPONENTS, "all"], split)]
    asked = goals(result)
    return Tables(found + ([Table("goals", ["goal", "asked", "measured"], asked)] if asked else []))


def model_bars(result: dict) -> list[tuple[str, dict[str, float]]]:
    """The performance model's reference and ideal, where it has this recipe at this size."""
    name = result["recipe"]
    if not result["is_official_size"] or MODEL_BATCH.get(name) != result["batch_size"] or result["device"] == "cpu":
        return []
    return [(label, dict(zip(COMPONENTS, ms, strict=True)))
            for label, ms in zip(("model: reference", "model: ideal"), MODEL_MS[name], strict=True)]


def goals(result: dict) -> list[list[str]]:
    ours = next((row for row in ratios(result) if row["provider"] == "ours"), None)
    if ours is None:
        return []
    if result["device"] == "cpu":
        goal = CPU_GOALS.get(result["family"]) if "-vits" in result["case"] else None
        asked = [("× official", goal, ours["x_official"])]
    else:
        official, tuned, mfu = GOALS.get(result["recipe"], (None, None, None))
        asked = [("× official", official, ours["x_official"]), ("× tuned", tuned, ours["x_tuned"]),
                 ("MFU", mfu, ours["mfu"])]
    return [[name, f"{goal:.2f}", _number(measured, ".2f") or "not measured"] for name, goal, measured in asked if goal]


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale if scale != 1 else value, form)


def write(result: dict, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    columns = ["provider", "ms", "p20_ms", "p80_ms", "samples_per_s", "x_official", "x_tuned", "mfu", "hfu", "launches",
               "stops", "host_ms", "idle_ms", "peak_bytes", *COMPONENTS]
    with (folder / "result.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | row.get("components", {}) for row in ratios(result))
    draw(result, folder / "result.png")


def draw(result: dict, path: pathlib.Path) -> None:
    """One bar for each provider, stacked by component and scaled to its median step."""
    from matplotlib.figure import Figure

    bars = [(row["provider"], _scaled(row), row["ms"]) for row in result["rows"] if "components" in row]
    bars += [(name, components, sum(components.values())) for name, components in model_bars(result)]
    figure = Figure(figsize=(8, 1.3 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for number, (_, components, total) in enumerate(bars):
        left = 0.0
        for component, color in zip(COMPONENTS, COLORS, strict=True):
            axes.barh(number, components[component], left=left, color=color, height=0.7,
                      label=component if number == 0 else None)
            left += components[component]
        axes.annotate(f" {total:.0f} ms", (left, number), va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="ms per step", title=f"{result['case']}, {result['provenance']['device']}")
    axes.title.set_fontsize(9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _scaled(row: dict) -> dict[str, float]:
    # profiling slows a step down: its parts are shown as shares of the step that was timed
    scale = row["ms"] / max(sum(row["components"].values()), 1e-9)
    return {name: value * scale for name, value in row["components"].items()}
