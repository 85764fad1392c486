"""Official I-JEPA checkpoints (`*.pth.tar`): a dict of encoder, predictor, target_encoder, opt, scaler, epoch, ...

Our modules carry the official parameter names; the official files add the prefix `module.` of data-parallel wrappers.
The optimizer's state has the official layout too: four groups in the same order, frozen tables counted.
"""

import os
import pathlib

import torch
from torch import Tensor

from ..objectives.latent_prediction import LatentPrediction

PREFIXES = ("module.", "_orig_mod.", "backbone.")


def save_ijepa(path: str | pathlib.Path, objective: LatentPrediction, optimizer: torch.optim.Optimizer | None = None, *,
               epoch: int = 0, loss: float = 0.0, batch_size: int = 0, world_size: int = 1, lr: float = 0.0) -> None:
    """Write what the official loader reads, atomically."""
    path = pathlib.Path(path)
    state = {
        "encoder": _prefixed(objective.encoder.state_dict()),
        "predictor": _prefixed(objective.predictor.state_dict()),
        "target_encoder": _prefixed(objective.target_encoder.encoder.state_dict()),
        "opt": None if optimizer is None else optimizer.state_dict(),
        "scaler": None, "epoch": epoch, "loss": loss, "batch_size": batch_size, "world_size": world_size, "lr": lr}
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_ijepa(path: str | pathlib.Path, objective: LatentPrediction,
               optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Put an official checkpoint into an objective, strictly; returns its other entries (epoch, loss, ...).

    Raises ValueError, naming role and parameter, where a parameter is missing, left over or of another shape.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    modules = {"encoder": objective.encoder, "predictor": objective.predictor,
               "target_encoder": objective.target_encoder.encoder}
    for role, module in modules.items():
        if role not in state:
            raise ValueError(f"{path} has no {role}; it holds {', '.join(state)}")
        theirs = strip(state[role])
        _check(str(path), role, theirs, module.state_dict())
        module.load_state_dict(theirs)
    if optimizer is not None and state.get("opt") is not None:
        optimizer.load_state_dict(state["opt"])
    return {key: value for key, value in state.items() if key not in modules and key != "opt"}


def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without the prefixes of wrappers."""
    out = {}
    for name, value in state.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        out[name] = value
    return out


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def _check(path: str, role: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name in ours.keys() | theirs.keys():
        sizes = [list(side[name].shape) if name in side else None for side in (theirs, ours)]
        if sizes[0] != sizes[1]:
            said = ["absent" if size is None else str(size) for size in sizes]
            raise ValueError(f"{path}: {role} {name} is {said[0]} in the file and {said[1]} in the model")
