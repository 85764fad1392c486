"""Trajectories of a robot on disk: one file each, with frames and the hand's poses.

Files are `.npz` or `.safetensors`, anywhere below one folder, with the arrays

    frames   uint8 [T, H, W, 3]
    states   [T, 7]: position (3), extrinsic xyz Euler angles (3, radians), gripper (see poses.py)
    actions  [T - 1, 7], optional, used where `actions` is "file"
    fps      [] or [1], optional: frames per second

A clip is `num_frames` frames, ceil(fps of the file / fps) apart, from a window drawn at random, cut in the middle. Actions
are the differences of the states of its frames. From a `.safetensors` file only the window is read.
V-JEPA 2-AC, arXiv:2506.09985, appendix; facebookresearch/vjepa2, app/vjepa_droid.
"""

import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from .images import printable
from .loader import BadFile
from .pixels import normalise
from .poses import pose_difference
from .transforms import IMAGENET_MEAN, IMAGENET_STD

STATE_DIM = 7
EXTENSIONS = (".npz", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """The middle of a frame at an aspect ratio in `ratio`, squashed to a square; the same for all frames of one size.

    Officially a random crop of 1.777 times the frame's area is tried, which never fits, so this is what is left.
    """

    image_size: int = 256                                   # pixels
    ratio: tuple[float, float] = (0.75, 1.35)               # width / height of the crop, nearest to the frame's
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        if self.image_size < 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"image_size must be at least 1 and ratio rise from above 0, got {self}")

    def box(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the crop."""
        low, high = self.ratio
        h = round(width / low) if width / height < low else height
        w = round(height * high) if width / height > high else width
        top, left = (height - h) // 2, (width - w) // 2
        return slice(top, top + h), slice(left, left + w)

    def finish(self, frames: Tensor) -> Tensor:
        """Cut frames [T, h, w, 3] uint8 -> [T, 3, S, S] float32, resized bilinearly without antialiasing, normalised."""
        pixels = frames.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(values, device=frames.device)[:, None, None] for values in (self.mean, self.std))
        return normalise(pixels / 255, mean, std)


class Trajectories:
    """Files below `root`, sorted by path.

    Raises ValueError where a folder holds no trajectory or a file has arrays of the wrong width; BadFile, which the loader
    skips, for a file that is damaged or too short.
    """

    in_chans = 3

    def __init__(self, root: str | Path, *, num_frames: int = 8, fps: float = 4.0, source_fps: float | None = None,
                 actions: str = "states", crop: CentreCrop | None = None):
        self.root = Path(os.path.expanduser(root))
        if not self.root.is_dir():
            raise ValueError(f"no such folder: {printable(str(self.root))}")
        self.paths = sorted(path for path in self.root.rglob("*") if path.suffix in EXTENSIONS and path.name[0] != ".")
        if not self.paths:
            raise ValueError(f"no trajectories in {printable(str(self.root))}; expected {' or '.join(EXTENSIONS)} files")
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if not fps > 0 or (source_fps is not None and not source_fps > 0):
            raise ValueError(f"fps and source_fps must be above 0, got {fps} and {source_fps}")
        if actions not in ("states", "file"):
            raise ValueError(f"actions must be states or file, got {actions!r}")
        self.num_frames, self.fps, self.source_fps = num_frames, fps, source_fps
        self.actions, self.crop = actions, crop or CentreCrop()

    def __len__(self) -> int:
        return len(self.paths)

    def clip(self, index: int, generator: torch.Generator, features=None) -> dict[str, Tensor]:
        """A random clip of file `index`: states [T, 7], actions [T - 1, 7] float32, frames [T, h, w, 3] uint8, cut; or
        "features" [T, n, D] where features(index, slice of frames) is given."""
        with self._open(index) as file:
            length, step = self.length(index, file), self._step(index, file)
            needed = self.num_frames * step
            if length < needed:
                raise BadFile(f"{self._name(index)}: {length} frames, but a clip of {self.num_frames}, {step} apart, needs "
                              f"{needed}")
            # officially the window never ends with the last frame, and a file of just `needed` frames is drawn again
            start = int(torch.randint(0, max(1, length - needed), (1,), generator=generator))
            window = slice(start, start + needed, step)
            states = torch.from_numpy(np.asarray(file.read("states", window), dtype=np.float64))
            sample = {"states": states.float(), "actions": self._actions(index, file, states, window, step)}
            if features is not None:
                return sample | {"features": features(index, window)}
            return sample | {"frames": self.cut(file.read("frames", window))}

    def frames(self, index: int) -> Tensor:
        """All frames of file `index` [T, h, w, 3] uint8, cut."""
        with self._open(index) as file:
            self.length(index, file)
            return self.cut(file.read("frames", slice(None)))

    def cut(self, frames: np.ndarray) -> Tensor:
        rows, columns = self.crop.box(*frames.shape[1:3])
        return torch.from_numpy(np.ascontiguousarray(frames[:, rows, columns]))

    def length(self, index: int, file: "_File | None" = None) -> int:
        """Frames of file `index`; ValueError for arrays of the wrong width, BadFile where they do not fit together."""
        if file is None:
            with self._open(index) as opened:
                return self.length(index, opened)
        name, shapes = self._name(index), {}
        for key, shape, tail in (("frames", "[T, H, W, 3] uint8", (3,)), ("states", f"[T, {STATE_DIM}]", (STATE_DIM,))):
            shapes[key], dtype = file.shape(key)
            if len(shapes[key]) != (4 if key == "frames" else 2) or shapes[key][-1:] != tail or \
                    (key == "frames" and dtype != "uint8"):
                raise ValueError(f"{name}: {key} must be {shape}, got {list(shapes[key])} {dtype}")
        if shapes["frames"][0] != shapes["states"][0]:
            raise BadFile(f"{name}: {shapes['frames'][0]} frames but {shapes['states'][0]} states")
        return shapes["frames"][0]

    def _step(self, index: int, file: "_File") -> int:
        fps = self.source_fps
        if fps is None:
            if "fps" not in file.keys:
                raise ValueError(f"{self._name(index)} has no array fps: store it, or set data.source_fps")
            fps = float(np.asarray(file.read("fps")).reshape(-1)[0])
            if not (math.isfinite(fps) and fps > 0):
                raise BadFile(f"{self._name(index)}: fps must be above 0, got {fps}")
        return math.ceil(fps / self.fps)

    def _actions(self, index: int, file: "_File", states: Tensor, window: slice, step: int) -> Tensor:
        if self.actions == "states":
            return pose_difference(states[:-1], states[1:]).float()
        if step != 1:
            raise ValueError(f"{self._name(index)}: actions of the file are between its own frames, but clips take every "
                             f"{step}th: set data.actions states, or data.fps to the file's")
        shape, _ = file.shape("actions")
        if len(shape) != 2 or shape[1] != STATE_DIM:
            raise ValueError(f"{self._name(index)}: actions must be [T - 1, {STATE_DIM}], got {list(shape)}")
        actions = np.asarray(file.read("actions", slice(window.start, window.stop - 1)), dtype=np.float32)
        if len(actions) != self.num_frames - 1:
            raise BadFile(f"{self._name(index)}: actions end before frame {window.stop - 1}")
        return torch.from_numpy(actions)

    def _name(self, index: int) -> str:
        return printable(str(self.paths[index]))

    def _open(self, index: int) -> "_File":
        return _File(self.paths[index])


class _File:
    """One file, opened for reading; what is wrong with it becomes a BadFile that names it."""

    _DAMAGE = (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError)

    def __init__(self, path: Path):
        self.path, self.arrays = path, {}

    def __enter__(self) -> "_File":
        is_npz = self.path.suffix == ".npz"
        self.file = self._try(lambda: np.load(self.path, allow_pickle=False) if is_npz
                              else safe_open(self.path, framework="numpy").__enter__())
        if is_npz and not isinstance(self.file, np.lib.npyio.NpzFile):
            raise BadFile(f"{printable(str(self.path))}: not a .npz file")
        self.keys = set(self.file.keys())
        return self

    def __exit__(self, *error) -> None:
        if self.path.suffix == ".npz":
            self.file.close()
        else:
            self.file.__exit__(*error)

    def shape(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype; reads the header only."""
        if self.path.suffix == ".npz":
            return self._try(lambda: _npy_header(self.file.zip, key))
        part = self._try(lambda: self.file.get_slice(key))
        return tuple(part.get_shape()), {"U8": "uint8"}.get(part.get_dtype(), part.get_dtype())

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        if self.path.suffix == ".npz":
            return self._array(key) if rows is None else self._array(key)[rows]
        if rows is None:
            return self._try(lambda: self.file.get_tensor(key))
        part = self._try(lambda: self.file.get_slice(key))
        return self._try(lambda: part[rows.start or 0:rows.stop or part.get_shape()[0]])[::rows.step or 1]

    def _array(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            self.arrays[key] = self._try(lambda: self.file[key])
        return self.arrays[key]

    def _try(self, read):
        try:
            return read()
        except (*self._DAMAGE, ValueError) as error:
            raise BadFile(f"{printable(str(self.path))}: {' '.join(str(error).split())}") from None


def _npy_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], str]:
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, str(dtype)
