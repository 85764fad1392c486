"""timm's vision transformers patched, against themselves unpatched: before they are built, and live."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_fast.patches import PatchError, _block, _timm_rope
from jepa_fast.patches import timm as patch

timm = pytest.importorskip("timm")
from timm.models import eva, vision_transformer  # noqa: E402

TINY = dict(embed_dim=24, num_heads=2, depth=2, num_classes=5, img_size=32)
CASES = {  # architecture, options, what runs twice: whole blocks, or their attention
    "plain": ("vit_tiny_patch16_224", {}, "run_block"),
    "i-jepa": ("vit_huge_patch14_gap_224", dict(img_size=28), "run_block"),
    "drop-path": ("vit_tiny_patch16_224", dict(init_values=0.3, drop_path_rate=0.5), "run_block"),
    "registers": ("vit_small_patch14_reg4_dinov2", dict(img_size=28, dynamic_img_size=True), "run_block"),
    "patch-drop": ("vit_tiny_patch16_224", dict(patch_drop_rate=0.5), "run_block"),
    "siglip": ("vit_base_patch16_siglip_224", {}, "run_block"),
    "swiglu": ("vit_giant_patch14_dinov2", dict(img_size=28), "attend"),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", {}, "run_block"),
    "rope": ("vit_small_patch16_rope_224", dict(patch_drop_rate=0.5), "run_block"),
    "eva02": ("eva02_tiny_patch14_224", dict(img_size=28), "attend"),
}
FLOOR = {"float64": 1e-12, "float32": 1e-7, "bfloat16": 4e-3, "autocast": 4e-3}  # about one rounding
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Tiny models take the fast path too."""
    for name in ("MIN_TOKENS", "MIN_TOKENS_HALF", "MIN_PRODUCTS", "MIN_PRODUCTS_HALF"):
        monkeypatch.setattr(_block, name, 0)


@pytest.fixture
def runs(monkeypatch):
    """Names of the fast paths that ran."""
    names = []

    def record(name, function):
        return lambda *args, **kwargs: (names.append(name), function(*args, **kwargs))[1]

    for name in ("run_block", "attend", "drop_patches"):
        monkeypatch.setattr(patch, name, record(name, getattr(patch, name)))
    return names


@functools.cache
def built(case: str) -> nn.Module:
    name, options, _ = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, **TINY | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def make(case: str = "plain", dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(built(case)).to(dtype)


def images(model, size: int = 3) -> torch.Tensor:
    side = model.patch_embed.img_size[0]
    return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))


