"""What `jepa-fast eval` does with a video run: probes of motion and content, surprise, pictures over time."""

import math
import pathlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipes
from ..data import ImpossiblePairs
from ..objectives.video_prediction import VideoPrediction
from .clip_pictures import clip_strips, event_strips
from .curves import learning_curves
from .knn import knn_accuracy
from .linear import linear_probe
from .pictures import features_scatter
from .probe_grid import ProbeGridConfig, attentive_probe
from .surprise import latent_surprise, pairwise_accuracy, surprise_table
from .table import Table

MAX_TRAIN, MAX_TEST, NUM_PAIRS = 2000, 1000, 300
MAX_BYTES = 2 * 2**30                            # of the tokens of one encoder; fewer clips where they would take more
POOLED = (8, 12, 12)                             # raw clips are shrunk to this for the raw-pixel row
PROBES = ProbeGridConfig(depth=1, batch_size=128)


@dataclass(frozen=True)
class Clips:
    """Labelled clips of one split: uint8 [n, C, T, H, W], and {question: (labels [n], class names)}."""

    plain: Tensor
    targets: dict[str, tuple[Tensor, list[str]]]


@dataclass(frozen=True)
class Features:
    """What one encoder says of both splits: pooled [n, D] and tokens [n, N, D] float16, train then test."""

    pooled: tuple[Tensor, Tensor]
    tokens: tuple[Tensor, Tensor]
    num_heads: int


def is_video(data) -> bool:
    """Whether a data config makes labelled clips to probe with."""
    return hasattr(data, "build_probe")


