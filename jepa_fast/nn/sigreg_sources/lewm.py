"""The SIGReg of LeWorldModel (github.com/lucas-maes/le-wm), and of stable-worldmodel."""

from torch import Tensor

from ...ops import sigreg
from ._knots import HalfLine, quadrature_of, unit_columns


class LeWMSIGReg(HalfLine):
    """LeWorldModel's (github.com/lucas-maes/le-wm) and stable-worldmodel's SIGReg; embeddings time first [T, B, D].

    Directions from the global random numbers. Under data parallelism the statistic is that of each rank's own samples, as in
    the source; `SIGReg.from_preset("lewm", process_group="auto")` is that of the global batch.
    """

    def __init__(self, knots: int = 17, num_proj: int = 1024):
        super().__init__(3, knots)
        self.num_proj = num_proj

    def forward(self, proj: Tensor) -> Tensor:
        """proj [..., N, D] -> scalar."""
        directions = unit_columns(proj.shape[-1], self.num_proj, proj.device)
        return sigreg(proj, directions, quadrature=quadrature_of(self), scale="N")
