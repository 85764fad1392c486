"""Weighted nearest neighbours on frozen features: the probe with nothing to train."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_same_width, check_split


@torch.no_grad()
def knn_accuracy(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *,
                 k: int = 20, temperature: float = 0.07, chunk: int | None = None) -> float:
    """Part of the test rows, in [0, 1], whose class wins a vote of their `k` nearest train rows.

    Similarity s is the cosine, a neighbour's vote exp(s / temperature); among equal classes the lowest number wins.
    Features [n, D] of any floating dtype (compared in float32, float64 stays), labels [n] int64 >= 0; a test label
    that no train row has counts as wrong. `chunk` is how many test rows are compared at once; None keeps their
    similarities under 128 MiB. Raises ValueError for k > n and for sizes, dtypes or values that do not fit.
    Wu et al., arXiv:1805.01978, section 3.4; k = 20 and 0.07 as in DINO, arXiv:2104.14294.
    """
    check_split("train", train_features, train_labels)
    check_split("test", test_features, test_labels)
    check_same_width(train_features, test_features)
    n = train_features.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], the number of train rows, got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk is None:
        chunk = max(1, 2**25 // n)
    elif chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    keys = _unit(train_features)
    num_classes = int(train_labels.max()) + 1
    num_right = torch.zeros((), dtype=torch.int64, device=keys.device)
    for rows, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        similarity, nearest = (_unit(rows).to(keys.dtype) @ keys.T).topk(k)   # [chunk, k]
        # the best neighbour votes 1, so no temperature overflows; the winner stays the same
        votes = torch.exp((similarity - similarity[:, :1]) / temperature)
        scores = votes.new_zeros(len(rows), num_classes).scatter_add_(1, train_labels[nearest], votes)
        num_right += (scores.argmax(1) == labels).sum()
    return int(num_right) / len(test_labels)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
