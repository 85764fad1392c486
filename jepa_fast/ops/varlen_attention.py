"""Attention over packed sequences (flash-attention's `cu_seqlens` contract): q, k, v apart, or one packed qkv."""

import torch
from torch import Tensor

from ..reference import varlen_attention as reference
from ._attention import backends
from ._define import define
from ._torch_attention import empty_lse

_MAX_HEAD_DIM = 256


def _check_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_):
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q.shape[0], "max_seqlen_q", max_seqlen_q)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k.shape[0], "max_seqlen_k", max_seqlen_k)


def _check_qkv(qkv, cu_seqlens, max_seqlen, *_):
    _check_cu_seqlens("cu_seqlens", cu_seqlens, "qkv", qkv.shape[0], "max_seqlen", max_seqlen)


def _check_cu_seqlens(what, cu_seqlens, rows_of, rows, what_longest, longest):
    if cu_seqlens.device.type != "cpu":
        lengths = cu_seqlens.diff()
        fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == rows) & ((lengths >= 0) & (lengths <= longest)).all()
        torch._assert_async(fits, f"{what} must rise from 0 to the {rows} rows of {rows_of}, no sequence longer than "
                                  f"{what_longest}, {longest}")
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{what} must start at 0, got {bounds[0]}")
    if bounds[-1] != rows:
        raise ValueError(f"{what} must end at the {rows} rows of {rows_of}, got {bounds[-1]}")
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if lengths and min(lengths) < 0:
        s = lengths.index(min(lengths))
        raise ValueError(f"{what} must not decrease, got {bounds[s]} then {bounds[s + 1]} at sequence {s}")
    if lengths and max(lengths) > longest:
        raise ValueError(f"{what_longest} must be at least the longest sequence, {max(lengths)}, got {longest}")


_HOW = ("Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, "
        "Tensor? rotary_q, Tensor? rotary_k, SymInt frame_size")
_HOW_QKV = "Tensor cu_seqlens, SymInt max_seqlen, float scale, Tensor? rotary, SymInt frame_size"
define(f"varlen_attention(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor)",
       plain=reference.varlen_attention, check=_check_lengths, **backends(is_qkv=False, is_backward=False))
define(f"varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_HOW}) "
       "-> (Tensor, Tensor, Tensor)",
       plain=reference.varlen_attention_backward,
       check=lambda grad, q, k, v, out, lse, *rest: _check_lengths(q, k, v, *rest),
       **backends(is_qkv=False, is_backward=True))
define(f"varlen_attention_qkv(Tensor qkv, {_HOW_QKV}) -> (Tensor, Tensor)",
       plain=reference.varlen_attention_qkv, check=_check_qkv, **backends(is_qkv=True, is_backward=False))
define(f"varlen_attention_qkv_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_HOW_QKV}) -> Tensor",
       plain=reference.varlen_attention_qkv_backward,
       check=lambda grad, qkv, out, lse, *rest: _check_qkv(qkv, *rest), **backends(is_qkv=True, is_backward=True))


@torch.library.register_fake("jepa_fast::varlen_attention")
def _(q, k, v, *how):
    return q.new_empty(q.shape), empty_lse(q)


