"""facebookresearch/jepa and vjepa2: V-JEPA, V-JEPA 2, 2-AC and 2.1, ViT-S on 16 frames, two groups of masks.

With activation checkpointing where their configuration files have it: all of vjepa2's.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import patches
from jepa_fast.recipes import vjepa2 as recipes

from ..checkouts import checkout
from .official_images import adamw, adamw_ema, move_average, move_average_foreach, trained, with_target
from .task import Case, Task, inference, training

BATCH, FRAMES, SIZE = 2, 16, 128
ENCODER = dict(img_size=SIZE, patch_size=16, num_frames=FRAMES, tubelet_size=2, use_sdpa=True)
PREDICTOR = ENCODER | dict(embed_dim=384, predictor_embed_dim=384, depth=12, num_heads=12, use_mask_tokens=True,
                           zero_init_mask_tokens=True)
CHECKPOINTS = dict(use_activation_checkpointing=True)


def cases() -> list[Case]:
    name = f"ViT-S/16 {FRAMES}x{SIZE}, batch {BATCH}"
    ac = f"2-AC predictor, width 384, 12 blocks, 4 frames of 8x8, batch {BATCH}"
    pair = "encoder + predictor, forward + backward"
    return [_case("jepa", vjepa, name, "training step", "step"), _case("jepa", vjepa, name, "inference", "inference"),
            _case("vjepa2", vjepa2, name, pair, "pair", goal=2.5), _case("vjepa2", vjepa2, name, "training step", "step"),
            _case("vjepa2", vjepa2, name, "inference", "inference"),
            _case("vjepa2", action_conditioned, ac, "forward + backward", "pair"),
            _case("vjepa2", action_conditioned, ac, "inference", "inference"),
            _case("vjepa2_1", vjepa21, name, "training step", "step"),
            _case("vjepa2_1", vjepa21, name, "inference", "inference")]


def _case(patch: str, make: Callable, name: str, what: str, how: str, goal: float | None = None) -> Case:
    return Case(patch, name, what, functools.partial(make, how=how), goal, checkout=patch)


def clip_masks() -> tuple[list[Tensor], list[Tensor]]:
    masking = dataclasses.replace(recipes.vjepa2_vitl16().objective.masking, mask_group_size=BATCH)
    masks = masking.sample((FRAMES // 2, SIZE // 16, SIZE // 16), BATCH, seed=0, step=0, first_sample=0)
    return masks.context_lists(), masks.target_lists()


def task_of(how: str, encoder: nn.Module, predictor: nn.Module, *, clips, target_of: Callable, loss_of: Callable,
            apply: Callable, apply_all: Callable | None = None, after_step: Callable) -> Task:
    """how: "inference": the target encoder; "pair": forward and backward of both that train; "step": all of train.py.

    apply_all: the patch that keeps all activations where the original computes them again.
    """
    model = with_target(encoder, predictor)
    if how == "inference":
        return Task(model, inference(lambda model: model["target_encoder"](clips)), apply)
    if how == "pair":
        targets = target_of(model)
        start = training(lambda model: loss_of(model, targets), trained=trained)
        return Task(model, start, apply, (("all activations kept", apply_all, start),) if apply_all else ())

    def loss(model: nn.ModuleDict) -> Tensor:
        return loss_of(model, target_of(model))

    by_hand = training(loss, trained=trained, optimizer=adamw_ema)
    more = [("AdamWEMA", apply, by_hand)] + ([("AdamWEMA, all activations kept", apply_all, by_hand)] if apply_all else [])
    return Task(model, training(loss, trained=trained, optimizer=adamw, after_step=after_step), apply, tuple(more))


def mean_power(z: list[Tensor], h: list[Tensor]) -> Tensor:
    """The loss of all three, exponent 1."""
    return sum((zi - hi).abs().mean() for zi, hi in zip(z, h, strict=True)) / len(z)


@contextlib.contextmanager
def vjepa(path: pathlib.Path, how: str):
    names = ("src.models.vision_transformer", "src.models.predictor", "src.models.utils.multimask", "src.masks.utils")
    with checkout(path, *names) as (transformer, predictors, multimask, masks_utils):
        torch.manual_seed(0)
        encoder = multimask.MultiMaskWrapper(transformer.vit_small(**ENCODER, uniform_power=True))
        predictor = multimask.PredictorMultiMaskWrapper(
            predictors.vit_predictor(**PREDICTOR, uniform_power=True, num_mask_tokens=2))
        clips = torch.randn(BATCH, 3, FRAMES, SIZE, SIZE)
        context, target = clip_masks()

        @torch.no_grad()
        def target_of(model):
            h = model["target_encoder"](clips)
            return masks_utils.apply_masks(F.layer_norm(h, h.shape[-1:]), target, concat=False)

        def loss_of(model, h):
            return mean_power(model["predictor"](model["encoder"](clips, context), h, context, target), h)

        yield task_of(how, encoder, predictor, clips=clips, target_of=target_of, loss_of=loss_of, after_step=move_average,
                      apply=lambda model: patches.jepa.apply(modules=[transformer]))


@contextlib.contextmanager
def vjepa2(path: pathlib.Path, how: str):
    names = ("src.models.vision_transformer", "src.models.predictor", "src.utils.wrappers", "src.masks.utils")
    with checkout(path, *names) as (transformer, predictors, wrappers, masks_utils):
        torch.manual_seed(0)
        encoder = wrappers.MultiSeqWrapper(transformer.vit_small(**ENCODER, **CHECKPOINTS, use_rope=True))
        predictor = wrappers.PredictorMultiSeqWrapper(
            predictors.vit_predictor(**PREDICTOR, **CHECKPOINTS, use_rope=True, num_mask_tokens=10))
        clips = [torch.randn(BATCH, 3, FRAMES, SIZE, SIZE)]
        context, target = ([lists] for lists in clip_masks())

        @torch.no_grad()
        def target_of(model):
            h = [F.layer_norm(h, h.shape[-1:]) for h in model["target_encoder"](clips)]
            return masks_utils.apply_masks(h[0], target[0], concat=False)

        def loss_of(model, h):
            return mean_power(model["predictor"](model["encoder"](clips, context), context, target)[0], h)

        yield task_of(how, encoder, predictor, clips=clips, target_of=target_of, loss_of=loss_of,
                      after_step=move_average_foreach, apply=lambda model: patches.vjepa2.apply(modules=[transformer]),
                      apply_all=lambda model: patches.vjepa2.apply(modules=[transformer], activations="all"))


@contextlib.contextmanager
def vjepa21(path: pathlib.Path, how: str):
    """As its files train: features of four layers, context tokens predicted too, positions stretched to the grid."""
    names = ("app.vjepa_2_1.models.vision_transformer", "app.vjepa_2_1.models.predictor", "app.vjepa_2_1.wrappers",
             "src.masks.utils")
    with checkout(path, *names) as (transformer, predictors, wrappers, masks_utils):
        torch.manual_seed(0)
        options = CHECKPOINTS | dict(use_rope=True, interpolate_rope=True, modality_embedding=True, img_temporal_dim_size=1)
        encoder = wrappers.MultiSeqWrapper(transformer.vit_small(**ENCODER, **options))
        predictor = wrappers.PredictorMultiSeqWrapper(
            predictors.vit_predictor(**PREDICTOR, **options, num_mask_tokens=10, return_all_tokens=True))
        clips = [torch.randn(BATCH, 3, FRAMES, SIZE, SIZE)]
        context, target = ([lists] for lists in clip_masks())

        @torch.no_grad()
        def target_of(model):
            h = model["target_encoder"](clips, gram_mode=False, training_mode=True)[0]
            h = torch.cat([F.layer_norm(level, level.shape[-1:]) for level in h.split(384, -1)], -1)
            return [masks_utils.apply_masks(h, masks[0], concat=False) for masks in (target, context)]

        def loss_of(model, h):
            z = model["encoder"](clips, context, gram_mode=False, training_mode=True)
            z_target, z_context = model["predictor"](z, context, target, mod="video")
            return mean_power(z_target[0], h[0]) + mean_power(z_context[0], h[1])

        yield task_of(how, encoder, predictor, clips=clips, target_of=target_of, loss_of=loss_of,
                      after_step=move_average_foreach, apply=lambda model: patches.vjepa2_1.apply(modules=[transformer]),
                      apply_all=lambda model: patches.vjepa2_1.apply(modules=[transformer], activations="all"))


@contextlib.contextmanager
def action_conditioned(path: pathlib.Path, how: str):
    with checkout(path, "src.models.ac_predictor") as (predictors,):
        torch.manual_seed(0)
        model = predictors.vit_ac_predictor(img_size=SIZE, patch_size=16, num_frames=8, tubelet_size=2, embed_dim=384,
                                            predictor_embed_dim=384, depth=12, num_heads=12, use_rope=True, **CHECKPOINTS)
        frames = torch.randn(BATCH, 4 * 64, 384)
        actions, states = torch.randn(2, BATCH, 4, 7)

        def apply(model):
            return patches.vjepa2.apply(modules=[predictors])

        if how == "inference":
            yield Task(model, inference(lambda model: model(frames, actions, states)), apply)
        else:
            yield Task(model, training(lambda model: model(frames, actions, states).square().mean()), apply)
