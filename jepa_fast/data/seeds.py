"""One number from several: how every draw of the data room is keyed."""

import torch

_MASK = (1 << 64) - 1


def mix_seed(*keys: int) -> int:
    """A seed in [0, 2**63) from integers of any size and sign; the order of the keys matters.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over the keys in turn. A CPU `torch.Generator` uses the low 32 bits.
    """
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_for(*keys: int) -> torch.Generator:
    """A CPU generator seeded by `mix_seed(*keys)`; the global generators are never touched."""
    return torch.Generator().manual_seed(mix_seed(*keys))
