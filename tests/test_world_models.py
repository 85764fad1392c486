"""World models: EB-JEPA's losses against the public ones, both objectives against plain loops, training."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from golden_data import error, golden, under
from test_train import assert_equal_states, state_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jepa_fast import recipes
from jepa_fast.data.two_rooms import DiscRooms, DotRooms
from jepa_fast.data.two_rooms_data import TwoRoomsData
from jepa_fast.models.conditional_predictor import ConditionalPredictorConfig
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.impala import ImpalaConfig
from jepa_fast.nn import SIGReg, vicreg
from jepa_fast.objectives.eb_jepa import EBJEPAConfig
from jepa_fast.objectives.lejepa import SIGRegConfig
from jepa_fast.objectives.leworldmodel import LeWorldModelConfig
from jepa_fast.objectives.world_model import PlanningConfig
from jepa_fast.train.loop import train

GOLDEN = golden("eb_jepa_losses")
LOSSES = {"hinge_std": vicreg.hinge_std, "covariance": vicreg.covariance, "vc": vicreg.vc,
          "temporal_similarity": vicreg.temporal_similarity, "vicreg": vicreg.vicreg}


def evaluated(loss, inputs, dtype):
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = loss(*inputs)
    return out, torch.autograd.grad(out, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_public_ones(name):
    """BCS and its Epps-Pulley statistic are in test_sigreg."""
    tensors = under(GOLDEN, f"{name}/")
    names = [key for key in ("x", "z1", "z2") if key in tensors]
    inputs = [tensors[key] for key in names]
    exact, _ = evaluated(LOSSES[name], inputs, torch.float64)
    assert error(exact, GOLDEN[f"f64/{name}/out"]) < 1e-12
    out, grads = evaluated(LOSSES[name], inputs, torch.float32)
    assert error(out, tensors["out"]) < 5e-6
    for key, grad in zip(names, grads, strict=True):
        assert error(grad, tensors[f"grad_{key}"]) < 5e-6


def test_projected_vc_is_the_public_one():
    tensors = under(GOLDEN, "vc_projected/")
    weights = under(tensors, "weights/")
    for dtype, out, tolerance in [(torch.float64, GOLDEN["f64/vc_projected/out"], 1e-12),
                                  (torch.float32, tensors["out"], 5e-6)]:
        net = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20))
        net.load_state_dict(weights)
        net.to(dtype)
        ours, (grad,) = evaluated(lambda x, net=net: vicreg.vc(net(x.movedim(1, -1)).movedim(-1, 1)), [tensors["x"]], dtype)
        assert error(ours, out) < tolerance
    assert error(grad, tensors["grad_x"]) < 5e-6


@pytest.mark.parametrize("N, D", [(5, 40), (40, 5), (2, 2)])
def test_covariance_of_few_and_many_rows(N, D):
    """The Gram matrix of few rows gives the same loss and gradient as the covariance itself."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3

    def plain(x):
        c = torch.cov(x.T)
        return (c - c.diag().diag()).square().sum() / (D * (D - 1))

    for ours, expected in zip(evaluated(vicreg.covariance, [x], x.dtype), evaluated(plain, [x], x.dtype), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"x must be \[N, D\] with N and D at least 2, got \[1, 5\]"):
        vicreg.covariance(torch.randn(1, 5))


def vc_on_ranks(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6).double(), torch.randn(10, 4, dtype=torch.float64)
    expected = torch.autograd.grad(vicreg.hinge_std(model(x)) + vicreg.covariance(model(x)), model.weight)[0]
    parallel = DistributedDataParallel(model)
    rows = vicreg.all_rows(parallel(x.split(5)[rank]))
    (vicreg.hinge_std(rows) + vicreg.covariance(rows)).backward()
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-12, atol=1e-14)
    dist.destroy_process_group()


def test_statistics_of_the_global_batch(tmp_path):
    torch.multiprocessing.spawn(vc_on_ranks, (str(tmp_path / "meet"),), nprocs=2)


TINY_DOTS = DotRooms(image_size=17)
TINY_EB = EBJEPAConfig(encoder=ImpalaConfig(image_size=17, widths=(4, 6), num_blocks=1, num_outputs=16), unroll_steps=3,
                       inverse_dynamics_dim=12,
                       planning=PlanningConfig(horizon=6, num_samples=12, num_iterations=2, num_elites=4))
TINY_LEWM = LeWorldModelConfig(
    encoder=VisionTransformerConfig(image_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=3, positions="learned",
                                    class_token=True),
    predictor=ConditionalPredictorConfig(depth=2, num_heads=3, head_dim=5, mlp_dim=20, dropout=0.0), embed_dim=18,
    projector_dim=30, sigreg=SIGRegConfig(num_slices=16),
    planning=PlanningConfig(horizon=2, num_samples=12, num_iterations=2, num_elites=4, num_executed=2, distance="last"))


