"""Fixed sine-cosine position tables, computed in float64 as the official code does."""

import math
from typing import Literal

import torch
from torch import Tensor


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """positions [N] -> [N, dim] float64: sines, then cosines, of positions * 10000^(-i / (dim / 2))."""
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, grid: tuple[int, int], *, first: Literal["column", "row"] = "column") -> Tensor:
    """[rows * columns, dim] float64, row-major: one half of dim from the column, the other from the row.

    `first` says which half comes first: the column's in I-JEPA (arXiv:2301.08243, official code), the row's in V-JEPA.
    """
    row, column = _coordinates(grid)
    order = (column, row) if first == "column" else (row, column)
    return torch.cat([sincos_1d(dim // 2, positions) for positions in order], dim=1)


def sincos_3d(dim: int, grid: tuple[int, int, int], *, is_uniform: bool = True) -> Tensor:
    """[times * rows * columns, dim] float64, row-major: parts from time, row and column, as V-JEPA's official code.

    is_uniform: each part has 2 ceil(dim / 6) dimensions and the whole is cut to dim, at the cost of the last columns'
    frequencies (the official `uniform_power`); else dim / 2 for time and dim / 4 each for row and column.
    """
    widths = (2 * math.ceil(dim / 6),) * 3 if is_uniform else (dim // 2, dim // 4, dim // 4)
    parts = [sincos_1d(width, positions) for width, positions in zip(widths, _coordinates(grid), strict=True)]
    return torch.cat(parts, dim=1)[:, :dim]


def _coordinates(grid: tuple[int, ...]) -> list[Tensor]:
    """The coordinate of every token along each axis, [N] each, row-major."""
    return [axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij")]
