"""The arithmetic of a transformer block, forward and backward, as one node of the autograd graph.

    h1 = norm1(x)    qkv = h1 Wqkv + b    a = attention(qkv)    x1 = x + s1 (a Wproj + b)
    h2 = norm2(x1)   u = h2 Wfc1          g = gelu(u + b)       out = x1 + s2 (g Wfc2 + b)

with s1, s2 the row scales of stochastic depth, or 1. Written out for three reasons: what is kept for the backward pass is
chosen here, operands go to each product in the dtype it computes in without a cast of weights or statistics in between,
and weight gradients leave their products in the parameter's dtype.

activations, the bytes kept per token and layer of width D in bfloat16 with a float32 stream and an MLP of 4 D:

    "all"         36 D    x, h1, qkv, a, x1, h2, u, g
    "lean"        24 D    x, qkv, a, x1, u: both normalised rows and gelu are computed again, elementwise passes only
    "checkpoint"   4 D    x: the whole forward pass is computed again

All three give the same bits. Computing again what is cheap, instead of keeping it: arXiv:2205.05198.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .linear import linear, mm

Activations = Literal["lean", "all", "checkpoint"]


class BlockWeights(NamedTuple):
    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class How(NamedTuple):
    """What is not a number of the model: sequences as `varlen_attention_qkv` takes them, heads, precision, what to keep."""

    cu_seqlens: Tensor
    max_seqlen: int
    rotary: Tensor | None
    frame_size: int
    num_heads: int
    eps: float
    dtype: torch.dtype                # in which products are computed
    activations: Activations
    scale1: Tensor | None = None      # [P, 1]
    scale2: Tensor | None = None


class _Kept(NamedTuple):
    """Everything that the backward pass wants."""

    x: Tensor
    h1: Tensor
    mean1: Tensor
    rstd1: Tensor
    qkv: Tensor
    attended: Tensor
    lse: Tensor
    x1: Tensor
    h2: Tensor
    mean2: Tensor
    rstd2: Tensor
    u: Tensor
    g: Tensor


def block(x: Tensor, weights: BlockWeights, copies: BlockWeights, how: How) -> Tensor:
    """x [P, D], the residual stream -> [P, D].

    weights: the parameters, which receive the gradients; copies: the same in the dtype of the products (norms and
    fc1_bias as they are). The stream keeps its dtype unless the products' is wider.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return _Block.apply(x, how, copies, *weights)
    return _forward(x, copies, how)[0]


