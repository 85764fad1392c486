"""Clips of video files: every frame carries its number in its pixels, so what was decoded can be read back."""

import dataclasses
import io
import json
import math
import pickle
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch.nn import functional as F

from jepa_fast.data import (
    BadFile,
    ClipSampling,
    ClipTransform,
    EvalClipTransform,
    IjepaTransform,
    SyntheticVideoData,
    VideoData,
    VideoFolder,
    VideoList,
    VideoShards,
    clip_transform,
    decoders,
    load_batches,
    load_in_order,
    loader,
    steps_per_epoch,
)
from jepa_fast.data.clips import clip_indices, frame_step_of
from jepa_fast.data.seeds import generator_for, mix_seed
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictorConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig
from jepa_fast.optim.schedules import Constant, WarmupCosine
from jepa_fast.recipes import OptimConfig, Recipe, TrainConfig
from jepa_fast.train import checkpoint
from jepa_fast.train.loop import train

av = pytest.importorskip("av", reason="PyAV is not installed")

BITS = 9
SMALL = ClipTransform(image_size=16, horizontal_flip=0.5)


def frame(number: int, width: int, height: int) -> np.ndarray:
    """The number as black and white bars, above a gradient that has no symmetry."""
    pixels = np.zeros((height, width, 3), np.uint8)
    bars = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], width // BITS)
    pixels[:height // 2, :len(bars)] = bars[:, None]
    pixels[height // 2:] = np.linspace(0, 255, width)[:, None] * [1, 0.5, 0.2]
    return pixels


def number_of(pixels: np.ndarray) -> int:
    height, width = pixels.shape[:2]
    return sum(int(pixels[height // 4, bit * (width // BITS) + width // BITS // 2].mean() > 128) << bit
               for bit in range(BITS))


def numbers_of(clip: torch.Tensor) -> list[int]:
    return [number_of(pixels) for pixels in clip.permute(1, 2, 3, 0).numpy()]


def encode(path, num_frames: int = 40, *, size=(72, 48), codec="libx264", rate=30, gop=12, times=None, first=0,
           pix_fmt="yuv420p", rotation=0, **options) -> str:
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        stream.gop_size, stream.max_b_frames = gop, 3 if codec in ("libx264", "mpeg2video") else 0
        for number in range(num_frames):
            picture = av.VideoFrame.from_ndarray(frame(number + first, *size), format="rgb24")
            picture.pts = number if times is None else times[number]
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return str(path)


def folder_of(path, lengths, **options):
    """Videos of these lengths in class folders a and b; the frames of video i count from 50 i."""
    for i, length in enumerate(lengths):
        (path / "ab"[i % 2]).mkdir(exist_ok=True, parents=True)
        encode(path / "ab"[i % 2] / f"{i:02}.mp4", length, first=50 * i, **options)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("videos"), (30, 35, 40, 45, 50, 20, 30))


# ---- which frames make a clip


def test_a_window_is_spread_over_both_ends():
    """linspace(0, 64, 16) cut off at 63, written as fractions: 64 / 15 frames apart."""
    expected = [min(64 * i // 15, 63) for i in range(16)]
    assert clip_indices(65, 16, 4).tolist() == [expected]
    assert clip_indices(200, 16, 4, num_clips=3).tolist() == [[66 * c + i for i in expected] for c in range(3)]
    assert clip_indices(9, 1, 4).tolist() == [[0]]


def test_ends_are_drawn_from_clip_len_to_the_last_frame_but_one():
    starts = {clip_indices(20, 4, 4, generator=torch.Generator().manual_seed(seed))[0, 0] for seed in range(60)}
    assert starts == {0, 1, 2, 3}
    generator = torch.Generator().manual_seed(5)
    expected = torch.randint(16, 100, (2,), generator=torch.Generator().manual_seed(5)) - 16
    clips = clip_indices(200, 4, 4, num_clips=2, generator=generator)
    assert (clips[:, 0] - [0, 100]).tolist() == expected.tolist()


@pytest.mark.parametrize("num_video_frames, num_clips, allow_overlap, expected", [
    # 4 x 4 in a part of 16: four samples over [0, 16], the last one cut off
    (16, 1, False, [[0, 5, 10, 15]]), (10, 1, False, [[0, 9, 9, 9]]), (3, 1, False, [[2, 2, 2, 2]]),
    (21, 2, False, [[0, 9, 9, 9], [10, 19, 19, 19]]), (1, 1, False, [[0, 0, 0, 0]]),
    # overlapping ones are spread over [0, last], the last left out
    (10, 1, True, [[0, 8, 8, 8]]), (20, 2, True, [[0, 7, 14, 14], [4, 11, 18, 18]]),
    (10, 3, True, [[0, 8, 8, 8]] * 3), (2, 3, True, [[0, 0, 0, 0]] * 3), (1, 1, True, [[0, 0, 0, 0]])])
def test_short_videos_repeat_their_last_frame(num_video_frames, num_clips, allow_overlap, expected):
    assert clip_indices(num_video_frames, 4, 4, num_clips=num_clips, allow_overlap=allow_overlap).tolist() == expected


@pytest.mark.parametrize("average_fps, arguments, expected", [
    (29.97, dict(fps=4), 7), (25.0, dict(fps=4), 6), (23.976, dict(fps=4), 6), (60.0, dict(fps=4), 15),
    (4.0, dict(fps=4), 1), (29.97, dict(duration=4.0), 7), (30.0, dict(duration=2.5), 4)])
def test_frame_steps_from_rates_and_durations(average_fps, arguments, expected):
    assert frame_step_of(average_fps, 16, **arguments) == expected


@pytest.mark.parametrize("arguments, message", [
    (dict(num_frames=0), r"num_frames must be an integer of at least 1, got 0"),
    (dict(frame_step=1.5), r"frame_step must be an integer of at least 1, got 1.5"),
    (dict(duration=-1.0), r"duration must be a number of seconds above 0, got -1.0"),
    (dict(fps=4, duration=2.0), r"fps and duration exclude each other, got 4 and 2.0")])
def test_sampling_names_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ClipSampling(**arguments)


# ---- which frames are decoded


def decoder(name):
    try:
        return decoders.choose_decoder(name)
    except ImportError as error:
        pytest.skip(str(error))


FILES = {"h264.mp4": {}, "h264.mkv": {}, "h264.avi": {}, "h264.ts": {}, "vp9.webm": dict(codec="libvpx-vp9"),
         "open-gop.hevc.mp4": dict(codec="libx265", **{"x265-params": "log-level=none:open-gop=1:keyint=12:bframes=4"}),
         "open-gop.mpg": dict(codec="mpeg2video"), "odd.mp4": dict(size=(77, 49), pix_fmt="yuv444p"),
         "one-keyframe.mp4": dict(gop=500), "fragmented.mp4": dict(container={"movflags": "frag_keyframe+empty_moov"}),
         "variable.mp4": dict(times=np.cumsum([1 + i * i % 7 for i in range(60)]).tolist())}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_exactly_the_frames_asked_for(tmp_path, name, backend, monkeypatch):
    if backend == "torchcodec" and name.endswith((".avi", ".ts", ".mpg")):
        pytest.skip("torchcodec takes the time stamps of these for the order")
    path = encode(tmp_path / name, 60, **FILES[name])
    video = decoder(backend)(path)
    assert video.num_frames == 60
    assert [number_of(pixels) for pixels in video.read(np.arange(60))] == list(range(60))
    rng = np.random.default_rng(0)
    for worth_a_seek in (1, 16):
        monkeypatch.setattr(decoders, "_WORTH_A_SEEK", worth_a_seek)
        for _ in range(6):
            wanted = rng.integers(0, 60, 5)
            assert [number_of(pixels) for pixels in video.read(wanted)] == wanted.tolist()
    video.close()
    with open(path, "rb") as file:
        assert number_of(decoder(backend)(file.read()).read(np.array([47]))[0]) == 47


@pytest.mark.parametrize("rotation", [90, -90, 180])
@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_frames_are_upright(tmp_path, backend, rotation):
    path = encode(tmp_path / "x.mp4", 9, rotation=rotation)
    raw = frames_of(path)[[3, 8]]
    turned = np.rot90(raw, {90: 1, -90: -1, 180: 2}[rotation], axes=(1, 2))
    assert np.array_equal(decoder(backend)(path).read(np.array([3, 8])), turned)


@pytest.mark.parametrize("first_time", [-20, -6, 5])
def test_what_an_edit_list_cuts_away_is_not_counted(tmp_path, first_time):
    """As in clips cut without encoding again: the keyframe lies before the first frame shown."""
    path = encode(tmp_path / "x.mp4", 60, times=list(range(first_time, first_time + 60)),
                  container={"avoid_negative_ts": "disabled"})
    shown = list(range(max(0, -first_time), 60))
    assert [number_of(pixels) for pixels in frames_of(path)] == shown
    video = decoders.PyAV(path)
    assert video.num_frames == len(shown)
    assert [number_of(pixels) for pixels in video.read(np.arange(len(shown)))] == shown
    for number in (len(shown) - 1, 0, 3, 11, 21, 30):
        assert number_of(video.read(np.array([number]))[0]) == shown[number]


def test_a_clip_of_a_long_video_reads_a_small_part_of_it(tmp_path, monkeypatch):
    class Counted(io.BytesIO):
        num_read = 0

        def read(self, size=-1):
            data = super().read(size)
            Counted.num_read += len(data)
            return data

    # hard to compress, so that frames are most of the file
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "long.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 160, 160, "yuv420p", 10
        for _ in range(120):
            pixels = rng.integers(0, 255, (160, 160, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "long.mp4").read_bytes()
    monkeypatch.setattr(decoders.io, "BytesIO", Counted)
    decoders.PyAV(content).read(np.array([95, 99]))
    assert 0 < Counted.num_read < len(content) / 4


def test_a_missing_decoder_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ImportError, match=r'torchcodec: pip install "jepa_fast\[torchcodec\]"'):
        decoders.choose_decoder("torchcodec")
    assert decoders.choose_decoder("auto") is decoders.PyAV
    with monkeypatch.context() as older, pytest.raises(ImportError, match="version 17.1 or newer is needed, got 17.0.1"):
        older.setattr(av, "__version__", "17.0.1")
        decoders.choose_decoder("pyav")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'^videos need a decoder; pyav: pip install "jepa_fast\[video\]" .*torchcodec'):
        decoders.choose_decoder("auto")
    with pytest.raises(ValueError, match="^decoder must be auto, pyav or torchcodec, got 'decord'$"):
        decoders.choose_decoder("decord")


# ---- data sets


def test_folder_classes_and_clips(videos):
    folder = VideoFolder(videos, ClipSampling(num_frames=4, frame_step=2))
    assert len(folder) == 7 and folder.class_names == ["a", "b"] and folder.labels.tolist() == [0] * 4 + [1] * 3
    clip = folder.clip(1)                                   # a/02.mp4
    assert clip.shape == (3, 4, 48, 72) and clip.dtype == torch.uint8
    assert numbers_of(clip) == [100, 102, 105, 107]
    assert numbers_of(folder.clip(1, num_clips=2)) == [100, 102, 105, 107, 120, 122, 125, 127]
    drawn = {numbers_of(folder.clip(1, torch.Generator().manual_seed(seed)))[0] for seed in range(20)}
    assert min(drawn) >= 100 and max(drawn) < 140 - 8 and len(drawn) > 8
    assert numbers_of(VideoFolder(videos, ClipSampling(num_frames=4, fps=4)).clip(0)) == [0, 9, 18, 27]


def test_too_short_videos_are_filled_up_or_skipped(videos):
    fill = VideoFolder(videos, ClipSampling(num_frames=8, frame_step=4))
    assert numbers_of(fill.clip(0)) == [0, 5, 10, 15, 20, 25, 29, 29]       # 30 frames: 7 over [0, 30], then the last
    skip = VideoFolder(videos, ClipSampling(num_frames=8, frame_step=4, skip_short=True))
    with pytest.raises(BadFile, match=r"/a/00\.mp4: too short: 30 frames, a clip of 8 x 4 needs 32$"):
        skip.clip(0)
    with pytest.raises(BadFile, match=r"/a/00\.mp4: 30 frames per second are too few for fps = 60$"):
        VideoFolder(videos, ClipSampling(fps=60)).clip(0)


def damaged(path, kind: str):
    if kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    elif kind in ("truncated", "half"):
        encode(path, 60, container={"movflags": "faststart"})
        content = path.read_bytes()
        path.write_bytes(content[:-600] if kind == "truncated" else content[:len(content) // 2])
    elif kind == "cut header":
        encode(path, 60)
        path.write_bytes(path.read_bytes()[:-600])
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"no video " * 500}[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "audio", "truncated", "half", "cut header", "missing"])
def test_damaged_files_are_named(tmp_path, kind):
    damaged(tmp_path / "x.mp4", kind)
    (tmp_path / "list.csv").write_text("x.mp4 0\n")
    with pytest.raises(BadFile, match=r"/x\.mp4: \S.*$") as caught:
        VideoList([tmp_path / "list.csv"], sampling=ClipSampling(num_frames=15)).clip(0)
    assert "\n" not in str(caught.value)
    if kind == "audio":
        assert "no video in it" in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_files_are_skipped_and_counted(videos, tmp_path, num_workers):
    lines = [f"{path} 1" for path in sorted(videos.rglob("*.mp4"))]
    damaged(tmp_path / "bad.mp4", "truncated")
    (tmp_path / "list.csv").write_text("\n".join(["bad.mp4 7", *lines]))
    data = VideoList([tmp_path / "list.csv"], sampling=ClipSampling(num_frames=15, frame_step=2))
    batches = load_batches(data, SMALL, global_batch_size=8, num_steps=2, num_workers=num_workers)
    with pytest.warns(RuntimeWarning, match=r"skipped an unreadable file: /.*/bad\.mp4: \S"):
        batches = list(batches)
    assert [batch["num_bad_files"] for batch in batches] == [1, 1] and len(batches[0]["bad_files"]) == 1
    assert sorted(batches[0]["index"].tolist()) == [1, 1, 2, 3, 4, 5, 6, 7] and batches[0]["labels"].tolist() == [1] * 8
    damaged(tmp_path / "list", "empty")
    (tmp_path / "list.csv").write_text("bad.mp4 7\nlist 7\n")
    data = VideoList([tmp_path / "list.csv"], sampling=ClipSampling(num_frames=15, frame_step=2))
    with pytest.raises(ValueError, match="^2 of 2 files seen are not readable videos, more than the allowed 0.01 "), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        list(load_batches(data, SMALL, global_batch_size=1, num_steps=1, num_workers=num_workers))


def test_images_stand_still(tmp_path):
    pixels = frame(77, 72, 48)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.PNG")
    encode(tmp_path / "video.mp4")
    (tmp_path / "list.csv").write_text("photo.png 3\n")
    clip = VideoList([tmp_path / "list.csv"], sampling=ClipSampling(num_frames=4)).clip(0)
    assert torch.equal(clip, torch.from_numpy(pixels).permute(2, 0, 1)[:, None].expand(-1, 4, -1, -1))
    assert len(VideoFolder(tmp_path)) == 1
    folder = VideoFolder(tmp_path, ClipSampling(num_frames=1))
    assert len(folder) == 3 and [folder.clip(i).shape for i in range(3)] == [(3, 1, 48, 72)] * 3


def test_lists_as_the_official_code_reads_them(videos, tmp_path):
    (tmp_path / "x.csv").write_text(f"{videos}/a/00.mp4 5\n\nwith space.mp4\t2\n{videos}/b/01.mp4::-1\na,b.mp4,3\n")
    data = VideoList([tmp_path / "x.csv"])
    assert data.labels.tolist() == [5, 2, -1, 3] and data.class_names == ["0", "1", "2", "3", "4", "5"]
    assert [data.source(i)[0] for i in range(4)] == [f"{videos}/a/00.mp4", f"{tmp_path}/with space.mp4",
                                                    f"{videos}/b/01.mp4", f"{tmp_path}/a,b.mp4"]


def test_weights_draw_sources_with_replacement(videos, tmp_path):
    paths = [str(path) for path in sorted(videos.rglob("*.mp4"))]
    for name, chosen in (("x", paths[:1]), ("y", paths[1:])):
        (tmp_path / f"{name}.csv").write_text("".join(f"{path} 0\n" for path in chosen))
    data = VideoList([tmp_path / "x.csv", tmp_path / "y.csv"], (3.0, 1.0), ClipSampling(num_frames=2, frame_step=1))
    orders = torch.stack([data.order(generator_for(0, epoch)) for epoch in range(2000)])
    share = torch.bincount(orders.flatten(), minlength=7).double() / orders.numel()
    expected = torch.tensor([3 / 4] + [1 / 24] * 6)
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / orders.numel())
    # the same video drawn again in an epoch gives another clip; ranks and resumed runs still agree
    whole = list(load_batches(data, SMALL, global_batch_size=6, num_steps=3))
    epoch = whole[0]
    again = (epoch["index"] == 0).nonzero().flatten().tolist()
    assert len(again) > 2
    assert not any(torch.equal(epoch["clips"][again[0]], epoch["clips"][row]) for row in again[1:])
    resumed = list(load_batches(data, SMALL, global_batch_size=6, num_steps=3, start_step=2, rank=1, world_size=2))
    assert torch.equal(resumed[0]["clips"], whole[2]["clips"][3:])


@pytest.mark.parametrize("values", [[], [4], [3, 3, 3], [5, 1, 5, 5, 1, 2]])
def test_repeats_count_earlier_equals(values):
    expected = [values[:i].count(value) for i, value in enumerate(values)]
    assert loader._repeats(torch.tensor(values, dtype=torch.int64)).tolist() == expected


def shard(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_give_what_files_give(videos, tmp_path):
    paths = sorted(videos.rglob("*.mp4"))
    for s in range(3):
        shard(tmp_path / f"train-{s:03}.tar", {
            name: content for i, path in enumerate(paths[3 * s:3 * s + 3])
            for name, content in ((f"{s}{i}.mp4", path.read_bytes()),
                                  (f"{s}{i}.cls", str(i).encode()) if s else
                                  (f"{s}{i}.json", json.dumps({"label": i + 4, "text": "x"}).encode()))})
    sampling = ClipSampling(num_frames=4, frame_step=2)
    shards, folder = VideoShards([f"{tmp_path}/train-{{000..002}}.tar"], (), sampling), VideoFolder(videos, sampling)
    assert shards.labels.tolist() == [4, 5, 6, 0, 1, 2, 0] and len(shards.class_names) == 7
    for i in range(7):
        assert torch.equal(shards.clip(i, generator_for(i)), folder.clip(i, generator_for(i)))
    weighted = VideoShards([f"{tmp_path}/train-{{000..001}}.tar", f"{tmp_path}/train-002.tar"], (0.0, 1.0), sampling)
    assert weighted.sizes == (6, 1) and set(weighted.order(generator_for(0)).tolist()) == {6}
    alone, workers = (list(load_batches(VideoData(shards=(f"{tmp_path}/train-*.tar",)).build(), SMALL, num_steps=5,
                                        global_batch_size=3, num_workers=n)) for n in (0, 2))
    assert all(torch.equal(a["clips"], b["clips"]) for a, b in zip(alone, workers, strict=True))
    assert len(torch.cat([batch["index"] for batch in alone[:2]]).unique()) == 6


def test_an_epoch_reads_few_shards_at_a_time(tmp_path, monkeypatch):
    for s in range(6):
        shard(tmp_path / f"{s}.tar", {f"{i}.mp4": b"x" for i in range(4)})
    monkeypatch.setattr("jepa_fast.data.shards.SHUFFLE_SHARDS", 2)
    shards = VideoShards([f"{tmp_path}/*.tar"])
    orders = [shards.order(generator_for(seed)) for seed in range(30)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(24))
        assert [len(set(part.tolist())) for part in (order // 4).split(8)] == [2, 2, 2]
    assert len({tuple(order.tolist()) for order in orders}) == 30 and len({order[0].item() for order in orders}) > 10
    assert shards.labels.tolist() == [-1] * 24
    with pytest.raises(BadFile, match=r"/2\.tar/1\.mp4: "):
        shards.clip(9)


def test_shards_written_by_webdataset(videos, tmp_path):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    content = next(videos.rglob("00.mp4")).read_bytes()
    with wds.ShardWriter(f"{tmp_path}/v-%04d.tar", maxcount=2, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"clip/{i:05}", "mp4": content, "cls": i})
    shards = VideoShards([f"{tmp_path}/v-{{0000..0002}}.tar"], sampling=ClipSampling(num_frames=2))
    assert shards.labels.tolist() == list(range(5)) and shards.shard_sizes == [2, 2, 1]
    assert shards.source(4) == (f"{tmp_path}/v-0002.tar/clip/00004.mp4", content)


# ---- batches


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)])


def official_view(frames: np.ndarray, seed: int, sampling: ClipSampling, size: int):
    """One training view after the text of the paper's code: global generator, torchvision's crop, float32 clip."""
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(seed)
    clip_len = sampling.num_frames * sampling.frame_step
    end = int(torch.randint(clip_len, len(frames), (1,))) if len(frames) > clip_len else clip_len
    indices = np.linspace(end - clip_len, end, sampling.num_frames).clip(max=end - 1).astype(int)
    clip = torch.from_numpy(frames[indices]).permute(3, 0, 1, 2).float()
    top, left, h, w = transforms.RandomResizedCrop.get_params(clip[:, 0], (0.3, 1.0), (0.75, 1.35))
    view = F.interpolate(clip[..., top:top + h, left:left + w], size=(size, size), mode="bilinear", align_corners=False)
    if torch.rand(1).item() < 0.5:
        view = view.flip(-1)
    mean, std = (torch.tensor(values)[:, None, None, None] * 255
                 for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (view - mean) / std


def test_batches_are_official_crops_of_float_clips(videos):
    sampling = ClipSampling(num_frames=4, frame_step=3)
    data = VideoFolder(videos, sampling)
    batch = next(load_batches(data, SMALL, global_batch_size=7, seed=3))
    assert batch["clips"].shape == (7, 3, 4, 16, 16) and batch["clips"].dtype == torch.float32
    assert torch.equal(batch["labels"], data.labels[batch["index"]])
    for row, index in enumerate(batch["index"].tolist()):
        expected = official_view(frames_of(data.source(index)[0]), mix_seed(3, 0, index), sampling, 16)
        torch.testing.assert_close(batch["clips"][row], expected, rtol=0, atol=1e-5)
    raw = next(load_batches(data, SMALL, global_batch_size=7, seed=3, is_normalised=False))["clips"]
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (SMALL.mean, SMALL.std))
    torch.testing.assert_close((raw - mean) / std, batch["clips"], rtol=0, atol=1e-5)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("clips", "labels", "index"))


def test_workers_ranks_and_resuming_change_nothing(videos):
    data = VideoData(root=str(videos), num_frames=4, transform=SMALL, num_workers=0)
    run = dict(global_batch_size=4, seed=1, num_steps=4)
    dataset = data.build()
    alone = list(data.batches(dataset, **run))
    assert len(alone) == 4 and not same(alone[0], alone[1]) and steps_per_epoch(dataset, 4) == 1
    workers = dataclasses.replace(data, num_workers=2)
    assert all(same(a, b) for a, b in zip(alone, workers.batches(dataset, **run), strict=True))
    for rank in range(2):
        for whole, part in zip(alone, data.batches(dataset, rank=rank, world_size=2, **run), strict=True):
            rows = slice(2 * rank, 2 * rank + 2)
            assert same({key: whole[key][rows] for key in ("clips", "labels", "index")}, part)
    resumed = list(data.batches(dataset, start_step=2, **run))
    assert all(same(a, b) for a, b in zip(alone[2:], resumed, strict=True))
    assert not same(alone[0], next(data.batches(dataset, **run | dict(seed=2))))


def test_a_run_on_videos_resumes_bit_equal(videos, tmp_path):
    encoder = VideoTransformerConfig(image_size=64, num_frames=4, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    recipe = Recipe(
        name="tiny", paper="", summary="", objective=VideoPredictionConfig(
            encoder=encoder, predictor=VideoPredictorConfig(embed_dim=24, depth=1)),
        data=VideoData(root=str(videos), num_frames=4, transform=ClipTransform(image_size=64), num_workers=0),
        optim=OptimConfig(lr=WarmupCosine(start=1e-3, peak=1e-3, final=1e-3, warmup_epochs=1),
                          weight_decay=Constant(value=0.04)),
        train=TrainConfig(batch_size=3, epochs=2, precision="fp32", device="cpu", log_every=1, checkpoint_every=0.5))
    train(recipe, tmp_path / "whole")
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=2)), tmp_path / "parts")
    train(recipe, tmp_path / "parts", resume=True)
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts"))
    assert whole["step"] == 4 and whole["objective"].keys() == parts["objective"].keys()
    assert all(torch.equal(value, parts["objective"][name]) for name, value in whole["objective"].items())


