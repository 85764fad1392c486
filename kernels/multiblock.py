"""Multi-block masks, a program per sample: blocks drawn, counted and drawn again without leaving registers.

Saves the 20 rounds of some 100 launches that eager PyTorch takes, since without a host it cannot know that the first
attempt was enough, and the upload of index lists. Bytes: B (M + E) rows columns, written once; FLOPs: none that count.
vith14-224-b128 (M = 4, E = 1, 16x16): 0.16 MB, 0.04 us at 4.3 TB/s, so a launch is what it costs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ATTEMPTS = tl.constexpr(20)


@triton.jit
def between(LOW: tl.constexpr, HIGH: tl.constexpr, u):
    return tl.full(u.shape, LOW, tl.float64) + u * tl.full(u.shape, HIGH - LOW, tl.float64)


@triton.jit
def side(area):
    """The square root as an integer, halves to even."""
    return ((tl.sqrt(area) + 6755399441055744.0) - 6755399441055744.0).to(tl.int32)


@triton.jit
def draw(sample, step, seed, attempt, block, is_context, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
         TARGET_LOW: tl.constexpr, TARGET_HIGH: tl.constexpr, CONTEXT_LOW: tl.constexpr, CONTEXT_HIGH: tl.constexpr,
         ASPECT_LOW: tl.constexpr, ASPECT_HIGH: tl.constexpr):
    """One block each of a sample, [BLOCK_K, BLOCK_T]."""
    word = tl.zeros_like(block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(word + sample.to(tl.uint32), word + step.to(tl.uint32), block.to(tl.uint32),
                                    word + attempt, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    u, v = (w0 >> 8).to(tl.float64) * 5.9604644775390625e-08, (w1 >> 8).to(tl.float64) * 5.9604644775390625e-08
    scale = tl.where(is_context, between(CONTEXT_LOW, CONTEXT_HIGH, u), between(TARGET_LOW, TARGET_HIGH, u))
    aspect = tl.where(is_context, tl.full(u.shape, 1.0, tl.float64), between(ASPECT_LOW, ASPECT_HIGH, v))
    kept = tl.floor((ROWS * COLUMNS) * scale)
    height = tl.minimum(tl.maximum(side(kept * aspect), 1), ROWS)
    width = tl.minimum(tl.maximum(side(kept / aspect), 1), COLUMNS)
    # a target never covers the whole grid: the longer side gives way
    is_whole = ((height == ROWS) & (width == COLUMNS) & (is_context == 0)).to(tl.int32)
    if ROWS >= COLUMNS:
        height -= is_whole
    else:
        width -= is_whole
    top = ((w2.to(tl.int64) * (ROWS - height + 1)) >> 32).to(tl.int32)
    left = ((w3.to(tl.int64) * (COLUMNS - width + 1)) >> 32).to(tl.int32)
    return ((row >= top[:, None]) & (row < (top + height)[:, None])
            & (column >= left[:, None]) & (column < (left + width)[:, None]))


@triton.jit(do_not_specialize=["seed", "first_sample"])
def multiblock_kernel(step_ptr, seed: tl.int64, first_sample: tl.int64, out_ptr, min_keep, M: tl.constexpr, K: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, TARGET_LOW: tl.constexpr, TARGET_HIGH: tl.constexpr,
                      CONTEXT_LOW: tl.constexpr, CONTEXT_HIGH: tl.constexpr, ASPECT_LOW: tl.constexpr,
                      ASPECT_HIGH: tl.constexpr, ALLOW_OVERLAP: tl.constexpr, BLOCK_K: tl.constexpr,
                      BLOCK_T: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr)
    block, token = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    is_context = block >= M
    is_last, is_target = (block < K) & is_context, (block < M)[:, None]
    row, column, is_token = (token // COLUMNS)[None, :], (token % COLUMNS)[None, :], (token < ROWS * COLUMNS)[None, :]
    attempt, fewest = 0, 0
    inside = tl.zeros([BLOCK_K, BLOCK_T], tl.int1)
    free = tl.zeros([1, BLOCK_T], tl.int1)
    while (attempt < ATTEMPTS) & (fewest <= min_keep):
        inside = draw(first_sample + pid, step, seed, attempt, block, is_context, row, column, ROWS, COLUMNS,
                      TARGET_LOW, TARGET_HIGH, CONTEXT_LOW, CONTEXT_HIGH, ASPECT_LOW, ASPECT_HIGH)
        free = is_token
        if not ALLOW_OVERLAP:
            free = free & (tl.max((inside & is_target).to(tl.int32), 0) == 0)[None, :]
        inside = inside & (is_target | free)
        counts = tl.sum(inside.to(tl.int32), 1)
        fewest = tl.min(tl.where(is_last, counts, ROWS * COLUMNS), 0)
        attempt += 1
    if fewest <= min_keep:
        inside = (inside & is_target) | (free & (is_target == 0))
        if (ALLOW_OVERLAP == 0) & (tl.sum(free.to(tl.int32)) <= min_keep):
            first = tl.max((inside & (block == 0)[:, None]).to(tl.int32), 0)[None, :] != 0
            inside = (first & is_target) | ((first == 0) & (is_target == 0))
    offs = (pid * K + block)[:, None] * (ROWS * COLUMNS) + token[None, :]
    tl.store(out_ptr + offs, inside.to(tl.uint8), mask=(block < K)[:, None] & is_token)


def multiblock(step: Tensor, seed: int, first_sample: int, batch_size: int, rows: int, columns: int, num_targets: int,
               num_contexts: int, target_scale: list[float], context_scale: list[float], aspect_ratio: list[float],
               min_keep: int, allow_overlap: bool) -> Tensor:
    """step 0-dim int64 -> [B, M + E, rows, columns] bool."""
    K = num_targets + num_contexts
    out = torch.empty(batch_size, K, rows, columns, dtype=torch.bool, device=step.device)
    multiblock_kernel[(batch_size,)](
        step, seed, first_sample, out.view(torch.uint8), min_keep, M=num_targets, K=K, ROWS=rows, COLUMNS=columns,
        TARGET_LOW=target_scale[0], TARGET_HIGH=target_scale[1], CONTEXT_LOW=context_scale[0],
        CONTEXT_HIGH=context_scale[1], ASPECT_LOW=aspect_ratio[0], ASPECT_HIGH=aspect_ratio[1],
        ALLOW_OVERLAP=allow_overlap, BLOCK_K=triton.next_power_of_2(K), BLOCK_T=triton.next_power_of_2(rows * columns),
        enable_fp_fusion=False)  # the host rounds after every operation
    return out
