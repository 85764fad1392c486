"""GELU of a sum with a bias, and its gradient.

    out = z Phi(z),   z = x + bias,   Phi(z) = (1 + erf(z / sqrt 2)) / 2
    grad_x = grad (Phi(z) + z phi(z)),   phi(z) = exp(-z^2 / 2) / sqrt(2 pi),   grad_bias = sum over rows of grad_x

Gaussian error linear units, arXiv:1606.08415, section 2, exact (no tanh).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """x [..., D], bias [D] -> [..., D] in x's dtype."""
    return F.gelu(widened_sum(x, bias)).to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """-> grad_x [..., D], grad_bias [D]; rows are summed before rounding to x's dtype."""
    z = widened_sum(x, bias)
    slope = 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    grad_z = grad.to(z.dtype) * slope
    return grad_z.to(x.dtype), grad_z.flatten(0, -2).sum(0).to(bias.dtype)


def widened_sum(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, contiguous, in float32, or float64 where one of them is."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32)
    return x.contiguous().to(dtype) + bias.to(dtype)
