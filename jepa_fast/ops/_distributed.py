"""Sums over the ranks of a process group, differentiable, for losses of the global batch under data parallelism."""

import torch
import torch.distributed as dist
from torch import Tensor


def resolve_group(process_group) -> "dist.ProcessGroup | None":
    """The group to reduce over, None where this process is alone.

    process_group: None (no communication), "auto" (all ranks, where torch.distributed is initialised), "world" (all
    ranks; an error where it is not initialised) or a ProcessGroup this rank belongs to.
    """
    if isinstance(process_group, str) and process_group not in ("auto", "world"):
        raise ValueError(f'process_group must be None, "auto", "world" or a ProcessGroup, got {process_group!r}')
    is_initialized = dist.is_available() and dist.is_initialized()
    if process_group is None or (process_group == "auto" and not is_initialized):
        return None
    if not is_initialized:
        raise ValueError("process_group needs torch.distributed.init_process_group to be called first")
    if isinstance(process_group, str):
        process_group = dist.group.WORLD
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group does not contain this rank")
    return process_group if dist.get_world_size(process_group) > 1 else None


def sum_over_ranks(x: Tensor, group: "dist.ProcessGroup", upstream_sync: bool = False) -> Tensor:
    """One SUM all-reduce; the gradient is that of the *global* loss, times the number of ranks.

    Data parallelism averages gradients over the ranks, which cancels that factor: the step is the one a single process
    takes on the global batch. The backward communicates only with `upstream_sync`, which is needed where the ranks
    multiply the (equal) result by different factors. SUM, because AVG differentiates differently on gloo and NCCL.
    """
    return _SumOverRanks.apply(x, group, upstream_sync)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, upstream_sync):
        ctx.group, ctx.upstream_sync = group, upstream_sync
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        return total

    @staticmethod
    def backward(ctx, grad):
        if not ctx.upstream_sync:
            return grad * dist.get_world_size(ctx.group), None, None
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM, ctx.group)
        return total, None, None

