"""The files that their authors released: names and addresses. Nothing here downloads."""

from dataclasses import dataclass

BASE = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True)
class Released:
    url: str
    family: str
    model: str     # encoder, patch, pixels
    encoder: str   # the key of the encoder to use


def released() -> dict[str, Released]:
    """File name -> where it is and what is in it."""
    files = {
        "ijepa/IN1K-vit.h.14-300e.pth.tar": ("ijepa", "ViT-H/14, 224 pixels, ImageNet-1k"),
        "ijepa/IN1K-vit.h.16-448px-300e.pth.tar": ("ijepa", "ViT-H/16, 448 pixels, ImageNet-1k"),
        "ijepa/IN22K-vit.h.14-900e.pth.tar": ("ijepa", "ViT-H/14, 224 pixels, ImageNet-22k"),
        "ijepa/IN22K-vit.g.16-600e.pth.tar": ("ijepa", "ViT-g/16, 224 pixels, ImageNet-22k"),
        "jepa/vitl16/vitl16.pth.tar": ("vjepa", "ViT-L/16, 16 frames, 224 pixels"),
        "jepa/vith16/vith16.pth.tar": ("vjepa", "ViT-H/16, 16 frames, 224 pixels"),
        "jepa/vith16-384/vith16-384.pth.tar": ("vjepa", "ViT-H/16, 16 frames, 384 pixels"),
        "vjepa2/vitl.pt": ("vjepa2", "ViT-L/16, 64 frames, 256 pixels"),
        "vjepa2/vith.pt": ("vjepa2", "ViT-H/16, 64 frames, 256 pixels"),
        "vjepa2/vitg.pt": ("vjepa2", "ViT-g/16, 64 frames, 256 pixels"),
        "vjepa2/vitg-384.pt": ("vjepa2", "ViT-g/16, 64 frames, 384 pixels"),
        "vjepa2/vjepa2-ac-vitg.pt": ("vjepa2_ac", "ViT-g/16, 256 pixels, action-conditioned predictor"),
        "vjepa2/vjepa2_1_vitb_dist_vitG_384.pt": ("vjepa2_1", "ViT-B/16, 64 frames, 384 pixels, distilled"),
        "vjepa2/vjepa2_1_vitl_dist_vitG_384.pt": ("vjepa2_1", "ViT-L/16, 64 frames, 384 pixels, distilled"),
        "vjepa2/vjepa2_1_vitg_384.pt": ("vjepa2_1", "ViT-g/16, 64 frames, 384 pixels"),
        "vjepa2/vjepa2_1_vitG_384.pt": ("vjepa2_1", "ViT-G/16, 64 frames, 384 pixels"),
    }
    keys = {"vjepa2_ac": "encoder"}
    return {path.rsplit("/", 1)[1]: Released(f"{BASE}/{path}", family, model,
                                             "ema_encoder" if "_dist_" in path else keys.get(family, "target_encoder"))
            for path, (family, model) in files.items()}
