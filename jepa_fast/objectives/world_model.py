"""What world models share: a probe of positions, normalised frames, and how planning with them is set up.

To planners a world model is an objective with `encode(frames [N, C, H, W]) -> states [N, D]` and
`predict(states [N, D], actions [N, T, A])`, which yields the states [N, D] after each action.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..nn.block import at_least_float32


@dataclass(frozen=True, kw_only=True)
class PlanningConfig:
    """What `jepa-fast plan` uses unless told otherwise."""

    planner: Literal["cem", "mppi", "icem", "gradient"] = "cem"
    horizon: int = 90              # actions (blocks of them, where the environment skips frames) per plan
    num_samples: int = 200         # sequences per iteration and episode
    num_iterations: int = 20
    num_elites: int = 20
    std: float = 1.5               # of the first distribution
    num_executed: int = 1          # actions of a plan that are executed before the next plan
    warm_start: bool = False       # the next search starts from what is left of the plan
    distance: Literal["sum", "last"] = "sum"  # to the goal: of all predicted states, or of the last

    def __post_init__(self):
        if not 1 <= self.num_executed <= self.horizon:
            raise ValueError(f"num_executed must be from 1 to horizon = {self.horizon}, got {self.num_executed}")


class Observations(nn.Module):
    """uint8 frames [..., C, H, W] to normalised float32 images: (x / 255 - mean) / std, per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("scale", 1 / (255 * torch.tensor(std))[:, None, None], persistent=False)
        self.register_buffer("shift", (torch.tensor(mean) / torch.tensor(std))[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        return frames * self.scale - self.shift


class PositionProbe(nn.Module):
    """Where the dot is, read from states by an MLP that trains beside the model and leaves it alone."""

    def __init__(self, dim: int, mean: tuple[float, float], std: tuple[float, float]):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 512), nn.ReLU(), nn.Linear(512, 2))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., 2], in pixels."""
        return at_least_float32(self.mlp(states)) * self.std + self.mean

    def loss(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error in standard deviations, without gradient to the states; its root in pixels."""
        error = self(states.detach()) - positions
        return (error / self.std).square().mean(), error.detach().square().mean().sqrt()


def check_channels(mean: tuple[float, ...], std: tuple[float, ...], in_chans: int) -> None:
    if len(mean) != in_chans or len(std) != in_chans:
        raise ValueError(f"mean and std must have encoder.in_chans = {in_chans} numbers each, got {mean} and {std}")


def check_batch(frames: Tensor, actions: Tensor, action_dim: int, at_least: int) -> None:
    B, T = frames.shape[:2]
    if T < at_least:
        raise ValueError(f"observations must have at least {at_least} frames, got {T}")
    if actions.shape != (B, T - 1, action_dim):
        raise ValueError(f"actions must be [{B}, {T - 1}, {action_dim}], got {list(actions.shape)}")
