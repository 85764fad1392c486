"""Several gloo processes take the step that one process takes on the global batch: DDP, FSDP2 and HSDP."""

import dataclasses
import importlib
import os
import pathlib
import pickle
import shutil

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from shrink import shrink

from jepa_fast import recipes
from jepa_fast.checkpoints import convert
from jepa_fast.eval.collapse import feature_moments, monitors_of_moments
from jepa_fast.optim import Horizon
from jepa_fast.train import checkpoint, distributed
from jepa_fast.train.parallel import parallelize
from jepa_fast.train.saver import Saver
from jepa_fast.train.statistics import monitors
from jepa_fast.train.step import TrainStep, build_optimizer

STEPS = 3
TOLERANCE = 1e-9  # float64, of the largest entry: sums in another order, and what AdamW's division makes of them


def small(name: str, **train_changes) -> recipes.Recipe:
    recipe = shrink(recipes.get_recipe(name))
    objective = recipe.objective
    if hasattr(objective, "predictor"):
        shallow = {part: dataclasses.replace(getattr(objective, part), depth=1) for part in ("encoder", "predictor")}
        objective = dataclasses.replace(objective, **shallow)
    return dataclasses.replace(
        recipe, objective=objective, optim=dataclasses.replace(recipe.optim, clip_grad=0.5, clip_from_epoch=0.0),
        train=dataclasses.replace(recipe.train, **{"steps_per_epoch": 2, "epochs": 3.0, **train_changes}))


def take_steps(recipe: recipes.Recipe, world: distributed.World, double: bool = True, start: pathlib.Path | None = None,
               saver: Saver | None = None) -> tuple[list, torch.nn.Module]:
    """Losses and gradient norms of each step over all ranks, and the objective after the last.

    They begin with a checkpoint where `start` is given; `saver` takes the state after two of three.
    """
    torch.manual_seed(1 if start else 0)
    objective = recipe.objective.build().to(torch.float64 if double else torch.float32)
    if start and world.size > 1:
        for value in objective.state_dict().values():
            dist.broadcast(value, 0)
    model = parallelize(objective, recipe, world)
    optimizer = build_optimizer(recipe, objective)
    first = checkpoint.restore(start, objective, optimizer) if start else 0
    dataset = recipe.data.build()
    step = TrainStep(recipe, objective, optimizer, Horizon(2, 3.0, 1.0), world, model)
    batches = recipe.data.batches(dataset, global_batch_size=recipe.train.batch_size, seed=0, start_step=first,
                                  num_steps=STEPS, rank=world.rank, world_size=world.size, device=world.device)
    history = []
    for number, batch in enumerate(batches, start=first):
        if saver is not None and number == 2:
            saver.save(2, recipes.to_yaml(recipe), objective, optimizer)
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


