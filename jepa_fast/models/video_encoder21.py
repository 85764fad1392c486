"""V-JEPA 2.1's vision transformer: a stem for clips and one for images, one trunk, outputs at several depths.

arXiv:2603.14482. Positions are rotary and interleaved, those along rows and columns stretched to the
side of a 256 x 256 frame. After some blocks, the levels, the residual stream goes through a norm of that level; the last
level's is the encoder's output.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..nn.block import Block, Sequences
from ..nn.init import init_vit_, rescale_blocks_
from ..nn.rotary import axis_widths, grid_positions, rotary_table
from ..tokenizers.video import TubeletEmbed
from .video_encoder import Grid, check_sizes


@dataclass(frozen=True, kw_only=True)
class HierarchicalVideoTransformerConfig:
    image_size: int = 256                    # pixels, square
    num_frames: int = 16                     # of a clip; nothing is bound to it, nor to image_size, but the masks' check
    patch_size: int = 16                     # pixels
    tubelet_size: int = 2                    # frames
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    levels: tuple[int, ...] = (2, 5, 8, 11)  # blocks, from 0, whose outputs count; the last one is the last block
    native_side: int | None = None           # tokens that rows and columns are stretched to; None: 256 / 16 or 252 / 14
    angle_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: round angles as officially under autocast

    def __post_init__(self):
        check_sizes(self)
        if list(self.levels) != sorted(set(self.levels)) or not self.levels or min(self.levels) < 0 \
                or self.levels[-1] != self.depth - 1:
            raise ValueError(f"levels must be numbers of blocks in rising order, the last one depth - 1 = "
                             f"{self.depth - 1}, got {self.levels}")
        if self.native_side is None and self.patch_size not in (14, 16):
            raise ValueError(f"native_side must be given for patches that are not 14 or 16 pixels, got patch_size "
                             f"{self.patch_size}")

    @property
    def grid(self) -> Grid:
        """Time steps, rows, columns of a clip's tokens."""
        return self.num_frames // self.tubelet_size, *self.image_grid[1:]

    @property
    def image_grid(self) -> Grid:
        side = self.image_size // self.patch_size
        return 1, side, side

    @property
    def side(self) -> int:
        """Tokens along a side that positions are stretched to."""
        return self.native_side or {16: 256 // 16, 14: 252 // 14}[self.patch_size]

    @property
    def num_features(self) -> int:
        return self.embed_dim

    def build(self) -> "HierarchicalVideoTransformer":
        return HierarchicalVideoTransformer(self)


class HierarchicalVideoTransformer(nn.Module):
    """Encoder of clips [B, C, T, H, W] and images [B, C, H, W], or [B, C, 1, H, W], with the official parameter names."""

    def __init__(self, config: HierarchicalVideoTransformerConfig):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, D))
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, D))
        self.patch_embed = TubeletEmbed(config.tubelet_size, config.patch_size, config.in_chans, D)
        self.patch_embed_img = TubeletEmbed(1, config.patch_size, config.in_chans, D)
        self.blocks = nn.ModuleList(Block(D, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norms_block = nn.ModuleList(nn.LayerNorm(D, eps=1e-6) for _ in config.levels)
        init_vit_(self)
        rescale_blocks_(self.blocks)
        for embed in (self.img_mod_embed, self.video_mod_embed):
            nn.init.normal_(embed, std=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Clips or images -> tokens [B, N, D] in the order time, row, column: the last level."""
        return self.layers(pixels, self.config.levels[-1:])[0]

    def frames(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, rows * columns, D], through the stem of images."""
        return self(images)

    def features(self, pixels: Tensor) -> Tensor:
        """The mean of the tokens [B, D]."""
        return self(pixels).mean(1)

    def patch_features(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        """Tokens [B, N, D] and their grid (time steps, rows, columns)."""
        return self(pixels), self.grid(pixels)

    def layers(self, pixels: Tensor, out_layers: tuple[int, ...]) -> list[Tensor]:
        """Clips or images -> the tokens [B, N, D] of each level in `out_layers`, after that level's norm."""
        x, rotary = self.embed(pixels)
        B, N = len(pixels), len(x) // max(len(pixels), 1)
        levels = self.encode(x, Sequences.uniform(B, N, x.device, rotary), out_layers)
        return [level.view(B, N, -1) for level in levels]

    def grid(self, pixels: Tensor) -> Grid:
        """Time steps, rows and columns of the tokens of clips or images."""
        return self._stem(pixels)[0].grid(as_clips(pixels))

    def is_image(self, pixels: Tensor) -> bool:
        """Whether pixels go through the stem of images: a clip of one frame does, as official."""
        return as_clips(pixels).shape[2] == 1

    def embed(self, pixels: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clips or images -> stem plus embedding of the modality [P, D], and rotary positions [P, 2, R].

        index [P]: only these rows of [B * N]; the others are never touched.
        """
        stem, modality = self._stem(pixels)
        clips, rotary = as_clips(pixels), self.rotary(self.grid(pixels))
        x = stem(clips, index)
        if index is None:
            x, rotary = x.flatten(0, 1), rotary.repeat(len(clips), 1, 1)
        else:
            rotary = rotary[index % len(rotary)]
        # in place: in x's dtype under autocast, rounded once, as official
        return x.add_(modality.view(-1)), rotary

    def encode(self, x: Tensor, sequences: Sequences, out_layers: tuple[int, ...] | None = None) -> list[Tensor]:
        """Embedded tokens [P, D] -> [P, D] for each of `out_layers`, which are levels; None: all levels."""
        levels = self.config.levels
        out_layers = levels if out_layers is None else tuple(out_layers)
        if not set(out_layers) <= set(levels) or not out_layers:
            raise ValueError(f"out_layers must be some of the levels {levels}, got {out_layers}")
        out = {}
        for number, block in enumerate(self.blocks[:max(out_layers) + 1]):
            x = block(x, sequences)
            if number in out_layers:
                out[number] = self.norms_block[levels.index(number)](x)
        return [out[number] for number in out_layers]

    def rotary(self, grid: Grid) -> Tensor:
        """[N, 2, R] for the tokens of a grid, on the device and in the precision of the model."""
        return stretched_rotary(grid, self.config, self.config.embed_dim // self.config.num_heads, self.video_mod_embed)

    def _stem(self, pixels: Tensor) -> tuple[TubeletEmbed, nn.Parameter]:
        if self.is_image(pixels):
            return self.patch_embed_img, self.img_mod_embed
        return self.patch_embed, self.video_mod_embed


def as_clips(pixels: Tensor) -> Tensor:
    """Images [B, C, H, W] as clips of one frame; clips [B, C, T, H, W] as they are."""
    if pixels.dim() not in (4, 5):
        raise ValueError(f"pixels must be clips [B, C, T, H, W] or images [B, C, H, W], got {list(pixels.shape)}")
    return pixels.unsqueeze(2) if pixels.dim() == 4 else pixels


def stretched_rotary(grid: Grid, config: HierarchicalVideoTransformerConfig, head_dim: int, like: Tensor) -> Tensor:
    """The table [N, 2, R] of a grid: rows and columns run from 0 to side - 1 whatever their number, time is as it is.

    On the device of `like`, in float64 where the model is.
    """
    if min(grid[1:]) < 2:
        raise ValueError(f"a grid must have two rows and columns or more to be stretched, got {grid}")
    is_double = like.dtype == torch.float64
    positions = grid_positions(grid, device=like.device).to(like.dtype if is_double else torch.float32)
    for axis in (1, 2):
        positions[:, axis] = positions[:, axis] * (config.side - 1) / (grid[axis] - 1)
    angle_dtype = torch.float64 if is_double else getattr(torch, config.angle_dtype)
    return rotary_table(positions, axis_widths(head_dim), "interleaved", angle_dtype=angle_dtype)
