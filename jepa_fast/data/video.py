"""Videos as a data set: folder trees and lists of files; shards are in shards.py.

A data set of clips is an object with `len()`, `clip(i, generator, num_clips=1, allow_overlap=False)` -> uint8
[C, num_clips * T, H, W], the clips end to end, `labels` [len] int64 (-1: none), `class_names` and `in_chans`; without a
generator clips are the first ones of their parts of the video. `order(generator)`, where there is one, draws the places
of an epoch. Files that cannot be read, or are too short for what was asked, raise `BadFile`; the loader skips those.
"""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from . import images
from .clip_transform import ClipTransform, EvalClipTransform
from .clips import EVERY_FOURTH, ClipSampling
from .decoders import DecoderName, choose_decoder
from .images import bad_file, find_files, printable
from .loader import Prefetcher, load_batches

EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv")


def extensions_for(sampling: ClipSampling) -> tuple[str, ...]:
    """What to look for in folders and shards: clips of one frame are taken from images too."""
    return EXTENSIONS + (images.EXTENSIONS if sampling.num_frames == 1 else ())


class Videos:
    """What all data sets of video files share: clips of each, and sources drawn by weight.

    `sizes` are the lengths of the sources that lie one after the other in the data set. With `weights`, one per source,
    an epoch is as many draws with replacement: a source by weight, then one of its videos.
    """

    in_chans = 3

    def __init__(self, labels: Tensor, class_names: list[str], sizes: Sequence[int], weights: Sequence[float] = (),
                 sampling: ClipSampling = EVERY_FOURTH, decoder: DecoderName = "auto"):
        if weights and len(weights) != len(sizes):
            raise ValueError(f"weights must be one number per source, got {len(weights)} for {len(sizes)} sources")
        if weights and not (min(weights) >= 0 and sum(weights) > 0):
            raise ValueError(f"weights must be at least 0 and not all 0, got {tuple(weights)}")
        self.labels, self.class_names, self.sizes, self.weights = labels, class_names, tuple(sizes), tuple(weights)
        self.sampling, self.decoder = sampling, choose_decoder(decoder)

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> tuple[str, str | bytes]:
        """The name of a video, and what to open: a path, or the bytes of the file."""
        raise NotImplementedError

    def order(self, generator: Generator) -> Tensor:
        if not self.weights:
            return torch.randperm(len(self), generator=generator)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        which = torch.multinomial(weights, len(self), replacement=True, generator=generator)
        sizes = torch.tensor(self.sizes)
        starts = sizes.cumsum(0) - sizes
        draws = torch.rand(len(self), dtype=torch.float64, generator=generator)
        return starts[which] + (draws * sizes[which]).long()

    def clip(self, index: int, generator: Generator | None = None, *, num_clips: int = 1,
             allow_overlap: bool = False) -> Tensor:
        """uint8 [3, num_clips * num_frames, H, W]; an image is a video that stands still."""
        name, source = self.source(index)
        try:
            if name.lower().endswith(images.EXTENSIONS):
                return self._still(source, num_clips)
            video = self.decoder(source)
            try:
                numbers = self.sampling.indices(video.num_frames, video.average_fps, generator, num_clips=num_clips,
                                                allow_overlap=allow_overlap)
                frames = video.read(numbers.reshape(-1))
            finally:
                video.close()
        # FFmpeg's errors are OSError, ValueError and others, by their number
        except Exception as error:
            raise bad_file(name, error) from None
        return torch.from_numpy(frames).permute(3, 0, 1, 2)

    def _still(self, source: str | bytes, num_clips: int) -> Tensor:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
        return pixels.permute(2, 0, 1).unsqueeze(1).expand(-1, num_clips * self.sampling.num_frames, -1, -1)


class PathList:
    """A list of paths as one block of bytes: millions of str would be copied into every worker by their counts."""

    def __init__(self, paths: list[str]):
        encoded = [os.fsencode(path) for path in paths]
        self._bytes, self._ends = b"".join(encoded), np.cumsum([len(path) for path in encoded])

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"index must be in [0, {len(self._ends)}), got {index}")
        return os.fsdecode(self._bytes[self._ends[index - 1] if index else 0:self._ends[index]])


