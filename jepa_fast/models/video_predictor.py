"""V-JEPA's predictor: a narrow transformer over each context followed by one mask token for every target."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..masking import PackedMasks
from ..nn.block import Block, Sequences
from ..nn.init import frozen_table, init_vit_, rescale_blocks_
from ..nn.linear import linear
from ..ops import assemble_predictor_input, gather_tokens
from .video_encoder import Grid, VideoTransformerConfig, position_table, video_rotary


@dataclass(frozen=True, kw_only=True)
class VideoPredictorConfig:
    embed_dim: int = 384
    depth: int = 12
    num_heads: int | None = None          # None: as many as the encoder (V-JEPA: heads of 24); V-JEPA 2: 12
    mlp_ratio: float = 4.0
    num_mask_tokens: int = 2              # V-JEPA: one per kind of mask; V-JEPA 2 holds more and trains the first
    zero_init_mask_tokens: bool = True


class VideoPredictor(nn.Module):
    """Predicts the representation at every target token from the context of the same kind of mask.

    Positions are of the encoder's kind: fixed tables added to context and mask tokens, or rotary. V-JEPA 2 sorts tokens
    by position first, which with explicit positions changes nothing. Parameter names are the official ones.
    """

    def __init__(self, config: VideoPredictorConfig, encoder: VideoTransformerConfig):
        super().__init__()
        D = config.embed_dim
        self.config, self.encoder_config = config, encoder
        self.num_heads = config.num_heads or encoder.num_heads
        self.predictor_embed = nn.Linear(encoder.embed_dim, D)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, D) for _ in range(config.num_mask_tokens))
        if encoder.positions == "sincos":
            self.predictor_pos_embed = frozen_table(position_table(D, encoder))
        self.predictor_blocks = nn.ModuleList(Block(D, self.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.predictor_norm = nn.LayerNorm(D, eps=1e-6)
        self.predictor_proj = nn.Linear(D, encoder.embed_dim)
        init_vit_(self)
        if encoder.rescale_init:
            rescale_blocks_(self.predictor_blocks)
        if not config.zero_init_mask_tokens:
            for token in self.mask_tokens:
                nn.init.trunc_normal_(token, std=0.02)

    def forward(self, context: Tensor, masks: PackedMasks, grid: Grid, mask_tokens: slice = slice(None)) -> Tensor:
        """context [P_c, D_encoder] -> predictions [Q, D_encoder], ordered kind of mask, sample, token.

        `mask_tokens` says which of them the numbers P_c, P_c + 1, ... of masks.predictor_idx stand for.
        """
        x = linear(context, self.predictor_embed.weight, self.predictor_embed.bias)
        tokens = torch.cat([token.flatten(0, 1) for token in self.mask_tokens[mask_tokens]])
        rotary = None
        if self.encoder_config.positions == "sincos":
            # the op knows one mask token, the last row; the others are rows before it
            x = torch.cat([x.to(tokens.dtype), tokens[:-1]]) if len(tokens) > 1 else x
            x = assemble_predictor_input(x, tokens[-1], masks.predictor_idx, self._table(grid), masks.predictor_position)
        else:
            x = gather_tokens(torch.cat([x.to(tokens.dtype), tokens]), masks.predictor_idx)
            table = video_rotary(grid, self.config.embed_dim // self.num_heads, self.encoder_config.angle_dtype,
                                 self.predictor_embed.weight)
            rotary = table[masks.predictor_position]
        sequences = Sequences(masks.predictor_cu_seqlens, masks.predictor_max_seqlen, rotary)
        for block in self.predictor_blocks[:-1]:
            x = block(x, sequences)
        # what the last block does to context tokens would be thrown away
        x = self.predictor_blocks[-1].of_rows(x, sequences, masks.prediction_idx,
                                              Sequences(masks.prediction_cu_seqlens, masks.prediction_max_seqlen))
        return linear(self.predictor_norm(x), self.predictor_proj.weight, self.predictor_proj.bias)

    def _table(self, grid: Grid) -> Tensor:
        if grid != self.encoder_config.grid:
            raise ValueError(f"clips must have the grid of the position table, {self.encoder_config.grid}, got {grid}")
        return self.predictor_pos_embed[0]
