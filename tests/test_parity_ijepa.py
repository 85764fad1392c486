"""test_patch_ijepa.py on a checkout of facebookresearch/ijepa (--upstream ijepa=PATH), and the authors' own main."""

import pytest
import torch
import yaml
from checkouts import checkout
from official_main import losses
from test_patch_ijepa import *  # noqa: F403
from test_patch_ijepa import MODULES, REPORT, ijepa


@pytest.fixture
def code(upstream):  # noqa: F811
    with checkout(upstream("ijepa"), *MODULES) as modules:
        yield modules


def test_their_main(upstream, tmp_path, monkeypatch):
    path = upstream("ijepa")
    settings = yaml.safe_load((path / "configs/in1k_vith14_ep300.yaml").read_text())
    settings["meta"] |= {"model_name": "vit_tiny", "pred_depth": 2, "pred_emb_dim": 96, "use_bfloat16": False}
    settings["data"] |= {"crop_size": 96, "batch_size": 2, "num_workers": 0}
    settings["mask"] |= {"patch_size": 16, "min_keep": 2}
    settings["optimization"] |= {"epochs": 1, "warmup": 0}
    torch.manual_seed(1)
    samples = [(torch.randn(3, 96, 96), 0) for _ in range(6)]
    with checkout(path, "src.train") as (train,):
        theirs = losses(train, settings, "make_imagenet1k", samples, tmp_path / "theirs", monkeypatch)
        with ijepa.apply() as report:
            assert report.replaced == REPORT | {"apply_masks": 4, "repeat_interleave_batch": 3, "MaskCollator": 2}
            ours = losses(train, settings, "make_imagenet1k", samples, tmp_path / "ours", monkeypatch)
    assert len(set(theirs)) == 3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.1e-5)  # they are logged with five digits
