"""Multi-block masks drawn on the device: a function of (seed, step, number of the sample), no host in between."""

import torch
from torch import Tensor

from ..reference import multiblock as reference
from ._backends import Missing, triton
from ._define import define

TILE = 2**15  # blocks times tokens, both rounded up to a power of two, that a program of the Triton kernel holds


def _fits(step, seed, first_sample, batch_size, rows, columns, num_targets, num_contexts, *settings):
    size = 2 ** ((num_targets + num_contexts - 1).bit_length() + (rows * columns - 1).bit_length())
    return None if size <= TILE else f"{num_targets + num_contexts} blocks on {rows}x{columns} tokens"


define("multiblock(Tensor step, int seed, int first_sample, SymInt batch_size, int rows, int columns, int num_targets, "
       "int num_contexts, float[] target_scale, float[] context_scale, float[] aspect_ratio, int min_keep, "
       "bool allow_overlap) -> Tensor",
       plain=reference.multiblock, cpp=Missing("on the CPU masking.MultiBlock samples, in C++"),
       triton=triton("multiblock", supports=_fits), cuda=Missing("Triton's is one short launch"))


@torch.library.register_fake("jepa_fast::multiblock")
def _(step, seed, first_sample, batch_size, rows, columns, num_targets, num_contexts, *settings):
    return torch.empty(batch_size, num_targets + num_contexts, rows, columns, dtype=torch.bool, device=step.device)


def multiblock(step: Tensor, grid: tuple[int, int], batch_size: int, *, seed: int, first_sample: int = 0,
               num_targets: int = 4, num_contexts: int = 1, target_scale: tuple[float, float] = (0.15, 0.2),
               context_scale: tuple[float, float] = (0.85, 1.0), aspect_ratio: tuple[float, float] = (0.75, 1.5),
               min_keep: int = 10, allow_overlap: bool = False) -> tuple[Tensor, Tensor]:
    """Contexts [B, E, rows, columns] and targets [B, M, rows, columns], bool, on the device of `step`.

    The masks of `masking.MultiBlock(mode="unbiased")` with the same settings, to the bit, for samples first_sample,
    ..., first_sample + batch_size - 1 of the global batch of a step; `masking.Masks.from_grids` makes lists of them.
    step: 0-dim int64 tensor in [0, 2^32), not read on the host. seed in [0, 2^63). Settings as in `masking.MultiBlock`.
    """
    rows, columns = grid
    if step.dim() != 0 or step.dtype != torch.int64:
        raise ValueError(f"step must be a 0-dim int64 tensor, got {list(step.shape)} {step.dtype}")
    if rows < 1 or columns < 1 or not 2 <= rows * columns <= 2**24:
        raise ValueError(f"grid must be (rows, columns), 2 to 2^24 tokens in all, got {rows}x{columns}")
    for name, value, low, high in (("seed", seed, 0, 2**63 - 1), ("batch_size", batch_size, 1, 2**24),
                                   ("first_sample", first_sample, 0, 2**32 - 1 - batch_size),
                                   ("min_keep", min_keep, 0, 2**24), ("num_targets", num_targets, 1, 2**16),
                                   ("num_contexts", num_contexts, 1, 2**16)):
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    for name, (low, high), limit in (("target_scale", target_scale, 1.0), ("context_scale", context_scale, 1.0),
                                     ("aspect_ratio", aspect_ratio, 1000.0)):
        if not 0 < low <= high <= limit:
            raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {limit:g}, got {(low, high)}")
    grids = torch.ops.jepa_fast.multiblock(step, seed, first_sample, batch_size, rows, columns, num_targets, num_contexts,
                                           target_scale, context_scale, aspect_ratio, min_keep, allow_overlap)
    return grids[:, num_targets:], grids[:, :num_targets]
