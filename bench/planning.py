"""One environment step of planning: ours, and the same plan made the way the public EB-JEPA code makes it.

The public way takes the episodes one by one, and in every iteration of the cross-entropy method repeats the observation
for all samples, encodes all these copies, and appends to the predicted states by `torch.cat`. Same model, same noise.
"""

import torch
from torch import Tensor, nn

from jepa_fast import recipes
from jepa_fast.planning import CEM
from jepa_fast.planning.world_models import GoalCost, encode

from .measure import agree, interleaved

CASES = {  # recipe, episodes, samples, horizon, iterations
    "two-rooms-33-e20-s100-h60": ("eb_jepa_two_rooms_small", 20, 100, 60, 2),
    "two-rooms-65-e4-s200-h90": ("eb_jepa_two_rooms", 4, 200, 90, 2),
}


def public_plan(objective: nn.Module, frames: Tensor, goal_frames: Tensor, noise: Tensor, planner: CEM) -> Tensor:
    """Plans [E, H, A] from frames [E, C, H, W] and noise [iterations, E, S, H, A]."""
    plans = []
    for e in range(len(frames)):
        goal = objective.encode(goal_frames[e:e + 1])
        mean, std = torch.zeros(noise.shape[3:]), planner.std * torch.ones(noise.shape[3:])
        for white in noise[:, e]:
            actions = mean + std * white
            length = actions.norm(dim=-1, keepdim=True)
            actions = actions * (length.clamp(max=planner.max_norm) / (length + 1e-12))
            cost = public_cost(objective, frames[e:e + 1], goal, actions)
            elites = actions[cost.topk(planner.num_elites, largest=False).indices]
            mean, std = elites.mean(0), elites.std(0)
        plans.append(mean)
    return torch.stack(plans)


def public_cost(objective: nn.Module, frame: Tensor, goal: Tensor, actions: Tensor) -> Tensor:
    """Cost [S] of actions [S, H, A]: every sample has its own copy of the frame encoded."""
    states = objective.encode(frame.repeat(len(actions), 1, 1, 1))[:, None]
    for step in range(actions.shape[1]):
        following = objective.step(states[:, -1], actions[:, step])
        states = torch.cat([states, following[:, None]], dim=1)
    return (states[:, 1:] - goal).square().mean(-1).sum(1)


def bench_planning(repeats: int = 3, only: str = "") -> list[dict]:
    """Rows for the public way and ours; their plans must agree first."""
    rows = []
    for case, (name, E, S, H, iterations) in CASES.items():
        if only in case:
            rows += _bench(case, recipes.get_recipe(name), E, S, H, iterations, repeats)
    return rows


@torch.no_grad()
def _bench(case: str, recipe: "recipes.Recipe", E: int, S: int, H: int, iterations: int, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    objective = recipe.objective.build().eval().requires_grad_(False)
    environment = recipe.data.rooms.build()
    environment.reset(0, E)
    frames, goal_frames = environment.render(), environment.render_goal()
    planner = CEM.eb_jepa(horizon=H, num_samples=S, num_iterations=iterations, num_elites=S // 10)
    noise = torch.randn(iterations, E, S, H, 2)

    def ours() -> Tensor:
        cost = GoalCost(objective, encode(objective, frames), encode(objective, goal_frames), action_dim=2)
        return planner.plan(cost, E, action_dim=2, seed=0, noise=noise).actions

    providers = {"public way": lambda: public_plan(objective, frames, goal_frames, noise, planner), "ours": ours}
    agree({name: [call()] for name, call in providers.items()}, 1e-4)
    timings = interleaved(providers, repeats=repeats, warmup=0)
    base = timings["public way"].median
    return [{"bench": "planning", "case": case, "provider": name, "ms": t.median * 1e3, "p20_ms": t.p20 * 1e3,
             "p80_ms": t.p80 * 1e3, "ratio": base / t.median} for name, t in timings.items()]
