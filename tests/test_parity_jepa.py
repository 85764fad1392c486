"""test_patch_jepa.py on a checkout of facebookresearch/jepa (--upstream jepa=PATH), and the authors' own main."""

import importlib.util
import sys
import types

import pytest
import torch
import yaml
from checkouts import checkout
from official_main import STUBS, losses
from test_patch_jepa import *  # noqa: F403
from test_patch_jepa import MODULES, jepa


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("jepa"), *MODULES) as modules:
        yield modules


def test_their_main(upstream, tmp_path, monkeypatch):
    path = upstream("jepa")
    for name in STUBS:
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            for attribute in ("VideoReader", "cpu"):
                monkeypatch.setattr(sys.modules[name], attribute, None, raising=False)
    settings = yaml.safe_load((path / "configs/pretrain/vitl16.yaml").read_text())
    settings["meta"]["dtype"] = "float32"
    settings["model"] |= {"model_name": "vit_tiny", "pred_depth": 2, "pred_embed_dim": 96}
    settings["data"] |= {"crop_size": 64, "num_frames": 4, "batch_size": 2, "num_workers": 0}
    settings["optimization"] |= {"epochs": 1, "warmup": 0, "ipe": 3}
    torch.manual_seed(1)
    samples = [([torch.randn(3, 4, 64, 64)], 0, [torch.arange(4)]) for _ in range(6)]
    with checkout(path, "app.vjepa.train") as (train,):
        theirs = losses(train, settings, "init_data", samples, tmp_path / "theirs", monkeypatch)
        with jepa.apply() as report:
            assert report.replaced["apply_masks"] == 5 and report.replaced["MaskCollator"] == 2
            ours = losses(train, settings, "init_data", samples, tmp_path / "ours", monkeypatch)
    assert len(set(theirs)) == 3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.1e-5)  # they are logged with five digits
