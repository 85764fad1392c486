"""A pre-norm transformer block of another code base, computed as one of ours.

Its modules stay where they are and keep their parameters; only the arithmetic is `nn.block_function.block`. Where that
would not be the same (hooks on inner modules, dropout that drops, weights that are no plain Linear, tracing and
compilation), the block's own code runs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..nn.block import Sequences
from ..nn.block_function import Activations, BlockWeights, How, block
from ..nn.linear import linear
from ..ops import COMPILED_MISSING, bias_gelu, varlen_attention
from ._report import has_own

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# on a CPU, a block of fewer tokens or products per thread gains nothing; training gains later than evaluation
MIN_TOKENS, MIN_TOKENS_HALF, MIN_PRODUCTS, MIN_PRODUCTS_HALF = 256, 64, 25e6, 7e6


class BlockParts(NamedTuple):
    """x + scale1 proj(attention(qkv(norm1(x)))), then x + scale2 fc2(gelu(fc1(norm2(x))))."""

    norm1: nn.LayerNorm
    qkv: tuple[nn.Linear, ...]              # one that makes all three side by side, or query, key, value; or `make_qkv`
    proj: nn.Linear
    norm2: nn.LayerNorm
    fc1: nn.Linear
    act: nn.Module
    fc2: nn.Linear
    num_heads: int
    drop_path1: nn.Module | None = None     # stochastic depth, a module; drawn by itself, so that the numbers are the same
    drop_path2: nn.Module | None = None
    dropouts: tuple[nn.Module, ...] = ()    # that must not drop
    scale1: Tensor | None = None            # [D], LayerScale of a branch
    scale2: Tensor | None = None
    make_qkv: Callable[[], tuple[Tensor, Tensor]] | None = None  # weight [3 D, D] and bias, if not just those of `qkv`


def why_never(parts: BlockParts) -> str | None:
    """Why a block cannot be computed as ours, whatever comes in; None where it can."""
    layers = [("qkv", layer) for layer in parts.qkv] + [("proj", parts.proj), ("fc1", parts.fc1), ("fc2", parts.fc2)]
    for name, layer in layers:
        if type(layer) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return f"{name} is a {type(layer).__name__}, no plain Linear"
        if type(layer.weight) not in (nn.Parameter, Tensor):  # quantised, distributed, fake
            return f"the weight of {name} is a {type(layer.weight).__name__}"
    for norm in (parts.norm1, parts.norm2):
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return f"its norm is {type(norm).__name__}, no LayerNorm with weight and bias"
    if parts.norm1.eps != parts.norm2.eps:
        return f"its two norms have eps {parts.norm1.eps} and {parts.norm2.eps}"
    if not is_exact_gelu(parts.act):
        return f"its activation is {type(parts.act).__name__}, no exact GELU"
    head_dim = parts.proj.in_features / parts.num_heads
    if parts.proj.in_features != parts.proj.out_features or head_dim % 1 or head_dim > 256:
        return f"its heads are {head_dim:g} wide, of {parts.proj.in_features} into {parts.proj.out_features}"
    return None


def is_exact_gelu(act) -> bool:
    """nn.GELU() of any code base, not its approximations."""
    if isinstance(act, nn.GELU):
        return act.approximate == "none"
    return act is F.gelu or getattr(act, "act", None) is F.gelu  # Hugging Face's GELUActivation


def why_not_now(owner: nn.Module, parts: BlockParts, x: Tensor,
                is_idle: Callable[[Callable], bool] = lambda hook: False) -> str | None:
    """Why this call of a block (`owner`) must run its own code; None where ours computes the same.

    is_idle: whether a forward hook would do nothing now.
    """
    if is_transformed(x):
        return "it is being compiled, traced or transformed"
    if x.device.type not in ("cpu", "cuda"):
        return f"x is on {x.device}"
    if x.dim() != 3 or x.dtype not in FLOATS:
        return f"x is {list(x.shape)} {x.dtype}"
    if not torch.is_autocast_enabled(x.device.type) and parts.proj.weight.dtype != x.dtype:
        return f"x is {x.dtype}, its weights {parts.proj.weight.dtype}"
    if any(dropout.p > 0 and dropout.training for dropout in parts.dropouts):
        return "its dropout drops"
    if has_inner_hooks(owner, is_idle):
        return "its parts have hooks"
    if product_dtype(x) == torch.float16 and (parts.scale1 is not None or parts.scale2 is not None):
        return "weights times LayerScale can be too small for float16"
    return why_never(parts)


def is_transformed(x: Tensor | None = None) -> bool:
    """Whether torch.compile, a tracer (x may be a torch.fx.Proxy) or functorch looks on."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
            or not isinstance(x, Tensor | None))


def product_dtype(x: Tensor) -> torch.dtype:
    """In which F.linear would compute."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_faster(x: Tensor) -> bool:
    """Whether a block of x [B, N, D] without rotary positions is faster; measured on a CPU, and taken to be on a GPU."""
    if x.device.type != "cpu":
        return True
    trains, dtype = torch.is_grad_enabled() and x.requires_grad, product_dtype(x)
    # PyTorch's attention of bfloat16 is the faster one, but for its backward pass
    return (dtype == torch.float32 or dtype == torch.bfloat16 and trains) and gains(x)


def gains(x: Tensor) -> bool:
    """Whether a block of x [B, N, D] is large enough to be faster on a CPU, and our kernels for CPUs are there."""
    if x.device.type != "cpu" or x.dim() != 3:
        return True
    if COMPILED_MISSING is not None:
        return False
    tokens = x.shape[0] * x.shape[1]
    is_half = product_dtype(x) in (torch.bfloat16, torch.float16)
    min_tokens, min_products = (MIN_TOKENS_HALF, MIN_PRODUCTS_HALF) if is_half else (MIN_TOKENS, MIN_PRODUCTS)
    return tokens >= min_tokens and tokens * x.shape[2] ** 2 >= min_products * torch.get_num_threads()


def has_inner_hooks(owner: nn.Module, is_idle: Callable[[Callable], bool] = lambda hook: False) -> bool:
    """Whether a part of a module would miss its hooks, or a forward of its own, if it were not called."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks or nn_module._global_backward_hooks:
        return True
    return any(part is not owner and (part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
                                      or not all(map(is_idle, part._forward_hooks.values())) or _is_wrapped(part))
               for part in owner.modules())


