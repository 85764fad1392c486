"""`jepa-fast bench scale`: the paper model of scale.py as a table, CSV, JSON and a picture, with all it assumes."""

import csv
import dataclasses
import json
import pathlib
from typing import Annotated, Literal

import tyro

from jepa_fast import recipes
from jepa_fast.eval._style import drawing
from jepa_fast.eval.table import Table

from .scale import MODES, Links, Run, Step, table
from .scale_inputs import IMAGENET_1K, step_of

RESULTS = pathlib.Path(__file__).parent / "results" / "scale"
# PIL decoding and cropping at 224 pixels, performance model section 3
IMAGES_PER_CORE_S = 135.0


@dataclasses.dataclass(frozen=True)
class Arguments:
    config: str = "ijepa_vith14"              # a recipe
    step_ms: float | None = None              # of one GPU, measured: `jepa-fast bench step`
    source: Annotated[pathlib.Path | None, tyro.conf.arg(name="from")] = None   # its result.json instead
    provider: str = "ours"                    # of that file
    batch_size: int | None = None             # samples in that step; None: the file's, or the recipe's mask_group_size
    batch: Literal["recipe", "grow"] = "recipe"   # the recipe's batch over all GPUs, or batch_size on every GPU
    samples_per_epoch: int | None = None      # None: the recipe's steps, or ImageNet-1k
    samples_per_core_s: float | None = None   # that a CPU core decodes; None: 135 for images, unknown for clips
    overlap: float = 0.9                      # of communication that can run beside computation
    jitter: float = 0.01                      # standard deviation of a GPU's step, besides that of masks
    max_gpus: int = 1024
    links: Links = Links()
    out: pathlib.Path | None = None           # folder of scale.json, .csv and .png; None: bench/results/scale/RECIPE


def main(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, prog="jepa-fast bench scale", args=argv)
    result = scale(arguments)
    folder = arguments.out or RESULTS / arguments.config
    write(result, folder)
    print(text_table(result), *(f"  {line}" for line in result["assumptions"]), f"written: {folder}", sep="\n")


def scale(arguments: Arguments) -> dict:
    """Rows and everything they rest on."""
    recipe = recipes.get_recipe(arguments.config)
    ms, batch_size, precision, measured = measured_step(arguments, recipe)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision=precision))
    step = step_of(recipe, ms, batch_size)
    train, is_image = recipe.train, "images" == noun_of(recipe)
    per_epoch = arguments.samples_per_epoch or (train.steps_per_epoch * train.batch_size if train.steps_per_epoch
                                                else IMAGENET_1K)
    per_core = arguments.samples_per_core_s or (IMAGES_PER_CORE_S if is_image else None)
    run = Run(samples=train.epochs * per_epoch, global_batch=train.batch_size if arguments.batch == "recipe" else None,
              overlap=arguments.overlap, jitter=arguments.jitter, samples_per_core_s=per_core)
    rows = table(step, run, arguments.links, arguments.max_gpus)
    return {"recipe": recipe.name, "noun": noun_of(recipe), "step": dataclasses.asdict(step), "run": dataclasses.asdict(run),
            "links": dataclasses.asdict(arguments.links), "rows": rows,
            "assumptions": assumptions(step, run, arguments.links, measured, per_epoch, train.epochs)}


def measured_step(arguments: Arguments, recipe: recipes.Recipe) -> tuple[float, int, str, str]:
    """Milliseconds, samples, precision, and where they are from."""
    if (arguments.step_ms is None) == (arguments.source is None):
        raise ValueError("pass either --step-ms MS, of one GPU, or --from FILE, the result.json of `jepa-fast bench step`")
    masking = getattr(recipe.objective, "masking", None)
    group = getattr(masking, "mask_group_size", None)
    if arguments.step_ms is not None:
        batch_size = arguments.batch_size or group
        if batch_size is None:
            raise ValueError("pass --batch-size, the samples in the step of --step-ms")
        return arguments.step_ms, batch_size, recipe.train.precision, f"{arguments.step_ms:g} ms as given"
    result = json.loads(arguments.source.read_text())
    row = next((row for row in result.get("rows", []) if row.get("provider") == arguments.provider), None)
    if row is None or "ms" not in row:
        found = ", ".join(sorted({str(row.get("provider")) for row in result.get("rows", [])})) or "none"
        raise ValueError(f"{arguments.source} has no row of provider {arguments.provider!r}; it has {found}")
    if result.get("recipe", recipe.name) != recipe.name:
        raise ValueError(f"{arguments.source} is of {result['recipe']}, not of {recipe.name}: pass --config "
                         f"{result['recipe']}")
    if not result.get("is_official_size", True):
        raise ValueError(f"{arguments.source} was measured at another size than the recipe's: {result.get('case')}")
    if arguments.batch_size not in (None, result["batch_size"]):
        raise ValueError(f"--batch-size {arguments.batch_size} is not that of {arguments.source}, {result['batch_size']}")
    return row["ms"], result["batch_size"], result["precision"], (
        f"{row['ms']:.4g} ms, measured: {arguments.provider} on {result['device']}, {arguments.source}")


