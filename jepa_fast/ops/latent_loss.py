"""Smooth-L1 or L1 distance of predictions from the normalised, gathered output of the target encoder, in one pass."""

import torch
from torch import Tensor

from ..reference import latent_loss as reference
from ._backends import compiled, cuda, triton
from ._define import define
from .gather_tokens import _check_range

_STATS = ("cosine", "prediction_power", "target_std")
_MAX_WIDTH = 8192  # of a row that one program holds


def _forward_native(raw, prediction, target, target_idx, weight, beta, eps):
    P = prediction.shape[0]
    loss, stats, mean, rstd = (prediction.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), (P,), (P,)))
    arguments = [None if t is None else t.contiguous() for t in (prediction, target, target_idx, weight)]
    raw.latent_loss(*arguments, beta, eps, loss, stats, mean, rstd)
    return loss, stats, mean, rstd


def _backward_native(raw, grad_loss, prediction, target, target_idx, weight, mean, rstd, beta):
    out = prediction.new_empty(prediction.shape)
    arguments = [None if t is None else t.contiguous() for t in (prediction, target, target_idx, weight, mean, rstd)]
    raw.latent_loss_backward(grad_loss, *arguments, beta, out)
    return out


def _why_not_triton(*args):
    widest = max(arg.shape[-1] for arg in args if isinstance(arg, Tensor) and arg.dim() == 2)
    return f"no Triton version for rows wider than {_MAX_WIDTH}" if widest > _MAX_WIDTH else None


def _check_rows(target, target_idx):
    if target_idx is not None:
        _check_range("target_idx", target_idx, target.shape[0])


define("latent_loss(Tensor prediction, Tensor target, Tensor? target_idx, Tensor? weight, float beta, float eps)"
       " -> (Tensor loss, Tensor stats, Tensor mean, Tensor rstd)",
       plain=reference.latent_loss, cpp=compiled("latent_loss", call=_forward_native),
       cuda=cuda("latent_loss", call=_forward_native),
       triton=triton("latent_loss", supports=_why_not_triton),
       check=lambda prediction, target, target_idx, *_: _check_rows(target, target_idx))
define("latent_loss_backward(Tensor grad_loss, Tensor prediction, Tensor target, Tensor? target_idx, Tensor? weight, "
       "Tensor mean, Tensor rstd, float beta) -> Tensor",
       plain=reference.latent_loss_backward, cpp=compiled("latent_loss_backward", call=_backward_native),
       cuda=cuda("latent_loss_backward", call=_backward_native),
       triton=triton("latent_loss.latent_loss_backward", supports=_why_not_triton))


@torch.library.register_fake("jepa_fast::latent_loss")
def _(prediction, target, target_idx, weight, beta, eps):
    dtype, P = reference.loss_dtype(prediction, target), prediction.shape[0]
    return tuple(prediction.new_empty(shape, dtype=dtype) for shape in ((), (3,), (P,), (P,)))


@torch.library.register_fake("jepa_fast::latent_loss_backward")
def _(grad_loss, prediction, target, target_idx, weight, mean, rstd, beta):
    return prediction.new_empty(prediction.shape)


def _save(ctx, inputs, output):
    prediction, target, target_idx, weight, ctx.beta, _ = inputs
    _, stats, mean, rstd = output
    ctx.save_for_backward(prediction, target, target_idx, weight, mean, rstd)
    ctx.mark_non_differentiable(stats, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("latent_loss has no second derivative: call backward() or grad() without create_graph")
    grad = None
    if grad_loss is not None:
        prediction, *others = ctx.saved_tensors
        grad = torch.ops.jepa_fast.latent_loss_backward(grad_loss, prediction.detach(), *others, ctx.beta)
    return grad, None, None, None, None, None


torch.library.register_autograd("jepa_fast::latent_loss", _backward, setup_context=_save)


def latent_loss(prediction: Tensor, target: Tensor, target_idx: Tensor | None = None, *, beta: float = 1.0,
                eps: float = 1e-5, weight: Tensor | None = None,
                return_stats: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Smooth-L1 distance of `prediction` from the layer-normalised rows of `target`, averaged over rows and width.

    prediction [P, D]; target [R, D], the output of the target encoder as it is: its rows are normalised here, over D,
    without weight and bias; target_idx [P] int64: the row of target for each prediction, or None for row p. beta: where
    the square ends; 0 is L1. weight [P] float32: sum of weight * row mean instead of the mean over rows; 1 / (M * P_m)
    on the P_m rows of mask kind m weighs M kinds equally. Arithmetic and loss are float32, also for bfloat16 (float64
    if an input is); the two may differ in dtype. No rows: NaN, as the mean of nothing, or 0 with weight. Gradient
    reaches prediction only, and has no gradient itself (RuntimeError with create_graph).
    return_stats: also {"cosine", "prediction_power", "target_std"}, scalars without gradient: means over rows of the
    cosine of prediction and normalised target, of the prediction's mean square (the normalised target has 1), and of
    the target's standard deviation over D. They cost no further pass.
    Raises IndexError for a target_idx out of range (CPU).  I-JEPA, arXiv:2301.08243, section 3.
    """
    _check(prediction, target, target_idx)
    _check_weight(weight, prediction, target)
    if beta < 0 or eps < 0:
        raise ValueError(f"beta and eps must be at least 0, got {beta} and {eps}")
    loss, stats, _, _ = torch.ops.jepa_fast.latent_loss(prediction, target, target_idx, weight, beta, eps)
    return (loss, dict(zip(_STATS, stats.unbind(), strict=True))) if return_stats else loss


def _check(prediction: Tensor, target: Tensor, target_idx: Tensor | None) -> None:
    for name, x in (("prediction", prediction), ("target", target)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if prediction.dim() != 2 or target.dim() != 2 or prediction.shape[1] != target.shape[1] or target.shape[1] == 0:
        raise ValueError(f"prediction must be [P, D] and target [R, D] with one D > 0, "
                         f"got {list(prediction.shape)} and {list(target.shape)}")
    if target.requires_grad:
        raise ValueError("target must not require grad, got one that does: run the target encoder under "
                         "torch.no_grad(), or detach() its output")
    if target_idx is None:
        if prediction.shape[0] != target.shape[0]:
            raise ValueError(f"target must have the {prediction.shape[0]} rows of prediction where target_idx is None, "
                             f"got {target.shape[0]}")
    elif target_idx.dtype != torch.int64 or target_idx.shape != prediction.shape[:1]:
        raise ValueError(f"target_idx must be [P] = [{prediction.shape[0]}] int64, "
                         f"got {list(target_idx.shape)} {target_idx.dtype}")
    devices = [x.device for x in (prediction, target, target_idx) if x is not None]
    if len(set(devices)) > 1:
        raise ValueError(f"prediction, target and target_idx must be on one device, got {', '.join(map(str, devices))}")


def _check_weight(weight: Tensor | None, prediction: Tensor, target: Tensor) -> None:
    if weight is None:
        return
    dtypes = (torch.float32, reference.loss_dtype(prediction, target))
    if weight.shape != prediction.shape[:1] or weight.dtype not in dtypes:
        raise ValueError(f"weight must be [P] = [{prediction.shape[0]}] float32, "
                         f"got {list(weight.shape)} {weight.dtype}")
    if weight.requires_grad:
        raise ValueError("weight must not require grad, got one that does: gradient reaches prediction only")
    if weight.device != prediction.device:
        raise ValueError(f"weight must be on {prediction.device} as prediction, got {weight.device}")
