"""SIGReg with every direction at once: its expectation over uniform directions, in closed form, without noise.

With Psi_D(r) = E cos(r u), u the first coordinate of a uniform point on the unit sphere in D dimensions,

    E statistic = 1/N^2 sum over i, j of kappa(|x_i - x_j|) - 2/N sum over i of eta(|x_i|) + sum of weights_j phi_j^2
    kappa(s) = sum over j of weights_j Psi_D(t_j s)          eta(s) = sum over j of weights_j phi_j Psi_D(t_j s)

which are radial functions; the gradient needs kappa'(s) / s = -1/D sum of weights_j t_j^2 Psi_{D+2}(t_j s). Computed in
float64: kappa's argument is a difference of products. x [V, N, D], row_mask [V, N], statistic [V].
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .sigreg import accumulation_dtype

PAIRS = 1 << 18      # distances at a time
TABLE_FROM_DIM = 10  # below, Psi decays too slowly to be tabulated and is computed at every distance
SMALLEST = 1e-9      # where Psi stays below, it is taken as 0
NODES = 256          # of the Gauss rule behind the tables: exact for Psi_D(r), r < 400, D >= 10


def sigreg_exact(x: Tensor, row_mask: Tensor | None, t_start: float, t_step: float, phi: list[float],
                 weights: list[float]) -> Tensor:
    """The expected statistic of each group, [V]; 0 for a group without rows."""
    kappa, eta = _radial_pair(x, t_start, t_step, phi, weights)
    constant = sum(w * f * f for w, f in zip(weights, phi, strict=True))
    statistic = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
    for v, (rows, keep) in enumerate(_groups(x, row_mask)):
        count = torch.where(keep.sum() == 0, 1, keep.sum())
        pairs = sum(keep[i] @ kappa.value(distance) @ keep for i, distance in _distances(rows))
        value = pairs / count**2 - 2 / count * (keep @ eta.value(rows.norm(dim=1))) + constant
        statistic[v] = torch.where(keep.sum() == 0, 0, value)
    return statistic


def sigreg_exact_backward(grad: Tensor, x: Tensor, row_mask: Tensor | None, t_start: float, t_step: float,
                          phi: list[float], weights: list[float]) -> Tensor:
    """The gradient with respect to x, [V, N, D]."""
    kappa, eta = _radial_pair(x, t_start, t_step, phi, weights)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    for v, (rows, keep) in enumerate(_groups(x, row_mask)):
        count = torch.where(keep.sum() == 0, 1, keep.sum())
        out = -2 / count * eta.slope(rows.norm(dim=1)).unsqueeze(1) * rows
        centred = rows - rows.mean(0)
        for i, distance in _distances(rows):
            pull = kappa.slope(distance) * keep
            out[i] += 2 / count**2 * (pull.sum(1, keepdim=True) * centred[i] - pull @ centred)
        grad_x[v] = (grad[v] * out).masked_fill(keep.unsqueeze(1) == 0, 0)
    return grad_x


def _groups(x: Tensor, row_mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [N, D] float64 and which of them count, [N] of 0 and 1; the others are 0, whatever they hold."""
    for v in range(x.shape[0]):
        keep = x.new_ones(x.shape[1], dtype=torch.float64) if row_mask is None else row_mask[v].double()
        yield x[v].double().masked_fill(keep.unsqueeze(1) == 0, 0), keep