def _forward(x: Tensor, w: BlockWeights, how: How) -> tuple[Tensor, _Kept]:
    ops = torch.ops.jepa_fast
    D = x.shape[1]
    h1, mean1, rstd1 = ops.layer_norm(x, w.norm1_weight, w.norm1_bias, how.eps, how.dtype)
    qkv = linear(h1, w.qkv_weight, w.qkv_bias).view(-1, 3, how.num_heads, D // how.num_heads)
    attended, lse = ops.varlen_attention_qkv(qkv, how.cu_seqlens, how.max_seqlen, qkv.shape[-1] ** -0.5, how.rotary,
                                             how.frame_size)
    branch = linear(attended.view(-1, D), w.proj_weight, w.proj_bias)
    if how.scale1 is not None:
        branch = branch * how.scale1.to(branch.dtype)
    h2, x1, mean2, rstd2 = ops.add_layer_norm(branch, x, w.norm2_weight, w.norm2_bias, how.eps, how.dtype)
    u = linear(h2, w.fc1_weight)
    g = ops.bias_gelu(u, w.fc1_bias)
    branch = linear(g, w.fc2_weight, w.fc2_bias)
    if how.scale2 is not None:
        branch = branch * how.scale2.to(branch.dtype)
    out = branch.add_(x1) if branch.dtype == x1.dtype else x1 + branch
    return out, _Kept(x, h1, mean1, rstd1, qkv, attended, lse, x1, h2, mean2, rstd2, u, g)


def _backward(grad: Tensor, kept: _Kept, w: BlockWeights, how: How, trains: bool) -> tuple[Tensor, BlockWeights]:
    """The gradients of x and of the weights, these in float32 or wider; a block that does not train gets None for some."""
    ops = torch.ops.jepa_fast
    weight_gradient = _weight_gradient if trains else lambda grad, x, has_bias=True: (None, None)
    P, D = kept.x.shape
    # the gradient of a branch is rounded to its dtype, as autograd does where the stream is wider
    branch_dtype = how.dtype if how.dtype != grad.dtype else None
    branch = grad.to(how.dtype)
    if how.scale2 is not None:
        branch = branch * how.scale2.to(branch.dtype)
    fc2_weight, fc2_bias = weight_gradient(branch, kept.g)
    u, fc1_bias = ops.bias_gelu_backward(mm(branch, w.fc2_weight), kept.u, w.fc1_bias)
    fc1_weight, _ = weight_gradient(u, kept.h2, has_bias=False)
    stream, branch, norm2 = ops.layer_norm_backward(mm(u, w.fc1_weight), grad, kept.x1, w.norm2_weight, kept.mean2,
                                                    kept.rstd2, branch_dtype)
    branch = stream if branch_dtype is None else branch
    if how.scale1 is not None:
        branch = branch * how.scale1.to(branch.dtype)
    proj_weight, proj_bias = weight_gradient(branch, kept.attended.view(P, D))
    attended = mm(branch, w.proj_weight).view(kept.attended.shape)
    qkv = ops.varlen_attention_qkv_backward(attended, kept.qkv, kept.attended, kept.lse, how.cu_seqlens, how.max_seqlen,
                                            kept.qkv.shape[-1] ** -0.5, how.rotary, how.frame_size).view(P, 3 * D)
    qkv_weight, qkv_bias = weight_gradient(qkv, kept.h1)
    x, _, norm1 = ops.layer_norm_backward(mm(qkv, w.qkv_weight), stream, kept.x, w.norm1_weight, kept.mean1, kept.rstd1,
                                          None)
    return x, BlockWeights(*norm1, qkv_weight, qkv_bias, proj_weight, proj_bias, *norm2, fc1_weight, fc1_bias,
                           fc2_weight, fc2_bias)


def _weight_gradient(grad: Tensor, x: Tensor, has_bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """grad [P, N], x [P, K] -> [N, K] and the sum over rows [N], summed in float32 or wider."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    bias = grad.sum(0, dtype=wide) if has_bias else None
    if grad.is_cuda and grad.dtype != wide:
        return torch.mm(grad.t(), x, out_dtype=wide), bias
    return mm(grad.t(), x), bias


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, how, copies, *weights):
        out, kept = _forward(x, copies, how)
        ctx.how, ctx.dtypes = how, [weight.dtype for weight in weights]
        if how.activations == "checkpoint":
            kept = (x,)
        elif how.activations == "lean":
            kept = kept._replace(h1=None, h2=None, g=None)
        ctx.save_for_backward(*copies, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("a block has no second derivative: call backward() or grad() without create_graph")
        how, num_weights = ctx.how, len(BlockWeights._fields)
        saved = ctx.saved_tensors   # once: non-reentrant checkpointing refuses a second time
        copies, kept = BlockWeights(*saved[:num_weights]), saved[num_weights:]
        kept = _forward(*kept, copies, how)[1] if how.activations == "checkpoint" else _Kept(*kept)
        if how.activations == "lean":
            norm = torch.ops.jepa_fast.layer_norm
            kept = kept._replace(
                h1=norm(kept.x, copies.norm1_weight, copies.norm1_bias, how.eps, how.dtype)[0],
                h2=norm(kept.x1, copies.norm2_weight, copies.norm2_bias, how.eps, how.dtype)[0],
                g=torch.ops.jepa_fast.bias_gelu(kept.u, copies.fc1_bias))
        x, weights = _backward(grad.contiguous(), kept, copies, how, trains=any(ctx.needs_input_grad[3:]))
        weights = (None if weight is None else weight.to(dtype) for weight, dtype in zip(weights, ctx.dtypes, strict=True))
        return x, None, None, *weights
