"""The ops: one public function each, checked once, differentiable, one node for torch.compile."""

from ._backends import COMPILED_MISSING, why_not
from ._define import BACKENDS, ORDER, TABLE, checks_on_device, info, use_backend
from .adamw_ema import adamw_ema_, adamw_ema_scalars, adamw_ema_scalars_
from .assemble_predictor_input import assemble_predictor_input
from .bias_gelu import bias_gelu
from .crop_resize import crop_resize
from .directions import directions
from .ema_update import ema_update_
from .gather_patches import gather_patches, scatter_patches
from .gather_tokens import gather_tokens, scatter_tokens
from .latent_loss import latent_loss
from .layer_norm import layer_norm
from .matmul import matmul
from .multiblock import multiblock
from .sigreg import Quadrature, epps_pulley, sigreg
from .sigreg_exact import sigreg_exact
from .varlen_attention import varlen_attention, varlen_attention_qkv

__all__ = ["BACKENDS", "COMPILED_MISSING", "ORDER", "TABLE", "Quadrature", "adamw_ema_", "adamw_ema_scalars",
           "adamw_ema_scalars_", "assemble_predictor_input", "bias_gelu", "checks_on_device", "crop_resize", "directions",
           "ema_update_", "epps_pulley", "gather_patches", "gather_tokens", "info", "latent_loss", "layer_norm", "matmul",
           "multiblock", "scatter_patches", "scatter_tokens", "sigreg", "sigreg_exact", "use_backend", "varlen_attention",
           "varlen_attention_qkv", "why_not"]
