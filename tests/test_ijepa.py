"""I-JEPA against what the official code computed: forward, gradients, three steps of training, in float32 and float64."""

import contextlib

import pytest
import torch
from golden_data import assert_moments, config, error, golden, under

from jepa_fast import ops
from jepa_fast.masking import Masks, MultiBlock
from jepa_fast.models.encoder import VisionTransformerConfig
from jepa_fast.models.predictor import PredictorConfig
from jepa_fast.nn.positions import sincos_2d
from jepa_fast.objectives.latent_prediction import LatentPrediction, LatentPredictionConfig
from jepa_fast.optim import AdamWEMA, param_groups


def build(name: str, dtype: torch.dtype) -> LatentPrediction:
    """The model of a golden file, with its weights; loading is strict: our names are the official ones."""
    settings = config(name)
    args, encoder = settings["args"], settings["encoder"]
    size = args["data"]["crop_size"]
    objective = LatentPredictionConfig(
        encoder=VisionTransformerConfig(image_size=size, patch_size=args["data"]["patch_size"],
                                        embed_dim=encoder["embed_dim"], depth=encoder["depth"],
                                        num_heads=encoder["num_heads"]),
        predictor=PredictorConfig(embed_dim=args["meta"]["pred_emb_dim"], depth=args["meta"]["pred_depth"]),
        masking=MultiBlock(min_keep=1)).build()  # masks come from the file
    data = golden(name)
    objective.encoder.load_state_dict(under(data, "weights/encoder/"))
    objective.predictor.load_state_dict(under(data, "weights/predictor/"))
    objective.target_encoder.encoder.load_state_dict(under(data, "weights/target_encoder/"))
    return objective.to(dtype)


def masks_of(name: str, step: int, num_tokens: int) -> Masks:
    inputs = under(golden(name), f"input/step{step}/")
    lists = {kind: [inputs[key] for key in sorted(inputs) if key.startswith(kind)] for kind in ("context", "target")}
    return Masks.from_lists(lists["context"], lists["target"], num_tokens)


def batch_of(objective: LatentPrediction, name: str, step: int, dtype: torch.dtype) -> dict:
    rows, columns = objective.config.encoder.grid
    return {"images": golden(name)[f"input/step{step}/pixels"].to(dtype),
            "masks": masks_of(name, step, rows * columns).pack()}


PRECISIONS = [pytest.param(torch.float32, "", 5e-6, id="float32"), pytest.param(torch.float64, "f64/", 1e-10, id="float64")]


@pytest.mark.parametrize("name", ["ijepa_model", "ijepa_two_contexts"])
@pytest.mark.parametrize("dtype, prefix, tolerance", PRECISIONS)
def test_forward(name, dtype, prefix, tolerance):
    objective, data = build(name, dtype), golden(name)
    batch = batch_of(objective, name, 1, dtype)
    masks = batch["masks"]
    target = objective.targets(batch["images"], masks)
    prediction = objective.predict(batch["images"], masks)
    B, N, D = data["out/target_full"].shape
    assert error(target.view(B, N, D), data["out/target_full"]) < 5e-6
    normalised = torch.nn.functional.layer_norm(target, (D,))
    assert error(normalised[masks.prediction_target_idx].view_as(data["out/target"]), data["out/target"]) < 5e-6
    expected = data[f"{prefix}out/prediction"]
    assert error(prediction.view_as(expected), expected) < tolerance
    loss = objective(batch)["loss"].detach()
    assert abs(float(loss) / float(data[f"{prefix}train/loss"][0]) - 1) < max(tolerance / 2, 1e-10)


def test_context_tokens():
    objective = build("ijepa_model", torch.float32)
    masks = (batch := batch_of(objective, "ijepa_model", 1, torch.float32))["masks"]
    from jepa_fast.nn.block import Sequences

    context = objective.encoder.context(batch["images"], masks.context_idx,
                                        Sequences(masks.context_cu_seqlens, masks.context_max_seqlen))
    expected = golden("ijepa_model")["out/context"]
    assert error(context.view_as(expected), expected) < 5e-6


