"""Checkpoints of a run: one file, replaced atomically, so that a kill at any moment leaves a whole one."""

import os
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = "jepa_fast/1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or put into this model; the message says why."""


def save(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Write beside `path`, flush to the disk, then rename over it. On an error the previous file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    # torch.save reports a full disk as RuntimeError
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = f"; the previous checkpoint {path} is unchanged" if path.exists() else ""
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"cannot save {path}: {reason}{kept}") from error


def _flush_folder(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, tensors and plain containers only."""
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} has format {found!r}, expected {FORMAT!r}")
    return state


def load_into(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """load_state_dict that names the first difference, both shapes side by side."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in state:
            raise CheckpointError(f"{where}: {name} {list(value.shape)} of the model is not in the checkpoint")
        if state[name].shape != value.shape:
            raise CheckpointError(f"{where}: {name} is {list(state[name].shape)} in the checkpoint and "
                                  f"{list(value.shape)} in the model: another recipe?")
    for name in state:
        if name not in own:
            raise CheckpointError(f"{where}: {name} {list(state[name].shape)} of the checkpoint is not in the model")
    module.load_state_dict(state)
