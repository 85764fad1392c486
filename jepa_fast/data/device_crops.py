"""Multi-crop on the device: the loader's processes only decode, every view is cut and coloured where the model is.

    cut(image)  -> Whole                    in a loader's process: the pixels as they are, large images shrunk
    pack_whole  -> {"pixels" [P, C] uint8, "layout" [B, 3], "originals" [B, 2]}     images of any sizes, end to end
    draw(...)   -> "params" beside them     on the host, ahead of time: all that is random, for each view of each row
    views(...)  -> [B, C, h, w] per view    on the device: one crop_resize per view size, colours, mean and std

An image is decoded and moved once however many views it has, and not resized twice.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..ops import crop_resize
from . import colors
from .draws import Draws
from .pixels import gaussian_blur, to_pil
from .seeds import generator_for
from .transforms import IMAGENET_MEAN, IMAGENET_STD, IjepaTransform, MultiCrop, Views, check_ranges, check_sizes

# boxes tried before the largest centred one is taken, as RandomResizedCrop does
_TRIES = 10
_PARAMS = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation", "hue", "gray", "sigma",
           "solarize")


class Whole(NamedTuple):
    pixels: Tensor              # uint8 [h, w, C]
    original: tuple[int, int]   # height and width before it was shrunk


def pack_whole(samples: list[Whole]) -> dict[str, Tensor]:
    """Images of any sizes as one tensor, and where each lies: first pixel, height, width."""
    sizes = torch.tensor([sample.pixels.shape[:2] for sample in samples])
    ends = sizes.prod(1).cumsum(0)
    return {"pixels": torch.cat([sample.pixels.flatten(0, 1) for sample in samples]),
            "layout": torch.cat([(ends - sizes.prod(1))[:, None], sizes], dim=1),
            "originals": torch.tensor([sample.original for sample in samples])}


@dataclass(frozen=True, kw_only=True)
class DeviceMultiCrop(Views):
    """Global views, then local ones: MultiCrop's, made on the device. The defaults are the README of LeJEPA.

    Boxes are drawn as RandomResizedCrop draws them, in whole pixels of the original. Pixels are not rounded to levels
    between the steps, the four colour adjustments come in an order drawn once per step (kornia's way; torchvision draws it
    per image). All is a function of (images, seed, step, row of the global batch): ranks and resumed runs agree.
    """

    jitter_prob: float = 0.8                                # of the four that follow, together
    brightness: float = 0.4                                 # factors in 1 +- strength
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1                                        # turns, +-, at most 0.5
    grayscale_prob: float = 0.2
    blur_prob: tuple[float, ...] = (0.5,)                   # for all views, or one for each
    blur_kernel: int = 7                                    # pixels, odd
    blur_sigma: tuple[float, float] = (0.1, 2.0)            # pixels
    solarize_prob: tuple[float, ...] = (0.2,)               # for all views, or one for each
    solarize_threshold: int = 128                           # levels from here on are inverted
    decode_size: int = 512                                  # images with a longer short side are shrunk to it; 0: none are
    mean: tuple[float, ...] = IMAGENET_MEAN                 # per channel, of values in [0, 1]
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        check_sizes(global_size=self.global_size, local_size=self.local_size)
        check_ranges(1, global_scale=self.global_scale, local_scale=self.local_scale)
        check_ranges(math.inf, crop_ratio=self.crop_ratio, blur_sigma=self.blur_sigma)
        if self.num_global < 0 or self.num_local < 0 or self.num_views < 1:
            raise ValueError("num_global and num_local must be at least 0 and not both 0, got "
                             f"{self.num_global} and {self.num_local}")
        smallest = min(self.global_size, self.local_size)
        if self.blur_kernel % 2 == 0 or smallest <= self.blur_kernel // 2:
            raise ValueError(f"blur_kernel must be odd and less than twice the smallest view, got {self.blur_kernel}")
        for name in ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"):
            value = getattr(self, name)
            each = value if isinstance(value, tuple) else (value,)
            count = f", one or {self.num_views} of them" if isinstance(value, tuple) else ""
            if len(each) not in (1, self.num_views) or not all(0 <= p <= 1 for p in each):
                raise ValueError(f"{name} must be a probability in [0, 1]{count}, got {value}")
        if not 0 <= self.hue <= 0.5 or min(self.brightness, self.contrast, self.saturation) < 0:
            raise ValueError("brightness, contrast and saturation must be at least 0 and hue in [0, 0.5], got "
                             f"{self.brightness}, {self.contrast}, {self.saturation} and {self.hue}")
        if self.decode_size < 0:
            raise ValueError(f"decode_size must be at least 0 pixels, got {self.decode_size}")

    @property
    def num_views(self) -> int:
        return self.num_global + self.num_local

    def cut(self, image: Image.Image | Tensor) -> Whole:
        """PIL (RGB or L) or uint8 [C, H, W] -> its pixels, the short side at most decode_size."""
        image = to_pil(image)
        width, height = image.size
        shrink = self.decode_size / min(width, height) if self.decode_size else 1
        if shrink < 1:
            size = round(width * shrink), round(height * shrink)
            image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
        pixels = torch.from_numpy(np.array(image))
        return Whole(pixels if pixels.dim() == 3 else pixels.unsqueeze(2), (height, width))

    def draw(self, packed: dict, seed: int, step: int, first: int = 0) -> dict:
        """"params" float32 [V, B, 12] and "order" of the colour adjustments beside the pixels; rows first and following."""
        layout, originals = packed["layout"].cpu(), packed["originals"].cpu()
        draws = Draws(seed, torch.arange(first, first + len(layout)), step)
        u = draws.uniform(self.num_views, _TRIES, 4).double().transpose(0, 1)
        scales = [self.global_scale] * self.num_global + [self.local_scale] * self.num_local
        boxes = torch.stack([self.boxes(u[view], originals, scale) for view, scale in enumerate(scales)])
        shrink = (layout[:, 1:] / originals).repeat(1, 2)
        u = draws.uniform(self.num_views, 10).transpose(0, 1)
        params = torch.cat([(boxes * shrink).float(), self._tones(u)], dim=2)
        order = torch.randperm(4, generator=generator_for(seed, step)).tolist()
        return {"pixels": packed["pixels"], "layout": packed["layout"], "params": params, "order": order}

    def boxes(self, u: Tensor, sizes: Tensor, scale: tuple[float, float]) -> Tensor:
        """Boxes [B, 4] in whole pixels of images of `sizes` [B, 2] (height, width), from u [B, tries, 4] in (0, 1)."""
        height, width = sizes.double()[:, None].unbind(2)
        area = height * width * (scale[0] + u[..., 0] * (scale[1] - scale[0]))
        low, high = (math.log(ratio) for ratio in self.crop_ratio)
        ratio = (low + u[..., 1] * (high - low)).exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top, left = (u[..., 2] * (height - h + 1)).floor(), (u[..., 3] * (width - w + 1)).floor()
        # the first that fits
        tried = torch.stack([top, left, h, w], dim=2)
        chosen = tried[torch.arange(len(u)), fits.double().argmax(1)]
        h, w = height[:, 0], width[:, 0]
        narrow, wide = w / h < self.crop_ratio[0], w / h > self.crop_ratio[1]
        box_h = torch.where(narrow, (w / self.crop_ratio[0]).round(), h)
        box_w = torch.where(wide, (h * self.crop_ratio[1]).round(), w)
        middle = torch.stack([((h - box_h) / 2).floor(), ((w - box_w) / 2).floor(), box_h, box_w], dim=1)
        return torch.where(fits.any(1, keepdim=True), chosen, middle)

    def _tones(self, u: Tensor) -> Tensor:
        """What follows the box, [V, B, 8], for u [V, B, 10] in (0, 1); where a step is left out it changes nothing."""
        is_jittered = u[..., 0] < self.jitter_prob
        factors = [torch.where(is_jittered, max(0.0, 1 - s) + u[..., 1 + i] * (1 + s - max(0.0, 1 - s)), 1)
                   for i, s in enumerate((self.brightness, self.contrast, self.saturation))]
        hue = torch.where(is_jittered, (2 * u[..., 4] - 1) * self.hue, 0)
        # a tiny sigma has the kernel (0, 1, 0): no branch per image
        sigma = torch.where(u[..., 5] < _per_view(self.blur_prob), self.blur_sigma[0] + u[..., 6] * (
            self.blur_sigma[1] - self.blur_sigma[0]), 1e-3)
        return torch.stack([u[..., 7] < self.flip_prob, *factors, hue, u[..., 8] < self.grayscale_prob, sigma,
                            u[..., 9] < _per_view(self.solarize_prob)], dim=2)

    def views(self, drawn: dict, mean: Tensor | None = None, std: Tensor | None = None) -> list[Tensor]:
        """What `draw` returned, on a device -> float32 [B, C, size, size] per view; in [0, 1] without mean and std [C]."""
        views, G = [], self.num_global
        for params, size in ((drawn["params"][:G], self.global_size), (drawn["params"][G:], self.local_size)):
            if len(params):
                index = torch.arange(params.shape[1], device=params.device).repeat(len(params))
                stacked = self._make(drawn, params.flatten(0, 1), index, size, mean, std)
                views += stacked.view(*params.shape[:2], *stacked.shape[1:]).unbind(0)
        return views

    def _make(self, drawn: dict, params: Tensor, index: Tensor, size: int, mean: Tensor | None,
              std: Tensor | None) -> Tensor:
        param = dict(zip(_PARAMS, params.unbind(1), strict=True))
        fused = {"mean": mean, "std": std} if not self._has_tones else {}
        images = crop_resize(drawn["pixels"], params[:, :4], index, (size, size), flips=param["flip"] > 0,
                             layout=drawn["layout"], **fused)
        if not self._has_tones:
            return images
        for which in drawn["order"] if self.jitter_prob else ():
            name = ("brightness", "contrast", "saturation", "hue")[which]
            images = getattr(colors, name)(images, param[name]) if getattr(self, name) else images
        if self.grayscale_prob:
            images = colors.blend_to_grey(images, param["gray"] > 0)
        if any(self.blur_prob):
            images = gaussian_blur(images, param["sigma"], self.blur_kernel)
        if any(self.solarize_prob):
            images = colors.solarize(images, param["solarize"] > 0, self.solarize_threshold / 255)
        return images if mean is None else images.sub_(mean[:, None, None]).div_(std[:, None, None])

    @property
    def _has_tones(self) -> bool:
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        return bool(self.jitter_prob and any(strengths) or self.grayscale_prob or any(self.blur_prob)
                    or any(self.solarize_prob))


def _per_view(probabilities: tuple[float, ...]) -> Tensor:
    return torch.tensor(probabilities)[:, None]


def ijepa_views(image_size: int = 224) -> DeviceMultiCrop:
    """I-JEPA's one crop and nothing else, arXiv:2301.08243, appendix A."""
    return DeviceMultiCrop(num_global=1, num_local=0, global_size=image_size, flip_prob=0.0, jitter_prob=0.0,
                           grayscale_prob=0.0, blur_prob=(0.0,), solarize_prob=(0.0,))


