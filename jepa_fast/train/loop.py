"""The training loop, on one screen."""

import contextlib
import pathlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import steps_per_epoch
from ..optim import AdamWEMA, Horizon, clip_scale, param_groups
from ..recipes import Recipe
from . import distributed
from .run import Run


def train(recipe: Recipe, folder: pathlib.Path, *, resume: bool = False) -> Run:
    """Run a recipe in a folder; with `resume` from its last checkpoint, bit-equal to a run that was never stopped.

    Everything random is a function of (seed, step, rank). Raises ValueError for settings that do not fit, NotFinite
    where a loss term stops being a number.
    """
    config, world = recipe.train, distributed.start(recipe.train.device)
    dataset = recipe.data.build()
    horizon = Horizon(config.steps_per_epoch or steps_per_epoch(dataset, config.batch_size), config.epochs,
                      config.schedule_scale)
    batch_size = local_batch_size(recipe, world.size)
    torch.manual_seed(config.seed)
    objective = recipe.objective.build().to(world.device)
    optimizer = build_optimizer(recipe, objective)
    run = Run(folder, recipe, world)
    step = run.resume(objective, optimizer) if resume else 0
    if config.start_from and not resume:
        run.start_from(pathlib.Path(config.start_from), objective, optimizer)
    num_steps = min(num_steps_of(horizon), config.max_steps or num_steps_of(horizon))
    model = wrap(objective, world)
    save_every = max(1, round(config.checkpoint_every * horizon.steps_per_epoch))
    run.start(step, num_steps)
    batches = recipe.data.batches(dataset, global_batch_size=config.batch_size, seed=config.seed, start_step=step,
                                  num_steps=num_steps, rank=world.rank, world_size=world.size, device=world.device)
    try:
        for batch in batches:
            settings = set_schedules(optimizer, recipe, step, horizon)
            torch.manual_seed(config.seed + 1_000_003 * step + world.rank)
            losses = accumulate(model, objective, batch, recipe, step, world.rank * batch_size)
            run.check(step + 1, losses)
            is_clipped = step >= horizon.steps(recipe.optim.clip_from_epoch)
            optimizer.step(grad_scale=clip(recipe, objective, losses) if is_clipped else None)
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % config.log_every == 0 or step == num_steps:
                run.log(step, step / horizon.steps_per_epoch, losses, settings)
            run.tick(step)
            if step % save_every == 0 or step == num_steps:
                run.save(step, objective, optimizer)
    finally:
        run.close()
    return run


def accumulate(model: nn.Module, objective: nn.Module, batch: dict, recipe: Recipe, step: int,
               first_sample: int) -> dict[str, Tensor]:
    """Forward and backward over the micro-batches of one step; the mean of what they return, detached."""
    count, totals = recipe.train.accumulate, {}
    for i, micro in enumerate(micro_batches(batch, count)):
        size = len(micro["index"])
        micro = objective.prepare(micro, seed=recipe.train.seed, step=step, first_sample=first_sample + i * size)
        is_last = i == count - 1
        silent = model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last \
            else contextlib.nullcontext()
        device_type = next(objective.parameters()).device.type
        with silent, torch.autocast(device_type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
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


def num_steps_of(horizon: Horizon) -> int:
    return int(horizon.epochs * horizon.steps_per_epoch)


def local_batch_size(recipe: Recipe, world_size: int) -> int:
    """Samples per rank and step; ValueError where the global batch does not divide."""
    config = recipe.train
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(f"train.batch_size must be a multiple of ranks x accumulate, got {config.batch_size} for "
                         f"{world_size} x {config.accumulate}")
    return config.batch_size // world_size


def wrap(objective: nn.Module, world: distributed.World) -> nn.Module:
    """DistributedDataParallel where there is more than one process."""
    if world.size == 1:
        return objective
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
