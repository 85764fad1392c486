"""jepa_fast: a fast, exact engine for joint-embedding predictive architectures (JEPA).

Rooms are imported by name: `jepa_fast.ops`, `.nn`, `.optim`, `.masking`, `.models`, `.objectives`, `.recipes`, `.train`,
`.eval`, `.checkpoints`. README.md has the map.
"""

__version__ = "0.1.0"
