"""Processes and devices: what torchrun says, or one process."""

import datetime
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .peers import Peers

_peers: Peers | None = None  # of this process, as its process group is


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str, timeout_s: float = 600.0) -> World:
    """Join the process group that torchrun describes (gloo on CPUs, nccl on GPUs), or be a world of one.

    device: "auto", "cpu" or "cuda". From then on every rank ends when one dies, and after timeout_s where one hangs.
    Raises ValueError where the description is incomplete or the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but PyTorch sees no GPU; use cpu or auto")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    if size == 1:
        return World(0, 1, where)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} but {', '.join(missing)} not set: start the processes with torchrun")
    global _peers
    timeout = datetime.timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", device_id=where if use_cuda else None, timeout=timeout)
    if _peers is None:
        side = dist.new_group(backend="gloo", timeout=timeout) if use_cuda else dist.group.WORLD
        _peers = Peers(dist.get_rank(), dist.get_world_size(), os.environ["MASTER_ADDR"], side)
    return World(dist.get_rank(), dist.get_world_size(), where)


def leave() -> None:
    """The work of this rank is done: its end is no longer the end of the others, nor theirs of it."""
    global _peers
    if _peers is not None:
        _peers.leave()
        _peers = None


def stop() -> None:
    leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def give_up() -> None:
    """After an error that was told: end the other ranks, and this one, whose threads may wait for what is gone."""
    if _peers is not None:
        _peers.leave(failed=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def same(value: object, world: World) -> object:
    """The first rank's value, on every rank."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def advise(text: str) -> None:
    """What to say after the message that a rank died: how to go on."""
    if _peers is not None:
        _peers.advice = text


def told(error: BaseException) -> str:
    """The message of an error, where ranks answer badly in words; waits where the death of a rank is its cause.

    Collectives notice a dead rank too, in their own way; that rank's name follows in a moment and ends this process.
    """
    text = " ".join(str(error).split())
    if _peers is None or not (isinstance(error, dist.DistError) or "gloo" in text):
        return text
    time.sleep(3.0)
    if "imed out" not in text and "imeout" not in text:
        return text
    return f"a rank did not answer in time (train.timeout_s): it hangs, or its machine is gone: {text}"


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
