"""Whole training steps as CUDA graphs: forward, backward, clipping, optimizer and moving average in one launch.

For small models, whose launches take the host longer than the device. What a graph froze it does again in every replay, so
whatever changes from step to step comes in through memory: images and masks are copied into the buffers that the graph
reads, the optimizer's numbers are staged, random numbers come from PyTorch's generator, whose state graphs read at replay.
"""

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..models.flops import Work
from .step import TrainStep, clip, set_schedules

Outputs = tuple[Tensor, Tensor | None]   # losses [number of losses], features


class CudaGraphs:
    """The part of torch.cuda that `GraphedStep` uses. All graphs share memory for what they compute in between."""

    def __init__(self):
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def warm_up(self, function: Callable[[], Outputs]) -> Outputs:
        """Run a function now, on the stream that captures."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record a function without running it: how to run it, and where its outputs will be."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: loaders may pin memory and statistics ask for events meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


@dataclasses.dataclass
class _Graph:
    replay: Callable[[], None]
    outputs: Outputs
    names: list[str]       # of the losses
    grads: list[Tensor]    # kept alive, for the graph writes there


class GraphedStep:
    """A `TrainStep` that replays: same arguments, same results, and features that the next step overwrites.

    The shapes of a batch are its key. A shape is first run as usual, to compile and tune what it needs; when it comes back
    it is captured, from the `warmup_steps`-th step on. At most `max_graphs` are kept; beyond, the one not used for the
    longest time makes room, and `num_captures` goes on rising: then train.pad_tokens_to is too small. Gradients stay
    allocated.
    """

    def __init__(self, step: TrainStep, *, max_graphs: int = 64, warmup_steps: int = 3, graphs: Any = None):
        if max_graphs < 1 or warmup_steps < 1:
            raise ValueError(f"max_graphs and warmup_steps must be at least 1, got {max_graphs} and {warmup_steps}")
        if not getattr(step.objective, "is_capturable", False):
            raise ValueError(f"train.cuda_graphs is for objectives whose steps differ in tensors only: I-JEPA, V-JEPA, "
                             f"V-JEPA 2 and LeJEPA, got {type(step.objective).__name__}")
        self.step, self.max_graphs, self.warmup_steps = step, max_graphs, warmup_steps
        self.num_captures = self.num_replays = self.num_eager = 0
        self._cuda = CudaGraphs() if graphs is None else graphs
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._seen: Counter[tuple] = Counter()
        self._buffers: dict[tuple, Tensor] = {}      # what graphs read; those with inputs of one shape share it
        self._staged: Tensor | None = None           # the optimizer's numbers that the graphs read
        step.optimizer.reads_device = True

    @property
    def work(self) -> Work:
        return self.step.work

    def __call__(self, batch: dict, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Step number `step` (from 0) on a batch: losses and what else to watch, and the schedules' values."""
        outer, train = self.step, self.step.recipe.train
        settings = set_schedules(outer.optimizer, outer.recipe, step, outer.horizon)
        batch = outer.objective.prepare(batch, seed=train.seed, step=step, first_sample=outer.first_sample)
        outer.work = Work()
        outer.count(batch)
        batch = _tensors(batch)
        is_clipped = step >= outer.horizon.steps(outer.recipe.optim.clip_from_epoch)
        torch.manual_seed(train.seed + 1_000_003 * step + outer.world.rank)
        key = (is_clipped, *_shapes(batch))
        if outer.optimizer.staged is not self._staged:
            # state was loaded, or other parameters have gradients: graphs would write into memory that is gone
            self._graphs.clear()
            self._staged = outer.optimizer.staged
        if key not in self._graphs and (self.num_eager < self.warmup_steps or not self._seen[key]):
            self._seen[key] += 1
            self.num_eager += 1
            names: list[str] = []
            losses, features = self._cuda.warm_up(lambda: self._compute(batch, is_clipped, False, names))
            self._staged = outer.optimizer.staged
        else:
            names, losses, features = self._replay(key, batch, is_clipped)
        watched = {} if features is None else {"features": features}
        return dict(zip(names, losses.unbind(), strict=True)) | watched, settings

    def _replay(self, key: tuple, batch: dict, is_clipped: bool) -> tuple[list[str], Tensor, Tensor | None]:
        buffers = self._copy_in(batch)
        self.step.optimizer.stage()
        graph = self._graphs.get(key)
        if graph is None:
            names: list[str] = []
            replay, outputs = self._cuda.capture(lambda: self._compute(buffers, is_clipped, True, names))
            graph = self._graphs[key] = _Graph(replay, outputs, names, self._gradients())
            self.num_captures += 1
            if len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph.replay()
        self.num_replays += 1
        losses, features = graph.outputs
        return graph.names, losses.clone(), features

    def _compute(self, batch: dict, is_clipped: bool, is_staged: bool, names: list[str]) -> Outputs:
        """What is captured. `names` receives the names of the losses."""
        outer, recipe = self.step, self.step.recipe
        if grads := self._gradients():
            torch._foreach_zero_(grads)
        with torch.autocast(outer.world.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            losses = outer.model(batch)
            losses["loss"].backward()
        losses = {name: value.detach() for name, value in losses.items()}
        features = losses.pop("features", None)
        outer.optimizer.step(grad_scale=clip(recipe, outer.objective, losses) if is_clipped else None, is_staged=is_staged)
        names += losses
        return torch.stack([value.to(losses["loss"].dtype) for value in losses.values()]), features

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.step.objective.parameters() if p.grad is not None]

    def _copy_in(self, batch: dict) -> dict:
        """The batch in the buffers that graphs read."""
        sources, buffers = [], []

        def copy(path: str, value: Tensor) -> Tensor:
            key = (path, value.shape, value.dtype)
            if key not in self._buffers:
                self._buffers[key] = torch.empty_like(value, memory_format=torch.contiguous_format)
            sources.append(value)
            buffers.append(self._buffers[key])
            return buffers[-1]

        out = _map(batch, copy)
        torch._foreach_copy_(buffers, sources, non_blocking=True)
        return out


def _tensors(batch: dict) -> dict:
    """The tensors of a prepared batch, alone or in lists and masks; names of files and counts of masks are for the host."""
    def strip(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [strip(item) for item in value]
        return dataclasses.replace(value, counts=None) if hasattr(value, "counts") else value

    return {name: strip(value) for name, value in batch.items()
            if isinstance(value, (Tensor, list, tuple)) or dataclasses.is_dataclass(value)}


def _map(value: Any, function: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """The same structure with another tensor for each."""
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, (list, tuple)):
        return [_map(item, function, f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        fields = value if isinstance(value, dict) else vars(value)
        fields = {name: _map(item, function, f"{path}.{name}") for name, item in fields.items()}
        return fields if isinstance(value, dict) else dataclasses.replace(value, **fields)
    return value


def _shapes(value: Any, path: str = "") -> Iterator[tuple]:
    """Shapes of all tensors, and the other values beside them: two batches with the same can share a graph."""
    if isinstance(value, Tensor):
        yield path, value.shape, value.dtype
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _shapes(item, f"{path}.{i}")
    elif isinstance(value, dict) or dataclasses.is_dataclass(value):
        for name, item in (value if isinstance(value, dict) else vars(value)).items():
            yield from _shapes(item, f"{path}.{name}")
    else:
        yield path, value
