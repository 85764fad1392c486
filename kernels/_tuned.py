"""Measured configurations, where there are any: tuned.json, {op: {"sm_90": {key: {"BLOCK_M": ..., ...}}}}."""

import functools
import json
import pathlib

import torch


@functools.cache
def _table() -> dict:
    path = pathlib.Path(__file__).with_name("tuned.json")
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _architecture() -> str | None:
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def tuned(op: str, key: str) -> dict:
    """What tuned.json says of an op's key on this GPU; {} where it says nothing, and on a CPU."""
    return _table().get(op, {}).get(_architecture(), {}).get(key, {})