def results(model, autocast=False) -> list[torch.Tensor]:
    """Output and gradients of the parameters, in training mode."""
    x = images(model).to(next(model.parameters()).dtype)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.train()(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad((out.double() * weights).sum(), list(model.parameters()))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_numbers(case, dtype, runs):
    model, autocast = make(case, DTYPES[dtype]), dtype == "autocast"
    plain, exact = results(model, autocast), results(make(case, torch.float64))
    assert not runs
    with patch.apply(model):
        ours = results(model, autocast)
    assert runs.count(CASES[case][2]) == 2 and len(runs) == 2 + ("drop" in case or case == "rope") - (case == "drop-path")
    largest = max(float(e.norm()) for e in exact[1:])  # a bias of keys has no gradient but rounding
    for ours_, plain_, exact_ in zip(ours, plain, exact, strict=True):
        assert ours_.dtype == plain_.dtype
        error, allowed = (ours_.double() - exact_).norm(), 2 * (plain_.double() - exact_).norm()
        assert error <= allowed + FLOOR[dtype] * (exact_.norm() + largest)


def test_float16_but_for_layer_scale(runs):
    for case in ("plain", "drop-path"):
        runs.clear()
        model = make(case, torch.float16)
        x = images(model).half()
        exact, plain = make(case, torch.float64).eval()(x.double()), model.eval()(x)
        with patch.apply(model):
            assert (model(x).double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-3 * exact.norm()
        assert runs == ["run_block" if case == "plain" else "attend"] * 2


def test_materialised_attention(runs):
    """fused_attn False, of timm.layers.set_fused_attn, is the same attention."""
    model = make("swiglu")
    for block in model.blocks:
        block.attn.fused_attn = False
    plain = results(model)
    with patch.apply(model):
        ours = results(model)
    assert runs == ["attend"] * 2
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_before_it_is_built_or_live(runs):
    """Three steps each: with timm's losses, and with the state-dict of timm's."""
    def train(live: bool | None) -> tuple[list[float], list[str]]:
        def build():
            torch.manual_seed(0)
            return timm.create_model("vit_tiny_patch16_224", **TINY, drop_path_rate=0.3)
        model = build() if live is not False else None
        report = None if live is None else patch.apply(model)
        model = model or build()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for _ in range(3):
            loss = F.cross_entropy(model(images(model)), torch.tensor([0, 1, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if report is not None:
            report.undo()
        return losses, list(model.state_dict())

    methods = {cls: vars(cls)["forward"] for cls in (vision_transformer.Block, vision_transformer.Attention, eva.EvaBlock)}
    plain = train(None)
    assert not runs
    for live in (False, True):
        losses, keys = train(live)
        assert losses == pytest.approx(plain[0], rel=1e-5) and keys == plain[1]
    assert runs == ["run_block"] * 12
    assert all(vars(cls)["forward"] is method for cls, method in methods.items())


def test_only_one_model(runs):
    model, other = make(), make()
    report = patch.apply(model)
    other(images(other))
    assert not runs and "Block.forward in 2 places" in str(report)
    report.undo()
    assert not any("forward" in vars(part) for part in model.modules())


def test_hooks(runs):
    """Outside, they are called as before; where one is on a part inside, timm's own code calls it."""
    model, seen = make(), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    with patch.apply(model):
        model(images(model))
        assert seen == ["block"] and runs == ["run_block"] * 2
        model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
        model(images(model))
        assert seen == ["block", "block", "fc1"] and runs[2:] == ["run_block", "attend"]
        model.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: seen.append("attn_drop"))
        model.blocks[1].attn.fused_attn = False
        model(images(model))
        assert seen[3:] == ["block", "attn_drop", "fc1"]


def test_features(runs):
    model = make().eval()
    x, compared = images(model), (
        lambda: model.forward_intermediates(x)[1], lambda: model.get_intermediate_layers(x, n=2, return_prefix_tokens=False))
    plain = [f() for f in compared]
    with patch.apply(model):
        torch.testing.assert_close([f() for f in compared], plain)
        assert runs == ["run_block"] * 4


def test_feature_models_built_while_patched(runs):
    options = {name: TINY[name] for name in TINY if name != "num_classes"}
    with patch.apply():
        torch.manual_seed(0)
        hooked = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **options).eval()
        x = torch.randn(1, 3, 32, 32)
        ours = hooked(x)
    assert runs == ["run_block"] * 2
    torch.testing.assert_close(ours, hooked(x))


def test_images_of_other_sizes(runs):
    model = make("registers").eval()
    x = torch.randn(2, 3, 42, 56)
    plain = model(x)
    with patch.apply(model):
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
    assert len(runs) == 2


def test_checkpointing(runs):
    model = make("drop-path")
    plain = results(model)
    model.set_grad_checkpointing()
    with patch.apply(model):
        torch.testing.assert_close(results(model), plain, rtol=1e-4, atol=1e-4)
    assert runs == ["run_block"] * 4  # forward, and again in the backward pass


def test_what_timm_computes_itself(runs):
    """A mask, causal attention, dropout, a learned rope, a norm of q and k, LoRA's layers."""
    model, x = make(), torch.randn(2, 5, 24)
    with patch.apply(model):
        block = model.blocks[0]
        plain = vision_transformer.Block.forward(block, x, is_causal=True)
        torch.testing.assert_close(block(x, is_causal=True), plain, rtol=0, atol=0)
        block(x, attn_mask=torch.ones(5, 5, dtype=torch.bool))
        block.attn.proj_drop.p = 0.1
        block.attn.attn_drop.p = 0.1
        block(x)
        model.blocks[1].attn.qkv = nn.Sequential(nn.Linear(24, 72))
        model.blocks[1](x)
    for name, options in (("vit_small_patch16_rope_mixed_224", {}), ("vit_tiny_patch16_224", dict(qk_norm=True))):
        model = timm.create_model(name, **TINY | options)
        with patch.apply(model) as report:
            model(images(model))
    assert not runs and report.kept["Block as a whole"] == report.kept["Attention"] == "its attention has a q_norm"


@pytest.mark.parametrize("name, per_pass", [("vit_small_patch16_rope_224", 0), ("vit_small_patch16_dinov3", 1)])
def test_one_table_for_all_layers(name, per_pass, monkeypatch):
    """And for all passes where timm keeps its rope; DINOv3's is made in each."""
    tables = []
    monkeypatch.setattr(_timm_rope, "make_table", lambda *args, _make=_timm_rope.make_table: tables.append(_make(*args))
                        or tables[-1])
    model = timm.create_model(name, **TINY)
    with patch.apply(model):
        with torch.inference_mode():
            model.eval()(images(model))
        assert len(tables) == 1
        results(model)  # what was made for inference is fit for training
    assert len(tables) == 1 + per_pass


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_compiled_traced_scripted(runs):
    """timm's own code, bit for bit."""
    model = make().eval()
    x = images(model)
    plain = model(x)
    with patch.apply(model):
        for seen in (torch.compile(model, backend="eager", fullgraph=True), torch.fx.symbolic_trace(model),
                     torch.jit.script(model)):
            assert torch.equal(seen(x), plain)
        torch._dynamo.reset()
    assert not runs


def test_copies(runs):
    model = make()
    with patch.apply(model):
        twin = copy.deepcopy(model)
        assert twin.blocks[0].forward.__self__ is twin.blocks[0]
        twin(images(twin))
        assert runs == ["run_block"] * 2
        pickle.loads(pickle.dumps(model))(images(model))
        assert len(runs) == 2  # a saved model is timm's own again


def test_few_tokens_are_left_alone(monkeypatch, runs):
    monkeypatch.setattr(_block, "MIN_TOKENS", 16)
    model = make()
    with patch.apply(model):
        model(images(model))      # 3 x 5 tokens
        assert not runs
        model(images(model, 4))
    assert runs == ["run_block"] * 2


def test_another_timm_is_refused(monkeypatch):
    before = vars(eva.EvaBlock)["forward"]
    monkeypatch.setattr(vision_transformer.Block, "forward", lambda self, x, rope: x)
    with pytest.raises(PatchError, match="timm's Block.forward must take .*attn_mask.*another version"):
        patch.apply()
    assert vars(eva.EvaBlock)["forward"] is before


def test_matches():
    assert patch.matches(nn.Sequential(make())) and not patch.matches(nn.Linear(2, 2))
