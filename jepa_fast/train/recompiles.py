"""Graphs that torch.compile or CUDA graphs make: after warm-up there should be no more."""

import sys


def num_compilations() -> int:
    """Graphs that torch.compile has made in this process; 0 where it was never used, without importing it."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]


class Recompilations:
    """Counts what is compiled or captured after `warmed_up`.

    `note()` counts one more by hand: for CUDA graphs, of which torch.compile knows nothing.
    """

    def __init__(self):
        self.num_captured = 0
        self._before: int | None = None

    def note(self) -> None:
        self.num_captured += 1

    def warmed_up(self) -> None:
        """From here on graphs count; what was made before is warm-up."""
        self._before = num_compilations() + self.num_captured

    @property
    def count(self) -> int:
        return 0 if self._before is None else num_compilations() + self.num_captured - self._before
