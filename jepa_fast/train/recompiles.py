"""Graphs that torch.compile or CUDA graphs make: after warm-up there should be no more."""

import sys
from collections.abc import Callable


def num_compilations() -> int:
    """Graphs that torch.compile has made in this process; 0 where it was never used, without importing it."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]


class Recompilations:
    """Counts graphs that are compiled, or captured, after `warmed_up`."""

    def __init__(self):
        self._counters: list[Callable[[], int]] = [num_compilations]
        self._before: int | None = None

    def watch(self, counter: Callable[[], int]) -> None:
        """Add what `counter` has counted: CUDA graphs, of which torch.compile knows nothing."""
        self._counters.append(counter)

    def warmed_up(self) -> None:
        """From here on graphs count; what was made before is warm-up."""
        self._before = self._total()

    @property
    def count(self) -> int:
        return 0 if self._before is None else self._total() - self._before

    def _total(self) -> int:
        return sum(counter() for counter in self._counters)
