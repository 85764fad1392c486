"""V-JEPA 2.1's predictor: from all levels of the context to all levels at every token, targets and context alike."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masking import PackedMasks
from ..nn.block import Block, Sequences
from ..nn.init import init_vit_, rescale_blocks_
from ..ops import gather_tokens
from .video_encoder import Grid
from .video_encoder21 import HierarchicalVideoTransformerConfig, stretched_rotary


@dataclass(frozen=True, kw_only=True)
class HierarchicalVideoPredictorConfig:
    embed_dim: int = 384
    depth: int = 24
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_mask_tokens: int = 6       # only the first one is used; official files hold them all
    num_levels: int | None = None  # of the encoder's levels, the last ones; None: all. The distilled models have 1
    target_dim: int | None = None  # width of a target's level; None: the encoder's. The distilled models have 1664

    def __post_init__(self):
        if self.num_mask_tokens < 1:
            raise ValueError(f"num_mask_tokens must be at least 1, got {self.num_mask_tokens}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and {self.num_heads}")


class HierarchicalVideoPredictor(nn.Module):
    """A narrow transformer over each context followed by one mask token for every target, clips and images together.

    The official code sorts the tokens by position first, which with explicit positions changes nothing, and takes the
    grid that it was built with for the true one. Parameter names are the official ones.
    """

    def __init__(self, config: HierarchicalVideoPredictorConfig, encoder: HierarchicalVideoTransformerConfig):
        super().__init__()
        self.config, self.encoder_config = config, encoder
        self.num_levels = len(encoder.levels) if config.num_levels is None else config.num_levels
        if not 1 <= self.num_levels <= len(encoder.levels):
            raise ValueError(f"predictor.num_levels must be in [1, {len(encoder.levels)}], got {config.num_levels}")
        D, d = encoder.embed_dim, config.embed_dim
        out_dim = self.num_levels * (config.target_dim or D)
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, d))
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, d))
        if self.num_levels == 1:
            self.predictor_embed = nn.Linear(D, d)
        else:
            self.predictor_embed = nn.Sequential(nn.Linear(self.num_levels * D, D), nn.GELU(), nn.Linear(D, d))
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, d) for _ in range(config.num_mask_tokens))
        # without gradient the others neither decay nor move, as official
        self.mask_tokens[1:].requires_grad_(False)
        self.predictor_blocks = nn.ModuleList(Block(d, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.predictor_norm = nn.LayerNorm(d, eps=1e-6)
        self.predictor_proj = nn.Linear(d, out_dim)
        self.predictor_proj_context = nn.Linear(d, out_dim)
        init_vit_(self)
        rescale_blocks_(self.predictor_blocks)
        for embed in (self.video_mod_embed, self.img_mod_embed):
            nn.init.normal_(embed, std=1e-6)

    def forward(self, levels: list[Tensor], masks: PackedMasks, grids: list[Grid], is_image: list[bool],
                context_lengths: list[int], with_context: bool) -> tuple[Tensor, Tensor | None]:
        """levels [P_c, D_encoder] each -> what the heads read at the targets [Q, d], and at the context [C, d] or None.

        `masks` are those of one or more groups of clips or images, joined: see `PackedMasks.join`. Of each group: its
        grid, whether it is of images, and how many of the P_c context rows are its own.
        """
        x = self._tokens(self.predictor_embed(in_autocast_dtype(levels)), is_image, context_lengths)
        x = gather_tokens(x, masks.predictor_idx)
        head_dim = self.config.embed_dim // self.config.num_heads
        table = torch.cat([stretched_rotary(grid, self.encoder_config, head_dim, self.video_mod_embed) for grid in grids])
        sequences = Sequences(masks.predictor_cu_seqlens, masks.predictor_max_seqlen, table[masks.predictor_position])
        for block in self.predictor_blocks[:-1]:
            x = block(x, sequences)
        if not with_context:
            # what the last block does to context tokens would be thrown away
            x = self.predictor_blocks[-1].of_rows(x, sequences, masks.prediction_idx,
                                                  Sequences(masks.prediction_cu_seqlens, masks.prediction_max_seqlen))
            return self.predictor_norm(x), None
        x = self.predictor_norm(self.predictor_blocks[-1](x, sequences))
        return gather_tokens(x, masks.prediction_idx), gather_tokens(x, masks.context_prediction_idx)

    def project(self, x: Tensor, head: nn.Linear) -> list[Tensor]:
        """Rows [Q, d] -> the prediction [Q, D_target] of each level, never side by side in memory."""
        parts = zip(head.weight.chunk(self.num_levels), head.bias.chunk(self.num_levels), strict=True)
        return [F.linear(x, weight, bias) for weight, bias in parts]

    def _tokens(self, context: Tensor, is_image: list[bool], context_lengths: list[int]) -> Tensor:
        """[P_c + groups, d]: context rows, then each group's mask token; all with the embedding of their modality."""
        embeds = [(self.img_mod_embed if image else self.video_mod_embed).flatten(0, 1) for image in is_image]
        contexts = [part + embed for part, embed in zip(context.split(context_lengths), embeds, strict=True)]
        return torch.cat([*contexts, *(self.mask_tokens[0].flatten(0, 1) + embed for embed in embeds)])


def in_autocast_dtype(levels: list[Tensor]) -> Tensor:
    """Levels [P, D] side by side [P, levels * D], narrowed before they are joined to what the next Linear reads."""
    device_type = levels[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        levels = [level.to(dtype) for level in levels]
    return torch.cat(levels, 1) if len(levels) > 1 else levels[0]
