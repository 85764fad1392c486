"""Violation of expectation: models that know the answer, models that know nothing, and the windows they see."""

import math

import pytest
import torch
from torch.nn import functional as F

from jepa_fast.data import ImpossiblePairs
from jepa_fast.data.impossible import KINDS
from jepa_fast.eval.surprise import (
    PairwiseAccuracy,
    clip_surprise,
    latent_surprise,
    pairwise_accuracy,
    predict_window,
    surprise_table,
)
from jepa_fast.masking import Masks, MultiBlock3D
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_encoder21 import HierarchicalVideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictorConfig
from jepa_fast.models.video_predictor21 import HierarchicalVideoPredictorConfig
from jepa_fast.objectives.video_prediction import VideoPrediction, VideoPredictionConfig
from jepa_fast.objectives.video_prediction21 import HierarchicalVideoPredictionConfig


def tiny(positions: str = "sincos") -> VideoPrediction:
    torch.manual_seed(0)
    config = VideoPredictionConfig(
        encoder=VideoTransformerConfig(image_size=48, num_frames=16, patch_size=12, in_chans=1, embed_dim=24, depth=1,
                                       num_heads=2, positions=positions),
        predictor=VideoPredictorConfig(embed_dim=12, depth=1, num_heads=2), masking=MultiBlock3D(mode="unbiased"))
    objective = config.build().double().eval()
    with torch.no_grad():
        for token in objective.predictor.mask_tokens:
            token.normal_()
    return objective


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_a_window_is_predicted_from_its_first_time_steps(positions):
    """The surprise is the objective's own loss on that mask, and frames after the context reach only the target."""
    objective = tiny(positions)
    windows = torch.randn(3, 1, 16, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (prediction, target), = predict_window(objective, windows, context_steps=3)
    assert prediction.shape == target.shape == (3, 5 * 16, 24)
    expected = F.layer_norm(objective.target_encoder(windows), (24,))[:, 3 * 16:]
    assert torch.equal(target, expected)
    # as many context and target tokens per clip: the mean over clips is the loss of the same masks
    tokens = torch.arange(128).expand(3, 128)
    masks = objective.pack(Masks.from_lists([tokens[:, :48]], [tokens[:, 48:]], 128))
    loss = objective({"clips": windows, "masks": masks})["loss"]
    surprise = latent_surprise(objective, 3)(windows)
    assert surprise.shape == (3,) and abs(float(surprise.mean() - loss.detach())) < 1e-10
    changed = windows.clone()
    changed[:, :, 6:] += 1
    (again, other), = predict_window(objective, changed, context_steps=3)
    assert torch.equal(again, prediction) and (other - target).abs().max() > 1e-3
    changed[:, :, :6] += 1
    assert (predict_window(objective, changed, context_steps=3)[0][0] - prediction).abs().max() > 1e-6


def test_every_level_of_v_jepa_21_counts_alike():
    """The surprise is the mean over levels, and the objective's own loss where context tokens do not count."""
    torch.manual_seed(0)
    config = HierarchicalVideoPredictionConfig(
        encoder=HierarchicalVideoTransformerConfig(image_size=24, num_frames=8, patch_size=4, native_side=6, in_chans=1,
                                                   embed_dim=32, depth=4, num_heads=2, levels=(1, 3)),
        predictor=HierarchicalVideoPredictorConfig(embed_dim=24, depth=2, num_heads=2, num_mask_tokens=3),
        masking=MultiBlock3D(mode="unbiased"), image_masking=MultiBlock3D(mode="unbiased"), context_weight=0.0)
    objective = config.build().double().eval()
    windows = torch.randn(2, 1, 8, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = predict_window(objective, windows, context_steps=3)
    assert len(levels) == 2 and all(part.shape == (2, 36, 32) for pair in levels for part in pair)
    tokens = torch.arange(144).expand(2, 144)
    masks = Masks.from_lists([tokens[:, :108]], [tokens[:, 108:]], 144)
    loss = objective({"groups": [objective.group(windows, masks)]})["loss"].detach()
    assert abs(float(latent_surprise(objective, 3)(windows).mean() - loss)) < 1e-10


def test_windows_slide_over_the_clip():
    clips = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(2, 1, 12, 4, 4).clone()
    clips[1] += 100
    seen = []

    def first_frame(windows):
        seen.append(windows[0, 0, :, 0, 0].tolist())
        return windows[:, 0, 0, 0, 0]

    assert clip_surprise(first_frame, clips, 6, stride=3).tolist() == [3.0, 103.0]
    assert seen == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [6, 7, 8, 9, 10, 11]]
    assert clip_surprise(first_frame, clips, 6, stride=3, reduce="max").tolist() == [6.0, 106.0]


class Recorded(ImpossiblePairs):
    """Pairs whose impossible clips carry a mark in one corner from the event on, for an oracle to read."""

    def pairs(self, indices):
        pairs = super().pairs(indices)
        pairs[:, 1, :, 14:, 0, 0] = 77
        return pairs


def test_an_oracle_detects_every_event_and_a_constant_sits_at_chance():
    pairs = Recorded(num_pairs=60, image_size=48)

    def oracle(windows):
        return (windows[:, 0, :, 0, 0] == 77).double().sum(1)

    found = pairwise_accuracy(oracle, pairs, lambda clips: clips, 16, batch_size=7)
    assert list(found) == [*KINDS, "all"] and all(part.accuracy == 1.0 for part in found.values())
    assert [part.n for part in found.values()] == [10] * 6 + [60]
    backwards = pairwise_accuracy(lambda windows: -oracle(windows), pairs, lambda clips: clips, 16)
    assert all(part.accuracy == 0.0 for part in backwards.values())
    constant = pairwise_accuracy(lambda windows: torch.ones(len(windows)), pairs, lambda clips: clips, 16)
    assert all(part.accuracy == 0.5 and part.interval[0] < 0.5 < part.interval[1] for part in constant.values())


def test_sudden_light_is_found_in_real_pairs():
    """Light that comes or goes all at once, which happens in no possible clip of these kinds."""
    pairs = ImpossiblePairs(num_pairs=24, image_size=48, kinds=("vanish", "appear"))

    def light_changes(windows):
        light = windows.double().sum((1, 3, 4))
        return light.diff(dim=1).abs().amax(1)

    found = pairwise_accuracy(light_changes, pairs, lambda clips: clips, 16, reduce="max")
    assert found["all"].accuracy == 1.0


def test_the_interval_is_wilsons():
    """Roots p of |x / n - p| = z sqrt(p (1 - p) / n)."""
    for right, n in ((0, 10), (5, 10), (41.5, 50), (300, 300)):
        part = PairwiseAccuracy(right, n)
        for p in part.interval:
            assert abs(abs(right / n - p) - 1.959964 * math.sqrt(p * (1 - p) / n)) < 1e-9
        assert part.interval[0] <= part.accuracy <= part.interval[1]
    assert str(PairwiseAccuracy(8, 10)) == "80.0 (49 – 94)"


def test_table():
    accuracies = {"untrained": {"vanish": PairwiseAccuracy(5, 10)}, "trained": {"vanish": PairwiseAccuracy(10, 10)}}
    table = surprise_table(accuracies, "pairs")
    assert list(table.header) == ["event", "pairs", "chance %", "untrained %", "trained %"]
    assert table.rows == [("vanish", "10", "50.0", "50.0 (24 – 76)", "100.0 (72 – 100)")]


def test_mistakes():
    windows = torch.zeros(1, 1, 16, 48, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"context_steps must be in \[1, 7\], of 8 time steps, got 8"):
        predict_window(tiny(), windows, 8)
    with pytest.raises(ValueError, match=r"num_frames must be in \[1, 16\].*got 17 and 2"):
        clip_surprise(len, windows, 17)
    with pytest.raises(ValueError, match="reduce must be mean or max, got 'sum'"):
        clip_surprise(len, windows, 16, reduce="sum")
