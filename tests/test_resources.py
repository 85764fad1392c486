"""The compile gate: every Triton kernel, every shipped configuration, for sm_80, sm_90 and sm_100, without a GPU."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from jepa_fast import ops, testing  # noqa: E402
from jepa_fast.ops._backends import Implementation  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
NAMES = [spec.name for spec in testing.OPS.values() if isinstance(ops.TABLE[spec.name]["triton"], Implementation)]


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_fit(name, arch):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "bench.resources", "--op", name, "--arch", arch], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " compiled kernels" in done.stdout and not done.stdout.startswith("0 ")
