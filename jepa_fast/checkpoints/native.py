"""Our own files for weights: one safetensors per role, and config.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

from safetensors.torch import save_file
from torch import nn

from . import official
from ._names import State
from ._write import whole
from .load import Report, encoder_fields, infer_predictor, source_of
from .sniff import OURS, Foreign, read


def export(source: str | pathlib.Path | Foreign | nn.Module, folder: str | pathlib.Path, *, which: str | None = None,
           force: bool = False) -> list[Report]:
    """Write the roles of a run folder, of any checkpoint, or of an objective (`which`: only that one) to `folder`.

    FOLDER/ROLE.safetensors, and config.json with the fields of each role's config; `read` and `load_encoder` take the
    folder. Atomic.
    """
    file = of_objective(source) if isinstance(source, nn.Module) else source if isinstance(source, Foreign) else read(source)
    roles = {which: file.role(which)} if which else file.roles
    config, notes = {}, ()
    try:
        config = configs(file, roles)
    except ValueError as error:
        notes = (f"config.json is without configs: {error}",)
    with whole(pathlib.Path(folder), force=force) as temporary:
        temporary.mkdir()
        for role, state in roles.items():
            save_safetensors(state, temporary / f"{role}.safetensors", {"role": role, "family": file.family or ""})
        described = {"format": OURS, "family": file.family, "roles": list(roles), "config": config}
        (temporary / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    return [Report(source_of(file), role, tuple(state), notes=notes) for role, state in roles.items()]


def save_safetensors(state: State, path: pathlib.Path, metadata: dict[str, str] | None = None) -> None:
    path.touch()
    mode = path.stat().st_mode  # save_file would leave the file to its owner alone
    save_file({name: value.contiguous() for name, value in state.items()}, path, {"format": "pt", **(metadata or {})})
    path.chmod(mode)


def configs(file: Foreign, roles: Mapping[str, State], encoder: dict | None = None,
            predictor: dict | None = None) -> dict[str, dict]:
    """Fields of the configs of encoder and video predictor: as given, as the file says, else read off the tensors."""
    out = {name: fields for name, fields in file.config.items() if name in roles}
    for role in roles:
        if role in official.ENCODERS:
            out["encoder"] = encoder_fields(file, role, **(encoder or {}))
        elif role == "predictor" and file.family in ("vjepa", "vjepa2"):
            given = {name: value for name, value in (predictor or {}).items() if value is not None}
            said = file.fields(role) | given
            # None in a recipe: as many as the encoder, as in all V-JEPA files
            as_encoder = "num_heads" in said or file.family == "vjepa"
            heads = said.get("num_heads") or (out.get("encoder", {}).get("num_heads") if as_encoder else None)
            inferred = infer_predictor(roles[role], heads, where=file.path)
            out["predictor"] = inferred | said | {"num_heads": inferred["num_heads"]}
    return out


def of_objective(objective: nn.Module) -> Foreign:
    """An objective in memory as a checkpoint that was read."""
    fields = dataclasses.asdict(objective.config)
    roles = official.roles_of(objective.state_dict())
    return Foreign(type(objective).__name__, "run", official.family_of(roles), roles,
                   {name: value for name, value in fields.items() if isinstance(value, dict)})
