"""Who takes part: name -> training loop over batches."""

import importlib
import pathlib
from collections.abc import Callable
from functools import partial

from .work import Work

NAMES = ("official", "official style", "tuned", "ours", "ours+fp8")
REPOSITORY = {"ijepa": "facebookresearch/ijepa", "vjepa": "facebookresearch/jepa", "vjepa2": "facebookresearch/vjepa2",
              "ac": "facebookresearch/vjepa2", "lejepa": "rbalestr-lab/lejepa"}


def loop_of(name: str, work: Work, official: pathlib.Path | None, *, is_compiled: bool) -> Callable:
    """A function (work, batches) that trains for ever."""
    if name in ("ours", "ours+fp8"):
        from . import ours

        return partial(ours.loop, target_precision="fp8" if name == "ours+fp8" else "same")
    if name == "official":
        adapter = importlib.import_module(f"{__package__}.official_{work.family}")
        return partial(adapter.loop, checkout=official.resolve())
    from . import plain_loop

    return partial(plain_loop.loop, manner=plain_loop.tuned(work, is_compiled) if name == "tuned" else plain_loop.official(work))
