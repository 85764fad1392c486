"""Masks of a batch, ragged and packed: which tokens are context, which are targets, and where every row comes from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """Context and target lists of a batch, packed end to end; int64, on one device.

    A list holds token numbers (row * columns + column, of a clip (time * rows + row) * columns + column) of one sample.
    Lists are ordered list-major: list 0 of every sample, then list 1 of every sample. Every target list is predicted
    from every context list, or, where `is_paired`, from the context list of the same number. Raises ValueError if
    lengths, indices and sizes do not belong together.
    """

    context_idx: Tensor       # [P_c], in [0, num_tokens)
    context_lengths: Tensor   # [E, B]: context list, then sample
    target_idx: Tensor        # [P_t], in [0, num_tokens)
    target_lengths: Tensor    # [M, B]: target list, then sample
    num_tokens: int           # N, tokens of one sample
    is_paired: bool = False   # E == M: list i of the contexts belongs to list i of the targets only

    def __post_init__(self):
        for name in ("context", "target"):
            _check_lists(name, getattr(self, f"{name}_idx"), getattr(self, f"{name}_lengths"), self.num_tokens)
        if self.context_lengths.shape[1] != self.target_lengths.shape[1]:
            raise ValueError(f"context_lengths and target_lengths must agree on the batch, got "
                             f"{self.context_lengths.shape[1]} and {self.target_lengths.shape[1]} samples")
        if self.is_paired and self.context_lengths.shape[0] != self.target_lengths.shape[0]:
            raise ValueError(f"context_lengths and target_lengths must hold as many lists to be paired, got "
                             f"{self.context_lengths.shape[0]} and {self.target_lengths.shape[0]}")

    @classmethod
    def from_lists(cls, context: list[Tensor], target: list[Tensor], num_tokens: int, *, is_paired: bool = False) -> Masks:
        """Masks from the official form: lists of [B, K] token numbers, K free to differ between lists."""
        context_idx, context_lengths = _from_lists("context", context)
        target_idx, target_lengths = _from_lists("target", target)
        return cls(context_idx=context_idx, context_lengths=context_lengths, target_idx=target_idx,
                   target_lengths=target_lengths, num_tokens=num_tokens, is_paired=is_paired)

    @classmethod
    def unchecked(cls, **fields) -> Masks:
        """Masks from all six fields as they are: for samplers, whose lists are right by construction."""
        masks = object.__new__(cls)
        masks.__dict__.update(fields)
        return masks

    @classmethod
    def from_grids(cls, contexts: Tensor, targets: Tensor) -> Masks:
        """Masks, on the same device, from bool [B, E, rows, columns] and [B, M, rows, columns]; reads sizes on the host."""
        context_idx, context_lengths = _from_grids("contexts", contexts)
        target_idx, target_lengths = _from_grids("targets", targets)
        return cls(context_idx=context_idx, context_lengths=context_lengths, target_idx=target_idx,
                   target_lengths=target_lengths, num_tokens=contexts.shape[2] * contexts.shape[3])

    @property
    def batch_size(self) -> int:
        return self.context_lengths.shape[1]

    def context_lists(self) -> list[Tensor]:
        """The official form: E tensors [B, K]. Raises ValueError if the samples of a list differ in length."""
        return _to_lists("context", self.context_idx, self.context_lengths)

    def target_lists(self) -> list[Tensor]:
        """The official form: M tensors [B, K]. Raises ValueError if the samples of a list differ in length."""
        return _to_lists("target", self.target_idx, self.target_lengths)

    def pack(self, *, num_mask_tokens: int = 1) -> PackedMasks:
        """Everything a packed model indexes with, so that the device never has to wait for the host.

        Of several mask tokens, target list m takes number m % num_mask_tokens, as V-JEPA does.
        """
        (num_contexts, B), num_targets, N = self.context_lengths.shape, self.target_lengths.shape[0], self.num_tokens
        context_lengths, target_lengths = self.context_lengths.flatten(), self.target_lengths.flatten()
        context_rows = _sample_offsets(self.context_lengths, N).add_(self.context_idx)
        target_idx = _sample_offsets(self.target_lengths, N).add_(self.target_idx)
        is_target = torch.zeros(B, N, dtype=torch.bool, device=target_idx.device)
        is_target.view(-1)[target_idx] = True
        target_row_lengths = is_target.sum(1)

        # a predictor sequence is two pieces of cat([context_idx, target_idx]): list (e, b), then list (m, b)
        m, e = self._pairs()
        context_pieces, target_pieces = self.context_lengths[e].flatten(), self.target_lengths[m].flatten()
        context_starts = _starts(context_lengths).view(num_contexts, B)[e].flatten()
        target_starts = _starts(target_lengths).view(num_targets, B)[m].flatten() + len(context_rows)
        rows = _runs(torch.stack([context_starts, target_starts], dim=1).flatten(),
                     torch.stack([context_pieces, target_pieces], dim=1).flatten())
        sequence_lengths = context_pieces + target_pieces
        context_prediction_idx = _runs(_starts(sequence_lengths), context_pieces)
        context_target = rows.index_select(0, context_prediction_idx)
        prediction_idx = _runs(_starts(sequence_lengths) + context_pieces, target_pieces)
        prediction_target = rows.index_select(0, prediction_idx).sub_(len(context_rows))
        prediction_target_idx = target_idx.index_select(0, prediction_target)
        is_uniform = int(target_lengths.min()) == int(target_lengths.max())
        position = torch.cat([self.context_idx, self.target_idx]).index_select(0, rows)
        # every row past the contexts is a target, and all targets of a list share one mask-token row
        predictor_idx = rows.clamp_max_(len(context_rows))
        if num_mask_tokens > 1:
            predictor_idx[prediction_idx] += (m % num_mask_tokens).repeat_interleave(B).repeat_interleave(target_pieces)
        return PackedMasks(
            context_idx=context_rows,
            context_cu_seqlens=_cu_seqlens(context_lengths),
            context_max_seqlen=int(context_lengths.max()),
            target_idx=target_idx,
            predictor_idx=predictor_idx,
            predictor_position=position,
            predictor_cu_seqlens=_cu_seqlens(sequence_lengths),
            predictor_max_seqlen=int(sequence_lengths.max()),
            prediction_idx=prediction_idx,
            prediction_target_idx=prediction_target_idx,
            prediction_target_row=is_target.view(-1).cumsum(0).sub_(1).index_select(0, prediction_target_idx),
            target_rows=is_target.view(-1).nonzero().view(-1),
            target_rows_cu_seqlens=_cu_seqlens(target_row_lengths),
            target_rows_max_seqlen=int(target_row_lengths.max()),
            prediction_cu_seqlens=_cu_seqlens(target_pieces),
            prediction_max_seqlen=int(target_lengths.max()),
            prediction_lengths=None if is_uniform else target_pieces,
            context_prediction_idx=context_prediction_idx,
            context_target_idx=context_rows.index_select(0, context_target),
            full_cu_seqlens=torch.arange(0, (B + 1) * N, N, dtype=torch.int32, device=rows.device),
            batch_size=B, num_tokens=N, num_contexts=num_contexts, num_targets=num_targets,
            counts=MaskCounts.of(context_lengths, sequence_lengths, target_pieces, int(target_row_lengths.sum())))

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Target list and context list of every kind of predictor sequence, [S] each."""
        (E, _), M, device = self.context_lengths.shape, self.target_lengths.shape[0], self.context_lengths.device
        targets, contexts = torch.arange(M, device=device), torch.arange(E, device=device)
        return (targets, contexts) if self.is_paired else (targets.repeat_interleave(E), contexts.repeat(M))


