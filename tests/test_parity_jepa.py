"""test_patch_jepa.py on a checkout of facebookresearch/jepa: --upstream jepa=PATH."""

import pytest
from checkouts import checkout
from test_patch_jepa import *  # noqa: F403
from test_patch_jepa import MODULES


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("jepa"), *MODULES) as modules:
        yield modules
