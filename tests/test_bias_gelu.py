"""Bias and GELU against PyTorch's Linear and GELU and against float64; every element, special values, bad input."""

import re

import pytest
import torch
import torch.nn.functional as F

from jepa_fast import ops, testing
from jepa_fast.nn.block import Mlp
from jepa_fast.ops import bias_gelu

BACKENDS = testing.OPS["bias_gelu"].backends()
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gelu_and_slope(z):
    """In float64, also where 1 + erf cancels."""
    z = z.double()
    cdf = 0.5 * torch.special.erfc(-z * 0.5**0.5)
    return z * cdf, cdf + z * torch.exp(-0.5 * z * z) / (2 * torch.pi) ** 0.5


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend in ("cpp", "cuda")])
def test_every_element_keeps_its_relative_accuracy(backend):
    """Down to where the result is no longer a normal float32; PyTorch's gives 0 from about -5.5 on."""
    x = torch.linspace(-12.5, 30.0, 200_000).view(-1, 20).requires_grad_()
    with ops.use_backend(backend):
        out = bias_gelu(x, torch.zeros(20))
        (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    exact, exact_slope = gelu_and_slope(x.detach())
    assert float(((out.detach() - exact) / exact).abs().nan_to_num(0).max()) < 1e-5
    near = x.detach() > -2
    assert float(((out.detach() - exact) / exact).abs()[near].nan_to_num(0).max()) < 5e-7
    far = (x.detach() + 0.7518).abs() > 0.3  # from the root of the slope
    assert float(((slope - exact_slope) / exact_slope).abs()[far].max()) < 1e-5
    assert float((slope - exact_slope).abs().max()) < 3e-7


def test_equals_linear_and_gelu(backend):
    x, weight, bias, grad = draw(50, 24), draw(45, 24, seed=1), draw(45, seed=2), draw(50, 45, seed=3)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = F.gelu(F.linear(*exact_inputs))
    out = bias_gelu(F.linear(x, weight), bias)
    assert testing.error(out, exact) < 5e-7
    for ours, theirs in zip(torch.autograd.grad(out, inputs, grad),
                            torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True):
        assert testing.error(ours, theirs) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values(backend, dtype):
    """NaN, and infinities: on a CPU they become it, as in PyTorch's own vectors; in whole vectors and in the rest."""
    values = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1e30, -1e30, 14.9, -16.0, 1e-30, -1e-30]).to(dtype)
    D = 5 * len(values)
    x, bias = values.repeat(2, 5).requires_grad_(), torch.zeros(D, dtype=dtype, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    out, expected = bias_gelu(x, bias), F.gelu(exact)
    if backend != "triton":
        expected = torch.where(exact == INF, NAN, expected)
    grad, grad_bias = torch.autograd.grad(out, [x, bias], torch.ones_like(out))
    (expected_grad,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for ours, theirs in ((out, expected), (grad, expected_grad), (grad_bias, 2 * expected_grad[0])):
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=1e-6, atol=1e-37, equal_nan=True)


def test_nan_in_grad_reaches_both_gradients(backend):
    x, bias, grad = draw(40, 20).requires_grad_(), draw(20, seed=1).requires_grad_(), draw(40, 20, seed=2)
    grad[35, 3] = grad[35, 19] = NAN
    grad_x, grad_bias = torch.autograd.grad(bias_gelu(x, bias), [x, bias], grad)
    assert torch.equal(grad_x.isnan(), grad.isnan()) and grad_bias.isnan().nonzero().flatten().tolist() == [3, 19]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_half_precision_is_rounded_once(dtypes):
    x, bias = (6 * draw(200, 70)).to(dtypes[0]).requires_grad_(), draw(70, seed=1).to(dtypes[1]).requires_grad_()
    grad = draw(200, 70, seed=2).to(dtypes[0])
    out = bias_gelu(x, bias)
    grad_x, grad_bias = torch.autograd.grad(out, [x, bias], grad)
    exact, slope = gelu_and_slope(x.detach().double() + bias.detach().double())
    exact_grad = grad.double() * slope
    half_step = torch.finfo(dtypes[0]).eps / 2
    for ours, theirs in ((out, exact), (grad_x, exact_grad)):
        assert ours.dtype == dtypes[0]
        assert bool(((ours - theirs).abs() <= 1.001 * half_step * theirs.abs() + 1e-6).all())
    assert grad_bias.dtype == dtypes[1]
    assert testing.error(grad_bias, exact_grad.sum(0)) < (1e-6 if dtypes[1] == torch.float32 else half_step)


@pytest.mark.parametrize("P", [1, 2, 31, 32, 33, 65])
def test_every_width(backend, P):
    """Against what a sum of P rounded terms may be off, element by element: nothing is missed at an edge or twice."""
    for D in range(1, 71):
        x, bias, grad = draw(P, D).requires_grad_(), draw(D, seed=1).requires_grad_(), draw(P, D, seed=2)
        out = bias_gelu(x, bias)
        grad_x, grad_bias = torch.autograd.grad(out, [x, bias], grad)
        exact, slope = gelu_and_slope(x.detach().double() + bias.detach().double())
        terms = grad * slope
        assert bool(((out - exact).abs() <= 1e-6 * (1 + exact.abs())).all()), D
        assert bool(((grad_x - terms).abs() <= 5e-7 * grad.abs()).all()), D
        assert bool(((grad_bias - terms.sum(0)).abs() <= 5e-7 * grad.abs().sum(0)).all()), D


@pytest.mark.parametrize("fc1_gets_gradient", [True, False])
def test_only_what_is_asked_gets_a_gradient(backend, fc1_gets_gradient):
    x, bias = draw(5, 9).requires_grad_(not fc1_gets_gradient), draw(9, seed=1).requires_grad_(fc1_gets_gradient)
    bias_gelu(x, bias).sum().backward()
    assert (x.grad is None) == fc1_gets_gradient and (bias.grad is None) != fc1_gets_gradient


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension was not built")
def test_number_of_threads_does_not_matter():
    x, bias, grad = draw(700, 100).requires_grad_(), draw(100, seed=1).requires_grad_(), draw(700, 100, seed=2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with ops.use_backend("cpp"):
                out = bias_gelu(x, bias)
                results.append((out, *torch.autograd.grad(out, [x, bias], grad)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("sign", [0.0, 1.0])
def test_long_sums_stay_exact(backend, sign):
    """The bias gradient over 20,000 rows: random signs, and all of one sign."""
    grad = draw(20_000, 8) if sign == 0 else draw(20_000, 8).abs()
    x, bias = 3 + draw(20_000, 8, seed=1).abs(), torch.zeros(8, requires_grad=True)
    (grad_bias,) = torch.autograd.grad(bias_gelu(x, bias), bias, grad)
    assert testing.error(grad_bias, (grad.double() * gelu_and_slope(x)[1]).sum(0)) < 3e-7


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not emulated")
@pytest.mark.parametrize("P", [95, 96, 97])
def test_many_rows_per_program(monkeypatch, P):
    """Sums over rows where a program has several blocks of them, and the last program fewer."""
    from jepa_fast.kernels import bias_gelu as kernels
    monkeypatch.setattr(kernels, "NUM_PROGRAMS", 4)
    x, bias, grad = draw(P, 600), draw(600, seed=1).requires_grad_(), draw(P, 600, seed=2)
    with ops.use_backend("triton"):
        (grad_bias,) = torch.autograd.grad(bias_gelu(x, bias), bias, grad)
    assert testing.error(grad_bias, (grad * gelu_and_slope(x.double() + bias.detach().double())[1]).sum(0)) < 3e-7


def test_mlp_is_linear_gelu_linear(backend):
    torch.manual_seed(0)
    mlp, x = Mlp(24, 90), draw(31, 24)
    # its products are another op
    with torch.no_grad(), ops.use_backend("plain", "matmul"):
        expected = mlp.fc2(F.gelu(mlp.fc1(x)))
        assert testing.error(mlp(x), expected) < 5e-7
        with torch.autocast("cpu", torch.bfloat16):
            assert mlp(x).dtype == torch.bfloat16 and testing.error(mlp(x), expected) < 1e-2
    assert [name for name, _ in mlp.named_parameters()] == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def test_second_derivative_is_refused(backend):
    x = draw(4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="bias_gelu has no second derivative"):
        torch.autograd.grad(bias_gelu(x, torch.zeros(8)).sum(), x, create_graph=True)


X, BIAS = torch.zeros(4, 8), torch.zeros(8)
BAD = [
    ((X.long(), BIAS), TypeError, "x must be floating point, got torch.int64"),
    ((X[0], BIAS), ValueError, "x must be [..., D] of at least two dimensions, got [8]"),
    ((X, BIAS[:7]), ValueError, "bias must be [D] = [8] torch.float32 or torch.float32, got [7] torch.float32"),
    ((X, BIAS[None]), ValueError, "bias must be [D] = [8] torch.float32 or torch.float32, got [1, 8] torch.float32"),
    ((X.bfloat16(), BIAS.half()), ValueError,
     "bias must be [D] = [8] torch.bfloat16 or torch.float32, got [8] torch.float16"),
    ((X, BIAS.to("meta")), ValueError, "x and bias must be on one device, got cpu and meta"),
]


@pytest.mark.parametrize("arguments, kind, message", BAD)
def test_bad_input(arguments, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        bias_gelu(*arguments)
