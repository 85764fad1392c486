"""The whole V-JEPA 2 step: ours, and the same step written as the official code does it, on the same weights and masks."""

import torch

from jepa_fast.masking import MultiBlock3D
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictorConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig

from .measure import agree, interleaved
from .official_style_video import OfficialStyleVideoStep
from .train_step import LR, WEIGHT_DECAY, OurStep

MOMENTUM = 0.99925


def config_vits16(image_size: int = 128, num_frames: int = 16) -> VideoPredictionConfig:
    """ViT-S/16 with V-JEPA 2's predictor, positions and masks, trimmed to the shortest of two clips."""
    return VideoPredictionConfig(
        encoder=VideoTransformerConfig(image_size=image_size, num_frames=num_frames, embed_dim=384, depth=12, num_heads=6,
                                       positions="rotary", rescale_init=True),
        predictor=VideoPredictorConfig(embed_dim=384, depth=12, num_heads=12, num_mask_tokens=2),
        masking=MultiBlock3D(mask_group_size=2), mask_token_by="clip")


def bench_video_step(batch_size: int = 2, repeats: int = 5, image_size: int = 128) -> list[dict]:
    """Rows for the official style, with and without activation checkpointing, and ours. First losses must agree."""
    config = config_vits16(image_size)
    torch.manual_seed(0)
    ours = OurStep(config, MOMENTUM)
    official = {"official style": OfficialStyleVideoStep(config, LR, WEIGHT_DECAY, MOMENTUM),
                "official style, no checkpointing": OfficialStyleVideoStep(config, LR, WEIGHT_DECAY, MOMENTUM,
                                                                           is_checkpointed=False)}
    for step in official.values():
        step.load(ours.objective)
    encoder = config.encoder
    clips = torch.randn(batch_size, encoder.in_chans, encoder.num_frames, encoder.image_size, encoder.image_size)
    masks = config.masking.sample(encoder.grid, batch_size, seed=0, step=0)
    contexts, targets = masks.context_lists(), masks.target_lists()
    batch = {"clips": clips, "masks": masks.pack()}
    providers = {name: lambda step=step: step.step(clips, contexts, targets) for name, step in official.items()}
    providers["ours"] = lambda: ours.step(batch)
    agree({name: [torch.tensor([call()])] for name, call in providers.items()}, 1e-4)
    timings = interleaved(providers, repeats=repeats, warmup=1)
    base = timings["official style"].median
    return [{"bench": "video-step", "case": f"vjepa2-vits16-{encoder.num_frames}x{image_size}-b{batch_size}-fp32",
             "provider": name, "ms": t.median * 1e3, "p20_ms": t.p20 * 1e3, "p80_ms": t.p80 * 1e3,
             "ratio": base / t.median, "clips_per_s": batch_size / t.median} for name, t in timings.items()]
