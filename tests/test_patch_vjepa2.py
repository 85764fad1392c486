"""facebookresearch/vjepa2, patched: here its stand-in, in test_parity_vjepa2.py a checkout."""

import copy
import functools
import pathlib

import pytest
import torch
import torch.nn.functional as F
from checkouts import checkout
from foreign_models import assert_as_good, numbers, train, unchanged
from golden_data import assert_moments, config, error, golden, under
from torch import nn

from jepa_fast import patches
from jepa_fast.drop_in.attention import ACRoPEAttention, RoPEAttention, is_frame_causal
from jepa_fast.drop_in.collators import VJEPA2MaskCollator
from jepa_fast.patches import _vjepa2_packed, vjepa2
from jepa_fast.patches._report import PatchError

MODULES = ("src.models.vision_transformer", "src.models.predictor", "src.models.ac_predictor", "src.utils.wrappers",
           "src.models.utils.modules", "src.models.attentive_pooler", "src.masks.multiseq_multiblock3d")
B, SIDE, GRID = 2, 2, (2, 2, 2)
norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
# two masks of clips of 8 tokens, one of clips of 4; an index twice
MASKS_X = [[torch.tensor([[0, 3, 5], [1, 2, 7]]), torch.tensor([[4, 1], [6, 0]])], [torch.tensor([[2], [1]])]]
MASKS_Y = [[torch.tensor([[1, 2], [0, 4]]), torch.tensor([[0, 3, 7], [5, 5, 1]])], [torch.tensor([[0, 3], [2, 0]])]]


@pytest.fixture
def code():
    with checkout(pathlib.Path(__file__).parent / "stand_ins/vjepa2", *MODULES) as modules:
        yield modules


def randomise(*models):
    """Numbers where initialisation has 0 and 1, and attention that is far from uniform."""
    for model in models:
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("bias", "norm", "mask_tokens", "qkv")):
                nn.init.normal_(parameter, std=0.3)
    return models


def make(code, encoder=None, predictor=None, **both) -> tuple[nn.Module, nn.Module]:
    vit, pred, _, wrappers = code[:4]
    torch.manual_seed(0)
    both = dict(img_size=16 * SIDE, num_frames=4, norm_layer=norm_layer, use_rope=True) | both
    both |= dict(embed_dim=32, depth=2, num_heads=2)
    return randomise(wrappers.MultiSeqWrapper(vit.VisionTransformer(**both, **encoder or {})),
                     wrappers.PredictorMultiSeqWrapper(pred.VisionTransformerPredictor(
                         predictor_embed_dim=24, use_mask_tokens=True, zero_init_mask_tokens=False, **both,
                         **predictor or {})))


def clips(dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(B, 3, frames, 32, 32).to(dtype) for frames in (4, 2)]


def loss_of(code, encoder, predictor, target, x, distance=torch.abs):
    """The loss as app.vjepa.train computes it, where distance is abs; signs of rounding errors are not in others."""
    x = [c.to(next(encoder.parameters()).dtype) for c in x]
    with torch.no_grad():
        h = [F.layer_norm(hi, hi.shape[-1:]) for hi in target(x)]
    z = predictor(encoder(x, MASKS_X), MASKS_X, MASKS_Y)
    h = [code[1].apply_masks(hi, masks, concat=False) for hi, masks in zip(h, MASKS_Y, strict=True)]
    pairs = [(a, b) for zi, hi in zip(z, h, strict=True) for a, b in zip(zi, hi, strict=True)]
    return sum(distance(a - b).mean() for a, b in pairs) / len(pairs)


def step_of(code, models, kind, x=None):
    x = clips() if x is None else x
    return [torch.zeros((), dtype=torch.float64) if value is None else value for value in numbers(
        lambda encoder, predictor: loss_of(code, encoder, predictor, copy.deepcopy(encoder), x, torch.square), models,
        kind)]


