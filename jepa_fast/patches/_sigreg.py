"""When a foreign SIGReg runs as ours, and what every report of one says."""

from torch import Tensor, nn

from ..nn.sigreg_sources import quadrature_of
from ..ops import TABLE
from ..ops._define import choose
from ._block import has_inner_hooks, is_transformed
from ._report import Report


def why_not_now(x: Tensor, owner: nn.Module, num_slices: int, knots: nn.Module | None = None, *, op: str = "sigreg_sums",
                fewest: int = 4096) -> str | None:
    """Why this call must run its own code; None where ours computes the same, and faster.

    x [..., N, D] goes through `op`; knots: the module with buffers t, phi and weights, where there is one; fewest: with
    fewer projections on a CPU the original was measured as faster.
    """
    if is_transformed(x):
        return "it is being compiled, traced or transformed"
    if x.dim() < 2 or x.numel() == 0 or not x.is_floating_point():
        return f"x is {list(x.shape)} {x.dtype}"
    if choose(op, x.device.type, (x,)) is TABLE[op]["plain"]:
        return f"there is no kernel for {x.dtype} on {x.device.type} here"
    if x.is_cpu and x.numel() // x.shape[-1] * num_slices < fewest:
        return "there is so little to do that the original is faster"
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
    report.note("the original runs for few projections on a CPU, in float64, for knots that are not evenly spaced, where "
                "parts have hooks, and under torch.compile")
    report.note("the loss cannot be differentiated twice (create_graph=True)")
