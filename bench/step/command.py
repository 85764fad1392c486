"""`jepa-fast bench step --config RECIPE`: the same step by the official code, tuned PyTorch and ours."""

import dataclasses
import pathlib
import re
import tempfile
from typing import Literal

import torch
import tyro

from jepa_fast.recipes import get_recipe

from ..measure import provenance
from . import page, run, work
from .providers import NAMES, REPOSITORY

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "step"


@dataclasses.dataclass(frozen=True)
class Arguments:
    config: str = "ijepa_vits16"             # a recipe of I-JEPA, V-JEPA, V-JEPA 2, V-JEPA 2-AC or LeJEPA
    official: pathlib.Path | None = None     # checkout of the authors' repository; None: the step written again
    size: tyro.conf.OmitArgPrefixes[work.Size] = work.Size()
    precision: Literal["auto", "fp32", "bf16"] = "auto"   # auto: the recipe's on a GPU, fp32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    providers: tuple[str, ...] = ()          # names as in the table; see providers.NAMES
    rounds: int = 7                          # of all providers in turn
    steps: int = 0                           # of each in a round; 0: 1 on a CPU, 5 on a GPU
    warmup: int = -1                         # steps before the first round; -1: 1 on a CPU, 10 on a GPU
    one_at_a_time: bool = False              # where not all fit on the device at once
    out: pathlib.Path | None = None          # folder of result.json, .csv and .png; None: bench/results/step/DEVICE/CASE


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, prog="jepa-fast bench step", args=argv)
    result = bench(arguments)
    folder = arguments.out or RESULTS / slug(result["device"]) / result["case"]
    page.write(result, folder)
    print(page.tables(result), f"written: {folder}", sep="\n")


def bench(arguments: Arguments) -> dict:
    """Everything that was measured, as it is saved."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe, is_cuda = get_recipe(arguments.config), device == "cuda"
    precision = arguments.precision if arguments.precision != "auto" else recipe.train.precision if is_cuda else "fp32"
    check(arguments, recipe, precision, is_cuda)
    plan = run.Plan(providers=arguments.providers or default_providers(arguments.official is not None, is_cuda),
                    official=arguments.official, rounds=arguments.rounds, steps=arguments.steps or (5 if is_cuda else 1),
                    warmup=arguments.warmup if arguments.warmup >= 0 else (10 if is_cuda else 1),
                    one_at_a_time=arguments.one_at_a_time)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        task = work.make(pathlib.Path(folder), recipe, arguments.size, precision=precision, device=device,
                         num_steps=plan.num_steps)
        ceilings = run.measure_ceilings(torch.device(device), precision)
        if is_cuda:
            torch.cuda.empty_cache()
        rows, left_out = run.measure(task, plan)
        return describe(task, arguments, plan, ceilings, rows, left_out)


def check(arguments: Arguments, recipe, precision: str, is_cuda: bool) -> None:
    unknown = set(arguments.providers) - set(NAMES)
    if unknown:
        raise ValueError(f"providers must be of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if "ours, cached features" in arguments.providers and work.family_of(recipe) != "ac":
        raise ValueError(f"cached features are V-JEPA 2-AC's, got recipe {recipe.name}")
    if "official" in arguments.providers and arguments.official is None:
        repository = REPOSITORY[work.family_of(recipe)]
        raise ValueError(f"provider official needs --official PATH, a checkout of github.com/{repository}")
    if arguments.rounds < 1 or arguments.steps < 0:
        raise ValueError(f"rounds must be at least 1 and steps at least 0, got {arguments.rounds} and {arguments.steps}")
    if arguments.official is not None and precision == "bf16" and not is_cuda:
        raise ValueError("the official code computes in bfloat16 on a GPU only: pass --precision fp32")


def default_providers(has_official: bool, is_cuda: bool) -> tuple[str, ...]:
    base = ("official" if has_official else "official style", "tuned")
    # compiling takes minutes on a CPU, and there is no float8 product
    return (*base, "tuned, compiled", "ours", "ours+fp8") if is_cuda else (*base, "ours")


def describe(task: work.Work, arguments: Arguments, plan: run.Plan, ceilings: dict, rows: list[dict],
             left_out: dict[str, str]) -> dict:
    train, device = task.recipe.train, task.device
    first = run.CHECKED_STEPS + plan.warmup
    asked, ours = run.flops(task, range(first, first + min(plan.rounds * plan.steps, 8)))
    for row in rows:
        if "flops" in row:  # counted in the last step; others have other masks
            row["flops"] *= asked / run.flops(task, [task.num_steps - 1])[0]
        elif row["provider"] in ("ours", "ours+fp8"):
            row["flops"] = ours
    peak, peak_is = run.peak_of(device, train.precision, ceilings)
    is_cuda = device.type == "cuda"
    return {"case": case_name(task), "recipe": task.recipe.name, "family": task.family, "batch_size": train.batch_size,
            "precision": train.precision, "device": torch.cuda.get_device_name() if is_cuda else "cpu",
            "is_official_size": arguments.size == work.Size() or arguments.size == work.Size(batch_size=train.batch_size),
            "rounds": plan.rounds, "steps": plan.steps, "is_interleaved": not plan.one_at_a_time,
            "official_commit": run.commit_of(plan.official), "provenance": provenance(), "ceilings": ceilings,
            "peak_flop_per_s": peak, "peak_is": peak_is,
            "model_flops": asked, "rows": rows,
            "left_out": left_out}


def case_name(task: work.Work) -> str:
    """As ijepa_vits16-vits16-224-b16-fp32, video with its frames."""
    encoder, train = task.recipe.objective.encoder, task.recipe.train
    widths = {width: name for name, (width, *_) in work.ENCODERS.items()} | {1408: "g"}
    letter = widths.get(encoder.embed_dim, f"{encoder.embed_dim}-")
    frames = f"{encoder.num_frames}x" if task.family in ("vjepa", "vjepa2") else ""
    return (f"{task.recipe.name}-vit{letter}{encoder.patch_size}-{frames}{encoder.image_size}-b{train.batch_size}"
            f"-{train.precision}")


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")
