"""facebookresearch/ijepa, patched: here its stand-in, in test_parity_ijepa.py a checkout."""

import copy
import io
import pathlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from checkouts import checkout
from foreign_models import assert_as_good, fill, numbers, train, unchanged
from torch import nn

from jepa_fast import drop_in, patches
from jepa_fast.drop_in.collators import IJEPAMaskCollator
from jepa_fast.patches import _meta, ijepa
from jepa_fast.patches._meta import is_slower
from jepa_fast.patches._report import PatchError, modules_of_checkout

MODULES = ("src.models.vision_transformer", "src.utils.tensors", "src.masks.utils", "src.masks.multiblock")
B, GRID = 2, 4
MASKS_X = [torch.tensor([[0, 1, 2, 5, 9], [15, 3, 4, 7, 8]])]
MASKS = [torch.tensor([[10, 11, 14], [0, 1, 5]]), torch.tensor([[12, 13, 13], [6, 10, 11]])]  # one index twice
REPORT = {"Block.forward": 1, "Attention.forward": 1, "VisionTransformerPredictor.forward": 1, "apply_masks": 3,
          "repeat_interleave_batch": 2, "MaskCollator": 1}


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Fused in every size and dtype, as on a GPU."""
    monkeypatch.setattr(_meta, "is_slower", lambda x: False)


@pytest.fixture
def code():
    """vision_transformer, utils.tensors, masks.utils and masks.multiblock of the checkout."""
    with checkout(pathlib.Path(__file__).parent / "stand_ins/ijepa", *MODULES) as modules:
        yield modules


def make(code, **settings) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    settings |= {"norm_layer": lambda D: nn.LayerNorm(D, eps=1e-6)}
    encoder = code[0].VisionTransformer(img_size=[16 * GRID], embed_dim=32, depth=2, num_heads=4, **settings)
    predictor = code[0].VisionTransformerPredictor(GRID**2, embed_dim=32, predictor_embed_dim=24, depth=2, num_heads=4,
                                                   **settings)
    fill(encoder, predictor)
    return encoder, predictor


def images(count: int = B) -> torch.Tensor:
    return torch.randn(count, 3, 16 * GRID, 16 * GRID)


def loss_of(code, encoder, predictor, target, x, masks_x=MASKS_X):
    """The loss as src.train computes it, in the dtype of the encoder."""
    x = x.to(encoder.pos_embed.dtype)
    with torch.no_grad():
        h = target(x)
        h = code[0].apply_masks(F.layer_norm(h, (h.shape[-1],)), MASKS)
        h = code[1].repeat_interleave_batch(h, len(x), repeat=len(masks_x))
    return F.smooth_l1_loss(predictor(encoder(x, masks_x), masks_x, MASKS), h)


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("num_contexts", [1, 2])
def test_numbers_of_a_step(kind, num_contexts, code):
    models, x = make(code), images()
    masks_x = [mask.flip(0) if i else mask for i, mask in enumerate(MASKS_X * num_contexts)]

    def loss(encoder, predictor):
        return loss_of(code, encoder, predictor, encoder, x, masks_x)

    exact, theirs = numbers(loss, models, "float64"), numbers(loss, models, kind)
    with ijepa.apply():
        ours = numbers(loss, models, kind)
    assert_as_good(ours, theirs, exact, kind)


def test_training_steps(code):
    models, batches = make(code, drop_path_rate=0.2), [(images(),) for _ in range(3)]

    def losses():
        torch.manual_seed(1)  # for stochastic depth
        return train(lambda *arguments: loss_of(code, *arguments), models, batches)

    theirs = losses()
    with ijepa.apply():
        ours = losses()
    assert len(set(theirs)) == 3
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


def test_everything_is_put_back(code):
    with unchanged(code):
        report = ijepa.apply(modules=code[1])
        assert report.replaced == REPORT
        assert all(module.apply_masks is drop_in.masks.apply_masks for module in code[:3])
        assert code[3].MaskCollator is IJEPAMaskCollator
        text = str(report)
        assert "the loop of src.train: it is written inline" in text and "first derivatives only" in text
        report.undo()


def test_one_model_only(code):
    encoder, _ = make(code)
    other, x, keys = copy.deepcopy(encoder), images(), list(encoder.state_dict())
    before = encoder(x)
    with unchanged(code):
        report = ijepa.apply(encoder)
        assert report.replaced == {"Block.forward": 2, "Attention.forward": 2, "apply_masks": 1,
                                   "repeat_interleave_batch": 1}
        assert list(encoder.state_dict()) == keys and "forward" not in vars(other.blocks[0])
        torch.testing.assert_close(encoder(x), before)
        torch.testing.assert_close(copy.deepcopy(encoder)(x), before)
        file = io.BytesIO()
        torch.save(encoder.blocks, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)  # computes as before it was patched
        torch.testing.assert_close(loaded[0](before), other.blocks[0](before))
        report.undo()
    assert not any("forward" in vars(part) for part in encoder.modules())


def test_attention_weights_are_there_for_those_who_read_them(code):
    encoder, _ = make(code)
    block, x, seen = encoder.blocks[0], torch.randn(B, 5, 32), []
    weights, out = block(x, return_attention=True), block(x)
    with ijepa.apply():
        assert torch.equal(block(x, return_attention=True), weights)
        assert torch.equal(block.attn(block.norm1(x))[1], weights)
        handle = block.attn.register_forward_hook(lambda *call: seen.append(call[-1][1]))
        torch.testing.assert_close(block(x), out)
        assert torch.equal(seen[0], weights)
        handle.remove()
        block.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
        encoder.blocks.register_forward_hook(lambda *_: seen.append("never called"))
        block.register_forward_hook(lambda *_: seen.append("block"))
        torch.testing.assert_close(block(x), out)
    assert seen[1:] == ["mlp", "block"]


def test_blocks_with_odd_parts_run_their_own_code(code, monkeypatch):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.repeat(1, 1, 3)

    x, runs = torch.randn(B, 5, 32), []
    run_block = ijepa.run_block
    monkeypatch.setattr(ijepa, "run_block", lambda *call: runs.append(1) or run_block(*call))

    def change(block, what):
        if what == "qkv":
            block.attn.qkv = Adapted(32, 96)
        elif what == "scale":
            block.attn.scale = 1.0
        elif what == "mlp":
            block.mlp = type("Halved", (type(block.mlp),), {"forward": lambda self, x: self.fc2(self.fc1(x) / 2)})(32, 64)
        elif what == "attn_drop":
            block.attn.attn_drop.p = 0.5

    for what, is_fused in (("none", True), ("qkv", False), ("scale", False), ("mlp", False), ("attn_drop", False)):
        block = make(code)[0].blocks[0]
        change(block, what)
        torch.manual_seed(1)
        before = block(x)
        with ijepa.apply():
            torch.manual_seed(1)
            torch.testing.assert_close(block(x), before)
        assert bool(runs) == is_fused, what
        runs.clear()


def test_on_a_cpu_only_what_is_faster():
    large, small = torch.empty(8, 200, 384), torch.empty(8, 10, 384)
    assert not is_slower(large) and is_slower(small) and is_slower(large.bfloat16()) and is_slower(large.double())
    assert not is_slower(small.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_slower(large)


def test_stochastic_depth_is_drawn_alike(code):
    encoder, x = make(code, drop_path_rate=0.6)[0], images(8)

    def run():
        torch.manual_seed(2)
        return encoder(x), torch.rand(1)

    theirs = run()
    with ijepa.apply(encoder):
        ours = run()
    torch.testing.assert_close(ours, theirs)


def test_compiles_whole(code):
    models, x = make(code), images()
    with torch.no_grad():
        before = loss_of(code, *models, models[0], x)
        with ijepa.apply():
            compiled = [torch.compile(model, backend="eager", fullgraph=True) for model in models]
            z = compiled[1](compiled[0](x, MASKS_X), MASKS_X, MASKS)
            assert models[1](models[0](x, MASKS_X), MASKS_X, MASKS).sub(z).abs().max() < 1e-5
            torch.testing.assert_close(loss_of(code, *models, models[0], x), before)


def test_what_is_found_and_what_is_refused(code, monkeypatch):
    encoder, predictor = make(code)
    assert ijepa.matches(encoder) and ijepa.matches(predictor) and not ijepa.matches(nn.Linear(2, 2))
    with patches.auto(encoder) as report:
        assert report.patch == "auto (ijepa)"
    with pytest.raises(PatchError, match="model must have parts of facebookresearch/ijepa, got a Linear"):
        ijepa.apply(nn.Linear(2, 2))
    with pytest.raises(PatchError, match="ijepa: no module in that checkout defines .*; import it first, or pass"):
        ijepa.apply(modules=pytest)
    monkeypatch.setattr(code[0].Attention, "forward", lambda self, x, mask=None: x)
    with unchanged(code), pytest.raises(PatchError, match=r"vision_transformer.Attention.forward must take \(self, x\)"):
        ijepa.apply()


def test_a_checkout_within_a_project(monkeypatch):
    names = ["mine.ijepa.src.models.vision_transformer", "mine.ijepa.src.masks.utils", "mine.jepa.src.masks.utils"]
    for name in names:
        module = types.ModuleType(name)
        module.__file__ = f"/project/{name.replace('.', '/')}.py"
        monkeypatch.setitem(sys.modules, name, module)
    found = modules_of_checkout(sys.modules[names[0]], "src.models.vision_transformer")
    assert [module.__name__ for module in found] == names[:2]
    assert [module.__name__ for module in modules_of_checkout(sys.modules[names[1]])] == names
