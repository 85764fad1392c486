"""The cross-entropy method of V-JEPA 2-AC: position and gripper are searched, the hand does not turn.

arXiv:2506.09985, section 4; constants of facebookresearch/vjepa2, notebooks/utils/world_model_wrapper.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import Cost, Plan, Watch, check_plan, evaluate, preset
from .cem import CEM

_SEARCHED = [0, 1, 2, 6]   # of the 7 action dimensions: xyz and the gripper
_GRIPPER_LIMIT = 0.75      # of sampled gripper actions
_GRIPPER_LEAST = 0.25      # a planned gripper action below this is none
_GRIPPER_MOMENTUM = 0.15


@dataclass(frozen=True, kw_only=True)
class CEMAC:
    """`CEM` in 4 of the 7 action dimensions; the cost sees all 7 and moves poses along the rollout (`move_pose`)."""

    horizon: int = 2                             # actions per plan
    num_samples: int = 400
    num_iterations: int = 10
    num_elites: int = 10
    momentum_mean: float = 0.15                  # of x, y, z; the gripper's are 0.15
    momentum_std: float = 0.15
    max_step: float = 0.05                       # of x, y, z each (official maxnorm), metres; the first std, too
    axis: tuple[tuple[int, float], ...] = ()     # (dimension 0, 1 or 2, the value it is held at)
    close_gripper: int | None = None             # from this step of the plan on the gripper's action is 1

    def __post_init__(self):
        if not self.max_step > 0:
            raise ValueError(f"max_step must be above 0, got {self.max_step}")
        if any(dim not in (0, 1, 2) for dim, _ in self.axis):
            raise ValueError(f"axis must name dimensions 0, 1 or 2, got {self.axis}")
        if self.close_gripper is not None and not 0 <= self.close_gripper < self.horizon:
            raise ValueError(f"close_gripper must be a step in [0, {self.horizon}), got {self.close_gripper}")
        self._search()

    @classmethod
    def vjepa2_ac(cls, **changes) -> "CEMAC":
        """What the official planning wrapper uses."""
        return preset(cls, {}, changes)

    @torch.no_grad()
    def plan(self, cost: Cost, num_episodes: int, *, action_dim: int = 7, seed: int, step: int = 0,
             first_episode: int = 0, device: torch.device | str = "cpu", mean: Tensor | None = None,
             noise: Tensor | None = None, watch: Watch | None = None) -> Plan:
        """As `CEM.plan`, with actions and mean [..., 7]; noise [iterations, E, S, H, 4], mean and std of watch [E, H, 4]."""
        if action_dim != 7:
            raise ValueError(f"action_dim must be 7 (position, rotation, gripper), got {action_dim}")
        if mean is None:
            mean = torch.zeros(num_episodes, self.horizon, 7, device=device)
        elif mean.shape != (num_episodes, self.horizon, 7):
            raise ValueError(f"mean must be [E, H, A] = {[num_episodes, self.horizon, 7]}, got {list(mean.shape)}")
        mean = mean[..., _SEARCHED].clone()
        for dim, value in self.axis:
            mean[..., dim] = value
        check_plan(cost, num_episodes, self.horizon, 4, first_episode, device, mean)
        found = self._search().search(lambda actions: cost(_all_dimensions(actions)), num_episodes, action_dim=4, seed=seed,
                                      step=step, first_episode=first_episode, device=device, mean=mean, noise=noise,
                                      watch=watch)
        gripper = found[..., 3:]
        actions = _all_dimensions(torch.cat([found[..., :3], gripper.where(gripper.abs() >= _GRIPPER_LEAST, 0)], -1))
        return Plan(actions, evaluate(cost, actions.unsqueeze(1))[:, 0])

    def _search(self) -> CEM:
        """The search in 4 dimensions: what is held at a value is a box of no width."""
        momentum = {name: (value, value, value, _GRIPPER_MOMENTUM) for name, value in
                    (("momentum_mean", self.momentum_mean), ("momentum_std", self.momentum_std))}
        low, high = [[-self.max_step] * 3 + [-_GRIPPER_LIMIT]], [[self.max_step] * 3 + [_GRIPPER_LIMIT]]
        for dim, value in self.axis:
            low[0][dim] = high[0][dim] = value
        low, high = low * self.horizon, high * self.horizon
        if self.close_gripper is not None:
            low, high = ([[*row[:3], 1.0] if step >= self.close_gripper else row for step, row in enumerate(rows)]
                         for rows in (low, high))
        return CEM(horizon=self.horizon, num_samples=self.num_samples, num_iterations=self.num_iterations,
                   num_elites=self.num_elites, std=(self.max_step, self.max_step, self.max_step, 1.0),
                   low=tuple(map(tuple, low)), high=tuple(map(tuple, high)), **momentum)


def _all_dimensions(actions: Tensor) -> Tensor:
    """[..., 4] -> [..., 7], rotations 0."""
    zeros = actions.new_zeros(*actions.shape[:-1], 3)
    return torch.cat([actions[..., :3], zeros, actions[..., 3:]], -1)
