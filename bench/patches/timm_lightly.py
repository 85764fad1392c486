"""timm's ViT-S, and lightly's I-JEPA and LeJEPA as their examples train them."""

import contextlib
import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from jepa_fast import patches

from .official_images import image_masks
from .task import Case, Task, inference, training

BATCH = 8


def cases() -> list[Case]:
    vit, timm, lightly = f"vit_small_patch16_224, batch {BATCH}", ("timm",), ("lightly", "timm")
    return [Case("timm", vit, "inference", functools.partial(timm_vit, trains=False), packages=timm),
            Case("timm", vit, "forward + backward", functools.partial(timm_vit, trains=True), packages=timm),
            Case("lightly", f"I-JEPA, ViT-S/16, batch {BATCH}", "training step", ijepa, packages=lightly),
            Case("lightly", "LeJEPA, ViT-S/16, 2 x 224 and 4 x 96, batch 4", "training step", lejepa,
                 packages=lightly)]


@contextlib.contextmanager
def timm_vit(trains: bool):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    images = torch.randn(BATCH, 3, 224, 224)

    def features(model):
        return model(images)

    yield Task(model, training(lambda model: features(model).square().mean()) if trains else inference(features),
               patches.timm.apply)


@contextlib.contextmanager
def ijepa():
    """One context block, four targets predicted each on its own, smooth L1 to a moving average's features."""
    import timm
    from lightly.models import utils
    from lightly.models.modules import IJEPAPredictorTIMM, MaskedVisionTransformerTIMM

    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, class_token=False, global_pool="avg")
    encoder = MaskedVisionTransformerTIMM(vit)
    predictor = IJEPAPredictorTIMM(num_patches=196, depth=6, mlp_dim=384, predictor_embed_dim=384, num_heads=6,
                                   qkv_bias=True, mlp_ratio=4.0, drop_path_rate=0.0, proj_drop_rate=0.0, attn_drop_rate=0.0)
    target = copy.deepcopy(encoder).requires_grad_(False)
    model = nn.ModuleDict({"encoder": encoder, "predictor": predictor, "target_encoder": target})
    images = torch.randn(BATCH, 3, 224, 224)
    context, targets = image_masks(BATCH)

    def loss_of(model):
        with torch.no_grad():
            h = model["target_encoder"].encode(images)
            h = utils.apply_masks(F.layer_norm(h, h.shape[-1:]), targets)
        z = model["encoder"].encode(images, idx_keep=context[0])
        return F.smooth_l1_loss(model["predictor"](z, context, targets), h)

    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def move_average(model):
        utils.update_momentum(model["encoder"], model["target_encoder"], 0.996)

    def trained(model):
        return nn.ModuleList([model["encoder"], model["predictor"]])

    yield Task(model, training(loss_of, trained=trained, optimizer=adamw, after_step=move_average), patches.lightly.apply)


@contextlib.contextmanager
def lejepa():
    import timm
    from lightly.loss import LeJEPALoss
    from lightly.models.modules import LeJEPAProjectionHead

    torch.manual_seed(0)
    model = nn.ModuleDict({
        "backbone": timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, drop_path_rate=0.1),
        "head": LeJEPAProjectionHead(input_dim=384), "loss": LeJEPALoss()})
    views = [torch.randn(4, 3, 224, 224) for _ in range(2)], [torch.randn(4, 3, 96, 96) for _ in range(4)]

    def loss_of(model):
        globals_, locals_ = (torch.stack([model["head"](model["backbone"](view)) for view in some]) for some in views)
        return model["loss"](local_proj=locals_, global_proj=globals_)

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=5e-2)

    yield Task(model, training(loss_of, optimizer=adamw), patches.lightly.apply)
