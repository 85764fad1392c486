"""Packed tokens in length buckets, so that the shapes of a step come back: for CUDA graphs, and for compiled code."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import PackedMasks

TILE = 64  # rows of an attention kernel's tile: longest sequences are rounded up to it, padding is cut into such sequences

# list of rows -> (its cu_seqlens, its max_seqlen)
_LISTS = {"context_idx": ("context_cu_seqlens", "context_max_seqlen"),
          "predictor_idx": ("predictor_cu_seqlens", "predictor_max_seqlen"),
          "prediction_idx": ("prediction_cu_seqlens", "prediction_max_seqlen"),
          "target_rows": ("target_rows_cu_seqlens", "target_rows_max_seqlen")}


def pad(masks: PackedMasks, multiple: int) -> PackedMasks:
    """The same masks with contexts, predictor tokens, predictions and target rows padded to multiples of `multiple`.

    Padding is further sequences at the end, ceil((multiple - 1) / 64) of them, at most 64 long and mostly empty; they see
    only themselves. Padded predictions have weight 0 in `prediction_weight`, so loss and gradients are those of the true
    ones up to the order of sums. Longest sequences are rounded up to 64. What no objective with padding reads is dropped.
    Raises ValueError for a multiple below 1 and for masks that are padded.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    if masks.num_padding:
        raise ValueError("masks must not be padded already")
    num_contexts, num_more = len(masks.context_idx), -(-(multiple - 1) // TILE)
    more_contexts = -num_contexts % multiple
    # mask tokens follow the encoded contexts, of which there are more now; padding is the first of them
    predictor_idx = torch.where(masks.predictor_idx < num_contexts, masks.predictor_idx,
                                masks.predictor_idx + more_contexts)
    changes = {"predictor_idx": _extend(predictor_idx, multiple, num_contexts + more_contexts),
               "predictor_position": _extend(masks.predictor_position, multiple, 0),
               "prediction_target_row": _extend(masks.prediction_target_row, multiple, 0),
               "prediction_weight": _extend(_weights(masks), multiple, 0),
               # padded target rows are queries of whole samples that have no tokens
               "full_cu_seqlens": torch.cat([masks.full_cu_seqlens, masks.full_cu_seqlens[-1:].expand(num_more)])}
    for rows, (cu_seqlens, max_seqlen) in _LISTS.items():
        idx = getattr(masks, rows)
        changes.setdefault(rows, _extend(idx, multiple, 0))
        changes[cu_seqlens] = _end(getattr(masks, cu_seqlens), len(idx), len(changes[rows]), num_more)
        changes[max_seqlen] = -(-getattr(masks, max_seqlen) // TILE) * TILE
    unread = dict.fromkeys(("target_idx", "prediction_target_idx", "prediction_lengths", "context_prediction_idx",
                            "context_target_idx"))
    return dataclasses.replace(masks, **changes, **unread, num_padding=multiple - 1)


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
        lengths = {name: len(getattr(masks, name)) for name in _LISTS}
        whole = {name: -(-length // multiple) * multiple for name, length in lengths.items()}
        longest = [-(-getattr(masks, name) // TILE) for _, name in _LISTS.values()]
        shapes[(*whole.values(), *longest)] += 1
        true.update(lengths)
        padded.update(whole)
    num_steps = shapes.total()
    names = {"context_idx": "context", "predictor_idx": "predictor", "prediction_idx": "predictions",
             "target_rows": "targets"}
    return PaddingReport(multiple, num_steps, len(shapes), sum(n for _, n in shapes.most_common(32)) / num_steps,
                         {text: padded[name] / true[name] - 1 for name, text in names.items()})


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
