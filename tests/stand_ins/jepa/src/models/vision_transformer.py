"""Stand-in for the module of this name in facebookresearch/jepa: video only."""

import torch
from src.masks.utils import apply_masks
from src.models.utils.modules import Block
from torch import nn


class PatchEmbed3D(nn.Module):
    def __init__(self, patch_size, tubelet_size, in_chans, embed_dim):
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=size, stride=size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, img_size=224, patch_size=16, num_frames=1, tubelet_size=2, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, qkv_bias=True, drop_rate=0.0, norm_layer=nn.LayerNorm, out_layers=None,
                 uniform_power=False):
        super().__init__()
        self.embed_dim, self.num_heads, self.out_layers = embed_dim, num_heads, out_layers
        self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        num_patches = (num_frames // tubelet_size) * (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop=drop_rate, norm_layer=norm_layer)
                                    for _ in range(depth))
        self.norm = norm_layer(embed_dim)

    def interpolate_pos_encoding(self, x, pos_embed):
        return pos_embed

    def forward(self, x, masks=None):
        positions = self.interpolate_pos_encoding(x, self.pos_embed)
        x = self.patch_embed(x)
        x += positions
        if masks is not None:
            masks = masks if isinstance(masks, list) else [masks]
            x, masks = apply_masks(x, masks), torch.cat(masks)
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x, mask=masks)
            if self.out_layers is not None and i in self.out_layers:
                outs.append(self.norm(x))
        return self.norm(x) if self.out_layers is None else outs
