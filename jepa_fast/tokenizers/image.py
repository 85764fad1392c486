"""Images to patch tokens, embedding only the visible patches."""

from torch import Tensor, nn

from ..nn.linear import linear
from ..ops import gather_patches


class PatchEmbed(nn.Module):
    """A convolution with stride equal to its kernel, computed as one matrix product over the kept patches.

    Its parameters are a Conv2d's (`proj.weight` [D, C, p, p], `proj.bias` [D]), as in the official checkpoints.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images [B, C, H, W]."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """images [B, C, H, W] -> [B, N, D], or with packed rows `index` [P] of [B * N] -> [P, D]."""
        patches = gather_patches(images, index, (self.patch_size, self.patch_size))
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)
