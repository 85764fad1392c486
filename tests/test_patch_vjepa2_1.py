"""V-JEPA 2.1 (facebookresearch/vjepa2), patched: here its stand-in, in test_parity_vjepa2_1.py a checkout."""

import copy
import functools
import pathlib

import pytest
import torch
import torch.nn.functional as F
from checkouts import checkout
from foreign_models import assert_as_good, numbers, train, unchanged
from golden_data import assert_moments, error, golden, under
from test_patch_vjepa2 import counting, randomise
from torch import nn

from jepa_fast.patches import _vjepa2_packed, auto, vjepa2_1
from jepa_fast.patches._report import PatchError

PACKAGE = "app.vjepa_2_1"
MODULES = (f"{PACKAGE}.models.vision_transformer", f"{PACKAGE}.models.predictor", f"{PACKAGE}.wrappers",
           f"{PACKAGE}.models.utils.modules", f"{PACKAGE}.models.utils.masks_dist", "src.masks.utils")
B = 2
norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
MASKS = {"video": ([[torch.tensor([[0, 3, 5], [1, 2, 7]]), torch.tensor([[4, 1], [6, 0]])]],
                   [[torch.tensor([[1, 2], [0, 4]]), torch.tensor([[0, 3, 7], [5, 2, 1]])]]),
         "image": ([[torch.tensor([[2], [1]])]], [[torch.tensor([[0, 3], [2, 0]])]])}


@pytest.fixture
def code():
    with checkout(pathlib.Path(__file__).parent / "stand_ins/vjepa2_1", *MODULES) as modules:
        yield modules


def make(code, encoder=None, predictor=None, **both) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    both = dict(img_size=32, num_frames=4, norm_layer=norm_layer, use_rope=True, interpolate_rope=True, embed_dim=16,
                num_heads=1, img_temporal_dim_size=1) | both
    return randomise(code[2].MultiSeqWrapper(code[0].VisionTransformer(**dict(depth=12) | both, **encoder or {})),
                     code[2].PredictorMultiSeqWrapper(code[1].VisionTransformerPredictor(
                         **both, **dict(predictor_embed_dim=24, depth=4, use_mask_tokens=True, zero_init_mask_tokens=False,
                                        return_all_tokens=True) | (predictor or {}))))


def clips(mod: str) -> list[torch.Tensor]:
    return [torch.randn(B, 3, 4 if mod == "video" else 1, 32, 32)]


