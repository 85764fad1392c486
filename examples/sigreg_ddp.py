"""SIGReg of the global batch under DDP:  torchrun --nproc-per-node 2 examples/sigreg_ddp.py

Each process has its part of the batch, and the losses are those of one process with all of it: without torchrun they are
the same. Any SIGReg of jepa_fast takes the place of the one in MINIMAL.md or le-wm, which know their own samples only.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import jepa_fast

GLOBAL_BATCH, VIEWS, DIM = 64, 2, 16


def main() -> None:
    is_distributed = "RANK" in os.environ
    if is_distributed:
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))
    if is_distributed:
        net = DistributedDataParallel(net)
    sigreg = jepa_fast.SIGReg.from_preset("minimal", process_group="auto", scale="N_global")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(5):
        torch.manual_seed(100 + step)
        samples = torch.randn(GLOBAL_BATCH, 1, DIM) + 0.1 * torch.randn(GLOBAL_BATCH, VIEWS, DIM)
        mine = samples.chunk(world_size)[rank]
        proj = net(mine.flatten(0, 1)).unflatten(0, mine.shape[:2]).transpose(0, 1)  # [V, B, D]
        invariance = (proj - proj.mean(0)).square().mean()
        loss = 0.95 * invariance + 0.05 * sigreg(proj)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if is_distributed:
            dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}  loss {total / world_size:.5f}  ({world_size} x {len(mine)} samples)", flush=True)
    if is_distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
