"""The moving average that makes I-JEPA's targets."""

import copy

import torch
from torch import Tensor, nn

from ..masking import PackedMasks
from ..nn import fp8
from ..nn.block import Sequences
from ..ops import ema_update_


class TargetEncoder(nn.Module):
    """Moving average of an encoder; gradients never reach it.  I-JEPA, arXiv:2301.08243, section 3."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    @torch.no_grad()
    def rows(self, pixels: Tensor, masks: PackedMasks) -> Tensor:
        """Tokens masks.target_rows [R] of forward(pixels) -> [R, D], all that a loss compares with: exact.

        The last block has queries, projection and MLP for these rows only.
        """
        return self.encoder.rows(pixels, Sequences(masks.full_cu_seqlens, masks.num_tokens), masks.target_rows,
                                 Sequences(masks.target_rows_cu_seqlens, masks.target_rows_max_seqlen))

    def quantize_(self) -> None:
        """Compute the products of all blocks but the last in float8 from now on; see nn/fp8.py for what it needs."""
        fp8.quantize_(self.encoder)

    def refresh_(self) -> None:
        """Quantise the weights anew: after every step of the average, where `quantize_` was called."""
        fp8.refresh_(self.encoder)

    @torch.no_grad()
    def update(self, source: nn.Module, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * source, for every parameter, frozen tables included."""
        ema_update_(list(self.encoder.parameters()), list(source.parameters()), momentum)

    def averages(self, source: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, its average) pairs, for an optimizer that moves both in one pass."""
        return list(zip(source.parameters(), self.encoder.parameters(), strict=True))
