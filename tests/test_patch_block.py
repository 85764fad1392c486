"""A foreign transformer block computed as ours: the same numbers, and its own code where they could not be the same."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_fast.patches._block import BlockParts, run_block, why_never, why_not_now
from jepa_fast.patches._report import Report

B, N, D, H = 2, 7, 24, 3


class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.floor(torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype) + 1 - self.p)
        return x.div(1 - self.p) * keep


class Foreign(nn.Module):
    """A block as others write it, with everything that can be told to `BlockParts`."""

    def __init__(self, packed=True, bias=True, layer_scale=False, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        widths = [3 * D] if packed else [D, D, D]
        self.projections = nn.ModuleList([nn.Linear(D, width, bias) for width in widths])
        self.proj, self.fc1, self.fc2 = nn.Linear(D, D, bias), nn.Linear(D, 2 * D, bias), nn.Linear(2 * D, D, bias)
        self.act, self.drop, self.drop_path = nn.GELU(), nn.Dropout(dropout), DropPath(drop_path)
        self.gamma1 = nn.Parameter(torch.rand(D)) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.rand(D)) if layer_scale else None

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2)
                   for t in torch.cat([layer(h) for h in [self.norm1(x)] for layer in self.projections], -1).chunk(3, -1))
        attended = self.drop(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        x = x + self.drop_path(attended if self.gamma1 is None else attended * self.gamma1)
        hidden = self.drop(self.fc2(self.act(self.fc1(self.norm2(x)))))
        return x + self.drop_path(hidden if self.gamma2 is None else hidden * self.gamma2)

    def parts(self):
        return BlockParts(self.norm1, tuple(self.projections), self.proj, self.norm2, self.fc1, self.act, self.fc2, H,
                          self.drop_path, self.drop_path, (self.drop,), self.gamma1, self.gamma2)


RUNS = []


def fast(original, self, x):
    parts = self.parts()
    reason = why_not_now(self, parts, x)
    RUNS.append(reason)
    return original(self, x) if reason else run_block(x, parts)


@pytest.fixture
def report():
    RUNS.clear()
    with Report.of("test") as report:
        report.replace_method(Foreign, "forward", fast)
    yield report
    report.undo()


def results(block, x, *, autocast=False):
    """Output, gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x)
    grads = torch.autograd.grad(out.float().square().sum() if out.dtype != torch.float64 else out.square().sum(),
                                [x, *block.parameters()])
    return [out, *grads]


def assert_as_good(ours, theirs, exact, floor):
    size = max(truth.norm() for truth in exact)  # of all: the gradient of a key's bias is 0 but for rounding
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - truth).norm() <= 2 * (b.double() - truth).norm() + floor * size


OPTIONS = {"packed": {}, "separate": {"packed": False}, "no-bias": {"bias": False}, "layer-scale": {"layer_scale": True},
           "separate-no-bias-scaled": {"packed": False, "bias": False, "layer_scale": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "float16", "autocast"])
def test_numbers(options, kind, report):
    torch.manual_seed(0)
    block, x = Foreign(**options), torch.randn(B, N, D)
    report.undo()
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    block, x = block.to(dtype), x.to(dtype)
    exact = results(copy.deepcopy(block).double(), x.double())
    theirs = results(block, x, autocast=kind == "autocast")
    report.replace_method(Foreign, "forward", fast)
    ours = results(block, x, autocast=kind == "autocast")
    is_original = kind == "float16" and options.get("layer_scale")
    assert RUNS == ["weights times LayerScale can be too small for float16" if is_original else None]
    assert_as_good(ours, theirs, exact, {"float64": 1e-13, "float32": 1e-6}.get(kind, 2e-3))


@pytest.mark.parametrize("autocast", [False, True])
def test_stochastic_depth_draws_the_same(autocast, report):
    torch.manual_seed(1)
    block, x = Foreign(drop_path=0.5), torch.randn(16, N, D)

    def run():
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return block(x), torch.rand(1)

    ours, ours_after = run()
    assert RUNS == [None]
    report.undo()
    theirs, theirs_after = run()
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if not autocast else 2e-2, atol=1e-5 if not autocast else 2e-2)
    assert torch.equal(ours_after, theirs_after)


def test_hooks_inside_are_called_by_the_original(report):
    block, x, seen = Foreign(), torch.randn(B, N, D), []
    handle = block.fc1.register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert seen == [1] and RUNS.pop() == "its parts have hooks"
    handle.remove()
    block(x)
    assert RUNS.pop() is None
    block.register_forward_hook(lambda *_: seen.append(2))
    block(x)
    assert seen == [1, 2] and RUNS.pop() is None
    with torch.no_grad():
        block.proj.forward = lambda a: a
        block(x)
    assert RUNS.pop() == "its parts have hooks"


def test_its_own_code_runs_where_ours_would_differ(report):
    x = torch.randn(B, N, D)
    block = Foreign(dropout=0.5)
    block(x)
    assert RUNS.pop() == "its dropout drops"
    block.eval()(x)
    assert RUNS.pop() is None
    block.fc1 = nn.utils.parametrizations.weight_norm(block.fc1)
    block(x)
    assert "fc1 is a ParametrizedLinear" in RUNS.pop()
    block = Foreign()
    torch.func.vmap(block)(torch.randn(3, B, N, D))
    assert RUNS.pop() == "it is being compiled, traced or transformed"
    for name, layer in (("act", nn.GELU(approximate="tanh")), ("norm2", nn.LayerNorm(D)), ("norm1", nn.BatchNorm1d(N))):
        block = Foreign()
        setattr(block, name, layer)
        assert why_never(block.parts())
        block(x)
        assert RUNS.pop()


def test_compiles(report):
    torch.manual_seed(0)
    block, x = Foreign(), torch.randn(B, N, D)
    with torch.no_grad():
        plain = block(x)
        RUNS.clear()
        compiled = torch.compile(block, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, plain)


def test_copies_and_files_of_a_patched_model():
    torch.manual_seed(0)
    model, x = nn.Sequential(Foreign(), Foreign()), torch.randn(B, N, D)
    keys = list(model.state_dict())
    with Report.of("test") as report:
        report.replace_method(Foreign, "forward", fast, model)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(x).equal(x) and not model(x).equal(x)  # the copy computes with its own weights
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), model(x))
    report.undo()
    assert all("forward" not in vars(block) for block in model)


def test_inference_mode_first_then_training(report):
    block, x = Foreign(), torch.randn(5, N, D)
    with torch.inference_mode():
        block(x)
    block(x).sum().backward()
    assert block.fc2.weight.grad is not None and RUNS == [None, None]
