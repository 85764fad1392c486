"""The SIGReg of EB-JEPA (github.com/facebookresearch/eb_jepa)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import Quadrature, sigreg
from ...ops._distributed import resolve_group
from ._knots import unit_columns


class BCS(nn.Module):
    """eb_jepa.losses.BCS: SIGReg of two views, not scaled by their size, and their mean squared difference.

    `step` is a number as there, in no state-dict. The gradient under data parallelism is that of the global batch; the
    source's is 1/W of it on gloo.
    """

    def __init__(self, num_slices: int = 256, lmbd: float = 10.0):
        super().__init__()
        self.num_slices = num_slices
        self.step = 0
        self.lmbd = lmbd

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """z1, z2 [N, D] -> scalars loss, bcs_loss and invariance_loss."""
        return bcs(self, z1, z2)


def bcs(self: BCS, z1: Tensor, z2: Tensor, strict_numerics: bool = False) -> dict[str, Tensor]:
    """Forward of a BCS, ours or eb_jepa's; strict_numerics: with its all-reduce, whatever autograd makes of that."""
    with torch.no_grad():
        generator = torch.Generator(z1.device).manual_seed(self.step)
        directions = unit_columns(z1.shape[1], self.num_slices, z1.device, generator)
    self.step += 1
    views, quadrature = torch.stack([z1, z2]), Quadrature.trapezoid(-3, 3, 10)
    if strict_numerics and resolve_group("auto") is not None:
        statistic = _statistic_as_in_eb_jepa(views, directions, quadrature)
    else:
        statistic = sigreg(views, directions, quadrature=quadrature, scale="none", process_group="auto",
                           ddp_weighting="rank")
    invariance = F.mse_loss(z1, z2)
    return {"loss": invariance + self.lmbd * statistic, "bcs_loss": statistic, "invariance_loss": invariance}


def _statistic_as_in_eb_jepa(x: Tensor, directions: Tensor, quadrature: Quadrature) -> Tensor:
    """x [V, N, D] -> scalar. An all-reduce in place of a tensor that has a gradient: on gloo AVG is a sum and a division,
    and the division alone is recorded."""
    sums = torch.ops.jepa_fast.sigreg_sums(x, directions, None, quadrature.t_start, quadrature.t_step,
                                           quadrature.num_knots)
    means = sums / x.shape[1]
    dist.all_reduce(means, dist.ReduceOp.AVG)
    one = means.new_ones(len(x))
    return torch.ops.jepa_fast.sigreg_statistic(means, one, quadrature.phi, quadrature.weights).mean()
