"""Stand-in for the module of this name in facebookresearch/jepa: the same classes, attributes and results, our words."""

import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    def __init__(self, in_features, hidden_features=None, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2, self.drop = nn.Linear(hidden_features, in_features), nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_sdpa=True):
        super().__init__()
        self.num_heads, self.scale, self.use_sdpa = num_heads, qk_scale or (dim // num_heads) ** -0.5, use_sdpa
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Dropout(attn_drop)
        self.proj, self.proj_drop_prob, self.proj_drop = nn.Linear(dim, dim), proj_drop, nn.Dropout(proj_drop)

    def forward(self, x, mask=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = None
        if self.use_sdpa:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.proj_drop_prob)
        else:
            weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
            out = weights @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, N, D))), weights


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, qk_scale=None, drop=0.0, attn_drop=0.0,
                 act_layer=nn.GELU, norm_layer=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer, drop)

    def forward(self, x, return_attention=False, mask=None):
        y, weights = self.attn(self.norm1(x), mask=mask)
        if return_attention:
            return weights
        x = x + y
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads=12, qkv_bias=False, use_sdpa=True):
        super().__init__()
        self.num_heads, self.use_sdpa = num_heads, use_sdpa
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q, x):
        heads = (self.num_heads, q.shape[-1] // self.num_heads)
        k, v = self.kv(x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q(q).unflatten(-1, heads).transpose(1, 2), k, v)
        return out.transpose(1, 2).reshape(q.shape)


class CrossAttentionBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, act_layer=nn.GELU, norm_layer=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.xattn, self.mlp = CrossAttention(dim, num_heads, qkv_bias), MLP(dim, int(dim * mlp_ratio), act_layer)

    def forward(self, q, x):
        q = q + self.xattn(q, self.norm1(x))
        return q + self.mlp(self.norm2(q))
