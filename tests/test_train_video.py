"""Training on clips: a handful is learnt by heart, resume is bit-equal, two ranks equal one, cool-downs start elsewhere."""

import dataclasses

import pytest
import torch
from shrink import shrink
from test_train import assert_equal_states, launch, losses_of, state_of

from jepa_fast import recipes
from jepa_fast.optim import AdamWEMA, param_groups
from jepa_fast.train import checkpoint
from jepa_fast.train.loop import train


def small(positions: str = "rotary", **settings) -> recipes.Recipe:
    """The demo, shrunk; with rotary positions it is a V-JEPA 2."""
    recipe = shrink(recipes.get_recipe("vjepa_moving_digits"))
    encoder = dataclasses.replace(recipe.objective.encoder, positions=positions, rescale_init=positions == "rotary")
    objective = dataclasses.replace(recipe.objective, encoder=encoder,
                                    mask_token_by="clip" if positions == "rotary" else "mask")
    settings = {"max_steps": 6, "checkpoint_every": 0.34} | settings
    return dataclasses.replace(recipe, objective=objective, train=dataclasses.replace(recipe.train, epochs=2.0, **settings))


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_resume_is_bit_equal(positions, tmp_path):
    recipe = small(positions)
    train(recipe, tmp_path / "whole")
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=4)), tmp_path / "parts")
    assert state_of(tmp_path / "parts")["step"] == 4
    train(recipe, tmp_path / "parts", resume=True)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole") and len(losses_of(tmp_path / "whole")) == 6
    assert_equal_states(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_two_ranks_equal_one(tmp_path):
    """From a saved recipe; a group of masks lies within a rank, as a rank's batch does officially."""
    path = tmp_path / "recipe.yaml"
    recipes.save(small(max_steps=3), path)
    for ranks in (1, 2):
        done = launch(["train", "--from", str(path), "--run-dir", str(tmp_path / str(ranks))], ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([float(loss) for loss in losses_of(tmp_path / str(ranks))] for ranks in (1, 2))
    assert len(one) == 3 and two[0] == pytest.approx(one[0], rel=1e-5)
    assert two == pytest.approx(one, rel=2e-3)


def test_accumulation_equals_one_batch(tmp_path):
    losses = {}
    for count in (1, 2):
        train(small(max_steps=3, accumulate=count), tmp_path / str(count))
        losses[count] = [float(loss) for loss in losses_of(tmp_path / str(count))]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def test_a_handful_of_clips_is_learnt_by_heart():
    """V-JEPA 2 on four clips and one set of masks: the loss falls to a fraction, and not by collapse of the targets."""
    torch.manual_seed(0)
    recipe = small()
    objective = recipe.objective.build()
    clips = next(recipe.data.batches(recipe.data.build(), global_batch_size=4, seed=0))
    batch = objective.prepare(clips, seed=0, step=0, first_sample=0)
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.0), lr=2e-3, averages=objective.averages())
    optimizer.momentum = 0.999
    losses = []
    for _ in range(120):
        out = objective(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(out["loss"].detach()))
    assert losses[-1] < 0.5 * losses[0]
    features = objective.targets(clips["clips"])
    assert features.std(0).mean() > 0.1


def test_a_cooldown_starts_from_another_run(tmp_path):
    """Weights, averages and optimizer state of the other run, from step 0 on; with clips of another length."""
    train(small(), tmp_path / "first")
    path = tmp_path / "first" / "checkpoints" / "last.pt"
    longer = small(max_steps=1, start_from=str(path))
    longer = dataclasses.replace(
        longer, data=dataclasses.replace(longer.data, num_frames=8),
        objective=dataclasses.replace(longer.objective,
                                      encoder=dataclasses.replace(longer.objective.encoder, num_frames=8)),
        optim=dataclasses.replace(longer.optim, lr=dataclasses.replace(longer.optim.lr, start=0.0, peak=0.0, final=0.0)))
    train(longer, tmp_path / "second")
    first, second = state_of(tmp_path / "first"), state_of(tmp_path / "second")
    assert second["step"] == 1
    for name, value in first["objective"].items():  # nothing moved: the learning rate is 0
        if not name.startswith("target_encoder"):
            assert torch.equal(second["objective"][name], value), name
    assert second["optimizer"]["state"][0]["step"] == first["optimizer"]["state"][0]["step"] + 1
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        train(small(start_from=str(tmp_path / "none.pt")), tmp_path / "third")
    with pytest.raises(checkpoint.CheckpointError, match=r"is \[48, 1, 2, 8, 8\] in the checkpoint and \[96, 1, 2, 8, 8\]"):
        wide = dataclasses.replace(longer.objective.encoder, embed_dim=96)
        train(dataclasses.replace(longer, objective=dataclasses.replace(longer.objective, encoder=wide)), tmp_path / "4")
