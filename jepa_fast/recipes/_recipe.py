"""A recipe: everything a run needs to know, as one frozen dataclass, saved with the run and read back from it."""

import dataclasses
import difflib
import pathlib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pydantic
import yaml

from ..data import (
    HfImagesData,
    ImageData,
    ImageFolderData,
    ImageShardsData,
    MixedData,
    MnistData,
    MovingDigitsData,
    SyntheticData,
    SyntheticTrajectoryData,
    SyntheticVideoData,
    TrajectoryData,
    TwoRoomsData,
    VideoData,
)
from ..objectives.action_conditioned import ActionConditionedConfig
from ..objectives.eb_jepa import EBJEPAConfig
from ..objectives.latent_prediction import LatentPredictionConfig
from ..objectives.lejepa import LeJEPAConfig
from ..objectives.leworldmodel import LeWorldModelConfig
from ..objectives.video_prediction import VideoPredictionConfig
from ..objectives.video_prediction21 import HierarchicalVideoPredictionConfig
from ..optim.schedules import Constant, Cosine, WarmupConstantLinear, WarmupCosine

Objective = (ActionConditionedConfig | EBJEPAConfig | HierarchicalVideoPredictionConfig | LatentPredictionConfig
             | LeJEPAConfig | LeWorldModelConfig | VideoPredictionConfig)
Data = (HfImagesData | ImageFolderData | ImageShardsData | MixedData | MnistData | MovingDigitsData | SyntheticData
        | SyntheticTrajectoryData | SyntheticVideoData | TrajectoryData | TwoRoomsData | VideoData)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with decoupled decay; biases and one-dimensional parameters do not decay unless told to."""

    lr: WarmupCosine | WarmupConstantLinear
    weight_decay: Cosine | Constant
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_all: bool = False         # biases and one-dimensional parameters decay too
    clip_grad: float | None = None  # largest gradient norm, per role (encoder, predictor); None: no clipping
    clip_from_epoch: float = 0.0    # no clipping before


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch_size: int                            # samples per step, over all ranks and micro-batches
    epochs: float
    steps_per_epoch: int | None = None         # the official `ipe` of video recipes; None: whole batches in the data set
    schedule_scale: float = 1.0                # schedules run over this many times the epochs (official ipe_scale)
    accumulate: int = 1                        # micro-batches per step and rank
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast, parameters and optimizer state stay float32
    target_precision: Literal["same", "fp8"] = "same"  # of the target encoder's products; fp8 approximates (class E3)
    activations: Literal["all", "lean", "checkpoint"] = "all"  # kept for the backward pass: 36, 24 or 4 bytes x D
    blocks: Literal["auto", "ops", "compile"] = "auto"  # who fuses a block: our ops, torch.compile, or what was measured
    shard_ranks: int = 1                       # ranks that hold one copy of the weights: 1 DDP, -1 all (FSDP2), else HSDP
    timeout_s: float = 600.0                   # a collective that takes longer ends the run: a rank hangs
    cuda_graphs: bool = False                  # replay whole steps: for small models; needs pad_tokens_to
    pad_tokens_to: int = 0                     # contexts in multiples of this, longer lists of 4 times it, so that shapes
                                               # come back; 0: no padding
    seed: int = 0
    max_steps: int | None = None               # stop early, schedules unchanged
    start_from: str = ""                       # a run's checkpoint to begin with: weights and optimizer, not the step
    log_every: int = 10                        # steps
    checkpoint_every: float = 1.0              # epochs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = False                  # needs the extra jepa_fast[tensorboard]
    wandb: bool = False                        # needs the extra jepa_fast[wandb]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    paper: str
    summary: str                               # one line, for `jepa-fast recipes`
    objective: Objective
    data: Data
    optim: OptimConfig
    train: TrainConfig


def with_image_source(recipe: Recipe, fields: Iterable[str]) -> Recipe:
    """The recipe on the source of images that has the named fields of `data`; as it is where its own has them, or none.

    --data.shards turns a folder of images into shards, --data.path into a Hugging Face data set.
    """
    if isinstance(recipe.data, ImageData):
        unknown = set(fields) - {field.name for field in dataclasses.fields(recipe.data)}
        shared = {field.name: getattr(recipe.data, field.name) for field in dataclasses.fields(ImageData)}
        for source in (ImageFolderData, ImageShardsData, HfImagesData):
            if unknown and unknown <= {field.name for field in dataclasses.fields(source)}:
                return dataclasses.replace(recipe, data=source(**shared))
    return recipe


def save(recipe: Recipe, path: pathlib.Path) -> None:
    path.write_text(to_yaml(recipe))


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False, allow_unicode=True)


def merge(base: Recipe, values: dict, where: str = "recipe") -> Recipe:
    """`base` with values from a file. The recipe of that name in the code says which classes its parts have."""
    data = values.get("data")
    return _merge(with_image_source(base, data) if isinstance(data, dict) else base, values, where, "")


def _merge(base, values: dict, where: str, prefix: str):
    """`base` with the fields of `values` put in, typed as the dataclass says; unknown fields are an error."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.') or 'recipe'} must be a mapping, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(base)}
    changes = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3, cutoff=0.3) or list(fields)
            raise ValueError(f"{where}: unknown field {prefix}{key}; nearest: {', '.join(prefix + name for name in near)}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _merge(current, value, where, f"{prefix}{key}.")
        else:
            changes[key] = _typed(type(base), key, value, f"{where}: {prefix}{key}")
    return dataclasses.replace(base, **changes)


def _typed(owner: type, key: str, value, where: str):
    """One value checked and converted (a list to a tuple, an integer to a float) by the field's annotation."""
    try:
        return pydantic.TypeAdapter(typing.get_type_hints(owner)[key]).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {first['msg']}, got {value!r}") from error


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
