"""Features of a frozen encoder, computed once for all epochs to come."""

import pathlib

import torch

from ..data import FeatureCache
from ..objectives.action_conditioned import ActionConditionedConfig
from ..recipes import Recipe
from . import distributed


def cache_features(recipe: Recipe, folder: pathlib.Path, dtype: str = "float32") -> FeatureCache:
    """Write the features of every frame of a recipe's trajectories, in the precision that its training has.

    Train with data.features = folder. dtype "bfloat16" halves the file and rounds them.
    """
    if not isinstance(recipe.objective, ActionConditionedConfig):
        raise ValueError(f"{recipe.name} has no frozen encoder, so there is nothing to cache")
    if (folder / "cache.json").exists():
        raise ValueError(f"{folder} holds a feature cache already: name another folder, or delete it")
    device = distributed.start(recipe.train.device).device
    dataset = recipe.data.build()
    torch.manual_seed(recipe.train.seed)  # as in training, where the encoder is random
    objective = recipe.objective.build().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        return FeatureCache.write(folder, dataset, objective.encode, encoder=objective.encoder_name(), device=device,
                                  dtype=dtype)
