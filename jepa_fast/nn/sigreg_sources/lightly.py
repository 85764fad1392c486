"""The SIGReg of lightly 1.6."""

import torch
from torch import Tensor

from ...ops import sigreg
from ...ops._distributed import resolve_group
from ._knots import HalfLine, quadrature_of


class LightlySIGReg(HalfLine):
    """lightly.loss.SIGReg (1.6). Directions from the global random numbers, in the dtype of the embeddings.

    gather_distributed: the statistic of the global batch, for any number of samples per rank, with rank 0's directions.
    """

    def __init__(self, *, knots: int = 17, t_max: float = 3.0, num_vectors: int = 1024, gather_distributed: bool = False):
        super().__init__(t_max, knots)
        if num_vectors <= 0:
            raise ValueError(f"num_vectors must be a positive integer, got {num_vectors}")
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed=True needs a PyTorch with torch.distributed")
        self.num_vectors = num_vectors
        self.gather_distributed = gather_distributed

    def _generate_unit_vectors(self, device: torch.device, dtype: torch.dtype, num_features: int) -> Tensor:
        directions = torch.randn(num_features, self.num_vectors, device=device, dtype=dtype)
        if self.gather_distributed and resolve_group("auto") is not None:
            torch.distributed.broadcast(directions, src=0)
        return directions.div_(directions.norm(p=2, dim=0))

    def forward(self, proj: Tensor) -> Tensor:
        """proj [..., N, D] -> scalar."""
        directions = self._generate_unit_vectors(proj.device, proj.dtype, proj.shape[-1])
        group = "auto" if self.gather_distributed else None
        return sigreg(proj, directions, quadrature=quadrature_of(self), process_group=group)
