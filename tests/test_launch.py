"""`jepa-fast launch`: what SLURM is asked for, and a job that comes back after its signal."""

import dataclasses
import os
import pathlib
import signal
import time

import pytest
from shrink import shrink

from jepa_fast import cli, recipes
from jepa_fast.train import checkpoint
from jepa_fast.train.launch import LaunchConfig, launch
from jepa_fast.train.run import read_metrics


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """sbatch and srun that keep what they are given."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho Submitted batch job 7\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "script"


def test_what_slurm_is_asked_for(fake_slurm, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["launch", "ijepa_mnist", "--run-dir", str(run), "--nodes", "2", "--gpus", "4", "--partition", "fast",
                     "--minutes", "90", "--signal-s", "45", "--train.epochs", "2", "--setup", "module load cuda"]) == 0
    assert "job 7" in capsys.readouterr().out
    lines = fake_slurm.read_text().splitlines()
    for expected in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=fast", "--time=90",
                     "--signal=USR2@45", "--requeue", "--job-name=run", "--open-mode=append", "--cpus-per-task=12"):
        assert f"#SBATCH {expected}" in lines, expected
    assert "module load cuda" in lines
    import submitit

    submitted = submitit.core.utils.DelayedSubmission.load(next((run / "jobs").glob("7_submitted.pkl")))
    assert submitted.function.folder == run and submitted.function.recipe.train.epochs == 2
    # the next life is the same call: whether there is a checkpoint decides where it begins
    assert submitted.function.checkpoint().function == submitted.function


@pytest.mark.parametrize(("changes", "message"), [
    ({"nodes": 0}, "nodes must be at least 1, got 0"), ({"gpus": 0}, "gpus or processes must be at least 1"),
    ({"minutes": 2}, "signal_s must be below the 120 s of the job, got 120")])
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LaunchConfig(**changes)


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch and srun must be on the path"):
        launch(recipes.get_recipe("ijepa_mnist"), tmp_path, LaunchConfig())


@pytest.mark.slow
def test_a_job_comes_back_after_its_signal(tmp_path):
    """Two processes, submitit's signal to both in mid-run: the same job starts again and ends the run."""
    recipe = shrink(recipes.get_recipe("ijepa_mnist"))
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(
        recipe.train, max_steps=100, epochs=1000.0, steps_per_epoch=10, checkpoint_every=100.0, shard_ranks=2))
    job = launch(recipe, tmp_path / "run", LaunchConfig(cluster="local", gpus=0, processes=2, minutes=10))
    metrics = tmp_path / "run" / "metrics.csv"
    while not metrics.exists() or len(read_metrics(metrics)) < 3:
        time.sleep(0.1)
    children = pathlib.Path(f"/proc/{job._process.pid}/task/{job._process.pid}/children").read_text().split()
    assert len(children) == 2
    for pid in children:
        os.kill(int(pid), signal.SIGUSR2)
    job.wait()
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 100
    assert [row["step"] for row in read_metrics(metrics)] == [str(i) for i in range(1, 101)]
    log = (tmp_path / "run" / "jobs" / f"{job.job_id}_0_log.err").read_text()
    assert log.count("jepa-fast: stopped by a signal") == 1
