"""Matrix products of the modules: PyTorch's, but for float32 on CPUs and for weights that bring a product of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import matmul
from .fp8 import Float8Weight


def linear(x: Tensor, weight: Tensor | Float8Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> x weight^T + bias [..., N]."""
    if isinstance(weight, Float8Weight):
        return weight.linear(x, bias)
    if _is_float32_on_cpu(x):
        return matmul(x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [K, N] -> [M, N]."""
    return matmul(a, b) if _is_float32_on_cpu(a) else torch.mm(a, b)


def _is_float32_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
