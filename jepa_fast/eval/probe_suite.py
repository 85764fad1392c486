"""One table that says what training was worth: the same probes on several features of the same images."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .knn import knn_accuracy
from .linear import linear_probe
from .table import Table


def evaluate_features(named_features: Mapping[str, tuple[Tensor, Tensor]], train_labels: Tensor, test_labels: Tensor, *,
                      k: int = 20, weight_decay: float | Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
                      title: str = "Frozen features") -> Table:
    """Linear-probe and kNN accuracy in percent of each (train_features [n, D], test_features [m, D]), in their order.

    For instance {"raw pixels": ..., "untrained encoder": ..., "trained encoder": ...}; widths may differ. Samples of
    more dimensions are flattened. `k`, `weight_decay` as in `knn_accuracy` and `linear_probe`, whose errors it raises.
    """
    if not named_features:
        raise ValueError("named_features must name at least one pair of features, got none")
    rows = []
    for name, pair in named_features.items():
        train, test = (features.flatten(1) for features in pair)
        linear = linear_probe(train, train_labels, test, test_labels, weight_decay=weight_decay).accuracy
        nearest = knn_accuracy(train, train_labels, test, test_labels, k=k)
        rows.append((name, f"{train.shape[1]}", f"{100 * linear:.1f}", f"{100 * nearest:.1f}"))
    return Table(title, ("features", "width", "linear probe %", f"kNN (k={k}) %"), rows)
