"""Layer normalisation of the residual stream, its sum included, in the dtype that the next GEMM wants."""

import torch
from torch import Tensor

from ..reference import layer_norm as reference
from ._backends import Missing, cuda, triton
from ._define import define

_CPU = Missing("not written: plain calls PyTorch's own layer_norm")


def _forward_native(raw, x, weight, bias, eps, out_dtype):
    out, _, mean, rstd = _add_native(raw, x, None, weight, bias, eps, out_dtype)
    return out, mean, rstd


def _add_native(raw, x, residual, weight, bias, eps, out_dtype):
    out, summed = x.new_empty(x.shape, dtype=out_dtype), None if residual is None else residual.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    raw.layer_norm(_rows(x), _rows(residual), _wide(weight), _wide(bias), eps, _rows(out), _rows(summed), mean, rstd)
    return out, summed, mean, rstd


def _backward_native(raw, grad, grad_summed, x, weight, mean, rstd, branch_dtype):
    grad_x, branch = x.new_empty(x.shape), None if branch_dtype is None else x.new_empty(x.shape, dtype=branch_dtype)
    affine = None if weight is None else mean.new_empty(2, x.shape[-1])
    raw.layer_norm_backward(_rows(grad), _rows(grad_summed), _rows(x), _wide(weight), mean.contiguous(),
                            rstd.contiguous(), _rows(grad_x), _rows(branch), affine)
    return grad_x, x.new_empty(0) if branch is None else branch, mean.new_empty(2, 0) if affine is None else affine


def _rows(x: Tensor | None) -> Tensor | None:  # [P, D], contiguous
    return None if x is None else x.contiguous().flatten(0, -2)


def _wide(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()


def _up_to(width: int, language: str):
    """Rows that fit the registers that hold them."""
    def supports(x, *args):
        if x.shape[-1] > width:
            return f"no {language} version for rows wider than {width}"
        if any(arg is torch.float64 for arg in args):
            return f"no {language} version for float64"
        return None
    return supports


_TRITON, _CUDA = _up_to(2048, "Triton"), _up_to(8192, "CUDA")

define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype)"
       " -> (Tensor out, Tensor mean, Tensor rstd)",
       plain=reference.layer_norm, cpp=_CPU, triton=triton("layer_norm", supports=_TRITON),
       cuda=cuda("layer_norm", call=_forward_native, supports=_CUDA))
define("add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype)"
       " -> (Tensor out, Tensor summed, Tensor mean, Tensor rstd)",
       plain=reference.add_layer_norm, cpp=_CPU, triton=triton("layer_norm.add_layer_norm", supports=_TRITON),
       cuda=cuda("layer_norm", call=_add_native, supports=_CUDA))
define("layer_norm_backward(Tensor grad, Tensor? grad_summed, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
       "ScalarType? branch_dtype) -> (Tensor grad_x, Tensor grad_branch, Tensor grad_affine)",
       plain=reference.layer_norm_backward, cpp=_CPU,
       triton=triton("layer_norm.layer_norm_backward", supports=_TRITON),
       cuda=cuda("layer_norm_backward", call=_backward_native, supports=_CUDA))


@torch.library.register_fake("jepa_fast::layer_norm")
def _(x, weight, bias, eps, out_dtype):
    statistics = [x.new_empty(x.shape[:-1], dtype=reference.widened(x)) for _ in range(2)]
    return x.new_empty(x.shape, dtype=out_dtype), *statistics


@torch.library.register_fake("jepa_fast::add_layer_norm")
def _(x, residual, weight, bias, eps, out_dtype):
    statistics = [x.new_empty(x.shape[:-1], dtype=reference.widened(residual)) for _ in range(2)]
    return x.new_empty(x.shape, dtype=out_dtype), residual.new_empty(x.shape), *statistics


@torch.library.register_fake("jepa_fast::layer_norm_backward")
def _(grad, grad_summed, x, weight, mean, rstd, branch_dtype):
    branch = x.new_empty(0) if branch_dtype is None else x.new_empty(x.shape, dtype=branch_dtype)
    return x.new_empty(x.shape), branch, mean.new_empty(2, 0 if weight is None else x.shape[-1])


def _save(ctx, inputs, output):
    x, ctx.weight_dtype, ctx.bias_dtype = inputs[0], *(None if t is None else t.dtype for t in inputs[-4:-2])
    *stream, mean, rstd = output[1:]
    ctx.has_residual, ctx.x_dtype = bool(stream), x.dtype
    ctx.save_for_backward(stream[0] if stream else x, inputs[-4], mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *grads):
    if torch.is_grad_enabled():
        raise RuntimeError("layer_norm has no second derivative: call backward() or grad() without create_graph")
    x, weight, mean, rstd = (None if t is None else t.detach() for t in ctx.saved_tensors)
    grad_summed = grads[0] if ctx.has_residual else None
    if grad is None:  # only the stream is used
        grad_x = grad_weight = grad_bias = None
        branch = None if grad_summed is None else grad_summed.to(ctx.x_dtype)
    else:
        branch_dtype = ctx.x_dtype if ctx.x_dtype != x.dtype else None
        grad_x, branch, (grad_weight, grad_bias) = torch.ops.jepa_fast.layer_norm_backward(
            grad, grad_summed, x, weight, mean, rstd, branch_dtype)
        branch = grad_x if branch_dtype is None else branch
        grad_weight = None if ctx.weight_dtype is None else grad_weight.to(ctx.weight_dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    grad_stream = (grad_summed if grad is None else grad_x,) if ctx.has_residual else ()
    return branch, *grad_stream, grad_weight, grad_bias, None, None


torch.library.register_autograd("jepa_fast::layer_norm", _backward, setup_context=_save)
torch.library.register_autograd("jepa_fast::add_layer_norm", _backward, setup_context=_save)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6,
               residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Rows of `x`, or of `x + residual`, normalised over their width; with residual -> (out, the sum).

    x [..., D]; weight and bias [D], in x's dtype or float32, or None. out is in out_dtype (default x's): bfloat16 for the
    next GEMM while the stream is float32. residual [..., D] is the residual stream, float32 or in x's dtype; the sum is
    rounded to its dtype, and what is normalised is that sum. Statistics, arithmetic and the gradients' sums over rows are
    float32 for bfloat16 and float16 too (float64 if the stream is). The gradients that reach the sum and the normalised
    rows are added inside; they have no gradient themselves (RuntimeError with create_graph).
    Layer normalisation, arXiv:1607.06450, section 3.
    """
    out_dtype = out_dtype or x.dtype
    _check(x, weight, bias, residual, out_dtype)
    if residual is None:
        return torch.ops.jepa_fast.layer_norm(x, weight, bias, eps, out_dtype)[0]
    out, summed, _, _ = torch.ops.jepa_fast.add_layer_norm(x, residual, weight, bias, eps, out_dtype)
    return out, summed


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
           out_dtype: torch.dtype) -> None:
    if not x.is_floating_point() or not out_dtype.is_floating_point:
        raise TypeError(f"x and out_dtype must be floating point, got {x.dtype} and {out_dtype}")
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., D] of at least two dimensions, D > 0, got {list(x.shape)}")
    if weight is None and bias is not None:
        raise ValueError("bias was given without weight")
    for name, t, shape in (("weight", weight, x.shape[-1:]), ("bias", bias, x.shape[-1:]), ("residual", residual, x.shape)):
        if t is None:
            continue
        if t.shape != shape or t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} must be {list(shape)} {x.dtype} or torch.float32, got {list(t.shape)} {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x, got {t.device}")
