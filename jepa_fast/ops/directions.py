"""Random unit vectors, the slices of SIGReg: a function of (seed, step), the same on every rank."""

import torch
from torch import Tensor

from ..reference import directions as reference
from ._backends import compiled, cuda, triton
from ._define import define

RNGS = ("philox", "torch")


def _directions_native(raw, step, seed, dim, num_slices, rng):
    out = torch.empty(dim, num_slices, dtype=torch.float32, device=step.device)
    raw.directions(step, seed, out)
    return out


def _philox_only(step, seed, dim, num_slices, rng):
    return None if rng == "philox" else f"rng {rng!r}"


define("directions(Tensor step, int seed, SymInt dim, SymInt num_slices, str rng) -> Tensor",
       plain=reference.directions,
       cpp=compiled("directions", call=_directions_native, supports=_philox_only),
       cuda=cuda("directions", call=_directions_native, supports=_philox_only),
       triton=triton("directions", supports=_philox_only))


@torch.library.register_fake("jepa_fast::directions")
def _(step, seed, dim, num_slices, rng):
    return torch.empty(dim, num_slices, dtype=torch.float32, device=step.device)


def directions(seed: int, step: int | Tensor, dim: int, num_slices: int, rng: str = "philox",
               device: torch.device | str | None = None) -> Tensor:
    """Random directions [dim, num_slices] float32, columns of norm 1; a function of (seed, step) alone.

    rng "philox": counter-based; equal on every rank, device and thread count, but for a last bit once in a million.
    `step` may be a 0-dim int64 tensor and is not read on the host. seed in [0, 2^63).
    rng "torch": bit-equal to the official code, torch.randn of a generator seeded with `seed + step` (official: seed
    0); reads `step` on the host, and its numbers depend on the kind of device.
    device: where an int `step` is put; a tensor stays where it is.
    """
    if rng not in RNGS:
        raise ValueError(f"rng must be one of {', '.join(RNGS)}, got {rng!r}")
    if dim < 1 or num_slices < 1:
        raise ValueError(f"dim and num_slices must be at least 1, got {dim} and {num_slices}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    if step.dim() != 0 or step.dtype != torch.int64:
        raise ValueError(f"step must be an int or a 0-dim int64 tensor, got {list(step.shape)} {step.dtype}")
    return torch.ops.jepa_fast.directions(step, seed, dim, num_slices, rng)