def tiny(name: str) -> recipes.Recipe:
    """An official recipe with a model, pictures and batches of no size."""
    recipe = recipes.get_recipe(name)
    eb = name.startswith("eb_jepa")
    data = TwoRoomsData(rooms=TINY_DOTS, num_frames=5, num_samples=16) if eb else \
        dataclasses.replace(recipe.data, rooms=DiscRooms(image_size=28), num_samples=16)
    settings = dict(batch_size=8, epochs=2.0, log_every=1, checkpoint_every=0.5, precision="fp32", device="cpu")
    return dataclasses.replace(recipe, objective=TINY_EB if eb else TINY_LEWM, data=data,
                               train=dataclasses.replace(recipe.train, **settings))


def batch_of(recipe: recipes.Recipe) -> dict:
    return next(recipe.data.batches(recipe.data.build(), global_batch_size=8))


def in_float64(batch: dict) -> dict:
    """Formulas, not rounding: constants stay float32, so errors are theirs."""
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def eb_terms(objective, batch, unroll):
    """EB-JEPA's terms frame by frame, step by step."""
    frames, actions, T = batch["observations"], batch["actions"], batch["observations"].shape[1]
    mean, std = torch.tensor([[0.0026, 0.0989], [0.0369, 0.2986]])
    states = [objective.encoder(((frames[:, t] .double() / 255).permute(0, 2, 3, 1) - mean).div(std).permute(0, 3, 1, 2))
              for t in range(T)]
    gru = objective.predictor

    def step(state, action):
        r, z, n = (action @ gru.weight_ih.T + gru.bias_ih).chunk(3, 1)
        hr, hz, hn = (state @ gru.weight_hh.T + gru.bias_hh).chunk(3, 1)
        z = (z + hz).sigmoid()
        return objective.encoder.norm((1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * state)

    total = 0.0
    for first in range(T - 1) if unroll == "parallel" else [0]:
        state = states[first]
        for k in range(min(3, T - 1 - first)):
            state = step(state, actions[:, first + k])
            pairs = T - 1 - k if unroll == "parallel" else 1  # that k + 1 steps are averaged over
            total = total + (state - states[first + k + 1]).square().mean() / 3 / pairs
    rows = torch.cat(states)
    c = torch.cov(rows.T)
    idm = torch.stack([objective.inverse_dynamics(torch.cat([states[t], states[t + 1]], 1)) for t in range(T - 1)], 1)
    return {"prediction": total, "std": (1 - (rows.var(0) + 1e-4).sqrt()).clamp(min=0).mean(),
            "cov": (c - c.diag().diag()).square().sum() / (16 * 15),
            "similarity": torch.stack([(b - a).square().mean() for a, b in zip(states, states[1:], strict=False)]).mean(),
            "inverse_dynamics": (idm - actions).square().mean()}


@pytest.mark.parametrize("unroll", ["autoregressive", "parallel"])
def test_eb_jepa_is_what_a_loop_computes(unroll):
    torch.manual_seed(0)
    objective = dataclasses.replace(TINY_EB, unroll=unroll).build().double()
    batch = in_float64(batch_of(tiny("eb_jepa_two_rooms")))
    losses = objective(batch)
    expected = eb_terms(objective, batch, unroll)
    for name, value in expected.items():
        assert error(losses[name], value.detach()) < 1e-6, name
    total = sum(weight * expected[name] for name, weight in
                {"prediction": 1, "std": 16, "cov": 8, "similarity": 12, "inverse_dynamics": 1}.items())
    parameters = [p for name, p in objective.named_parameters() if not name.startswith("probe")]
    ours = torch.autograd.grad(losses["loss"], parameters)
    for a, b in zip(ours, torch.autograd.grad(total, parameters), strict=True):
        assert error(a, b) < 1e-5


def test_eb_jepa_without_inverse_dynamics():
    objective = dataclasses.replace(TINY_EB, inverse_dynamics_weight=0.0).build()
    assert "inverse_dynamics" not in objective(batch_of(tiny("eb_jepa_two_rooms")))
    assert list(objective.roles()) == ["encoder", "predictor", "probe"]


def attended(block, x, condition):
    """A ConditionalBlock with attention by hand, position by position."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(F.silu(condition)).chunk(6, -1)

    def plain_norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    q, k, v = block.qkv(block.norm1(plain_norm(x) * (1 + scale1) + shift1)).chunk(3, -1)
    rows = []
    for t in range(x.shape[1]):
        heads = []
        for h in range(3):
            part = slice(5 * h, 5 * h + 5)
            scores = (q[:, t, None, part] * k[:, :t + 1, part]).sum(-1) / 5**0.5
            heads.append((scores.softmax(1)[..., None] * v[:, :t + 1, part]).sum(1))
        rows.append(torch.cat(heads, -1))
    x = x + gate1 * block.proj(torch.stack(rows, 1))
    return x + gate2 * block.mlp(plain_norm(x) * (1 + scale2) + shift2)


def open_gates(objective):
    """AdaLN-zero starts closed: nothing to see there before training."""
    for block in objective.predictor.blocks:
        nn.init.normal_(block.modulation.weight, std=0.3)
        nn.init.normal_(block.modulation.bias, std=0.3)


def test_leworldmodel_is_what_a_loop_computes():
    torch.manual_seed(0)
    objective = TINY_LEWM.build().double()
    open_gates(objective)
    batch = in_float64(batch_of(tiny("leworldmodel_two_rooms")))
    losses = objective(batch)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    frames = ((batch["observations"] .double() / 255).permute(0, 1, 3, 4, 2) - mean).div(std).permute(0, 1, 4, 2, 3)
    features = torch.stack([objective.encoder(frames[:, t])[:, 0] for t in range(4)], 1)  # class tokens
    states = objective.projector(features.flatten(0, 1)).view(8, 4, 18)
    x = states[:, :3] + objective.predictor.pos_embed
    for block in objective.predictor.blocks:
        x = attended(block, x, objective.action_encoder(batch["actions"]))
    x = objective.prediction_projector(objective.predictor.norm(x).flatten(0, 1)).view(8, 3, 18)
    assert error(losses["prediction"], (x - states[:, 1:]).square().mean().detach()) < 1e-6
    sigreg = SIGReg.from_preset("lewm", num_slices=16)(states.transpose(0, 1))
    assert error(losses["sigreg"], sigreg.detach()) < 1e-6
    expected = (x - states[:, 1:]).square().mean()
    weight = objective.encoder.norm.weight
    # the target is not detached: its gradient is there
    whole = torch.autograd.grad(expected + 0.09 * sigreg, weight)[0]
    assert error(torch.autograd.grad(losses["loss"], weight)[0], whole) < 1e-5


def test_leworldmodel_predicts_from_a_window():
    """Three steps of `predict` are those of one pass; later ones see the last three states and actions only."""
    torch.manual_seed(0)
    objective = TINY_LEWM.build()
    open_gates(objective)
    objective.eval()
    state, actions = torch.randn(4, 18), torch.randn(4, 5, 10)
    states = [state, *objective.predict(state, actions)]
    for step in range(5):
        window = slice(max(0, step - 2), step + 1)
        expected = objective.next_states(torch.stack(states, 1)[:, window], actions[:, window])[:, -1]
        torch.testing.assert_close(states[step + 1], expected)
    with pytest.raises(ValueError, match="x must have at most history = 3 steps, got 4"):
        objective.next_states(torch.randn(1, 4, 18), torch.randn(1, 4, 10))


NAMES = ["eb_jepa_two_rooms", "leworldmodel_two_rooms"]


@pytest.mark.parametrize("name", NAMES)
def test_training_resumes_bit_equal(name, tmp_path):
    recipe = tiny(name)
    train(recipe, tmp_path / "whole")
    stopped = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=3))
    train(stopped, tmp_path / "parts")
    train(recipe, tmp_path / "parts", resume=True)
    assert_equal_states(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_moves_in_bfloat16(name, tmp_path):
    recipe = tiny(name)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision="bf16"))
    torch.manual_seed(recipe.train.seed)
    before = {key: value.clone() for key, value in recipe.objective.build().named_parameters()}
    train(recipe, tmp_path)
    after = state_of(tmp_path)["objective"]
    assert not [key for key, value in before.items() if torch.equal(value, after[key])]


def test_wrong_batches_are_named():
    batch = batch_of(tiny("eb_jepa_two_rooms"))
    with pytest.raises(ValueError, match="observations must have at least 4 frames, got 3"):
        TINY_EB.build()(batch | {"observations": batch["observations"][:, :3]})
    with pytest.raises(ValueError, match=r"actions must be \[8, 4, 2\], got \[8, 3, 2\]"):
        TINY_EB.build()(batch | {"actions": batch["actions"][:, :3]})
    with pytest.raises(ValueError, match=r"mean and std must have encoder.in_chans = 2 numbers each, got \(0.5,\)"):
        dataclasses.replace(TINY_EB, mean=(0.5,))
    with pytest.raises(ValueError, match="num_executed must be from 1 to horizon = 5, got 6"):
        PlanningConfig(horizon=5, num_executed=6)
