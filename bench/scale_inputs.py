"""What the paper model needs to know of a recipe, from its shapes and masks: no weights, no pixels, no device."""

import statistics

import torch

from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.flops import transformer
from jepa_fast.nn.block import Block
from jepa_fast.objectives.action_conditioned import ActionConditionedConfig
from jepa_fast.objectives.flops import step_work
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.objectives.lejepa import LeJEPAConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig, as_list
from jepa_fast.objectives.video_prediction21 import HierarchicalVideoPredictionConfig
from jepa_fast.recipes import Recipe

from .scale import Step

IMAGENET_1K = 1_281_167


def step_of(recipe: Recipe, ms: float, batch_size: int, num_batches: int = 16) -> Step:
    """A measured step of a recipe; work and memory are means over `num_batches` of its masks."""
    if not ms > 0 or batch_size < 1:
        raise ValueError(f"step_ms must be above 0 and batch_size at least 1, got {ms} and {batch_size}")
    config = recipe.objective
    with torch.device("meta"):
        objective = config.build()
    batch = empty_batch(recipe, batch_size)
    batches = [objective.prepare(batch, seed=0, step=100_000 + step, first_sample=0) for step in range(num_batches)]
    flops = [step_work(config, prepared).model_flops for prepared in batches]
    mean = statistics.mean(flops)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    units = [sum(p.numel() for p in block.parameters()) for block in objective.modules() if isinstance(block, Block)]
    return Step(ms=ms, batch_size=batch_size, precision=recipe.train.precision,
                backward_share=2 / 3 * (1 - statistics.mean(frozen_flops(config, b) for b in batches) / mean),
                deviation=statistics.pstdev(flops) / mean, trained=trained,
                averaged=sum(p.numel() for p in objective.parameters()) - trained, largest_unit=max(units, default=trained),
                activation_bytes=statistics.mean(activation_bytes(recipe, b) for b in batches))


def empty_batch(recipe: Recipe, B: int) -> dict:
    """Shapes of a batch of one GPU."""
    def empty(*shape: int):
        return torch.empty(shape, device="meta")

    config, data = recipe.objective, recipe.data
    encoder = config.encoder
    size = (encoder.image_size, encoder.image_size)
    match config:
        case LatentPredictionConfig():
            return {"images": empty(B, encoder.in_chans, *size)}
        case VideoPredictionConfig():
            return {"clips": empty(B, encoder.in_chans, encoder.num_frames, *size)}
        case HierarchicalVideoPredictionConfig():
            return {"clips": empty(B, encoder.in_chans, encoder.num_frames, *size),
                    "images": empty(round(B * data.images_per_clip), encoder.in_chans, *size)}
        case ActionConditionedConfig():
            return {"states": empty(B, data.num_frames, config.predictor.action_dim)}
        case LeJEPAConfig() if isinstance(encoder, VisionTransformerConfig):
            views = data.transform
            local = getattr(views, "num_local", 0)
            sides = [encoder.image_size] * (views.num_views - local) + [getattr(views, "local_size", 0)] * local
            return {"images": [empty(B, encoder.in_chans, side, side) for side in sides]}
    raise ValueError(f"scale is for I-JEPA, V-JEPA, V-JEPA 2, 2.1, 2-AC and LeJEPA with a vision transformer, "
                     f"got {recipe.name}")


def frozen_flops(config, batch: dict) -> float:
    """Operations of the encoder that does not train."""
    if isinstance(config, LeJEPAConfig):
        return 0.0
    if isinstance(config, ActionConditionedConfig):
        B, T = batch["states"].shape[:2]
        n = config.encoder.grid[1] * config.encoder.grid[2]
        return transformer(config.encoder, B * T * n, B * T * n * n, trains=False).model_flops
    return sum(transformer(config.encoder, m.batch_size * m.num_tokens, m.batch_size * m.num_tokens**2,
                           trains=False).model_flops for m in masks_of(batch))


def masks_of(batch: dict) -> list:
    return [group.masks for group in batch["groups"]] if "groups" in batch else as_list(batch["masks"])


def activation_bytes(recipe: Recipe, batch: dict) -> float:
    """What blocks keep for their backward pass (nn/block_function.py), and all of one block, the widest in use."""
    config, train = recipe.objective, recipe.train
    encoder, predictor = config.encoder, getattr(config, "predictor", None)
    if isinstance(config, LeJEPAConfig):
        p = encoder.patch_size
        tokens = sum(len(v) * ((v.shape[-2] // p) * (v.shape[-1] // p) + encoder.class_token) for v in batch["images"])
        parts, widest = [(encoder, tokens)], tokens
    elif isinstance(config, ActionConditionedConfig):
        B, T = batch["states"].shape[:2]
        n = encoder.grid[1] * encoder.grid[2]
        parts, widest = [(predictor, B * (T - 2 + config.auto_steps) * (n + 2))], B * T * n
    else:
        counts = [masks.counts for masks in masks_of(batch)]
        parts = [(encoder, sum(c.context for c in counts)), (predictor, sum(c.predictor for c in counts))]
        widest = sum(masks.batch_size * masks.num_tokens for masks in masks_of(batch))
    kept = sum(tokens * part.depth * bytes_per_token(part, train.activations, train.precision) for part, tokens in parts)
    return kept + widest * bytes_per_token(encoder, "all", train.precision)


def bytes_per_token(config, activations: str, precision: str) -> float:
    """Of one block: x and x1 of the float32 stream; h1, qkv, attention's output, h2 and the MLP's two as products are."""
    width, ratio = (2 if precision == "bf16" else 4), config.mlp_ratio
    values = {"all": 8 + width * (1 + 3 + 1 + 1 + 2 * ratio), "lean": 8 + width * (3 + 1 + ratio), "checkpoint": 4}
    return config.embed_dim * values[activations]
