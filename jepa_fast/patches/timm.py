"""timm: blocks of its vision transformers as one autograd node, attention without copies of q, k and v, patch dropout.

For timm 1.0.15 to 1.0.31. Covered is everything that timm builds of these classes: VisionTransformer (vit_*, deit, also
with the weights of I-JEPA, MAE, DINO, DINOv2, CLIP, SigLIP), Eva (EVA, DINOv3, Perception Encoder, vit_*_rope_*), and
NaFlexViT, PiT, MobileViT, CrossViT, ViTamin and hybrids, which borrow Block. What a block has beyond the plain one is
computed by timm: `block_parts` and `why_other_attention` say what that is.
"""

import functools
import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gather_tokens, varlen_attention_qkv
from ._block import FLOATS, BlockParts, cu_seqlens, gains, has_inner_hooks, is_transformed, run_block, why_never, why_not_now
from ._report import PatchError, Report, check_signature
from ._timm_rope import RopeTable, is_constant, side_by_side


class _Class(NamedTuple):
    homes: tuple[str, ...]    # where some timm defines it
    forward: Callable         # what its forward takes
    least: int                # and how much of that in the oldest


_LAYERS, _VIT, _EVA = "timm.layers", "timm.models.vision_transformer", "timm.models.eva"
_REPLACED = {
    "Block": _Class((_VIT,), lambda self, x, attn_mask=None, is_causal=False: 0, 2),
    "EvaBlock": _Class((_EVA,), lambda self, x, rope=None, attn_mask=None, is_causal=False: 0, 4),
    "Attention": _Class((f"{_LAYERS}.attention", _VIT), lambda self, x, attn_mask=None, is_causal=False: 0, 2),
    "AttentionRope": _Class((f"{_LAYERS}.attention",),
                            lambda self, x, rope=None, attn_mask=None, is_causal=False: 0, 4),
    "EvaAttention": _Class((_EVA,), lambda self, x, rope=None, attn_mask=None, is_causal=False: 0, 4),
    "PatchDropout": _Class((f"{_LAYERS}.patch_dropout",), lambda self, x: 0, 2),
    "PatchDropoutWithIndices": _Class((f"{_LAYERS}.patch_dropout",), lambda self, x: 0, 2),
}
_RELIED_ON = {
    "Mlp": _Class((f"{_LAYERS}.mlp",), lambda self, x: 0, 2),
    "LayerScale": _Class((f"{_LAYERS}.layer_scale", _VIT), lambda self, x: 0, 2),
    "DropPath": _Class((f"{_LAYERS}.drop",), lambda self, x: 0, 2),
    "LayerNorm": _Class((f"{_LAYERS}.norm",), lambda self, x: 0, 2),
}
_KNOWN, _NEWER = _REPLACED | _RELIED_ON, ("AttentionRope", "PatchDropoutWithIndices")
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


def kind(part: nn.Module) -> str | None:
    """The name of a part's class, where it is exactly one that this patch knows."""
    name = type(part).__name__
    return name if name in _KNOWN and type(part).__module__ in _KNOWN[name].homes else None


