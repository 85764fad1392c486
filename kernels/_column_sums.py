"""Sums over rows in two stages of fixed order: each program adds up its rows, and here the programs' sums are added."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_PROGRAMS = 528  # of a first stage: a multiple of an H200's 132 SMs, and the same on every GPU


@triton.jit
def column_sums_kernel(partial_ptr, out_ptr, num_programs, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p in range(0, num_programs, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_programs)[:, None] & (offs_d < D)[None, :]
        total += tl.load(partial_ptr + offs_p[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_d, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=offs_d < D)


def split_rows(num_rows: int, BLOCK_R: int, num_programs: int) -> tuple[int, int]:
    """At most so many programs, of whole blocks of rows each -> programs, rows per program."""
    rows_per_program = triton.cdiv(triton.cdiv(num_rows, num_programs), BLOCK_R) * BLOCK_R
    return triton.cdiv(num_rows, max(rows_per_program, 1)), rows_per_program


def column_sums(partial: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """partial [G, ...] float32 -> its sum over G, rounded once to dtype."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    if out.numel():
        column_sums_kernel[triton.cdiv(out.numel(), 32),](partial, out, partial.shape[0], out.numel(),
                                                          BLOCK_P=32, BLOCK_D=32, num_warps=4)
    return out
