"""Counted operations: against the table of the performance model, and against PyTorch counting what really runs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from shrink import shrink
from torch.utils.flop_counter import FlopCounterMode

from jepa_fast import recipes
from jepa_fast.masking import MaskCounts, PackedMasks
from jepa_fast.masking.padding import pad
from jepa_fast.models.flops import Work, transformer
from jepa_fast.nn.block import configure_blocks_
from jepa_fast.objectives.flops import prediction_work, step_work
from jepa_fast.ops import use_backend

OPS = torch.ops.jepa_fast


def uniform(batch_size: int, pairs: list[tuple[float, float]]) -> MaskCounts:
    """Counts of masks whose context and target lists have these (mean) lengths."""
    context, target = (torch.tensor(lengths, dtype=torch.float64).repeat(batch_size) for lengths in zip(*pairs, strict=True))
    return MaskCounts.of(context, context + target, target, target_rows=0)


# recipe, batch per GPU, tokens of a sample, (context, target) lengths of each kind of mask, TFLOP of a step, of recomputing
TABLE = [("ijepa_vith14", 128, 256, [(69.7, 43.8)], 84.6, None), ("ijepa_vith16_448", 16, 784, [(268.2, 138.1)], 38.2, None),
         ("ijepa_vitg16_in22k", 16, 196, [(59.4, 33.4)], 13.3, None),
         ("vjepa_vitl16", 24, 1568, [(365, 752), (99, 1102)], 61.1, None),
         ("vjepa_vith16", 24, 1568, [(365, 752), (99, 1102)], 112.3, None),
         ("vjepa2_vitl16", 24, 2048, [(495, 973), (130, 1438)], 85.0, 14.8),
         ("vjepa2_vith16", 24, 2048, [(495, 973), (130, 1438)], 154.6, 25.0),
         ("vjepa2_vitg16", 24, 2048, [(495, 973), (130, 1438)], 233.7, 36.8),
         ("vjepa2_vitl16_cooldown", 12, 8192, [(2157, 4086), (650, 5831)], 293, 50.7),
         ("vjepa2_vitg16_cooldown", 6, 8192, [(2383, 4293), (826, 5984)], 374, 61),
         ("vjepa2_vitg16_384_cooldown", 6, 18432, [(5500, 9599), (1981, 13529)], 1275, 196)]


@pytest.mark.parametrize(("name", "batch_size", "num_tokens", "lengths", "tflop", "recomputed"), TABLE, ids=lambda v: str(v))
def test_the_table_of_the_performance_model(name, batch_size, num_tokens, lengths, tflop, recomputed):
    config = recipes.get_recipe(name).objective
    # I-JEPA predicts four target blocks, each from the one context
    counts = uniform(batch_size, lengths)
    if name.startswith("ijepa"):
        context, four = uniform(batch_size, lengths), uniform(4 * batch_size, lengths)
        counts = dataclasses.replace(four, context=context.context, context_pairs=context.context_pairs)
    target = (batch_size * num_tokens, batch_size * num_tokens**2, None)
    patch_values = 3 * config.encoder.patch_size**2 * getattr(config.encoder, "tubelet_size", 1)
    work, with_recompute = (prediction_work(config.encoder, config.predictor, patch_values, target, counts, recompute=flag)
                            for flag in (False, True))
    assert work.model_flops / 1e12 == pytest.approx(tflop, rel=0.01)
    assert with_recompute.model_flops == work.model_flops
    if recomputed:
        # without the predictor's last block, which is pruned instead
        assert (with_recompute.hardware_flops - work.hardware_flops) / 1e12 == pytest.approx(recomputed, rel=0.04)


def test_the_table_of_the_performance_model_with_actions():
    config = recipes.get_recipe("vjepa2_ac_vitg").objective
    work = step_work(config, {"states": torch.empty(8, 8, 7)})
    assert work.model_flops / 1e12 == pytest.approx(76.0, rel=0.01)
    # causal attention and kept keys and values; the half forward pass that fused attention computes again is ours
    attention = 4 * 1024 * 24 * 8 * (258**2 * (7 * 8 // 2) + 258 * 258 * 2)
    assert (work.hardware_flops - 0.5 * attention) / 1e12 == pytest.approx(68.6, rel=0.01)
    cached = step_work(config, {"states": torch.empty(8, 8, 7), "features": None})
    assert (work.model_flops - cached.model_flops) / 1e12 == pytest.approx(33.1 + 0.9, rel=0.01)


def _pairs(cu_q, cu_k, frame_size: int) -> int:
    """Pairs of a query and a key that attention looks at, sequence by sequence."""
    total = 0
    for q, k in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True):
        if frame_size:
            # the queries are the last q of the k tokens
            total += sum((row // frame_size + 1) * frame_size for row in range(k - q, k))
        else:
            total += q * k
    return total


def raw(formula):
    formula._get_raw = True
    return formula


@raw
def apart(q, k, v, cu_q, cu_k, max_q, max_k, scale, rotary_q, rotary_k, frame_size, out_val=None):
    return 4 * q.shape[1] * q.shape[2] * _pairs(cu_q, cu_k, frame_size)


@raw
def apart_backward(grad, q, k, v, out, lse, *how, out_val=None):
    return apart(q, k, v, *how) * 5 // 2


@raw
def packed(qkv, cu_seqlens, max_seqlen, scale, rotary, frame_size, out_val=None):
    return 4 * qkv.shape[2] * qkv.shape[3] * _pairs(cu_seqlens, cu_seqlens, frame_size)


@raw
def packed_backward(grad, qkv, out, lse, *how, out_val=None):
    return packed(qkv, *how) * 5 // 2


@raw
def projections(x, directions, *rest, out_val=None):
    return 2 * x.numel() * directions.shape[-1]


@raw
def projections_backward(grad, x, directions, *rest, out_val=None):
    return 2 * x.numel() * directions.shape[-1]


def of_pytorch(q, k, v, *rest, out_shape=None, **kwargs):
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def of_pytorch_backward(grad, q, k, v, *rest, out_shape=None, **kwargs):
    return of_pytorch(q, k, v) * 5 // 2


MAPPING = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_pytorch,
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: of_pytorch_backward,
           OPS.varlen_attention: apart, OPS.varlen_attention_backward: apart_backward, OPS.varlen_attention_qkv: packed,
           OPS.varlen_attention_qkv_backward: packed_backward, OPS.sigreg_sums: projections,
           OPS.sigreg_sums_backward: projections_backward}
COUNTED = ["ijepa_vits16", "vjepa_vitl16", "vjepa2_vitl16", "vjepa2_1_vitl16", "vjepa2_ac_vitg", "lejepa_minimal",
           "lejepa_mnist", "leworldmodel_two_rooms", "eb_jepa_two_rooms"]


def first_batch(recipe):
    torch.manual_seed(0)
    dataset, objective = recipe.data.build(), recipe.objective.build()
    batch = next(iter(recipe.data.batches(dataset, global_batch_size=recipe.train.batch_size, seed=0, start_step=0,
                                          num_steps=1, rank=0, world_size=1, device=torch.device("cpu"))))
    return objective, objective.prepare(batch, seed=0, step=0, first_sample=0)


CASES = [*((name, "lean") for name in COUNTED),
         *((name, "checkpoint") for name in ("ijepa_vits16", "vjepa2_vitl16", "vjepa2_1_vitl16", "vjepa2_ac_vitg"))]


@pytest.mark.parametrize(("name", "activations"), CASES)
def test_pytorch_counts_the_same_in_a_real_step(name, activations):
    recipe = shrink(recipes.get_recipe(name))
    if name == "leworldmodel_two_rooms":
        # with dropout PyTorch's attention on a CPU keeps its scores instead of computing them again
        predictor = dataclasses.replace(recipe.objective.predictor, dropout=0.0)
        recipe = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, predictor=predictor))
    objective, batch = first_batch(recipe)
    configure_blocks_(objective, activations, "ops", "cpu")
    with use_backend("plain"), FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        objective(batch)["loss"].backward()
    work = step_work(recipe.objective, batch, recompute=activations == "checkpoint")
    assert work.hardware_flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("name", ["ijepa_vits16", "vjepa2_vitl16"])
def test_padding_runs_but_is_not_asked_for(name):
    recipe = shrink(recipes.get_recipe(name))
    objective, batch = first_batch(recipe)
    padded = batch | {"masks": pad(masks, 96) if isinstance(masks := batch["masks"], PackedMasks) else [pad(masks[0], 96)]}
    with use_backend("plain"), FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        objective(padded)["loss"].backward()
    true, work = step_work(recipe.objective, batch), step_work(recipe.objective, padded)
    assert work.hardware_flops == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert work.hardware_flops > true.hardware_flops
    assert (work.model_flops, work.tokens) == (true.model_flops, true.tokens)
    masks = padded["masks"] if isinstance(padded["masks"], PackedMasks) else padded["masks"][0]
    more = len(masks.context_idx) + len(masks.predictor_idx) - masks.counts.context - masks.counts.predictor
    assert (work.padding_tokens, true.padding_tokens) == (more, 0) and more > 0


def test_ragged_masks_count_their_true_lengths():
    """The pairs that masks carry are those of the sequences they pack, where samples differ too."""
    recipe = shrink(recipes.get_recipe("ijepa_vits16"))
    masking = dataclasses.replace(recipe.objective.masking, mode="unbiased")
    masks = masking.sample(recipe.objective.encoder.grid, 6, seed=1, step=2).pack()
    predictor, prediction = masks.predictor_cu_seqlens.diff().tolist(), masks.prediction_cu_seqlens.diff().tolist()
    assert len(set(predictor)) > 1
    assert masks.counts == MaskCounts(
        context=len(masks.context_idx), context_pairs=sum(n * n for n in masks.context_cu_seqlens.diff().tolist()),
        predictor=len(masks.predictor_idx), predictor_pairs=sum(n * n for n in predictor), prediction=sum(prediction),
        prediction_pairs=sum(q * n for q, n in zip(prediction, predictor, strict=True)),
        target_rows=len(set(masks.prediction_target_idx.tolist())))


def test_checkpointing_adds_one_forward_pass_to_what_runs():
    config = SimpleNamespace(embed_dim=8, depth=3, mlp_ratio=4.0)
    forward = 3 * (24 * 8 * 8 * 10 + 4 * 8 * 50)
    assert transformer(config, 10, 50, trains=False) == Work(10, forward, forward)
    kept, again = (transformer(config, 10, 50, recompute=flag) for flag in (False, True))
    assert kept.model_flops == again.model_flops == 3 * forward
    assert again.hardware_flops - kept.hardware_flops == forward
    # a block of which 4 rows are wanted, with 20 pairs: keys and values of all
    pruned = transformer(config, 10, 50, trains=False, last=(4, 20))
    assert pruned.model_flops == forward
    assert pruned.hardware_flops == 2 * (24 * 8 * 8 * 10 + 4 * 8 * 50) + 4 * 8 * 8 * 10 + 20 * 8 * 8 * 4 + 4 * 8 * 20


def test_an_unknown_objective_is_named():
    with pytest.raises(TypeError, match="no count of operations for int"):
        step_work(3, {})
