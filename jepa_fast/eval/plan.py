"""`jepa-fast plan RUN`: success of planning with a run's world model, beside policies that do not plan, and its page."""

import dataclasses
import json
import pathlib
import time
from typing import Literal

import torch
from torch import nn

from .. import recipes
from ..data.two_rooms import DotRooms, Rooms, TwoRooms
from ..data.two_rooms_data import TwoRoomsData
from ..info import devices, versions
from ..objectives.world_model import PlanningConfig
from ..planning import CEM, ICEM, MPPI, GradientPlanner
from ..planning.closed_loop import Outcome, PlanningAgent, RandomPolicy, StraightLine, run_episodes
from ..train import checkpoint
from ._style import ACCENT, MUTED, drawing
from .curves import learning_curves
from .page import write_page
from .table import Table

HELD_OUT_SEED = 1_000_003  # of samples that no run trains on


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """How to plan; None: as the recipe says."""

    planner: Literal["cem", "mppi", "icem", "gradient"] | None = None
    episodes: int = 20
    seed: int = 0                     # of the episodes and of the planner's noise
    horizon: int | None = None        # actions per plan
    num_samples: int | None = None    # sequences per iteration and episode
    num_iterations: int | None = None
    num_executed: int | None = None   # actions executed before the next plan
    max_steps: int | None = None      # environment steps of an episode
    max_rows: int = 8192              # sequences rolled out at once: bounds memory
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self):
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")


def plan_run(folder: pathlib.Path, arguments: PlanArguments) -> tuple[Table, pathlib.Path]:
    """Plan with the run in `folder`; returns the table and the page. Writes plan.json, plan.png and index.html there."""
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: no recipe.yaml in it")
    recipe = recipes.load(folder / "recipe.yaml")
    if not isinstance(recipe.data, TwoRoomsData):
        raise ValueError(f"plan needs the run of a world model (eb_jepa_..., leworldmodel_...), got {recipe.name}")
    device = "cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu"
    objective = recipe.objective.build()
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    checkpoint.load_into(objective, state["objective"], str(folder))
    objective.to(device).eval().requires_grad_(False)
    settings = settings_of(recipe.objective.planning, arguments)
    planner = make_planner(settings, recipe.data.rooms)
    agents = {"random policy": RandomPolicy(arguments.seed), "straight to the goal": StraightLine(),
              settings.planner: PlanningAgent(objective, planner, settings, seed=arguments.seed,
                                              max_rows=arguments.max_rows)}
    environment, outcomes = recipe.data.rooms.build(), {}
    for name, agent in agents.items():
        environment.reset(arguments.seed, arguments.episodes, device)
        outcomes[name] = run_episodes(environment, agent, max_steps=arguments.max_steps)
    rmse = probe_error(objective, recipe.data, device)
    table = table_of(outcomes, f"{recipe.name} after {state['step']} steps: {arguments.episodes} episodes; positions read "
                               f"from held-out frames to {rmse:.2f} pixels")
    environment.reset(arguments.seed, arguments.episodes, device)
    return table, write(folder, recipe, table, outcomes, planner, arguments, environment, rmse, state["step"])


def settings_of(config: PlanningConfig, arguments: PlanArguments) -> PlanningConfig:
    given = {name: getattr(arguments, name) for name in ("planner", "horizon", "num_samples", "num_iterations",
                                                    "num_executed")}
    changes = {name: value for name, value in given.items() if value is not None}
    changes["num_elites"] = min(config.num_elites, changes.get("num_samples", config.num_elites))
    return dataclasses.replace(config, **changes)


def make_planner(settings: PlanningConfig, rooms: Rooms):
    """The planner with the public project's constants, but for what `settings` and the rooms say."""
    name, dots = settings.planner, isinstance(rooms, DotRooms)
    limits = dict(max_norm=rooms.max_step) if dots else dict(low=-1.0, high=1.0)
    changes = dict(horizon=settings.horizon, num_samples=settings.num_samples, num_iterations=settings.num_iterations,
                   std=settings.std, **limits)
    if name == "gradient":
        return GradientPlanner.leworldmodel(**changes)
    changes["num_elites"] = settings.num_elites
    if name == "icem":
        return ICEM.stable_worldmodel(num_kept=min(5, settings.num_elites), **changes)
    if name == "mppi":
        return MPPI.eb_jepa(**changes) if dots else MPPI.stable_worldmodel(**changes)
    if name != "cem":
        raise ValueError(f"planner must be cem, mppi, icem or gradient, got {name!r}")
    return CEM.eb_jepa(**changes) if dots else CEM.leworldmodel(**changes)


