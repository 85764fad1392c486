"""One page of what `python -m bench.on_gpu` measured: DIR/results.json, DIR/index.html, DIR/roofline.png."""

import json
import pathlib
from html import escape

MUFU_PER_CLOCK = 16  # exponentials per multiprocessor and clock: sm_80 to sm_100
CLOCK_HZ = 1.75e9    # of an H100 or H200 at work
GOALS = [  # (op, case or "" for all, what, kind, factor)
    ("gather_tokens", "", "forward", "floor", 0.9),
    ("scatter_tokens", "", "forward", "floor", 0.9),
    ("gather_patches", "", "forward", "floor", 0.9),
    ("latent_loss", "", "forward", "floor", 0.9),
    ("layer_norm", "", "forward", "floor", 0.9),
    ("adamw_ema_", "", "forward", "floor", 0.9),
    ("varlen_attention_qkv", "", "forward and backward", "best peer", 1.0),
    ("varlen_attention_qkv", "ijepa-h14-b128-predictor", "forward and backward", "best peer", 1.3),
    ("varlen_attention_qkv", "ijepa-h14-b128-target", "forward and backward", "best peer", 1.3),
    ("sigreg_sums", "", "forward and backward", "eager", 30.0),
    ("sigreg_sums", "", "forward and backward", "torch.compile", 4.0),
    ("sigreg_sums", "lejepa-8x256x512-k4096", "forward and backward", "floor", 1 / 2.5),
    ("sigreg_sums", "tokens-1x65536x384-k1024", "forward and backward", "100 MB", 1.0),
]
OURS = ("cuda", "triton", "cpp")


def gather(folder: pathlib.Path) -> dict:
    """Everything in the folder's row files."""
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    ceilings = next((row for row in rows.get("ceilings", []) if "copy_bytes_per_s" in row), {})
    proofs = [row for name, lines in sorted(rows.items()) if name.startswith("prove-") for row in lines if "key" in row]
    timed = [row | {"floor_us": floor_us(row, ceilings)} for row in rows.get("time", []) if "us" in row]
    failed = [row for row in rows.get("time", []) if "error" in row]
    return {"provenance": ceilings, "proofs": proofs, "times": timed, "not_timed": failed, "goals": goals(timed),
            "sanitize": [row for row in rows.get("sanitize", []) if "key" in row], "sweep": rows.get("sweep", []),
            "steps": [row for row in rows.get("step", []) if "key" in row]}


def floor_us(row: dict, ceilings: dict) -> float | None:
    """The least time the device could take: bytes, products or exponentials, whichever is the limit."""
    if not ceilings:
        return None
    exponentials_per_s = ceilings.get("multiprocessors", 0) * MUFU_PER_CLOCK * CLOCK_HZ
    seconds = [row["bytes"] / ceilings["copy_bytes_per_s"], row["flops"] / ceilings["bf16_flop_per_s"]]
    if exponentials_per_s:
        seconds.append(row["exponentials"] / exponentials_per_s)
    return max(seconds) * 1e6


def goals(timed: list[dict]) -> list[dict]:
    """Each goal on each case: asked, measured, met; "not measured" where there is no row."""
    found = []
    for op, only, what, against, asked in GOALS:
        cases = sorted({row["case"] for row in timed if row["op"] == op and only in row["case"]}) or [only or "all"]
        for case in cases:
            rows = {row["provider"]: row for row in timed
                    if (row["op"], row["case"], row["what"]) == (op, case, what)}
            ours = min((row["us"] for name, row in rows.items() if name in OURS), default=None)
            if against == "floor":
                base = next((row["floor_us"] for row in rows.values()), None)
            elif against == "best peer":
                base = min((row["us"] for name, row in rows.items() if name not in OURS), default=None)
            else:
                base = rows.get(against, {}).get("us")
            if against == "100 MB":
                peaks = [row.get("peak_mb") for name, row in rows.items() if name in OURS]
                ours, base = min(filter(None, peaks), default=None), 100.0
            measured = base / ours if ours and base else None
            found.append({"op": op, "case": case, "what": what, "against": against, "asked": asked, "measured": measured,
                          "met": None if measured is None else measured >= asked})
    return found


def write(folder: pathlib.Path) -> None:
    data = gather(folder)
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    picture = draw(data["times"], folder / "roofline.png")
    (folder / "index.html").write_text(html(data, picture), encoding="utf-8")
    wrong = [row for row in data["proofs"] if row.get("error")]
    proven = [row for row in data["proofs"] if "error_ours" in row and not row.get("error")]
    print(f"{len(proven)} proofs hold, {len(wrong)} do not; {len(data['times'])} times; {folder / 'index.html'}")


