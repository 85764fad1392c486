"""From any checkpoint to any other: `jepa-fast convert`."""

import json
import pathlib
from typing import Any

import torch

from ..train import checkpoint
from . import hf_ijepa, hf_vjepa2, native, official
from ._names import State
from ._write import whole
from .load import Report, fitted, optimizer_state, source_of
from .sniff import Foreign, read

TARGETS = ("official", "ours", "hf", "safetensors")


def convert(source: str | pathlib.Path, target: str | pathlib.Path, to: str, *, which: str | None = None,
            family: str | None = None, recipe: Any = None, encoder: dict | None = None, predictor: dict | None = None,
            resize_mask_tokens: bool = False, force: bool = False) -> list[Report]:
    """Write `source` at `target` as: an official file; a run folder of ours; a Hugging Face folder; safetensors of ours.

    which: the encoder that goes to Hugging Face (target_encoder unless given), or the only role to write.
    recipe: of the run folder; its objective says which names and shapes there must be.
    encoder, predictor: fields of their configs that a file does not tell, such as num_heads, image_size, num_frames.
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    file, target = read(source, family=family), pathlib.Path(target)
    if target.resolve() == pathlib.Path(source).resolve():
        raise ValueError(f"source and target are the same: {target}")
    if to == "safetensors":
        return native.export(file, target, which=which, force=force)
    if to == "official":
        return to_official(file, target, which=which, force=force)
    if to == "hf":
        return to_hugging_face(file, target, which=which or "target_encoder", encoder=encoder, predictor=predictor,
                               force=force)
    if which is not None:
        raise ValueError(f"a run folder takes every role, got which={which!r}")
    if recipe is None:
        raise ValueError("a run folder is made for a recipe: pass recipe (--recipe NAME or RUN/recipe.yaml)")
    return to_run(file, target, recipe, resize_mask_tokens=resize_mask_tokens, force=force)


def to_official(file: Foreign, target: pathlib.Path, *, which: str | None = None, force: bool = False) -> list[Report]:
    """torch.save of the official dict, optimizer included where all roles that it holds are written."""
    roles = {which: file.role(which)} if which else {name: state for name, state in file.roles.items()
                                                     if name in official.ROLES}
    if file.family is None or not roles:
        raise ValueError(f"{file.path} is of none of {', '.join(official.PREFIXES)}: it holds {', '.join(file.roles)}")
    scalars = {key: file.other[key] for key in official.SCALARS if key in file.other} or progress(file)
    optimizer = None if which else file.other.get("opt")
    if optimizer is not None:
        optimizer = official.official_optimizer(optimizer, roles)
    with whole(target, force=force) as temporary:
        torch.save(official.pack(roles, file.family, optimizer, **scalars), temporary)
    return [Report(source_of(file), role, tuple(state)) for role, state in roles.items()]


def progress(file: Foreign) -> dict:
    """epoch, loss and lr of a run, from its metrics.csv and its optimizer."""
    from ..train.run import read_metrics

    out = {}
    for folder in (pathlib.Path(file.path), pathlib.Path(file.path).parent.parent):
        if file.format == "run" and (folder / "metrics.csv").is_file():
            rows = read_metrics(folder / "metrics.csv")
            out = {"epoch": int(float(rows[-1]["epoch"])), "loss": float(rows[-1]["loss"])} if rows else {}
            break
    if file.other.get("opt"):
        out["lr"] = file.other["opt"]["param_groups"][0]["lr"]
    return out


def to_hugging_face(file: Foreign, target: pathlib.Path, *, which: str = "target_encoder", encoder: dict | None = None,
                    predictor: dict | None = None, force: bool = False) -> list[Report]:
    """A folder that `from_pretrained` of transformers 4 and 5 loads: config.json, model.safetensors."""
    if file.family not in ("ijepa", "vjepa2"):
        raise ValueError(f"transformers has classes for I-JEPA and V-JEPA 2; {file.path} is {file.family or 'of neither'}")
    roles = {"encoder": file.role(which)} | {name: file.roles[name] for name in ("predictor", "probe") if name in file.roles}
    notes = [f"{name} is left out" for name in file.roles if name not in (which, *roles)]
    if file.family == "ijepa":
        fields = native.configs(file, {which: roles["encoder"]}, encoder)["encoder"]
        if roles.pop("predictor", None):
            notes.append("predictor is left out: IJepaModel has none")
        config, state = hf_ijepa.config_to_hf(fields, roles.get("probe")), hf_ijepa.to_hf(roles)
    else:
        file.role("predictor")
        fields = native.configs(file, {which: roles["encoder"], "predictor": roles["predictor"]}, encoder, predictor)
        config = hf_vjepa2.config_to_hf(fields["encoder"], fields["predictor"], roles.get("probe"))
        state = hf_vjepa2.to_hf(roles)
        if config["pred_num_mask_tokens"] > 1:
            notes.append("transformers predicts with mask_tokens[1], V-JEPA 2 trains mask_tokens[0]")
        if "probe" in roles:
            notes.append("the pooler's LayerNorms have epsilon 1e-6 in transformers, 1e-5 in official probes")
    write_hugging_face(target, config, state, force=force)
    return [hugging_face_report(file, which if role == "encoder" else role, part, notes if role == "encoder" else [])
            for role, part in roles.items()]


def hugging_face_report(file: Foreign, role: str, state: State, notes: list[str]) -> Report:
    tables = hf_vjepa2.TABLE_NAMES if file.family == "vjepa2" else ()
    ignored = {name: f"{list(state[name].shape)}, positions are rotary" for name in tables if name in state}
    return Report(source_of(file), role, tuple(name for name in state if name not in ignored), ignored, notes=tuple(notes))


def write_hugging_face(target: pathlib.Path, config: dict, state: State, *, force: bool = False) -> None:
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    with whole(target, force=force) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=1) + "\n")
        native.save_safetensors(state, temporary / "model.safetensors")


def to_run(file: Foreign, target: pathlib.Path, recipe: Any, *, resize_mask_tokens: bool = False,
           force: bool = False) -> list[Report]:
    """recipe.yaml and checkpoints/last.pt, for `jepa-fast train --from TARGET/recipe.yaml --resume`.

    The optimizer's state comes along where the file has one; its number of steps is where the run goes on, else 0.
    """
    from .. import recipes
    from ..train.step import build_optimizer

    with torch.device("meta"):
        objective = recipe.objective.build()
    own = official.roles_of(objective.state_dict())
    states, reports = {}, []
    for role, ours in own.items():
        states[role], ignored, missing = fitted(file, role, ours, resize_mask_tokens=resize_mask_tokens)
        if missing:
            raise ValueError(f"{file.path} has no {role} {next(iter(missing))}: the recipe must have as many mask tokens")
        reports.append(Report(source_of(file), role, tuple(states[role]), ignored))
    optimizer = build_optimizer(recipe, objective).state_dict()
    if file.other.get("opt") is not None:
        optimizer["state"] = optimizer_state(file, own, list(objective.roles()))
    step = max((int(state["step"]) for state in optimizer["state"].values()), default=0)
    with whole(target, force=force) as temporary:
        temporary.mkdir()
        recipes.save(recipe, temporary / "recipe.yaml")
        checkpoint.save(temporary / "checkpoints" / "last.pt", {
            "step": step, "recipe": recipes.to_yaml(recipe), "objective": official.objective_of(states),
            "optimizer": optimizer})
    return reports
