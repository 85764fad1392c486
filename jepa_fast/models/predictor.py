"""I-JEPA's predictor: a narrow transformer over context tokens followed by mask tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.block import Block, Sequences
from ..nn.init import frozen_table, init_vit_
from ..nn.linear import linear
from ..nn.positions import sincos_2d
from ..ops import assemble_predictor_input


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    embed_dim: int = 384
    depth: int = 12
    num_heads: int | None = None  # None: as many as the encoder, which gives I-JEPA ViT-H its head width of 24
    mlp_ratio: float = 4.0


class Predictor(nn.Module):
    """Predicts the representation at every target token from the context, each target block on its own.

    Parameter names are the official I-JEPA ones.
    """

    def __init__(self, config: PredictorConfig, encoder_dim: int, encoder_heads: int, grid: tuple[int, int]):
        super().__init__()
        D = config.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.predictor_pos_embed = frozen_table(sincos_2d(D, grid))
        self.predictor_embed = nn.Linear(encoder_dim, D)
        heads = config.num_heads or encoder_heads
        self.predictor_blocks = nn.ModuleList(Block(D, heads, config.mlp_ratio) for _ in range(config.depth))
        self.predictor_norm = nn.LayerNorm(D, eps=1e-6)
        self.predictor_proj = nn.Linear(D, encoder_dim)
        init_vit_(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, predictor_idx: Tensor, predictor_position: Tensor, sequences: Sequences,
                prediction_idx: Tensor, prediction_sequences: Sequences) -> Tensor:
        """context [P_c, D_encoder] -> predictions [P_t, D_encoder].

        predictor_idx [P] says where each token of the packed sequences comes from: a row of `context`, or P_c for the
        mask token; predictor_position [P] is its place in the grid; prediction_idx [P_t] names the rows to return, and
        prediction_sequences says which of them belong to which of the sequences.
        """
        x = linear(context, self.predictor_embed.weight, self.predictor_embed.bias)
        # in the mask token's dtype: a float32 residual stream under autocast, as official
        x = assemble_predictor_input(x, self.mask_token.flatten(), predictor_idx, self.predictor_pos_embed[0],
                                     predictor_position)
        for block in self.predictor_blocks[:-1]:
            x = block(x, sequences)
        # what the last block does to context tokens would be thrown away
        x = self.predictor_blocks[-1].of_rows(x, sequences, prediction_idx, prediction_sequences)
        return linear(self.predictor_norm(x), self.predictor_proj.weight, self.predictor_proj.bias)
