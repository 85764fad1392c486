"""Modules of official repositories, which are no packages: several call themselves `src`."""

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
def checkout(path: pathlib.Path, *names: str) -> Iterator[list[ModuleType]]:
    """The named modules of the checkout at `path`, loaded meanwhile; afterwards sys.path and sys.modules are as before."""
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
        sys.modules.update(hidden)
        sys.path[:] = search
        root.handlers[:], root.level = handlers, level


def allow_torchvision() -> None:
    """torchvision from PyPI is linked to CUDA and fails on a CPU build of torch over two schemas; its Python parts work."""
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "qnms"):
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _libraries[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
