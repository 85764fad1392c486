"""LeWorldModel patched: the same rollouts, costs, gradients and SIGReg losses; what is not the same code is refused."""

import copy
import inspect
import io
import sys
import types

import plain_lewm
import pytest
import torch
from torch import nn

from jepa_fast import patches
from jepa_fast.patches import PatchError, lewm

DIM, B, S = 12, 2, 3


def world(cls, hidden_dim=DIM, dtype=torch.float32):
    torch.manual_seed(0)
    predictor = plain_lewm.ARPredictor(num_frames=3, depth=2, heads=2, mlp_dim=20, input_dim=DIM, hidden_dim=hidden_dim,
                                       dim_head=4, dropout=0.1)
    projector = nn.Sequential(nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, DIM))
    model = cls(plain_lewm.Pixels(DIM), predictor, plain_lewm.Embedder(2, 2, DIM), pred_proj=projector)
    return model.to(dtype).eval()


def inputs(cls, num_frames, horizon=5, dtype=torch.float32):
    """What a planner passes: all samples of an episode see its frames."""
    torch.manual_seed(1)
    info = {"pixels": torch.randn(B, 1, num_frames, 3, 4, 4, dtype=dtype).expand(-1, S, -1, -1, -1, -1),
            "step": 3}
    if cls is plain_lewm.LeWM and num_frames > 1:
        info["action_history"] = torch.randn(B, 1, num_frames - 1, 2, dtype=dtype).expand(-1, S, -1, -1)
    return info, torch.randn(B, S, horizon, 2, dtype=dtype, requires_grad=True)


def error(x, exact):
    x, exact = x.detach().double(), exact.detach()
    return float((x - exact).norm() / exact.norm())


def results(model, cls, num_frames, history, dtype):
    """Predictions, and gradients of the actions and of the predictor."""
    info, actions = inputs(cls, num_frames, dtype=dtype)
    out = model.rollout(info, actions, history)
    assert set(out) == {"pixels", "step", "action", "emb", "predicted_emb"} | ({"action_history"} & set(info))
    grads = torch.autograd.grad(out["predicted_emb"].square().sum(), [actions, *model.predictor.parameters()])
    return [out["action"], out["emb"], out["predicted_emb"], *grads]


