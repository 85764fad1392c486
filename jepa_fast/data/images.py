"""Any folder tree of images as a data set.

A data set here is an object with `len()`, `image(i)` (PIL image, or uint8 tensor [C, H, W]), `labels` [len] int64
(-1: none), `class_names` and `in_chans`. Where files can be damaged, `image` raises `BadFile`; the loader skips those.
"""

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from .device_crops import DeviceMultiCrop, on_device
from .loader import BadFile, Prefetcher, load_batches
from .transforms import AsIs, EvalTransform, IjepaTransform, Transform

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB"}
# what a machine runs out of is no fault of the file
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class ImageFolder:
    """All images below `root`, sorted by path; the class of an image is the folder directly under `root` it lies in.

    Images directly in `root` have no class (label -1), beside classes or alone; a folder without images is no class.
    Names are matched without case (`EXTENSIONS`); those that start with a dot are left out. Links are followed, but
    each real folder is read once, under its own name where it lies below `root` itself. Only `image` opens files.
    Raises FileNotFoundError or ValueError where there is no such folder or no image in it.
    """

    def __init__(self, root: str | Path, in_chans: int = 3):
        check_in_chans(in_chans)
        self.root, self.in_chans = os.path.expanduser(root), in_chans
        expected = f"expected a folder tree of images ({', '.join(EXTENSIONS)})"
        if not os.path.exists(self.root):
            raise FileNotFoundError(f"no such folder: {printable(self.root)}; {expected}")
        if not os.path.isdir(self.root):
            raise ValueError(f"not a folder: {printable(self.root)}; {expected}")
        found = find_files(self.root, EXTENSIONS)
        if not found:
            raise ValueError(f"no images in {printable(self.root)}; {expected}")
        self.class_names = sorted({parts[0] for parts in found if len(parts) > 1})
        number = {name: label for label, name in enumerate(self.class_names)}
        self.labels = torch.tensor([number[parts[0]] if len(parts) > 1 else -1 for parts in found])
        # one block of bytes: millions of str objects would be copied into every worker by their reference counts
        names = [os.fsencode("/".join(parts)) for parts in found]
        self._names, self._ends = b"".join(names), np.cumsum([len(name) for name in names])

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self._names[start:self._ends[index]]))

    def image(self, index: int) -> Image.Image:
        """The image in mode RGB (in_chans = 3) or L (1); the first frame of several; orientation tags are ignored.

        Raises BadFile for a file that is missing, truncated or no image.
        """
        path = self.path(index)
        # Pillow raises nearly every kind of exception on damaged files
        try:
            with open(path, "rb") as file:
                return Image.open(file).convert(_MODES[self.in_chans])
        except Exception as error:
            raise bad_file(path, error) from None


def check_in_chans(in_chans: int) -> None:
    if in_chans not in _MODES:
        raise ValueError(f"in_chans must be 1 or 3, got {in_chans}")


def bad_file(path: str, error: Exception) -> Exception:
    """What to raise for an error met while a file was read: BadFile, or the error itself where no file is to blame."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _EXHAUSTED:
        return error
    return BadFile(f"{printable(path)}: {_reason(error)}")


def decode(name: str, content: bytes, in_chans: int) -> Image.Image:
    """The image in these bytes, as `ImageFolder.image` gives it; BadFile under that name where it cannot be read."""
    try:
        return Image.open(io.BytesIO(content)).convert(_MODES[in_chans])
    except Exception as error:
        raise bad_file(name, error) from None


def _reason(error: Exception) -> str:
    """One line; Pillow's own message for a non-image repeats the file object."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def printable(path: str) -> str:
    """The path with bytes that are no text written as escapes, on one line."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def find_files(root: str, extensions: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The path below `root` of every file with such a name, as its parts, sorted."""
    found, folders, links, visited = [], [()], [], set()
    while folders or links:
        if not folders:
            # links wait until all real folders are read, so that those keep their own names
            links.sort()
            folders.append(links.pop(0))
        parts = folders.pop()
        status = os.stat(os.path.join(root, *parts))
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, *parts)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and os.path.isdir(entry.path):
                    links.append((*parts, entry.name))
                elif entry.is_dir(follow_symlinks=False):
                    folders.append((*parts, entry.name))
                # a broken link is listed, to be reported when it is read
                elif entry.name.lower().endswith(extensions) and (entry.is_symlink() or entry.is_file()):
                    found.append((*parts, entry.name))
    return sorted(found)


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """What all sources of image files have in common: views, and the processes that make them."""

    in_chans: int = 3                                       # 3: RGB, 1: grayscale
    transform: Transform | DeviceMultiCrop = IjepaTransform()  # training views
    views_on: Literal["workers", "device"] = "workers"      # where they are made; the device makes DeviceMultiCrop's of them
    eval_transform: EvalTransform | AsIs = EvalTransform()  # for probes
    num_workers: int = 4                                    # loader processes per rank; 0: in the training process
    prefetch_factor: int = 2                                # batches that each of them has under way
    pin_memory: bool = True                                 # page-locked batches, for a GPU
    max_bad_fraction: float = 0.01                          # of the files seen; more unreadable ones are an error

    def batches(self, dataset, **run) -> Prefetcher:
        """Training batches; `run` as `load_batches` takes it."""
        transform = on_device(self.transform) if self.views_on == "device" else self.transform
        return load_batches(dataset, transform, num_workers=self.num_workers, prefetch_factor=self.prefetch_factor,
                            pin_memory=self.pin_memory, max_bad_fraction=self.max_bad_fraction, **run)


@dataclass(frozen=True, kw_only=True)
class ImageFolderData(ImageData):
    """A folder tree of images; see ImageFolder."""

    root: str = ""                                          # the folder

    def build(self) -> ImageFolder:
        if not self.root:
            raise ValueError("data.root is empty: pass --data.root FOLDER")
        return ImageFolder(self.root, self.in_chans)
