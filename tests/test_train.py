"""The trainer: resume, accumulation, ranks, kills, full disks and numbers that stop being numbers."""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from jepa_fast import recipes
from jepa_fast.data import SyntheticData
from jepa_fast.train import checkpoint
from jepa_fast.train.loop import train
from jepa_fast.train.run import NotFinite, read_metrics

ROOT = pathlib.Path(__file__).parent.parent


def tiny(name: str, **train_changes) -> recipes.Recipe:
    """A recipe of some minutes' size cut to seconds: synthetic 28 x 28 images."""
    recipe = recipes.get_recipe(name)
    encoder = dataclasses.replace(recipe.objective.encoder, embed_dim=48, depth=2) \
        if hasattr(recipe.objective.encoder, "embed_dim") else dataclasses.replace(recipe.objective.encoder, width=8)
    changes = {"encoder": encoder}
    if hasattr(recipe.objective, "masking"):
        changes["masking"] = dataclasses.replace(recipe.objective.masking, mask_group_size=4)
    else:
        changes |= {"projector": (32, recipe.objective.projector[-1]),
                    "sigreg": dataclasses.replace(recipe.objective.sigreg, num_slices=32)}
    data = SyntheticData(num_images=40, image_size=28, in_chans=1, transform=recipe.data.transform)
    settings = {"batch_size": 8, "epochs": 2.0, "log_every": 1, "checkpoint_every": 0.4, "precision": "fp32",
                "device": "cpu", "max_steps": None} | train_changes
    return dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, **changes), data=data,
                               train=dataclasses.replace(recipe.train, **settings))


DEMOS = ["ijepa_mnist", "lejepa_mnist"]


def losses_of(folder: pathlib.Path) -> list[str]:
    return [row["loss"] for row in read_metrics(folder / "metrics.csv")]


def state_of(folder: pathlib.Path) -> dict:
    return checkpoint.load(folder / "checkpoints" / "last.pt")


