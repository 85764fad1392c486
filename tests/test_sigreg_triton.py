"""The Triton kernels of SIGReg, interpreted: what the cases of the op are too small, too large or too tame to reach."""

import pytest
import torch

from jepa_fast import ops, testing
from jepa_fast.ops import Quadrature
from jepa_fast.testing import Case
from jepa_fast.testing.sigreg import _case

SPEC = testing.OPS["sigreg_sums"]
pytestmark = pytest.mark.skipif("triton" not in SPEC.backends(), reason="triton is not installed")


@pytest.fixture
def kernels():
    return pytest.importorskip("jepa_fast.kernels.sigreg")


def assert_rule(case: Case, dtype: torch.dtype = torch.float32):
    testing.assert_within_error_rule(*testing.run_three_ways(SPEC, case, "triton", dtype), SPEC.floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles_and_splits(kernels, monkeypatch, dtype):
    """As where there are many groups and slices: a program adds up several tiles, the last of them ragged."""
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "ROWS", 256)
    assert_rule(_case("tiles", (2,), 530, 11, 20, mask=0.8), dtype)
    assert_rule(_case("tiles", (), 530, 70, 20), dtype)


@pytest.mark.parametrize("rows", [33, 100, 190])
def test_gradient_in_pieces(kernels, monkeypatch, rows):
    """Pieces of some rows of a group, of one group and of several, against one piece."""
    case = _case("pieces", (3,), 90, 11, 20, mask=0.8)
    whole = testing.run(SPEC, testing.make(SPEC, case, torch.float32), "triton")
    monkeypatch.setattr(kernels, "PIECE", rows * 20 * 4)
    pieces = testing.run(SPEC, testing.make(SPEC, case, torch.float32), "triton")
    torch.testing.assert_close(pieces["grad x"], whole["grad x"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("num_knots", [17, 18, 20, 42, 66])
def test_knots_in_passes(num_knots):
    """More knots than a pass takes; 16, 17, 19, 41 and 65 of them."""
    for quadrature in (Quadrature.half_line(3.0, num_knots), Quadrature.trapezoid(0.2, 4.0, num_knots - 1)):
        assert_rule(_case("knots", (2,), 30, 9, 20, quadrature=quadrature))


@pytest.mark.parametrize("t_start, t_step", [(0.0, 0.25), (0.25, 0.25), (0.125, 0.25), (0.3, 0.17), (2.0, 0.01)])
def test_any_grid(t_start, t_step):
    """The sums and their gradient alone, on grids that no quadrature has."""
    x, directions = torch.randn(2, 33, 7), torch.randn(7, 20)
    grad = torch.randn(2, 2, 6, 20)
    arguments = [(x, directions, None, t_start, t_step, 6), (grad, x, directions, None, t_start, t_step)]
    for op, args in zip((torch.ops.jepa_fast.sigreg_sums, torch.ops.jepa_fast.sigreg_sums_backward), arguments, strict=True):
        results = {}
        for name, backend, dtype in (("ours", "triton", torch.float32), ("plain", "plain", torch.float32),
                                     ("exact", "plain", torch.float64)):
            with ops.use_backend(backend):
                results[name] = {"out": op(*(testing.cast(arg, dtype) for arg in args))}
        testing.assert_within_error_rule(**results, roundings=SPEC.floor)


def test_float16():
    assert_rule(_case("half", (2,), 70, 20, 24), torch.float16)
    assert_rule(_case("mean", (2,), 40, 70, 70, reduction="mean"), torch.float16)


@pytest.mark.parametrize("spread, mean", [(1.0, 0.0), (1e-3, 0.0), (5.0, 0.0), (1.0, 3.0), (40.0, 0.0)])
def test_as_near_to_float64_as_plain(spread, mean):
    """Twice the error of plain and no floor, on sizes where that is no luck."""
    case = _case(f"near-{spread}-{mean}", (2,), 130, 64, 64, spread=spread, mean=mean, reduction="mean")
    ours, plain, exact = testing.run_three_ways(SPEC, case, "triton", torch.float32)
    assert testing.error(ours["grad x"], exact["grad x"]) <= 2 * testing.error(plain["grad x"], exact["grad x"])
    assert testing.error(ours["out0"], exact["out0"]) <= 2 * testing.error(plain["out0"], exact["out0"]) + 2e-7


def test_directions_are_rounded_to_half_precision():
    """Another direction, hardly shorter or longer: far from the sums as the noise of slices goes."""
    generator = torch.Generator().manual_seed(0)
    x, directions = torch.randn(2, 64, 32, generator=generator).bfloat16(), ops.directions(0, 0, 32, 64)
    with ops.use_backend("triton"):
        ours = ops.sigreg(x, directions)
        assert torch.equal(ours, ops.sigreg(x, directions.bfloat16()))
    assert testing.error(ours, ops.sigreg(x.double(), directions)) < 3e-3


def test_nan_infinity_and_huge_numbers():
    with ops.use_backend("triton"):
        for bad in (float("nan"), float("inf"), -float("inf")):
            x = torch.randn(2, 30, 5)
            x[1, 17, 3] = bad
            statistic = ops.sigreg(x, torch.randn(5, 40), reduction=None)
            assert statistic[0].isfinite().all() and statistic[1].isnan().all()
        for size in (1e-40, 1e-30, 1e5, 1e10, 1e30):
            x = (size * torch.randn(2, 30, 5)).requires_grad_()
            loss = ops.sigreg(x, torch.randn(5, 40))
            loss.backward()
            assert loss.isfinite() and x.grad.isfinite().all() and loss < 100
        x = torch.randn(2, 30, 5)
        x[:, 10:] = float("nan")
        mask = torch.arange(30).expand(2, 30) < 10
        x.requires_grad_()
        ops.sigreg(x, torch.randn(5, 40), row_mask=mask).backward()
        assert x.grad.isfinite().all() and (x.grad[:, 10:] == 0).all() and (x.grad[:, :10] != 0).all()
