"""Boxes cut out of images and resized, bilinear with antialiasing: every view of multi-crop training in one call.

    out[n, c, y, x] = ((sum_ij u[y, i] v[x, j] image[c, i, j]) / 255 - mean[c]) / std[c]

u[y] is a triangle about top + (y + 1/2) s, of half-width max(s, 1) for s = box height / view height, over the pixels
whose middle lies in the box, with sum 1; v likewise along the width. For boxes of whole pixels this is
torchvision's `resized_crop(antialias=True)` of float images: nothing outside of the box is seen.
"""

import math

import torch
from torch import Tensor


def crop_resize(images: Tensor, layout: Tensor | None, boxes: Tensor, image_index: Tensor, flips: Tensor | None,
                mean: Tensor | None, std: Tensor | None, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """images uint8 [B, C, H, W], or [P, C] with layout [B, 3]; boxes [N, 4] -> [N, C, height, width]."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(len(boxes), images.shape[1], height, width, dtype=compute, device=images.device)
    for n, (box, i) in enumerate(zip(boxes.tolist(), image_index.tolist(), strict=True)):
        image = images[i] if layout is None else _unpack(images, layout[i].tolist())
        top, bottom, u = _weights(box[0], box[2], image.shape[1], height, compute)
        left, right, v = _weights(box[1], box[3], image.shape[2], width, compute)
        out[n] = u.to(image.device) @ image[:, top:bottom, left:right].to(compute) @ v.T.to(image.device)
    if flips is not None:
        out = torch.where(flips[:, None, None, None], out.flip(-1), out)
    out = out / 255
    if mean is not None:
        out = (out - mean.to(compute)[:, None, None]) / std.to(compute)[:, None, None]
    return out.to(dtype)


def _unpack(pixels: Tensor, where: list[int]) -> Tensor:
    """One image [C, H, W] of packed ones; where = (first pixel, H, W)."""
    first, H, W = where
    return pixels[first:first + H * W].view(H, W, -1).permute(2, 0, 1)


def _weights(start: float, length: float, size: int, count: int, dtype: torch.dtype) -> tuple[int, int, Tensor]:
    """The pixels [first, end) of an axis whose middles lie in the box, and what each adds: [count, end - first]."""
    first = min(max(math.ceil(start - 0.5), 0), size - 1)
    end = min(max(math.ceil(start + length - 0.5), first + 1), size)
    start, length = torch.tensor(start - first, dtype=dtype), torch.tensor(length, dtype=dtype)
    scale = length / count
    centre = start + scale * (torch.arange(count, dtype=dtype) + 0.5)
    distance = (torch.arange(end - first, dtype=dtype) + 0.5 - centre[:, None]).abs()
    weights = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    return first, end, weights / weights.sum(1, keepdim=True)
