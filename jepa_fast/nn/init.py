"""Initialisation as the official ViTs do it."""

import torch
from torch import nn


def init_vit_(module: nn.Module, std: float = 0.02) -> None:
    """Linear and convolution weights from a normal cut at +-2, biases 0, norms (1, 0), throughout `module`.

    I-JEPA's official code also divides the output projections of block l by sqrt(2 l) in its constructors, and then
    undoes it by a second pass over all Linears: what trains is this.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def frozen_table(table: torch.Tensor) -> nn.Parameter:
    """A position table as the official checkpoints store it: float32 [1, N, D], a parameter that does not train."""
    return nn.Parameter(table.float().unsqueeze(0), requires_grad=False)
