"""Collapse monitors: numbers that fall when an encoder starts to say the same about every image.

    std             standard deviation of each feature over the samples; 0 where a feature is constant
    effective_rank  exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j, s the singular values of the [n, D] features:
                    between 1 and min(n, D), 0 for all-zero features.  RankMe, arXiv:2210.02885, section 3
                    (without the paper's 1e-7 inside p, which only keeps the logarithm finite)
    cosine          mean cosine similarity of predictions and targets; 1 with a falling rank is collapse, not success

As in RankMe the features are not centred: a large common mean lowers the rank too, and the features minus their mean
give the rank around it. Singular values are square roots of the eigenvalues of the smaller Gram matrix, in float64:
in float32 every zero among them would come out near 3e-4 of the largest.

All results are 0-dim tensors on the device of the features. Nothing waits for the device but the effective rank, since
`eigvalsh` does on CUDA: take it at the steps that print, or keep `feature_moments` (no wait) and read them there. NaN
or infinite features give NaN, never an exception.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_features


@torch.no_grad()
def collapse_monitors(features: Tensor, *, max_rows: int = 512) -> dict[str, Tensor]:
    """`std_mean`, `std_min` (over the D features) and `effective_rank` of features [n, D] at hand, float32.

    The standard deviation (divided by n, not n - 1) takes all rows; the rank at most `max_rows`, evenly spaced.
    """
    return {**standard_deviations(features), "effective_rank": effective_rank(features, max_rows=max_rows)}


@torch.no_grad()
def standard_deviations(features: Tensor) -> dict[str, Tensor]:
    """`std_mean` and `std_min` of `collapse_monitors`. No wait."""
    check_features("features", features)
    x = features.detach().double()
    # sum / n instead of mean(), which may multiply by 1 / n: the mean of a constant is then exact, and its deviation 0
    std = (x - x.sum(0) / x.shape[0]).square().mean(0).sqrt()
    return {"std_mean": std.mean().float(), "std_min": std.min().float()}


@torch.no_grad()
def effective_rank(features: Tensor, *, max_rows: int = 512) -> Tensor:
    """RankMe of at most `max_rows` evenly spaced rows of features [n, D], 0-dim float32; at most min(max_rows, D)."""
    return rank_of_gram(gram_of_rows(features, max_rows=max_rows))


@torch.no_grad()
def gram_of_rows(features: Tensor, *, max_rows: int = 512) -> Tensor:
    """What `rank_of_gram` needs of at most `max_rows` evenly spaced rows: the smaller Gram matrix, float64. No wait."""
    check_features("features", features)
    if max_rows < 1:
        raise ValueError(f"max_rows must be >= 1, got {max_rows}")
    n = features.shape[0]
    x = features.detach()[::-(-n // max_rows)].double()
    return x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x


@torch.no_grad()
def feature_moments(features: Tensor) -> Tensor:
    """Everything the monitors need of features [n, D], as one float64 sum: [D + 1, D + 1] = [1, x]^T [1, x].

    It holds the count, the sum and the second moment. Moments of several batches add up, and so do those of several
    processes: one `torch.distributed.all_reduce(moments)` makes the monitors exact for the global batch.
    """
    check_features("features", features)
    x = F.pad(features.detach().double(), (1, 0), value=1.0)
    return x.T @ x


@torch.no_grad()
def monitors_of_moments(moments: Tensor) -> dict[str, Tensor]:
    """What `collapse_monitors` gives with every row in the rank, from `feature_moments` (summed or not).

    A standard deviation below about 1e-7 of its feature's mean is rounding here, unlike in `collapse_monitors`.
    """
    if moments.dim() != 2 or moments.shape[0] != moments.shape[1] or moments.shape[0] < 2 \
            or moments.dtype != torch.float64:
        raise ValueError(f"moments must be [D + 1, D + 1] float64, got {list(moments.shape)} {moments.dtype}")
    mean = moments[0, 1:] / moments[0, 0]
    std = (moments.diagonal()[1:] / moments[0, 0] - mean.square()).clamp_min(0).sqrt()
    return {"std_mean": std.mean().float(), "std_min": std.min().float(),
            "effective_rank": rank_of_gram(moments[1:, 1:])}


@torch.no_grad()
def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine similarity of the rows of two [..., D] tensors, 0-dim float32; a zero row counts as 0."""
    if prediction.shape != target.shape or prediction.dim() < 1 or not prediction.numel():
        raise ValueError(f"prediction and target must have one non-empty [..., D] shape, "
                         f"got {list(prediction.shape)} and {list(target.shape)}")
    unit = [F.normalize(x.detach().float(), dim=-1) for x in (prediction, target)]
    return (unit[0] * unit[1]).sum(-1).mean()


@torch.no_grad()
def rank_of_gram(gram: Tensor) -> Tensor:
    """RankMe of the rows whose Gram matrix this is, 0-dim float32. Waits for the device on CUDA."""
    # eigvalsh raises on NaN; the trainer, not a monitor, is to name the step where one appears
    is_finite = torch.isfinite(gram).all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(is_finite, gram, 0.0)).clamp_min(0)   # ascending
    # rounding of the largest reaches every eigenvalue: what is below it is zero
    floor = eigenvalues[-1] * (gram.shape[0] * torch.finfo(gram.dtype).eps)
    singular = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    p = singular / singular.sum()   # 0 / 0 for all-zero features, replaced below
    rank = torch.exp(torch.special.entr(p).sum())
    rank = torch.where(singular.sum() > 0, rank, 0.0)
    return torch.where(is_finite, rank, float("nan")).float()
