"""Two rooms: draws, moves, pictures and trajectories, against the public statistics and scalar re-computations."""

import math

import pytest
import torch
from scipy import stats

from jepa_fast.data.draws import Draws
from jepa_fast.data.two_rooms import DiscRooms, DotRooms, Layout, TwoRooms
from jepa_fast.data.two_rooms_data import TwoRoomsData

DOTS, DISCS = TwoRoomsData(), TwoRoomsData(rooms=DiscRooms(), num_frames=4)


def cdf_distance(values, cdf) -> float:
    """Kolmogorov-Smirnov statistic, in units of its 0.1 % quantile for so many samples."""
    return stats.kstest(values.double().numpy(), cdf).statistic / (1.95 / len(values) ** 0.5)


@pytest.mark.parametrize("name", ["uniform", "normal", "von_mises", "truncated_normal"])
def test_draws_have_their_distribution(name):
    draws = Draws(7, torch.arange(50))
    values, cdf = {
        "uniform": lambda: (draws.uniform(400), stats.uniform.cdf),
        "normal": lambda: (draws.normal(400), stats.norm.cdf),
        "von_mises": lambda: (draws.von_mises(5.0, 400), stats.vonmises(5.0).cdf),
        "truncated_normal": lambda: (draws.truncated_normal(1.0, 0.4, 0.2, 1.8, 400),
                                     stats.truncnorm(-2, 2, loc=1.0, scale=0.4).cdf)}[name]()
    assert values.shape == (50, 400)
    assert cdf_distance(values.flatten(), cdf) < 1
    assert cdf_distance(values[:, 0], cdf) < 1  # across samples as well as within one


def test_draws_belong_to_the_sample():
    whole, part = Draws(3, torch.arange(10), 1), Draws(3, torch.tensor([7, 2]), 1)
    for _ in range(2):
        assert torch.equal(whole.uniform(5)[[7, 2]], part.uniform(5))
    for other in (Draws(4, torch.tensor([7, 2]), 1), Draws(3, torch.tensor([7, 2]), 2)):
        assert not torch.isin(other.uniform(100), Draws(3, torch.tensor([7, 2]), 1).uniform(100)).float().mean() > 0.01


def dot_move(x, y, dx, dy, wall, door):
    """One step of one dot: blocked where the segment passes a point of a wall, looked for in 1,001 points of it."""
    length = math.hypot(dx, dy)
    if length > 2.45:
        dx, dy = dx * 2.45 / length, dy * 2.45 / length
    for i in range(1001):
        px, py = x + dx * i / 1000, y + dy * i / 1000
        in_wall = abs(px - wall) <= 1 and abs(py - door) > 4
        if in_wall or not (4 < px < 60 and 4 < py < 60):
            return x, y
    return x + dx, y + dy


def test_dots_move_as_one_by_one():
    torch.manual_seed(0)
    n = 600
    layout = Layout(torch.randint(20, 45, (n,)).float(), torch.randint(10, 55, (n,)).float())
    # near the door's corners, where every case happens
    start = torch.stack([layout.wall + 6 * torch.rand(n) - 3, layout.door + 12 * torch.rand(n) - 6], 1).clamp(4.1, 59.9)
    free = ((start[:, 0] - layout.wall).abs() > 1) | ((start[:, 1] - layout.door).abs() < 4)
    actions = 2.5 * torch.randn(n, 2)
    moved = DotRooms().move(start, actions, layout)
    stayed = 0
    for i in torch.nonzero(free).flatten().tolist():
        expected = dot_move(*start[i].tolist(), *actions[i].tolist(), float(layout.wall[i]), float(layout.door[i]))
        assert moved[i].tolist() == pytest.approx(expected, abs=1e-4), i
        stayed += expected == tuple(start[i].tolist())
    assert 50 < stayed < 450


def disc_move(x, y, actions):
    """One block of one disc, from the public environment's rules."""
    for dx, dy in actions:
        left = x < 112
        x = min(max(x + 5 * min(max(dx, -1), 1), 21), 203)
        y = min(max(y + 5 * min(max(dy, -1), 1), 21), 203)
        if not 49 - 14 - 1.75 <= y <= 49 + 14 + 1.75:
            if left and x > 112 - 5 - 7:
                x = 112 - 5 - 7 - 0.5
            elif not left and x < 112 + 5 + 7:
                x = 112 + 5 + 7 + 0.5
    return x, y


def test_discs_move_as_one_by_one():
    torch.manual_seed(0)
    rooms, n = DiscRooms(), 500
    layout = rooms.draw_layout(Draws(0, torch.arange(n)))
    start = torch.rand(n, 2) * torch.tensor([60.0, 100.0]) + torch.tensor([82.0, 10.0])
    actions = 1.2 * torch.randn(n, 10)
    moved = rooms.move(start, actions, layout)
    for i in range(n):
        assert moved[i].tolist() == pytest.approx(disc_move(*start[i].tolist(), actions[i].view(5, 2).tolist()), abs=1e-3)


