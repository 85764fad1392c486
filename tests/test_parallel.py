"""Several gloo processes take the step that one process takes on the global batch: DDP, FSDP2 and HSDP."""

import dataclasses
import importlib
import pathlib

import pytest
import ranks
import torch
import torch.distributed as dist
from shrink import shrink

from jepa_fast import recipes
from jepa_fast.eval.collapse import feature_moments, monitors_of_moments
from jepa_fast.optim import Horizon
from jepa_fast.train import distributed
from jepa_fast.train.parallel import parallelize
from jepa_fast.train.run import monitors_over_ranks
from jepa_fast.train.step import TrainStep, build_optimizer

STEPS = 3
TOLERANCE = 1e-9  # float64, of the largest entry: sums in another order, and what AdamW's division makes of them


def small(name: str, **train_changes) -> recipes.Recipe:
    recipe = shrink(recipes.get_recipe(name))
    return dataclasses.replace(
        recipe, optim=dataclasses.replace(recipe.optim, clip_grad=0.5, clip_from_epoch=0.0),
        train=dataclasses.replace(recipe.train, **{"steps_per_epoch": 2, "epochs": 3.0, **train_changes}))


def take_steps(recipe: recipes.Recipe, world: distributed.World, double: bool = True) -> tuple[list, torch.nn.Module]:
    """Losses and gradient norms of each step over all ranks, and the objective after the last."""
    torch.manual_seed(0)
    objective = recipe.objective.build().to(torch.float64 if double else torch.float32)
    model = parallelize(objective, recipe, world)
    optimizer = build_optimizer(recipe, objective)
    dataset = recipe.data.build()
    step = TrainStep(recipe, objective, optimizer, Horizon(2, 3.0, 1.0), world, model)
    batches = recipe.data.batches(dataset, global_batch_size=recipe.train.batch_size, seed=0, start_step=0, num_steps=STEPS,
                                  rank=world.rank, world_size=world.size, device=world.device)
    history = []
    for number, batch in enumerate(batches):
        losses, _ = step(doubled(batch) if double else batch, number)
        values = {name: value.detach().double() for name, value in losses.items() if value.dim() == 0}
        for name, value in values.items():
            if world.size > 1 and not name.startswith("grad_norm"):
                dist.all_reduce(value)
                value /= world.size
        history.append({name: float(value) for name, value in values.items()})
    return history, objective


def doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    return [doubled(item) for item in value] if isinstance(value, list) else value


def full(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in objective.state_dict().items()}


def assert_equal(history, objective, expected, what):
    theirs, weights = expected
    for step, (a, b) in enumerate(zip(history, theirs, strict=True)):
        # the others are means over tokens, of which ranks do not have equally many
        for key in [key for key in b if key == "loss" or key.startswith("grad_norm")]:
            assert a[key] == pytest.approx(b[key], rel=TOLERANCE), f"{what}: {key} at step {step}"
    ours = full(objective)
    for key, value in weights.items():
        error = (ours[key].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-3)
        assert error < TOLERANCE, f"{what}: {key} {error}"


def check_steps(world, cases, expected):
    for name, changes in cases:
        history, objective = take_steps(small(name, **changes), world)
        assert_equal(history, objective, expected[name], f"{name} {changes} on {world.size}")


def check_dropped_reductions(world, expected):
    """Where a reduction is computed and thrown away, or left out, the comparison above does not hold."""
    def thrown_away(x, group, upstream_sync=False):
        dist.all_reduce(x.clone(), group=group)
        return x

    sigreg, parallel = (importlib.import_module(f"jepa_fast.{name}") for name in ("ops.sigreg", "train.parallel"))
    for module, name, replacement, changes in ((sigreg, "sum_over_ranks", thrown_away, {}),
                                               (parallel, "average_whole_", lambda model: None, {"shard_ranks": -1})):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="lejepa_mnist"):
            patch.setattr(module, name, replacement)
            check_steps(world, [("lejepa_mnist", changes)], expected)


def check_ddp_holds_only_what_trains(world):
    recipe = small("ijepa_mnist")
    torch.manual_seed(0)
    objective = recipe.objective.build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", None)
        model = parallelize(objective, recipe, world)
    trained = sum(p.numel() for role in objective.roles().values() for p in role.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model._module_parameters) == trained < sum(p.numel() for p in objective.parameters())


def check_bfloat16(world, expected):
    """Autocast under FSDP2 meets the dtypes that it meets in one process, and the losses are as near as bfloat16 allows."""
    history, seen = take_bfloat16_steps(world)
    assert seen == expected["dtypes"], (seen, expected["dtypes"])
    for a, b in zip(history, expected["bfloat16"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def take_bfloat16_steps(world):
    seen, original = set(), torch.nn.LayerNorm.forward

    def watched(self, x):
        seen.add((str(x.dtype), str(self.weight.dtype)))
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.LayerNorm, "forward", watched)
        return take_steps(small("ijepa_mnist", precision="bf16", shard_ranks=-1), world, double=False)[0], sorted(seen)


def check_monitors(world):
    """Ranks with different numbers of rows, one with none but its own: the monitors of all rows together."""
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    own = features.split([1, 2, 4, 13])[world.rank]
    together, expected = monitors_over_ranks(own, world), monitors_of_moments(feature_moments(features))
    for name, value in expected.items():
        assert float(together[name]) == pytest.approx(float(value), rel=1e-6), name
    assert float(monitors_of_moments(feature_moments(own))["std_mean"]) != pytest.approx(float(value), rel=1e-3)


def check_mistakes(world):
    with pytest.raises(ValueError, match="train.shard_ranks must divide the number of ranks, .* got 3 for 4"):
        parallelize(torch.nn.Linear(2, 2), small("ijepa_mnist", shard_ranks=3), world)
    odd = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(odd.weight, 1.0)
    torch.nn.init.constant_(odd.bias, float(world.rank == 2))
    with pytest.raises(ValueError, match="ranks start from different weights: bias"):
        parallelize(odd, small("ijepa_mnist"), world)


def worker(expected_path):
    world, expected = distributed.start("cpu"), torch.load(expected_path)
    if world.size == 2:
        check_steps(world, [("ijepa_mnist", {}), ("ijepa_mnist", {"shard_ranks": 2})], expected)
        return
    check_steps(world, CASES, expected)
    check_bfloat16(world, expected)
    check_dropped_reductions(world, expected)
    check_ddp_holds_only_what_trains(world)
    check_monitors(world)
    check_mistakes(world)


CASES = [("ijepa_mnist", {}), ("ijepa_mnist", {"accumulate": 2}), ("ijepa_mnist", {"shard_ranks": -1}),
         ("ijepa_mnist", {"shard_ranks": -1, "accumulate": 2}), ("ijepa_mnist", {"shard_ranks": 2}),
         ("vjepa2_vitl16", {"shard_ranks": 2}), ("lejepa_mnist", {}), ("lejepa_mnist", {"shard_ranks": -1})]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path, alone = tmp_path_factory.mktemp("expected") / "expected.pt", distributed.World(0, 1, torch.device("cpu"))
    out = {}
    for name in sorted({name for name, _ in CASES}):
        history, objective = take_steps(small(name), alone)
        out[name] = history, full(objective)
    out["bfloat16"], out["dtypes"] = take_bfloat16_steps(alone)
    torch.save(out, path)
    return path


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_one(num_ranks, expected, tmp_path: pathlib.Path):
    ranks.run(worker, num_ranks, expected, folder=tmp_path)
