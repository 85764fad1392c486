"""Checkpoints that several ranks write and read together: a folder, in the format of torch.distributed.checkpoint.

    step_00001000/run.json            step, recipe, settings of the optimizer's groups
    step_00001000/.metadata           which rows of which tensor are in which file
    step_00001000/__RANK_0.distcp     one file per rank that wrote

Tensors are named objective.NAME and optimizer.INDEX.KEY and have their full shapes, however many ranks held them: any
other number of ranks, or a process alone, reads back just the rows that it holds.
"""

import io
import json
import pathlib
import pickle
import warnings
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import FORMAT, CheckpointError, check_same

State = dict[str, Tensor]


def start_writing(folder: pathlib.Path, tensors: State, about: dict[str, Any], group: "dist.ProcessGroup",
                  stager: Any) -> Future:
    """Copy `tensors` through `stager`, and write them from a thread; called by all ranks of `group`, which is gloo's.

    `about` is written by the first rank. The folder is whole when the first rank's future is done.
    """
    import torch.distributed.checkpoint as dcp

    if dist.get_rank(group) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"format": FORMAT, **about}) + "\n")
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    return dcp.async_save(own(tensors, group), storage_writer=writer, process_group=group, async_stager=stager)


def own(tensors: State, group: "dist.ProcessGroup") -> State:
    """What this rank writes: its rows of sharded tensors, and its share of those that every rank holds."""
    sizes, shares = [0] * dist.get_world_size(group), {}
    for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):
        if not hasattr(tensors[name], "to_local"):
            shares[name] = sizes.index(min(sizes))
            sizes[shares[name]] += tensors[name].nbytes
    return {name: value for name, value in tensors.items() if shares.get(name, dist.get_rank(group)) == dist.get_rank(group)}


def load(folder: pathlib.Path) -> dict[str, Any]:
    """A whole checkpoint on the CPU, in the layout of the one-file format, by one process."""
    reader, sizes = open_folder(folder)
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in sizes.items()}
    _read(folder, reader, tensors)
    about = read_about(folder)
    return {"format": FORMAT, "step": about["step"], "recipe": about["recipe"], **nested(tensors, about)}


def load_into(folder: pathlib.Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read the rows that this rank holds into the objective and the optimizer; the step they are of."""
    reader, sizes = open_folder(folder)
    about = read_about(folder)
    tensors = {f"objective.{name}": value.detach() for name, value in objective.state_dict().items()}
    check_same({name.removeprefix("objective."): value.shape for name, value in tensors.items()},
               {name.removeprefix("objective."): meta.size for name, meta in sizes.items() if name.startswith("objective.")},
               str(folder))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, meta in sizes.items():
        kind, index, *_ = name.split(".")
        if kind != "optimizer":
            continue
        if int(index) >= len(params):
            raise CheckpointError(f"{folder}: {name} is of a parameter that the optimizer does not have: another recipe?")
        like = params[int(index)].detach()
        tensors[name] = torch.zeros_like(like) if meta.size == like.shape else torch.zeros(meta.size)
    _read(folder, reader, tensors)
    optimizer.load_state_dict(nested(tensors, about)["optimizer"])
    return about["step"]


def flat(objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, list[dict]]:
    """Every tensor of a run by the name it has in a checkpoint, and the settings of the optimizer's groups."""
    state = optimizer.state_dict()
    tensors = {f"objective.{name}": value.detach() for name, value in objective.state_dict().items()}
    for index, values in state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    return tensors, state["param_groups"]


def nested(tensors: State, about: dict[str, Any]) -> dict[str, Any]:
    """The objective's and the optimizer's state dicts from what `flat` made of them."""
    objective, state = {}, {}
    for name, value in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "objective":
            objective[rest] = value
        else:
            index, key = rest.split(".")
            state.setdefault(int(index), {})[key] = value
    groups = [group | {"betas": tuple(group["betas"])} for group in about["param_groups"]]
    return {"objective": objective, "optimizer": {"state": dict(sorted(state.items())), "param_groups": groups}}


def read_about(folder: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a readable checkpoint: run.json: {error}") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {about.get('format')!r}, expected {FORMAT!r}")
    return about


def open_folder(folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """A reader of the folder, and of each tensor in it the size and dtype."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        # its own would run whatever a pickle says
        def read_metadata(self, *args, **kwargs):
            return metadata

    try:
        metadata = _MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no .metadata, which is written last") from error
    except Exception as error:
        raise CheckpointError(f"{folder} is not a readable checkpoint: {error}") from error
    return Reader(folder), metadata.state_dict_metadata


def _read(folder: pathlib.Path, reader: Any, tensors: State) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[-1]
        raise CheckpointError(f"{folder} is not a readable checkpoint: {reason}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """Descriptions of tensors, and nothing that a pickle could run."""

    ALLOWED = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
               ("pathlib._local", "PosixPath")}

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_data = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem") \
            and name in ("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties",
                         "BytesStorageMetadata", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING")
        if not (is_dtype or is_data or (module, name) in self.ALLOWED):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}")
        return super().find_class(module, name)
