"""iCEM: the cross-entropy method with noise that is smooth in time, and elites that stay.

Pinneri et al., Sample-efficient Cross-Entropy Method for Real-time Planning, arXiv:2008.06389.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import preset
from .cem import CEM


@dataclass(frozen=True, kw_only=True)
class ICEM(CEM):
    beta: float = 2.0     # power of noise at frequency f goes as f^-beta; 0: white
    num_kept: int = 5     # best elites of an iteration that are evaluated again in the next one

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.num_kept <= min(self.num_elites, self.num_samples - self.include_mean):
            raise ValueError(f"num_kept must be at least 0 and at most num_elites = {self.num_elites}, with room among "
                             f"num_samples = {self.num_samples}, got {self.num_kept}")
        if self.beta < 0:
            raise ValueError(f"beta must be at least 0, got {self.beta}")

    @classmethod
    def stable_worldmodel(cls, **changes) -> "ICEM":
        """The defaults of stable-worldmodel's ICEMSolver."""
        return preset(cls, dict(horizon=5, num_samples=300, num_iterations=30, num_elites=30, std=1.0, momentum_mean=0.1,
                                momentum_std=0.1, beta=2.0, num_kept=5, include_mean=True), changes)

    def _sample(self, white: Tensor, mean: Tensor, std: Tensor, elites: Tensor | None) -> Tensor:
        actions = super()._sample(colored(white, self.beta), mean, std, elites)
        if elites is not None:
            first = int(self.include_mean)
            actions[:, first:first + self.num_kept] = elites[:, :self.num_kept]
        return actions


def colored(white: Tensor, beta: float) -> Tensor:
    """White noise [E, S, H, A] -> power f^-beta along H, each sequence scaled to an unbiased variance of 1.

    Frequency 0 gets the scale of the lowest one above it. In float64, so that rounding does not depend on E.
    """
    H = white.shape[2]
    if H < 2 or beta == 0:
        return white
    frequency = torch.fft.rfftfreq(H, dtype=torch.float64, device=white.device)
    frequency = torch.cat([frequency[1:2], frequency[1:]])
    spectrum = torch.fft.rfft(white.double(), dim=2) * (frequency ** (-beta / 2))[:, None]
    noise = torch.fft.irfft(spectrum, n=H, dim=2)
    return (noise / noise.std(2, keepdim=True).clamp_min(1e-8)).to(white.dtype)