@dataclass(frozen=True, kw_only=True)
class MaskCounts:
    """What masks cost, known on the host: tokens, for linear layers, and pairs (query, key), for attention."""

    context: int
    context_pairs: int
    predictor: int
    predictor_pairs: int
    prediction: int           # mask tokens among those of the predictor
    prediction_pairs: int     # of mask tokens as queries with all tokens of their sequences
    target_rows: int          # tokens that any prediction is compared with

    @classmethod
    def of(cls, context: Tensor, predictor: Tensor, prediction: Tensor, target_rows: int) -> MaskCounts:
        """Lengths of context sequences, of predictor sequences, and how many of the latter's tokens are predicted."""
        return cls(context=int(context.sum()), context_pairs=int(context.square().sum()),
                   predictor=int(predictor.sum()), predictor_pairs=int(predictor.square().sum()),
                   prediction=int(prediction.sum()), prediction_pairs=int((prediction * predictor).sum()),
                   target_rows=target_rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedMasks:
    """Row numbers for packed sequences; B samples of N tokens are the rows b * N + token of one [B*N, ...] tensor.

    Predictor sequences are ordered target list m, context list e, sample b, S = M * E * B of them; where the lists are
    paired, e is always m and S = M * B. Each holds the context list (e, b), then one mask token for every token of the
    target list (m, b). P_p counts the rows of all predictor sequences, Q the mask tokens among them. Indices are int64,
    cu_seqlens int32.
    """

    context_idx: Tensor             # [P_c]: row of [B*N], ordered (e, b)
    context_cu_seqlens: Tensor      # [E*B + 1]
    context_max_seqlen: int
    target_idx: Tensor              # [P_t]: row of [B*N], ordered (m, b)
    predictor_idx: Tensor           # [P_p]: row of cat([encoded context rows, mask tokens]); mask token i = P_c + i
    predictor_position: Tensor      # [P_p]: token number in the grid, for the position table
    predictor_cu_seqlens: Tensor    # [S + 1]
    predictor_max_seqlen: int
    prediction_idx: Tensor          # [Q]: row of the predictor output, ordered (m, e, b, token)
    prediction_target_idx: Tensor   # [Q]: row of [B*N] each prediction is compared with
    prediction_target_row: Tensor   # [Q]: the same as an entry of target_rows
    target_rows: Tensor             # [R]: the rows of [B*N] that any prediction is compared with, rising
    target_rows_cu_seqlens: Tensor  # [B + 1]: which of them belong to which sample
    target_rows_max_seqlen: int
    prediction_cu_seqlens: Tensor   # [S + 1]: which predictions belong to which sequence
    prediction_max_seqlen: int
    prediction_lengths: Tensor | None   # [S]: predictions per sequence; None where all are equal
    context_prediction_idx: Tensor  # [C]: the other rows of the predictor output, contexts, ordered (m, e, b, token)
    context_target_idx: Tensor      # [C]: row of [B*N] each of them stands for
    full_cu_seqlens: Tensor         # [B + 1]: whole samples, for the target encoder
    batch_size: int                 # B
    num_tokens: int                 # N
    num_contexts: int               # E
    num_targets: int                # M
    prediction_weight: Tensor | None = None  # [Q] float64: of a prediction in the loss, 0 for padding; None: see above
    num_padding: int = 0            # so many of the last predictions and target rows may be padding (see `padding.pad`)
    counts: MaskCounts | None = None    # tokens without any padding; None where batches were joined

    @classmethod
    def join(cls, batches: list[PackedMasks]) -> PackedMasks:
        """Batches on different grids, each packed with one mask token, as one: their rows and samples end to end.

        Positions become rows of the batches' position tables end to end, and the mask token of batch g is number
        P_c + g. B, N, the lengths and the numbers of lists are sums, or maxima, that say nothing of a single batch.
        """
        if len(batches) == 1:
            return batches[0]
        sizes = {"context": [len(m.context_idx) for m in batches], "tokens": [m.batch_size * m.num_tokens for m in batches],
                 "predictor": [len(m.predictor_idx) for m in batches], "table": [m.num_tokens for m in batches],
                 "prediction": [len(m.prediction_idx) for m in batches],
                 "target_rows": [len(m.target_rows) for m in batches]}

        def rows(name: str, kind: str) -> Tensor:
            return torch.cat([getattr(m, name) + start for m, start in zip(batches, _before(sizes[kind]), strict=True)])

        def ends(name: str, kind: str) -> Tensor:
            parts = [getattr(m, name) + start for m, start in zip(batches, _before(sizes[kind]), strict=True)]
            return torch.cat([parts[0], *(part[1:] for part in parts[1:])])

        num_contexts, before = sum(sizes["context"]), _before(sizes["context"])
        predictor_idx = [torch.where(m.predictor_idx < size, m.predictor_idx + start, num_contexts + g)
                         for g, (m, size, start) in enumerate(zip(batches, sizes["context"], before, strict=True))]
        return cls(
            context_idx=rows("context_idx", "tokens"), context_cu_seqlens=ends("context_cu_seqlens", "context"),
            context_max_seqlen=max(m.context_max_seqlen for m in batches), target_idx=rows("target_idx", "tokens"),
            predictor_idx=torch.cat(predictor_idx), predictor_position=rows("predictor_position", "table"),
            predictor_cu_seqlens=ends("predictor_cu_seqlens", "predictor"),
            predictor_max_seqlen=max(m.predictor_max_seqlen for m in batches),
            prediction_idx=rows("prediction_idx", "predictor"),
            prediction_target_idx=rows("prediction_target_idx", "tokens"),
            prediction_target_row=rows("prediction_target_row", "target_rows"),
            target_rows=rows("target_rows", "tokens"), target_rows_cu_seqlens=ends("target_rows_cu_seqlens", "target_rows"),
            target_rows_max_seqlen=max(m.target_rows_max_seqlen for m in batches),
            prediction_cu_seqlens=ends("prediction_cu_seqlens", "prediction"),
            prediction_max_seqlen=max(m.prediction_max_seqlen for m in batches),
            prediction_lengths=ends("prediction_cu_seqlens", "prediction").diff().long(),
            context_prediction_idx=rows("context_prediction_idx", "predictor"),
            context_target_idx=rows("context_target_idx", "tokens"), full_cu_seqlens=ends("full_cu_seqlens", "tokens"),
            batch_size=sum(m.batch_size for m in batches), num_tokens=sum(sizes["table"]),
            num_contexts=sum(m.num_contexts for m in batches), num_targets=sum(m.num_targets for m in batches))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedMasks:
        """On a device; non_blocking goes through page-locked memory, from which the host does not wait for the copy."""
        is_pinned = non_blocking and torch.device(device).type == "cuda" and self.context_idx.device.type == "cpu"
        masks = self.pin_memory() if is_pinned else self
        return masks._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedMasks:
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> PackedMasks:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **{name: function(value) for name, value in tensors.items()})


