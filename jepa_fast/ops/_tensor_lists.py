"""What the ops on lists of tensors (`ema_update_`, `adamw_ema_`) share: checks of lists, when our own code takes them."""

import torch
from torch import Tensor

MASTER_DTYPES = (torch.float32, torch.float64)


def check_floating(name: str, tensors: list[Tensor], dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """Floating point, of one of `dtypes` if any are given, and all on one device."""
    for i, t in enumerate(tensors):
        if not t.is_floating_point() or (dtypes and t.dtype not in dtypes):
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes) or "floating point"
            raise TypeError(f"{name}[{i}] must be {expected}, got {str(t.dtype).removeprefix('torch.')}")
        if t.device != tensors[0].device:
            raise ValueError(f"{name}[{i}] must be on {tensors[0].device} as {name}[0], got {t.device}")


def check_like(name: str, tensors: list[Tensor], like_name: str, like: list[Tensor], same_dtype: bool = False) -> None:
    """As many tensors as `like`, of the same shapes, on its device; of the same dtypes where asked."""
    if len(tensors) != len(like):
        raise ValueError(f"{name} must have {len(like)} tensors as {like_name}, got {len(tensors)}")
    for i, (t, other) in enumerate(zip(tensors, like, strict=True)):
        if t.shape != other.shape:
            raise ValueError(f"{name}[{i}] must be {list(other.shape)} as {like_name}[{i}], got {list(t.shape)}")
        if t.device != other.device:
            raise ValueError(f"{name}[{i}] must be on {other.device} as {like_name}[{i}], got {t.device}")
        if same_dtype and t.dtype != other.dtype:
            raise TypeError(f"{name}[{i}] must be {other.dtype} as {like_name}[{i}], got {t.dtype}")
    check_floating(name, tensors)


def why_not_flat(*lists: list[Tensor], dtype: torch.dtype = torch.float32) -> str | None:
    """Why our own code cannot change these tensors in place; None where it can."""
    for tensors in lists:
        for t in tensors:
            if t.dtype != dtype:
                return f"no version of its own that writes {str(t.dtype).removeprefix('torch.')} here"
            if not t.is_contiguous():
                return "no version of its own for tensors that are not contiguous"
    return None


def mark_changed(*lists: list[Tensor]) -> None:
    """Tell autograd that the raw op wrote here: a backward pass that saved the old values must fail, not be wrong."""
    torch.autograd.graph.increment_version([t for tensors in lists for t in tensors])
