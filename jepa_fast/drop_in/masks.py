"""`apply_masks` and `repeat_interleave_batch` of I-JEPA, V-JEPA and V-JEPA 2, with their signatures and values."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..ops import gather_tokens

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def apply_masks(x: Tensor, masks: Iterable[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """Tokens of x [B, N, D] at masks, a list of [B, K] int64 or a tensor [M, B, K]: -> [M * B, K, D], mask by mask.

    concat=False: a list of [B, K, D] instead, where K may differ. Indices may repeat; their gradients add up.
    """
    masks = list(masks)
    if not _is_plain(x, masks):
        tokens = [torch.gather(x, 1, mask.unsqueeze(-1).repeat(1, 1, x.size(-1))) for mask in masks]
        return torch.cat(tokens) if concat else tokens
    if not concat:
        return [gather_tokens(x, mask) for mask in masks]
    if len(masks) == 1:
        return gather_tokens(x, masks[0])
    B, N, D = x.shape
    rows = torch.cat(masks).view(len(masks), B, -1) + torch.arange(B, device=x.device).view(1, B, 1) * N
    return gather_tokens(x.reshape(B * N, D), rows.flatten()).view(len(masks) * B, -1, D)


def _is_plain(x: Tensor, masks: list[Tensor]) -> bool:
    """Whether the op takes this call; it knows no compiler, no transforms, and one batch size only."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return (type(x) in (Tensor, nn.Parameter) and x.dim() == 3 and x.dtype in _FLOATS and len(masks) > 0
            and all(type(mask) is Tensor and mask.dtype == torch.int64 and mask.device == x.device
                    and mask.dim() == 2 and mask.shape[0] == x.shape[0] for mask in masks))


def repeat_interleave_batch(x: Tensor, B: int, repeat: int) -> Tensor:
    """Each batch of B rows `repeat` times: rows of batch 0, batch 0, ..., batch 1, batch 1, ...; a rest is dropped.

    x [M * B, ...] -> [M * repeat * B, ...], a view where repeat is 1.
    """
    num_batches = len(x) // B
    if num_batches < 1 or repeat < 1:
        raise ValueError(f"x must hold a batch of B = {B} rows and repeat must be positive, got {len(x)} rows and {repeat}")
    batches = x[:num_batches * B].unflatten(0, (num_batches, 1, B))
    return batches.expand(-1, repeat, *batches.shape[2:]).flatten(0, 2)
