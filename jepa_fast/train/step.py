"""One step of training: schedules, forward, backward, clipping, optimizer and moving average."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models.flops import Work
from ..nn.block import configure_blocks_, use_copies_
from ..objectives.flops import step_work
from ..optim import AdamWEMA, Horizon, clip_scale, param_groups
from ..recipes import Recipe
from .distributed import World
from .host_memory import keep_freed_memory
from .options import apply_options
from .parallel import averaged_gradients


class TrainStep:
    """A whole step of a recipe, as the loop takes it and as `bench step` times it.

    `model` is the objective, or what wraps it for several processes. Nothing here waits for a device. `work` is what the
    last step asked of this rank's device.
    """

    def __init__(self, recipe: Recipe, objective: nn.Module, optimizer: AdamWEMA, horizon: Horizon, world: World,
                 model: nn.Module | None = None):
        self.recipe, self.objective, self.optimizer, self.horizon, self.world = recipe, objective, optimizer, horizon, world
        self.model = objective if model is None else model
        self.first_sample = world.rank * local_batch_size(recipe, world.size)
        self.work = Work()
        configure_blocks_(objective, recipe.train.activations, recipe.train.blocks, architecture(world.device))
        if recipe.train.precision == "bf16":
            keep_copies_(objective, optimizer)
        if world.device.type == "cpu":
            keep_freed_memory()
        apply_options(recipe, objective, optimizer, world)

    def __call__(self, batch: dict, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Step number `step` (from 0) on one rank's batch: losses and what else to watch, and the schedules' values."""
        recipe = self.recipe
        settings = set_schedules(self.optimizer, recipe, step, self.horizon)
        torch.manual_seed(recipe.train.seed + 1_000_003 * step + self.world.rank)
        self.work = Work()
        losses = accumulate(self.model, self.objective, batch, recipe, step, self.first_sample, self.count)
        is_clipped = step >= self.horizon.steps(recipe.optim.clip_from_epoch)
        self.optimizer.step(grad_scale=clip(recipe, self.objective, losses) if is_clipped else None)
        self.optimizer.zero_grad(set_to_none=True)
        return losses, settings

    def count(self, micro: dict) -> None:
        """Add what a prepared batch asks for to `work`."""
        self.work += step_work(self.recipe.objective, micro, recompute=self.recipe.train.activations == "checkpoint")


def architecture(device: torch.device) -> str:
    """The device as tables of measurements name it: "sm_90" and the like, or "cpu"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type


def keep_copies_(objective: nn.Module, optimizer: AdamWEMA) -> None:
    """bfloat16 copies for the products of every block: the optimizer's, and lasting ones of what it does not move."""
    optimizer.refresh_shadows()
    moved = optimizer.shadows
    frozen = {p: p.detach().to(torch.bfloat16) for p in objective.parameters() if p not in moved}
    use_copies_(objective, moved | frozen)


def accumulate(model: nn.Module, objective: nn.Module, batch: dict, recipe: Recipe, step: int,
               first_sample: int, observe: Callable[[dict], None] | None = None) -> dict[str, Tensor]:
    """Forward and backward over the micro-batches of one step; the mean of what they return, detached.

    `observe` sees every micro-batch as it is prepared.
    """
    count, totals = recipe.train.accumulate, {}
    for i, micro in enumerate(micro_batches(batch, count)):
        size, is_last = len(micro["index"]), i == count - 1
        micro = objective.prepare(micro, seed=recipe.train.seed, step=step, first_sample=first_sample + i * size)
        if observe is not None:
            observe(micro)
        device_type = next(objective.parameters()).device.type
        autocast = torch.autocast(device_type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
        with averaged_gradients(model, is_last), autocast:
            losses = model(micro)
            (losses["loss"] / count).backward()
        for name, value in losses.items():
            value = value.detach()
            # features to look at are taken from the last micro-batch, numbers are averaged
            totals[name] = value if value.dim() else totals.get(name, 0) + value / count
    return totals


def micro_batches(batch: dict, count: int) -> list[dict]:
    """Cut a batch into `count` equal parts, keeping order: every tensor by its own rows, and every tensor of a list."""
    if count == 1:
        return [batch]

    def cut(value, i: int):
        if isinstance(value, Tensor):
            if len(value) % count:
                raise ValueError(f"a batch must have a multiple of train.accumulate = {count} rows, got {len(value)}")
            return value.chunk(count)[i]
        return [cut(item, i) for item in value] if isinstance(value, list) and _is_tensors(value) else value

    return [{key: cut(value, i) for key, value in batch.items()} for i in range(count)]


def _is_tensors(values: list) -> bool:
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def build_optimizer(recipe: Recipe, objective: nn.Module) -> AdamWEMA:
    groups = param_groups(objective.roles(), 0.0)
    if recipe.optim.decay_all:
        for group in groups:
            group.pop("WD_exclude", None)
    return AdamWEMA(groups, betas=recipe.optim.betas, eps=recipe.optim.eps, averages=objective.averages())


def clip(recipe: Recipe, objective: nn.Module, losses: dict[str, Tensor]) -> Tensor | None:
    """The factor for each optimizer group, every role clipped by its own norm; the norms join `losses`."""
    if recipe.optim.clip_grad is None:
        return None
    roles = objective.roles()
    norms, scales = clip_scale([role.parameters() for role in roles.values()], recipe.optim.clip_grad)
    losses |= {f"grad_norm_{name}": norm for name, norm in zip(roles, norms, strict=True)}
    return scales.repeat(2)  # groups: weights of every role, then biases of every role


def set_schedules(optimizer: AdamWEMA, recipe: Recipe, step: int, horizon: Horizon) -> dict[str, float]:
    """Learning rate, weight decay and momentum of this step, put into the optimizer; what was put there."""
    settings = {"lr": recipe.optim.lr(step, horizon), "weight_decay": recipe.optim.weight_decay(step, horizon)}
    optimizer.set_hyperparameters(**settings)
    momentum = getattr(recipe.objective, "momentum", None)
    if momentum is not None:
        optimizer.momentum = settings["momentum"] = momentum(step, horizon)
    return settings


def local_batch_size(recipe: Recipe, world_size: int) -> int:
    """Samples per rank and step; ValueError where the global batch does not divide."""
    config = recipe.train
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(f"train.batch_size must be a multiple of ranks x accumulate, got {config.batch_size} for "
                         f"{world_size} x {config.accumulate}")
    return config.batch_size // world_size
