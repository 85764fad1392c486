"""Distance of predictions from the normalised output of the target encoder, and its gradient.

    h = (t - mean(t)) / sqrt(var(t) + eps)    per row t = target[target_idx[p]], over D, without weight and bias
    loss = sum over p of weight[p] * mean over D of smooth_l1(prediction[p] - h);   weight 1 / P where none is given
    smooth_l1(d) = d^2 / (2 beta) where |d| < beta, else |d| - beta / 2;   beta = 0: |d|

I-JEPA, arXiv:2301.08243, section 3 (smooth L1, beta 1); V-JEPA, arXiv:2404.08471, section 3.1 (L1). Normalising the
target before or after the gather is the same, since both work on rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def latent_loss(prediction: Tensor, target: Tensor, target_idx: Tensor | None, weight: Tensor | None, beta: float,
                eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], stats [3] (means over rows of cosine, prediction power, target std), mean [P], rstd [P]."""
    z, t = widen(prediction, target, target_idx)
    _, mean, rstd = torch.native_layer_norm(t, t.shape[1:], None, None, eps)
    mean, rstd = mean.squeeze(1), rstd.squeeze(1)
    h = normalise(t, mean, rstd)
    losses = F.smooth_l1_loss(z, h, reduction="none", beta=beta).mean(1)
    loss = losses.mean() if weight is None else (losses * weight).sum()
    std = (t - mean.unsqueeze(1)).square().mean(1).sqrt()
    stats = torch.stack([F.cosine_similarity(z, h, dim=1).mean(), z.square().mean(), std.mean()])
    return loss, stats, mean, rstd


def latent_loss_backward(grad_loss: Tensor, prediction: Tensor, target: Tensor, target_idx: Tensor | None,
                         weight: Tensor | None, mean: Tensor, rstd: Tensor, beta: float) -> Tensor:
    """-> grad_loss * weight[p] / D * clamp((prediction - h) / beta, -1, 1) [P, D]; the sign where beta is 0."""
    z, t = widen(prediction, target, target_idx)
    difference = z - normalise(t, mean, rstd)
    slope = difference.sign() if beta == 0 else (difference / beta).clamp(-1, 1)
    P, D = prediction.shape
    scale = grad_loss / (P * D) if weight is None else grad_loss * weight.unsqueeze(1) / D
    return (slope * scale).to(prediction.dtype)


def widen(prediction: Tensor, target: Tensor, target_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both [P, D] and contiguous, in float32, or float64 where one of them is."""
    dtype = loss_dtype(prediction, target)
    t = target if target_idx is None else target[target_idx]
    return prediction.to(dtype).contiguous(), t.to(dtype).contiguous()


def loss_dtype(prediction: Tensor, target: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)


def normalise(t: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (t - mean.unsqueeze(1)) * rstd.unsqueeze(1)
