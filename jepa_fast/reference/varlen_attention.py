"""Attention over packed sequences: each query attends to every key of its own sequence, and to no other.

    S = scale q k^T        lse = log sum exp(S)        P = exp(S - lse)        out = P v
    dv = P^T g    dS = P * (g v^T - rowsum(g * out))    dq = scale dS k    dk = scale dS^T q

Sequence s owns rows cu_seqlens[s] .. cu_seqlens[s + 1]. Without keys: out = 0, lse = -inf, and no gradient.
Attention: arXiv:1706.03762, section 3.2.1. The gradient from lse and out: FlashAttention, arXiv:2205.14135, appendix B.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                     max_seqlen_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """q [P_q, H, d], k, v [P_k, H, d] -> out as q, lse [H, P_q] in the dtype of the arithmetic (float32 at least)."""
    qf, kf, vf = (_widen(t) for t in (q, k, v))
    out = torch.zeros_like(qf)
    lse = qf.new_full((q.shape[1], q.shape[0]), -torch.inf)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores = torch.einsum("qhd,khd->hqk", qf[rows], kf[keys]) * scale
        lse[:, rows] = torch.logsumexp(scores, -1)
        out[rows] = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), vf[keys])
    return out.to(q.dtype), lse


@torch.no_grad()
def varlen_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                              cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
                              scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """grad as out -> dq, dk, dv as q, k, v."""
    g, qf, kf, vf, of = (_widen(t) for t in (grad, q, k, v, out))
    dq, dk, dv = (torch.zeros_like(t) for t in (qf, kf, vf))
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores = torch.einsum("qhd,khd->hqk", qf[rows], kf[keys]) * scale
        p = torch.exp(scores - lse[:, rows].unsqueeze(-1))
        dp = torch.einsum("qhd,khd->hqk", g[rows], vf[keys])
        ds = p * (dp - (g[rows] * of[rows]).sum(-1).T.unsqueeze(-1)) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, kf[keys])
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, qf[rows])
        dv[keys] = torch.einsum("hqk,qhd->khd", p, g[rows])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def varlen_attention_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    """qkv [P, 3, H, d] -> out [P, H, d], lse [H, P]."""
    return varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale)


def varlen_attention_qkv_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                                  max_seqlen: int, scale: float) -> Tensor:
    """grad [P, H, d] -> dqkv [P, 3, H, d]."""
    return torch.stack(varlen_attention_backward(grad, *qkv.unbind(1), out, lse, cu_seqlens, cu_seqlens, max_seqlen,
                                                 max_seqlen, scale), 1)


def _widen(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32)).contiguous()


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of q and rows of k of every sequence that has both."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(q) - 1):
        if q[s] < q[s + 1] and k[s] < k[s + 1]:
            yield slice(q[s], q[s + 1]), slice(k[s], k[s + 1])
