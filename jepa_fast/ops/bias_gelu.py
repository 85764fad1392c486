"""What follows the first GEMM of an MLP: bias and exact GELU in one pass, their gradients in another."""

import torch
from torch import Tensor

from ..reference import bias_gelu as reference
from ._backends import compiled, cuda, triton
from ._define import define


def _forward_native(raw, x, bias):
    out = x.new_empty(x.shape)
    raw.bias_gelu(_rows(x), bias.float().contiguous(), _rows(out))
    return out


def _backward_native(raw, grad, x, bias):
    grad_x, grad_bias = x.new_empty(x.shape), bias.new_empty(bias.shape, dtype=torch.float32)
    raw.bias_gelu_backward(_rows(grad), _rows(x), bias.float().contiguous(), _rows(grad_x), grad_bias)
    return grad_x, grad_bias.to(bias.dtype)


def _rows(x: Tensor) -> Tensor:  # [P, D], contiguous
    return x.contiguous().flatten(0, -2)


define("bias_gelu(Tensor x, Tensor bias) -> Tensor",
       plain=reference.bias_gelu, cpp=compiled("bias_gelu", call=_forward_native),
       cuda=cuda("bias_gelu", call=_forward_native), triton=triton("bias_gelu"))
define("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor grad_x, Tensor grad_bias)",
       plain=reference.bias_gelu_backward, cpp=compiled("bias_gelu_backward", call=_backward_native),
       cuda=cuda("bias_gelu_backward", call=_backward_native), triton=triton("bias_gelu.bias_gelu_backward"))


@torch.library.register_fake("jepa_fast::bias_gelu")
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("jepa_fast::bias_gelu_backward")
def _(grad, x, bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    if torch.is_grad_enabled():
        raise RuntimeError("bias_gelu has no second derivative: call backward() or grad() without create_graph")
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.jepa_fast.bias_gelu_backward(grad, x.detach(), bias.detach())
    return grad_x if ctx.needs_input_grad[0] else None, grad_bias if ctx.needs_input_grad[1] else None


torch.library.register_autograd("jepa_fast::bias_gelu", _backward, setup_context=_save)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of `x + bias`, for the output of a GEMM that has not added its bias.

    x [..., D]; bias [D] in x's dtype or float32 -> [..., D] in x's dtype. Arithmetic, and the sum over rows of the bias
    gradient, are float32 for bfloat16 and float16 too (float64 if an input is); the sum x + bias is never rounded.
    Gaussian error linear units, arXiv:1606.08415, section 2, with erf rather than tanh.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must be [..., D] of at least two dimensions, got {list(x.shape)}")
    if bias.shape != x.shape[-1:] or bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"bias must be [D] = [{x.shape[-1]}] {x.dtype} or torch.float32, "
                         f"got {list(bias.shape)} {bias.dtype}")
    if x.device != bias.device:
        raise ValueError(f"x and bias must be on one device, got {x.device} and {bias.device}")
    return torch.ops.jepa_fast.bias_gelu(x, bias)
