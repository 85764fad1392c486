"""V-JEPA and V-JEPA 2 against what the official code computed: tables, forward, gradients, three steps of training."""

import dataclasses

import pytest
import torch
from golden_data import assert_moments, config, error, golden, under

from jepa_fast.masking import Masks, MultiBlock3D, PackedMasks
from jepa_fast.models.video_encoder import VideoTransformerConfig
from jepa_fast.models.video_predictor import VideoPredictorConfig
from jepa_fast.nn.block import Sequences
from jepa_fast.nn.positions import sincos_2d, sincos_3d
from jepa_fast.objectives.latent_prediction import LatentPredictionConfig
from jepa_fast.objectives.video_prediction import VideoPrediction, VideoPredictionConfig, variance_loss
from jepa_fast.optim import AdamWEMA, clip_scale, param_groups

MODELS = ["vjepa_model", "vjepa2_model_a", "vjepa2_model_b"]
PRECISIONS = [pytest.param(torch.float32, "", id="float32"), pytest.param(torch.float64, "f64/", id="float64")]


def build(name: str, dtype: torch.dtype = torch.float32) -> VideoPrediction:
    """The model of a golden file, with its weights; loading is strict: our names are the official ones."""
    args, encoder, data = config(name)["args"], config(name)["encoder"], golden(name)
    is_rotary = args["model"]["use_rope"]
    tokens = sum(key.startswith("weights/predictor/backbone.mask_tokens.") for key in data)
    objective = VideoPredictionConfig(
        encoder=VideoTransformerConfig(image_size=args["data"]["crop_size"], num_frames=args["data"]["num_frames"],
                                       patch_size=args["data"]["patch_size"], embed_dim=encoder["embed_dim"],
                                       depth=encoder["depth"], num_heads=encoder["num_heads"],
                                       positions="rotary" if is_rotary else "sincos"),
        predictor=VideoPredictorConfig(embed_dim=args["model"]["pred_embed_dim"], depth=args["model"]["pred_depth"],
                                       num_heads=args["model"]["pred_num_heads"], num_mask_tokens=tokens),
        masking=MultiBlock3D(mode="unbiased"),  # masks come from the file
        mask_token_by="clip" if is_rotary else "mask", num_clip_lengths=len(groups_of(name))).build()
    for role, module in modules(objective).items():
        module.load_state_dict(under(data, f"weights/{role}/backbone."))
    return objective.to(dtype)


def modules(objective: VideoPrediction) -> dict[str, torch.nn.Module]:
    return objective.roles() | {"target_encoder": objective.target_encoder.encoder}


def groups_of(name: str) -> list[str]:
    return ["group0/", "group1/"] if name.endswith("_b") else [""]


def batch_of(objective: VideoPrediction, name: str, step: int, dtype: torch.dtype) -> dict:
    clips, masks = [], []
    for group in groups_of(name):
        inputs = under(golden(name), f"input/step{step}/{group}")
        clips.append(inputs["pixels"].to(dtype))
        lists = ([inputs[f"{kind}{i}"] for i in range(2)] for kind in ("context", "target"))
        num_tokens = torch.Size(objective.encoder.patch_embed.grid(clips[-1])).numel()
        masks.append(objective.pack(Masks.from_lists(*lists, num_tokens, is_paired=True)))
    return {"clips": clips, "masks": masks}


