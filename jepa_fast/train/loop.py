"""The training loop, on one screen."""

import pathlib

import torch

from ..data import steps_per_epoch
from ..optim import Horizon
from ..recipes import Recipe
from . import distributed
from .graph import GraphedStep
from .parallel import parallelize
from .preemption import Preempted, Preemption
from .run import Run
from .step import TrainStep, build_optimizer


def train(recipe: Recipe, folder: pathlib.Path, *, resume: bool = False) -> Run:
    """Run a recipe in a folder; with `resume` from its last checkpoint, bit-equal to a run that was never stopped.

    Everything random is a function of (seed, step, rank). Raises ValueError for settings that do not fit, NotFinite
    where a loss term stops being a number, Preempted where a scheduler wants the machine.
    """
    config, world = recipe.train, distributed.start(recipe.train.device, recipe.train.timeout_s)
    dataset = recipe.data.build()
    horizon = Horizon(config.steps_per_epoch or steps_per_epoch(dataset, config.batch_size), config.epochs,
                      config.schedule_scale)
    torch.manual_seed(config.seed)
    objective = recipe.objective.build().to(world.device)
    model = parallelize(objective, recipe, world)
    optimizer = build_optimizer(recipe, objective)
    run = Run(distributed.same(folder, world), recipe, world)  # ranks may have looked for a free name one after another
    step = run.resume(objective, optimizer) if resume else 0
    if config.start_from and not resume:
        run.start_from(pathlib.Path(config.start_from), objective, optimizer)
    num_steps = min(num_steps_of(horizon), config.max_steps or num_steps_of(horizon))
    take_step = TrainStep(recipe, objective, optimizer, horizon, world, model)
    if config.cuda_graphs:
        take_step = GraphedStep(take_step)
        run.meters.recompilations.watch(lambda: take_step.num_captures)
    save_every = max(1, round(config.checkpoint_every * horizon.steps_per_epoch))
    run.start(step, num_steps)
    batches = recipe.data.batches(dataset, global_batch_size=config.batch_size, seed=config.seed, start_step=step,
                                  num_steps=num_steps, rank=world.rank, world_size=world.size, device=world.device)
    try:
        with Preemption(world, config.timeout_s) as preemption:
            for batch in run.meters.watch(batches):
                losses, settings = take_step(batch, step)
                step += 1
                run.record(step, step / horizon.steps_per_epoch, losses, settings, take_step.work,
                           is_log_step=step % config.log_every == 0 or step == num_steps)
                if step % save_every == 0 or step == num_steps:
                    run.save(step, objective, optimizer)
                if preemption.requested() and step < num_steps:
                    run.save(step, objective, optimizer)
                    run.finish()
                    raise Preempted(f"stopped by a signal after step {step}, saved in {run.checkpoint_path}; go on with: "
                                    f"{run.how_to_resume()}")
        run.finish()
        distributed.leave()
    finally:
        run.close()
        if hasattr(batches, "close"):
            batches.close()
    return run


def num_steps_of(horizon: Horizon) -> int:
    return int(horizon.epochs * horizon.steps_per_epoch)
