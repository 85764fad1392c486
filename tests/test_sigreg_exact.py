"""The slice-free limit against the series it sums, against many slices, and in its corner cases."""

import mpmath
import pytest
import torch

from jepa_fast import ops
from jepa_fast.ops import Quadrature
from jepa_fast.reference import sigreg_exact as reference

OFFICIAL = Quadrature.half_line(3.0, 17)
DIMS = [1, 2, 3, 4, 6, 9, 10, 11, 16, 33, 128, 160, 512, 2048]


def psi(dim: int, r: float) -> float:
    """The series of the hypergeometric function 0F1, summed with as many digits as it takes."""
    with mpmath.workdps(30):
        return float(mpmath.hyp0f1(mpmath.mpf(dim) / 2, -mpmath.mpf(r) ** 2 / 4))


def brute_force(x: torch.Tensor, quadrature: Quadrature) -> tuple[float, torch.Tensor]:
    """Statistic of x [N, D] and its gradient, pair by pair and knot by knot."""
    N, D = x.shape
    value, grad = 0.0, torch.zeros_like(x)
    for t, phi, weight in zip(quadrature.knots, quadrature.phi, quadrature.weights, strict=True):
        value += weight * phi**2
        for i in range(N):
            r = x[i].norm().item()
            value -= 2 / N * weight * phi * psi(D, t * r)
            grad[i] += 2 / N * weight * phi * t**2 / D * psi(D + 2, t * r) * x[i]
            for j in range(N):
                r = (x[i] - x[j]).norm().item()
                value += weight * psi(D, t * r) / N**2
                grad[i] -= 2 / N**2 * weight * t**2 / D * psi(D + 2, t * r) * (x[i] - x[j])
    return value, grad


@pytest.mark.parametrize("dim", DIMS[:-1])
@pytest.mark.parametrize("spread, offset", [(1.0, 0.0), (0.01, 0.0), (10.0, 0.0), (1.0, 30.0)])
def test_against_the_series(dim, spread, offset):
    g = torch.Generator().manual_seed(dim)
    x = offset / dim**0.5 + spread * torch.randn(4, dim, dtype=torch.float64, generator=g)
    quadrature = Quadrature.half_line(4.0, 8)
    value, grad = brute_force(x, quadrature)
    x.requires_grad_()
    ours = ops.sigreg_exact(x, quadrature=quadrature, scale="none")
    ours.backward()
    assert ours.item() == pytest.approx(value, rel=1e-8)
    # far from the origin everything has decayed, and the gradient with it: there the error is absolute
    full = sum(w * t**2 for t, w in zip(quadrature.knots, quadrature.weights, strict=True)) / dim * x.norm()
    assert (x.grad - grad).norm() < 1e-7 * grad.norm() + 1e-9 * full


@pytest.mark.parametrize("dim", DIMS)
def test_radial_functions_from_zero_to_far_beyond_their_tables(dim):
    kappa = reference._radial(dim, OFFICIAL.knots, OFFICIAL.weights, torch.device("cpu"))
    end = 60.0 if dim < reference.TABLE_FROM_DIM else reference._cutoff(dim) / OFFICIAL.t_start
    r = [0.0, 1e-9, 1e-3, 1.0, *(dim**0.5 * s for s in (0.1, 0.5, 1, 2, 5, 10)), 0.5 * end, 0.999 * end, 1.01 * end]
    value = [sum(w * psi(dim, t * s) for t, w in zip(OFFICIAL.knots, OFFICIAL.weights, strict=True)) for s in r]
    slope = [-sum(w * t**2 * psi(dim + 2, t * s) for t, w in zip(OFFICIAL.knots, OFFICIAL.weights, strict=True)) / dim
             for s in r]
    r, value, slope = (torch.tensor(numbers, dtype=torch.float64) for numbers in (r, value, slope))
    assert (kappa.value(r) - value).abs().max() < 2e-9
    assert (kappa.slope(r) - slope).abs().max() < 2e-9 * slope[0].abs()


@pytest.mark.parametrize("dim", [1, 2, 7, 24, 64])
def test_mean_over_many_slices(dim):
    """The mean over slices comes nearer as one over the root of their number; with one dim it is the same at once."""
    x = torch.randn(2, 60, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.3
    x.requires_grad_()
    exact = ops.sigreg_exact(x, reduction=None)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x)
    slices = ops.sigreg(x, step=0, num_slices=20_000, reduction=None)
    (grad,) = torch.autograd.grad(slices.mean(1).sum(), x)
    noise = slices.std(1) / slices.shape[1] ** 0.5
    assert ((slices.mean(1) - exact).abs() <= 4 * noise + 1e-9).all()
    assert float((grad - exact_grad).norm() / exact_grad.norm()) < (1e-9 if dim == 1 else 0.15)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x = torch.randn(1, 300, 20, dtype=torch.float64)
    expected = ops.sigreg_exact(x)
    monkeypatch.setattr(reference, "PAIRS", 7 * 300)
    assert ops.sigreg_exact(x).item() == pytest.approx(expected.item(), rel=1e-13)


def test_row_mask_equals_dropping_rows():
    x, mask = torch.randn(2, 30, 12), torch.rand(2, 30) < 0.5
    garbage = x.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    masked = ops.sigreg_exact(garbage, row_mask=mask, reduction=None)
    masked.sum().backward()
    for v in range(2):
        rows = x[v, mask[v]].requires_grad_()
        loss = ops.sigreg_exact(rows)
        loss.backward()
        torch.testing.assert_close(masked[v], loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(garbage.grad[v, mask[v]], rows.grad, rtol=1e-5, atol=1e-7)
        assert (garbage.grad[v, ~mask[v]] == 0).all()


@pytest.mark.parametrize("dim", [3, 12])
def test_nan_reaches_the_loss_of_its_group(dim):
    x = torch.randn(2, 10, dim)
    x[1, 4, 1] = float("nan")
    loss = ops.sigreg_exact(x, reduction=None)
    assert loss[0].isfinite() and loss[1].isnan()


def test_bad_input():
    with pytest.raises(ValueError, match="scale must be one of N, none, got 'N_global'"):
        ops.sigreg_exact(torch.randn(4, 3), scale="N_global")
    with pytest.raises(ValueError, match=r"row_mask must be \[4\] bool"):
        ops.sigreg_exact(torch.randn(4, 3), row_mask=torch.ones(3, dtype=torch.bool))
