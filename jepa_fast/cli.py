"""jepa-fast: train · eval · plan · cache · convert · launch · bench · info · recipes."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

USAGE = """usage: jepa-fast COMMAND ...

  train RECIPE [--field.subfield VALUE ...]   train a recipe; own images: --data.root FOLDER
  train --from RUN/recipe.yaml [...]          the recipe of an earlier run, perhaps with changes
  eval RUN                                    probe a run's encoder; writes tables and pictures to its folder
  plan RUN [--planner cem ...]                plan with a run's world model in its environment, until its goals
  cache RECIPE --to FOLDER [...]              features of a frozen encoder, for train --data.features FOLDER
  convert SOURCE TARGET --to KIND             a checkpoint of any kind as official, ours, hf or safetensors
  launch RECIPE [--nodes 2 --partition X ...] train as a SLURM job that comes back after pre-emptions and time limits
  bench step --config RECIPE [--official PATH]
                                              whole steps: the authors' code, tuned PyTorch, ours, in one run
  bench scale --config RECIPE --from FILE     what that step would be on 1 to 1,024 GPUs, on paper
  bench ops | blocks | video-memory | plan    ratios against plain PyTorch, measured in one run
  bench patches [--official FOLDER]           code of others before and after its patch, measured in one run
  info [--all]                                devices, versions, and which code each op would run
  recipes                                     the recipes, one line each

train also takes --run-dir DIR (where to write; default runs/NAME), --resume (go on from the checkpoint there),
--eval (probe the encoder at the end) and --help after a recipe's name for all of its fields. SIGTERM and SIGUSR1 make it
save after the step and exit with 75, to be started again with --resume.
--debug anywhere shows tracebacks."""


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """What `train` takes besides the recipe's fields."""

    recipe: str | None
    source: pathlib.Path | None
    run: pathlib.Path | None
    resume: bool
    eval: bool


class UserError(Exception):
    """A mistake on the command line; the message is all there is to say."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    commands = {"train": train, "eval": evaluate, "plan": plan, "cache": cache, "convert": convert, "launch": launch,
                "bench": bench, "info": info, "recipes": list_recipes}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        if argv[0] not in commands:
            raise UserError(f"unknown command {argv[0]!r}; one of {', '.join(commands)}")
        commands[argv[0]](argv[1:])
        return 0
    except KeyboardInterrupt:
        return 130
    # what a user or a machine did wrong, in one line; anything else is ours and keeps its traceback
    except (UserError, ValueError, OSError, ImportError, RuntimeError) as error:
        if debug:
            raise
        return tell(error)
    finally:
        with contextlib.suppress(ImportError):
            from .train import distributed

            if sys.exc_info()[0] is None:
                distributed.stop()


def tell(error: Exception) -> int:
    """Print an error, once for all ranks, and return the exit code: 75 where the run was stopped from outside."""
    from .train import distributed

    code, rank, message = getattr(error, "exit_code", 1), int(os.environ.get("RANK", "0")), distributed.told(error)
    if rank:
        # the first rank says what is wrong with all of them, and ends them; this one has a say where that one goes on
        time.sleep(1.0)
    if rank == 0 or code == 1:
        where = f"rank {rank}: " if rank else ""
        print(f"jepa-fast: {'error: ' if code == 1 else ''}{where}{message}", file=sys.stderr, flush=True)
    if code == 1:
        distributed.give_up()
    return code


def train(argv: list[str]) -> None:
    arguments, rest = split_train_arguments(argv)
    from .train.loop import train as run_training

    recipe, folder = recipe_and_folder(arguments, rest)
    if is_first_rank():
        warnings.showwarning = lambda message, *_, **__: print(f"jepa-fast: {message}", file=sys.stderr)
        say_if_plain()
    else:
        warnings.simplefilter("ignore")
    run = run_training(recipe, folder, resume=arguments.resume)
    if run.world.is_main:
        from .train.meters import describe

        print(*describe(run.summary, recipe), sep="\n")
    if run.world.is_main and arguments.eval:
        evaluate([str(folder)])
    elif run.world.is_main:
        next_command = "plan" if hasattr(recipe.objective, "planning") else "eval"
        print(f"run folder: {folder}  (next: jepa-fast {next_command} {folder})")


def launch(argv: list[str]) -> None:
    from .train.launch import LaunchConfig
    from .train.launch import launch as submit

    arguments, rest = split_train_arguments(argv)
    if arguments.eval:
        raise UserError("launch only trains; probe the encoder afterwards: jepa-fast eval RUN")
    # what is not known here is for the recipe's fields
    config, rest = tyro.cli(LaunchConfig, prog="jepa-fast launch", args=rest, return_unknown_args=True)
    recipe, folder = recipe_and_folder(arguments, rest)
    job = submit(recipe, folder, config)
    print(f"job {job.job_id}, logs in {folder / 'jobs'}, run folder: {folder}")


def recipe_and_folder(arguments: TrainArguments, rest: list[str]) -> tuple:
    """The recipe with its changes, and where to run it."""
    recipe = on_image_source(chosen_recipe(arguments), rest)
    recipe = tyro.cli(tyro.conf.AvoidSubcommands[type(recipe)], prog=f"jepa-fast train {recipe.name}", default=recipe,
                      args=rest, description=recipe.summary, console_outputs=is_first_rank())
    folder = arguments.run or (arguments.source.parent if arguments.source and arguments.resume
                               else fresh_folder(pathlib.Path("runs"), recipe.name, arguments.resume))
    if not arguments.resume and (folder / "checkpoints" / "last.pt").exists():
        raise UserError(f"{folder} holds a run already: pass --resume to go on with it, or another --run-dir")
    return recipe, folder


def split_train_arguments(argv: list[str]) -> tuple[TrainArguments, list[str]]:
    """Take RECIPE, --from, --run-dir, --resume and --eval out; the rest is for the recipe's fields."""
    values: dict[str, str | None] = {"--from": None, "--run-dir": None}
    flags: dict[str, bool] = {"--resume": False, "--eval": False}
    rest, name = [], None
    i = 0
    while i < len(argv):
        arg, _, given = argv[i].partition("=")
        if arg in values:
            if not given and i + 1 >= len(argv):
                raise UserError(f"{arg} needs a value")
            values[arg] = given or argv[i := i + 1]
        elif arg in flags:
            flags[arg] = True
        elif name is None and not rest and not arg.startswith("-"):
            name = arg
        else:
            rest.append(argv[i])
        i += 1
    paths = {key: pathlib.Path(value) if value else None for key, value in values.items()}
    return TrainArguments(name, paths["--from"], paths["--run-dir"], flags["--resume"], flags["--eval"]), rest


