"""V-JEPA 2's rotary attention layers, with their constructors, parameter names and signatures.

The same numbers by another way: one rotary table for all layers, heads, queries and keys of a forward pass instead of six
rotations per layer, attention on packed q, k, v, and the dense mask of V-JEPA 2-AC recognised as frame-causal attention.
q and k keep their dtype, so that half precisions run. `attend` and the tables work on any layer with these attributes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..nn.last_made import LastMade
from ..nn.rotary import axis_widths, rotary_table
from ..ops import varlen_attention_qkv


class RoPEAttention(nn.Module):
    """`src.models.utils.modules.RoPEAttention` of V-JEPA 2; positions in time, height and width turn q and k.

    strict_numerics: angles in the dtype of q, and attention dropout (of probability proj_drop) in eval too, as there;
    otherwise angles are float32 or wider and only training drops.
    """

    strict_numerics = False

    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_sdpa=True,
                 grid_size=14, is_causal=False):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop_prob = proj_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.use_sdpa = use_sdpa
        self.d_dim, self.h_dim, self.w_dim = axis_widths(self.head_dim)
        self.grid_size = grid_size
        self.is_causal = is_causal

    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        """x [B, N, D] -> [B, N, D]. mask [B, N] int64: the tokens' numbers on the grid, all of it where None."""
        table = rope_table(self, x, mask, H_patches, W_patches, self.strict_numerics)
        return attend(self, x, table, attn_mask, strict=self.strict_numerics)


class ACRoPEAttention(RoPEAttention):
    """`src.models.utils.modules.ACRoPEAttention` of V-JEPA 2-AC: every frame starts with tokens of actions and states."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_sdpa=True,
                 is_causal=False, grid_size=16):
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, use_sdpa, grid_size, is_causal)

    def forward(self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        """x [B, T (action_tokens + H W), D] -> the same; attn_mask: dense, recognised where it is frame-causal."""
        if mask is not None and action_tokens:
            raise ValueError("mask must be None with action_tokens: they have no number on the grid")
        table = action_table(self, x, mask, T, H, W, action_tokens, self.strict_numerics)
        frame_size = frame_size_of(attn_mask, action_tokens + H * W)
        return attend(self, x, table, attn_mask, frame_size, self.strict_numerics)


def attend(layer: nn.Module, x: Tensor, rotary: Tensor | None, attn_mask: Tensor | None = None, frame_size: int = 0,
           strict: bool = False, packs: bool = True) -> Tensor:
    """Self-attention of a layer with V-JEPA 2's attributes: x [B, N, D] -> [B, N, D]; rotary [B * N, 2, R].

    frame_size > 0 says that attn_mask is frame-causal. Other masks, causal layers and dropout go through PyTorch's own, and
    everything where not `packs`.
    """
    B, N, _ = x.shape
    is_sdpa = attn_mask is not None or layer.use_sdpa
    scale = None if is_sdpa else layer.scale
    qkv = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1))
    dropout = attention_dropout(layer, is_sdpa, strict)
    is_causal = is_sdpa and layer.is_causal
    if packs and (attn_mask is None or frame_size) and not dropout and not is_causal and qkv.shape[-1] <= 256:
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=x.device) * N
        out = varlen_attention_qkv(qkv.flatten(0, 1), cu_seqlens, N, scale, rotary=rotary, frame_size=frame_size)
        out = out.view(B, N, -1)
    else:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = (turned(t, rotary) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, scale=scale)
        out = out.transpose(1, 2).flatten(2)
    return layer.proj_drop(layer.proj(out))


def attention_dropout(layer: nn.Module, is_sdpa: bool, strict: bool) -> float:
    """The probability with which attention drops; PyTorch's own drops by proj_drop, officially in eval too."""
    if is_sdpa:
        return layer.proj_drop_prob if strict or layer.training else 0.0
    return layer.attn_drop.p if layer.attn_drop.training else 0.0


def turned(x: Tensor, rotary: Tensor) -> Tensor:
    """x [B, H, N, d] with its first R columns turned by rotary [B * N, 2, R], in the dtype of x."""
    B, _, N, d = x.shape
    R = rotary.shape[2]
    cos, sin = rotary.view(B, 1, N, 2, R).unbind(3)
    swapped = x[..., :R].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.cat([(x[..., :R] * cos + swapped * sin).to(x.dtype), x[..., R:]], -1)


