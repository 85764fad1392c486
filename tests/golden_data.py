"""Golden data: what the official code computes on tiny problems (tests/golden; a README there says what is what)."""

import functools
import json
import pathlib

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = pathlib.Path(__file__).parent / "golden"


@functools.cache
def manifest() -> dict:
    return json.loads((FOLDER / "manifest.json").read_text())


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """Tensors of a file; integers as int64."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {key: value.long() if value.dtype == torch.int16 else value for key, value in tensors.items()}


def config(name: str) -> dict:
    return manifest()["files"][f"{name}.safetensors"]["config"]


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def error(ours: Tensor, golden: Tensor) -> float:
    """norm(ours - golden) / norm(golden), the measure of the golden README."""
    return float((ours.detach().double() - golden.double()).norm() / golden.double().norm())


def moments(tensor: Tensor) -> Tensor:
    values = tensor.detach().double()
    return torch.stack([values.sum(), values.square().sum()])


def assert_moments(ours: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Sums that nearly cancel are measured against what they are made of (golden README, section 1)."""
    own = moments(ours)
    scale = torch.stack([torch.sqrt(ours.numel() * expected[1]), expected[1]])
    assert ((own - expected).abs() <= tolerance * scale.clamp_min(1e-300)).all(), (name, own, expected)
