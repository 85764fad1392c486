"""Rotary positions of tokens on a grid, as `varlen_attention` takes them.

Each axis owns n columns of a head, side by side, and frequencies w_i = theta^(-i / (n / 2)), i < n / 2. For columns in
pairs (2i, 2i + 1) of one axis, at position p:

    out[2i] = x[2i] cos(a) - x[2i + 1] sin(a)        out[2i + 1] = x[2i + 1] cos(b) + x[2i] sin(b)

pairing "interleaved": a = b = p w_i, a rotation (V-JEPA 2.1). pairing "tiled": column j has the angle p w_(j mod n / 2),
so that a and b differ, and the map is not a rotation (V-JEPA 2, kept for its weights). Position 0 leaves a token alone.
RoPE: arXiv:2104.09864. On three axes: V-JEPA 2, arXiv:2506.09985.
"""

import torch
from torch import Tensor

PAIRINGS = ("interleaved", "tiled")


def axis_widths(head_dim: int, num_axes: int = 3) -> tuple[int, ...]:
    """Columns of each axis in the official models: 2 ((head_dim // 3) // 2); what remains of a head is not turned."""
    return (2 * (head_dim // num_axes // 2),) * num_axes


def rotary_table(positions: Tensor, widths: tuple[int, ...], pairing: str, theta: float = 10000.0,
                 angle_dtype: torch.dtype = torch.float32) -> Tensor:
    """positions [P, A], whole or not, widths of the A axes -> rotary [P, 2, sum(widths)] float32.

    angle_dtype bfloat16 rounds as the official code does under CUDA autocast: positions, frequencies (in 2.1 also their
    exponents), angles, cosines and sines; 0.03 rad off at position 31. float64 makes a float64 table. Raises ValueError
    for other shapes.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, got {pairing!r}")
    if positions.dim() != 2 or positions.shape[1] != len(widths):
        raise ValueError(f"positions must be [P, {len(widths)}], one per width, got {list(positions.shape)}")
    if any(width < 0 or width % 2 for width in widths):
        raise ValueError(f"widths must be even, got {widths}")
    if angle_dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"angle_dtype must be float32, bfloat16 or float64, got {angle_dtype}")
    angles = torch.cat([_angles(positions[:, axis], width, pairing, theta, angle_dtype)
                        for axis, width in enumerate(widths)], 1)
    out = torch.float64 if angle_dtype == torch.float64 else torch.float32
    sign = torch.arange(angles.shape[1], device=angles.device) % 2 * 2 - 1  # -1, 1, ...; made there, not copied there
    return torch.stack([angles.cos().to(out), angles.sin().to(out) * sign], 1)


def _angles(positions: Tensor, width: int, pairing: str, theta: float, dtype: torch.dtype) -> Tensor:
    """[P, width], the angle of each column."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(width // 2, dtype=wide, device=positions.device) / max(width / 2, 1)
    if pairing == "interleaved":
        exponents = exponents.to(dtype)
    frequencies = 1.0 / theta ** exponents.to(wide)
    angles = positions.to(dtype).unsqueeze(1) * frequencies.to(dtype)
    return angles.repeat_interleave(2, 1) if pairing == "interleaved" else angles.repeat(1, 2)


def grid_positions(grid: tuple[int, ...], index: Tensor | None = None, device: torch.device | str | None = None) -> Tensor:
    """Positions [P, A] float32 of tokens `index` [P] (all, row-major, where None) on a grid of A axes."""
    if index is None:
        index = torch.arange(torch.Size(grid).numel(), device=device)
    columns = []
    for size in reversed(grid):
        columns.append(index % size)
        index = index // size
    return torch.stack(columns[::-1], 1).float()
