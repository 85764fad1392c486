"""Rotary tables of another code base's attention, made once for all layers of a forward pass."""

import weakref

import torch
from torch import Tensor

from ..nn.rotary import axis_widths, grid_positions, rotary_table


class RotaryTables:
    """The table [B * N, 2, R] of the last call: layers of one forward pass ask for the same one."""

    def __init__(self):
        self._last = (None, None, None)  # key, ids, table: one tuple, so that threads never mix two calls

    def of_grid(self, num_samples: int, grid: tuple[int, ...], ids: Tensor | None, head_dim: int, device: torch.device, *,
                pairing: str, stretch: tuple[float, ...] | None = None,
                angle_dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens at `ids` [B, N] int64 (all of the grid, where None) of a row-major grid.

        stretch: what positions are multiplied by, per axis. Widths are those of the official models.
        """
        is_known = ids is None or not ids.is_inference()  # without a version, who knows whether it was written to
        version = ids._version if ids is not None and is_known else None
        key = (num_samples, grid, head_dim, device, pairing, stretch, angle_dtype, version)
        last_key, last_ids, table = self._last
        if is_known and key == last_key and (last_ids() if last_ids else None) is ids:
            return table
        with torch.inference_mode(False), torch.no_grad():  # kept from call to call: of training, too
            index = None if ids is None else ids.reshape(-1)
            positions = grid_positions(grid, index, device)
            if stretch is not None:
                positions = positions * torch.tensor(stretch, device=device)
            table = rotary_table(positions, axis_widths(head_dim, len(grid)), pairing, angle_dtype=angle_dtype)
            table = table if ids is not None else table.repeat(num_samples, 1, 1)
        self._last = (key, None if ids is None else weakref.ref(ids), table)
        return table
