"""The block as one autograd node, against the same modules one after the other."""

import pytest
import torch

from jepa_fast.nn import block_compiled
from jepa_fast.nn.block import Block, Sequences, configure_blocks_, use_copies_
from jepa_fast.nn.rotary import axis_widths, grid_positions, rotary_table

D, HEADS = 48, 3


def make(dtype=torch.float64, **options) -> Block:
    torch.manual_seed(0)
    block = Block(D, HEADS, **options).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def sequences(kind: str) -> Sequences:
    if kind == "frames":
        return Sequences.uniform(3, 8, torch.device("cpu"), frame_size=4)
    ends = torch.tensor([0, 7, 7, 19, 24], dtype=torch.int32)
    if kind == "rotary":
        table = rotary_table(grid_positions((2, 3, 4)), axis_widths(D // HEADS), "tiled", angle_dtype=torch.float64)
        return Sequences(ends, 12, rotary=table)
    return Sequences(ends, 12)


def one_after_the_other(block: Block, x, seq):
    x = x + block._drop(block.attn(block.norm1(x), seq), seq)
    return x + block._drop(block.mlp(block.norm2(x)), seq)


def run(function, block, x, seq, dtype=torch.float64):
    """Output and gradients of the input and of every weight."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = function(x, seq) if function is block else function(block, x, seq)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])


@pytest.mark.parametrize("kind", ["plain", "rotary", "frames"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_equals_its_modules(kind, drop_path):
    block, seq = make(drop_path=drop_path), sequences(kind)
    x = torch.randn(24, D, dtype=torch.float64)
    for ours, theirs in zip(run(block, block, x, seq), run(one_after_the_other, block, x, seq), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_bfloat16_products_are_as_good_as_autocast(stream):
    block, seq = make(torch.float32), sequences("plain")
    x = torch.randn(24, D).to(stream)
    ours = run(block, block, x, seq, torch.bfloat16)
    plain = run(one_after_the_other, block, x, seq, torch.bfloat16)
    exact = run(one_after_the_other, make(), x.double(), seq)
    assert ours[0].dtype == plain[0].dtype == stream
    for ours_, plain_, exact_ in zip(ours, plain, exact, strict=True):
        error, allowed = (ours_.double() - exact_).norm(), 2 * (plain_.double() - exact_).norm()
        assert error <= allowed + 1e-6 * exact_.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_no_bit(dtype):
    seq, x, results = sequences("rotary"), torch.randn(24, D), {}
    for activations in ("all", "lean", "checkpoint"):
        block = make(torch.float32, drop_path=0.5)
        block.activations = activations
        results[activations] = run(block, block, x, seq, dtype)
    for name in ("lean", "checkpoint"):
        assert all(torch.equal(a, b) for a, b in zip(results[name], results["all"], strict=True)), name


@pytest.mark.parametrize("activations, bytes_per_column", [("all", 36), ("lean", 24), ("checkpoint", 4)])
def test_bytes_kept(activations, bytes_per_column):
    block, P = make(torch.float32), 64
    block.activations = activations
    use_copies_(block, {p: p.detach().bfloat16() for p in block.parameters()})
    weights = {t.data_ptr() for t in (*block.parameters(), *block.copies.values())}
    kept = {}

    def keep(t):
        if t.data_ptr() not in weights:
            kept[t.data_ptr()] = t.nbytes
        return t

    x = torch.randn(P, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        block(x, Sequences.uniform(4, 16, torch.device("cpu")))
    # beside the rows: two numbers per row and norm, one per row and head
    statistics = P * (4 * 4 + 4 * HEADS) if activations != "checkpoint" else 0
    assert P * D * bytes_per_column <= sum(kept.values()) <= P * D * bytes_per_column + statistics + 100


@pytest.fixture
def compiled_by(monkeypatch):
    """A compiler that traces as torch.compile does, and runs what it traced without generating code."""
    def compile_with(backend: str):
        torch._dynamo.reset()
        function = torch.compile(block_compiled._plain_block, dynamic=True, backend=backend, fullgraph=True)
        monkeypatch.setattr(block_compiled, "_compiled", lambda: function)
    yield compile_with
    torch._dynamo.reset()


def test_compiled_block_equals_its_modules(compiled_by):
    compiled_by("aot_eager")
    block, seq = make(drop_path=0.5), sequences("rotary")
    block.fusion = "compile"
    x = torch.randn(24, D, dtype=torch.float64)
    for ours, theirs in zip(run(block, block, x, seq), run(one_after_the_other, block, x, seq), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_compiled_block_in_bfloat16_takes_copies(compiled_by):
    compiled_by("aot_eager")
    block, seq, x = make(torch.float32), sequences("plain"), torch.randn(24, D)
    use_copies_(block, {p: p.detach().bfloat16() for p in block.parameters()})
    by_ops = run(block, block, x, seq, torch.bfloat16)
    block.fusion = "compile"
    compiled = run(block, block, x, seq, torch.bfloat16)
    exact = run(one_after_the_other, make(), x.double(), seq)
    for ours, theirs, exact_ in zip(compiled, by_ops, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - exact_).norm() <= 2 * (theirs - exact_).norm() + 1e-6 * exact_.norm()
    with torch.autocast("cpu", torch.bfloat16):
        for copy in block.copies.values():
            copy.zero_()
        assert torch.equal(block(x, seq), x)


def test_token_counts_do_not_recompile(compiled_by):
    compiled_by("aot_eager")
    block = make(torch.float32)
    block.fusion = "compile"

    def go(lengths):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        block(torch.randn(sum(lengths), D, requires_grad=True), Sequences(ends, max(lengths))).sum().backward()

    for lengths in ([5, 9, 3], [8, 2, 2, 7]):
        go(lengths)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3, 3], [11, 6, 4, 20, 7], [40, 2]):
            go(lengths)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_blocks_choose_what_to_keep():
    block = make()
    block.fusion, block.activations = "compile", "lean"
    with pytest.raises(ValueError, match="activations must be all, got 'lean'"):
        block(torch.randn(24, D, dtype=torch.float64), sequences("plain"))


def test_auto_takes_what_the_table_says(monkeypatch):
    monkeypatch.setattr(block_compiled, "FASTEST", {"sm_90": {str(D): "compile"}})
    block = make()
    for architecture, activations, expected in (("sm_90", "all", "compile"), ("sm_90", "lean", "ops"),
                                                ("cpu", "all", "ops")):
        configure_blocks_(block, activations, "auto", architecture)
        assert (block.fusion, block.activations) == (expected, activations)
    configure_blocks_(block, "all", "compile", "cpu")
    assert block.fusion == "compile"


def test_copies_are_what_products_take():
    block, seq, x = make(torch.float32), sequences("plain"), torch.randn(24, D)
    expected = run(block, block, x, seq, torch.bfloat16)
    copies = {p: p.detach().bfloat16() for p in block.parameters()}
    use_copies_(block, copies)
    assert all(torch.equal(a, b) for a, b in zip(run(block, block, x, seq, torch.bfloat16), expected, strict=True))
    for p in block.parameters():
        copies[p].zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x, seq), x)  # products with nothing leave the stream as it was
    assert not torch.equal(block(x, seq), x)  # float32 products have no use for them


def test_frozen_block_gives_the_gradient_of_its_input():
    block, seq, x = make(), sequences("plain"), torch.randn(24, D, dtype=torch.float64)
    expected = run(block, block, x, seq)[1]
    block.requires_grad_(False)
    x.requires_grad_()
    out = block(x, seq)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    assert torch.equal(torch.autograd.grad((out * weight).sum(), x)[0], expected)
    assert block(x.detach(), seq).grad_fn is None


def test_no_second_derivative():
    block, x = make(), torch.randn(24, D, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(block(x, sequences("plain")).sum(), x, create_graph=True)
