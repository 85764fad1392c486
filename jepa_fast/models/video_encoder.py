"""The vision transformer of clips, on packed tubelet tokens: V-JEPA's with tables, V-JEPA 2's with rotary positions."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.block import Block, Sequences
from ..nn.init import frozen_table, init_vit_, rescale_blocks_
from ..nn.positions import sincos_2d, sincos_3d
from ..nn.rotary import axis_widths, grid_positions, rotary_table
from ..tokenizers.video import TubeletEmbed

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class VideoTransformerConfig:
    image_size: int = 224                                # pixels, square
    num_frames: int = 16                                 # of a clip; like image_size, what a position table is made for
    patch_size: int = 16                                 # pixels
    tubelet_size: int = 2                                # frames
    in_chans: int = 3
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    positions: Literal["sincos", "rotary"] = "sincos"    # sincos: a fixed table, as V-JEPA; rotary: as V-JEPA 2 (tiled)
    angle_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: round angles as V-JEPA 2 does under autocast
    rescale_init: bool = False                           # V-JEPA 2: block l starts with outputs divided by sqrt(2 l)

    def __post_init__(self):
        check_sizes(self)

    @property
    def grid(self) -> Grid:
        """Time steps, rows, columns of tokens."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def num_features(self) -> int:
        return self.embed_dim

    def build(self) -> "VideoTransformer":
        return VideoTransformer(self)


class VideoTransformer(nn.Module):
    """Encoder with the official V-JEPA parameter names: pos_embed (tables only), patch_embed.proj, blocks.N, norm."""

    def __init__(self, config: VideoTransformerConfig):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.patch_embed = TubeletEmbed(config.tubelet_size, config.patch_size, config.in_chans, D)
        if config.positions == "sincos":
            self.pos_embed = frozen_table(position_table(D, config))
        self.blocks = nn.ModuleList(Block(D, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        init_vit_(self)
        if config.rescale_init:
            rescale_blocks_(self.blocks)

    def forward(self, clips: Tensor) -> Tensor:
        """clips [B, C, T, H, W] -> tokens [B, N, D] in the order time, row, column, after the last norm."""
        return self._all(self.patch_embed(clips), self.patch_embed.grid(clips))

    def frames(self, images: Tensor) -> Tensor:
        """images [B, C, H, W], each as a clip that repeats it for one tubelet -> tokens [B, rows * columns, D]."""
        x = self.patch_embed.frames(images)
        side = self.config.patch_size
        return self._all(x, (1, images.shape[-2] // side, images.shape[-1] // side))

    def context(self, clips: Tensor, context_idx: Tensor, sequences: Sequences) -> Tensor:
        """Only the kept tubelets: rows `context_idx` [P] of [B * N] -> tokens [P, D]; the others are never touched."""
        grid = self.patch_embed.grid(clips)
        x = self.patch_embed(clips, context_idx)
        if self.config.positions == "sincos":
            table = self._table(grid)
            return self._run(x + table[context_idx % len(table)].to(x.dtype), sequences)
        rotary = self._rotary(grid)
        return self._run(x, replace(sequences, rotary=rotary[context_idx % len(rotary)]))

    def rows(self, clips: Tensor, whole: Sequences, rows: Tensor, row_sequences: Sequences) -> Tensor:
        """Rows `rows` [R] of [B * N] of forward(clips) -> [R, D], without the last block's work for the others.

        `whole` are all tokens, clip by clip, `row_sequences` says which rows belong to which clip.
        """
        x, rotary = self._tokens(self.patch_embed(clips), self.patch_embed.grid(clips))
        whole = replace(whole, rotary=rotary)
        for block in self.blocks[:-1]:
            x = block(x, whole)
        return self.norm(self.blocks[-1].of_rows(x, whole, rows, row_sequences))

    def features(self, clips: Tensor) -> Tensor:
        """The mean of the tokens [B, D]."""
        return self(clips).mean(1)

    def patch_features(self, clips: Tensor) -> tuple[Tensor, Grid]:
        """Tokens [B, N, D] and their grid (time steps, rows, columns)."""
        return self(clips), self.patch_embed.grid(clips)

    def _all(self, x: Tensor, grid: Grid) -> Tensor:
        B, N, D = x.shape
        x, rotary = self._tokens(x, grid)
        return self._run(x, Sequences.uniform(B, N, x.device, rotary)).view(B, N, D)

    def _tokens(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] -> packed [B * N, D] with position tables added, or the rotary table [B * N, 2, R]."""
        if self.config.positions == "sincos":
            # added in x's dtype: a bfloat16 residual stream under autocast, as official
            return (x + self._table(grid).to(x.dtype)).flatten(0, 1), None
        return x.flatten(0, 1), self._rotary(grid).repeat(x.shape[0], 1, 1)

    def _run(self, x: Tensor, sequences: Sequences) -> Tensor:
        for block in self.blocks:
            x = block(x, sequences)
        return self.norm(x)

    def _table(self, grid: Grid) -> Tensor:
        """[N, D]: the table of the native grid, or its trilinear interpolation to another."""
        if grid == self.config.grid:
            return self.pos_embed[0]
        volume = self.pos_embed.view(1, *self.config.grid, -1).permute(0, 4, 1, 2, 3)
        return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).flatten(2)[0].T

    def _rotary(self, grid: Grid) -> Tensor:
        """[N, 2, R] of every token of the true grid; nothing is bound to the configured one."""
        return video_rotary(grid, self.config.embed_dim // self.config.num_heads, self.config.angle_dtype,
                            self.patch_embed.proj.weight)


def check_sizes(config) -> None:
    """ValueError where patches, tubelets or heads of a configuration do not come out even."""
    for name, unit_name in (("image_size", "patch_size"), ("num_frames", "tubelet_size"), ("embed_dim", "num_heads")):
        value, unit = getattr(config, name), getattr(config, unit_name)
        if value < 1 or unit < 1 or value % unit:
            raise ValueError(f"{name} must be a multiple of {unit_name}, got {value} and {unit}")


def position_table(dim: int, config: VideoTransformerConfig) -> Tensor:
    """[N, dim] float64: three axes, or two where a clip is one frame, as official."""
    return sincos_2d(dim, config.grid[1:], first="row") if config.num_frames == 1 else sincos_3d(dim, config.grid)


def video_rotary(grid: Grid, head_dim: int, angle_dtype: str, like: Tensor) -> Tensor:
    """V-JEPA 2's table [N, 2, R] for a grid, on the device of `like`, in float64 where the model is."""
    dtype = torch.float64 if like.dtype == torch.float64 else getattr(torch, angle_dtype)
    return rotary_table(grid_positions(grid, device=like.device), axis_widths(head_dim), "tiled", angle_dtype=dtype)
