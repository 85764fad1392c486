"""Planners: the official plans on golden data, optimal control of a linear system, one episode or many, bad input."""

import dataclasses

import pytest
import torch
from golden_data import error, golden, manifest, under
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from jepa_fast.data.poses import euler_angles, move_pose, pose_difference, rotation_matrix
from jepa_fast.planning import CEM, CEMAC, ICEM, MPPI, GradientPlanner
from jepa_fast.planning._common import Noise
from jepa_fast.planning.icem import colored

PLANNERS = {
    "cem": CEM(horizon=4, num_samples=200, num_iterations=15, num_elites=20),
    "cem_clipped": CEM(horizon=4, num_samples=200, num_iterations=15, num_elites=20, low=(-0.4, -1.0), high=0.5,
                       include_mean=True, momentum_mean=0.1, momentum_std=(0.1, 0.2), returns="best"),
    "mppi": MPPI(horizon=4, num_samples=300, num_iterations=15, num_elites=40, temperature=0.02, max_norm=0.6),
    "mppi_as_written": MPPI.eb_jepa(as_written=True, horizon=4, num_iterations=15),
    "icem": ICEM.stable_worldmodel(horizon=4, num_samples=200, num_iterations=15, beta=0.5),
    "gradient": GradientPlanner(horizon=4, num_samples=10, num_iterations=60, max_norm=0.6),
}


def reach(goals):
    """Cost of a point that starts at 0 and moves by each action: distance to the goal, and what the actions cost."""
    def cost(actions):
        end = actions.sum(2)
        return (end - goals[:, None]).square().sum(-1) + 0.1 * actions.square().sum((2, 3))
    return cost


def best_reach(goal, horizon=4):
    """Each action of the minimum: goal / (H + 0.1)."""
    return (goal / (horizon + 0.1)).expand(horizon, -1)


@pytest.mark.parametrize("name", PLANNERS)
def test_a_planner_finds_the_minimum_of_a_quadratic(name):
    goals = torch.tensor([[0.9, -1.2], [0.3, 1.1], [-1.3, -0.2]])
    plan = PLANNERS[name].plan(reach(goals), 3, action_dim=2, seed=1)
    assert torch.allclose(plan.cost, reach(goals)(plan.actions[:, None])[:, 0])
    best = torch.stack([best_reach(goal) for goal in goals])
    optimum = reach(goals)(best[:, None])[:, 0]
    at_zero = goals.square().sum(1)
    # how much of the way from doing nothing to the optimum is made
    progress = (at_zero - plan.cost) / (at_zero - optimum)
    # a sample drawn by nearly equal weights is no minimum
    assert progress.min() > (0.8 if name == "mppi_as_written" else 0.97), progress


@pytest.mark.parametrize("name", PLANNERS)
def test_episodes_together_equal_one_by_one(name):
    goals = torch.randn(5, 2, generator=torch.Generator().manual_seed(3))
    mean = 0.1 * torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(4))
    planner = dataclasses.replace(PLANNERS[name], num_iterations=4)
    together = planner.plan(reach(goals), 5, action_dim=2, seed=7, step=9, first_episode=2**33, mean=mean)
    for e in range(5):
        alone = planner.plan(reach(goals[e:e + 1]), 1, action_dim=2, seed=7, step=9, first_episode=2**33 + e,
                             mean=mean[e:e + 1])
        assert torch.equal(alone.actions[0], together.actions[e]) and torch.equal(alone.cost[0], together.cost[e])
    for changed in (dict(seed=8, step=9), dict(seed=7, step=10)):
        other = planner.plan(reach(goals), 5, action_dim=2, first_episode=2**33, mean=mean, **changed)
        assert not torch.equal(other.actions, together.actions)


