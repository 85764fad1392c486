"""`jepa-fast eval RUN`: probes of a run's encoder beside raw pixels and the same encoder untrained, and its page."""

import json
import pathlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipes
from ..data import MnistData, TwoRoomsData, load_in_order
from ..info import devices, versions
from ..objectives.action_conditioned import ActionConditioned
from ..train import checkpoint
from .curves import learning_curves
from .page import write_page
from .pictures import features_scatter, pca_features
from .probe_suite import evaluate_features
from .rollouts import evaluate_rollouts
from .table import Table, Tables
from .video_run import evaluate_video, is_video

MAX_TRAIN, MAX_TEST = 10_000, 2_000  # images; a probe of more tells little more
PIXELS = 32                          # images are shrunk to this for the raw-pixel row


@dataclass(frozen=True)
class Images:
    """Normalised images of one split, their labels, and the same images in [0, 1]."""

    normalised: Tensor
    labels: Tensor
    plain: Tensor


def evaluate_run(folder: pathlib.Path, *, probe_depth: int = 1) -> tuple[Table | Tables, pathlib.Path]:
    """Probe the run in `folder`; returns the tables and the page written there. Raises ValueError for unusable runs.

    `probe_depth` is that of the attentive probes of a video run: 1 as V-JEPA, 4 as V-JEPA 2.
    """
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: no recipe.yaml in it")
    recipe = recipes.load(folder / "recipe.yaml")
    if isinstance(recipe.data, TwoRoomsData):
        raise ValueError(f"eval probes encoders, a world model is judged by: jepa-fast plan {folder}")
    torch.manual_seed(recipe.train.seed)
    untrained = recipe.objective.build()
    objective = recipe.objective.build()
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    checkpoint.load_into(objective, state["objective"], str(folder))
    if isinstance(objective, ActionConditioned):
        tables, pictures = evaluate_rollouts(folder, recipe, untrained, objective, state["step"])
        return Tables(tables), write(folder, recipe, tables, pictures, state["step"])
    if is_video(recipe.data):
        tables, pictures = evaluate_video(folder, recipe, untrained, objective, state["step"], probe_depth)
        return Tables(tables), write(folder, recipe, tables, pictures, state["step"])
    encoders = {"untrained encoder": untrained.evaluation_encoder(), "trained encoder": objective.evaluation_encoder()}
    train, test = splits(recipe)
    table = probe(encoders, train, test, f"{recipe.name} after {state['step']} steps: {len(train.labels)} images to "
                                         f"fit the probes, {len(test.labels)} to judge them")
    return table, write(folder, recipe, [table], draw(folder, encoders, test), state["step"])


def write(folder: pathlib.Path, recipe: "recipes.Recipe", tables: list[Table], pictures: list[tuple[str, str]],
          step: int) -> pathlib.Path:
    """The page, and eval.json: the first table, the others below "more"; the path of the page."""
    page = write_page(folder, f"{recipe.name} ({recipe.paper})", (folder / "recipe.yaml").read_text(), tables,
                      pictures, versions=versions() | {"device": devices()[-1], "step": str(step)})
    first, *more = ({"header": list(table.header), "rows": [list(row) for row in table.rows], "title": table.title}
                    for table in tables)
    (folder / "eval.json").write_text(json.dumps(first | ({"more": more} if more else {}), indent=1) + "\n")
    return page


def probe(encoders: dict[str, nn.Module], train: Images, test: Images, title: str) -> Table:
    named = {"raw pixels": tuple(F.adaptive_avg_pool2d(s.plain, min(PIXELS, s.plain.shape[-1])).flatten(1)
                                 for s in (train, test))}
    for name, encoder in encoders.items():
        named[name] = tuple(features_of(encoder, split.normalised) for split in (train, test))
    return evaluate_features(named, train.labels, test.labels, title=title)


@torch.no_grad()
def features_of(encoder: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Pooled features [n, D] in evaluation mode; the encoder's own output before any head that pre-training used."""
    encoder.eval()
    return torch.cat([encoder.features(part).float() for part in images.split(batch_size)])


def splits(recipe: "recipes.Recipe") -> tuple[Images, Images]:
    """Labelled images to fit probes on and others to judge them; for a folder without `val_root` every fifth is held out."""
    data = recipe.data
    if isinstance(data, MnistData):
        return tuple(load(data.build(split), data) for split in ("train", "test"))
    dataset = data.build()
    labelled = torch.nonzero(dataset.labels >= 0).flatten()
    if len(labelled) < 10 or len(dataset.labels[labelled].unique()) < 2:
        raise ValueError("probes need labels: put the images of each class into a sub-folder of data.root")
    order = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))]
    is_test = torch.arange(len(order)) % 5 == 0
    return (load(Subset(dataset, order[~is_test][:MAX_TRAIN]), data),
            load(Subset(dataset, order[is_test][:MAX_TEST]), data))


class Subset:
    """Some images of a data set, as a data set."""

    def __init__(self, dataset, indices: Tensor):
        self.dataset, self.indices = dataset, indices.tolist()
        self.labels, self.class_names, self.in_chans = dataset.labels[indices], dataset.class_names, dataset.in_chans

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int):
        return self.dataset.image(self.indices[index])


def load(dataset, data) -> Images:
    transform = data.eval_transform
    batches = list(load_in_order(dataset, transform, batch_size=256, num_workers=data.num_workers))
    images = torch.cat([batch["images"] for batch in batches])
    mean, std = (torch.tensor(value)[:, None, None] for value in (transform.mean, transform.std))
    return Images(images, torch.cat([batch["labels"] for batch in batches]), (images * std + mean).clamp(0, 1))


@torch.no_grad()
def draw(folder: pathlib.Path, encoders: dict[str, nn.Module], test: Images) -> list[tuple[str, str]]:
    """The pictures of a run: (file name, caption) each."""
    pictures = []
    if (folder / "metrics.csv").is_file():
        learning_curves(folder / "metrics.csv", folder / "curves.png")
        pictures.append(("curves.png", "Learning curves, from metrics.csv."))
    chosen = torch.linspace(0, len(test.labels) - 1, 32).long()
    patches = {name: encoder.eval().patch_features(test.normalised[chosen]) for name, encoder in encoders.items()}
    (before, _), (after, grid) = patches["untrained encoder"], patches["trained encoder"]
    pca_features(after, grid, test.plain[chosen], folder / "patches.png", untrained=before)
    pictures.append(("patches.png", f"Patch features of {len(chosen)} held-out images; each patch is coloured by the "
                                    "first three principal components."))
    features = features_of(encoders["trained encoder"], test.normalised)
    features_scatter(features, test.labels, folder / "features.png", title="Held-out images by class, trained encoder")
    pictures.append(("features.png", "Pooled features of the held-out images over their first two principal components."))
    return pictures
