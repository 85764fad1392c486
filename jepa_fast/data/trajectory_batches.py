"""Training batches of trajectories, from frames or from cached features of a frozen encoder.

    {"clips": [B, 3, T, S, S], or "features": [B, T, n, D] and "encoder": whose they are,
     "actions": [B, T - 1, 7],  "states": [B, T, 7],  "index": int64 [B]: the file's place,  "bad_files", "num_bad_files"}

Files come in one permutation after the other, drawn from (seed, number of the permutation); a clip's window is drawn from
(seed, number of the permutation, file). Both are functions of the place in the run, so any number of ranks and workers,
and a run resumed at any step, see the same clips.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .feature_cache import FeatureCache
from .loader import BadFile, BadFiles, Batch, Prefetcher
from .poses import pose_difference
from .seeds import generator_for
from .trajectories import STATE_DIM, CentreCrop, Trajectories


@dataclass(frozen=True, kw_only=True)
class TrajectoryData:
    """Trajectories in `.npz` or `.safetensors` files; see Trajectories."""

    root: str = ""                                  # the folder
    num_frames: int = 8                             # of a clip
    fps: float = 4.0                                # of a clip
    source_fps: float | None = None                 # of the files; None: their array fps
    actions: Literal["states", "file"] = "states"   # differences of states, or as stored between neighbouring frames
    crop: CentreCrop = CentreCrop()
    features: str = ""                              # folder of a feature cache: frames are not read
    num_workers: int = 4                            # loader processes per rank; 0: in the training process
    prefetch_factor: int = 2                        # batches that each of them has under way
    pin_memory: bool = True                         # page-locked batches, for a GPU
    max_bad_fraction: float = 0.01                  # of the files seen; more unreadable ones are an error

    def build(self) -> Trajectories:
        if not self.root:
            raise ValueError("data.root is empty: pass --data.root FOLDER")
        return Trajectories(self.root, num_frames=self.num_frames, fps=self.fps, source_fps=self.source_fps,
                            actions=self.actions, crop=self.crop)

    def batches(self, dataset: Trajectories, *, global_batch_size: int, seed: int = 0, start_step: int = 0,
                num_steps: int | None = None, rank: int = 0, world_size: int = 1,
                device: torch.device | str = "cpu") -> Prefetcher:
        """Batches of one rank for the steps from `start_step` to `num_steps` (None: endless)."""
        if global_batch_size < 1 or world_size < 1 or global_batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError("global_batch_size must be a positive multiple of world_size, and rank below it, got "
                             f"{global_batch_size}, {world_size} and {rank}")
        if start_step < 0 or self.num_workers < 0:
            raise ValueError(f"start_step and num_workers must be at least 0, got {start_step} and {self.num_workers}")
        cache = FeatureCache.open(self.features, dataset) if self.features else None
        rows = _Rows(len(dataset), seed, global_batch_size, rank, world_size, start_step, num_steps)
        samples = _Clips(dataset, seed, cache, self.max_bad_fraction)
        loader = DataLoader(samples, batch_sampler=rows, collate_fn=list, num_workers=self.num_workers,
                            prefetch_factor=self.prefetch_factor if self.num_workers else None, generator=torch.Generator(),
                            pin_memory=self.pin_memory and torch.device(device).type == "cuda")
        bad_files = BadFiles(len(dataset), self.max_bad_fraction, "trajectories")

        def finish(batch: Batch, step: int) -> Batch:
            if cache:
                return batch
            clips = [dataset.crop.finish(frames) for frames in batch.pop("frames")]
            return batch | {"clips": torch.stack(clips).transpose(1, 2)}

        return Prefetcher(_judged(loader, cache, bad_files), device, finish=finish, start_step=start_step)


class SyntheticTrajectories:
    """`num_files` trajectories of noise that need no file; clip i depends on (generator, i) alone."""

    in_chans = 3

    def __init__(self, data: "SyntheticTrajectoryData"):
        self.num_files, self.num_frames, self.crop = data.num_files, data.num_frames, data.crop

    def __len__(self) -> int:
        return self.num_files

    def clip(self, index: int, generator: torch.Generator, features=None) -> dict[str, Tensor]:
        T, S = self.num_frames, self.crop.image_size
        states = torch.randn(T, STATE_DIM, generator=generator, dtype=torch.float64)
        return {"states": states.float(), "actions": pose_difference(states[:-1], states[1:]).float(),
                "frames": torch.randint(0, 256, (T, S, S, 3), dtype=torch.uint8, generator=generator)}


@dataclass(frozen=True, kw_only=True)
class SyntheticTrajectoryData(TrajectoryData):
    """Noise, for benches and tests."""

    num_files: int = 1000

    def build(self) -> SyntheticTrajectories:
        return SyntheticTrajectories(self)


class _Rows:
    """For each step the (permutation, file) of one rank's rows; a batch sampler for DataLoader."""

    def __init__(self, num_files: int, seed: int, global_batch_size: int, rank: int, world_size: int, start_step: int,
                 num_steps: int | None):
        self.num_files, self.seed, self.global_batch_size = num_files, seed, global_batch_size
        self.B = global_batch_size // world_size
        self.first, self.start_step, self.num_steps = rank * self.B, start_step, num_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, drawn, order = self.start_step, -1, None
        while self.num_steps is None or step < self.num_steps:
            rows = []
            for place in range(self.B):
                permutation, at = divmod(step * self.global_batch_size + self.first + place, self.num_files)
                if permutation != drawn:
                    order = torch.randperm(self.num_files, generator=generator_for(self.seed, permutation)).tolist()
                    drawn = permutation
                rows.append((permutation, order[at]))
            yield rows
            step += 1


class _Clips:
    """(permutation, file) -> a clip of that file, or of the next readable one; what a worker process runs."""

    def __init__(self, dataset: Trajectories, seed: int, cache: FeatureCache | None, max_bad_fraction: float):
        self.dataset, self.seed, self.cache = dataset, seed, cache
        # one search that meets more unreadable files than this has settled the matter
        self.max_bad = max(1, max_bad_fraction * len(dataset))

    def __getitem__(self, key: tuple[int, int]) -> dict:
        permutation, index = key
        bad, rows = [], None if self.cache is None else self.cache.rows
        for place in range(index, index + len(self.dataset)):
            place %= len(self.dataset)
            try:
                clip = self.dataset.clip(place, generator_for(self.seed, permutation, place), rows)
            except BadFile as error:
                bad.append((place, str(error)))
                if len(bad) > self.max_bad:
                    break
                continue
            except ValueError as error:  # travels as text: a worker would add its traceback
                return {"bad": bad, "error": str(error), "index": place}
            return clip | {"index": place, "bad": bad}
        return {"bad": bad, "index": index}


def _judged(loader: DataLoader, cache: FeatureCache | None, bad_files: BadFiles) -> Iterator[Batch]:
    """Host batches; frames, which may have any size, as a list."""
    for samples in loader:
        errors = [sample["error"] for sample in samples if "error" in sample]
        if errors:
            raise ValueError(errors[0])
        index = torch.tensor([sample["index"] for sample in samples])
        new = bad_files.add(index, sum((sample["bad"] for sample in samples), []))
        if any("states" not in sample for sample in samples):
            raise ValueError(bad_files.summary())
        batch = {"index": index, "bad_files": new, "num_bad_files": len(bad_files.messages)}
        for key in ("states", "actions", *(["features"] if cache else [])):
            batch[key] = torch.stack([sample[key] for sample in samples])
        yield batch | ({"encoder": cache.encoder} if cache else {"frames": [sample["frames"] for sample in samples]})
