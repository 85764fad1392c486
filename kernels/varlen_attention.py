"""Attention within packed sequences, forward: rotary positions, head widths between powers of two, frame-causal.

A head of width d is computed as one or two blocks of columns (80 = 64 + 16, 88 -> 64 + 32), never padded from 80 to 128.
Two schedules. Short, all keys of a sequence in one block of at most 128: one pass, nothing is rescaled, and q and k are
rotated as they are loaded. Long: online softmax over blocks of keys; q and k are rotated once into scratch, since a
table read at every block of keys (8 R bytes per key, four times the key) would cost more than the attention.
Frame-causal attention never loads a block of keys that no query of the block sees, and masks only the blocks that some
of them see in part. Heads of 32 columns and less are bound by the exponential, not by the tensor cores: a quarter of
their columns takes 2^x as a polynomial on the FMA pipes.

Bytes: q, k, v read and out written, 4 P H d x element size, and 4 P H of lse; rotated and long: 4 P H d more elements.
FLOPs: 4 H d sum n_q n_k. V-JEPA 2 ViT-L/16, 16 frames (24 clips of 2048 tokens, 16 heads of 64, bfloat16): 412 GFLOP
and 406 MB (811 MB rotated). Floor 522 us at 790 TFLOP/s (the exponential: 436 us), plus 94 us of rotation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuned import capability, tuned

_LOWEST = tl.constexpr(-1e30)  # a floor under the running maximum: without keys 2^(-inf - maximum) is 0, never NaN
_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def polynomial_exp2(x):
    """2^x for x <= 127 without the special function unit: relative error 1.0e-4, 0 where x <= -126."""
    x = tl.maximum(x, -126.0)
    shifted = x + 12582912.0             # 1.5 * 2^23: the nearest whole number, in the low bits
    f = x - (shifted - 12582912.0)       # [-0.5, 0.5]
    y = ((0.0550089329 * f + 0.2422109544) * f + 0.6932829022) * f + 1.0
    y = (y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return y - 1.1754943508222875e-38    # 2^-126, what the floor of x leaves


@triton.jit
def halves(x):
    """Columns [0, N/2) and [N/2, N) of x [M, N]; both stay in their registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def whole(low, high):
    return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [low.shape[0], 2 * low.shape[1]])


@triton.jit
def exp2(x, POLYNOMIAL: tl.constexpr):
    """2^x; one column in POLYNOMIAL (0: none, 2, 4) as a polynomial."""
    if POLYNOMIAL == 0:
        return tl.exp2(x)
    low, high = halves(x)
    if POLYNOMIAL == 2:
        return whole(tl.exp2(low), polynomial_exp2(high))
    middle, last = halves(high)
    return whole(tl.exp2(low), whole(tl.exp2(middle), polynomial_exp2(last)))


@triton.jit
def sequence(cu_seqlens_ptr, s):
    """First row and number of rows of sequence s."""
    first = tl.load(cu_seqlens_ptr + s)
    return first.to(tl.int64), tl.load(cu_seqlens_ptr + s + 1) - first


@triton.jit
def num_visible(query, n_q, n_k, frame_size, FRAME_CAUSAL: tl.constexpr):
    """How many keys, from the first, a query attends to."""
    if FRAME_CAUSAL:
        return tl.minimum(tl.maximum(query + (n_k - n_q) + frame_size, 0) // frame_size * frame_size, n_k)
    else:
        return query * 0 + n_k


@triton.jit
def load_columns(x_ptr, row, count, stride, D: tl.constexpr, BLOCK_R: tl.constexpr, START: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    offs_r, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D) + START
    mask = (offs_r < count)[:, None] & (offs_d < D)[None, :]
    return tl.load(x_ptr + row * stride * D + offs_r[:, None] * (stride * D) + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_head(x_ptr, row, count, stride, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D0: tl.constexpr,
              BLOCK_D1: tl.constexpr):
    """Rows row, row + 1, ... of a head, zero from count on, in two blocks of columns, the second idle without BLOCK_D1."""
    x0 = load_columns(x_ptr, row, count, stride, D, BLOCK_R, 0, BLOCK_D0)
    x1 = x0
    if BLOCK_D1:
        x1 = load_columns(x_ptr, row, count, stride, D, BLOCK_R, BLOCK_D0, BLOCK_D1)
    return x0, x1


@triton.jit
def store_columns(x_ptr, x, row, count, stride, D: tl.constexpr, START: tl.constexpr):
    offs_r, offs_d = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1]) + START
    mask = (offs_r < count)[:, None] & (offs_d < D)[None, :]
    tl.store(x_ptr + row * stride * D + offs_r[:, None] * (stride * D) + offs_d[None, :], x.to(x_ptr.dtype.element_ty),
             mask=mask)


