"""Random views of a whole batch of small images at once, on the device where the batch is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .pixels import gaussian_blur
from .seeds import generator_for

# one uniform number in [0, 1) per image, view and name
_DRAWS = ("area", "ratio", "left", "top", "angle", "shear", "zoom", "shift_x", "shift_y", "gamma", "brightness",
          "contrast", "blur", "sigma", "erase", "erase_area", "erase_ratio", "erase_left", "erase_top")


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return draw * (high - low) + low


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@dataclass(frozen=True, kw_only=True)
class TensorAugment:
    """Crop, rotation, shear and elastic field in one resampling; then blur, tone, erasing. A strength of 0 is none.

    Outside of the image all is 0 (black). A pure function of (images, seed, step): the parameters are drawn on the CPU
    for the global batch, so ranks, devices and resumed runs agree.
    """

    num_global: int = 2                                     # views
    num_local: int = 0
    global_size: int = 28                                   # pixels
    local_size: int = 20
    global_scale: tuple[float, float] = (0.6, 1.0)          # area of the crop, fraction of the image
    local_scale: tuple[float, float] = (0.25, 0.6)
    crop_ratio: float = 1.2                                 # aspect in [1 / crop_ratio, crop_ratio], log-uniform
    rotation: float = 15.0                                  # degrees, +-
    shear: float = 0.2                                      # tangent, +-
    zoom: tuple[float, float] = (1.0, 1.0)                  # magnification, on top of the crop's
    translation: float = 0.0                                # fraction of the side, +-, on top of the crop's
    elastic: float = 0.0                                    # std of the displacement, in half crops
    elastic_grid: int = 5                                   # control points per side
    gamma: float = 0.0                                      # value ** exp(+- gamma)
    brightness: float = 0.0                                 # value * (1 +- brightness)
    contrast: float = 0.0                                   # distance from the image's mean * (1 +- contrast)
    blur_prob: float = 0.0
    blur_kernel: int = 5                                    # pixels, odd
    blur_sigma: tuple[float, float] = (0.1, 1.0)            # pixels
    erase_prob: float = 0.0                                 # one black rectangle
    erase_scale: tuple[float, float] = (0.02, 0.2)          # area of the rectangle, fraction of the view
    erase_ratio: float = 2.0                                # aspect in [1 / erase_ratio, erase_ratio], log-uniform
    mean: tuple[float, ...] = (0.1307,)                     # per channel, of values in [0, 1]; here MNIST's
    std: tuple[float, ...] = (0.3081,)

    def __post_init__(self):
        if self.num_views < 1 or min(self.global_size, self.local_size) < 1:
            raise ValueError(f"there must be a view and a pixel, got num_global={self.num_global}, num_local="
                             f"{self.num_local}, global_size={self.global_size}, local_size={self.local_size}")
        if self.crop_ratio < 1 or self.erase_ratio < 1:
            raise ValueError("crop_ratio and erase_ratio must be at least 1, got "
                             f"{self.crop_ratio} and {self.erase_ratio}")
        smallest = min(self.global_size, self.local_size)
        if self.blur_kernel % 2 == 0 or (self.blur_prob and smallest <= self.blur_kernel // 2):
            raise ValueError(f"blur_kernel must be odd and less than twice the smallest view, got {self.blur_kernel}")

    @property
    def num_views(self) -> int:
        return self.num_global + self.num_local

    def __call__(self, images: Tensor, seed: int, step: int, first: int = 0, total: int | None = None) -> list[Tensor]:
        """images [B, C, H, W], uint8 or float in [0, 1] -> num_views tensors [B, C, size, size] float32 in [0, 1].

        The images are rows `first` to `first + B` of a global batch of `total` (default B).
        """
        B = images.shape[0]
        total = B if total is None else total
        if not 0 <= first <= first + B <= total:
            raise ValueError(f"first must be in [0, total - B] = [0, {total - B}], got {first}")
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        generator = generator_for(seed, step)
        draws = torch.rand(total, self.num_views, len(_DRAWS), generator=generator)[first:first + B]
        grid = self.elastic_grid
        field = torch.randn(total, self.num_views, 2, grid, grid, generator=generator)[first:first + B]
        views = []
        for view in range(self.num_views):
            is_global = view < self.num_global
            size = self.global_size if is_global else self.local_size
            scale = self.global_scale if is_global else self.local_scale
            draw = dict(zip(_DRAWS, draws[:, view].unbind(1), strict=True))
            views.append(self._view(images, draw, field[:, view], size, scale))
        return views

    def _view(self, images: Tensor, draw: dict[str, Tensor], field: Tensor, size: int,
              scale: tuple[float, float]) -> Tensor:
        device = images.device
        theta, half = self.affine(draw, scale, images.shape[-2] / images.shape[-1])
        grid = self._grid(theta.to(device, non_blocking=True), size)
        if self.elastic:
            field = field.to(device, non_blocking=True) * self.elastic
            field = F.interpolate(field, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
            grid = grid + field * half.to(device, non_blocking=True)[:, None, None, :]
        views = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        draw = {name: values.to(device, non_blocking=True) for name, values in draw.items()}
        return self._erase(self._tone(self._blur(views, draw), draw), draw)

    @staticmethod
    def _grid(theta: Tensor, size: int) -> Tensor:
        """[B, size, size, 2]: theta of the middle of each pixel; F.affine_grid is a matmul, TF32 on some GPUs."""
        middle = (2 * torch.arange(size, device=theta.device) + 1) / size - 1
        x, y = middle[None, None, :, None], middle[None, :, None, None]
        columns = theta[:, None, None]                               # [B, 1, 1, 2, 3]
        return columns[..., 0] * x + columns[..., 1] * y + columns[..., 2]

    def affine(self, draw: dict[str, Tensor], scale: tuple[float, float], aspect: float) -> tuple[Tensor, Tensor]:
        """theta [B, 2, 3] and half [B, 2], the crop's half-width and half-height, for draws [B] in [0, 1).

        theta maps points of the view to points of the image, each spanning [-1, 1] both ways: crop, then shear, then
        rotation about the middle of the crop.  aspect = height / width of the image.
        """
        area = _between(draw["area"], *scale)
        ratio = (_between(draw["ratio"], -1, 1) * math.log(self.crop_ratio)).exp()
        half = torch.stack([area * ratio, area / ratio], dim=1).sqrt()
        middle = _between(torch.stack([draw["left"], draw["top"]], dim=1), -1, 1) * (1 - half).clamp(min=0)
        middle = middle + _between(torch.stack([draw["shift_x"], draw["shift_y"]], dim=1), -2, 2) * self.translation
        half = half / _between(draw["zoom"], *self.zoom)[:, None]
        angle = _between(draw["angle"], -1, 1) * math.radians(self.rotation)
        shear = _between(draw["shear"], -1, 1) * self.shear
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([cos, (cos * shear - sin) * aspect, sin / aspect, sin * shear + cos], dim=1).view(-1, 2, 2)
        return torch.cat([turn * half[:, None, :], middle[:, :, None]], dim=2), half

    def _blur(self, views: Tensor, draw: dict[str, Tensor]) -> Tensor:
        if not self.blur_prob:
            return views
        # a tiny sigma has the kernel (0, 1, 0): no branch per image
        sigma = torch.where(draw["blur"] < self.blur_prob, _between(draw["sigma"], *self.blur_sigma), 1e-3)
        return gaussian_blur(views, sigma, self.blur_kernel)

    def _tone(self, views: Tensor, draw: dict[str, Tensor]) -> Tensor:
        if self.gamma:
            views = views.clamp(0, 1) ** _per_image((_between(draw["gamma"], -1, 1) * self.gamma).exp())
        if self.brightness:
            views = (views * _per_image(1 + _between(draw["brightness"], -1, 1) * self.brightness)).clamp(0, 1)
        if self.contrast:
            mean = views.mean(dim=(1, 2, 3), keepdim=True)
            factor = _per_image(1 + _between(draw["contrast"], -1, 1) * self.contrast)
            views = ((views - mean) * factor + mean).clamp(0, 1)
        return views

    def _erase(self, views: Tensor, draw: dict[str, Tensor]) -> Tensor:
        if not self.erase_prob:
            return views
        area = _between(draw["erase_area"], *self.erase_scale)
        ratio = (_between(draw["erase_ratio"], -1, 1) * math.log(self.erase_ratio)).exp()
        height, width = views.shape[-2:]
        columns = self._span(draw["erase_left"], (area * ratio).sqrt(), width)
        rows = self._span(draw["erase_top"], (area / ratio).sqrt(), height)
        hit = (draw["erase"] < self.erase_prob)[:, None, None]
        return views.masked_fill((hit & rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    @staticmethod
    def _span(start: Tensor, length: Tensor, side: int) -> Tensor:
        """[B, side] bool: pixels whose middle lies in a stretch of `length`, a fraction of the side, that fits."""
        length = length.clamp(max=1) * side
        start = (start * (side - length))[:, None]
        middle = torch.arange(side, device=start.device) + 0.5
        return (middle >= start) & (middle < start + length[:, None])
