"""Multi-block masks of video in plain Python: the specification, and the fallback without a compiler.

V-JEPA, arXiv:2404.08471, section 3.2. `sample_official` and `next_official` draw like the official collator, clip by
clip; `sample_unbiased` draws every block on its own and trims nothing. csrc/masking/multiblock3d.h returns the same
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import multiblock_plain
from .masks import Masks
from .multiblock_plain import ATTEMPTS, PositionStream, between
from .philox import below, philox, unit

if TYPE_CHECKING:
    from .multiblock3d import BlockMask, MultiBlock3D

MAX_DRAWS = 10_000

Grid = tuple[int, int, int]             # time steps, rows, columns
Size = tuple[int, int, int]             # duration, height, width
Clip = tuple[Tensor, Tensor]            # context and target token numbers


def block_size(mask: BlockMask, grid: Grid, u: tuple[float, float, float]) -> Size:
    """Size of a block from three numbers in [0, 1); no rows or columns where it is very small."""
    time, rows, columns = grid
    duration = int(time * between(mask.temporal_scale, u[0]))
    height, width = multiblock_plain.block_size(
        (rows, columns), between(mask.spatial_scale, u[1]), between(mask.aspect_ratio, u[2]))
    return max(duration, 1), min(height, rows), min(width, columns)


def context_duration(mask: BlockMask, grid: Grid) -> int:
    """Time steps that a context may use, the first ones."""
    return max(int(grid[0] * mask.max_temporal_keep), 1)


def unused(mask: BlockMask, grid: Grid) -> Tensor:
    """A clip before its blocks, bool [time, rows, columns]: only what no context may use is target."""
    is_target = torch.zeros(grid, dtype=torch.bool)
    is_target[context_duration(mask, grid):] = True
    return is_target


def paint(is_target: Tensor, size: Size, start: int, top: int, left: int) -> None:
    is_target[start:start + size[0], top:top + size[1], left:left + size[2]] = True


def tokens(selected: Tensor) -> Tensor:
    return selected.flatten().nonzero().squeeze(1)


# ---- official


def official_size(mask: BlockMask, grid: Grid, counter: int) -> Size:
    """Size of all blocks of an iteration: a generator seeded with its number gives three uniform numbers."""
    generator = torch.Generator().manual_seed(counter)
    u_time, u_space, u_aspect = (torch.rand(1, generator=generator).item() for _ in range(3))
    return block_size(mask, grid, (u_time, u_space, u_aspect))


def official_clip(mask: BlockMask, number: int, grid: Grid, size: Size, positions: PositionStream) -> Clip:
    """One clip: the context is what no block covers, and drawn again while it is empty."""
    for _ in range(MAX_DRAWS):
        is_target = unused(mask, grid)
        for _ in range(mask.num_blocks):
            top = positions.integer(grid[1] - size[1] + 1)
            left = positions.integer(grid[2] - size[2] + 1)
            start = positions.integer(grid[0] - size[0] + 1)
            paint(is_target, size, start, top, left)
        if not is_target.all():
            return tokens(~is_target), tokens(is_target)
    raise ValueError(f"masks[{number}] never leaves a context: {mask.num_blocks} blocks covered the grid {MAX_DRAWS} "
                     f"times in a row; use fewer or smaller blocks")


def official_trim(mask: BlockMask, clips: list[Clip], num_tokens: int) -> list[Clip]:
    """Cut the contexts to the shortest of all, the targets to the shortest of all; the first tokens stay."""
    def complement(kept: Tensor) -> Tensor:
        return tokens(torch.ones(num_tokens, dtype=torch.bool).index_fill(0, kept, False))

    keep_context = min([len(context) for context, _ in clips] + ([] if mask.max_keep is None else [mask.max_keep]))
    keep_target = min(len(target) for _, target in clips)
    clips = [(context[:keep_context], target[:keep_target]) for context, target in clips]
    if mask.full_complement:
        clips = [(context, complement(context)) for context, _ in clips]
    elif mask.pred_full_complement:
        clips = [(complement(target), target) for _, target in clips]
    return clips


def official_group(config: MultiBlock3D, grid: Grid, group_size: int, positions: PositionStream,
                   counter: int) -> list[list[Clip]]:
    """[mask][sample] clips of samples that are trimmed together."""
    group = []
    for number, mask in enumerate(config.masks):
        size = official_size(mask, grid, counter)
        clips = [official_clip(mask, number, grid, size, positions) for _ in range(group_size)]
        group.append(official_trim(mask, clips, grid[0] * grid[1] * grid[2]))
    return group


def next_official(config: MultiBlock3D, grid: Grid, positions: PositionStream, counter: int, batch_size: int) -> Masks:
    """The next batch of the official collator, trimmed together."""
    return _masks(config, official_group(config, grid, batch_size, positions, counter), grid)


def sample_official(config: MultiBlock3D, grid: Grid, seed: int, step: int, first_sample: int, batch_size: int) -> Masks:
    """Samples first_sample, first_sample + 1, ... of a step; every group they touch is drawn and trimmed whole."""
    group_size, stop = config.mask_group_size, first_sample + batch_size
    clips = [[] for _ in config.masks]
    for group in range(first_sample // group_size, (stop - 1) // group_size + 1):
        positions = PositionStream(philox((group, step, 0, 0), seed)[0])
        part = slice(max(first_sample - group * group_size, 0), stop - group * group_size)
        for list_, drawn in zip(clips, official_group(config, grid, group_size, positions, step), strict=True):
            list_ += drawn[part]
    return _masks(config, clips, grid)


# ---- unbiased


def unbiased_block(mask: BlockMask, grid: Grid, sizes: tuple[int, ...], positions: tuple[int, ...]) -> tuple[Size, ...]:
    """Size and place (start, top, left) of one block, every number from its own word, any position possible."""
    time, rows, columns = grid
    duration, height, width = block_size(mask, grid, tuple(unit(word) for word in sizes[:3]))
    height, width = max(height, 1), max(width, 1)
    # a block never covers all that a context may use: the longest side gives way
    usable = context_duration(mask, grid)
    if duration >= usable and (height, width) == (rows, columns):
        if usable >= max(rows, columns):
            duration = usable - 1
        elif rows >= columns:
            height -= 1
        else:
            width -= 1
    place = (below(positions[0], time - duration + 1), below(positions[1], rows - height + 1),
             below(positions[2], columns - width + 1))
    return (duration, height, width), place


def unbiased_clip(mask: BlockMask, number: int, grid: Grid, seed: int, step: int, sample: int) -> Clip:
    """One clip. All blocks are drawn again while the context is empty, 20 times at most; then the first one counts."""
    for attempt in range(ATTEMPTS):
        is_target = unused(mask, grid)
        blocks = []
        for k in range(mask.num_blocks):
            words = [philox((sample, step, number << 16 | k << 1 | half, attempt), seed) for half in (0, 1)]
            size, place = unbiased_block(mask, grid, *words)
            blocks.append((size, *place))
            paint(is_target, *blocks[-1])
        if not is_target.all():
            return tokens(~is_target), tokens(is_target)
    is_target = unused(mask, grid)
    paint(is_target, *blocks[0])
    return tokens(~is_target), tokens(is_target)


def sample_unbiased(config: MultiBlock3D, grid: Grid, seed: int, step: int, first_sample: int, batch_size: int) -> Masks:
    """Samples first_sample, first_sample + 1, ... of a step, each drawn on its own."""
    samples = range(first_sample, first_sample + batch_size)
    clips = [[unbiased_clip(mask, number, grid, seed, step, sample) for sample in samples]
             for number, mask in enumerate(config.masks)]
    return _masks(config, clips, grid)


def _masks(config: MultiBlock3D, clips: list[list[Clip]], grid: Grid) -> Masks:
    """Masks from [mask][sample] clips."""
    clips = [[clip[::-1] if mask.inv_block else clip for clip in list_]
             for mask, list_ in zip(config.masks, clips, strict=True)]

    def idx(kind):
        return torch.cat([clip[kind] for list_ in clips for clip in list_])

    def lengths(kind):
        return torch.tensor([[len(clip[kind]) for clip in list_] for list_ in clips])

    return Masks(context_idx=idx(0), context_lengths=lengths(0), target_idx=idx(1), target_lengths=lengths(1),
                 num_tokens=grid[0] * grid[1] * grid[2], is_paired=True)
