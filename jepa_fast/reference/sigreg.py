"""SIGReg: how far random projections of embeddings are from a standard normal (LeJEPA, arXiv:2511.08544).

For a group of N rows x, a direction a and knots t_j, with p = x a:

    C_j = 1/N sum over n of cos(t_j p_n)      S_j = 1/N sum over n of sin(t_j p_n)
    statistic = sum over j of weights_j ((C_j - phi_j)^2 + S_j^2)

the Epps-Pulley distance between the empirical characteristic function and phi = exp(-t^2 / 2). Two ops: the raw sums (of
x, or of projections that are given), which is where the work is and which data parallelism adds up, and the statistic of
the sums. x [V, N, D], directions
[D, K], sums [V, 2, J, K] with cos first, count [V] rows behind each sum. Half precision is computed in float32.
"""

import torch
from torch import Tensor

SLICES = 128  # at a time: bounds the memory


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sigreg_sums(x: Tensor, directions: Tensor, row_mask: Tensor | None, t_start: float, t_step: float,
                num_knots: int) -> Tensor:
    """Sums of cos(t_j p), then of sin(t_j p), over the rows where row_mask [V, N] is True -> [V, 2, J, K]."""
    keep = 1 if row_mask is None else row_mask.unsqueeze(-1)
    sums = [_sums(p, keep, t_start, t_step, num_knots) for p, _ in _projections(x, directions, row_mask)]
    return torch.cat(sums, -1)


def _sums(p: Tensor, keep: Tensor | int, t_start: float, t_step: float, num_knots: int) -> Tensor:
    phases = ((t_start + j * t_step) * p for j in range(num_knots))
    return torch.stack([torch.stack([(phase.cos() * keep).sum(1), (phase.sin() * keep).sum(1)], 1) for phase in phases], 2)


def sigreg_sums_backward(grad_sums: Tensor, x: Tensor, directions: Tensor, row_mask: Tensor | None, t_start: float,
                         t_step: float) -> Tensor:
    """The gradient with respect to x, [V, N, D]."""
    grad_x = torch.zeros_like(x, dtype=accumulation_dtype(x))
    pieces = zip(_projections(x, directions, row_mask), grad_sums.split(SLICES, -1), strict=True)
    for (p, some_directions), grad in pieces:
        grad_p = _gradient(grad, p, t_start, t_step)
        if row_mask is not None:
            grad_p = grad_p.masked_fill(~row_mask.unsqueeze(-1), 0)
        grad_x += grad_p @ some_directions.T
    return grad_x.to(x.dtype)


def _gradient(grad_sums: Tensor, p: Tensor, t_start: float, t_step: float) -> Tensor:
    grad_cos, grad_sin = grad_sums.unsqueeze(-2).unbind(1)  # [V, J, 1, K]
    grad_p = torch.zeros_like(p)
    for j in range(grad_sums.shape[2]):
        t = t_start + j * t_step
        grad_p += t * (grad_sin[:, j] * (t * p).cos() - grad_cos[:, j] * (t * p).sin())
    return grad_p


def projection_sums(p: Tensor, t_start: float, t_step: float, num_knots: int) -> Tensor:
    """`sigreg_sums` of projections p [V, N, K] that exist already -> [V, 2, J, K]."""
    parts = p.to(accumulation_dtype(p)).split(SLICES, -1)
    return torch.cat([_sums(part, 1, t_start, t_step, num_knots) for part in parts], -1)


def projection_sums_backward(grad_sums: Tensor, p: Tensor, t_start: float, t_step: float) -> Tensor:
    """The gradient with respect to p, [V, N, K]."""
    parts = zip(grad_sums.split(SLICES, -1), p.to(accumulation_dtype(p)).split(SLICES, -1), strict=True)
    return torch.cat([_gradient(grad, part, t_start, t_step) for grad, part in parts], -1).to(p.dtype)


def _projections(x: Tensor, directions: Tensor, row_mask: Tensor | None):
    x = x.to(accumulation_dtype(x)).contiguous()
    if row_mask is not None:
        x = x.masked_fill(~row_mask.unsqueeze(-1), 0)  # a row that does not count may hold anything
    for some_directions in directions.to(x.dtype).contiguous().split(SLICES, 1):
        yield x @ some_directions, some_directions


def sigreg_statistic(sums: Tensor, count: Tensor, phi: list[float], weights: list[float]) -> Tensor:
    """[V, K]; 0 where no row was counted."""
    rows = torch.where(count == 0, 1, count).unsqueeze(-1)
    cos, sin = sums.unbind(1)
    statistic = torch.zeros_like(cos[:, 0])
    for j, (target, weight) in enumerate(zip(phi, weights, strict=True)):
        statistic += weight * ((cos[:, j] / rows - target) ** 2 + (sin[:, j] / rows) ** 2)
    return statistic.masked_fill(count.unsqueeze(-1) == 0, 0)


def sigreg_statistic_backward(grad: Tensor, sums: Tensor, count: Tensor, phi: list[float],
                              weights: list[float]) -> Tensor:
    """The gradient with respect to the sums, [V, 2, J, K]."""
    rows = torch.where(count == 0, 1, count).unsqueeze(-1)
    cos, sin = sums.unbind(1)
    grad = grad.masked_fill(count.unsqueeze(-1) == 0, 0)
    grad_cos = [2 * weight * (cos[:, j] / rows - target) / rows * grad
                for j, (target, weight) in enumerate(zip(phi, weights, strict=True))]
    grad_sin = [2 * weight * (sin[:, j] / rows) / rows * grad for j, weight in enumerate(weights)]
    return torch.stack([torch.stack(grad_cos, 1), torch.stack(grad_sin, 1)], 1)