def chosen_recipe(arguments: TrainArguments):
    from . import recipes

    source = arguments.source
    if source is None and arguments.recipe is None and arguments.resume and arguments.run:
        source = arguments.run / "recipe.yaml"
    if (source is None) == (arguments.recipe is None):
        raise UserError("name a recipe or pass --from RUN/recipe.yaml (jepa-fast recipes lists them)")
    if source is None:
        return recipes.get_recipe(arguments.recipe)
    if not source.is_file():
        raise UserError(f"no recipe file at {source}")
    return recipes.load(source)


def on_image_source(recipe, options: list[str]):
    """The recipe on the source of images that the --data options speak of."""
    from . import recipes

    fields = [option.removeprefix("--data.").split("=")[0].split(".")[0].replace("-", "_")
              for option in options if option.startswith("--data.")]
    return recipes.with_image_source(recipe, fields)


def fresh_folder(root: pathlib.Path, name: str, resume: bool) -> pathlib.Path:
    """runs/NAME, or runs/NAME-2, ... where that is taken; with `resume` the newest that exists."""
    taken = [root / name, *(root / f"{name}-{i}" for i in range(2, 10_000))]
    existing = [folder for folder in taken[:1000] if folder.exists()]
    if resume:
        if not existing:
            raise UserError(f"nothing to resume: no {root / name}; pass --run-dir DIR")
        return existing[-1]
    return next(folder for folder in taken if not folder.exists())


