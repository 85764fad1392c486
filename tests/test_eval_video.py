"""`jepa-fast eval` on video runs: probes find what is planted and nothing in noise; table, pictures and page are there."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jepa_fast import recipes
from jepa_fast.data import MovingDigits, MovingDigitsData, SyntheticVideoData
from jepa_fast.data.clip_transform import EvalClipTransform
from jepa_fast.eval import clip_splits, run, video_run
from jepa_fast.eval.clip_pictures import clip_strips, event_strips
from jepa_fast.eval.probe_grid import ProbeGridConfig
from jepa_fast.masking import MultiBlock3D
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictorConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig
from jepa_fast.optim.schedules import Constant, WarmupCosine
from jepa_fast.recipes import OptimConfig, Recipe, TrainConfig
from jepa_fast.train.loop import train

CPU = torch.device("cpu")
ENCODER = VideoTransformerConfig(image_size=32, num_frames=4, patch_size=8, in_chans=1, embed_dim=24, depth=1, num_heads=2)


class Planted(nn.Module):
    """An encoder whose tokens are noise, but one says in which of 10 classes the clip's mean pixel puts it."""

    def __init__(self, classes: int):
        super().__init__()
        self.config, self.classes = ENCODER, classes

    def forward(self, clips):
        generator = torch.Generator().manual_seed(len(clips))
        tokens = torch.randn(len(clips), math.prod(ENCODER.grid), 24, generator=generator)
        # label planted by `labelled` below, in the first pixel
        label = (clips[:, 0, 0, 0, 0] * self.classes).long().clamp_min(0) % 24
        tokens[:, 5] += 30 * torch.eye(24)[label]
        return tokens


