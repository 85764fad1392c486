"""Random views of one image. A transform is its configuration: a frozen dataclass that is called.

    transform(image, generator, view) -> uint8 [C, H, W]         image: PIL (RGB or L) or uint8 tensor [C, H, W]

`view` counts from 0 to `num_views` - 1. All randomness comes from `generator`, drawn in torchvision's order, so equal
seeds give equal views. `mean` and `std` are applied later, where the batch already sits on its device.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Generator, Tensor

from . import pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)


def uniform(low: float, high: float, generator: Generator) -> float:
    return torch.empty(1).uniform_(low, high, generator=generator).item()


def chance(probability: float, generator: Generator) -> bool:
    return torch.rand(1, generator=generator).item() < probability


@lru_cache
def _log_ratio(ratio: tuple[float, float]) -> list[float]:
    return torch.tensor(ratio).log().tolist()   # float32, as the draw is


def random_box(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float],
               generator: Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a box with an area in `scale` (of the image) and an aspect in `ratio`, log-uniform.

    After ten boxes that do not fit: the largest centred box with an allowed aspect.
    """
    for _ in range(10):
        area = height * width * uniform(*scale, generator)
        aspect = torch.empty(1).uniform_(*_log_ratio(ratio), generator=generator).exp_().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - w + 1, (1,), generator=generator).item()
            return top, left, h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1 pixel, got {size}")


