"""test_patch_vjepa2.py on a checkout of facebookresearch/vjepa2: --upstream vjepa2=PATH."""

import warnings

import pytest
import torch
from checkouts import checkout
from test_patch_vjepa2 import *  # noqa: F403
from test_patch_vjepa2 import MASKS_X, MODULES, ac_inputs, ac_predictor, clips, make, step_of

from jepa_fast.patches import vjepa2


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("vjepa2"), *MODULES) as modules:
        yield modules


def test_compiled(code):
    """What torch.compile sees is the original."""
    encoder, x = make(code)[0].backbone, clips()[0]
    torch._dynamo.reset()  # of what other tests compiled: too many versions of one function are run as they are
    with torch.no_grad():
        expected = encoder(x, MASKS_X[0][0])
        with vjepa2.apply(encoder):
            compiled = torch.compile(encoder, backend="eager")
            assert torch.equal(compiled(x, MASKS_X[0][0]), expected)


def test_no_deprecated_context_manager(code):
    """The original warns in every attention that torch.backends.cuda.sdp_kernel() will go."""
    models, x = make(code), clips()
    pooler = code[5].AttentivePooler(embed_dim=32, num_heads=2, depth=2)
    with vjepa2.apply(modules=code[0]), warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of(code, models, "float32", x)
        pooler(models[0](x)[0])
        ac_predictor(code)(*ac_inputs(2))
