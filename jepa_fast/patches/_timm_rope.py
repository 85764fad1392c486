"""timm's rotary embeddings as `ops.varlen_attention` takes them."""

import torch
from torch import Tensor, nn

from ..nn.last_made import LastMade


def is_constant(rope: Tensor | None, x: Tensor) -> bool:
    """Whether a rope is sines and cosines that are not learned, one per token for all heads: [N, 2 d] or [B, 1, N, 2 d]."""
    if rope is None:
        return True
    return not rope.requires_grad and (rope.dim() == 2 or rope.dim() == 4 and rope.shape[:2] == (x.shape[0], 1))


class RopeTable(LastMade):
    """The rotary table [B * N, 2, d] of timm's last rope: the layers of one forward pass ask for the same."""

    def of(self, rope: Tensor | None, attn: nn.Module, x: Tensor) -> Tensor | None:
        """rope [N, 2 d] or [B, 1, N, 2 d], sines then cosines, of the tokens after the prefix."""
        if rope is None:
            return None
        dtype, halves = torch.promote_types(torch.float32, x.dtype), getattr(attn, "rotate_half", False)
        return self.get((x.shape[0], attn.num_prefix_tokens, halves, dtype), rope, is_constant=True, make=lambda: make_table(
            rope.clone().to(dtype), x.shape[0], attn.num_prefix_tokens, halves))


def make_table(rope: Tensor, num_samples: int, num_prefix_tokens: int, halves: bool) -> Tensor:
    """[B * N, 2, d], what `ops.varlen_attention` turns q and k with; prefix tokens stay as they are."""
    sin, cos = rope.flatten(0, -2).chunk(2, -1)
    if halves:
        sin, cos = (t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1) for t in (sin, cos))
    sign = torch.arange(sin.shape[1], device=sin.device) % 2 * 2 - 1   # -1, 1, ...
    table = torch.stack([cos, sin * sign], 1)
    if rope.dim() == 2:
        table = table.repeat(num_samples, 1, 1)
    prefix = table.new_tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(num_samples, num_prefix_tokens, 2, sin.shape[1])
    return torch.cat([prefix, table.view(num_samples, -1, 2, sin.shape[1])], 1).flatten(0, 1)


def side_by_side(rows: Tensor, num_heads: int) -> Tensor:
    """rows [3 H d, ...] of q, k, v: the columns i and i + d / 2 of q and k, which rotate together, next to each other.

    Products of q and k do not change when the columns of both change places.
    """
    heads = rows.view(3, num_heads, 2, -1, *rows.shape[1:])
    return torch.cat([heads[:2].transpose(2, 3).flatten(2, 3), heads[2:].flatten(2, 3)]).view(rows.shape)
