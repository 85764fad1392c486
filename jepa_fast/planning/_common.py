"""What the planners share: the loop over iterations, noise, projection onto what is allowed, checks."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.seeds import mix_seed
from ..reference.directions import box_muller, philox4x32

Cost = Callable[[Tensor], Tensor]  # actions [E, S, H, A] -> cost [E, S], lower is better
Watch = Callable[[Tensor, Tensor, Tensor], None]  # mean, std [E, H, A], cost [E, S] in ascending order
PerDimension = float | tuple[float, ...] | tuple[tuple[float, ...], ...]  # one for all, [A], or [H, A]


@dataclass(frozen=True)
class Plan:
    actions: Tensor  # [E, H, A]
    cost: Tensor     # [E], of these actions


@dataclass(frozen=True, kw_only=True)
class SamplingPlanner:
    """Draw sequences from a normal distribution, keep those of lowest cost, move the distribution towards them."""

    horizon: int = 5                       # actions per plan
    num_samples: int = 300                 # sequences per iteration and episode
    num_iterations: int = 30
    num_elites: int = 30                   # sequences of lowest cost that make the next distribution
    std: PerDimension = 1.0                # of the first distribution, in units of the actions
    momentum_mean: PerDimension = 0.0      # share of the old mean in the new one, in [0, 1]
    momentum_std: PerDimension = 0.0
    low: PerDimension | None = None        # box: actions are clamped to [low, high]
    high: PerDimension | None = None
    max_norm: float | None = None          # longer actions are scaled down to this norm
    include_mean: bool = False             # the first sample is the mean itself
    returns: Literal["mean", "best", "sample"] = "mean"  # best: of the last samples; sample: an elite, by its weight

    def __post_init__(self):
        check_counts(self, ("horizon", "num_samples", "num_iterations", "num_elites"))
        if self.num_elites > self.num_samples:
            raise ValueError(f"num_elites must be at most num_samples = {self.num_samples}, got {self.num_elites}")
        if self.returns not in ("mean", "best", "sample"):
            raise ValueError(f"returns must be mean, best or sample, got {self.returns!r}")
        check_limits(self)
        for name in ("momentum_mean", "momentum_std"):
            if not all(0 <= value <= 1 for value in flat(getattr(self, name))):
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @torch.no_grad()
    def plan(self, cost: Cost, num_episodes: int, *, action_dim: int, seed: int, step: int = 0, first_episode: int = 0,
             device: torch.device | str = "cpu", mean: Tensor | None = None, noise: Tensor | None = None,
             watch: Watch | None = None) -> Plan:
        """One plan for each of E episodes, all at once.

        cost: actions [E, S, H, A] float32 -> [E, S]. mean [E, H, A] starts the search there instead of at 0. Noise is a
        function of (seed, step, number of the episode), the episodes being first_episode, first_episode + 1, ...; given
        a cost that treats rows alike, E episodes at once are planned as one by one. noise [iterations, E, S, H, A]
        replaces it. watch(mean, std, cost) is called after each iteration. Plan.cost is one more call of `cost`.
        """
        actions = self.search(cost, num_episodes, action_dim=action_dim, seed=seed, step=step, first_episode=first_episode,
                              device=device, mean=mean, noise=noise, watch=watch)
        return Plan(actions, evaluate(cost, actions.unsqueeze(1))[:, 0])

    @torch.no_grad()
    def search(self, cost: Cost, num_episodes: int, *, action_dim: int, seed: int, step: int, first_episode: int,
               device: torch.device | str, mean: Tensor | None, noise: Tensor | None, watch: Watch | None) -> Tensor:
        """The actions [E, H, A] of `plan`."""
        E, S, H, A = num_episodes, self.num_samples, self.horizon, action_dim
        check_plan(cost, E, H, A, first_episode, device, mean)
        draw = Noise(E, H, A, seed, step, first_episode, device)
        if noise is not None and noise.shape != (self.num_iterations, E, S, H, A):
            raise ValueError(f"noise must be [iterations, E, S, H, A] = {[self.num_iterations, E, S, H, A]}, "
                             f"got {list(noise.shape)}")
        limits = Limits(self, H, A, device)
        std = per_dimension("std", self.std, H, A, device).expand(E, H, A)
        mean = torch.zeros(E, H, A, device=device) if mean is None else mean.float()
        elites = None
        for iteration in range(self.num_iterations):
            white = draw.normals(iteration, S) if noise is None else noise[iteration]
            actions = limits.project(self._sample(white, mean, std, elites))
            # stable: ties are broken alike in every batch
            values, order = evaluate(cost, actions).sort(dim=1, stable=True)
            elites = actions.gather(1, order[:, :self.num_elites, None, None].expand(-1, -1, H, A))
            weights = self._weights(values[:, :self.num_elites])
            mean, std = self._moments(elites, weights, mean, std, limits)
            if watch is not None:
                watch(mean, std, values)
        if self.returns == "sample":
            return draw.choose(elites, weights, self.num_iterations)
        return mean if self.returns == "mean" else elites[:, 0]

    def _sample(self, white: Tensor, mean: Tensor, std: Tensor, elites: Tensor | None) -> Tensor:
        """Actions [E, S, H, A] from standard normal numbers; `elites` of the iteration before, best first."""
        actions = mean.unsqueeze(1) + std.unsqueeze(1) * white
        if self.include_mean:
            actions[:, 0] = mean
        return actions

    def _weights(self, cost: Tensor) -> Tensor:
        """cost [E, K] of the elites, ascending -> their weights [E, K] float64, of sum 1."""
        return torch.full_like(cost, 1 / cost.shape[1], dtype=torch.float64)

    def _moments(self, elites: Tensor, weights: Tensor, mean: Tensor, std: Tensor,
                 limits: "Limits") -> tuple[Tensor, Tensor]:
        """The next mean and std, in float64 until rounded: the same for any number of episodes."""
        elites, weights = elites.double(), weights[:, :, None, None]
        new_mean = (weights * elites).sum(1)
        variance = (weights * (elites - new_mean.unsqueeze(1)).square()).sum(1)
        new_std = (variance * self._variance_scale()).sqrt()
        return (torch.lerp(new_mean, mean.double(), limits.momentum_mean).float(),
                torch.lerp(new_std, std.double(), limits.momentum_std).float())

    def _variance_scale(self) -> float:
        return 1.0


class Limits:
    """Settings per action dimension as tensors, and the projection of actions onto what they allow."""

    def __init__(self, planner, H: int, A: int, device: torch.device | str):
        def tensor(name: str) -> Tensor | None:
            value = getattr(planner, name, None)
            return None if value is None else per_dimension(name, value, H, A, device)
        self.low, self.high, self.max_norm = tensor("low"), tensor("high"), planner.max_norm
        self.momentum_mean, self.momentum_std = (
            tensor(name).double() if hasattr(planner, name) else None for name in ("momentum_mean", "momentum_std"))

    def project(self, actions: Tensor) -> Tensor:
        if self.max_norm is not None:
            norm = actions.double().norm(dim=-1, keepdim=True)
            actions = actions * (self.max_norm / norm.clamp_min(self.max_norm)).float()
        return actions if self.low is None and self.high is None else actions.clamp(self.low, self.high)


class Noise:
    """Random numbers of the episodes of one plan, by Philox on the device."""

    def __init__(self, E: int, H: int, A: int, seed: int, step: int, first_episode: int, device: torch.device | str):
        key = mix_seed(seed, step)
        self.shape, self.device = (H, A), torch.device(device)
        self.key = tuple(torch.full((), word, device=device) for word in (key & 0xFFFFFFFF, key >> 32))
        self.episodes = torch.arange(first_episode, first_episode + E, device=device).unsqueeze(1)

    def normals(self, iteration: int, S: int) -> Tensor:
        """[E, S, H, A] float32."""
        H, A = self.shape
        words = self._words(iteration, (S * H * A + 3) // 4)
        pairs = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
        return torch.stack(pairs, 2).flatten(1)[:, :S * H * A].reshape(-1, S, H, A).float()

    def choose(self, elites: Tensor, weights: Tensor, iteration: int) -> Tensor:
        """One of elites [E, K, H, A] per episode, with probability weights [E, K] -> [E, H, A]."""
        uniform = self._words(iteration, 1)[0].double() * 2.0**-32  # [E, 1]
        chosen = (weights.cumsum(1) <= uniform).sum(1).clamp(max=weights.shape[1] - 1)
        return elites.gather(1, chosen[:, None, None, None].expand(-1, 1, *self.shape))[:, 0]

    def _words(self, iteration: int, num_blocks: int) -> tuple[Tensor, ...]:
        """Four tensors [E, num_blocks]: counters (block, iteration, episode), key (seed, step)."""
        block = torch.arange(num_blocks, device=self.device).unsqueeze(0)
        return philox4x32((block, torch.full_like(block, iteration), self.episodes, self.episodes >> 32), self.key)


def evaluate(cost: Cost, actions: Tensor) -> Tensor:
    values = cost(actions)
    if not isinstance(values, Tensor) or values.shape != actions.shape[:2] or not values.is_floating_point():
        got = f"{list(values.shape)} {values.dtype}" if isinstance(values, Tensor) else repr(type(values).__name__)
        raise ValueError(f"cost must return floating point [E, S] = {list(actions.shape[:2])}, got {got}")
    return values


def check_plan(cost: Cost, E: int, H: int, A: int, first_episode: int, device: torch.device | str,
               mean: Tensor | None) -> None:
    if not callable(cost):
        raise ValueError(f"cost must be a function of actions [E, S, H, A], made for a goal; got {cost!r}")
    for name, value, least in (("num_episodes", E, 1), ("action_dim", A, 1), ("first_episode", first_episode, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if mean is not None and (mean.shape != (E, H, A) or mean.device.type != torch.device(device).type):
        raise ValueError(f"mean must be [E, H, A] = {[E, H, A]} on {device}, got {list(mean.shape)} on {mean.device}")


def per_dimension(name: str, value: PerDimension, H: int, A: int, device: torch.device | str) -> Tensor:
    """[H, A] float32 of one number, one per action dimension, or one per step and dimension."""
    tensor = torch.tensor(value, dtype=torch.float32, device=device)
    if tensor.shape not in ((), (A,), (H, A)):
        raise ValueError(f"{name} must be a number, {A} of them (one per action dimension) or [{H}, {A}] (one per step, "
                         f"too), got {list(tensor.shape)}")
    return tensor.expand(H, A)


def flat(value: PerDimension | None) -> list[float]:
    if value is None:
        return []
    return [number for item in value for number in flat(item)] if isinstance(value, tuple) else [value]


def check_counts(planner, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(planner, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(planner, name)}")


def check_limits(planner) -> None:
    if not all(value >= 0 for value in flat(planner.std)):
        raise ValueError(f"std must be at least 0, got {planner.std}")
    if planner.max_norm is not None and not planner.max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {planner.max_norm}")
    low, high = planner.low, planner.high
    if low is None or high is None:
        return
    sizes = {np.shape(bound) for bound in (low, high)} - {()}
    if len({size[-1] for size in sizes}) > 1:
        raise ValueError(f"low and high must have one number per action dimension, got {low} and {high}")
    if not np.less_equal(low, high).all():
        raise ValueError(f"low must be at most high, got {low} and {high}")


def preset(cls, official: dict, changes: dict):
    """A planner with official constants and some changed; an unknown name is an error of the dataclass."""
    unknown = changes.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    return cls(**official | changes)
