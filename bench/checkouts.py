"""Modules of an official repository, imported from a checkout as if it alone were there: several are called `src`."""

import contextlib
import importlib
import logging
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

_libraries: list[torch.library.Library] = []  # a library's schemas go when it does


@contextlib.contextmanager
def checkout(path: str | pathlib.Path, *names: str) -> Iterator[list[ModuleType]]:
    """The named modules of the checkout at `path`; afterwards sys.path, sys.modules and the root logger are as before.

    What they import from elsewhere stays loaded. The same path a second time gives new modules.
    """
    path = pathlib.Path(path).resolve()
    own = {entry.stem for entry in path.iterdir() if entry.is_dir() or entry.suffix == ".py"}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
    loaded, search, root = set(sys.modules), list(sys.path), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        for name in set(sys.modules) - loaded:
            if name.partition(".")[0] in own:
                del sys.modules[name]
        _forget_compiled(own)
        sys.modules.update(hidden)
        sys.path[:] = search
        root.handlers[:], root.level = handlers, level


def _forget_compiled(own: set[str]) -> None:
    """Let torch.compile import modules of these names anew: it keeps them, also in the namespaces of what it compiled."""
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    if dynamo is not None:
        dynamo._import_module.cache_clear()
    for module in list(sys.modules.values()):
        for name in [name for name in vars(module) if name.startswith("__import_")]:
            if name.removeprefix("__import_").partition("_dot_")[0] in own:
                delattr(module, name)


def allow_torchvision() -> None:
    """torchvision from PyPI is linked to CUDA and fails on a CPU build of torch over two schemas; its Python parts work."""
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "qnms"):
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _libraries[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
