"""How far every context token is from its nearest target, exactly, by a distance transform of the grid."""

import math

import torch
from torch import Tensor

from .masks import Masks


def nearest_target(masks: Masks, grid: tuple[int, ...]) -> Tensor:
    """Squared distance [C] int64 of each context token to the nearest target of the same mask and sample.

    In steps of the grid, one time step being as far as one row or column; in the order of `masks.context_idx`, whose
    lists must be paired with the targets. Squared distances along the axes add up, so that the nearest target is found
    one axis after the other: L * N * (sum of the sides) operations for L lists, not one per pair of tokens.
    Raises ValueError for a list without targets.
    """
    if not masks.is_paired:
        raise ValueError("masks must have every context list paired with its own target list, got masks that are not")
    if math.prod(grid) != masks.num_tokens:
        raise ValueError(f"grid must have the {masks.num_tokens} tokens of the masks, got {tuple(grid)}")
    if int(masks.target_lengths.min()) < 1:
        raise ValueError("every target list must hold a token to measure the distance to, got an empty one")
    # beyond any distance on the grid; sums of it stay far from the end of int32
    far = sum(side * side for side in grid)
    squared = torch.full((masks.target_lengths.numel(), masks.num_tokens), far, dtype=torch.int32,
                         device=masks.target_idx.device)
    squared[_list_number(masks.target_lengths), masks.target_idx] = 0
    squared = squared.unflatten(1, tuple(grid))
    for axis, side in enumerate(grid, start=1):
        squared = _nearest_along(squared, axis, side)
    return squared.flatten(1)[_list_number(masks.context_lengths), masks.context_idx].long()


def _nearest_along(squared: Tensor, axis: int, side: int) -> Tensor:
    """The least of squared[j] + (i - j)^2 over all places j of an axis, for every i; one pass over memory per j."""
    squared = squared.movedim(axis, -1)
    places = torch.arange(side, dtype=squared.dtype, device=squared.device)
    nearest = squared[..., :1] + places.square()
    for j in range(1, side):
        nearest = torch.minimum(nearest, squared[..., j:j + 1] + (places - j).square())
    return nearest.movedim(-1, axis)


def _list_number(lengths: Tensor) -> Tensor:
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths.flatten())
