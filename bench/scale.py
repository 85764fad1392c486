"""A paper model of training on 1 to 1,024 GPUs: one measured step, stated links, and what follows. Nothing here is measured.

A step of n GPUs takes  compute * (1 + straggling) + the communication that computation cannot hide.

compute      the measured step, in proportion to the samples per GPU: more are micro-batches, fewer are assumed to be as fast
             per sample, which flatters (a GPU with few samples is not)
links        collectives go ring-wise within a node, then between nodes on what every GPU has of it, each over its own
             adapter: an all-gather of S bytes by g GPUs in each of m nodes takes
             (g - 1) / g * S / node_rate + (m - 1) / m * S / g / network_rate, an all-reduce twice that
volume       DDP: an all-reduce of the gradients, float32, once a step. FSDP2: bfloat16 weights are gathered for the forward
             pass of every micro-batch and again for its backward pass (those of the target encoder once), gradients
             reduce-scattered in float32 once a step. HSDP: both within a node, then an all-reduce of what a GPU holds of
             the gradients between nodes
overlap      a stated part of it runs beside computation, as long as there is any: all-reduces beside the backward pass of
             the last micro-batch, gathers beside everything
straggling   a step waits for the slowest of n GPUs: about deviation * sqrt(2 log n), the deviation that of the masks' work
             (every GPU has masks of its own) and a stated jitter together
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Links:
    """Rates per GPU and direction, in 10^9 bytes per second."""

    gpus_per_node: int = 8
    node_gb_s: float = 450.0       # NVLink 4, as in H100 and H200 nodes
    network_gb_s: float = 50.0     # one 400 Gb/s InfiniBand adapter for each GPU
    efficiency: float = 0.8        # of both that collectives reach
    latency_us: float = 10.0       # of one round of a collective

    def __post_init__(self):
        if self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node must be at least 1, got {self.gpus_per_node}")
        for name in ("node_gb_s", "network_gb_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency must be in (0, 1], got {self.efficiency}")
        if self.latency_us < 0:
            raise ValueError(f"latency_us must be at least 0, got {self.latency_us}")

    def all_gather_s(self, size_bytes: float, gpus: int, nodes: int = 1) -> float:
        """Seconds until each of `gpus` in each of `nodes` has all bytes, of which each began with its share."""
        rounds = math.ceil(math.log2(gpus)) + math.ceil(math.log2(nodes))
        within = (gpus - 1) / gpus * size_bytes / (self.node_gb_s * 1e9 * self.efficiency)
        between = (nodes - 1) / nodes * size_bytes / gpus / (self.network_gb_s * 1e9 * self.efficiency)
        return within + between + rounds * self.latency_us * 1e-6

    def all_reduce_s(self, size_bytes: float, gpus: int, nodes: int = 1) -> float:
        """A reduce-scatter, which takes as long as an all-gather, and an all-gather."""
        return 2 * self.all_gather_s(size_bytes, gpus, nodes)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one GPU does in the measured step, and what it holds."""

    ms: float                      # measured
    batch_size: int                # samples in it
    backward_share: float          # of its operations that are backward passes
    deviation: float               # of the work between GPUs, over its mean: masks
    trained: int                   # parameters with gradients
    averaged: int                  # parameters without: target or frozen encoder
    largest_unit: int              # parameters of the largest part that FSDP2 gathers at once
    activation_bytes: float        # kept for the backward pass, and in use in one block
    precision: str = "bf16"        # of products; gradients and the optimizer's state are float32

    def state_bytes(self) -> float:
        """Weights, gradients and two moments in float32, the average, and bfloat16 copies of both where they are used."""
        copy = 2 if self.precision == "bf16" else 0
        return self.trained * (16 + copy) + self.averaged * (4 + copy)


