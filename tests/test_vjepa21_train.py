"""V-JEPA 2.1 from data to training: mixed batches, resume, accumulation, and the constants of its recipes."""

import dataclasses
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from PIL import Image
from test_train import ROOT, assert_equal_states, losses_of, state_of
from test_vjepa21 import OBJECTIVE, SIZES

from jepa_fast import recipes
from jepa_fast.data import (
    AsIs,
    ClipTransform,
    ImageFolderData,
    MixedData,
    SyntheticData,
    SyntheticVideoData,
    VideoData,
    steps_per_epoch,
)
from jepa_fast.optim import Horizon
from jepa_fast.optim.schedules import Constant
from jepa_fast.train.loop import train
from jepa_fast.train.step import micro_batches

VIDEOS = SyntheticVideoData(num_videos=20, num_frames=4, image_size=24,
                            transform=ClipTransform(image_size=24))
IMAGES = SyntheticData(num_images=18, image_size=24)
MIXED = MixedData(videos=VIDEOS, images=IMAGES, images_per_clip=1.5)


def tiny(**train_changes) -> recipes.Recipe:
    objective = dataclasses.replace(OBJECTIVE, momentum=Constant(value=0.9), context_warmup=(1, 3))
    settings = {"batch_size": 4, "epochs": 2.0, "log_every": 1, "checkpoint_every": 0.6, "precision": "fp32",
                "device": "cpu"} | train_changes
    return recipes.Recipe(name="tiny", paper="arXiv:2603.14482", summary="", objective=objective, data=MIXED,
                          optim=recipes.OptimConfig(lr=Constant(value=2e-3), weight_decay=Constant(value=0.04)),
                          train=recipes.TrainConfig(**settings))


def batches(config: MixedData, batch_size: int = 4, **run) -> list[dict]:
    return list(config.batches(config.build(), global_batch_size=batch_size, seed=3, **run))


def test_mixed_batches_are_those_of_their_sources():
    """Clip for clip and image for image, over the end of an epoch of either; the index is the clips'."""
    ours = batches(MIXED, num_steps=6)
    clips = list(VIDEOS.batches(VIDEOS.build(), global_batch_size=4, seed=3, num_steps=6))
    images = list(IMAGES.batches(IMAGES.build(), global_batch_size=6, seed=3, num_steps=6))
    assert len(ours) == 6 and steps_per_epoch(MIXED.build(), 4) == 5
    for batch, video, image in zip(ours, clips, images, strict=True):
        assert torch.equal(batch["clips"], video["clips"]) and torch.equal(batch["images"], image["images"])
        assert batch["clips"].shape == (4, 3, 4, 24, 24) and batch["images"].shape == (6, 3, 24, 24)
        assert torch.equal(batch["index"], video["index"]) and torch.equal(batch["image_index"], image["index"])


def test_ranks_split_a_mixed_batch_and_any_step_can_be_the_first():
    whole = batches(MIXED, num_steps=4)
    ranks = [batches(MIXED, num_steps=4, start_step=2, rank=rank, world_size=2) for rank in range(2)]
    for step in (2, 3):
        for name in ("clips", "images", "index", "image_index"):
            assert torch.equal(torch.cat([rank[step - 2][name] for rank in ranks]), whole[step][name]), name


def test_images_of_a_folder_as_images_and_as_clips_of_one_frame(tmp_path):
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 10, 20)).save(tmp_path / f"{i}.png")
    crop = ClipTransform(image_size=24, scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=0.0)
    for source, shape in ((ImageFolderData(root=str(tmp_path), num_workers=0,
                                           transform=AsIs(mean=crop.mean, std=crop.std)), (4, 3, 30, 30)),
                          (VideoData(root=str(tmp_path), num_frames=1, num_workers=0, transform=crop), (4, 3, 1, 24, 24))):
        batch = batches(dataclasses.replace(MIXED, images=source, images_per_clip=1.0), num_steps=1)[0]
        assert batch["images"].shape == shape
        levels = batch["images"].flatten(2).mean(2) * torch.tensor(crop.std) + torch.tensor(crop.mean)
        assert torch.allclose(levels[:, 0] * 255, batch["image_index"] * 60.0, atol=1e-3)


@pytest.mark.parametrize("change, message", [
    ({"images_per_clip": 0.0}, "images_per_clip must be above 0, got 0.0"),
    ({"images": VideoData(num_frames=2)}, "images.num_frames must be 1, got 2")])
def test_bad_mixtures_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MIXED, **change)


def test_bad_sources_are_named():
    with pytest.raises(ValueError, match="images_per_clip must make a whole number of images, got 1.5 for 3 clips"):
        batches(MIXED, 3)
    with pytest.raises(ValueError, match="data.images: data.root is empty"):
        dataclasses.replace(MIXED, images=ImageFolderData()).build()
    with pytest.raises(ValueError, match="data.videos: one of data.root, data.csv and data.shards"):
        dataclasses.replace(MIXED, videos=VideoData()).build()
    with pytest.raises(ValueError, match="as many channels, got 1 and 3"):
        dataclasses.replace(MIXED, videos=dataclasses.replace(VIDEOS, in_chans=1)).build()
    with pytest.raises(ValueError, match="global_batch_size must be a multiple of world_size, got 6 and 4"):
        batches(MIXED, 4, world_size=4)


