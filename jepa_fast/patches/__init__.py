"""Other people's code made fast in one line, and back: one file per code base.

    report = jepa_fast.patches.hf_vjepa2.apply(model)     # this model; or .apply(), before models are built
    print(report)                                         # what was replaced, what was not and why
    report.undo()

A patched model keeps its parameters, state-dict keys and hooks, and its numbers within twice the original's own rounding
error. strict_numerics=True also reproduces what is wrong in the original, where a report notes that it is put right.
Under nn.DataParallel, whose replicas are shallow copies, patch before models are built.
"""

import importlib
import pkgutil

from torch import nn

from ._report import PatchError, Report

__all__ = ["PatchError", "Report", "auto"]


def auto(model: nn.Module, *, strict_numerics: bool = False) -> Report:
    """Apply every patch whose code base a model has parts of. ValueError where there is none."""
    with Report.of("auto") as report:
        names = []
        for name in _names():
            patch = importlib.import_module(f".{name}", __name__)
            if patch.matches(model):
                names.append(name)
                report.take(patch.apply(model, strict_numerics=strict_numerics))
        if not names:
            raise ValueError(f"model must have parts that a patch knows ({', '.join(_names())}), got a "
                             f"{type(model).__module__}.{type(model).__qualname__}")
        report.patch = f"auto ({', '.join(names)})"
    return report


def _names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def __getattr__(name: str):
    if name in _names():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"jepa_fast.patches has no {name!r}; there are {', '.join(_names())}")