def check_saves(world, expected, folder):
    """FSDP2 on all ranks and HSDP save while they take another step; both go on as `check_resumes` says."""
    for name, shards in (("all", -1), ("two", 2), ("each", 1)):
        saver = Saver(folder / name, world)
        result = take_steps(small("ijepa_mnist", shard_ranks=shards), world, saver=saver)
        assert_equal(*result, expected["ijepa_mnist"], f"saved by {name}")
        saver.wait()
        dist.barrier()
        assert sorted(item.name for item in (folder / name).iterdir()) == ["last.pt", "step_00000002"]
        assert len(list((folder / name / "step_00000002").glob("*.distcp"))) == world.size
        dist.barrier()
    # a disk error in the thread is told by the next call, on every rank, and nothing is lost
    with pytest.MonkeyPatch.context() as patch, pytest.raises(checkpoint.CheckpointError) as told:
        patch.setattr(os, "fsync", full_disk if world.rank == 3 else os.fsync)
        saver.save(3, "", torch.nn.Linear(300, 300), torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
        saver.wait()
    assert str(told.value).endswith(f"No space left on device; the previous checkpoint {saver.path} is unchanged")
    assert checkpoint.load(saver.path)["step"] == 2


def full_disk(*_):
    raise OSError(28, "No space left on device")


def check_resumes(world, expected, folder):
    """What four ranks saved goes on with one rank and with two, sharded or not, as if nothing had happened."""
    history, weights = expected["ijepa_mnist"]
    for name, shards in (("all", 1), ("two", world.size), ("each", world.size)):
        result = take_steps(small("ijepa_mnist", shard_ranks=shards), world, start=folder / name / "last.pt")
        assert_equal(*result, (history[2:], weights), f"saved by {name}, {shards} of {world.size}")


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
    together, expected = monitors(own, world)(), monitors_of_moments(feature_moments(features))
    for name, value in expected.items() if world.is_main else ():
        assert float(together[name]) == pytest.approx(float(value), rel=1e-6), name
    alone = monitors_of_moments(feature_moments(own))
    assert float(alone["std_mean"]) != pytest.approx(float(expected["std_mean"]), rel=1e-3)


def check_mistakes(world):
    with pytest.raises(ValueError, match="train.shard_ranks must divide the number of ranks, .* got 3 for 2"):
        parallelize(torch.nn.Linear(2, 2), small("ijepa_mnist", shard_ranks=3), world)
    odd = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(odd.weight, 1.0)
    torch.nn.init.constant_(odd.bias, float(world.rank == 1))
    with pytest.raises(ValueError, match="ranks start from different weights: bias"):
        parallelize(odd, small("ijepa_mnist"), world)


def worker(expected_path, folder):
    world, expected = distributed.start("cpu"), torch.load(expected_path)
    check_steps(world, CASES[world.size], expected)
    if world.size == 2:
        check_bfloat16(world, expected)
        check_dropped_reductions(world, expected)
        check_ddp_holds_only_what_trains(world)
        check_mistakes(world)
        check_resumes(world, expected, folder)
    else:
        check_monitors(world)
        check_saves(world, expected, folder)
    distributed.stop()


# number of ranks -> besides I-JEPA with every shard_ranks on four: see check_saves
CASES = {2: [("ijepa_mnist", {"accumulate": 2}), ("ijepa_mnist", {"shard_ranks": -1, "accumulate": 2})],
         4: [("vjepa2_vitl16", {"shard_ranks": 2}), ("lejepa_mnist", {"shard_ranks": -1})]}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path, out = tmp_path_factory.mktemp("expected") / "expected.pt", {}
    for name in sorted({name for cases in CASES.values() for name, _ in cases}):
        history, objective = take_steps(small(name), ALONE)
        out[name] = history, full(objective)
    out["bfloat16"], out["dtypes"] = take_bfloat16_steps(ALONE)
    torch.save(out, path)
    return path


ALONE = distributed.World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def saved(expected, tmp_path_factory) -> pathlib.Path:
    """What four ranks saved, after all that they check."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(worker, 4, expected, folder, folder=folder / "ranks")
    return folder


def test_two_ranks_equal_one_and_go_on_where_four_stopped(expected, saved, tmp_path):
    ranks.run(worker, 2, expected, saved, folder=tmp_path)


def test_one_process_goes_on_where_four_stopped(expected, saved, tmp_path):
    check_resumes(ALONE, torch.load(expected), saved)


def test_ranks_go_on_where_one_process_stopped(expected, saved, tmp_path):
    """And the file that it leaves takes the place of the folder."""
    shutil.copytree(saved / "two", tmp_path / "run", symlinks=True)
    saver = Saver(tmp_path / "run", ALONE)
    take_steps(small("ijepa_mnist"), ALONE, saver=saver)
    saver.wait()
    assert [item.name for item in (tmp_path / "run").iterdir()] == ["last.pt"] and saver.path.is_file()
    alone, together = checkpoint.load(saver.path), checkpoint.load(saved / "all" / "last.pt")
    assert alone["step"] == together["step"] and alone["recipe"].split("train:")[0] == together["recipe"].split("train:")[0]
    for index, values in alone["optimizer"]["state"].items():
        assert values.keys() == together["optimizer"]["state"][index].keys()
        assert all(torch.allclose(values[key], together["optimizer"]["state"][index][key], rtol=1e-9) for key in values)
    assert alone["optimizer"]["param_groups"] == together["optimizer"]["param_groups"]


def test_every_reader_takes_a_folder_of_many_ranks(saved, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").parent.mkdir()
    (run / "checkpoints").symlink_to(saved / "all")
    weights = checkpoint.load(saved / "all" / "last.pt")["objective"]
    convert(run, tmp_path / "weights", "safetensors")
    for role in ("encoder", "target_encoder", "predictor"):
        for name, value in load_file(tmp_path / "weights" / f"{role}.safetensors").items():
            prefix = "target_encoder.encoder" if role == "target_encoder" else role
            assert torch.equal(value, weights[f"{prefix}.{name}"]), name


def test_mistakes_in_a_folder_are_named(saved, tmp_path):
    folder = tmp_path / "step_00000002"
    shutil.copytree(saved / "all" / "step_00000002", folder)
    model = torch.nn.Linear(3, 2)
    with pytest.raises(checkpoint.CheckpointError, match=r"weight \[2, 3\] of the model is not in the checkpoint"):
        checkpoint.restore(folder, model, torch.optim.AdamW(model.parameters()))
    next(folder.glob("__0_*.distcp")).write_bytes(b"cut short")
    with pytest.raises(checkpoint.CheckpointError, match="is not a readable checkpoint"):
        checkpoint.load(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(checkpoint.CheckpointError, match="is not a readable checkpoint: .metadata names pathlib.Path"):
        checkpoint.load(folder)
    assert not (tmp_path / "pwned").exists()
    (folder / ".metadata").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="is not a whole checkpoint"):
        checkpoint.load(folder)


class Evil:
    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)
