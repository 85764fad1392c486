"""facebookresearch/jepa, patched: here its stand-in, in test_parity_jepa.py a checkout."""

import copy
import functools
import pathlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from checkouts import checkout
from foreign_models import assert_as_good, fill, numbers, train, unchanged
from torch import nn

from jepa_fast import drop_in
from jepa_fast.drop_in.collators import VJEPAMaskCollator
from jepa_fast.patches import _meta, jepa
from jepa_fast.patches._report import PatchError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.backends.cuda.sdp_kernel in the original
MODULES = ("src.models.vision_transformer", "src.models.predictor", "src.models.utils.multimask",
           "src.models.utils.modules", "src.masks.utils", "src.utils.tensors", "src.masks.multiblock3d")
VIDEO = {"img_size": 32, "num_frames": 8, "tubelet_size": 2, "patch_size": 16, "uniform_power": True}
MASKS_X = [torch.tensor([[0, 1, 2, 5, 9], [15, 3, 4, 7, 8]]), torch.tensor([[3, 4], [0, 11]])]
MASKS = [torch.tensor([[10, 11, 14], [0, 1, 5]]), torch.tensor([[12, 13, 13, 0], [6, 10, 11, 15]])]  # one index twice


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Fused in every size and dtype, as on a GPU."""
    monkeypatch.setattr(_meta, "is_slower", lambda x: False)


@pytest.fixture
def code():
    """The modules of MODULES."""
    with checkout(pathlib.Path(__file__).parent / "stand_ins/jepa", *MODULES) as modules:
        yield modules


def make(code, *, use_mask_tokens=True, **settings) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    encoder = code[0].VisionTransformer(embed_dim=24, depth=2, num_heads=2, norm_layer=norm, **VIDEO, **settings)
    predictor = code[1].VisionTransformerPredictor(
        embed_dim=24, predictor_embed_dim=24, depth=2, num_heads=2, norm_layer=norm, use_mask_tokens=use_mask_tokens,
        zero_init_mask_tokens=not use_mask_tokens, **VIDEO)
    fill(encoder, predictor)
    return code[2].MultiMaskWrapper(encoder), code[2].PredictorMultiMaskWrapper(predictor)


def clips() -> torch.Tensor:
    return torch.randn(2, 3, 8, 32, 32)


def loss_of(code, encoder, predictor, target, x, loss_exp=1):
    """The loss as app.vjepa.train computes it, in the dtype of the encoder."""
    x = x.to(encoder.backbone.pos_embed.dtype)
    with torch.no_grad():
        h = target(x)
        h = code[0].apply_masks(F.layer_norm(h, (h.shape[-1],)), MASKS, concat=False)
    z = predictor(encoder(x, MASKS_X), h, MASKS_X, MASKS)
    return sum((a - b).abs().pow(loss_exp).mean() / loss_exp for a, b in zip(z, h, strict=True)) / len(z)


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "float16", "autocast"])
def test_numbers_of_a_step(kind, code):
    models, x = make(code), clips()

    def loss(encoder, predictor):
        return loss_of(code, encoder, predictor, encoder, x, loss_exp=2)  # 1 has a gradient that jumps

    exact, theirs = numbers(loss, models, "float64"), numbers(loss, models, kind)
    with jepa.apply():
        ours = numbers(loss, models, kind)
    assert_as_good(ours, theirs, exact, kind)


@pytest.mark.parametrize("use_mask_tokens", [True, False], ids=["mask_tokens", "diffusion"])
def test_training_steps(use_mask_tokens, code):
    models, batches = make(code, use_mask_tokens=use_mask_tokens), [(clips(),) for _ in range(3)]

    def losses():
        torch.manual_seed(1)  # for diffusion
        return train(lambda *arguments: loss_of(code, *arguments), models, batches)

    theirs = losses()
    with jepa.apply():
        ours = losses()
    assert len(set(theirs)) == 3
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


def test_everything_is_put_back(code):
    with unchanged(code):
        report = jepa.apply(modules=code[5])
        assert report.replaced == {
            "Block.forward": 1, "Attention.forward": 1, "CrossAttention.forward": 1, "VisionTransformerPredictor.forward": 1,
            "MultiMaskWrapper.forward": 1, "apply_masks": 4, "repeat_interleave_batch": 2, "MaskCollator": 1}
        assert all(code[i].apply_masks is drop_in.masks.apply_masks for i in (0, 1, 4, 5))
        assert code[6].MaskCollator is VJEPAMaskCollator and "eval mode too: put right" in str(report)
        report.undo()
        with jepa.apply(strict_numerics=True) as report:
            assert "eval mode" not in str(report)


@pytest.mark.parametrize("kind", ["float32", "autocast"])
def test_a_clip_is_embedded_once(kind, code):
    models, x, calls = make(code, out_layers=[0, 1]), clips(), []
    embed = type(models[0].backbone.patch_embed)
    forward = embed.forward

    def counted(self, x):
        calls.append(1)
        return forward(self, x)

    def loss(encoder):
        outs = encoder(x.to(encoder.backbone.pos_embed.dtype), MASKS_X)
        return sum(out.square().mean() for out in (*outs[0], *outs[1]))

    exact, theirs = numbers(loss, models[:1], "float64"), numbers(loss, models[:1], kind)
    embed.forward = counted
    with jepa.apply():
        ours = numbers(loss, models[:1], kind)
        assert len(calls) == 1
        models[0].backbone.patch_embed.register_forward_hook(lambda *_: calls.append("hook"))
        models[0](x, MASKS_X)
    embed.forward = forward
    assert calls == [1, 1, "hook", 1, "hook"]  # who hooks it gets every call
    assert_as_good(ours, theirs, exact, kind)


def test_one_model_only(code):
    encoder, predictor = make(code)
    keys, x = list(encoder.state_dict()), clips()
    before = encoder(x, MASKS_X)
    with unchanged(code):
        report = jepa.apply(encoder)
        assert report.replaced == {"Block.forward": 2, "Attention.forward": 2, "MultiMaskWrapper.forward": 1,
                                   "apply_masks": 1}
        assert list(encoder.state_dict()) == keys and "forward" not in vars(predictor.backbone.predictor_blocks[0])
        torch.testing.assert_close(encoder(x, MASKS_X), before)
        torch.testing.assert_close(copy.deepcopy(encoder)(x, MASKS_X), before)
        report.undo()
    assert not any("forward" in vars(part) for part in encoder.modules())


def test_dropout_in_eval_mode(code):
    """The original drops attention weights whether it trains or not."""
    block, x = code[3].Block(24, 2, drop=0.4).eval(), torch.randn(2, 9, 24)
    plain = code[3].Block(24, 2)
    plain.load_state_dict(block.state_dict())
    right = plain(x)

    def run(*, with_hook=False, train=False):
        handle = block.mlp.register_forward_hook(lambda *_: None) if with_hook else None
        torch.manual_seed(3)
        out = block.train(train)(x)
        if handle:
            handle.remove()
        return out

    theirs, trained = run(), run(train=True)
    assert (theirs - right).abs().max() > 0.01
    for strict in (False, True):
        with jepa.apply(strict_numerics=strict):
            for with_hook in (False, True):  # fused, and not
                torch.testing.assert_close(run(with_hook=with_hook), theirs if strict else right)
            torch.testing.assert_close(run(train=True), trained)


def test_attention_with_and_without_sdpa(code):
    Attention, Block, CrossAttention = code[3].Attention, code[3].Block, code[3].CrossAttention
    block, cross, x = Block(24, 2), CrossAttention(24, 2, qkv_bias=True), torch.randn(2, 9, 24)
    q = torch.randn(2, 3, 24)
    for use_sdpa in (True, False):
        block.attn = Attention(24, 2, use_sdpa=use_sdpa)
        cross.use_sdpa = use_sdpa
        mask = torch.zeros(2, 9, dtype=torch.int64)
        before = block(x, mask=mask), block.attn(x)[0], cross(q, x)
        weights = block(x, return_attention=True)
        with jepa.apply():
            torch.testing.assert_close((block(x, mask=mask), block.attn(x)[0], cross(q, x)), before)
            again = block(x, return_attention=True)
        assert (again is None and weights is None) if use_sdpa else torch.equal(again, weights)


def test_compiles_whole(code):
    models, x = make(code), clips()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = models[1](models[0](x, MASKS_X), MASKS, MASKS_X, MASKS)
        with jepa.apply():
            encoder, predictor = (torch.compile(model, backend="eager") for model in models)
            compiled = predictor(encoder(x, MASKS_X), MASKS, MASKS_X, MASKS)
    torch.testing.assert_close(compiled, before)


def test_what_is_found_and_what_is_refused(code, monkeypatch):
    encoder, predictor = make(code)
    assert jepa.matches(encoder) and jepa.matches(predictor.backbone) and not jepa.matches(nn.Linear(2, 2))
    with pytest.raises(PatchError, match="model must have parts of facebookresearch/jepa, got a Linear"):
        jepa.apply(nn.Linear(2, 2))
    monkeypatch.setattr(code[2].MultiMaskWrapper, "forward", lambda self, x: x)
    with unchanged(code), pytest.raises(PatchError, match=r"multimask.MultiMaskWrapper.forward must take \(self, x, masks"):
        jepa.apply()
    monkeypatch.setattr(code[3], "RoPEAttention", code[3].Attention, raising=False)  # so it is V-JEPA 2
    with pytest.raises(PatchError, match="jepa: no module loaded defines"):
        jepa.apply()
