"""The engine's own step, `train.step.TrainStep`, from the recipe."""

import dataclasses
from functools import partial

import torch

from jepa_fast.checkpoints.official import objective_of
from jepa_fast.train import distributed
from jepa_fast.train.step import TrainStep, build_optimizer

from .work import Work, to_float
from .worker import Batches


def loop(work: Work, batches: Batches, *, target_precision: str = "same", has_features: bool = False) -> None:
    """`has_features`: V-JEPA 2-AC from features of its frozen encoder, computed before."""
    recipe = dataclasses.replace(work.recipe, train=dataclasses.replace(work.recipe.train,
                                                                        target_precision=target_precision))
    world = distributed.start(recipe.train.device)
    batches.prepare(lambda inputs: inputs)
    objective = build(work).to(world.device)
    if has_features:
        batches.prepare(partial(with_features, work, objective))
    take_step = TrainStep(recipe, objective, build_optimizer(recipe, objective), work.horizon, world)
    batches.regions(**regions_of(work, objective))
    for step, (inputs, _) in enumerate(batches):
        losses, _ = take_step(on_device(inputs, work), step)
        batches.record(losses["loss"])


def build(work: Work):
    """The objective with the initial weights, the target encoder with the encoder's."""
    objective, weights = work.recipe.objective.build(), work.weights()
    if hasattr(objective, "target_encoder"):
        weights["target_encoder"] = weights["encoder"]
    objective.load_state_dict(objective_of(weights))
    return objective


def regions_of(work: Work, objective) -> dict:
    """What is called for each part of the model; with convolutions apart in other providers, patch embedding is here too."""
    encoders = [objective.encoder] + ([objective.target_encoder.encoder] if hasattr(objective, "target_encoder") else [])
    patches = {"patch embed": [(encoder.patch_embed, "forward") for encoder in encoders if hasattr(encoder, "patch_embed")]}
    if work.family == "lejepa":
        return patches | {"context": (objective.encoder, "views")}
    if work.family == "ac":
        return patches | {"target": (objective, "encode"), "predictor": (objective, "predict")}
    return patches | {"context": (objective.encoder, "context"), "target": (objective.target_encoder, "rows"),
                      "predictor": (objective.predictor, "forward")}


def with_features(work: Work, objective, inputs: dict) -> dict:
    """The batch as a feature cache gives it, on the host: features in place of clips, and whose they are."""
    with torch.autocast(work.device.type, torch.bfloat16, enabled=work.recipe.train.precision == "bf16"):
        features = objective.encode(to_float("clips", inputs["clips"].to(work.device)))
        rest = {name: value for name, value in inputs.items() if name != "clips"}
        return rest | {"features": features.cpu(), "encoder": objective.encoder_name()}


def on_device(inputs: dict, work: Work) -> dict:
    """What the data loader's processes hand over, uint8 -> what an objective takes: the loader's last step."""
    batch = {name: value.to(work.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
             for name, value in inputs.items()}
    for name in ("images", "clips"):
        if name in batch and batch[name].dtype == torch.uint8:
            batch[name] = to_float(name, batch[name])
    if work.family == "lejepa":
        batch["images"] = list(batch["images"].unbind(1))
    return batch | {"index": torch.arange(work.recipe.train.batch_size)}
