"""Stand-in for the module of this name in facebookresearch/ijepa: the same classes, attributes and results, our words."""

from functools import partial

import torch
from src.masks.utils import apply_masks
from src.utils.tensors import repeat_interleave_batch
from torch import nn


class DropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x.div(keep) * (keep + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)).floor()


class MLP(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2, self.drop = nn.Linear(hidden_features, in_features), nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, qk_scale or (dim // num_heads) ** -0.5
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Dropout(attn_drop)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))), weights


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, qk_scale=None, drop=0.0, attn_drop=0.0, drop_path=0.0,
                 act_layer=nn.GELU, norm_layer=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer, drop)

    def forward(self, x, return_attention=False):
        y, weights = self.attn(self.norm1(x))
        if return_attention:
            return weights
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _blocks(dim, depth, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, drop_path_rate, norm_layer):
    rates = torch.linspace(0, drop_path_rate, depth).tolist()
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate,
                               norm_layer=norm_layer) for rate in rates)


class VisionTransformerPredictor(nn.Module):
    def __init__(self, num_patches, embed_dim=768, predictor_embed_dim=384, depth=6, num_heads=12, mlp_ratio=4.0,
                 qkv_bias=True, qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0,
                 norm_layer=nn.LayerNorm):
        super().__init__()
        D = predictor_embed_dim
        self.predictor_embed, self.predictor_proj = nn.Linear(embed_dim, D), nn.Linear(D, embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, D))
        self.predictor_pos_embed = nn.Parameter(torch.randn(1, num_patches, D), requires_grad=False)
        self.predictor_blocks = _blocks(D, depth, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate,
                                        drop_path_rate, norm_layer)
        self.predictor_norm = norm_layer(D)

    def forward(self, x, masks_x, masks):
        masks_x, masks = (m if isinstance(m, list) else [m] for m in (masks_x, masks))
        B = len(x) // len(masks_x)
        table = self.predictor_pos_embed.repeat(B, 1, 1)
        x = self.predictor_embed(x)
        x += apply_masks(table, masks_x)
        num_context = x.shape[1]
        tokens = repeat_interleave_batch(apply_masks(table, masks), B, repeat=len(masks_x))
        x = torch.cat([x.repeat(len(masks), 1, 1), tokens + self.mask_token], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, num_context:])


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, img_size=(224,), patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 qkv_bias=True, qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0,
                 norm_layer=nn.LayerNorm):
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.patch_embed = PatchEmbed(img_size[0], patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches, embed_dim), requires_grad=False)
        self.blocks = _blocks(embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate,
                              drop_path_rate, norm_layer)
        self.norm = norm_layer(embed_dim)

    def forward(self, x, masks=None):
        x = self.patch_embed(x) + self.pos_embed
        if masks is not None:
            x = apply_masks(x, masks if isinstance(masks, list) else [masks])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def vit_predictor(**settings):
    return VisionTransformerPredictor(norm_layer=partial(nn.LayerNorm, eps=1e-6), **settings)
