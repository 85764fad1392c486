"""Directions: published numbers of the generator, the same everywhere, what the official code draws."""

import pytest
import torch

from jepa_fast import ops
from jepa_fast.reference import directions as reference
from jepa_fast.testing import OPS

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, result
KNOWN = [
    ((0x00000000, 0x00000000, 0x00000000, 0x00000000), (0x00000000, 0x00000000),
     (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF),
     (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
HAS_CPP = ops.COMPILED_MISSING is None
BACKENDS = OPS["directions"].backends()


def signed(high: int, low: int) -> int:
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


def cpp_words(first: int, seed: int, step: int, count: int) -> torch.Tensor:
    words = torch.empty(count, 4, dtype=torch.int64)
    torch.ops.jepa_fast_C.philox_words(torch.tensor(step), seed, first, words)
    return words


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_known_answers(counter, key, expected):
    block, seed, step = (signed(counter[1], counter[0]), signed(counter[2], key[0]), signed(counter[3], key[1]))
    words = reference.philox(torch.tensor([block]), seed, torch.tensor(step))
    assert tuple(int(word) & 0xFFFFFFFF for word in words) == expected
    if HAS_CPP:
        assert tuple(cpp_words(block, seed, step, 1)[0].tolist()) == expected


@pytest.mark.skipif(not HAS_CPP, reason=str(ops.COMPILED_MISSING))
@pytest.mark.parametrize("first", [0, 5, 2**32 - 3, 2**40])  # also across the carry into the high word
def test_philox_words_are_bit_equal(first):
    seed, step = 2**45 + 17, 2**33 + 5
    words = torch.stack(reference.philox(first + torch.arange(53), seed, torch.tensor(step)), 1)
    assert torch.equal(cpp_words(first, seed, step, 53), words)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "plain"])
def test_backends_agree_to_the_last_bit(backend):
    drawn = {}
    for name in ("plain", backend):
        with ops.use_backend(name):
            drawn[name] = ops.directions(123, 456, 300, 700)
    difference = (drawn[backend] - drawn["plain"]).abs() / drawn["plain"].abs()
    assert difference.max() <= 2**-22 and (difference > 0).sum() <= 20  # both rounded from float64


def test_numbers_do_not_depend_on_threads_or_on_how_the_step_is_given():
    threads, expected = torch.get_num_threads(), ops.directions(1, torch.tensor(7), 65, 129)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(ops.directions(1, 7, 65, 129), expected)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["plain", "cpp"] if HAS_CPP else ["plain"])
def test_directions_are_uniform_on_the_sphere(backend):
    with ops.use_backend(backend):
        a = ops.directions(0, 0, 8, 50_000).double()
    assert (a.norm(dim=0) - 1).abs().max() < 2e-7
    assert a.mean(1).abs().max() < 5 / (8 * 50_000) ** 0.5
    assert (a @ a.T / 50_000 - torch.eye(8) / 8).abs().max() < 5 * (2 / 8 / 8 / 50_000) ** 0.5
    # E u^4 = 3 / (D (D + 2)) on the sphere
    assert (a**4).mean().item() == pytest.approx(3 / 80, rel=0.01)
    assert (a > 0).double().mean(1).sub(0.5).abs().max() < 5 * 0.5 / 50_000**0.5


def test_seeds_and_steps_give_other_directions():
    drawn = [ops.directions(seed, step, 4, 9) for seed, step in ((0, 0), (1, 0), (0, 1), (2**32, 0), (0, 2**32))]
    for i, a in enumerate(drawn):
        assert all((a - b).abs().max() > 0.1 for b in drawn[:i])


def test_torch_directions_are_the_official_ones():
    generator = torch.Generator().manual_seed(41)
    normals = torch.randn(12, 30, generator=generator)
    assert torch.equal(ops.directions(0, 41, 12, 30, "torch"), normals / normals.norm(p=2, dim=0))
