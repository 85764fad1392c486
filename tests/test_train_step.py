"""The step of the trainer: what it hands to the blocks, and that none of it changes what is learned."""

import dataclasses
import platform
import subprocess
import sys

import pytest
import torch
from shrink import shrink

from jepa_fast import recipes
from jepa_fast.nn.block import Block
from jepa_fast.optim import Horizon
from jepa_fast.train.distributed import World
from jepa_fast.train.step import TrainStep, build_optimizer, keep_copies_


def make(**train):
    recipe = shrink(recipes.get_recipe("ijepa_vits16"))
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **train))
    torch.manual_seed(0)
    objective = recipe.objective.build()
    optimizer = build_optimizer(recipe, objective)
    step = TrainStep(recipe, objective, optimizer, Horizon(10, 2, 1.0), World(0, 1, torch.device("cpu")))
    return step, objective, optimizer


def batch(step: int, recipe) -> dict:
    size, chans = recipe.objective.encoder.image_size, recipe.objective.encoder.in_chans
    generator = torch.Generator().manual_seed(step)
    return {"images": torch.randn(recipe.train.batch_size, chans, size, size, generator=generator),
            "index": torch.arange(recipe.train.batch_size)}


def losses(**train) -> list[float]:
    step, _, _ = make(**train)
    return [float(step(batch(i, step.recipe), i)[0]["loss"]) for i in range(3)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_changes_no_loss(precision):
    expected = losses(precision=precision, activations="all")
    assert losses(precision=precision, activations="lean") == expected
    assert losses(precision=precision, activations="checkpoint") == expected
    assert len(set(expected)) == 3


def test_copies_follow_the_weights():
    step, objective, _ = make(precision="bf16")
    for i in range(2):
        step(batch(i, step.recipe), i)
    blocks = [part for part in objective.modules() if isinstance(part, Block)]
    assert blocks
    for block in blocks:
        for parameter in block.parameters():
            assert torch.equal(block.copies[parameter], parameter.detach().bfloat16())


def test_frozen_weights_have_copies_too():
    _, objective, optimizer = make(precision="fp32")
    frozen = torch.nn.ModuleDict({"objective": objective, "other": Block(8, 2).requires_grad_(False)})
    keep_copies_(frozen, optimizer)
    assert set(frozen["other"].copies) == set(frozen["other"].parameters())
    assert not set(optimizer.shadows) & set(frozen["other"].parameters())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    code = """
import resource, torch
from jepa_fast.train.host_memory import keep_freed_memory
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults(4)
assert keep_freed_memory()
faults(20)
print(first, faults(4))
"""
    first, then = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                          check=True).stdout.split())
    assert then < 100 < first
