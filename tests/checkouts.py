"""Modules of an official repository, imported from a checkout: as the bench of patches imports them."""

from bench.checkouts import checkout

__all__ = ["checkout"]
