"""LeWorldModel of stable-worldmodel: the imagined rollout of a planner."""

import contextlib
import pathlib

import torch
from torch import nn

from jepa_fast import patches

from ..checkouts import checkout
from .task import Case, Task, inference

SAMPLES, HORIZON, DIM = 300, 5, 192


def cases() -> list[Case]:
    return [Case("lewm", f"ViT-Ti/14 224, {SAMPLES} plans of {HORIZON} actions", "rollout", rollout,
                 checkout="stable-worldmodel", packages=("transformers",))]


@contextlib.contextmanager
def rollout(path: pathlib.Path):
    from transformers import ViTConfig, ViTModel

    with checkout(path / "stable_worldmodel/wm", "lewm.lewm", "lewm.module") as (world, parts):
        torch.manual_seed(0)
        encoder = ViTModel(ViTConfig(hidden_size=DIM, num_hidden_layers=12, num_attention_heads=3, intermediate_size=4 * DIM,
                                     patch_size=14, image_size=224), add_pooling_layer=False)
        predictor = parts.Predictor(num_frames=3, depth=6, heads=16, mlp_dim=2048, input_dim=DIM, hidden_dim=DIM,
                                    dropout=0.1)
        for layer in predictor.transformer.layers:
            nn.init.normal_(layer.adaLN_modulation[-1].weight, std=0.02)  # as trained: at first, all gates are closed
        model = world.LeWM(encoder, predictor, parts.Embedder(10, 10, DIM), parts.MLP(DIM, 2048, DIM, nn.BatchNorm1d),
                           parts.MLP(DIM, 2048, DIM, nn.BatchNorm1d))
        pixels = torch.randn(1, 1, 1, 3, 224, 224).expand(-1, SAMPLES, -1, -1, -1, -1)
        actions = torch.randn(1, SAMPLES, HORIZON, 10)

        def predicted(model):
            return model.rollout({"pixels": pixels}, actions)["predicted_emb"]

        yield Task(model, inference(predicted), patches.lewm.apply)