def test_what_workers_run_can_be_pickled(videos):
    samples = loader._Samples(VideoFolder(videos, ClipSampling(num_frames=2)), SMALL, 0, 0.01)
    ours, theirs = samples[0, 1][0], pickle.loads(pickle.dumps(samples))[0, 1][0]
    assert torch.equal(ours.pixels, theirs.pixels) and ours[1:] == theirs[1:]


@pytest.mark.parametrize("shape", [(3, 4, 31, 17), (3, 2, 90, 160), (1, 1, 16, 16), (3, 4, 300, 8)])
def test_what_travels_is_bounded_and_exact(shape):
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator_for(0))
    whole = ClipTransform(image_size=16, scale=(1.0, 1.0), ratio=(0.01, 100.0), horizontal_flip=0.0)
    regions = [whole.cut(clip, generator_for(seed)) for seed in range(5)]
    regions.append(SMALL.cut(clip, generator_for(9)))
    packed = clip_transform.pack(regions)
    bound = 4 * shape[0] * shape[1] * 16 * 16
    assert packed["pixels"].numel() <= len(regions) * bound
    views, = clip_transform.unpack(packed, whole, torch.device("cpu"))
    for view, region in zip(views, regions, strict=True):
        if region.pixels.dtype == torch.uint8:
            assert region.pixels.numel() <= bound
            exact = F.interpolate(region.pixels.double(), size=(16, 16), mode="bilinear", align_corners=False)
            plain = F.interpolate(region.pixels.float(), size=(16, 16), mode="bilinear", align_corners=False)
            exact, plain = (x.flip(-1) if region.is_flipped else x for x in (exact, plain))
            assert (view - exact).abs().max() <= 2 * (plain - exact).abs().max()
    # the whole frame, crop and all: resized before or after the journey
    exact = F.interpolate(clip.double(), size=(16, 16), mode="bilinear", align_corners=False)
    plain = F.interpolate(clip.float(), size=(16, 16), mode="bilinear", align_corners=False)
    region = clip_transform._region(clip, (16, 16))
    assert (region.pixels.dtype == torch.float32) == (shape[-1] * shape[-2] > 4 * 16 * 16)
    assert (clip_transform.resize(region.pixels, (16, 16)) - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("size", [(50, 30), (30, 50)])
@pytest.mark.parametrize("num_clips, num_crops", [(8, 3), (2, 3), (1, 1), (3, 1)])
def test_evaluation_views(tmp_path, size, num_clips, num_crops):
    encode(tmp_path / "x.mp4", 70, size=size, gop=70)
    data = VideoFolder(tmp_path, ClipSampling(num_frames=4, frame_step=4))
    transform = EvalClipTransform(image_size=16, num_clips=num_clips, num_crops=num_crops)
    batch, = load_in_order(data, transform, batch_size=4, is_normalised=False)
    views = batch["clips"] if num_clips * num_crops > 1 else [batch["clips"]]
    assert len(views) == num_clips * num_crops and views[0].shape == (1, 3, 4, 16, 16)
    numbers = clip_indices(70, 4, 4, num_clips=num_clips, allow_overlap=True, generator=generator_for(0, 0, 0))
    frames = torch.from_numpy(frames_of(tmp_path / "x.mp4")).permute(3, 0, 1, 2).float() / 255
    short = 16 if num_crops > 1 else 18
    long = short * 50 // 30
    to = (long, short) if size[0] < size[1] else (short, long)
    resized = F.interpolate(frames, size=to, mode="bilinear", align_corners=False)
    starts = [round((long - 16) / 2)] if num_crops == 1 else [0, (long - 16) // 2, 2 * ((long - 16) // 2)]
    other = round((short - 16) / 2)
    for v, view in enumerate(views):
        start = starts[v % num_crops]
        top, left = (start, other) if size[0] < size[1] else (other, start)
        expected = resized[:, numbers[v // num_crops], top:top + 16, left:left + 16]
        torch.testing.assert_close(view[0], expected, rtol=0, atol=1e-5)


def test_synthetic_clips_are_left_as_they_are():
    data = SyntheticVideoData(num_videos=6, num_frames=4, image_size=32, transform=EvalClipTransform(
        image_size=32, resize_ratio=1.0, mean=(0.0,) * 3, std=(1 / 255,) * 3))
    dataset = data.build()
    batch = next(data.batches(dataset, global_batch_size=6))
    assert batch["clips"].shape == (6, 3, 4, 32, 32)
    expected = torch.stack([dataset.clip(i) for i in batch["index"].tolist()])
    torch.testing.assert_close(batch["clips"], expected.float(), rtol=0, atol=1e-4)
    assert torch.equal(dataset.clip(3), data.build().clip(3)) and not torch.equal(dataset.clip(3), dataset.clip(4))


# ---- what a user gets wrong


def bad(**change):
    return lambda path: VideoData(**{name: value(path) if callable(value) else value for name, value in change.items()})


@pytest.mark.parametrize("make, message", [
    (bad(), "one of data.root, data.csv and data.shards must say where the videos are, got none"),
    (bad(root="x", csv=("y",)), "one of data.root, .* got root and csv"),
    (bad(root="/no/such"), r"no such folder: /no/such; expected a folder tree of videos \(\.mp4, .*\)"),
    (bad(root=lambda p: f"{p}/empty"), r"no videos in .*/empty; expected a folder tree of videos \(.*\)"),
    (bad(root=lambda p: f"{p}/one.csv"), "not a folder: .*one.csv; expected a folder tree of videos .*"),
    (bad(root=lambda p: f"{p}", weights=(1.0,)), r"data.weights are for several lists or shards, got \(1.0,\) .*"),
    (bad(csv=("/no/such.csv",)), "no such file: /no/such.csv; expected lines of a path and a label"),
    (bad(csv=lambda p: (f"{p}/unlabelled.csv",)), ".*/unlabelled.csv, line 2: expected a path and an integer label, "
                                                  "got 'b.mp4'"),
    (bad(csv=lambda p: (f"{p}/none.csv",)), "no videos in .*none.csv; expected lines of a path and a label"),
    (bad(csv=lambda p: (f"{p}/one.csv",), weights=(0.5, 0.5)), "weights must be one number per source, got 2 for 1 "
                                                               "sources"),
    (bad(csv=lambda p: (f"{p}/one.csv",), weights=(-1.0,)), r"weights must be at least 0 and not all 0, got \(-1.0,\)"),
    (bad(csv=lambda p: (f"{p}/one.csv",), num_frames=0), "num_frames must be an integer of at least 1, got 0"),
    (bad(shards=lambda p: (f"{p}/v-{{0..3}}.tar",)), "no such shard: .*/v-0.tar"),
    (bad(shards=lambda p: (f"{p}/*.tar.gz",)), r"no such shard: .*/\*.tar.gz"),
    (bad(shards=lambda p: (f"{p}/one.csv",)), r".*/one.csv: expected an uncompressed tar file of videos \(.*\)"),
    (bad(shards=lambda p: (f"{p}/nothing.tar",)), "no videos in .*nothing.tar; expected members named .mp4, .*"),
    (bad(shards=lambda p: (f"{p}/label.tar",)), ".*label.tar/a.cls: expected an integer label, got b'cat'"),
    (bad(shards=("pipe:aws s3 cp s3://x -",)), "shards must be local or mounted files, got 'pipe:aws.*"),
    (bad(shards=("https://x/y.tar",)), "shards must be local or mounted files, got 'https://x/y.tar'")])
def test_one_clear_line(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.csv").write_text("a.mp4 0\n")
    (tmp_path / "none.csv").write_text("\n")
    (tmp_path / "unlabelled.csv").write_text("a.mp4 0\nb.mp4\n")
    shard(tmp_path / "nothing.tar", {"a.txt": b"x"})
    shard(tmp_path / "label.tar", {"a.mp4": b"x", "a.cls": b"cat"})
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}$"):
        make(tmp_path).build()


@pytest.mark.parametrize("make, message", [
    (lambda: ClipTransform(image_size=0), "image_size must be at least 1 pixel, got 0"),
    (lambda: ClipTransform(scale=(0.5, 1.5)), r"scale must be 0 < low <= high <= 1, got \(0.5, 1.5\)"),
    (lambda: ClipTransform(horizontal_flip=2), r"horizontal_flip must be a probability in \[0, 1\], got 2"),
    (lambda: EvalClipTransform(num_clips=0), "num_clips, num_crops and resize_ratio must be at least 1, got 0, 1 and .*"),
    (lambda: SyntheticVideoData(num_frames=0).build(), "num_frames must be at least 1, got 0")])
def test_transforms_name_bad_settings(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_batches_name_what_does_not_fit(videos):
    data = VideoFolder(videos)
    with pytest.raises(ValueError, match="^the data set must hold at least one global batch: 7 videos < "):
        load_batches(data, SMALL, global_batch_size=8)
    with pytest.raises(ValueError, match="^videos need a transform of their own, got IjepaTransform$"):
        load_batches(data, IjepaTransform(), global_batch_size=2)
    with pytest.raises(ValueError, match=r"^transform.mean must have one number per channel, got \(0.5,\) for in_chans"):
        load_batches(data, ClipTransform(mean=(0.5,), std=(1.0,)), global_batch_size=2)


def test_configuration_on_the_command_line():
    data = tyro.cli(VideoData, args=["--csv", "k710.csv", "ssv2.csv", "--weights", "0.335", "0.1", "--fps", "4",
                                     "--num-frames", "64", "--transform.image-size", "256", "--decoder", "pyav"])
    assert data == VideoData(csv=("k710.csv", "ssv2.csv"), weights=(0.335, 0.1), fps=4, num_frames=64, decoder="pyav",
                             transform=ClipTransform(image_size=256))
