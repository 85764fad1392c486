"""Boxes of uint8 images resized with antialiasing, mirrored and normalised: every view is written once, in one launch.

Each program makes a tile of one channel of one view and reads the bytes under it, at most (2 s + 1)^2 per pixel for a
box s times the view; the three channels of interleaved pixels run side by side and share their cache lines. Weights are
computed where they are used. Saved against a library: a launch or four per image and view, a float copy of the image.
Bytes: the boxes once, and out. lejepa-2x224-6x98-b256: 218 M values, 0.87 GB in float32, 0.2 ms at 4.3 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def first_and_count(start, length, size):
    """The first pixel of an axis whose middle lies in the box, and how many do, at least one."""
    # broken boxes: in float64, or the same pixel would be within for one backend and without for another
    last = tl.ceil(start.to(tl.float64) + length.to(tl.float64) - 0.5).to(tl.int64)
    first = tl.minimum(tl.maximum(tl.ceil(start.to(tl.float64) - 0.5).to(tl.int64), 0), size - 1)
    return first, tl.minimum(tl.maximum(last, first + 1), size) - first


@triton.jit
def weight_of(pixel, count, centre, support):
    distance = tl.abs(pixel.to(tl.float32) + 0.5 - centre)
    return tl.where((pixel >= 0) & (pixel < count), tl.maximum(1.0 - distance / support, 0.0), 0.0)


@triton.jit
def crop_resize_kernel(images_ptr, layout_ptr, boxes_ptr, index_ptr, flips_ptr, mean_ptr, std_ptr, out_ptr, H, W,
                       stride_b, stride_c, stride_h, stride_w, height, width, C, IS_PACKED: tl.constexpr,
                       HAS_FLIPS: tl.constexpr, IS_NORMALISED: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    pid_c, n = tl.program_id(0) % C, (tl.program_id(0) // C).to(tl.int64)
    tiles_x = tl.cdiv(width, BLOCK_X)
    offs_y = tl.program_id(1) // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    offs_x = tl.program_id(1) % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    image = tl.load(index_ptr + n)
    if IS_PACKED:
        where_ptr = layout_ptr + 3 * image
        corner, rows, columns = tl.load(where_ptr) * C, tl.load(where_ptr + 1), tl.load(where_ptr + 2)
        step_c, step_h, step_w = 1, columns * C, C
    else:
        corner, rows, columns = image * stride_b, tl.full([], H, tl.int64), tl.full([], W, tl.int64)
        step_c, step_h, step_w = stride_c, stride_h, stride_w
    top, left = tl.load(boxes_ptr + 4 * n), tl.load(boxes_ptr + 4 * n + 1)
    box_h, box_w = tl.load(boxes_ptr + 4 * n + 2), tl.load(boxes_ptr + 4 * n + 3)
    first_y, count_y = first_and_count(top, box_h, rows)
    first_x, count_x = first_and_count(left, box_w, columns)
    scale_y, scale_x = box_h / height, box_w / width
    support_y, support_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    centre_y = (top - first_y.to(tl.float32)) + scale_y * (offs_y.to(tl.float32) + 0.5)
    centre_x = (left - first_x.to(tl.float32)) + scale_x * (offs_x.to(tl.float32) + 0.5)
    low_y = tl.floor(centre_y - support_y + 0.5).to(tl.int64)
    low_x = tl.floor(centre_x - support_x + 0.5).to(tl.int64)
    taps_y, taps_x = (2 * support_y).to(tl.int32) + 2, (2 * support_x).to(tl.int32) + 2
    total_x = tl.zeros([BLOCK_X], tl.float32)
    for k in range(0, taps_x):
        total_x += weight_of(low_x + k, count_x, centre_x, support_x)
    total_y = tl.zeros([BLOCK_Y], tl.float32)
    out = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    base_ptr = images_ptr + corner + pid_c * step_c + first_y * step_h + first_x * step_w
    for j in range(0, taps_y):
        y = low_y + j
        weight_y = weight_of(y, count_y, centre_y, support_y)
        total_y += weight_y
        row = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
        for k in range(0, taps_x):
            x = low_x + k
            weight_x = weight_of(x, count_x, centre_x, support_x)
            mask = (weight_y > 0)[:, None] & (weight_x > 0)[None, :]
            pixel = tl.load(base_ptr + y[:, None] * step_h + x[None, :] * step_w, mask=mask, other=0)
            row += weight_x[None, :] * pixel.to(tl.float32)
        out += weight_y[:, None] * row
    # tiles may reach beyond the view, where no pixel weighs anything
    out = out / tl.maximum(total_y, 1e-30)[:, None] / tl.maximum(total_x, 1e-30)[None, :] / 255.0
    if IS_NORMALISED:
        out = (out - tl.load(mean_ptr + pid_c)) / tl.load(std_ptr + pid_c)
    to_x = offs_x
    if HAS_FLIPS:
        to_x = tl.where(tl.load(flips_ptr + n) != 0, width - 1 - offs_x, offs_x)
    at = out_ptr + ((n * C + pid_c) * height + offs_y[:, None]) * width + to_x[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(offs_y < height)[:, None] & (offs_x < width)[None, :])


def crop_resize(images: Tensor, layout: Tensor | None, boxes: Tensor, image_index: Tensor, flips: Tensor | None,
                mean: Tensor | None, std: Tensor | None, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """images uint8 [B, C, H, W], or [P, C] with layout [B, 3]; boxes [N, 4] -> [N, C, height, width]."""
    N, C = len(boxes), images.shape[1]
    out = torch.empty(N, C, height, width, dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    layout, boxes, image_index, flips, mean, std = (None if x is None else x.contiguous() for x in (
        layout, boxes.float(), image_index, flips, mean, std))
    images = images if layout is None else images.contiguous()
    sizes = (*images.shape[2:], *images.stride()) if layout is None else (0,) * 6
    BLOCK_X = min(triton.next_power_of_2(width), 64)
    BLOCK_Y = max(1, min(triton.next_power_of_2(height), 1024 // BLOCK_X))
    grid = N * C, triton.cdiv(height, BLOCK_Y) * triton.cdiv(width, BLOCK_X)
    crop_resize_kernel[grid](
        images, layout, boxes, image_index, None if flips is None else flips.view(torch.uint8), mean, std, out, *sizes,
        height, width, C, IS_PACKED=layout is not None, HAS_FLIPS=flips is not None, IS_NORMALISED=mean is not None,
        BLOCK_Y=BLOCK_Y, BLOCK_X=BLOCK_X, num_warps=4)
    return out
