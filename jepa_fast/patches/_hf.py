"""What the patches of Hugging Face transformers (4.57 and 5) share: attention by name, layers, recorded outputs."""

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import varlen_attention
from ._block import FLOATS, BlockParts, cu_seqlens, gains, is_transformed, product_dtype, run_block, why_not_now
from ._report import PatchError, Report, check_signature, has_own

ATTENTION = "jepa_fast"
WHERE_ORIGINAL = ("its own code runs with attention masks, output_attentions, dropout that drops and hooks on parts, under "
                  "torch.compile, and on CPUs, where ours was measured as slower, for few tokens, in float16{}")
# on a CPU, less gains nothing: tokens, of wide layers with rotary positions, and numbers of a float32 stream without them
MIN_TOKENS, MIN_NUMBERS = 128, 150_000
NARROW = 256


def modeling(name: str) -> types.ModuleType:
    """transformers.models.NAME.modeling_NAME; ImportError where it cannot be imported."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def has_parts_of(model: nn.Module, name: str) -> bool:
    return any(type(part).__module__ == f"transformers.models.{name}.modeling_{name}" for part in model.modules())


def has_options(masks: tuple, options: dict) -> bool:
    """Whether a layer is asked for more than its output: masks, attention weights."""
    return (any(mask is not None and mask is not False for mask in masks)
            or any(value is not None and value is not False and name != "output_hidden_states"
                   for name, value in options.items()))


def is_idle(hook: Callable) -> bool:
    """Whether a hook is transformers 5's recorder, which stays after its first use, and records no attention now."""
    recorder = sys.modules.get("transformers.utils.output_capturing")
    if recorder is None or getattr(hook, "__module__", None) != recorder.__name__:
        return False
    return not set(recorder._active_collector.get() or ()) - {"hidden_states", "_hidden_states_layers"}


def runs_itself(layer: nn.Module, parts: BlockParts, x: Tensor, has_rotary: bool) -> bool:
    """Whether a layer must run its own code on x [B, N, D], or is faster so."""
    return is_transformed(x) or _is_slower(x, parts, has_rotary) or why_not_now(layer, parts, x, is_idle) is not None


def _is_slower(x: Tensor, parts: BlockParts, has_rotary: bool) -> bool:
    """Whether ours was measured as slower: on CPUs, for few tokens, and in 16-bit inference without rotary positions."""
    if x.device.type != "cpu" or x.dim() != 3:
        return False
    dtype = product_dtype(x)
    if has_rotary:
        return dtype == torch.float16 or (x.shape[2] > NARROW and x.shape[0] * x.shape[1] < MIN_TOKENS)
    trains = torch.is_grad_enabled() and (x.requires_grad or parts.proj.weight.requires_grad)
    return not gains(x) or _prefers_sdpa(dtype, trains) or (dtype.itemsize > 2 and x.numel() < MIN_NUMBERS)


