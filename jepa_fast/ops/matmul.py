"""A matrix product that keeps float32's accuracy on the bfloat16 matrix units (AMX) of CPUs."""

import dataclasses
import functools

import torch
from torch import Tensor

from ..reference import matmul as reference
from ._backends import Implementation, Missing, Slower, compiled
from ._define import define


@functools.cache
def _amx_missing(device: str) -> str | None:
    if device != "cpu" or torch.ops.jepa_fast_C.has_amx(torch.empty(0)):
        return None
    return "needs a CPU with AMX (bfloat16), and AVX-512, which ATEN_CPU_CAPABILITY may have switched off"


def _on_amx(raw, a, b, bias):
    out, bias = a.new_empty(a.shape[0], b.shape[1]), None if bias is None else bias.contiguous()
    is_whole = out.numel() > 0 and a.shape[1] > 0
    if is_whole and raw.matmul(_along_a_dimension(a), _along_a_dimension(b), bias, out):
        return out
    return reference.matmul(a, b, bias)  # nothing to multiply, or numbers too small, too large or not finite


def _along_a_dimension(x: Tensor) -> Tensor:  # one of the two is contiguous
    return x if 1 in x.stride() else x.contiguous()


def _with_amx(implementation: Implementation | Missing) -> Implementation | Missing:
    if isinstance(implementation, Missing):
        return implementation
    return dataclasses.replace(implementation, missing=_amx_missing)


_BLAS = Missing("GPUs use PyTorch's products")
_SLOWER = Slower("M or N below 64, M N K below 2^23", lambda a, b, bias: (
    min(a.shape[0], b.shape[1]) < 64 or a.shape[0] * a.shape[1] * b.shape[1] < 2**23))
define("matmul(Tensor a, Tensor b, Tensor? bias) -> Tensor", plain=reference.matmul,
       cpp=_with_amx(compiled("matmul", dtypes=(torch.float32,), call=_on_amx, slower=_SLOWER)),
       torch=Implementation(reference.matmul, ("cpu",)), cuda=_BLAS, triton=_BLAS)


@torch.library.register_fake("jepa_fast::matmul")
def _(a, b, bias):
    return a.new_empty(a.shape[0], b.shape[1])


def _save(ctx, inputs, output):
    a, b, ctx.has_bias = inputs[0], inputs[1], inputs[2] is not None
    ctx.save_for_backward(a, b)


def _backward(ctx, grad):
    a, b = ctx.saved_tensors
    needs_a, needs_b, needs_bias = ctx.needs_input_grad
    return (torch.ops.jepa_fast.matmul(grad, b.T, None) if needs_a else None,
            torch.ops.jepa_fast.matmul(a.T, grad, None) if needs_b else None,
            grad.sum(0) if ctx.has_bias and needs_bias else None)


torch.library.register_autograd("jepa_fast::matmul", _backward, setup_context=_save)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b (+ bias), float32 on CPUs with AMX at the accuracy of plain float32 but faster.

    a [M, K], b [K, N], bias [N] of one floating point dtype -> [M, N]. Transposed matrices cost nothing, any other strides
    that skip elements in both dimensions a copy. AMX takes numbers below 2^-126 for zero, also in what float32 splits into:
    elements below 2^-108 lose their last bits. Matrices whose largest magnitude is outside of [2^-50, 2^50], or which hold
    infinities or NaN, are multiplied by PyTorch, as are other dtypes and devices. The result does not depend on the number
    of threads. Henry, Tang, Heinecke, arXiv:1904.06376.
    """
    for name, x, dim in (("a", a, 2), ("b", b, 2), ("bias", bias, 1)):
        if x is None:
            continue
        if not x.is_floating_point() or x.dtype != a.dtype:
            raise TypeError(f"{name} must be floating point, of one dtype with a, got {x.dtype} and {a.dtype}")
        if x.dim() != dim:
            raise ValueError(f"{name} must have {dim} dimension{'s' * (dim > 1)}, got {list(x.shape)}")
        if x.device != a.device:
            raise ValueError(f"a and {name} must be on one device, got {a.device} and {x.device}")
    if b.shape[0] != a.shape[1]:
        raise ValueError(f"b must be [K, N] with K = {a.shape[1]}, as a, got {list(b.shape)}")
    if bias is not None and bias.shape[0] != b.shape[1]:
        raise ValueError(f"bias must be [N] = [{b.shape[1]}], got {list(bias.shape)}")
    return torch.ops.jepa_fast.matmul(a, b, bias)
