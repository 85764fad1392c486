"""`varlen_attention` against PyTorch's own attention per sequence, its choice of backend, and bad input."""

import re
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from jepa_fast import ops

BACKENDS = [backend for backend in ("plain", "cpp", "torch")
            if ops.why_not(ops.TABLE["varlen_attention"][backend], "cpu") is None]
LENGTHS, LENGTHS_K = [40, 1, 0, 83, 9, 130], [33, 57, 6, 83, 0, 270]


def ends(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def sdpa_per_sequence(q, k, v, lengths, lengths_k, scale):
    """The same with scaled_dot_product_attention, one sequence at a time; zeros where there is no key."""
    parts = zip(q.split(lengths), k.split(lengths_k), v.split(lengths_k), strict=True)
    outs = [F.scaled_dot_product_attention(*(t.transpose(0, 1).unsqueeze(0) for t in part), scale=scale)[0]
            .transpose(0, 1) if part[0].shape[0] and part[1].shape[0] else part[0] * 0 for part in parts]
    return torch.cat(outs)


def draw(P, H, d, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(P, H, d, generator=generator) for _ in range(count)]


def relative(a, b):
    return float(((a.double() - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)],
                         ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("d, scale", [(24, None), (64, None), (80, 0.31)])
def test_values_and_gradients_match_sdpa(backend, dtype, tolerance, d, scale):
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("no C++ version for float64")
    q, grad = draw(sum(LENGTHS), 3, d, 2, seed=1)
    k, v = draw(sum(LENGTHS_K), 3, d, 2, seed=2)
    q, k, v, grad = (t.to(dtype) for t in (q, k, v, grad))
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected = sdpa_per_sequence(*exact, LENGTHS, LENGTHS_K, scale)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with ops.use_backend(backend):
        out = ops.varlen_attention(*inputs, ends(LENGTHS), 200, ends(LENGTHS_K), 300, scale)
        grads = torch.autograd.grad(out, inputs, grad)
    for ours, theirs in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert ours.dtype == dtype and relative(ours, theirs) < tolerance
    assert torch.equal(out[124:133], torch.zeros(9, 3, d, dtype=dtype))  # the sequence without keys
    assert torch.equal(grads[0][124:133], torch.zeros(9, 3, d, dtype=dtype))
    assert torch.equal(grads[1][90:96], torch.zeros(6, 3, d, dtype=dtype))  # the sequence without queries


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[50] * 3, LENGTHS], ids=["equal", "ragged"])
def test_packed_qkv_is_the_same_attention(backend, lengths):
    """Bit-equal to q, k, v apart as strided views; the gradient is packed and contiguous."""
    qkv = torch.stack(draw(sum(lengths), 2, 32, 3, seed=3), 1).requires_grad_()
    (grad,) = draw(sum(lengths), 2, 32, 1, seed=4)
    with ops.use_backend(backend):
        packed = ops.varlen_attention_qkv(qkv, ends(lengths), max(lengths))
        apart = ops.varlen_attention(*qkv.unbind(1), ends(lengths), max(lengths))
        dqkv = torch.autograd.grad(packed, qkv, grad)[0]
        expected = torch.autograd.grad(apart, qkv, grad)[0]
    assert packed.is_contiguous() and dqkv.is_contiguous()
    assert torch.equal(packed, apart) and torch.equal(dqkv, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_takes_an_expanded_gradient(backend):
    qkv = torch.stack(draw(30, 2, 16, 3, seed=5), 1).requires_grad_()
    with ops.use_backend(backend):
        out = ops.varlen_attention_qkv(qkv, ends([10, 20]), 20)
        of_sum, = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
        of_ones, = torch.autograd.grad(out, qkv, torch.ones_like(out))
    torch.testing.assert_close(of_sum, of_ones, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend):
    qkv = torch.stack(draw(60, 2, 24, 3, seed=6), 1)
    qkv[25, 1, 0, 3] = float("nan")  # one key of the second sequence, first head
    with ops.use_backend(backend):
        out = ops.varlen_attention_qkv(qkv, ends([20, 30, 10]), 30)
    is_bad = torch.zeros(60, 2, dtype=torch.bool)
    is_bad[20:50, 0] = True
    assert torch.equal(out.isnan().all(-1), is_bad) and torch.equal(out.isnan().any(-1), is_bad)


needs_cuda = pytest.mark.skipif(ops.why_not(ops.TABLE["varlen_attention"]["cuda"], "cpu") is not None,
                                reason="no C++ compiler, or a GPU: csrc/cuda is not run on the host")


@needs_cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("d", [4, 12, 24, 40, 72, 88, 104, 116])
def test_cuda_matches_sdpa(dtype, tolerance, d):
    """Widths that are rounded up to those compiled, one packed dqkv, and q, k, v that are not aligned to 16 bytes."""
    qkv, grad = torch.stack(draw(sum(LENGTHS), 3, d, 3, seed=1), 1), draw(sum(LENGTHS), 3, d, 1, seed=2)[0]
    qkv, grad = qkv.to(dtype).requires_grad_(), grad.to(dtype)
    exact = qkv.detach().double().requires_grad_()
    expected = sdpa_per_sequence(*exact.unbind(1), LENGTHS, LENGTHS, d ** -0.5)
    expected_grad, = torch.autograd.grad(expected, exact, grad.double())
    room = torch.zeros(qkv.shape[0], 3, 3, d + 4, dtype=dtype)
    room[..., 2:-2] = qkv.detach()
    shifted = room[..., 2:-2].requires_grad_()
    with ops.use_backend("cuda"):
        out = ops.varlen_attention_qkv(qkv, ends(LENGTHS), 130)
        dqkv, = torch.autograd.grad(out, qkv, grad)
        again = ops.varlen_attention_qkv(shifted, ends(LENGTHS), 130)
    assert relative(out, expected) < tolerance and relative(dqkv, expected_grad) < tolerance
    assert torch.equal(again, out)


@needs_cuda
@pytest.mark.parametrize("d", [24, 80])
def test_cuda_keeps_nan_in_its_sequence(d):
    for key in (20, 33, 45):  # with d <= 32, the exponential of the last one is a polynomial
        qkv = torch.stack(draw(60, 2, d, 3, seed=6), 1).bfloat16()
        qkv[key, 1, 0, 3] = float("nan")
        with ops.use_backend("cuda"):
            out = ops.varlen_attention_qkv(qkv, ends([20, 30, 10]), 30)
        is_bad = torch.zeros(60, 2, dtype=torch.bool)
        is_bad[20:50, 0] = True
        assert torch.equal(out.isnan().all(-1), is_bad) and torch.equal(out.isnan().any(-1), is_bad)


@pytest.mark.skipif(ops.COMPILED_MISSING is not None, reason=str(ops.COMPILED_MISSING))
def test_bits_do_not_depend_on_the_number_of_threads():
    qkv = torch.stack(draw(sum(LENGTHS) + 600, 4, 64, 3, seed=7), 1).requires_grad_()
    (grad,) = draw(qkv.shape[0], 4, 64, 1, seed=8)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with ops.use_backend("cpp"):
                out = ops.varlen_attention_qkv(qkv, ends([*LENGTHS, 600]), 600)
                results.append((out, torch.autograd.grad(out, qkv, grad)[0]))
    finally:
        torch.set_num_threads(before)
    for out, dqkv in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(dqkv, results[0][1])


@pytest.mark.skipif(ops.COMPILED_MISSING is not None, reason=str(ops.COMPILED_MISSING))
def test_automatic_choice_passes_over_what_is_slower(monkeypatch):
    """float32 and short bfloat16 run in C++; long bfloat16 in PyTorch where the processor multiplies it."""
    from jepa_fast.ops._define import choose

    def chosen(N, d, dtype, is_backward=False):
        qkv, cu_seqlens = torch.zeros(2 * N, 3, 1, d, dtype=dtype), ends([N, N])
        out, lse = torch.zeros(2 * N, 1, d, dtype=dtype), torch.zeros(1, 2 * N)
        args = (*((out, qkv, out, lse) if is_backward else (qkv,)), cu_seqlens, N, 1.0, None, 0)
        name = "varlen_attention_qkv" + "_backward" * is_backward
        implementation = choose(name, "cpu", args)
        return next(backend for backend, row in ops.TABLE[name].items() if row is implementation)

    for has_unit, expected in ((True, "torch"), (False, "cpp")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_unit=has_unit: has_unit, raising=False)
        assert chosen(256, 64, torch.bfloat16) == expected
        assert chosen(1024, 64, torch.bfloat16, is_backward=True) == expected
        assert chosen(196, 64, torch.bfloat16) == "cpp" and chosen(256, 24, torch.bfloat16) == "cpp"
        assert chosen(256, 64, torch.bfloat16, is_backward=True) == "cpp"
        assert chosen(1024, 64, torch.float32) == "cpp" and chosen(1024, 64, torch.float64) == "torch"
    rows = {name: others for name, _, others in ops.info("cpu")}
    assert rows["varlen_attention"]["torch"].startswith("used for bfloat16 with AMX, sequences of 256 tokens")


def arguments(**changes):
    q, k, v = draw(6, 2, 8, 3, seed=9)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": ends([2, 4]), "max_seqlen_q": 4} | changes


BAD = [
    ({"q": torch.zeros(6, 16)}, "q must be [P, H, d] floating point, got [6, 16] torch.float32"),
    ({"k": torch.zeros(6, 1, 8)}, "k must be [P, 2, 8] torch.float32 as q, got [6, 1, 8] torch.float32"),
    ({"k": torch.zeros(6, 2, 8).double()}, "k must be [P, 2, 8] torch.float32 as q, got [6, 2, 8] torch.float64"),
    ({"v": torch.zeros(5, 2, 8)}, "v must be [6, 2, 8] torch.float32 as k, got [5, 2, 8] torch.float32"),
    ({"cu_seqlens_q": ends([2, 4]).long()}, "cu_seqlens_q must be [S + 1] int32, got [3] torch.int64"),
    ({"cu_seqlens_q": ends([2, 4])[None]}, "cu_seqlens_q must be [S + 1] int32, got [1, 3] torch.int32"),
    ({"cu_seqlens_k": ends([6])}, "cu_seqlens_k must be [3] as cu_seqlens_q, got [2]"),
    ({"cu_seqlens_q": ends([2, 4]) + 1}, "cu_seqlens_q must start at 0, got 1"),
    ({"cu_seqlens_q": ends([2, 3])}, "cu_seqlens_q must end at the 6 rows of q, got 5"),
    ({"cu_seqlens_k": ends([2, 5])}, "cu_seqlens_k must end at the 6 rows of k, got 7"),
    ({"cu_seqlens_q": torch.tensor([0, 4, 2, 6], dtype=torch.int32)},
     "cu_seqlens_q must not decrease, got 4 then 2 at sequence 1"),
    ({"max_seqlen_q": 3}, "max_seqlen_q must be at least the longest sequence, 4, got 3"),
    ({"max_seqlen_k": 3}, "max_seqlen_k must be at least the longest sequence, 4, got 3"),
    ({name: torch.zeros(6, 1, 257) for name in "qkv"}, "q must have a head width d of 1 to 256, got 257"),
    ({"k": torch.zeros(6, 2, 8, device="meta"), "v": torch.zeros(6, 2, 8, device="meta")},
     "q and k must be on one device, got cpu and meta"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ops.varlen_attention(**arguments(**changes))


@pytest.mark.parametrize("qkv, cu_seqlens, message", [
    (torch.zeros(6, 2, 8), ends([6]), "qkv must be [P, 3, H, d] floating point, got [6, 2, 8] torch.float32"),
    (torch.zeros(6, 3, 2, 8), ends([5]), "cu_seqlens must end at the 6 rows of qkv, got 5"),
    (torch.zeros(6, 3, 2, 0), ends([6]), "qkv must have a head width d of 1 to 256, got 0"),
])
def test_bad_packed_input(qkv, cu_seqlens, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        ops.varlen_attention_qkv(qkv, cu_seqlens, 6)


def test_peers_are_called_as_they_want_to_be():
    """PyTorch's schemas take our arguments, on tensors that only claim to be on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from jepa_fast.ops import _attention_peers as peers

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(10, 2, 64, device="cuda", dtype=torch.bfloat16)
        how = (torch.empty(3, device="cuda", dtype=torch.int32),) * 2 + (7, 7, 0.125)
        out, lse = peers.torch_forward(q, q, q, *how)
        assert out.shape == q.shape and lse.shape == (2, 10) and lse.dtype == torch.float32
        assert all(g.shape == q.shape for g in peers.torch_backward(q, q, q, q, out, lse, *how))
        assert peers._supports(q, *how, None, None, 0) is None
        assert "frame_size 4" in peers._supports(q, *how, None, None, 4)
        assert "float32" in peers._supports(q.float(), *how, None, None, 0)
        assert "head width 20" in peers._supports(torch.empty(1, 1, 20, device="cuda").half(), None, 0)


def test_a_gpu_runs_ours_until_a_peer_was_timed(monkeypatch):
    from jepa_fast.ops import _backends

    monkeypatch.setattr(_backends, "_too_old", lambda language: None)
    rows = {name: (chosen, others) for name, chosen, others in ops.info("cuda")}
    chosen, others = rows["varlen_attention_qkv"]
    assert chosen in ("triton", "cuda")
    assert others["flash_attn"] == "flash_attn is not installed"
    assert others["torch"] == "only where asked for by name: not timed against ours"
