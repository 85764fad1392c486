"""Clips to tubelet tokens, embedding only the visible tubelets."""

from torch import Tensor, nn

from ..nn.linear import linear
from ..ops import gather_patches


class TubeletEmbed(nn.Module):
    """A 3-D convolution with stride equal to its kernel, computed as one matrix product over the kept tubelets.

    Its parameters are a Conv3d's (`proj.weight` [D, C, t, p, p], `proj.bias` [D]), as in the official checkpoints.
    """

    def __init__(self, tubelet_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.tubelet_size, self.patch_size = tubelet_size, patch_size
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

    def grid(self, clips: Tensor) -> tuple[int, int, int]:
        """Time steps, rows and columns of clips [B, C, T, H, W]. ValueError where frames or pixels would be left over."""
        sizes, kernel = clips.shape[2:], self.proj.kernel_size
        if len(sizes) != 3 or any(size % unit or not size for size, unit in zip(sizes, kernel, strict=True)):
            raise ValueError(f"clips must be [B, C, frames, height, width], multiples of {kernel[0]} frames and "
                             f"{kernel[1]} x {kernel[2]} pixels, got {list(clips.shape)}")
        return tuple(size // unit for size, unit in zip(sizes, kernel, strict=True))

    def forward(self, clips: Tensor, index: Tensor | None = None) -> Tensor:
        """clips [B, C, T, H, W] -> [B, N, D], or with packed rows `index` [P] of [B * N] -> [P, D]."""
        tubelets = gather_patches(clips, index, self.proj.kernel_size)
        return linear(tubelets, self.proj.weight.flatten(1), self.proj.bias)

    def frames(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> [B, H / p * W / p, D]: each as the clip that repeats it for one tubelet.

        The kernel's sum over time does that without the copies: the same products, added in another order.
        """
        patches = gather_patches(images, None, (self.patch_size, self.patch_size))
        return linear(patches, self.proj.weight.sum(2).flatten(1), self.proj.bias)
