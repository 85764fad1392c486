"""One step taken apart: launches, stops, host time, and the time of each component of the performance model."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable

from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

COMPONENTS = ("target GEMM", "context GEMM", "predictor GEMM", "attention", "elementwise, norm", "patch embed, loss",
              "optimizer, EMA", "host")
BACKWARD = "autograd::engine::evaluate_function: "
LAUNCHES = re.compile(r"(cuda|cu)(LaunchKernel|GraphLaunch|Memcpy|Memset)")
STOPS = re.compile(r"cuda(Stream|Device|Event)Synchronize")
# by the names of PyTorch's operators and of ours; the first that matches
KINDS = (("optimizer", r"adamw|_foreach|ema_update"),
         ("attention", r"scaled_dot_product|flash|efficient_attention|varlen_attention|softmax|bmm"),
         ("patch embed", r"conv|latent_loss|gather_patches|smooth_l1|l1_loss"),
         ("GEMM", r"^aten::(mm|addmm|_addmm_activation|linear|mkldnn_linear|_scaled_mm|matmul)$|^jepa_fast\w*::matmul|fp8"))


def mark(name: str, function: Callable) -> Callable:
    """The function, its calls named in profiles: target, context, predictor or patch embed."""
    def marked(*args, **kwargs):
        with record_function(f"region: {name}"):
            return function(*args, **kwargs)
    return marked


class Profile:
    """A profile of one step, or a count of the FLOPs of its matrix products."""

    def __init__(self, is_cuda: bool, *, count_flops: bool = False):
        self.is_cuda = is_cuda
        if count_flops:
            self.recorder = FlopCounterMode(display=False)
        else:
            self.recorder = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda)

    def start(self) -> None:
        self.recorder.__enter__()

    def stop(self, seconds: float) -> dict:
        """What was found; `seconds` is how long the step took."""
        self.recorder.__exit__(None, None, None)
        if isinstance(self.recorder, FlopCounterMode):
            return {"flops": self.recorder.get_total_flops()}
        return take_apart(self.recorder.events(), seconds, self.is_cuda)


def take_apart(events, seconds: float, is_cuda: bool) -> dict:
    """Numbers of one step from a profiler's events; times in ms.

    On a GPU components are times of kernels, by the operator that launched them, and "host" is how long the device had
    nothing to do. On a CPU they are the operators' own times, and "host" is what passed between them.
    """
    host_events = [event for event in events if event.device_type == DeviceType.CPU]
    device_events = [event for event in events if event.device_type == DeviceType.CUDA]
    names = Counter(event.name for event in host_events)
    regions = Regions(host_events)
    times: dict[str, float] = defaultdict(float)
    for event in host_events:
        own = _device_time(event) if is_cuda else _own_time(event)
        if own:
            times[regions.component(event)] += own / 1e3
    total_ms = seconds * 1e3
    if is_cuda:
        busy_ms = _covered([(e.time_range.start, e.time_range.end) for e in device_events]) / 1e3
        waits = sum(e.time_range.elapsed_us() for e in host_events if STOPS.match(e.name)) / 1e3
        # the stopwatch's own synchronisation is one of the stops
        return {"components": _ordered(times | {"host": max(0.0, total_ms - busy_ms)}), "step_ms": total_ms,
                "launches": sum(n for name, n in names.items() if LAUNCHES.match(name)),
                "stops": max(0, sum(n for name, n in names.items() if STOPS.match(name)) - 1),
                "host_ms": max(0.0, total_ms - waits), "idle_ms": max(0.0, total_ms - busy_ms)}
    times["host"] = max(0.0, total_ms - sum(time for name, time in times.items() if name != "host"))
    leaves = sum(not event.cpu_children and "::" in event.name for event in host_events)
    return {"components": _ordered(times), "step_ms": total_ms, "launches": leaves,
            "stops": names["aten::_local_scalar_dense"], "host_ms": total_ms, "idle_ms": 0.0}


class Regions:
    """Which part of the model an operator worked for, the backward pass by the forward operators it belongs to."""

    def __init__(self, events: list):
        backward = [event for event in events if event.name.startswith(BACKWARD)]
        self.backward_end = max((event.time_range.end for event in backward), default=float("inf"))
        # of several operators with one number the last makes the node
        self.forward = {event.sequence_nr: self._marked(event)
                        for event in sorted(events, key=lambda event: event.time_range.start)
                        if event.sequence_nr >= 0 and self._backward_node(event) is None}

    def component(self, event) -> str:
        region, kind = self.region(event), kind_of(event)
        if region == "optimizer" or kind == "optimizer":
            return "optimizer, EMA"
        if kind in ("attention", "patch embed"):
            return {"attention": "attention", "patch embed": "patch embed, loss"}[kind]
        if region in (None, "patch embed"):
            return "patch embed, loss"
        return f"{region} GEMM" if kind == "GEMM" else "elementwise, norm"

    def region(self, event) -> str | None:
        """target, context, predictor, optimizer (all that follows the backward pass: clipping and loggers too), or None."""
        node = self._backward_node(event)
        if node is not None:
            return self._marked(event) or self.forward.get(node.sequence_nr)
        return self._marked(event) or ("optimizer" if event.time_range.start >= self.backward_end else None)

    @staticmethod
    def _backward_node(event):
        while event is not None and not event.name.startswith(BACKWARD):
            event = event.cpu_parent
        return event

    @staticmethod
    def _marked(event) -> str | None:
        while event is not None:
            if event.name.startswith("region: "):
                return event.name.removeprefix("region: ")
            if event.name.startswith("Optimizer.step"):
                return "optimizer"
            event = event.cpu_parent
        return None


def kind_of(event) -> str | None:
    """Of the operator itself or of the ones that called it: a copy inside an attention operator is attention."""
    while event is not None and not event.name.startswith((BACKWARD, "region: ")):
        if event.name.startswith(("aten::", "jepa_fast", "mkldnn", "void ", "fp8")):
            for kind, pattern in KINDS:
                if re.search(pattern, event.name):
                    return kind
        event = event.cpu_parent
    return None


def _device_time(event) -> float:
    # calls of the CUDA library stand beside the operators that made them
    return 0.0 if event.name.startswith("cu") else sum(kernel.duration for kernel in event.kernels)


def _own_time(event) -> float:
    # a marker's or node's own time is the Python between its operators
    is_operator = "::" in event.name and not event.name.startswith(BACKWARD)
    return event.self_cpu_time_total if is_operator else 0.0


def _ordered(times: dict[str, float]) -> dict[str, float]:
    return {name: round(times.get(name, 0.0), 4) for name in COMPONENTS}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