def evaluate_video(folder: pathlib.Path, recipe: "recipes.Recipe", untrained: nn.Module, trained: nn.Module,
                   step: int, probe_depth: int = 1) -> tuple[list[Table], list[tuple[str, str]]]:
    """Tables and pictures (file name in `folder`, caption) of a run whose data makes clips."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objectives = {"untrained": untrained.to(device).eval(), "trained": trained.to(device).eval()}
    encoders = {f"{name} encoder": objective.evaluation_encoder() for name, objective in objectives.items()}
    data, config = recipe.data, trained.evaluation_encoder().config
    share = MAX_BYTES / (2 * math.prod(config.grid) * config.embed_dim * (MAX_TRAIN + MAX_TEST))
    train, test = (load(data, split, max(20, int(most * min(1, share)))) for split, most in
                   (("train", MAX_TRAIN), ("test", MAX_TEST)))
    features = {"raw pixels": raw_features(train, test, config, device)} | {
        name: features_of(encoder, data, train, test, device) for name, encoder in encoders.items()}
    title = f"{recipe.name} after {step} steps"
    tables = [probe(features, train, test, probe_depth, f"{title}: {len(train.plain)} clips to fit the probes, "
                                                        f"{len(test.plain)} to judge them")]
    pictures = draw(folder, encoders, data, test, features)
    if isinstance(trained, VideoPrediction):
        table, picture = surprise(folder, objectives, data, title, device)
        tables.append(table)
        pictures.append(picture)
    return tables, pictures


def load(data, split: str, num_clips: int) -> Clips:
    dataset = data.build_probe(split, num_clips)
    return Clips(dataset.clips(torch.arange(len(dataset))), dataset.targets)


def raw_features(train: Clips, test: Clips, config, device: torch.device) -> Features:
    """Pixels instead of features: shrunken clips, and the tubelets' own pixels as tokens."""
    t, p = config.tubelet_size, config.patch_size

    def tubelets(clips: Tensor) -> Tensor:
        n, C, T, H, W = clips.shape
        cut = clips.view(n, C, T // t, t, H // p, p, W // p, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return (cut.reshape(n, -1, C * t * p * p).to(device, torch.float16)) / 255

    def shrink(clips: Tensor) -> Tensor:
        size = [min(most, side) for most, side in zip(POOLED, clips.shape[2:], strict=True)]
        return torch.cat([F.adaptive_avg_pool3d(part.to(device).float() / 255, size).flatten(1)
                          for part in clips.split(256)])

    width = config.in_chans * t * p * p
    return Features((shrink(train.plain), shrink(test.plain)), (tubelets(train.plain), tubelets(test.plain)),
                    math.gcd(width, config.num_heads))


@torch.no_grad()
def features_of(encoder: nn.Module, data, train: Clips, test: Clips, device: torch.device,
                batch_size: int = 32) -> Features:
    """Tokens of an encoder in evaluation mode, and their means."""
    tokens = []
    for split in (train, test):
        parts = [encoder(data.normalise(part.to(device))) for part in split.plain.split(batch_size)]
        tokens.append((torch.cat([part.mean(1).float() for part in parts]), torch.cat([part.half() for part in parts])))
    pooled, tokens = zip(*tokens, strict=True)
    return Features(pooled, tokens, encoder.config.num_heads)


def probe(features: dict[str, Features], train: Clips, test: Clips, depth: int, title: str) -> Table:
    """Linear, kNN and attentive accuracy in percent on every question, one row per features."""
    rows = []
    for name, of in features.items():
        cells = [name, f"{of.pooled[0].shape[1]}"]
        # V-JEPA: as many heads as the encoder; V-JEPA 2: 16
        width = of.tokens[0].shape[2]
        grid = replace(PROBES, depth=depth, num_heads=of.num_heads if depth == 1 else math.gcd(width, 16))
        for question in train.targets:
            labels = [split.targets[question][0].to(of.pooled[0].device) for split in (train, test)]
            split = of.pooled[0], labels[0], of.pooled[1], labels[1]
            accuracies = (linear_probe(*split).accuracy, knn_accuracy(*split, k=min(20, len(labels[0]))),
                          attentive_probe(of.tokens[0], labels[0], of.tokens[1], labels[1], grid).accuracy)
            cells += [f"{100 * accuracy:.1f}" for accuracy in accuracies]
        rows.append(cells)
    columns = [f"{question} {kind}" for question in train.targets for kind in ("linear %", "kNN %", "attentive %")]
    return Table(title, ("features", "width", *columns), rows)


def surprise(folder: pathlib.Path, objectives: dict[str, VideoPrediction], data, title: str,
             device: torch.device) -> tuple[Table, tuple[str, str]]:
    """How often the impossible clip of a pair surprises more: clips half as long again as the model's."""
    config = next(iter(objectives.values())).config.encoder
    time, tubelet = config.grid[0], config.tubelet_size
    pairs = ImpossiblePairs("test", NUM_PAIRS, num_frames=config.num_frames + (time + 1) // 2 * tubelet,
                            image_size=config.image_size)
    accuracies = {name: pairwise_accuracy(latent_surprise(objective, time // 2), pairs,
                                          lambda clips: data.normalise(clips.to(device)), config.num_frames, stride=tubelet)
                  for name, objective in objectives.items()}
    first = pairs.pairs(torch.arange(len(pairs.kinds)))
    event_strips(first, list(pairs.kinds), folder / "events.png")
    table = surprise_table(accuracies, f"{title}: percent of pairs whose impossible clip surprises more (95 % interval)")
    return table, ("events.png", "Pairs of clips for violation of expectation, one of each kind.")


@torch.no_grad()
def draw(folder: pathlib.Path, encoders: dict[str, nn.Module], data, test: Clips,
         features: dict[str, Features]) -> list[tuple[str, str]]:
    """The pictures of a run: (file name, caption) each."""
    pictures = []
    if (folder / "metrics.csv").is_file():
        learning_curves(folder / "metrics.csv", folder / "curves.png")
        pictures.append(("curves.png", "Learning curves, from metrics.csv."))
    chosen = torch.linspace(0, len(test.plain) - 1, 16).long()
    grid = next(iter(encoders.values())).config.grid
    clip_strips({name.removesuffix(" encoder"): features[name].tokens[1][chosen].float() for name in encoders}, grid,
                test.plain[chosen] / 255, folder / "tokens.png")
    pictures.append(("tokens.png", f"Held-out clips and their tokens over time, coloured by the first three principal "
                                   f"components of {len(chosen)} clips together."))
    question, (labels, names) = next(iter(test.targets.items()))
    features_scatter(features["trained encoder"].pooled[1], labels, folder / "features.png", class_names=names,
                     title=f"Held-out clips by {question}, trained encoder")
    pictures.append(("features.png", "Pooled features of the held-out clips over their first two principal components."))
    return pictures
