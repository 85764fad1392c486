"""SIGReg in one pass per direction: projection, characteristic function and sums, without the [N, K, J] tensor.

Forward: slices are the rows of the product A^T x^T, so that sums over samples stay within a row; one sine and cosine per
projection, then angle addition from knot to knot. Up to 512 rows are added in float32, and their sums in float64, in a
fixed order. Backward: the projection again, the sum over knots by Horner's rule in exp(i t_step p), then one GEMM with
A^T, in pieces of 32 MB. Eager PyTorch moves 27.5 times the tensor [V, N, K, J] and holds 6 of it; here it never exists.
Half-precision x is multiplied with directions rounded to its dtype; sums are float32 whatever the dtype.

lejepa-8x256x128-k1024, bfloat16, J = 16, forward and backward: 3 GEMMs of 0.54 GFLOP, 2.0 us at 790 TFLOP/s; 21 MB with
all partial sums, 4.9 us at 4.3 TB/s. What binds is float32 arithmetic: some 220 operations for each of 2.1 M
projections, 13.8 us at 33.4 T operations/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KNOTS = 16          # in one pass over the samples: a longer grid starts again from a sine and cosine of its own
ROWS = 512          # at most, added up in float32
PROGRAMS = 512      # wanted, for which fewer rows are added up
PIECE = 32 << 20    # bytes of the gradient of the projections that exist at a time


@triton.jit
def rotation(angle):
    """1 - cos and sin, to float32 accuracy for |angle| < 2^14; a rotation for any finite angle, NaN for infinity.

    Of a small angle both are known to their last bit, so that many rotations in a row do not drift.
    """
    turns = angle * 0.15915494309189535
    angle = tl.where(tl.abs(angle) < 16384.0, angle, (turns - tl.floor(turns)) * 6.283185307179586)
    # adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    shifted = angle * 0.6366197723675814 + 12582912.0
    quarters, quadrant = shifted - 12582912.0, shifted.to(tl.int32, bitcast=True)
    # pi / 2 in three parts; the product with the first, of 8 bits, is exact
    r = ((angle - quarters * 1.5703125) - quarters * 4.838109016418457e-4) + quarters * 1.58932547e-8
    z = r * r
    s = ((-1.951461827e-4 * z + 8.332155955e-3) * z - 1.666665454e-1) * (z * r) + r
    v = ((-2.447653416e-5 * z + 1.388772694e-3) * z - 4.166665485e-2) * (z * z) + 0.5 * z
    is_odd, is_back = (quadrant & 1) != 0, (quadrant & 2) != 0
    sine = tl.where(is_odd, 1.0 - v, s)
    versine = tl.where(is_odd, s, v)
    base = tl.where(is_odd, 1.0, tl.where(is_back, 2.0, 0.0))
    return base + tl.where(is_back, -versine, versine), tl.where(is_back, -sine, sine)


@triton.jit
def first_and_step(p, t_start, t_step, RATIO: tl.constexpr):
    """cos and sin of t_start p, 1 - cos and sin of t_step p; RATIO: t_start / t_step where one follows from the other."""
    versine, sine = rotation(t_start * p)
    if RATIO == 1.0:
        step_v, step_s = versine, sine
    elif RATIO == 0.5:
        step_v, step_s = 2.0 * sine * sine, 2.0 * sine - 2.0 * sine * versine
    else:
        step_v, step_s = rotation(t_step * p)
    return 1.0 - versine, sine, step_v, step_s


@triton.jit
def project(x_ptr, directions_ptr, row_mask_ptr, v, offs_k, offs_n, N, D, K, stride_xv, stride_xn, stride_mv,
            BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """directions^T x^T [BLOCK_K, BLOCK_N], and which rows count; 0 for those that do not, whatever they hold."""
    keep = offs_n < N
    p = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        directions = tl.load(directions_ptr + offs_d[None, :] * K + offs_k[:, None],
                             mask=(offs_d < D)[None, :] & (offs_k < K)[:, None], other=0.0)  # [BLOCK_K, BLOCK_D]
        x = tl.load(x_ptr + v * stride_xv + offs_n[None, :] * stride_xn + offs_d[:, None],
                    mask=(offs_d < D)[:, None] & keep[None, :], other=0.0)                   # [BLOCK_D, BLOCK_N]
        p = tl.dot(directions, x, p, input_precision="ieee")
    # after the product: operands masked by bytes make Triton multiply float32 as tf32 on sm_100
    if row_mask_ptr is not None:
        keep = keep & (tl.load(row_mask_ptr + v * stride_mv + offs_n, mask=keep, other=0) != 0)
        p = tl.where(keep[None, :], p, 0.0)
    return p, keep


@triton.jit
def sums_kernel(x_ptr, directions_ptr, row_mask_ptr, out_ptr, N, D, K, J, splits, rows_per_split, t_start, t_step,
                stride_xv, stride_xn, stride_mv, RATIO: tl.constexpr, KNOTS: tl.constexpr, KNOTS_P2: tl.constexpr,
                BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over the rows of a split, out [V, splits, 2, J, K]; a program has BLOCK_K slices and KNOTS knots."""
    pid, blocks, passes = tl.program_id(0).to(tl.int64), tl.cdiv(K, BLOCK_K), tl.cdiv(J, KNOTS)
    offs_k = pid % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    first_knot = pid // blocks % passes * KNOTS
    group = pid // (blocks * passes)                             # over V * splits
    v, split = group // splits, group % splits
    t_first = t_start + first_knot.to(tl.float32) * t_step
    offs_j = tl.arange(0, KNOTS_P2)
    sum_cos = tl.zeros([BLOCK_K, KNOTS_P2], tl.float32)
    sum_sin = tl.zeros([BLOCK_K, KNOTS_P2], tl.float32)
    for n in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        p, keep = project(x_ptr, directions_ptr, row_mask_ptr, v, offs_k, offs_n, N, D, K, stride_xv, stride_xn, stride_mv,
                          BLOCK_K, BLOCK_N, BLOCK_D)
        c, s, step_v, step_s = first_and_step(p, t_first, t_step, RATIO)
        # a row that does not count starts at 0, and turning leaves it there
        c, s = tl.where(keep[None, :], c, 0.0), tl.where(keep[None, :], s, 0.0)
        for j in range(KNOTS):
            sum_cos += tl.where(offs_j[None, :] == j, tl.sum(c, 1)[:, None], 0.0)
            sum_sin += tl.where(offs_j[None, :] == j, tl.sum(s, 1)[:, None], 0.0)
            c, s = c - c * step_v - s * step_s, s - s * step_v + c * step_s
    knot = first_knot + offs_j
    mask = ((offs_j < KNOTS) & (knot < J))[None, :] & (offs_k < K)[:, None]
    out_ptr += (group * 2 * J + knot)[None, :] * K + offs_k[:, None]
    tl.store(out_ptr, sum_cos, mask=mask)
    tl.store(out_ptr + tl.cast(J, tl.int64) * K, sum_sin, mask=mask)