def test_micro_batches_cut_every_tensor_by_its_own_rows():
    batch = batches(MIXED, num_steps=1)[0]
    parts = micro_batches(batch, 2)
    for name in ("clips", "images", "index", "image_index"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name]), name
    assert [len(part["images"]) for part in parts] == [3, 3]
    with pytest.raises(ValueError, match="a batch must have a multiple of train.accumulate = 4 rows, got 6"):
        micro_batches(batch, 4)


def test_resume_is_bit_equal(tmp_path):
    """Stopped after step 6 of 10, while lambda rises in steps 1 to 3."""
    recipe = tiny()
    train(recipe, tmp_path / "whole")
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=6)), tmp_path / "parts")
    train(recipe, tmp_path / "parts", resume=True)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole") and len(losses_of(tmp_path / "whole")) == 10
    assert_equal_states(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_accumulation_equals_one_batch(tmp_path):
    for name, count in (("whole", 1), ("parts", 2)):
        train(tiny(max_steps=4, accumulate=count), tmp_path / name)
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert [float(x) for x in parts] == pytest.approx([float(x) for x in whole], rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_cooldown", [False, True], ids=["pretraining", "cooldown"])
def test_official_constants(size, is_cooldown):
    """What the official YAML files say, once more and by hand."""
    width, depth, heads, ratio, levels, _, predictor_depth, _ = SIZES[size]
    name = f"vjepa2_1_vit{size.lower() if size in 'BL' else size}16"
    recipe = recipes.get_recipe(f"{name}_cooldown" if is_cooldown else name)
    objective, data, optim = recipe.objective, recipe.data, recipe.optim
    encoder = objective.encoder
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads, encoder.mlp_ratio, encoder.levels) == \
        (width, depth, heads, ratio, levels)
    assert (encoder.image_size, encoder.patch_size, encoder.tubelet_size, encoder.side) == (256, 16, 2, 16)
    assert (objective.predictor.depth, objective.predictor.embed_dim, objective.predictor.num_heads) == \
        (predictor_depth, 384, 12)
    groups = {"B": (96, 144), "L": (48, 72), "g": (48, 72), "G": (24, 36)}[size]
    assert objective.masking.mask_group_size == groups[0] // (2 if is_cooldown else 1)
    assert objective.image_masking.mask_group_size == groups[1]
    kinds = [(mask.num_blocks, mask.spatial_scale) for mask in objective.masking.masks + objective.image_masking.masks]
    assert kinds == [(8, (0.15, 0.15)), (2, (0.7, 0.7)), (10, (0.15, 0.15))]
    assert (objective.context_weight, objective.image_context_weight, objective.image_share) == (0.5, 0.5, 0.5)
    assert (objective.context_warmup, objective.weight_by_distance) == \
        ((None, False) if is_cooldown else ((15_000, 30_000), True))
    assert data.images_per_clip * recipe.train.batch_size == (9216 if is_cooldown else 4608)
    assert recipe.train.batch_size == 3072 and recipe.train.seed == 239 and recipe.train.precision == "bf16"
    assert (data.videos.num_frames, data.videos.fps, data.videos.weights) == \
        (64 if is_cooldown else 16, 4, (0.335, 0.1, 0.565))
    for source in (data.videos, data.images):
        crop = source.transform
        assert (crop.image_size, crop.scale, crop.ratio, crop.horizontal_flip) == (256, (0.3, 1.0), (0.75, 1.35), 0.5)
    horizon = Horizon(recipe.train.steps_per_epoch, recipe.train.epochs, recipe.train.schedule_scale)
    assert horizon.steps_per_epoch * horizon.epochs == (12_000 if is_cooldown else 300_000)
    if is_cooldown:
        assert optim.lr(11_999, horizon) == pytest.approx(1.208e-4, rel=1e-6)
    else:
        assert optim.lr(0, horizon) == pytest.approx(1e-4 + 5e-4 / 12_000, rel=1e-12)
        assert optim.lr(11_999, horizon) == optim.lr(299_999, horizon) == 6e-4
    assert objective.momentum(5, horizon) == 0.99925 and optim.weight_decay(5, horizon) == 0.04
    assert optim.betas == (0.9, 0.999) and optim.eps == 1e-8 and optim.clip_grad is None and not optim.decay_all


def test_sources_are_options_of_the_command_line():
    done = subprocess.run([sys.executable, "-m", "jepa_fast.cli", "train", "vjepa2_1_vitb16", "--data.videos.csv", "no.csv",
                           "--data.images.root", "/no"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and "data.videos: no such file: no.csv" in done.stderr, done.stderr[-500:]


def train_on_a_rank(rank: int, port: int, recipe: recipes.Recipe, folder) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}
    train(recipe, folder)
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """Steps without and with the loss of the context; every parameter takes part, so that ranks never wait."""
    recipe = tiny(max_steps=4)
    train(recipe, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(os, "environ", os.environ.copy())  # this process is rank 0
    other = torch.multiprocessing.get_context("spawn").Process(target=train_on_a_rank,
                                                               args=(1, port, recipe, tmp_path / "other"))
    other.start()
    train_on_a_rank(0, port, recipe, tmp_path / "two")
    other.join(60)
    one, two = ([float(x) for x in losses_of(tmp_path / name)] for name in ("one", "two"))
    # step 1 sees rounding only; AdamW's division magnifies it in the next ones
    assert two[0] == pytest.approx(one[0], rel=1e-5) and two == pytest.approx(one, rel=2e-3) and len(one) == 4
    assert other.exitcode == 0
