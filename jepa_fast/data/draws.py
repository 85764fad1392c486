"""Random numbers of many samples at once, on any device: functions of (seed, sample, draw) and of nothing drawn before."""

import functools
import math

import torch
from torch import Tensor

from .seeds import mix_seed

_GOLDEN, _FIRST, _SECOND = (value - (1 << 64) if value >> 63 else value for value in
                            (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Draws:
    """Numbers of the samples `index` [B] int64; each call takes the next draws, the same ones for a sample in any batch.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over (seed, index, draw), in int64 that wraps around.
    """

    def __init__(self, seed: int, index: Tensor, *keys: int):
        self.device, self.count = index.device, 0
        self.state = _mix(_mix(index + mix_seed(seed, *keys)))

    def uniform(self, *shape: int) -> Tensor:
        """Float32 [B, *shape] in the open interval (0, 1), on steps of 2^-24."""
        size = math.prod(shape)
        draws = torch.arange(self.count + 1, self.count + size + 1, device=self.device)
        self.count += size
        words = _mix(self.state[:, None] + draws * _GOLDEN)
        return ((_shift(words, 40).to(torch.float32) + 0.5) * 2.0**-24).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.special.ndtri(self.uniform(*shape).double()).float()

    def truncated_normal(self, mean: float, std: float, low: float, high: float, *shape: int) -> Tensor:
        """Normal numbers given that they lie in [low, high]: by the inverse of the distribution function."""
        below, above = (0.5 * (1 + math.erf((bound - mean) / std / math.sqrt(2))) for bound in (low, high))
        quantile = below + (above - below) * self.uniform(*shape).double()
        return (mean + std * torch.special.ndtri(quantile)).clamp(low, high).float()

    def von_mises(self, concentration: float, *shape: int) -> Tensor:
        """Angles in (-pi, pi) about 0: by the inverse of the distribution function, tabulated, error below 1e-4."""
        angles, cumulative = (table.to(self.device) for table in _von_mises_table(concentration))
        u = self.uniform(*shape)
        right = torch.searchsorted(cumulative, u).clamp(1, len(angles) - 1)
        low, high = cumulative[right - 1], cumulative[right]
        return torch.lerp(angles[right - 1], angles[right], (u - low) / (high - low))


@functools.cache
def _von_mises_table(concentration: float) -> tuple[Tensor, Tensor]:
    angles = torch.linspace(-math.pi, math.pi, 4097, dtype=torch.float64)
    density = torch.exp(concentration * (angles.cos() - 1))
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, angles)])
    return angles.float(), (cumulative / cumulative[-1]).float()


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: PyTorch's carries the sign along."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift(words, 30)) * _FIRST
    words = (words ^ _shift(words, 27)) * _SECOND
    return words ^ _shift(words, 31)
