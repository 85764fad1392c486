"""Multi-block masks of I-JEPA (arXiv:2301.08243) without a host: the unbiased sampler, all samples of a batch at once.

Block k of a sample (targets first, then contexts) is drawn from the four words of the Philox4x32-10 block with

    counter = (sample, step, k, attempt)     key = (seed low, seed high)

one each for scale, aspect ratio, top and left; every size and position as in masking/multiblock_plain.py, to the bit.
Sizes are float64 and round half to even.
"""

import torch
from torch import Tensor

from .directions import philox4x32

ATTEMPTS = 20


def multiblock(step: Tensor, seed: int, first_sample: int, batch_size: int, rows: int, columns: int, num_targets: int,
               num_contexts: int, target_scale: list[float], context_scale: list[float], aspect_ratio: list[float],
               min_keep: int, allow_overlap: bool) -> Tensor:
    """step 0-dim int64 -> [B, M + E, rows, columns] bool: target blocks, then contexts.

    All blocks are drawn again while a context keeps `min_keep` tokens or fewer, 20 times at most. After that every
    token that is no target is context; if these are too few, the first target block serves as every target.
    """
    def free(targets):
        return torch.ones_like(targets[:, :1]) if allow_overlap else ~targets.any(1, keepdim=True)

    def is_enough(contexts):
        return contexts.sum((2, 3)).amin(1).view(-1, 1, 1, 1) > min_keep

    M = num_targets
    sample = first_sample + torch.arange(batch_size, device=step.device).unsqueeze(1)
    block = torch.arange(M + num_contexts, device=step.device)
    seed = torch.full_like(step, seed)
    targets = contexts = None
    for attempt in range(ATTEMPTS):
        counter = (sample, step, block, torch.full_like(step, attempt))
        words = philox4x32(counter, (seed, seed >> 32))
        blocks = torch.cat([_blocks([word[:, :M] for word in words], rows, columns, target_scale, aspect_ratio, True),
                            _blocks([word[:, M:] for word in words], rows, columns, context_scale, [1.0, 1.0], False)], 1)
        drawn = blocks[:, :M], blocks[:, M:] & free(blocks[:, :M])
        if attempt == 0:
            targets, contexts = drawn
        else:
            found = is_enough(contexts)
            targets, contexts = (torch.where(found, old, new) for old, new in zip((targets, contexts), drawn, strict=True))
    contexts = torch.where(is_enough(contexts), contexts, free(targets))
    if not allow_overlap:
        found = is_enough(contexts)
        targets = torch.where(found, targets, targets[:, :1])
        contexts = torch.where(found, contexts, ~targets[:, :1])
    return torch.cat([targets, contexts], 1)


def _blocks(words: list[Tensor], rows: int, columns: int, scale: list[float], aspect_ratio: list[float],
            is_target: bool) -> Tensor:
    """words 4 x [B, M] -> [B, M, rows, columns]."""
    def between(low, high, word):
        return low + (word >> 8).double() * 2**-24 * (high - low)

    kept, aspect = (rows * columns * between(*scale, words[0])).floor(), between(*aspect_ratio, words[1])
    height = (kept * aspect).sqrt().round().long().clamp(1, rows)
    width = (kept / aspect).sqrt().round().long().clamp(1, columns)
    if is_target:  # which never covers the whole grid: the longer side gives way
        is_whole = ((height == rows) & (width == columns)).long()
        height, width = (height - is_whole, width) if rows >= columns else (height, width - is_whole)
    top, left = (words[2] * (rows - height + 1)) >> 32, (words[3] * (columns - width + 1)) >> 32
    row, column = (torch.arange(size, device=height.device) for size in (rows, columns))
    in_rows = (row >= top.unsqueeze(-1)) & (row < (top + height).unsqueeze(-1))
    in_columns = (column >= left.unsqueeze(-1)) & (column < (left + width).unsqueeze(-1))
    return in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2)
