"""Videos and images in WebDataset shards: tar files whose members with one name before the first dot make a sample.

    000017.mp4  000017.cls (an integer)  or  000017.json ({"label": an integer})
    000018.jpg  000018.cls

The shards are indexed once, by reading their headers; a sample is then one read at a known place. So an epoch's order,
the slices of the ranks and a run that goes on at step n are the same functions of (seed, epoch, step) as for files, which
a stream through a shuffle buffer is not. The files must be local or mounted.
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from .clips import EVERY_FOURTH, ClipSampling
from .decoders import DecoderName
from .images import ImageData, bad_file, check_in_chans, decode, printable
from .video import PathList, Videos, extensions_for

# shards whose samples are mixed; an epoch reads all of these before it opens others
SHUFFLE_SHARDS = 16
_BLOCK = 512  # bytes
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class Shards:
    """The samples of tar files that have a member with one of the extensions, in the order of their names and members.

    `patterns`: names, each perhaps with numeric ranges ("train-{000..127}.tar") or wildcards. `sizes` are the samples of
    each pattern, `shard_sizes` those of each file.
    """

    def __init__(self, patterns: Sequence[str], extensions: tuple[str, ...], noun: str):
        self.files, names, labels, places, self.sizes, self.shard_sizes = [], [], [], [], [], []
        expanded = [_expand(os.path.expanduser(pattern)) for pattern in patterns]
        # threads: on a network file system this is waiting
        with ThreadPoolExecutor(16) as pool:
            indices = pool.map(partial(_index, extensions=extensions, noun=noun), chain.from_iterable(expanded))
            for files in expanded:
                before = len(names)
                for file, samples in zip(files, indices, strict=False):
                    names += [name for name, _, _, _ in samples]
                    labels += [label for _, label, _, _ in samples]
                    places += [(len(self.files), start, size) for _, _, start, size in samples]
                    self.shard_sizes.append(len(samples))
                    self.files.append(file)
                self.sizes.append(len(names) - before)
        # which file, first byte, number of bytes
        self._places = np.array(places, dtype=np.int64)
        self._names = PathList(names)
        self.labels = torch.tensor(labels)
        self.class_names = [str(label) for label in range(max(labels) + 1)]

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        return f"{self.files[self._places[index, 0]]}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        shard, start, size = self._places[index].tolist()
        with open(self.files[shard], "rb") as file:
            file.seek(start)
            return file.read(size)

    def order(self, generator: Generator) -> Tensor:
        """The shards in random order, SHUFFLE_SHARDS at a time, their samples mixed among themselves."""
        ends = np.cumsum(self.shard_sizes).tolist()
        shards = torch.randperm(len(self.files), generator=generator).tolist()
        parts = []
        for first in range(0, len(shards), SHUFFLE_SHARDS):
            group = torch.cat([torch.arange(ends[shard] - self.shard_sizes[shard], ends[shard])
                               for shard in shards[first:first + SHUFFLE_SHARDS]])
            parts.append(group[torch.randperm(len(group), generator=generator)])
        return torch.cat(parts)


class VideoShards(Videos):
    """The videos of tar files; with `weights`, one for each entry of `shards`, drawn with replacement, else see `Shards`."""

    def __init__(self, shards: Sequence[str], weights: Sequence[float] = (), sampling: ClipSampling = EVERY_FOURTH,
                 decoder: DecoderName = "auto"):
        self.shards = Shards(shards, extensions_for(sampling), "videos")
        super().__init__(self.shards.labels, self.shards.class_names, self.shards.sizes, weights, sampling, decoder)

    @property
    def shard_sizes(self) -> list[int]:
        return self.shards.shard_sizes

    def source(self, index: int) -> tuple[str, bytes]:
        return self.shards.name(index), self.shards.read(index)

    def order(self, generator: Generator) -> Tensor:
        return super().order(generator) if self.weights else self.shards.order(generator)


class ImageShards:
    """The images of tar files (jpg, png, webp), as `ImageFolder` gives those of a folder."""

    def __init__(self, shards: Sequence[str], in_chans: int = 3):
        check_in_chans(in_chans)
        self.shards, self.in_chans = Shards(shards, IMAGE_EXTENSIONS, "images"), in_chans
        self.labels, self.class_names = self.shards.labels, self.shards.class_names

    def __len__(self) -> int:
        return len(self.shards)

    def image(self, index: int) -> Image.Image:
        """Raises BadFile for a member that is no image, or a shard that has gone."""
        name = self.shards.name(index)
        try:
            content = self.shards.read(index)
        except OSError as error:
            raise bad_file(name, error) from None
        return decode(name, content, self.in_chans)

    def order(self, generator: Generator) -> Tensor:
        return self.shards.order(generator)


@dataclass(frozen=True, kw_only=True)
class ImageShardsData(ImageData):
    """Images in WebDataset shards; see ImageShards."""

    shards: tuple[str, ...] = ()                            # tar files: names, "{000..127}" or wildcards

    def build(self) -> ImageShards:
        if not self.shards:
            raise ValueError("data.shards is empty: pass --data.shards 'train-{000..127}.tar'")
        return ImageShards(self.shards, self.in_chans)


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


def _index(file: str, extensions: tuple[str, ...], noun: str) -> list[tuple[str, int, int, int]]:
    """(name, label, first byte, number of bytes) of each sample in a shard."""
    found, labels = {}, {}
    with open(file, "rb", buffering=0) as tar:
        try:
            members = list(_members(tar.fileno()))
        except _NotTar as error:
            raise ValueError(f"{printable(file)}: expected an uncompressed tar file of {noun} ({error})") from None
        for name, start, size in members:
            folder, last = os.path.split(name)
            stem, _, extension = last.partition(".")
            key = os.path.join(folder, stem)
            if f".{extension.lower()}" in extensions:
                if key in found:
                    raise ValueError(f"{printable(file)}: expected one {noun[:-1]} per sample, got "
                                     f"{printable(found[key][0])} and {printable(name)}")
                found[key] = (name, start, size)
            elif extension in ("cls", "json"):
                label = _label(os.pread(tar.fileno(), size, start), extension, f"{file}/{name}")
                # a json of captions beside a cls says nothing of the label
                labels[key] = label if label != -1 else labels.get(key, -1)
    if not found:
        raise ValueError(f"no {noun} in {printable(file)}; expected members named {', '.join(extensions)}")
    return [(name, labels.get(key, -1), start, size) for key, (name, start, size) in found.items()]


class _NotTar(ValueError):
    pass


def _members(fd: int) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, number of bytes) of each regular file of a ustar, GNU or pax archive; only headers are read.

    What tarfile finds, an order of magnitude faster: a data set has millions. Reads wait outside of the GIL.
    """
    offset, end, special = 0, os.fstat(fd).st_size, {}
    while offset < end:
        header = os.pread(fd, _BLOCK, offset)
        if not header[0]:  # zeros end an archive
            return
        if len(header) < _BLOCK or (offset == 0 and _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32):
            raise _NotTar(f"no header at byte {offset}")
        kind, size = header[156:157], int(special.get("size", 0)) or _number(header[124:136])
        start = offset + _BLOCK
        offset = start + -(-size // _BLOCK) * _BLOCK
        if start + size > end:
            raise _NotTar(f"it ends within the member at byte {start}")
        if kind == b"x":
            special |= _pax_records(os.pread(fd, size, start))
        elif kind == b"L":  # GNU: the name of the next member
            special["path"] = os.fsdecode(os.pread(fd, size, start).rstrip(b"\0"))
        elif kind not in b"gK":
            name = header[:100].partition(b"\0")[0]
            folder = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
            name = special.get("path") or os.fsdecode(folder + b"/" + name if folder else name)
            if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                yield name, start, size
            special = {}


def _number(field: bytes) -> int:
    """Octal digits, or where those do not suffice a binary number."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _NotTar(f"no number in a header: {field!r}") from None


def _pax_records(content: bytes) -> dict[str, str]:
    """"18 path=a/b.jpeg\n" and so on."""
    records = {}
    while content:
        length = content.partition(b" ")[0]
        if not length.isdigit() or not len(length) < int(length) <= len(content):
            raise _NotTar(f"no pax record: {content[:40]!r}")
        key, _, value = content[len(length) + 1:int(length) - 1].partition(b"=")
        records[os.fsdecode(key)] = os.fsdecode(value)
        content = content[int(length):]
    return records


def _label(content: bytes, extension: str, name: str) -> int:
    try:
        value = int(content) if extension == "cls" else json.loads(content).get("label", -1)
        if isinstance(value, int):
            return value
    except (ValueError, AttributeError):
        value = content[:80]
    raise ValueError(f"{printable(name)}: expected an integer label, got {value!r}")
