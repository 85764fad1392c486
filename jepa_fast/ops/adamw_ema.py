"""The whole optimizer step in one pass over memory: AdamW, moving average, bfloat16 copies."""

import torch
from torch import Tensor

from ..reference import adamw_ema as reference
from ._backends import Missing, compiled, cuda, triton
from ._define import define
from ._tensor_lists import MASTER_DTYPES, check_floating, check_like, mark_changed, why_not_flat


def _native(raw, params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, *scalars):
    if params:  # nothing to dispatch on otherwise
        *scalars, grad_scale = scalars
        raw.adamw_ema_(params, [g.contiguous() for g in grads], exp_avg, exp_avg_sq, average, shadow,
                       average_shadow, *scalars, None if grad_scale is None else grad_scale.contiguous())
    mark_changed(params, exp_avg, exp_avg_sq, average, shadow, average_shadow)


def _scalars_native(raw, params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, scalars, beta1, beta2, eps,
                    grad_scale):
    if params:
        raw.adamw_ema_scalars_(params, [g.contiguous() for g in grads], exp_avg, exp_avg_sq, average, shadow,
                               average_shadow, scalars.contiguous(), beta1, beta2, eps,
                               None if grad_scale is None else grad_scale.contiguous())
    mark_changed(params, exp_avg, exp_avg_sq, average, shadow, average_shadow)


def _supports(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, *scalars):
    return (why_not_flat(params, exp_avg, exp_avg_sq, average)
            or why_not_flat(shadow, average_shadow, dtype=torch.bfloat16))


define("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
       "Tensor(d!)[] average, Tensor(e!)[] shadow, Tensor(f!)[] average_shadow, float[] lr, float[] weight_decay, "
       "int[] step, float beta1, float beta2, float eps, float momentum, Tensor? grad_scale) -> ()",
       plain=reference.adamw_ema_, cpp=compiled("adamw_ema_", call=_native, supports=_supports),
       triton=triton("adamw_ema.adamw_ema_", supports=_supports),
       cuda=cuda("adamw_ema_", call=_native, supports=_supports))


define("adamw_ema_scalars_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
       "Tensor(d!)[] average, Tensor(e!)[] shadow, Tensor(f!)[] average_shadow, Tensor scalars, float beta1, "
       "float beta2, float eps, Tensor? grad_scale) -> ()",
       plain=reference.adamw_ema_scalars_, cpp=Missing("the CPU has no graphs to replay: use adamw_ema_"),
       triton=triton("adamw_ema.adamw_ema_scalars_", supports=_supports),
       cuda=cuda("adamw_ema_scalars_", call=_scalars_native, supports=_supports))


@torch.library.register_fake("jepa_fast::adamw_ema_")
def _(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, *scalars):
    return None


@torch.library.register_fake("jepa_fast::adamw_ema_scalars_")
def _(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, *scalars):
    return None


@torch.no_grad()
def adamw_ema_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
               average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], lr: list[float],
               weight_decay: list[float], step: list[int], beta1: float, beta2: float, eps: float, momentum: float,
               grad_scale: Tensor | None = None) -> None:
    """One AdamW step of all `params` in place, then one step of their moving averages and smaller copies.

    params, exp_avg, exp_avg_sq: float32 (or float64), same shapes pairwise. grads: any floating dtype, widened first.
    average: moving averages of the *first* len(average) parameters, updated as `ema_update_` does with `momentum`.
    shadow, average_shadow: rounded copies (bfloat16, nearest even) of params and of average; empty or as long.
    lr, weight_decay, step: one per parameter; decay is decoupled, `step` counts this step, from 1.
    grad_scale: float32, 0-dim or [len(params)], multiplies the gradients (clipping); None changes no bit.

    Follows torch.optim.AdamW(foreach=False) operation by operation. C++ differs from it by the last bit of the square
    root alone, which PyTorch does not always round correctly. Raises ValueError for other lengths or shapes,
    a momentum outside [0, 1] or a step below 1, TypeError for other dtypes. arXiv:1711.05101; arXiv:2301.08243.
    """
    _check_lists(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow)
    for name, values in (("lr", lr), ("weight_decay", weight_decay), ("step", step)):
        if len(values) != len(params):
            raise ValueError(f"{name} must have {len(params)} numbers, one per parameter, got {len(values)}")
    if min(step, default=1) < 1:
        raise ValueError(f"step must count from 1, got {min(step)}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if grad_scale is not None:
        _check_scale(grad_scale, params)
    torch.ops.jepa_fast.adamw_ema_(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, lr,
                                   weight_decay, step, beta1, beta2, eps, momentum, grad_scale)


@torch.no_grad()
def adamw_ema_scalars_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
                       average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], scalars: Tensor,
                       beta1: float, beta2: float, eps: float, grad_scale: Tensor | None = None) -> None:
    """`adamw_ema_` with what changes from step to step read from a tensor: what a CUDA graph can capture and replay.

    scalars [len(params), 5] float32 on the device of params, as `adamw_ema_scalars` makes it on the CPU: capture once,
    then before each replay copy the new ones into the same memory. Nothing is read on the host. Triton must have been
    called with the same lists before the capture (RuntimeError).
    """
    _check_lists(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow)
    if scalars.shape != (len(params), 5) or scalars.dtype not in MASTER_DTYPES:
        raise ValueError(f"scalars must be [{len(params)}, 5] float32, got {list(scalars.shape)} {scalars.dtype}")
    if params and scalars.device != params[0].device:
        raise ValueError(f"scalars must be on {params[0].device} as params, got {scalars.device}")
    if grad_scale is not None:
        _check_scale(grad_scale, params)
    torch.ops.jepa_fast.adamw_ema_scalars_(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, scalars,
                                           beta1, beta2, eps, grad_scale)


def adamw_ema_scalars(lr: list[float], weight_decay: list[float], step: list[int], beta1: float, beta2: float,
                      momentum: float) -> Tensor:
    """One row per parameter, [n, 5] float32 on the CPU; computed in float64 and rounded once, as PyTorch does."""
    rows = [(1 - rate * decay, -(rate / (1 - beta1**count)), (1 - beta2**count) ** 0.5, momentum, 1 - momentum)
            for rate, decay, count in zip(lr, weight_decay, step, strict=True)]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)


def _check_lists(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow) -> None:
    check_floating("params", params, MASTER_DTYPES)
    check_like("grads", grads, "params", params)
    check_like("exp_avg", exp_avg, "params", params, same_dtype=True)
    check_like("exp_avg_sq", exp_avg_sq, "params", params, same_dtype=True)
    if len(average) > len(params):
        raise ValueError(f"average must have at most {len(params)} tensors as params, got {len(average)}")
    check_like("average", average, "params", params[: len(average)], same_dtype=True)
    if shadow:
        check_like("shadow", shadow, "params", params)
    if average_shadow:
        check_like("average_shadow", average_shadow, "average", average)


def _check_scale(grad_scale: Tensor, params: list[Tensor]) -> None:
    if grad_scale.dtype not in MASTER_DTYPES:
        raise TypeError(f"grad_scale must be float32, got {grad_scale.dtype}")
    if grad_scale.shape not in ((), (len(params),)):
        raise ValueError(f"grad_scale must be [] or [{len(params)}], got {list(grad_scale.shape)}")
    if params and grad_scale.device != params[0].device:
        raise ValueError(f"grad_scale must be on {params[0].device} as params, got {grad_scale.device}")