def check_ranges(highest: float, **ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        if not 0 < low <= high <= highest:
            raise ValueError(f"{name} must be 0 < low <= high <= {highest}, got {(low, high)}")


def color_jitter(image: Image.Image, brightness: float, contrast: float, saturation: float, hue: float,
                 generator: Generator) -> Image.Image:
    """The four adjustments in random order, factors in 1 +- strength, hue in +- strength; a strength of 0 is none."""
    order = torch.randperm(4, generator=generator).tolist()
    factors = [uniform(max(0.0, 1 - strength), 1 + strength, generator) if strength else None
               for strength in (brightness, contrast, saturation)]
    factors.append(uniform(-hue, hue, generator) if hue else None)
    adjust = (pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation, pixels.adjust_hue)
    for which in order:
        if factors[which] is not None:
            image = adjust[which](image, factors[which])
    return image


@dataclass(frozen=True, kw_only=True)
class IjepaTransform:
    """One random crop; the rest is off in every official configuration.  I-JEPA, arXiv:2301.08243, appendix A.

    Colour distortion and blur, where switched on, are SimCLR's (arXiv:2002.05709, appendix A).
    """

    image_size: int = 224                                   # pixels, the model's input
    crop_scale: tuple[float, float] = (0.3, 1.0)            # area, fraction of the image
    crop_ratio: tuple[float, float] = RATIO                 # width / height
    use_horizontal_flip: bool = False                       # with probability 0.5
    use_color_distortion: bool = False                      # jitter with probability 0.8, grayscale with 0.2
    color_jitter_strength: float = 0.0                      # 0.8 s on brightness, contrast, saturation; 0.2 s on hue
    use_gaussian_blur: bool = False                         # with probability 0.5, radius 0.1 to 2 pixels
    mean: tuple[float, ...] = IMAGENET_MEAN                 # per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        check_sizes(image_size=self.image_size)
        check_ranges(1, crop_scale=self.crop_scale)
        check_ranges(math.inf, crop_ratio=self.crop_ratio)

    @property
    def num_views(self) -> int:
        return 1

    def __call__(self, image: Image.Image | Tensor, generator: Generator, view: int = 0) -> Tensor:
        image = pixels.to_pil(image)
        box = random_box(*image.size, self.crop_scale, self.crop_ratio, generator)
        image = pixels.resized_crop(image, box, self.image_size)
        if self.use_horizontal_flip and chance(0.5, generator):
            image = ImageOps.mirror(image)
        if self.use_color_distortion:
            s = self.color_jitter_strength
            if chance(0.8, generator):
                image = color_jitter(image, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, generator)
            if chance(0.2, generator):
                image = pixels.grayscale(image)
        if self.use_gaussian_blur and chance(0.5, generator):
            image = image.filter(ImageFilter.GaussianBlur(uniform(0.1, 2.0, generator)))
        return pixels.to_uint8(image)


@dataclass(frozen=True, kw_only=True)
class Views:
    """How many views of an image there are, and which part of it each shows."""

    num_global: int = 2                                     # views
    num_local: int = 6
    global_size: int = 224                                  # pixels
    local_size: int = 98
    global_scale: tuple[float, float] = (0.3, 1.0)          # area, fraction of the image
    local_scale: tuple[float, float] = (0.05, 0.3)
    crop_ratio: tuple[float, float] = RATIO                 # width / height
    flip_prob: float = 0.5


@dataclass(frozen=True, kw_only=True)
class MultiCrop(Views):
    """Global views, then local ones, all with the same colours.  The defaults are the README of LeJEPA.

    arXiv:2511.08544. The README gives no blur kernel and sigma; here they are MINIMAL.md's.
    """

    flip_last: bool = False                                 # after all else instead of after the crop
    jitter_prob: float = 0.8
    brightness: float = 0.4                                 # strengths, see color_jitter
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1                                        # turns, at most 0.5
    grayscale_prob: float = 0.2
    blur_prob: float = 0.5
    blur_kernel: int = 7                                    # pixels, odd
    blur_sigma: tuple[float, float] = (0.1, 2.0)            # pixels
    solarize_prob: float = 0.2
    solarize_second_prob: float = 1.0                       # below 1: solarised only if a second draw agrees
    solarize_threshold: int = 128                           # levels from here on are inverted
    mean: tuple[float, ...] = IMAGENET_MEAN                 # per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        check_sizes(global_size=self.global_size, local_size=self.local_size)
        check_ranges(1, global_scale=self.global_scale, local_scale=self.local_scale)
        check_ranges(math.inf, crop_ratio=self.crop_ratio, blur_sigma=self.blur_sigma)
        if self.num_views < 1:
            raise ValueError(f"num_global + num_local must be at least 1, got {self.num_global} + {self.num_local}")
        smallest = min(self.global_size, self.local_size)
        if self.blur_kernel % 2 == 0 or smallest <= self.blur_kernel // 2:
            raise ValueError(f"blur_kernel must be odd and less than twice the smallest view, got {self.blur_kernel}")

    @property
    def num_views(self) -> int:
        return self.num_global + self.num_local

    def __call__(self, image: Image.Image | Tensor, generator: Generator, view: int = 0) -> Tensor:
        image = pixels.to_pil(image)
        is_global = view < self.num_global
        box = random_box(*image.size, self.global_scale if is_global else self.local_scale, self.crop_ratio, generator)
        image = pixels.resized_crop(image, box, self.global_size if is_global else self.local_size)
        if not self.flip_last and chance(self.flip_prob, generator):
            image = ImageOps.mirror(image)
        image = self._colors(image, generator)
        if self.flip_last and chance(self.flip_prob, generator):
            image = ImageOps.mirror(image)
        return pixels.to_uint8(image)

    def _colors(self, image: Image.Image, generator: Generator) -> Image.Image:
        if chance(self.jitter_prob, generator):
            image = color_jitter(image, self.brightness, self.contrast, self.saturation, self.hue, generator)
        if chance(self.grayscale_prob, generator):
            image = pixels.grayscale(image)
        if chance(self.blur_prob, generator):
            image = pixels.blur(image, uniform(*self.blur_sigma, generator), self.blur_kernel)
        if chance(self.solarize_prob, generator) and (
                self.solarize_second_prob >= 1 or chance(self.solarize_second_prob, generator)):
            image = ImageOps.solarize(image, self.solarize_threshold)
        return image


def lejepa_minimal_views(num_views: int = 4, image_size: int = 128) -> MultiCrop:
    """The views of LeJEPA's MINIMAL.md: one kind, stronger colours, the flip at the end.

    MINIMAL.md wraps RandomSolarize, which has a probability of 0.5 of its own, in RandomApply(p=0.2): one view in ten.
    """
    return MultiCrop(num_global=num_views, num_local=0, global_size=image_size, global_scale=(0.08, 1.0),
                     flip_last=True, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, solarize_second_prob=0.5)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """No randomness: resize the short side, cut the middle. MINIMAL.md's test images have resize_ratio = 1."""

    image_size: int = 224                                   # pixels
    resize_ratio: float = 256 / 224                         # short side before the cut, in units of image_size, >= 1
    mean: tuple[float, ...] = IMAGENET_MEAN                 # per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        if self.image_size < 1 or self.resize_ratio < 1:
            raise ValueError("image_size and resize_ratio must be at least 1, got "
                             f"{self.image_size} and {self.resize_ratio}")

    @property
    def num_views(self) -> int:
        return 1

    def __call__(self, image: Image.Image | Tensor, generator: Generator | None = None, view: int = 0) -> Tensor:
        image = pixels.resize_short_side(pixels.to_pil(image), round(self.image_size * self.resize_ratio))
        return pixels.to_uint8(pixels.centre_crop(image, self.image_size))


@dataclass(frozen=True, kw_only=True)
class AsIs:
    """The image as it is: for data sets whose images all have one size."""

    mean: tuple[float, ...] = IMAGENET_MEAN                 # per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def num_views(self) -> int:
        return 1

    def __call__(self, image: Image.Image | Tensor, generator: Generator | None = None, view: int = 0) -> Tensor:
        return pixels.to_uint8(image)


Transform = IjepaTransform | MultiCrop | EvalTransform | AsIs
