"""Plan, execute, plan again until the goal is reached: all episodes of an evaluation at once."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.draws import Draws
from ..data.two_rooms import TwoRooms
from ..objectives.world_model import PlanningConfig
from .world_models import GoalCost, encode

Agent = Callable[[TwoRooms, Tensor, int], Tensor]  # environment, active [E] bool, step -> actions [E, K, A] to execute
POLICY = 2  # first key of the draws of the random policy


@dataclass(frozen=True)
class Outcome:
    """What became of E episodes."""

    success: Tensor    # [E] bool
    steps: Tensor      # [E] environment steps until success, or all there were
    distance: Tensor   # [E] to the goal in the end, pixels
    positions: Tensor  # [E, T + 1, 2] after each action; a finished episode stays where it is
    seconds: float     # wall time of all episodes together

    @property
    def success_rate(self) -> float:
        return float(self.success.float().mean())


def run_episodes(environment: TwoRooms, agent: Agent, *, max_steps: int | None = None) -> Outcome:
    """Let an agent act in an environment that was reset, until success or `max_steps` environment steps (None: its own).

    Success is looked for after each action, of `frame_skip` steps. Finished episodes are no longer active: nothing is
    encoded, planned or moved for them.
    """
    start, skip = time.perf_counter(), environment.rooms.frame_skip
    limit = environment.rooms.max_steps if max_steps is None else max_steps
    if limit < skip:
        raise ValueError(f"max_steps must be at least one action of {skip} steps, got {limit}")
    success, positions, step = environment.success(), [environment.state], 0
    steps = torch.zeros_like(success, dtype=torch.int64)
    while step + skip <= limit and not bool(success.all()):
        for action in agent(environment, ~success, step).unbind(1):
            environment.step(action[~success], ~success)
            step += skip
            steps[~success] = step
            success = success | environment.success()
            positions.append(environment.state)
            if step + skip > limit or bool(success.all()):
                break
    return Outcome(success, steps, environment.distance(), torch.stack(positions, 1), time.perf_counter() - start)


class PlanningAgent:
    """Plans in a world model; goals are encoded once, observations once per plan."""

    def __init__(self, model: nn.Module, planner, settings: PlanningConfig, *, seed: int = 0, max_rows: int = 8192):
        self.model, self.planner, self.settings = model.eval(), planner, settings
        self.seed, self.max_rows = seed, max_rows
        self.goal = self.mean = None

    def __call__(self, environment: TwoRooms, active: Tensor, step: int) -> Tensor:
        if self.goal is None:
            self.goal = encode(self.model, environment.render_goal())
        states = torch.zeros_like(self.goal)
        states[active] = encode(self.model, environment.render(active))
        cost = GoalCost(self.model, states, self.goal, action_dim=environment.action_dim, active=active,
                        distance=self.settings.distance, max_rows=self.max_rows)
        plan = self.planner.plan(cost, len(states), action_dim=environment.action_dim, seed=self.seed, step=step,
                                 device=states.device, mean=self.mean)
        count = self.settings.num_executed
        if self.settings.warm_start:
            rest = plan.actions[:, count:]
            self.mean = torch.cat([rest, torch.zeros_like(plan.actions[:, :count])], dim=1)
        return plan.actions[:, :count]


class RandomPolicy:
    """Actions that know nothing, from (seed, episode, step)."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, environment: TwoRooms, active: Tensor, step: int) -> Tensor:
        draws = Draws(self.seed, torch.arange(len(active), device=active.device), POLICY, step)
        return environment.rooms.random_action(draws)[:, None]


class StraightLine:
    """Towards the goal as if there were no wall; it is told the positions."""

    def __call__(self, environment: TwoRooms, active: Tensor, step: int) -> Tensor:
        return environment.rooms.action_towards(environment.state, environment.goal)[:, None]
