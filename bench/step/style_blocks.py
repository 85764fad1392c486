"""Transformer blocks in plain PyTorch, in two manners: as the official code writes them, and as one would tune them.

An own writing after a description of that code. Modules carry the official parameter names, so the same weights go into
all providers. Officially rotary angles, sines and cosines are made anew in every layer, for queries and keys, axis by
axis, for every head (`Ids`); tuned, there is one table for all layers (`Tables`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a step is written. The defaults are the tuned ones."""

    is_unfused: bool = False          # attention that returns its probabilities (I-JEPA)
    is_checkpointed: bool = False     # blocks recompute in the backward pass
    makes_tables: bool = True         # rotary tables once per step, no sorting, patches embedded once for all masks
    has_scaler: bool = False          # GradScaler, where there is a GPU and bfloat16
    logs: str = ""                    # read on the host in every step: "loss", "gradients", "gradients, moments"
    average: str = "foreach"          # the moving average: "loop" tensor by tensor, or "foreach"
    is_fused: bool = True             # AdamW
    is_compiled: bool = False         # blocks go through torch.compile
    keeps_memory: bool = True         # on a CPU the C library keeps freed memory, as in our trainer


class Tables(NamedTuple):
    """cos and sin [B or 1, 1, N, head width]; 1 and 0 where nothing turns."""

    cos: Tensor
    sin: Tensor

    def turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return tuple((x * self.cos + _swap(x) * self.sin).to(x.dtype) for x in (q, k))


class Ids(NamedTuple):
    """Token numbers [B, N] in a grid of (frames, rows, columns); None: all of them."""

    ids: Tensor | None
    grid: tuple[int, int, int]

    def turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (B, H, N, width), (_, rows, columns) = q.shape, self.grid
        axis = 2 * (width // 3 // 2)
        ids = torch.arange(N, device=q.device).view(1, N) if self.ids is None else self.ids
        ids = ids.unsqueeze(1).repeat(B // ids.shape[0], H, 1)
        frame = ids // (rows * columns)
        row = (ids - frame * rows * columns) // columns
        column = ids - frame * rows * columns - row * columns
        turned = []
        for heads in (q, k):
            parts = [rotate(heads[..., i * axis:(i + 1) * axis], positions)
                     for i, positions in enumerate((frame, row, column))]
            turned.append(torch.cat([*parts, heads[..., 3 * axis:]], dim=-1))
        return tuple(turned)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [..., N, n], positions [..., N]: the tiled map of one axis."""
    n = x.shape[-1]
    omega = torch.arange(n // 2, dtype=x.dtype, device=x.device) / (n / 2)
    angles = torch.einsum("...,f->...f", positions.to(x.dtype), 1.0 / 10000**omega)
    sin, cos = torch.cat([angles.sin()] * 2, -1), torch.cat([angles.cos()] * 2, -1)
    return x * cos + _swap(x) * sin


def _swap(x: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def tables(positions: Tensor, width: int, dtype: torch.dtype) -> Tables:
    """positions [..., N, 3] of frame, row, column -> tables for heads of `width`, angles in `dtype` as officially."""
    axis = 2 * (width // 3 // 2)
    omega = 1.0 / 10000 ** (torch.arange(axis // 2, device=positions.device) / (axis / 2))
    angles = (positions.to(dtype).unsqueeze(-1) * omega.to(dtype)).float()  # [..., N, 3, axis / 2]
    angles = torch.cat([angles, angles], -1).flatten(-2)
    pad = (0, width - 3 * axis)
    cos, sin = F.pad(angles.cos(), pad, value=1.0), F.pad(angles.sin(), pad)
    return Tables(cos.unsqueeze(-3).to(dtype), sin.unsqueeze(-3).to(dtype))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, is_unfused: bool):
        super().__init__()
        self.num_heads, self.is_unfused = num_heads, is_unfused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: Tables | Ids | None = None, mask: Tensor | None = None) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if positions is not None:
            q, k = positions.turn(q, k)
        if self.is_unfused:
            out = ((q @ k.transpose(-2, -1)) * (D // self.num_heads) ** -0.5).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, attention: nn.Module):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), attention
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, positions: Tables | Ids | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), positions, mask)
        return x + self.mlp(self.norm2(x))


def blocks(config, dim: int, num_heads: int, manner: Manner, attention: type[nn.Module] = Attention) -> nn.ModuleList:
    made = nn.ModuleList(Block(dim, num_heads, config.mlp_ratio, attention(dim, num_heads, manner.is_unfused))
                         for _ in range(config.depth))
    if manner.is_compiled:
        for block in made:
            block.compile(dynamic=True)
    return made


def run(blocks: nn.ModuleList, x: Tensor, manner: Manner, positions: Tables | Ids | None = None,
        mask: Tensor | None = None) -> Tensor:
    is_checkpointed = manner.is_checkpointed and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, positions, mask, use_reentrant=False) if is_checkpointed else block(x, positions, mask)
    return x


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, D], index [B, K] -> [B, K, D] through an index as wide as the rows."""
    return torch.gather(x, 1, index.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def pick_lists(x: Tensor, lists: list[Tensor]) -> Tensor:
    return torch.cat([pick(x, index) for index in lists], dim=0)
