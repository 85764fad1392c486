"""Mask samplers: bit-equal to the official ones, C++ equal to Python, pure functions, and they always end."""

import dataclasses
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from jepa_fast.masking import Masks, MultiBlock, MultiBlockStream, multiblock, multiblock_plain
from jepa_fast.masking.philox import philox

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["files"]["ijepa_masks.safetensors"]["config"]["cases"]
COMPILED = multiblock._masking
FUZZ = settings(max_examples=300, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(params=["compiled", "plain"])
def backend(request, monkeypatch):
    if request.param == "compiled" and COMPILED is None:
        pytest.skip("jepa_fast._masking is not built")
    monkeypatch.setattr(multiblock, "_masking", COMPILED if request.param == "compiled" else None)
    return request.param


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "ijepa_masks.safetensors")


def golden_config(case: dict) -> MultiBlock:
    return MultiBlock(num_targets=case["npred"], num_contexts=case["nenc"], target_scale=tuple(case["pred_mask_scale"]),
                      context_scale=tuple(case["enc_mask_scale"]), aspect_ratio=tuple(case["aspect_ratio"]),
                      min_keep=case["min_keep"], allow_overlap=case["allow_overlap"], mask_group_size=case["batch"])


def split(masks: Masks) -> dict[tuple[str, int, int], list[int]]:
    """(kind, list, sample) -> token numbers."""
    out = {}
    for kind in ("context", "target"):
        lengths = getattr(masks, f"{kind}_lengths")
        parts = getattr(masks, f"{kind}_idx").split(lengths.flatten().tolist())
        out |= {(kind, i // lengths.shape[1], i % lengths.shape[1]): part.tolist() for i, part in enumerate(parts)}
    return out


def equal(a: Masks, b: Masks) -> bool:
    fields = ("context_idx", "context_lengths", "target_idx", "target_lengths")
    return a.num_tokens == b.num_tokens and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


def check_invariants(masks: Masks, config: MultiBlock, grid: tuple[int, int], batch_size: int) -> None:
    assert masks.context_lengths.shape == (config.num_contexts, batch_size)
    assert masks.target_lengths.shape == (config.num_targets, batch_size)
    lists = split(masks)
    for tokens in lists.values():
        assert tokens and tokens == sorted(set(tokens)) and tokens[0] >= 0 and tokens[-1] < grid[0] * grid[1]
    if config.mode == "unbiased" and not config.allow_overlap:
        for e, m, b in itertools.product(range(config.num_contexts), range(config.num_targets), range(batch_size)):
            assert not set(lists["context", e, b]) & set(lists["target", m, b])
    if config.mode == "official":
        assert all(len(tokens) > config.min_keep for tokens in lists.values())


# ---- random numbers


@pytest.mark.parametrize("counter, seed, words", [   # known answers of Random123
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))])
def test_philox_known_answers(counter, seed, words):
    assert philox(counter, seed) == words
    if COMPILED is not None:
        assert tuple(COMPILED.philox(counter, seed)) == words


@pytest.mark.skipif(COMPILED is None, reason="jepa_fast._masking is not built")
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_compiled_generator_reads_like_torch(seed):
    generator, ours = torch.Generator().manual_seed(seed), COMPILED.PositionStream(seed)
    for n in [1, 2, 7, 13, 256, 2**20] * 200:   # past one refill of the 624 words
        assert ours.integer(n) == int(torch.randint(0, n, (1,), generator=generator))
        assert ours.uniform() == torch.rand(1, generator=generator).item()
    assert ours.draws == 2400


# ---- official


@pytest.mark.parametrize("name", CASES)
def test_stream_equals_official_collator(name, backend, golden):
    case = CASES[name]
    stream = MultiBlockStream(golden_config(case), tuple(case["grid"]), seed=case["seed"],
                              counter=case["counter_starts_at"])
    for call in (1, 2, 3):
        masks = stream.next(case["batch"])
        for kind, lists in (("context", masks.context_lists()), ("target", masks.target_lists())):
            assert len(lists) == case["nenc" if kind == "context" else "npred"]
            for i, tokens in enumerate(lists):
                assert torch.equal(tokens, golden[f"{name}/call{call}/{kind}{i}"].long())


def test_stream_continues_from_counter_and_draws(backend):
    config, grid = MultiBlock(target_scale=(0.3, 0.4)), (8, 8)   # crowded: an irregular number of draws
    stream = MultiBlockStream(config, grid, seed=3)
    for _ in range(3):
        stream.next(32)
    again = MultiBlockStream(config, grid, seed=3, counter=stream.counter, draws=stream.draws)
    assert stream.draws > 3 * 32 * 10
    assert equal(again.next(32), stream.next(32)) and again.draws == stream.draws


