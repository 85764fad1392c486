"""Fixed sine-cosine position tables, computed in float64 as the official code does."""

import torch
from torch import Tensor


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """positions [N] -> [N, dim] float64: sines, then cosines, of positions * 10000^(-i / (dim / 2))."""
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """[rows * columns, dim] float64, row-major: the first half of dim from the column, the second from the row.

    This is I-JEPA's order (arXiv:2301.08243, official code); V-JEPA's image tables have the row first.
    """
    rows, columns = grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sincos_1d(dim // 2, column.flatten()), sincos_1d(dim // 2, row.flatten())], dim=1)
