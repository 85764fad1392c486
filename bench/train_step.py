"""The whole I-JEPA step: ours, and the same step written as the official code does it, on the same weights and masks."""

import torch

from jepa_fast.masking import MultiBlock
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.predictor import PredictorConfig
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig
from jepa_fast.optim import AdamWEMA, param_groups

from .measure import agree, interleaved
from .official_style import OfficialStyleStep

LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 0.04, 0.996


class OurStep:
    def __init__(self, config: LatentPredictionConfig | VideoPredictionConfig, momentum: float = MOMENTUM):
        self.objective = config.build()
        groups = param_groups(self.objective.roles(), WEIGHT_DECAY)
        self.optimizer = AdamWEMA(groups, lr=LR, averages=self.objective.averages())
        self.optimizer.momentum = momentum

    def step(self, batch: dict) -> float:
        losses = self.objective(batch)
        losses["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(losses["loss"].detach())


def config_vits16(image_size: int = 224) -> LatentPredictionConfig:
    return LatentPredictionConfig(
        encoder=VisionTransformerConfig(image_size=image_size, patch_size=16, embed_dim=384, depth=12, num_heads=6),
        predictor=PredictorConfig(embed_dim=384, depth=12), masking=MultiBlock(mask_group_size=16))


def bench_step(batch_size: int = 16, repeats: int = 5, precision: str = "fp32", num_batches: int = 1,
               config: LatentPredictionConfig | None = None) -> list[dict]:
    """Rows for the official style and ours. The losses of the first step must agree, before any update."""
    config = config or config_vits16()
    torch.manual_seed(0)
    ours = OurStep(config)
    official = OfficialStyleStep(config, LR, WEIGHT_DECAY, MOMENTUM)
    official.load(ours.objective)
    size, chans = config.encoder.image_size, config.encoder.in_chans
    images = torch.randn(batch_size, chans, size, size)
    masks = [config.masking.sample(config.encoder.grid, batch_size, seed=0, step=s) for s in range(num_batches)]
    lists = [(m.context_lists(), m.target_lists()) for m in masks]
    batches = [{"images": images, "masks": m.pack()} for m in masks]

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def round_of(step):
        def call():
            with autocast():
                return [step(i) for i in range(num_batches)]
        return call

    providers = {"official style": round_of(lambda i: official.step(images, *lists[i])),
                 "ours": round_of(lambda i: ours.step(batches[i]))}
    agree({name: [torch.tensor(call()[:1])] for name, call in providers.items()}, 1e-4 if precision == "fp32" else 2e-2)
    timings = interleaved(providers, repeats=repeats, warmup=0)
    base = timings["official style"].median
    return [{"bench": "step", "case": f"ijepa-vits16-{size}-b{batch_size}-{precision}", "provider": name,
             "ms": t.median / num_batches * 1e3, "p20_ms": t.p20 / num_batches * 1e3,
             "p80_ms": t.p80 / num_batches * 1e3, "ratio": base / t.median,
             "images_per_s": batch_size * num_batches / t.median}
            for name, t in timings.items()]
