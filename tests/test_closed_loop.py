"""Planning with world models: in a perfect one goals are reached, together as alone; costs, the command, mistakes."""

import dataclasses
import json
import pathlib

import pytest
import torch
from test_cli import fails
from test_world_models import NAMES, TINY_EB, tiny
from torch import nn

from jepa_fast.cli import main
from jepa_fast.data.two_rooms import DiscRooms, DotRooms, TwoRooms
from jepa_fast.eval.plan import make_planner
from jepa_fast.objectives.world_model import PlanningConfig
from jepa_fast.planning import CEM
from jepa_fast.planning.closed_loop import PlanningAgent, StraightLine, run_episodes
from jepa_fast.planning.world_models import GoalCost
from jepa_fast.train.loop import train


class Truth(nn.Module):
    """A perfect world model: the state is the position, the wall included; a single wall for all episodes."""

    def __init__(self, environment: TwoRooms):
        super().__init__()
        self.rooms, self.layout, self.anything = environment.rooms, environment.layout[:1], nn.Parameter(torch.zeros(1))

    def encode(self, frames):
        """The middle of mass of the dot."""
        dot, grid = frames[:, 0].double(), torch.linspace(0, 64, frames.shape[-1], dtype=torch.float64)
        mass = dot.sum((1, 2))
        return torch.stack([(dot.sum(1) * grid).sum(1) / mass, (dot.sum(2) * grid).sum(1) / mass], 1).float()

    def predict(self, state, actions):
        layout = type(self.layout)(self.layout.wall.expand(len(state)), self.layout.door.expand(len(state)))
        for action in actions.unbind(1):
            state = self.rooms.move(state, action, layout)
            yield state


ROOMS = DotRooms(wall_range=(32, 32), door_range=(30, 30))
SETTINGS = PlanningConfig(horizon=30, num_samples=64, num_iterations=4, num_elites=8, num_executed=3, planner="icem",
                          warm_start=True)


def planned(episodes, seed=0, max_steps=40):
    environment = TwoRooms(ROOMS)
    environment.reset(5, episodes)
    agent = PlanningAgent(Truth(environment), make_planner(SETTINGS, ROOMS), SETTINGS, seed=seed)
    return run_episodes(environment, agent, max_steps=max_steps)


def test_planning_in_a_perfect_model_reaches_the_goal():
    outcome = planned(4)
    environment = TwoRooms(ROOMS)
    environment.reset(5, 4)
    straight = run_episodes(environment, StraightLine(), max_steps=40)
    assert outcome.success_rate == 1.0 > straight.success_rate
    assert (outcome.distance < 4.5).all() and (outcome.steps < 40).all()
    assert outcome.positions.shape == (4, int(outcome.steps.max()) + 1, 2)
    moved = outcome.positions.diff(dim=1).norm(dim=-1)
    assert (moved <= 2.45 + 1e-4).all()
    for i, steps in enumerate(outcome.steps.tolist()):
        assert not moved[i, steps:].any()  # a finished episode rests


def test_episodes_together_are_episodes_alone():
    """The first of several episodes goes the way it goes alone, although the others end sooner or later."""
    together, alone = planned(4), planned(1)
    steps = int(alone.steps[0])
    assert steps == int(together.steps[0])
    assert torch.equal(together.positions[0, :steps + 1], alone.positions[0])


def test_costs_are_those_of_one_sequence_at_a_time():
    torch.manual_seed(0)
    objective = TINY_EB.build().eval().requires_grad_(False)
    states, goal, actions = torch.randn(3, 16), torch.randn(3, 16), torch.randn(3, 5, 4, 2)
    expected = {"sum": torch.zeros(3, 5), "last": torch.zeros(3, 5)}
    for e in range(3):
        for s in range(5):
            state = states[e:e + 1]
            for t in range(4):
                state = objective.encoder.norm(objective.predictor(actions[e, s, t][None], state))
                distance = (state - goal[e]).square().mean()
                expected["sum"][e, s] += distance
                expected["last"][e, s] = distance
    for distance, values in expected.items():
        for max_rows in (1, 6, 8192):
            cost = GoalCost(objective, states, goal, action_dim=2, distance=distance, max_rows=max_rows)
            torch.testing.assert_close(cost(actions), values, rtol=1e-5, atol=1e-6)
        active = torch.tensor([True, False, True])
        cost = GoalCost(objective, states, goal, action_dim=2, distance=distance, active=active)
        torch.testing.assert_close(cost(actions), values * active[:, None], rtol=1e-5, atol=1e-6)


def test_wrong_plans_are_named():
    model, states = TINY_EB.build(), torch.zeros(3, 16)
    with pytest.raises(ValueError, match="got None: planning needs a goal"):
        GoalCost(model, states, None, action_dim=2)
    with pytest.raises(ValueError, match=r"states and goal must be \[E, D\] alike, got \[3, 16\] and \[2, 16\]"):
        GoalCost(model, states, states[:2], action_dim=2)
    with pytest.raises(ValueError, match=r"with E = 3 and A = 2, got \[3, 5, 4, 3\]"):
        CEM(horizon=4, num_samples=5, num_elites=2).plan(GoalCost(model, states, states, action_dim=2), 3, action_dim=3,
                                                         seed=0)
    with pytest.raises(ValueError, match="distance must be sum or last, got 'first'"):
        GoalCost(model, states, states, action_dim=2, distance="first")
    environment = TwoRooms(DiscRooms())
    environment.reset(0, 2)
    with pytest.raises(ValueError, match="max_steps must be at least one action of 5 steps, got 4"):
        run_episodes(environment, StraightLine(), max_steps=4)


@pytest.mark.parametrize("name", NAMES)
def test_plan_command(name, tmp_path, capsys):
    run = tmp_path / "run"
    train(dataclasses.replace(tiny(name), name=name), run)
    planners = ["cem", "gradient"] if name == NAMES[0] else ["mppi", "icem"]
    for planner in planners:
        options = ["--planner", planner, "--episodes", "3", "--max-steps", "10", "--num-samples", "8"]
        assert main(["plan", str(run), *options, "--num-iterations", "1"]) == 0
        out = capsys.readouterr().out
        assert [line.split("  ")[0] for line in out.splitlines()[3:6]] == ["random policy", "straight to the goal", planner]
        record = json.loads((run / "plan.json").read_text())
        assert len(record["episodes"][planner]["success"]) == 3 and record["planner"]["num_samples"] == 8
        assert (run / "plan.png").stat().st_size > 1000 and "plan.png" in (run / "index.html").read_text()


def test_plan_command_mistakes(capsys, tmp_path):
    assert "is not a run folder" in fails(capsys, "plan", str(tmp_path))
    pathlib.Path(tmp_path / "recipe.yaml").write_text("name: lejepa_mnist\n")
    assert "plan needs the run of a world model" in fails(capsys, "plan", str(tmp_path))
    pathlib.Path(tmp_path / "recipe.yaml").write_text("name: eb_jepa_two_rooms\n")
    assert "a world model is judged by: jepa-fast plan" in fails(capsys, "eval", str(tmp_path))
    assert "no checkpoint at" in fails(capsys, "plan", str(tmp_path))
    assert "episodes must be at least 1" in plan_refused(capsys, tmp_path, "--episodes", "0")


def plan_refused(capsys, folder, *options) -> str:
    with pytest.raises(SystemExit) as stop:  # values that a field refuses are tyro's to report
        main(["plan", str(folder), *options])
    err = capsys.readouterr().err
    assert stop.value.code != 0 and "Traceback" not in err
    return err
