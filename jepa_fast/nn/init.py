"""Initialisation as the official ViTs do it."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from .block import Block


def init_vit_(module: nn.Module, std: float = 0.02) -> None:
    """Linear and convolution weights from a normal cut at +-2, biases 0, norms (1, 0), throughout `module`.

    I-JEPA's and V-JEPA's official code also divides the output projections of block l by sqrt(2 l) in constructors, and
    then undoes it by a second pass over all Linears: what trains is this. V-JEPA 2 keeps it: see `rescale_blocks_`.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def rescale_blocks_(blocks: Iterable[Block]) -> None:
    """Divide what block l (from 1) adds to the residual stream, its two output projections, by sqrt(2 l)."""
    for number, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))


def frozen_table(table: torch.Tensor) -> nn.Parameter:
    """A position table as the official checkpoints store it: float32 [1, N, D], a parameter that does not train."""
    return nn.Parameter(table.float().unsqueeze(0), requires_grad=False)
