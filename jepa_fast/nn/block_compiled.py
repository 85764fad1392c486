"""The same block left to torch.compile: plain PyTorch around our attention, its elementwise work fused by the compiler.

Which of the two is faster depends on the device and the width; FASTEST says what was measured (`jepa-fast bench blocks`),
and what was not measured is computed by our own ops. Compiled once, for any number of tokens.
"""

import functools
import json
import pathlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import varlen_attention_qkv
from .block_function import BlockWeights, How

Fusion = Literal["ops", "compile"]
# {"sm_90" or "cpu" ...: {width: "ops" or "compile"}}
FASTEST = json.loads(pathlib.Path(__file__).with_name("block_table.json").read_text())


def fastest(architecture: str, dim: int) -> Fusion:
    """What the table says for a width on a device; "ops" where it says nothing."""
    return FASTEST.get(architecture, {}).get(str(dim), "ops")


def compiled_block(x: Tensor, weights: BlockWeights, copies: BlockWeights, how: How) -> Tensor:
    """`block_function.block`, the backward pass and what is kept for it by the compiler too."""
    if how.activations != "all":
        raise ValueError(f"compiled blocks choose themselves what to keep: activations must be all, got {how.activations!r}")
    with torch.autocast(x.device.type, enabled=False):
        operands = [weight if weight is copy else _AsCopy.apply(weight, copy)
                    for weight, copy in zip(weights, copies, strict=True)]
        return _compiled()(x, operands, how)


@functools.cache
def _compiled(backend: str = "inductor"):
    return torch.compile(_plain_block, dynamic=True, backend=backend)


def _plain_block(x: Tensor, weights: list[Tensor], how: How) -> Tensor:
    w, D = BlockWeights(*weights), x.shape[1]
    h = _norm(x, w.norm1_weight, w.norm1_bias, how)
    qkv = F.linear(h, w.qkv_weight, w.qkv_bias).view(-1, 3, how.num_heads, D // how.num_heads)
    attended = varlen_attention_qkv(qkv, how.cu_seqlens, how.max_seqlen, rotary=how.rotary, frame_size=how.frame_size)
    x = _add(x, F.linear(attended.view(-1, D), w.proj_weight, w.proj_bias), how.scale1)
    h = _norm(x, w.norm2_weight, w.norm2_bias, how)
    u = F.linear(h, w.fc1_weight, w.fc1_bias.to(h.dtype))
    return _add(x, F.linear(F.gelu(u), w.fc2_weight, w.fc2_bias), how.scale2)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, how: How) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[1:], weight.to(wide), bias.to(wide), how.eps).to(how.dtype)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    branch = branch if scale is None else branch * scale.to(branch.dtype)
    return (x + branch).to(x.dtype)


class _AsCopy(torch.autograd.Function):
    """The copy of a weight where a product wants it; its gradient goes to the weight, in the weight's dtype."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None
