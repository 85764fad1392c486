"""Trajectories through two rooms, made as they are needed, whole batches at once: no files, no loader processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .draws import Draws
from .loader import Batch
from .two_rooms import DiscRooms, DotRooms, Layout, Rooms, expert_walk

SAMPLES = 0       # first key of the draws of training samples
DOOR_SIGMA = 1.4  # of the place in the door through which a walk is led


class TwoRoomsTrajectories:
    """Sample i of an endless stream, a function of (seed, i); `len` samples of it are called an epoch."""

    def __init__(self, config: "TwoRoomsData"):
        self.config, self.rooms = config, config.rooms
        self.in_chans, self.action_dim = config.rooms.in_chans, config.rooms.action_dim

    def __len__(self) -> int:
        return self.config.num_samples

    def samples(self, index: Tensor, seed: int) -> Batch:
        """index [B] int64 -> observations uint8 [B, T, C, H, W], actions [B, T - 1, A] and positions [B, T, 2] float32."""
        draws = Draws(seed, index, SAMPLES)
        layout = self.rooms.draw_layout(draws)
        walk = expert_samples if isinstance(self.rooms, DiscRooms) else walk_samples
        positions, actions = walk(self.config, draws, layout)
        return {"observations": self.rooms.draw(positions, layout), "actions": actions, "positions": positions,
                "index": index}


@dataclass(frozen=True, kw_only=True)
class TwoRoomsData:
    """Walks in DotRooms, a noisy expert in DiscRooms; see TwoRoomsTrajectories."""

    rooms: Rooms = field(default_factory=DotRooms)
    num_samples: int = 100_000              # in what is called an epoch
    num_frames: int = 17                    # of a sample: T
    # DotRooms
    episode_steps: int = 91                 # the frames are cut out of a walk of so many positions
    angle_concentration: float = 5.0        # von Mises, of the turn from step to step
    step_mean: float = 1.0                  # length of a step, normal, cut to [step_min, step_max]
    step_std: float = 0.4
    step_min: float = 0.2
    step_max: float = 1.8
    cross_wall_rate: float = 0.35           # share of walks that are led through the door
    # DiscRooms
    expert_steps: int = 100                 # the frames are cut out of so many steps of the expert
    action_noise: float = 2.0               # sigma, added to the expert's unit vector before it is clipped to [-1, 1]
    action_repeat: float = 0.05             # probability that the expert repeats its last action

    def __post_init__(self):
        blocks = self.num_frames - 1
        steps = blocks * self.rooms.frame_skip
        length = self.expert_steps if isinstance(self.rooms, DiscRooms) else self.episode_steps - 1
        if not 0 < steps <= length:
            raise ValueError(f"num_frames must be from 2 to {length // self.rooms.frame_skip + 1} for {length} steps, "
                             f"got {self.num_frames}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")

    def build(self) -> TwoRoomsTrajectories:
        return TwoRoomsTrajectories(self)

    def batches(self, dataset: TwoRoomsTrajectories, *, global_batch_size: int, seed: int = 0, start_step: int = 0,
                num_steps: int | None = None, rank: int = 0, world_size: int = 1,
                device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Training batches of one rank, made on `device`; sample step * global_batch_size + row is row of that step."""
        if world_size < 1 or global_batch_size % world_size:
            raise ValueError("global_batch_size must be a multiple of world_size, got "
                             f"{global_batch_size} and {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        B, step = global_batch_size // world_size, start_step
        rows = torch.arange(rank * B, (rank + 1) * B, device=device)
        while num_steps is None or step < num_steps:
            yield dataset.samples(step * global_batch_size + rows, seed)
            step += 1


def walk_samples(config: TwoRoomsData, draws: Draws, layout: Layout) -> tuple[Tensor, Tensor]:
    """Positions [B, T, 2] and actions [B, T - 1, 2]: a piece of a walk whose heading is a random walk."""
    rooms, num_steps = config.rooms, config.episode_steps - 1
    u = draws.uniform(4)
    heading = draws.von_mises(config.angle_concentration, num_steps).cumsum(1)
    length = draws.truncated_normal(config.step_mean, config.step_std, config.step_min, config.step_max, num_steps)
    # a walk through the door is one that is there at step `middle`, heading across within 45 degrees, to either side
    crosses = u[:, 0] < config.cross_wall_rate
    middle = torch.where(crosses, (u[:, 1] * num_steps).long(), 0)
    across = (u[:, 2] - 0.5) * math.pi / 2 + (u[:, 3] < 0.5) * math.pi
    angle = torch.where(crosses, across, 2 * math.pi * u[:, 2])
    heading = heading + (angle - heading.gather(1, middle[:, None])[:, 0])[:, None]
    actions = length[..., None] * torch.stack([heading.cos(), heading.sin()], -1)
    before = (actions * (torch.arange(num_steps, device=middle.device) < middle[:, None])[..., None]).sum(1)
    inside = (rooms.low + 0.01, rooms.high - 0.01)
    start = torch.where(crosses[:, None], (door_point(rooms, draws, layout) - before).clamp(*inside),
                        free_point(rooms, draws, layout))
    positions = [start]
    for action in actions.unbind(1):
        positions.append(rooms.move(positions[-1], action, layout))
    return cut(torch.stack(positions, 1), actions, draws, config.num_frames - 1, 1)


def door_point(rooms: DotRooms, draws: Draws, layout: Layout) -> Tensor:
    """[B, 2] in the door."""
    x = layout.wall + (2 * draws.uniform() - 1) * rooms.wall_half
    return torch.stack([x, layout.door + draws.truncated_normal(0.0, DOOR_SIGMA, -rooms.door_half, rooms.door_half)], 1)


def free_point(rooms: DotRooms, draws: Draws, layout: Layout) -> Tensor:
    """[B, 2] anywhere between the borders; who is in the wall is put into one of the rooms."""
    u = draws.uniform(4)
    x, y = (rooms.low + (rooms.high - rooms.low) * u[:, :2]).unbind(1)
    left, right = layout.wall - rooms.wall_half, layout.wall + rooms.wall_half
    elsewhere = torch.where(u[:, 2] < 0.5, rooms.low + u[:, 3] * (left - rooms.low), right + u[:, 3] * (rooms.high - right))
    in_wall = ((x - layout.wall).abs() <= rooms.wall_half) & ((y - layout.door).abs() > rooms.door_half)
    return torch.stack([torch.where(in_wall, elsewhere, x), y], 1)


def expert_samples(config: TwoRoomsData, draws: Draws, layout: Layout) -> tuple[Tensor, Tensor]:
    """Positions [B, T, 2] every `frame_skip` steps and the action blocks between them [B, T - 1, frame_skip * 2]."""
    start = config.rooms.draw_positions(draws)
    positions, actions = expert_walk(config.rooms, draws, layout, start, config.expert_steps, config.action_noise,
                                     config.action_repeat)
    return cut(positions, actions, draws, config.num_frames - 1, config.rooms.frame_skip)


def cut(positions: Tensor, actions: Tensor, draws: Draws, blocks: int, frame_skip: int) -> tuple[Tensor, Tensor]:
    """A piece of `blocks` action blocks at a random place of each trajectory."""
    num_steps = blocks * frame_skip
    start = (draws.uniform() * (actions.shape[1] - num_steps + 1)).long()[:, None]
    rows = torch.arange(len(start), device=start.device)[:, None]
    steps = torch.arange(num_steps, device=start.device)
    frames = positions[rows, start + torch.arange(0, num_steps + 1, frame_skip, device=start.device)]
    return frames, actions[rows, start + steps].reshape(len(start), blocks, -1)
