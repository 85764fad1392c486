"""The SIGReg of stable-pretraining (github.com/rbalestr-lab/stable-pretraining)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...ops import epps_pulley, sigreg
from ...ops._distributed import resolve_group
from ..host_values import count_up_
from ._knots import HalfLine, check_odd, quadrature_of, unit_columns, world_size


class FlatEppsPulley(HalfLine):
    """stable_pretraining.methods.lejepa.EppsPulley, as the part of a SlicedEppsPulley."""

    def __init__(self, t_max: float = 3.0, n_points: int = 17):
        check_odd(n_points)
        super().__init__(t_max, n_points)
        self._is_ddp = dist.is_available() and dist.is_initialized()
        self.world_size = world_size()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, K] -> [K]."""
        return epps_pulley(x.movedim(0, -2), quadrature=quadrature_of(self), process_group="auto", ddp_weighting="rank")


class SlicedEppsPulley(nn.Module):
    """stable_pretraining.methods.lejepa.SlicedEppsPulley: all views in one sample, x [V * N, D].

    The source computes an all-reduce under data parallelism and throws the result away; here it counts.
    """

    def __init__(self, num_slices: int = 1024, t_max: float = 3.0, n_points: int = 17):
        super().__init__()
        self._is_ddp = dist.is_available() and dist.is_initialized()
        self.num_slices = num_slices
        self.ep = FlatEppsPulley(t_max, n_points)
        self.register_buffer("global_step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> scalar."""
        return flat_sliced_epps_pulley(self, x)


def flat_sliced_epps_pulley(self: SlicedEppsPulley, x: Tensor, strict_numerics: bool = False) -> Tensor:
    """Forward of a SlicedEppsPulley, ours or stable-pretraining's.

    strict_numerics: as the source computes it, the characteristic function of this rank's samples times those of as many
    ranks as there were when the module was made.
    """
    is_parallel = self._is_ddp if strict_numerics else resolve_group("auto") is not None
    with torch.no_grad():
        if is_parallel:
            newest = self.global_step.clone()
            dist.broadcast(newest, src=0)
            self.global_step.add_(1)
            step = newest.item()
        else:
            step = count_up_(self.global_step)
        directions = unit_columns(x.shape[-1], self.num_slices, x.device, torch.Generator(x.device).manual_seed(step))
    how = dict(process_group="auto", ddp_weighting="rank")
    if strict_numerics:
        how = dict(scale=float(x.shape[0] * self.ep.world_size))
    return sigreg(x.movedim(0, -2), directions, quadrature=quadrature_of(self.ep), **how)
