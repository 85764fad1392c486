"""The moving average: official bits, what it refuses, what autograd is told."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file

from jepa_fast import ops, testing

GOLDEN = load_file(pathlib.Path(__file__).parent / "golden/ijepa_model.safetensors")
BACKENDS = testing.OPS["ema_update_"].backends()


@pytest.mark.parametrize("backend", BACKENDS)
def test_official_average_to_the_bit(backend):
    """From the official target encoder and the official encoder after step 1; frozen tables did not change by then."""
    names = [key.split("/")[2] for key in GOLDEN if key.startswith("weights/target_encoder/")]
    target = [GOLDEN[f"weights/target_encoder/{name}"].clone() for name in names]
    source = [GOLDEN.get(f"after_step1/encoder/{name}", GOLDEN[f"weights/encoder/{name}"]) for name in names]
    with ops.use_backend(backend):
        ops.ema_update_(target, source, GOLDEN["train/momentum"][0].item())
    assert "pos_embed" in names
    for name, t in zip(names, target, strict=True):
        expected = GOLDEN.get(f"after_step1/target_encoder/{name}", GOLDEN[f"weights/target_encoder/{name}"])
        assert torch.equal(t, expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_the_official_expression(backend):
    g = torch.Generator().manual_seed(0)
    for momentum in (0.996, 0.99925, 0.9999, 1 - 1e-7, 0.5, 1 / 3):
        source = [torch.randn(shape, generator=g) for shape in ((999,), (64, 65), ())]
        target = [torch.randn(s.shape, generator=g) for s in source]
        expected = [t.clone().mul_(momentum).add_((1.0 - momentum) * s) for t, s in zip(target, source, strict=True)]
        with ops.use_backend(backend):
            ops.ema_update_(target, source, momentum)
        for t, e in zip(target, expected, strict=True):
            assert torch.equal(t, e)


def test_float64_and_half_precision_sources():
    target, source = [torch.ones(5, dtype=torch.float64)], [torch.full((5,), 3.0)]
    ops.ema_update_(target, source, 0.75)
    assert torch.equal(target[0], torch.full((5,), 1.5, dtype=torch.float64))
    target, source = [torch.ones(5)], [torch.full((5,), 1.0078125, dtype=torch.float16)]
    ops.ema_update_(target, source, 0.5)
    assert torch.equal(target[0], torch.full((5,), 1.00390625))


def test_tensors_that_are_not_contiguous():
    source = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(4, 6).t()
    ops.ema_update_([target], [source], 0.0)
    assert torch.equal(target, source)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_through_changed_values_fails(backend):
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    with ops.use_backend(backend):
        ops.ema_update_([p], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_graph_is_built():
    source = torch.nn.Parameter(torch.ones(3))
    target = torch.zeros(3)
    ops.ema_update_([target], [source * 2], 0.5)
    assert not target.requires_grad and torch.equal(target, torch.ones(3))


@pytest.mark.parametrize("target, source, momentum, error, message", [
    ([torch.ones(2)], [], 0.5, ValueError, "source must have 1 tensors as target, got 0"),
    ([torch.ones(2)], [torch.ones(3)], 0.5, ValueError, r"source\[0\] must be \[2\] as target\[0\], got \[3\]"),
    ([torch.ones(2)], [torch.ones(2)], 1.5, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
    ([torch.ones(2)], [torch.ones(2)], float("nan"), ValueError, r"momentum must be in \[0, 1\], got nan"),
    ([torch.ones(2).bfloat16()], [torch.ones(2)], 0.5, TypeError,
     r"target\[0\] must be float32 or float64, got bfloat16"),
    ([torch.ones(2)], [torch.ones(2).int()], 0.5, TypeError, r"source\[0\] must be floating point, got int32"),
    ([torch.ones(2)], [torch.ones(2, device="meta")], 0.5, ValueError,
     r"source\[0\] must be on cpu as target\[0\], got meta"),
])
def test_bad_input(target, source, momentum, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        ops.ema_update_(target, source, momentum)
