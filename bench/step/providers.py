"""Who takes part: name -> training loop over batches."""

import importlib
import pathlib
from collections.abc import Callable
from functools import partial

from .work import Work

NAMES = ("official", "official style", "tuned", "tuned, compiled", "ours", "ours+fp8",
         "ours, cached features")
REPOSITORY = {"ijepa": "facebookresearch/ijepa", "vjepa": "facebookresearch/jepa", "vjepa2": "facebookresearch/vjepa2",
              "ac": "facebookresearch/vjepa2", "lejepa": "rbalestr-lab/lejepa"}


def loop_of(name: str, work: Work, official: pathlib.Path | None) -> Callable:
    """A function (work, batches) that trains for ever."""
    if name.startswith("ours"):
        from . import ours

        return partial(ours.loop, target_precision="fp8" if name == "ours+fp8" else "same",
                       has_features=name == "ours, cached features")
    if name == "official":
        adapter = importlib.import_module(f"{__package__}.official_{work.family}")
        return partial(adapter.loop, checkout=official.resolve())
    from . import plain_loop

    manner = plain_loop.official(work) if name == "official style" else plain_loop.tuned(name == "tuned, compiled")
    return partial(plain_loop.loop, manner=manner)
