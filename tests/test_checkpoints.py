"""Official I-JEPA checkpoints, written and read."""

import pytest
import torch
from test_ijepa import batch_of, build

from jepa_fast.checkpoints import load_ijepa, save_ijepa
from jepa_fast.optim import AdamWEMA, param_groups


def trained(seed: int):
    objective = build("ijepa_model", torch.float32)
    torch.manual_seed(seed)
    for parameter in objective.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.04), averages=objective.averages())
    optimizer.momentum = 0.9
    objective(batch_of(objective, "ijepa_model", 1, torch.float32))["loss"].backward()
    optimizer.step()
    return objective, optimizer


def test_round_trip_in_the_official_layout(tmp_path):
    objective, optimizer = trained(0)
    path = tmp_path / "jepa-latest.pth.tar"
    save_ijepa(path, objective, optimizer, epoch=7, loss=0.5, batch_size=3, world_size=1, lr=1e-3)
    raw = torch.load(path, weights_only=True)
    assert set(raw) == {"encoder", "predictor", "target_encoder", "opt", "scaler", "epoch", "loss", "batch_size",
                        "world_size", "lr"}
    assert "module.blocks.0.attn.qkv.weight" in raw["encoder"] and "module.mask_token" in raw["predictor"]
    assert [len(group["params"]) for group in raw["opt"]["param_groups"]] == [10, 12, 19, 20]
    other, other_optimizer = trained(1)
    rest = load_ijepa(path, other, other_optimizer)
    assert rest["epoch"] == 7 and rest["lr"] == 1e-3
    for (name, a), b in zip(objective.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(optimizer.state_dict()["state"].values(), other_optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and float(a["step"]) == float(b["step"])


def test_differences_are_named(tmp_path):
    objective, _ = trained(0)
    path = tmp_path / "file.pth.tar"
    save_ijepa(path, objective)
    state = torch.load(path, weights_only=True)
    state["encoder"]["module.norm.weight"] = torch.zeros(7)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"encoder norm\.weight is \[7\] in the file and \[48\] in the model"):
        load_ijepa(path, objective)
    del state["encoder"]["module.norm.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"encoder norm\.weight is absent in the file"):
        load_ijepa(path, objective)
    del state["predictor"], state["encoder"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="has no encoder"):
        load_ijepa(path, objective)
