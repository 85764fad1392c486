"""Every value of the official schedules, to the bit."""

import json
import pathlib

import pytest
from safetensors.torch import load_file

from jepa_fast.optim import Constant, Cosine, Horizon, Linear, WarmupConstantLinear, WarmupCosine

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = json.loads((GOLDEN / "manifest.json").read_text())["files"]
CASES = [pytest.param(file, name, id=name if file != "vjepa_tables" else f"vjepa-{name}")
         for file in ("ijepa_tables", "vjepa_tables", "vjepa2_tables")
         for name in FILES[f"{file}.safetensors"]["config"]["schedules"]]


def schedules(config: dict) -> dict:
    """What the recipes write for an official configuration."""
    ends = {"start": config["start_lr"], "peak": config["lr"], "final": config["final_lr"]}
    if config.get("is_anneal"):
        lr = WarmupConstantLinear(**ends, warmup_epochs=0, anneal_epochs=None)
    elif "anneal" in config:
        lr = WarmupConstantLinear(**ends, warmup_epochs=config["warmup"], anneal_epochs=config["anneal"])
    else:
        lr = WarmupCosine(**ends, warmup_epochs=config["warmup"])
    result = {"lr": lr, "weight_decay": Cosine(start=config["weight_decay"], final=config["final_weight_decay"])}
    if "ema" in config:
        result["momentum"] = Linear(start=config["ema"][0], final=config["ema"][1])
    return result


@pytest.mark.parametrize("file, name", CASES)
def test_official_values(file, name):
    tensors, config = load_file(GOLDEN / f"{file}.safetensors"), FILES[f"{file}.safetensors"]["config"]["schedules"]
    config = config[name]
    horizon = Horizon(config["ipe"], config["epochs"], config.get("ipe_scale", 1.0))
    steps = tensors[f"{name}/step"].tolist()
    assert steps[0] == 1 and steps[-1] > horizon.total_steps  # the first step, and past the end
    for key, schedule in schedules(config).items():
        expected = tensors[f"{name}/{key}"].tolist()  # momentum ends earlier than the others
        assert len(expected) > 50
        ours = [schedule(step - 1, horizon) for step in steps[: len(expected)]]
        assert ours == expected, key


def test_first_step():
    """Step 0 is the first optimizer step: one step into the warm-up, none into the momentum."""
    horizon = Horizon(steps_per_epoch=10, epochs=4)
    assert WarmupCosine(start=0.0, peak=1.0, final=0.0, warmup_epochs=2)(0, horizon) == 1 / 20
    assert Linear(start=0.9, final=1.0)(0, horizon) == 0.9
    assert Constant(value=0.3)(0, horizon) == 0.3


def test_constant_between_warm_up_and_anneal():
    horizon = Horizon(steps_per_epoch=10, epochs=6)
    schedule = WarmupConstantLinear(start=0.0, peak=1.0, final=0.0, warmup_epochs=2, anneal_epochs=1)
    values = [schedule(step, horizon) for step in range(60)]
    assert values[:20] == [(s + 1) / 20 for s in range(20)]
    assert values[20:49] == [1.0] * 29 and values[49] == 1.0 and values[59] == 0.0
    assert values[50:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_momentum_length_is_not_rounded():
    assert Linear(start=0.0, final=1.0)(1, Horizon(3, 1.5)) == 1 / 4.5
    assert Horizon(3, 1.5).total_steps == 4


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (1, 1, 0.0)])
def test_bad_horizon(arguments):
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1, epochs and scale above 0"):
        Horizon(*arguments)
