"""LeWorldModel's predictor: a causal transformer over a few embeddings, steered by their actions through AdaLN-zero.

Maes et al., arXiv:2603.19312; AdaLN-zero: Peebles and Xie, arXiv:2212.09748.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ConditionalPredictorConfig:
    history: int = 3        # embeddings that a prediction sees
    depth: int = 6
    num_heads: int = 16
    head_dim: int = 64      # num_heads x head_dim may differ from the embeddings' width
    mlp_dim: int = 2048
    dropout: float = 0.1    # of attention weights and of what each branch adds

    def __post_init__(self):
        if self.history < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"history must be at least 1 and dropout in [0, 1), got {self.history} and {self.dropout}")


class ConditionalPredictor(nn.Module):
    def __init__(self, config: ConditionalPredictorConfig, dim: int):
        super().__init__()
        self.config = config
        self.pos_embed = nn.Parameter(torch.randn(1, config.history, dim))
        self.blocks = nn.ModuleList(ConditionalBlock(config, dim) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Embeddings and conditions [B, T, D], T <= history -> [B, T, D]; step t sees steps up to t."""
        if x.shape[1] > self.config.history:
            raise ValueError(f"x must have at most history = {self.config.history} steps, got {x.shape[1]}")
        x = x + self.pos_embed[:, :x.shape[1]]
        for block in self.blocks:
            x = block(x, condition)
        return self.norm(x)


class ConditionalBlock(nn.Module):
    """Attention and MLP, each normed twice: without weights before the modulation, with weights after it, as official."""

    def __init__(self, config: ConditionalPredictorConfig, dim: int):
        super().__init__()
        inner, drop = config.num_heads * config.head_dim, config.dropout
        self.num_heads, self.dropout = config.num_heads, drop
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.proj = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(drop))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.mlp_dim), nn.GELU(), nn.Dropout(drop),
                                 nn.Linear(config.mlp_dim, dim), nn.Dropout(drop))
        self.modulation = nn.Linear(dim, 6 * dim)
        # both branches start out closed: the block is the identity
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = x + gate1 * self._attend(_modulated(x, shift1, scale1))
        return x + gate2 * self.mlp(_modulated(x, shift2, scale2))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(out.transpose(1, 2).flatten(2))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