def counting(monkeypatch, module, name) -> list:
    """Calls of a function from here on."""
    function, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))
    return calls


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "autocast"])
@pytest.mark.parametrize("use_rope", [True, False])
def test_step(code, kind, use_rope, monkeypatch):
    runs = counting(monkeypatch, _vjepa2_packed, "run_packed")
    settings = {} if use_rope else {"num_frames": 4}
    models = make(code, use_rope=use_rope, **settings)
    masks = MASKS_X, MASKS_Y
    x = clips()
    if not use_rope:  # position tables of one length of clip
        monkeypatch.setattr(f"{__name__}.MASKS_X", masks[0][:1])
        monkeypatch.setattr(f"{__name__}.MASKS_Y", masks[1][:1])
        x = x[:1]
    exact, theirs = step_of(code, models, "float64", x), step_of(code, models, kind, x)
    with vjepa2.apply(modules=code[0]):
        ours = step_of(code, models, kind, x)
    assert len(runs) == 4  # each of two blocks of encoder and predictor once, for all masks
    assert_as_good(ours, theirs, exact, kind)


def test_what_is_kept(code):
    """Nothing but x and the output of a block where the model asks for checkpointing, unless told otherwise."""
    encoder, _ = make(code, use_activation_checkpointing=True)
    x, sizes, grads = clips(), [], []
    for activations in (None, "lean", "all"):
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t)
        with vjepa2.apply(encoder, activations=activations), hooks:
            loss = sum(out.square().mean() for outs in encoder(x, MASKS_X) for out in outs)
        sizes.append(sum(t.numel() for t in saved.values()))
        grads.append(torch.autograd.grad(loss, encoder.backbone.blocks[0].attn.qkv.weight)[0])
    assert sizes[0] < sizes[1] < sizes[2]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("settings", [
    {"use_activation_checkpointing": True}, {"drop_path_rate": 0.3}, {"encoder": {"use_silu": True}},
    {"encoder": {"use_sdpa": False}}, {"encoder": {"handle_nonsquare_inputs": False}}, {"encoder": {"drop_rate": 0.2}}],
    ids=str)
def test_training(code, settings):
    """Three steps on a model patched alive: the same random numbers, the same losses."""
    models = [model.double() for model in make(code, **settings)]
    batches = [(clips(),) for _ in range(3)]
    keys = [list(model.state_dict()) for model in models]

    def losses():
        torch.manual_seed(1)
        return train(lambda *args: loss_of(code, *args), models, batches)

    expected = losses()
    with vjepa2.apply(models[0]), patches.auto(models[1]):
        assert [list(model.state_dict()) for model in models] == keys
        assert losses() == pytest.approx(expected, abs=1e-9)


def test_undo_and_report(code):
    with unchanged(code), vjepa2.apply(modules=code[0], strict_numerics=True) as report:
        assert report.replaced == {
            "RoPEAttention.forward": 1, "ACRoPEAttention.forward": 1, "Attention.forward": 1, "Block.forward": 1,
            "ACBlock.forward": 1, "CrossAttention.forward": 1, "VisionTransformerPredictor.forward": 1,
            "VisionTransformerPredictorAC.forward": 1, "MultiSeqWrapper.forward": 1, "PredictorMultiSeqWrapper.forward": 1,
            "MaskCollator": 1, "apply_masks": 3, "repeat_interleave_batch": 2}
        assert code[6].MaskCollator is VJEPA2MaskCollator
        assert "fused blocks have first derivatives only" in str(report) and "rotary angles" not in str(report)
    models = make(code)
    with vjepa2.apply(models[0]) as report:
        assert report.replaced["Block.forward"] == 2 and "apply_masks" in report.replaced
        assert patches.vjepa2.matches(models[0]) and not patches.vjepa2.matches(nn.Linear(1, 1))
    assert "forward" not in vars(models[0].backbone.blocks[0])
    with pytest.raises(PatchError, match="got a Linear"):
        vjepa2.apply(nn.Linear(1, 1))
    with unchanged(code), pytest.raises(ValueError, match="activations must be None or one of"):
        vjepa2.apply(models[0], activations="some")


