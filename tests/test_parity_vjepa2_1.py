"""test_patch_vjepa2_1.py on a checkout of facebookresearch/vjepa2: --upstream vjepa2_1=PATH."""

import pytest
import torch
from checkouts import checkout
from test_patch_vjepa2_1 import *  # noqa: F403
from test_patch_vjepa2_1 import MASKS, MODULES, clips, make

from jepa_fast.patches import vjepa2_1


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("vjepa2_1"), *MODULES) as modules:
        yield modules


def test_compiled(code):
    """What torch.compile sees is the original."""
    encoder, x = make(code)[0].backbone, clips("video")[0]
    with torch.no_grad():
        expected = encoder(x, MASKS["video"][0][0][0])
        with vjepa2_1.apply(encoder):
            compiled = torch.compile(encoder, backend="eager")
            assert torch.equal(compiled(x, MASKS["video"][0][0][0]), expected)
