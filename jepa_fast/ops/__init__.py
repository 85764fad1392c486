"""The ops: one public function each, checked once, differentiable, one node for torch.compile."""

from ..reference.quadrature import Quadrature
from ._define import BACKENDS, COMPILED_MISSING, ORDER, TABLE, info, use_backend, why_not
from .directions import directions
from .gather_tokens import gather_tokens, scatter_tokens
from .sigreg import sigreg
from .sigreg_exact import sigreg_exact

__all__ = ["BACKENDS", "COMPILED_MISSING", "ORDER", "Quadrature", "TABLE", "directions", "gather_tokens", "info",
           "scatter_tokens", "sigreg", "sigreg_exact", "use_backend", "why_not"]
