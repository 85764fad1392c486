"""Operations and tokens of a training step, from a prepared batch: see models/flops.py for what is counted and how.

`step_work(config, batch)` reads shapes and the counts that masks carry, nothing on a device.
"""

import dataclasses
import functools

from ..masking import MaskCounts, PackedMasks
from ..masking.padding import TILE
from ..models.encoder import VisionTransformerConfig
from ..models.flops import Work, convolutional, embed, linear, perceptron, transformer
from .action_conditioned import ActionConditionedConfig
from .eb_jepa import EBJEPAConfig
from .latent_prediction import LatentPredictionConfig
from .lejepa import LeJEPAConfig
from .leworldmodel import LeWorldModelConfig
from .video_prediction import VideoPredictionConfig, as_list
from .video_prediction21 import HierarchicalVideoPredictionConfig


@functools.singledispatch
def step_work(config, batch: dict, *, recompute: bool = False) -> Work:
    """Forward and backward of one batch, as `prepare` returns it. `recompute`: with activation checkpointing."""
    raise TypeError(f"no count of operations for {type(config).__name__}")


@step_work.register
def _(config: LatentPredictionConfig, batch: dict, *, recompute: bool = False) -> Work:
    encoder, masks = config.encoder, batch["masks"]
    patch_values = encoder.in_chans * encoder.patch_size**2
    return _masked(encoder, config.predictor, patch_values, masks, recompute)


@step_work.register
def _(config: VideoPredictionConfig, batch: dict, *, recompute: bool = False) -> Work:
    encoder = config.encoder
    patch_values = encoder.in_chans * encoder.tubelet_size * encoder.patch_size**2
    return sum((_masked(encoder, config.predictor, patch_values, masks, recompute) for masks in as_list(batch["masks"])),
               Work())


def _masked(encoder, predictor, patch_values: int, masks: PackedMasks, recompute: bool) -> Work:
    """The algorithm's work is that of the true tokens; what runs has the padding too."""
    asked, done = (prediction_work(encoder, predictor, patch_values, _targets(masks), counts, recompute=recompute)
                   for counts in (masks.counts, _with_padding(masks)))
    return Work(asked.tokens, asked.model_flops, done.hardware_flops, done.tokens - asked.tokens)


def _with_padding(masks: PackedMasks) -> MaskCounts:
    """Padding is in sequences of TILE tokens, which see only themselves."""
    true = masks.counts
    context, predictor, prediction = (len(rows) for rows in (masks.context_idx, masks.predictor_idx, masks.prediction_idx))

    def pairs(num_queries: int, num_keys: int) -> int:
        starts = range(0, min(num_queries, num_keys), TILE)
        return sum(min(TILE, num_queries - start) * min(TILE, num_keys - start) for start in starts)

    more = [context - true.context, predictor - true.predictor, prediction - true.prediction]
    return dataclasses.replace(
        true, context=context, context_pairs=true.context_pairs + pairs(more[0], more[0]),
        predictor=predictor, predictor_pairs=true.predictor_pairs + pairs(more[1], more[1]), prediction=prediction,
        prediction_pairs=true.prediction_pairs + pairs(more[2], more[1]))


def prediction_work(encoder, predictor, patch_values: int, target: tuple[int, int, tuple[int, int] | None],
                    counts: MaskCounts, *, recompute: bool = False) -> Work:
    """A target encoder, an encoder of the context and a predictor. `target`: tokens, pairs, a pruned last block or None."""
    D, d, (tokens, pairs, last) = encoder.embed_dim, predictor.embed_dim, target
    return (embed(tokens, patch_values, D, trains=False) + transformer(encoder, tokens, pairs, trains=False, last=last)
            + embed(counts.context, patch_values, D)
            + transformer(encoder, counts.context, counts.context_pairs, recompute=recompute)
            + linear(counts.context, D, d)
            + transformer(predictor, counts.predictor, counts.predictor_pairs, recompute=recompute,
                          last=(counts.prediction, counts.prediction_pairs))
            + linear(counts.prediction, d, D))


def _targets(masks: PackedMasks) -> tuple[int, int, tuple[int, int]]:
    """Tokens and pairs of the target encoder, and those of its last block, through which only some rows go."""
    B, N = masks.batch_size, masks.num_tokens
    # padded rows look at nothing
    return B * N, B * N * N, (len(masks.target_rows), masks.counts.target_rows * N)


@step_work.register
def _(config: HierarchicalVideoPredictionConfig, batch: dict, *, recompute: bool = False) -> Work:
    encoder, predictor, groups = config.encoder, config.predictor, batch["groups"]
    D, d = encoder.embed_dim, predictor.embed_dim
    num_levels = predictor.num_levels or len(encoder.levels)
    out_features, with_context = num_levels * (predictor.target_dim or D), any(g.context_loss_weight for g in groups)
    work = Work()
    for group in groups:
        (tokens, pairs, _), counts = _targets(group.masks), group.masks.counts
        patch_values = encoder.in_chans * encoder.patch_size**2 * (1 if group.is_image else encoder.tubelet_size)
        last = None if with_context else (counts.prediction, counts.prediction_pairs)
        work += embed(tokens, patch_values, D, trains=False) + transformer(encoder, tokens, pairs, trains=False)
        work += embed(counts.context, patch_values, D)
        work += transformer(encoder, counts.context, counts.context_pairs, recompute=recompute)
        work += perceptron(counts.context, *((D, d) if num_levels == 1 else (num_levels * D, D, d)))
        work += transformer(predictor, counts.predictor, counts.predictor_pairs, recompute=recompute, last=last)
        work += linear(counts.prediction, d, out_features)
        if group.context_loss_weight:
            work += linear(counts.predictor - counts.prediction, d, out_features)
    return work