def test_another_version_is_refused(code, monkeypatch):
    monkeypatch.setattr(code[4].Block, "forward", lambda self, x, mask=None: x)
    with unchanged(code), pytest.raises(PatchError, match="Block.forward must take"):
        vjepa2.apply(modules=code[0])


@pytest.mark.parametrize("where", ["blocks.1", "blocks.0.attn", "blocks.0.mlp.fc1"])
def test_hooks_see_what_they_saw(code, where):
    encoder, _ = make(code)
    seen = []
    encoder.backbone.get_submodule(where).register_forward_hook(lambda module, args, out: seen.append(out))
    x = clips()
    encoder(x, MASKS_X)
    with vjepa2.apply(encoder):
        encoder(x, MASKS_X)
    assert len(seen) == 6
    for theirs, ours in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("predictor, has_cls", [
    ({"return_all_tokens": True}, False), ({"return_all_tokens": True, "chop_last_n_tokens": 1}, False),
    ({"use_rope": False}, True), ({"use_rope": False, "return_all_tokens": True}, True)], ids=str)
def test_predictor_in_order(code, predictor, has_cls):
    """What depends on the order of tokens: no loop over samples, the same order."""
    torch.manual_seed(0)
    model, = randomise(code[1].VisionTransformerPredictor(**dict(
        img_size=32, num_frames=4, embed_dim=32, predictor_embed_dim=24, depth=1, num_heads=2, use_mask_tokens=True,
        use_rope=True, norm_layer=norm_layer) | predictor))
    x = torch.randn(B, 3 + has_cls, 32)
    expected = model(x, MASKS_X[0][0], MASKS_Y[0][1], has_cls=has_cls)
    with vjepa2.apply(model):
        torch.testing.assert_close(model(x, [MASKS_X[0][0]], [MASKS_Y[0][1]], has_cls=has_cls), expected)


def ac_predictor(code, **settings):
    torch.manual_seed(0)
    return randomise(code[2].VisionTransformerPredictorAC(
        img_size=48, num_frames=6, embed_dim=16, predictor_embed_dim=48, depth=2, num_heads=2, norm_layer=norm_layer,
        **settings))[0]


def ac_inputs(T: int, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((B, 9 * T, 16), (B, T, 7), (B, T, 7), (B, T, 6))]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "autocast", "extrinsics", "checkpoints", "plain"])
def test_ac_predictor(code, kind, monkeypatch):
    settings = {"extrinsics": {"use_extrinsics": True}, "checkpoints": {"use_activation_checkpointing": True},
                "plain": {"use_rope": False}}.get(kind, {})
    kind = "float32" if settings else kind
    runs = counting(monkeypatch, vjepa2, "run_block")
    inputs = [ac_inputs(T) for T in (3, 2)]  # shorter sequences see a corner of the mask

    def loss(model):
        dtype = model.predictor_proj.weight.dtype
        return sum(model(*(t.to(dtype) for t in given)).abs().mean() for given in inputs)

    def step(kind):
        return [value for value in numbers(loss, [ac_predictor(code, **settings)], kind) if value is not None]

    exact = step("float64")
    if kind == "bfloat16":  # positions are float32, which the original's attention refuses beside bfloat16 values
        with pytest.raises(RuntimeError, match="dtype"):
            step(kind)
        theirs = step("autocast")
    else:
        theirs = step(kind)
    with vjepa2.apply(modules=code[0]):
        ours = step(kind)
    assert len(runs) == (8 if settings.get("use_activation_checkpointing") else 4)
    if kind == "bfloat16":
        assert all(float((a.double() - b).norm() / b.norm().clamp_min(1e-3)) < 0.1
                   for a, b in zip(ours[:1], exact[:1], strict=True))
        assert all(a.dtype == torch.bfloat16 for a in ours)
    else:
        assert_as_good(ours, theirs, exact, kind)


def test_attention_mask_of_another_kind(code):
    """A dense mask that is not frame-causal goes through PyTorch's own attention."""
    model, inputs = ac_predictor(code), ac_inputs(3)
    model.attn_mask[:11, 11:] = True
    assert not is_frame_causal(model.attn_mask, 11)
    expected = model(*inputs)
    with vjepa2.apply(model):
        torch.testing.assert_close(model(*inputs), expected)
        model.attn_mask[:11, 11:] = False  # in place: compared again
        assert not torch.allclose(model(*inputs), expected, atol=1e-4)


