"""Principal components with a fixed sign, so that the same features always give the same picture."""

import torch
from torch import Tensor

from ._check import check_features


@torch.no_grad()
def principal_components(features: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
    """Coordinates [n, k] of features [n, D] on their first k components, and the fraction [k] of the variance of each.

    float64 on the CPU; components beyond min(n, D) are zero. Sign: the entry of a component with the largest absolute
    value is positive. Raises ValueError for features that are not finite.
    """
    check_features("features", features)
    x = features.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("features must be finite, got NaN or infinity")
    x = x - x.mean(0)
    variance, axes = torch.linalg.eigh(x.T @ x)   # ascending
    variance, axes = variance.flip(0).clamp_min(0)[:num_components], axes.flip(1)[:, :num_components]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    missing = num_components - axes.shape[1]
    coordinates = torch.nn.functional.pad(x @ axes, (0, missing))
    total = x.square().sum()
    fraction = torch.where(total > 0, variance / total, 0.0)
    return coordinates, torch.nn.functional.pad(fraction, (0, missing))
