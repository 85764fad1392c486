"""ViT of Hugging Face transformers, 4.57 and 5: the encoder of LeWorldModel, among others."""

from torch import nn

from . import _hf
from ._report import Report


def matches(model: nn.Module) -> bool:
    return _hf.has_parts_of(model, "vit")


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Make `ViTModel` and what is built on it fast: all of them (model None), or a model that is there already.

    Replaced: `ViTLayer.forward` in transformers.models.vit.modeling_vit, as `hf_ijepa.apply` says of `IJepaLayer`.
    """
    return _hf.apply_to_vit("vit", "ViT", model)