@torch.library.register_fake("jepa_fast::varlen_attention_backward")
def _(grad, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("jepa_fast::varlen_attention_qkv")
def _(qkv, *how):
    q = qkv[:, 0]
    return q.new_empty(q.shape), empty_lse(q)


@torch.library.register_fake("jepa_fast::varlen_attention_qkv_backward")
def _(grad, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.max_seqlen_q, ctx.max_seqlen_k, ctx.scale, rotary_q, rotary_k, ctx.frame_size = inputs
    ctx.save_for_backward(*tensors, rotary_q, rotary_k, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    q, k, v, cu_seqlens_q, cu_seqlens_k, rotary_q, rotary_k, out, lse = ctx.saved_tensors
    grads = torch.ops.jepa_fast.varlen_attention_backward(
        grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k, ctx.scale,
        rotary_q, rotary_k, ctx.frame_size)
    return *grads, *[None] * 8


def _save_qkv(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, rotary, ctx.frame_size = inputs
    ctx.save_for_backward(qkv, cu_seqlens, rotary, *output)
    ctx.mark_non_differentiable(output[1])


def _backward_qkv(ctx, grad, _):
    qkv, cu_seqlens, rotary, out, lse = ctx.saved_tensors
    dqkv = torch.ops.jepa_fast.varlen_attention_qkv_backward(grad, qkv, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale,
                                                             rotary, ctx.frame_size)
    return dqkv, None, None, None, None, None


torch.library.register_autograd("jepa_fast::varlen_attention", _backward, setup_context=_save)
torch.library.register_autograd("jepa_fast::varlen_attention_qkv", _backward_qkv, setup_context=_save_qkv)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int,
                     cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None,
                     scale: float | None = None, *, rotary_q: Tensor | None = None, rotary_k: Tensor | None = None,
                     frame_size: int = 0) -> Tensor:
    """Softmax attention within each of S packed sequences: row i of q attends to every row of k of its sequence.

    q [P_q, H, d], k, v [P_k, H, d] floating point with d <= 256 -> [P_q, H, d]. Any strides; copied only where the last
    dimension is not contiguous (on a GPU also where the other strides are no whole heads). cu_seqlens_q, cu_seqlens_k
    [S + 1] int32: sequence s owns rows cu_seqlens[s] up to cu_seqlens[s + 1]; it may be empty. cu_seqlens_k and
    max_seqlen_k are those of q where not given. max_seqlen_q, max_seqlen_k: at least the longest sequence. scale:
    d ** -0.5 where not given. Queries without keys give 0.

    rotary_q [P_q, 2, R], rotary_k [P_k, 2, R] float32, R even: rotary positions from `nn.rotary_table`, applied to q and
    k (not rounded before the product in plain, rounded to their dtype elsewhere, as the official code does). Constants.
    frame_size F > 0: frame-causal. With n_q queries and n_k keys in a sequence, query i attends to key j where
    j // F <= (i + n_k - n_q) // F: the last query is in the frame of the last key, as with a cache of keys.
    Raises ValueError for lengths that do not fit (CPU; undefined on a GPU).
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q must be [P, H, d] floating point, got {list(q.shape)} {q.dtype}")
    if k.dim() != 3 or k.shape[1:] != q.shape[1:] or k.dtype != q.dtype:
        raise ValueError(f"k must be [P, {q.shape[1]}, {q.shape[2]}] {q.dtype} as q, got {list(k.shape)} {k.dtype}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v must be {list(k.shape)} {k.dtype} as k, got {list(v.shape)} {v.dtype}")
    _check_arguments("q", q, {"k": k, "v": v}, {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}, frame_size)
    _check_rotary("rotary_q", rotary_q, "q", q)
    _check_rotary("rotary_k", rotary_k, "k", k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_k must be {list(cu_seqlens_q.shape)} as cu_seqlens_q, "
                         f"got {list(cu_seqlens_k.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.jepa_fast.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                                scale, rotary_q, rotary_k, frame_size)[0]


def varlen_attention_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None, *,
                         rotary: Tensor | None = None, frame_size: int = 0) -> Tensor:
    """`varlen_attention` of q, k, v = qkv.unbind(1); its backward writes one packed gradient.

    qkv [P, 3, H, d] -> [P, H, d]; cu_seqlens [S + 1] int32, max_seqlen, scale, rotary [P, 2, R], frame_size and errors
    as there.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be [P, 3, H, d] floating point, got {list(qkv.shape)} {qkv.dtype}")
    _check_arguments("qkv", qkv, {}, {"cu_seqlens": cu_seqlens}, frame_size)
    _check_rotary("rotary", rotary, "qkv", qkv)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.jepa_fast.varlen_attention_qkv(qkv, cu_seqlens, max_seqlen, scale, rotary, frame_size)[0]


def _check_arguments(name: str, first: Tensor, others: dict[str, Tensor], lengths: dict[str, Tensor],
                     frame_size: int) -> None:
    if not 1 <= first.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head width d of 1 to {_MAX_HEAD_DIM}, got {first.shape[-1]}")
    for what, cu_seqlens in lengths.items():
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"{what} must be [S + 1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    for what, t in (others | lengths).items():
        if t.device != first.device:
            raise ValueError(f"{name} and {what} must be on one device, got {first.device} and {t.device}")
    if frame_size < 0:
        raise ValueError(f"frame_size must be 0 (full attention) or the tokens of a frame, got {frame_size}")


def _check_rotary(name: str, rotary: Tensor | None, of: str, x: Tensor) -> None:
    if rotary is None:
        return
    P, d = x.shape[0], x.shape[-1]
    if rotary.dim() != 3 or rotary.shape[:2] != (P, 2) or rotary.shape[2] % 2 or rotary.shape[2] > d:
        raise ValueError(f"{name} must be [P, 2, R] with P = {P} as {of} and R even, at most {d}, "
                         f"got {list(rotary.shape)}")
    if rotary.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32, got {rotary.dtype}")
    if rotary.device != x.device:
        raise ValueError(f"{of} and {name} must be on one device, got {x.device} and {rotary.device}")
    if rotary.requires_grad:
        raise ValueError(f"{name} is a constant here and must not require a gradient; detach it")
