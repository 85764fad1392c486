"""Stand-in for the module of this name in facebookresearch/jepa: video only."""

from functools import partial

import torch
from src.masks.utils import apply_masks
from src.models.utils.modules import Block
from src.utils.tensors import repeat_interleave_batch
from torch import nn


class VisionTransformerPredictor(nn.Module):
    def __init__(self, img_size=224, patch_size=16, num_frames=1, tubelet_size=2, embed_dim=768, predictor_embed_dim=384,
                 depth=6, num_heads=12, mlp_ratio=4.0, qkv_bias=True, norm_layer=nn.LayerNorm, uniform_power=False,
                 use_mask_tokens=False, num_mask_tokens=2, zero_init_mask_tokens=True):
        super().__init__()
        D = predictor_embed_dim
        self.predictor_embed, self.predictor_proj = nn.Linear(embed_dim, D), nn.Linear(D, embed_dim)
        self.num_mask_tokens, self.mask_tokens = 0, None
        if use_mask_tokens:
            self.num_mask_tokens = num_mask_tokens
            self.mask_tokens = nn.ParameterList(nn.Parameter(torch.randn(1, 1, D)) for _ in range(num_mask_tokens))
        self.num_patches = (num_frames // tubelet_size) * (img_size // patch_size) ** 2
        self.predictor_pos_embed = nn.Parameter(torch.randn(1, self.num_patches, D), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(D, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer)
                                              for _ in range(depth))
        self.predictor_norm = norm_layer(D)

    def diffusion(self, x):
        return nn.functional.layer_norm(x, (x.shape[-1],)) + torch.randn_like(x)

    def forward(self, ctxt, tgt, masks_ctxt, masks_tgt, mask_index=1):
        masks_ctxt, masks_tgt = (m if isinstance(m, list) else [m] for m in (masks_ctxt, masks_tgt))
        B = len(ctxt) // len(masks_ctxt)
        table = self.predictor_pos_embed.repeat(B, 1, 1)
        x = self.predictor_embed(ctxt)
        x += apply_masks(table, masks_ctxt)
        if self.mask_tokens is None:
            tokens = self.diffusion(self.predictor_embed(tgt))
        else:
            token = self.mask_tokens[mask_index % self.num_mask_tokens]
            tokens = apply_masks(token.repeat(B, self.num_patches, 1), masks_tgt)
        tokens = tokens + repeat_interleave_batch(apply_masks(table, masks_tgt), B, repeat=len(masks_ctxt))
        num_context, masks = x.shape[1], torch.cat([torch.cat(masks_ctxt), torch.cat(masks_tgt)], dim=1)
        x = torch.cat([x.repeat(len(masks_tgt), 1, 1), tokens], dim=1)
        for block in self.predictor_blocks:
            x = block(x, mask=masks)
        return self.predictor_proj(self.predictor_norm(x)[:, num_context:])


def vit_predictor(**settings):
    return VisionTransformerPredictor(norm_layer=partial(nn.LayerNorm, eps=1e-6), **settings)
