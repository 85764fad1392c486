"""Multi-block masks in plain Python: the specification, the fallback without a compiler, the baseline of the bench.

I-JEPA, arXiv:2301.08243, section 3. `sample_official` and `next_official` draw like the official collator, image by
image; `sample_unbiased` draws every position with equal chance and trims nothing. csrc/masking/multiblock.h returns
the same numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .masks import Masks
from .philox import below, philox, unit

if TYPE_CHECKING:
    from jepa_fast.masking.multiblock import MultiBlock

ATTEMPTS = 20
SQUARE = (1.0, 1.0)

Grid = tuple[int, int]                  # rows, columns
Range = tuple[float, float]
Size = tuple[int, int]                  # height, width


def between(range_: Range, u: float) -> float:
    return range_[0] + u * (range_[1] - range_[0])


def block_size(grid: Grid, scale: float, aspect: float) -> Size:
    """Height and width of a block with `scale` of the grid's area; may be larger than the grid, or zero."""
    kept = int(grid[0] * grid[1] * scale)
    return round(math.sqrt(kept * aspect)), round(math.sqrt(kept / aspect))


# ---- official


class PositionStream:
    """PyTorch's CPU generator, read one number at a time; `draws` counts them, so that a run can resume."""

    def __init__(self, seed: int, draws: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = draws
        for start in range(0, draws, 1 << 20):
            torch.randint(0, 2, (min(1 << 20, draws - start),), generator=self.generator)

    def integer(self, n: int) -> int:
        """Uniform in [0, n), up to the bias of a remainder."""
        self.draws += 1
        return int(torch.randint(0, n, (1,), generator=self.generator))


def official_size(grid: Grid, scale: Range, aspect: Range, u: float) -> Size:
    """Block size where one uniform number drives scale and aspect ratio; the last row and column stay out."""
    height, width = block_size(grid, between(scale, u), between(aspect, u))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


def official_sizes(config: MultiBlock, grid: Grid, counter: int) -> tuple[Size, Size]:
    """Target and context size of an iteration: a generator seeded with its number gives one uniform number for each."""
    generator = torch.Generator().manual_seed(counter)
    target_u = torch.rand(1, generator=generator).item()
    context_u = torch.rand(1, generator=generator).item()
    return (official_size(grid, config.target_scale, config.aspect_ratio, target_u),
            official_size(grid, config.context_scale, SQUARE, context_u))


def official_block(grid: Grid, size: Size, min_keep: int, positions: PositionStream,
                   constraints: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One block: its token numbers and the grid without it.

    Tokens outside a constraint do not count; a block with `min_keep` tokens or fewer is drawn again, after every 20
    draws with one constraint fewer. The caller has checked that height * width > min_keep.
    """
    (rows, columns), (height, width) = grid, size
    attempt = 0
    while True:
        top, left = positions.integer(rows - height), positions.integer(columns - width)
        block = torch.zeros(rows, columns, dtype=torch.int32)
        block[top:top + height, left:left + width] = 1
        complement = 1 - block
        for constraint in constraints[:max(len(constraints) - attempt // ATTEMPTS, 0)]:
            block *= constraint
        tokens = block.flatten().nonzero().squeeze(1)
        if len(tokens) > min_keep:
            return tokens, complement
        attempt += 1


def official_group(config: MultiBlock, grid: Grid, group_size: int, positions: PositionStream,
                   counter: int) -> tuple[list[Tensor], list[Tensor]]:
    """Context lists [B, K] and target lists [B, K] of samples that are trimmed together."""
    target_size, context_size = official_sizes(config, grid, counter)
    if min(math.prod(target_size), math.prod(context_size)) <= config.min_keep:
        raise ValueError(f"these blocks never keep more than min_keep = {config.min_keep} tokens")
    contexts, targets = [], []
    for _ in range(group_size):
        blocks = [official_block(grid, target_size, config.min_keep, positions, []) for _ in range(config.num_targets)]
        constraints = [] if config.allow_overlap else [complement for _, complement in blocks]
        targets.append([tokens for tokens, _ in blocks])
        contexts.append([official_block(grid, context_size, config.min_keep, positions, constraints)[0]
                         for _ in range(config.num_contexts)])
    return official_trim(contexts), official_trim(targets)


def official_trim(lists: list[list[Tensor]]) -> list[Tensor]:
    """Cut [sample][list] token lists to the shortest of all; the first tokens stay."""
    keep = min(len(tokens) for sample in lists for tokens in sample)
    return [torch.stack([tokens[:keep] for tokens in column]) for column in zip(*lists, strict=True)]


def next_official(config: MultiBlock, grid: Grid, positions: PositionStream, counter: int, batch_size: int) -> Masks:
    """The next batch of the official collator, trimmed together."""
    contexts, targets = official_group(config, grid, batch_size, positions, counter)
    return Masks.from_lists(contexts, targets, grid[0] * grid[1])


def sample_official(config: MultiBlock, grid: Grid, seed: int, step: int, first_sample: int, batch_size: int) -> Masks:
    """Samples first_sample, first_sample + 1, ... of a step; every group they touch is drawn and trimmed whole."""
    group_size, stop = config.mask_group_size, first_sample + batch_size
    contexts, targets = [[] for _ in range(config.num_contexts)], [[] for _ in range(config.num_targets)]
    for group in range(first_sample // group_size, (stop - 1) // group_size + 1):
        positions = PositionStream(philox((group, step, 0, 0), seed)[0])
        part = slice(max(first_sample - group * group_size, 0), stop - group * group_size)
        group_contexts, group_targets = official_group(config, grid, group_size, positions, step)
        for lists, group_lists in ((contexts, group_contexts), (targets, group_targets)):
            for list_, tokens in zip(lists, group_lists, strict=True):
                list_.extend(tokens[part])
    return _masks(contexts, targets, grid)


# ---- unbiased


def unbiased_block(config: MultiBlock, grid: Grid, words: tuple[int, int, int, int], is_context: bool) -> Tensor:
    """One block as a boolean grid: scale, aspect ratio, top and left, each from its own word, any position possible."""
    rows, columns = grid
    scale = config.context_scale if is_context else config.target_scale
    aspect = SQUARE if is_context else config.aspect_ratio
    height, width = block_size(grid, between(scale, unit(words[0])), between(aspect, unit(words[1])))
    height, width = min(max(height, 1), rows), min(max(width, 1), columns)
    # a target never covers the whole grid: the longer side gives way
    if not is_context and (height, width) == grid:
        height, width = (height - 1, width) if rows >= columns else (height, width - 1)
    top, left = below(words[2], rows - height + 1), below(words[3], columns - width + 1)
    block = torch.zeros(rows, columns, dtype=torch.bool)
    block[top:top + height, left:left + width] = True
    return block


def unbiased_sample(config: MultiBlock, grid: Grid, seed: int, step: int, sample: int) -> tuple[Tensor, Tensor]:
    """Contexts [E, rows, columns] and targets [M, rows, columns] of one sample, boolean.

    All blocks are drawn again while a context keeps `min_keep` tokens or fewer, 20 times at most. After that every
    token that is no target is context; if these are too few, the first target block serves as every target.
    """
    def free(targets):
        return torch.ones(grid, dtype=torch.bool) if config.allow_overlap else ~targets.any(0)

    def is_enough(contexts):
        return int(contexts.sum((1, 2)).min()) > config.min_keep

    M = config.num_targets
    for attempt in range(ATTEMPTS):
        blocks = torch.stack([unbiased_block(config, grid, philox((sample, step, k, attempt), seed), k >= M)
                              for k in range(M + config.num_contexts)])
        targets, contexts = blocks[:M], blocks[M:] & free(blocks[:M])
        if is_enough(contexts):
            return contexts, targets
    contexts = free(targets).expand_as(contexts)
    if not is_enough(contexts) and not config.allow_overlap:
        targets = targets[:1].expand_as(targets)
        contexts = free(targets).expand_as(contexts)
    return contexts, targets


def sample_unbiased(config: MultiBlock, grid: Grid, seed: int, step: int, first_sample: int, batch_size: int) -> Masks:
    """Samples first_sample, first_sample + 1, ... of a step, each drawn on its own."""
    contexts, targets = [[] for _ in range(config.num_contexts)], [[] for _ in range(config.num_targets)]
    for sample in range(first_sample, first_sample + batch_size):
        for lists, blocks in zip((contexts, targets), unbiased_sample(config, grid, seed, step, sample), strict=True):
            for list_, block in zip(lists, blocks, strict=True):
                list_.append(block.flatten().nonzero().squeeze(1))
    return _masks(contexts, targets, grid)


def _masks(contexts: list[list[Tensor]], targets: list[list[Tensor]], grid: Grid) -> Masks:
    """Masks from [list][sample] token lists."""
    def lengths(lists):
        return torch.tensor([[len(tokens) for tokens in list_] for list_ in lists])

    def idx(lists):
        return torch.cat([tokens for list_ in lists for tokens in list_])

    return Masks(context_idx=idx(contexts), context_lengths=lengths(contexts), target_idx=idx(targets),
                 target_lengths=lengths(targets), num_tokens=grid[0] * grid[1])
