"""jepa_fast: a fast, exact engine for joint-embedding predictive architectures (JEPA).

Rooms are imported by name: `jepa_fast.ops`, `.nn`, `.optim`, `.masking`, `.models`, `.objectives`, `.recipes`, `.train`,
`.eval`, `.checkpoints`. `jepa_fast.patches` makes other people's code fast; the pieces to drop in by hand are here too,
each loaded when it is first named. README.md has the map.
"""

import importlib

__version__ = "0.1.0"

_PIECES = {
    "AdamWEMA": "optim", "SIGReg": "nn", "ema_update_": "ops",
    "register_hf_attention": "patches._hf",
    "ACRoPEAttention": "drop_in.attention", "RoPEAttention": "drop_in.attention",
    "apply_masks": "drop_in.masks", "repeat_interleave_batch": "drop_in.masks",
}


def __getattr__(name: str):
    if name in _PIECES:
        return getattr(importlib.import_module(f".{_PIECES[name]}", __name__), name)
    if name == "patches":
        return importlib.import_module(".patches", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PIECES, "patches"])
