"""A matrix product and, where there is one, a bias: out = a b + bias."""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a [M, K], b [K, N], bias [N] -> [M, N]."""
    return a @ b if bias is None else torch.addmm(bias, a, b)
