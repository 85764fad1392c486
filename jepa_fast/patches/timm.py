"""timm: blocks of its vision transformers as one autograd node, attention without copies of q, k and v, patch dropout.

Written for timm 1.0.31. Covered is everything that timm builds of these classes: VisionTransformer (vit_*, deit, also with
the weights of I-JEPA, MAE, DINO, DINOv2, CLIP, SigLIP), Eva (EVA, DINOv3, Perception Encoder, vit_*_rope_*), and NaFlexViT,
PiT, MobileViT, CrossViT, ViTamin and hybrids, which borrow Block. What a block has beyond the plain one is computed by
timm: `block_parts` and `why_other_attention` say what that is.
"""

import functools
import weakref
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gather_tokens, varlen_attention_qkv
from ._block import FLOATS, BlockParts, cu_seqlens, gains, has_inner_hooks, is_transformed, run_block, why_never, why_not_now
from ._report import Report, check_signature

# class -> its module, and what its forward must take
_REPLACED = {
    "Block": ("timm.models.vision_transformer", lambda self, x, attn_mask=None, is_causal=False: 0),
    "EvaBlock": ("timm.models.eva", lambda self, x, rope=None, attn_mask=None, is_causal=False: 0),
    "Attention": ("timm.layers.attention", lambda self, x, attn_mask=None, is_causal=False: 0),
    "AttentionRope": ("timm.layers.attention", lambda self, x, rope=None, attn_mask=None, is_causal=False: 0),
    "EvaAttention": ("timm.models.eva", lambda self, x, rope=None, attn_mask=None, is_causal=False: 0),
    "PatchDropout": ("timm.layers.patch_dropout", lambda self, x: 0),
    "PatchDropoutWithIndices": ("timm.layers.patch_dropout", lambda self, x: 0),
}
_RELIED_ON = {
    "Mlp": ("timm.layers.mlp", lambda self, x: 0),
    "LayerScale": ("timm.layers.layer_scale", lambda self, x: 0),
    "DropPath": ("timm.layers.drop", lambda self, x: 0),
    "LayerNorm": ("timm.layers.norm", lambda self, x: 0),
}
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


def kind(part: nn.Module) -> str | None:
    """The name of a part's class, where it is exactly one that this patch knows."""
    name = type(part).__name__
    module, _ = (_REPLACED | _RELIED_ON).get(name, (None, None))
    return name if module == type(part).__module__ else None


def matches(model: nn.Module) -> bool:
    """Whether a model has blocks, attention or patch dropout of timm."""
    return any(kind(part) in _REPLACED for part in model.modules())


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Replace the forward of Block, EvaBlock, Attention, AttentionRope, EvaAttention and PatchDropout.

    Of the classes where model is None, else of the instances in a model; of subclasses only where model is None and they
    inherit it. strict_numerics changes nothing: nothing is put right here.
    """
    types = {}
    for name, (module, expected) in (_REPLACED | _RELIED_ON).items():
        types[name] = getattr(import_module(module), name)
        check_signature(types[name].forward, expected, f"timm's {name}.forward")
    tables = RopeTable()
    fast = {"Block": fast_block, "EvaBlock": functools.partial(fast_eva_block, tables),
            "Attention": fast_attention, "AttentionRope": functools.partial(fast_rope_attention, tables),
            "EvaAttention": functools.partial(fast_rope_attention, tables),
            "PatchDropout": fast_patch_dropout, "PatchDropoutWithIndices": fast_patch_dropout_with_indices}
    with Report.of("timm") as report:
        for name, function in fast.items():
            report.replace_method(types[name], "forward", function, model)
        if model is not None:
            _say_what_is_kept(report, model)
        report.note("timm's code runs under torch.compile, torch.export, torch.fx and torch.jit, where parts have hooks, "
                    "drop or get a mask, and on CPUs for few tokens, where it is faster; GPUs: not measured")
        report.note("a fused block has no second derivative: undo() before create_graph=True")
    return report


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


def fast_block(original, self, x, attn_mask=None, is_causal=False):
    if _is_plain(x, attn_mask, is_causal):
        parts = block_parts(self)
        if not isinstance(parts, str) and why_not_now(self, parts, x) is None:
            return run_block(x, parts)
    return original(self, x, attn_mask=attn_mask, is_causal=is_causal)


def fast_eva_block(tables, original, self, x, rope=None, attn_mask=None, is_causal=False):
    if _is_plain(x, attn_mask, is_causal) and is_constant(rope, x):
        parts = block_parts(self, rope is not None)
        if not isinstance(parts, str) and why_not_now(self, parts, x) is None:
            return run_block(x, parts, tables.of(rope, self.attn, x))
    return original(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)


def fast_attention(original, self, x, attn_mask=None, is_causal=False):
    if _is_plain(x, attn_mask, is_causal) and why_not_attend(self, x) is None:
        return attend(self, x)
    return original(self, x, attn_mask=attn_mask, is_causal=is_causal)


def fast_rope_attention(tables, original, self, x, rope=None, attn_mask=None, is_causal=False):
    if _is_plain(x, attn_mask, is_causal) and is_constant(rope, x) and why_not_attend(self, x) is None:
        return attend(self, x, tables.of(rope, self, x))
    return original(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)


def _is_plain(x, attn_mask, is_causal) -> bool:
    return attn_mask is None and not is_causal and not is_transformed(x) and gains(x)


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
        if not isinstance(getattr(attn, what), nn.Identity):
            return f"its attention has a {what}"
    if attn.gate is not None:
        return "its attention has a gate"
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        return f"its attention has {attn.num_kv_heads} heads of keys for {attn.num_heads} of queries"
    if attn.scale != attn.head_dim ** -0.5 or attn.head_dim > 256:
        return f"its heads are {attn.head_dim} wide and scaled by {attn.scale:g}"
    return None


def why_not_attend(attn: nn.Module, x: Tensor) -> str | None:
    """Why this call of an attention must run timm's code."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        return f"x is {list(x.shape)} {x.dtype}"
    if any(type(layer) is not nn.Linear for layer in projections(attn)):
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


