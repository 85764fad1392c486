"""Moving digits and pairs of possible and impossible clips: pixels against an independent drawing, order, ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jepa_fast.data import ImpossiblePairs, Mnist, MovingDigits, MovingDigitsData
from jepa_fast.data.impossible import KINDS, first_difference
from jepa_fast.data.moving_digits import DIRECTIONS, draw_moving, uniforms
from jepa_fast.data.seeds import mix_seed


def test_draws_are_those_of_mix_seed():
    draws = uniforms(4, 3, -7, 2**40)
    expected = [[(mix_seed(-7, 2**40, i, k) >> 10) / 2**53 for k in range(3)] for i in range(4)]
    assert draws.tolist() == expected


@pytest.mark.parametrize("wraps", [False, True])
def test_drawing_is_bilinear(wraps):
    """Against grid_sample, which places the whole picture by an affine map instead of by rows and columns."""
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (3, 9, 7), dtype=np.uint8))
    positions = np.rint(rng.uniform(-8, 22, (3, 4, 2)) * 16) / 16
    drawn = draw_moving(pictures, positions, 20, wraps)
    shifts = [(0, 0)] if not wraps else [(20 * i, 20 * j) for i in (-1, 0, 1, 2) for j in (-1, 0, 1, 2)]
    for n in range(3):
        for t in range(4):
            expected = sum(_place(pictures[n], positions[n, t] - shift, 20) for shift in shifts)
            assert (drawn[n, t].double() - expected).abs().max() <= 0.5 + 1e-9


def _place(picture: torch.Tensor, corner: np.ndarray, size: int) -> torch.Tensor:
    h, w = picture.shape
    y, x = (torch.arange(size, dtype=torch.float64) - c for c in corner)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1) * 2 / torch.tensor([w - 1, h - 1]) - 1
    return F.grid_sample(picture[None, None].double(), grid[None], padding_mode="zeros", align_corners=True)[0, 0]


def test_a_single_digit_moves_as_its_direction_says():
    clips = MovingDigits("train", 64, image_size=96, num_frames=6, num_digits=(1, 1), speed=(1.0, 2.0), seed=3)
    frames = clips.clips(torch.arange(64))[:, 0].double()
    mass = frames.flatten(2)
    place = torch.arange(96, dtype=torch.float64)
    down = (frames.sum(3) @ place) / mass.sum(2)
    right = (frames.sum(2) @ place) / mass.sum(2)
    # a digit that meets no border moves by one constant step
    steps = torch.stack([down.diff(dim=1), right.diff(dim=1)], -1)
    is_free = (steps - steps[:, :1]).abs().amax((1, 2)) < 0.15
    assert is_free.sum() >= 40
    for i in is_free.nonzero().flatten().tolist():
        name = DIRECTIONS[clips.labels[i]]
        expected = torch.tensor([float(word in name) - float(back in name)
                                 for word, back in (("down", "up"), ("right", "left"))], dtype=torch.float64)
        velocity = steps[i].mean(0)
        assert torch.equal(torch.where(velocity.abs() < 0.1, 0, velocity.sign()), expected), (name, velocity)
        assert 0.9 < velocity.norm() < 2.1


def test_crossing_keeps_the_light_and_bouncing_keeps_the_digit_inside():
    cross = MovingDigits("train", 20, image_size=40, num_digits=(1, 1), border="cross", speed=(3.0, 3.0))
    light = cross.clips(torch.arange(20)).double().sum((1, 3, 4))
    assert (light / light[:, :1] - 1).abs().max() < 0.02  # rounding to whole levels
    bounce = MovingDigits("train", 20, image_size=40, num_digits=(1, 1), speed=(3.0, 3.0), num_frames=40)
    light = bounce.clips(torch.arange(20)).double().sum((1, 3, 4))
    assert (light / light[:, :1] - 1).abs().max() < 0.02


def test_digits_are_those_of_the_split():
    """At whole positions the digit is the image itself; those of test clips are test images of the label's class."""
    clips = MovingDigits("test", 300, image_size=48, num_digits=(1, 1), border="bounce")
    test, (labels, names) = Mnist("test"), clips.targets["digit"]
    assert torch.equal(torch.from_numpy(np.asarray(clips.images)), test.images[:, 0])
    first = clips._digit[:, 0]
    assert torch.equal(labels, test.labels[torch.from_numpy(first)]) and names == [str(i) for i in range(10)]
    assert labels.bincount(minlength=10).min() > 10 and clips.labels.bincount(minlength=8).min() > 15
    clips._start, clips._velocity = np.full_like(clips._start, 10), np.zeros_like(clips._velocity)
    assert torch.equal(clips.clip(7)[0, 5, 10:38, 10:38], test.images[first[7], 0])


def test_clips_depend_on_their_index_alone():
    clips, more = MovingDigits(num_clips=70, seed=1), MovingDigits(num_clips=700, seed=1)
    together = more.clips(torch.arange(70))
    assert torch.equal(clips.clip(69), together[69]) and together.dtype == torch.uint8
    assert together.shape == (70, 1, 16, 64, 64)
    assert not torch.equal(together, MovingDigits(num_clips=70, seed=2).clips(torch.arange(70)))
    counts = MovingDigits(num_clips=400)._count
    assert 150 < (counts == 2).sum() < 250


