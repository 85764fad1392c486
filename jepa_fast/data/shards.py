"""Videos in WebDataset shards: tar files whose members with one name before the first dot make a sample.

    000017.mp4  000017.cls (an integer)  or  000017.json ({"label": an integer})

The shards are indexed once, by reading their headers; a sample is then one read at a known place. So an epoch's order,
the slices of the ranks and a run that goes on at step n are the same functions of (seed, epoch, step) as for files, which
a stream through a shuffle buffer is not. The files must be local or mounted.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Generator, Tensor

from .clips import EVERY_FOURTH, ClipSampling
from .decoders import DecoderName
from .images import printable
from .video import PathList, Videos, extensions_for

# shards whose samples are mixed; an epoch reads all of these before it opens others
SHUFFLE_SHARDS = 16


class VideoShards(Videos):
    """The samples of tar files, in the order of their names and members.

    `shards`: names, each perhaps with numeric ranges ("train-{000..127}.tar") or wildcards; with `weights`, one weight
    each. Without weights an epoch takes the shards in random order, SHUFFLE_SHARDS at a time, mixed among themselves.
    """

    def __init__(self, shards: Sequence[str], weights: Sequence[float] = (), sampling: ClipSampling = EVERY_FOURTH,
                 decoder: DecoderName = "auto"):
        self.files, names, labels, places, sizes, self.shard_sizes = [], [], [], [], [], []
        patterns = [_expand(os.path.expanduser(pattern)) for pattern in shards]
        # threads: on a network file system this is waiting
        with ThreadPoolExecutor(16) as pool:
            indices = pool.map(partial(_index, extensions=extensions_for(sampling)), chain.from_iterable(patterns))
            for files in patterns:
                before = len(names)
                for file, samples in zip(files, indices, strict=False):
                    names += [name for name, _, _, _ in samples]
                    labels += [label for _, label, _, _ in samples]
                    places += [(len(self.files), start, size) for _, _, start, size in samples]
                    self.shard_sizes.append(len(samples))
                    self.files.append(file)
                sizes.append(len(names) - before)
        # which file, first byte, number of bytes
        self._places = np.array(places, dtype=np.int64)
        self._names = PathList(names)
        class_names = [str(label) for label in range(max(labels) + 1)]
        super().__init__(torch.tensor(labels), class_names, sizes, weights, sampling, decoder)

    def source(self, index: int) -> tuple[str, bytes]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        shard, start, size = self._places[index].tolist()
        with open(self.files[shard], "rb") as file:
            file.seek(start)
            return f"{self.files[shard]}/{self._names[index]}", file.read(size)

    def order(self, generator: Generator) -> Tensor:
        if self.weights:
            return super().order(generator)
        ends = np.cumsum(self.shard_sizes).tolist()
        shards = torch.randperm(len(self.files), generator=generator).tolist()
        parts = []
        for first in range(0, len(shards), SHUFFLE_SHARDS):
            group = torch.cat([torch.arange(ends[shard] - self.shard_sizes[shard], ends[shard])
                               for shard in shards[first:first + SHUFFLE_SHARDS]])
            parts.append(group[torch.randperm(len(group), generator=generator)])
        return torch.cat(parts)


def _expand(pattern: str) -> list[str]:
    """The files of a pattern, sorted by name; ValueError or FileNotFoundError where one is missing."""
    if re.match(r"(pipe|[a-z][a-z0-9+]+)://?|pipe:", pattern):
        raise ValueError(f"shards must be local or mounted files, got {pattern!r}")
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span:
        width, (first, last) = len(span[1]), (int(span[1]), int(span[2]))
        return [file for number in range(first, last + 1)
                for file in _expand(f"{pattern[:span.start()]}{number:0{width}d}{pattern[span.end():]}")]
    files = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        raise FileNotFoundError(f"no such shard: {printable(missing[0] if missing else pattern)}")
    return files


def _index(file: str, extensions: tuple[str, ...]) -> list[tuple[str, int, int, int]]:
    """(name, label, first byte, number of bytes) of each video in a shard."""
    videos, labels = {}, {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key = os.path.join(folder, stem)
                if f".{extension.lower()}" in extensions:
                    videos[key] = (member.name, member.offset_data, member.size)
                elif extension in ("cls", "json"):
                    labels[key] = _label(tar.extractfile(member).read(), extension, f"{file}/{member.name}")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{printable(file)}: expected an uncompressed tar file of videos ({error})") from None
    if not videos:
        raise ValueError(f"no videos in {printable(file)}; expected members named {', '.join(extensions)}")
    return [(name, labels.get(key, -1), start, size) for key, (name, start, size) in videos.items()]


def _label(content: bytes, extension: str, name: str) -> int:
    try:
        value = int(content) if extension == "cls" else json.loads(content).get("label", -1)
        if isinstance(value, int):
            return value
    except (ValueError, AttributeError):
        value = content[:80]
    raise ValueError(f"{printable(name)}: expected an integer label, got {value!r}")