def labelled(n: int, seed: int, is_shuffled: bool = False) -> clip_splits.Split:
    """Clips of nothing but a first pixel that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=generator)
    clips = torch.zeros(n, 1, 4, 32, 32)
    clips[:, 0, 0, 0, 0] = (labels + 0.5) / 5
    if is_shuffled:
        labels = labels[torch.randperm(n, generator=generator)]
    batches = zip(clips.split(50), ({"class": part} for part in labels.split(50)), strict=True)
    return clip_splits.Split(batches, {"class": list("abcde")}, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


def test_probes_find_what_is_planted_and_nothing_in_shuffled_labels(monkeypatch):
    monkeypatch.setattr(video_run, "PROBES", ProbeGridConfig(depth=1, epochs=30, batch_size=40, lrs=(1e-2, 5e-3)))
    for is_shuffled in (False, True):
        train_split, test_split = labelled(400, 0, is_shuffled), labelled(200, 1)
        features = [video_run.features_of({"planted": Planted(5)}, split) for split in (train_split, test_split)]
        for part in features:
            del part.pooled["raw pixels"], part.tokens["raw pixels"]
        table = video_run.probe(*features, {"planted": 2}, 1, "planted")
        assert list(table.header) == ["features", "width", "class linear %", "class kNN %", "class attentive %"]
        row = dict(zip(table.header, table.rows[0], strict=True))
        accuracies = [float(row[name]) for name in table.header[2:]]
        if is_shuffled:
            chance, spread = 20.0, 400 * math.sqrt(0.2 * 0.8 / 200)
            assert all(abs(accuracy - chance) < spread for accuracy in accuracies), accuracies
        else:
            assert accuracies == [100.0, 100.0, 100.0]


def test_raw_pixels_are_the_pixels():
    split = next(iter(clip_splits.splits(MovingDigitsData(num_frames=4, image_size=32), 40, 20, 32, CPU)))
    features = video_run.features_of({"planted": Planted(5)}, split)
    clips = MovingDigits("train", 40, num_frames=4, image_size=32, num_digits=(1, 1), border="cross").clips(torch.arange(40))
    plain = clips.float() / 255
    assert (features.shown - plain[:16]).abs().max() < 1e-5
    tokens = features.tokens["raw pixels"].float()                       # time, row, column; then C, t, y, x
    expected = plain[7, 0, 2:4, 8:16, 24:32].flatten()
    assert (tokens[7, 16 + 4 + 3] - expected).abs().max() < 1e-3
    pooled = features.pooled["raw pixels"].view(40, 4, 12, 12)
    assert (pooled.mean((2, 3)) - plain[:, 0].mean((2, 3))).abs().max() < 0.02
    assert torch.equal(features.labels["direction"], MovingDigits("train", 40, num_frames=4, image_size=32,
                                                                  num_digits=(1, 1), border="cross").labels)


def recipe(data) -> Recipe:
    return Recipe(name="tiny", paper="arXiv:2404.08471", summary="for tests", data=data,
                  objective=VideoPredictionConfig(encoder=ENCODER, predictor=VideoPredictorConfig(embed_dim=24, depth=1),
                                                  masking=MultiBlock3D(mode="unbiased"), momentum=Constant(value=0.9)),
                  optim=OptimConfig(lr=WarmupCosine(start=1e-3, peak=1e-3, final=1e-3, warmup_epochs=0),
                                    weight_decay=Constant(value=0.04)),
                  train=TrainConfig(batch_size=4, epochs=1, max_steps=2, log_every=1, precision="fp32", device="cpu"))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(video_run, "MAX_TRAIN", 60)
    monkeypatch.setattr(video_run, "MAX_TEST", 30)
    monkeypatch.setattr(video_run, "NUM_PAIRS", 12)
    monkeypatch.setattr(video_run, "PROBES", ProbeGridConfig(depth=1, epochs=2, batch_size=16))


DATA = {"digits": (MovingDigitsData(num_frames=4, image_size=32, num_clips=40), ["direction", "digit"]),
        "noise": (SyntheticVideoData(num_videos=40, num_frames=4, image_size=32, in_chans=1, num_classes=4,
                                     transform=EvalClipTransform(image_size=32, resize_ratio=1.0, mean=(0.5,), std=(0.3,)),
                                     eval_transform=EvalClipTransform(image_size=32, resize_ratio=1.0, mean=(0.5,),
                                                                      std=(0.3,))), ["class"])}


@pytest.mark.parametrize(("name", "depth"), [("digits", 1), ("noise", 2)])
def test_eval_of_a_video_run(name, depth, tmp_path, few, monkeypatch):
    data, questions = DATA[name]
    made = recipe(data)
    monkeypatch.setattr(recipes, "get_recipe", lambda name: made)
    train(made, tmp_path)
    tables, page = run.evaluate_run(tmp_path, probe_depth=depth)
    probes, surprise = tables
    assert [row[0] for row in probes.rows] == ["raw pixels", "untrained encoder", "trained encoder"]
    assert list(probes.header[2:]) == [f"{q} {kind} %" for q in questions for kind in ("linear", "kNN", "attentive")]
    assert all(0 <= float(cell) <= 100 for row in probes.rows for cell in row[2:])
    assert [row[0] for row in surprise.rows][-1] == "all" and len(surprise.rows) == 7
    assert surprise.rows[-1][1] == "12" and "(" in surprise.rows[-1][3]
    assert str(tables) == f"{probes}\n\n{surprise}"
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert saved["rows"] == [list(row) for row in probes.rows]
    assert saved["more"][0]["rows"] == [list(row) for row in surprise.rows]
    text = page.read_text()
    for picture in ("curves.png", "tokens.png", "features.png", "events.png"):
        assert f'src="{picture}"' in text
        assert np.asarray(Image.open(tmp_path / picture).convert("RGB")).std() > 5
    assert all(cell in text for row in (*probes.rows, *surprise.rows) for cell in row)


def test_strips_show_frames_above_and_tokens_below(tmp_path):
    """A token that differs from all others in one place and time is the one tile that differs."""
    tokens = torch.zeros(1, 2 * 2 * 2, 3)
    tokens[0, 5] = torch.tensor([1.0, 0, 0])        # second time step, upper right
    clips = torch.zeros(1, 1, 4, 24, 24)
    clips[0, 0, 2] = 1                              # drawn for the second time step; frames 1 and 3 are not
    clips[0, 0, 1] = clips[0, 0, 3] = 0.5
    picture = np.asarray(Image.open(clip_strips({"features": tokens}, (2, 2, 2), clips, tmp_path / "a.png")).convert("RGB"))
    picture = picture[len(picture) // 4:]           # below the title
    middle = picture[:, picture.shape[1] // 3:]
    black, white = (np.argwhere((middle == level).all(2)) for level in (0, 255))
    assert len(black) > 500 and len(white) > 500
    assert not (np.abs(middle.astype(int) - 127).max(2) < 3).sum() > 0.5 * middle[..., 0].size


def test_strips_mistakes(tmp_path):
    clips = torch.zeros(2, 1, 4, 8, 8)
    with pytest.raises(ValueError, match="T a multiple of 3, got"):
        clip_strips({"a": torch.zeros(2, 12, 4)}, (3, 2, 2), clips, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a must be \[2, 8, D\]"):
        clip_strips({"a": torch.zeros(2, 12, 4)}, (2, 2, 2), clips, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"pairs must be \[3, 2, 1 or 3, T, H, W\], one per name, got \[2, 2, 1, 4, 8, 8\]"):
        event_strips(torch.zeros(2, 2, 1, 4, 8, 8, dtype=torch.uint8), ["a"] * 3, tmp_path / "a.png")


def test_a_data_set_without_classes_is_one_clear_line():
    data = SyntheticVideoData(num_videos=30, num_frames=4, image_size=32, in_chans=1, num_classes=1)
    with pytest.raises(ValueError, match="probes need labels"):
        clip_splits.splits(data, 10, 10, 32, CPU)
