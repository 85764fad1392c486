"""pytest-benchmark over every op, case and backend:  python -m pytest bench/test_ops.py"""

import pytest

pytest.importorskip("pytest_benchmark")

from .ops import op_calls  # noqa: E402


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in op_calls()])
def test_op(benchmark, call):
    benchmark(call)