def matches(model: nn.Module) -> bool:
    """Whether a model has blocks, attention or patch dropout of timm."""
    return any(kind(part) in _REPLACED for part in model.modules())


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Replace the forward of Block, EvaBlock, Attention, AttentionRope, EvaAttention and PatchDropout.

    Of the classes where model is None, else of the instances in a model; of subclasses that inherit it, too.
    strict_numerics changes nothing: nothing is put right here.
    """
    classes = {name: _find(name) for name in _KNOWN}
    tables = RopeTable()
    fast = {"Block": fast_block, "EvaBlock": functools.partial(fast_eva_block, tables),
            "Attention": fast_attention, "AttentionRope": functools.partial(fast_rope_attention, tables),
            "EvaAttention": functools.partial(fast_rope_attention, tables),
            "PatchDropout": fast_patch_dropout, "PatchDropoutWithIndices": fast_patch_dropout_with_indices}
    with Report.of("timm") as report:
        for name, function in fast.items():
            for cls in classes[name]:
                report.replace_method(cls, "forward", function, model)
        if model is not None:
            _say_what_is_kept(report, model)
        report.note("timm's code runs under torch.compile, torch.export, torch.fx and torch.jit, where parts have hooks, "
                    "drop or get a mask, and on CPUs for few tokens, where it is faster; GPUs: not measured")
        report.note("a fused block has no second derivative: undo() before create_graph=True")
    return report


def _find(name: str) -> list[type]:
    """The classes of that name in the timm that is there, checked."""
    modules = [import_module(home) for home in _KNOWN[name].homes if importlib.util.find_spec(home) is not None]
    found = [getattr(module, name) for module in modules if hasattr(module, name)]
    if not found and name not in _NEWER:
        raise PatchError(f"{' or '.join(_KNOWN[name].homes)} must define {name} for this patch: another version of timm")
    for cls in found:
        check_signature(cls.forward, _KNOWN[name].forward, f"timm's {name}.forward", _KNOWN[name].least)
    return list(dict.fromkeys(found))


def _say_what_is_kept(report: Report, model: nn.Module) -> None:
    for part in model.modules():
        name = type(part).__name__
        if kind(part) in ("Block", "EvaBlock"):
            parts = block_parts(part)
            why = parts if isinstance(parts, str) else why_never(parts)
            if why:
                report.keep(f"{name} as a whole", why)
        elif kind(part) in _ATTENTIONS and why_other_attention(part):
            report.keep(name, why_other_attention(part))
        elif type(part).__module__.startswith("timm.") and kind(part) is None and name.endswith(("Block", "Attention")):
            report.keep(name, "not one of the classes that this patch knows")


def fast_block(original, self, x, *args, **kwargs):
    if _is_plain(x, args, kwargs):
        parts = block_parts(self)
        if not isinstance(parts, str) and why_not_now(self, parts, x) is None:
            return run_block(x, parts)
    return original(self, x, *args, **kwargs)


def fast_eva_block(tables, original, self, x, rope=None, *args, **kwargs):
    if _is_plain(x, args, kwargs) and is_constant(rope, x):
        parts = block_parts(self, rope is not None)
        if not isinstance(parts, str) and why_not_now(self, parts, x) is None:
            return run_block(x, parts, tables.of(rope, self.attn, x))
    return original(self, x, rope, *args, **kwargs)


def fast_attention(original, self, x, *args, **kwargs):
    if _is_plain(x, args, kwargs) and why_not_attend(self, x) is None:
        return attend(self, x)
    return original(self, x, *args, **kwargs)


def fast_rope_attention(tables, original, self, x, rope=None, *args, **kwargs):
    if _is_plain(x, args, kwargs) and is_constant(rope, x) and why_not_attend(self, x) is None:
        return attend(self, x, tables.of(rope, self, x))
    return original(self, x, rope, *args, **kwargs)


def _is_plain(x, args, kwargs) -> bool:
    """Whether attn_mask and is_causal, as far as this timm knows them, ask for nothing."""
    return not is_transformed(x) and all(value is None or value is False for value in (*args, *kwargs.values())) and gains(x)


def block_parts(block: nn.Module, rotates: bool = False) -> BlockParts | str:
    """What a Block or EvaBlock computes with, or what it does that ours does not."""
    attn, mlp = block.attn, block.mlp
    why = why_other_attention(attn)
    if why:
        return why
    if kind(mlp) != "Mlp" or not isinstance(mlp.norm, nn.Identity):
        return f"its MLP is a {type(mlp).__name__}{' with a norm' if kind(mlp) == 'Mlp' else ''}"
    norms, drops = (block.norm1, block.norm2), (block.drop_path1, block.drop_path2)
    scales = () if hasattr(block, "gamma_1") else (block.ls1, block.ls2)   # EvaBlock has parameters only
    for parts, known, same in ((norms, "LayerNorm", nn.LayerNorm), (drops, "DropPath", nn.Identity),
                               (scales, "LayerScale", nn.Identity)):
        for part in parts:
            if kind(part) != known and type(part) is not same:
                return f"its {known} is a {type(part).__name__}"
    gammas = [getattr(scale, "gamma", None) for scale in scales] or (block.gamma_1, block.gamma_2)
    return BlockParts(block.norm1, projections(attn), attn.proj, block.norm2, mlp.fc1, mlp.act, mlp.fc2, attn.num_heads,
                      *drops, (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2), *gammas, _make_qkv(attn, rotates))


def why_other_attention(attn: nn.Module) -> str | None:
    """What an attention does beyond softmax(q k) v of as many keys as queries."""
    if kind(attn) not in _ATTENTIONS:
        return f"its attention is a {type(attn).__name__}"
    for what in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attn, what, None), nn.Identity | None):
            return f"its attention has a {what}"
    if getattr(attn, "gate", None) is not None:
        return "its attention has a gate"
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        return f"its attention has {attn.num_kv_heads} heads of keys for {attn.num_heads} of queries"
    head_dim = attn.proj.in_features / attn.num_heads
    if attn.scale != head_dim ** -0.5 or head_dim > 256:
        return f"its heads are {head_dim:g} wide and scaled by {attn.scale:g}"
    return None


def why_not_attend(attn: nn.Module, x: Tensor) -> str | None:
    """Why this call of an attention must run timm's code."""
    if x.dim() != 3 or x.dtype not in FLOATS or x.device.type not in ("cpu", "cuda"):
        return f"x is {list(x.shape)} {x.dtype} on {x.device}"
    if any(type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter for layer in projections(attn)):
        return "its projections are no plain Linears"
    if not torch.is_autocast_enabled(x.device.type) and projections(attn)[0].weight.dtype != x.dtype:
        return f"x is {x.dtype}, its weights {projections(attn)[0].weight.dtype}"
    if attn.training and attn.attn_drop.p > 0:
        return "its dropout drops"
    return "its parts have hooks" if has_inner_hooks(attn) else why_other_attention(attn)


