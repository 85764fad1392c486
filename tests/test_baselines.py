"""The benches' baselines compute what ours compute: losses over three steps of training, on the same weights and masks."""

import dataclasses

import pytest
import torch

from bench.official_style import OfficialStyleStep
from bench.official_style_video import OfficialStyleVideoStep
from bench.train_step import LR, WEIGHT_DECAY, OurStep, config_vits16
from bench.video_step import config_vits16 as video_config_vits16


def narrow(config):
    size = dict(embed_dim=32, depth=2, num_heads=2)
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **size),
                               predictor=dataclasses.replace(config.predictor, **size))


@pytest.mark.parametrize("is_checkpointed", [True, False])
def test_official_style_of_video(is_checkpointed):
    torch.manual_seed(0)
    config = narrow(video_config_vits16(image_size=96, num_frames=8))
    ours = OurStep(config, 0.9)
    official = OfficialStyleVideoStep(config, LR, WEIGHT_DECAY, 0.9, is_checkpointed=is_checkpointed)
    official.load(ours.objective)
    clips = torch.randn(2, 3, 8, 96, 96)
    for step in range(3):
        masks = config.masking.sample(config.encoder.grid, 2, seed=0, step=step)
        theirs = official.step(clips, masks.context_lists(), masks.target_lists())
        assert ours.step({"clips": clips, "masks": masks.pack()}) == pytest.approx(theirs, rel=1e-5)


def test_official_style_of_images():
    torch.manual_seed(0)
    config = narrow(config_vits16(image_size=160))
    config = dataclasses.replace(config, masking=dataclasses.replace(config.masking, mask_group_size=4))
    ours = OurStep(config, 0.9)
    official = OfficialStyleStep(config, LR, WEIGHT_DECAY, 0.9)
    official.load(ours.objective)
    images = torch.randn(4, 3, 160, 160)
    for step in range(3):
        masks = config.masking.sample(config.encoder.grid, 4, seed=0, step=step)
        theirs = official.step(images, masks.context_lists(), masks.target_lists())
        assert ours.step({"images": images, "masks": masks.pack()}) == pytest.approx(theirs, rel=1e-5)
