"""Multi-block masks of video: V-JEPA (arXiv:2404.08471), V-JEPA 2 (arXiv:2506.09985) and V-JEPA 2.1 (arXiv:2603.14482).

Blocks of a mask together are the target, the rest of the clip is the context; every clip gets several masks, officially
one of many short-range blocks and one of few long-range blocks, each predicted on its own.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from typing import Literal

from . import multiblock, multiblock3d_plain, multiblock_plain
from .masks import Masks
from .multiblock import _check_call, _check_int, _check_mode, _check_range, _masks
from .multiblock3d_plain import Grid, Size, block_size, context_duration
from .multiblock_plain import Range

LAST = 1 - 2.0**-24                              # the largest of the uniform numbers


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """One mask of a clip: the union of a few blocks is the target, all else the context."""

    num_blocks: int = 8                          # blocks per clip, free to overlap
    spatial_scale: Range = (0.15, 0.15)          # area of a block, fraction of a frame
    temporal_scale: Range = (1.0, 1.0)           # duration of a block, fraction of the clip
    aspect_ratio: Range = (0.75, 1.5)            # height / width of a block
    max_temporal_keep: float = 1.0               # the context uses this fraction of the time steps, the first ones
    max_keep: int | None = None                  # context tokens at most, the first ones; None: all (official mode only)
    full_complement: bool = False                # target: all tokens but the trimmed context
    pred_full_complement: bool = False           # context: all tokens but the trimmed target
    inv_block: bool = False                      # swap context and target at the end

    def __post_init__(self):
        _check_int("num_blocks", self.num_blocks, 1, 2**15)
        if self.max_keep is not None:
            _check_int("max_keep", self.max_keep, 1, 2**24)
        for name, limit in (("spatial_scale", 1.0), ("temporal_scale", 1.0), ("aspect_ratio", 1000.0)):
            _check_range(name, getattr(self, name), limit)
        if not 0 < self.max_temporal_keep <= 1:
            raise ValueError(f"max_temporal_keep must be in (0, 1], got {self.max_temporal_keep!r}")
        if self.full_complement and self.pred_full_complement:
            raise ValueError("full_complement and pred_full_complement exclude each other, got both")


@dataclass(frozen=True, kw_only=True)
class MultiBlock3D:
    """Settings of the multi-block masks of video, and their sampler.

    The defaults are those of V-JEPA and of clips in V-JEPA 2 and 2.1; images in V-JEPA 2.1 are clips of one time step
    with one mask, `BlockMask(num_blocks=10)`. `mode` "official" reproduces the official collator with all it does: all
    blocks of a step have one size, and the lists of `mask_group_size` samples are cut to the shortest of them, which
    drops the later time steps. "unbiased" draws size and position of every block on its own, every position with equal
    chance, cuts nothing, so context and target are always complements, and works wherever a context may use two tokens
    or more: after 20 draws without a context the first block alone is the target. Contexts and targets are never empty,
    and disjoint. Of 1568 tokens (8x14x14) the long-range context keeps 99 on average officially, 294 without the cut in
    groups of 24, and 260 unbiased, where two blocks of different shape overlap less.
    """

    masks: tuple[BlockMask, ...] = (BlockMask(), BlockMask(num_blocks=2, spatial_scale=(0.7, 0.7)))
    mask_group_size: int = 24                    # samples trimmed together: the official batch per GPU
    mode: Literal["official", "unbiased"] = "official"

    def __post_init__(self):
        is_valid = isinstance(self.masks, tuple) and all(isinstance(mask, BlockMask) for mask in self.masks)
        if not is_valid or not 1 <= len(self.masks) <= 2**16:
            raise ValueError(f"masks must be a tuple of one BlockMask or more, got {self.masks!r}")
        _check_int("mask_group_size", self.mask_group_size, 1, 2**16)
        _check_mode(self.mode)
        for i, mask in enumerate(self.masks):
            if self.mode == "unbiased" and mask.max_keep is not None:
                raise ValueError(f'masks[{i}].max_keep must be None in mode "unbiased", got {mask.max_keep}')

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError if sampling on `grid` (time steps, rows, columns) could fail or, officially, never end."""
        _check_grid(self, tuple(grid))

    def sample(self, grid: Grid, batch_size: int, *, seed: int, step: int, first_sample: int = 0) -> Masks:
        """Masks of samples first_sample, ..., first_sample + batch_size - 1 of the global batch of a step.

        Context list i and target list i come from `masks[i]` and are a pair. The masks of a sample depend on the
        settings, `grid` (time steps, rows, columns), `seed`, `step` and the number of the sample in the global batch,
        and on nothing else, as those of `MultiBlock` do. Official block sizes depend on `step` alone, as if it were the
        iteration counter of the official collator. Raises ValueError if 10,000 official draws leave no context.
        """
        grid = tuple(grid)
        _check_grid(self, grid)
        _check_call(batch_size, seed, step, first_sample)
        compiled = multiblock._masking
        if compiled is None:
            plain = getattr(multiblock3d_plain, f"sample_{self.mode}")
            return plain(self, grid, seed, step, first_sample, batch_size)
        settings = _compiled_settings(self, grid)
        if self.mode == "unbiased":
            arrays = compiled.sample_unbiased(settings, seed, step, first_sample, batch_size)
        else:
            arrays = compiled.sample_official(settings, self.mask_group_size, seed, step, first_sample, batch_size)
        return _masks(arrays, grid, is_paired=True)

    def _next(self, grid: Grid, positions, counter: int, batch_size: int) -> Masks:
        if isinstance(positions, multiblock_plain.PositionStream):
            return multiblock3d_plain.next_official(self, grid, positions, counter, batch_size)
        settings = _compiled_settings(self, grid)
        return _masks(multiblock._masking.next_official(settings, positions, counter, batch_size), grid, is_paired=True)


