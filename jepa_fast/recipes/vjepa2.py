"""V-JEPA 2, arXiv:2506.09985: pre-training on 16 frames, then a cool-down on 64, as the official YAML files have it.

Where a public file is known to be cut down, this is what is assumed: ViT-L and ViT-H say 10 epochs beside a warm-up of
40, the ViT-g cool-down at 256 pixels says 4 epochs of 30 steps; here pre-training has the 800 x 300 steps and the
cool-down the 40 x 300 of ViT-g's complete files. Schedules run over 1.25 times the training, so the cool-down really
ends at a learning rate of 1.06e-4.

A cool-down begins with a pre-training run: `--train.start-from RUN/checkpoints/last.pt`. Videos are three lists, drawn
by weight: `--data.csv K710.csv SSV2.csv HOWTO.csv`.
"""

import dataclasses

from ..data import ClipTransform, VideoData
from ..masking import MultiBlock3D
from ..models.video_encoder import VideoTransformerConfig
from ..models.video_predictor import VideoPredictorConfig
from ..objectives.video_prediction import VideoPredictionConfig
from ..optim.schedules import Constant, WarmupConstantLinear, WarmupCosine
from ._recipe import OptimConfig, Recipe, TrainConfig
from .vjepa import LONG_RANGE, SHORT_RANGE

__all__ = ["vjepa2_vitg16", "vjepa2_vitg16_384_cooldown", "vjepa2_vitg16_cooldown", "vjepa2_vith16",
           "vjepa2_vith16_cooldown", "vjepa2_vitl16", "vjepa2_vitl16_cooldown"]

PAPER = "arXiv:2506.09985"
SOURCE_WEIGHTS = (0.335, 0.1, 0.565)  # Kinetics-710, Something-Something v2, HowTo100M
SIZES = {"L": dict(embed_dim=1024, depth=24, num_heads=16), "H": dict(embed_dim=1280, depth=32, num_heads=16),
         "g": dict(embed_dim=1408, depth=40, num_heads=22, mlp_ratio=48 / 11)}


def _pretraining(name: str, size: str) -> Recipe:
    encoder = VideoTransformerConfig(image_size=256, num_frames=16, positions="rotary", rescale_init=True, **SIZES[size])
    return Recipe(
        name=name, paper=PAPER, summary=f"ViT-{size}/16, 16 frames at 256, 800 x 300 steps",
        objective=VideoPredictionConfig(
            encoder=encoder,
            # one mask token per kind of mask and data set, as in the official files; the first one trains
            predictor=VideoPredictorConfig(embed_dim=384, depth=12, num_heads=12, num_mask_tokens=6,
                                           zero_init_mask_tokens=True),
            masking=MultiBlock3D(masks=(SHORT_RANGE, LONG_RANGE), mask_group_size=24),
            momentum=Constant(value=0.99925), mask_token_by="clip"),
        data=VideoData(weights=SOURCE_WEIGHTS, num_frames=16, fps=4, num_workers=8,
                       transform=ClipTransform(image_size=256, scale=(0.3, 1.0), ratio=(0.75, 1.35), horizontal_flip=0.5)),
        optim=OptimConfig(lr=WarmupCosine(start=1e-4, peak=5.25e-4, final=5.25e-4, warmup_epochs=40),
                          weight_decay=Constant(value=0.04)),
        train=TrainConfig(batch_size=3072, epochs=800, steps_per_epoch=300, schedule_scale=1.25, precision="bf16",
                          seed=239, activations="lean" if size == "g" else "all"))


def _cooldown(name: str, size: str, *, mask_group_size: int, image_size: int = 256) -> Recipe:
    recipe = _pretraining(name, size)
    objective = dataclasses.replace(
        recipe.objective,
        encoder=dataclasses.replace(recipe.objective.encoder, num_frames=64, image_size=image_size),
        masking=dataclasses.replace(recipe.objective.masking, mask_group_size=mask_group_size))
    data = dataclasses.replace(recipe.data, num_frames=64,
                               transform=dataclasses.replace(recipe.data.transform, image_size=image_size))
    lr = WarmupConstantLinear(start=5.25e-4, peak=5.25e-4, final=1e-6, warmup_epochs=0, anneal_epochs=None)
    return dataclasses.replace(
        recipe, summary=f"cool-down of vjepa2_vit{size.lower()}16: 64 frames at {image_size}, 40 x 300 steps",
        objective=objective, data=data, optim=dataclasses.replace(recipe.optim, lr=lr),
        train=dataclasses.replace(recipe.train, epochs=40, activations="lean"))


def vjepa2_vitl16() -> Recipe:
    return _pretraining("vjepa2_vitl16", "L")


def vjepa2_vith16() -> Recipe:
    return _pretraining("vjepa2_vith16", "H")


def vjepa2_vitg16() -> Recipe:
    return _pretraining("vjepa2_vitg16", "g")


def vjepa2_vitl16_cooldown() -> Recipe:
    return _cooldown("vjepa2_vitl16_cooldown", "L", mask_group_size=12)


def vjepa2_vith16_cooldown() -> Recipe:
    return _cooldown("vjepa2_vith16_cooldown", "H", mask_group_size=12)


def vjepa2_vitg16_cooldown() -> Recipe:
    return _cooldown("vjepa2_vitg16_cooldown", "g", mask_group_size=6)


def vjepa2_vitg16_384_cooldown() -> Recipe:
    return _cooldown("vjepa2_vitg16_384_cooldown", "g", mask_group_size=6, image_size=384)
