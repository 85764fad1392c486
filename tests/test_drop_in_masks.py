"""apply_masks, repeat_interleave_batch and the mask collators: the official values, calls and random numbers."""

import itertools
import sys

import pytest
import torch
from checkouts import checkout
from golden_data import config, golden
from torch.utils.data import DataLoader

import jepa_fast
from jepa_fast.drop_in import collators
from jepa_fast.drop_in.collators import IJEPAMaskCollator, VJEPA2MaskCollator, VJEPAMaskCollator
from jepa_fast.drop_in.masks import apply_masks, repeat_interleave_batch
from jepa_fast.masking import MultiBlock, MultiBlockStream, multiblock

IMAGE = {"enc_mask_scale": (0.85, 1.0), "pred_mask_scale": (0.15, 0.2), "aspect_ratio": (0.75, 1.5), "min_keep": 4,
         "npred": 3}
VIDEO = [{"num_blocks": 4, "spatial_scale": [0.15, 0.15], "temporal_scale": [1.0, 1.0], "aspect_ratio": [0.75, 1.5]},
         {"num_blocks": 2, "spatial_scale": [0.6, 0.6], "temporal_scale": [0.5, 1.0], "aspect_ratio": [0.75, 1.5],
          "max_temporal_keep": 0.5, "max_keep": 9}]


def official_apply_masks(x, masks, concat=True):
    tokens = [torch.gather(x, 1, mask.unsqueeze(-1).repeat(1, 1, x.shape[-1])) for mask in masks]
    return torch.cat(tokens) if concat else tokens


