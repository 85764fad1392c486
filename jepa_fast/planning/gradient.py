"""Planning by gradient descent on the actions, from many starts at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import (
    Cost,
    Limits,
    Noise,
    PerDimension,
    Plan,
    check_counts,
    check_limits,
    check_plan,
    evaluate,
    per_dimension,
    preset,
)


@dataclass(frozen=True, kw_only=True)
class GradientPlanner:
    """AdamW on every one of S sequences; the one of lowest cost in the end is the plan."""

    horizon: int = 5                  # actions per plan
    num_samples: int = 100            # starts per episode: the mean, and normal numbers around it
    num_iterations: int = 30
    std: PerDimension = 1.0           # of the starts, in units of the actions
    lr: float = 0.1
    weight_decay: float = 0.01        # decoupled
    betas: tuple[float, float] = (0.9, 0.999)
    low: PerDimension | None = None   # box: actions are clamped to [low, high] after every step
    high: PerDimension | None = None
    max_norm: float | None = None     # longer actions are scaled down to this norm after every step

    def __post_init__(self):
        check_counts(self, ("horizon", "num_samples", "num_iterations"))
        check_limits(self)
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")

    @classmethod
    def leworldmodel(cls, **changes) -> "GradientPlanner":
        """LeWorldModel (arXiv:2603.19312) as stable-worldmodel plans with it (solver/adam.yaml)."""
        return preset(cls, dict(horizon=5, num_samples=100, num_iterations=30, std=1.0, lr=0.1), changes)

    def plan(self, cost: Cost, num_episodes: int, *, action_dim: int, seed: int, step: int = 0, first_episode: int = 0,
             device: torch.device | str = "cpu", mean: Tensor | None = None, noise: Tensor | None = None) -> Plan:
        """As `CEM.plan`, for a cost that is differentiable in the actions; noise [E, S, H, A]."""
        E, S, H, A = num_episodes, self.num_samples, self.horizon, action_dim
        check_plan(cost, E, H, A, first_episode, device, mean)
        draw = Noise(E, H, A, seed, step, first_episode, device)
        if noise is not None and noise.shape != (E, S, H, A):
            raise ValueError(f"noise must be [E, S, H, A] = {[E, S, H, A]}, got {list(noise.shape)}")
        limits = Limits(self, H, A, device)
        white = draw.normals(0, S) if noise is None else noise.clone()
        white[:, 0] = 0
        actions = white * per_dimension("std", self.std, H, A, device)
        actions = limits.project(actions if mean is None else actions + mean.float().unsqueeze(1)).requires_grad_()
        optimizer = torch.optim.AdamW([actions], lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        for _ in range(self.num_iterations):
            with torch.enable_grad():
                values = evaluate(cost, actions)
                if not values.requires_grad:
                    raise ValueError("cost must be differentiable in the actions, got one that carries no gradient")
                # of the actions alone: the model's parameters keep their gradients
                actions.grad, = torch.autograd.grad(values.sum(), actions)
            optimizer.step()
            with torch.no_grad():
                actions.copy_(limits.project(actions))
        with torch.no_grad():
            values, order = evaluate(cost, actions.detach()).sort(dim=1, stable=True)
            best = actions.detach().gather(1, order[:, :1, None, None].expand(-1, 1, H, A))[:, 0]
        return Plan(best, values[:, 0])
