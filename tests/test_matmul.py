"""`matmul` where it can go wrong: every edge of a tile, what does not fit bfloat16, ranges, special values, bad input."""

import re

import pytest
import torch

from jepa_fast import ops, testing
from jepa_fast.ops import matmul

HAS_AMX = "cpp" in testing.OPS["matmul"].backends()
INF, NAN = float("inf"), float("nan")
NAN_OF_ONES = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding it carries into the sign
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="no AMX here, or the C++ extension was not built")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_amx(a, b, bias=None):
    with ops.use_backend("cpp"):
        return matmul(a, b, bias)


def assert_as_accurate_as_float32(a, b, times=1.0):
    """Row by row: a small one must not hide behind a large one."""
    exact = a.double() @ b.double()
    ours, plain = (((out - exact).norm(dim=1) / exact.norm(dim=1)) for out in (on_amx(a, b), a @ b))
    assert float(ours.max()) <= times * float(plain.max()) + torch.finfo(torch.float32).eps


@needs_amx
@pytest.mark.parametrize("M, N", [(1, 1), (15, 17), (16, 16), (31, 32), (32, 33), (65, 47), (5, 470)])
def test_every_edge(M, N):
    """Element by element, for depths around every border of tiles and chunks."""
    for K in (1, 15, 16, 17, 31, 32, 33, 63, 65, 383, 384, 385, 769):
        a, b, bias = draw(M, K, seed=K), draw(K, N, seed=K + 1), draw(N, seed=2)
        for left in (a, a.T.contiguous().T):
            for right in (b, b.T.contiguous().T):
                out, exact = on_amx(left, right, bias), a.double() @ b.double() + bias
                bound = 4e-7 * (a.double().abs() @ b.double().abs() + bias.abs())
                assert bool(((out - exact).abs() <= bound).all()), (K, left.stride(), right.stride())


@needs_amx
@pytest.mark.parametrize("K", [1, 2, 33, 384, 1536, 9000])
def test_long_sums(K):
    assert_as_accurate_as_float32(draw(40, K), draw(K, 50, seed=1))
    assert_as_accurate_as_float32(draw(40, K).abs(), draw(K, 50, seed=1).abs(), times=2.0)


@needs_amx
def test_exponents_of_all_sizes():
    """Rows of sizes from 2^-40 to 2^40; elements of a row from 2^-30 to 2^30, with and without their inverse in b."""
    generator = torch.Generator().manual_seed(3)
    powers = torch.randint(-30, 31, (600,), generator=generator).float().exp2()
    a, b = draw(64, 600), draw(600, 70, seed=1)
    assert_as_accurate_as_float32(a * torch.linspace(-40, 40, 64).round().exp2()[:, None], b, times=2.0)
    assert_as_accurate_as_float32(a * powers, b, times=2.0)
    assert_as_accurate_as_float32(a * powers, b / powers[:, None], times=2.0)


@needs_amx
@pytest.mark.parametrize("share", [1e-2, 1e-5])
def test_cancellation(share):
    a, b = draw(64, 300), draw(300, 70, seed=1)
    assert_as_accurate_as_float32(torch.cat([a, -a], 1), torch.cat([b, b + share * draw(300, 70, seed=2)]), times=2.0)


@needs_amx
def test_all_24_bits_count():
    """Products that are exact in float32: one per sum, of numbers that fill the first, second or third bfloat16."""
    generator = torch.Generator().manual_seed(4)
    whole = torch.randint(-(2**24), 2**24, (64, 64), generator=generator).float()
    assert torch.equal(on_amx(whole, torch.eye(64)), whole) and torch.equal(on_amx(torch.eye(64), whole), whole)
    odd = torch.randint(-(2**12), 2**12, (2, 64, 1), generator=generator).float()
    assert torch.equal(on_amx(odd[0], odd[1].T), odd[0] * odd[1].T)


