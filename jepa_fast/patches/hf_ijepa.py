"""I-JEPA of Hugging Face transformers, 4.57 and 5."""

from torch import nn

from . import _hf
from ._report import Report


def matches(model: nn.Module) -> bool:
    return _hf.has_parts_of(model, "ijepa")


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Make `IJepaModel` and what is built on it fast: all of them (model None), or a model that is there already.

    Replaced: `IJepaLayer.forward` in transformers.models.ijepa.modeling_ijepa, by one fused block on the same parameters;
    in a model, `attn_implementation` "sdpa" by "jepa_fast", which is registered as an attention and as a mask. A model
    that runs "eager" is fused until attention weights are asked for. strict_numerics changes nothing: nothing is wrong.
    """
    return _hf.apply_to_vit("ijepa", "IJepa", model)
