"""The ops: one public function each, checked once, differentiable, one node for torch.compile."""

from ._define import BACKENDS, COMPILED_MISSING, ORDER, TABLE, info, use_backend, why_not
from .gather_patches import gather_patches, scatter_patches
from .gather_tokens import gather_tokens, scatter_tokens
from .latent_loss import latent_loss

__all__ = ["BACKENDS", "COMPILED_MISSING", "ORDER", "TABLE", "gather_patches", "gather_tokens", "info", "latent_loss",
           "scatter_patches", "scatter_tokens", "use_backend", "why_not"]
