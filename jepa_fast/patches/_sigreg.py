"""When a foreign SIGReg runs as ours, and what every report of one says."""

from torch import Tensor, nn

from ..nn.sigreg_sources import quadrature_of
from ..ops import TABLE
from ..ops._define import choose
from ._block import has_inner_hooks, is_transformed
from ._report import Report


def why_not_now(x: Tensor, owner: nn.Module, knots: nn.Module | None = None, op: str = "sigreg_sums") -> str | None:
    """Why this call must run its own code; None where ours computes the same, and faster.

    x [..., N, D] goes through `op`; knots: the module with buffers t, phi and weights, where there is one.
    """
    if is_transformed(x):
        return "it is being compiled, traced or transformed"
    if x.dim() < 2 or x.numel() == 0 or not x.is_floating_point():
        return f"x is {list(x.shape)} {x.dtype}"
    if choose(op, x.device.type, (x,)) is TABLE[op]["plain"]:
        return f"there is no kernel for {x.dtype} on {x.device.type} here"
    if has_inner_hooks(owner):
        return "its parts have hooks"
    try:
        if knots is not None:
            quadrature_of(knots)
    except ValueError as error:
        return str(error)
    return None


def note_numerics(report: Report) -> None:
    """What differs from every original."""
    report.note("losses are float32 also under autocast, where the original rounds them to the lower precision")
    report.note("the loss cannot be differentiated twice (create_graph=True)")
