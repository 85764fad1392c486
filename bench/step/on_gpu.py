"""The step benches of `python -m bench.on_gpu --stages step page`: official sizes on a GPU, one process and row each."""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from ..on_gpu import ROOT, Rows

# recipe and options, the largest gain that the performance model expects first
FULL = {
    "ijepa_vith14": [],
    "vjepa2_vitl16": [],
    "vjepa_vitl16": [],
    "vjepa2_ac_vitg": ["--providers", "{official}", "tuned", "ours", "ours, cached features"],
    # two encoders of a billion weights for each provider do not fit beside one another
    "vjepa2_vitg16": ["--one-at-a-time", "--providers", "{official}", "tuned", "ours", "ours+fp8"],
    "lejepa_minimal": ["--encoder", "vitl14", "--image-size", "224", "--batch-size", "64"],
}
SMALL = ["--device", "cpu", "--encoder", "vitt16", "--batch-size", "2", "--image-size", "160", "--predictor-depth", "1",
         "--providers", "tuned", "ours", "--rounds", "1", "--warmup", "0"]
CHECKOUTS = {"ijepa": "ijepa", "vjepa": "jepa", "vjepa2": "vjepa2", "lejepa": "lejepa"}
LIMIT_S = 240  # of one recipe


def steps(arguments: argparse.Namespace, limit_s: float) -> None:
    """Every recipe that has no row yet, as long as there is time; DIR/step/CASE has the table's numbers and the picture."""
    rows, deadline = Rows(arguments.out / "step.jsonl"), time.monotonic() + limit_s
    for recipe in list(FULL)[:1] if arguments.rehearse else FULL:
        left = deadline - time.monotonic()
        if left > 30:
            rows.measure(recipe, lambda recipe=recipe, left=left: measure(recipe, arguments, min(left, LIMIT_S)))


def measure(recipe: str, arguments: argparse.Namespace, limit_s: float) -> dict:
    checkout = arguments.official and arguments.official / CHECKOUTS[recipe.split("_")[0]]
    has_official = bool(checkout) and checkout.exists()
    options = SMALL if arguments.rehearse else \
        [option.format(official="official" if has_official else "official style") for option in FULL[recipe]]
    options = [*options, "--official", str(checkout.resolve())] if has_official else options
    folder = (arguments.out / "step" / recipe).resolve()
    command = [sys.executable, "-m", "jepa_fast.cli", "bench", "step", "--config", recipe, "--out", str(folder), *options]
    with (arguments.out / "step.log").open("a") as log:
        # providers end when their standard input does, also where this one is killed
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s)
    if done.returncode:
        raise RuntimeError(last_line(arguments.out / "step.log"))
    result = json.loads((folder / "result.json").read_text())
    return {"case": result["case"], "ms": {row["provider"]: row["ms"] for row in result["rows"]}}


def last_line(path: pathlib.Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:400] if lines else "it said nothing"