@triton.jit
def store_head(x_ptr, x0, x1, row, count, stride, D: tl.constexpr, BLOCK_D1: tl.constexpr):
    store_columns(x_ptr, x0, row, count, stride, D, 0)
    if BLOCK_D1:
        store_columns(x_ptr, x1, row, count, stride, D, x0.shape[1])


@triton.jit
def swap(x):
    """Column c ^ 1 in place of column c."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(odd, even), [x.shape[0], x.shape[1]])


@triton.jit
def rotate_columns(x, rotary_ptr, row, count, R: tl.constexpr, START: tl.constexpr, TRANSPOSED: tl.constexpr):
    offs_r, offs_d = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1]) + START
    mask = (offs_r < count)[:, None] & (offs_d < R)[None, :]
    rotary_ptr += row * (2 * R) + offs_r[:, None] * (2 * R) + offs_d[None, :]
    # the two maps load apart, so that the compiler does not keep the table in registers from one to the other
    policy: tl.constexpr = "evict_first" if TRANSPOSED else "evict_last"
    cos = tl.load(rotary_ptr, mask=mask, other=1.0, eviction_policy=policy)
    sin = tl.load(rotary_ptr + R, mask=mask, other=0.0, eviction_policy=policy)
    y = x.to(tl.float32)
    y = y * cos + (swap(y * sin) if TRANSPOSED else swap(y) * sin)
    return y.to(x.dtype)


@triton.jit
def rotate_head(x0, x1, rotary_ptr, row, count, R: tl.constexpr, BLOCK_D1: tl.constexpr, TRANSPOSED: tl.constexpr):
    """x[c] * rotary[0, c] + x[c ^ 1] * rotary[1, c] in the first R columns, or the transposed map; in x's dtype."""
    if R > 0:
        x0 = rotate_columns(x0, rotary_ptr, row, count, R, 0, TRANSPOSED)
    if BLOCK_D1 and R > x0.shape[1]:
        x1 = rotate_columns(x1, rotary_ptr, row, count, R, x0.shape[1], TRANSPOSED)
    return x0, x1


@triton.jit
def zeros_head(BLOCK_R: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr):
    x0 = tl.zeros([BLOCK_R, BLOCK_D0], tl.float32)
    x1 = x0
    if BLOCK_D1:
        x1 = tl.zeros([BLOCK_R, BLOCK_D1], tl.float32)
    return x0, x1


@triton.jit
def dot_heads(a0, a1, b0, b1, BLOCK_D1: tl.constexpr):
    """a b^T over the columns of a head."""
    c = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if BLOCK_D1:
        c = tl.dot(a1, tl.trans(b1), c, input_precision="ieee")
    return c


@triton.jit
def add_dot(c0, c1, a, b0, b1, BLOCK_D1: tl.constexpr):
    """c + a b for each column of a head, a rounded to b's dtype."""
    c0 = tl.dot(a.to(b0.dtype), b0, c0, input_precision="ieee")
    if BLOCK_D1:
        c1 = tl.dot(a.to(b1.dtype), b1, c1, input_precision="ieee")
    return c0, c1


@triton.jit
def store_result(out_ptr, lse_ptr, acc0, acc1, maximum, total, row, count, P_q, H, head, D: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_D1: tl.constexpr):
    inverse = (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    store_head(out_ptr + head * D, acc0 * inverse, acc1 * inverse, row, count, H, D, BLOCK_D1)
    offs_m = tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head * P_q + row + offs_m, maximum * _LN2 + tl.log(total), mask=offs_m < count)


