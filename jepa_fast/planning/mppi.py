"""Model predictive path integral control: elites weighted by exp(-cost / temperature).

Williams et al., arXiv:1509.01149; with elites and several iterations as in TD-MPC, arXiv:2203.04955.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import Limits, SamplingPlanner, preset


@dataclass(frozen=True, kw_only=True)
class MPPI(SamplingPlanner):
    temperature: float = 0.5     # in units of the cost: a sample costing so much more than the best weighs exp(-1)
    is_inverse: bool = False     # weights exp(-temperature * cost), as EB-JEPA writes it: `temperature` is 1 / temperature
    updates_std: bool = True     # False: the first std in every iteration (stable-worldmodel)

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @classmethod
    def eb_jepa(cls, as_written: bool = False, **changes) -> "MPPI":
        """Two-Rooms of EB-JEPA (facebookresearch/eb_jepa, planning_mppi.yaml): its settings, and a mean returned.

        as_written: what its code does with them. It multiplies by the temperature of 0.005, which makes all elites
        weigh about the same; it starts with std 2 and clips nothing, whatever the file says; it returns an elite drawn
        by weight.
        """
        official = dict(horizon=90, num_samples=200, num_iterations=20, num_elites=20, temperature=0.005)
        official |= (dict(std=2.0, is_inverse=True, returns="sample") if as_written else dict(std=1.5, max_norm=2.45))
        return preset(cls, official, changes)

    @classmethod
    def stable_worldmodel(cls, **changes) -> "MPPI":
        """The defaults of stable-worldmodel's MPPISolver."""
        return preset(cls, dict(horizon=5, num_samples=300, num_iterations=30, num_elites=30, std=1.0, temperature=0.5,
                                include_mean=True, updates_std=False), changes)

    def _weights(self, cost: Tensor) -> Tensor:
        gap = cost.double() - cost[:, :1].double()
        return torch.softmax(-gap * self.temperature if self.is_inverse else -gap / self.temperature, 1)

    def _moments(self, elites: Tensor, weights: Tensor, mean: Tensor, std: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        mean, new_std = super()._moments(elites, weights, mean, std, limits)
        return mean, new_std if self.updates_std else std
