"""lightly patched, against itself unpatched: SIGReg and its losses, token functions, I-JEPA training, torchvision's ViTs."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from jepa_fast.patches import PatchError, _block, torchvision
from jepa_fast.patches import lightly as patch

lightly = pytest.importorskip("lightly")
timm = pytest.importorskip("timm")
from lightly.data import IJEPAMaskCollator  # noqa: E402
from lightly.loss import LeJEPALoss, SIGReg  # noqa: E402
from lightly.models import utils  # noqa: E402
from lightly.models.modules import IJEPAPredictorTIMM, MaskedVisionTransformerTIMM  # noqa: E402
from lightly.models.modules.masked_vision_transformer_torchvision import MaskedVisionTransformerTorchvision  # noqa: E402

B, N, D, K = 3, 9, 8, 4
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "autocast": torch.float32}


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Tiny inputs take the fast path too."""
    for module, names in ((_block, ("MIN_TOKENS", "MIN_TOKENS_HALF", "MIN_PRODUCTS", "MIN_PRODUCTS_HALF")),
                          (patch, ("MIN_MOVED", "MIN_AVERAGED", "MIN_PROJECTIONS"))):
        for name in names:
            monkeypatch.setattr(module, name, 0)


def index(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(B)])


def draw(*shape, dtype=torch.float32, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(dtype.is_floating_point)


FUNCTIONS = {
    "get_at_index": lambda dtype: (draw(B, N, D, dtype=dtype), index()),
    "set_at_index": lambda dtype: (draw(B, N, D, dtype=dtype), index(), draw(B, K, D, dtype=dtype, seed=2)),
    "mask_at_index": lambda dtype: (draw(B, N, D, dtype=dtype), index(), draw(1, 1, D, seed=2)),
    "apply_masks": lambda dtype: (draw(B, N, D, dtype=dtype), [index(), index(1)]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_token_functions(name, dtype):
    """The same bits, forward and backward, with gradients and without."""
    def run(with_grad):
        arguments = FUNCTIONS[name](dtype)
        with torch.set_grad_enabled(with_grad):
            out = getattr(utils, name)(*arguments)
        leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        return [out.detach(), *(torch.autograd.grad((out * weights).sum(), leaves) if with_grad and leaves else ())]

    plain = [run(True), run(False)]
    with patch.apply(nn.Identity()):
        for ours, plain_ in zip([run(True), run(False)], plain, strict=True):
            torch.testing.assert_close(ours, plain_, rtol=0, atol=0)


def test_masked_tokens_may_be_anything():
    tokens = draw(B, N, D).detach().index_put((torch.arange(B).unsqueeze(1), index()), torch.tensor(torch.nan))
    with patch.apply(nn.Identity()) as report:
        assert utils.mask_at_index(tokens, index(), torch.zeros(1, 1, D)).isfinite().all()
        assert "mask_at_index replaces tokens that are NaN" in str(report)
    with patch.apply(nn.Identity(), strict_numerics=True) as report:
        assert utils.mask_at_index(tokens, index(), torch.zeros(1, 1, D)).isnan().any()
        assert report.kept["mask_at_index"] == "strict_numerics: a masked NaN stays NaN"


def test_every_namespace_and_back():
    mine = types.ModuleType("mine")
    mine.update_momentum = original = utils.update_momentum
    with patch.apply(nn.Identity(), modules=[mine]) as report:
        assert mine.update_momentum is utils.update_momentum is not original
        assert report.replaced["update_momentum"] == 2
        with patch.apply(nn.Identity()) as again:
            assert not again.replaced
    assert mine.update_momentum is utils.update_momentum is original


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_update_momentum(dtype):
    source, target = nn.Linear(5, 7).to(dtype), nn.Linear(5, 7).to(dtype)
    twin = copy.deepcopy(target)
    utils.update_momentum(source, target, 0.9)
    with patch.apply(source):
        utils.update_momentum(source, twin, m=0.9)
    torch.testing.assert_close(list(twin.parameters()), list(target.parameters()), rtol=1e-6, atol=1e-7)


def sigreg_results(module, x, autocast=False):
    """Loss, gradient, and the next random number."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(x)
    return loss, *torch.autograd.grad(loss, x), torch.rand(1)


def exactly(module: SIGReg, x: torch.Tensor):
    """What lightly's code gives in float64 for the directions it draws for x."""
    torch.manual_seed(3)
    directions = module._generate_unit_vectors(x.device, x.dtype, x.shape[-1]).double()
    wide = copy.deepcopy(module).double()
    wide._generate_unit_vectors = lambda *_: directions
    return sigreg_results(wide, x.detach().double().requires_grad_())


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", [(9, 6), (2, 3, 9, 6)], ids=str)
def test_sigreg(shape, kind):
    dtype, autocast = DTYPES[kind], kind == "autocast"
    module, x = SIGReg(knots=9, t_max=2.5, num_vectors=16), draw(*shape, dtype=dtype)
    plain, exact = sigreg_results(module, x, autocast), exactly(module, x)
    with patch.apply(module):
        ours = sigreg_results(module, x, autocast)
    assert torch.equal(ours[2], plain[2])
    for ours_, plain_, exact_ in zip(ours[:2], plain[:2], exact[:2], strict=True):
        floor = {"float32": 1e-6, "float64": 1e-6}.get(kind, 4e-3)  # buffers and knots are float32
        assert (ours_.double() - exact_).norm() <= 2 * (plain_.double() - exact_).norm() + floor * exact_.norm()


def test_changed_knots_and_loaded_buffers():
    module, x = SIGReg(knots=9, num_vectors=16), draw(9, 6)
    with patch.apply(module):
        module(x)
        module.load_state_dict(SIGReg(knots=9, t_max=1.5).state_dict())
        ours = sigreg_results(module, x)
    torch.testing.assert_close(ours, sigreg_results(module, x), rtol=1e-5, atol=1e-7)


class Subclass(SIGReg):
    def _integrate_via_trapezoidal_rule(self, err_per_frequency, num_samples):
        return super()._integrate_via_trapezoidal_rule(err_per_frequency, num_samples) * 2


def test_a_subclass_of_sigreg_is_its_own():
    x, module = draw(9, 6), Subclass(num_vectors=16)
    plain = sigreg_results(module, x)
    with patch.apply():
        torch.testing.assert_close(sigreg_results(module, x), plain, rtol=0, atol=0)


def train_lejepa(report_of) -> list[float]:
    """Three steps on two global and two local views."""
    torch.manual_seed(0)
    if report_of == "before":
        report = patch.apply()
    backbone = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=2, num_classes=0, img_size=32,
                                 dynamic_img_size=True, drop_path_rate=0.1)
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(24, 16),
                           "loss": LeJEPALoss(lambda_param=0.5, sigreg_num_vectors=32)})
    if report_of == "live":
        report = patch.apply(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        views = [torch.randn(8, 3, side, side) for side in (32, 32, 16, 16)]
        projections = [model["head"](backbone(view)) for view in views]
        loss = model["loss"](global_proj=torch.stack(projections[:2]), local_proj=torch.stack(projections[2:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if report_of:
        assert report.replaced["SIGReg.forward"] == 1 and report.replaced["Block.forward"] >= 1
        report.undo()
    return losses


def test_lejepa_training():
    forward, plain = SIGReg.forward, train_lejepa(None)
    assert train_lejepa("live") == pytest.approx(plain, rel=1e-5)
    assert train_lejepa("before") == pytest.approx(plain, rel=1e-5)
    assert SIGReg.forward is forward


def train_ijepa(patched: bool) -> tuple[list[float], list[str]]:
    """Three steps of lightly's I-JEPA from timm's ViT, with lightly's moving average."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=2, num_classes=0, img_size=48,
                            class_token=False, global_pool="avg")
    model = nn.ModuleDict({"encoder": MaskedVisionTransformerTIMM(vit),
                           "predictor": IJEPAPredictorTIMM(9, 1, 24, 12, 2)})
    target_encoder = copy.deepcopy(model["encoder"])
    reports = [patch.apply(module) for module in (model, target_encoder)] if patched else []
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(3):
        images, context, targets = torch.randn(B, 3, 48, 48), index(step), [index(10 + step), index(20 + step)]
        predicted = model["predictor"](model["encoder"].encode(images, idx_keep=context), [context], targets)
        with torch.no_grad():
            latent = F.layer_norm(target_encoder.encode(images), (24,))
            latent = utils.repeat_interleave_batch(utils.apply_masks(latent, targets), B, repeat=1)
        loss = F.smooth_l1_loss(predicted, latent)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        utils.update_momentum(model["encoder"], target_encoder, m=0.9)
        losses.append(loss.item())
    for report in reversed(reports):
        report.undo()
    return losses, list(model.state_dict())


def test_ijepa_training():
    plain, ours = train_ijepa(False), train_ijepa(True)
    assert ours[0] == pytest.approx(plain[0], rel=1e-5) and ours[1] == plain[1]


@pytest.mark.parametrize("settings, is_ours", [
    (dict(input_size=(64, 96), patch_size=8, pred_mask_scale=(0.15, 0.2), enc_mask_scale=(0.85, 1.0),
          aspect_ratio=(0.75, 1.5), npred=4), True),
    (dict(input_size=(224, 160), patch_size=32), False)], ids=["i-jepa", "may not end"])
def test_mask_collator(settings, is_ours, monkeypatch):
    """The same masks from the same numbers, batch after batch, and the generator left where lightly leaves it."""
    configs = []
    monkeypatch.setattr(patch, "_next_official",
                        lambda config, *args, _next=patch._next_official: configs.append(config) or _next(config, *args))

    def batches():
        collator = IJEPAMaskCollator(**settings)
        torch.manual_seed(7)
        return [collator([torch.ones(2)] * 3) for _ in range(3)], torch.rand(1)

    plain = batches()
    with patch.apply() as report:
        torch.testing.assert_close(batches(), plain, rtol=0, atol=0)
        assert report.replaced["IJEPAMaskCollator.__call__"] == 1 and len(configs) == 3 * is_ours
    with patch.apply(nn.Identity()) as report:
        assert "IJEPAMaskCollator" in report.kept


@pytest.mark.parametrize("kind", DTYPES)
def test_torchvision_blocks(kind, monkeypatch):
    """The ViT of lightly's torchvision models, masked, in training mode and in evaluation."""
    dtype, autocast, runs = DTYPES[kind], kind == "autocast", []
    monkeypatch.setattr(torchvision, "run_block", lambda *args, _run=torchvision.run_block: runs.append(1) or _run(*args))
    torch.manual_seed(0)
    model = MaskedVisionTransformerTorchvision(VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=3)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)

    def used(model):
        return [p for name, p in model.named_parameters() if "heads" not in name and p.requires_grad]

    def results(model, autocast):
        x, parameters = draw(2, 3, 32, 32).detach().to(model.mask_token.dtype), used(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.train().encode(x, idx_mask=torch.tensor([[1], [3]]))
            evaluated = model.eval().encode(x).detach()
        return [evaluated, out, *torch.autograd.grad(out.double().square().sum(), parameters)]

    exact, plain = results(copy.deepcopy(model).double(), False), results(model, autocast)
    assert not runs
    with patch.apply(model) as report:
        ours = results(model, autocast)
        assert report.replaced["EncoderBlock.forward"] == len(runs) / 2 == 2
    largest = max(float(e.detach().norm()) for e in exact)
    floor = {"float32": 1e-7, "float64": 1e-12}.get(kind, 4e-3)
    for ours_, plain_, exact_ in zip(ours, plain, exact, strict=True):
        error, allowed = (ours_.double() - exact_).norm(), 2 * (plain_.double() - exact_).norm()
        assert ours_.dtype == plain_.dtype and error <= allowed + floor * (exact_.norm() + largest)


@pytest.mark.parametrize("drop, kept", [((0.0, 0.5), {"EncoderBlock as a whole": "its attention drops"}), ((0.5, 0.0), {})])
def test_torchvision_dropout_is_left_alone(drop, kept):
    block, x = EncoderBlock(2, 8, 16, *drop), draw(2, 5, 8)
    torch.manual_seed(0)
    plain = block(x)
    with torchvision.apply(block) as report:
        torch.manual_seed(0)
        torch.testing.assert_close(block(x), plain, rtol=0, atol=0)
    assert report.kept == kept


def test_another_lightly_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "get_at_index", lambda tokens, rows: tokens)
    with pytest.raises(PatchError, match="lightly's get_at_index must take .tokens, index."):
        patch.apply()


def test_matches():
    assert patch.matches(nn.Sequential(SIGReg())) and not patch.matches(nn.Linear(2, 2))
