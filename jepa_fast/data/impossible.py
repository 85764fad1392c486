"""Clips for violation of expectation: the same pixels up to an event, then one goes on as things do.

A digit moves along a line. What cannot happen, by kind:

    vanish          it is gone from one frame to the next, in the open
    vanish_behind   it passes behind a screen and never comes out
    pass_wall       it goes on where a wall turns the possible one back
    change_shape    it becomes another digit, in the open
    change_colour   it becomes darker, in the open

Of two contents A and B, such as a digit and nothing, a set holds all four clips: AA and BB, which can happen, AB and BA,
which cannot. Both halves of a set show the same frames in all (but for the wall, nearly), so a model that is more
surprised by fuller pictures, or by emptier ones, gains nothing. Sets of IntPhys: arXiv:1803.07616. Violation of
expectation with V-JEPA: arXiv:2502.11831.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .mnist import load_mnist, split_indices
from .moving_digits import draw_moving, uniforms

KINDS = ("vanish", "vanish_behind", "pass_wall", "change_shape", "change_colour")
_SIDE = 20                     # pixels: digits without their empty margin
_GREY, _DARK = 128, 0.4        # a screen's or wall's level; what a change of colour leaves of the light


class ImpossiblePairs:
    """`num_pairs` sets of clips uint8 [1, T, H, W], of each kind in turn; set i depends on (seed, split, i) and sizes.

    `kind` [n] int64 numbers `kinds`. The event comes after three eighths of the frames and before five eighths; what
    goes on behind a screen shows later, when the possible digit comes out.
    """

    in_chans = 1

    def __init__(self, split: Literal["train", "test", "all"] = "test", num_pairs: int = 600, *, num_frames: int = 24,
                 image_size: int = 64, kinds: Sequence[str] = KINDS, seed: int = 0):
        for name, value, least in (("num_pairs", num_pairs, 1), ("num_frames", num_frames, 8),
                                   ("image_size", image_size, 48)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {tuple(kinds)}")
        images, digits = load_mnist()
        keep = split_indices(digits, split)
        self.images, digits = images[keep, 0, 4:24, 4:24], digits[keep].numpy()
        self.num_frames, self.image_size, self.kinds = num_frames, image_size, tuple(kinds)
        self.kind = torch.arange(num_pairs) % len(self.kinds)

        draws = uniforms(num_pairs, 6, seed, 3 + ("train", "test", "all").index(split))
        self._digit = (draws[:, 0] * len(digits)).astype(np.int64)
        # another class: in the order of classes, somewhere past all of the first one, and round
        order = np.argsort(digits, kind="stable")
        size = np.bincount(digits)[digits[self._digit]]
        first = np.searchsorted(digits[order], digits[self._digit])
        self._other = order[(first + size + (draws[:, 1] * (len(digits) - size)).astype(np.int64)) % len(digits)]
        low, high = -(-num_frames * 3 // 8), num_frames * 5 // 8
        self._event = low + (draws[:, 2] * (high - low + 1)).astype(np.int64)
        self._across = draws[:, 3] * (image_size - _SIDE)
        self._is_reversed, self._is_vertical = draws[:, 4] < 0.5, draws[:, 5] < 0.5

    def __len__(self) -> int:
        return len(self.kind)

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """(possible, impossible), uint8 [1, T, H, W] each: AA and AB of set `index`."""
        return tuple(self.pairs(torch.tensor([index]))[0])

    def pairs(self, indices: Tensor) -> Tensor:
        """uint8 [B, 2, 1, T, H, W] of sets `indices` [B]: AA and AB."""
        return self.sets(indices)[:, ::2]

    def sets(self, indices: Tensor) -> Tensor:
        """uint8 [B, 4, 1, T, H, W] of sets `indices` [B]: the possible AA and BB, the impossible AB and BA."""
        return torch.stack([self._set(int(i)) for i in indices])

    def _set(self, i: int) -> Tensor:
        kind, event, T, S = self.kinds[self.kind[i]], self._event[i], self.num_frames, self.image_size
        digit, time = self.images[self._digit[i]], np.arange(T)
        along = (S - _SIDE) * time / (T - 1)           # from one border to the other
        if kind == "pass_wall":
            clips = self._at_a_wall(digit, along[event], along - along[event], i)
        else:
            a = self._draw(digit, along, i)
            b = {"change_shape": lambda: self._draw(self.images[self._other[i]], along, i),
                 "change_colour": lambda: (a * _DARK).to(torch.uint8)}.get(kind, lambda: torch.zeros_like(a))()
            is_after = along > (S - _SIDE) / 2 if kind == "vanish_behind" else time >= event
            is_after = torch.from_numpy(is_after)[:, None, None]
            clips = torch.stack([a, b, torch.where(is_after, b, a), torch.where(is_after, a, b)])
            if kind == "vanish_behind":
                clips[..., (S - _SIDE) // 2 - 1:(S + _SIDE) // 2 + 1] = _GREY
        clips = clips.flip(-1) if self._is_reversed[i] else clips
        return (clips.mT if self._is_vertical[i] else clips).unsqueeze(1).contiguous()

    def _at_a_wall(self, digit: Tensor, contact: float, way: np.ndarray, i: int) -> Tensor:
        """A stays before the wall, B behind it; `way` [T] is 0 where they touch it."""
        begin = int(np.ceil(contact)) + _SIDE
        behind = begin + 4
        lines = (contact - np.abs(way), behind + np.abs(way), contact + way, behind - way)
        clips = torch.stack([self._draw(digit, line, i) for line in lines])
        clips[..., begin:behind] = _GREY
        return clips

    def _draw(self, digit: Tensor, along: np.ndarray, i: int) -> Tensor:
        """uint8 [T, S, S], from left to right."""
        positions = np.stack([np.full_like(along, self._across[i]), along], -1)[None]
        # mirrored and transposed once more with the whole clip: upright in the end
        digit = digit.T if self._is_vertical[i] else digit
        digit = digit.flip(-1) if self._is_reversed[i] else digit
        return draw_moving(digit[None], positions, self.image_size)[0]


def first_difference(pairs: Tensor) -> Tensor:
    """[B] int64, the first frame where the clips of pairs [B, 2, C, T, H, W] differ; T where none does."""
    differs = (pairs[:, 0] != pairs[:, 1]).transpose(1, 2).flatten(2).any(2)
    return torch.where(differs.any(1), differs.int().argmax(1), differs.shape[1])
