"""What happens to pixels, given all parameters: no randomness here.

Images are PIL images in mode RGB or L, or uint8 tensors [C, H, W]; values agree with torchvision's PIL operations.
"""

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F


def to_pil(image: Image.Image | Tensor) -> Image.Image:
    """uint8 [C, H, W], C 1 or 3 -> PIL image in mode L or RGB; a PIL image passes through."""
    if isinstance(image, Image.Image):
        return image
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be [1 or 3, H, W] uint8, got {tuple(image.shape)} {image.dtype}")
    return Image.fromarray((image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)).numpy())


def to_uint8(image: Image.Image | Tensor) -> Tensor:
    """PIL image -> uint8 [C, H, W], C = 1 for mode L and 3 for mode RGB; a tensor passes through."""
    if isinstance(image, Tensor):
        return image
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std in float32; images [..., C, H, W] uint8, read as value / 255, or float in [0, 1].

    mean, std float32 [C, 1, 1] on the same device.
    """
    images = images.float().div_(255) if images.dtype == torch.uint8 else images
    return (images - mean).div_(std)


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Bilinear with antialiasing; the short side becomes `size` pixels, the long one follows, rounded down."""
    width, height = image.size
    if width <= height:
        return image.resize((size, int(size * height / width)), Image.Resampling.BILINEAR)
    return image.resize((int(size * width / height), size), Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle [size, size] pixels; half pixels round to even, as torchvision does."""
    left, top = (int(round((side - size) / 2)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """Cut `box` = (top, left, height, width), then resize to [size, size], bilinear with antialiasing."""
    top, left, height, width = box
    # in two steps: resize(box=...) would filter with pixels from outside the box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BILINEAR)


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black; factor 0 black, 1 unchanged."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image's mean grey; factor 0 grey, 1 unchanged."""
    return ImageEnhance.Contrast(image).enhance(factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the grayscale image; factor 0 grayscale, 1 unchanged."""
    return ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift` in [-0.5, 0.5] turns, in whole steps of 1/255; grayscale images have no hue."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    steps = int(shift * 255)
    hue = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert(image.mode)


def grayscale(image: Image.Image) -> Image.Image:
    """The luminance, in the mode the image had."""
    return image.convert("L").convert(image.mode)


def blur(image: Image.Image, sigma: float, kernel_size: int) -> Image.Image:
    """`gaussian_blur` of one image, rounded to whole levels; `sigma` in pixels."""
    blurred = gaussian_blur(to_uint8(image).unsqueeze(0).float(), torch.tensor([sigma]), kernel_size)
    return to_pil(blurred[0].round_().to(torch.uint8))


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur each image with its own sigma; borders are mirrored.

    images [B, C, H, W] float, H and W above kernel_size // 2; sigma [B] in pixels; kernel_size odd.
    """
    half = kernel_size // 2
    distance = torch.arange(-half, half + 1, device=images.device) / sigma[:, None]
    kernel = torch.softmax(distance.square() / -2, dim=1)[:, :, None, None, None]   # [B, kernel_size, 1, 1, 1]
    height, width = images.shape[-2:]
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    # sums of shifted images: on a CPU faster than a grouped convolution, and each image keeps its own kernel
    columns = sum(kernel[:, k] * padded[..., k:k + width] for k in range(kernel_size))
    return sum(kernel[:, k] * columns[..., k:k + height, :] for k in range(kernel_size))