def _prefers_sdpa(dtype: torch.dtype, trains: bool) -> bool:
    """Whether PyTorch's 16-bit attention was measured as faster on CPUs."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not trains)


def replace_layer(report: Report, cls: type, fast: Callable, model: nn.Module | None) -> None:
    """`Report.replace_method` of a layer's forward that keeps its gradient checkpointing.

    transformers 4 checkpoints around the call of a layer, 5 within the forward, which every subclass gets wrapped anew; so
    do the classes that `fully_shard` makes.
    """
    checkpoints_itself = any("__init_subclass__" in vars(base) for base in cls.__mro__[1:-1])
    inner = cls.forward.__wrapped__ if checkpoints_itself else cls.forward

    def layer(original, self, *args, **kwargs):
        if (checkpoints_itself and self.gradient_checkpointing and self.training
                and (type(self) is cls or has_own(self, "forward"))):
            return self._gradient_checkpointing_func(functools.partial(fast, inner, self, **kwargs), *args)
        return fast(inner, self, *args, **kwargs)

    innermost = inspect.unwrap(cls.forward)
    classes = [cls] if model is None else dict.fromkeys(
        type(part) for part in model.modules() if isinstance(part, cls) and inspect.unwrap(type(part).forward) is innermost)
    for each in classes:
        report.replace_method(each, "forward", layer, model)


def check_parts(cls: type, parts: Callable, *arguments, **options) -> None:
    """Refuse a layer that is not built of what `parts` asks for: make one that holds no numbers, and look."""
    with torch.device("meta"):
        layer = cls(*arguments, **options)
    try:
        parts(layer)
    except AttributeError as error:
        raise PatchError(f"{cls.__module__}.{cls.__name__} must have other parts for this patch: {error}; nothing was "
                         f"replaced") from None


def apply_to_vit(name: str, prefix: str, model: nn.Module | None) -> Report:
    """The patch of a model built as ViT is: fused layers, and the attention by name."""
    module = modeling(name)
    cls = getattr(module, f"{prefix}Layer", None)
    if cls is None:
        raise PatchError(f"{module.__name__} must have a {prefix}Layer: another version of transformers")
    with Report.of(f"hf_{name}") as report:
        if hasattr(module, f"{prefix}Intermediate"):  # transformers 4
            check_signature(cls.forward, lambda self, hidden_states, head_mask=None: 0, f"{prefix}Layer.forward")
            if model is None:
                report.note("recording hidden states or attentions binds a model's forwards for good (transformers 4): what "
                            "recorded before this is not reached, what does after it is not undone")
        else:
            check_signature(cls.forward, lambda self, hidden_states, attention_mask=None, **kwargs: 0,
                            f"{prefix}Layer.forward")
        config = getattr(module, f"{prefix}Config")(hidden_size=8, num_attention_heads=1, intermediate_size=8)
        check_parts(cls, _vit_parts, config)
        replace_layer(report, cls, _vit_layer, model)
        report.keep(f"{prefix}Layer", WHERE_ORIGINAL.format(" and in bfloat16 inference"))
        use_attention(report, model)
    return report


def _vit_layer(original, self, hidden_states, *masks, **options):
    parts = _vit_parts(self)
    attention = getattr(self.attention, "attention", self.attention)  # of transformers 4, of 5
    dropout = getattr(attention, "dropout_prob", None) or getattr(attention, "attention_dropout", 0.0)
    if (has_options(masks, options) or (dropout and attention.training)
            or runs_itself(self, parts, hidden_states, has_rotary=False)):
        return original(self, hidden_states, *masks, **options)
    return run_block(hidden_states, parts)


def _vit_parts(layer: nn.Module) -> BlockParts:
    if hasattr(layer, "intermediate"):  # transformers 4
        attention, output = layer.attention.attention, layer.attention.output
        return BlockParts(layer.layernorm_before, (attention.query, attention.key, attention.value), output.dense,
                          layer.layernorm_after, layer.intermediate.dense, layer.intermediate.intermediate_act_fn,
                          layer.output.dense, attention.num_attention_heads,
                          dropouts=(output.dropout, layer.output.dropout))
    attention, mlp = layer.attention, layer.mlp
    return BlockParts(layer.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj,
                      layer.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2, attention.num_attention_heads,
                      dropouts=(layer.dropout,))


def register_hf_attention() -> None:
    """Make attn_implementation="jepa_fast" known to transformers, for any of its models; it stays known."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention_forward)
    # without this one a user's attention_mask would be dropped, and nothing said
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])


def use_attention(report: Report, model: nn.Module | None) -> None:
    """Let the configurations of a model that name "sdpa" as their attention name ours."""
    register_hf_attention()
    if model is None:
        report.note(f"attn_implementation={ATTENTION!r} names our attention, for what no layer computes itself")
        return
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    for config in configs:
        found = vars(config).get("_attn_implementation_internal")
        if found == "sdpa":
            report.replace(config, "_attn_implementation_internal", ATTENTION, f"{type(config).__name__}: attention")
        elif found != ATTENTION:
            report.keep(f"{type(config).__name__}: attention", f"{found!r} was chosen; for layers that run as they were")


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
                      dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
                      **kwargs) -> tuple[Tensor, None]:
    """The "jepa_fast" of `attn_implementation`: query [B, H, N, d], key and value [B, H, M, d] -> ([B, N, H, d], None).

    `varlen_attention` where it computes the same and is not slower; transformers' "sdpa" for masks, dropout, causal or
    grouped heads, under torch.compile, and where it is slower: on CPUs for few tokens, float16 and bfloat16 inference.
    """
    from transformers import AttentionInterface

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (is_transformed() or attention_mask is not None or dropout or (causal and query.shape[2] > 1)
            or has_options((), kwargs) or not _fits(query, key, value)):
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                            is_causal=is_causal, **kwargs)
    B, H, N, d = query.shape
    M = key.shape[2]
    q, k, v = (x.transpose(1, 2).reshape(-1, H, d) for x in (query, key, value))
    out = varlen_attention(q, k, v, cu_seqlens(B, N, query.device), N, cu_seqlens(B, M, query.device), M, scaling)
    return out.view(B, N, H, d), None


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    B, H, _, d = query.shape
    if key.shape != value.shape or (*key.shape[:2], key.shape[3]) != (B, H, d) or d > 256:
        return False
    if query.device.type not in ("cpu", "cuda") or query.dtype not in FLOATS or not query.dtype == key.dtype == value.dtype:
        return False
    is_small = query.shape[0] * query.shape[2] < MIN_TOKENS
    trains = torch.is_grad_enabled() and query.requires_grad
    return query.is_cuda or not (is_small or _prefers_sdpa(query.dtype, trains))
