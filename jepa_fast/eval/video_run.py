"""What `jepa-fast eval` does with a video run: probes of motion and content, surprise, pictures over time."""

import math
import pathlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import recipes
from ..data import ImpossiblePairs
from .clip_pictures import clip_strips, event_strips
from .clip_splits import Split, is_video, mean_and_std, splits
from .curves import learning_curves
from .knn import knn_accuracy
from .linear import linear_probe
from .pictures import features_scatter
from .probe_grid import ProbeGridConfig, attentive_probe
from .surprise import PairwiseAccuracy, VideoObjective, latent_surprise, pairwise_accuracy, surprise_table
from .table import Table

MAX_TRAIN, MAX_TEST, NUM_PAIRS = 1000, 1000, 300
MAX_BYTES = 2 * 2**30           # of the tokens of one encoder; fewer clips where they would take more
POOLED = (8, 12, 12)            # raw clips are shrunk to this for the raw-pixel row
NUM_SHOWN = 16                  # held-out clips whose tokens are drawn, or fitted with those that are
PAIRS_SIZE = 64                 # pixels of the pairs' clips; drawn larger for larger models
PROBES = ProbeGridConfig(depth=1, batch_size=128)

__all__ = ["evaluate_video", "is_video"]


@dataclass(frozen=True)
class Features:
    """What each encoder says of one split, by name: pooled [n, D] float32, tokens [n, N, D] float16."""

    pooled: dict[str, Tensor]
    tokens: dict[str, Tensor]
    labels: dict[str, Tensor]            # of each question
    shown: Tensor                        # the first clips, [NUM_SHOWN, C, T, H, W] in [0, 1], on the CPU


def evaluate_video(folder: pathlib.Path, recipe: "recipes.Recipe", untrained: nn.Module, trained: nn.Module,
                   step: int, probe_depth: int = 1) -> tuple[list[Table], list[tuple[str, str]]]:
    """Tables and pictures (file name in `folder`, caption) of a run whose data makes clips."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objectives = {"untrained": untrained.to(device).eval(), "trained": trained.to(device).eval()}
    encoders = {f"{name} encoder": objective.evaluation_encoder() for name, objective in objectives.items()}
    config = encoders["trained encoder"].config
    raw_width = config.in_chans * config.tubelet_size * config.patch_size**2
    share = MAX_BYTES / (2 * math.prod(config.grid) * max(config.embed_dim, raw_width) * (MAX_TRAIN + MAX_TEST))
    most = [max(20, int(limit * min(1.0, share))) for limit in (MAX_TRAIN, MAX_TEST)]
    train_split, test_split = splits(recipe.data, *most, config.image_size, device)
    train, test = (features_of(encoders, split) for split in (train_split, test_split))
    title = f"{recipe.name} after {step} steps"
    heads = {name: config.num_heads for name in encoders} | {"raw pixels": math.gcd(raw_width, config.num_heads)}
    tables = [probe(train, test, heads, probe_depth, f"{title}: {count(train)} clips to fit the probes, {count(test)} to "
                                                     "judge them")]
    pictures = draw(folder, test, test_split.class_names, config)
    if isinstance(trained, VideoObjective):
        accuracies, picture = surprise(folder, objectives, recipe.data, device)
        tables.append(surprise_table(accuracies, f"{title}: percent of pairs whose impossible clip surprises more "
                                                 "(95 % interval)"))
        pictures.append(picture)
    return tables, pictures


def count(features: Features) -> int:
    return len(next(iter(features.labels.values())))


@torch.no_grad()
def features_of(encoders: dict[str, nn.Module], split: Split) -> Features:
    """One pass over the clips of a split: raw pixels, then every encoder in evaluation mode."""
    config = next(iter(encoders.values())).config
    parts, labels, shown = {name: [] for name in ("raw pixels", *encoders)}, [], []
    for clips, of in split.batches:
        plain = clips * split.std + split.mean
        parts["raw pixels"].append((shrink(plain), tubelets(plain, config.tubelet_size, config.patch_size).half()))
        for name, encoder in encoders.items():
            tokens = encoder(clips).float()
            parts[name].append((tokens.mean(1), tokens.half()))
        labels.append(of)
        shown.append(plain[:max(0, NUM_SHOWN - sum(map(len, shown)))].cpu())
    pooled, tokens = ({name: torch.cat([part[i] for part in of]) for name, of in parts.items()} for i in (0, 1))
    return Features(pooled, tokens, {question: torch.cat([of[question] for of in labels]).to(clips.device)
                                     for question in split.class_names}, torch.cat(shown))


def shrink(clips: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, C * at most prod(POOLED)], by averaging."""
    size = [min(most, side) for most, side in zip(POOLED, clips.shape[2:], strict=True)]
    return F.adaptive_avg_pool3d(clips, size).flatten(1)


