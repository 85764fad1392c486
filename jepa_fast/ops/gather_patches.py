"""Visible patches of images and clips by number (`gather_patches`), and the adjoint; each is the other's backward."""

import math

import torch
from torch import Tensor

from ..reference import gather_patches as reference
from ._backends import compiled, cuda, triton
from ._define import define
from .gather_tokens import _check_range


def _num_tokens(shape, patch_size) -> int:
    return math.prod([size // patch for size, patch in zip(shape[2:], patch_size, strict=True)])


def _check_index(index, shape, patch_size):
    if index is not None:
        _check_range("index", index, _num_tokens(shape, patch_size) * (shape[0] if index.dim() == 1 else 1))


def _out_shape(pixels, index, patch_size):
    rows = (pixels.shape[0], _num_tokens(pixels.shape, patch_size)) if index is None else index.shape
    return (*rows, pixels.shape[1] * math.prod(patch_size))


def _as_clip(pixels, patch_size):
    """An image is a clip of one frame."""
    return (pixels.unsqueeze(2), [1, *patch_size]) if len(patch_size) == 2 else (pixels, patch_size)


def _gather_native(raw, pixels, index, patch_size):
    out = pixels.new_empty(_out_shape(pixels, index, patch_size))
    clip, patch = _as_clip(pixels, patch_size)
    raw.gather_patches(clip, None if index is None else index.contiguous(), *patch, out)
    return out


def _scatter_native(raw, patches, index, shape, patch_size):
    is_covered = all(size % patch == 0 for size, patch in zip(shape[2:], patch_size, strict=True))
    out = patches.new_empty(shape) if is_covered else patches.new_zeros(shape)
    clip, patch = _as_clip(out, patch_size)
    raw.scatter_patches(
        patches.contiguous(), None if index is None else index.contiguous(), *patch, clip)
    return out


define("gather_patches(Tensor pixels, Tensor? index, int[] patch_size) -> Tensor",
       plain=reference.gather_patches,
       cpp=compiled("gather_patches", (torch.float32, torch.bfloat16, torch.float16, torch.float64), _gather_native),
       triton=triton("gather_patches"),
       cuda=cuda("gather_patches", call=_gather_native),
       check=lambda pixels, index, patch_size: _check_index(index, pixels.shape, patch_size))
define("scatter_patches(Tensor patches, Tensor? index, SymInt[] shape, int[] patch_size) -> Tensor",
       plain=reference.scatter_patches,
       cpp=compiled("scatter_patches", (torch.float32, torch.bfloat16, torch.float64), _scatter_native),
       triton=triton("gather_patches.scatter_patches"),
       cuda=cuda("scatter_patches", call=_scatter_native),
       check=lambda patches, index, shape, patch_size: _check_index(index, shape, patch_size))


@torch.library.register_fake("jepa_fast::gather_patches")
def _(pixels, index, patch_size):
    return pixels.new_empty(_out_shape(pixels, index, patch_size))


@torch.library.register_fake("jepa_fast::scatter_patches")
def _(patches, index, shape, patch_size):
    return patches.new_empty(shape)


def _save_gather(ctx, inputs, output):
    pixels, index, ctx.patch_size = inputs
    ctx.shape = pixels.shape
    ctx.save_for_backward(index)


def _gather_backward(ctx, grad):
    return torch.ops.jepa_fast.scatter_patches(grad, *ctx.saved_tensors, ctx.shape, ctx.patch_size), None, None


def _save_scatter(ctx, inputs, output):
    _, index, _, ctx.patch_size = inputs
    ctx.save_for_backward(index)


def _scatter_backward(ctx, grad):
    return torch.ops.jepa_fast.gather_patches(grad, *ctx.saved_tensors, ctx.patch_size), None, None, None


torch.library.register_autograd("jepa_fast::gather_patches", _gather_backward, setup_context=_save_gather)
torch.library.register_autograd("jepa_fast::scatter_patches", _scatter_backward, setup_context=_save_scatter)


def gather_patches(pixels: Tensor, index: Tensor | None, patch_size: tuple[int, ...]) -> Tensor:
    """The pixels of the patches named by `index`, one row each; the other patches are not read.

    pixels [B, C, H, W] with patch_size (p_h, p_w), or [B, C, T, H, W] with (p_t, p_h, p_w); any strides. Patches are
    numbered row-major: (row, column), or (time, row, column). index int64: [B, K] token numbers -> [B, K, L], or [P]
    rows `b * N + token` of the packed batch -> [P, L], or None for all -> [B, N, L]. A patch is its L = C * p_t * p_h *
    p_w pixels in the order (c, t, h, w) of a flattened convolution weight. Pixels beyond the last whole patch of an
    axis are ignored, as a convolution with stride = kernel ignores them. Indices may repeat; gradients add up.
    Raises IndexError for an index out of range (CPU; undefined on a GPU).
    """
    _check("pixels", pixels.shape, patch_size)
    _check_tensors("pixels", pixels, index)
    _check_samples("pixels", pixels.shape, index)
    return torch.ops.jepa_fast.gather_patches(pixels, index, list(patch_size))


def scatter_patches(patches: Tensor, index: Tensor | None, shape: tuple[int, ...],
                    patch_size: tuple[int, ...]) -> Tensor:
    """Put patches back at their place in pixels of `shape`: the adjoint of `gather_patches`.

    patches, index and patch_size as `gather_patches` returns and takes them; shape [B, C, H, W] or [B, C, T, H, W].
    Patches named more than once are summed; pixels of no patch are zero. Raises IndexError for an index out of range
    (CPU).
    """
    _check("shape", shape, patch_size)
    _check_tensors("patches", patches, index)
    _check_samples("shape", shape, index)
    rows = [shape[0], _num_tokens(shape, patch_size)] if index is None else [*index.shape]
    expected = [*rows, shape[1] * math.prod(patch_size)]
    if list(patches.shape) != expected:
        raise ValueError(f"patches must be {expected} for this index, shape and patch_size, got {list(patches.shape)}")
    return torch.ops.jepa_fast.scatter_patches(patches, index, list(shape), list(patch_size))


def _check(name: str, shape: tuple[int, ...], patch_size: tuple[int, ...]) -> None:
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise ValueError(f"patch_size must be (p_h, p_w) or (p_t, p_h, p_w), each at least 1, got {tuple(patch_size)}")
    if len(shape) != len(patch_size) + 2:
        expected = "[B, C, H, W]" if len(patch_size) == 2 else "[B, C, T, H, W]"
        raise ValueError(f"{name} must be {expected} for patch_size {tuple(patch_size)}, got {list(shape)}")
    if any(size < patch for size, patch in zip(shape[2:], patch_size, strict=True)):
        raise ValueError(f"{name} must hold at least one patch of {tuple(patch_size)}, got {list(shape)}")


def _check_tensors(name: str, x: Tensor, index: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if index is None:
        return
    if index.dtype != torch.int64 or index.dim() not in (1, 2):
        raise ValueError(f"index must be [B, K] or [P] int64, got {list(index.shape)} {index.dtype}")
    if x.device != index.device:
        raise ValueError(f"{name} and index must be on one device, got {x.device} and {index.device}")


def _check_samples(name: str, shape: tuple[int, ...], index: Tensor | None) -> None:
    if index is not None and index.dim() == 2 and index.shape[0] != shape[0]:
        raise ValueError(f"index must be [B, K] with B = {shape[0]} as {name}, got {list(index.shape)}")
