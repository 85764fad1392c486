"""The moving average that makes I-JEPA's targets."""

import copy

import torch
from torch import Tensor, nn

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
    def update(self, source: nn.Module, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * source, for every parameter, frozen tables included."""
        ema_update_(list(self.encoder.parameters()), list(source.parameters()), momentum)

    def averages(self, source: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, its average) pairs, for an optimizer that moves both in one pass."""
        return list(zip(source.parameters(), self.encoder.parameters(), strict=True))
