"""Modules of an official repository, imported from a checkout as if it alone were there: several are called `src`."""

import contextlib
import importlib
import logging
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType


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
        sys.modules.update(hidden)
        sys.path[:] = search
        root.handlers[:], root.level = handlers, level