def test_dot_pictures():
    layout = Layout(torch.tensor([30.0, 41.0]), torch.tensor([20.0, 50.0]))
    position = torch.tensor([[10.25, 40.5], [50.0, 30.75]])
    frames = DotRooms().draw(position, layout)
    assert frames.dtype == torch.uint8 and frames.shape == (2, 2, 65, 65)
    for e in range(2):
        wall, door = int(layout.wall[e]), int(layout.door[e])
        for y in range(65):
            for x in range(65):
                d = (x - float(position[e, 0])) ** 2 + (y - float(position[e, 1])) ** 2
                # the public code truncates, so a rounding error may cost one
                assert abs(int(frames[e, 0, y, x]) - int(255 * math.exp(-d / (2 * 1.3**2)))) <= 1
                solid = abs(x - wall) <= 1 and abs(y - door) > 4 or x in (4, 60) or y in (4, 60)
                assert int(frames[e, 1, y, x]) == 255 * solid, (e, x, y)
    half = DotRooms(image_size=33).draw(position, layout)
    assert torch.equal(half[:, 0], frames[:, 0, ::2, ::2])


def test_disc_pictures():
    position = torch.tensor([[60.5, 100.25], [150.0, 49.0]])
    rooms = DiscRooms()
    frames = rooms.draw(position, rooms.draw_layout(Draws(0, torch.arange(2))))
    assert frames.shape == (2, 3, 224, 224) and frames.dtype == torch.uint8
    for e in range(2):
        for y in range(0, 224, 3):
            for x in range(224):
                d = (x - float(position[e, 0])) ** 2 + (y - float(position[e, 1])) ** 2
                alpha = math.exp(-d / (2 * 7**2))
                line = any(10 <= v < 14 or 210 <= v < 214 for v in (x, y))
                base = 0 if line or abs(x - 112) <= 5 and abs(y - 49) > 14 else 255
                for channel, colour in enumerate((255, 0, 0)):
                    # the public code divides by the brightest pixel; off the grid's points that is below 1
                    assert abs(int(frames[e, channel, y, x]) - (base * (1 - alpha) + colour * alpha)) < 2.5, (e, x, y)


def test_samples_have_the_public_statistics():
    """Means and deviations that the public code normalises its own random walks with."""
    dataset = DOTS.build()
    batch = dataset.samples(torch.arange(1500), 0)
    frames = batch["observations"][:, ::4].float() / 255
    for channel, (mean, std) in enumerate([(0.0026, 0.0369), (0.0989, 0.2986)]):
        assert float(frames[:, :, channel].mean()) == pytest.approx(mean, rel=0.05)
        assert float(frames[:, :, channel].std()) == pytest.approx(std, rel=0.06)
    positions = batch["positions"].flatten(0, 1)
    assert torch.allclose(positions.mean(0), torch.tensor([31.5863, 32.0618]), atol=1.2)  # 3 standard errors
    assert torch.allclose(positions.std(0), torch.tensor([16.1025, 16.1353]), rtol=0.05)


@pytest.mark.parametrize("config", [DOTS, TwoRoomsData(rooms=DotRooms(image_size=33), num_frames=9), DISCS],
                         ids=["dots", "small", "discs"])
def test_samples_follow_their_actions(config):
    dataset = config.build()
    batch = dataset.samples(torch.arange(40), 5)
    B, T = 40, config.num_frames
    positions, actions = batch["positions"], batch["actions"]
    assert actions.shape == (B, T - 1, dataset.action_dim) and batch["observations"].shape[:3] == (B, T, dataset.in_chans)
    layout = config.rooms.draw_layout(Draws(5, torch.arange(B), 0))
    for t in range(T - 1):
        assert torch.allclose(config.rooms.move(positions[:, t], actions[:, t], layout), positions[:, t + 1], atol=1e-4)
    assert torch.equal(batch["observations"], config.rooms.draw(positions, layout))
    assert (positions[:, 1:] != positions[:, :-1]).any(-1).float().mean() > 0.4


def test_walks_are_led_through_the_door():
    def crossings(rate):
        config = TwoRoomsData(cross_wall_rate=rate, num_frames=91, rooms=DotRooms(image_size=9))
        batch = config.build().samples(torch.arange(400), 0)
        side = batch["positions"][..., 0] > config.rooms.draw_layout(Draws(0, torch.arange(400), 0)).wall[:, None]
        return float((side != side[:, :1]).any(1).float().mean())

    assert crossings(1.0) > 0.6 and crossings(0.0) < 0.2


