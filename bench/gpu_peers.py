"""What others offer for the same work: each takes an op's arguments and returns a call of the same result, or None
where it is not installed or cannot do that case."""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _heads(qkv: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v apart, with rotary positions in plain PyTorch: what a peer without them has to do first."""
    q, k, v = qkv.unbind(1)
    if rotary is None:
        return q, k, v
    turn = _compiled_rotate()
    return turn(q, rotary), turn(k, rotary), v


@functools.cache
def _compiled_rotate() -> Callable:
    from jepa_fast.reference.varlen_attention import rotate
    return torch.compile(rotate, dynamic=True)


def sdpa(arguments: dict) -> Callable | None:
    """One call for equal lengths; frame-causal with the dense mask that the official code uses."""
    qkv, ends, n = arguments["qkv"], arguments["cu_seqlens"], arguments["max_seqlen"]
    S, frame_size = len(ends) - 1, arguments["frame_size"]
    if S * n != len(qkv):
        return None
    mask = None
    if frame_size:
        frame = torch.arange(n, device=qkv.device) // frame_size
        mask = frame[:, None] >= frame[None, :]

    def call():
        q, k, v = (t.unflatten(0, (S, n)).transpose(1, 2) for t in _heads(qkv, arguments["rotary"]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)
    return call


def torch_varlen(arguments: dict) -> Callable | None:
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    ends, n = arguments["cu_seqlens"], arguments["max_seqlen"]
    if arguments["frame_size"]:
        return None
    return lambda: varlen_attn(*_heads(arguments["qkv"], arguments["rotary"]), ends, ends, n, n)


def flash_attn(arguments: dict) -> Callable | None:
    if importlib.util.find_spec("flash_attn") is None or arguments["frame_size"]:
        return None
    varlen = getattr(importlib.import_module("flash_attn"), "flash_attn_varlen_func", None)
    ends, n = arguments["cu_seqlens"], arguments["max_seqlen"]
    return varlen and (lambda: varlen(*_heads(arguments["qkv"], arguments["rotary"]), ends, ends, n, n))


def xformers(arguments: dict) -> Callable | None:
    if importlib.util.find_spec("xformers") is None or arguments["frame_size"]:
        return None
    fmha = importlib.import_module("xformers.ops.fmha")
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(arguments["cu_seqlens"].diff().tolist())

    def call():
        q, k, v = (t.unsqueeze(0) for t in _heads(arguments["qkv"], arguments["rotary"]))
        return fmha.memory_efficient_attention(q, k, v, attn_bias=bias)[0]
    return call


def flex(arguments: dict) -> Callable | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    qkv, ends, frame_size = arguments["qkv"], arguments["cu_seqlens"], arguments["frame_size"]
    if qkv.device.type != "cuda" or len(qkv) > 60_000:  # its block mask is dense over all blocks
        return None
    P = len(qkv)
    sequence = torch.repeat_interleave(torch.arange(len(ends) - 1, device=qkv.device), ends.diff().long())
    place = torch.arange(P, device=qkv.device) - ends[sequence]

    def visible(b, h, i, j):
        same = sequence[i] == sequence[j]
        return same & (place[j] // frame_size <= place[i] // frame_size) if frame_size else same

    mask = create_block_mask(visible, None, None, P, P, device=qkv.device)
    attend = torch.compile(flex_attention, dynamic=False)

    def call():
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in _heads(qkv, arguments["rotary"]))
        return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)
    return call


def eager_and_compiled(function: Callable) -> dict[str, Callable]:
    return {"eager": lambda arguments: lambda: function(**arguments),
            "torch.compile": lambda arguments: functools.partial(torch.compile(function, dynamic=False), **arguments)}


def gather_tokens(x, index, positions):
    D = x.shape[-1]
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, D)) + positions[index]


def scatter_tokens(values, index, num_tokens):
    B, _, D = values.shape
    out = values.new_zeros(B, num_tokens, D)
    return out.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, D), values)


def gather_patches(pixels, index, patch_size):
    B, C, H, W = pixels.shape
    p, q = patch_size
    patches = pixels.view(B, C, H // p, p, W // q, q).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * q)
    return torch.gather(patches, 1, index.unsqueeze(-1).expand(-1, -1, C * p * q))


def latent_loss(prediction, target, target_idx, beta):
    h = F.layer_norm(target.float(), target.shape[-1:])[target_idx]
    if beta == 0:
        return (prediction.float() - h).abs().mean()
    return F.smooth_l1_loss(prediction.float(), h, beta=beta)


def layer_norm(x, weight, bias, residual=None):
    if residual is None:
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6).to(x.dtype)
    summed = residual + x
    return F.layer_norm(summed, x.shape[-1:], weight, bias, 1e-6).to(x.dtype), summed


def bias_gelu(x, bias):
    return F.gelu(x.float() + bias).to(x.dtype)


def _eager_sigreg(x, directions):
    from jepa_fast.testing.sigreg import eager_sigreg
    return eager_sigreg(x.float(), directions)


sigreg_peers = eager_and_compiled(_eager_sigreg)


def adamw_fused(arguments: dict) -> Callable | None:
    """PyTorch's fused AdamW, its foreach moving average, and the bfloat16 copies that autocast would make."""
    if arguments["params"][0].device.type != "cuda":
        return None
    params = [torch.nn.Parameter(p.clone()) for p in arguments["params"]]
    for p, grad in zip(params, arguments["grads"], strict=True):
        p.grad = grad
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.04, fused=True)
    average = [a.clone() for a in arguments["average"]]
    shadow, average_shadow = ([t.clone() for t in arguments[name]] for name in ("shadow", "average_shadow"))

    @torch.no_grad()
    def call():
        optimizer.step()
        torch._foreach_mul_(average, 0.996)
        torch._foreach_add_(average, params[:len(average)], alpha=1 - 0.996)
        torch._foreach_copy_(shadow, params)
        torch._foreach_copy_(average_shadow, average)
    return call


def ema_foreach(arguments: dict) -> Callable:
    target, source = [t.clone() for t in arguments["target"]], arguments["source"]

    def call():
        torch._foreach_mul_(target, 0.996)
        torch._foreach_add_(target, source, alpha=1 - 0.996)
    return call