class VideoFolder(Videos):
    """All videos below `root`, sorted by path; the class is the folder directly under `root`, as for ImageFolder.

    Clips of one frame are taken from images too; otherwise images in the tree are left out.
    """

    def __init__(self, root: str | Path, sampling: ClipSampling = EVERY_FOURTH, decoder: DecoderName = "auto"):
        root = os.path.expanduser(root)
        extensions = extensions_for(sampling)
        expected = f"expected a folder tree of videos ({', '.join(extensions)})"
        if not os.path.exists(root):
            raise FileNotFoundError(f"no such folder: {printable(root)}; {expected}")
        if not os.path.isdir(root):
            raise ValueError(f"not a folder: {printable(root)}; {expected}")
        found = find_files(root, extensions)
        if not found:
            raise ValueError(f"no videos in {printable(root)}; {expected}")
        class_names = sorted({parts[0] for parts in found if len(parts) > 1})
        number = {name: label for label, name in enumerate(class_names)}
        labels = torch.tensor([number[parts[0]] if len(parts) > 1 else -1 for parts in found])
        super().__init__(labels, class_names, [len(found)], sampling=sampling, decoder=decoder)
        self._paths = PathList([os.path.join(root, *parts) for parts in found])

    def source(self, index: int) -> tuple[str, str]:
        return self._paths[index], self._paths[index]


class VideoList(Videos):
    """The videos and images that text files list, a path and an integer label per line, as the official code reads them.

    Between the two: a space, a tab, a comma or `::`. Relative paths are relative to the list's folder. Only `clip` opens
    the videos.
    """

    def __init__(self, files: Sequence[str | Path], weights: Sequence[float] = (), sampling: ClipSampling = EVERY_FOURTH,
                 decoder: DecoderName = "auto"):
        lists = [_read_list(os.path.expanduser(file)) for file in files]
        labels = torch.tensor([label for entries in lists for _, label in entries])
        class_names = [str(label) for label in range(max(0, int(labels.max()) + 1))]
        super().__init__(labels, class_names, [len(entries) for entries in lists], weights, sampling, decoder)
        self._paths = PathList([path for entries in lists for path, _ in entries])

    def source(self, index: int) -> tuple[str, str]:
        return self._paths[index], self._paths[index]


def _read_list(file: str) -> list[tuple[str, int]]:
    if not os.path.isfile(file):
        raise FileNotFoundError(f"no such file: {printable(file)}; expected lines of a path and a label")
    entries, folder = [], os.path.dirname(os.path.abspath(file))
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            match = re.fullmatch(r"(.*?\S)\s*(?:::|,|\s)\s*(-?\d+)", line.strip())
            if not match:
                raise ValueError(f"{printable(file)}, line {number}: expected a path and an integer label, "
                                 f"got {line.strip()[:200]!r}")
            entries.append((os.path.join(folder, match[1]), int(match[2])))
    if not entries:
        raise ValueError(f"no videos in {printable(file)}; expected lines of a path and a label")
    return entries


@dataclass(frozen=True, kw_only=True)
class VideoData:
    """Video files: a folder tree, lists or shards, one of the three; see VideoFolder, VideoList, VideoShards."""

    root: str = ""                                          # a folder tree of videos
    csv: tuple[str, ...] = ()                               # files with a path and a label per line
    shards: tuple[str, ...] = ()                            # WebDataset tar files: names, "{000..127}" or wildcards
    weights: tuple[float, ...] = ()                         # of each list or shard entry, drawn with replacement; (): all
    num_frames: int = 16                                    # per clip
    frame_step: int = 4                                     # frames of the video per sample
    fps: int | None = None                                  # samples per second instead (V-JEPA 2: 4)
    duration: float | None = None                           # seconds per clip instead
    skip_short: bool = False                                # leave out videos shorter than a clip
    decoder: DecoderName = "auto"                           # auto: PyAV, else torchcodec
    transform: ClipTransform = ClipTransform()              # training clips
    eval_transform: EvalClipTransform = EvalClipTransform()  # for probes
    num_workers: int = 8                                    # loader processes per rank; 0: in the training process
    prefetch_factor: int = 2                                # batches that each of them has under way
    pin_memory: bool = True                                 # page-locked batches, for a GPU
    max_bad_fraction: float = 0.01                          # of the files seen; more unreadable ones are an error

    def build(self) -> Videos:
        given = [name for name in ("root", "csv", "shards") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("one of data.root, data.csv and data.shards must say where the videos are, got "
                             f"{' and '.join(given) or 'none'}")
        if self.root and self.weights:
            raise ValueError(f"data.weights are for several lists or shards, got {self.weights} with data.root")
        sampling = ClipSampling(num_frames=self.num_frames, frame_step=self.frame_step, fps=self.fps,
                                duration=self.duration, skip_short=self.skip_short)
        if self.root:
            return VideoFolder(self.root, sampling, self.decoder)
        if self.csv:
            return VideoList(self.csv, self.weights, sampling, self.decoder)
        from .shards import VideoShards

        return VideoShards(self.shards, self.weights, sampling, self.decoder)

    def batches(self, dataset, **run) -> Prefetcher:
        """Training batches; `run` as `load_batches` takes it."""
        return load_batches(dataset, self.transform, num_workers=self.num_workers, prefetch_factor=self.prefetch_factor,
                            pin_memory=self.pin_memory, max_bad_fraction=self.max_bad_fraction, **run)
