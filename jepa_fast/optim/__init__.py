"""The optimizer step: AdamW with moving averages, parameter groups, clipping, schedules."""

from .adamw_ema import AdamWEMA
from .clip import clip_scale
from .groups import param_groups
from .schedules import Constant, Cosine, Horizon, Linear, Schedule, WarmupConstantLinear, WarmupCosine

__all__ = ["AdamWEMA", "Constant", "Cosine", "Horizon", "Linear", "Schedule", "WarmupConstantLinear", "WarmupCosine",
           "clip_scale", "param_groups"]
