"""Multi-block masks of I-JEPA, arXiv:2301.08243: large context blocks without the tokens of several target blocks."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from . import multiblock_plain
from .masks import Masks
from .multiblock_plain import SQUARE, Grid, Range, Size, between, block_size, official_size

if TYPE_CHECKING:
    from .multiblock3d import MultiBlock3D

try:
    import jepa_fast._masking as _masking
except ModuleNotFoundError:
    _masking = None


def backend() -> str:
    """Which code samples: "compiled" (jepa_fast._masking, C++) or "plain" (Python, where that module is not built)."""
    return "plain" if _masking is None else "compiled"


@dataclass(frozen=True, kw_only=True)
class MultiBlock:
    """Settings of the multi-block masks, and their sampler.

    `mode` "official" reproduces the official collator with all it does: one uniform number drives scale and aspect
    ratio of all blocks of a step, the last row and column are never used, and the lists of `mask_group_size` samples
    are cut to the shortest of them, which drops mostly the lower rows. "unbiased" draws scale, aspect ratio and
    position of every block independently, every position with equal chance, cuts nothing, and works on any grid of
    two tokens or more; `min_keep` then asks for context tokens only and gives way where a grid is too small for it:
    after 20 draws every token that is no target is context, and if these are still too few, the first target block
    serves as every target. Contexts and targets are never empty, and disjoint unless `allow_overlap`. (The official
    sampler lets a context overlap the last targets where 20 draws were not enough.)
    """

    num_targets: int = 4                         # M, target blocks per sample
    num_contexts: int = 1                        # E, context blocks per sample
    target_scale: Range = (0.15, 0.2)            # area of a target block, fraction of the grid
    context_scale: Range = (0.85, 1.0)           # area of a context block before the targets are taken out
    aspect_ratio: Range = (0.75, 1.5)            # height / width of a target block; contexts are square
    min_keep: int = 10                           # every block keeps more tokens than this
    allow_overlap: bool = False                  # context keeps the tokens of the targets
    mask_group_size: int = 128                   # samples trimmed together: the official batch per GPU
    mode: Literal["official", "unbiased"] = "official"

    def __post_init__(self):
        for name, low, high in (("num_targets", 1, 2**16), ("num_contexts", 1, 2**16), ("min_keep", 0, 2**24),
                                ("mask_group_size", 1, 2**16)):
            _check_int(name, getattr(self, name), low, high)
        for name, limit in (("target_scale", 1.0), ("context_scale", 1.0), ("aspect_ratio", 1000.0)):
            _check_range(name, getattr(self, name), limit)
        _check_mode(self.mode)

    def check_grid(self, grid: Grid) -> None:
        """Raise ValueError if sampling on `grid` (rows, columns) could fail or, officially, never end."""
        _check_grid(self, tuple(grid))

    def sample(self, grid: Grid, batch_size: int, *, seed: int, step: int, first_sample: int = 0) -> Masks:
        """Masks of samples first_sample, ..., first_sample + batch_size - 1 of the global batch of a step.

        The masks of a sample depend on the settings, `grid` (rows, columns), `seed`, `step` and the number of the
        sample in the global batch, and on nothing else: neither ranks, micro-batches nor a resumed run change them.
        Group g of `mask_group_size` samples starts at sample g * mask_group_size and is drawn and trimmed whole, also
        where this batch holds a part of it only. Official block sizes depend on `step` alone, as if it were the
        iteration counter of the official collator.
        """
        grid = tuple(grid)
        _check_grid(self, grid)
        _check_call(batch_size, seed, step, first_sample)
        if _masking is None:
            plain = getattr(multiblock_plain, f"sample_{self.mode}")
            return plain(self, grid, seed, step, first_sample, batch_size)
        settings = _compiled_settings(self, grid)
        if self.mode == "unbiased":
            return _masks(_masking.sample_unbiased(settings, seed, step, first_sample, batch_size), grid)
        return _masks(_masking.sample_official(settings, self.mask_group_size, seed, step, first_sample, batch_size),
                      grid)

    def _next(self, grid: Grid, positions, counter: int, batch_size: int) -> Masks:
        if isinstance(positions, multiblock_plain.PositionStream):
            return multiblock_plain.next_official(self, grid, positions, counter, batch_size)
        return _masks(_masking.next_official(_compiled_settings(self, grid), positions, counter, batch_size), grid)


class MultiBlockStream:
    """An official collator, call after call: one position stream for all batches and a counter that seeds the sizes.

    A new stream equals a new collator after `torch.manual_seed(seed)`, as long as nothing else draws from that
    generator. A whole batch is trimmed together, whatever `mask_group_size` says. `counter` and `draws` are its state:
    a stream made with the values of another continues it exactly, also on another grid (clips of several lengths).
    """

    def __init__(self, config: MultiBlock | MultiBlock3D, grid: tuple[int, ...], *, seed: int, counter: int = 0,
                 draws: int = 0):
        if config.mode != "official":
            raise ValueError(f'config.mode must be "official" for a stream, got {config.mode!r}')
        config.check_grid(grid)
        _check_int("seed", seed, 0, 2**63 - 1)
        _check_int("counter", counter, 0, 2**63 - 1)
        _check_int("draws", draws, 0, 2**63 - 1)
        self.config, self.grid, self.counter = config, tuple(grid), counter
        self._positions = (multiblock_plain if _masking is None else _masking).PositionStream(seed, draws)

    @property
    def draws(self) -> int:
        """Random numbers taken from the position stream so far."""
        return self._positions.draws

    def next(self, batch_size: int) -> Masks:
        """Masks of the next batch."""
        _check_int("batch_size", batch_size, 1, 2**24)
        counter, self.counter = self.counter, self.counter + 1
        return self.config._next(self.grid, self._positions, counter, batch_size)


def find_small_block(grid: Grid, scale: Range, aspect: Range, min_keep: int) -> Size | None:
    """A block of `min_keep` tokens or fewer that the official sampler can draw on `grid`; None if there is none.

    Exact over all 2^24 values of the uniform number: a span of them is halved until its ends decide it.
    """
    spans = [(0, 2**24 - 1)]
    while spans:
        low, high = spans.pop()
        for end in (low, high):
            size = official_size(grid, scale, aspect, end * 2.0**-24)
            if math.prod(size) <= min_keep:
                return size
        # no block of the span is lower or narrower than this one: least area, least height, least width
        least_scale, low_aspect = between(scale, low * 2.0**-24), between(aspect, low * 2.0**-24)
        height = block_size(grid, least_scale, low_aspect)[0]
        width = block_size(grid, least_scale, between(aspect, high * 2.0**-24))[1]
        if min(height, grid[0] - 1) * min(width, grid[1] - 1) <= min_keep and high - low > 1:
            spans += [(low, (low + high) // 2), ((low + high) // 2, high)]
    return None


@functools.lru_cache(maxsize=64)
def _check_grid(config: MultiBlock, grid: Grid) -> None:
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid) or grid[0] * grid[1] > 2**24:
        raise ValueError(f"grid must be (rows, columns), at least 1 each and 2^24 tokens in all, got {grid}")
    if config.mode == "unbiased":
        if grid[0] * grid[1] < 2:
            raise ValueError("grid must hold a context and a target token, got 1x1")
        return
    for kind, scale, aspect in (("target", config.target_scale, config.aspect_ratio),
                                ("context", config.context_scale, SQUARE)):
        size = find_small_block(grid, scale, aspect, config.min_keep)
        if size is not None:
            height, width = size
            raise ValueError(
                f"grid {grid[0]}x{grid[1]} is too small: a {kind} block of {kind}_scale {scale} can be {height}x{width}"
                f" = {height * width} tokens and must keep more than min_keep = {config.min_keep};"
                f' use larger images, smaller patches, a larger {kind}_scale, a smaller min_keep, or mode "unbiased"')


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def _check_range(name: str, range_: Range, limit: float) -> None:
    if not isinstance(range_, tuple) or len(range_) != 2 or not 0 < range_[0] <= range_[1] <= limit:
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {limit:g}, got {range_!r}")


def _check_mode(mode: str) -> None:
    if mode not in ("official", "unbiased"):
        raise ValueError(f'mode must be "official" or "unbiased", got {mode!r}')


def _check_call(batch_size: int, seed: int, step: int, first_sample: int) -> None:
    _check_int("batch_size", batch_size, 1, 2**24)
    _check_int("seed", seed, 0, 2**63 - 1)
    _check_int("step", step, 0, 2**32 - 1)
    _check_int("first_sample", first_sample, 0, 2**32 - 1 - batch_size)


@functools.lru_cache(maxsize=64)
def _compiled_settings(config: MultiBlock, grid: Grid):
    names = ("num_targets", "num_contexts", "target_scale", "context_scale", "aspect_ratio", "min_keep",
             "allow_overlap")
    return _masking.Settings(rows=grid[0], columns=grid[1], **{name: getattr(config, name) for name in names})


def _masks(arrays, grid: tuple[int, ...], *, is_paired: bool = False) -> Masks:
    context_idx, context_lengths, target_idx, target_lengths = map(torch.from_numpy, arrays)
    return Masks.unchecked(context_idx=context_idx, context_lengths=context_lengths, target_idx=target_idx,
                           target_lengths=target_lengths, num_tokens=math.prod(grid), is_paired=is_paired)