def assumptions(step: Step, run: Run, links: Links, measured: str, per_epoch: float, epochs: float) -> list[str]:
    batch = "batch_size on every GPU" if run.global_batch is None else f"the recipe's batch of {run.global_batch}"
    decode = "not known for clips" if run.samples_per_core_s is None else f"{run.samples_per_core_s:g} samples/s per core"
    return [
        f"a paper model, not a measurement; step of {step.batch_size} samples on one GPU, {step.precision}: {measured}",
        f"compute in proportion to the samples per GPU, {batch}; {epochs:g} epochs of {per_epoch:,.0f} samples",
        f"links per GPU and direction: {links.node_gb_s:g} GB/s in a node of {links.gpus_per_node}, {links.network_gb_s:g} "
        f"GB/s between nodes, {100 * links.efficiency:g} % of both reached, {links.latency_us:g} us a round",
        f"gradients {4e-9 * step.trained:.2f} GB in float32; {100 * run.overlap:g} % of communication can be hidden; the "
        f"backward pass is {100 * step.backward_share:.0f} % of the step",
        f"slowest GPU: deviation {100 * step.deviation:.1f} % from masks, {100 * run.jitter:g} % from the machine",
        f"memory: {step.state_bytes() / 1e9:.1f} GB of state, {step.activation_bytes / 1e9:.1f} GB of activations; no "
        "pixels, no fragmentation",
        f"data always in time; decoding {decode}",
    ]


def noun_of(recipe: recipes.Recipe) -> str:
    return "clips" if hasattr(recipe.objective.encoder, "num_frames") else "images"


def text_table(result: dict) -> Table:
    body = [[f"{row['gpus']}", row["mode"], f"{row['samples_per_gpu']:g}{' <' if row['is_smaller_than_measured'] else ''}",
             f"{row['step_ms']:.1f}", f"{row['communication_ms']:.1f}", f"{row['exposed_ms']:.1f}",
             f"{row['straggling_ms']:.1f}", f"{row['samples_per_s']:,.0f}", f"{row['efficiency_percent']:.1f}",
             f"{row['hours']:,.1f}", f"{row['gpu_hours']:,.0f}", f"{row['memory_gb']:.1f}",
             "" if row["cores_per_gpu"] is None else f"{row['cores_per_gpu']:.1f}"] for row in result["rows"]]
    header = ["GPUs", "mode", f"{result['noun']}/GPU", "step ms", "comm. ms", "exposed ms", "straggling ms",
              f"{result['noun']}/s", "efficiency %", "hours", "GPU-hours", "GB/GPU", "cores/GPU"]
    return Table(f"{result['recipe']}: predicted, not measured (<: fewer samples per GPU than in the measured step)", header,
                 body)


def write(result: dict, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    with open(folder / "scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(result["rows"][0]))
        writer.writeheader()
        writer.writerows(result["rows"])
    draw(result, folder / "scale.png")


def draw(result: dict, path: pathlib.Path) -> None:
    """Samples per second, beside a straight line, and efficiency, against GPUs."""
    rows = result["rows"]
    with drawing(path, 8.0, 3.2) as figure:
        rate, efficiency = figure.subplots(1, 2)
        gpus = sorted({row["gpus"] for row in rows})
        one = 1e3 * result["step"]["batch_size"] / result["step"]["ms"]
        rate.plot(gpus, [one * n for n in gpus], color="0.75", linestyle="--", label="in proportion")
        for mode in MODES:
            own = [row for row in rows if row["mode"] == mode]
            rate.plot([row["gpus"] for row in own], [row["samples_per_s"] for row in own], marker="o", markersize=3,
                      label=mode)
            efficiency.plot([row["gpus"] for row in own], [row["efficiency_percent"] for row in own], marker="o",
                            markersize=3, label=mode)
        rate.set(title=f"{result['recipe']}, predicted", xlabel="GPUs", ylabel=f"{result['noun']} per second", yscale="log")
        efficiency.set(title="efficiency, predicted", xlabel="GPUs", ylabel="% of one GPU's rate", ylim=(0, 105))
        for ax in (rate, efficiency):
            ax.set_xscale("log", base=2)
            ax.set_xticks(gpus[::2], [str(n) for n in gpus[::2]])
            ax.legend()
