"""Packed tokens in length buckets, so that the shapes of a step come back: for CUDA graphs, and for compiled code."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .masks import PackedMasks

TILE = 64  # rows of an attention kernel's tile: longest sequences are rounded up to it, padding is cut into such sequences

COARSE = 4  # predictor tokens, predictions and target rows are many and cheap beside contexts: padded to so many multiples


class _List(NamedTuple):
    """A list of rows and what belongs to it."""

    name: str
    cu_seqlens: str
    max_seqlen: str
    multiples: int
    text: str


_LISTS = (_List("context_idx", "context_cu_seqlens", "context_max_seqlen", 1, "context"),
          _List("predictor_idx", "predictor_cu_seqlens", "predictor_max_seqlen", COARSE, "predictor"),
          _List("prediction_idx", "prediction_cu_seqlens", "prediction_max_seqlen", COARSE, "predictions"),
          _List("target_rows", "target_rows_cu_seqlens", "target_rows_max_seqlen", COARSE, "targets"))


def pad(masks: PackedMasks, multiple: int) -> PackedMasks:
    """The same masks with contexts padded to a multiple of `multiple`; predictor, predictions and targets of 4 times that.

    Padding is further sequences at the end, as many in every step, at most 64 long and mostly empty; they see only
    themselves. Padded predictions have weight 0 in `prediction_weight`, so loss and gradients are those of the true ones
    up to the order of sums. Longest sequences are rounded up to 64. What no objective with padding reads is dropped;
    `counts` stay those of true tokens. Raises ValueError for a multiple below 1 and for masks that are padded.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    if masks.num_padding:
        raise ValueError("masks must not be padded already")
    num_contexts, coarse = len(masks.context_idx), COARSE * multiple
    more_contexts = -num_contexts % multiple
    # mask tokens follow the encoded contexts, of which there are more now; padding is the first of them
    predictor_idx = torch.where(masks.predictor_idx < num_contexts, masks.predictor_idx,
                                masks.predictor_idx + more_contexts)
    empty = masks.full_cu_seqlens[-1:].expand(_num_sequences(coarse))
    changes = {"predictor_idx": _extend(predictor_idx, coarse, num_contexts + more_contexts),
               "predictor_position": _extend(masks.predictor_position, coarse, 0),
               "prediction_target_row": _extend(masks.prediction_target_row, coarse, 0),
               "prediction_weight": _extend(_weights(masks), coarse, 0),
               # padded target rows are queries of whole samples that have no tokens
               "full_cu_seqlens": torch.cat([masks.full_cu_seqlens, empty])}
    for name, cu_seqlens, max_seqlen, multiples, _ in _LISTS:
        idx = getattr(masks, name)
        changes.setdefault(name, _extend(idx, multiples * multiple, 0))
        changes[cu_seqlens] = _end(getattr(masks, cu_seqlens), len(idx), len(changes[name]),
                                   _num_sequences(multiples * multiple))
        changes[max_seqlen] = _up(getattr(masks, max_seqlen), TILE)
    unread = dict.fromkeys(("target_idx", "prediction_target_idx", "prediction_lengths", "context_prediction_idx",
                            "context_target_idx"))
    return dataclasses.replace(masks, **changes, **unread, num_padding=coarse - 1)


@dataclass(frozen=True)
class PaddingReport:
    """What a multiple costs and brings: over `num_steps` steps, in tokens and in shapes."""

    multiple: int
    num_steps: int
    num_shapes: int                 # distinct; as many CUDA graphs
    share_of_commonest: float       # of the steps that have one of the 32 most frequent shapes
    waste: dict[str, float]         # padded tokens / true tokens - 1, per list

    def __str__(self) -> str:
        waste = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.waste.items())
        return (f"multiple {self.multiple}: {self.num_shapes} shapes in {self.num_steps} steps (the 32 commonest: "
                f"{100 * self.share_of_commonest:.0f} %); padding {waste}")


def padding_report(batches: Iterable[PackedMasks], multiple: int) -> PaddingReport:
    """Shapes and waste of unpadded masks if they were padded; from the lengths alone."""
    shapes, true, padded = Counter(), Counter(), Counter()
    for masks in batches:
        lengths = {entry.text: len(getattr(masks, entry.name)) for entry in _LISTS}
        whole = {entry.text: _up(lengths[entry.text], entry.multiples * multiple) for entry in _LISTS}
        longest = [_up(getattr(masks, entry.max_seqlen), TILE) for entry in _LISTS]
        shapes[(*whole.values(), *longest)] += 1
        true.update(lengths)
        padded.update(whole)
    num_steps = shapes.total()
    return PaddingReport(multiple, num_steps, len(shapes), sum(n for _, n in shapes.most_common(32)) / num_steps,
                         {text: padded[text] / true[text] - 1 for text in true})


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _num_sequences(multiple: int) -> int:
    """That hold any padding up to a multiple."""
    return -(-(multiple - 1) // TILE)


def _extend(values: Tensor, multiple: int, value: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % multiple), value=value)


def _end(cu_seqlens: Tensor, start: int, end: int, num_more: int) -> Tensor:
    """cu_seqlens with sequences of at most TILE rows from `start` to `end`, the rest of them empty."""
    tiles = torch.arange(1, num_more + 1, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.cat([cu_seqlens, tiles.mul_(TILE).add_(start).clamp_max_(end)])


def _weights(masks: PackedMasks) -> Tensor:
    """[Q] float64: of a prediction in the loss, 1 / Q, or 1 / (S * length) where sequences differ in length."""
    lengths, Q = masks.prediction_lengths, len(masks.prediction_idx)
    if lengths is None:
        return torch.full((Q,), 1 / max(Q, 1), dtype=torch.float64, device=masks.prediction_idx.device)
    return (1 / (len(lengths) * lengths.double())).repeat_interleave(lengths, output_size=Q)
