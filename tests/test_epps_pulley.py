"""The statistic of projections that are given: the sums of sigreg without its product, by the checks of every op."""

import pytest
import torch

from jepa_fast import ops, testing
from jepa_fast.testing import Case, OpSpec
from jepa_fast.testing.sigreg import QUADRATURES

# not in testing.OPS: kernels and cases are those of sigreg, and another 300 random cases would find nothing new
SPEC = OpSpec(function=ops.epps_pulley, ops=("projection_sums", "projection_sums_backward"), gradients=("projections",),
              cases=[], random_case=None, floor=4.0)
CASES = {"no-groups": ((0,), 5, 4, "official"), "no-rows": ((2,), 0, 4, "official"), "bcs": ((2,), 48, 24, "bcs"),
         "33-knots": ((2, 2), 33, 130, "wide-33"), "official": ((2,), 64, 48, "official")}


def case_of(name, **options):
    lead, N, K, quadrature = CASES[name]
    return Case(name, lambda g: {"projections": torch.randn(*lead, N, K, generator=g),
                                 "quadrature": QUADRATURES[quadrature]} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.skipif("cpp" not in SPEC.backends(), reason=str(ops.COMPILED_MISSING))
def test_kernel(name, dtype):
    testing.assert_within_error_rule(*testing.run_three_ways(SPEC, case_of(name), "cpp", dtype), SPEC.floor)


@pytest.mark.parametrize("scale", ["N", "none", 2.5])
def test_is_sigreg_along_the_axes(scale):
    p = torch.randn(3, 20, 9, dtype=torch.float64, requires_grad=True)
    ours, expected = ops.epps_pulley(p, scale=scale), ops.sigreg(p, torch.eye(9), scale=scale, reduction=None)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    grad, expected_grad = (torch.autograd.grad(out, p, upstream)[0] for out in (ours, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


def test_strides_do_not_matter():
    p = torch.randn(48, 2, 30).transpose(0, 1)
    assert torch.equal(ops.epps_pulley(p), ops.epps_pulley(p.contiguous()))


def test_opcheck_and_one_graph():
    for call in testing.record_calls(SPEC, case_of("bcs")):
        torch.library.opcheck(*call)
    torch._dynamo.reset()
    p = torch.randn(2, 20, 9)
    compiled = torch.compile(ops.epps_pulley, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p), ops.epps_pulley(p), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"x must be floating point \[..., N, D\], got \[4\]"):
        ops.epps_pulley(torch.randn(4))
