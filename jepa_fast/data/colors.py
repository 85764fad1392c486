"""Colours of many images at once, each by a factor of its own: torchvision's float semantics, on any device.

images float [N, C, H, W] in [0, 1], C 1 or 3; factors [N].
"""

import torch
from torch import Tensor

# ITU-R 601-2 luma, as torchvision rounds it
_LUMA = (0.2989, 0.587, 0.114)


def _each(factors: Tensor) -> Tensor:
    return factors[:, None, None, None]


def grey(images: Tensor) -> Tensor:
    """[N, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black; factor 0 black, 1 unchanged."""
    return (images * _each(factors)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's mean grey."""
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.addcmul(mean * (1 - _each(factors)), images, _each(factors)).clamp_(0, 1)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image; an image of one channel has no saturation."""
    if images.shape[1] == 1:
        return images
    return torch.addcmul(grey(images) * (1 - _each(factors)), images, _each(factors)).clamp_(0, 1)


def hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue by `shifts`, in turns; an image of one channel has no hue.

    Without a detour over HSV's six sectors: channel n of a colour of hue h, value v and chroma c is
    v - c * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 h) mod 6 for n = 5, 3, 1.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, lowest = images.amax(1), images.amin(1)
    chroma = value - lowest
    safe = torch.where(chroma > 0, chroma, 1)
    h = torch.where(value == red, (green - blue) / safe,
                    torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    h = h + 6 * shifts[:, None, None]
    channels = [value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in ((n + h).remainder(6) for n in (5, 3, 1))]
    return torch.stack(channels, dim=1)


def blend_to_grey(images: Tensor, is_grey: Tensor) -> Tensor:
    """Grey where is_grey [N], in as many channels as before."""
    return torch.where(_each(is_grey), grey(images), images)


def solarize(images: Tensor, is_solarized: Tensor, threshold: float) -> Tensor:
    """1 - value for values from the threshold on, where is_solarized [N]."""
    return torch.where(_each(is_solarized) & (images >= threshold), 1 - images, images)
