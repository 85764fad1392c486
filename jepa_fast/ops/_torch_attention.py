"""PyTorch's own attention for CPU tensors, on packed sequences: one call for neighbours of equal length."""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor


def empty_lse(q: Tensor) -> Tensor:
    """[H, P] for q [P, H, d], in the dtype of the arithmetic."""
    return q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


def _runs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring sequences of equal lengths, none of them 0: their rows of q, their rows of k, how many."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths = [(q[s + 1] - q[s], k[s + 1] - k[s]) for s in range(len(q) - 1)]
    first = 0
    for length, run in groupby(lengths):
        last = first + len(list(run))
        if all(length):  # PyTorch's own dies of a division by zero without rows
            yield slice(q[first], q[last]), slice(k[first], k[last]), last - first
        first = last


def whole_rows(t: Tensor) -> Tensor:
    """Any strides, but a contiguous last dimension: what the C++ version reads and PyTorch's own is fast with."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _batched(t: Tensor, rows: slice, count: int) -> Tensor:
    """Rows of count sequences as PyTorch's attention takes them, [count, H, N, d]: a view."""
    return t[rows].unflatten(0, (count, -1)).transpose(1, 2)


def _batched_lse(lse: Tensor, rows: slice, count: int) -> Tensor:
    return lse[:, rows].unflatten(1, (count, -1)).transpose(0, 1)


def _frame_mask(rows: slice, keys: slice, count: int, frame_size: int, dtype: torch.dtype) -> Tensor | None:
    """[n_q, n_k] to be added to the scores: 0 where a query sees a key, else -inf."""
    if not frame_size:
        return None
    num_q, num_k = ((part.stop - part.start) // count for part in (rows, keys))
    frame_of_q = torch.div(torch.arange(num_q) + num_k - num_q, frame_size, rounding_mode="floor").unsqueeze(1)
    is_hidden = torch.arange(num_k) // frame_size > frame_of_q
    return torch.zeros(num_q, num_k, dtype=dtype).masked_fill_(is_hidden, -torch.inf)


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, frame_size=0):
    q, k, v = (whole_rows(t) for t in (q, k, v))

    def attend(rows, keys, count):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _batched(q, rows, count), _batched(k, keys, count), _batched(v, keys, count), scale=scale,
            attn_mask=_frame_mask(rows, keys, count, frame_size, q.dtype))

    runs = list(_runs(cu_seqlens_q, cu_seqlens_k))
    lse = empty_lse(q).fill_(-torch.inf)
    if len(runs) == 1 and runs[0][0] == slice(0, q.shape[0]):  # what PyTorch returns is already packed
        out, part = attend(*runs[0])
        _batched_lse(lse, runs[0][0], runs[0][2]).copy_(part)
        return out.transpose(1, 2).flatten(0, 1), lse
    out = q.new_zeros(q.shape)
    for rows, keys, count in runs:
        results = attend(rows, keys, count)
        _batched(out, rows, count).copy_(results[0])
        _batched_lse(lse, rows, count).copy_(results[1])
    return out, lse


@torch.no_grad()  # the gradient of the gradient is not known
def backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, into=None,
             frame_size=0):
    grad, q, k, v, out = (whole_rows(t) for t in (grad, q, k, v, out))
    runs = list(_runs(cu_seqlens_q, cu_seqlens_k))
    is_whole = len(runs) == 1 and runs[0][:2] == (slice(0, q.shape[0]), slice(0, k.shape[0]))
    if not is_whole:
        into = [t.zero_() for t in into] if into else [t.new_zeros(t.shape) for t in (q, k, v)]
    for rows, keys, count in runs:
        inputs = [_batched(t, part, count) for t, part in ((grad, rows), (q, rows), (k, keys), (v, keys), (out, rows))]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, _batched_lse(lse, rows, count), 0.0, False, scale=scale,
            attn_mask=_frame_mask(rows, keys, count, frame_size, q.dtype))
        if into is None:
            return tuple(g.transpose(1, 2).flatten(0, 1) for g in grads)
        for t, part, g in zip(into, (rows, keys, keys), grads, strict=True):
            _batched(t, part, count).copy_(g)
    return tuple(into)
