"""SIGReg of every code base that has one, forward and backward, at sizes of training runs."""

import contextlib
import functools
import pathlib
import sys
import types
from unittest.mock import MagicMock

import torch
from torch import nn

from jepa_fast import patches

from ..checkouts import checkout
from .task import Case, Task, training

VIEWS, LATENTS = (8, 256, 128), (4, 128, 192)


def cases() -> list[Case]:
    views, what = "SIGReg {} x {} x {}, 1024 slices".format(*VIEWS), "forward + backward"
    latents = "SIGReg {} x {} x {}, 1024 slices".format(*LATENTS)
    only = functools.partial(Case, precisions=("fp32",))
    return [only("lejepa", views, what, lejepa, goal=15.0, checkout="lejepa"),
            only("lightly", views, what, lightly, goal=15.0, packages=("lightly",)),
            only("lewm", latents, what, lewm, goal=15.0, checkout="stable-worldmodel"),
            only("stable_pretraining", "SIGReg {1} x {2}, 1024 slices".format(*VIEWS), what, stable_pretraining,
                 checkout="stable-pretraining"),
            only("eb_jepa", "BCS 2 x {1} x {2}, 256 slices".format(*VIEWS), what, eb_jepa, checkout="eb_jepa")]


class OfEmbeddings(nn.Module):
    """loss(*x), x the parameters: their gradients are SIGReg's."""

    def __init__(self, loss: nn.Module, *x: torch.Tensor):
        super().__init__()
        self.loss, self.x = loss, nn.ParameterList(x)

    def forward(self):
        out = self.loss(*self.x)
        return out["loss"] if isinstance(out, dict) else out


def _task(loss: nn.Module, *shapes: tuple[int, ...], patch: types.ModuleType) -> Task:
    torch.manual_seed(0)
    return Task(OfEmbeddings(loss, *map(torch.randn, shapes)), training(lambda model: model()), patch.apply)


@contextlib.contextmanager
def lejepa(path: pathlib.Path):
    with checkout(path, "lejepa.univariate.epps_pulley", "lejepa.multivariate.slicing") as (univariate, multivariate):
        loss = multivariate.SlicingUnivariateTest(univariate.EppsPulley(n_points=17), num_slices=1024)
        yield _task(loss, VIEWS, patch=patches.lejepa)


@contextlib.contextmanager
def lightly():
    from lightly.loss.lejepa_loss import SIGReg

    yield _task(SIGReg(), VIEWS, patch=patches.lightly)


@contextlib.contextmanager
def lewm(path: pathlib.Path):
    with checkout(path / "stable_worldmodel/wm", "loss") as (loss,):
        yield _task(loss.SIGReg(), LATENTS, patch=patches.lewm)


@contextlib.contextmanager
def stable_pretraining(path: pathlib.Path):
    """Its loss's file alone: the package has dozens of dependencies, of which the loss needs none."""
    package = MagicMock(name="stable_pretraining", Module=nn.Module)
    stubs = {"stable_pretraining": package, "stable_pretraining.backbone": package.backbone,
             "stable_pretraining.methods": package.methods}
    name = "stable_pretraining.methods.lejepa"
    hidden = {key: sys.modules.pop(key) for key in [*stubs, name] if key in sys.modules}
    module = sys.modules[name] = types.ModuleType(name)
    sys.modules.update(stubs)
    try:
        file = path / "stable_pretraining/methods/lejepa.py"
        exec(compile(file.read_text(), str(file), "exec"), vars(module))
        yield _task(module.SlicedEppsPulley(), VIEWS[1:], patch=patches.stable_pretraining)
    finally:
        for key in [*stubs, name]:
            del sys.modules[key]
        sys.modules.update(hidden)


@contextlib.contextmanager
def eb_jepa(path: pathlib.Path):
    with checkout(path, "eb_jepa.losses") as (losses,):
        yield _task(losses.BCS(), VIEWS[1:], VIEWS[1:], patch=patches.eb_jepa)
