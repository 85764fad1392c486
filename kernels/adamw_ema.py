"""AdamW, the moving average of the new parameters and the bfloat16 copies of both, in one launch for all parameters.

One pass over memory instead of about a dozen: with float32 gradients 28 bytes per parameter, 8 more with an average, 2 for
each copy. The arithmetic is that of csrc/cpu/adamw_ema.cpp operation by operation, fused multiply-adds where it has them
and nowhere else. What changes from step to step is in one small tensor, which the kernel reads: a CUDA graph replays it with
whatever is there by then. The table of addresses comes from the host, so the same lists must have been updated once before
the capture.
ViT-H/14 and its predictor (632 M + 22 M parameters, average and both copies): 26 GB, 6.0 ms at 4.3 TB/s; about 20 FLOPs
each, 13 GFLOP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._tensor_lists import BLOCK, address, addresses, is_capturing, locate, split, table, to_device
from .ema_update import TRITON_DTYPE

_CAPTURED = WeakTensorKeyDictionary()  # scalars that CUDA graphs read -> the tables that the same graphs read


@triton.jit
def adamw_ema_kernel(table_ptr, tensor_of_block_ptr, scalars_ptr, grad_scale_ptr, num_tensors, lerp_weight, beta2,
                     one_minus_beta2, eps, GRAD: tl.constexpr, HAS_SCALE: tl.constexpr, LERP_FROM_GRAD: tl.constexpr,
                     HAS_SHADOW: tl.constexpr, HAS_AVERAGE_SHADOW: tl.constexpr, IS_ALIGNED: tl.constexpr,
                     BLOCK: tl.constexpr):
    entry_ptr, offs, mask = locate(table_ptr, tensor_of_block_ptr, num_tensors, IS_ALIGNED, BLOCK)
    param_ptr = address(entry_ptr, num_tensors, 3, tl.float32, IS_ALIGNED)
    exp_avg_ptr = address(entry_ptr, num_tensors, 4, tl.float32, IS_ALIGNED)
    exp_avg_sq_ptr = address(entry_ptr, num_tensors, 5, tl.float32, IS_ALIGNED)
    grad_ptr = address(entry_ptr, num_tensors, 6, GRAD, IS_ALIGNED)
    place = tl.load(entry_ptr + 2 * num_tensors)  # in the lists
    scalars_ptr += 5 * place
    decay, step_size, correction2 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)

    m = tl.load(exp_avg_ptr + offs, mask=mask)
    v = tl.load(exp_avg_sq_ptr + offs, mask=mask)
    grad = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(grad_scale_ptr + place)
    m = tl.fma(lerp_weight, grad - m, grad if LERP_FROM_GRAD else m)
    v = tl.fma(one_minus_beta2 * grad, grad, v * beta2)
    denom = tl.div_rn(tl.sqrt_rn(v), correction2) + eps
    param = tl.load(param_ptr + offs, mask=mask) * decay + tl.div_rn(step_size * m, denom)
    tl.store(exp_avg_ptr + offs, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v, mask=mask)
    tl.store(param_ptr + offs, param, mask=mask)
    if HAS_SHADOW:
        shadow_ptr = address(entry_ptr, num_tensors, 7, tl.bfloat16, IS_ALIGNED)
        tl.store(shadow_ptr + offs, param.to(tl.bfloat16), mask=mask)
    if tl.load(entry_ptr + 8 * num_tensors) != 0:
        momentum, rest = tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4)
        average_ptr = address(entry_ptr, num_tensors, 8, tl.float32, IS_ALIGNED)
        average = tl.load(average_ptr + offs, mask=mask) * momentum + param * rest
        tl.store(average_ptr + offs, average, mask=mask)
        if HAS_AVERAGE_SHADOW:
            shadow_ptr = address(entry_ptr, num_tensors, 9, tl.bfloat16, IS_ALIGNED)
            tl.store(shadow_ptr + offs, average.to(tl.bfloat16), mask=mask)


def adamw_ema_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
               average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], lr: list[float],
               weight_decay: list[float], step: list[int], beta1: float, beta2: float, eps: float, momentum: float,
               grad_scale: Tensor | None) -> None:
    """Everything that is written is float32 (shadows bfloat16) and contiguous; grads in any of three dtypes."""
    if params:
        scalars = [(1 - rate * decay, -(rate / (1 - beta1**count)), (1 - beta2**count) ** 0.5, momentum, 1 - momentum)
                   for rate, decay, count in zip(lr, weight_decay, step, strict=True)]
        adamw_ema_scalars_(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow,
                           to_device(scalars, torch.float32, params[0].device), beta1, beta2, eps, grad_scale)


def adamw_ema_scalars_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
                       average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], scalars: Tensor,
                       beta1: float, beta2: float, eps: float, grad_scale: Tensor | None) -> None:
    """scalars [n, 5] float32: 1 - lr * wd, -lr / (1 - beta1^step), sqrt(1 - beta2^step), momentum, 1 - momentum."""
    grads, count, sizes = [grad.contiguous() for grad in grads], len(params), [p.numel() for p in params]
    lists = [addresses(tensors, count) for tensors in (params, exp_avg, exp_avg_sq, grads, shadow, average, average_shadow)]
    if is_capturing(scalars.device) and not scalars.is_contiguous():
        raise ValueError("scalars must be contiguous where a CUDA graph captures them")
    scalars, grad_scale = scalars.contiguous(), None if grad_scale is None else grad_scale.expand(count).contiguous()
    lerp_weight = torch.tensor(1 - beta1, dtype=torch.float32).item()
    lerp_from_grad = lerp_weight >= 0.5  # PyTorch's lerp starts from the nearer end
    for (dtype, is_aligned), chosen in split([grad.dtype for grad in grads], sizes, *lists).items():
        entries, tensor_of_block = table(
            params[0].device, *(tuple(column[i] for i in chosen) for column in (sizes, range(count), *lists)))
        if is_capturing(scalars.device):
            _CAPTURED.setdefault(scalars, []).append((entries, tensor_of_block))
        adamw_ema_kernel[tensor_of_block.numel(),](
            entries, tensor_of_block, scalars, grad_scale, len(chosen), lerp_weight - lerp_from_grad, beta2, 1 - beta2, eps,
            GRAD=TRITON_DTYPE[dtype], HAS_SCALE=grad_scale is not None, LERP_FROM_GRAD=lerp_from_grad,
            HAS_SHADOW=bool(shadow), HAS_AVERAGE_SHADOW=bool(average_shadow), IS_ALIGNED=is_aligned, BLOCK=BLOCK,
            num_warps=8, enable_fp_fusion=False)
    torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq, *average, *shadow, *average_shadow])
