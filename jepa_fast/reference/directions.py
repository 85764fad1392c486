"""Random directions: the slices of SIGReg. Columns of normal numbers, divided by their norms.

`philox`: number e of the row-major [dim, num_slices] normals is word e % 4 of the Philox4x32-10 block with

    counter = (e // 4 low, e // 4 high, seed high, step high)     key = (seed low, step low)

(Salmon et al., SC 2011), two words at a time through Box-Muller. A function of (seed, step, position) and of nothing
else, so every rank, device and thread count has the same directions, and the step can stay on the device.

`torch`: what the official code draws, `torch.randn` from a generator seeded with the step
(rbalestr-lab/lejepa, SlicingUnivariateTest).
"""

import math

import torch
from torch import Tensor

SMALLEST_NORM = 1e-30
_WORD = 0xFFFFFFFF


def directions(step: Tensor, seed: int, dim: int, num_slices: int, rng: str) -> Tensor:
    """step 0-dim int64 -> [dim, num_slices] float32 with unit columns."""
    if rng == "torch":
        normals = seeded_normals(step, seed, dim, num_slices)
        # the order of operations of the official code, to the bit
        return normals / normals.norm(p=2, dim=0).clamp_min(SMALLEST_NORM)
    count = dim * num_slices
    block = torch.arange((count + 3) // 4, device=step.device)
    words = philox(block, seed, step)
    a, b = box_muller(words[0], words[1])
    c, d = box_muller(words[2], words[3])
    normals = torch.stack([a, b, c, d], 1).float().flatten()[:count].reshape(dim, num_slices).double()
    return (normals / normals.norm(dim=0).clamp_min(SMALLEST_NORM)).float()


def seeded_normals(step: Tensor, seed: int, dim: int, num_slices: int) -> Tensor:
    """torch.randn seeded with seed + step; reads the step on the host, which stops a GPU."""
    generator = torch.Generator(step.device).manual_seed(seed + int(step))
    return torch.randn(dim, num_slices, generator=generator, device=step.device)


def philox(block: Tensor, seed: int, step: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 of int64 block numbers; four int64 tensors of words in [0, 2^32)."""
    seed = torch.full_like(step, seed)
    return philox4x32((block, block >> 32, seed >> 32, step >> 32), (seed, step))


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds; four words of counter and two of key as the low halves of int64 tensors, and so are the results."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*(word & _WORD for word in counter))
    key0, key1 = (word & _WORD for word in key)
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits, wrapping
        c0, c1 = ((b >> 32) & _WORD) ^ c1 ^ key0, b & _WORD
        c2, c3 = ((a >> 32) & _WORD) ^ c3 ^ key1, a & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two words -> two independent normals, float64. Their top 23 bits, centred in the interval: never 0 or 1."""
    u, v = ((word >> 9).double() * 2**-23 + 2**-24 for word in (a, b))
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return radius * angle.cos(), radius * angle.sin()