# ---- functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_masks, kept", [(1, 5), (4, 3), (2, 0)])
def test_apply_masks(num_masks, kept, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 9, 8, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    masks = [torch.randint(0, 9, (3, kept)) for _ in range(num_masks)]  # repeated indices
    results = []
    for function in (apply_masks, official_apply_masks):
        for masks_ in (masks, torch.stack(masks)):
            leaf = x.clone().requires_grad_()
            out = function(leaf, masks_)
            out.backward(torch.arange(out.numel(), dtype=torch.float64).view(out.shape).sin().to(dtype))
            results.append((out.detach(), leaf.grad))
    (out, grad), again, (expected, expected_grad), _ = results
    assert torch.equal(out, expected) and torch.equal(again[0], expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-7 if dtype.itemsize > 2 else 0.02, rtol=1e-6)
    if dtype.itemsize > 2:
        torch.testing.assert_close(grad.sum((0, 1)), grad.new_tensor(range(out.numel())).sin().view(-1, 8).sum(0))


def test_apply_masks_as_lists_and_in_odd_calls():
    x, masks = torch.randn(3, 9, 8), [torch.randint(0, 9, (3, kept)) for kept in (2, 5)]
    for ours, theirs in zip(apply_masks(x, masks, concat=False), official_apply_masks(x, masks, False), strict=True):
        assert torch.equal(ours, theirs)
    for odd in (masks[0], [masks[0][:2]]):  # a tensor [B, K] means rows of sample 0; fewer samples than x
        assert torch.equal(apply_masks(x, odd), official_apply_masks(x, odd))
    mask = masks[:1]
    assert torch.equal(torch.func.vmap(lambda x: apply_masks(x, mask))(x.expand(2, -1, -1, -1))[1], apply_masks(x, mask))
    assert torch.equal(torch.compile(apply_masks, backend="eager", fullgraph=True)(x, mask), apply_masks(x, mask))
    assert jepa_fast.apply_masks is apply_masks and jepa_fast.repeat_interleave_batch is repeat_interleave_batch


def test_repeat_interleave_batch():
    rows = torch.randn(7, 3, 2)
    for x, repeat in itertools.product((rows, rows[:6], rows.view(6, 7).t(), rows[:, 0, 0]), (1, 2, 3)):
        expected = torch.cat([batch for i in range(len(x) // 3) for batch in [x[i * 3:i * 3 + 3]] * repeat])
        assert torch.equal(repeat_interleave_batch(x, 3, repeat), expected)
    for call in ((rows, 8, 1), (rows, 3, 0)):
        with pytest.raises(ValueError, match="must hold a batch of B = [38] rows and repeat must be positive, got 7 rows"):
            repeat_interleave_batch(*call)


# ---- collators


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, int):
        return a == b
    return len(a) == len(b) and all(map(same, a, b))


def clip(num_frames: int):
    """What an official data set returns: buffers, label, frame numbers."""
    return [torch.zeros(1)], 0, [torch.arange(num_frames)]


def expect_golden(collator, call, case, file, name) -> None:
    torch.manual_seed(case["seed"])
    for number in (1, 2, 3):
        for group, (_, *kinds) in enumerate(call(collator)):
            prefix = f"{name}/call{number}" + (f"/group{group}" if len(case.get("frames", [0])) > 1 else "")
            for kind, lists in zip(("context", "target"), kinds, strict=True):
                assert isinstance(lists, list)
                for i, tokens in enumerate(lists):
                    assert torch.equal(tokens, golden(file)[f"{prefix}/{kind}{i}"].long()), (prefix, kind, i)


@pytest.mark.parametrize("name", config("ijepa_masks")["cases"])
def test_ijepa_masks_are_the_official_ones(name):
    case = config("ijepa_masks")["cases"][name]
    fields = ("enc_mask_scale", "pred_mask_scale", "aspect_ratio", "nenc", "npred", "min_keep", "allow_overlap")
    collator = IJEPAMaskCollator(tuple(16 * side for side in case["grid"]), 16, **{f: case[f] for f in fields})
    for _ in range(case["counter_starts_at"]):
        collator.step()
    expect_golden(collator, lambda c: [c([torch.zeros(1)] * case["batch"])], case, "ijepa_masks", name)


@pytest.mark.parametrize("file, name", [(file, name) for file in ("vjepa_masks", "vjepa2_masks")
                                        for name, case in config(file)["cases"].items() if "ratio" not in case["masks"][0]])
def test_video_masks_are_the_official_ones(file, name):
    case = config(file)["cases"][name]
    time, rows, columns = case["grid"]
    frames, settings = case.get("frames", [2 * time]), {"crop_size": (rows, columns), "patch_size": (1, 1)}
    batch = [clip(frames[i % len(frames)]) for i in range(case["batch"])]
    if file == "vjepa_masks":
        collator = VJEPAMaskCollator(case["masks"], num_frames=frames[0], **settings)
    else:
        collator = VJEPA2MaskCollator(case["masks"], frames, **settings)
    for _ in range(case["counter_starts_at"]):
        collator.step()
    expect_golden(collator, lambda c: c(batch) if file == "vjepa2_masks" else [c(batch)], case, file, name)


COLLATORS = {"ijepa": (lambda **how: IJEPAMaskCollator(112, 16, **IMAGE, **how), torch.zeros(1)),
             "vjepa": (lambda **how: VJEPAMaskCollator(VIDEO, 64, 8, 8, **how), torch.zeros(1)),
             "vjepa2": (lambda **how: VJEPA2MaskCollator(VIDEO, [8, 4], 64, 8, **how), clip(8))}


@pytest.mark.skipif(multiblock._masking is None, reason="jepa_fast._masking is not built")
@pytest.mark.parametrize("name", COLLATORS)
@pytest.mark.parametrize("layout", ["known", "unknown"])
def test_the_global_generator_moves_on_as_officially(name, layout, monkeypatch):
    make, sample = COLLATORS[name]

    def run():
        collator, out = make(), []
        for draws in (0, 1, 617, 623):  # from anywhere within the generator's 624 words
            torch.manual_seed(2**40 + 5)
            torch.rand(draws)
            out += [collator([sample] * 5), torch.rand(2), torch.randn(3)]
        return out

    ours = run()
    if layout == "unknown":
        monkeypatch.setattr(torch, "initial_seed", lambda: -1)
    else:
        monkeypatch.setattr(multiblock, "_masking", None)  # draws from the global generator itself
    assert same(ours, run())


@pytest.mark.parametrize("name", COLLATORS)
def test_unbiased(name):
    make, sample = COLLATORS[name]

    def run(seed):
        torch.manual_seed(seed)
        collator = make(compat="unbiased")
        out = [collator([sample] * 30) for _ in range(2)]
        return [lists for call in out for lists in (call[0][1:] if name == "vjepa2" else call[1:])]

    lists = run(3)
    assert same(lists, run(3)) and not same(lists, run(4)) and not same(lists[:2], lists[2:])
    num_tokens = 49 if name == "ijepa" else 256
    counts = torch.zeros(num_tokens)
    for contexts, targets in zip(lists[::2], lists[1::2], strict=True):
        for i, context in enumerate(contexts):
            assert context.shape[0] == 30 and context.diff().gt(0).all()
            counts.index_add_(0, context.flatten(), torch.ones(context.numel()))
            for target in (targets if name == "ijepa" else targets[i:i + 1]):
                assert all(not set(c) & set(t) for c, t in zip(context.tolist(), target.tolist(), strict=True))
    if name == "ijepa":  # officially the last row and column are never used, and the lower rows are cut
        assert counts.min() > 0 and counts[-21:].sum() > 0.7 * counts[:21].sum()
    else:
        assert lists[0][1].shape[1] <= 9 and lists[0][1].max() < 128  # max_keep and max_temporal_keep


@pytest.mark.parametrize("flag", ["full_complement", "pred_full_complement", "none"])
def test_unbiased_complements(flag):
    lists = []
    for inv_block in (False, True):
        torch.manual_seed(0)
        fields = VIDEO[0] | {"inv_block": inv_block} | ({} if flag == "none" else {flag: True})
        ((_, (context,), (target,)),) = VJEPA2MaskCollator([fields], [8], 64, 8, compat="unbiased")([clip(8)] * 4)
        lists.append((context, target))
    assert same(lists[0], lists[1][::-1])
    union = torch.cat(lists[0], dim=1).sort().values
    assert (union.shape == (4, 256) and bool((union == torch.arange(256)).all())) == (flag != "none")


def test_in_processes_of_a_loader():
    collator = IJEPAMaskCollator(112, 16, **IMAGE)
    loader = DataLoader(torch.arange(24).float(), batch_size=4, collate_fn=collator, num_workers=2)
    batches = list(loader)
    assert torch.equal(torch.cat([x for x, _, _ in batches]), torch.arange(24).float())
    assert collator._itr_counter.value == 5
    settings = MultiBlock(num_targets=3, target_scale=(0.15, 0.2), min_keep=4)
    sizes = [MultiBlockStream(settings, (7, 7), seed=0, counter=c).next(1).target_lengths[0, 0].item() for c in range(6)]
    assert sorted(masks[0].shape[1] for _, _, masks in batches) == sorted(sizes)  # every number of the counter once


def test_bad_settings():
    with pytest.raises(ValueError, match='compat must be "official" or "unbiased", got \'fast\''):
        IJEPAMaskCollator(compat="fast")
    if multiblock._masking is not None:
        with pytest.raises(ValueError, match="words must be the 624 of an mt19937, used at most 624"):
            multiblock._masking.PositionStream.continue_from([0] * 623, 0)
    with pytest.raises(ValueError, match="grid 2x2 is too small"):
        IJEPAMaskCollator(32, 16)
    with pytest.raises(ValueError, match="of every mask, got one without temporal_scale, aspect_ratio"):
        VJEPAMaskCollator([{"num_blocks": 1, "spatial_scale": (0.2, 0.3)}])


# ---- beside the official collators


@pytest.mark.parametrize("name, module", [("ijepa", "multiblock"), ("jepa", "multiblock3d"),
                                          ("vjepa2", "multiseq_multiblock3d")])
def test_official_collators(name, module, upstream):
    ours, args = {"ijepa": (IJEPAMaskCollator, {"input_size": 224, "patch_size": 14, "nenc": 1, **IMAGE}),
                  "jepa": (VJEPAMaskCollator, {"cfgs_mask": VIDEO, "crop_size": 128, "num_frames": 8, "patch_size": 16}),
                  "vjepa2": (VJEPA2MaskCollator, {"cfgs_mask": VIDEO, "dataset_fpcs": [8, 16], "crop_size": 128,
                                                  "patch_size": 16})}[name]
    with checkout(upstream(name), f"src.masks.{module}") as (masks,):
        results = []
        for cls in (masks.MaskCollator, ours):
            torch.manual_seed(11)
            collator = cls(**args)
            collator.step()
            results.append([part for size in (3, 16, 1) for part in
                            (collator([clip(8 + 8 * (i % 3 == 1)) for i in range(size)]) if name == "vjepa2" else
                             collator([(torch.randn(2), i) for i in range(size)]), torch.rand(2))])
    assert same(results[0], results[1])
    assert sys.modules.get("src.masks.utils") is None and collators.MultiBlock is MultiBlock
