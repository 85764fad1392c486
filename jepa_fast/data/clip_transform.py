"""Views of a clip: cut in the loader's processes, resized, flipped and normalised on the device.

    transform.cut(clip, generator) -> Region       uint8 [C, T, H, W] -> the pixels that its views need
    transform.views(region) -> list of views       on the device; float32 [C, T, size, size] in [0, 255]

What travels is uint8, unless the region has more bytes than the float32 result: then it is resized first, so that a
clip never takes more than 4 bytes per value of the model's input. Resizing is bilinear without antialiasing, on float32:
torch.nn.functional.interpolate, as in facebookresearch/vjepa2 c2963a4, src/datasets/utils/video/transforms.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .transforms import IMAGENET_MEAN, IMAGENET_STD, chance, check_ranges, check_sizes, random_box

# each region of a packed batch starts at a multiple of this
_ALIGN_BYTES = 16


class Region(NamedTuple):
    pixels: Tensor                  # [C, T, h, w] uint8, or float32 where already resized
    size: tuple[int, int]           # to resize to
    is_flipped: bool = False        # after resizing


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, T, h, w] -> [C, T, *size] float32, bilinear, no antialiasing."""
    return F.interpolate(pixels.to(torch.float32, memory_format=torch.contiguous_format), size=size, mode="bilinear",
                         align_corners=False)


def _region(pixels: Tensor, size: tuple[int, int], is_flipped: bool = False) -> Region:
    if pixels.shape[-2] * pixels.shape[-1] > 4 * size[0] * size[1]:
        # frame by frame: the float32 copy of large frames would be large
        pixels = torch.cat([resize(frame, size) for frame in pixels.split(1, dim=1)], dim=1)
    return Region(pixels, size, is_flipped)


@dataclass(frozen=True, kw_only=True)
class ClipTransform:
    """One random crop per clip, the same in all its frames, resized and perhaps mirrored: V-JEPA 1, 2 and 2.1."""

    image_size: int = 224                                   # pixels, the model's input
    scale: tuple[float, float] = (0.3, 1.0)                 # area of the crop, fraction of the frame
    ratio: tuple[float, float] = (0.75, 1.35)               # width / height of the crop
    horizontal_flip: float = 0.5                            # probability
    mean: tuple[float, ...] = IMAGENET_MEAN                 # per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        check_sizes(image_size=self.image_size)
        check_ranges(1, scale=self.scale)
        check_ranges(math.inf, ratio=self.ratio)
        if not 0 <= self.horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip must be a probability in [0, 1], got {self.horizontal_flip}")

    @property
    def num_clips(self) -> int:
        return 1

    @property
    def allow_overlap(self) -> bool:
        return False

    def cut(self, clip: Tensor, generator: Generator) -> Region:
        """Drawn in the official order: area, aspect, top, left, flip."""
        top, left, height, width = random_box(clip.shape[-1], clip.shape[-2], self.scale, self.ratio, generator)
        is_flipped = chance(self.horizontal_flip, generator)
        pixels = clip[..., top:top + height, left:left + width]
        return _region(pixels, (self.image_size, self.image_size), is_flipped)

    def views(self, region: Region) -> list[Tensor]:
        view = resize(region.pixels, region.size)
        return [view.flip(-1) if region.is_flipped else view]


@dataclass(frozen=True, kw_only=True)
class EvalClipTransform:
    """num_clips clips spread over a video, num_crops squares of each: 16x8x3 for Kinetics, 16x2x3 for SSv2.

    One crop is the middle, of frames whose short side is resize_ratio * image_size; several lie evenly along the long
    side, the short side being image_size. View c * num_crops + s is square s of clip c. The official code rounds
    resized frames to whole levels; here they stay float32.
    """

    image_size: int = 224                                   # pixels
    num_clips: int = 1                                      # per video
    num_crops: int = 1                                      # squares per clip
    resize_ratio: float = 256 / 224                         # for one crop: short side in units of image_size
    allow_overlap: bool = True                              # clips of short videos share frames
    mean: tuple[float, ...] = IMAGENET_MEAN                 # per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        check_sizes(image_size=self.image_size)
        if self.num_clips < 1 or self.num_crops < 1 or self.resize_ratio < 1:
            raise ValueError("num_clips, num_crops and resize_ratio must be at least 1, got "
                             f"{self.num_clips}, {self.num_crops} and {self.resize_ratio}")

    def cut(self, clip: Tensor, generator: Generator | None = None) -> Region:
        height, width = clip.shape[-2:]
        short = self.image_size if self.num_crops > 1 else int(self.image_size * self.resize_ratio)
        size = (int(short * height / width), short) if width < height else (short, int(short * width / height))
        return _region(clip, size)

    def views(self, region: Region) -> list[Tensor]:
        frames = resize(region.pixels, region.size)
        side, (height, width) = self.image_size, region.size
        if self.num_crops == 1:
            starts = [(round((height - side) / 2), round((width - side) / 2))]
        else:
            step = (max(height, width) - side) // (self.num_crops - 1)
            starts = [(i * step, 0) if height > width else (0, i * step) for i in range(self.num_crops)]
        return [clip[..., top:top + side, left:left + side]
                for clip in frames.chunk(self.num_clips, dim=1) for top, left in starts]


def pack(regions: list[Region]) -> dict:
    """Regions of any sizes as one tensor of bytes: one shared-memory file and one copy to the device per batch."""
    starts, end = [], 0
    for region in regions:
        starts.append(end)
        size_bytes = region.pixels.numel() * region.pixels.element_size()
        end += -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
    pixels, layout = torch.empty(end, dtype=torch.uint8), []
    for start, region in zip(starts, regions, strict=True):
        layout.append((start, tuple(region.pixels.shape), region.pixels.dtype, region.size, region.is_flipped))
        _region_at(pixels, *layout[-1]).pixels.copy_(region.pixels)
    return {"pixels": pixels, "layout": layout}


def _region_at(pixels: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype, size: tuple[int, int],
              is_flipped: bool) -> Region:
    # [T, h, w, C] in memory, as decoders give frames: the copy in the loader's process runs along rows
    C, T, h, w = shape
    end = start + math.prod(shape) * dtype.itemsize
    return Region(pixels[start:end].view(dtype).view(T, h, w, C).permute(3, 0, 1, 2), size, is_flipped)


def unpack(packed: dict, transform: ClipTransform | EvalClipTransform, device: torch.device) -> list[Tensor]:
    """What `pack` made -> for each view float32 [B, C, T, size, size] in [0, 255] on the device."""
    pixels = packed["pixels"].to(device, non_blocking=True)
    views = [transform.views(_region_at(pixels, *where)) for where in packed["layout"]]
    return [torch.stack(view) for view in zip(*views, strict=True)]
