"""facebookresearch/ijepa: encoder, predictor, target encoder and the step of src/train.py, ViT-S."""

import contextlib
import copy
import dataclasses
import functools
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import patches
from jepa_fast.optim import AdamWEMA
from jepa_fast.recipes import ijepa as recipes

from ..checkouts import checkout
from .task import Case, Task, inference, training

BATCH, SIZE = 16, 224


def cases() -> list[Case]:
    name = f"ViT-S/16 {SIZE}, batch {BATCH}"
    return [Case("ijepa", name, "training step", functools.partial(task, trains=True), goal=1.5, checkout="ijepa"),
            Case("ijepa", name, "inference", functools.partial(task, trains=False), checkout="ijepa")]


@contextlib.contextmanager
def task(path: pathlib.Path, trains: bool):
    with checkout(path, "src.helper", "src.masks.utils", "src.utils.tensors") as (helper, masks_utils, tensors):
        torch.manual_seed(0)
        encoder, predictor = helper.init_model("cpu", patch_size=16, model_name="vit_small", crop_size=SIZE, pred_depth=12,
                                               pred_emb_dim=384)
        model = with_target(encoder, predictor)
        images = torch.randn(BATCH, 3, SIZE, SIZE)

        def apply(model):
            return patches.ijepa.apply(modules=[helper])  # the whole checkout, as a user of its main.py does

        if not trains:
            yield Task(model, inference(lambda model: model["target_encoder"](images)), apply)
            return
        context, target = image_masks(BATCH)

        def loss_of(model: nn.ModuleDict) -> Tensor:
            with torch.no_grad():
                h = model["target_encoder"](images)
                h = F.layer_norm(h, h.shape[-1:])
                # named in their modules, where the patch replaces them
                h = tensors.repeat_interleave_batch(masks_utils.apply_masks(h, target), BATCH, repeat=len(context))
            return F.smooth_l1_loss(model["predictor"](model["encoder"](images, context), context, target), h)

        yield Task(model, training(loss_of, trained=trained, optimizer=adamw, after_step=move_average), apply,
                   (("AdamWEMA", apply, training(loss_of, trained=trained, optimizer=adamw_ema)),))


def image_masks(batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    masking = dataclasses.replace(recipes.ijepa_vith14().objective.masking, mask_group_size=batch_size)
    masks = masking.sample((SIZE // 16,) * 2, batch_size, seed=0, step=0, first_sample=0)
    return masks.context_lists(), masks.target_lists()


# a step as all three of Meta's train.py take it

MOMENTUM = 0.996


def with_target(encoder: nn.Module, predictor: nn.Module) -> nn.ModuleDict:
    target = copy.deepcopy(encoder).requires_grad_(False)
    return nn.ModuleDict({"encoder": encoder, "predictor": predictor, "target_encoder": target})


def trained(model: nn.ModuleDict) -> nn.ModuleList:
    return nn.ModuleList([model["encoder"], model["predictor"]])


def _groups(model: nn.ModuleDict) -> list[dict]:
    parameters = [p for p in trained(model).parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0}]


def adamw(model: nn.ModuleDict) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(model), lr=1e-4, weight_decay=0.04)


@torch.no_grad()
def move_average(model: nn.ModuleDict) -> None:
    """One parameter at a time, as in ijepa and jepa."""
    for q, k in zip(model["encoder"].parameters(), model["target_encoder"].parameters(), strict=True):
        k.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * q.detach().data)


@torch.no_grad()
def move_average_foreach(model: nn.ModuleDict) -> None:
    """As in vjepa2."""
    averages = list(model["target_encoder"].parameters())
    torch._foreach_mul_(averages, MOMENTUM)
    torch._foreach_add_(averages, list(model["encoder"].parameters()), alpha=1 - MOMENTUM)


def adamw_ema(model: nn.ModuleDict) -> AdamWEMA:
    pairs = zip(model["encoder"].parameters(), model["target_encoder"].parameters(), strict=True)
    optimizer = AdamWEMA(_groups(model), lr=1e-4, weight_decay=0.04, averages=pairs)
    optimizer.momentum = MOMENTUM
    return optimizer
