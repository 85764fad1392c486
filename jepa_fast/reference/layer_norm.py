"""Layer normalisation of rows, of a residual sum where there is one, and the gradient.

    h = x + residual,   the residual stream, rounded to the residual's dtype
    out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias,   over D
    grad_h = rstd (g - mean(g) - n mean(g n)) + what reaches h by itself,   g = grad * weight, n = (h - mean(h)) rstd
    grad_weight = sum over rows of grad * n,   grad_bias = sum over rows of grad

Layer normalisation: arXiv:1607.06450, section 3; ahead of each branch of a block, on the stream: arXiv:2002.04745.
"""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
               out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> out [..., D] in out_dtype, mean [...], rstd [...]."""
    dtype = widened(x)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    out, mean, rstd = torch.native_layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    return out.to(out_dtype), mean.squeeze(-1), rstd.squeeze(-1)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
                   out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out, h = x + residual in the residual's dtype, mean, rstd."""
    dtype = torch.promote_types(widened(x), residual.dtype)
    summed = (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
    out, mean, rstd = layer_norm(summed, weight, bias, eps, out_dtype)
    return out, summed, mean, rstd


def layer_norm_backward(grad: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor,
                        rstd: Tensor, branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad of x [..., D] in x's dtype, again in branch_dtype (or [0]), those of weight and bias [2, D] (or [2, 0])."""
    dtype, affine = widened(x), weight is not None
    weight = weight.to(dtype) if affine else None
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype).contiguous(), x.to(dtype).contiguous(), x.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), weight,
        weight, (True, affine, affine))
    if grad_summed is not None:
        grad_x = grad_x + grad_summed.to(dtype)
    branch = x.new_empty(0) if branch_dtype is None else grad_x.to(branch_dtype)
    grad_affine = torch.stack([grad_weight, grad_bias]) if affine else mean.new_empty(2, 0)
    return grad_x.to(x.dtype), branch, grad_affine


def widened(x: Tensor) -> torch.dtype:
    """In which a row is summed: float32, or float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)
