"""What the patches of V-JEPA 2 and 2.1 share: which of their blocks are computed as ours, and their attention layers."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..drop_in.attention import angle_dtype, attend, attention_dropout
from ..drop_in.masks import apply_masks, repeat_interleave_batch
from ..nn.block_function import Activations
from ._block import BlockParts, gains, is_transformed, why_not_now
from ._meta import Checkout
from ._report import Report, check_signature

Positions = Callable[[nn.Module, Tensor, int | None, int | None, torch.dtype], Tensor]

FUNCTIONS = {"apply_masks": (apply_masks, lambda x, masks, concat=True: 0),
              "repeat_interleave_batch": (repeat_interleave_batch, lambda x, B, repeat: 0)}


class Family(NamedTuple):
    """One loaded tree of layers (`modules.py` of V-JEPA 2 or 2.1) and how its rotary positions go."""

    layers: ModuleType
    strict: bool
    pairing: str
    positions: Positions    # (attention, ids [P], H, W, dtype) -> [P, 3]
    activations: Activations | None     # what packed blocks keep for the backward pass; None: as the model is configured


NOTE = ("rotary angles are float32 or wider (originally in the dtype of q and k), and attention drops in training only "
        "(originally by drop_rate in eval too); strict_numerics=True goes back to both")


def family_of(layers: ModuleType, strict: bool, pairing: str, positions: Positions, activations: Activations | None
              ) -> Family:
    if activations not in (None, *get_args(Activations)):
        raise ValueError(f"activations must be None or one of {', '.join(get_args(Activations))}, got {activations!r}")
    return Family(layers, strict, pairing, positions, activations)


def replace_all(report: Report, checkout: Checkout, model: nn.Module | None, classes: dict[str, list[type]],
                forwards: dict[str, Callable], functions: dict[str, tuple[Callable, Callable]]) -> None:
    """Replace the forwards of classes and, everywhere, functions: name -> (ours, the signature that it must have)."""
    for name, forward in forwards.items():
        for cls in classes[name]:
            report.replace_method(cls, "forward", forward, model)
        if not classes[name] and model is None:
            report.keep(name, "its module is not loaded; import it first")
    for name, (new, expected) in functions.items():
        for old in checkout.holders(name):
            check_signature(old, expected, name)
        checkout.replace_function(report, name, new)


def block_parts(block: nn.Module) -> BlockParts:
    attn, mlp = block.attn, block.mlp
    return BlockParts(block.norm1, (attn.qkv,), attn.proj, block.norm2, mlp.fc1, mlp.act, mlp.fc2, attn.num_heads,
                      block.drop_path, block.drop_path, (attn.proj_drop, mlp.drop))


def why_not_fused(family: Family, block: nn.Module, x: Tensor, attn_mask: Tensor | None = None,
                  frame_size: int = 0) -> str | None:
    """Why a block must run its own code on x [B, N, D]; None where `run_block` computes the same."""
    if is_transformed(x):  # first: what follows is not for a compiler's eyes
        return "it is being compiled, traced or transformed"
    attn = block.attn
    if type(attn) not in attention_types(family.layers) or type(block.mlp) is not family.layers.MLP:
        return f"its parts are {type(attn).__name__} and {type(block.mlp).__name__}"
    if attn_mask is not None and not frame_size:
        return "its attention mask is not frame-causal"
    is_sdpa = attn_mask is not None or attn.use_sdpa
    if is_sdpa and attn.is_causal or attention_dropout(attn, is_sdpa, family.strict):
        return "its attention is causal or drops"
    if not is_sdpa and attn.scale != (attn.qkv.in_features // attn.num_heads) ** -0.5:
        return f"its attention has a scale of its own, {attn.scale}"
    if is_rotary(attn) and has_own_angles(x, family.strict):
        return "its angles are rounded as only its own code does"
    return why_not_now(block, block_parts(block), x)


def attention_types(layers: ModuleType) -> list[type]:
    return [vars(layers)[name] for name in ("RoPEAttention", "ACRoPEAttention", "Attention") if name in vars(layers)]


def is_rotary(attn: nn.Module) -> bool:
    return hasattr(attn, "d_dim")


def own_code_only(layer: nn.Module, x: Tensor, strict: bool) -> bool:
    """Whether even the attention of a layer must be the original's."""
    return is_transformed(x) or x.dim() != 3 or has_own_angles(x, strict)


def has_own_angles(x: Tensor, strict: bool) -> bool:
    """Whether no table of ours rounds angles as the original: float16 anywhere, and bfloat16 on CPUs, where autocast leaves
    the products of positions and frequencies alone."""
    dtype = angle_dtype(x, strict)
    return strict and (dtype == torch.float16 or dtype == torch.bfloat16 and x.device.type == "cpu")


def plain_attention(family: Family):
    """`Attention.forward` without rotary positions, with masks and without."""
    def forward(original, self, x, mask=None, attn_mask=None):
        if is_transformed(x) or x.dim() != 3:
            return original(self, x, mask, attn_mask)
        return attend(self, x, None, attn_mask, strict=family.strict, packs=gains(x))
    return forward


def cross_attention(original, self, q, x):
    """`CrossAttention.forward` without PyTorch's deprecated context manager."""
    if is_transformed(q) or not self.use_sdpa:
        return original(self, q, x)
    queries = self.q(q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
    k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return nn.functional.scaled_dot_product_attention(queries, k, v).transpose(1, 2).flatten(2)


def classes_of(checkout: Checkout, name: str, expected: Callable) -> list[type]:
    """The classes of a name that are made of the layers of this checkout's core, with the `forward` they must have.

    A checkout may hold two trees, V-JEPA 2's and 2.1's: models name their blocks; the wrappers name nothing, and are told
    apart by their arguments.
    """
    found = []
    for cls in checkout.definitions(name):
        block = cls.__init__.__globals__.get("Block")   # the layers' own, in models and in the layers' module
        if block is not None:
            if block in (vars(checkout.core).get("Block"), vars(checkout.core).get("ACBlock")):
                check_signature(cls.forward, expected, f"{name}.forward")
                found.append(cls)
        elif list(inspect.signature(cls.forward).parameters) == list(inspect.signature(expected).parameters):
            found.append(cls)
    return found