def tubelets(clips: Tensor, t: int, p: int) -> Tensor:
    """[B, C, T, H, W] -> [B, N, C * t * p * p], the pixels of each tubelet as its token."""
    B, C, T, H, W = clips.shape
    cut = clips.reshape(B, C, T // t, t, H // p, p, W // p, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cut.reshape(B, -1, C * t * p * p)


def probe(train: Features, test: Features, num_heads: dict[str, int], depth: int, title: str) -> Table:
    """Linear, kNN and attentive accuracy in percent on every question, one row per features."""
    rows = []
    for name in train.pooled:
        # V-JEPA: as many heads as the encoder; V-JEPA 2: 16
        width = train.tokens[name].shape[2]
        grid = replace(PROBES, depth=depth, num_heads=num_heads[name] if depth == 1 else math.gcd(width, 16))
        cells = [name, f"{train.pooled[name].shape[1]}"]
        for question, labels in train.labels.items():
            pooled = train.pooled[name], labels, test.pooled[name], test.labels[question]
            attentive = attentive_probe(train.tokens[name], labels, test.tokens[name], test.labels[question], grid)
            accuracies = (linear_probe(*pooled, tolerance=1e-4, dtype=torch.float32).accuracy,
                          knn_accuracy(*pooled, k=min(20, len(labels))), attentive.accuracy)
            cells += [f"{100 * accuracy:.1f}" for accuracy in accuracies]
        rows.append(cells)
    columns = [f"{question} {kind}" for question in train.labels for kind in ("linear %", "kNN %", "attentive %")]
    return Table(title, ("features", "width", *columns), rows)


def surprise(folder: pathlib.Path, objectives: dict[str, VideoObjective], data,
             device: torch.device) -> tuple[dict[str, dict[str, PairwiseAccuracy]], tuple[str, str]]:
    """How often the impossible clip of a pair surprises more, by model and kind; clips half as long again as the model's."""
    config = next(iter(objectives.values())).config.encoder
    time, tubelet = config.grid[0], config.tubelet_size
    is_small = config.image_size <= 96
    pairs = ImpossiblePairs("test", NUM_PAIRS, num_frames=max(8, config.num_frames + (time + 1) // 2 * tubelet),
                            image_size=max(48, config.image_size) if is_small else PAIRS_SIZE)
    mean, std = mean_and_std(data, device)

    def prepare(clips: Tensor) -> Tensor:
        clips = clips.to(device).float() / 255
        size = (clips.shape[2], config.image_size, config.image_size)
        if clips.shape[2:] != size:
            clips = F.interpolate(clips, size=size, mode="trilinear", align_corners=False)
        return (clips - mean) / std

    accuracies = {name: pairwise_accuracy(latent_surprise(objective, time // 2), pairs, prepare, config.num_frames,
                                          stride=tubelet) for name, objective in objectives.items()}
    event_strips(pairs.pairs(torch.arange(len(pairs.kinds))), list(pairs.kinds), folder / "events.png")
    return accuracies, ("events.png", "Pairs of clips for violation of expectation, one of each kind.")


def draw(folder: pathlib.Path, test: Features, class_names: dict[str, list[str]], config) -> list[tuple[str, str]]:
    """The pictures of a run: (file name, caption) each."""
    pictures = []
    if (folder / "metrics.csv").is_file():
        learning_curves(folder / "metrics.csv", folder / "curves.png")
        pictures.append(("curves.png", "Learning curves, from metrics.csv."))
    T, H, W = test.shown.shape[2:]
    grid = T // config.tubelet_size, H // config.patch_size, W // config.patch_size
    tokens = {name: test.tokens[f"{name} encoder"][:len(test.shown)].float() for name in ("untrained", "trained")}
    clip_strips(tokens, grid, test.shown, folder / "tokens.png")
    pictures.append(("tokens.png", "Held-out clips and their tokens over time, coloured by the first three principal "
                                   f"components of {len(test.shown)} clips together."))
    question, labels = next(iter(test.labels.items()))
    features_scatter(test.pooled["trained encoder"], labels, folder / "features.png", class_names=class_names[question],
                     title=f"Held-out clips by {question}, trained encoder")
    pictures.append(("features.png", "Pooled features of the held-out clips over their first two principal components."))
    return pictures