@needs_amx
@pytest.mark.parametrize("value", [NAN, NAN_OF_ONES, INF, -INF, 3.4e38, 1e20, -1e20], ids=str)
@pytest.mark.parametrize("which", ["a", "b", "bias"])
def test_special_values(value, which):
    """Infinities, NaN and what might overflow on the way: PyTorch's own product, wherever they are."""
    arguments = {"a": draw(70, 40), "b": draw(40, 90, seed=1), "bias": draw(90, seed=2)}
    arguments[which].view(-1)[-1] = value  # a tensor: Python's numbers do not keep which NaN it is
    out, expected = on_amx(**arguments), torch.addmm(arguments["bias"], arguments["a"], arguments["b"])
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.isfinite(), expected.isfinite()) and torch.equal(out.isnan(), expected.isnan())


@needs_amx
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-20, 1e-15, 1e15, 1e30])
def test_small_and_large_numbers(scale):
    """Ranges in which the units would lose bits (denormals, too) or overflow."""
    a, b = scale * draw(40, 50), draw(50, 60, seed=1)
    for left, right in ((a, b), (b.T, a.T)):
        exact = left.double() @ right.double()
        ours, plain = testing.error(on_amx(left, right), exact), testing.error(left @ right, exact)
        assert ours <= 2 * plain + 1e-7


@needs_amx
def test_number_of_threads_and_place_do_not_matter():
    """Bit-equal for 1 to 3 threads, and a row or column alone equals itself among others."""
    a, b, threads = draw(210, 900), draw(900, 450, seed=1), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(on_amx(a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(on_amx(a[33:70], b), results[0][33:70])
    assert torch.equal(on_amx(a, b[:, 100:440]), results[0][:, 100:440])


@needs_amx
def test_backward_uses_it_too():
    """Gradients of all three, of transposed arguments, and only of those that need one; twice."""
    a, b, bias, grad = draw(70, 40), draw(33, 40, seed=1), draw(33, seed=2), draw(70, 33, seed=3)
    inputs = [t.requires_grad_() for t in (a, b, bias)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(exact_inputs[0] @ exact_inputs[1].T + exact_inputs[2], exact_inputs, grad.double())
    for ours, theirs in zip(torch.autograd.grad(on_amx(a, b.T, bias), inputs, grad), exact, strict=True):
        assert testing.error(ours, theirs) < 3e-7
    on_amx(a.detach(), b.T, bias.detach()).sum().backward()
    assert a.grad is None and b.grad is not None and bias.grad is None
    (first,) = torch.autograd.grad(on_amx(a, b.T).square().sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    assert testing.error(second, 2 * torch.ones(70, 40) @ (b.T @ b)) < 1e-6


def test_small_products_and_other_dtypes_are_pytorch_s():
    a, b = draw(8, 9), draw(9, 10, seed=1)
    assert torch.equal(matmul(a, b), a @ b)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(matmul(a.to(dtype), b.to(dtype)), a.to(dtype) @ b.to(dtype))


A, B, BIAS = torch.zeros(4, 8), torch.zeros(8, 6), torch.zeros(6)
BAD = [
    ((A.long(), B), TypeError, "a must be floating point, of one dtype with a, got torch.int64 and torch.int64"),
    ((A, B.double()), TypeError, "b must be floating point, of one dtype with a, got torch.float64 and torch.float32"),
    ((A, B, BIAS.half()), TypeError,
     "bias must be floating point, of one dtype with a, got torch.float16 and torch.float32"),
    ((A[0], B), ValueError, "a must have 2 dimensions, got [8]"),
    ((A, B[None]), ValueError, "b must have 2 dimensions, got [1, 8, 6]"),
    ((A, B, B), ValueError, "bias must have 1 dimension, got [8, 6]"),
    ((A, B.T), ValueError, "b must be [K, N] with K = 8, as a, got [6, 8]"),
    ((A, B, BIAS[:5]), ValueError, "bias must be [N] = [6], got [5]"),
    ((A, B.to("meta")), ValueError, "a and b must be on one device, got cpu and meta"),
]


@pytest.mark.parametrize("arguments, kind, message", BAD)
def test_bad_input(arguments, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        matmul(*arguments)
