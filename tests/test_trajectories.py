"""Trajectories on disk: which frames, which crop, which actions; ranks, workers and resume; damage; cached features."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from jepa_fast.data import BadFile, FeatureCache, TrajectoryData
from jepa_fast.data.seeds import generator_for
from jepa_fast.data.trajectories import CentreCrop, Trajectories
from jepa_fast.models.ac_predictor import ACPredictorConfig
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.objectives.action_conditioned import ActionConditionedConfig

CROP = CentreCrop(image_size=16)
DATA = dict(num_frames=3, crop=CROP, num_workers=0)


def write(path, length=20, height=9, width=16, fps=8.0, states=None, seed=0, **arrays):
    """A trajectory whose frame t has the value t in its first pixel row; its state's gripper is t / 100."""
    generator = np.random.default_rng(seed)
    frames = generator.integers(0, 256, (length, height, width, 3), dtype=np.uint8)
    frames[:, 0] = np.arange(length, dtype=np.uint8)[:, None, None]
    if states is None:
        states = generator.normal(size=(length, 7))
        states[:, 6] = np.arange(length) / 100
    arrays = {"frames": frames, "states": states, "fps": None if fps is None else np.array([fps])} | arrays
    arrays = {key: value for key, value in arrays.items() if value is not None}
    (np.savez(path, **arrays) if path.suffix == ".npz" else save_file(arrays, path))
    return arrays


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        write(tmp_path / f"t{i}{'.npz' if i % 2 else '.safetensors'}", length=12 + 2 * i, seed=i,
              height=9 + i % 3, width=16)
    return tmp_path


