"""The ops: one public function each, checked once, differentiable, one node for torch.compile."""

from ._define import BACKENDS, COMPILED_MISSING, ORDER, TABLE, info, use_backend, why_not
from .adamw_ema import adamw_ema_
from .ema_update import ema_update_
from .gather_tokens import gather_tokens, scatter_tokens

__all__ = ["BACKENDS", "COMPILED_MISSING", "ORDER", "TABLE", "adamw_ema_", "ema_update_", "gather_tokens", "info",
           "scatter_tokens", "use_backend", "why_not"]
