"""Floating-point operations of networks, counted from token numbers: formulas on host integers, nothing runs.

Only products count (matrix products, convolutions, attention), a multiply-add as two. Each network is counted twice:

    model     what the published algorithm asks for: every block on every token, attention between every two tokens of a
              sequence, backward as two forward passes. The same for every implementation: the numerator of MFU.
    hardware  what this engine executes: a last block only on the rows whose output is used; attention recomputing its
              scores in the backward pass (2.5 forward passes, as fused kernels do); no gradient of pixels; activation
              checkpointing's second forward pass. The numerator of HFU, which exact savings can put below MFU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Work:
    """What a step asks for: tokens that pass through transformers, operations, and tokens that only pad."""

    tokens: int = 0
    model_flops: float = 0.0
    hardware_flops: float = 0.0
    padding_tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.model_flops + other.model_flops,
                    self.hardware_flops + other.hardware_flops, self.padding_tokens + other.padding_tokens)


class Transformer(Protocol):
    """What every configuration of a transformer has."""

    embed_dim: int
    depth: int
    mlp_ratio: float


def linear(rows: int, in_features: int, out_features: int, *, trains: bool = True, input_grad: bool = True) -> Work:
    """A Linear layer. `trains`: its weights get gradients; without, its input does not either."""
    forward = 2.0 * rows * in_features * out_features
    return Work(0, forward * (3 if trains else 1), forward * (1 + trains + (trains and input_grad)))


def embed(rows: int, patch_values: int, embed_dim: int, *, trains: bool = True) -> Work:
    """A patch embedding; pixels get no gradient, in the algorithm neither."""
    forward = 2.0 * rows * patch_values * embed_dim
    return Work(0, forward * (1 + trains), forward * (1 + trains))


def transformer(config: Transformer, tokens: int, pairs: int, *, trains: bool = True, recompute: bool = False,
                last: tuple[int, int] | None = None) -> Work:
    """The blocks. `pairs` sums the squared lengths of the sequences; `last` is (rows, pairs) of a pruned last block.

    Per token and block 2 (4 D^2 + 2 D hidden) for the linear layers, and 4 D for each token that it attends to.
    recompute: activation checkpointing, in all blocks but a pruned one.
    """
    D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    products, attention = 2.0 * tokens * (4 * D * D + 2 * D * hidden), 4.0 * D * pairs
    rows, row_pairs = last or (tokens, pairs)
    # keys and values of all tokens; queries, projection and MLP of the rows
    last_products = 2.0 * (tokens * 2 * D * D + rows * (2 * D * D + 2 * D * hidden))
    whole = config.depth - 1
    all_products, all_attention = whole * products + last_products, whole * attention + 4.0 * D * row_pairs
    forward = config.depth * (products + attention)
    if not trains:
        return Work(tokens, forward, all_products + all_attention)
    again = (config.depth if last is None else whole) * (products + attention) if recompute else 0.0
    return Work(tokens, 3 * forward, 3 * all_products + 3.5 * all_attention + again)


def perceptron(rows: int, *widths: int, input_grad: bool = True) -> Work:
    """Linear layers in a row, from the width of the input to that of the output."""
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    return sum((linear(rows, a, b, input_grad=input_grad or i > 0) for i, (a, b) in enumerate(pairs)), Work())


def convolutional(config, images: int, chans: int, height: int, width: int) -> Work:
    """A training step of an encoder without tokens, counted by PyTorch on tensors without memory."""
    flops = images * _convolutional(config, chans, height, width)
    return Work(0, flops, flops)


@functools.lru_cache(maxsize=64)
def _convolutional(config, chans: int, height: int, width: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = config.build()
        # two images: batch norm refuses one row
        images = torch.empty(2, chans, height, width)
    with FlopCounterMode(display=False) as counter:
        module.features(images).sum().backward()
    return counter.get_total_flops() / 2
