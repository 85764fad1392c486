"""The calls of SIGReg's C++ kernels: in pieces that stay in the cache, between two matrix products."""

from collections.abc import Iterator

import torch
from torch import Tensor

SLICES = 512      # at a time, and of those as many rows that
PIECE = 1 << 18   # so many projections (1 MB) fall to a thread: they stay in its cache from pass to pass


def sigreg_sums(raw, x, directions, row_mask, t_start, t_step, num_knots):
    x, directions = x.float(), directions.float().contiguous()
    parts = []
    for some_directions in directions.split(SLICES, 1):
        sums = x.new_zeros(x.shape[0], 2, num_knots, some_directions.shape[1], dtype=torch.float64)
        for p, mask, groups, _ in _projections(x, some_directions, row_mask):
            raw.sigreg_add_sums(p, mask, t_start, t_step, sums[groups])
        parts.append(sums.float())
    return torch.cat(parts, -1)


def sigreg_sums_backward(raw, grad_sums, x, directions, row_mask, t_start, t_step):
    wide_x, directions, grad_sums = x.float(), directions.float().contiguous(), grad_sums.contiguous()
    grad_x = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    flat = grad_x.view(-1, x.shape[2])
    for some_directions, some_grads in zip(directions.split(SLICES, 1), grad_sums.split(SLICES, 3), strict=True):
        for p, mask, groups, rows in _projections(wide_x, some_directions, row_mask):
            raw.sigreg_gradient_(p, mask, some_grads[groups], t_start, t_step)
            flat[rows].addmm_(p.flatten(0, 1), some_directions.T)
    return grad_x.to(x.dtype)


def _projections(x: Tensor, directions: Tensor, row_mask: Tensor | None) -> Iterator[tuple]:
    """x @ directions piece by piece, in memory used again and again: p [groups, rows, K], its mask, its place."""
    V, N, D = x.shape
    K = directions.shape[1]
    x = x.reshape(V * N, D).contiguous()
    mask = None if row_mask is None else row_mask.reshape(-1)
    height = PIECE * torch.get_num_threads() // K // 64 * 64  # a multiple of the rows that are added up in float32
    room = x.new_empty(min(height, V * N) * K)
    for groups, rows in _pieces(V, N, height):
        count = rows.stop - rows.start
        shape = (groups.stop - groups.start, -1)
        p = torch.mm(x[rows], directions, out=room[:count * K].view(count, K))
        yield p.view(*shape, K), None if mask is None else mask[rows].view(shape), groups, rows


def _pieces(V: int, N: int, height: int) -> Iterator[tuple[slice, slice]]:
    """Groups and rows, out of V and V * N: up to `height` rows, of whole groups or of one."""
    if N > height:
        for v in range(V):
            for n in range(0, N, height):
                yield slice(v, v + 1), slice(v * N + n, v * N + min(n + height, N))
    elif N > 0:
        for v in range(0, V, height // N):
            end = min(v + height // N, V)
            yield slice(v, end), slice(v * N, end * N)


def projection_sums(raw, p, t_start, t_step, num_knots):
    sums = p.new_zeros(p.shape[0], 2, num_knots, p.shape[2], dtype=torch.float64)
    raw.sigreg_add_sums(p.float().contiguous(), None, t_start, t_step, sums)
    return sums.float()


def projection_sums_backward(raw, grad_sums, p, t_start, t_step):
    grad = p.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    raw.sigreg_gradient_(grad, None, grad_sums.contiguous(), t_start, t_step)
    return grad.to(p.dtype)


def sigreg_statistic(raw, sums, count, phi, weights):
    out = sums.new_empty(sums.shape[0], sums.shape[3])
    knots = torch.tensor([phi, weights], dtype=torch.float64)
    raw.sigreg_statistic(sums.contiguous(), count.contiguous(), knots, out)
    return out


def sigreg_statistic_backward(raw, grad, sums, count, phi, weights):
    out = torch.empty_like(sums, memory_format=torch.contiguous_format)
    grad, sums, count = grad.contiguous(), sums.contiguous(), count.contiguous()
    knots = torch.tensor([phi, weights], dtype=torch.float64)
    raw.sigreg_statistic_backward(grad, sums, count, knots, out)
    return out
