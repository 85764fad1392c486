"""A whole optimizer step: AdamW, the moving average of the new parameters, copies in a smaller dtype.

    p = p * (1 - lr * wd)
    m = m + (1 - beta1) * (g - m)                v = beta2 * v + (1 - beta2) * g²
    p = p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
    average = momentum * average + (1 - momentum) * p

AdamW: arXiv:1711.05101, algorithm 2. The operations and their order are those of torch.optim.AdamW(foreach=False), so
on one device the results are equal to its bits; the average is that of `ema_update_`.
"""

from torch import Tensor

from .ema_update import ema_update_


def adamw_ema_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
               average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], lr: list[float],
               weight_decay: list[float], step: list[int], beta1: float, beta2: float, eps: float, momentum: float,
               grad_scale: Tensor | None) -> None:
    """`average` belongs to the first parameters; `step` counts from 1; `grad_scale` is 0-dim or one per parameter."""
    for i, (p, m, v) in enumerate(zip(params, exp_avg, exp_avg_sq, strict=True)):
        grad = grads[i].to(p.dtype)
        if grad_scale is not None:
            grad = grad * (grad_scale[i] if grad_scale.dim() else grad_scale)
        p.mul_(1 - lr[i] * weight_decay[i])
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denom = (v.sqrt() / (1 - beta2 ** step[i]) ** 0.5).add_(eps)
        p.addcdiv_(m, denom, value=-(lr[i] / (1 - beta1 ** step[i])))
    ema_update_(average, params[: len(average)], momentum)
    for copy, value in zip(shadow + average_shadow, params[: len(shadow)] + average[: len(average_shadow)],
                           strict=True):
        copy.copy_(value)


def adamw_ema_scalars_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
                       average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], scalars: Tensor,
                       beta1: float, beta2: float, eps: float, grad_scale: Tensor | None) -> None:
    """The same from `scalars` [n, 5]: 1 - lr * wd, -lr / (1 - beta1^step), sqrt(1 - beta2^step), momentum, 1 - momentum."""
    for i, (p, m, v) in enumerate(zip(params, exp_avg, exp_avg_sq, strict=True)):
        decay, step_size, correction2, keep, take = scalars[i]
        grad = grads[i].to(p.dtype)
        if grad_scale is not None:
            grad = grad * (grad_scale[i] if grad_scale.dim() else grad_scale)
        p.mul_(decay)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.add_(m * step_size / (v.sqrt() / correction2).add_(eps))
        if i < len(average):
            average[i].mul_(keep).add_(take * p)
    for copy, value in zip(shadow + average_shadow, params[: len(shadow)] + average[: len(average_shadow)],
                           strict=True):
        copy.copy_(value)
