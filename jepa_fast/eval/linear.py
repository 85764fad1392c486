"""Linear probe: multinomial logistic regression on frozen features, solved to its optimum."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_same_width, check_split


@dataclass(frozen=True, kw_only=True)
class LinearProbeResult:
    """A fitted probe; its tensors are on the device of the features, in the dtype of the fit."""
    accuracy: float           # fraction of the test rows classified right
    train_accuracy: float     # the same on the train rows
    weight: Tensor            # [C, D], for standardised features
    bias: Tensor              # [C]
    mean: Tensor              # [D] of the train features
    std: Tensor               # [D] of the train features, 1 where a feature is constant
    weight_decay: float       # the one given, or the one chosen
    grad_max: float           # largest absolute entry of the gradient at the end: how converged the fit is

    def logits(self, features: Tensor) -> Tensor:
        """features [n, D] -> [n, C]."""
        return F.linear((features.to(self.mean) - self.mean) / self.std, self.weight, self.bias)


def linear_probe(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *,
                 weight_decay: float | Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4), holdout: float = 0.2, seed: int = 0,
                 tolerance: float = 1e-5, max_iterations: int = 1000,
                 dtype: torch.dtype = torch.float64) -> LinearProbeResult:
    """Minimise mean cross entropy + weight_decay / 2 * |weight|^2 over the train rows, by full-batch L-BFGS.

    Features [n, D] of any floating dtype are standardised with the mean and standard deviation of the train rows;
    labels [n] int64 >= 0; the bias is not decayed. sklearn's LogisticRegression(C) has the same optimum at
    weight_decay = 1 / (n * C). Of several decays the most accurate on held-out train rows is taken (a fraction
    `holdout`, drawn from `seed`; at a tie the largest decay) and fitted again on all of them: the test rows choose
    nothing. A fit ends when no entry of the gradient exceeds `tolerance`. Deterministic; float32 takes half the time
    and memory, float64 keeps rounding out of the answer. Raises TypeError or ValueError for what does not fit.
    """
    check_split("train", train_features, train_labels)
    check_split("test", test_features, test_labels)
    check_same_width(train_features, test_features)
    decays = sorted(weight_decay if isinstance(weight_decay, Sequence) else [weight_decay], reverse=True)
    if not decays or not all(0 <= decay < float("inf") for decay in decays):
        raise ValueError(f"weight_decay must be a finite number >= 0 or several, got {weight_decay}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    train_features, test_features = train_features.detach().to(dtype), test_features.detach()
    if len(decays) > 1:
        kept, held = _split(len(train_labels), holdout, seed, train_labels.device)
        probes = _probes(train_features[kept], train_labels[kept], train_features[held], train_labels[held], decays,
                         tolerance, max_iterations)
        decays = [max(probes, key=lambda probe: probe.accuracy).weight_decay]   # the first, so the largest, at a tie
    return next(_probes(train_features, train_labels, test_features, test_labels, decays, tolerance, max_iterations))


def _split(n: int, holdout: float, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers kept and held out, the same on every device."""
    num_held = round(n * holdout)
    if not 0 < num_held < n:
        raise ValueError(f"holdout must leave train rows on both sides, got {holdout} of {n} rows")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    return order[num_held:], order[:num_held]


def _probes(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor,
            decays: Sequence[float], tolerance: float, max_iterations: int) -> Iterator[LinearProbeResult]:
    """One fit per decay, each from where the last one ended; train_features in the dtype of the fit."""
    std, mean = torch.std_mean(train_features, dim=0, correction=0)
    # rounding leaves a trace of spread in a constant feature: dividing by it would make it as large as the others
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    x = (train_features - mean) / std
    num_classes = int(train_labels.max()) + 1
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    for decay in decays:
        weight, bias, grad_max = _minimise(x, train_labels, weight, bias, decay, tolerance, max_iterations)
        probe = LinearProbeResult(accuracy=0.0, train_accuracy=_accuracy(F.linear(x, weight, bias), train_labels),
                                  weight=weight, bias=bias, mean=mean, std=std, weight_decay=float(decay),
                                  grad_max=grad_max)
        yield replace(probe, accuracy=_accuracy(probe.logits(test_features), test_labels))


@torch.enable_grad()
def _minimise(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, decay: float, tolerance: float,
              max_iterations: int) -> tuple[Tensor, Tensor, float]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, max_eval=2 * max_iterations,
                                  tolerance_grad=tolerance, tolerance_change=torch.finfo(x.dtype).eps,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()   # the line search may have ended on another point than it returned
    return weight.detach(), bias.detach(), float(torch.cat([weight.grad.flatten(), bias.grad]).abs().max())


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(1) == labels).sum()) / len(labels)
