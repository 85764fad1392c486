"""LeWorldModel's patch against its sources: --upstream stable-worldmodel=PATH, --upstream le-wm=PATH."""

import pytest
import torch
from checkouts import checkout
from plain_lewm import Pixels
from torch import nn

from jepa_fast.patches import lewm


@pytest.fixture(params=["stable-worldmodel", "le-wm"])
def code(request, upstream):
    """The world model's class, its predictor's, the module of its parts, SIGReg; loaded, as in a user's process."""
    path = upstream(request.param)
    if request.param == "stable-worldmodel":
        with checkout(path / "stable_worldmodel/wm", "lewm.lewm", "lewm.module", "loss") as (world, parts, loss):
            yield world.LeWM, parts.Predictor, parts, loss.SIGReg
        return
    names = ("source.model.lewm.jepa", "source.model.lewm.modules")  # or as its first versions have it
    names = names if (path / "source/model/lewm").exists() else ("jepa", "module")
    with checkout(path, *names) as (world, parts):
        yield world.JEPA, parts.ARPredictor, parts, parts.SIGReg


def build(code, dtype=torch.float32):
    world, predictor, parts, _ = code
    torch.manual_seed(0)
    predictor = predictor(num_frames=3, depth=3, heads=4, mlp_dim=32, input_dim=24, hidden_dim=16, dim_head=8, dropout=0.1)
    model = world(Pixels(24), predictor, parts.Embedder(5, 5, 24), parts.MLP(24, 32, 24, nn.BatchNorm1d),
                  parts.MLP(24, 32, 24, nn.BatchNorm1d))
    for parameter in model.predictor.parameters():  # as trained: at first, all gates are closed
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_rollouts(code, num_frames):
    torch.manual_seed(1)
    info = {"pixels": torch.randn(2, 1, num_frames, 3, 8, 8).expand(-1, 4, -1, -1, -1, -1)}
    if code[0].__name__ == "LeWM" and num_frames > 1:
        info["action_history"] = torch.randn(2, 4, num_frames - 1, 5)
    actions = torch.randn(2, 4, 6, 5, requires_grad=True)
    model = build(code)

    def run():
        out = model.rollout(dict(info), actions)
        grads = torch.autograd.grad(out["predicted_emb"].square().sum(), [actions, *model.predictor.parameters()])
        return [out["emb"], out["action"], out["predicted_emb"], *grads]

    theirs = run()
    with lewm.apply(model) as report:
        assert report.replaced == {f"{code[0].__name__}.rollout": 1}
        ours = run()
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and float((a - b).detach().norm()) <= 1e-5 * float(b.detach().norm())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        theirs = model.rollout(dict(info), actions)["predicted_emb"]
        with lewm.apply():
            ours = model.rollout(dict(info), actions)["predicted_emb"]
    assert ours.dtype == theirs.dtype and float((ours - theirs).norm()) <= 2e-2 * float(theirs.norm())


def test_seeded_training_with_sigreg(code):
    """Losses of three steps on encoder, predictor and SIGReg, with dropout."""
    if "cuda" in code[3].forward.__code__.co_consts:
        pytest.skip("this le-wm's SIGReg draws on a GPU only")

    def losses():
        model = build(code).train()
        sigreg = code[3](num_proj=2048)  # few projections are left to the original
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        torch.manual_seed(2)
        for _ in range(3):
            info = model.encode({"pixels": torch.randn(16, 4, 3, 8, 8), "action": torch.randn(16, 4, 5)})
            predicted = model.predict(info["emb"][:, :3], info["act_emb"][:, :3])
            loss = (predicted - info["emb"][:, 1:]).square().mean() + 0.09 * sigreg(info["emb"].transpose(0, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield float(loss.detach())

    theirs = list(losses())
    forward = code[3].forward
    with lewm.apply() as report:
        assert "SIGReg.forward" in report.replaced
        ours = list(losses())
    assert ours == pytest.approx(theirs, rel=1e-5) and code[3].forward is forward