def evaluate(argv: list[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Arguments:
        run: Annotated[pathlib.Path, tyro.conf.Positional]  # the run folder
        probe_depth: int = 1  # of the attentive probes of a video run: 1 as V-JEPA, 4 as V-JEPA 2

    arguments = tyro.cli(Arguments, prog="jepa-fast eval", args=argv)
    from .eval.run import evaluate_run

    table, page = evaluate_run(arguments.run, probe_depth=arguments.probe_depth)
    print(table)
    print(f"page: {page}")


def plan(argv: list[str]) -> None:
    from .eval.plan import PlanArguments, plan_run

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        run: Annotated[pathlib.Path, tyro.conf.Positional]  # the run folder
        how: tyro.conf.OmitArgPrefixes[PlanArguments] = PlanArguments()

    arguments = tyro.cli(Arguments, prog="jepa-fast plan", args=argv)
    table, page = plan_run(arguments.run, arguments.how)
    print(table)
    print(f"page: {page}")


def cache(argv: list[str]) -> None:
    from . import recipes
    from .train.cache import cache_features

    if not argv or argv[0].startswith("-"):
        raise UserError("usage: jepa-fast cache RECIPE --to FOLDER [--dtype float32|bfloat16] [--field.subfield VALUE ...]")
    recipe = recipes.get_recipe(argv[0])

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        to: pathlib.Path                                    # the folder to write
        dtype: Literal["float32", "bfloat16"] = "float32"   # bfloat16: half the size, rounded

    # what is not known here is for the recipe's fields
    arguments, rest = tyro.cli(Arguments, prog=f"jepa-fast cache {recipe.name}", args=argv[1:], return_unknown_args=True)
    recipe = tyro.cli(tyro.conf.AvoidSubcommands[type(recipe)], prog=f"jepa-fast cache {recipe.name}", default=recipe,
                      args=rest, description=recipe.summary)
    cache_features(recipe, arguments.to, arguments.dtype)
    print(f"features: {arguments.to}  (next: jepa-fast train {recipe.name} --data.features {arguments.to} ...)")


def convert(argv: list[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Arguments:
        source: Annotated[pathlib.Path, tyro.conf.Positional]  # file or folder: official, a run, Hugging Face, safetensors
        target: Annotated[pathlib.Path, tyro.conf.Positional]  # official: a file; the others: a folder
        to: Literal["official", "ours", "hf", "safetensors"]   # ours: a run folder to train on; hf: for from_pretrained
        which: str | None = None              # the encoder for hf (target_encoder unless given), or the only role to write
        recipe: str | None = None             # of the run folder: a name, or RUN/recipe.yaml
        family: str | None = None             # ijepa, vjepa, vjepa2, vjepa2_ac, vjepa2_1: where the file does not tell
        num_heads: int | None = None          # of the encoder, where its width is not an official one
        image_size: int | None = None         # pixels, where the file does not tell
        num_frames: int | None = None         # of a clip, where the file does not tell
        predictor_num_heads: int | None = None
        resize_mask_tokens: bool = False      # ours: take as many of the mask tokens as the recipe has
        force: bool = False                   # replace TARGET

    from . import checkpoints, recipes

    files = [f"{name}: {file.model}; {file.encoder}; {file.url}" for name, file in checkpoints.released().items()]
    arguments = tyro.cli(Arguments, prog="jepa-fast convert", args=argv,
                         description="Write a checkpoint of any kind as another. Released files:\n\n" + "\n\n".join(files))
    recipe = None
    if arguments.recipe:
        path = pathlib.Path(arguments.recipe)
        recipe = recipes.load(path) if path.is_file() else recipes.get_recipe(arguments.recipe)
    given = {name: getattr(arguments, name) for name in ("num_heads", "image_size", "num_frames")}
    reports = checkpoints.convert(
        arguments.source, arguments.target, arguments.to, which=arguments.which, family=arguments.family, recipe=recipe,
        encoder={name: value for name, value in given.items() if value is not None},
        predictor={"num_heads": arguments.predictor_num_heads}, resize_mask_tokens=arguments.resize_mask_tokens,
        force=arguments.force)
    print(*reports, f"written: {arguments.target}", sep="\n")


def bench(argv: list[str]) -> None:
    try:
        from bench.command import main as run_bench
    except ImportError as error:
        raise UserError(f"the benches are in the repository's bench/ folder: run this from a checkout ({error})") from error
    run_bench(argv)


def info(argv: list[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Arguments:
        all: bool = False  # also why the other backends are not chosen

    arguments = tyro.cli(Arguments, prog="jepa-fast info", args=argv)
    from .info import report

    print(report(arguments.all))


def list_recipes(argv: list[str]) -> None:
    from . import recipes

    for name, make in sorted(recipes.all_recipes().items()):
        recipe = make()
        millions = count_parameters(recipe) / 1e6
        print(f"{name:28s} {millions:7.1f} M  {recipe.paper:18s} {recipe.summary}")


def count_parameters(recipe) -> int:
    """Trainable parameters, counted without allocating them."""
    import torch

    with torch.device("meta"):
        objective = recipe.objective.build()
    return sum(p.numel() for p in objective.parameters() if p.requires_grad)


def is_first_rank() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def say_if_plain() -> None:
    from .ops import COMPILED_MISSING

    if COMPILED_MISSING:
        print(f"jepa-fast: running on plain PyTorch: {COMPILED_MISSING}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
