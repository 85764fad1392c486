"""Every recipe: complete, saved and read back equal, every parameter gets a gradient, the same first losses as before."""

import dataclasses
import json
import pathlib

import pytest
import torch
from shrink import shrink

from jepa_fast import recipes
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.optim import Horizon
from jepa_fast.train.loop import train

ALL = sorted(recipes.all_recipes())


def distinct() -> list[str]:
    """Names without those that shrink to the same run: sizes of one family."""
    seen, names = set(), []
    for name in ALL:
        small = dataclasses.replace(shrink(recipes.get_recipe(name)), name="", summary="")
        if recipes.to_yaml(small) not in seen:
            seen.add(recipes.to_yaml(small))
            names.append(name)
    return names


DISTINCT = distinct()
GOLDEN = pathlib.Path(__file__).parent / "golden" / "recipe_losses.json"


@pytest.mark.parametrize("name", ALL)
def test_saved_and_read_back_equal(name, tmp_path):
    recipe = recipes.get_recipe(name)
    assert recipe.name == name and recipe.paper.startswith("arXiv:") and recipe.summary
    recipes.save(recipe, tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", DISTINCT)
def test_every_parameter_gets_a_gradient(name):
    recipe = shrink(recipes.get_recipe(name))
    torch.manual_seed(0)
    objective = recipe.objective.build()
    for parameter in objective.parameters():
        if parameter.requires_grad and not parameter.any():  # gates that start at zero let nothing through
            torch.nn.init.normal_(parameter, std=0.02)
    batch = next(iter(batches(recipe)))
    objective(objective.prepare(batch, seed=0, step=0, first_sample=0))["loss"].backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # keys and queries of a freshly initialised network may get tiny, but not zero, gradients
    assert not without


def batches(recipe):
    return recipe.data.batches(recipe.data.build(), global_batch_size=recipe.train.batch_size, seed=recipe.train.seed)


@pytest.mark.parametrize("name", DISTINCT)
def test_first_losses(name, tmp_path):
    """Three steps on synthetic images give the committed losses, and twice the same bits."""
    recipe = shrink(recipes.get_recipe(name))
    losses = []
    for attempt in range(2):
        run = train(recipe, tmp_path / str(attempt))
        lines = run.metrics_path.read_text().splitlines()
        column = lines[0].split(",").index("loss")
        losses.append([float(line.split(",")[column]) for line in lines[1:]])
    assert losses[0] == losses[1]
    expected = json.loads(GOLDEN.read_text())
    assert name in expected, f"new recipe: add {name}: {losses[0]} to {GOLDEN.name}"
    # machines differ in the order of their sums, and AdamW's first steps amplify it
    assert losses[0] == pytest.approx(expected[name], rel=2e-3)


def test_official_ijepa_constants():
    """What the four official YAML files say, once more and by hand."""
    for name, group, epochs, warmup, image, patch, width, depth, heads, predictor_depth in [
            ("ijepa_vith14", 128, 300, 40, 224, 14, 1280, 32, 16, 12),
            ("ijepa_vith16_448", 16, 300, 40, 448, 16, 1280, 32, 16, 12),
            ("ijepa_vith14_in22k", 32, 66, 3, 224, 14, 1280, 32, 16, 12),
            ("ijepa_vitg16_in22k", 16, 44, 3, 224, 16, 1408, 40, 16, 16)]:
        recipe = recipes.get_recipe(name)
        encoder: VisionTransformerConfig = recipe.objective.encoder
        assert (encoder.image_size, encoder.patch_size, encoder.embed_dim, encoder.depth, encoder.num_heads) == \
            (image, patch, width, depth, heads)
        masking = recipe.objective.masking
        assert masking.mask_group_size == group and masking.min_keep == 10 and masking.mode == "official"
        assert recipe.objective.predictor.depth == predictor_depth and recipe.objective.predictor.embed_dim == 384
        assert recipe.train.epochs == epochs and recipe.train.batch_size == 2048
        lr = recipe.optim.lr
        assert (lr.start, lr.peak, lr.final, lr.warmup_epochs) == (2e-4, 1e-3, 1e-6, warmup)


def test_official_vjepa_constants():
    """What the official YAML files say, once more and by hand: V-JEPA, then V-JEPA 2 with its cool-downs."""
    for name, batch, group, image, width, depth, heads in [
            ("vjepa_vitl16", 3072, 24, 224, 1024, 24, 16), ("vjepa_vith16", 3072, 24, 224, 1280, 32, 16),
            ("vjepa_vith16_384", 2400, 10, 384, 1280, 32, 16)]:
        recipe = recipes.get_recipe(name)
        check_video(recipe, batch, group, 16, image, width, depth, heads)
        assert (recipe.data.frame_step, recipe.data.fps) == (4, None)
        assert recipe.optim.clip_grad == 10 and recipe.optim.clip_from_epoch == 41
        assert recipe.train.epochs == 300 and recipe.train.seed == 234
        horizon = Horizon(300, 300, 1.25)
        assert recipe.optim.lr(11_999, horizon) == 6.25e-4 and recipe.objective.momentum(0, horizon) == 0.998
    for name, group, frames, image, width, depth, heads in [
            ("vjepa2_vitl16", 24, 16, 256, 1024, 24, 16), ("vjepa2_vith16", 24, 16, 256, 1280, 32, 16),
            ("vjepa2_vitg16", 24, 16, 256, 1408, 40, 22), ("vjepa2_vitl16_cooldown", 12, 64, 256, 1024, 24, 16),
            ("vjepa2_vith16_cooldown", 12, 64, 256, 1280, 32, 16), ("vjepa2_vitg16_cooldown", 6, 64, 256, 1408, 40, 22),
            ("vjepa2_vitg16_384_cooldown", 6, 64, 384, 1408, 40, 22)]:
        recipe = recipes.get_recipe(name)
        check_video(recipe, 3072, group, frames, image, width, depth, heads)
        assert recipe.data.fps == 4 and recipe.data.weights == (0.335, 0.1, 0.565) and recipe.optim.clip_grad is None
        is_cooldown = frames == 64
        horizon = Horizon(300, recipe.train.epochs, recipe.train.schedule_scale)
        assert recipe.train.epochs == (40 if is_cooldown else 800) and recipe.train.seed == 239
        last = recipe.optim.lr(300 * 40 - 1, horizon)
        assert last == pytest.approx(1.06e-4, rel=5e-3) if is_cooldown else last == 5.25e-4
        assert recipe.objective.momentum(5, horizon) == 0.99925 and recipe.optim.weight_decay(5, horizon) == 0.04


def check_video(recipe, batch, group, frames, image, width, depth, heads):
    objective, encoder = recipe.objective, recipe.objective.encoder
    assert (recipe.train.batch_size, objective.masking.mask_group_size) == (batch, group)
    assert (encoder.num_frames, encoder.image_size, encoder.patch_size, encoder.tubelet_size) == (frames, image, 16, 2)
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads) == (width, depth, heads)
    assert (recipe.data.num_frames, recipe.data.transform.image_size) == (frames, image)
    assert (objective.predictor.embed_dim, objective.predictor.depth) == (384, 12)
    kinds = [(mask.num_blocks, mask.spatial_scale) for mask in objective.masking.masks]
    assert kinds == [(8, (0.15, 0.15)), (2, (0.7, 0.7))] and objective.masking.mode == "official"
    assert recipe.train.steps_per_epoch == 300 and recipe.train.schedule_scale == 1.25


@pytest.mark.parametrize("name, millions", [("ijepa_vith14", 630.4 + 22.3), ("ijepa_vitl16", 303.1 + 22.2),
                                            ("vjepa_vitl16", 303.9 + 22.1), ("vjepa2_vitg16", 1012.2 + 22.4)])
def test_parameter_counts(name, millions):
    from jepa_fast.cli import count_parameters

    assert count_parameters(recipes.get_recipe(name)) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_recipe_file_mistakes_name_the_field(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: ijepa_vits16\ntrain: {epoch: 3}\n")
    with pytest.raises(ValueError, match=r"unknown field train.epoch; nearest: train.epochs"):
        recipes.load(path)
    path.write_text("name: ijepa_vits16\ntrain: {epochs: many}\n")
    with pytest.raises(ValueError, match=r"train.epochs: .*got 'many'"):
        recipes.load(path)
    with pytest.raises(ValueError, match=r"unknown recipe 'ijepa_vit16'; nearest: ijepa_vit"):
        recipes.get_recipe("ijepa_vit16")
