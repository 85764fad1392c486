"""The ops: one public function each, checked once, differentiable, one node for torch.compile."""

from ._define import BACKENDS, COMPILED_MISSING, ORDER, TABLE, info, use_backend, why_not
from .directions import directions
from .gather_tokens import gather_tokens, scatter_tokens

__all__ = ["BACKENDS", "COMPILED_MISSING", "ORDER", "TABLE", "directions", "gather_tokens", "info", "scatter_tokens",
           "use_backend", "why_not"]