@pytest.mark.parametrize("num_frames, history", [(1, 3), (2, 3), (3, 2), (2, 1)])
@pytest.mark.parametrize("cls", [plain_lewm.JEPA, plain_lewm.LeWM])
def test_rollouts(cls, num_frames, history):
    exact = results(world(cls, 8).double(), cls, num_frames, history, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        model = world(cls, 8, dtype)
        theirs = results(model, cls, num_frames, history, dtype)
        report = lewm.apply(model)
        ours = results(model, cls, num_frames, history, dtype)
        report.undo()
        for a, b, c in zip(ours, theirs, exact, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert error(a, c) <= 2 * error(b, c) + 1e-6
    assert "rollout" not in vars(model)


def test_actions_are_embedded_once_and_windows_not_again():
    model = world(plain_lewm.JEPA)
    rows = []
    info, actions = inputs(plain_lewm.JEPA, 1)
    fc2 = model.predictor.transformer.layers[0].mlp.net[4]
    original, fc2_forward = fc2.forward, lambda x: (rows.append(x.shape[1]), original(x))[1]
    with lewm.apply(model):
        fc2_forward.is_of_jepa_fast = True  # a forward of somebody else's would run the original
        fc2.forward = fc2_forward
        model.rollout(info, actions)
    assert rows == [1, 1, 1, 3, 3]  # grows to 3, slides twice


def test_training_mode_hooks_and_overrides_run_the_original():
    model = world(plain_lewm.JEPA)
    report = lewm.apply(model)
    model.train()
    with torch.no_grad():
        torch.manual_seed(2)
        ours = model.rollout(*inputs(plain_lewm.JEPA, 1))["predicted_emb"]
        fresh = world(plain_lewm.JEPA).train()
        torch.manual_seed(2)
        assert torch.equal(ours, fresh.rollout(*inputs(plain_lewm.JEPA, 1))["predicted_emb"])
        model.eval()
        called = []
        hook = model.predictor.register_forward_hook(lambda *_: called.append(1))
        model.rollout(*inputs(plain_lewm.JEPA, 1))
        assert len(called) == 5
        hook.remove()
        model.predict = lambda emb, act_emb: torch.zeros_like(emb)
        assert not model.rollout(*inputs(plain_lewm.JEPA, 1))["predicted_emb"][:, :, 1:].any()
        del model.predict
    with pytest.raises(RuntimeError):  # more history than positions: as without the patch
        model.rollout(*inputs(plain_lewm.JEPA, 1), history_size=4)
    report.undo()


def test_classes_before_construction_costs_copies_and_undo():
    originals = [plain_lewm.JEPA.rollout, plain_lewm.LeWM.rollout, plain_lewm.SIGReg.forward]
    info, actions = inputs(plain_lewm.JEPA, 2)
    info["goal"] = torch.randn_like(info["pixels"])
    theirs = world(plain_lewm.JEPA).get_cost(dict(info), actions)
    keys = list(world(plain_lewm.JEPA).state_dict())
    report = lewm.apply()
    model = copy.deepcopy(world(plain_lewm.JEPA))
    ours = model.get_cost(dict(info), actions)
    assert list(model.state_dict()) == keys and error(ours, theirs.double()) < 1e-5
    assert plain_lewm.JEPA.rollout is not originals[0]
    report.undo()
    assert [plain_lewm.JEPA.rollout, plain_lewm.LeWM.rollout, plain_lewm.SIGReg.forward] == originals


def test_sigreg_of_seeded_training():
    losses = {}
    for name in ("original", "patched"):
        torch.manual_seed(3)
        model = nn.ModuleDict({"net": nn.Linear(6, 6), "sigreg": plain_lewm.SIGReg(num_proj=64)})
        report = lewm.apply(model) if name == "patched" else None
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(3, 40, 6)
        for _ in range(3):
            loss = model["sigreg"](model["net"](x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(name, []).append(float(loss.detach()))
    assert report.replaced == {"SIGReg.forward": 1} and "each process's own samples" in str(report)
    assert losses["patched"] == pytest.approx(losses["original"], rel=1e-5)
    assert losses["patched"][0] > losses["patched"][2]


def fork(monkeypatch, old, new):
    """The same code with a line of its own."""
    module = types.ModuleType("lewm_fork")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = inspect.getsource(plain_lewm)
    assert source.count(old) == 1
    exec(source.replace(old, new), vars(module))
    return module


@pytest.mark.parametrize("old, new", [("if causal:", "if not causal:"), ("gate2 * self", "self"), ("shift1 + self", "self"),
                                      ("[:, -history:], embedded", "[:, :history], embedded")])
def test_a_fork_that_rolls_otherwise_is_refused(monkeypatch, old, new):
    module = fork(monkeypatch, old, new)
    model = module.JEPA(module.Pixels(4), module.ARPredictor(**lewm._TINY), module.Embedder(2, 2, 4))
    with pytest.raises(PatchError, match="JEPA.rollout of lewm_fork with ARPredictor computes another predicted_emb"):
        lewm.apply(model)
    assert "rollout" not in vars(model)


def test_a_fork_with_another_sigreg_is_refused(monkeypatch):
    module = fork(monkeypatch, "return proj.size(-2) * (", "return (")
    with pytest.raises(PatchError, match="SIGReg of lewm_fork computes .* nothing was replaced"):
        lewm.apply(nn.Sequential(module.SIGReg()))


def test_another_signature_is_refused(monkeypatch):
    model = world(plain_lewm.JEPA)
    monkeypatch.setattr(plain_lewm.JEPA, "predict", lambda self, emb, act_emb, goal: 0)
    with pytest.raises(PatchError, match="JEPA.predict must take"):
        lewm.apply(model)


def test_models_without_parts_of_it():
    assert not lewm.matches(nn.Linear(2, 2))
    with pytest.raises(PatchError, match="no part of a Linear defines"):
        lewm.apply(nn.Linear(2, 2))
    report = patches.auto(world(plain_lewm.LeWM))
    assert report.patch == "auto (lewm)" and report.replaced == {"LeWM.rollout": 1}


def test_an_encoder_of_hugging_face_is_patched_along_and_copies_work():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96,
                                    patch_size=16, image_size=64)
    model = world(plain_lewm.JEPA)
    model.encoder, model.projector = transformers.ViTModel(config, add_pooling_layer=False).eval(), nn.Linear(48, DIM)
    torch.manual_seed(4)
    info = {"pixels": torch.randn(B, 1, 1, 3, 64, 64).expand(-1, S, -1, -1, -1, -1)}
    actions = torch.randn(B, S, 4, 2)
    with torch.no_grad():
        theirs = model.rollout(dict(info), actions)["predicted_emb"]
        report = lewm.apply(model)
        assert report.replaced["JEPA.rollout"] == report.replaced["ViTLayer.forward"] == 1
        saved = io.BytesIO()
        torch.save(model, saved)
        loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
        copied = copy.deepcopy(model)
        assert copied.rollout.__self__ is copied
        for other in (model, copied, loaded):
            torch.testing.assert_close(other.rollout(dict(info), actions)["predicted_emb"], theirs)
    report.undo()
    assert "rollout" not in vars(model)
