"""Random tubes of V-JEPA, arXiv:2404.08471: the same random patches of every frame are the target, the rest is context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .masks import Masks
from .multiblock import _check_call
from .multiblock3d_plain import Grid, tokens
from .philox import philox


@dataclass(frozen=True, kw_only=True)
class RandomTube:
    """Settings of the random tubes, and their sampler; every list of a mask has one length, so nothing is trimmed."""

    ratios: tuple[float, ...] = (0.9,)           # per mask: fraction of the patches of a frame that are target

    def __post_init__(self):
        if not isinstance(self.ratios, tuple) or not self.ratios or not all(0 < ratio < 1 for ratio in self.ratios):
            raise ValueError(f"ratios must be a tuple of one number in (0, 1) or more, got {self.ratios!r}")

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError if a mask on `grid` (time steps, rows, columns) would have no context or no target."""
        if len(grid) != 3 or not all(isinstance(side, int) and side > 0 for side in grid):
            raise ValueError(f"grid must be (time steps, rows, columns), at least 1 each, got {grid}")
        num_patches = grid[1] * grid[2]
        for ratio in self.ratios:
            if not 0 < _num_context(num_patches, ratio) < num_patches:
                raise ValueError(f"grid {grid[0]}x{grid[1]}x{grid[2]} is too small: ratio {ratio} of {num_patches} patches "
                                 f"leaves {_num_context(num_patches, ratio)} as context")

    def sample(self, grid: Grid, batch_size: int, *, seed: int, step: int, first_sample: int = 0) -> Masks:
        """Masks of samples first_sample, ... of the global batch of a step: a function of (seed, step, sample)."""
        self.check_grid(grid)
        _check_call(batch_size, seed, step, first_sample)
        generator, clips = np.random.RandomState(), []
        for sample in range(first_sample, first_sample + batch_size):
            generator.seed(philox((sample, step, 0, 0), seed)[0])
            clips.append([_tube(generator, grid, ratio) for ratio in self.ratios])
        return _masks(torch.stack([torch.stack(clip) for clip in clips], dim=1))

    def next_official(self, grid: Grid, batch_size: int, generator: np.random.RandomState) -> Masks:
        """The next batch of the official collator, whose `generator` is NumPy's global one."""
        self.check_grid(grid)
        return _masks(torch.stack([torch.stack([_tube(generator, grid, ratio) for _ in range(batch_size)])
                                   for ratio in self.ratios]))


def _num_context(num_patches: int, ratio: float) -> int:
    return int(num_patches * (1 - ratio))


def _tube(generator: np.random.RandomState, grid: Grid, ratio: float) -> Tensor:
    """Which tokens of a clip are context, bool [time, rows, columns]."""
    time, rows, columns = grid
    is_context = np.arange(rows * columns) >= rows * columns - _num_context(rows * columns, ratio)
    generator.shuffle(is_context)
    return torch.from_numpy(is_context).view(1, rows, columns).expand(time, rows, columns)


def _masks(is_context: Tensor) -> Masks:
    """Masks from bool [masks, B, time, rows, columns]."""
    def lists(selected: Tensor) -> list[Tensor]:
        return [torch.stack([tokens(clip) for clip in clips]) for clips in selected]

    return Masks.from_lists(lists(is_context), lists(~is_context), is_context[0, 0].numel(), is_paired=True)
