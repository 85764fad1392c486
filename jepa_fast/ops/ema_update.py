"""The moving average of a list of parameters, in place."""

import torch
from torch import Tensor

from ..reference import ema_update as reference
from ._backends import compiled, cuda, triton
from ._define import define
from ._tensor_lists import MASTER_DTYPES, check_floating, check_like, mark_changed, why_not_flat


def _native(raw, target, source, momentum):
    if target:  # nothing to dispatch on otherwise
        raw.ema_update_(target, [s.contiguous() for s in source], momentum)
    mark_changed(target)


def _supports(target, source, momentum):
    return why_not_flat(target)


define("ema_update_(Tensor(a!)[] target, Tensor[] source, float momentum) -> ()",
       plain=reference.ema_update_,
       cpp=compiled("ema_update_", call=_native, supports=_supports),
       triton=triton("ema_update.ema_update_", supports=_supports),
       cuda=cuda("ema_update_", call=_native, supports=_supports))


@torch.library.register_fake("jepa_fast::ema_update_")
def _(target, source, momentum):
    return None


@torch.no_grad()
def ema_update_(target: list[Tensor], source: list[Tensor], momentum: float) -> None:
    """Move `target` towards `source` in place: t = momentum * t + (1 - momentum) * s.

    Same shapes pairwise, one device. `target` float32 or float64, since bfloat16 loses steps when momentum > 0.99;
    `source` in any floating dtype is first converted to the target's. Bit-equal to the official
    `t.mul_(momentum).add_((1.0 - momentum) * s)`. Gradients do not pass.
    Raises ValueError for other lengths or shapes and for a momentum outside [0, 1], TypeError for other dtypes.
    I-JEPA, arXiv:2301.08243, section 3.
    """
    check_floating("target", target, MASTER_DTYPES)
    check_like("source", source, "target", target)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    torch.ops.jepa_fast.ema_update_(target, source, momentum)