def test_sample_uses_the_official_size_of_its_step(backend, golden):
    for step in (50, 51, 52):
        kept = golden[f"blocks_16x16_b128/call{step - 49}/target0"].shape[1]
        masks = MultiBlock(mask_group_size=16).sample((16, 16), 48, seed=9, step=step)
        assert masks.target_lengths.eq(kept).all()
        # three groups, each with its own length
        assert all(len(set(group.tolist())) == 1 for group in masks.context_lengths[0].split(16))
        assert len(set(masks.context_lengths[0].tolist())) > 1


def test_official_never_uses_last_row_and_column_and_drops_lower_rows(backend):
    masks = MultiBlock().sample((16, 16), 128, seed=0, step=50)
    tokens = torch.cat([masks.context_idx, masks.target_idx])
    assert (tokens // 16).max() == 14 and (tokens % 16).max() == 14
    rows = torch.bincount(masks.context_idx // 16, minlength=16)
    assert rows[0] > 4 * rows[12]


@pytest.mark.parametrize("mode", ["official", "unbiased"])
@pytest.mark.parametrize("group", [1, 5, 16, 128])
def test_ranks_and_micro_batches_give_the_same_masks(mode, group, backend):
    config = MultiBlock(mode=mode, mask_group_size=group)
    whole = split(config.sample((14, 14), 24, seed=7, step=11))
    for parts in ([12, 12], [8, 8, 8], [5, 1, 18]):
        first = 0
        for size in parts:
            part = split(config.sample((14, 14), size, seed=7, step=11, first_sample=first))
            assert all(tokens == whole[kind, i, b + first] for (kind, i, b), tokens in part.items())
            first += size
    other = [config.sample((14, 14), 24, seed=seed, step=step) for seed, step in ((8, 11), (7, 12), (7 + 2**32, 11))]
    assert not any(split(masks) == whole for masks in other)


@pytest.mark.parametrize("mode", ["official", "unbiased"])
def test_threads_do_not_disturb_each_other(mode, backend):
    config = MultiBlock(mode=mode, mask_group_size=8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: config.sample((16, 16), 8, seed=1, step=step), range(40)))
    assert all(equal(masks, config.sample((16, 16), 8, seed=1, step=step)) for step, masks in enumerate(found))


@pytest.mark.parametrize("scale, aspect, size", [   # sqrt(25 / 4) = 2.5, sqrt(49 / 4) = 3.5: halves go to even
    ((0.25, 0.25), (0.25, 0.25), (2, 10)), ((0.49, 0.49), (0.25, 0.25), (4, 14)),
    ((0.25, 0.25), (4.0, 4.0), (10, 2)), ((0.49, 0.49), (4.0, 4.0), (14, 4))], ids=str)
def test_sizes_round_half_to_even(scale, aspect, size, backend):
    fields = {"target_scale": scale, "aspect_ratio": aspect, "num_targets": 1, "min_keep": 0}
    for mode, side in (("official", 9), ("unbiased", 10)):
        masks = MultiBlock(mode=mode, **fields).sample((10, 10), 2, seed=0, step=0)
        assert masks.target_lengths.tolist() == [[min(size[0], side) * min(size[1], side)] * 2]


# ---- unbiased


def test_unbiased_reaches_every_token_and_trims_nothing(backend):
    masks = MultiBlock(mode="unbiased", num_contexts=2).sample((12, 14), 200, seed=5, step=0)
    for idx in (masks.context_idx, masks.target_idx):
        assert torch.bincount(idx, minlength=168).min() > 0
    lists = split(masks)
    for b in range(200):
        targets = [set(lists["target", m, b]) for m in range(4)]
        assert all(tokens == box(tokens) for tokens in targets)
        for e in range(2):
            context = set(lists["context", e, b])
            assert context == box(context) - set().union(*targets)


def box(tokens: set[int], columns: int = 14) -> set[int]:
    """All tokens of the smallest rectangle around some."""
    rows, cols = {t // columns for t in tokens}, {t % columns for t in tokens}
    return {r * columns + c for r in range(min(rows), max(rows) + 1) for c in range(min(cols), max(cols) + 1)}


@pytest.mark.skipif(COMPILED is None, reason="jepa_fast._masking is not built; the plain sampler is equal but slow")
def test_unbiased_positions_are_uniform():
    # 7x7 targets on a 16x16 grid: 100 positions; overlap allowed, so that no draw is rejected
    config = MultiBlock(mode="unbiased", target_scale=(0.2, 0.2), aspect_ratio=(1.0, 1.0), allow_overlap=True)
    masks = config.sample((16, 16), 10_000, seed=0, step=0)
    assert masks.target_lengths.eq(49).all()
    first = masks.target_idx.view(-1, 49)[:, 0]
    counts = torch.bincount(first // 16 * 10 + first % 16, minlength=100).double()
    expected = len(first) / 100
    assert len(counts) == 100 and first.max() == 9 * 16 + 9
    # chi-square with 99 degrees of freedom exceeds 161 once in 10,000 seeds
    assert ((counts - expected) ** 2 / expected).sum() < 161


@pytest.mark.skipif(COMPILED is None, reason="jepa_fast._masking is not built; the plain sampler is equal but slow")
def test_unbiased_scale_and_aspect_are_independent():
    config = MultiBlock(mode="unbiased", num_targets=1)
    masks = config.sample((64, 64), 4000, seed=0, step=0)
    sizes = []
    for tokens in masks.target_idx.split(masks.target_lengths[0].tolist()):
        height = int(tokens[-1] // 64 - tokens[0] // 64) + 1
        sizes.append((len(tokens), height * height / len(tokens)))
    area, aspect = np.array(sizes).T
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.06   # four standard errors
    assert abs(area.mean() / 64**2 - 0.175) < 0.002 and abs(aspect.mean() - 1.125) < 0.02


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (2, 1), (1, 7), (3, 3), (2, 9)], ids=str)
@pytest.mark.parametrize("scale", [(0.15, 0.2), (0.9, 1.0), (1.0, 1.0)], ids=str)
def test_unbiased_ends_on_tiny_grids(grid, scale, backend):
    for num_targets, num_contexts in ((1, 1), (4, 2), (40, 1)):
        config = MultiBlock(mode="unbiased", target_scale=scale, num_targets=num_targets, num_contexts=num_contexts)
        check_invariants(config.sample(grid, 8, seed=2, step=3), config, grid, 8)


# ---- fuzz: both implementations on random settings


@st.composite
def problems(draw, mode):
    def interval(low, high):
        return tuple(sorted((draw(st.floats(low, high)), draw(st.floats(low, high)))))
    small = mode == "unbiased"   # settings that the official mode refuses are the interesting ones here
    config = MultiBlock(
        mode=mode, num_targets=draw(st.integers(1, 5)), num_contexts=draw(st.integers(1, 3)),
        target_scale=interval(0.01 if small else 0.15, 1.0 if small else 0.5), context_scale=interval(0.3, 1.0),
        aspect_ratio=interval(0.3, 3.0), min_keep=draw(st.integers(0, 40 if small else 8)),
        allow_overlap=draw(st.booleans()), mask_group_size=draw(st.integers(1, 7)))
    grid = (draw(st.integers(1 if small else 4, 12)), draw(st.integers(2 if small else 4, 12)))
    call = {"seed": draw(st.integers(0, 2**63 - 1)), "step": draw(st.integers(0, 2**32 - 1)),
            "first_sample": draw(st.integers(0, 20))}
    return config, grid, draw(st.integers(1, 9)), call


def both(config, grid, batch_size, call):
    masks = config.sample(grid, batch_size, **call)
    check_invariants(masks, config, grid, batch_size)
    if COMPILED is not None:
        plain = getattr(multiblock_plain, f"sample_{config.mode}")
        assert equal(masks, plain(config, grid, batch_size=batch_size, **call))


@FUZZ
@given(problems("unbiased"))
def test_fuzz_unbiased(problem):
    both(*problem)


@FUZZ
@given(problems("official"))
def test_fuzz_official(problem):
    config, grid, batch_size, call = problem
    try:
        config.check_grid(grid)
    except ValueError:
        assume(False)
    both(config, grid, batch_size, call)


# ---- settings that would never end


@pytest.mark.parametrize("grid, scale, aspect", [   # in the first two, 1 draw in 10,000 gives the smallest block
    ((10, 16), (0.14, 0.23), (0.44, 2.38)), ((7, 13), (0.18, 0.36), (0.35, 1.11)), ((6, 10), (0.15, 0.4), (0.75, 1.5))],
    ids=str)
def test_never_ending_settings_are_found_exactly(grid, scale, aspect):
    smallest = min(smallest_block(grid, scale, aspect, start) for start in range(0, 2**24, 2**21))
    assert multiblock.find_small_block(grid, scale, aspect, smallest - 1) is None
    assert math.prod(multiblock.find_small_block(grid, scale, aspect, smallest)) == smallest


def smallest_block(grid, scale, aspect, start):
    u = np.arange(start, start + 2**21) * 2.0**-24
    kept = np.floor(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height = np.minimum(np.rint(np.sqrt(kept * ratio)), grid[0] - 1)
    return int((height * np.minimum(np.rint(np.sqrt(kept / ratio)), grid[1] - 1)).min())


@pytest.mark.parametrize("grid, pieces", [
    ((2, 2), ["grid 2x2 is too small", "target_scale (0.15, 0.2)", "0x0 = 0 tokens", "min_keep = 10"]),
    ((1, 64), ["grid 1x64", "= 0 tokens"]), ((6, 10), ["grid 6x10", "3x3 = 9 tokens"])], ids=str)
def test_official_refuses_grids_that_never_end(grid, pieces, backend):
    for call in (lambda: MultiBlock().sample(grid, 4, seed=0, step=0),
                 lambda: MultiBlockStream(MultiBlock(), grid, seed=0)):
        with pytest.raises(ValueError) as error:
            call()
        assert all(piece in str(error.value) for piece in pieces) and "\n" not in str(error.value)


@pytest.mark.skipif(COMPILED is None, reason="jepa_fast._masking is not built")
def test_compiled_sampler_never_hangs_on_its_own():
    with pytest.raises(ValueError, match="min_keep = 10"):
        COMPILED.sample_official(multiblock._compiled_settings(MultiBlock(), (2, 2)), 4, 0, 0, 0, 4)


@pytest.mark.parametrize("fields, text", [
    ({"num_targets": 0}, r"num_targets must be in \[1, 65536\], got 0"),
    ({"num_contexts": 1.5}, "num_contexts must be an integer, got 1.5"),
    ({"min_keep": -1}, "min_keep must be in"), ({"mask_group_size": 0}, "mask_group_size must be in"),
    ({"target_scale": (0.2, 0.15)}, "target_scale must be .low, high. with 0 < low <= high <= 1, got .0.2, 0.15."),
    ({"context_scale": (0.5, 1.1)}, "context_scale must be"), ({"aspect_ratio": (0.0, 1.0)}, "aspect_ratio must be"),
    ({"target_scale": [0.1, 0.2]}, "target_scale must be"), ({"mode": "fast"}, "mode must be .* got 'fast'")])
def test_bad_settings(fields, text):
    with pytest.raises((ValueError, TypeError), match=text):
        MultiBlock(**fields)


@pytest.mark.parametrize("change, text", [
    ({"grid": (0, 4)}, "grid must be"), ({"grid": (4,)}, "grid must be"), ({"grid": (1, 1)}, "got 1x1"),
    ({"grid": (4.0, 4)}, "grid must be"), ({"batch_size": 0}, "batch_size must be in"), ({"seed": -1}, "seed must be"),
    ({"step": 2**32}, "step must be"), ({"step": 1.0}, "step must be an integer"),
    ({"first_sample": -1}, "first_sample must be")], ids=str)
def test_bad_calls(change, text, backend):
    call = {"grid": (8, 8), "batch_size": 4, "seed": 0, "step": 0} | change
    with pytest.raises((ValueError, TypeError), match=text):
        MultiBlock(mode="unbiased").sample(call.pop("grid"), call.pop("batch_size"), **call)


def test_stream_wants_the_official_mode():
    with pytest.raises(ValueError, match="config.mode must be"):
        MultiBlockStream(dataclasses.replace(MultiBlock(), mode="unbiased"), (16, 16), seed=0)


# ---- an independent implementation


@pytest.mark.parametrize("grid, options", [
    ((16, 16), {}), ((14, 14), {"nenc": 2, "npred": 3}), ((12, 20), {"allow_overlap": True}),
    ((10, 10), {"pred_mask_scale": (0.3, 0.4), "min_keep": 4})], ids=str)
def test_stream_equals_lightly(grid, options, backend):
    # torchvision for CUDA cannot be imported with a CPU build of torch unless these two operators exist
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        global _library
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    collate = pytest.importorskip("lightly.data.ijepa_collate", reason="lightly is not installed", exc_type=ImportError)
    options = {"nenc": 1, "npred": 4, "min_keep": 10, "pred_mask_scale": (0.15, 0.2), "allow_overlap": False} | options
    collator = collate.IJEPAMaskCollator(input_size=(grid[0] * 16, grid[1] * 16), patch_size=16,
                                         enc_mask_scale=(0.85, 1.0), aspect_ratio=(0.75, 1.5), **options)
    config = MultiBlock(num_targets=options["npred"], num_contexts=options["nenc"], min_keep=options["min_keep"],
                        target_scale=options["pred_mask_scale"], allow_overlap=options["allow_overlap"])
    stream = MultiBlockStream(config, grid, seed=21)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        for _ in range(5):
            _, contexts, targets = collator([torch.zeros(1)] * 12)
            masks = stream.next(12)
            for ours, theirs in ((masks.context_lists(), contexts), (masks.target_lists(), targets)):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
