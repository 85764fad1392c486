"""AdamW, the moving average of the new parameters and the bfloat16 copies of both, in one launch for all parameters.

One pass over memory instead of about a dozen: with float32 gradients 28 bytes per parameter, 8 more with an average, 2 for
each copy. The operations are those of torch.optim.AdamW(foreach=False), in the order and with the fused multiply-adds
that PyTorch's CUDA code is written with, and no others; the division of sqrt(v) by a number is a product with its
reciprocal there and here.
What changes from step to step is one small tensor on the device, 5 numbers per group of parameters (`adamw_ema_`), or the
caller's, per parameter (`adamw_ema_scalars_`): a CUDA graph replays the latter with whatever the tensor holds by then. The
table of addresses comes from the host, so the same lists must have been updated once before the capture.
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
                     one_minus_beta2, eps, GRAD: tl.constexpr, HAS_SCALE: tl.constexpr,
                     LERP_FROM_GRAD: tl.constexpr, HAS_SHADOW: tl.constexpr, HAS_AVERAGE_SHADOW: tl.constexpr,
                     IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    entry_ptr, offs, mask = locate(table_ptr, tensor_of_block_ptr, num_tensors, IS_ALIGNED, BLOCK)
    param_ptr = address(entry_ptr, num_tensors, 4, tl.float32, IS_ALIGNED)
    exp_avg_ptr = address(entry_ptr, num_tensors, 5, tl.float32, IS_ALIGNED)
    exp_avg_sq_ptr = address(entry_ptr, num_tensors, 6, tl.float32, IS_ALIGNED)
    grad_ptr = address(entry_ptr, num_tensors, 7, GRAD, IS_ALIGNED)
    scalars_ptr += 5 * tl.load(entry_ptr + 2 * num_tensors)  # decay, step_size, correction2, keep, take
    decay, step_size = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    reciprocal = tl.div_rn(1.0, tl.load(scalars_ptr + 2))

    param = tl.load(param_ptr + offs, mask=mask) * decay
    m = tl.load(exp_avg_ptr + offs, mask=mask)
    v = tl.load(exp_avg_sq_ptr + offs, mask=mask)
    grad = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(grad_scale_ptr + tl.load(entry_ptr + 3 * num_tensors)).to(tl.float32)
    m = tl.fma(lerp_weight, grad - m, grad if LERP_FROM_GRAD else m)
    v = tl.fma(one_minus_beta2, grad * grad, v * beta2)
    denom = tl.sqrt_rn(v) * reciprocal + eps
    param = tl.fma(step_size, tl.div_rn(m, denom), param)
    tl.store(exp_avg_ptr + offs, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v, mask=mask)
    tl.store(param_ptr + offs, param, mask=mask)
    if HAS_SHADOW:
        shadow_ptr = address(entry_ptr, num_tensors, 8, tl.bfloat16, IS_ALIGNED)
        tl.store(shadow_ptr + offs, param.to(tl.bfloat16), mask=mask)
    if tl.load(entry_ptr + 9 * num_tensors) != 0:
        average_ptr = address(entry_ptr, num_tensors, 9, tl.float32, IS_ALIGNED)
        keep, take = tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4)
        average = tl.load(average_ptr + offs, mask=mask) * keep + param * take
        tl.store(average_ptr + offs, average, mask=mask)
        if HAS_AVERAGE_SHADOW:
            shadow_ptr = address(entry_ptr, num_tensors, 10, tl.bfloat16, IS_ALIGNED)
            tl.store(shadow_ptr + offs, average.to(tl.bfloat16), mask=mask)


def adamw_ema_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
               average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], lr: list[float],
               weight_decay: list[float], step: list[int], beta1: float, beta2: float, eps: float, momentum: float,
               grad_scale: Tensor | None) -> None:
    """Everything that is written is float32 (shadows bfloat16) and contiguous; grads in any of three dtypes."""
    steps = list(zip(lr, weight_decay, step, strict=True))
    row_of = {key: row for row, key in enumerate(dict.fromkeys(steps))}  # a handful: one per group
    scalars = [(1 - lr * decay, -(lr / (1 - beta1**step)), (1 - beta2**step) ** 0.5, momentum, 1 - momentum)
               for lr, decay, step in row_of]
    if params:
        scalars = to_device(scalars, torch.float32, params[0].device)
    _launch(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, scalars, [row_of[key] for key in steps],
            beta1, beta2, eps, grad_scale)


def adamw_ema_scalars_(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
                       average: list[Tensor], shadow: list[Tensor], average_shadow: list[Tensor], scalars: Tensor,
                       beta1: float, beta2: float, eps: float, grad_scale: Tensor | None) -> None:
    """The same with scalars [len(params), 5] float32 on the device: decay, step_size, correction2, keep, take."""
    tables = _launch(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, scalars.contiguous(),
                     range(len(params)), beta1, beta2, eps, grad_scale)
    if is_capturing(scalars.device):
        _CAPTURED.setdefault(scalars, []).append(tables)


def _launch(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow, scalars, row_of_tensor, beta1, beta2, eps,
            grad_scale) -> list[tuple[Tensor, Tensor]]:
    """Returns the tables that the launches read."""
    grads, count, sizes, tables = [grad.contiguous() for grad in grads], len(params), [p.numel() for p in params], []
    lists = [addresses(tensors, count) for tensors in (params, exp_avg, exp_avg_sq, grads, shadow, average, average_shadow)]
    lerp_weight = torch.tensor(1 - beta1, dtype=torch.float32).item()
    lerp_from_grad = lerp_weight >= 0.5  # PyTorch's lerp starts from the nearer end
    if params and grad_scale is not None:
        grad_scale = grad_scale.expand(count).contiguous()
    columns = (sizes, row_of_tensor, range(count), *lists)
    for (dtype, is_aligned), chosen in split([grad.dtype for grad in grads], sizes, *lists).items():
        entries, tensor_of_block = table(params[0].device, *(tuple(column[i] for i in chosen) for column in columns))
        adamw_ema_kernel[tensor_of_block.numel(),](
            entries, tensor_of_block, scalars, grad_scale, len(chosen), lerp_weight - lerp_from_grad, beta2, 1 - beta2, eps,
            GRAD=TRITON_DTYPE[dtype], HAS_SCALE=grad_scale is not None, LERP_FROM_GRAD=lerp_from_grad,
            HAS_SHADOW=bool(shadow), HAS_AVERAGE_SHADOW=bool(average_shadow), IS_ALIGNED=is_aligned, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=False)
        tables.append((entries, tensor_of_block))
    torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq, *average, *shadow, *average_shadow])
    return tables
