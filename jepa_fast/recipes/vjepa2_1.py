"""V-JEPA 2.1, arXiv:2603.14482: pre-training on 16 frames and images, then a cool-down on 64 frames and twice the images.

A step has 3,072 clips, which the batch size counts, and 4,608 images, 9,216 in a cool-down. Officially half of the GPUs
take images only; here each takes its part of both, and `mask_group_size` is the official batch on a GPU of each kind.
Schedules run over 1.25 times the training, so that a cool-down really ends at a learning rate of 1.21e-4.

Two public copies of the official repository differ in one number of ViT-L's files, the depth of the predictor: 24 in the
one that was synchronised with it on 2026-03-27, and in the files of ViT-g and ViT-G; 12 in the other. Here it is 24; for
the other, `--objective.predictor.depth 12`. The released ViT-B and ViT-L are others: distilled from ViT-G, by a recipe
that is not public.

A cool-down begins with a pre-training run: `--train.start-from RUN/checkpoints/last.pt`. Videos are three lists, drawn
by weight, images a list or a folder: `--data.videos.csv K710.csv SSV2.csv HOWTO.csv --data.images.root IMAGENET/train`.
"""

import dataclasses

from ..data import ClipTransform, MixedData, VideoData
from ..masking import BlockMask, MultiBlock3D
from ..models.video_encoder21 import HierarchicalVideoTransformerConfig
from ..models.video_predictor21 import HierarchicalVideoPredictorConfig
from ..objectives.video_prediction21 import HierarchicalVideoPredictionConfig
from ..optim.schedules import Constant, WarmupConstantLinear
from ._recipe import OptimConfig, Recipe, TrainConfig
from .vjepa import LONG_RANGE, SHORT_RANGE
from .vjepa2 import SOURCE_WEIGHTS

__all__ = ["vjepa2_1_vitG16", "vjepa2_1_vitG16_cooldown", "vjepa2_1_vitb16", "vjepa2_1_vitb16_cooldown", "vjepa2_1_vitg16",
           "vjepa2_1_vitg16_cooldown", "vjepa2_1_vitl16", "vjepa2_1_vitl16_cooldown"]

PAPER = "arXiv:2603.14482"
IMAGE_MASK = BlockMask(num_blocks=10, spatial_scale=(0.15, 0.15), temporal_scale=(1.0, 1.0), aspect_ratio=(0.75, 1.5))
SIZES = {"b": dict(embed_dim=768, depth=12, num_heads=12, levels=(2, 5, 8, 11)),
         "l": dict(embed_dim=1024, depth=24, num_heads=16, levels=(5, 11, 17, 23)),
         "g": dict(embed_dim=1408, depth=40, num_heads=22, mlp_ratio=48 / 11, levels=(9, 19, 29, 39)),
         "G": dict(embed_dim=1664, depth=48, num_heads=26, mlp_ratio=64 / 13, levels=(11, 23, 37, 47))}
PREDICTOR_DEPTHS = {"b": 12, "l": 24, "g": 24, "G": 24}
GROUPS = {"b": (96, 144), "l": (48, 72), "g": (48, 72), "G": (24, 36)}  # clips, images: official batches per GPU


def _pretraining(size: str) -> Recipe:
    clips, images = GROUPS[size]
    crop = ClipTransform(image_size=256, scale=(0.3, 1.0), ratio=(0.75, 1.35), horizontal_flip=0.5)
    return Recipe(
        name=f"vjepa2_1_vit{size}16", paper=PAPER,
        summary=f"ViT-{_letter(size)}/16, 16 frames and images at 256, 1000 x 300 steps",
        objective=HierarchicalVideoPredictionConfig(
            encoder=HierarchicalVideoTransformerConfig(image_size=256, num_frames=16, **SIZES[size]),
            # one mask token per kind of mask and data set, as in the official files; the first one trains
            predictor=HierarchicalVideoPredictorConfig(embed_dim=384, depth=PREDICTOR_DEPTHS[size], num_heads=12,
                                                       num_mask_tokens=6),
            masking=MultiBlock3D(masks=(SHORT_RANGE, LONG_RANGE), mask_group_size=clips),
            image_masking=MultiBlock3D(masks=(IMAGE_MASK,), mask_group_size=images),
            momentum=Constant(value=0.99925), image_share=0.5, context_weight=0.5, image_context_weight=0.5,
            context_warmup=(15_000, 30_000), weight_by_distance=True),
        data=MixedData(videos=VideoData(weights=SOURCE_WEIGHTS, num_frames=16, fps=4, num_workers=8, transform=crop),
                       images=VideoData(num_frames=1, num_workers=8, transform=crop), images_per_clip=1.5),
        optim=OptimConfig(lr=WarmupConstantLinear(start=1e-4, peak=6e-4, final=6e-4, warmup_epochs=40, anneal_epochs=0),
                          weight_decay=Constant(value=0.04)),
        train=TrainConfig(batch_size=3072, epochs=1000, steps_per_epoch=300, schedule_scale=1.25, precision="bf16",
                          seed=239, activations="all" if size == "b" else "lean"))


def _cooldown(size: str) -> Recipe:
    recipe = _pretraining(size)
    objective, data = recipe.objective, recipe.data
    objective = dataclasses.replace(
        objective, encoder=dataclasses.replace(objective.encoder, num_frames=64),
        # a GPU has half as many clips, and as many images
        masking=dataclasses.replace(objective.masking, mask_group_size=GROUPS[size][0] // 2),
        context_warmup=None, weight_by_distance=False)
    data = dataclasses.replace(data, videos=dataclasses.replace(data.videos, num_frames=64, num_workers=12),
                               images=dataclasses.replace(data.images, num_workers=12), images_per_clip=3.0)
    lr = WarmupConstantLinear(start=6e-4, peak=6e-4, final=1e-6, warmup_epochs=0, anneal_epochs=None)
    return dataclasses.replace(
        recipe, name=f"{recipe.name}_cooldown", summary=f"cool-down of {recipe.name}: 64 frames, 40 x 300 steps",
        objective=objective, data=data, optim=dataclasses.replace(recipe.optim, lr=lr),
        train=dataclasses.replace(recipe.train, epochs=40, activations="lean"))


def _letter(size: str) -> str:
    return size.upper() if size in "bl" else size


def vjepa2_1_vitb16() -> Recipe:
    return _pretraining("b")


def vjepa2_1_vitl16() -> Recipe:
    return _pretraining("l")


def vjepa2_1_vitg16() -> Recipe:
    return _pretraining("g")


def vjepa2_1_vitG16() -> Recipe:
    return _pretraining("G")


def vjepa2_1_vitb16_cooldown() -> Recipe:
    return _cooldown("b")


def vjepa2_1_vitl16_cooldown() -> Recipe:
    return _cooldown("l")


def vjepa2_1_vitg16_cooldown() -> Recipe:
    return _cooldown("g")


def vjepa2_1_vitG16_cooldown() -> Recipe:
    return _cooldown("G")
