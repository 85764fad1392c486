"""What the probes and pictures ask of features and labels; each failure is one line."""

import torch
from torch import Tensor


def check_split(name: str, features: Tensor, labels: Tensor) -> None:
    """Features [n, D] finite, labels as in `check_labels`; `name` is the split, "train" or "test"."""
    check_features(f"{name}_features", features)
    check_labels(f"{name}_labels", labels, f"{name}_features", features)
    if labels.device != features.device:
        raise ValueError(f"{name}_labels must be on {features.device} as {name}_features, got {labels.device}")
    bad_rows = int((~torch.isfinite(features)).any(1).sum())
    if bad_rows:
        raise ValueError(f"{name}_features must be finite, got NaN or infinity in {bad_rows} of {len(features)} rows")


def check_features(name: str, features: Tensor) -> None:
    """Features [n, D] floating point with n and D > 0."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a [n, D] tensor, got {type(features).__name__}")
    if features.dim() != 2 or not features.numel() or not features.is_floating_point():
        raise ValueError(f"{name} must be [n, D] floating point with n, D > 0, "
                         f"got {list(features.shape)} {features.dtype}")


def check_labels(name: str, labels: Tensor, features_name: str, features: Tensor) -> None:
    """Labels [n] int64 >= 0, one for each row of features."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be an int64 tensor of class numbers, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        raise ValueError(f"{name} must be [{features.shape[0]}] int64, one for each row of {features_name}, "
                         f"got {list(labels.shape)} {labels.dtype}")
    if int(labels.min()) < 0:
        raise ValueError(f"{name} must be >= 0, got {int(labels.min())}; leave rows without a class out")


def check_same_width(train_features: Tensor, test_features: Tensor) -> None:
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(f"test_features must have width {train_features.shape[1]} as train_features, "
                         f"got {test_features.shape[1]}")
