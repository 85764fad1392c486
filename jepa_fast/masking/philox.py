"""Philox4x32-10 in plain Python: random numbers that depend on a counter and a seed, and on nothing drawn before."""


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Four random 32-bit words for a counter of four 32-bit words and a 64-bit seed.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (product1 >> 32) ^ c1 ^ key0, product1 & 0xFFFFFFFF
        c2, c3 = (product0 >> 32) ^ c3 ^ key1, product0 & 0xFFFFFFFF
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def unit(word: int) -> float:
    """A word as a number in [0, 1), on the same 2^24 steps as `torch.rand`."""
    return (word >> 8) * 2.0**-24


def below(word: int, n: int) -> int:
    """A word as an integer in [0, n)."""
    return (word * n) >> 32
