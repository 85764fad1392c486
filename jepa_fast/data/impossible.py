"""Pairs of clips for violation of expectation: the same pixels up to an event, then one goes on as things do.

A digit moves along a line. What cannot happen, by kind:

    vanish          it is gone from one frame to the next, in the open
    vanish_behind   it passes behind a screen and never comes out
    pass_wall       it goes on where a wall turns the possible one back
    change_shape    it becomes another digit, in the open
    change_colour   it becomes darker, in the open
    appear          it is there from one frame to the next, in an empty picture

`appear` is the control: there the impossible clip has more to see, elsewhere as much or less.
Violation of expectation with V-JEPA: arXiv:2502.11831.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .mnist import load_mnist, split_indices
from .moving_digits import draw_moving, uniforms

KINDS = ("vanish", "vanish_behind", "pass_wall", "change_shape", "change_colour", "appear")
_SIDE = 20                     # pixels: digits without their empty margin
_GREY, _DARK = 128, 0.4        # a screen's or wall's level; what a change of colour leaves of the light


class ImpossiblePairs:
    """`num_pairs` pairs of clips uint8 [1, T, H, W], of each kind in turn; pair i depends on (seed, split, i) and sizes.

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
        """(possible, impossible), uint8 [1, T, H, W] each."""
        return tuple(self.pairs(torch.tensor([index]))[0])

    def pairs(self, indices: Tensor) -> Tensor:
        """uint8 [B, 2, 1, T, H, W] of pairs `indices` [B]: possible, impossible."""
        return torch.stack([self._pair(int(i)) for i in indices])

    def _pair(self, i: int) -> Tensor:
        kind, event, T, S = self.kinds[self.kind[i]], self._event[i], self.num_frames, self.image_size
        digit, other = self.images[self._digit[i]], self.images[self._other[i]]
        time = np.arange(T)
        is_after = torch.from_numpy(time >= event)[:, None, None]
        along = (S - _SIDE) * time / (T - 1)           # from one border to the other
        possible = self._draw(digit, along, i)
        if kind == "vanish":
            impossible = possible * ~is_after
        elif kind == "appear":
            possible, impossible = torch.zeros_like(possible), possible * is_after
        elif kind == "change_shape":
            impossible = torch.where(is_after, self._draw(other, along, i), possible)
        elif kind == "change_colour":
            impossible = torch.where(is_after, (possible * _DARK).to(torch.uint8), possible)
        elif kind == "vanish_behind":
            is_past = torch.from_numpy(along > (S - _SIDE) / 2)[:, None, None]
            begin, end = (S - _SIDE) // 2 - 1, (S + _SIDE) // 2 + 1
            impossible = possible * ~is_past
            possible[..., begin:end] = impossible[..., begin:end] = _GREY
        else:
            contact = along[event]
            impossible = possible
            possible = self._draw(digit, np.minimum(along, 2 * contact - along), i)
            begin = int(np.ceil(contact)) + _SIDE
            impossible[..., begin:begin + 4] = possible[..., begin:begin + 4] = _GREY
        both = torch.stack([possible, impossible])
        both = both.flip(-1) if self._is_reversed[i] else both
        return (both.mT if self._is_vertical[i] else both).unsqueeze(1).contiguous()

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