def test_cem_is_the_formula():
    """One iteration with momentum, box and a norm against a few lines in float64."""
    E, S, H, A = 2, 12, 3, 2
    noise = torch.randn(1, E, S, H, A, generator=torch.Generator().manual_seed(0))
    mean = torch.full((E, H, A), 0.2)
    planner = CEM(horizon=H, num_samples=S, num_iterations=1, num_elites=5, std=(0.5, 2.0), momentum_mean=0.3,
                  momentum_std=0.6, max_norm=1.5, high=1.2)
    seen = []
    plan = planner.plan(lambda a: a.square().sum((2, 3)), E, action_dim=A, seed=0, mean=mean, noise=noise,
                        watch=lambda *values: seen.append(values))
    actions = 0.2 + noise[0].double() * torch.tensor([0.5, 2.0])
    norm = actions.norm(dim=-1, keepdim=True)
    actions = torch.where(norm > 1.5, actions / norm * 1.5, actions).clamp(max=1.2)
    for e in range(E):
        elites = actions[e][actions[e].square().sum((1, 2)).argsort()[:5]]
        expected_mean = 0.7 * elites.mean(0) + 0.3 * 0.2
        expected_std = 0.4 * elites.std(0) + 0.6 * torch.tensor([0.5, 2.0])
        assert error(seen[0][0][e], expected_mean) < 1e-6 and error(seen[0][1][e], expected_std) < 1e-6
    assert torch.equal(plan.actions, seen[0][0])


@pytest.mark.parametrize("is_inverse", [False, True])
def test_mppi_is_the_formula(is_inverse):
    E, S, H, A = 2, 12, 3, 2
    noise = torch.randn(1, E, S, H, A, generator=torch.Generator().manual_seed(0))
    planner = MPPI(horizon=H, num_samples=S, num_iterations=1, num_elites=6, std=1.5, temperature=0.7,
                   is_inverse=is_inverse)
    seen = []
    planner.plan(lambda a: a.square().sum((2, 3)), E, action_dim=A, seed=0, noise=noise,
                 watch=lambda *values: seen.append(values))
    actions = noise[0].double() * 1.5
    for e in range(E):
        cost = actions[e].square().sum((1, 2))
        order = cost.argsort()[:6]
        gap = cost[order] - cost.min()
        weights = torch.exp(-gap * 0.7 if is_inverse else -gap / 0.7)
        weights = (weights / weights.sum())[:, None, None]
        mean = (weights * actions[e][order]).sum(0)
        std = (weights * (actions[e][order] - mean).square()).sum(0).sqrt()
        assert error(seen[0][0][e], mean) < 1e-6 and error(seen[0][1][e], std) < 1e-6


def test_mppi_returns_elites_as_often_as_they_weigh():
    planner = MPPI(horizon=1, num_samples=4, num_iterations=1, num_elites=4, temperature=1.0, returns="sample")
    E = 4000
    noise = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, E, 4, 1, 1)
    plan = planner.plan(lambda a: a.sum((2, 3)), E, action_dim=1, seed=0, noise=noise)
    share = torch.stack([(plan.actions == value).double().mean() for value in range(4)])
    assert (share - torch.softmax(-torch.arange(4.0).double(), 0)).abs().max() < 0.03  # 3.8 standard deviations


def test_icem_keeps_elites_and_the_mean():
    seen = []
    planner = ICEM(horizon=3, num_samples=20, num_iterations=3, num_elites=6, num_kept=4, include_mean=True)

    def cost(actions):
        seen.append(actions)
        return (actions - 0.3).square().sum((2, 3))

    means = []
    planner.plan(cost, 2, action_dim=2, seed=5, watch=lambda mean, std, values: means.append(mean))
    for before, after, mean in zip(seen[:2], seen[1:3], means, strict=False):
        best = (before - 0.3).square().sum((2, 3)).argsort(1)[:, :4]
        assert torch.equal(after[:, 0], mean)
        assert torch.equal(after[:, 1:5], before.gather(1, best[:, :, None, None].expand(-1, -1, 3, 2)))