def _distances(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their distances to all, [some, N]; from their mean, so that an offset costs nothing."""
    rows = rows - rows.mean(0) if len(rows) else rows
    square = rows.square().sum(1)
    some = max(1, PAIRS // max(1, len(rows)))
    for start in range(0, len(rows), some):
        i = slice(start, start + some)
        yield i, (square[i, None] + square - 2 * rows[i] @ rows.T).clamp_min(0).sqrt()


def _radial_pair(x: Tensor, t_start: float, t_step: float, phi: list[float], weights: list[float]):
    knots = tuple(t_start + j * t_step for j in range(len(phi)))
    damped = tuple(w * f for w, f in zip(weights, phi, strict=True))
    return _radial(x.shape[2], knots, tuple(weights), x.device), _radial(x.shape[2], knots, damped, x.device)


@functools.lru_cache(maxsize=16)
def _radial(dim: int, knots: tuple[float, ...], weights: tuple[float, ...], device: torch.device):
    if dim < TABLE_FROM_DIM:
        return RadialSum(dim, knots, weights)
    return RadialTable(dim, knots, weights, device)


class RadialSum:
    """f(r) = sum over j of w_j Psi_D(t_j r), knot by knot."""

    def __init__(self, dim: int, knots: tuple[float, ...], weights: tuple[float, ...]):
        self.dim, self.knots, self.weights = dim, knots, weights

    def value(self, r: Tensor) -> Tensor:
        return sum(w * psi(self.dim, t * r) for t, w in zip(self.knots, self.weights, strict=True))

    def slope(self, r: Tensor) -> Tensor:
        """f'(r) / r."""
        terms = (w * t * t * psi(self.dim + 2, t * r) for t, w in zip(self.knots, self.weights, strict=True))
        return sum(terms) / -self.dim


class RadialTable:
    """The same from cubics between equidistant points, made once; wrong by less than 1e-9 of sum |w|."""

    def __init__(self, dim: int, knots: tuple[float, ...], weights: tuple[float, ...], device: torch.device):
        fourth = sum(abs(w) * t**4 for t, w in zip(knots, weights, strict=True)) / sum(map(abs, weights))
        self.step = 0.004 * math.sqrt(dim) / max(1.0, fourth) ** 0.25
        r = torch.arange(0, _cutoff(dim) / min(knots), self.step, dtype=torch.float64)
        value, slope, curvature = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
        tables = [_PsiTable(dim + more) for more in (0, 2, 4)]
        for t, w in zip(knots, weights, strict=True):
            value += w * tables[0](t * r)
            slope -= w * t**2 * tables[1](t * r) / dim
            curvature += w * t**4 * tables[2](t * r) / (dim * (dim + 2))
        self.values = cubics(value, slope * r, self.step).to(device)
        self.slopes = cubics(slope, curvature * r, self.step).to(device)

    def value(self, r: Tensor) -> Tensor:
        return interpolate(self.values, r / self.step)

    def slope(self, r: Tensor) -> Tensor:
        return interpolate(self.slopes, r / self.step)


class _PsiTable:
    def __init__(self, dim: int):
        node, weight = sphere_rule(dim)
        self.step = 0.004 * math.sqrt(dim)
        r = torch.arange(0, _cutoff(dim), self.step, dtype=torch.float64)
        value, slope = torch.zeros_like(r), torch.zeros_like(r)
        for u, w in zip(node.tolist(), weight.tolist(), strict=True):
            value += w * (r * u).cos()
            slope -= w * u * (r * u).sin()
        self.values = cubics(value, slope, self.step)

    def __call__(self, r: Tensor) -> Tensor:
        return interpolate(self.values, r / self.step)


def cubics(value: Tensor, derivative: Tensor, step: float) -> Tensor:
    """[M] values and derivatives at distance `step` -> [M, 4] Hermite coefficients; the last is 0, for all beyond."""
    rise, left, right = value[1:] - value[:-1], step * derivative[:-1], step * derivative[1:]
    inside = torch.stack([value[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise], 1)
    return torch.cat([inside, inside.new_zeros(1, 4)])


def interpolate(coefficients: Tensor, position: Tensor) -> Tensor:
    index = position.long().clamp(0, len(coefficients) - 1)  # NaN lands anywhere and stays NaN
    c, u = coefficients[index], position - index
    return c[..., 0] + u * (c[..., 1] + u * (c[..., 2] + u * c[..., 3]))


def psi(dim: int, r: Tensor) -> Tensor:
    """E cos(r u) for u the first coordinate of a uniform point on the unit sphere, dim <= 12, float64."""
    if dim == 1:
        return r.cos()
    small, big = r.clamp_max(10).square(), r.clamp_min(10)
    coefficient, coefficients = 1.0, [1.0]
    for m in range(1, 45):
        coefficient *= -0.25 / (m * (dim / 2 + m - 1))
        coefficients.append(coefficient)
    series = torch.zeros_like(r)
    for coefficient in reversed(coefficients):
        series = series * small + coefficient
    if dim % 2:
        d, lower, value = 3, big.cos(), big.sin() / big
    else:
        d, lower, value = 4, torch.special.bessel_j0(big), 2 * torch.special.bessel_j1(big) / big
    if dim == 2:
        value = lower
    while d < dim:  # Bessel functions of rising order, stable for r > order
        d, lower, value = d + 2, value, d * (d - 2) / big.square() * (value - lower)
    return torch.where(r < 10, series, value)


def sphere_rule(dim: int) -> tuple[Tensor, Tensor]:
    """Gauss rule for u: eigenvectors of the Jacobi matrix of the Gegenbauer polynomials (Golub, Welsch 1969)."""
    k = torch.arange(1, NODES, dtype=torch.float64)
    off_diagonal = (k * (k + dim - 3) / ((2 * k + dim - 2) * (2 * k + dim - 4))).sqrt()
    node, vector = torch.linalg.eigh(off_diagonal.diag(1) + off_diagonal.diag(-1))
    return node, vector[0].square()


def _cutoff(dim: int) -> float:
    """Psi_D(r) stays below SMALLEST from here on."""
    order = dim / 2 - 1
    # |Psi| <= exp(-r^2 / 2D) up to the first zero, which lies beyond `order`
    normal = math.sqrt(-2 * dim * math.log(SMALLEST))
    if normal < order:
        return normal
    # the amplitude of the Bessel function decays as r^(-1/2)
    log_amplitude = math.lgamma(dim / 2) + order * math.log(2) + math.log(2 / math.pi) / 2
    return max(1.1 * math.exp((log_amplitude - math.log(SMALLEST)) / ((dim - 1) / 2)), 1.3 * order)
