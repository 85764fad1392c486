"""test_patch_vjepa2.py on a checkout of facebookresearch/vjepa2: --upstream vjepa2=PATH."""

import pytest
import torch
from checkouts import checkout
from test_patch_vjepa2 import *  # noqa: F403
from test_patch_vjepa2 import MASKS_X, MODULES, clips, make

from jepa_fast.patches import vjepa2


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("vjepa2"), *MODULES) as modules:
        yield modules


def test_compiled(code):
    """What torch.compile sees is the original."""
    encoder, x = make(code)[0].backbone, clips()[0]
    with torch.no_grad():
        expected = encoder(x, MASKS_X[0][0])
        with vjepa2.apply(encoder):
            compiled = torch.compile(encoder, backend="eager")
            assert torch.equal(compiled(x, MASKS_X[0][0]), expected)