@step_work.register
def _(config: ActionConditionedConfig, batch: dict, *, recompute: bool = False) -> Work:
    encoder, predictor, steps = config.encoder, config.predictor, config.auto_steps
    D, n = encoder.embed_dim, encoder.grid[1] * encoder.grid[2]
    size = n + 2 + predictor.use_extrinsics                      # tokens of a frame
    B, T = batch["states"].shape[:2]
    work = Work()
    if "features" not in batch:
        # a frame is a clip that repeats it: the algorithm's kernel has all of the tubelet, ours its sum over time
        patch_values = encoder.in_chans * encoder.patch_size**2
        both = embed(B * T * n, patch_values, D, trains=False)
        work += Work(0, encoder.tubelet_size * both.model_flops, both.hardware_flops)
        work += transformer(encoder, B * T * n, B * T * n * n, trains=False)
    # officially frames 0 .. k go through again for step k of the rollout, and masked pairs are computed
    frames = [T - 1, *range(2, steps + 1)]
    asked = sum((_frames(predictor, D, B, t * size, B * (t * size) ** 2, t * n * B) for t in frames), Work())
    # here attention skips later frames, and the rollout adds one frame at a time to kept keys and values; such blocks are
    # never checkpointed
    before = (T - 1) * T // 2
    done = (_frames(predictor, D, B, (T - 1) * size, B * before * size**2, (T - 1) * n * B, input_grad=False)
            + sum((_frames(predictor, D, B, size, B * t * size**2, n * B) for t in range(2, steps + 1)), Work()))
    return work + Work(done.tokens, asked.model_flops, done.hardware_flops)


def _frames(predictor, encoder_dim: int, B: int, tokens: int, pairs: int, patches: int, input_grad: bool = True) -> Work:
    """The predictor on B sequences of `tokens`, `patches` of which, over all sequences, are of frames."""
    conditions = linear(B * tokens - patches, predictor.action_dim, predictor.embed_dim, input_grad=False)
    return (linear(patches, encoder_dim, predictor.embed_dim, input_grad=input_grad) + conditions
            + transformer(predictor, B * tokens, pairs) + linear(patches, predictor.embed_dim, encoder_dim))


@step_work.register
def _(config: LeJEPAConfig, batch: dict, *, recompute: bool = False) -> Work:
    views = as_list(batch["images"])
    rows = sum(len(view) for view in views)
    work = sum((encoder_work(config.encoder, *view.shape, recompute=recompute) for view in views), Work())
    work += perceptron(rows, config.encoder.num_features, *config.projector)
    return work + _sigreg(rows, config.projector[-1], config.sigreg.num_slices)


def encoder_work(encoder, images: int, chans: int, height: int, width: int, recompute: bool = False) -> Work:
    """An image encoder with its head: a vision transformer by formula, anything else as PyTorch counts it."""
    if not isinstance(encoder, VisionTransformerConfig):
        return convolutional(encoder, images, chans, height, width)
    patches = (height // encoder.patch_size) * (width // encoder.patch_size)
    length = patches + encoder.class_token
    work = embed(images * patches, chans * encoder.patch_size**2, encoder.embed_dim)
    work += transformer(encoder, images * length, images * length**2, recompute=recompute)
    return work + (linear(images, encoder.embed_dim, encoder.num_outputs) if encoder.num_outputs else Work())


def _sigreg(rows: int, dim: int, num_slices: int) -> Work:
    """Projections on random directions, which get no gradient."""
    flops = 2 * 2.0 * rows * dim * num_slices
    return Work(0, flops, flops)


@step_work.register
def _(config: EBJEPAConfig, batch: dict, *, recompute: bool = False) -> Work:
    B, T, *frame = batch["observations"].shape
    D, A, steps = config.encoder.num_outputs, config.action_dim, config.unroll_steps
    # a gated recurrent unit: three gates of the state and of the action
    calls = B * (steps if config.unroll == "autoregressive" else sum(T - 1 - k for k in range(steps)))
    work = encoder_work(config.encoder, B * T, *frame) + linear(calls, D, 3 * D) + linear(calls, A, 3 * D, input_grad=False)
    if config.inverse_dynamics_weight > 0:
        width = config.inverse_dynamics_dim
        work += perceptron(B * (T - 1), 2 * D, width, width, A)
    covariance = 3 * 2.0 * B * T * D * min(B * T, D)
    return work + Work(0, covariance, covariance) + _probe(B * T, D)


@step_work.register
def _(config: LeWorldModelConfig, batch: dict, *, recompute: bool = False) -> Work:
    B, T, *frame = batch["observations"].shape
    D, A, predictor = config.embed_dim, config.action_dim, config.predictor
    rows, inner = B * (T - 1), predictor.num_heads * predictor.head_dim
    work = encoder_work(config.encoder, B * T, *frame, recompute=recompute)
    work += perceptron(B * T, config.encoder.num_features, config.projector_dim, D)
    work += perceptron(rows, A, A, 4 * D, D, input_grad=False)
    attention = 4.0 * inner * rows * (T - 1)
    block = (linear(rows, D, 3 * inner) + linear(rows, inner, D) + perceptron(rows, D, predictor.mlp_dim, D)
             + linear(rows, D, 6 * D) + Work(rows, 3 * attention, 3.5 * attention))
    work = sum([block] * predictor.depth, work) + perceptron(rows, D, config.projector_dim, D)
    return work + _sigreg(B * T, D, config.sigreg.num_slices) + _probe(B * T, D)


def _probe(rows: int, dim: int) -> Work:
    return perceptron(rows, dim, 512, 2, input_grad=False)
