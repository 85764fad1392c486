"""The predictor's input against the cat and gather that it replaces, to the bit; bad input."""

import pytest
import torch

from jepa_fast import ops, testing
from jepa_fast.ops import assemble_predictor_input

BACKENDS = testing.OPS["assemble_predictor_input"].backends()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_cast_cat_and_gather(backend, dtype):
    """Context in half precision under a float32 mask token: widened exactly, its gradient rounded once."""
    g = torch.Generator().manual_seed(0)
    context, mask_token = torch.randn(7, 20, generator=g).to(dtype).requires_grad_(), torch.randn(20, generator=g)
    mask_token.requires_grad_()
    positions, grad = torch.randn(9, 20, generator=g), torch.randn(30, 20, generator=g).round()
    index, position_index = torch.randint(0, 8, (30,), generator=g), torch.randint(0, 9, (30,), generator=g)
    with ops.use_backend(backend):
        out = assemble_predictor_input(context, mask_token, index, positions, position_index)
        ours = torch.autograd.grad(out, [context, mask_token], grad)
    expected = torch.cat([context.float(), mask_token[None]])[index] + positions[position_index]
    theirs = torch.autograd.grad(expected, [context, mask_token], grad)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


GOOD = {"context": torch.zeros(3, 4), "mask_token": torch.zeros(4), "index": torch.tensor([0, 3]),
        "positions": torch.zeros(5, 4), "position_index": torch.tensor([0, 4])}
BAD = [
    ({"context": torch.zeros(3, 5)}, ValueError, r"context must be \[R, D\] and mask_token \[D\]"),
    ({"context": torch.zeros(3, 4).int()}, TypeError, "context and mask_token must be floating point"),
    ({"positions": torch.zeros(5, 4).double()}, ValueError, "positions must be"),
    ({"position_index": torch.tensor([0])}, ValueError, r"got position_index \[1\]"),
    ({"index": torch.tensor([0, 4])}, IndexError, r"index must be in \[0, 4\), got 4"),
    ({"position_index": torch.tensor([0, 5])}, IndexError, r"position_index must be in \[0, 5\), got 5"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        assemble_predictor_input(**GOOD | changes)
