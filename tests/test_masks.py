"""Masks and PackedMasks: the packed row numbers say what a loop over samples says, and bad lists are refused."""

import pickle

import pytest
import torch

from jepa_fast.masking import Masks, MultiBlock, PackedMasks


def random_masks(seed: int, num_contexts: int, num_targets: int, batch_size: int, num_tokens: int) -> Masks:
    """Ragged lists, some of them empty."""
    generator = torch.Generator().manual_seed(seed)

    def lists(num_lists):
        lengths = torch.randint(0, num_tokens + 1, (num_lists, batch_size), generator=generator)
        parts = [torch.randperm(num_tokens, generator=generator)[:n].sort()[0] for n in lengths.flatten().tolist()]
        return torch.cat(parts), lengths

    (context_idx, context_lengths), (target_idx, target_lengths) = lists(num_contexts), lists(num_targets)
    return Masks(context_idx=context_idx, context_lengths=context_lengths, target_idx=target_idx,
                 target_lengths=target_lengths, num_tokens=num_tokens)


def pack_by_loop(masks: Masks) -> dict:
    """PackedMasks sequence by sequence."""
    (E, B), M, N = masks.context_lengths.shape, masks.target_lengths.shape[0], masks.num_tokens
    contexts = masks.context_idx.split(masks.context_lengths.flatten().tolist())
    targets = masks.target_idx.split(masks.target_lengths.flatten().tolist())
    first_row = [sum(len(part) for part in contexts[:i]) for i in range(E * B)]
    mask_row = sum(len(part) for part in contexts)
    idx, position, cu_seqlens, prediction, prediction_target, lengths = [], [], [0], [], [], []
    context_prediction, context_target = [], []
    for m in range(M):
        for e in range(E):
            for b in range(B):
                context, target = contexts[e * B + b].tolist(), targets[m * B + b].tolist()
                context_prediction += [len(idx) + i for i in range(len(context))]
                context_target += [b * N + token for token in context]
                idx += [first_row[e * B + b] + i for i in range(len(context))]
                prediction += [len(idx) + i for i in range(len(target))]
                prediction_target += [b * N + token for token in target]
                lengths.append(len(target))
                idx += [mask_row] * len(target)
                position += context + target
                cu_seqlens.append(len(idx))
    rows = sorted(set(prediction_target))
    of_sample = [sum(row // N == b for row in rows) for b in range(B)]
    return {
        "prediction_target_row": [rows.index(row) for row in prediction_target], "target_rows": rows,
        "target_rows_cu_seqlens": [sum(of_sample[:b]) for b in range(B + 1)], "target_rows_max_seqlen": max(of_sample),
        "context_idx": [i % B * N + token for i, part in enumerate(contexts) for token in part.tolist()],
        "context_cu_seqlens": first_row + [mask_row], "context_max_seqlen": max(map(len, contexts)),
        "target_idx": [i % B * N + token for i, part in enumerate(targets) for token in part.tolist()],
        "predictor_idx": idx, "predictor_position": position, "predictor_cu_seqlens": cu_seqlens,
        "predictor_max_seqlen": max(b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)),
        "prediction_idx": prediction, "prediction_target_idx": prediction_target,
        "prediction_cu_seqlens": [sum(lengths[:i]) for i in range(len(lengths) + 1)],
        "prediction_max_seqlen": max(lengths), "prediction_lengths": lengths if len(set(lengths)) > 1 else None,
        "context_prediction_idx": context_prediction, "context_target_idx": context_target,
        "full_cu_seqlens": [b * N for b in range(B + 1)],
        "batch_size": B, "num_tokens": N, "num_contexts": E, "num_targets": M,
        "prediction_weight": None, "num_padding": 0}


PROBLEMS = {
    "ragged": lambda: random_masks(0, 1, 4, 5, 12), "two contexts": lambda: random_masks(1, 2, 3, 4, 9),
    "one of each": lambda: random_masks(2, 1, 1, 1, 7),
    "official": lambda: MultiBlock(num_contexts=2).sample((14, 14), 6, seed=0, step=4),
    "unbiased": lambda: MultiBlock(mode="unbiased").sample((9, 13), 7, seed=0, step=4),
    "empty": lambda: Masks.from_lists([torch.empty(3, 0, dtype=torch.int64)], [torch.tensor([[1], [0], [3]])], 4)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_pack_equals_loop(name):
    masks = PROBLEMS[name]()
    packed, expected = dict(vars(masks.pack())), pack_by_loop(masks)
    packed.pop("counts")  # tests/test_flops.py
    assert packed.keys() == expected.keys()
    for field, value in packed.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.int32 if field.endswith("cu_seqlens") else torch.int64)
            assert value.is_contiguous()
            value = value.tolist()
        assert value == expected[field], field


def test_pack_assembles_the_predictor_input():
    # tokens carry their own (sample, token) number, so every row shows where it came from
    masks = MultiBlock(num_contexts=2).sample((14, 14), 4, seed=3, step=1)
    packed, tokens = masks.pack(), torch.arange(4 * 196)
    rows = torch.cat([tokens[packed.context_idx], torch.tensor([-1])])[packed.predictor_idx]
    contexts, targets = masks.context_lists(), masks.target_lists()
    expected = torch.cat([torch.cat([context + 196 * torch.arange(4)[:, None], torch.full_like(target, -1)], dim=1)
                          for target in targets for context in contexts]).flatten()
    assert torch.equal(rows, expected)
    compared = torch.cat([target + 196 * torch.arange(4)[:, None] for target in targets for _ in contexts]).flatten()
    assert torch.equal(tokens[packed.prediction_target_idx], compared)
    assert torch.equal(packed.predictor_position[packed.prediction_idx], compared % 196)


def test_lists_round_trip():
    context = [torch.tensor([[0, 2, 5], [1, 2, 3]])]
    target = [torch.tensor([[1, 4], [0, 5]], dtype=torch.int16), torch.tensor([[3], [4]], dtype=torch.int16)]
    masks = Masks.from_lists(context, target, 6)
    assert masks.context_idx.tolist() == [0, 2, 5, 1, 2, 3] and masks.context_lengths.tolist() == [[3, 3]]
    assert masks.target_idx.tolist() == [1, 4, 0, 5, 3, 4] and masks.target_lengths.tolist() == [[2, 2], [1, 1]]
    assert masks.batch_size == 2 and masks.target_idx.dtype == torch.int64
    for ours, theirs in ((masks.context_lists(), context), (masks.target_lists(), target)):
        assert [tokens.tolist() for tokens in ours] == [tokens.tolist() for tokens in theirs]
    again = pickle.loads(pickle.dumps(masks))
    assert again.target_lists()[1].tolist() == [[3], [4]]


def test_ragged_lists_have_no_official_form():
    masks = Masks(context_idx=torch.tensor([0, 1, 2]), context_lengths=torch.tensor([[1, 2]]),
                  target_idx=torch.tensor([3, 3]), target_lengths=torch.tensor([[1, 1]]), num_tokens=4)
    with pytest.raises(ValueError, match="context list 0 must have one length .* got 1 to 2 tokens"):
        masks.context_lists()
    assert masks.target_lists()[0].tolist() == [[3], [3]]


def test_context_rows_are_what_prediction_leaves():
    for problem in PROBLEMS.values():
        packed = problem().pack()
        both = torch.cat([packed.context_prediction_idx, packed.prediction_idx]).sort()[0]
        assert torch.equal(both, torch.arange(len(packed.predictor_idx)))


def test_join_puts_batches_end_to_end():
    """Numbered tokens, contexts and positions, assembled batch by batch and from the joined rows, are the same."""
    batches = [PROBLEMS[name]().pack() for name in ("ragged", "unbiased", "one of each")]
    joined = PackedMasks.join(batches)

    def assembled(packed, tokens, contexts, mask_tokens, table):
        rows = torch.cat([contexts, mask_tokens])[packed.predictor_idx]
        return [tokens[packed.context_idx], tokens[packed.target_idx], rows, table[packed.predictor_position],
                rows[packed.prediction_idx], tokens[packed.prediction_target_idx], rows[packed.context_prediction_idx],
                tokens[packed.context_target_idx]]

    tokens = [1000 * g + torch.arange(m.batch_size * m.num_tokens) for g, m in enumerate(batches)]
    contexts = [5000 + 1000 * g + torch.arange(len(m.context_idx)) for g, m in enumerate(batches)]
    tables = [1000 * g + torch.arange(m.num_tokens) for g, m in enumerate(batches)]
    mask_tokens = -1 - torch.arange(3)
    parts = [assembled(m, tokens[g], contexts[g], mask_tokens[g:g + 1], tables[g]) for g, m in enumerate(batches)]
    whole = assembled(joined, torch.cat(tokens), torch.cat(contexts), mask_tokens, torch.cat(tables))
    for i, value in enumerate(whole):
        assert torch.equal(value, torch.cat([part[i] for part in parts])), i
    for name in ("context", "predictor", "prediction", "full"):
        lengths = torch.cat([getattr(m, f"{name}_cu_seqlens").diff() for m in batches])
        cu_seqlens = getattr(joined, f"{name}_cu_seqlens")
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0 and torch.equal(cu_seqlens.diff(), lengths)
        assert name == "full" or getattr(joined, f"{name}_max_seqlen") == int(lengths.max())
    assert joined.batch_size == sum(m.batch_size for m in batches)
    assert PackedMasks.join(batches[:1]) is batches[0]


GOOD = {"context_idx": torch.tensor([0, 1, 2]), "context_lengths": torch.tensor([[1, 2]]),
        "target_idx": torch.tensor([3, 3]), "target_lengths": torch.tensor([[1, 1]]), "num_tokens": 4}


@pytest.mark.parametrize("change, text", [
    ({"context_idx": torch.tensor([0.0, 1, 2])}, r"context_idx must be \[P\] int64, got \[3\] torch.float32"),
    ({"target_idx": torch.tensor([[3, 3]])}, r"target_idx must be \[P\] int64, got \[1, 2\]"),
    ({"target_lengths": torch.tensor([1, 1])}, r"target_lengths must be \[lists, B\] int64"),
    ({"target_lengths": torch.empty(0, 2, dtype=torch.int64)}, "target_lengths must be .* not empty"),
    ({"context_lengths": torch.tensor([[1, 1]])}, "context_lengths must .* sum to the 3 entries .* got a sum of 2"),
    ({"context_lengths": torch.tensor([[4, -1]])}, "a minimum of -1"),
    ({"context_idx": torch.tensor([0, 1, 4])}, r"context_idx must be in \[0, 4\), got \[0, 4\]"),
    ({"target_idx": torch.tensor([-1, 3])}, r"target_idx must be in \[0, 4\), got \[-1, 3\]"),
    ({"target_lengths": torch.tensor([[2]])}, "must agree on the batch, got 2 and 1 samples")])
def test_bad_masks(change, text):
    with pytest.raises(ValueError, match=text):
        Masks(**(GOOD | change))


@pytest.mark.parametrize("context, text", [
    ([], "context must be one or more"), ([torch.tensor([1])], r"got \[\[1\]\]"),
    ([torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)], r"with one B, got \[\[2, 1\], "),
    ([torch.zeros(2, 1)], "context must hold token numbers")])
def test_bad_lists(context, text):
    with pytest.raises(ValueError, match=text):
        Masks.from_lists(context, [torch.zeros(2, 1, dtype=torch.int64)], 4)


def test_to_moves_every_tensor():
    packed = MultiBlock().sample((14, 14), 3, seed=0, step=0).pack()
    moved = packed.to("meta", non_blocking=True)
    assert isinstance(moved, PackedMasks) and moved.predictor_max_seqlen == packed.predictor_max_seqlen
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 15 and all(value.device.type == "meta" for value in tensors.values())
    assert torch.equal(packed.to("cpu").predictor_idx, packed.predictor_idx)
