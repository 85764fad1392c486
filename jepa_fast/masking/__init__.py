"""Masking: from a grid of tokens to context and target lists, and to packed row numbers."""

from .distance import nearest_target
from .masks import MaskCounts, Masks, PackedMasks
from .multiblock import MultiBlock, MultiBlockStream, backend
from .multiblock3d import BlockMask, MultiBlock3D, clip_grid
from .padding import PaddingReport, pad, padding_report
from .random_tube import RandomTube

__all__ = ["BlockMask", "MaskCounts", "Masks", "MultiBlock", "MultiBlock3D", "MultiBlockStream", "PackedMasks",
           "PaddingReport", "RandomTube", "backend", "clip_grid", "nearest_target", "pad", "padding_report"]
