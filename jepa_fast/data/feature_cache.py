"""Features of every frame of a data set of trajectories, computed once: exact where crops are not random.

    jepa-fast cache vjepa2_ac_vitg --to FOLDER --data.root ...
    jepa-fast train vjepa2_ac_vitg --data.features FOLDER --data.root ...

A folder with `features.npy` [frames of all files, n, D], memory-mapped when read, and `cache.json`: where each file begins,
and what the features depend on. A cache that does not fit the data set's files or crop is refused here, one of another
encoder by the objective.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .images import printable
from .loader import BadFile
from .trajectories import Trajectories

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FeatureCache:
    def __init__(self, folder: Path, about: dict):
        self.folder, self.encoder, self.ends = folder, about["encoder"], about["ends"]
        self.dtype = _DTYPES[about["dtype"]]
        self._array: np.ndarray | None = None

    @staticmethod
    @torch.no_grad()
    def write(folder: str | Path, dataset: Trajectories, encode: Callable[[Tensor], Tensor], *, encoder: str,
              device: torch.device | str = "cpu", dtype: str = "float32", batch_size: int = 64) -> "FeatureCache":
        """encode: clips [1, 3, T, S, S] -> tokens [1, T, n, D], every frame alone; `batch_size` frames at a time.

        dtype "bfloat16" halves the file and rounds the features. A damaged file takes no room and is skipped in training.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cache.json").unlink(missing_ok=True)
        ends = np.cumsum([_length(dataset, index) for index in range(len(dataset.paths))]).tolist()
        array = None
        for index, end in enumerate(tqdm(ends, desc="features", unit="file", disable=None)):
            start = ends[index - 1] if index else 0
            frames = dataset.frames(index).to(device) if end > start else []
            for first in range(0, len(frames), batch_size):
                clip = dataset.crop.finish(frames[first:first + batch_size]).transpose(0, 1).unsqueeze(0)
                tokens = encode(clip)[0].to(_DTYPES[dtype]).cpu()
                if array is None:
                    array = np.lib.format.open_memmap(folder / "features.npy", "w+", _stored(tokens).dtype,
                                                      (ends[-1], *tokens.shape[1:]))
                array[start + first:start + first + len(tokens)] = _stored(tokens)
        if array is None:
            raise ValueError(f"no readable trajectory in {printable(str(dataset.root))}")
        array.flush()
        about = {"encoder": encoder, "data": _data_key(dataset), "dtype": dtype, "ends": ends}
        # last, and at once: a cache without it is not finished
        temporary = folder / ".cache.json.tmp"
        temporary.write_text(json.dumps(about))
        os.replace(temporary, folder / "cache.json")
        return FeatureCache(folder, about)

    @staticmethod
    def open(folder: str | Path, dataset: Trajectories) -> "FeatureCache":
        """ValueError where the folder holds no finished cache, or one of other files or another crop."""
        path = Path(folder) / "cache.json"
        if not path.is_file():
            raise ValueError(f"no finished feature cache in {printable(str(folder))}: write it with jepa-fast cache")
        about, expected = json.loads(path.read_text()), _data_key(dataset)
        for what, value in expected.items():
            if about["data"].get(what) != value:
                raise ValueError(f"the feature cache in {printable(str(folder))} is of other data: {what} is "
                                 f"{about['data'].get(what)} there and {value} here; write it again")
        return FeatureCache(Path(folder), about)

    def rows(self, index: int, frames: slice) -> Tensor:
        """Features [T, n, D] of frames `frames` of file `index`."""
        start, end = self.ends[index - 1] if index else 0, self.ends[index]
        if (frames.stop or 0) > end - start:
            raise BadFile(f"file {index} has {end - start} frames in the feature cache, not {frames.stop}")
        if self._array is None:  # in the process that reads
            self._array = np.load(self.folder / "features.npy", mmap_mode="r")
        part = np.array(self._array[start + (frames.start or 0):start + frames.stop:frames.step or 1])
        return torch.from_numpy(part).view(self.dtype).float() if self.dtype == torch.bfloat16 else torch.from_numpy(part)


def _stored(tokens: Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits as int16."""
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).contiguous().numpy()


def _length(dataset: Trajectories, index: int) -> int:
    try:
        return dataset.length(index)
    except BadFile:
        return 0


def _data_key(dataset: Trajectories) -> dict:
    """What the features depend on besides the encoder: the crop, and which files there are and how large."""
    files = hashlib.sha256()
    for path in dataset.paths:
        files.update(f"{path.relative_to(dataset.root)} {path.stat().st_size};".encode(errors="surrogateescape"))
    crop = json.loads(json.dumps(dataclasses.asdict(dataset.crop)))
    return {"crop": crop, "files": files.hexdigest()[:16]}
