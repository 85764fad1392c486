"""The implementations of `varlen_attention`, its packed form and their gradients: C++, CUDA, Triton and the peers.

C++, like the peers, knows no rotary positions: q and k are turned before it and the gradients turned back after it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import varlen_attention as reference
from . import _attention_peers as peers
from ._backends import COMPILED_MISSING, Implementation, Missing, Slower, compiled, cuda, triton
from ._torch_attention import empty_lse, whole_rows


def backends(is_qkv: bool, is_backward: bool) -> dict[str, Implementation | Missing]:
    """The columns of one of the four ops."""
    rotated, packed = (_rotated_backward, _qkv_backward) if is_backward else (_rotated, _qkv_forward)
    on_cpu, on_gpu = (_cpp_backward, _cuda_backward) if is_backward else (_cpp, _cuda)
    slower, suffix = (_SLOWER_BACKWARD, "_backward") if is_backward else (_SLOWER, "")
    launcher = f"varlen_attention{suffix}" + f".varlen_attention_qkv{suffix}" * is_qkv

    def adapt(function: Callable) -> Callable:
        return packed(function) if is_qkv else function

    return {"cpp": compiled(f"varlen_attention{suffix}", call=adapt(rotated(on_cpu)), supports=_full_only,
                            slower=_for_qkv(slower) if is_qkv else slower),
            "triton": triton(launcher, supports=_positive_scale),
            "cuda": cuda(f"varlen_attention{suffix}_cuda", call=adapt(on_gpu), supports=_cuda_supports, slower=_NOT_TIMED),
            **peers.backends(lambda function: adapt(rotated(function)), is_backward)}


def _cpp(raw, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    out, lse = q.new_empty(q.shape), empty_lse(q)
    raw.varlen_attention(*map(whole_rows, (q, k, v)), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), scale, out,
                         lse)
    return out, lse


def _cpp_backward(raw, grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, into=None):
    into = into or tuple(t.new_empty(t.shape) for t in (q, k, v))
    raw.varlen_attention_backward(
        *map(whole_rows, (grad, q, k, v, out)), lse.contiguous(), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
        scale, *into)
    return into


def _rotated(function):
    """A forward without rotary positions, on q and k turned before."""
    def forward(*args):
        *raw, q, k, v, cu_q, cu_k, max_q, max_k, scale, rotary_q, rotary_k, frame_size = args
        frames = {"frame_size": frame_size} if frame_size else {}
        return function(*raw, _turn(q, rotary_q), _turn(k, rotary_k), v, cu_q, cu_k, max_q, max_k, scale, **frames)
    return forward


def _rotated_backward(function):
    """A backward without rotary positions, on q and k turned before; its dq and dk turned back."""
    @torch.no_grad()
    def backward(*args, into=None):
        *raw, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, rotary_q, rotary_k, frame_size = args
        frames = {"frame_size": frame_size} if frame_size else {}
        grads = function(*raw, grad, _turn(q, rotary_q), _turn(k, rotary_k), v, out, lse, cu_q, cu_k, max_q, max_k, scale,
                         into, **frames)
        for t, rotary in zip(grads, (rotary_q, rotary_k), strict=False):
            if rotary is not None:
                _turn(t, reference.transposed(rotary), into=t)
        return grads
    return backward


def _turn(x: Tensor, rotary: Tensor | None, into: Tensor | None = None) -> Tensor:
    if rotary is None:
        return x
    if COMPILED_MISSING or not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or rotary.dtype != torch.float32:
        turned = reference.rotate(x, rotary)
        return turned if into is None else into.copy_(turned)
    into = x.new_empty(x.shape) if into is None else into
    torch.ops.jepa_fast_C.rotate_heads(whole_rows(x), rotary.contiguous(), into)
    return into


def _qkv_forward(function):
    """A forward of q, k, v apart, on views of a packed qkv."""
    def forward(*args):
        *raw, qkv, cu_seqlens, max_seqlen, scale, rotary, frame_size = args
        return function(*raw, *whole_rows(qkv).unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale,
                        rotary, rotary, frame_size)
    return forward


def _qkv_backward(function):
    """A backward of q, k, v apart, writing into views of one packed dqkv."""
    @torch.no_grad()
    def backward(*args):
        *raw, grad, qkv, out, lse, cu_seqlens, max_seqlen, scale, rotary, frame_size = args
        dqkv = qkv.new_empty(qkv.shape)
        function(*raw, grad, *whole_rows(qkv).unbind(1), out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                 scale, rotary, rotary, frame_size, into=dqkv.unbind(1))
        return dqkv
    return backward


def _cuda(raw, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, rotary_q, rotary_k, frame_size):
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), empty_lse(q)
    rotary_q, rotary_k = _table(rotary_q), _table(rotary_k)
    if max_seqlen_q > _few_rows(q):
        k, rotary_k = _turned_once(raw, k, rotary_k), None
    raw.varlen_attention_cuda(*map(_aligned_rows, (q, k, v)), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
                              rotary_q, rotary_k, max_seqlen_q, max_seqlen_k, scale, frame_size, out, lse)
    return out, lse


@torch.no_grad()
def _cuda_backward(raw, grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, rotary_q,
                   rotary_k, frame_size, into=None):
    into = into or tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    rotary_q, rotary_k = _table(rotary_q), _table(rotary_k)
    is_turned = max(max_seqlen_q, max_seqlen_k) > _few_rows(q)
    if is_turned:
        q, k = _turned_once(raw, q, rotary_q), _turned_once(raw, k, rotary_k)
    raw.varlen_attention_backward_cuda(
        *map(_aligned_rows, (grad, q, k, v, out)), lse.contiguous(), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
        rotary_q, rotary_k, is_turned, max_seqlen_q, max_seqlen_k, scale, frame_size,
        torch.empty(lse.shape, dtype=lse.dtype, device=lse.device), *into)
    return into


def _few_rows(q: Tensor) -> int:
    """Two blocks of the CUDA version: in longer sequences rows are turned once, not by every block that reads them."""
    return 256 if q.shape[2] <= 32 else 128


def _turned_once(raw, x: Tensor, rotary: Tensor | None) -> Tensor:
    if rotary is None:
        return x
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    raw.rotate_heads(_aligned_rows(x), rotary, turned)
    return turned


def _table(rotary: Tensor | None) -> Tensor | None:
    return None if rotary is None or rotary.shape[2] == 0 else rotary.contiguous()


def _aligned_rows(t: Tensor) -> Tensor:
    """Any strides in multiples of 4 elements, but a contiguous last dimension: what the CUDA version reads."""
    is_aligned = t.stride(-1) == 1 and not any(stride % 4 for stride in t.stride()[:-1]) and t.data_ptr() % 8 == 0
    return t if is_aligned else t.clone(memory_format=torch.contiguous_format)


def _cuda_supports(*args) -> str | None:
    scale, q = next(arg for arg in args if isinstance(arg, float)), args[0]  # backward: grad, which is as q
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"no CUDA version for {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % 4 or q.shape[-1] > 128:
        return f"no CUDA version with head width {q.shape[-1]}, only multiples of 4 up to 128"
    return None if scale > 0 else f"no CUDA version with scale {scale}, only above 0"


def _full_only(*args) -> str | None:
    return f"no version here with frame_size {args[-1]}" if args[-1] else None


def _positive_scale(*args) -> str | None:
    scale = next(arg for arg in args if isinstance(arg, float))
    return None if scale > 0 else f"no version here with scale {scale}, only above 0"


def _has_bf16_matrix_unit() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


# measured with AMX: PyTorch's own multiplies in bfloat16 there, the C++ version in float32 everywhere
_SLOWER = Slower("bfloat16 with AMX, sequences of 256 tokens or more, d >= 32",
                 lambda q, k, v, cu_seqlens_q, cu_seqlens_k, *rest: _is_long(q, k, cu_seqlens_q, 256, 32))
_SLOWER_BACKWARD = Slower("bfloat16 with AMX, sequences of 1024 tokens or more, d >= 64",
                          lambda grad, q, k, v, out, lse, cu_seqlens_q, *rest: _is_long(q, k, cu_seqlens_q, 1024, 64))


def _is_long(q: Tensor, k: Tensor, cu_seqlens: Tensor, tokens: int, head_dim: int) -> bool:
    """bfloat16 on AMX with at least so many tokens per sequence on average, queries and keys."""
    total = tokens * max(cu_seqlens.shape[0] - 1, 1)
    return (q.dtype == torch.bfloat16 and q.shape[-1] >= head_dim and min(q.shape[0], k.shape[0]) >= total
            and _has_bf16_matrix_unit())


def _for_qkv(slower: Slower) -> Slower:
    """The same for arguments with a packed qkv."""
    def holds(*args):
        at = next(i for i, arg in enumerate(args) if arg.dim() == 4)
        return slower.holds(*args[:at], *args[at].unbind(1), *args[at + 1:])
    return Slower(slower.when, holds)


_NOT_TIMED = Slower("not timed against Triton's", lambda *args: True, always=("cuda",))