ATTENTIONS = [dict(use_sdpa=False, qk_scale=0.3), dict(is_causal=True), dict(proj_drop=0.5),
              dict(attn_drop=0.5, use_sdpa=False), dict(use_sdpa=False, attn_mask=True)]


@pytest.mark.parametrize("settings", ATTENTIONS, ids=str)
@pytest.mark.parametrize("name", ["RoPEAttention", "ACRoPEAttention", "Attention"])
def test_attention_alone(code, name, settings):
    settings = dict(settings)
    mask = torch.rand(8, 8) > 0.3 if settings.pop("attn_mask", False) else None
    torch.manual_seed(0)
    grid = {} if name == "Attention" else {"grid_size": 2}
    layer = getattr(code[4], name)(24, 2, qkv_bias=True, **grid, **settings)
    where = {"T": 2, "H": 2, "W": 2} if name == "ACRoPEAttention" else {}
    x = torch.randn(B, 8, 24)

    def outputs(layer):
        torch.manual_seed(2)
        return layer(x, attn_mask=mask, **where), layer.eval()(x, attn_mask=mask, **where), layer.train()

    train_, eval_, _ = outputs(layer)
    for strict in (True, False):
        with vjepa2.apply(layer, strict_numerics=strict):
            ours = outputs(layer)
        torch.testing.assert_close(ours[0], train_)
        if strict or "proj_drop" not in settings:
            torch.testing.assert_close(ours[1], eval_)
    if "proj_drop" in settings:  # eval drops nothing by default
        layer.eval()
        layer.proj_drop_prob = 0.0
        torch.testing.assert_close(ours[1], layer(x, attn_mask=mask, **where))


def test_pooler_and_frozen_encoder(code):
    torch.manual_seed(0)
    encoder, _ = make(code)
    pooler = code[5].AttentivePooler(embed_dim=32, num_heads=2, depth=2, complete_block=False)
    x = clips()[:1]
    with torch.inference_mode():
        expected = pooler(encoder(x)[0])
        with vjepa2.apply(modules=code[0]):
            torch.testing.assert_close(pooler(encoder(x)[0]), expected)
    with vjepa2.apply(modules=code[0]):  # what inference kept serves training too
        pooler(encoder(x)[0]).sum().backward()


