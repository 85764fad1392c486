"""Processes and devices: what torchrun says, or one process."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str) -> World:
    """Join the process group that torchrun describes (gloo on CPUs, nccl on GPUs), or be a world of one.

    device: "auto", "cpu" or "cuda". Raises ValueError where the description is incomplete or the device is not there.
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
    if not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", device_id=where if use_cuda else None)
    return World(dist.get_rank(), dist.get_world_size(), where)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
