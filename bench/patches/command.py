"""`jepa-fast bench patches [--official FOLDER] [--only WORD]`: every patch, before and after, in one run."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import pathlib
import subprocess
import sys
from typing import Annotated, Literal

import tyro

from ..measure import provenance
from . import hugging_face, official_images, official_videos, sigregs, timm_lightly, world_models
from .task import Case, Disagreement, measure

FAMILIES = {"ijepa": official_images, "vjepa": official_videos, "hf": hugging_face, "timm": timm_lightly,
            "sigreg": sigregs, "lewm": world_models}


@dataclasses.dataclass(frozen=True)
class Arguments:
    family: Annotated[Literal["all", "ijepa", "vjepa", "hf", "timm", "sigreg", "lewm"], tyro.conf.Positional] = "all"
    # a folder with checkouts of the official repositories: ijepa, jepa, vjepa2, vjepa2_1, lejepa, eb_jepa,
    # stable-pretraining, stable-worldmodel; without one, what needs it is left out
    official: pathlib.Path | None = None
    only: str = ""                       # cases whose patch, name and work contain this
    precision: Literal["both", "fp32", "bf16"] = "both"
    repeats: int = 5                     # rounds over before and after
    out: pathlib.Path | None = None      # also write the rows as JSON here
    add: bool = False                    # to the rows that are there, instead of replacing them


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, prog="jepa-fast bench patches", args=argv)
    logging.disable(logging.WARNING)  # official code logs its models
    rows, used, left_out, wrong = [], [], {}, {}
    for case in cases(arguments):
        label = f"{case.patch}: {case.name}, {case.what}"
        missing = why_missing(case, arguments.official)
        if missing:
            left_out[label] = missing
            continue
        used.append(case)
        for precision in case.precisions:
            if arguments.precision in ("both", precision):
                print(f"{label}, {precision}", file=sys.stderr, flush=True)
                try:
                    rows += measure(case, precision, arguments.official, arguments.repeats)
                except Disagreement as error:  # the others are measured all the same
                    wrong[f"{label}, {precision}"] = str(error)
    where = provenance() | versions(used, arguments.official)
    from ..command import table

    print(table(rows, f"patches · {where['device']} · torch {where['torch']} · commit {where['commit']}"))
    for label, missing in left_out.items():
        print(f"left out: {label} ({missing})")
    if arguments.out:
        write(arguments.out, {"provenance": where, "rows": rows, "left_out": left_out | wrong}, arguments.add)
        print(f"rows: {arguments.out}")
    if wrong:
        raise SystemExit("\n".join(f"not timed: {label}: {why}" for label, why in wrong.items()))


def cases(arguments: Arguments) -> list[Case]:
    found = [case for family, module in FAMILIES.items() if arguments.family in ("all", family) for case in module.cases()
             if arguments.only in f"{case.patch}: {case.name}, {case.what}"]
    if not found:
        raise ValueError(f"no case of {arguments.family} contains {arguments.only!r}")
    return found


def why_missing(case: Case, official: pathlib.Path | None) -> str | None:
    if case.checkout and (official is None or not (official / case.checkout).is_dir()):
        return f"--official must have {case.checkout}"
    missing = [name for name in case.packages if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}" if missing else None


def versions(used: list[Case], official: pathlib.Path | None) -> dict[str, str]:
    """Of the packages and checkouts that were measured."""
    packages = {name: importlib.metadata.version(name) for case in used for name in case.packages}
    folders = {case.checkout for case in used if case.checkout}
    return packages | {name: head_of(official / name) for name in sorted(folders)}


def head_of(checkout: pathlib.Path) -> str:
    result = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def write(path: pathlib.Path, results: dict, add: bool) -> None:
    if add and path.exists():
        before = json.loads(path.read_text())
        measured = {(row["bench"], row["case"]) for row in results["rows"]}
        results["rows"] = [row for row in before["rows"] if (row["bench"], row["case"]) not in measured] + results["rows"]
        results["provenance"] = before["provenance"] | results["provenance"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
