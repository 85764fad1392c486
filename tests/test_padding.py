"""Length buckets: padding changes neither loss nor gradients, and shapes come back."""

import dataclasses

import pytest
import torch
from golden_data import error

from jepa_fast.masking import BlockMask, MultiBlock, MultiBlock3D, pad, padding_report
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.predictor import PredictorConfig
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictorConfig
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.objectives.video_prediction import VideoPredictionConfig

KINDS = (BlockMask(num_blocks=3, spatial_scale=(0.2, 0.2)), BlockMask(num_blocks=1, spatial_scale=(0.5, 0.5)))


def ijepa(**masking):
    return LatentPredictionConfig(
        encoder=VisionTransformerConfig(image_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2),
        predictor=PredictorConfig(embed_dim=16, depth=2), masking=MultiBlock(min_keep=2, mask_group_size=3, **masking))


def video(positions, **fields):
    masking = MultiBlock3D(masks=KINDS, mask_group_size=2, mode=fields.pop("mode", "official"))
    return VideoPredictionConfig(
        encoder=VideoTransformerConfig(image_size=16, num_frames=4, patch_size=4, embed_dim=36, depth=2, num_heads=2,
                                       positions=positions),
        predictor=VideoPredictorConfig(embed_dim=24, depth=2, num_heads=2), masking=masking, **fields)


CONFIGS = {"I-JEPA": ijepa(), "two contexts": ijepa(num_contexts=2), "unbiased": ijepa(mode="unbiased"),
           "V-JEPA": video("sincos", reg_coeff=0.1),
           "V-JEPA 2": video("rotary", mask_token_by="clip"), "V-JEPA 2 unbiased": video("rotary", mode="unbiased")}


def run(config, pad_tokens_to, dtype, step=0):
    torch.manual_seed(0)
    objective = config.build()
    for token in getattr(objective.predictor, "mask_tokens", []):  # zeros would hide a wrong number
        torch.nn.init.normal_(token)
    objective = objective.to(dtype)
    objective.pad_tokens_to = pad_tokens_to
    g = torch.Generator().manual_seed(1)
    batch = {"images": torch.randn(3, 3, 32, 32, generator=g, dtype=dtype)} if isinstance(config, LatentPredictionConfig) \
        else {"clips": torch.randn(3, 3, 4, 16, 16, generator=g, dtype=dtype)}
    batch = objective.prepare(batch, seed=0, step=step, first_sample=0)
    losses = objective(batch)
    losses["loss"].backward()
    grads = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, grads, batch["masks"]


@pytest.mark.parametrize("multiple", [8, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_neither_loss_nor_gradients(name, multiple):
    (plain, grads, _), (padded, padded_grads, masks) = (run(CONFIGS[name], n, torch.float64) for n in (0, multiple))
    for key in plain.keys() - {"features"}:
        assert abs(float(padded[key] / plain[key]) - 1) < 1e-12, key
    assert grads.keys() == padded_grads.keys()
    for key, grad in grads.items():
        # the key part of qkv.bias has no gradient but rounding noise
        scale = grads[key.replace("qkv.bias", "qkv.weight")].norm()
        assert (padded_grads[key] - grad).norm() <= 1e-12 * scale, key
    # what the monitors see are rows of the unpadded target, in their order
    rows = padded["features"]
    assert error(rows, plain["features"][: len(rows)]) < 1e-12
    for packed in masks if isinstance(masks, list) else [masks]:
        assert len(packed.context_idx) % multiple == 0
        for lists in ("predictor_idx", "prediction_idx", "target_rows", "prediction_weight"):
            assert len(getattr(packed, lists)) % (4 * multiple) == 0, lists


def test_padding_in_float32_on_the_default_kernels():
    (plain, grads, _), (padded, padded_grads, _) = (run(CONFIGS["V-JEPA 2"], n, torch.float32) for n in (0, 100))
    assert abs(float(padded["loss"] / plain["loss"]) - 1) < 1e-6
    for key, grad in grads.items():
        if "qkv.bias" not in key:
            assert error(padded_grads[key], grad) < 2e-5, key


def test_target_rows_are_the_rows_of_all_targets():
    """The target encoder's last block for these rows only."""
    for config in CONFIGS.values():
        torch.manual_seed(0)
        objective = config.build().double()
        key, shape = ("images", (3, 3, 32, 32)) if isinstance(config, LatentPredictionConfig) else \
            ("clips", (3, 3, 4, 16, 16))
        batch = objective.prepare({key: torch.randn(shape, dtype=torch.float64)}, seed=0, step=0, first_sample=0)
        masks = batch["masks"][0] if isinstance(batch["masks"], list) else batch["masks"]
        whole = objective.target_encoder(batch[key]).flatten(0, 1)
        rows = objective.target_encoder.rows(batch[key], masks)
        assert error(rows, whole[masks.target_rows]) < 1e-14
        assert torch.equal(masks.target_rows[masks.prediction_target_row], masks.prediction_target_idx)


def test_report_counts_shapes_and_waste():
    config = MultiBlock()
    batches = [config.sample((16, 16), 8, seed=0, step=step).pack() for step in range(30)]
    report = padding_report(batches, 64)
    padded = [pad(masks, 64) for masks in batches]
    shapes = {tuple((name, tuple(value.shape) if isinstance(value, torch.Tensor) else value)
                    for name, value in vars(masks).items() if name != "counts") for masks in padded}
    assert report.num_shapes == len(shapes) and 1 < report.num_shapes < 30
    assert report.waste["predictor"] == (sum(len(m.predictor_idx) for m in padded)
                                         / sum(len(m.predictor_idx) for m in batches) - 1)
    assert padding_report(batches, 1).waste["context"] == 0


def test_bad_padding():
    masks = MultiBlock().sample((16, 16), 2, seed=0, step=0).pack()
    with pytest.raises(ValueError, match="^multiple must be at least 1, got 0$"):
        pad(masks, 0)
    with pytest.raises(ValueError, match="^masks must not be padded already$"):
        pad(pad(masks, 64), 64)
    assert pad(masks, 1).predictor_idx.equal(masks.predictor_idx)


def test_compiled_objective_takes_any_masks_without_compiling_again():
    """All of V-JEPA 2 in one graph, whatever the numbers of tokens; backend eager, since only guards are in question."""
    config = dataclasses.replace(CONFIGS["V-JEPA 2"], encoder=dataclasses.replace(CONFIGS["V-JEPA 2"].encoder, depth=1),
                                 predictor=VideoPredictorConfig(embed_dim=24, depth=1, num_heads=2))
    objective = config.build()
    compiled = torch.compile(objective, fullgraph=True, dynamic=True, backend="eager")
    clips = torch.randn(3, 3, 4, 16, 16)
    # two sizes that happen to be equal are not taken for the same
    with torch.fx.experimental._config.patch(use_duck_shape=False), torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(10):
            batch = objective.prepare({"clips": clips}, seed=0, step=step, first_sample=0)
            loss = compiled(batch)["loss"]
            loss.backward()
            assert torch.equal(loss, objective(batch)["loss"])
