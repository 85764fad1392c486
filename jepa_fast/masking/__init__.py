"""Masking: from a grid of tokens to context and target lists, and to packed row numbers."""

from jepa_fast.masking.masks import Masks, PackedMasks
from jepa_fast.masking.multiblock import MultiBlock, MultiBlockStream, backend

__all__ = ["Masks", "MultiBlock", "MultiBlockStream", "PackedMasks", "backend"]