def _is_wrapped(part: nn.Module) -> bool:
    return has_own(part, "forward") and not getattr(part.forward, "is_of_jepa_fast", False)


def run_block(x: Tensor, parts: BlockParts, rotary: Tensor | None = None, frame_size: int = 0) -> Tensor:
    """x [B, N, D] -> [B, N, D]. rotary [B * N, 2, R] and frame_size as `ops.varlen_attention` takes them."""
    B, N, D = x.shape
    dtype = product_dtype(x)
    sequences = Sequences(cu_seqlens(B, N, x.device), N, rotary, frame_size)
    scales = tuple(_row_scale(drop_path, x, dtype) for drop_path in (parts.drop_path1, parts.drop_path2))
    out = run_packed(x.reshape(B * N, D), parts, sequences, scales=scales)
    return torch.ops.aten._unsafe_view(out, (B, N, D))  # no view, as no other block returns one: FSDP's hooks warn of views


def run_packed(x: Tensor, parts: BlockParts, sequences: Sequences, activations: Activations = "all",
               scales: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    """Sequences of any lengths, end to end: x [P, D] -> [P, D]. scales [P, 1]: what each branch is multiplied by."""
    dtype = product_dtype(x)
    weights = _weights(parts)
    copies = weights._replace(**{name: getattr(weights, name).detach().to(dtype) for name in _IN_PRODUCTS})
    how = How(sequences.cu_seqlens, sequences.max_seqlen, sequences.rotary, sequences.frame_size, parts.num_heads,
              parts.norm1.eps, dtype, activations, *scales)
    return block(x, weights, copies, how)


def run_last_rows(x: Tensor, parts: BlockParts, num_others: int) -> Tensor:
    """`run_block` where the first rows of every sequence are not wanted: x [B, N, D] -> [B, N - num_others, D].

    All rows are keys and values; queries, MLP and residuals are computed for the wanted ones only.
    """
    B, N, D = x.shape
    heads, device = (parts.num_heads, D // parts.num_heads), x.device
    h, w = parts.norm1(x), _weights(parts)
    q = linear(h[:, num_others:].reshape(-1, D), w.qkv_weight[:D], w.qkv_bias[:D]).view(-1, *heads)
    k, v = linear(h.view(-1, D), w.qkv_weight[D:], w.qkv_bias[D:]).view(-1, 2, *heads).unbind(1)
    attended = varlen_attention(q, k, v, cu_seqlens(B, N - num_others, device), N - num_others, cu_seqlens(B, N, device), N)
    drop1, drop2 = (nn.Identity() if drop is None else drop for drop in (parts.drop_path1, parts.drop_path2))
    x = x[:, num_others:]
    x = x + drop1(linear(attended.view(x.shape), w.proj_weight, w.proj_bias))
    hidden = bias_gelu(linear(parts.norm2(x), w.fc1_weight), w.fc1_bias)
    return x + drop2(linear(hidden, w.fc2_weight, w.fc2_bias))


_IN_PRODUCTS = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "fc1_weight", "fc2_weight", "fc2_bias")


def _weights(parts: BlockParts) -> BlockWeights:
    """The parameters, those of separate projections side by side; a missing bias is 0, a LayerScale in the weights."""
    def scaled(layer: nn.Linear, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, bias = layer.weight, _bias(layer)
        return (weight, bias) if scale is None else (weight * scale.unsqueeze(1), bias * scale)

    if parts.make_qkv is not None:
        qkv_weight, qkv_bias = parts.make_qkv()
    elif len(parts.qkv) == 1:
        qkv_weight, qkv_bias = parts.qkv[0].weight, _bias(parts.qkv[0])
    else:
        qkv_weight, qkv_bias = torch.cat([layer.weight for layer in parts.qkv]), torch.cat(list(map(_bias, parts.qkv)))
    return BlockWeights(parts.norm1.weight, parts.norm1.bias, qkv_weight, qkv_bias, *scaled(parts.proj, parts.scale1),
                        parts.norm2.weight, parts.norm2.bias, parts.fc1.weight, _bias(parts.fc1),
                        *scaled(parts.fc2, parts.scale2))


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def _row_scale(drop_path: nn.Module | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What stochastic depth multiplies each row by [B * N, 1]; None where it leaves a branch alone."""
    if drop_path is None or isinstance(drop_path, nn.Identity) or not drop_path.training:
        return None
    scale = drop_path(x.new_ones(x.shape[0], 1, 1, dtype=dtype))  # draws what it would for a branch of this dtype
    return scale.expand(-1, x.shape[1], 1).reshape(-1, 1)


@functools.lru_cache(maxsize=64)
def cu_seqlens(num_sequences: int, length: int, device: torch.device) -> Tensor:
    """[B + 1] int32 of sequences of one length."""
    with torch.inference_mode(False):  # kept from call to call: of training, too
        return torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
