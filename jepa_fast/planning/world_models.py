"""The cost of actions under a trained world model: how far from the goal, in latent space, they are predicted to lead."""

from typing import Literal

import torch
from torch import Tensor, nn


class GoalCost:
    """cost(actions [E, S, H, A]) -> [E, S]: mean squared distance of predicted states to the goal's.

    The episodes' observations are encoded once, by `encode`, not once per sample or iteration. `model` has
    `predict(states [N, D], actions [N, T, A])`, which yields the states after each action: all episodes and samples take
    a step together, no more than `max_rows` of them at once, and no step but the last is kept.

    distance: "sum" over all steps or that of the "last". active [E] bool: the other episodes' states are not computed and
    their cost is 0, so that a planner's noise does not depend on which episodes are finished.
    """

    def __init__(self, model: nn.Module, states: Tensor, goal: Tensor | None, *, action_dim: int,
                 distance: Literal["sum", "last"] = "sum", active: Tensor | None = None, max_rows: int = 8192):
        if goal is None:
            raise ValueError("goal must be the states [E, D] of the goals, got None: planning needs a goal")
        if states.dim() != 2 or goal.shape != states.shape:
            raise ValueError(f"states and goal must be [E, D] alike, got {list(states.shape)} and {list(goal.shape)}")
        if distance not in ("sum", "last"):
            raise ValueError(f"distance must be sum or last, got {distance!r}")
        if active is not None and (active.shape != states.shape[:1] or active.dtype != torch.bool):
            raise ValueError(f"active must be [{len(states)}] bool, got {list(active.shape)} {active.dtype}")
        self.model, self.states, self.goal, self.action_dim = model, states, goal, action_dim
        self.distance, self.active, self.max_rows = distance, active, max_rows

    def __call__(self, actions: Tensor) -> Tensor:
        E = len(self.states)
        if actions.dim() != 4 or actions.shape[0] != E or actions.shape[3] != self.action_dim:
            raise ValueError(f"actions must be [E, S, H, A] with E = {E} and A = {self.action_dim}, "
                             f"got {list(actions.shape)}")
        if self.active is None:
            return self._cost(actions, self.states, self.goal)
        some = self._cost(actions[self.active], self.states[self.active], self.goal[self.active])
        return some.new_zeros(actions.shape[:2]).masked_scatter(self.active[:, None].expand(-1, actions.shape[1]), some)

    def _cost(self, actions: Tensor, states: Tensor, goal: Tensor) -> Tensor:
        at_once = max(1, self.max_rows // max(1, len(states)))
        return torch.cat([self._chunk(part, states, goal) for part in actions.split(at_once, dim=1)], dim=1)

    def _chunk(self, actions: Tensor, states: Tensor, goal: Tensor) -> Tensor:
        E, S, H, _ = actions.shape
        states = states[:, None].expand(-1, S, -1).flatten(0, 1)
        total = 0.0
        for step, predicted in enumerate(self.model.predict(states, actions.flatten(0, 1))):
            if self.distance == "sum" or step == H - 1:
                total = total + (predicted.view(E, S, -1) - goal[:, None]).square().mean(-1)
        return total


@torch.no_grad()
def encode(model: nn.Module, frames: Tensor) -> Tensor:
    """uint8 frames [E, C, H, W] -> states [E, D] float32, on the model's device."""
    return model.encode(frames.to(next(model.parameters()).device)).float()