@triton.jit
def add_splits_kernel(partials_ptr, out_ptr, splits, L, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr):
    """partials [V, splits, L] -> out [V, L]."""
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(L, BLOCK_L)
    v, offs_l = pid // blocks, pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_L], tl.float64)
    for split in range(0, splits, BLOCK_S):
        offs_s = split + tl.arange(0, BLOCK_S)
        partial = tl.load(partials_ptr + (v * splits + offs_s)[:, None] * L + offs_l[None, :],
                          mask=(offs_s < splits)[:, None] & (offs_l < L)[None, :], other=0.0)
        total += tl.sum(partial.to(tl.float64), 0)
    tl.store(out_ptr + v * L + offs_l, total.to(tl.float32), mask=offs_l < L)


@triton.jit
def projection_gradient_kernel(grad_sums_ptr, x_ptr, directions_ptr, row_mask_ptr, g_ptr, N, D, K, J, t_start, t_step,
                               stride_xv, stride_xn, stride_mv, RATIO: tl.constexpr,
                               BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """g [V, N, K], the gradient with respect to the projections."""
    pid, blocks_k, blocks_n = tl.program_id(0).to(tl.int64), tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    offs_k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = pid // blocks_k % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    v = pid // (blocks_k * blocks_n)
    p, keep = project(x_ptr, directions_ptr, row_mask_ptr, v, offs_k, offs_n, N, D, K, stride_xv, stride_xn, stride_mv,
                      BLOCK_K, BLOCK_N, BLOCK_D)
    c, s, step_v, step_s = first_and_step(p, t_start, t_step, RATIO)
    step_c = 1.0 - step_v
    # the real part of the sum over knots of t (grad_sin + i grad_cos) exp(i t p)
    real = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    imag = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    grad_cos_ptr = grad_sums_ptr + v * 2 * J * K + offs_k
    grad_sin_ptr = grad_cos_ptr + tl.cast(J, tl.int64) * K
    for i in range(J):
        j = J - 1 - i
        t = t_start + j.to(tl.float32) * t_step
        grad_cos = t * tl.load(grad_cos_ptr + j.to(tl.int64) * K, mask=offs_k < K, other=0.0)  # [BLOCK_K]
        grad_sin = t * tl.load(grad_sin_ptr + j.to(tl.int64) * K, mask=offs_k < K, other=0.0)  # [BLOCK_K]
        real, imag = (real * step_c - imag * step_s + grad_sin[:, None],
                      real * step_s + imag * step_c + grad_cos[:, None])
    g = tl.where(keep[None, :], real * c - imag * s, 0.0)
    tl.store(g_ptr + (v * N + offs_n)[None, :] * K + offs_k[:, None], g, mask=(offs_n < N)[None, :] & (offs_k < K)[:, None])


def sigreg_sums(x: Tensor, directions: Tensor, row_mask: Tensor | None, t_start: float, t_step: float,
                num_knots: int) -> Tensor:
    """x [V, N, D], directions [D, K], row_mask [V, N] -> [V, 2, J, K] float32."""
    (V, N, D), K, J = x.shape, directions.shape[1], num_knots
    if V * N * K == 0:
        return x.new_zeros(V, 2, J, K, dtype=torch.float32)
    x, directions, row_mask = _prepare(x, directions, row_mask)
    passes = triton.cdiv(J, KNOTS)
    knots, ratio = triton.cdiv(J, passes), _ratio(t_start, t_step) if passes == 1 else None
    config = _tile(x, ratio)
    programs, rows = V * passes * triton.cdiv(K, config["BLOCK_K"]), ROWS
    while rows > config["BLOCK_N"] and programs * triton.cdiv(N, rows) < PROGRAMS:
        rows //= 2
    splits = triton.cdiv(N, rows)
    partials = x.new_empty(V, splits, 2, J, K, dtype=torch.float32)
    sums_kernel[(programs * splits,)](
        x, directions, row_mask, partials, N, D, K, J, splits, rows, t_start, t_step, x.stride(0), x.stride(1),
        0 if row_mask is None else row_mask.stride(0), RATIO=ratio, KNOTS=knots, KNOTS_P2=triton.next_power_of_2(knots),
        **config)
    if splits == 1:
        return partials[:, 0]
    sums, L = x.new_empty(V, 2, J, K, dtype=torch.float32), 2 * J * K
    add_splits_kernel[(V * triton.cdiv(L, 256),)](partials, sums, splits, L, BLOCK_S=16, BLOCK_L=256)
    return sums


def sigreg_sums_backward(grad_sums: Tensor, x: Tensor, directions: Tensor, row_mask: Tensor | None, t_start: float,
                         t_step: float) -> Tensor:
    """The gradient with respect to x, [V, N, D]; of the projections in bfloat16 for bfloat16, else in float32."""
    (V, N, D), K, J = x.shape, directions.shape[1], grad_sums.shape[2]
    if x.numel() == 0 or K == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    x, rounded, row_mask = _prepare(x, directions, row_mask)
    grad_sums, ratio = grad_sums.contiguous(), _ratio(t_start, t_step)
    config = _tile(x, ratio)
    # float16 has no room for gradients of a mean
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    grad_x, transposed = torch.empty(V, N, D, dtype=dtype, device=x.device), rounded.to(dtype).T
    height = max(PIECE // (K * dtype.itemsize), 1)                 # rows of whole groups, or of one
    groups, rows = max(height // N, 1), min(height, N)
    room = x.new_empty(groups * rows * K, dtype=dtype)
    for v in range(0, V, groups):
        for n in range(0, N, rows):
            piece, out = x[v:v + groups, n:n + rows], grad_x[v:v + groups, n:n + rows]
            mask = None if row_mask is None else row_mask[v:v + groups, n:n + rows]
            num_groups, num_rows, _ = piece.shape
            g = room[:num_groups * num_rows * K].view(-1, K)
            grid = num_groups * triton.cdiv(num_rows, config["BLOCK_N"]) * triton.cdiv(K, config["BLOCK_K"])
            projection_gradient_kernel[(grid,)](
                grad_sums[v:], piece, rounded, mask, g, num_rows, D, K, J, t_start, t_step, x.stride(0), x.stride(1),
                0 if mask is None else mask.stride(0), RATIO=ratio, **config)
            torch.mm(g, transposed, out=out.view(-1, D))
    return grad_x.to(x.dtype)


def _prepare(x: Tensor, directions: Tensor, row_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, directions.to(x.dtype).contiguous(), None if row_mask is None else row_mask.contiguous().view(torch.uint8)


def _tile(x: Tensor, ratio: float | None) -> dict:
    """What fits into registers: four numbers are live from knot to knot for each of 16 or 32 projections a thread."""
    D = x.shape[2]
    if x.dtype == torch.float32:  # no tensor cores
        K, N, wide, num_warps = 64, 64, 32, 8
    elif ratio is None or D < 32:  # two angles, or a loop that ends at once: more is live
        K, N, wide, num_warps = 128, 32, 64, 8
    elif D > 256:  # bound by the reading of operands, not by arithmetic
        K, N, wide, num_warps = 128, 64, 64, 8
    else:
        K, N, wide, num_warps = 64, 32, 64, 4
    return {"BLOCK_K": K, "BLOCK_N": N, "BLOCK_D": min(max(triton.next_power_of_2(D), 16), wide), "num_warps": num_warps}


def _ratio(t_start: float, t_step: float) -> float | None:
    """t_start / t_step where a kernel can use it."""
    return next((ratio for ratio in (1.0, 0.5) if abs(t_start - ratio * t_step) <= 1e-9 * t_step), None)
