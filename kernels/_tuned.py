"""Measured configurations, where there are any: tuned.json, {op: {"sm_90": {key: {"BLOCK_M": ..., ...}}}}.

`python -m bench.on_gpu` writes such a file; what a kernel takes without an entry stands beside it.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator

import torch
import triton

_asked: dict[tuple[str, str], None] = {}   # (op, key) of every look-up, in order
_trial: dict[tuple[str, str], dict] = {}   # what a sweep tries now


@functools.cache
def _table() -> dict:
    path = pathlib.Path(__file__).with_name("tuned.json")
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def architecture() -> str | None:
    """"sm_90" and the like; None without a GPU."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def capability() -> int:
    """90 for sm_90: of the GPU, or of the target where kernels are compiled without one; 90 where they are interpreted."""
    return 90 if triton.knobs.runtime.interpret else int(triton.runtime.driver.active.get_current_target().arch)


def tuned(op: str, key: str) -> dict:
    """What tuned.json says of an op's key on this GPU; {} where it says nothing, and on a CPU."""
    _asked[op, key] = None
    if (op, key) in _trial:
        return _trial[op, key]
    return _table().get(op, {}).get(architecture(), {}).get(key, {})


@contextlib.contextmanager
def trying(op: str, key: str, constants: dict) -> Iterator[None]:
    """Within the block `tuned(op, key)` is `constants`."""
    _trial[op, key] = constants
    try:
        yield
    finally:
        del _trial[op, key]


@contextlib.contextmanager
def asked() -> Iterator[list[tuple[str, str]]]:
    """Yields a list of the (op, key) that are looked up within the block, complete at its end."""
    _asked.clear()
    found: list[tuple[str, str]] = []
    yield found
    found += _asked