def loss_of(code, mod, encoder, predictor, target, x, masks=None, distance=torch.abs):
    """The loss as app.vjepa_2_1.train computes it, with the weights of distances."""
    masks_x, masks_y = masks or MASKS[mod]
    x = [c.to(next(encoder.parameters()).dtype) for c in x]
    with torch.no_grad():
        h = [F.layer_norm(hi.unflatten(2, (4, -1)), (hi.shape[2] // 4,)).flatten(2)
             for hi in target(x, gram_mode=False, training_mode=True)]
    z, context = predictor(encoder(x, masks_x, gram_mode=False, training_mode=True), masks_x, masks_y, mod=mod)
    near = code[4].compute_mask_distance(masks_y, masks_x, 2 if masks is None else 5, False)
    loss = 0
    for i, hi in enumerate(h):
        for zij, cij, mx, my, d in zip(z[i], context[i], masks_x[i], masks_y[i], near[i], strict=True):
            loss += distance(zij - code[5].apply_masks(hi, [my])).mean() / len(z[i])
            if cij is not None:
                difference = distance(cij - code[5].apply_masks(hi, [mx]))
                loss += 0.5 * (difference / d.to(difference.dtype).unsqueeze(-1)).mean() / len(z[i])
    return loss


def step_of(code, mod, models, kind, x):
    return [torch.zeros((), dtype=torch.float64) if value is None else value for value in numbers(
        lambda encoder, predictor: loss_of(code, mod, encoder, predictor, copy.deepcopy(encoder), x, distance=torch.square),
        models, kind)]


@pytest.mark.parametrize("kind, mod", [("float32", "video"), ("float64", "image"), ("autocast", "video")])
def test_step(code, kind, mod, monkeypatch):
    runs = counting(monkeypatch, _vjepa2_packed, "run_packed")
    models, x = make(code), clips(mod)
    exact, theirs = step_of(code, mod, models, "float64", x), step_of(code, mod, models, kind, x)
    with vjepa2_1.apply(modules=code[0]):
        ours = step_of(code, mod, models, kind, x)
    assert len(runs) == 16  # each of the blocks of encoder and predictor once, for all masks
    assert_as_good(ours, theirs, exact, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions(code, dtype):
    """Positions are float32, which the original's attention refuses beside values in half precision: vjepa2#175."""
    encoder, predictor = (model.eval() for model in make(code))
    x, (masks_x, masks_y) = clips("video"), MASKS["video"]
    with torch.no_grad():
        exact = encoder.double()([c.double() for c in x])[0]
        x, encoder, predictor = [c.to(dtype) for c in x], encoder.to(dtype), predictor.to(dtype)
        with pytest.raises(RuntimeError, match="dtype"):
            encoder(x)
        with vjepa2_1.apply(encoder), vjepa2_1.apply(predictor):
            out = encoder(x)[0]
            assert out.dtype == dtype and error(out, exact) < (0.05 if dtype == torch.bfloat16 else 0.01)
            context = encoder(x, masks_x, training_mode=True)
            assert all(part.dtype == dtype for part in predictor(context, masks_x, masks_y)[0][0])


@pytest.mark.parametrize("settings", [
    {"use_activation_checkpointing": True}, {"drop_path_rate": 0.3}, {"predictor": {"is_causal": True}},
    {"predictor": {"return_all_tokens": False}}], ids=str)
def test_training(code, settings):
    """Two steps on a model patched alive: the same random numbers, the same losses."""
    models = [model.double() for model in make(code, **settings)]
    batches = [(clips("video"),) for _ in range(2)]

    def losses():
        torch.manual_seed(1)
        return train(lambda *args: loss_of(code, "video", *args), models, batches)

    expected, keys = losses(), [list(model.state_dict()) for model in models]
    with vjepa2_1.apply(models[0]), auto(models[1]):
        assert [list(model.state_dict()) for model in models] == keys
        assert losses() == pytest.approx(expected, abs=1e-9)


def test_undo_and_report(code):
    with unchanged(code), vjepa2_1.apply(modules=code[0], strict_numerics=True) as report:
        report.replaced.pop("repeat_interleave_batch", None)  # imported by the official predictor, called by nothing
        assert report.replaced == {
            "RoPEAttention.forward": 1, "Attention.forward": 1, "Block.forward": 1, "CrossAttention.forward": 1,
            "VisionTransformerPredictor.forward": 1, "MultiSeqWrapper.forward": 1, "PredictorMultiSeqWrapper.forward": 1,
            "apply_masks": 3, "compute_mask_distance": 1}
        assert "fused blocks have first derivatives only" in str(report) and "rotary angles" not in str(report)
    with pytest.raises(PatchError, match="got a Linear"):
        vjepa2_1.apply(nn.Linear(1, 1))


@pytest.mark.parametrize("settings", [
    dict(n_registers=2), dict(has_cls_first=True, n_registers=1), dict(interpolate_rope=True), dict(is_causal=True),
    dict(use_sdpa=False, qk_scale=0.3), dict(proj_drop=0.5)], ids=str)
def test_block_alone(code, settings):
    """Prefix and suffix without position, stretched grids, attention weights, hooks on the way."""
    extra = settings.get("n_registers", 0) + settings.get("has_cls_first", False)
    settings = {"drop" if name == "proj_drop" else name: value for name, value in settings.items()}
    torch.manual_seed(0)
    block = code[3].Block(24, 2, qkv_bias=True, use_rope=True, grid_size=2, **settings).eval()
    x = torch.randn(B, 8 + extra, 24)
    calls = [dict(T=2, H_patches=2, W_patches=2), dict(mask=torch.randint(0, 30, (B, 8)), H_patches=3, W_patches=5),
             dict(mask=torch.randint(0, 8, (B, 8)))] + [dict(T=2, H_patches=2, W_patches=2, return_attn=True)]

    def outputs(hooked):
        seen = []
        handle = block.attn.register_forward_hook(lambda *args: seen.append(args)) if hooked else None
        torch.manual_seed(1)
        results = [block(x, **call) for call in calls]
        if hooked:
            handle.remove()
            assert len(seen) == len(calls)
        return results

    expected = outputs(False)
    for hooked in (False, True):
        with vjepa2_1.apply(block, strict_numerics=True):
            ours = outputs(hooked)
        for (a, weights), (b, their_weights) in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(weights, their_weights)


def test_mask_distance(code):
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(B, 3, 75, generator=generator).argsort(-1)
    masks_y, masks_x = [[order[:, 0, :6], order[:, 1, :9]]], [[order[:, 0, 6:40], order[:, 1, 9:10]]]
    for offset in (False, True):
        side = 32 if offset else 5
        expected = code[4].compute_mask_distance(masks_y, masks_x, side, offset)
        with vjepa2_1.apply(modules=code[0]):
            ours = code[4].compute_mask_distance(masks_y, masks_x, side, offset)
        for a, b in zip(ours[0], expected[0], strict=True):
            torch.testing.assert_close(a, b.view(a.shape), atol=2e-3 if offset else 1e-4, rtol=0)


def test_official_numbers(code):
    """The official weights in the patched stand-in give the official losses and gradients."""
    data, side = golden("vjepa21_model"), dict(img_size=80, embed_dim=32, num_heads=2, interpolate_rope=True)
    with vjepa2_1.apply(modules=code[0]):
        encoder, predictor = make(code, **side, predictor=dict(predictor_embed_dim=32))
        models = [encoder, predictor, copy.deepcopy(encoder)]
        for model, role in zip(models, ("encoder", "predictor", "target_encoder"), strict=True):
            model.load_state_dict(under(data, f"weights/{role}/"))
            model.double()
        total = 0
        for kind, mod in (("clips", "video"), ("images", "image")):
            inputs, pixels = under(data, f"input/{kind}/"), data[f"input/{kind}"].double()
            masks = [[[inputs[f"{name}{i}"] for i in range(len(inputs) // 2)]] for name in ("context", "target")]
            pixels = pixels.unsqueeze(2) if pixels.dim() == 4 else pixels
            loss = loss_of(code, mod, *models, [pixels], masks)
            expected = under(data, f"f64/train/{kind}/")
            theirs = expected["prediction_loss"] + 0.5 * expected["context_loss"]
            assert float(loss.detach()) == pytest.approx(float(theirs), rel=1e-6)
            total = total + 0.5 * loss
        total.backward()
    for role, model in (("encoder", encoder), ("predictor", predictor)):
        for key, expected in under(data, f"f64/grad/{role}/").items():
            assert_moments(model.get_parameter(key).grad, expected, 1e-6, key)
