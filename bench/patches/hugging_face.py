"""Hugging Face: IJepaModel and VJEPA2Model, ViT-S, random weights."""

import contextlib
import functools

import torch

from jepa_fast import patches

from .official_videos import clip_masks
from .task import Case, Task, inference, training

VIT_S = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)


def cases() -> list[Case]:
    image, clip = "IJepaModel ViT-S/16 224, batch 8", "VJEPA2Model ViT-S/16 16x128, batch 2"
    short = functools.partial(Case, packages=("transformers",))
    return [short("hf_ijepa", image, "inference", functools.partial(ijepa, trains=False)),
            short("hf_ijepa", image, "forward + backward", functools.partial(ijepa, trains=True)),
            short("hf_vjepa2", clip, "inference, encoder + predictor", functools.partial(vjepa2, trains=False), goal=1.3),
            short("hf_vjepa2", clip, "forward + backward, encoder + predictor", functools.partial(vjepa2, trains=True))]


@contextlib.contextmanager
def ijepa(trains: bool):
    from transformers import IJepaConfig, IJepaModel

    torch.manual_seed(0)
    model = IJepaModel(IJepaConfig(**VIT_S, intermediate_size=1536, image_size=224, patch_size=16, layer_norm_eps=1e-6),
                       add_pooling_layer=False)
    images = torch.randn(8, 3, 224, 224)

    def features(model):
        return model(images).last_hidden_state

    yield Task(model, training(lambda model: features(model).square().mean()) if trains else inference(features),
               patches.hf_ijepa.apply)


@contextlib.contextmanager
def vjepa2(trains: bool):
    """Inference: the predictor sees and predicts all tokens, as the model's default is; training: one group of masks."""
    from transformers import VJEPA2Config, VJEPA2Model

    torch.manual_seed(0)
    model = VJEPA2Model(VJEPA2Config(**VIT_S, crop_size=128, frames_per_clip=16, patch_size=16, pred_hidden_size=384,
                                     pred_num_attention_heads=12, pred_num_hidden_layers=12))
    clips = torch.randn(2, 16, 3, 128, 128)
    context, target = (masks[:1] for masks in clip_masks())

    def outputs(model):
        out = model(clips)
        return [out.last_hidden_state, out.predictor_output.last_hidden_state]

    def loss_of(model):
        out = model(clips, context_mask=context, target_mask=target).predictor_output
        return (out.last_hidden_state - out.target_hidden_state.detach()).abs().mean()

    yield Task(model, training(loss_of) if trains else inference(outputs), patches.hf_vjepa2.apply)