def test_batches_resume_and_split_over_ranks():
    data = MovingDigitsData(num_frames=4, image_size=32, num_clips=40)
    dataset = data.build()
    whole = list(data.batches(dataset, global_batch_size=8, seed=5, num_steps=7))
    assert len({int(i) for batch in whole[:5] for i in batch["index"]}) == 40  # an epoch is a permutation
    later = list(data.batches(dataset, global_batch_size=8, seed=5, start_step=4, num_steps=7))
    for a, b in zip(whole[4:], later, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    ranks = [list(data.batches(dataset, global_batch_size=8, seed=5, num_steps=7, rank=r, world_size=2)) for r in (0, 1)]
    for a, *parts in zip(whole, *ranks, strict=True):
        assert all(torch.equal(a[key], torch.cat([part[key] for part in parts])) for key in a)
    batch = whole[3]
    plain = dataset.clips(batch["index"]).double() / 255
    assert (batch["clips"] - (plain - 0.04) / 0.17).abs().max() < 1e-5 and batch["clips"].dtype == torch.float32
    assert torch.equal(batch["labels"], dataset.labels[batch["index"]])


def test_the_default_normalisation_is_that_of_the_default_clips():
    data = MovingDigitsData(num_clips=500)
    pixels = data.normalise(data.build().clips(torch.arange(300)))
    assert abs(float(pixels.mean())) < 0.1 and 0.85 < float(pixels.std()) < 1.15


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_clips": 0}, "num_clips must be at least 1, got 0"),
    ({"image_size": 28}, "image_size must be at least 29, got 28"),
    ({"num_digits": (1, 3)}, r"num_digits must be \(fewest, most\) within 1 and 2, got \(1, 3\)"),
    ({"speed": (0.0, 1.0)}, "speed must be"),
    ({"border": "stop"}, "border must be bounce or cross, got 'stop'"),
    ({"split": "val"}, "split must be train, test or all"),
])
def test_mistakes_in_moving_digits(arguments, message):
    with pytest.raises(ValueError, match=message):
        MovingDigits(**arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"global_batch_size": 3, "world_size": 2}, "multiple of world_size"),
    ({"global_batch_size": 4, "rank": 1}, "rank below it"),
    ({"global_batch_size": 4, "start_step": -1}, "start_step must be at least 0, got -1"),
    ({"global_batch_size": 50}, "at least one global batch"),
])
def test_mistakes_in_batches(arguments, message):
    data = MovingDigitsData(num_clips=10)
    with pytest.raises(ValueError, match=message):
        data.batches(data.build(), **arguments)
    with pytest.raises(ValueError, match="one number, for grey clips"):
        MovingDigitsData(mean=(0.1, 0.1)).batches(data.build(), global_batch_size=2)


@pytest.mark.parametrize("size", [48, 64])
def test_pairs_differ_from_the_event_on(size):
    pairs = ImpossiblePairs(num_pairs=60, image_size=size)
    clips = pairs.pairs(torch.arange(60))
    assert clips.shape == (60, 2, 1, 24, size, size) and torch.equal(torch.stack(pairs.pair(13)), clips[13])
    event = first_difference(clips)
    assert 9 <= int(event.min()) and int(event.max()) <= 18
    light = lambda frames: float(frames.double().sum())  # noqa: E731
    for possible, impossible, kind, t in zip(clips[:, 0, 0], clips[:, 1, 0], pairs.kind, event, strict=True):
        before, after, kind = slice(0, int(t)), slice(int(t), None), KINDS[kind]
        assert torch.equal(possible[before], impossible[before])
        if kind == "vanish":
            assert light(impossible[after]) == 0 < light(possible[-1])
        elif kind == "appear":
            assert light(possible) == 0 < light(impossible[-1])
        elif kind == "change_colour":
            assert 0.38 < light(impossible[after]) / light(possible[after]) < 0.4
        elif kind == "vanish_behind":
            screen = impossible[-1]
            assert set(screen.unique().tolist()) == {0, 128} and light(possible[-1]) > light(impossible[-1])
            assert torch.equal(possible[int(t)] != impossible[int(t)], (possible[int(t)] != screen))
        elif kind == "pass_wall":
            wall = (possible == 128).all(0)
            assert int(wall.sum()) == 4 * size and possible[:, wall].eq(128).all() and impossible[:, wall].eq(128).all()
            assert light(possible[-1] != impossible[-1]) > 20
        else:
            assert light(possible[-1] != impossible[-1]) > 20
    assert clips[pairs.kind != KINDS.index("appear"), 0].flatten(2).amax(2).min() > 0


def test_pairs_mistakes():
    with pytest.raises(ValueError, match="kinds must be some of vanish, .*, got \\('fly',\\)"):
        ImpossiblePairs(kinds=("fly",))
    with pytest.raises(ValueError, match="image_size must be at least 48, got 32"):
        ImpossiblePairs(image_size=32)
