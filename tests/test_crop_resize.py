"""Crops against torchvision's and kornia's, any memory layout, packed images; bad input."""

import re

import pytest
import torch

from jepa_fast import ops, testing
from jepa_fast.ops import crop_resize

BACKENDS = testing.OPS["crop_resize"].backends()


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def whole_boxes(N, H, W, seed=1):
    generator = torch.Generator().manual_seed(seed)
    corners = [torch.randint(0, side + 1, (N, 2), generator=generator).sort(1).values for side in (H, W)]
    starts = torch.stack([pair[:, 0].clamp(max=side - 1) for pair, side in zip(corners, (H, W), strict=True)], 1)
    ends = torch.stack([pair[:, 1] for pair in corners], 1)
    return torch.cat([starts, (ends - starts).clamp(min=1)], 1).float()


@pytest.mark.parametrize("size", [(5, 6), (20, 23), (2, 3)], ids=["smaller", "larger", "tiny"])
def test_whole_boxes_are_torchvisions_resized_crop(backend, size):
    v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="torchvision is not installed")
    images, boxes, flips = noise(2, 2, 13, 17), whole_boxes(4, 13, 17), torch.arange(4) % 2 == 1
    index = torch.tensor([0, 1, 1, 0])
    expected = []
    for box, i, is_flipped in zip(boxes.int().tolist(), index, flips, strict=True):
        view = v2.resized_crop(images[i].double() / 255, *box, list(size), antialias=True)
        expected.append(v2.horizontal_flip(view) if is_flipped else view)
    ours = crop_resize(images, boxes, index, size, flips=flips)
    # pixels of order 1, weights of box lengths below 40 in float32
    torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=0, atol=3e-6)


def test_enlarging_is_kornias_crop_and_resize(backend):
    """kornia has no antialiasing, which enlarging does not need; its boxes name the middles of corner pixels."""
    geometry = pytest.importorskip("kornia.geometry.transform", reason="kornia is not installed")
    images = noise(2, 3, 16, 20)
    top, left, height, width = boxes = 2.0, 3.0, 10.0, 12.0
    # the same points of the image, the corners of the outermost pixels of the view being half a step inside of the box
    size, y, x = (25, 36), height / 25 / 2 - 0.5, width / 36 / 2 - 0.5
    corners = torch.tensor([[left + x, top + y], [left + width - 1 - x, top + y],
                            [left + width - 1 - x, top + height - 1 - y], [left + x, top + height - 1 - y]])
    theirs = geometry.crop_and_resize(images.double() / 255, corners.double().expand(2, 4, 2), size, align_corners=True)
    ours = crop_resize(images, torch.tensor([boxes, boxes]), torch.arange(2), size).double()
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))   # kornia's border reads beyond the box
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=3e-6)


def test_mean_and_std(backend):
    images, boxes, index = noise(2, 3, 9, 9), whole_boxes(2, 9, 9), torch.tensor([0, 1])
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    plain = crop_resize(images, boxes, index, (5, 5)).double()
    expected = (plain - mean.double()[:, None, None]) / std.double()[:, None, None]
    ours = crop_resize(images, boxes, index, (5, 5), mean=mean, std=std)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=3e-6)
    half = crop_resize(images, boxes, index, (5, 5), mean=mean, std=std, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, ours.bfloat16())


def test_memory_layouts_and_packed_images_agree(backend):
    images, boxes, index = noise(3, 2, 7, 6), whole_boxes(3, 7, 6), torch.tensor([2, 0, 1])
    expected = crop_resize(images, boxes, index, (5, 4))
    packed = images.permute(0, 2, 3, 1).reshape(-1, 2)
    layout = torch.tensor([[0, 7, 6], [42, 7, 6], [84, 7, 6]])
    views = [crop_resize(images.contiguous(memory_format=torch.channels_last), boxes, index, (5, 4)),
             crop_resize(images.repeat_interleave(2, 0)[::2].mT.contiguous().mT, boxes, index, (5, 4)),
             crop_resize(packed, boxes, index, (5, 4), layout=layout)]
    assert all(torch.equal(view, expected) for view in views)


def test_nothing_outside_of_the_box_is_seen(backend):
    images = torch.full((1, 1, 12, 12), 255, dtype=torch.uint8)
    images[:, :, 3:8, 4:10] = 100
    box = torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    for size in ((2, 2), (9, 11)):
        view = crop_resize(images, box, torch.tensor([0]), size)
        torch.testing.assert_close(view, torch.full_like(view, 100 / 255), rtol=0, atol=1e-6)


IMAGES, BOX, INDEX = noise(2, 3, 8, 9), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0])
BAD = [
    (dict(images=IMAGES.float()), ValueError, "images must be [B, C, H, W] uint8, got [2, 3, 8, 9] torch.float32"),
    (dict(images=IMAGES[0]), ValueError, "images must be [B, C, H, W] uint8, got [3, 8, 9] torch.uint8"),
    (dict(images=IMAGES, layout=torch.zeros(1, 3)), ValueError,
     "images must be [P, C] beside a layout uint8, got [2, 3, 8, 9] torch.uint8"),
    (dict(size=(0, 4)), ValueError, "size must be (height, width), each at least 1, got (0, 4)"),
    (dict(boxes=BOX.long()), ValueError, "boxes must be [N, 4] float32, got [1, 4] torch.int64"),
    (dict(boxes=BOX[:, :3]), ValueError, "boxes must be [N, 4] float32, got [1, 3] torch.float32"),
    (dict(image_index=INDEX.int()), ValueError, "image_index must be [1] torch.int64, got [1] torch.int32"),
    (dict(flips=torch.zeros(2, dtype=torch.bool)), ValueError, "flips must be [1] torch.bool, got [2] torch.bool"),
    (dict(mean=torch.zeros(3)), ValueError, "mean and std go together, got mean alone"),
    (dict(mean=torch.zeros(1), std=torch.ones(1)), ValueError, "mean must be [3] torch.float32, got [1] torch.float32"),
    (dict(dtype=torch.int32), TypeError, "dtype must be floating point, got torch.int32"),
    (dict(image_index=INDEX + 2), IndexError, "image_index must be in [0, 2), got 2"),
    (dict(boxes=BOX + 5), ValueError, "boxes must be (top, left, height, width) within their images, got "
                                      "[5.0, 5.0, 9.0, 9.0] in 8 x 9 pixels"),
    (dict(boxes=BOX * 0), ValueError, "boxes must be (top, left, height, width) within their images, got "
                                      "[0.0, 0.0, 0.0, 0.0] in 8 x 9 pixels"),
    (dict(boxes=BOX * float("nan")), ValueError, "boxes must be (top, left, height, width) within their images, got "
                                                 "[nan, nan, nan, nan] in 8 x 9 pixels"),
    (dict(images=IMAGES.view(-1, 3), layout=torch.tensor([[100, 8, 9]])), ValueError,
     "layout must be (first pixel, height, width) within 144 pixels, got [[100, 8, 9]]"),
]


@pytest.mark.parametrize("change, kind, message", BAD)
def test_bad_input(change, kind, message):
    arguments = dict(images=IMAGES, boxes=BOX, image_index=INDEX, size=(4, 4)) | change
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        crop_resize(**arguments)
