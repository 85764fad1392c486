"""Others' attention on a GPU behind `varlen_attention`: PyTorch's own, flash-attn, xformers.

Same arguments and results as the op without rotary positions, and without frames but for PyTorch's on a CPU; all three are
FlashAttention 2 (arXiv:2307.08691), whose lse is [H, P] as ours, but +inf where a query has no key. None has been timed
against ours on a GPU yet, so the automatic choice passes over them there: `bench/on_gpu` times them, `use_backend` asks for
one by name.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import _torch_attention
from ._backends import Implementation, Slower, not_installed
from ._torch_attention import whole_rows

_HALF = (torch.float16, torch.bfloat16)
_NOT_TIMED = Slower("not timed against ours", lambda *args: args[0].is_cuda, always=("cuda",))


def backends(adapt: Callable, is_backward: bool) -> dict[str, Implementation]:
    """Columns torch, flash_attn and xformers of an op: forward or backward, passed through `adapt`."""
    def torch_on(*args, **kwargs):
        cpu, gpu = (_torch_attention.backward, torch_backward) if is_backward else (_torch_attention.forward, torch_forward)
        return (gpu if args[0].is_cuda else cpu)(*args, **kwargs)

    def package(name: str, forward: Callable, backward: Callable) -> Implementation:
        return Implementation(adapt(backward if is_backward else forward), ("cuda",), _supports, _NOT_TIMED,
                              lambda device: not_installed(name))

    return {"torch": Implementation(adapt(torch_on), ("cpu", "cuda"), _supports, _NOT_TIMED),
            "flash_attn": package("flash_attn", flash_attn_forward, flash_attn_backward),
            "xformers": package("xformers", xformers_forward, xformers_backward)}


def _supports(*args) -> str | None:
    t, frame_size = args[0], args[-1]
    if not t.is_cuda:
        # a query that sees no key is NaN there
        lengths = [arg.diff() for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.int32]
        is_short = frame_size and bool((lengths[-1] < lengths[0]).any())
        return f"no version with frame_size {frame_size} and fewer keys than queries" if is_short else None
    if frame_size:
        return f"no version here with frame_size {frame_size}"
    if t.dtype not in _HALF:
        return f"no version for {str(t.dtype).removeprefix('torch.')}"
    if t.shape[-1] % 8:
        return f"head width {t.shape[-1]} is not a multiple of 8"
    return "no version for empty tensors" if t.numel() == 0 else None


def torch_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *map(whole_rows, (q, k, v)), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, False, False,
        scale=scale)
    return out, lse


@torch.no_grad()
def torch_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, into=None):
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        *map(whole_rows, (grad, q, k, v, out)), lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, False,
        *no_dropout, scale=scale)
    return _put(grads, into)


def flash_attn_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse, *_ = interface._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, scale, False)
    return out, lse


@torch.no_grad()
def flash_attn_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                        into=None):
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    into = into or tuple(t.new_empty(t.shape) for t in (q, k, v))
    interface._flash_attn_varlen_backward(
        grad, q, k, v, out, lse, *into, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, scale, False, -1, -1,
        0.0, None, True)  # no window, no cap, no slopes, deterministic
    return tuple(into)


def _xformers(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor):
    """Its module and mask. The mask wants the lengths on the host, and waits for the device to get them."""
    fmha = importlib.import_module("xformers.ops.fmha")
    lengths = (t.diff().tolist() for t in (cu_seqlens_q, cu_seqlens_k))
    return fmha, fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths, device=cu_seqlens_q.device)


def xformers_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    fmha, mask = _xformers(cu_seqlens_q, cu_seqlens_k)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q[None], k[None], v[None], mask, scale=scale, op=fmha.flash.FwOp)
    return out[0], lse[0]


@torch.no_grad()
def xformers_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, into=None):
    fmha, mask = _xformers(cu_seqlens_q, cu_seqlens_k)
    grads = fmha.memory_efficient_attention_backward(
        grad[None], out[None], lse[None], q[None], k[None], v[None], mask, scale=scale, op=fmha.flash.BwOp)
    return _put([g[0] for g in grads], into)


def _put(grads, into):
    if into is None:
        return tuple(grads)
    for t, g in zip(into, grads, strict=True):
        t.copy_(g)
    return tuple(into)
