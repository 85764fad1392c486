"""Rotary tables of another code base's attention, made once for all layers of a forward pass."""

import torch
from torch import Tensor

from ..nn.last_made import LastMade
from ..nn.rotary import axis_widths, grid_positions, rotary_table


class RotaryTables(LastMade):
    """The table [B * N, 2, R] of the last call: layers of one forward pass ask for the same one."""

    def of_grid(self, num_samples: int, grid: tuple[int, ...], ids: Tensor | None, head_dim: int, device: torch.device, *,
                pairing: str, angle_dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens at `ids` [B, N] int64 (all of the grid, where None) of a row-major grid; widths of the official models."""
        def make() -> Tensor:
            positions = grid_positions(grid, None if ids is None else ids.reshape(-1), device)
            table = rotary_table(positions, axis_widths(head_dim, len(grid)), pairing, angle_dtype=angle_dtype)
            return table if ids is not None else table.repeat(num_samples, 1, 1)

        return self.get((num_samples, grid, head_dim, device, pairing, angle_dtype), ids, make)
