"""`jepa-fast eval` on a real run folder, as its own process would see it."""

import json

import numpy as np
import pytest
from PIL import Image

from jepa_fast import recipes
from jepa_fast.cli import main
from jepa_fast.eval.run import evaluate_run


def test_eval_of_a_digits_run(tmp_path, capsys):
    """Train a few steps on the digits, then probe: table, pictures and page are there, raw pixels as known."""
    small = ["--train.max-steps", "2", "--train.log-every", "1", "--objective.sigreg.num-slices", "32"]
    assert main(["train", "lejepa_mnist", "--run-dir", str(tmp_path / "run"), "--eval", *small]) == 0
    out = capsys.readouterr().out
    assert "raw pixels" in out and "untrained encoder" in out and "trained encoder" in out
    result = json.loads((tmp_path / "run/eval.json").read_text())
    raw = dict(zip(result["header"], result["rows"][0], strict=True))
    assert 87 < float(raw["linear probe %"]) < 93  # multinomial logistic regression on the pixels of these digits
    page = (tmp_path / "run/index.html").read_text()
    for name in ("curves.png", "patches.png", "features.png"):
        assert f'src="{name}"' in page
        assert np.asarray(Image.open(tmp_path / "run" / name).convert("RGB")).std() > 5


def test_eval_of_an_ijepa_run_on_a_folder(tmp_path):
    """Own images: two classes in sub-folders; a fifth of them judges the probes."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(rng.normal(level, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    small = ["--data.root", str(tmp_path / "images"), "--data.num-workers", "0", "--train.batch-size", "8",
             "--train.max-steps", "2", "--train.log-every", "1", "--train.precision", "fp32", "--train.device", "cpu",
             "--objective.encoder.embed-dim", "48", "--objective.encoder.depth", "1", "--objective.encoder.num-heads", "3",
             "--objective.predictor.embed-dim", "48", "--objective.predictor.depth", "1",
             "--objective.masking.mask-group-size", "8"]
    assert main(["train", "ijepa_vits16", "--run-dir", str(tmp_path / "run"), *small]) == 0
    # few images: the neighbours of kNN must exist
    table, page = evaluate_run(tmp_path / "run")
    assert len(table.rows) == 3 and page.is_file()
    assert float(table.rows[0][2]) >= 80  # brightness alone tells these classes


def test_eval_mistakes(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder: no recipe.yaml"):
        evaluate_run(tmp_path)
    recipes.save(recipes.get_recipe("ijepa_mnist"), tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="no checkpoint at"):
        evaluate_run(tmp_path)
