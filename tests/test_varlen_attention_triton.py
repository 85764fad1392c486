"""What tests/test_ops.py does not see of the Triton version of `varlen_attention`: float16, the polynomial, copies."""

import pytest
import torch

from jepa_fast import testing

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from jepa_fast.kernels.varlen_attention import exp2, head_blocks, in_heads  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = testing.OPS["varlen_attention"]
CASES = {str(case): case for case in SPEC.cases}


@pytest.mark.parametrize("name", ["ragged-d24", "rotary-d80", "frames-of-a-cache"])
def test_float16(name):
    ours, plain, exact = testing.run_three_ways(SPEC, CASES[name], "triton", torch.float16, DEVICE)
    testing.assert_within_error_rule(ours, plain, exact, SPEC.floor)


@triton.jit
def exp2_kernel(x_ptr, out_ptr, POLYNOMIAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, exp2(tl.load(x_ptr + offs), POLYNOMIAL))


@pytest.mark.parametrize("one_in", [0, 2, 4])
def test_polynomial_exp2(one_in):
    """Right to 1.02e-4 in the columns that take the polynomial, the last ones; 0 far below, never NaN."""
    x = torch.linspace(-40, 0, 64 * 64).reshape(64, 64).T.contiguous()
    x[0] = torch.tensor([-torch.inf, -1e30, -200.0, -126.0]).repeat(16)
    x, out = x.to(DEVICE), torch.empty(64, 64, device=DEVICE)
    exp2_kernel[(1,)](x, out, one_in, 64, 64)
    assert (out[0] <= 2.0 ** -126).all() and not out[0].reshape(16, 4)[:, :3].any()
    error = (out[1:].double() / torch.exp2(x[1:].double()) - 1).abs()
    first = 64 - (64 // one_in if one_in else 0)
    assert error[:, :first].max() < 1e-6
    if one_in:
        assert 1e-5 < error[:, first:].max() < 1.02e-4


def test_head_blocks():
    """Neither padded to the next power of two where two blocks are fewer, nor wider than 128."""
    blocks = {d: tuple(head_blocks(d).values()) for d in (1, 16, 20, 24, 32, 48, 64, 80, 88, 96, 104, 128, 144, 256)}
    assert blocks == {1: (16, 0), 16: (16, 0), 20: (32, 0), 24: (32, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0),
                      80: (64, 16), 88: (64, 32), 96: (64, 32), 104: (128, 0), 128: (128, 0), 144: (128, 16),
                      256: (128, 128)}
    for d in range(1, 257):
        assert d <= sum(head_blocks(d).values()) <= max(16, 2 * d)


def test_only_strides_that_are_no_multiple_of_a_head_are_copied():
    qkv = torch.randn(5, 3, 2, 24)
    for x in (*qkv.unbind(1), qkv[:, 0].transpose(0, 1).contiguous().transpose(0, 1)):
        same, stride_p, stride_h = in_heads(x)
        assert same is x and (stride_p * 24, stride_h * 24) == x.stride()[:2]
    for x in (torch.randn(5, 2, 48)[..., ::2], torch.randn(5, 2, 25)[..., :24]):
        copy, stride_p, stride_h = in_heads(x)
        assert torch.equal(copy, x) and (stride_p, stride_h) == (2, 1)
