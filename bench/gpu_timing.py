"""Times on a GPU: events around each call, L2 emptied or warm, graph replay for what is shorter than its launch."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
SHORT_US = 100.0         # below this a call is also replayed as a CUDA graph


@dataclass(frozen=True)
class Microseconds:
    """Of one call: median, 20th and 80th percentile; `graph` per replayed call, None where not captured."""

    cold: float              # L2 emptied before each call
    p20: float
    p80: float
    warm: float
    graph: float | None


class Timer:
    """Times calls on one device; on a CPU (rehearsal) with the wall clock."""

    def __init__(self, device: str, repeats: int = 20):
        self.is_cuda = torch.device(device).type == "cuda"
        self.repeats = repeats if self.is_cuda else 2
        self.flush = torch.empty(FLUSH_BYTES if self.is_cuda else 1024, dtype=torch.int8, device=device)

    def interleaved(self, providers: dict[str, Callable[[], object]]) -> dict[str, Microseconds]:
        """Every provider in turn, `repeats` times round."""
        for call in providers.values():
            for _ in range(3):
                call()
        cold: dict[str, list[float]] = {name: [] for name in providers}
        for _ in range(self.repeats):
            for name, call in providers.items():
                self.flush.zero_()
                cold[name].append(self._microseconds(call, 1))
        results = {}
        for name, call in providers.items():
            values = sorted(cold[name])
            median = statistics.median(values)
            count = max(2, min(50, int(20_000 / max(median, 1.0))))
            results[name] = Microseconds(
                median, values[round(0.2 * (len(values) - 1))], values[round(0.8 * (len(values) - 1))],
                self._microseconds(call, count),
                self._replayed(call, count) if self.is_cuda and median < 10 * SHORT_US else None)
        return results

    def _microseconds(self, call: Callable[[], object], count: int) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) / count * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count * 1e3

    def _replayed(self, call: Callable[[], object], count: int) -> float | None:
        """Per call in a graph of `count` calls; None where the call cannot be captured."""
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(count):
                    call()
        except RuntimeError:  # it stops the device, or allocates outside the graph's pool
            torch.cuda.synchronize()
            return None
        graph.replay()
        return self._microseconds(graph.replay, 3) / count


def measure_ceilings(device: str) -> dict[str, float]:
    """What this device does at best: bytes per second of a large copy (read and written), FLOP/s of large products."""
    timer = Timer(device)
    is_cuda = timer.is_cuda
    source = torch.randn((1 << 30) // 4 if is_cuda else 1 << 20, device=device)
    target, size = torch.empty_like(source), 8192 if is_cuda else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = timer.interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    count = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 0
    return {"multiprocessors": count, "copy_bytes_per_s": 2 * source.numel() * 4 / times["copy"].cold * 1e6,
            "bf16_flop_per_s": 2 * size**3 / times["product"].cold * 1e6}
