"""I-JEPA's models in plain PyTorch.

One convolution over all patches before the kept ones are picked, tables and mask tokens repeated over the batch, context
copied for every target block, one loss over the targets of all blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .style_blocks import Manner, blocks, pick_lists, run


class Patches(nn.Module):
    def __init__(self, patch: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, config, manner: Manner):
        super().__init__()
        self.manner = manner
        self.patch_embed = Patches(config.patch_size, config.in_chans, config.embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid[0] * config.grid[1], config.embed_dim), requires_grad=False)
        self.blocks = blocks(config, config.embed_dim, config.num_heads, manner)
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)

    def forward(self, images: Tensor, context: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        if context is not None:
            x = pick_lists(x, context)
        return self.norm(run(self.blocks, x, self.manner))


class Predictor(nn.Module):
    def __init__(self, config, encoder, manner: Manner):
        super().__init__()
        self.manner, dim = manner, config.embed_dim
        self.predictor_embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, encoder.grid[0] * encoder.grid[1], dim), requires_grad=False)
        self.predictor_blocks = blocks(config, dim, config.num_heads or encoder.num_heads, manner)
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder.embed_dim)

    def forward(self, x: Tensor, context: list[Tensor], target: list[Tensor]) -> Tensor:
        positions = self.predictor_pos_embed.repeat(len(context[0]), 1, 1)
        x = self.predictor_embed(x)
        x += pick_lists(positions, context)
        num_context = x.shape[1]
        masks = pick_lists(positions, target)
        masks = self.mask_token.repeat(masks.shape[0], masks.shape[1], 1) + masks
        x = run(self.predictor_blocks, torch.cat([x.repeat(len(target), 1, 1), masks], dim=1), self.manner)
        return self.predictor_proj(self.predictor_norm(x)[:, num_context:])


class ImageStep(nn.Module):
    def __init__(self, objective, manner: Manner):
        super().__init__()
        self.encoder = Encoder(objective.encoder, manner)
        self.target_encoder = Encoder(objective.encoder, manner).requires_grad_(False)
        self.predictor = Predictor(objective.predictor, objective.encoder, manner)

    def loss(self, batch: dict, masks: dict[str, list[Tensor]]) -> Tensor:
        with torch.no_grad():
            h = self.target_encoder(batch["images"])
            h = pick_lists(F.layer_norm(h, h.shape[-1:]), masks["target"])
        z = self.predictor(self.encoder(batch["images"], masks["context"]), masks["context"], masks["target"])
        return F.smooth_l1_loss(z, h)
