"""The vision transformer, on packed tokens."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.block import Block, Sequences
from ..nn.init import frozen_table, init_vit_
from ..nn.positions import sincos_2d
from ..tokenizers.image import PatchEmbed


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    image_size: int = 224                            # pixels, square; the position table is made for it
    patch_size: int = 16                             # pixels
    in_chans: int = 3
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    positions: Literal["sincos", "learned"] = "sincos"  # sincos: fixed, as I-JEPA; learned: as timm
    class_token: bool = False                        # a learned first token, then taken as the image's feature
    drop_path: float = 0.0                           # stochastic depth of the last block, rising linearly from 0
    num_outputs: int = 0                             # Linear head on the pooled feature; 0: none

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    @property
    def num_features(self) -> int:
        """Width of `features`: of the head where there is one."""
        return self.num_outputs or self.embed_dim

    def build(self) -> "VisionTransformer":
        return VisionTransformer(self)


class VisionTransformer(nn.Module):
    """Encoder with the official I-JEPA parameter names: pos_embed, patch_embed.proj, blocks.N, norm."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        self.config = config
        D, (rows, columns) = config.embed_dim, config.grid
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, D)
        if config.positions == "sincos":
            self.pos_embed = frozen_table(sincos_2d(D, config.grid))
        else:
            length = rows * columns + config.class_token
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, length, D), std=0.02))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, D) * 1e-6)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(D, config.num_heads, config.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        if config.num_outputs:
            self.head = nn.Linear(D, config.num_outputs)
        init_vit_(self)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, N, D] (class token first where there is one), after the last norm."""
        x, sequences = self._tokens(images)
        return self._run(x, sequences).view(images.shape[0], -1, x.shape[-1])

    def context(self, images: Tensor, context_idx: Tensor, sequences: Sequences) -> Tensor:
        """Only the kept patches: rows `context_idx` [P] of [B * N] -> tokens [P, D]; the others are never touched."""
        if self.config.class_token:
            raise ValueError("context encoding is for encoders without a class token")
        positions = self._position_table(self.patch_embed.grid(images))
        x = self.patch_embed(images, context_idx)
        # the sum promotes to float32 under autocast: a float32 residual stream, as official
        x = x + positions[context_idx % positions.shape[0]]
        return self._run(x, sequences)

    def rows(self, images: Tensor, whole: Sequences, rows: Tensor, row_sequences: Sequences) -> Tensor:
        """Rows `rows` [R] of [B * N] of forward(images) -> [R, D], without the last block's work for the others.

        `whole` are all tokens, sample by sample, `row_sequences` says which rows belong to which sample.
        """
        if self.config.class_token:
            raise ValueError("rows are counted without a class token, and the encoder has one")
        x, _ = self._tokens(images)
        for block in self.blocks[:-1]:
            x = block(x, whole)
        return self.norm(self.blocks[-1].of_rows(x, whole, rows, row_sequences))

    def views(self, views: list[Tensor]) -> list[Tensor]:
        """Views [B_v, C, H_v, W_v] of any sizes as one packed batch -> pooled features [B_v, num_features] each."""
        packed = [self._tokens(view) for view in views]
        # summed on the device: a copy from the host would wait
        lengths = torch.cat([seq.cu_seqlens.diff() for _, seq in packed])
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        x = self._run(torch.cat([x for x, _ in packed]), Sequences(ends, max(seq.max_seqlen for _, seq in packed)))
        parts = x.split([x.shape[0] for x, _ in packed])
        return [self.pool(part.view(view.shape[0], -1, part.shape[-1])) for part, view in zip(parts, views, strict=True)]

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features]: the class token, or the mean of the tokens, then the head."""
        return self.pool(self(images))

    def patch_features(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, N, D] without the class token, and their grid (rows, columns)."""
        return self(images)[:, int(self.config.class_token):], self.patch_embed.grid(images)

    def pool(self, tokens: Tensor) -> Tensor:
        pooled = tokens[:, 0] if self.config.class_token else tokens.mean(1)
        return self.head(pooled) if self.config.num_outputs else pooled

    def _run(self, x: Tensor, sequences: Sequences) -> Tensor:
        for block in self.blocks:
            x = block(x, sequences)
        return self.norm(x)

    def _tokens(self, images: Tensor) -> tuple[Tensor, Sequences]:
        x = self.patch_embed(images) + self._position_table(self.patch_embed.grid(images))
        if self.config.class_token:
            first = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([first, x], dim=1)
        return x.flatten(0, 1), Sequences.uniform(x.shape[0], x.shape[1], x.device)

    def _position_table(self, grid: tuple[int, int]) -> Tensor:
        """[N, D]: the table of the native grid, or its bicubic interpolation to another (multi-crop)."""
        table = self.pos_embed[0, int(self.config.class_token):]
        if grid == self.config.grid:
            return table
        square = table.view(1, *self.config.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return resized.flatten(2)[0].T
