"""Violation of expectation: is a video model more surprised by what cannot happen?

A window slides over a clip. From the tokens of its first time steps the predictor predicts the representation of the
others; the mean absolute difference to the target encoder's representation of the window is the window's surprise, the
mean (or the largest) over the windows that of the clip. Of two clips that are equal up to an event, the impossible one
should surprise more. Garrido et al., arXiv:2502.11831.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masking import Masks
from ..objectives.video_prediction import VideoPrediction
from ..objectives.video_prediction21 import HierarchicalVideoPrediction
from .table import Table

VideoObjective = VideoPrediction | HierarchicalVideoPrediction

# windows [B, C, T, H, W] -> surprise [B]
WindowSurprise = Callable[[Tensor], Tensor]


def predict_window(objective: VideoObjective, windows: Tensor, context_steps: int) -> list[tuple[Tensor, Tensor]]:
    """(prediction, target) [B, K, D] of the time steps of windows [B, C, T, H, W] after the first `context_steps`.

    One pair for each level that the objective predicts: one, or several in V-JEPA 2.1. Targets are normalised as in the
    loss; the mask token is the first one. Raises ValueError if no step or all are context.
    """
    is_hierarchical = isinstance(objective, HierarchicalVideoPrediction)
    time, rows, columns = (objective.encoder if is_hierarchical else objective.encoder.patch_embed).grid(windows)
    if not 0 < context_steps < time:
        raise ValueError(f"context_steps must be in [1, {time - 1}], of {time} time steps, got {context_steps}")
    B, N, first = len(windows), time * rows * columns, context_steps * rows * columns
    tokens = torch.arange(N).expand(B, N)
    masks = Masks.from_lists([tokens[:, :first]], [tokens[:, first:]], N, is_paired=True)
    if is_hierarchical:
        groups = [objective.group(windows, masks, scale=0.0)]
        predictions, targets = objective.predict(groups, groups[0].masks)[0][0], objective.targets(groups, groups[0].masks)
    else:
        masks = objective.pack(masks).to(windows.device)
        predictions, targets = [objective.predict(windows, masks)], [objective.targets(windows)]
    return [(prediction.view(B, N - first, -1), F.layer_norm(target, target.shape[-1:]).view(B, N, -1)[:, first:])
            for prediction, target in zip(predictions, targets, strict=True)]


def latent_surprise(objective: VideoObjective, context_steps: int) -> WindowSurprise:
    """The surprise of windows to an objective that predicts video: mean |prediction - target|."""

    @torch.no_grad()
    def surprise(windows: Tensor) -> Tensor:
        levels = predict_window(objective.eval(), windows, context_steps)
        return sum((prediction - target).abs().mean((1, 2)) for prediction, target in levels) / len(levels)

    return surprise


def clip_surprise(surprise: WindowSurprise, clips: Tensor, num_frames: int, *, stride: int = 2,
                  reduce: Literal["mean", "max"] = "mean") -> Tensor:
    """Surprise [B] of clips [B, C, T, H, W]: windows of `num_frames` frames begin at every `stride`-th frame."""
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce must be mean or max, got {reduce!r}")
    if not 0 < num_frames <= clips.shape[2] or stride < 1:
        raise ValueError(f"num_frames must be in [1, {clips.shape[2]}], the frames of a clip, and stride at least 1, "
                         f"got {num_frames} and {stride}")
    windows = clips.unfold(2, num_frames, stride)                                # [B, C, W, H', W', num_frames]
    windows = windows.permute(0, 2, 1, 5, 3, 4)
    values = torch.stack([surprise(windows[:, i].contiguous()) for i in range(windows.shape[1])], 1)
    return values.mean(1) if reduce == "mean" else values.amax(1)


@dataclass(frozen=True)
class PairwiseAccuracy:
    """In how many of n pairs the impossible clip surprised more; a tie counts half."""

    right: float
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy, Wilson's (1927), which stays within [0, 1]."""
        z, p, n = 1.959964, self.accuracy, self.n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.accuracy:.1f} ({100 * low:.0f} – {100 * high:.0f})"


def pairwise_accuracy(surprise: WindowSurprise, pairs, prepare: Callable[[Tensor], Tensor], num_frames: int, *,
                      stride: int = 2, reduce: Literal["mean", "max"] = "mean",
                      batch_size: int = 16) -> dict[str, PairwiseAccuracy]:
    """By kind of event, and "all": how often the impossible clip of a pair surprises more.

    `pairs` as `data.ImpossiblePairs`; `prepare` makes of its uint8 clips [n, C, T, H, W] what the model takes.
    """
    right = torch.cat([_right(surprise, prepare(pairs.pairs(part).flatten(0, 1)), num_frames, stride, reduce)
                       for part in torch.arange(len(pairs)).split(batch_size)])
    result = {}
    for number, kind in enumerate(pairs.kinds):
        of_kind = right[pairs.kind == number]
        if len(of_kind):
            result[kind] = PairwiseAccuracy(float(of_kind.sum()), len(of_kind))
    return result | {"all": PairwiseAccuracy(float(right.sum()), len(right))}


def _right(surprise: WindowSurprise, clips: Tensor, num_frames: int, stride: int, reduce: str) -> Tensor:
    """[B] in {0, 0.5, 1} of clips [2 B, ...], possible and impossible in turn."""
    possible, impossible = clip_surprise(surprise, clips, num_frames, stride=stride, reduce=reduce).view(-1, 2).cpu().T
    return torch.where(impossible == possible, 0.5, (impossible > possible).float())


def surprise_table(accuracies: Mapping[str, Mapping[str, PairwiseAccuracy]], title: str) -> Table:
    """Kinds of events down, models across: percent of pairs and its 95 % interval, beside chance."""
    kinds = list(next(iter(accuracies.values())))
    rows = [(kind, f"{next(iter(accuracies.values()))[kind].n}", "50.0",
             *(str(by_kind[kind]) for by_kind in accuracies.values())) for kind in kinds]
    return Table(title, ("event", "pairs", "chance %", *(f"{name} %" for name in accuracies)), rows)