def side_by_side(rows: Tensor, num_heads: int) -> Tensor:
    """rows [3 H d, ...] of q, k, v: the columns i and i + d / 2 of q and k, which rotate together, next to each other.

    Products of q and k do not change when the columns of both change places.
    """
    heads = rows.view(3, num_heads, 2, -1, *rows.shape[1:])
    return torch.cat([heads[:2].transpose(2, 3).flatten(2, 3), heads[2:].flatten(2, 3)]).view(rows.shape)


def is_constant(rope: Tensor | None, x: Tensor) -> bool:
    """Whether a rope is sines and cosines that are not learned, one per token for all heads: [N, 2 d] or [B, 1, N, 2 d]."""
    if rope is None:
        return True
    return not rope.requires_grad and (rope.dim() == 2 or rope.dim() == 4 and rope.shape[:2] == (x.shape[0], 1))


class RopeTable:
    """The rotary table [B * N, 2, d] of timm's last rope: the layers of one forward pass ask for the same."""

    def __init__(self):
        self._last = None, None, None

    def of(self, rope: Tensor | None, attn: nn.Module, x: Tensor) -> Tensor | None:
        """rope [N, 2 d] or [B, 1, N, 2 d], sines then cosines, of the tokens after the prefix."""
        if rope is None:
            return None
        dtype = torch.promote_types(torch.float32, x.dtype)
        version = 0 if rope.is_inference() else rope._version
        key = version, x.shape[0], attn.num_prefix_tokens, attn.rotate_half, dtype
        known, of, table = self._last
        if key != known or of() is not rope:
            with torch.inference_mode(False), torch.no_grad():  # kept from call to call: of training, too
                table = make_table(rope.clone().to(dtype), x.shape[0], attn.num_prefix_tokens, attn.rotate_half)
            self._last = key, weakref.ref(rope), table
        return table


def make_table(rope: Tensor, num_samples: int, num_prefix_tokens: int, halves: bool) -> Tensor:
    """[B * N, 2, d], what `ops.varlen_attention` turns q and k with; prefix tokens stay as they are."""
    sin, cos = rope.flatten(0, -2).chunk(2, -1)
    if halves:
        sin, cos = (t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1) for t in (sin, cos))
    sign = torch.arange(sin.shape[1], device=sin.device) % 2 * 2 - 1   # -1, 1, ...
    table = torch.stack([cos, sin * sign], 1)
    if rope.dim() == 2:
        table = table.repeat(num_samples, 1, 1)
    prefix = table.new_tensor([1.0, 0.0]).view(1, 1, 2, 1).expand(num_samples, num_prefix_tokens, 2, sin.shape[1])
    return torch.cat([prefix, table.view(num_samples, -1, 2, sin.shape[1])], 1).flatten(0, 1)


def fast_patch_dropout(original, self, x):
    return original(self, x) if _drops_otherwise(self, x) else drop_patches(self, x)[0]


def fast_patch_dropout_with_indices(original, self, x):
    return original(self, x) if _drops_otherwise(self, x) else drop_patches(self, x)


def _drops_otherwise(self: nn.Module, x: Tensor) -> bool:
    return not self.training or self.prob == 0 or is_transformed(x) or x.dim() != 3 or x.dtype not in FLOATS or not gains(x)


def drop_patches(dropout: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and prefix tokens kept [B, K, D], and which [B, K - prefix], by timm's random numbers; one gather."""
    prefix = dropout.num_prefix_tokens
    B, L = x.shape[0], x.shape[1] - prefix
    keep = torch.argsort(torch.randn(B, L, device=x.device), dim=-1)[:, :max(1, int(L * (1 - dropout.prob)))]
    if dropout.ordered:
        keep = keep.sort(dim=-1)[0]
    index = torch.cat([torch.arange(prefix, device=x.device).expand(B, -1), keep + prefix], 1)
    return gather_tokens(x, index), keep