def rope_table(layer: nn.Module, x: Tensor, ids: Tensor | None, H: int | None, W: int | None, strict: bool) -> Tensor:
    """The table [B * N, 2, R] of x [B, N, D]: tokens `ids` [B, N], or all, of a grid of H x W, or grid_size squared."""
    rows, columns = grid_of(layer, H, W)
    return tables.of(("rope", rows, columns), layer, x, ids, strict, "tiled",
                      lambda ids, dtype: grid_positions(ids, rows, columns, dtype))


def action_table(layer: nn.Module, x: Tensor, ids: Tensor | None, T: int, H: int, W: int, action_tokens: int,
                 strict: bool) -> Tensor:
    """`rope_table` where each frame is action_tokens, which have a time only, and H x W patches, scaled to grid_size."""
    def positions(ids: Tensor, dtype: torch.dtype) -> Tensor:
        patches = grid_positions(torch.arange(T * H * W, device=x.device) if action_tokens else ids, H, W, dtype)
        patches[..., 1] *= layer.grid_size / H
        patches[..., 2] *= layer.grid_size / W
        if not action_tokens:
            return patches
        patches = patches.view(T, H * W, 3)
        times = torch.zeros_like(patches[:, :1])
        times[..., 0] = patches[:, :1, 0]
        return torch.cat([times.expand(-1, action_tokens, -1), patches], 1).flatten(0, 1)

    return tables.of(("action", T, H, W, action_tokens, layer.grid_size), layer, x, ids, strict, "tiled", positions)


def grid_of(layer: nn.Module, H: int | None, W: int | None) -> tuple[int, int]:
    """Rows and columns of a frame: those given, or the layer's grid_size."""
    return (layer.grid_size, layer.grid_size) if H is None or W is None else (H, W)


def grid_positions(ids: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """ids [...] -> (time, row, column) [..., 3]; time has no end."""
    in_frame = ids % (rows * columns)
    return torch.stack([ids // (rows * columns), in_frame // columns, in_frame % columns], -1).to(dtype)


def angle_dtype(x: Tensor, strict: bool) -> torch.dtype:
    """float32, or the wider dtype of q and k; where strict, their dtype."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype if strict else torch.promote_types(dtype, torch.float32)


class RotaryTables(LastMade):
    """The last table that was made: the layers of a forward pass ask for the same one."""

    def of(self, what: tuple, layer: nn.Module, x: Tensor, ids: Tensor | None, strict: bool, pairing: str,
           positions: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
        """[B * N, 2, R] of x [B, N, D] with positions(ids, dtype) [B, N, 3] or, without ids, of 0, 1, ... N - 1."""
        B, N, _ = x.shape
        dtype = angle_dtype(x, strict)

        def make() -> Tensor:
            wide = torch.promote_types(dtype, torch.float32)
            at = positions(torch.arange(N, device=x.device) if ids is None else ids.expand(B, -1), wide)
            table = rotary_table(at.reshape(-1, 3), axis_widths(layer.head_dim), pairing, angle_dtype=dtype)
            return table.repeat(B, 1, 1) if at.dim() == 2 else table

        return self.get((what, B, N, layer.head_dim, x.device, dtype, pairing), ids, make)


class FrameMasks:
    """Which attention masks are frame-causal: each tensor is compared once, with its first use."""

    def __init__(self):
        self._known = WeakTensorKeyDictionary()

    def size(self, mask: Tensor, frame_size: int) -> int:
        """frame_size where mask [N, N] bool is frame-causal of frames of so many tokens, else 0."""
        found = self._known.get(mask)
        if found is None or found[0] != (_version(mask), frame_size):
            found = (_version(mask), frame_size), is_frame_causal(mask, frame_size)
            self._known[mask] = found
        return frame_size if found[1] else 0

    def same_as(self, mask: Tensor, whole: Tensor, frame_size: int) -> int:
        """`size` of a mask that is a copy of the first rows and columns of another: no comparison of its own."""
        size = self.size(whole, frame_size)
        self._known[mask] = (_version(mask), frame_size), bool(size)
        return size


def frame_size_of(mask: Tensor | None, frame_size: int) -> int:
    if mask is None or mask.dtype != torch.bool or mask.dim() != 2 or torch.compiler.is_compiling():
        return 0
    return frame_masks.size(mask, frame_size)


def is_frame_causal(mask: Tensor, frame_size: int) -> bool:
    """Whether mask [N, N] bool shows every token its own frame and those before, and nothing else."""
    frames = torch.arange(mask.shape[0], device=mask.device) // frame_size
    return mask.shape[0] == mask.shape[1] and torch.equal(mask, frames.unsqueeze(1) >= frames)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


tables = RotaryTables()
frame_masks = FrameMasks()
