"""Attention over packed sequences: each query attends to every key of its own sequence, and to no other.

    S = scale q k^T        lse = log sum exp(S)        P = exp(S - lse)        out = P v
    dv = P^T g    dS = P * (g v^T - rowsum(g * out))    dq = scale dS k    dk = scale dS^T q

Sequence s owns rows cu_seqlens[s] .. cu_seqlens[s + 1]. Without keys: out = 0, lse = -inf, and no gradient.

rotary [P, 2, R] turns the first R columns of q or k in pairs (2i, 2i + 1) before the product:

    x'[c] = x[c] rotary[0, c] + x[c ^ 1] rotary[1, c]        dx[c] = g[c] rotary[0, c] + g[c ^ 1] rotary[1, c ^ 1]

frame_size F > 0 is frame-causal: with n_q queries and n_k keys, query i attends to key j where
j // F <= (i + n_k - n_q) // F, so that the last query belongs to the frame of the last key.

Attention: arXiv:1706.03762, section 3.2.1. The gradient from lse and out: FlashAttention, arXiv:2205.14135, appendix B.
Frame-causal: V-JEPA 2-AC, arXiv:2506.09985, section 3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                     max_seqlen_k: int, scale: float, rotary_q: Tensor | None, rotary_k: Tensor | None,
                     frame_size: int) -> tuple[Tensor, Tensor]:
    """q [P_q, H, d], k, v [P_k, H, d] -> out as q, lse [H, P_q] in the dtype of the arithmetic (float32 at least)."""
    qf, kf, vf = rotate(_widen(q), rotary_q), rotate(_widen(k), rotary_k), _widen(v)
    out = torch.zeros_like(qf)
    lse = qf.new_full((q.shape[1], q.shape[0]), -torch.inf)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores = _scores(qf[rows], kf[keys], scale, frame_size)
        lse[:, rows] = torch.logsumexp(scores, -1)
        out[rows] = torch.einsum("hqk,khd->qhd", _weights(scores, lse[:, rows]), vf[keys])
    return out.to(q.dtype), lse


@torch.no_grad()
def varlen_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                              cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
                              scale: float, rotary_q: Tensor | None, rotary_k: Tensor | None,
                              frame_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """grad as out -> dq, dk, dv as q, k, v."""
    qf, kf = rotate(_widen(q), rotary_q), rotate(_widen(k), rotary_k)
    g, vf, of = (_widen(t) for t in (grad, v, out))
    dq, dk, dv = (torch.zeros_like(t) for t in (qf, kf, vf))
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        p = _weights(_scores(qf[rows], kf[keys], scale, frame_size), lse[:, rows])
        dp = torch.einsum("qhd,khd->hqk", g[rows], vf[keys])
        ds = p * (dp - (g[rows] * of[rows]).sum(-1).T.unsqueeze(-1)) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, kf[keys])
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, qf[rows])
        dv[keys] = torch.einsum("hqk,qhd->khd", p, g[rows])
    return rotate_backward(dq, rotary_q).to(q.dtype), rotate_backward(dk, rotary_k).to(k.dtype), dv.to(v.dtype)


def varlen_attention_qkv(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, rotary: Tensor | None,
                         frame_size: int) -> tuple[Tensor, Tensor]:
    """qkv [P, 3, H, d] -> out [P, H, d], lse [H, P]."""
    return varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, rotary, rotary,
                            frame_size)


def varlen_attention_qkv_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                                  max_seqlen: int, scale: float, rotary: Tensor | None, frame_size: int) -> Tensor:
    """grad [P, H, d] -> dqkv [P, 3, H, d]."""
    return torch.stack(varlen_attention_backward(grad, *qkv.unbind(1), out, lse, cu_seqlens, cu_seqlens, max_seqlen,
                                                 max_seqlen, scale, rotary, rotary, frame_size), 1)


def rotate(x: Tensor, rotary: Tensor | None) -> Tensor:
    """x [P, H, d] with its first R columns turned by rotary [P, 2, R]; x itself without."""
    if rotary is None:
        return x
    R = rotary.shape[2]
    kept, crossed = rotary.unsqueeze(2).unbind(1)  # [P, 1, R]
    return torch.cat([x[..., :R] * kept + _swap(x[..., :R]) * crossed, x[..., R:]], -1).to(x.dtype)


def rotate_backward(grad: Tensor, rotary: Tensor | None) -> Tensor:
    """The transposed map."""
    return rotate(grad, None if rotary is None else transposed(rotary))


def transposed(rotary: Tensor) -> Tensor:
    """The table of the transposed map."""
    return torch.stack([rotary[:, 0], _swap(rotary[:, 1])], 1)


def _swap(x: Tensor) -> Tensor:
    """Columns 2i and 2i + 1 exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _scores(q: Tensor, k: Tensor, scale: float, frame_size: int) -> Tensor:
    """[H, n_q, n_k], -inf where a query does not attend."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if frame_size > 0:
        n_q, n_k = q.shape[0], k.shape[0]
        frame_q = (torch.arange(n_q, device=q.device) + n_k - n_q).div(frame_size, rounding_mode="floor")
        frame_k = torch.arange(n_k, device=q.device).div(frame_size, rounding_mode="floor")
        scores = scores.masked_fill(frame_k > frame_q.unsqueeze(-1), -torch.inf)
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and 0 where a query has no key."""
    lse = lse.unsqueeze(-1)
    return torch.exp(scores - torch.where(lse.isinf(), 0, lse))


def _widen(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32)).contiguous()


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of q and rows of k of every sequence that has both."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(q) - 1):
        if q[s] < q[s + 1] and k[s] < k[s + 1]:
            yield slice(q[s], q[s + 1]), slice(k[s], k[s + 1])