def _check_lists(name: str, idx: Tensor, lengths: Tensor, num_tokens: int) -> None:
    if idx.dtype != torch.int64 or idx.dim() != 1:
        raise ValueError(f"{name}_idx must be [P] int64, got {list(idx.shape)} {idx.dtype}")
    if lengths.dtype != torch.int64 or lengths.dim() != 2 or lengths.numel() == 0:
        raise ValueError(f"{name}_lengths must be [lists, B] int64, not empty, "
                         f"got {list(lengths.shape)} {lengths.dtype}")
    shortest, total = int(lengths.min()), int(lengths.sum())
    if shortest < 0 or total != len(idx):
        raise ValueError(f"{name}_lengths must be at least 0 and sum to the {len(idx)} entries of {name}_idx, "
                         f"got a sum of {total} and a minimum of {shortest}")
    if len(idx):
        low, high = (int(bound) for bound in idx.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name}_idx must be in [0, {num_tokens}), got [{low}, {high}]")


def _from_lists(name: str, lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    shapes = [list(tokens.shape) for tokens in lists]
    if not lists or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"{name} must be one or more [B, K] tensors with one B, got {shapes}")
    if any(tokens.dtype.is_floating_point or tokens.dtype == torch.bool for tokens in lists):
        raise ValueError(f"{name} must hold token numbers, got {[tokens.dtype for tokens in lists]}")
    lengths = torch.tensor([[shape[1]] * shape[0] for shape in shapes])
    return torch.cat([tokens.flatten().to("cpu", torch.int64) for tokens in lists]), lengths