def batches(folder, num_steps=4, **changes):
    run = {key: changes.pop(key) for key in ("start_step", "rank", "world_size") if key in changes}
    data = TrajectoryData(root=str(folder), **DATA | changes)
    return list(data.batches(data.build(), global_batch_size=4, seed=3, num_steps=num_steps, **run))


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("index", "states", "actions"))
        assert torch.equal(a["clips"], b["clips"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_clip_has_the_frames_states_and_actions_of_one_window(tmp_path, suffix):
    from scipy.spatial.transform import Rotation

    arrays = write(tmp_path / f"a{suffix}", fps=9.0)
    dataset = Trajectories(tmp_path, num_frames=3, fps=4.0, crop=CROP)
    seen = set()
    for seed in range(120):
        clip = dataset.clip(0, generator_for(seed))
        times = clip["frames"][:, 0, 0, 0].long()
        start = int(times[0])
        seen.add(start)
        assert times.tolist() == [start, start + 3, start + 6]  # ceil(9 / 4) apart
        assert torch.equal(clip["states"], torch.from_numpy(arrays["states"][times]).float())
        poses = arrays["states"][times]
        turns = [Rotation.from_euler("xyz", pose[3:6]) for pose in poses]
        expected = [np.concatenate([b[:3] - a[:3], (R * Q.inv()).as_euler("xyz"), b[6:] - a[6:]])
                    for a, b, Q, R in zip(poses, poses[1:], turns, turns[1:], strict=False)]
        assert np.allclose(clip["actions"], np.stack(expected), atol=1e-6)
    assert seen == set(range(20 - 9))  # officially no window ends with the last frame


@pytest.mark.parametrize("height, width, h, w", [(180, 320, 180, 243), (300, 100, 133, 100), (100, 120, 100, 120)])
def test_crop_is_the_middle_at_the_nearest_ratio(height, width, h, w):
    crop = CentreCrop(image_size=32)
    rows, columns = crop.box(height, width)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (h, w)
    assert (rows.start, columns.start) == ((height - h) // 2, (width - w) // 2)
    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    ours = crop.finish(frames[:, rows, columns])
    pixels = F.interpolate(frames[:, rows, columns].permute(3, 0, 1, 2).double().flatten(0, 1)[:, None], size=(32, 32),
                           mode="bilinear").view(3, 2, 32, 32).transpose(0, 1)
    mean, std = (255 * torch.tensor(v).double()[:, None, None] for v in (crop.mean, crop.std))
    assert torch.allclose(ours.double(), (pixels - mean) / std, atol=1e-5)


def test_ranks_workers_and_resume_see_the_same_clips(folder):
    whole = batches(folder)
    assert whole[0]["clips"].shape == (4, 3, 3, 16, 16)
    # one permutation after the other: 16 clips of 6 files, and a file may come twice in a batch
    order = torch.cat([batch["index"] for batch in whole])
    assert all(sorted(order[i:i + 6].tolist()) == list(range(6)) for i in (0, 6))
    assert_equal(batches(folder, start_step=2), whole[2:])
    assert_equal(batches(folder, num_workers=2), whole)
    halves = [batches(folder, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for key in ("index", "states", "actions", "clips"):
            assert torch.equal(batch[key], torch.cat([part[key] for part in parts]))


def test_stored_actions(tmp_path):
    actions = np.random.default_rng(0).normal(size=(19, 7)).astype(np.float32)
    write(tmp_path / "a.npz", actions=actions)
    clip = Trajectories(tmp_path, num_frames=3, fps=8.0, actions="file", crop=CROP).clip(0, generator_for(0))
    start = int(clip["frames"][0, 0, 0, 0])
    assert np.array_equal(clip["actions"], actions[start:start + 2])
    with pytest.raises(ValueError, match="clips take every 2th"):
        Trajectories(tmp_path, num_frames=3, fps=4.0, actions="file").clip(0, generator_for(0))


def test_damaged_and_short_files_are_skipped_and_counted(folder):
    (folder / "t0.safetensors").write_bytes((folder / "t0.safetensors").read_bytes()[:500])
    (folder / "t1.npz").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="skipped an unreadable file: .*t"):
        seen = batches(folder, num_steps=3, max_bad_fraction=1.0)
    assert seen[-1]["num_bad_files"] == 2 and {0, 1}.isdisjoint(torch.cat([b["index"] for b in seen]).tolist())
    assert sorted(message for b in seen for message in b["bad_files"])[0].startswith(f"{folder}/t0.safetensors: ")
    with pytest.raises(ValueError, match="2 of [0-9]+ files seen are not readable trajectories"), \
            pytest.warns(RuntimeWarning):
        batches(folder, num_steps=3, num_workers=2)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("arrays, kind, message", [
    (dict(states=np.zeros((20, 6))), ValueError, r"a\.\w+: states must be \[T, 7\], got \[20, 6\]"),
    (dict(frames=np.zeros((20, 4, 4, 1), np.uint8)), ValueError, r"frames must be \[T, H, W, 3\] uint8, got \[20, 4, 4, 1"),
    (dict(frames=np.zeros((20, 4, 4, 3), np.float32)), ValueError, r"frames must be .* uint8, got \[20, 4, 4, 3\] [fF]"),
    (dict(states=np.zeros((19, 7))), BadFile, "20 frames but 19 states"),
    (dict(length=5), BadFile, r"5 frames, but a clip of 3, 2 apart, needs 6"),
    (dict(frames=None), BadFile, r"a\.\w+: .*frames"),
    (dict(fps=None), ValueError, r"has no array fps: store it, or set data.source_fps"),
    (dict(fps=0.0), BadFile, "fps must be above 0, got 0.0"),
])
def test_wrong_arrays_are_named(tmp_path, suffix, arrays, kind, message):
    write(tmp_path / f"a{suffix}", **arrays)
    with pytest.raises(kind, match=message) as caught:
        Trajectories(tmp_path, num_frames=3, fps=4.0).clip(0, generator_for(0))
    assert isinstance(caught.value, BadFile) == (kind is BadFile) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options, message", [
    (dict(root=""), "data.root is empty"),
    (dict(root="/nowhere/at/all"), "no such folder"),
    (dict(num_frames=0), "num_frames must be at least 1"),
    (dict(fps=0.0), "fps and source_fps must be above 0"),
    (dict(actions="none"), "actions must be states or file"),
    (dict(num_workers=-1), "num_workers must be at least 0"),
    (dict(features="nothing"), "no finished feature cache in nothing"),
])
def test_bad_settings(folder, options, message):
    with pytest.raises(ValueError, match=message):
        data = TrajectoryData(**dict(root=str(folder)) | DATA | options)
        next(data.batches(data.build(), global_batch_size=4))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no trajectories in .*; expected .npz or .safetensors files"):
        Trajectories(tmp_path)


# --- cached features

def objective(seed=0):
    torch.manual_seed(seed)
    encoder = VideoTransformerConfig(image_size=16, num_frames=2, patch_size=8, embed_dim=24, depth=1, num_heads=2,
                                     positions="rotary")
    return ActionConditionedConfig(encoder=encoder, predictor=ACPredictorConfig(embed_dim=24, depth=1, num_heads=2),
                                   encoder_weights="random").build()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_training_from_cached_features_equals_training_from_pixels(folder, tmp_path, dtype, tolerance):
    model, data = objective(), TrajectoryData(root=str(folder), **DATA)
    cache = tmp_path / "cache"
    FeatureCache.write(cache, data.build(), model.encode, encoder=model.encoder_name(), dtype=dtype, batch_size=5)
    by_workers = batches(folder, features=str(cache), num_workers=2)
    for cached, other, plain in zip(batches(folder, features=str(cache)), by_workers, batches(folder), strict=True):
        assert torch.equal(cached["features"], other["features"])
        assert "clips" not in cached and torch.equal(cached["actions"], plain["actions"])
        error = (cached["features"] - model.encode(plain["clips"])).abs().max() / cached["features"].abs().max()
        assert float(error) <= tolerance
        a, b = (float(model(batch)["loss"].detach()) for batch in (cached, plain))
        assert abs(a / b - 1) <= tolerance


def test_a_cache_that_does_not_match_is_refused(folder, tmp_path):
    model, data = objective(), TrajectoryData(root=str(folder), **DATA)
    cache = tmp_path / "cache"
    FeatureCache.write(cache, data.build(), model.encode, encoder=model.encoder_name())
    other = dataclasses.replace(data, crop=CentreCrop(image_size=16, ratio=(1.0, 1.0)))
    with pytest.raises(ValueError, match="is of other data: crop is .* write it again"):
        FeatureCache.open(cache, other.build())
    batch = batches(folder, features=str(cache))[0]
    with pytest.raises(ValueError, match=f"feature cache is of encoder '{model.encoder_name()}', this one is"):
        objective(seed=1)(batch)
    with pytest.raises(ValueError, match="this one is '[0-9a-f]+ autocast'"), torch.autocast("cpu", torch.bfloat16):
        model(batch)
    other_angles = dataclasses.replace(model.config.encoder, angle_dtype="bfloat16")
    same_weights = dataclasses.replace(model.config, encoder=other_angles).build()
    same_weights.load_state_dict(model.state_dict())
    assert same_weights.encoder_name() != model.encoder_name()
    write(folder / "t9.npz")
    with pytest.raises(ValueError, match="is of other data: files is"):
        FeatureCache.open(cache, data.build())
    # not finished: no cache.json
    (cache / "cache.json").rename(cache / "elsewhere.json")
    with pytest.raises(ValueError, match="no finished feature cache"):
        FeatureCache.open(cache, data.build())
    assert json.loads((cache / "elsewhere.json").read_text())["ends"][-1] == sum(12 + 2 * i for i in range(6))
