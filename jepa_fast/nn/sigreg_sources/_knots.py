"""What the sources have in common: buffers of knots, and directions."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...ops import Quadrature
from ..host_values import host_value


def quadrature_of(module: nn.Module) -> Quadrature:
    """Of a module's buffers t, phi and weights as they are now; ValueError where t is not evenly spaced."""
    if torch.compiler.is_compiling():
        return module.quadrature  # reading buffers would break the graph
    return _quadrature(*(tuple(host_value(buffer)) for buffer in (module.t, module.phi, module.weights)))


@functools.lru_cache(maxsize=64)
def _quadrature(t: tuple[float, ...], phi: tuple[float, ...], weights: tuple[float, ...]) -> Quadrature:
    return Quadrature.of_knots(t, phi, weights)


class HalfLine(nn.Module):
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
        self.register_load_state_dict_post_hook(HalfLine._read_quadrature)

    def _read_quadrature(self, incompatible_keys=None) -> None:
        if not self.t.is_meta:
            self.quadrature = quadrature_of(self)


def unit_columns(dim: int, num_slices: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Directions [D, K] float32, of a generator or else by the global random numbers of the device."""
    directions = torch.randn(dim, num_slices, device=device, generator=generator)
    return directions.div_(directions.norm(p=2, dim=0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_odd(n_points: int) -> None:
    if n_points % 2 == 0:
        raise ValueError(f"n_points must be odd, got {n_points}")