def test_compiled_code_is_the_original(code, monkeypatch):
    encoder, predictor = make(code)
    x = clips()
    with torch.no_grad():
        context = encoder(x, MASKS_X)
        expected = predictor(context, MASKS_X, MASKS_Y)
        with vjepa2.apply(modules=code[0]):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            for a, b in zip(encoder(x, MASKS_X)[0], context[0], strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(predictor(context, MASKS_X, MASKS_Y)[0], expected[0], strict=True):
                assert torch.equal(a, b)


def test_a_patched_model_is_copied(code):
    """A copy of a model patched alive computes with its own weights."""
    encoder, _ = make(code)
    x = clips()
    with torch.no_grad(), vjepa2.apply(encoder):
        twin, before = copy.deepcopy(encoder), encoder(x)[0]
        for parameter in encoder.parameters():
            parameter.zero_()
        assert torch.equal(twin(x)[0], before) and not torch.equal(encoder(x)[0], before)


@pytest.mark.parametrize("prefix", ["", "f64/"])
def test_official_numbers(code, prefix, monkeypatch):
    """The official weights in the patched stand-in give the official loss and gradients."""
    name = "vjepa2_model_a"
    args, encoder, data = config(name)["args"], config(name)["encoder"], golden(name)
    size = dict(img_size=args["data"]["crop_size"], patch_size=args["data"]["patch_size"], num_frames=6, use_rope=True,
                norm_layer=norm_layer)
    weights = {role: under(data, f"weights/{role}/") for role in ("encoder", "predictor", "target_encoder")}
    num_tokens = sum("mask_tokens" in key for key in weights["predictor"])
    vit, pred, _, wrappers = code[:4]
    with vjepa2.apply(modules=code[0]):
        models = [wrappers.MultiSeqWrapper(vit.VisionTransformer(**size, **encoder)), wrappers.PredictorMultiSeqWrapper(
            pred.VisionTransformerPredictor(embed_dim=64, predictor_embed_dim=40, depth=2, num_heads=2, use_mask_tokens=True,
                                            num_mask_tokens=num_tokens, **size))]
        models.append(copy.deepcopy(models[0]))
        for model, role in zip(models, weights, strict=True):
            model.load_state_dict(weights[role])
            model.to(torch.float64 if prefix else torch.float32)
        inputs = under(data, "input/step1/")
        for kind, masks in (("context", "MASKS_X"), ("target", "MASKS_Y")):
            monkeypatch.setattr(f"{__name__}.{masks}", [[inputs[f"{kind}{i}"] for i in (0, 1)]])
        loss = loss_of(code, *models, [inputs["pixels"]])
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(data[f"{prefix}train/loss"][0]), abs=1e-12 if prefix else 1e-6)
    grads = {f"{role}/{key}": parameter.grad for role, model in zip(weights, models[:2], strict=False)
             for key, parameter in model.named_parameters()}
    for key, expected in under(data, f"{prefix}grad/").items():
        if prefix:
            assert_moments(grads[key], expected, 1e-9, key)
        else:
            assert error(grads[key], expected) < 5e-6, key


ROPE = "vjepa2_rope"


@pytest.mark.parametrize("head_dim, heads", config(ROPE)["attention"])
@pytest.mark.parametrize("kind", ["all", "masked", "no_grid"])
def test_drop_in_attention_is_the_official_one(head_dim, heads, kind):
    at, (T, H, W) = f"attention/head_dim{head_dim}/", config(ROPE)["grid"]
    case, exact = under(golden(ROPE), f"{at}{kind}/"), golden(ROPE)[f"f64/{at}{kind}/out"]
    x = case["x"].clone().requires_grad_()
    layer = RoPEAttention(x.shape[-1], heads, qkv_bias=True, grid_size=H)
    layer.load_state_dict(under(golden(ROPE), f"{at}all/weights/"))
    where = {"all": dict(T=T, H_patches=H, W_patches=W), "no_grid": dict(mask=golden(ROPE)[f"{at}index"]),
             "masked": dict(mask=golden(ROPE)[f"{at}index"], T=T, H_patches=H, W_patches=W)}[kind]
    out = layer(x, **where)
    assert error(out, exact) < 2e-6
    (grad_x,) = torch.autograd.grad(out, x, case["upstream"])
    assert error(grad_x, case["grad_x"]) < 3e-6
    assert error(layer.double()(case["x"].double(), **where), exact) < 1e-12
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 5e-3)):  # no fp32 q beside half-precision v
        out = layer.to(dtype)(case["x"].to(dtype), **where)
        assert out.dtype == dtype and error(out, exact) < limit


def test_drop_in_attention_with_actions(code):
    """Against the plain computation: state-dict keys, dense mask recognised or not, errors."""
    torch.manual_seed(0)
    theirs = code[4].ACRoPEAttention(24, 2, qkv_bias=True, grid_size=3).double()
    ours = ACRoPEAttention(24, 2, qkv_bias=True, grid_size=3).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, 3 * (2 + 6), 24, dtype=torch.float64)
    where = dict(T=3, H=2, W=3, action_tokens=2)
    mask = code[4].build_action_block_causal_attention_mask(3, 2, 3, add_tokens=2)
    for attn_mask in (None, mask, torch.rand(24, 24) > 0.2):
        torch.testing.assert_close(ours(x, attn_mask=attn_mask, **where), theirs(x, attn_mask=attn_mask, **where))
    with pytest.raises(ValueError, match="mask must be None"):
        ours(x, mask=torch.zeros(B, 24, dtype=torch.int64), **where)