def split_by_kind(rows: torch.Tensor, expected: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = rows.split([value.shape[0] * value.shape[1] for value in expected])
    return [part.view_as(value) for part, value in zip(parts, expected, strict=True)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, prefix", PRECISIONS)
def test_forward(name, dtype, prefix):
    objective, data = build(name, dtype), golden(name)
    batch, limit = batch_of(objective, name, 1, dtype), 1e-10 if prefix else 5e-6
    for number, group in enumerate(groups_of(name)):
        clips, masks = batch["clips"][number], batch["masks"][number]
        target = objective.targets(clips)
        assert error(target.view_as(data[f"out/{group}target_full"]), data[f"out/{group}target_full"]) < 5e-6
        normalised = torch.nn.functional.layer_norm(target, target.shape[-1:])[masks.prediction_target_idx]
        expected = [data[f"out/{group}target{i}"] for i in range(2)]
        for ours, value in zip(split_by_kind(normalised, expected), expected, strict=True):
            assert error(ours, value) < 5e-6
        context = objective.encoder.context(clips, masks.context_idx,
                                            Sequences(masks.context_cu_seqlens, masks.context_max_seqlen))
        for kind, rows in (("context", context), ("prediction", objective.predict(clips, masks, number))):
            expected = [data[f"{prefix}out/{group}{kind}{i}"] for i in range(2)]
            for ours, value in zip(split_by_kind(rows, expected), expected, strict=True):
                assert error(ours, value) < limit, (kind, group)
    losses = data[f"{prefix}train/loss"]
    assert abs(float(objective(batch)["loss"].detach()) / float(losses[0]) - 1) < (1e-10 if prefix else 2e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, prefix", PRECISIONS)
def test_gradients_of_step_one(name, dtype, prefix):
    objective, data = build(name, dtype), golden(name)
    objective(batch_of(objective, name, 1, dtype))["loss"].backward()
    checked = 0
    for role, module in objective.roles().items():
        for key, parameter in module.named_parameters():
            key = f"grad/{role}/backbone.{key}"
            assert (parameter.grad is None) == (key not in data), key
            if parameter.grad is None:
                continue
            checked += 1
            if prefix:
                assert_moments(parameter.grad, data[f"f64/{key}"], 1e-10, key)
            elif not key.endswith("qkv.bias"):  # its key part is rounding noise (golden README, section 9)
                assert error(parameter.grad, data[key]) < 3e-5, key
    assert checked == sum(key.startswith("grad/") for key in data)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, row", [(torch.float32, 0), (torch.float64, 1)])
def test_three_training_steps(name, dtype, row):
    objective, data = build(name, dtype), golden(name)
    optimizer = AdamWEMA(param_groups(objective.roles(), 0.04), averages=objective.averages())
    losses = []
    for step in range(3):
        for group, lr, weight_decay in zip(optimizer.param_groups, data["train/lr"][step].tolist(),
                                           data["train/weight_decay"][step].tolist(), strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        optimizer.momentum = float(data["train/momentum"][step])
        loss = objective(batch_of(objective, name, step + 1, dtype))["loss"]
        loss.backward()
        scale = None
        if name == "vjepa_model" and step == 2:  # clipped once epoch > warm-up
            norms, scales = clip_scale([role.parameters() for role in objective.roles().values()], 0.05)
            assert error(norms, data["train/norms_before_clipping"]) < 1e-5
            scale = scales.repeat(2)
        optimizer.step(grad_scale=scale)
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    ours, expected = torch.tensor(losses, dtype=torch.float64), data["f64/train/loss" if row else "train/loss"]
    assert error(ours[:1], expected[:1]) < (1e-10 if row else 2e-6)
    # Adam's first steps blow differences of tiny gradients up (golden README, section 9)
    assert error(ours, expected) < (1e-10 if row else 5e-6)
    for role, module in modules(objective).items():
        for key, parameter in module.named_parameters():
            # in model_b the signs that make one gradient of predictor_proj.bias cancel exactly, and rounding noise in
            # its place grows in Adam as that of qkv.bias does (golden README, section 9)
            limit = 1e-10 if row else 2e-3 if key.endswith(("qkv.bias", "predictor_proj.bias")) else 1e-4
            assert_moments(parameter, data[f"final/{role}/backbone.{key}"][row], limit, f"{role} {key}")


def test_variance_loss():
    name = "vjepa_model"
    objective, data = build(name), golden(name)
    batch = batch_of(objective, name, 1, torch.float32)
    prediction = objective.predict(batch["clips"][0], batch["masks"][0])
    ours = float(variance_loss(prediction, batch["masks"][0]).detach())
    assert abs(ours / float(data["train/loss_reg"][0]) - 1) < 2e-6


def test_position_tables():
    data = golden("vjepa_tables")
    names = [key for key in data if key.startswith("sincos")]
    for key in names:
        kind, dim, grid, *rest = key.replace("/", "_").replace("sincos_", "").split("_")
        dim, side = int(dim.removeprefix("dim")), int(grid.removeprefix("grid"))
        if kind == "2d":
            ours = sincos_2d(dim, (side, side), first="row")
        else:
            ours = sincos_3d(dim, (int(rest[0].removeprefix("depth")), side, side), is_uniform=rest[1] == "uniform")
        assert (ours - data[key]).abs().max() < 1e-12, key
    assert len(names) >= 4


@pytest.mark.parametrize("name", ["vjepa_model", "vjepa2_model_a"])
def test_initialisation(name):
    """Mean, deviation and range of every parameter as officially initialised, from other random numbers."""
    torch.manual_seed(0)
    data, objective = golden(name), build(name)
    encoder = dataclasses.replace(objective.config.encoder, rescale_init=name != "vjepa_model")
    fresh = dataclasses.replace(objective.config, encoder=encoder).build()
    for role, module in fresh.roles().items():
        for key, parameter in module.named_parameters():
            mean, std, _, _ = data[f"init/{role}/backbone.{key}"].tolist()
            count = parameter.numel()
            own = float(parameter.detach().double().std(correction=0))
            assert abs(float(parameter.detach().mean()) - mean) <= 6 * std / count**0.5 + 1e-12, key
            assert abs(own - std) <= 4 * max(own, std) / count**0.5 + 1e-12, (key, own, std)


def test_image_as_a_tubelet_of_itself():
    objective = build("vjepa2_model_a", torch.float64)
    images = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    clips = images.unsqueeze(2).repeat(1, 1, 2, 1, 1)
    assert error(objective.encoder.frames(images), objective.encoder(clips)) < 1e-13


@pytest.mark.parametrize("change, message", [
    ({"image_size": 30}, "image_size must be a multiple of patch_size, got 30 and 16"),
    ({"num_frames": 5}, "num_frames must be a multiple of tubelet_size, got 5 and 2"),
    ({"embed_dim": 100}, "embed_dim must be a multiple of num_heads, got 100 and 6"),
])
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        VideoTransformerConfig(**change)


def test_bad_clips_are_named():
    objective = build("vjepa_model")
    with pytest.raises(ValueError, match=r"multiples of 2 frames and 4 x 4 pixels, got \[1, 3, 5, 20, 20\]"):
        objective.encoder(torch.zeros(1, 3, 5, 20, 20))
    with pytest.raises(ValueError, match=r"grid of the position table, \(3, 5, 5\), got \(4, 5, 5\)"):
        clips = torch.zeros(1, 3, 8, 20, 20)
        objective(objective.prepare({"clips": clips}, seed=0, step=0, first_sample=0))
    with pytest.raises(ValueError, match="num_mask_tokens must be at least 2, one per kind of mask, got 1"):
        VideoPredictionConfig(predictor=VideoPredictorConfig(num_mask_tokens=1))


def test_masks_of_a_batch():
    objective = build("vjepa2_model_a")
    batch = objective.prepare({"clips": torch.zeros(2, 3, 6, 20, 20)}, seed=1, step=2, first_sample=4)
    assert isinstance(batch["masks"][0], PackedMasks) and batch["masks"][0].num_contexts == 2


@pytest.mark.parametrize("make", [LatentPredictionConfig, VideoPredictionConfig])
def test_masks_are_where_the_batch_is(make):
    """On the device "meta" here, as on a GPU there."""
    with torch.device("meta"):
        objective = make().build()
        shape = (1, 3, 224, 224) if make is LatentPredictionConfig else (1, 3, 16, 224, 224)
        batch = {"images": torch.empty(shape), "clips": torch.empty(shape)}
    masks = objective.prepare(batch, seed=0, step=0, first_sample=0)["masks"]
    masks = masks if isinstance(masks, PackedMasks) else masks[0]
    assert masks.predictor_idx.is_meta and masks.context_cu_seqlens.is_meta