def test_batches_resume_and_split_over_ranks():
    config = TwoRoomsData(rooms=DotRooms(image_size=9), num_frames=3)
    dataset = config.build()
    run = dict(global_batch_size=6, seed=3)
    whole = list(config.batches(dataset, num_steps=4, **run))
    assert torch.equal(torch.cat([batch["index"] for batch in whole]), torch.arange(24))
    for key in whole[0]:
        resumed = list(config.batches(dataset, start_step=2, num_steps=4, **run))
        assert all(torch.equal(a[key], b[key]) for a, b in zip(resumed, whole[2:], strict=True))
        ranks = [next(config.batches(dataset, start_step=1, rank=rank, world_size=3, **run)) for rank in range(3)]
        assert torch.equal(torch.cat([batch[key] for batch in ranks]), whole[1][key])
    other = next(config.batches(dataset, global_batch_size=6, seed=4))
    assert not torch.equal(other["positions"], whole[0]["positions"])


@pytest.mark.parametrize("rooms", [DotRooms(), DiscRooms(), DiscRooms(goal="anywhere")], ids=["dots", "expert", "anywhere"])
def test_episodes_are_their_numbers(rooms):
    environment, part = TwoRooms(rooms), TwoRooms(rooms)
    environment.reset(1, 12)
    part.reset(1, torch.tensor([9, 4]))
    for a, b in [(environment.state, part.state), (environment.goal, part.goal), (environment.render(), part.render()),
                 (environment.render_goal(), part.render_goal())]:
        assert torch.equal(a[[9, 4]], b)
    if isinstance(rooms, DotRooms):
        wall = environment.layout.wall
        assert ((environment.state[:, 0] < wall) != (environment.goal[:, 0] < wall)).all()
        assert not environment.success().any()
    before = environment.state
    after = environment.step(rooms.action_towards(before, environment.goal))
    assert (environment.distance() <= (before - environment.goal).norm(dim=1)).all()
    active = torch.arange(12) < 5
    environment.step(rooms.random_action(Draws(0, torch.arange(5))), active)
    assert torch.equal(environment.state[5:], after[5:]) and (environment.state[:5] != after[:5]).any()
    environment.state = environment.goal + torch.tensor([0.99 * rooms.success_distance, 0.0])
    assert environment.success().all()
    environment.state = environment.goal + torch.tensor([0.0, 1.01 * rooms.success_distance])
    assert not environment.success().any()


def test_a_dot_at_a_wall_is_jolted():
    """In evaluation no dot stays where it hit; a jolt is small, and the same for an episode in any set of them."""
    environment, part = TwoRooms(DotRooms()), TwoRooms(DotRooms())
    environment.reset(0, 50)
    part.reset(0, torch.tensor([7]))
    towards = torch.tensor([[0.0, 2.4]])
    for _ in range(40):
        before = environment.state
        environment.step(towards.expand(50, 2))
        part.step(towards)
        assert torch.equal(environment.state[7], part.state[0])
    steps = environment.state - before
    jolts = steps[(steps - towards).abs().sum(1) > 1e-4]  # the others had room for the action
    assert len(jolts) > 10 and (jolts.abs() < 2).all() and 0.2 < float(jolts[jolts.abs().sum(1) > 0].std()) < 0.6
    assert (environment.state[:, 1] > 50).all() and (environment.state[:, 1] < 60).all()
    environment.step(torch.zeros(50, 2))  # who does not move hits nothing
    still = TwoRooms(DotRooms(jolt_sigma=0.0))
    still.reset(0, 50)
    for _ in range(40):
        still.step(towards.expand(50, 2))
    assert torch.equal(still.step(towards.expand(50, 2)), still.step(towards.expand(50, 2)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_frames must be from 2 to 91 for 90 steps, got 92"):
        TwoRoomsData(num_frames=92)
    with pytest.raises(ValueError, match="num_frames must be from 2 to 21 for 100 steps, got 22"):
        TwoRoomsData(rooms=DiscRooms(), num_frames=22)
    with pytest.raises(ValueError, match="image_size must be from 8 to 260, got 4"):
        DotRooms(image_size=4)
    with pytest.raises(ValueError, match="global_batch_size must be a multiple of world_size, got 5 and 2"):
        next(DOTS.batches(DOTS.build(), global_batch_size=5, world_size=2))
    environment = TwoRooms(DiscRooms())
    with pytest.raises(ValueError, match=r"episodes must be a number above 0 or \[E\] int64"):
        environment.reset(0, 0)
    environment.reset(0, 3)
    with pytest.raises(ValueError, match=r"actions must be \[3, 10\], got \[3, 2\]"):
        environment.step(torch.zeros(3, 2))
