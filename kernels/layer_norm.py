"""Layer normalisation of rows, with the residual sum before it and the cast after it; all gradients in one read.

add_layer_norm reads the branch and the stream once and writes the new stream and the next GEMM's input: PyTorch's add,
layer_norm and cast read and write a float32 [P, D] three times more. The backward pass reads grad and the stream once for
grad_x (the stream's own gradient added inside, rounded again to the branch's dtype for its GEMM), grad_weight and
grad_bias; sums over rows are taken in two stages of fixed order, without atomics.
One block of vith14-224-b128's target encoder (32768 rows of 1280, branch and out bfloat16, stream float32):
  forward   P D (2 + 4 + 4 + 2) = 503 MB, 117 us at 4.3 TB/s; 8 P D = 0.3 GFLOP
  backward  P D (2 + 4 + 4 + 4 + 2) = 671 MB, 156 us; 13 P D = 0.5 GFLOP
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._column_sums import NUM_PROGRAMS, column_sums, split_rows


@triton.jit
def layer_norm_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, summed_ptr, mean_ptr, rstd_ptr, num_rows, D, eps,
                      HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
                      BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r, mask_d = row < num_rows, offs_d < D
    mask = mask_r[:, None] & mask_d[None, :]
    offs = row[:, None] * D + offs_d[None, :]
    h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        summed = h.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offs, summed, mask=mask)
        h = summed.to(tl.float32)
    mean = tl.sum(h, axis=1) / D
    mean += tl.sum(tl.where(mask, h - mean[:, None], 0.0), axis=1) / D  # exact for a constant row, whose variance is 0
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=1) / D + eps))
    out = centred * rstd[:, None]
    if HAS_WEIGHT:
        out *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=mask_r)
    tl.store(rstd_ptr + row, rstd, mask=mask_r)


@triton.jit
def layer_norm_backward_kernel(grad_ptr, grad_summed_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr,
                               grad_branch_ptr, partial_ptr, num_rows, rows_per_program, D,
                               HAS_SUMMED: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                               BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        grad_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        grad_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    begin = pid * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    for i in range(begin, end, BLOCK_R):
        row = i + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & mask_d[None, :]
        offs = row[:, None] * D + offs_d[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < end, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < end, other=0.0)
        normalised = (x - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            grad_weight += grad * normalised
            grad_bias += grad
            grad *= weight
        along = tl.sum(grad * normalised, axis=1) / D
        level = tl.sum(grad, axis=1) / D
        grad_x = (grad - level[:, None] - normalised * along[:, None]) * rstd[:, None]
        if HAS_SUMMED:
            grad_x += tl.load(grad_summed_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            tl.store(grad_branch_ptr + offs, grad_x.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(partial_ptr + 2 * pid * D + offs_d, tl.sum(grad_weight, axis=0), mask=mask_d)
        tl.store(partial_ptr + (2 * pid + 1) * D + offs_d, tl.sum(grad_bias, axis=0), mask=mask_d)


def blocks(D: int, num_warps: int) -> dict[str, int]:
    """Whole rows, 2048 numbers a program: D is at most 2048."""
    BLOCK_D = triton.next_power_of_2(D)
    return {"BLOCK_R": 2048 // BLOCK_D, "BLOCK_D": BLOCK_D, "num_warps": num_warps}


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
               out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> out [..., D] in out_dtype, mean [...], rstd [...] float32."""
    out, _, mean, rstd = add_layer_norm(x, None, weight, bias, eps, out_dtype)
    return out, mean, rstd


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
                   out_dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """-> out, x + residual in the residual's dtype, mean, rstd."""
    x, residual, weight, bias = contiguous(x, residual, weight, bias)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(residual)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        D, config = x.shape[-1], blocks(x.shape[-1], num_warps=4)
        layer_norm_kernel[triton.cdiv(mean.numel(), config["BLOCK_R"]),](
            x, residual, weight, bias, out, summed, mean, rstd, mean.numel(), D, eps, HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **config)
    return out, summed, mean, rstd


def layer_norm_backward(grad: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor,
                        rstd: Tensor, branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad of x [..., D] in x's dtype and again in branch_dtype, those of weight and bias [2, D] float32."""
    grad, grad_summed, x, weight, mean, rstd = contiguous(grad, grad_summed, x, weight, mean, rstd)
    num_rows, D = mean.numel(), x.shape[-1]
    config = blocks(D, num_warps=8)
    num_programs, rows_per_program = split_rows(num_rows, config["BLOCK_R"], NUM_PROGRAMS)
    grad_x, branch = torch.empty_like(x), torch.empty_like(x, dtype=branch_dtype) if branch_dtype else x.new_empty(0)
    partial = torch.empty(num_programs, 2, D if weight is not None else 0, dtype=torch.float32, device=x.device)
    if num_rows:
        layer_norm_backward_kernel[num_programs,](
            grad, grad_summed, x, weight, mean, rstd, grad_x, branch, partial, num_rows, rows_per_program, D,
            HAS_SUMMED=grad_summed is not None, HAS_BRANCH=branch_dtype is not None, HAS_WEIGHT=weight is not None, **config)
    return grad_x, branch, column_sums(partial)
