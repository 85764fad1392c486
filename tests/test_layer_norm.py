"""Layer normalisation against PyTorch's on the written-out sum; dtypes; many rows per program; bad input."""

import pytest
import torch
import torch.nn.functional as F

from jepa_fast import ops, testing
from jepa_fast.ops import layer_norm

BACKENDS = testing.OPS["layer_norm"].backends()


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(outputs, inputs):
    upstream = [draw(*out.shape, seed=9 + i, dtype=out.dtype).detach() for i, out in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, upstream)


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_equals_pytorch(backend, has_residual):
    x, residual, weight, bias = draw(30, 48), draw(30, 48, seed=1), draw(48, seed=2), draw(48, seed=3)
    if has_residual:
        ours = layer_norm(x, weight, bias, 1e-5, residual)
        expected = F.layer_norm(x + residual, (48,), weight, bias, 1e-5), x + residual
        inputs = [x, residual, weight, bias]
    else:
        ours, expected = [layer_norm(x, weight, bias, 1e-5)], [F.layer_norm(x, (48,), weight, bias, 1e-5)]
        inputs = [x, weight, bias]
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    for grad, other in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_float32_stream_with_half_branches(backend, half):
    """The layout of a block under autocast: branch and out are half, stream, weight and bias float32."""
    branch, stream, weight, bias = draw(20, 64, dtype=half), draw(20, 64, seed=1), draw(64, seed=2), draw(64, seed=3)
    out, summed = layer_norm(branch, weight, bias, residual=stream)
    assert out.dtype == half and summed.dtype == torch.float32
    assert torch.equal(summed, branch.float() + stream)
    exact = F.layer_norm(summed.double(), (64,), weight.double(), bias.double(), 1e-6)
    assert testing.error(out, exact) <= torch.finfo(half).eps
    grads = gradients([out, summed], [branch, stream, weight, bias])
    assert [grad.dtype for grad in grads] == [half, torch.float32, torch.float32, torch.float32]
    assert torch.equal(grads[0], grads[1].to(half))


def test_out_dtype(backend):
    x = draw(20, 64)
    out = layer_norm(x, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert testing.error(out, F.layer_norm(x.double(), (64,), eps=1e-6)) <= torch.finfo(torch.bfloat16).eps
    assert gradients([out], [x])[0].dtype == torch.float32


def test_one_of_two_results_is_used(backend):
    """The gradient of the sum alone passes as it is; that of the normalised rows alone needs no other."""
    branch, stream = draw(6, 32), draw(6, 32, seed=1)
    _, summed = layer_norm(branch, residual=stream)
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in torch.autograd.grad(summed.sum(), [branch, stream]))
    out, _ = layer_norm(branch, residual=stream)
    ours = gradients([out], [branch, stream])
    expected = gradients([F.layer_norm(branch + stream, (32,), eps=1e-6)], [branch, stream])
    for grad, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6)


def test_collapsed_rows_are_zero(backend):
    """Rows without variance, far from zero, leave no rounding for 1 / std to blow up."""
    x = (1000 * draw(9, 1)).detach().repeat(1, 45)
    assert layer_norm(x).abs().max() < 1e-4


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not emulated")
def test_many_rows_per_program(monkeypatch):
    """The sums over rows in two stages, where a program has several blocks of rows and the last one fewer."""
    from jepa_fast.kernels import layer_norm as kernels
    monkeypatch.setattr(kernels, "NUM_PROGRAMS", 3)
    spec = testing.OPS["layer_norm"]
    for rows in (99, 100, 131):
        case = testing.Case(f"{rows} rows", lambda g, rows=rows: {
            "x": torch.randn(rows, 200, generator=g), "weight": torch.randn(200, generator=g),
            "bias": torch.randn(200, generator=g)})
        testing.assert_within_error_rule(*testing.run_three_ways(spec, case, "triton", torch.float32))


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no C++ compiler, or a GPU: csrc/cuda is not run on the host")
@pytest.mark.parametrize("rows, D, dtype", [
    (2, 8192, torch.float32), (2, 8192, torch.bfloat16), (2, 8191, torch.bfloat16),  # as many warps as there can be
    (2200, 16, torch.float32), (2300, 520, torch.float32),  # several rows per thread, and per barrier
])
def test_rows_of_many_warps_and_many_rows_per_block(rows, D, dtype):
    def make(g):
        return {"x": torch.randn(rows, D, generator=g), "weight": torch.randn(D, generator=g),
                "bias": torch.randn(D, generator=g)}

    def make_residual(g):
        return make(g) | {"residual": torch.randn(rows, D, generator=g)}

    for name, arguments in (("layer_norm", make), ("add_layer_norm", make_residual)):
        case = testing.Case(f"{rows}-{D}", arguments)
        testing.assert_within_error_rule(*testing.run_three_ways(testing.OPS[name], case, "cuda", dtype))


def test_wider_rows_have_no_fast_version():
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="wider than 8192|not for cpu tensors"):
        layer_norm(torch.zeros(1, 8200))


def test_no_second_derivative():
    x = draw(3, 8)
    with pytest.raises(RuntimeError, match="layer_norm has no second derivative"):
        torch.autograd.grad(layer_norm(x).sum(), x, create_graph=True)


BAD = [
    (dict(x=torch.zeros(3, 4, dtype=torch.int64)), TypeError, "x and out_dtype must be floating point"),
    (dict(x=torch.zeros(4)), ValueError, r"x must be \[..., D\] of at least two dimensions"),
    (dict(x=torch.zeros(3, 4), bias=torch.zeros(4)), ValueError, "bias was given without weight"),
    (dict(x=torch.zeros(3, 4), weight=torch.zeros(3)), ValueError, r"weight must be \[4\]"),
    (dict(x=torch.zeros(3, 4), weight=torch.zeros(4, dtype=torch.bfloat16)), ValueError, "weight must be"),
    (dict(x=torch.zeros(3, 4), residual=torch.zeros(1, 4)), ValueError, r"residual must be \[3, 4\]"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**arguments)
