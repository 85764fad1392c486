"""Gradient clipping without a pass over the gradients and without stopping the device."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def clip_scale(parameters: Iterable[Tensor] | Iterable[Iterable[Tensor]], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of all gradients together, and the factor min(1, max_norm / (norm + 1e-6)), both float32 [].

    Of several lists of parameters (V-JEPA clips encoder and predictor separately) both are [num_lists]. Nothing is
    multiplied here: `AdamWEMA.step(grad_scale=...)` does that on the way. Same numbers as
    `torch.nn.utils.clip_grad_norm_`; parameters without gradient do not count. Of DTensors every rank squares its own
    rows, and one all-reduce adds up the sums of all lists. Raises ValueError for max_norm <= 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    items = [item if isinstance(item, Tensor) else list(item) for item in parameters]
    if items and all(isinstance(item, list) for item in items):
        norms = _norms(items)
    elif all(isinstance(item, Tensor) for item in items):
        norms = _norms([items])[0]
    else:
        raise TypeError("parameters must be tensors or lists of tensors, got a mixture")
    return norms, torch.clamp(max_norm / (norms + 1e-6), max=1.0)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def _norms(lists: list[list[Tensor]]) -> Tensor:
    """Norms of the gradients [num_lists]."""
    grads = [[p.grad for p in parameters if p.grad is not None] for parameters in lists]
    cut = [[g for g in own if hasattr(g, "to_local")] for own in grads]
    if not any(cut):
        return torch.stack([_norm(own, parameters) for own, parameters in zip(grads, lists, strict=True)])
    whole = [[g for g in own if not hasattr(g, "to_local")] for own in grads]
    squares = torch.stack([_norm([local(g) for g in own], parameters).square()
                           for own, parameters in zip(cut, lists, strict=True)])
    for group in _shard_groups(next(own[0] for own in cut if own)):
        dist.all_reduce(squares, group=group)
    squares += torch.stack([_norm(own, parameters).square() for own, parameters in zip(whole, lists, strict=True)])
    return squares.sqrt()


def _norm(grads: list[Tensor], parameters: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    # squares of half precision gradients are summed in float32
    return torch.nn.utils.get_total_norm([g if g.dtype == torch.float64 else g.float() for g in grads])


def _shard_groups(tensor: Tensor) -> list:
    """The process groups whose ranks hold different rows of a DTensor."""
    mesh = tensor.device_mesh
    return [mesh.get_group(i) for i, placement in enumerate(tensor.placements) if placement.is_shard()]
