"""The SIGReg of lejepa (github.com/rbalestr-lab/lejepa): of its package, and of its MINIMAL.md."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...ops import epps_pulley, sigreg
from ...ops._distributed import resolve_group
from ..host_values import count_up_
from ._knots import HalfLine, check_odd, quadrature_of, unit_columns, world_size


class EppsPulley(HalfLine):
    """lejepa.univariate.EppsPulley: the statistic of each column of projections, times the samples of all ranks."""

    def __init__(self, t_max: float = 3, n_points: int = 17, integration: str = "trapezoid"):
        check_odd(n_points)
        super().__init__(t_max, n_points)
        self.integration = integration  # kept, and like there not looked at
        self.n_points = n_points

    @property
    def world_size(self) -> int:
        return world_size()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N, K] -> [..., K]."""
        return epps_pulley(x, quadrature=quadrature_of(self), process_group="auto", ddp_weighting="rank")


class SlicingUnivariateTest(nn.Module):
    """lejepa.multivariate.SlicingUnivariateTest; with an EppsPulley test no projection is kept, with others it is as there.

    Directions of a generator seeded with `global_step`, a buffer that moves on with every call, in evaluation too. Under
    torch.distributed the largest step of all ranks counts, so that ranks that lost count have the same directions; that is
    read on the host in every call, on one process only where somebody else wrote it.
    """

    def __init__(self, univariate_test: nn.Module, num_slices: int, reduction: str | None = "mean",
                 sampler: str = "gaussian", clip_value: float | None = None):
        super().__init__()
        self.reduction = reduction
        self.num_slices = num_slices
        self.sampler = sampler  # kept, and like there not looked at
        self.univariate_test = univariate_test
        self.clip_value = clip_value
        self.register_buffer("global_step", torch.zeros((), dtype=torch.long))
        self._generator = None
        self._generator_device = None

    def _get_generator(self, device: torch.device, seed: int) -> torch.Generator:
        if self._generator is None or self._generator_device != device:
            self._generator, self._generator_device = torch.Generator(device), device
        return self._generator.manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N, D] -> scalar, or [..., K] for reduction None."""
        if isinstance(self.univariate_test, EppsPulley):
            return sliced_epps_pulley(self, x)
        statistic = self.univariate_test(x @ stepped_directions(self, x))
        if self.clip_value is not None:
            statistic = torch.where(statistic < self.clip_value, 0, statistic)
        return {"mean": statistic.mean, "sum": statistic.sum, None: lambda: statistic}[self.reduction]()


def sliced_epps_pulley(self: SlicingUnivariateTest, x: Tensor) -> Tensor:
    """Forward of a SlicingUnivariateTest, ours or lejepa's, whose univariate test is an EppsPulley."""
    return sigreg(x, stepped_directions(self, x), quadrature=quadrature_of(self.univariate_test),
                  reduction=self.reduction, clip=self.clip_value, process_group="auto", ddp_weighting="rank")


@torch.no_grad()
def stepped_directions(self: SlicingUnivariateTest, x: Tensor) -> Tensor:
    """[D, K] float32 for the step that `global_step` says, which moves on."""
    if resolve_group("auto") is None:
        step = count_up_(self.global_step)
    else:
        newest = self.global_step.clone()
        dist.all_reduce(newest, dist.ReduceOp.MAX)
        self.global_step.add_(1)
        step = newest.item()
    return unit_columns(x.shape[-1], self.num_slices, x.device, self._get_generator(x.device, step))


class MinimalSIGReg(HalfLine):
    """The SIGReg of MINIMAL.md (github.com/rbalestr-lab/lejepa), views first [V, N, D]: 256 slices, as LeWM's otherwise.

    Directions are drawn on the device of its input; in the source it is always a GPU.
    """

    def __init__(self, knots: int = 17):
        super().__init__(3, knots)

    def forward(self, proj: Tensor) -> Tensor:
        """proj [..., N, D] -> scalar."""
        directions = unit_columns(proj.shape[-1], 256, proj.device)
        return sigreg(proj, directions, quadrature=quadrature_of(self), scale="N")
