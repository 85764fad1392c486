"""Files and folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

WRITTEN = re.compile(r".*\.safetensors|config\.json|recipe\.yaml|checkpoints")


@contextlib.contextmanager
def whole(path: pathlib.Path, *, force: bool = False) -> Iterator[pathlib.Path]:
    """A sibling path to write a file or a folder at; renamed to `path` at the end, removed on an error.

    Raises ValueError where `path` exists, unless `force`; the old one stays until the new one is complete. A folder is
    replaced only if it holds nothing but what is written here: weights, config.json, a fresh run.
    """
    if path.exists() and not force:
        raise ValueError(f"{path} exists already: pass force (--force) to replace it")
    others = [item.name for item in path.iterdir() if not WRITTEN.fullmatch(item.name)] if path.is_dir() else []
    if others:
        raise ValueError(f"{path} holds {', '.join(sorted(others)[:3])}, which is not replaced: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be renamed over another
            _remove(old)
            os.replace(path, old)
        elif temporary.is_dir():
            _remove(path)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    _remove(old)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
