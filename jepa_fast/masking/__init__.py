"""Masking: from a grid of tokens to context and target lists, and to packed row numbers."""

from .masks import Masks, PackedMasks
from .multiblock import MultiBlock, MultiBlockStream, backend

__all__ = ["Masks", "MultiBlock", "MultiBlockStream", "PackedMasks", "backend"]
