"""What tests of patches share: numbers of a loss, the error rule, three training steps, and what namespaces hold."""

import contextlib
import copy

import torch
from torch import nn

FLOORS = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3, "autocast": 4e-3}


def fill(*models: nn.Module) -> None:
    """Parameters large enough that every one matters to the loss, none of them 0 or 1."""
    for parameter in (parameter for model in models for parameter in model.parameters() if parameter.requires_grad):
        if parameter.dim() > 1 and parameter.shape[0] > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.5, std=0.5)


def numbers(loss_of, models: list[nn.Module], kind: str) -> list[torch.Tensor]:
    """The loss and the gradients of copies of models, computed in a dtype or under autocast to bfloat16."""
    models = [copy.deepcopy(model).to(torch.float32 if kind == "autocast" else getattr(torch, kind)) for model in models]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = loss_of(*models)
    loss.backward()
    parameters = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *(parameter.grad for parameter in parameters)]


def assert_as_good(ours, theirs, exact, kind: str) -> None:
    """Everything at most twice as far from float64 as the original's, by the norm."""
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - truth).norm() <= 2 * (b.double() - truth).norm() + FLOORS[kind] * truth.norm()


def train(loss_of, models: list[nn.Module], batches: list) -> list[float]:
    """Losses of one training step per batch: AdamW, and a moving average of the first model, the target of the loss."""
    models = [copy.deepcopy(model) for model in models]
    target = copy.deepcopy(models[0])
    optimizer = torch.optim.AdamW([parameter for model in models for parameter in model.parameters()], lr=1e-2)
    losses = []
    for batch in batches:
        loss = loss_of(*models, target, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(target.parameters(), models[0].parameters(), strict=True):
                average.mul_(0.9).add_(0.1 * parameter)
        losses.append(loss.item())
    return losses


@contextlib.contextmanager
def unchanged(modules):
    """That namespaces and their classes hold the very same things at the end as at the beginning."""
    def everything():
        owners = [*modules, *(value for module in modules for value in vars(module).values() if isinstance(value, type))]
        return {(id(owner), name): value for owner in owners for name, value in vars(owner).items()}

    before = everything()
    yield
    after = everything()
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)
