"""What the adapters to the authors' code share: their `main` runs as it is, around a loader and initial weights of ours.

Nothing of theirs is copied or edited: modules are imported from the user's checkout, and four names in their train module
are replaced: what makes the data loader, what builds the models (then gets our weights), the step timer (which also tells
us the loss) and DistributedDataParallel (which also marks the models in profiles). They always wrap their models, so there
is a process group of one; on a CPU, where they have none, the models stay bare, which is faster.
"""

import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
import yaml
from torch import nn

from .work import Work
from .worker import Batches

# imported by their data loading and launching, which no step touches; stubbed where not installed
NOT_IN_THE_STEP = ("decord", "h5py", "cv2", "psutil", "submitit", "iopath")
MODELS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge", 1408: "vit_giant"}

_kept: list[torch.library.Library] = []  # a library's schemas go when it does


def import_from(checkout: pathlib.Path, module: str) -> types.ModuleType:
    """A module of the checkout. ValueError where it is not there."""
    if not (checkout / (module.replace(".", "/") + ".py")).exists():
        path = module.replace(".", "/")
        raise ValueError(f"--official {checkout} has no {path}.py: is it a checkout of the right repository?")
    for name in NOT_IN_THE_STEP:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock(name=name)
    if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
        # torchvision from PyPI is linked to CUDA and fails on a CPU build of torch over two schemas
        _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _kept[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"the official code needs {error.name}: pip install {error.name.split('.')[0]}") from error


def configuration(checkout: pathlib.Path, path: str) -> dict:
    return yaml.safe_load((checkout / path).read_text())


def run_main(train: types.ModuleType, settings: dict, work: Work, batches: Batches, *, init: str, prefix: str) -> None:
    """Their main(settings) on our weights; `init` names the function that builds encoder and predictor."""
    device = "nccl" if work.device.type == "cuda" else "gloo"
    dist.init_process_group(device, store=dist.HashStore(), rank=0, world_size=1)
    weights = work.weights()
    build, timer, regions = getattr(train, init), train.gpu_timer, iter(("context", "predictor", "target"))

    def built(**arguments):
        models = build(**arguments)
        for model, role in zip(models, ("encoder", "predictor"), strict=True):
            put_weights(model, {prefix + name: value for name, value in weights.pop(role).items()})
        return models

    def wrapped(model: nn.Module, **options) -> nn.Module:
        batches.regions(**{next(regions): (model, "forward")})
        return nn.parallel.DistributedDataParallel(model, **options) if work.device.type == "cuda" else model

    def timed(step: Callable, **options):
        result, elapsed = timer(step, **options)
        batches.record(result[0])
        return result, elapsed

    setattr(train, init, built)
    train.DistributedDataParallel, train.gpu_timer = wrapped, timed
    train.main(settings)


def put_weights(model: nn.Module, state: dict) -> None:
    """Strictly, but for position tables that a model holds and does not use."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("pos_embed")]
    if missing or unexpected:
        raise ValueError(f"weights do not fit the official model: missing {missing[:3]}, unknown {unexpected[:3]}")


class Sampler:
    """What their loops tell the number of the epoch."""

    def set_epoch(self, epoch: int) -> None:
        pass


def run_folder(work: Work) -> str:
    folder = work.folder / "official"
    folder.mkdir(exist_ok=True)
    return str(folder)
