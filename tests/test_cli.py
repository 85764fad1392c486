"""The command line: every mistake is one clear line and a non-zero exit code."""

import pytest
from test_train import SMALL, SMALL_DEMO, launch, losses_of

from jepa_fast.cli import main


def fails(capsys, *argv: str) -> str:
    assert main(list(argv)) != 0
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1, err
    return err


def test_unknown_command_and_recipe(capsys):
    assert "unknown command 'trian'; one of train, eval" in fails(capsys, "trian")
    assert "unknown recipe 'lejepa_mnits'; nearest: lejepa_mnist" in fails(capsys, "train", "lejepa_mnits")
    assert "name a recipe or pass --from" in fails(capsys, "train")
    assert "no recipe file at" in fails(capsys, "train", "--from", "nowhere.yaml")


def test_unknown_field_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "ijepa_mnist", "--train.epoch", "3"])
    assert stop.value.code != 0
    assert "--train.epochs" in capsys.readouterr().err


def test_missing_and_empty_folders(capsys, tmp_path):
    assert "data.root is empty: pass --data.root FOLDER" in fails(capsys, "train", "ijepa_vits16")
    missing = fails(capsys, "train", "ijepa_vits16", "--data.root", str(tmp_path / "none"))
    assert "no such folder" in missing and "none" in missing
    assert "no images in" in fails(capsys, "train", "ijepa_vits16", "--data.root", str(tmp_path))


def test_settings_that_do_not_fit(capsys, tmp_path):
    run = ["--run-dir", str(tmp_path / "run")]
    assert "at least one global batch" in fails(capsys, "train", "ijepa_mnist", *run, "--train.batch-size", "9999")
    assert "multiple of ranks x accumulate" in fails(capsys, "train", "ijepa_mnist", *run, "--train.batch-size", "15",
                                                     "--train.accumulate", "2")
    tiny_grid = fails(capsys, "train", "ijepa_mnist", *run, "--objective.encoder.patch-size", "14",
                      "--train.batch-size", "16")
    assert "min_keep" in tiny_grid or "grid" in tiny_grid
    with pytest.raises(SystemExit) as stop:  # values that a field refuses are tyro's to report
        main(["train", "lejepa_mnist", *run, "--objective.sigreg.num-knots", "1"])
    err = capsys.readouterr().err
    assert stop.value.code != 0 and "num_knots must be at least 2" in err and "Traceback" not in err


def test_torchrun_half_described(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    err = fails(capsys, "train", "ijepa_mnist", "--run-dir", str(tmp_path / "run"), "--train.device", "cpu")
    assert "RANK, MASTER_ADDR, MASTER_PORT not set: start the processes with torchrun" in err


def test_train_resume_from_and_overwrite(tmp_path):
    """The whole life of a run in real processes: train, refuse to overwrite, resume, train again from its recipe."""
    run = tmp_path / "run"
    small = [*SMALL_DEMO, *SMALL["ijepa_mnist"]]
    done = launch(["train", "ijepa_mnist", "--run-dir", str(run), *small])
    assert done.returncode == 0, done.stderr
    assert "run folder" in done.stdout
    again = launch(["train", "ijepa_mnist", "--run-dir", str(run), *small])
    assert again.returncode == 1 and "holds a run already: pass --resume" in again.stderr
    more = launch(["train", "--from", str(run / "recipe.yaml"), "--resume", "--train.max-steps", "5"])
    assert more.returncode == 0, more.stderr
    assert len(losses_of(run)) == 5
    other = launch(["train", "--from", str(run / "recipe.yaml"), "--run-dir", str(tmp_path / "other")])
    assert other.returncode == 0, other.stderr
    assert losses_of(tmp_path / "other") == losses_of(run)[:3] + losses_of(tmp_path / "other")[3:]


def test_a_checkpoint_of_another_shape(tmp_path):
    small = [*SMALL_DEMO, *SMALL["ijepa_mnist"]]
    assert launch(["train", "ijepa_mnist", "--run-dir", str(tmp_path / "run"), *small]).returncode == 0
    wider = launch(["train", "ijepa_mnist", "--run-dir", str(tmp_path / "run"), "--resume", *small,
                    "--objective.encoder.embed-dim", "96"])
    assert wider.returncode == 1 and wider.stderr.strip().splitlines()[-1].startswith("jepa-fast: error:")
    assert "in the checkpoint and" in wider.stderr and "Traceback" not in wider.stderr


def test_info_and_recipes(capsys):
    assert main(["info", "--all"]) == 0
    out = capsys.readouterr().out
    for word in ("gather_tokens", "varlen_attention", "sigreg", "triton", "float64 products", "torch"):
        assert word in out
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for word in ("ijepa_vith14", "lejepa_minimal", "arXiv:2301.08243", "652."):
        assert word in out
