"""Two rooms, a wall, a door: navigation from pixels, procedural and vectorised over episodes. Two public variants.

`DotRooms`: PLDM's and EB-JEPA's (65 x 65; a dot channel and a wall channel; the wall and its door anywhere).
`DiscRooms`: LeWorldModel's and stable-worldmodel's (224 x 224 RGB; the wall in the middle, actions in blocks of 5).

Positions, steps and distances are in the pixels of the native size; `image_size` is only how finely it is drawn.
A DotRooms step that would hit a wall is not made, in training data here and there; in evaluation the dot is then jolted
instead, so that none gets stuck (the public environment puts it where it hits and adds noise of the same size).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .draws import Draws

EPISODES, JOLTS = 1, 3   # first keys of the draws of evaluation episodes; training samples use another
EXPERT_TOLERANCE = 10.5  # this near to the door's middle the expert turns to its goal


@dataclass(frozen=True)
class Layout:
    """Where wall and door are, per episode: x of the wall's middle and y of the door's, both float32 [E]."""

    wall: Tensor
    door: Tensor

    def __getitem__(self, rows) -> "Layout":
        return Layout(self.wall[rows], self.door[rows])


@dataclass(frozen=True, kw_only=True)
class DotRooms:
    image_size: int = 65                             # pixels drawn, square; 33 is the same rooms at half the resolution
    dot_sigma: float = 1.3                           # of the Gaussian dot
    wall_range: tuple[int, int] = (20, 44)           # x of the wall, integers, both ends included
    door_range: tuple[int, int] = (10, 54)           # y of the door's middle, integers
    success_distance: float = 4.5                    # to the goal, below which an episode is a success
    max_step: float = 2.45                           # largest length of an action
    max_steps: int = 200                             # environment steps of an episode
    jolt_sigma: float = 0.5                          # of the step made in evaluation where a wall is hit; 0: none

    native_size, in_chans, action_dim, frame_skip = 65, 2, 2, 1
    low, high, wall_half, door_half = 4.0, 60.0, 1.0, 4.0   # borders; half the width of wall and door

    def __post_init__(self):
        _check_size(self)

    def build(self) -> "TwoRooms":
        return TwoRooms(self)

    def draw_layout(self, draws: Draws) -> Layout:
        u = draws.uniform(2)
        ranges = (self.wall_range, self.door_range)
        return Layout(*((first + u[:, i] * (last + 1 - first)).floor().clamp(max=last)
                        for i, (first, last) in enumerate(ranges)))

    def draw_task(self, draws: Draws, layout: Layout) -> tuple[Tensor, Tensor]:
        """Start and goal [E, 2] in different rooms, two sigma of the dot away from every wall."""
        u, margin = draws.uniform(5), 2 * 1.3
        low, high = self.low + margin, self.high - margin
        left = low + u[:, 0] * (layout.wall - self.wall_half - margin - low)
        right = layout.wall + self.wall_half + margin
        right = right + u[:, 1] * (high - right)
        y = low + u[:, 2:4] * (high - low)
        ends = torch.stack([torch.stack([left, y[:, 0]], 1), torch.stack([right, y[:, 1]], 1)], 1)
        first = (u[:, 4] < 0.5).long()
        rows = torch.arange(len(first), device=first.device)
        return ends[rows, first], ends[rows, 1 - first]

    def move(self, position: Tensor, action: Tensor, layout: Layout) -> Tensor:
        """Positions [E, 2] after actions [E, 2], cut to `max_step`; who would hit a wall stays."""
        end = position + _shortened(action, self.max_step)
        hit = ((end <= self.low) | (end >= self.high)).any(-1)
        for side in (-1, 1):
            # the wall's sides are solid but for the door, the door's sides within the wall
            y = _crossing(position, end, 0, layout.wall + side * self.wall_half)
            hit |= (y - layout.door).abs() > self.door_half
            x = _crossing(position, end, 1, layout.door + side * self.door_half)
            hit |= (x - layout.wall).abs() <= self.wall_half
        return torch.where(hit[:, None], position, end)

    def random_action(self, draws: Draws) -> Tensor:
        """[E, 2] in any direction, of any length up to `max_step`."""
        u = draws.uniform(2)
        return self.max_step * u[:, :1] * torch.stack([(2 * math.pi * u[:, 1]).cos(), (2 * math.pi * u[:, 1]).sin()], 1)

    def action_towards(self, position: Tensor, goal: Tensor) -> Tensor:
        return _shortened(goal - position, self.max_step)

    def draw(self, position: Tensor, layout: Layout) -> Tensor:
        """Dots at [E, ..., 2] -> uint8 [E, ..., 2, size, size]: the dot, and walls and borders."""
        grid = _grid(self, position.device)
        rays = torch.exp(-(grid - position[..., None]).square() / (2 * self.dot_sigma**2))
        dot = (rays[..., 1, :, None] * rays[..., 0, None, :] * 255).to(torch.uint8)
        half = (self.native_size - 1) / (self.image_size - 1) / 2  # of a pixel drawn: no line may fall between two
        wall = (grid - layout.wall[:, None]).abs() <= max(self.wall_half, half)
        door = (grid - layout.door[:, None]).abs() <= self.door_half
        border = ((grid - self.low).abs() <= half) | ((grid - self.high).abs() <= half)
        walls = (wall[:, None, :] & ~door[:, :, None]) | border[None, :, None] | border[None, None, :]
        walls = (walls * 255).to(torch.uint8).view(len(walls), *[1] * (dot.dim() - 3), *walls.shape[1:])
        return torch.stack([dot, walls.expand_as(dot)], dim=-3)


@dataclass(frozen=True, kw_only=True)
class DiscRooms:
    image_size: int = 224                            # pixels drawn, square
    frame_skip: int = 5                              # steps per action block, which is [dx, dy] for each of them
    goal: Literal["expert", "anywhere"] = "expert"   # where the noisy expert gets in `goal_offset` steps, or anywhere
    goal_offset: int = 25                            # steps
    success_distance: float = 16.0
    max_steps: int = 50                              # steps of an episode

    native_size, in_chans = 224, 3
    border, wall_x, door_y, wall_half, door_half = 14.0, 112.0, 49.0, 5.0, 14.0
    radius, speed, door_margin, line_width = 7.0, 5.0, 1.75, 4.0
    jolt_sigma = 0.0  # discs slide along walls

    def __post_init__(self):
        _check_size(self)
        if self.frame_skip < 1:
            raise ValueError(f"frame_skip must be at least 1, got {self.frame_skip}")

    @property
    def action_dim(self) -> int:
        return 2 * self.frame_skip

    def build(self) -> "TwoRooms":
        return TwoRooms(self)

    def draw_layout(self, draws: Draws) -> Layout:
        ones = torch.ones_like(draws.state, dtype=torch.float32)
        return Layout(ones * self.wall_x, ones * self.door_y)

    def draw_task(self, draws: Draws, layout: Layout) -> tuple[Tensor, Tensor]:
        start, goal = self.draw_positions(draws), self.draw_positions(draws)
        if self.goal == "expert":
            goal = expert_walk(self, draws, layout, start, self.goal_offset)[0][:, -1]
        return start, goal

    def draw_positions(self, draws: Draws) -> Tensor:
        """[E, 2] anywhere but in the wall."""
        low, high = self.border + self.radius, self.native_size - self.border - self.radius
        gap = 2 * (self.wall_half + self.radius)
        u = draws.uniform(2)
        x = low + u[:, 0] * (high - low - gap)
        x = torch.where(x > self.wall_x - gap / 2, x + gap, x)
        return torch.stack([x, low + u[:, 1] * (high - low)], 1)

    def move(self, position: Tensor, action: Tensor, layout: Layout) -> Tensor:
        """Positions [E, 2] after one block of actions [E, frame_skip * 2], each clipped to [-1, 1] times the speed."""
        for step in action.clamp(-1, 1).unflatten(-1, (-1, 2)).unbind(-2):
            position = self._step(position, step, layout)
        return position

    def _step(self, position: Tensor, action: Tensor, layout: Layout) -> Tensor:
        reach = self.border + self.radius
        x, y = (position + self.speed * action).clamp(reach, self.native_size - reach).unbind(-1)
        in_door = (y - layout.door).abs() <= self.door_half + self.door_margin
        side = torch.where(position[:, 0] < layout.wall, -1.0, 1.0)
        # who touches the wall is put half a pixel away from it
        touches = side * (x - layout.wall) < self.wall_half + self.radius
        x = torch.where(touches & ~in_door, layout.wall + side * (self.wall_half + self.radius + 0.5), x)
        return torch.stack([x, y], -1)

    def random_action(self, draws: Draws) -> Tensor:
        """[E, frame_skip * 2], uniform in [-1, 1]."""
        return 2 * draws.uniform(self.action_dim) - 1

    def action_towards(self, position: Tensor, goal: Tensor) -> Tensor:
        return (_shortened((goal - position) / self.frame_skip, self.speed) / self.speed).repeat(1, self.frame_skip)

    def draw(self, position: Tensor, layout: Layout) -> Tensor:
        """Red discs at [E, ..., 2] -> uint8 [E, ..., 3, size, size], black walls on white."""
        grid = _grid(self, position.device)
        rays = torch.exp(-(grid - position[..., None]).square() / (2 * self.radius**2))
        disc = rays[..., 1, :, None] * rays[..., 0, None, :]
        disc = disc / disc.amax((-2, -1), keepdim=True)
        line = ((grid >= self.border - self.line_width) & (grid < self.border)) \
            | ((grid >= self.native_size - self.border) & (grid < self.native_size - self.border + self.line_width))
        wall = (grid - layout.wall[:, None]).abs() <= self.wall_half
        door = (grid - layout.door[:, None]).abs() <= self.door_half
        walls = (wall[:, None, :] & ~door[:, :, None]) | line[None, :, None] | line[None, None, :]
        white = (~walls).float().mul(255).view(len(walls), *[1] * (disc.dim() - 3), *walls.shape[1:])
        others = white * (1 - disc)
        return torch.stack([others + 255 * disc, others, others], dim=-3).to(torch.uint8)


Rooms = DotRooms | DiscRooms


class TwoRooms:
    """E episodes at once: `state` and `goal` [E, 2], float32. Episode e is the same in any set of episodes."""

    def __init__(self, rooms: Rooms):
        self.rooms = rooms
        self.in_chans, self.action_dim = rooms.in_chans, rooms.action_dim

    def reset(self, seed: int, episodes: Tensor | int, device: torch.device | str = "cpu") -> Tensor:
        """Start the episodes of these numbers [E] (or 0 to E - 1); wall, start and goal are functions of (seed, number)."""
        numbers = torch.arange(episodes) if isinstance(episodes, int) else episodes
        if numbers.dim() != 1 or numbers.dtype != torch.int64 or not len(numbers):
            raise ValueError(f"episodes must be a number above 0 or [E] int64, got {list(numbers.shape)} {numbers.dtype}")
        self.seed, self.numbers, self.num_steps = seed, numbers.to(device), 0
        draws = Draws(seed, self.numbers, EPISODES)
        self.layout = self.rooms.draw_layout(draws)
        self.state, self.goal = self.rooms.draw_task(draws, self.layout)
        return self.state

    def step(self, actions: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Move the episodes `rows` by actions [E, A], one action (block) each; the new state of all."""
        if actions.shape != (len(self.state[rows]), self.action_dim):
            raise ValueError(f"actions must be [{len(self.state[rows])}, {self.action_dim}], got {list(actions.shape)}")
        before, layout = self.state[rows], self.layout[rows]
        after = self.rooms.move(before, actions.float(), layout)
        if self.rooms.jolt_sigma:
            jolt = self.rooms.jolt_sigma * Draws(self.seed, self.numbers[rows], JOLTS, self.num_steps).normal(2)
            is_hit = (after == before).all(-1, keepdim=True) & (actions != 0).any(-1, keepdim=True)
            after = torch.where(is_hit, self.rooms.move(before, jolt, layout), after)
        self.num_steps += 1
        self.state = self.state.clone()
        self.state[rows] = after
        return self.state

    def render(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """What is seen now, uint8 [E, C, H, W]."""
        return self.rooms.draw(self.state[rows], self.layout[rows])

    def render_goal(self) -> Tensor:
        """What would be seen at the goal, uint8 [E, C, H, W]."""
        return self.rooms.draw(self.goal, self.layout)

    def distance(self) -> Tensor:
        return (self.state - self.goal).norm(dim=-1)

    def success(self) -> Tensor:
        return self.distance() < self.rooms.success_distance


def expert_walk(rooms: DiscRooms, draws: Draws, layout: Layout, start: Tensor, num_steps: int, noise: float = 2.0,
                repeat: float = 0.05) -> tuple[Tensor, Tensor]:
    """Positions [B, num_steps + 1, 2] and actions [B, num_steps, 2] of the expert: to the door's middle, then the goal.

    Where the public expert's episode ends, at its goal, ours draws another goal and walks on.
    """
    goal, door = rooms.draw_positions(draws), torch.stack([layout.wall, layout.door], 1)
    positions, actions = [start], []
    for _ in range(num_steps):
        position = positions[-1]
        arrived = (position - goal).norm(dim=1) < rooms.success_distance
        goal = torch.where(arrived[:, None], rooms.draw_positions(draws), goal)
        other_room = (position[:, 0] > layout.wall) != (goal[:, 0] > layout.wall)
        via_door = other_room & ((door - position).norm(dim=1) > EXPERT_TOLERANCE)
        way = torch.where(via_door[:, None], door, goal) - position
        action = (way / way.norm(dim=1, keepdim=True).clamp(min=1e-6) + noise * draws.normal(2)).clamp(-1, 1)
        if actions:
            action = torch.where((draws.uniform() < repeat)[:, None], actions[-1], action)
        actions.append(action)
        positions.append(rooms._step(position, action, layout))
    return torch.stack(positions, 1), torch.stack(actions, 1)


def _check_size(rooms: Rooms) -> None:
    if not 8 <= rooms.image_size <= 4 * rooms.native_size:
        raise ValueError(f"image_size must be from 8 to {4 * rooms.native_size}, got {rooms.image_size}")


def _grid(rooms: Rooms, device: torch.device) -> Tensor:
    """Native coordinates [size] of the pixels drawn."""
    return torch.linspace(0, rooms.native_size - 1, rooms.image_size, device=device)


def _shortened(vectors: Tensor, length: float) -> Tensor:
    """Vectors [..., 2], those longer than `length` scaled down to it."""
    return vectors * (length / vectors.norm(dim=-1, keepdim=True).clamp(min=length))


def _crossing(start: Tensor, end: Tensor, axis: int, line: Tensor) -> Tensor:
    """Where paths [E, 2] cross the lines `axis` = line [E]: the other coordinate, NaN where they do not."""
    before, after = start[:, axis] - line, end[:, axis] - line
    place = torch.lerp(start[:, 1 - axis], end[:, 1 - axis], before / (before - after))
    return torch.where(before * after <= 0, place, torch.nan)