@triton.jit
def short_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, rotary_q_ptr, rotary_k_ptr,
                 P_q, H, num_blocks, stride_qp, stride_qh, stride_kp, stride_kh, stride_vp, stride_vh, scale,
                 frame_size, D: tl.constexpr, R_Q: tl.constexpr, R_K: tl.constexpr, FRAME_CAUSAL: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr,
                 POLYNOMIAL: tl.constexpr):
    """One block of queries of one head against all keys of its sequence."""
    pid = tl.program_id(0)
    head = (pid // num_blocks % H).to(tl.int64)
    row_q, n_q = sequence(cu_seqlens_q_ptr, pid // num_blocks // H)
    row_k, n_k = sequence(cu_seqlens_k_ptr, pid // num_blocks // H)
    start_m = pid % num_blocks * BLOCK_M
    if start_m >= n_q:
        return
    row_q += start_m
    q0, q1 = load_head(q_ptr + head * stride_qh * D, row_q, n_q - start_m, stride_qp, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
    k0, k1 = load_head(k_ptr + head * stride_kh * D, row_k, n_k, stride_kp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
    v0, v1 = load_head(v_ptr + head * stride_vh * D, row_k, n_k, stride_vp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
    q0, q1 = rotate_head(q0, q1, rotary_q_ptr, row_q, n_q - start_m, R_Q, BLOCK_D1, False)
    k0, k1 = rotate_head(k0, k1, rotary_k_ptr, row_k, n_k, R_K, BLOCK_D1, False)

    scale_log2 = scale * _LOG2E
    visible = num_visible(start_m + tl.arange(0, BLOCK_M), n_q, n_k, frame_size, FRAME_CAUSAL)
    s = dot_heads(q0, q1, k0, k1, BLOCK_D1)                                         # [BLOCK_M, BLOCK_N]
    s = tl.where(tl.arange(0, BLOCK_N)[None, :] < visible[:, None], s, float("-inf"))
    maximum = tl.maximum(tl.max(s, 1) * scale_log2, _LOWEST)
    p = exp2(s * scale_log2 - maximum[:, None], POLYNOMIAL)
    acc0, acc1 = zeros_head(BLOCK_M, BLOCK_D0, BLOCK_D1)
    acc0, acc1 = add_dot(acc0, acc1, p, v0, v1, BLOCK_D1)
    store_result(out_ptr, lse_ptr, acc0, acc1, maximum, tl.sum(p, 1), row_q, n_q - start_m, P_q, H, head, D, BLOCK_M,
                 BLOCK_D1)


@triton.jit
def long_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
                P_q, H, num_blocks, stride_qp, stride_qh, stride_kp, stride_kh, stride_vp, stride_vh, scale,
                frame_size, D: tl.constexpr, FRAME_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """One block of queries of one head, over blocks of keys."""
    pid = tl.program_id(0)
    head = (pid // num_blocks % H).to(tl.int64)
    row_q, n_q = sequence(cu_seqlens_q_ptr, pid // num_blocks // H)
    row_k, n_k = sequence(cu_seqlens_k_ptr, pid // num_blocks // H)
    start_m = (num_blocks - 1 - pid % num_blocks) * BLOCK_M  # frame-causal: the longest loops first
    if start_m >= n_q:
        return
    row_q += start_m
    k_ptr += head * stride_kh * D
    v_ptr += head * stride_vh * D
    q0, q1 = load_head(q_ptr + head * stride_qh * D, row_q, n_q - start_m, stride_qp, D, BLOCK_M, BLOCK_D0, BLOCK_D1)

    scale_log2 = scale * _LOG2E
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    visible = num_visible(offs_m, n_q, n_k, frame_size, FRAME_CAUSAL)
    end_whole = num_visible(start_m, n_q, n_k, frame_size, FRAME_CAUSAL) // BLOCK_N * BLOCK_N
    end = num_visible(tl.minimum(start_m + BLOCK_M, n_q) - 1, n_q, n_k, frame_size, FRAME_CAUSAL)
    maximum = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0, acc1 = zeros_head(BLOCK_M, BLOCK_D0, BLOCK_D1)
    for MASKED in tl.static_range(2):  # the blocks that every query sees, then those that some see in part
        for start_n in tl.range(end_whole if MASKED else 0, end if MASKED else end_whole, BLOCK_N):
            k0, k1 = load_head(k_ptr, row_k + start_n, n_k - start_n, stride_kp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
            s = dot_heads(q0, q1, k0, k1, BLOCK_D1)                                 # [BLOCK_M, BLOCK_N]
            if MASKED:
                s = tl.where((start_n + offs_n)[None, :] < visible[:, None], s, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(s, 1) * scale_log2)
            p = exp2(s * scale_log2 - new_maximum[:, None], POLYNOMIAL)
            shrink = tl.exp2(maximum - new_maximum)
            total = total * shrink + tl.sum(p, 1)
            v0, v1 = load_head(v_ptr, row_k + start_n, n_k - start_n, stride_vp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
            acc0 *= shrink[:, None]
            if BLOCK_D1:
                acc1 *= shrink[:, None]
            acc0, acc1 = add_dot(acc0, acc1, p, v0, v1, BLOCK_D1)
            maximum = new_maximum
    store_result(out_ptr, lse_ptr, acc0, acc1, maximum, total, row_q, n_q - start_m, P_q, H, head, D, BLOCK_M, BLOCK_D1)


@triton.jit
def rotate_kernel(x_ptr, out_ptr, rotary_ptr, P, H, stride_p, stride_h, D: tl.constexpr, R: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr):
    head = (tl.program_id(0) % H).to(tl.int64)  # the heads of a row one after the other, for the table's sake
    row = (tl.program_id(0) // H).to(tl.int64) * BLOCK_R
    x0, x1 = load_head(x_ptr + head * stride_h * D, row, P - row, stride_p, D, BLOCK_R, BLOCK_D0, BLOCK_D1)
    x0, x1 = rotate_head(x0, x1, rotary_ptr, row, P - row, R, BLOCK_D1, False)
    store_head(out_ptr + head * D, x0, x1, row, P - row, H, D, BLOCK_D1)


def head_blocks(d: int) -> dict:
    """A head of width d as one block of columns, or as two where that is fewer; none is wider than 128."""
    whole = max(triton.next_power_of_2(d), 16)
    first = whole // 2
    rest = max(triton.next_power_of_2(d - first), 16) if d > first else 0
    is_split = 0 < rest < first or whole > 128
    return dict(BLOCK_D0=first, BLOCK_D1=rest) if is_split else dict(BLOCK_D0=whole, BLOCK_D1=0)


def block_size(length: int, largest: int = 128) -> int:
    return max(16, min(triton.next_power_of_2(length), largest))


def fits_one_block(d: int, max_seqlen_k: int, num_elements: int) -> bool:
    """All keys of a sequence in one block of at most 128 keys and num_elements numbers."""
    return max_seqlen_k <= 128 and block_size(max_seqlen_k) * sum(head_blocks(d).values()) <= num_elements


def config(kind: str, d: int, dtype: torch.dtype, **default) -> dict:
    """A kernel's constants: `default`, unless this GPU has measured ones."""
    key = f"d{d}-{kind}-{str(dtype).removeprefix('torch.')}"
    return head_blocks(d) | default | tuned("varlen_attention", key)


def float32_config(kind: str, d: int) -> dict:
    """Small blocks: float32 is multiplied exactly, not by the tensor cores, with whole rows in registers."""
    BLOCK_M, BLOCK_N = 32 if d <= 64 else 16, 32 if d <= 96 else 16
    return config(kind, d, torch.float32, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, POLYNOMIAL=0, num_warps=8, num_stages=2,
                  maxnreg=255)


def _short_config(d: int, max_seqlen_q: int, max_seqlen_k: int, dtype: torch.dtype) -> dict | None:
    """None where the keys of a sequence do not fit one block."""
    is_float32, is_hopper = dtype == torch.float32, capability() >= 90
    if d > 128 or not fits_one_block(d, max_seqlen_k, 3072 if is_float32 else 16384 if is_hopper else 4096):
        return None
    BLOCK_M, BLOCK_N = block_size(max_seqlen_q, 32 if is_float32 else 128 if is_hopper else 64), block_size(max_seqlen_k)
    return config(f"short{BLOCK_N}", d, dtype, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, POLYNOMIAL=_polynomial(d, BLOCK_N, dtype),
                  num_warps=8 if BLOCK_M == 128 else 4, num_stages=1)


def _long_config(d: int, dtype: torch.dtype) -> dict:
    if dtype == torch.float32:
        return float32_config("long", d)
    BLOCK_M, BLOCK_N, num_stages = (128, 64, 3) if d <= 128 else (64, 32, 2)
    return config("long", d, dtype, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, POLYNOMIAL=_polynomial(d, BLOCK_N, dtype),
                  num_warps=4 if d <= 64 else 8, num_stages=num_stages)


def _polynomial(d: int, BLOCK_N: int, dtype: torch.dtype) -> int:
    return 4 if d <= 32 and BLOCK_N >= 64 and dtype != torch.float32 else 0


def in_heads(x: Tensor) -> tuple[Tensor, int, int]:
    """x [P, H, d] and its strides counted in heads, so that the kernel knows their alignment; a copy where they are none."""
    d = x.shape[2]
    if x.stride(2) != 1 or x.stride(0) % d or x.stride(1) % d:
        x = x.contiguous()
    return x, x.stride(0) // d, x.stride(1) // d


def rotated(x: Tensor, rotary: Tensor | None) -> Tensor:
    """x [P, H, d] turned by rotary [P, 2, R], contiguous; x itself without."""
    if rotary is None or x.numel() == 0:
        return x
    (P, H, d), BLOCK_R = x.shape, 32
    x, *strides = in_heads(x)
    out = torch.empty(P, H, d, dtype=x.dtype, device=x.device)
    rotate_kernel[(triton.cdiv(P, BLOCK_R) * H,)](x, out, rotary.contiguous(), P, H, *strides, D=d, R=rotary.shape[2],
                                                  BLOCK_R=BLOCK_R, **head_blocks(d), num_warps=4)
    return out


def rotary_columns(rotary: Tensor | None) -> int:
    return 0 if rotary is None else rotary.shape[2]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                     max_seqlen_k: int, scale: float, rotary_q: Tensor | None, rotary_k: Tensor | None,
                     frame_size: int) -> tuple[Tensor, Tensor]:
    """q [P_q, H, d], k, v [P_k, H, d] -> out as q, lse [H, P_q] float32."""
    (P_q, H, d), num_sequences = q.shape, cu_seqlens_q.shape[0] - 1
    out = torch.empty(P_q, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, P_q, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    short = _short_config(d, max_seqlen_q, max_seqlen_k, q.dtype)
    constants = short or _long_config(d, q.dtype)
    if not short:
        q, k = rotated(q, rotary_q), rotated(k, rotary_k)
    (q, *strides_q), (k, *strides_k), (v, *strides_v) = (in_heads(x) for x in (q, k, v))
    num_blocks = triton.cdiv(max_seqlen_q, constants["BLOCK_M"])
    grid = (num_blocks * H * num_sequences,)
    tensors = q, k, v, out, lse, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    numbers = P_q, H, num_blocks, *strides_q, *strides_k, *strides_v, scale, frame_size
    constants |= dict(D=d, FRAME_CAUSAL=frame_size > 0)
    if short:
        tables = (None if rotary is None else rotary.contiguous() for rotary in (rotary_q, rotary_k))
        short_kernel[grid](*tensors, *tables, *numbers, R_Q=rotary_columns(rotary_q), R_K=rotary_columns(rotary_k),
                           **constants)
    else:
        long_kernel[grid](*tensors, *numbers, **constants)
    return out, lse


def varlen_attention_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, rotary: Tensor | None,
                         frame_size: int) -> tuple[Tensor, Tensor]:
    """qkv [P, 3, H, d] -> out [P, H, d], lse [H, P] float32."""
    return varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, rotary, rotary,
                            frame_size)
