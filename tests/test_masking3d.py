"""Mask samplers of video: bit-equal to the official ones, C++ equal to Python, pure functions, and they always end."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from golden_data import config as golden_settings
from golden_data import golden
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jepa_fast.masking import (
    BlockMask,
    Masks,
    MultiBlock,
    MultiBlock3D,
    MultiBlockStream,
    RandomTube,
    clip_grid,
    multiblock,
    multiblock3d,
    multiblock3d_plain,
)
from jepa_fast.masking.philox import philox

COMPILED = multiblock._masking
NEEDS_COMPILED = pytest.mark.skipif(COMPILED is None, reason="jepa_fast._masking is not built; the plain sampler is slow")
FUZZ = settings(max_examples=200, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
CASES = {(file, name): case for file in ("vjepa_masks", "vjepa2_masks")
         for name, case in golden_settings(file)["cases"].items() if "ratio" not in case["masks"][0]}
DEFAULT = MultiBlock3D().masks
IMAGE = (BlockMask(num_blocks=10),)   # images in V-JEPA 2.1


@pytest.fixture(params=["compiled", "plain"])
def backend(request, monkeypatch):
    if request.param == "compiled" and COMPILED is None:
        pytest.skip("jepa_fast._masking is not built")
    monkeypatch.setattr(multiblock, "_masking", COMPILED if request.param == "compiled" else None)
    return request.param


def golden_config(case: dict, **fields) -> MultiBlock3D:
    masks = tuple(BlockMask(**{key: tuple(value) if isinstance(value, list) else value for key, value in mask.items()})
                  for mask in case["masks"])
    return MultiBlock3D(masks=masks, **fields)


def expect_lists(masks: Masks, tensors: dict, prefix: str) -> None:
    for kind, lists in (("context", masks.context_lists()), ("target", masks.target_lists())):
        assert len(lists) == sum(key.startswith(f"{prefix}/{kind}") for key in tensors)
        for i, tokens in enumerate(lists):
            assert torch.equal(tokens, tensors[f"{prefix}/{kind}{i}"])


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
    return (a.num_tokens, a.is_paired) == (b.num_tokens, b.is_paired) and \
        all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


def check_invariants(masks: Masks, config: MultiBlock3D, grid: tuple[int, int, int], batch_size: int) -> None:
    N = math.prod(grid)
    assert masks.is_paired and masks.num_tokens == N
    assert masks.context_lengths.shape == masks.target_lengths.shape == (len(config.masks), batch_size)
    lists = split(masks)
    for i, mask in enumerate(config.masks):
        for b in range(batch_size):
            context, target = lists["context", i, b], lists["target", i, b]
            for tokens in (context, target):
                assert tokens and tokens == sorted(set(tokens)) and tokens[0] >= 0 and tokens[-1] < N
            assert not set(context) & set(target)
            if config.mode == "unbiased" or mask.full_complement or mask.pred_full_complement:
                assert len(context) + len(target) == N
            drawn = target if mask.inv_block else context
            if not mask.pred_full_complement:
                assert drawn[-1] < max(1, int(grid[0] * mask.max_temporal_keep)) * grid[1] * grid[2]
                assert mask.max_keep is None or len(drawn) <= mask.max_keep


# ---- official


@pytest.mark.parametrize("file, name", [key for key, case in CASES.items() if len(case.get("frames", [0])) == 1])
def test_stream_equals_official_collator(file, name, backend):
    case = CASES[file, name]
    stream = MultiBlockStream(golden_config(case), tuple(case["grid"]), seed=case["seed"],
                              counter=case["counter_starts_at"])
    for call in (1, 2, 3):
        masks = stream.next(case["batch"])
        expect_lists(masks, golden(file), f"{name}/call{call}")


def test_streams_of_several_clip_lengths_take_turns(backend):
    case = CASES["vjepa2_masks", "lengths_8x8x12_b5"]
    config, draws = golden_config(case), 0
    batches = [len(range(i, case["batch"], 2)) for i in (0, 1)]   # every second clip is short
    for call in (1, 2, 3):
        for group, (frames, batch_size) in enumerate(zip(case["frames"], batches, strict=True)):
            grid = clip_grid(frames, 8, 12, patch_size=1)
            stream = MultiBlockStream(config, grid, seed=case["seed"], counter=case["counter_starts_at"] + call - 1,
                                      draws=draws)
            masks, draws = stream.next(batch_size), stream.draws
            expect_lists(masks, golden("vjepa2_masks"), f"lengths_8x8x12_b5/call{call}/group{group}")


def test_random_tubes_equal_official_collator():
    case = golden_settings("vjepa_masks")["cases"]["tube_4x8x8_b3"]
    generator = np.random.RandomState(case["seed"])
    config = RandomTube(ratios=tuple(mask["ratio"] for mask in case["masks"]))
    for call in (1, 2, 3):
        masks = config.next_official(tuple(case["grid"]), case["batch"], generator)
        expect_lists(masks, golden("vjepa_masks"), f"tube_4x8x8_b3/call{call}")


def test_every_group_of_a_sample_is_a_stream(backend):
    config, grid = MultiBlock3D(mask_group_size=4), (8, 14, 14)
    whole = split(config.sample(grid, 8, seed=9, step=20))
    for group in (0, 1):
        stream = MultiBlockStream(config, grid, seed=philox((group, 20, 0, 0), 9)[0], counter=20)
        assert all(tokens == whole[kind, i, 4 * group + b] for (kind, i, b), tokens in split(stream.next(4)).items())


@NEEDS_COMPILED
@pytest.mark.parametrize("grid, group, masks, kept, untrimmed", [   # published means over 400 batches
    ((8, 14, 14), 24, DEFAULT, [(365, 752), (99, 1102)], [(583, 985), (294, 1274)]),
    ((8, 16, 16), 24, DEFAULT, [(501, 973), (131, 1439)], [(779, 1269), (388, 1660)]),
    ((8, 16, 16), 48, DEFAULT, [(455, 926), (111, 1432)], None),
    ((32, 16, 16), 12, DEFAULT, [(2184, 4085), (650, 5848)], [(3115, 5077), (1556, 6636)]),
    ((1, 16, 16), 36, IMAGE, [(45, 133)], [(82, 174)]), ((1, 16, 16), 72, IMAGE, [(42, 128)], None)])
def test_published_token_counts(grid, group, masks, kept, untrimmed):
    for group_size, expected in ((group, kept), (1, untrimmed)):
        config = MultiBlock3D(masks=masks, mask_group_size=group_size)
        drawn = [config.sample(grid, group, seed=0, step=step) for step in range(200 if expected else 0)]
        for i, published in enumerate(expected or ()):
            for kind, mean in zip(("context", "target"), published, strict=True):
                counts = torch.stack([getattr(m, f"{kind}_lengths")[i].double().mean() for m in drawn])
                # four standard errors of the difference to a mean of 400, and its rounding
                error = 4 * float(counts.std()) * (1 / 200 + 1 / 400) ** 0.5 + 1
                assert abs(float(counts.mean()) - mean) < error, (i, kind, float(counts.mean()), mean, error)


@NEEDS_COMPILED
def test_official_trimming_drops_the_later_time_steps():
    masks = MultiBlock3D().sample((8, 14, 14), 240, seed=0, step=0)
    contexts = masks.context_idx.split(masks.context_lengths.sum(1).tolist())
    share = torch.bincount(contexts[1] // 196, minlength=8) / len(contexts[1])
    assert share[0] > 0.25 and share[7] < 0.05


# ---- any rank


@pytest.mark.parametrize("mode, group", [("official", 1), ("official", 5), ("official", 16), ("unbiased", 5)])
def test_ranks_and_micro_batches_give_the_same_masks(mode, group, backend):
    config = MultiBlock3D(mode=mode, mask_group_size=group)
    grid = (4, 8, 10)
    whole = split(config.sample(grid, 12, seed=7, step=11))
    for parts in ([6, 6], [4, 4, 4], [5, 1, 6]):
        first = 0
        for size in parts:
            part = split(config.sample(grid, size, seed=7, step=11, first_sample=first))
            assert all(tokens == whole[kind, i, b + first] for (kind, i, b), tokens in part.items())
            first += size
    other = [config.sample(grid, 12, seed=seed, step=step) for seed, step in ((8, 11), (7, 12), (7 + 2**32, 11))]
    assert not any(split(masks) == whole for masks in other)


def test_random_tubes_are_functions_of_the_sample():
    config, grid = RandomTube(ratios=(0.9, 0.5)), (3, 6, 7)
    whole = config.sample(grid, 6, seed=1, step=2)
    lists = split(whole)
    part = split(config.sample(grid, 2, seed=1, step=2, first_sample=3))
    assert all(tokens == lists[kind, i, b + 3] for (kind, i, b), tokens in part.items())
    assert whole.context_lengths.tolist() == [[12] * 6, [63] * 6] and whole.target_lengths.tolist() == [[114] * 6, [63] * 6]
    for i in (0, 1):
        for b in range(6):
            context, target = lists["context", i, b], lists["target", i, b]
            assert sorted(context + target) == list(range(126))
            frame = [token for token in context if token < 42]
            assert context == [t * 42 + token for t in range(3) for token in frame]
    assert len({tuple(lists["context", 1, b]) for b in range(6)}) == 6


# ---- unbiased


@NEEDS_COMPILED
def test_unbiased_positions_and_sizes_are_uniform():
    # 3x3 blocks of 2 time steps on an 8x8 grid with 6: 5 * 6 * 6 places, every one as likely
    mask = BlockMask(num_blocks=1, spatial_scale=(0.15, 0.15), aspect_ratio=(1.0, 1.0), temporal_scale=(0.34, 0.34))
    masks = MultiBlock3D(masks=(mask,), mode="unbiased").sample((6, 8, 8), 20_000, seed=0, step=0)
    assert masks.target_lengths.eq(2 * 9).all()
    first = masks.target_idx.view(-1, 18)[:, 0]
    assert (first // 64).max() == 4 and (first // 8 % 8).max() == 5 and (first % 8).max() == 5
    counts = torch.bincount(first // 64 * 36 + first // 8 % 8 * 6 + first % 8, minlength=180).double()
    expected = len(first) / 180
    # chi-square with 179 degrees of freedom exceeds 259 once in 10,000 seeds
    assert ((counts - expected) ** 2 / expected).sum() < 259

    ranges = BlockMask(num_blocks=1, spatial_scale=(0.1, 0.5), aspect_ratio=(0.8, 1.2), temporal_scale=(0.2, 0.8))
    masks = MultiBlock3D(masks=(ranges,), mode="unbiased").sample((40, 32, 32), 3000, seed=0, step=0)
    sizes = []
    for tokens in masks.target_idx.split(masks.target_lengths[0].tolist()):
        duration, height = (int(tokens[-1] // n - tokens[0] // n) + 1 for n in (1024, 32))
        height -= (duration - 1) * 32
        sizes.append((duration / 40, len(tokens) / duration / 1024, height**2 * duration / len(tokens)))
    sizes = np.array(sizes).T
    assert np.allclose(sizes.mean(1), (0.5 - 0.0125, 0.3, 1.0), atol=0.015)   # a duration is rounded down
    assert np.abs(np.corrcoef(sizes) - np.eye(3)).max() < 4 / 3000**0.5


@pytest.mark.parametrize("mode", ["official", "unbiased"])
@pytest.mark.parametrize("mask", [
    BlockMask(num_blocks=3, spatial_scale=(0.2, 0.5), temporal_scale=(0.3, 0.9)), BlockMask(max_temporal_keep=0.5)])
def test_context_is_what_no_block_covers(mask, mode, backend):
    masks = MultiBlock3D(masks=(mask,), mode=mode, mask_group_size=1).sample((6, 8, 8), 10, seed=3, step=4)
    check_invariants(masks, MultiBlock3D(masks=(mask,), mode="unbiased"), (6, 8, 8), 10)


@pytest.mark.parametrize("grid", [(1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 2), (1, 1, 7), (5, 1, 1), (3, 2, 3)], ids=str)
@pytest.mark.parametrize("scale", [(0.15, 0.15), (0.7, 0.7), (1.0, 1.0)], ids=str)
def test_unbiased_ends_on_tiny_grids(grid, scale, backend):
    for num_blocks, temporal_scale in ((1, (1.0, 1.0)), (8, (0.2, 1.0)), (40, (1.0, 1.0))):
        mask = BlockMask(num_blocks=num_blocks, spatial_scale=scale, temporal_scale=temporal_scale)
        config = MultiBlock3D(masks=(mask, dataclasses.replace(mask, inv_block=True)), mode="unbiased")
        check_invariants(config.sample(grid, 8, seed=2, step=3), config, grid, 8)


@pytest.mark.parametrize("grid, keep", [((4, 3, 3), 0.3), ((9, 1, 2), 0.25), ((4, 2, 1), 0.3), ((6, 1, 1), 0.5)], ids=str)
def test_unbiased_context_in_the_first_time_steps_is_never_empty(grid, keep, backend):
    mask = BlockMask(num_blocks=20, spatial_scale=(1.0, 1.0), temporal_scale=(0.2, 1.0), max_temporal_keep=keep)
    config = MultiBlock3D(masks=(mask,), mode="unbiased")
    check_invariants(config.sample(grid, 12, seed=0, step=0), config, grid, 12)


# ---- fuzz: both implementations on random settings


@st.composite
def problems(draw, mode):
    def interval(low, high):
        return tuple(sorted((draw(st.floats(low, high)), draw(st.floats(low, high)))))

    def mask():
        complement = draw(st.sampled_from(["neither", "full_complement", "pred_full_complement"]))
        return BlockMask(
            num_blocks=draw(st.integers(1, 9)), spatial_scale=interval(0.05, 1.0), temporal_scale=interval(0.1, 1.0),
            aspect_ratio=interval(0.3, 3.0), max_temporal_keep=draw(st.sampled_from([1.0, 1.0, 0.75, 0.3])),
            max_keep=draw(st.none() | st.integers(1, 60)) if mode == "official" else None,
            inv_block=draw(st.booleans()), **({} if complement == "neither" else {complement: True}))
    config = MultiBlock3D(mode=mode, masks=tuple(mask() for _ in range(draw(st.integers(1, 3)))),
                          mask_group_size=draw(st.integers(1, 5)))
    grid = tuple(draw(st.integers(1, high)) for high in (6, 9, 9))
    call = {"seed": draw(st.integers(0, 2**63 - 1)), "step": draw(st.integers(0, 2**32 - 1)),
            "first_sample": draw(st.integers(0, 20))}
    try:
        config.check_grid(grid)
    except ValueError:
        assume(False)
    return config, grid, draw(st.integers(1, 6)), call


def both(config, grid, batch_size, call):
    masks = config.sample(grid, batch_size, **call)
    check_invariants(masks, config, grid, batch_size)
    if COMPILED is not None:
        plain = getattr(multiblock3d_plain, f"sample_{config.mode}")
        assert equal(masks, plain(config, grid, batch_size=batch_size, **call))


@FUZZ
@given(problems("unbiased"))
def test_fuzz_unbiased(problem):
    both(*problem)


@FUZZ
@given(problems("official"))
def test_fuzz_official(problem):
    try:
        both(*problem)
    except ValueError as error:
        assert "never leaves a context" in str(error)


# ---- packing


def pack_by_loop(masks: Masks, num_mask_tokens: int) -> dict:
    """The rows of the predictor, sequence by sequence: pair, then sample."""
    (G, B), N = masks.context_lengths.shape, masks.num_tokens
    lists = split(masks)
    order = [(g, b) for g in range(G) for b in range(B)]
    mask_row = sum(len(lists["context", g, b]) for g, b in order)
    out = {name: [] for name in ("context_idx", "target_idx", "predictor_idx", "predictor_position", "prediction_idx",
                                 "prediction_target_idx")}
    cu_seqlens, context_rows, lengths = [0], 0, []
    for g, b in order:
        context, target = lists["context", g, b], lists["target", g, b]
        out["context_idx"] += [b * N + token for token in context]
        out["target_idx"] += [b * N + token for token in target]
        out["predictor_idx"] += list(range(context_rows, context_rows + len(context)))
        out["prediction_idx"] += [len(out["predictor_idx"]) + i for i in range(len(target))]
        out["predictor_idx"] += [mask_row + g % num_mask_tokens] * len(target)
        out["predictor_position"] += context + target
        context_rows += len(context)
        cu_seqlens.append(len(out["predictor_idx"]))
        lengths.append(len(target))
    out["prediction_target_idx"] = out["target_idx"]   # every target is predicted once
    return out | {"predictor_cu_seqlens": cu_seqlens, "predictor_max_seqlen": max(np.diff(cu_seqlens)),
                  "prediction_cu_seqlens": [0, *np.cumsum(lengths)], "prediction_max_seqlen": max(lengths),
                  "prediction_lengths": lengths, "num_contexts": G, "num_targets": G, "batch_size": B}


@pytest.mark.parametrize("config, num_mask_tokens", [
    (MultiBlock3D(mask_group_size=2), 1), (MultiBlock3D(mask_group_size=3), 2), (MultiBlock3D(mode="unbiased"), 2),
    (MultiBlock3D(mode="unbiased", masks=(*DEFAULT, BlockMask(num_blocks=4))), 2), (MultiBlock3D(masks=IMAGE), 1),
    (RandomTube(ratios=(0.9, 0.7)), 2)])
def test_pack_equals_loop(config, num_mask_tokens):
    masks = config.sample((4, 8, 10), 5, seed=1, step=2)
    packed, expected = masks.pack(num_mask_tokens=num_mask_tokens), pack_by_loop(masks, num_mask_tokens)
    for name, value in expected.items():
        ours = getattr(packed, name)
        if name == "prediction_lengths" and len(set(value)) == 1:
            value = None
        assert (ours.tolist() if isinstance(ours, torch.Tensor) else ours) == value, name
    # one list of contexts per sample and mask, all in one batch
    assert len(packed.context_cu_seqlens) == packed.num_contexts * 5 + 1
    assert packed.to("meta").predictor_idx.is_meta


def test_one_mask_packs_like_an_image():
    masks = MultiBlock3D(masks=IMAGE).sample((1, 14, 14), 6, seed=0, step=0)
    image, clip = (vars(dataclasses.replace(masks, is_paired=is_paired).pack()) for is_paired in (False, True))
    for name, value in image.items():
        assert torch.equal(value, clip[name]) if isinstance(value, torch.Tensor) else value == clip[name], name


def test_mask_tokens_of_images_follow_the_target_list():
    masks = MultiBlock(num_contexts=2, mode="unbiased").sample((10, 10), 3, seed=0, step=0)
    one, three = masks.pack(), masks.pack(num_mask_tokens=3)
    number = three.predictor_idx - one.predictor_idx
    sequence = torch.arange(4 * 2 * 3).repeat_interleave(one.prediction_lengths)
    assert torch.equal(number[one.prediction_idx], sequence // 6 % 3)
    assert number.sum() == number[one.prediction_idx].sum()


def test_pairs_must_match():
    context = [torch.tensor([[0], [1]])]
    with pytest.raises(ValueError, match="must hold as many lists to be paired, got 1 and 2"):
        Masks.from_lists(context, context * 2, 4, is_paired=True)
    assert pickle.loads(pickle.dumps(Masks.from_lists(context, context, 4, is_paired=True))).is_paired


# ---- bad input


@pytest.mark.parametrize("fields, text", [
    ({"num_blocks": 0}, r"num_blocks must be in \[1, 32768\], got 0"), ({"max_keep": 0}, "max_keep must be in"),
    ({"spatial_scale": (0.2, 1.1)}, "spatial_scale must be .low, high. with 0 < low <= high <= 1, got .0.2, 1.1."),
    ({"temporal_scale": (0.0, 1.0)}, "temporal_scale must be"), ({"aspect_ratio": 1.0}, "aspect_ratio must be"),
    ({"max_temporal_keep": 0.0}, r"max_temporal_keep must be in \(0, 1\], got 0.0"),
    ({"full_complement": True, "pred_full_complement": True}, "exclude each other")])
def test_bad_masks(fields, text):
    with pytest.raises(ValueError, match=text):
        BlockMask(**fields)


@pytest.mark.parametrize("fields, text", [
    ({"masks": ()}, "masks must be a tuple of one BlockMask or more, got ()"), ({"masks": (3,)}, "masks must be a tuple"),
    ({"mask_group_size": 0}, "mask_group_size must be in"), ({"mode": "fast"}, "mode must be .* got 'fast'"),
    ({"mode": "unbiased", "masks": (BlockMask(), BlockMask(max_keep=9))}, r"masks\[1\].max_keep must be None .* got 9")])
def test_bad_settings(fields, text):
    with pytest.raises(ValueError, match=text):
        MultiBlock3D(**fields)


@pytest.mark.parametrize("mode, grid, masks, text", [
    ("official", (8, 2, 2), DEFAULT, r"grid 8x2x2 is too small: a block of masks\[0\] can be 8x0x0, without a token"),
    ("official", (8, 3, 3), (BlockMask(spatial_scale=(0.5, 0.95)),), "can cover all of it and leave no context"),
    ("unbiased", (1, 1, 1), DEFAULT, r"grid 1x1x1 is too small: masks\[0\] needs two tokens"),
    ("unbiased", (4, 1, 1), (BlockMask(max_temporal_keep=0.25),), "needs two tokens in the time steps a context may use"),
    ("unbiased", (8, 8), DEFAULT, r"grid must be \(time steps, rows, columns\)"),
    ("unbiased", (0, 8, 8), DEFAULT, "grid must be"), ("unbiased", (8.0, 8, 8), DEFAULT, "grid must be")])
def test_grids_that_do_not_fit(mode, grid, masks, text, backend):
    for call in (MultiBlock3D(mode=mode, masks=masks).check_grid,
                 lambda grid: MultiBlock3D(mode=mode, masks=masks).sample(grid, 2, seed=0, step=0)):
        with pytest.raises(ValueError, match=text) as error:
            call(grid)
        assert "\n" not in str(error.value)


def test_full_blocks_are_found_exactly():
    # 9 x 9 tokens are full from a scale of 0.8921 on: round(sqrt(73)) = 9, and only near aspect 1
    for scale, aspect, is_full in (((0.1, 0.95), (0.5, 2.0), True), ((0.1, 0.89), (0.5, 2.0), False),
                                   ((0.1, 0.91), (0.5, 0.9), False), ((0.91, 0.91), (0.99, 1.5), True)):
        mask = BlockMask(spatial_scale=scale, aspect_ratio=aspect)
        assert multiblock3d.find_full_block(mask, (4, 9, 9)) == is_full
        # by trying many
        u = (1.0 - 2.0**-24,) * 2
        tried = any(multiblock3d_plain.block_size(mask, (4, 9, 9), (*u, i / 4096)) == (4, 9, 9) for i in range(4096))
        assert tried == is_full
    mask = BlockMask(spatial_scale=(1.0, 1.0), temporal_scale=(0.5, 0.99), aspect_ratio=(1.0, 1.0))
    assert not multiblock3d.find_full_block(mask, (4, 9, 9))


def test_blocks_that_cover_everything_end_with_an_error(backend, monkeypatch):
    if backend == "plain":
        monkeypatch.setattr(multiblock3d_plain, "MAX_DRAWS", 3)
    config = MultiBlock3D(masks=(BlockMask(num_blocks=64, spatial_scale=(0.7, 0.7)),), mask_group_size=1)
    for call in (lambda: config.sample((1, 6, 6), 1, seed=0, step=0),
                 lambda: MultiBlockStream(config, (1, 6, 6), seed=0).next(1)):
        with pytest.raises(ValueError, match=r"masks\[0\] never leaves a context: 64 blocks covered the grid") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, text", [
    ({"batch_size": 0}, "batch_size must be in"), ({"seed": -1}, "seed must be"), ({"step": 2**32}, "step must be"),
    ({"step": 1.0}, "step must be an integer"), ({"first_sample": -1}, "first_sample must be")], ids=str)
@pytest.mark.parametrize("config", [MultiBlock3D(), RandomTube()], ids=["multiblock3d", "random_tube"])
def test_bad_calls(config, change, text):
    call = {"batch_size": 4, "seed": 0, "step": 0} | change
    with pytest.raises((ValueError, TypeError), match=text):
        config.sample((8, 8, 8), call.pop("batch_size"), **call)


def test_clip_grid():
    assert clip_grid(16, 224, 224) == (8, 14, 14) and clip_grid(64, 384, 256) == (32, 24, 16)
    assert clip_grid(1, 256, 256, tubelet_size=1) == (1, 16, 16)
    with pytest.raises(ValueError, match="num_frames must be divisible by tubelet_size = 2, got 15"):
        clip_grid(15, 224, 224)
    with pytest.raises(ValueError, match="width must be divisible by patch_size = 16, got 230"):
        clip_grid(16, 224, 230)
    with pytest.raises(TypeError, match="num_frames must be an integer, got 16.0"):
        clip_grid(16.0, 224, 224)


@pytest.mark.parametrize("fields, grid, text", [
    ({"ratios": ()}, (4, 8, 8), "ratios must be"), ({"ratios": (1.0,)}, (4, 8, 8), "ratios must be"),
    ({}, (4, 3, 3), "grid 4x3x3 is too small: ratio 0.9 of 9 patches leaves 0 as context"),
    ({}, (8, 8), "grid must be")])
def test_bad_tubes(fields, grid, text):
    with pytest.raises(ValueError, match=text):
        RandomTube(**fields).sample(grid, 2, seed=0, step=0)
