"""test_patch_ijepa.py on a checkout of facebookresearch/ijepa: --upstream ijepa=PATH."""

import pytest
from checkouts import checkout
from test_patch_ijepa import *  # noqa: F403
from test_patch_ijepa import MODULES


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("ijepa"), *MODULES) as modules:
        yield modules