def test_colored_noise_has_its_spectrum():
    white = torch.randn(1, 400, 16, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = colored(white, 2.0)
    assert torch.allclose(noise.std(2), torch.ones(1, 400, 2).double())
    # amplitudes went as 1 / f, up to the one factor of each sequence
    gain = torch.fft.rfft(noise, dim=2).abs() / torch.fft.rfft(white, dim=2).abs()
    gain = gain[:, :, 1:] * torch.arange(1, 9)[:, None]
    assert torch.allclose(gain / gain[:, :, :1], torch.ones_like(gain), rtol=1e-8)
    assert torch.equal(colored(white, 0.0), white) and torch.equal(colored(white[:, :, :1], 2.0), white[:, :, :1])


def test_noise_is_normal_and_follows_the_counter():
    noise = Noise(3, 5, 7, 11, 2, 0, "cpu").normals(0, 1000)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    # four words make four numbers: none repeats
    assert noise.flatten().unique().numel() > 0.99 * noise.numel()
    assert torch.equal(Noise(1, 5, 7, 11, 2, 2, "cpu").normals(0, 1000)[0], noise[2])
    assert not torch.equal(Noise(3, 5, 7, 11, 2, 0, "cpu").normals(1, 1000), noise)


# --- V-JEPA 2-AC, golden data

PLANS = {"linear": 0, "linear_axis": 1}


@pytest.mark.parametrize("name", PLANS)
def test_official_plan_of_vjepa2_ac(name):
    tensors, notes = golden("ac_planning"), manifest()["files"]["ac_planning.safetensors"]["notes"][name]
    frame, goal, weight = tensors[f"{name}/frame"], tensors[f"{name}/goal"], tensors["linear/weight"]

    def cost(actions):
        # the toy world: every action moves the frame by its row of weights
        moved = (actions @ weight).sum(2).view(*actions.shape[:2], *frame.shape[2:]) + frame
        return (moved - goal).abs().mean((2, 3))

    check_plan(name, notes, cost)


def check_plan(name, notes, cost):
    tensors = under(golden("ac_planning"), f"{name}/")
    steps, R, S = notes["cem_steps"], notes["rollout"], notes["samples"]
    planner = CEMAC(horizon=R, num_samples=S, num_iterations=steps, num_elites=notes["topk"],
                    momentum_mean=notes["momentum_mean"], momentum_std=notes["momentum_std"], max_step=notes["maxnorm"],
                    axis=tuple((int(dim), value) for dim, value in notes.get("axis", {}).items()),
                    close_gripper=notes.get("close_gripper"))
    noise = tensors["noise"].view(steps, R, S, 4).transpose(1, 2).unsqueeze(1)
    torch.manual_seed(notes["seed"])
    assert torch.equal(torch.randn(S, 4), tensors["noise"][0])
    actions, values, moments = [], [], []

    def recorded(a):
        actions.append(a)
        values.append(cost(a))
        return values[-1]

    plan = planner.plan(recorded, 1, seed=0, noise=noise, watch=lambda mean, std, _: moments.append((mean[0], std[0])))
    for i in range(steps):
        assert error(actions[i][0], tensors["actions"][i]) < 1e-5
        assert error(values[i][0], tensors["energy"][i]) < 1e-5
        assert error(moments[i][0], tensors["mean"][i]) < 1e-5
        assert error(moments[i][1], tensors["std"][i]) < 1e-5
    assert error(plan.actions[0], tensors["result"]) < 1e-5
    assert torch.equal(plan.cost, cost(plan.actions[:, None])[:, 0])


def test_poses_match_the_official_ones():
    tensors = under(golden("ac_planning"), "pose/")
    assert error(move_pose(tensors["pose"], tensors["action"]), tensors["new_pose"]) < 1e-6
    pose = tensors["pose"][:, 0].double()
    difference = pose_difference(pose[:6], pose[6:])
    # the official differences of positions were rounded to float32
    assert error(difference, tensors["difference"]) < 1e-7
    assert error(difference[:, 3:6], tensors["difference"][:, 3:6]) < 1e-12


def test_euler_angles_at_the_gimbal_lock():
    angles = torch.tensor([[0.3, torch.pi / 2, 0.0], [-0.4, -torch.pi / 2, 0.0], [0.3, torch.pi / 2, 0.5]]).double()
    rotation = rotation_matrix(angles)
    assert torch.allclose(euler_angles(rotation)[:2], angles[:2])
    assert torch.allclose(rotation_matrix(euler_angles(rotation)), rotation, atol=1e-7)


# --- bad input

def square(actions):
    return actions.square().sum((2, 3))


@pytest.mark.parametrize("make, message", [
    (lambda: CEM(num_samples=10, num_elites=11), "num_elites must be at most num_samples = 10, got 11"),
    (lambda: CEM(num_elites=1), "num_elites must be at least 2"),
    (lambda: CEM(horizon=0), "horizon must be at least 1, got 0"),
    (lambda: CEM(momentum_mean=1.5), r"momentum_mean must be in \[0, 1\], got 1.5"),
    (lambda: CEM(low=1.0, high=(0.0, 2.0)), "low must be at most high"),
    (lambda: CEM(low=(0.0, 0.0), high=(1.0, 1.0, 1.0)), "low and high must have one number per action dimension"),
    (lambda: CEM(max_norm=0.0), "max_norm must be above 0"),
    (lambda: CEM(std=-1.0), "std must be at least 0"),
    (lambda: CEM(returns="median"), "returns must be mean, best or sample, got 'median'"),
    (lambda: CEM.eb_jepa(horizont=3), "CEM has no field horizont"),
    (lambda: MPPI(temperature=0.0), "temperature must be above 0"),
    (lambda: ICEM(num_kept=40), "num_kept must be at least 0 and at most num_elites = 30"),
    (lambda: ICEM(beta=-1.0), "beta must be at least 0"),
    (lambda: GradientPlanner(lr=0.0), "lr must be above 0"),
    (lambda: CEMAC(axis=((3, 0.0),)), "axis must name dimensions 0, 1 or 2"),
    (lambda: CEMAC(close_gripper=2), r"close_gripper must be a step in \[0, 2\), got 2"),
    (lambda: CEMAC(max_step=0.0), "max_step must be above 0"),
    (lambda: CEM().plan(None, 1, action_dim=2, seed=0), "cost must be a function of actions .* got None"),
    (lambda: CEM().plan(square, 0, action_dim=2, seed=0), "num_episodes must be at least 1, got 0"),
    (lambda: CEM().plan(square, 1, action_dim=0, seed=0), "action_dim must be at least 1, got 0"),
    (lambda: CEM().plan(lambda a: a.sum(), 2, action_dim=2, seed=0), r"cost must return .* \[2, 300\], got \[\]"),
    (lambda: CEM().plan(lambda a: 3.0, 2, action_dim=2, seed=0), "cost must return .* got 'float'"),
    (lambda: CEM().plan(square, 2, action_dim=2, seed=0, mean=torch.zeros(2, 4, 2)), r"mean must be .* \[2, 5, 2\]"),
    (lambda: CEM().plan(square, 2, action_dim=2, seed=0, noise=torch.zeros(2, 4, 2)), r"noise must be .* \[30, 2, 300"),
    (lambda: CEM(std=(1.0, 1.0, 1.0)).plan(square, 2, action_dim=2, seed=0), r"std must be a number, 2 of them"),
    (lambda: GradientPlanner().plan(lambda a: a.detach().sum((2, 3)), 1, action_dim=2, seed=0), "must be differentiable"),
    (lambda: GradientPlanner().plan(None, 1, action_dim=2, seed=0), "cost must be a function"),
    (lambda: CEMAC().plan(square, 1, action_dim=4, seed=0), "action_dim must be 7"),
    (lambda: CEMAC().plan(square, 1, seed=0, mean=torch.zeros(1, 2, 4)), r"mean must be .* \[1, 2, 7\], got \[1, 2, 4\]"),
])
def test_bad_input_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_presets_have_the_official_constants():
    assert (CEM.eb_jepa().std, CEM.eb_jepa().max_norm, CEM.eb_jepa().horizon) == (1.5, 2.45, 90)
    lewm = CEM.leworldmodel()
    assert (lewm.num_samples, lewm.num_iterations, lewm.num_elites, lewm.horizon) == (300, 30, 30, 5)
    written = MPPI.eb_jepa(as_written=True)
    assert (written.std, written.max_norm, written.is_inverse, written.returns) == (2.0, None, True, "sample")
    assert (MPPI.eb_jepa().is_inverse, MPPI.eb_jepa().max_norm, MPPI.eb_jepa().temperature) == (False, 2.45, 0.005)
    assert (ICEM.stable_worldmodel().beta, ICEM.stable_worldmodel().num_kept) == (2.0, 5)
    official = CEMAC.vjepa2_ac()
    assert (official.horizon, official.num_samples, official.num_iterations, official.num_elites) == (2, 400, 10, 10)


def test_the_model_keeps_its_gradients():
    """Planning by gradient does not touch the parameters' gradients."""
    weight = torch.nn.Parameter(torch.ones(2))
    GradientPlanner(num_iterations=2).plan(lambda a: (a * weight).square().sum((2, 3)), 1, action_dim=2, seed=0)
    assert weight.grad is None


@pytest.mark.parametrize("name", PLANNERS)
def test_nothing_is_read_back_from_the_device(name):
    """With tensors that have no values, anything that reads one raises."""
    planner = dataclasses.replace(PLANNERS[name], num_iterations=2)
    with FakeTensorMode():
        goals = torch.empty(3, 2)
        plan = planner.plan(reach(goals), 3, action_dim=2, seed=1, mean=torch.zeros(3, 4, 2))
        assert plan.actions.shape == (3, 4, 2)
        with pytest.raises(DataDependentOutputException):
            float(plan.cost[0])
