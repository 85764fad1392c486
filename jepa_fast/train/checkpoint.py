"""Checkpoints of a run: one file, replaced atomically, so that a kill at any moment leaves a whole one.

Several ranks write a folder instead, see `sharded`; both are read here, and `saver` says which is the last.
"""

import os
import pathlib
import shutil
import zipfile
from collections.abc import Mapping
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
        flush_folder(path.parent)
        remove_folders(path.parent)
    # torch.save reports a full disk as RuntimeError
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = f"; the previous checkpoint {path} is unchanged" if path.exists() else ""
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"cannot save {path}: {reason}{kept}") from error


def flush_folder(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folders(folder: pathlib.Path, but: str = "") -> None:
    """Remove checkpoints of several ranks, complete or not, that are not the last one any more."""
    for old in folder.glob("step_*"):
        if old.name != but and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a checkpoint of one process or of many on the CPU, tensors and plain containers only."""
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if path.is_dir():
        from . import sharded

        return sharded.load(path)
    try:
        # memory-mapped: a rank that holds some rows reads those
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} has format {found!r}, expected {FORMAT!r}")
    return state


def load_into(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """load_state_dict that names the first difference, both shapes side by side, and cuts what is sharded."""
    own = module.state_dict()
    check_same(*({name: value.shape for name, value in side.items()} for side in (own, state)), where)
    module.load_state_dict({name: cut(state[name], value) for name, value in own.items()})


def restore(path: pathlib.Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint of any number of ranks into an objective, sharded or not, and its optimizer; the step it is of."""
    if path.is_dir():
        from . import sharded

        return sharded.load_into(path, objective, optimizer)
    state = load(path)
    load_into(objective, state["objective"], str(path))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {index: {key: value if value.dim() == 0 or index >= len(params) else cut(value, params[index]).clone()
                       for key, value in values.items()} for index, values in state["optimizer"]["state"].items()}
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})
    return state["step"]


def check_same(own: Mapping[str, torch.Size], state: Mapping[str, torch.Size], where: str) -> None:
    """CheckpointError with the first name or shape that differs between a model and a checkpoint."""
    for name, shape in own.items():
        if name not in state:
            raise CheckpointError(f"{where}: {name} {list(shape)} of the model is not in the checkpoint")
        if state[name] != shape:
            raise CheckpointError(f"{where}: {name} is {list(state[name])} in the checkpoint and {list(shape)} in the "
                                  f"model: another recipe?")
    for name, shape in state.items():
        if name not in own:
            raise CheckpointError(f"{where}: {name} {list(shape)} of the checkpoint is not in the model")


def cut(full: Tensor, like: Tensor) -> Tensor:
    """The rows of a full tensor that `like` holds on this rank, as a DTensor if it is one."""
    if not hasattr(like, "to_local"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
