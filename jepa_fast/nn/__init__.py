"""Modules over ops; nothing here knows what a JEPA is."""

from .sigreg import SIGReg

__all__ = ["SIGReg"]
