"""Boxes cut out of uint8 images, resized with antialiasing, mirrored and normalised, all views in one call."""

import torch
from torch import Tensor

from ..reference import crop_resize as reference
from ._backends import Missing, compiled, triton
from ._define import define

# of a pixel: what the rounding of a scaled box may reach beyond its image
_SLACK = 1e-2


def _check_values(images, layout, boxes, image_index, *_):
    count = len(images) if layout is None else len(layout)
    if image_index.numel() == 0:
        return
    low, high = (int(bound) for bound in image_index.aminmax())
    if low < 0 or high >= count:
        raise IndexError(f"image_index must be in [0, {count}), got {low if low < 0 else high}")
    sizes = boxes.new_tensor(images.shape[2:]) if layout is None else layout[image_index, 1:].to(boxes.dtype)
    fits = (boxes[:, :2] >= -_SLACK) & (boxes[:, 2:] > 0) & (boxes[:, :2] + boxes[:, 2:] <= sizes + _SLACK)
    if not fits.all():
        n = int((~fits.all(1)).nonzero()[0])
        height, width = (sizes if layout is None else sizes[n]).int().tolist()
        raise ValueError(f"boxes must be (top, left, height, width) within their images, got "
                         f"{[round(value, 3) for value in boxes[n].tolist()]} in {height} x {width} pixels")
    if layout is not None and not ((layout[:, 0] >= 0) & (layout[:, 0] + layout[:, 1] * layout[:, 2] <= len(images))).all():
        raise ValueError(f"layout must be (first pixel, height, width) within {len(images)} pixels, got {layout.tolist()}")


def _native(raw, images, layout, boxes, image_index, flips, mean, std, height, width, dtype):
    out = torch.empty(len(boxes), images.shape[1], height, width, dtype=dtype)
    contiguous = (None if x is None else x.contiguous() for x in (layout, boxes.float(), image_index, flips, mean, std))
    raw.crop_resize(images if layout is None else images.contiguous(), *contiguous, out)
    return out


def _supports(images, layout, boxes, image_index, flips, mean, std, height, width, dtype):
    return None if dtype in (torch.float32, torch.bfloat16) else f"no fast version for {str(dtype).removeprefix('torch.')}"


define("crop_resize(Tensor images, Tensor? layout, Tensor boxes, Tensor image_index, Tensor? flips, Tensor? mean, "
       "Tensor? std, SymInt height, SymInt width, ScalarType dtype) -> Tensor",
       plain=reference.crop_resize,
       cpp=compiled("crop_resize", (torch.float32,), _native, supports=_supports),
       triton=triton("crop_resize", (torch.float32,), supports=_supports),
       cuda=Missing("not written: bound by memory, which Triton's version reads once"),
       check=_check_values)


@torch.library.register_fake("jepa_fast::crop_resize")
def _(images, layout, boxes, image_index, flips, mean, std, height, width, dtype):
    return images.new_empty(boxes.shape[0], images.shape[1], height, width, dtype=dtype)


def crop_resize(images: Tensor, boxes: Tensor, image_index: Tensor, size: tuple[int, int], *,
                flips: Tensor | None = None, mean: Tensor | None = None, std: Tensor | None = None,
                layout: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """View n: box n of image image_index[n], resized to `size` = (height, width), mirrored where flips[n].

    images uint8 [B, C, H, W] of any strides; or, for images of many sizes, their pixels end to end, [P, C], with
    layout int64 [B, 3]: first pixel, height and width of each. boxes float32 [N, 4]: top, left, height and width in
    pixels, perhaps broken ones, within their image. image_index int64 [N], flips bool [N]. -> [N, C, height, width] in
    `dtype`: values / 255, then minus mean [C], over std [C] where given.
    Bilinear with antialiasing: torchvision's resized_crop of float images. Not rounded to levels. No gradient.
    Raises ValueError or IndexError for a box or an index out of range (CPU; on a GPU boxes are clamped to the image and
    an index out of range is undefined).
    """
    _check(images, boxes, image_index, size, flips, mean, std, layout)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    return torch.ops.jepa_fast.crop_resize(images, layout, boxes, image_index, flips, mean, std, *size, dtype)


def _check(images, boxes, image_index, size, flips, mean, std, layout):
    expected = "[B, C, H, W]" if layout is None else "[P, C] beside a layout"
    if images.dtype != torch.uint8 or images.dim() != (4 if layout is None else 2):
        raise ValueError(f"images must be {expected} uint8, got {list(images.shape)} {images.dtype}")
    if layout is None and min(images.shape[2:]) < 1:
        raise ValueError(f"images must have pixels, got {list(images.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width), each at least 1, got {tuple(size)}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"boxes must be [N, 4] float32, got {list(boxes.shape)} {boxes.dtype}")
    N, C = boxes.shape[0], images.shape[1]
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, got {'std' if mean is None else 'mean'} alone")
    rows = None if layout is None else layout.shape[0]
    for name, x, dtype, shape in (("image_index", image_index, torch.int64, [N]), ("flips", flips, torch.bool, [N]),
                                  ("mean", mean, None, [C]), ("std", std, None, [C]),
                                  ("layout", layout, torch.int64, [rows, 3])):
        if x is None:
            continue
        if list(x.shape) != shape or (x.dtype != dtype if dtype else x.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"{name} must be {shape} {dtype or torch.float32}, got {list(x.shape)} {x.dtype}")
        if x.device != images.device:
            raise ValueError(f"images and {name} must be on one device, got {images.device} and {x.device}")
