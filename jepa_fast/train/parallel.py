"""One objective on many ranks: DistributedDataParallel, FSDP2, or HSDP between them. The global batch's step, exactly.

    shard_ranks   who holds weights, averages and optimizer state    what a step sends
    1             every rank (DDP)                                   an all-reduce of gradients, during the backward pass
    -1            all ranks together (FSDP2)                         per block: all-gathers, one reduce-scatter of gradients
    S             every S ranks together (HSDP)                      the same among the S, and an all-reduce across

What a target encoder averages is cut as its source is, so that optimizer and moving average never communicate.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..recipes import Recipe
from .distributed import World


def parallelize(objective: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """What to call in place of `objective`: itself for one rank. To be done before the optimizer is built.

    Sharding happens in place: the parameters of `objective` become DTensors. Raises ValueError where train.shard_ranks
    does not divide the ranks, or where ranks start from different weights.
    """
    shards = num_shards(recipe.train.shard_ranks, world.size)
    if world.size == 1:
        return objective
    check_equal(objective)
    if shards > 1:
        if getattr(recipe.data, "features", None):
            objective.encoder_name()  # which reads the whole weights, once
        return shard(objective, shards, world, recipe.train.precision)
    # no gradient buckets and no broadcasts of a target encoder, nor of anything else that does not train
    still = [name for name, p in objective.named_parameters() if not p.requires_grad]
    still += [name for name, _ in objective.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, still)
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, init_sync=False, gradient_as_bucket_view=True)


def num_shards(shard_ranks: int, num_ranks: int) -> int:
    """Ranks that hold one copy of the weights together."""
    shards = num_ranks if shard_ranks == -1 else shard_ranks
    if shards < 1 or num_ranks % shards:
        raise ValueError(f"train.shard_ranks must divide the number of ranks, or be -1 for all of them, got {shard_ranks} "
                         f"for {num_ranks}")
    return shards


def shard(objective: nn.Module, shards: int, world: World, precision: str) -> nn.Module:
    """FSDP2 in place: each block a unit, everything else with the root.

    Vectors (norms, biases) and tables of fewer rows than shards stay whole on every rank, in float32: with them the
    autocast of a block meets what it meets on one GPU, and gathers its matrices in bfloat16, which autocast would round
    them to anyway. The root is gathered as it is, so that tables and tokens keep the dtype of the residual stream.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # keys and values that a block returns are views; nothing here changes them in place
    warnings.filterwarnings("ignore", ".*An in-place op on this view")
    replicas = world.size // shards
    shape, axes = ((shards,), ("shard",)) if replicas == 1 else ((replicas, shards), ("replicate", "shard"))
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=axes)
    # FSDP2 does not take channels-last kernels, those of a ResNet
    whole = {p for p in objective.parameters() if p.dim() < 2 or len(p) < shards or not p.is_contiguous()}
    reduced = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False) \
        if precision == "bf16" else MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in blocks(objective):
        if any(p not in whole for p in unit.parameters()):
            names = entries(unit)
            fully_shard(unit, mesh=mesh, mp_policy=reduced, ignored_params=whole)
            for name in names:
                register_fsdp_forward_method(unit, name)
    fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=whole)
    if world.device.type == "cpu":  # gloo has no average
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return objective


def blocks(objective: nn.Module) -> list[nn.Module]:
    """The members of every ModuleList, inner ones first."""
    lists = [module for module in objective.modules() if isinstance(module, nn.ModuleList)]
    return [block for members in reversed(lists) for block in members]


def entries(block: nn.Module) -> list[str]:
    """Public methods of a block besides `forward`: they too compute with its weights, which must have been gathered."""
    return [name for name, value in vars(type(block)).items()
            if callable(value) and not name.startswith("_") and not hasattr(nn.Module, name)]


@contextlib.contextmanager
def averaged_gradients(model: nn.Module, is_last: bool = True) -> Iterator[None]:
    """Around forward and backward of a micro-batch: after the last one of a step gradients are means over the ranks.

    Before it nothing is sent, and gradients add up where they are.
    """
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if is_last else model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(is_last)
        yield
        if is_last:
            average_whole_(model)
    else:
        yield


@torch.no_grad()
def average_whole_(model: nn.Module) -> None:
    """Means over the ranks of the gradients that FSDP leaves alone, those of parameters which every rank holds whole."""
    from torch.distributed.tensor import DTensor

    grads = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        same = [grad for grad in grads if grad.dtype == dtype]
        packed = torch.cat([grad.flatten() for grad in same])
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
        for grad, part in zip(same, packed.split([grad.numel() for grad in same]), strict=True):
            grad.copy_(part.view_as(grad))


@torch.no_grad()
def check_equal(objective: nn.Module) -> None:
    """ValueError, naming the first, where parameters or buffers differ between ranks: nothing is sent to mend it."""
    state = objective.state_dict()
    sums = torch.stack([value.sum(dtype=torch.float64) for value in state.values()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    for name, is_equal in zip(state, (low == high).tolist(), strict=True):
        if not is_equal:
            raise ValueError(f"ranks start from different weights: {name}; every rank must have the same seed, checkpoint "
                             f"and version of PyTorch")