def clip_grid(num_frames: int, height: int, width: int, *, tubelet_size: int = 2, patch_size: int = 16) -> Grid:
    """Time steps, rows and columns of a clip of `num_frames` frames, `height` x `width` pixels each."""
    for name, value, unit_name, unit in (("num_frames", num_frames, "tubelet_size", tubelet_size),
                                         ("height", height, "patch_size", patch_size),
                                         ("width", width, "patch_size", patch_size)):
        _check_int(unit_name, unit, 1, 2**24)
        _check_int(name, value, 1, 2**24)
        if value % unit:
            raise ValueError(f"{name} must be divisible by {unit_name} = {unit}, got {value}")
    return num_frames // tubelet_size, height // patch_size, width // patch_size


def find_full_block(mask: BlockMask, grid: Grid) -> bool:
    """Whether the official sampler can draw a block as large as `grid`; exact over all values of the uniform numbers."""
    def size(i: int) -> Size:
        return block_size(mask, grid, (LAST, LAST, i * 2.0**-24))

    # the largest area; of the aspect ratios that make it high enough, the first makes it widest
    first = bisect.bisect_left(range(2**24), True, key=lambda i: size(i)[1] == grid[1])
    return first < 2**24 and size(first) == grid


@functools.lru_cache(maxsize=64)
def _check_grid(config: MultiBlock3D, grid: Grid) -> None:
    if len(grid) != 3 or not all(isinstance(side, int) and side > 0 for side in grid) or math.prod(grid) > 2**24:
        raise ValueError(f"grid must be (time steps, rows, columns), at least 1 each and 2^24 tokens in all, got {grid}")
    name = "x".join(map(str, grid))
    for i, mask in enumerate(config.masks):
        if context_duration(mask, grid) * grid[1] * grid[2] < 2:
            raise ValueError(f"grid {name} is too small: masks[{i}] needs two tokens in the time steps a context may use")
        if config.mode == "unbiased":
            continue
        least = [block_size(mask, grid, (0.0, 0.0, u)) for u in (0.0, LAST)]
        for size in least:
            if math.prod(size) == 0:
                raise ValueError(f"grid {name} is too small: a block of masks[{i}] can be {size[0]}x{size[1]}x{size[2]}, "
                                 f'without a token; use larger frames, a larger spatial_scale, or mode "unbiased"')
        if find_full_block(mask, grid):
            raise ValueError(f"grid {name} is too small: a block of masks[{i}] can cover all of it and leave no context;"
                             f' use larger frames, a smaller spatial_scale or temporal_scale, or mode "unbiased"')


@functools.lru_cache(maxsize=64)
def _compiled_settings(config: MultiBlock3D, grid: Grid):
    compiled, num_tokens = multiblock._masking, math.prod(grid)
    masks = [compiled.BlockMask(**(vars(mask) | {"max_keep": mask.max_keep or num_tokens})) for mask in config.masks]
    return compiled.Settings3D(time=grid[0], rows=grid[1], columns=grid[2], masks=masks)
