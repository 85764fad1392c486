"""Options of a run that change how a step is computed: what each needs, and how it is put into force."""

from torch import nn

from ..optim import AdamWEMA
from ..recipes import Recipe
from .distributed import World


def apply_options(recipe: Recipe, objective: nn.Module, optimizer: AdamWEMA, world: World) -> None:
    """Put train.target_precision and train.pad_tokens_to into force, once weights are loaded.

    Raises ValueError for an option that the objective, the device or another option does not allow.
    """
    config = recipe.train
    _check_graphs(recipe, objective, world)
    if config.pad_tokens_to < 0:
        raise ValueError(f"train.pad_tokens_to must be at least 0, got {config.pad_tokens_to}")
    if config.pad_tokens_to:
        if not hasattr(objective, "pad_tokens_to"):
            raise ValueError(f"train.pad_tokens_to is for I-JEPA, V-JEPA and V-JEPA 2, got {type(objective).__name__}")
        objective.pad_tokens_to = config.pad_tokens_to
    if config.target_precision == "fp8":
        target_encoder = getattr(objective, "target_encoder", None)
        if target_encoder is None:
            raise ValueError(f"train.target_precision fp8 is for objectives with a target encoder, "
                             f"got {type(objective).__name__}")
        if config.shard_ranks != 1:
            raise ValueError("train.target_precision fp8 needs whole weights, train.shard_ranks 1, "
                             f"got {config.shard_ranks}")
        target_encoder.quantize_()
        optimizer.register_step_post_hook(lambda *_: target_encoder.refresh_())


def _check_graphs(recipe: Recipe, objective: nn.Module, world: World) -> None:
    config = recipe.train
    if not config.cuda_graphs:
        return
    if world.device.type != "cuda":
        raise ValueError(f"train.cuda_graphs needs a CUDA device, got {world.device}")
    for name, expected in (("accumulate", 1), ("shard_ranks", 1)):
        if getattr(config, name) != expected:
            raise ValueError(f"train.cuda_graphs needs train.{name} {expected}, got {getattr(config, name)}")
    if world.size > 1:
        raise ValueError(f"train.cuda_graphs is for one process, got {world.size}")
    if hasattr(objective, "pad_tokens_to") and not config.pad_tokens_to:
        raise ValueError("train.cuda_graphs needs train.pad_tokens_to, so that the shapes of packed tokens come back; "
                         "got 0")