def draw(timed: list[dict], path: pathlib.Path) -> bool:
    """Measured time over the floor of each case: on the diagonal a kernel does all that the device can."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in timed if row["floor_us"]]
    if not rows:
        return False
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for provider in sorted({row["provider"] for row in rows}, key=lambda name: (name not in OURS, name)):
        points = [(row["floor_us"], row["us"]) for row in rows if row["provider"] == provider]
        axes.scatter(*zip(*points, strict=True), s=30 if provider in OURS else 14, label=provider,
                     marker="o" if provider in OURS else "x")
    ends = [min(row["floor_us"] for row in rows) / 2, max(row["floor_us"] for row in rows) * 2]
    for share in (1.0, 0.5, 0.1):
        axes.plot(ends, [end / share for end in ends], color="0.7", linewidth=1)
        axes.annotate(f"{share:.0%}", (ends[1], ends[1] / share), color="0.4", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="floor: bytes, products or exponentials (µs)",
             ylabel="measured, cold L2 (µs)")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def html(data: dict, has_picture: bool) -> str:
    where = data["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in where.get("versions", {}).items())
    parts = [f"<h1>{escape(str(where.get('device', 'no device')))}</h1>",
             f"<p>{escape(versions)}; CUDA {where.get('cuda')}; commit {where.get('commit')}</p>"]
    if where:
        parts.append(f"<p>Ceilings of this run: copy {where['copy_bytes_per_s'] / 1e12:.2f} TB/s, 8192³ bfloat16 product "
                     f"{where['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s.</p>")
    if has_picture:
        parts.append('<img src="roofline.png" alt="measured time over the floor" style="max-width: 100%">')
    parts += ["<h2>Goals</h2>", table(("op", "case", "pass", "against", "asked", "measured"), [
        (g["op"], g["case"], g["what"], g["against"], f"{g['asked']:.2f}×",
         "not measured" if g["measured"] is None else f"{g['measured']:.2f}× {'met' if g['met'] else 'missed'}")
        for g in data["goals"]])]
    parts += ["<h2>Times</h2>", table(TIME_COLUMNS, [time_cells(row) for row in data["times"]])]
    if data["steps"]:
        parts += ["<h2>Whole steps</h2>", table(("recipe", "ms"), [(row["key"], row.get("error") or step_text(row))
                                                                   for row in data["steps"]])]
        parts += [f'<img src="step/{row["key"]}/result.png" alt="{row["key"]} by component" style="max-width: 100%">'
                  for row in data["steps"] if "ms" in row]
    wrong = [(row["key"], row["error"]) for row in [*data["proofs"], *data["not_timed"]] if row.get("error")]
    proven = [row for row in data["proofs"] if "error_ours" in row and not row.get("error")]
    parts += [f"<h2>Proofs</h2><p>{len(proven)} of case × backend × dtype hold against float64.</p>",
              table(("what failed", "how"), wrong) if wrong else ""]
    parts += ["<h2>Checkers</h2>", table(("tool", "result"), [(row["key"], row.get("result") or row.get("error"))
                                                               for row in data["sanitize"]])]
    style = "body{font:15px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}" \
            "td,th{padding:.2rem 1rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;white-space:nowrap}" \
            "table{border-collapse:collapse;display:block;overflow-x:auto}"
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>jepa_fast on a GPU</title><style>{style}</style>'
            f"<body>{''.join(parts)}</body></html>\n")


def step_text(row: dict) -> str:
    return f"{row['case']}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in row["ms"].items())


TIME_COLUMNS = ("op", "case", "pass", "code", "µs (p20 – p80)", "warm L2", "graph", "floor", "share of floor", "GB/s",
                "TFLOP/s")


def time_cells(row: dict) -> tuple:
    floor, graph = row["floor_us"], row["graph_us"]
    return (row["op"], row["case"], row["what"], row["provider"], f"{row['us']:.1f} ({row['p20']:.1f} – {row['p80']:.1f})",
            f"{row['warm_us']:.1f}", f"{graph:.1f}" if graph else "", f"{floor:.1f}" if floor else "",
            f"{floor / row['us']:.0%}" if floor else "", f"{row['bytes'] / row['us'] / 1e3:.0f}",
            f"{row['flops'] / row['us'] / 1e6:.0f}" if row["flops"] else "")


def table(columns: tuple, rows: list[tuple]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
