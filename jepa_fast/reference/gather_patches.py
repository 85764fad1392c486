"""Patches of an image or a clip by number: only the visible ones are read. And the adjoint.

    gather:   out[p] = the pixels of patch index[p], in the order of a convolution weight: (c, t, h, w)
    scatter:  pixels of patch n = sum over p with index[p] = n of patches[p], zero where there is none

`Linear(patches, weight.flatten(1), bias)` is then the convolution whose stride is its kernel: the patch embedding of
ViT, arXiv:2010.11929, section 3.1. As in that convolution, pixels beyond the last whole patch of an axis are ignored.
"""

import torch
from torch import Tensor


def gather_patches(pixels: Tensor, index: Tensor | None, patch_size: list[int]) -> Tensor:
    """pixels [B, C, T, H, W] (or without T), index [B, K], [P] or None -> [B, K, L], [P, L] or [B, N, L]."""
    cells = patch_view(pixels, patch_size)
    grid = cells.shape[: 1 + len(patch_size)]  # B and the patches per axis
    if index is None:
        return cells.flatten(-1 - len(patch_size)).flatten(1, -2)
    rows = packed_rows(index, grid[1:].numel())
    return cells[torch.unravel_index(rows, grid)].flatten(index.dim())


def scatter_patches(patches: Tensor, index: Tensor | None, shape: list[int], patch_size: list[int]) -> Tensor:
    """patches [B, K, L], [P, L] or [B, N, L] -> zeros of `shape`, with the patches added into place, in their order."""
    out = patches.new_zeros(shape)
    cells = patch_view(out, patch_size)
    num_tokens = cells.shape[1: 1 + len(patch_size)].numel()
    if index is not None:
        rows = packed_rows(index, num_tokens).flatten()
        wide = patches.flatten(0, -2).to(torch.promote_types(patches.dtype, torch.float32))
        sums = wide.new_zeros(shape[0] * num_tokens, wide.shape[1]).index_add_(0, rows, wide)
        patches = sums.to(patches.dtype)
    cells.copy_(patches.reshape(cells.shape))
    return out


def patch_view(pixels: Tensor, patch_size: list[int]) -> Tensor:
    """[B, C, T, H, W] -> a view [B, grid_t, grid_h, grid_w, C, p_t, p_h, p_w]; the same without T."""
    axes = len(patch_size)
    for axis, size in enumerate(patch_size):
        pixels = pixels.unfold(2 + axis, size, size)  # pixels of the patch go to the end
    return pixels.movedim(1, 1 + axes)


def packed_rows(index: Tensor, num_tokens: int) -> Tensor:
    """Token numbers [B, K] -> rows of the packed batch; an index [P] has them already."""
    if index.dim() == 1:
        return index
    return index + num_tokens * torch.arange(index.shape[0], device=index.device).unsqueeze(1)
