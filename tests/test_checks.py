"""Values that an op does not take are found on a GPU too: the same conditions, asserted where the data is."""

import pytest
import torch

from jepa_fast import ops


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a GPU, for conditions that are computed there."""

    @property
    def device(self):
        return torch.device("cuda")


def on_device(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype).as_subclass(OnDevice)


@pytest.mark.parametrize("index, fits", [([[0, 3]], True), ([[0, 4]], False), ([[-1, 0]], False), ([[]], True)])
def test_index_ranges(index, fits):
    from jepa_fast.ops.gather_tokens import _check_range
    if fits:
        _check_range("index", on_device(index), 4)
    else:
        with pytest.raises(RuntimeError, match=r"index must be in \[0, 4\)"):
            _check_range("index", on_device(index), 4)


@pytest.mark.parametrize("bounds, fits", [([0, 2, 5], True), ([0, 0, 5], True), ([1, 2, 5], False), ([0, 2, 4], False),
                                          ([0, 6, 5], False), ([0, 1, 5], False)])
def test_cu_seqlens(bounds, fits):
    from jepa_fast.ops.varlen_attention import _check_cu_seqlens
    arguments = ("cu_seqlens", on_device(bounds, torch.int32), "q", 5, "max_seqlen", 5 if bounds == [0, 0, 5] else 3)
    if fits:
        _check_cu_seqlens(*arguments)
    else:
        with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the 5 rows of q, no sequence longer than "
                                               "max_seqlen, 3"):
            _check_cu_seqlens(*arguments)


def test_only_where_asked(monkeypatch):
    """On a device checks run within checks_on_device() alone."""
    asked = []
    monkeypatch.setattr(ops._define, "tensors_of", lambda args: iter([on_device([0])]))
    monkeypatch.setattr(ops._define, "choose", lambda *args: type("Row", (), {"function": staticmethod(lambda *a: a[0])}))
    ops._define.define("checked_op(Tensor x) -> Tensor", plain=lambda x: x, check=lambda x: asked.append(1))
    try:
        torch.ops.jepa_fast.checked_op(torch.zeros(1))
        assert not asked
        with ops.checks_on_device():
            torch.ops.jepa_fast.checked_op(torch.zeros(1))
        assert len(asked) == 1
    finally:
        del ops.TABLE["checked_op"]
