"""Attention within packed sequences, backward: the gradient of q, k, v from out and lse, deterministic, no atomics.

Short (all keys of a sequence in one block): one kernel per sequence and head makes dq, dk and dv from one product q k^T,
takes rowsum(grad * out) on the way, and turns dq and dk back as it stores them. Long: q and k are rotated into scratch
again rather than kept from the forward, rowsum(grad * out) has a kernel of its own, one kernel makes dk and dv over
blocks of queries, one makes dq over blocks of keys. A packed dqkv is written in place, never concatenated.

Bytes: grad, out, q, k, v read and dq, dk, dv written, 8 P H d x element size; long: 4 P H d elements more for the second
kernel's reads, and 4 P H d more where rotated. FLOPs: 10 H d sum n_q n_k, long 14 (two products are taken twice).
V-JEPA ViT-L/16 predictor (48 sequences of 1159 tokens, 16 heads of 24, bfloat16): floors in microseconds at 4.3 TB/s
and 790 TFLOP/s: see each launcher.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuned import capability
from .varlen_attention import (
    _LOG2E,
    add_dot,
    block_size,
    config,
    dot_heads,
    exp2,
    fits_one_block,
    float32_config,
    head_blocks,
    in_heads,
    load_head,
    num_visible,
    rotary_columns,
    rotate_head,
    rotated,
    sequence,
    store_head,
    zeros_head,
)


@triton.jit
def first_query(key, n_q, n_k, frame_size, FRAME_CAUSAL: tl.constexpr):
    """The first query that attends to a key (all later ones do), negative before the first row."""
    if FRAME_CAUSAL:
        return key // frame_size * frame_size - (n_k - n_q)
    else:
        return key * 0


@triton.jit
def load_lse(lse_ptr, count, BLOCK_M: tl.constexpr, EXACT: tl.constexpr):
    """As `weights` takes it; infinite beyond count and where a query has no key, so that they are 0 there."""
    offs_m = tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < count, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse if EXACT else lse * _LOG2E)


@triton.jit
def weights(s, lse, scale, EXACT: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """exp(scale * s - lse); EXACT: the difference before the change of base, else lse comes in powers of two."""
    if EXACT:
        return tl.exp2((s * scale - lse) * _LOG2E)
    else:
        return exp2(s * (scale * _LOG2E) - lse, POLYNOMIAL)


@triton.jit
def dot_rows(a0, a1, b0, b1, BLOCK_D1: tl.constexpr):
    """rowsum(a * b) over the columns of a head."""
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if BLOCK_D1:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total


@triton.jit
def store_turned(x_ptr, x0, x1, rotary_ptr, row, count, stride, factor, D: tl.constexpr, R: tl.constexpr,
                 BLOCK_D1: tl.constexpr):
    """factor * x turned back."""
    x0 *= factor
    if BLOCK_D1:
        x1 *= factor
    x0, x1 = rotate_head(x0, x1, rotary_ptr, row, count, R, BLOCK_D1, True)
    store_head(x_ptr, x0, x1, row, count, stride, D, BLOCK_D1)


@triton.jit
def short_backward_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
                          rotary_q_ptr, rotary_k_ptr, dq_ptr, dk_ptr, dv_ptr, P_q, H, stride_qp, stride_qh, stride_kp,
                          stride_kh, stride_vp, stride_vh, stride_dp, scale, frame_size, D: tl.constexpr,
                          R_Q: tl.constexpr, R_K: tl.constexpr, FRAME_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr,
                          POLYNOMIAL: tl.constexpr):
    """All of one head of one sequence."""
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head = (tl.program_id(0) % H).to(tl.int64)
    row_q, n_q = sequence(cu_seqlens_q_ptr, tl.program_id(0) // H)
    row_k, n_k = sequence(cu_seqlens_k_ptr, tl.program_id(0) // H)
    k0, k1 = load_head(k_ptr + head * stride_kh * D, row_k, n_k, stride_kp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
    v0, v1 = load_head(v_ptr + head * stride_vh * D, row_k, n_k, stride_vp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
    k0, k1 = rotate_head(k0, k1, rotary_k_ptr, row_k, n_k, R_K, BLOCK_D1, False)

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first = tl.where(offs_n < n_k, first_query(offs_n, n_q, n_k, frame_size, FRAME_CAUSAL), n_q)
    dk0, dk1 = zeros_head(BLOCK_N, BLOCK_D0, BLOCK_D1)
    dv0, dv1 = zeros_head(BLOCK_N, BLOCK_D0, BLOCK_D1)
    for start_m in tl.range(0, n_q, BLOCK_M):
        row, count = row_q + start_m, n_q - start_m
        q0, q1 = load_head(q_ptr + head * stride_qh * D, row, count, stride_qp, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
        g0, g1 = load_head(grad_ptr + head * D, row, count, H, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
        o0, o1 = load_head(out_ptr + head * D, row, count, H, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
        q0, q1 = rotate_head(q0, q1, rotary_q_ptr, row, count, R_Q, BLOCK_D1, False)
        delta = dot_rows(g0, g1, o0, o1, BLOCK_D1)
        lse = load_lse(lse_ptr + head * P_q + row, count, BLOCK_M, EXACT)
        s = dot_heads(k0, k1, q0, q1, BLOCK_D1)                                     # [BLOCK_N, BLOCK_M]
        p = weights(s, lse[None, :], scale, EXACT, POLYNOMIAL)
        p = tl.where(first[:, None] <= (start_m + offs_m)[None, :], p, 0.0)
        dv0, dv1 = add_dot(dv0, dv1, p, g0, g1, BLOCK_D1)
        ds = p * (dot_heads(v0, v1, g0, g1, BLOCK_D1) - delta[None, :])
        ds = ds.to(q0.dtype)
        dk0, dk1 = add_dot(dk0, dk1, ds, q0, q1, BLOCK_D1)
        dq0, dq1 = zeros_head(BLOCK_M, BLOCK_D0, BLOCK_D1)
        dq0, dq1 = add_dot(dq0, dq1, tl.trans(ds), k0, k1, BLOCK_D1)
        store_turned(dq_ptr + head * D, dq0, dq1, rotary_q_ptr, row, count, stride_dp, scale, D, R_Q, BLOCK_D1)
    store_head(dv_ptr + head * D, dv0, dv1, row_k, n_k, stride_dp, D, BLOCK_D1)
    store_turned(dk_ptr + head * D, dk0, dk1, rotary_k_ptr, row_k, n_k, stride_dp, scale, D, R_K, BLOCK_D1)


@triton.jit
def delta_kernel(grad_ptr, out_ptr, delta_ptr, P_q, H, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D0: tl.constexpr,
                 BLOCK_D1: tl.constexpr):
    """rowsum(grad * out), [H, P_q]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R  # over P_q * H
    count = P_q * H - row
    g0, g1 = load_head(grad_ptr, row, count, 1, D, BLOCK_R, BLOCK_D0, BLOCK_D1)
    o0, o1 = load_head(out_ptr, row, count, 1, D, BLOCK_R, BLOCK_D0, BLOCK_D1)
    offs_r = tl.arange(0, BLOCK_R)
    tl.store(delta_ptr + (row + offs_r) % H * P_q + (row + offs_r) // H, dot_rows(g0, g1, o0, o1, BLOCK_D1),
             mask=offs_r < count)


