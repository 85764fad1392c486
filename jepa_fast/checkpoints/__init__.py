"""Other people's checkpoints, to ours and back."""

from .ijepa import load_ijepa, save_ijepa

__all__ = ["load_ijepa", "save_ijepa"]
