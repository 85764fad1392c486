"""V-JEPA 2-AC against what the official code computed, and the rollout with kept keys against recomputation."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_moments, config, error, golden, manifest, under
from test_planning import check_plan
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_fast.models.ac_predictor import ACPredictor, ACPredictorConfig
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.nn.block import Block, Sequences
from jepa_fast.objectives.action_conditioned import ActionConditioned, ActionConditionedConfig, normalise
from jepa_fast.optim import AdamWEMA, Horizon, WarmupConstantLinear, param_groups
from jepa_fast.planning import CEMAC, ACWorldModel

PRECISIONS = [pytest.param(torch.float32, "", id="float32"), pytest.param(torch.float64, "f64/", id="float64")]
MODELS = ["ac_model", "ac_rollout3"]


def build(name: str, dtype: torch.dtype = torch.float32) -> ActionConditioned:
    """The model of a golden file, with its weights; loading is strict: our names are the official ones."""
    args, encoder, data = config(name)["args"], config(name)["encoder"], golden(name)
    objective = ActionConditionedConfig(
        encoder=VideoTransformerConfig(image_size=args["data"]["crop_size"], num_frames=2,
                                       patch_size=args["data"]["patch_size"], positions="rotary", rescale_init=True,
                                       **encoder),
        predictor=ACPredictorConfig(embed_dim=args["model"]["pred_embed_dim"], depth=args["model"]["pred_depth"],
                                    num_heads=args["model"]["pred_num_heads"]),
        encoder_weights="random", auto_steps=args["loss"]["auto_steps"]).build()
    objective.encoder.load_state_dict(under(data, "weights/target_encoder/"))
    objective.predictor.load_state_dict(under(data, "weights/predictor/"))
    return objective.to(dtype)


def batch_of(name: str, step: int, dtype: torch.dtype) -> dict:
    inputs = under(golden(name), f"input/step{step}/")
    return {"clips": inputs["pixels"].to(dtype), "actions": inputs["actions"].to(dtype),
            "states": inputs["states"].to(dtype)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, prefix", PRECISIONS)
def test_forward(name, dtype, prefix):
    objective, data, batch = build(name, dtype), golden(name), batch_of(name, 1, dtype)
    limit = 1e-10 if prefix else 5e-6
    tokens = objective.encode(batch["clips"])
    features = normalise(tokens)
    assert error(features.flatten(1, 2), data["out/target_features"]) < 5e-6
    # the official calls recompute all frames; ours keep frame 0 of the first and add one frame per call
    actions, states, predictor = batch["actions"], batch["states"], objective.predictor
    raw, kept = predictor.forward_and_keep(features[:, :-1], actions, states[:, :-1], num_frames=1)
    raws, predictions = [raw], [normalise(raw)]
    parts = [raw[:, :1]]
    for k in range(1, objective.config.auto_steps):
        new, kept = predictor.extend(normalise(parts[-1]), actions[:, k:k + 1], states[:, k:k + 1], kept=kept)
        parts.append(new)
        raws.append(torch.cat(parts, 1))
        predictions.append(normalise(raws[-1]))
    for k, (ours, prediction) in enumerate(zip(raws, predictions, strict=True)):
        assert error(ours.flatten(1, 2), data[f"{prefix}out/predictor_raw{k}"]) < limit
        assert error(prediction.flatten(1, 2), data[f"{prefix}out/prediction{k}"]) < limit
    forced, rollout = objective.predict(tokens, actions, states)
    assert torch.equal(forced, predictions[0]) and torch.equal(rollout, predictions[-1])
    losses = objective(batch)
    for term in ("loss", "loss_teacher_forcing", "loss_rollout"):
        assert abs(float(losses[term].detach()) / float(data[f"{prefix}train/{term}"][0]) - 1) < (1e-10 if prefix else 2e-6)


@pytest.mark.parametrize("dtype, prefix", PRECISIONS)
def test_gradients_of_step_one(dtype, prefix):
    objective, data = build("ac_model", dtype), golden("ac_model")
    objective(batch_of("ac_model", 1, dtype))["loss"].backward()
    assert all(p.grad is None for p in objective.encoder.parameters())
    checked = 0
    for key, parameter in objective.predictor.named_parameters():
        key = f"grad/predictor/{key}"
        assert (parameter.grad is None) == (key not in data), key
        if parameter.grad is None:
            continue
        checked += 1
        if prefix:
            assert_moments(parameter.grad, data[f"f64/{key}"], 1e-10, key)
        else:
            assert error(parameter.grad, data[key]) < (2e-3 if key.endswith("qkv.bias") else 3e-5), key
    assert checked == sum(key.startswith("grad/") for key in data) == 34


@pytest.mark.parametrize("dtype, row", [(torch.float32, 0), (torch.float64, 1)])
def test_three_training_steps_with_their_schedules(dtype, row):
    objective, data = build("ac_model", dtype), golden("ac_model")
    schedule, constants = schedules_of("ac_model")
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.04), averages=objective.averages())
    losses = []
    for step in range(3):
        lr = schedule(step, constants)
        assert abs(lr / float(data["train/lr"][step, 1]) - 1) < 1e-12
        for group, column in zip(optimizer.param_groups, (1, 3), strict=True):
            group["lr"], group["weight_decay"] = lr, float(data["train/weight_decay"][step, column])
        loss = objective(batch_of("ac_model", step + 1, dtype))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    expected = data["f64/train/loss" if row else "train/loss"]
    assert error(torch.tensor(losses, dtype=torch.float64), expected) < (1e-10 if row else 5e-6)
    for role, module in (("predictor", objective.predictor), ("target_encoder", objective.encoder)):
        for key, parameter in module.named_parameters():
            limit = 1e-10 if row else 2e-3 if key.endswith("qkv.bias") else 1e-4
            assert_moments(parameter, data[f"final/{role}/{key}"][row], limit, f"{role} {key}")


def schedules_of(name: str) -> tuple[WarmupConstantLinear, Horizon]:
    args = config(name)["args"]["optimization"]
    return (WarmupConstantLinear(start=args["start_lr"], peak=args["lr"], final=args["final_lr"],
                                 warmup_epochs=args["warmup"], anneal_epochs=args["anneal"]),
            Horizon(args["ipe"], args["epochs"]))


def test_initialisation_is_the_official_one():
    data = golden("ac_model")
    torch.manual_seed(0)
    for key, value in build_fresh().named_parameters():
        mean, std, low, high = data[f"init/predictor/{key}"].tolist()
        assert abs(float(value.detach().mean()) - mean) < 6 * max(std, 1e-12) / value.numel() ** 0.5, key
        assert float(value.detach().std(correction=0)) == pytest.approx(std, rel=6 / value.numel() ** 0.5, abs=1e-12), key


def build_fresh() -> ACPredictor:
    return ACPredictor(ACPredictorConfig(embed_dim=48, depth=2, num_heads=2), 40, (4, 4))


# --- keys and values kept

@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_block_extends_as_it_recomputes(num_kept, num_new):
    """Value and gradient, in float64, of a block on whole sequences and of the same block extended by frames."""
    B, F_, D, T = 2, 5, 24, num_kept + num_new
    generator = torch.Generator().manual_seed(num_kept * 10 + num_new)
    block = Block(D, 2).double()
    x = torch.randn(B, T * F_, D, dtype=torch.float64, generator=generator, requires_grad=True)
    rotary = torch.randn(T * F_, 2, 8, dtype=torch.float64, generator=generator)
    upstream = torch.randn(B, T * F_, D, dtype=torch.float64, generator=generator)

    def sequences(rows):
        length = len(range(T * F_)[rows])
        return Sequences.uniform(B, length, x.device, rotary[rows].repeat(B, 1, 1), F_)

    everything, old, new = slice(None), slice(0, num_kept * F_), slice(num_kept * F_, None)
    whole = block(x.flatten(0, 1), sequences(everything)).view(B, -1, D)
    tensors = [x, *block.parameters()]
    expected = torch.autograd.grad((whole * upstream).sum(), tensors)

    kept, parts = None, []
    if num_kept:
        first, kept = block.forward_and_keep(x[:, old].flatten(0, 1), sequences(old), num_kept * F_)
        parts.append(first.view(B, -1, D))
    last, kept = block.extend(x[:, new].flatten(0, 1), kept, sequences(new), sequences(everything))
    ours = torch.cat([*parts, last.view(B, -1, D)], 1)
    assert error(ours, whole) < 1e-13 and kept.shape == (B, T * F_, 2, 2, D // 2)
    for mine, theirs in zip(torch.autograd.grad((ours * upstream).sum(), tensors), expected, strict=True):
        assert error(mine, theirs) < 1e-12


@pytest.mark.parametrize("auto_steps", [1, 2, 3])
def test_rollout_equals_recomputation(auto_steps):
    """Losses and all gradients against a rollout that computes every frame again in every call, in float64."""
    torch.manual_seed(auto_steps)
    objective = ActionConditionedConfig(
        encoder=VideoTransformerConfig(image_size=16, patch_size=8, num_frames=2, embed_dim=24, depth=1, num_heads=2,
                                       positions="rotary"),
        predictor=ACPredictorConfig(embed_dim=36, depth=3, num_heads=2, use_extrinsics=True),
        encoder_weights="random", auto_steps=auto_steps).build().double()
    for parameter in objective.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    B, T = 2, 4
    batch = {"clips": torch.randn(B, 3, T, 16, 16).double(), "actions": torch.randn(B, T - 1, 7).double(),
             "states": torch.randn(B, T, 7).double(), "extrinsics": torch.randn(B, T, 6).double()}
    parameters = list(objective.predictor.parameters())
    loss = objective(batch)["loss"]
    ours = torch.autograd.grad(loss, parameters)

    # the doubled clip, without the folded kernel
    frames = batch["clips"].transpose(1, 2).flatten(0, 1).unsqueeze(2).repeat(1, 1, 2, 1, 1)
    h = F.layer_norm(objective.encoder(frames), (24,)).view(B, T, 4, 24)

    def predict(z):
        t = z.shape[1]
        raw = objective.predictor(z, batch["actions"][:, :t], batch["states"][:, :t], batch["extrinsics"][:, :t])
        return F.layer_norm(raw, (24,))

    forced = predict(h[:, :-1])
    z = torch.cat([h[:, :1], forced[:, :1]], 1)
    for _ in range(1, auto_steps):
        z = torch.cat([z, predict(z)[:, -1:]], 1)
    expected = (forced - h[:, 1:]).abs().mean() + (z[:, 1:] - h[:, 1:auto_steps + 1]).abs().mean()
    assert abs(float(loss) / float(expected) - 1) < 1e-12
    for mine, theirs in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        assert error(mine, theirs) < 1e-10


def test_columns_are_scaled_to_the_rows_and_conditions_turn_in_time_only():
    predictor = ACPredictor(ACPredictorConfig(embed_dim=48, depth=1, num_heads=2), 40, (2, 4))
    table = predictor._rotary(3, 1).view(3, 10, 2, 24)
    frequencies = torch.cat([1e4 ** -(torch.arange(4) / 4)] * 2)
    for frame in range(3):
        for token, (row, column) in enumerate([(0, 0), (0, 0), *((r, c / 2) for r in range(2) for c in range(4))]):
            angles = torch.cat([(frame + 1) * frequencies, row * frequencies, column * frequencies])
            assert torch.allclose(table[frame, token, 0], angles.cos(), atol=1e-6)


def test_bfloat16_autocast_stays_near():
    objective, batch = build("ac_model"), batch_of("ac_model", 1, torch.float32)
    exact = float(objective(batch)["loss"].detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch)["loss"]
    assert loss.dtype == torch.float32 and abs(float(loss.detach()) / exact - 1) < 0.02
    loss.backward()


# --- planning with the predictor

def test_official_plan_with_the_predictor():
    name, tensors = "predictor", golden("ac_planning")
    predictor = ACPredictor(ACPredictorConfig(embed_dim=40, depth=1, num_heads=2), 24, (3, 3))
    predictor.load_state_dict(under(tensors, "predictor/weights/"))
    notes = manifest()["files"]["ac_planning.safetensors"]["notes"][name]
    for chunk_size in (0, 5):
        world = ACWorldModel(predictor, chunk_size=chunk_size)
        check_plan(name, notes, world.cost(*(tensors[f"{name}/{key}"] for key in ("frame", "pose", "goal"))))


def test_episodes_planned_together_equal_one_by_one():
    torch.manual_seed(0)
    world = ACWorldModel(build_fresh(), chunk_size=7)
    frames, goals = (normalise(torch.randn(3, 1, 16, 40)) for _ in range(2))
    poses = 0.3 * torch.randn(3, 1, 7)
    planner = CEMAC(num_samples=12, num_iterations=2, num_elites=4)
    together = planner.plan(world.cost(frames, poses, goals), 3, seed=1)
    for e in range(3):
        one = slice(e, e + 1)
        alone = planner.plan(world.cost(frames[one], poses[one], goals[one]), 1, seed=1, first_episode=e)
        # matrix products of another size round otherwise
        assert error(alone.actions[0], together.actions[e]) < 1e-5 and error(alone.cost, together.cost[one]) < 1e-5


def test_nothing_is_read_back_from_the_device():
    predictor = build_fresh()
    with FakeTensorMode(allow_non_fake_inputs=True):
        frame, pose = torch.empty(2, 1, 16, 40), torch.empty(2, 1, 7)
        cost = ACWorldModel(predictor, chunk_size=20).cost(frame, pose, frame)
        plan = CEMAC(num_samples=12, num_iterations=1).plan(cost, 2, seed=0)
    assert plan.actions.shape == (2, 2, 7)
