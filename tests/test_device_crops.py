"""Views made on the device: each against torchvision's functions of the same parameters; draws, ranks, resume."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_fast.data import (
    DeviceMultiCrop,
    ImageFolder,
    ImageFolderData,
    MultiCrop,
    SyntheticImages,
    dino_views,
    ijepa_views,
    load_batches,
    load_in_order,
)
from jepa_fast.data.device_crops import on_device, pack_whole
from jepa_fast.data.seeds import generator_for
from jepa_fast.data.transforms import EvalTransform, IjepaTransform

SMALL = DeviceMultiCrop(num_global=2, num_local=1, global_size=14, local_size=9, local_scale=(0.1, 0.4), blur_kernel=5,
                        blur_prob=(1.0, 0.0, 0.5), solarize_prob=(0.0, 0.5, 0.2), brightness=0.8, contrast=0.8,
                        saturation=0.8, hue=0.3)
SIZES = ((20, 31), (17, 17), (40, 12), (25, 26), (9, 30), (18, 21))


def picture(i, mode="RGB"):
    pixels = torch.randint(0, 256, (*SIZES[i % len(SIZES)], 3), dtype=torch.uint8, generator=generator_for(i))
    return Image.fromarray(pixels.numpy()).convert(mode)


def drawn(transform, count, seed=3, step=5, first=0, mode="RGB"):
    return transform.draw(pack_whole([transform.cut(picture(i, mode)) for i in range(count)]), seed, step, first)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_views_are_torchvisions(mode):
    """Every step of every view, image by image and in float64; the order of the adjustments differs between steps."""
    v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="torchvision is not installed")
    C, orders = len(mode), set()
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:C], torch.tensor([0.2, 0.3, 0.25])[:C]
    for step in range(3):
        batch = drawn(SMALL, 6, step=step, mode=mode)
        orders.add(tuple(batch["order"]))
        views = SMALL.views(batch, mean, std)
        assert [tuple(view.shape) for view in views] == [(6, C, 14, 14)] * 2 + [(6, C, 9, 9)]
        for v, view in enumerate(views):
            for i in range(6):
                param = batch["params"][v, i].tolist()
                image = torch.from_numpy(np.array(picture(i, mode))).view(*SIZES[i], C).permute(2, 0, 1).double() / 255
                image = v2.resized_crop(image, *map(int, param[:4]), view.shape[-2:], antialias=True)
                image = v2.horizontal_flip(image) if param[4] else image
                adjust = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue)
                for which in batch["order"]:
                    image = adjust[which](image, param[5 + which])
                image = v2.rgb_to_grayscale(image, C) if param[9] else image
                image = v2.gaussian_blur(image, [5, 5], [param[10]] * 2)
                image = v2.solarize(image, 128 / 255) if param[11] else image
                expected = (image - mean.double()[:, None, None]) / std.double()[:, None, None]
                # hue and solarisation are steep: a rounding of order 1e-7 may turn a pixel at an edge
                difference = (view[i].double() - expected).abs()
                assert (difference > 2e-5).sum() <= 2 and difference.median() < 1e-6, (step, v, i)
    assert len(orders) > 1
    assert torch.equal(batch["params"][0, :, 10] > 0.01, torch.ones(6, dtype=torch.bool))
    assert (batch["params"][1, :, 10] < 0.01).all() and not batch["params"][0, :, 11].any()


def test_one_crop_and_nothing_else():
    transform = ijepa_views(16)
    batch = drawn(transform, 6)
    view, = transform.views(batch)
    assert not batch["params"][..., 4].any()
    for i in range(6):
        top, left, h, w = batch["params"][0, i, :4].int().tolist()
        image = torch.from_numpy(np.array(picture(i))).permute(2, 0, 1)[None, :, top:top + h, left:left + w].float() / 255
        expected = torch.nn.functional.interpolate(image, size=(16, 16), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(view[i], expected, rtol=0, atol=2e-6)


def one_box(u, height, width, scale, ratio):
    """RandomResizedCrop, one image, number by number."""
    for area, aspect, top, left in u:
        area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + aspect * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_boxes_are_those_of_random_resized_crop():
    u = torch.rand(400, 10, 4, generator=generator_for(0), dtype=torch.float64)
    sizes = torch.randint(1, 60, (400, 2), generator=generator_for(1))
    sizes[:40] = torch.tensor([[50, 3], [2, 40]]).repeat(20, 1)  # too narrow and too wide for most boxes
    for scale in ((0.3, 1.0), (0.05, 0.3), (1.0, 1.0)):
        ours = SMALL.boxes(u, sizes, scale).int().tolist()
        expected = [one_box(u[i].tolist(), *sizes[i].tolist(), scale, SMALL.crop_ratio) for i in range(400)]
        assert ours == expected


def test_how_often_and_how_much():
    transform = dino_views(num_local=1)
    layout = torch.tensor([[0, 40, 50]]).repeat(4000, 1)
    packed = {"pixels": torch.zeros(2000, 3, dtype=torch.uint8), "layout": layout, "originals": layout[:, 1:]}
    params = transform.draw(packed, 0, 0)["params"].double()
    is_jittered = params[..., 5] != 1
    blurred = params[..., 10] > 0.01
    for name, rows, probability in (
            ("flip", params[..., 4], 0.5), ("jitter", is_jittered, 0.8), ("gray", params[..., 9], 0.2),
            ("blur 0", blurred[0], 1.0), ("blur 1", blurred[1], 0.1), ("blur 2", blurred[2], 0.5),
            ("solarize 0", params[0, :, 11], 0.0), ("solarize 1", params[1, :, 11], 0.2)):
        rows = rows.double()
        assert abs(rows.mean() - probability) <= 5 * (probability * (1 - probability) / rows.numel())**0.5, name
    for column, low, high in ((5, 0.6, 1.4), (6, 0.6, 1.4), (7, 0.8, 1.2), (8, -0.1, 0.1)):
        values = params[..., column][is_jittered]
        assert low <= values.min() < low + 0.02 * (high - low) and high >= values.max() > high - 0.02 * (high - low)
        assert torch.equal(params[..., column][~is_jittered].unique(), torch.tensor([0.0 if column == 8 else 1.0]).double())


def test_large_images_are_shrunk_and_boxes_with_them():
    whole, half = (dataclasses.replace(SMALL, decode_size=size) for size in (0, 20))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels, original = half.cut(image)
    assert original == (40, 60) and np.array_equal(pixels, image.resize((30, 20), Image.Resampling.BILINEAR, reducing_gap=3))
    a, b = (transform.draw(pack_whole([transform.cut(image)]), 0, 0) for transform in (whole, half))
    assert torch.equal(a["params"][..., :4], 2 * b["params"][..., :4])
    assert torch.equal(a["params"][..., 4:], b["params"][..., 4:])
    assert half.cut(image.resize((15, 20))).pixels.shape == (20, 15, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(14):
        picture(i).save(path / f"{i:02}.png")
    return ImageFolder(path)


def test_ranks_workers_and_resumed_runs_agree(folder):
    options = dict(global_batch_size=4, seed=7, num_steps=5)
    whole = list(load_batches(folder, SMALL, **options))
    assert whole[0]["images"][0].dtype == torch.float32 and len(whole) == 5
    assert not torch.equal(whole[0]["images"][0], whole[0]["images"][1])
    parts = [list(load_batches(folder, SMALL, rank=rank, world_size=2, start_step=2, num_workers=rank, **options))
             for rank in range(2)]
    for step, batch in enumerate(whole[2:]):
        for v in range(3):
            assert torch.equal(torch.cat([part[step]["images"][v] for part in parts]), batch["images"][v])
        assert torch.equal(torch.cat([part[step]["index"] for part in parts]), batch["index"])
    raw = next(load_batches(folder, SMALL, is_normalised=False, **options))["images"][0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (SMALL.mean, SMALL.std))
    torch.testing.assert_close((raw - mean) / std, whole[0]["images"][0], rtol=0, atol=1e-5)
    assert len(list(load_in_order(folder, SMALL, batch_size=5))) == 3


def test_views_of_other_transforms(tmp_path, folder):
    multi = on_device(MultiCrop(num_local=3, hue=0.2, solarize_prob=0.2, solarize_second_prob=0.5))
    assert (multi.num_local, multi.hue, multi.solarize_prob, multi.blur_prob) == (3, 0.2, (0.1,), (0.5,))
    single = on_device(IjepaTransform(image_size=32, crop_scale=(0.5, 1.0), use_horizontal_flip=True))
    assert single == dataclasses.replace(ijepa_views(32), global_scale=(0.5, 1.0), flip_prob=0.5)
    data = ImageFolderData(root=folder.root, transform=IjepaTransform(image_size=8), views_on="device", num_workers=0)
    batch = next(data.batches(data.build(), global_batch_size=4))
    expected = next(load_batches(folder, ijepa_views(8), global_batch_size=4))
    assert torch.equal(batch["images"], expected["images"])
    for transform in (EvalTransform(), IjepaTransform(use_gaussian_blur=True)):
        with pytest.raises(ValueError, match="^views are made on the device for a MultiCrop, or an IjepaTransform without"):
            on_device(transform)


@pytest.mark.parametrize("change, message", [
    (dict(num_global=0, num_local=0), "num_global and num_local must be at least 0 and not both 0, got 0 and 0"),
    (dict(num_global=-1), "num_global and num_local must be at least 0 and not both 0, got -1 and 6"),
    (dict(local_size=0), "local_size must be at least 1 pixel, got 0"),
    (dict(global_scale=(0.5, 0.2)), "global_scale must be 0 < low <= high <= 1, got (0.5, 0.2)"),
    (dict(blur_kernel=4), "blur_kernel must be odd and less than twice the smallest view, got 4"),
    (dict(flip_prob=1.5), "flip_prob must be a probability in [0, 1], got 1.5"),
    (dict(blur_prob=(0.1, 0.2)), "blur_prob must be a probability in [0, 1], one or 8 of them, got (0.1, 0.2)"),
    (dict(hue=0.6), "brightness, contrast and saturation must be at least 0 and hue in [0, 0.5], got 0.4, 0.4, 0.2 and 0.6"),
    (dict(decode_size=-1), "decode_size must be at least 0 pixels, got -1"),
])
def test_one_clear_line(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DeviceMultiCrop(**change)


def test_channels_must_fit():
    with pytest.raises(ValueError, match="^transform.mean must have one number per channel, got .* for in_chans = 1$"):
        load_batches(SyntheticImages(8, 8, 1), SMALL, global_batch_size=8)
