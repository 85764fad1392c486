"""Modules over ops; nothing here knows what a JEPA is."""

from .rotary import rotary_table
from .sigreg import SIGReg

__all__ = ["SIGReg", "rotary_table"]
