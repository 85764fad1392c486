"""SIGReg with the constructors, buffers, state-dicts and random numbers of the code it comes from, computed by one op.

    LeWMSIGReg(knots=17, num_proj=1024)     le-wm's module.SIGReg and stable-worldmodel's
    MinimalSIGReg(knots=17)                 lejepa's MINIMAL.md
    LightlySIGReg(knots=17, ...)            lightly.loss.SIGReg

A run with one of these in the place of the original draws the same directions and has the same losses, to rounding. Losses
are float32 also under autocast, where the originals round them to bfloat16. The forwards read nothing but the attributes
that the originals have, so that they also work as methods of those.
"""

import functools

import torch
from torch import Tensor, nn

from ..ops import Quadrature, sigreg
from ..ops._distributed import resolve_group
from .host_values import host_value


def quadrature_of(module: nn.Module) -> Quadrature:
    """Of a module's buffers t, phi and weights as they are now; ValueError where t is not evenly spaced."""
    if torch.compiler.is_compiling():
        return module.quadrature  # reading buffers would break the graph
    return _quadrature(*(tuple(host_value(buffer)) for buffer in (module.t, module.phi, module.weights)))


@functools.lru_cache(maxsize=64)
def _quadrature(t: tuple[float, ...], phi: tuple[float, ...], weights: tuple[float, ...]) -> Quadrature:
    return Quadrature.of_knots(t, phi, weights)


class _HalfLine(nn.Module):
    """Buffers t, phi and weights [J] float32: knots on [0, t_max], for the integral over [-t_max, t_max]."""

    def __init__(self, t_max: float, knots: int):
        super().__init__()
        if knots < 2 or t_max <= 0:
            raise ValueError(f"there must be at least 2 knots on [0, t_max] with t_max > 0, got {knots} and t_max {t_max}")
        t = torch.linspace(0, t_max, knots, dtype=torch.float32)
        step = t_max / (knots - 1)
        weights = torch.full((knots,), 2 * step, dtype=torch.float32)
        weights[[0, -1]] = step
        phi = torch.exp(-t.square() / 2.0)
        self.register_buffer("t", t)
        self.register_buffer("phi", phi)
        self.register_buffer("weights", weights * phi)
        self._read_quadrature()
        self.register_load_state_dict_post_hook(_HalfLine._read_quadrature)

    def _read_quadrature(self, incompatible_keys=None) -> None:
        if not self.t.is_meta:
            self.quadrature = quadrature_of(self)


def unit_columns(dim: int, num_slices: int, device: torch.device) -> Tensor:
    """Directions [D, K] float32 by the global random numbers of the device."""
    directions = torch.randn(dim, num_slices, device=device)
    return directions.div_(directions.norm(p=2, dim=0))


class LeWMSIGReg(_HalfLine):
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


class MinimalSIGReg(_HalfLine):
    """The SIGReg of MINIMAL.md (github.com/rbalestr-lab/lejepa), views first [V, N, D]: 256 slices, as LeWM's otherwise.

    Directions are drawn on the device of its input; in the source it is always a GPU.
    """

    def __init__(self, knots: int = 17):
        super().__init__(3, knots)

    def forward(self, proj: Tensor) -> Tensor:
        """proj [..., N, D] -> scalar."""
        directions = unit_columns(proj.shape[-1], 256, proj.device)
        return sigreg(proj, directions, quadrature=quadrature_of(self), scale="N")


class LightlySIGReg(_HalfLine):
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


# named as in nn.sigreg.PRESETS
SOURCES: dict[str, type[nn.Module]] = {"minimal": MinimalSIGReg, "lewm": LeWMSIGReg, "lightly": LightlySIGReg}
