"""`patches.auto` on models with parts of several code bases."""

import pytest
import torch
from torch import nn

from jepa_fast import patches
from jepa_fast.patches import _block
from jepa_fast.patches import lightly as lightly_patch

timm = pytest.importorskip("timm")
lightly = pytest.importorskip("lightly")
from lightly.loss import LeJEPALoss  # noqa: E402
from torchvision.models.vision_transformer import EncoderBlock  # noqa: E402


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    for name in ("MIN_TOKENS", "MIN_TOKENS_HALF", "MIN_PRODUCTS", "MIN_PRODUCTS_HALF"):
        monkeypatch.setattr(_block, name, 0)
    monkeypatch.setattr(lightly_patch, "MIN_PROJECTIONS", 0)


class Method(nn.Module):
    """As stable-pretraining and users write it: a backbone, a head and a loss of three code bases in one module."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=2, num_classes=0,
                                          img_size=32)
        self.head = EncoderBlock(2, 24, 48, 0.0, 0.0)
        self.loss = LeJEPALoss(sigreg_num_vectors=16)

    def forward(self, views):
        tokens = [self.head(self.backbone.forward_features(view)) for view in views]
        pooled = torch.stack([x.mean(1) for x in tokens])
        return self.loss(global_proj=pooled[:1], local_proj=pooled[1:])


def results(model):
    torch.manual_seed(1)
    loss = model([torch.randn(4, 3, 32, 32) for _ in range(3)])
    return loss, *torch.autograd.grad(loss, [p for p in model.parameters()])


def test_three_code_bases():
    torch.manual_seed(0)
    model = Method()
    plain = results(model)
    report = patches.auto(model)
    assert report.patch == "auto (lightly, timm, torchvision)"
    assert {name: count for name, count in report.replaced.items() if name.endswith("forward")} == {
        "SIGReg.forward": 1, "Block.forward": 2, "Attention.forward": 2, "EncoderBlock.forward": 1}
    assert "is patched already" not in str(report)
    ours = results(model)
    assert not all(map(torch.equal, ours, plain))  # sums have another order
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    report.undo()
    assert not any("forward" in vars(part) for part in model.modules())
    torch.testing.assert_close(results(model), plain, rtol=0, atol=0)


def test_one_code_base_and_none():
    model = Method()
    with patches.auto(nn.Sequential(model.backbone)) as report:
        assert report.patch == "auto (timm)"
    with pytest.raises(ValueError, match="model must have parts that a patch knows .*lightly.*timm.* got a .*Linear"):
        patches.auto(nn.Linear(2, 2))


def test_a_patched_class_is_enough():
    model = Method()
    with patches.timm.apply(), patches.auto(model.backbone) as report:
        assert not report.replaced and report.kept["Block.forward"] == "is patched already"
