"""test_patch_vjepa2_1.py on a checkout of facebookresearch/vjepa2: --upstream vjepa2_1=PATH."""

import pytest
from checkouts import checkout
from test_patch_vjepa2_1 import *  # noqa: F403
from test_patch_vjepa2_1 import MODULES


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("vjepa2_1"), *MODULES) as modules:
        yield modules