def assert_equal_states(a, b, path="state"):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "recipe":
                assert_equal_states(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_equal(name, precision, tmp_path):
    recipe = tiny(name, precision=precision)
    train(recipe, tmp_path / "whole")
    stopped = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=6))
    train(stopped, tmp_path / "parts")
    assert state_of(tmp_path / "parts")["step"] == 6
    train(recipe, tmp_path / "parts", resume=True)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert len(losses_of(tmp_path / "whole")) == 10
    assert_equal_states(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


@pytest.mark.parametrize("mode", ["official", "unbiased"])
def test_accumulation_equals_one_batch(mode, tmp_path):
    whole = tiny("ijepa_mnist", max_steps=3)
    masking = dataclasses.replace(whole.objective.masking, mode=mode)
    whole = dataclasses.replace(whole, objective=dataclasses.replace(whole.objective, masking=masking))
    parts = dataclasses.replace(whole, train=dataclasses.replace(whole.train, accumulate=2))
    train(whole, tmp_path / "whole")
    train(parts, tmp_path / "parts")
    for a, b in zip(losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts"), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-5)


def launch(arguments: list[str], ranks: int = 1, **environment) -> subprocess.CompletedProcess:
    """A real process, or several under torchrun, with one thread each."""
    command = [sys.executable, "-m", "jepa_fast.cli", *arguments]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
                   "jepa_fast.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


SMALL_DEMO = ["--data.num-workers", "0", "--train.precision", "fp32", "--train.device", "cpu", "--train.log-every", "1",
              "--train.batch-size", "16", "--train.max-steps", "3", "--objective.encoder.depth", "1"]
SMALL = {"ijepa_mnist": ["--objective.masking.mask-group-size", "8", "--objective.predictor.depth", "1"],
         "lejepa_mnist": ["--objective.projector", "32", "16", "--objective.sigreg.num-slices", "32"]}


@pytest.mark.parametrize("name", DEMOS)
def test_two_ranks_equal_one(name, tmp_path):
    """The same global batch on one process and on two: losses equal to rounding, after updates too."""
    small = [*SMALL_DEMO, *SMALL[name]]
    if not hasattr(recipes.get_recipe(name).objective.encoder, "embed_dim"):
        small = [arg for i, arg in enumerate(small) if arg != "--objective.encoder.depth"
                 and (i == 0 or small[i - 1] != "--objective.encoder.depth")]
        small += ["--objective.encoder.width", "8"]
    for ranks in (1, 2):
        done = launch(["train", name, "--run-dir", str(tmp_path / str(ranks)), *small], ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses_of(tmp_path / "1"), losses_of(tmp_path / "2")
    assert len(one) == 3
    # step 1 sees rounding only; AdamW's division magnifies it in the next ones
    assert float(two[0]) == pytest.approx(float(one[0]), rel=1e-5)
    assert [float(x) for x in two] == pytest.approx([float(x) for x in one], rel=2e-3)


def test_nan_stops_at_its_step_and_names_term_and_checkpoint(tmp_path, monkeypatch):
    from jepa_fast.objectives.lejepa import LeJEPA

    original, calls = LeJEPA.forward, []

    def poisoned(self, batch):
        losses = original(self, batch)
        calls.append(1)
        if len(calls) == 4:
            losses["invariance"] = losses["invariance"] * float("nan")
        return losses

    monkeypatch.setattr(LeJEPA, "forward", poisoned)
    with pytest.raises(NotFinite, match=r"invariance is not finite at step 4; the last good checkpoint is .*last\.pt"):
        train(tiny("lejepa_mnist"), tmp_path)
    state = state_of(tmp_path)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["objective"].values() if value.is_floating_point())


def test_save_is_atomic_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left on device; the previous checkpoint .* unchanged"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_save_to_a_device_that_is_really_full(tmp_path):
    (tmp_path / ".last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(checkpoint.CheckpointError, match="cannot save"):
        checkpoint.save(tmp_path / "last.pt", {"step": 2, "weights": torch.zeros(100_000)})


def test_checkpoint_mistakes_are_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        checkpoint.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoint.CheckpointError, match="not a readable checkpoint"):
        checkpoint.load(path)
    torch.save({"format": "other/9"}, path)
    with pytest.raises(checkpoint.CheckpointError, match="has format 'other/9', expected 'jepa_fast/1'"):
        checkpoint.load(path)
    model = torch.nn.Linear(3, 2)
    with pytest.raises(checkpoint.CheckpointError, match=r"weight is \[2, 4\] in the checkpoint and \[2, 3\] in the model"):
        checkpoint.load_into(model, torch.nn.Linear(4, 2).state_dict(), "file")


def test_pickles_are_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "pwned",))

    torch.save({"format": checkpoint.FORMAT, "step": Evil()}, tmp_path / "last.pt")
    with pytest.raises(checkpoint.CheckpointError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "pwned").exists()


def kill_at_random(folder: pathlib.Path, small: list[str], rng: random.Random) -> None:
    process = subprocess.Popen([sys.executable, "-m", "jepa_fast.cli", "train", "ijepa_mnist", "--run-dir", str(folder),
                                *(["--resume"] if (folder / "checkpoints/last.pt").exists() else []), *small],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    time.sleep(rng.uniform(1.0, 12.0))
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_100_random_kills_lose_nothing(tmp_path):
    """After each kill the checkpoint is whole and never older than before; the run ends as if nothing had happened."""
    small = [*SMALL_DEMO, *SMALL["ijepa_mnist"], "--train.max-steps", "4000", "--train.checkpoint-every", "0.004"]
    rng, step = random.Random(0), 0
    for _ in range(100):
        kill_at_random(tmp_path / "killed", small, rng)
        if (tmp_path / "killed/checkpoints/last.pt").exists():
            now = state_of(tmp_path / "killed")["step"]
            assert now >= step
            step = now
        elif step:
            raise AssertionError("the checkpoint is gone")
    assert step > 0
    rest = small[:-4] + ["--train.max-steps", str(step + 20), *small[-2:]]
    for name, resume in (("killed", ["--resume"]), ("whole", [])):
        done = launch(["train", "ijepa_mnist", "--run-dir", str(tmp_path / name), *resume, *rest])
        assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_states(state_of(tmp_path / "killed"), state_of(tmp_path / "whole"))


def test_metrics_have_the_collapse_monitors(tmp_path):
    train(tiny("ijepa_mnist", max_steps=2), tmp_path)
    row = read_metrics(tmp_path / "metrics.csv")[-1]
    for name in ("loss", "lr", "weight_decay", "momentum", "std_mean", "effective_rank", "cosine", "images_per_s"):
        assert float(row[name]) == float(row[name]), name
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]
