"""For which GPU kernels are compiled, and what was measured there: tuned.json, {op: {"sm_90": {key: {"BLOCK_M": ...}}}}."""

import functools
import json
import pathlib

import torch
import triton


def capability() -> int:
    """90 for sm_90: of the GPU, of the target where kernels are compiled without one, 90 where they are interpreted."""
    return 90 if triton.knobs.runtime.interpret else int(triton.runtime.driver.active.get_current_target().arch)


@functools.cache
def _table() -> dict:
    path = pathlib.Path(__file__).with_name("tuned.json")
    return json.loads(path.read_text()) if path.exists() else {}


def tuned(op: str, key: str) -> dict:
    """What tuned.json says of an op's key on this GPU; {} where it says nothing, and without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return _table().get(op, {}).get(f"sm_{capability()}", {}).get(key, {})
