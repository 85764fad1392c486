"""What an action-conditioned model predicts: rollouts from one frame of a clip, beside frames that stay as they are."""

import dataclasses
import pathlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import recipes
from ..objectives.action_conditioned import ActionConditioned, normalise
from ..planning import ACWorldModel
from ._style import ACCENT, MUTED, drawing
from .curves import learning_curves
from .table import Table

NUM_CLIPS, BATCH_SIZE = 64, 8
HELD_OUT_SEED = 1_000_003  # of windows that no run trains on; the files are those of the run


@torch.no_grad()
def evaluate_rollouts(folder: pathlib.Path, recipe: "recipes.Recipe", untrained: ActionConditioned,
                      trained: ActionConditioned, step: int) -> tuple[list[Table], list[tuple[str, str]]]:
    """A table of errors by the number of steps predicted, and its pictures.

    From frame 0 and its pose alone: later frames are the model's own predictions, later poses are moved by the actions, as
    in planning. Errors are mean absolute differences of layer-normalised features. With the actions of another clip a
    model that uses actions is worse.
    """
    device = "cuda" if recipe.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    trained, untrained = trained.to(device).eval(), untrained.to(device).eval()
    data, errors, count = dataclasses.replace(recipe.data, features=""), {}, 0
    batches = data.batches(data.build(), global_batch_size=BATCH_SIZE, seed=recipe.train.seed + HELD_OUT_SEED,
                           num_steps=NUM_CLIPS // BATCH_SIZE, device=device)
    for batch in batches:
        frames, pose, actions = normalise(trained.encode(batch["clips"])), batch["states"][:, :1], batch["actions"]
        start, steps = frames[:, :1], frames.shape[1] - 1
        rollouts = {"frames that stay": iter([start] * steps),
                    "untrained predictor": ACWorldModel(untrained.predictor).rollout(start, pose, actions),
                    "actions of another clip": ACWorldModel(trained.predictor).rollout(start, pose, actions.roll(1, 0)),
                    "trained predictor": ACWorldModel(trained.predictor).rollout(start, pose, actions)}
        for name, rollout in rollouts.items():
            errors[name] = errors.get(name, 0) + _errors(rollout, frames)
        count += 1
    errors = {name: (total / count).tolist() for name, total in errors.items()}
    header = ["prediction", *(f"{k} step{'s' * (k > 1)}" for k in range(1, steps + 1))]
    table = Table(f"{recipe.name} after {step} steps: error of {NUM_CLIPS} rollouts by steps predicted", header,
                  [[name, *(f"{value:.4f}" for value in values)] for name, values in errors.items()])
    return [table], _draw(folder, errors)


def _errors(rollout: Iterator[Tensor], frames: Tensor) -> Tensor:
    """[T - 1], mean absolute difference of each predicted frame."""
    return torch.stack([(prediction - frames[:, k:k + 1]).abs().mean() for k, prediction in enumerate(rollout, start=1)])


def _draw(folder: pathlib.Path, errors: dict[str, list[float]]) -> list[tuple[str, str]]:
    with drawing(folder / "rollouts.png", 5.0, 3.0) as figure:
        ax = figure.subplots()
        styles = [dict(color=MUTED, linestyle=":"), dict(color=MUTED, linestyle="--"), dict(color=ACCENT, linestyle="--"),
                  dict(color=ACCENT)]
        for (name, values), style in zip(errors.items(), styles, strict=True):
            ax.plot(range(1, len(values) + 1), values, label=name, marker=".", **style)
        ax.set(xlabel="steps predicted", ylabel="mean absolute error", ylim=(0, 1.1 * max(map(max, errors.values()))))
        ax.legend()
    pictures = [("rollouts.png", "Error of rollouts from one frame, by the number of steps predicted.")]
    if (folder / "metrics.csv").is_file():
        learning_curves(folder / "metrics.csv", folder / "curves.png")
        pictures.append(("curves.png", "Learning curves, from metrics.csv."))
    return pictures
