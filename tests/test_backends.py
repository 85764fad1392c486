"""The table of backends: what a machine lacks is said, and plain PyTorch takes over."""

import pytest
import torch

from jepa_fast import ops
from jepa_fast.ops import _backends


def test_an_old_gpu_runs_plain_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(_backends, "COMPILED_MISSING", None)
    monkeypatch.setattr(torch.ops.jepa_fast_C, "cuda_architectures", "90a", raising=False)
    _backends._too_old.cache_clear()
    try:
        rows = {name: (chosen, others) for name, chosen, others in ops.info("cuda")}
    finally:
        _backends._too_old.cache_clear()
    chosen, others = rows["gather_tokens"]
    assert chosen == "plain"
    assert others["cuda"] == "CUDA kernels need sm_80 or newer, cuda:0 is sm_75"
    assert others["triton"] in ("Triton kernels need sm_80 or newer, cuda:0 is sm_75", "triton is not installed")


def test_every_op_has_a_triton_and_a_cuda_version_or_a_reason():
    for name, row in ops.TABLE.items():
        for backend in ("triton", "cuda"):
            reason = getattr(row[backend], "reason", None)
            assert reason != "not written yet", f"{name}: {backend}"


def test_others_have_an_op_or_say_that_they_have_not():
    row = ops.TABLE["gather_tokens"]
    assert row["flash_attn"].reason == "flash_attn has no such op"
    assert not hasattr(ops.TABLE["varlen_attention"]["xformers"], "reason")


@pytest.mark.skipif(ops.COMPILED_MISSING is not None, reason=str(ops.COMPILED_MISSING))
def test_every_compiled_version_is_found():
    """Under the name of its raw op, which is not always that of the op; otherwise plain would run without a word."""
    missing = [name for name, row in ops.TABLE.items() if "older sources" in getattr(row["cpp"], "reason", "")]
    assert not missing
