"""Gradient clipping without a pass over the gradients and without stopping the device."""

from collections.abc import Iterable

import torch
from torch import Tensor


def clip_scale(parameters: Iterable[Tensor] | Iterable[Iterable[Tensor]], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of all gradients together, and the factor min(1, max_norm / (norm + 1e-6)), both float32 [].

    Of several lists of parameters (V-JEPA clips encoder and predictor separately) both are [num_lists]. Nothing is
    multiplied here: `AdamWEMA.step(grad_scale=...)` does that on the way. Same numbers as
    `torch.nn.utils.clip_grad_norm_`; parameters without gradient do not count. Raises ValueError for max_norm <= 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    items = [item if isinstance(item, Tensor) else list(item) for item in parameters]
    if items and all(isinstance(item, list) for item in items):
        norms = torch.stack([_norm(item) for item in items])
    elif all(isinstance(item, Tensor) for item in items):
        norms = _norm(items)
    else:
        raise TypeError("parameters must be tensors or lists of tensors, got a mixture")
    return norms, torch.clamp(max_norm / (norms + 1e-6), max=1.0)


@torch.no_grad()
def _norm(parameters: list[Tensor]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    # squares of half precision gradients are summed in float32
    return torch.nn.utils.get_total_norm([g if g.dtype == torch.float64 else g.float() for g in grads])