MODES = ("DDP", "FSDP2", "HSDP")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole training of `samples` in steps of `global_batch` (None: `Step.batch_size` on every GPU)."""

    samples: float
    global_batch: int | None
    overlap: float = 0.9           # of communication that can run beside computation
    jitter: float = 0.01           # standard deviation of a GPU's step over its mean, from clocks and hosts
    samples_per_core_s: float | None = None   # that one CPU core decodes; None: not known

    def __post_init__(self):
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be in [0, 1], got {self.overlap}")
        if self.jitter < 0:
            raise ValueError(f"jitter must be at least 0, got {self.jitter}")


def communication_s(step: Step, links: Links, mode: str, gpus: int, micro_batches: float) -> tuple[float, float]:
    """Seconds of (collectives beside everything, collectives beside the last backward pass) in one step."""
    within, nodes = min(gpus, links.gpus_per_node), max(1, gpus // links.gpus_per_node)
    width = 2 if step.precision == "bf16" else 4
    if gpus == 1:
        return 0.0, 0.0
    if mode == "DDP":
        return 0.0, links.all_reduce_s(4 * step.trained, within, nodes)
    shard_nodes = nodes if mode == "FSDP2" else 1
    gathers = micro_batches * (2 * links.all_gather_s(width * step.trained, within, shard_nodes)
                               + (links.all_gather_s(width * step.averaged, within, shard_nodes) if step.averaged else 0))
    reduction = links.all_gather_s(4 * step.trained, within, shard_nodes)
    if mode == "HSDP":
        reduction += links.all_reduce_s(4 * step.trained / within, 1, nodes)
    return gathers, reduction


def predict(step: Step, run: Run, links: Links, mode: str, gpus: int) -> dict:
    """One row: a number of GPUs, a way of spreading the model over them."""
    global_batch = run.global_batch or step.batch_size * gpus
    per_gpu = global_batch / gpus
    micro_batches = max(per_gpu / step.batch_size, 1.0)
    compute = step.ms / 1e3 * per_gpu / step.batch_size
    deviation = math.hypot(run.jitter, step.deviation / math.sqrt(micro_batches))
    straggling = deviation * math.sqrt(2 * math.log(gpus))
    gathers, reduction = communication_s(step, links, mode, gpus, micro_batches)
    exposed = (gathers - min(run.overlap * gathers, compute)
               + reduction - min(run.overlap * reduction, compute / micro_batches * step.backward_share))
    seconds = compute * (1 + straggling) + exposed
    rate = global_batch / seconds
    hours = run.samples / rate / 3600
    return {"gpus": gpus, "mode": mode, "global_batch": global_batch, "samples_per_gpu": per_gpu,
            "micro_batches": micro_batches, "is_smaller_than_measured": per_gpu < step.batch_size,
            "compute_ms": 1e3 * compute, "straggling_ms": 1e3 * compute * straggling,
            "communication_ms": 1e3 * (gathers + reduction), "exposed_ms": 1e3 * exposed, "step_ms": 1e3 * seconds,
            "samples_per_s": rate, "efficiency_percent": 100 * rate * step.ms / 1e3 / (gpus * step.batch_size),
            "hours": hours, "gpu_hours": hours * gpus, "memory_gb": memory_gb(step, links, mode, gpus, per_gpu),
            "cores_per_gpu": None if run.samples_per_core_s is None else rate / gpus / run.samples_per_core_s}


def memory_gb(step: Step, links: Links, mode: str, gpus: int, per_gpu: float) -> float:
    """State and activations of a micro-batch, 10^9 bytes; sharded state with two gathered units and a unit's gradient."""
    shards = {"DDP": 1, "FSDP2": gpus, "HSDP": min(gpus, links.gpus_per_node)}[mode]
    gathered = 0 if shards == 1 else step.largest_unit * (2 * (2 if step.precision == "bf16" else 4) + 4)
    activations = step.activation_bytes * min(per_gpu / step.batch_size, 1.0)
    return (step.state_bytes() / shards + gathered + activations) / 1e9


def table(step: Step, run: Run, links: Links, max_gpus: int = 1024) -> list[dict]:
    """Rows for 1, 2, 4, ... GPUs, as far as the batch can be divided; HSDP where there are several nodes."""
    rows, gpus = [], 1
    while gpus <= max_gpus and (run.global_batch is None or run.global_batch % gpus == 0):
        nodes = gpus / links.gpus_per_node
        if nodes <= 1 or nodes.is_integer():
            modes = [mode for mode in MODES if mode == "DDP" or (gpus > 1 and (mode == "FSDP2" or nodes > 1))]
            rows += [predict(step, run, links, mode, gpus) for mode in modes]
        gpus *= 2
    return rows
