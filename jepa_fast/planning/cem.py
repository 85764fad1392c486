"""The cross-entropy method: the elites' mean and standard deviation are the next distribution.

Rubinstein and Kroese, The Cross-Entropy Method (2004); in latent space as in V-JEPA 2-AC, EB-JEPA and LeWorldModel.
"""

from dataclasses import dataclass

from ._common import SamplingPlanner, preset


@dataclass(frozen=True, kw_only=True)
class CEM(SamplingPlanner):
    """`SamplingPlanner` whose new standard deviation is the unbiased one of the elites, which all count alike."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_elites < 2:
            raise ValueError(f"num_elites must be at least 2, for a standard deviation, got {self.num_elites}")

    @classmethod
    def eb_jepa(cls, **changes) -> "CEM":
        """Two-Rooms of EB-JEPA (facebookresearch/eb_jepa, planning_cem.yaml)."""
        return preset(cls, dict(horizon=90, num_samples=200, num_iterations=20, num_elites=20, std=1.5, max_norm=2.45),
                      changes)

    @classmethod
    def leworldmodel(cls, **changes) -> "CEM":
        """LeWorldModel (arXiv:2603.19312) as stable-worldmodel plans with it: horizon in blocks of 5 actions."""
        return preset(cls, dict(horizon=5, num_samples=300, num_iterations=30, num_elites=30, std=1.0,
                                include_mean=True), changes)

    def _variance_scale(self) -> float:
        return self.num_elites / (self.num_elites - 1)
