"""Every recipe: complete, saved and read back equal, every parameter gets a gradient, the same first losses as before."""

import dataclasses
import json
import pathlib

import pytest
import torch

from jepa_fast import recipes
from jepa_fast.data import SyntheticData
from jepa_fast.data.two_rooms_data import TwoRoomsData
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.resnet import ResNetConfig
from jepa_fast.objectives.lejepa import LeJEPAConfig
from jepa_fast.train.loop import train

ALL = sorted(recipes.all_recipes())
# world models train on trajectories; test_world_models does for them what the tests of IMAGES do
IMAGES = [name for name in ALL if not isinstance(recipes.get_recipe(name).data, TwoRoomsData)]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "recipe_losses.json"


def shrink(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with a narrow, shallow model, few synthetic images and a small batch; all else as it is."""
    objective, data = recipe.objective, recipe.data
    encoder = objective.encoder
    small = {"num_outputs": min(encoder.num_outputs, 16)}
    if isinstance(encoder, ResNetConfig):
        small |= {"width": 8}
    else:
        small |= {"embed_dim": 12 * encoder.num_heads, "depth": 2}
    encoder = dataclasses.replace(encoder, **small)
    changes = {"encoder": encoder}
    if isinstance(objective, LeJEPAConfig):
        changes["projector"] = (32, 32, objective.projector[-1])
        changes["sigreg"] = dataclasses.replace(objective.sigreg, num_slices=64)
    else:
        changes["predictor"] = dataclasses.replace(objective.predictor, embed_dim=12 * encoder.num_heads, depth=2)
        changes["masking"] = dataclasses.replace(objective.masking, mask_group_size=4)
    synthetic = SyntheticData(num_images=16, image_size=encoder.image_size, in_chans=encoder.in_chans,
                              transform=data.transform)
    return dataclasses.replace(
        recipe, objective=dataclasses.replace(objective, **changes), data=synthetic,
        train=dataclasses.replace(recipe.train, batch_size=8, precision="fp32", device="cpu", max_steps=3, log_every=1))


@pytest.mark.parametrize("name", ALL)
def test_saved_and_read_back_equal(name, tmp_path):
    recipe = recipes.get_recipe(name)
    assert recipe.name == name and recipe.paper.startswith("arXiv:") and recipe.summary
    recipes.save(recipe, tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", IMAGES)
def test_every_parameter_gets_a_gradient(name):
    recipe = shrink(recipes.get_recipe(name))
    torch.manual_seed(0)
    objective = recipe.objective.build()
    batch = next(iter(batches(recipe)))
    objective(objective.prepare(batch, seed=0, step=0, first_sample=0))["loss"].backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # keys and queries of a freshly initialised network may get tiny, but not zero, gradients
    assert not without


def batches(recipe):
    return recipe.data.batches(recipe.data.build(), global_batch_size=recipe.train.batch_size, seed=recipe.train.seed)


@pytest.mark.parametrize("name", IMAGES)
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


@pytest.mark.parametrize("name, millions", [("ijepa_vith14", 630.4 + 22.3), ("ijepa_vitl16", 303.1 + 22.2)])
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
