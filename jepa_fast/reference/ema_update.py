"""Moving average of parameters: t = momentum * t + (1 - momentum) * s.

I-JEPA, arXiv:2301.08243, section 3: the target encoder follows the context encoder, after every optimizer step. The
order of roundings is the official one: scale in place, scale the source, add.
"""

from torch import Tensor


def ema_update_(target: list[Tensor], source: list[Tensor], momentum: float) -> None:
    """Same shapes pairwise; the arithmetic is that of the target's dtype."""
    for t, s in zip(target, source, strict=True):
        t.mul_(momentum).add_((1.0 - momentum) * s.to(t.dtype))