def attend(attn: nn.Module, x: Tensor, rotary: Tensor | None = None) -> Tensor:
    """[B, N, D] -> [B, N, D_out]; rotary [B * N, 2, d]."""
    B, N, _ = x.shape
    weight, bias = (make() if (make := _make_qkv(attn, rotary is not None)) else stored_qkv(attn))
    qkv = F.linear(x, weight, bias).view(B * N, 3, attn.num_heads, -1)
    out = varlen_attention_qkv(qkv, cu_seqlens(B, N, x.device), N, rotary=rotary)
    return attn.proj_drop(attn.proj(out.view(B, N, -1)))


def projections(attn: nn.Module) -> tuple[nn.Linear, ...]:
    """The Linears that make q, k and v: one or three."""
    return (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)


def stored_qkv(attn: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [3 H d, D] and bias of the projections, as they lie in timm's modules."""
    layers = projections(attn)
    if getattr(attn, "q_bias", None) is not None:
        biases = [attn.q_bias, attn.k_bias, attn.v_bias]
    else:
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    weights = [layer.weight for layer in layers]
    return (torch.cat(weights) if len(weights) > 1 else weights[0]), (torch.cat(biases) if len(biases) > 1 else biases[0])


def _make_qkv(attn: nn.Module, rotates: bool):
    """How to make weight and bias where the Linears alone would not do: separate biases, halves that rotate together."""
    halves = rotates and getattr(attn, "rotate_half", False)
    if not halves and getattr(attn, "q_bias", None) is None:
        return None

    def make():
        weight, bias = stored_qkv(attn)
        return (side_by_side(weight, attn.num_heads), side_by_side(bias, attn.num_heads)) if halves else (weight, bias)
    return make


def fast_patch_dropout(original, self, x):
    return original(self, x) if _drops_otherwise(self, x) else drop_patches(self, x)[0]


def fast_patch_dropout_with_indices(original, self, x):
    return original(self, x) if _drops_otherwise(self, x) else drop_patches(self, x)


def _drops_otherwise(self: nn.Module, x: Tensor) -> bool:
    return (not self.training or self.prob == 0 or is_transformed(x) or x.dim() != 3 or x.dtype not in FLOATS
            or getattr(self, "return_indices", False) or not gains(x))


def drop_patches(dropout: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and prefix tokens kept [B, K, D], and which [B, K - prefix], by timm's random numbers; one gather."""
    prefix = dropout.num_prefix_tokens
    B, L = x.shape[0], x.shape[1] - prefix
    keep = torch.argsort(torch.randn(B, L, device=x.device), dim=-1)[:, :max(1, int(L * (1 - dropout.prob)))]
    if dropout.ordered:
        keep = keep.sort(dim=-1)[0]
    index = torch.cat([torch.arange(prefix, device=x.device).expand(B, -1), keep + prefix], 1)
    return gather_tokens(x, index), keep
