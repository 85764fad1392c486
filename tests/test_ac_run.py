"""V-JEPA 2-AC in a run: constants, resume, evaluation, weights, cached features, bad input; and that it learns to plan."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_ac import build_fresh

from jepa_fast import recipes
from jepa_fast.cli import count_parameters, main
from jepa_fast.data import SyntheticTrajectoryData
from jepa_fast.data.poses import move_pose
from jepa_fast.data.trajectories import CentreCrop
from jepa_fast.eval.rollouts import HELD_OUT_SEED, evaluate_rollouts
from jepa_fast.models.ac_predictor import ACPredictorConfig
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.objectives.action_conditioned import ActionConditionedConfig, normalise
from jepa_fast.optim import Constant
from jepa_fast.planning import CEMAC, ACWorldModel
from jepa_fast.train.loop import train
from jepa_fast.train.run import read_metrics


def small(**changes) -> ActionConditionedConfig:
    encoder = VideoTransformerConfig(image_size=16, num_frames=2, patch_size=8, embed_dim=24, depth=1, num_heads=2,
                                     positions="rotary")
    return ActionConditionedConfig(**dict(encoder=encoder, encoder_weights="random",
                                          predictor=ACPredictorConfig(embed_dim=24, depth=2, num_heads=2)) | changes)


def test_official_constants():
    recipe = recipes.get_recipe("vjepa2_ac_vitg")
    encoder, predictor, lr = recipe.objective.encoder, recipe.objective.predictor, recipe.optim.lr
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads, int(1408 * encoder.mlp_ratio)) == (1408, 40, 22, 6144)
    assert encoder.grid == (1, 16, 16) and encoder.positions == "rotary"
    assert (predictor.embed_dim, predictor.depth, predictor.num_heads) == (1024, 24, 16)
    assert (lr.start, lr.peak, lr.final, lr.warmup_epochs, lr.anneal_epochs) == (7.5e-5, 4.25e-4, 0.0, 15, 15)
    assert recipe.optim.weight_decay == Constant(value=0.04) and recipe.objective.auto_steps == 2
    run = recipe.train
    assert (run.batch_size, run.epochs, run.seed, run.precision) == (256, 315, 239, "bf16")
    assert run.steps_per_epoch == 300 and (recipe.data.num_frames, recipe.data.fps) == (8, 4.0)
    assert count_parameters(recipe) / 1e6 == pytest.approx(305.2, rel=1e-3)


def test_a_resumed_run_is_bit_equal(tmp_path):
    recipe = recipes.get_recipe("vjepa2_ac_vitg")
    recipe = dataclasses.replace(
        recipe, objective=small(),
        data=SyntheticTrajectoryData(num_files=8, num_frames=4, num_workers=0, crop=CentreCrop(image_size=16)),
        train=dataclasses.replace(recipe.train, batch_size=4, accumulate=2, precision="fp32", device="cpu", max_steps=4,
                                  log_every=1))
    train(recipe, tmp_path / "whole")
    half = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=2))
    train(half, tmp_path / "halves")
    train(recipe, tmp_path / "halves", resume=True)
    whole, halves = (torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True)["objective"]
                     for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    rows = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.csv")] for name in ("whole", "halves")]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    check_evaluation(tmp_path / "whole", recipe, whole)


def check_evaluation(folder, recipe, weights):
    """The table of `jepa-fast eval` against frames computed again for every step, with poses moved along."""
    model = recipe.objective.build()
    model.load_state_dict(weights)
    (table,), pictures = evaluate_rollouts(folder, recipe, recipe.objective.build(), model, 4)
    assert table.header[1:] == ["1 step", "2 steps", "3 steps"]
    assert [name for name, _ in pictures] == ["rollouts.png", "curves.png"] and (folder / "rollouts.png").stat().st_size > 0
    batches = recipe.data.batches(recipe.data.build(), global_batch_size=8, seed=recipe.train.seed + HELD_OUT_SEED,
                                  num_steps=8)
    stay, errors = torch.zeros(3), torch.zeros(3)
    for batch in batches:
        with torch.no_grad():
            frames, actions = normalise(model.encode(batch["clips"])), batch["actions"]
            seen, poses = frames[:, :1], batch["states"][:, :1]
            for k in range(3):
                last = normalise(model.predictor(seen, actions[:, :k + 1], poses))[:, -1:]
                errors[k] += (last - frames[:, k + 1:k + 2]).abs().mean() / 8
                stay[k] += (frames[:, :1] - frames[:, k + 1:k + 2]).abs().mean() / 8
                seen = torch.cat([seen, last], 1)
                poses = torch.cat([poses, move_pose(poses[:, -1:], actions[:, k:k + 1])], 1)
    for row, expected in ((table.rows[0], stay), (table.rows[-1], errors)):
        assert [float(value) for value in row[1:]] == pytest.approx(expected.tolist(), abs=2e-4), row[0]


def test_training_from_a_cache_by_command(tmp_path, capsys):
    """`jepa-fast cache`, then training from its features: the losses of training from pixels."""
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(3):
        np.savez(tmp_path / f"data/{i}.npz", frames=generator.integers(0, 256, (12, 9, 16, 3), dtype=np.uint8),
                 states=generator.normal(size=(12, 7)), fps=4.0)
    small_run = ("--data.root data --data.num-workers 0 --data.num-frames 3 --data.crop.image-size 16 --train.device cpu "
                 "--objective.encoder-weights random --objective.encoder.image-size 16 --objective.encoder.patch-size 8 "
                 "--objective.encoder.embed-dim 24 --objective.encoder.num-heads 2 --objective.encoder.depth 1 "
                 "--objective.predictor.embed-dim 24 --objective.predictor.num-heads 2 --objective.predictor.depth 1 "
                 "--train.batch-size 2 --train.max-steps 2 --train.log-every 1").replace("data ", f"{tmp_path}/data ", 1)
    name, cache = "vjepa2_ac_vitg", str(tmp_path / "cache")
    assert main(["cache", name, "--to", cache, *small_run.split()]) == 0
    assert main(["train", name, "--run-dir", str(tmp_path / "a"), *small_run.split()]) == 0
    assert main(["train", name, "--run-dir", str(tmp_path / "b"), "--data.features", cache, *small_run.split()]) == 0
    assert main(["eval", str(tmp_path / "b")]) == 0 and "trained predictor" in capsys.readouterr().out
    losses = [[float(row["loss"]) for row in read_metrics(tmp_path / run / "metrics.csv")] for run in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2
    capsys.readouterr()
    for arguments, message in [(["cache", name, "--to", cache, *small_run.split()], "holds a feature cache already"),
                               (["cache", "ijepa_vits16", "--to", "x"], "ijepa_vits16 has no frozen encoder"),
                               (["cache", "--to", "x"], "usage: jepa-fast cache RECIPE --to FOLDER")]:
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_encoder_weights_are_loaded_strictly(tmp_path):
    torch.manual_seed(1)
    source = small().encoder.build()
    state = {f"module.backbone.{key}": value for key, value in source.state_dict().items()}
    # released files hold a table that rotary models do not use
    torch.save({"target_encoder": state | {"module.backbone.pos_embed": torch.zeros(1, 4, 24)}, "epoch": 3},
               tmp_path / "vitg.pt")
    objective = small(encoder_weights=str(tmp_path / "vitg.pt")).build()
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), objective.encoder.parameters(), strict=True))
    assert not any(p.requires_grad for p in objective.encoder.parameters())
    torch.save({"target_encoder": {k: v for k, v in state.items() if "norm.bias" not in k}}, tmp_path / "short.pt")
    wide = VideoTransformerConfig(image_size=16, num_frames=2, patch_size=8, embed_dim=48, depth=1, num_heads=2,
                                  positions="rotary")
    for changes, message in [
            (dict(encoder_weights=""), "encoder_weights is empty: pass --objective.encoder-weights FILE"),
            (dict(encoder_weights="/nowhere.pt"), "no such file: /nowhere.pt"),
            (dict(encoder_weights=str(tmp_path / "vitg.pt"), encoder_key="ema"), "has no ema; it holds target_enc"),
            (dict(encoder_weights=str(tmp_path / "short.pt")), r"norm.bias is absent in the file and \[24\] in the model"),
            (dict(encoder_weights=str(tmp_path / "vitg.pt"), encoder=wide), r"\[24.* in the file and \[48.* in the model")]:
        with pytest.raises(ValueError, match=message):
            small(**changes).build()


@pytest.mark.parametrize("change, message", [
    (dict(actions=torch.zeros(2, 4, 7)), r"actions must be \[2, 3, 7\] for 4 frames, got \[2, 4, 7\]"),
    (dict(states=torch.zeros(2, 4, 6)), r"states must be \[2, 4, 7\] for 4 frames, got \[2, 4, 6\]"),
    (dict(clips=torch.zeros(2, 3, 2, 16, 16)), "at least auto_steps . 1 = 3 frames, got 2"),
    (dict(clips=torch.zeros(2, 3, 16, 16)), r"clips must be \[B, C, T, H, W\], got \[2, 3, 16, 16\]"),
    (dict(features=torch.zeros(2, 4, 5, 24)), r"features must be \[B, T, 4, 24\], got \[2, 3, 5, 24\]"),
    (dict(extrinsics=torch.zeros(2, 4, 6)), "extrinsics are given but predictor.use_extrinsics is False"),
])
def test_bad_batches(change, message):
    batch = {"clips": torch.zeros(2, 3, 4, 16, 16), "actions": torch.zeros(2, 3, 7), "states": torch.zeros(2, 4, 7)}
    with pytest.raises(ValueError, match=message):
        model = small().build()
        model(batch | change | {"encoder": model.encoder_name()})


def test_bad_settings():
    with pytest.raises(ValueError, match="auto_steps must be at least 1, got 0"):
        small(auto_steps=0)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        ACPredictorConfig(embed_dim=10, num_heads=3)
    predictor, frame = build_fresh(), torch.zeros(2, 1, 16, 40)
    with pytest.raises(ValueError, match="chunk_size must be at least 0"):
        ACWorldModel(predictor, chunk_size=-1)
    world = ACWorldModel(predictor)
    with pytest.raises(ValueError, match="frames and goal must be .* of one shape"):
        world.cost(frame, torch.zeros(2, 1, 7), frame[:1])
    with pytest.raises(ValueError, match=r"poses must be \[E, 1, 7\] = \[2, 1, 7\], got \[2, 7\]"):
        world.cost(frame, torch.zeros(2, 7), frame)
    with pytest.raises(ValueError, match=r"actions must be \[E, S, H, 7\] with E = 2, got \[1, 3, 2, 7\]"):
        world.cost(frame, torch.zeros(2, 1, 7), frame)(torch.zeros(1, 3, 2, 7))


# --- it learns, and what it learned plans

def draw(xy):
    """Frames [..., 3, 16, 16] with a blob at xy [..., 2], in [0, 1]."""
    place = (torch.arange(16) + 0.5) / 16
    square = (place - xy[..., :1, None]).square() + (place[:, None] - xy[..., 1:, None]).square()
    return torch.exp(-square / (2 * 0.12**2)).unsqueeze(-3).expand(*xy.shape[:-1], 3, 16, 16) * 2 - 1


def moving_hand(B, T, generator):
    """Poses of a hand that moves by at most 0.1 in x and y, and what is seen of it."""
    steps = (torch.rand(B, T - 1, 2, generator=generator) * 2 - 1) * 0.1
    start = 0.2 + 0.6 * torch.rand(B, 1, 2, generator=generator)
    states = torch.zeros(B, T, 7)
    states[..., :2] = torch.cat([start, start + steps.cumsum(1)], 1).clamp(0.05, 0.95)
    return {"clips": draw(states[..., :2]).transpose(1, 2), "actions": states.diff(dim=1), "states": states}


@pytest.mark.slow
def test_a_trained_model_plans_to_the_goal():
    """250 steps on a frozen random encoder; then 16 hands, 0.25 from their goals, are planned to them in 6 steps."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = small(encoder=VideoTransformerConfig(image_size=16, num_frames=2, patch_size=4, embed_dim=48, depth=1,
                                                 num_heads=2, positions="rotary"),
                  predictor=ACPredictorConfig(embed_dim=64, depth=2, num_heads=2)).build()
    for parameter in model.encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(model.predictor.parameters(), lr=2e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model(moving_hand(32, 4, generator))["loss"].backward()
        optimizer.step()

    def see(pose):
        return normalise(model.encode(draw(pose[:, None, :2]).transpose(1, 2)))

    pose = moving_hand(16, 2, generator)["states"][:, 0]
    goal = pose.clone()
    goal[:, :2] = (goal[:, :2] + 0.25 * F.normalize(torch.randn(16, 2, generator=generator), dim=1)).clamp(0.1, 0.9)
    start = (pose - goal)[:, :2].norm(dim=1).mean()
    planner, world = CEMAC(max_step=0.1, num_samples=60, num_iterations=5, num_elites=6), ACWorldModel(model.predictor)
    for step in range(6):
        plan = planner.plan(world.cost(see(pose), pose[:, None], see(goal)), 16, seed=0, step=step)
        pose[:, :2] = (pose + plan.actions[:, 0])[:, :2].clamp(0.05, 0.95)
    assert (pose - goal)[:, :2].norm(dim=1).mean() < 0.4 * start
