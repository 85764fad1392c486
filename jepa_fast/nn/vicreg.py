"""VICReg's terms as EB-JEPA normalises them, over the global batch where there are several ranks.

Bardes et al., arXiv:2105.04906; with the temporal terms of PLDM, arXiv:2502.14819. Rows are samples: x [N, D].
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops._distributed import sum_over_ranks


def hinge_std(x: Tensor, margin: float = 1.0) -> Tensor:
    """How far the standard deviations fall short of `margin`: mean over features of relu(margin - sqrt(var + 1e-4))."""
    return F.relu(margin - torch.sqrt(_centred(x).square().sum(0) / (_num_rows(x) - 1) + 1e-4)).mean()


def covariance(x: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of the unbiased covariance.

    Where rows are fewer than features the sum of squares is taken from the N x N Gram matrix, which has the same one.
    """
    x, (N, D) = _centred(x), (_num_rows(x), x.shape[1])
    product = (x @ x.T if N < D else x.T @ x) / (N - 1)
    variance = x.square().sum(0) / (N - 1)
    return (product.square().sum() - variance.square().sum()) / (D * (D - 1))


def temporal_similarity(x: Tensor) -> Tensor:
    """Mean squared difference of consecutive steps; x [T, B, D]."""
    return x.diff(dim=0).square().mean()


def vicreg(z1: Tensor, z2: Tensor, std_weight: float = 1.0, cov_weight: float = 80.0) -> Tensor:
    """Invariance, variance and covariance of two views [N, D]."""
    return (F.mse_loss(z1, z2) + std_weight * (hinge_std(z1) + hinge_std(z2))
            + cov_weight * (covariance(z1) + covariance(z2)))


def vc(x: Tensor, std_weight: float = 10.0, cov_weight: float = 100.0) -> Tensor:
    """Variance and covariance; x [B, C, T, H, W], every position a row of C channels."""
    rows = x.movedim(1, -1).flatten(0, -2)
    return std_weight * hinge_std(rows) + cov_weight * covariance(rows)


def all_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, with gradients; after DistributedDataParallel's mean they are those of the global batch.

    As many rows on every rank. A sum of padded rows, not an all-gather, whose gradient may wait forever on gloo.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    before, after = dist.get_rank() * len(x), (dist.get_world_size() - dist.get_rank() - 1) * len(x)
    return sum_over_ranks(F.pad(x, (0, 0, before, after)), dist.group.WORLD, upstream_sync=True)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def _num_rows(x: Tensor) -> int:
    if x.dim() != 2 or x.shape[0] < 2 or x.shape[1] < 2:
        raise ValueError(f"x must be [N, D] with N and D at least 2, got {list(x.shape)}")
    return x.shape[0]
