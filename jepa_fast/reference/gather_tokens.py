"""Rows by index: what the context encoder keeps, and its adjoint.

    gather:   out[p] = x[index[p]] + positions[position_index[p]]
    scatter:  out[r] = sum over p with index[p] = r of values[p], or `fill` where there is none, + positions[r]

I-JEPA, arXiv:2301.08243, section 3: the context encoder sees only the kept patches, the predictor sees them followed by
mask tokens, all with positions added.
"""

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor, positions: Tensor | None, position_index: Tensor | None) -> Tensor:
    """x [B, N, D], index [B, K] -> [B, K, D]."""
    out = torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    if positions is None:
        return out
    if position_index is None:
        position_index = index % positions.shape[0]
    return out + positions[position_index]


def scatter_tokens(values: Tensor, index: Tensor, num_tokens: int, fill: Tensor | None,
                   positions: Tensor | None) -> Tensor:
    """values [B, K, D], index [B, K] -> [B, num_tokens, D]."""
    B, _, D = values.shape
    out = values.new_zeros(B, num_tokens, D).scatter_add(1, index.unsqueeze(-1).expand_as(values), values)
    if fill is not None:
        out = torch.where(is_written(index, num_tokens).unsqueeze(-1), out, fill)
    if positions is not None:
        out = out + positions.repeat(num_tokens // positions.shape[0], 1)
    return out


def is_written(index: Tensor, num_tokens: int) -> Tensor:
    """index [B, K] -> [B, num_tokens] bool: rows that some index names."""
    return torch.zeros(index.shape[0], num_tokens, dtype=torch.bool, device=index.device).scatter_(1, index, True)