def _from_grids(name: str, grids: Tensor) -> tuple[Tensor, Tensor]:
    if grids.dim() != 4 or grids.dtype != torch.bool:
        raise ValueError(f"{name} must be [B, lists, rows, columns] bool, got {list(grids.shape)} {grids.dtype}")
    lists = grids.transpose(0, 1).flatten(2)  # [lists, B, N]
    return lists.nonzero()[:, 2], lists.sum(2)


def _to_lists(name: str, idx: Tensor, lengths: Tensor) -> list[Tensor]:
    for i, row in enumerate(lengths):
        if int(row.min()) != int(row.max()):
            raise ValueError(f"{name} list {i} must have one length to become [B, K], "
                             f"got {int(row.min())} to {int(row.max())} tokens")
    parts = idx.split(lengths.sum(1).tolist())
    return [part.view(lengths.shape[1], -1) for part in parts]


def _before(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """Consecutive numbers start, start + 1, ... of every run, end to end."""
    runs = (starts - _starts(lengths)).repeat_interleave(lengths)
    return runs.add_(torch.arange(len(runs), device=runs.device))


def _cu_seqlens(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _sample_offsets(lengths: Tensor, num_tokens: int) -> Tensor:
    num_lists, B = lengths.shape
    return (torch.arange(B, device=lengths.device) * num_tokens).repeat(num_lists).repeat_interleave(lengths.flatten())
