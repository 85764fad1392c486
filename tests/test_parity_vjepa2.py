"""test_patch_vjepa2.py on a checkout of facebookresearch/vjepa2: --upstream vjepa2=PATH."""

import pytest
from checkouts import checkout
from test_patch_vjepa2 import *  # noqa: F403
from test_patch_vjepa2 import MODULES


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("vjepa2"), *MODULES) as modules:
        yield modules