@triton.jit
def backward_kv_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
                       rotary_k_ptr, dk_ptr, dv_ptr, P_q, H, num_blocks, stride_qp, stride_qh, stride_kp, stride_kh,
                       stride_vp, stride_vh, stride_dp, scale, frame_size, D: tl.constexpr, R_K: tl.constexpr,
                       FRAME_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """dk and dv of one block of keys of one head, over blocks of queries."""
    pid = tl.program_id(0)
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head = (pid // num_blocks % H).to(tl.int64)
    row_q, n_q = sequence(cu_seqlens_q_ptr, pid // num_blocks // H)
    row_k, n_k = sequence(cu_seqlens_k_ptr, pid // num_blocks // H)
    start_n = pid % num_blocks * BLOCK_N
    if start_n >= n_k:
        return
    row_k += start_n
    count_k = n_k - start_n
    k0, k1 = load_head(k_ptr + head * stride_kh * D, row_k, count_k, stride_kp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
    v0, v1 = load_head(v_ptr + head * stride_vh * D, row_k, count_k, stride_vp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)

    offs_m, offs_n = tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    first = first_query(offs_n, n_q, n_k, frame_size, FRAME_CAUSAL)
    begin, end_part = 0, 0  # the first query that sees one of the keys, and that from which on all see all of them
    if FRAME_CAUSAL:
        begin = tl.maximum(first_query(start_n, n_q, n_k, frame_size, FRAME_CAUSAL), 0)
        end_part = first_query(tl.minimum(start_n + BLOCK_N, n_k) - 1, n_q, n_k, frame_size, FRAME_CAUSAL)
        end_part = tl.minimum(begin + tl.cdiv(tl.maximum(end_part - begin, 0), BLOCK_M) * BLOCK_M, n_q)
    dk0, dk1 = zeros_head(BLOCK_N, BLOCK_D0, BLOCK_D1)
    dv0, dv1 = zeros_head(BLOCK_N, BLOCK_D0, BLOCK_D1)
    for WHOLE in tl.static_range(0 if FRAME_CAUSAL else 1, 2):
        for start_m in tl.range(end_part if WHOLE else begin, n_q if WHOLE else end_part, BLOCK_M):
            row, count = row_q + start_m, n_q - start_m
            q0, q1 = load_head(q_ptr + head * stride_qh * D, row, count, stride_qp, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
            g0, g1 = load_head(grad_ptr + head * D, row, count, H, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
            lse = load_lse(lse_ptr + head * P_q + row, count, BLOCK_M, EXACT)
            delta = tl.load(delta_ptr + head * P_q + row + offs_m, mask=offs_m < count, other=0.0)
            s = dot_heads(k0, k1, q0, q1, BLOCK_D1)                                 # [BLOCK_N, BLOCK_M]
            p = weights(s, lse[None, :], scale, EXACT, POLYNOMIAL)
            if not WHOLE:
                p = tl.where(first[:, None] <= (start_m + offs_m)[None, :], p, 0.0)
            dv0, dv1 = add_dot(dv0, dv1, p, g0, g1, BLOCK_D1)
            ds = p * (dot_heads(v0, v1, g0, g1, BLOCK_D1) - delta[None, :])
            dk0, dk1 = add_dot(dk0, dk1, ds, q0, q1, BLOCK_D1)
    store_head(dv_ptr + head * D, dv0, dv1, row_k, count_k, stride_dp, D, BLOCK_D1)
    store_turned(dk_ptr + head * D, dk0, dk1, rotary_k_ptr, row_k, count_k, stride_dp, scale, D, R_K, BLOCK_D1)


@triton.jit
def backward_q_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
                      rotary_q_ptr, dq_ptr, P_q, H, num_blocks, stride_qp, stride_qh, stride_kp, stride_kh, stride_vp,
                      stride_vh, stride_dp, scale, frame_size, D: tl.constexpr, R_Q: tl.constexpr,
                      FRAME_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """dq of one block of queries of one head, over blocks of keys."""
    pid = tl.program_id(0)
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head = (pid // num_blocks % H).to(tl.int64)
    row_q, n_q = sequence(cu_seqlens_q_ptr, pid // num_blocks // H)
    row_k, n_k = sequence(cu_seqlens_k_ptr, pid // num_blocks // H)
    start_m = (num_blocks - 1 - pid % num_blocks) * BLOCK_M  # frame-causal: the longest loops first
    if start_m >= n_q:
        return
    row_q += start_m
    count_q = n_q - start_m
    k_ptr += head * stride_kh * D
    v_ptr += head * stride_vh * D
    q0, q1 = load_head(q_ptr + head * stride_qh * D, row_q, count_q, stride_qp, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
    g0, g1 = load_head(grad_ptr + head * D, row_q, count_q, H, D, BLOCK_M, BLOCK_D0, BLOCK_D1)
    lse = load_lse(lse_ptr + head * P_q + row_q, count_q, BLOCK_M, EXACT)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    delta = tl.load(delta_ptr + head * P_q + row_q + offs_m, mask=offs_m < count_q, other=0.0)

    visible = num_visible(start_m + offs_m, n_q, n_k, frame_size, FRAME_CAUSAL)
    end_whole = num_visible(start_m, n_q, n_k, frame_size, FRAME_CAUSAL) // BLOCK_N * BLOCK_N
    end = num_visible(tl.minimum(start_m + BLOCK_M, n_q) - 1, n_q, n_k, frame_size, FRAME_CAUSAL)
    dq0, dq1 = zeros_head(BLOCK_M, BLOCK_D0, BLOCK_D1)
    for MASKED in tl.static_range(2):
        for start_n in tl.range(end_whole if MASKED else 0, end if MASKED else end_whole, BLOCK_N):
            k0, k1 = load_head(k_ptr, row_k + start_n, n_k - start_n, stride_kp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
            v0, v1 = load_head(v_ptr, row_k + start_n, n_k - start_n, stride_vp, D, BLOCK_N, BLOCK_D0, BLOCK_D1)
            s = dot_heads(q0, q1, k0, k1, BLOCK_D1)                                 # [BLOCK_M, BLOCK_N]
            p = weights(s, lse[:, None], scale, EXACT, POLYNOMIAL)
            if MASKED:
                p = tl.where((start_n + offs_n)[None, :] < visible[:, None], p, 0.0)
            ds = p * (dot_heads(g0, g1, v0, v1, BLOCK_D1) - delta[:, None])
            dq0, dq1 = add_dot(dq0, dq1, ds, k0, k1, BLOCK_D1)
    store_turned(dq_ptr + head * D, dq0, dq1, rotary_q_ptr, row_q, count_q, stride_dp, scale, D, R_Q, BLOCK_D1)


def _short_config(d: int, max_seqlen_q: int, max_seqlen_k: int, dtype: torch.dtype) -> dict | None:
    """None where the keys of a sequence do not fit one block."""
    is_float32, is_hopper = dtype == torch.float32, capability() >= 90
    if d > 64 or not fits_one_block(d, max_seqlen_k, 2048 if is_float32 else 8192 if is_hopper else 4096):
        return None
    BLOCK_N = block_size(max_seqlen_k)
    BLOCK_M = 16 if is_float32 or d > 32 and not is_hopper else 64 if is_hopper and BLOCK_N == 128 else 32
    return config(f"short{BLOCK_N}-backward", d, dtype, BLOCK_M=block_size(max_seqlen_q, BLOCK_M), BLOCK_N=BLOCK_N,
                  POLYNOMIAL=0, num_warps=8 if BLOCK_N == 128 else 4, num_stages=1)


def _kv_config(d: int, dtype: torch.dtype) -> dict:
    if dtype == torch.float32:
        return float32_config("long-backward-kv", d)
    wide = 128 if capability() >= 90 else 96
    BLOCK_M, BLOCK_N = (64, 128) if d <= 64 else (32, 128) if d <= wide else (32, 64) if d <= 128 else (32, 32)
    return config("long-backward-kv", d, dtype, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, POLYNOMIAL=0, num_warps=8, num_stages=2)


def _q_config(d: int, dtype: torch.dtype) -> dict:
    if dtype == torch.float32:
        return float32_config("long-backward-q", d)
    BLOCK_M, BLOCK_N = (128, 64) if d <= (128 if capability() >= 90 else 96) else (64, 32)
    return config("long-backward-q", d, dtype, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, POLYNOMIAL=0, num_warps=8, num_stages=2)


def _short(constants, grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, rotary_q, rotary_k, frame_size, dq, dk,
           dv) -> None:
    (P_q, H, d), num_sequences = q.shape, cu_seqlens_q.shape[0] - 1
    (q, *strides_q), (k, *strides_k), (v, *strides_v) = (in_heads(x) for x in (q, k, v))
    short_backward_kernel[(H * num_sequences,)](
        grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rotary_q, rotary_k, dq, dk, dv, P_q, H, *strides_q,
        *strides_k, *strides_v, in_heads(dq)[1], scale, frame_size, D=d, R_Q=rotary_columns(rotary_q),
        R_K=rotary_columns(rotary_k), FRAME_CAUSAL=frame_size > 0, **constants)


def _long(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, rotary_q, rotary_k,
          frame_size, dq, dk, dv) -> None:
    (P_q, H, d), num_sequences = q.shape, cu_seqlens_q.shape[0] - 1
    stride_dp = in_heads(dk)[1]
    (q, *strides_q), (k, *strides_k), (v, *strides_v) = (
        in_heads(x) for x in (rotated(q, rotary_q), rotated(k, rotary_k), v))
    delta = torch.empty_like(lse)
    if P_q:
        blocks = head_blocks(d)
        delta_kernel[(triton.cdiv(P_q * H, 32),)](grad, out, delta, P_q, H, D=d, BLOCK_R=32, **blocks, num_warps=4)
    tensors = grad, q, k, v, lse, delta, cu_seqlens_q, cu_seqlens_k
    numbers = *strides_q, *strides_k, *strides_v, stride_dp, scale, frame_size
    constants = _kv_config(d, q.dtype) | dict(D=d, FRAME_CAUSAL=frame_size > 0)
    num_blocks = triton.cdiv(max_seqlen_k, constants["BLOCK_N"])
    backward_kv_kernel[(num_blocks * H * num_sequences,)](*tensors, rotary_k, dk, dv, P_q, H, num_blocks, *numbers,
                                                          R_K=rotary_columns(rotary_k), **constants)
    constants = _q_config(d, q.dtype) | dict(D=d, FRAME_CAUSAL=frame_size > 0)
    num_blocks = triton.cdiv(max_seqlen_q, constants["BLOCK_M"])
    if num_blocks:
        backward_q_kernel[(num_blocks * H * num_sequences,)](*tensors, rotary_q, dq, P_q, H, num_blocks, *numbers,
                                                             R_Q=rotary_columns(rotary_q), **constants)


def _backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, rotary_q, rotary_k,
              frame_size, into: tuple[Tensor, Tensor, Tensor]) -> None:
    if cu_seqlens_q.shape[0] == 1:
        return
    grad, out, lse, cu_seqlens_q, cu_seqlens_k = (x.contiguous() for x in (grad, out, lse, cu_seqlens_q, cu_seqlens_k))
    rotary_q, rotary_k = (None if rotary is None else rotary.contiguous() for rotary in (rotary_q, rotary_k))
    constants = _short_config(q.shape[2], max_seqlen_q, max_seqlen_k, q.dtype)
    if constants:
        _short(constants, grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, rotary_q, rotary_k, frame_size, *into)
    else:
        _long(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, rotary_q, rotary_k,
              frame_size, *into)


def varlen_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                              cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
                              scale: float, rotary_q: Tensor | None, rotary_k: Tensor | None,
                              frame_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """grad as out -> dq, dk, dv as q, k, v."""
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, rotary_q, rotary_k,
              frame_size, grads)
    return grads


def varlen_attention_qkv_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                                  max_seqlen: int, scale: float, rotary: Tensor | None, frame_size: int) -> Tensor:
    """grad [P, H, d] -> dqkv [P, 3, H, d]."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _backward(grad, *qkv.unbind(1), out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, rotary, rotary,
              frame_size, dqkv.unbind(1))
    return dqkv
