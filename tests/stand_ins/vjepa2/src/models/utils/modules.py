"""The layers of V-JEPA 2 in plain words: their names, constructors, attributes and calls, one line for each fact."""

import torch
import torch.nn.functional as F
from torch import nn


def build_action_block_causal_attention_mask(T, H, W, add_tokens=1):
    frame = torch.arange(T).repeat_interleave(H * W + add_tokens)
    return frame.unsqueeze(1) >= frame


def rotate_queries_or_keys(x, pos):
    n = x.shape[-1] // 2
    angle = pos.unsqueeze(-1) * (1.0 / 10000 ** (torch.arange(n, dtype=x.dtype) / n))
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


class DropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class MLP(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2, self.drop = nn.Linear(hidden_features, in_features), nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFN(nn.Module):
    def __init__(self, in_features, hidden_features):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(in_features, hidden_features)
        self.act, self.fc3 = nn.SiLU(), nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


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

    def attend(self, q, k, v, attn_mask):
        if attn_mask is not None or self.use_sdpa:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask, self.proj_drop_prob, self.is_causal)
        else:
            x = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def forward(self, x, mask=None, attn_mask=None):
        return self.attend(*self.heads(x), attn_mask)


class _Rotary(Attention):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_sdpa=True,
                 is_causal=False, grid_size=16):
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, use_sdpa, is_causal)
        self.head_dim, self.grid_size = dim // num_heads, grid_size
        self.d_dim = self.h_dim = self.w_dim = 2 * (self.head_dim // 3 // 2)

    def turned(self, x, *axes):
        n = self.d_dim
        parts = [rotate_queries_or_keys(x[..., i * n:(i + 1) * n], pos) for i, pos in enumerate(axes)]
        return torch.cat([*parts, x[..., len(axes) * n:]], -1)


def places(ids, H, W):
    return ids // (H * W), ids % (H * W) // W, ids % W


class RoPEAttention(_Rotary):
    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        H, W = (self.grid_size, self.grid_size) if None in (H_patches, W_patches) else (H_patches, W_patches)
        ids = torch.arange(x.shape[1]) if mask is None else mask.unsqueeze(1).repeat(1, self.num_heads, 1)
        q, k, v = self.heads(x)
        return self.attend(self.turned(q, *places(ids, H, W)), self.turned(k, *places(ids, H, W)), v, attn_mask)


class ACRoPEAttention(_Rotary):
    def forward(self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        ids = torch.arange(T * H * W) if mask is None else mask.unsqueeze(1).repeat(1, self.num_heads, 1)
        d, h, w = (1.0 * axis for axis in places(ids, H, W))
        h, w = h * (self.grid_size / H), w * (self.grid_size / W)
        q, k, v = self.heads(x)
        if not action_tokens:
            return self.attend(self.turned(q, d, h, w), self.turned(k, d, h, w), v, attn_mask)
        turned = []
        for t in (q, k):
            t = t.unflatten(2, (T, -1))
            actions = self.turned(t[:, :, :, :action_tokens].transpose(2, 3), torch.arange(T)).transpose(2, 3)
            patches = self.turned(t[:, :, :, action_tokens:].flatten(2, 3), d, h, w).unflatten(2, (T, -1))
            turned.append(torch.cat([actions, patches], 3).flatten(2, 3))
        return self.attend(*turned, v, attn_mask)


class _Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, qk_scale=None, drop=0.0, attn_drop=0.0, drop_path=0.0,
                 act_layer=nn.GELU, wide_silu=True, norm_layer=nn.LayerNorm, use_sdpa=True, is_causal=False, grid_size=16,
                 use_rope=False, **kwargs):
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        where = {"grid_size": grid_size} if use_rope else {}
        self.attn = (self.rotary if use_rope else Attention)(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, use_sdpa,
                                                             is_causal, **where)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLUFFN(dim, hidden) if act_layer is nn.SiLU else MLP(dim, hidden, act_layer, drop)

    def run(self, x, *where):
        where = where if isinstance(self.attn, self.rotary) else where[:2]
        x = x + self.drop_path(self.attn(self.norm1(x), *where))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Block(_Block):
    rotary = RoPEAttention

    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        return self.run(x, mask, attn_mask, T, H_patches, W_patches)


class ACBlock(_Block):
    rotary = ACRoPEAttention

    def forward(self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        return self.run(x, mask, attn_mask, T, H, W, action_tokens)


class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads=12, qkv_bias=False, use_sdpa=True):
        super().__init__()
        self.num_heads, self.scale, self.use_sdpa = num_heads, (dim // num_heads) ** -0.5, use_sdpa
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)

    def forward(self, q, x):
        q = self.q(q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