def dino_views(num_local: int = 8) -> DeviceMultiCrop:
    """DINOv2's two global views, blurred always and rarely, and its local ones, arXiv:2304.07193."""
    return DeviceMultiCrop(num_local=num_local, local_size=96, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32),
                           blur_prob=(1.0, 0.1, *[0.5] * num_local), blur_kernel=9,
                           solarize_prob=(0.0, 0.2, *[0.0] * num_local))


def on_device(transform) -> DeviceMultiCrop:
    """The views of an IjepaTransform or a MultiCrop, made on the device; ValueError for other transforms.

    Drawn otherwise, so other views of the same distribution.
    """
    if isinstance(transform, DeviceMultiCrop):
        return transform
    if isinstance(transform, MultiCrop):
        shared = {field.name for field in dataclasses.fields(transform)} & {
            field.name for field in dataclasses.fields(DeviceMultiCrop)}
        values = {name: getattr(transform, name) for name in shared}
        return DeviceMultiCrop(**values | {"blur_prob": (transform.blur_prob,),
                                           "solarize_prob": (transform.solarize_prob * transform.solarize_second_prob,)})
    if isinstance(transform, IjepaTransform) and not transform.use_gaussian_blur and not transform.use_color_distortion:
        return dataclasses.replace(
            ijepa_views(transform.image_size), global_scale=transform.crop_scale, crop_ratio=transform.crop_ratio,
            flip_prob=0.5 * transform.use_horizontal_flip, mean=transform.mean, std=transform.std)
    raise ValueError("views are made on the device for a MultiCrop, or an IjepaTransform without colour distortion and "
                     f"blur, got {transform}")