@pytest.mark.parametrize("dtype, prefix, tolerance", [(torch.float32, "", 3e-5), (torch.float64, "f64/", 1e-10)])
def test_gradients_of_step_one(dtype, prefix, tolerance):
    objective, data = build("ijepa_model", dtype), golden("ijepa_model")
    objective(batch_of(objective, "ijepa_model", 1, dtype))["loss"].backward()
    checked = 0
    for role, module in objective.roles().items():
        for name, parameter in module.named_parameters():
            key = f"grad/{role}/{name}"
            assert (parameter.grad is None) == (key not in data), name
            if parameter.grad is None:
                continue
            checked += 1
            if dtype == torch.float64:
                assert_moments(parameter.grad, data[f"f64/{key}"], tolerance, name)
            elif not name.endswith("qkv.bias"):  # its key part is rounding noise (golden README, section 9)
                assert error(parameter.grad, data[key]) < tolerance, name
    assert checked == sum(key.startswith("grad/") for key in data)


@pytest.mark.parametrize("dtype, row, tolerance", [(torch.float32, 0, 1e-4), (torch.float64, 1, 1e-10)])
def test_three_training_steps(dtype, row, tolerance):
    objective, data = build("ijepa_model", dtype), golden("ijepa_model")
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.04), averages=objective.averages())
    losses = []
    for step in range(3):
        for group, lr, weight_decay in zip(optimizer.param_groups, data["train/lr"][step].tolist(),
                                           data["train/weight_decay"][step].tolist(), strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        optimizer.momentum = float(data["train/momentum"][step])
        loss = objective(batch_of(objective, "ijepa_model", step + 1, dtype))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    expected = data["f64/train/loss" if row else "train/loss"]
    assert error(torch.tensor(losses, dtype=torch.float64), expected) < (1e-10 if row else 2e-6)
    roles = objective.roles() | {"target_encoder": objective.target_encoder.encoder}
    for role, module in roles.items():
        for name, parameter in module.named_parameters():
            limit = 2e-3 if name.endswith("qkv.bias") and not row else tolerance
            assert_moments(parameter, data[f"final/{role}/{name}"][row], limit, f"{role} {name}")


ROW_WISE = ("gather_patches", "gather_tokens", "scatter_tokens", "assemble_predictor_input", "bias_gelu",
            "bias_gelu_backward", "latent_loss", "latent_loss_backward", "adamw_ema_", "ema_update_")


@pytest.mark.skipif(any(ops.why_not(ops.TABLE[op]["triton"], "cpu") for op in ROW_WISE), reason="Triton is not emulated")
def test_three_training_steps_on_triton():
    """The row-wise kernels together, on the calls and dtypes that a model makes."""
    with contextlib.ExitStack() as stack:
        for op in ROW_WISE:
            stack.enter_context(ops.use_backend("triton", op))
        test_three_training_steps(torch.float32, 0, 1e-4)


def test_initialisation_matches_the_official_statistics():
    """Mean, spread and range of every freshly initialised parameter, as far as their sizes let chance differ."""
    data = under(golden("ijepa_model"), "init/")
    torch.manual_seed(0)
    objective = build("ijepa_model", torch.float32).config.build()
    roles = objective.roles() | {"target_encoder": objective.target_encoder.encoder}
    for key, (mean, std, low, high) in ((key, value.tolist()) for key, value in data.items()):
        role, name = key.split("/", 1)
        parameter = roles[role].get_parameter(name).detach()
        if std == 0 or "pos_embed" in name:
            assert float(parameter.min()) == pytest.approx(low, abs=1e-6), key
            assert float(parameter.max()) == pytest.approx(high, abs=1e-6), key
        else:
            spread = 5 * std / parameter.numel() ** 0.5
            assert float(parameter.mean()) == pytest.approx(mean, abs=2 * spread), key
            assert float(parameter.std()) == pytest.approx(std, abs=2 * spread), key


@pytest.mark.parametrize("key", ["sincos_2d/dim48_grid6", "sincos_2d/dim64_grid5"])
def test_position_tables(key):
    expected = golden("ijepa_tables")[key]
    side = int(expected.shape[0] ** 0.5)
    assert error(sincos_2d(expected.shape[1], (side, side)), expected) < 1e-12