@torch.no_grad()
def probe_error(objective: nn.Module, data: TwoRoomsData, device: str, num_samples: int = 64) -> float:
    """Root mean squared error, in pixels, of the positions that the probe reads from held-out frames."""
    batch = data.build().samples(torch.arange(num_samples, device=device), HELD_OUT_SEED)
    states = objective.encode(batch["observations"].flatten(0, 1))
    return float(objective.probe.loss(states, batch["positions"].flatten(0, 1))[1])


def table_of(outcomes: dict[str, Outcome], title: str) -> Table:
    rows = []
    for name, outcome in outcomes.items():
        reached = outcome.steps[outcome.success].float()
        rows.append([name, f"{100 * outcome.success_rate:.0f}", f"{float(reached.mean()):.0f}" if len(reached) else "-",
                     f"{float(outcome.distance.mean()):.1f}", f"{outcome.seconds / len(outcome.steps):.2f}"])
    return Table(title, ["policy", "success %", "steps to success", "distance in the end", "s per episode"], rows)


def write(folder: pathlib.Path, recipe: "recipes.Recipe", table: Table, outcomes: dict[str, Outcome], planner,
          arguments: PlanArguments, environment: TwoRooms, rmse: float, step: int) -> pathlib.Path:
    record = {"title": table.title, "header": list(table.header), "rows": [list(row) for row in table.rows],
              "planner": {"class": type(planner).__name__, **dataclasses.asdict(planner)},
              "arguments": dataclasses.asdict(arguments), "position_rmse": rmse, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
              "episodes": {name: {"success": outcome.success.tolist(), "steps": outcome.steps.tolist(),
                                  "distance": [round(value, 3) for value in outcome.distance.tolist()]}
                           for name, outcome in outcomes.items()}}
    (folder / "plan.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_episodes(environment, list(outcomes.values())[-1], folder / "plan.png")
    pictures = [("plan.png", f"Episodes planned with {list(outcomes)[-1]}: from the dot to the star; "
                             "the number is of environment steps.")]
    if (folder / "metrics.csv").is_file():
        learning_curves(folder / "metrics.csv", folder / "curves.png")
        pictures.append(("curves.png", "Learning curves, from metrics.csv."))
    return write_page(folder, f"{recipe.name} ({recipe.paper})", (folder / "recipe.yaml").read_text(), [table], pictures,
                      versions=versions() | {"device": devices()[-1], "step": str(step)})


def draw_episodes(environment: TwoRooms, outcome: Outcome, out_png: pathlib.Path, num_shown: int = 8) -> None:
    """The paths of the first episodes, failures first, over what was seen at their start."""
    chosen = torch.argsort(outcome.success.long(), stable=True)[:num_shown].tolist()
    frames, skip = environment.render().cpu().float() / 255, environment.rooms.frame_skip
    # walls only, dark on light: the wall channel, or where red meets no other colour
    walls = 1 - frames[:, 1] if environment.in_chans == 2 else frames[:, 0]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    extent = (-0.5, environment.rooms.native_size - 0.5, environment.rooms.native_size - 0.5, -0.5)
    with drawing(out_png, 2.1 * columns, 2.3 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, i in zip(axes.flat, chosen, strict=False):
            path = outcome.positions[i, :int(outcome.steps[i]) // skip + 1].cpu().numpy()
            ax.imshow(walls[i].numpy(), cmap="gray", vmin=-1, vmax=1.1, extent=extent)
            ax.plot(path[:, 0], path[:, 1], color=ACCENT, linewidth=1)
            ax.plot(*path[0], "o", color=ACCENT, markersize=4)
            ax.plot(*environment.goal[i].tolist(), "*", color="#b35900", markersize=8)
            ax.set_title(f"{int(outcome.steps[i])}" + ("" if outcome.success[i] else ", failed"), fontsize=8,
                         color=MUTED, loc="left")
