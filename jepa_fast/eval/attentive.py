"""Attentive probes of V-JEPA and V-JEPA 2: a learned query attends to frozen tokens, a Linear names the class.

A probe of depth d runs d - 1 self-attention blocks over all tokens and then one block in which the query, not
normalised, attends to the normalised tokens, followed by an MLP. V-JEPA (arXiv:2404.08471): depth 1. V-JEPA 2
(arXiv:2506.09985): depth 4. LayerNorm epsilon is 1e-5 here, as official, unlike in the encoders.

Many probes run as one: their parameters are stacked [G, ...], the GEMMs batched. What they share is computed once: the
statistics of the first norm, since LN(x) W^T + b = x_hat (W gamma)^T + (W beta + b). A learned query needs no keys or
values: its scores are x_hat (W_k^T q gamma), its output W_v of the weighted mean of x_hat. Both are exact, and D / H
times less work than projecting all tokens; the bias of the keys adds one number to all scores and cancels.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-5


class AttentiveProbe(nn.Module):
    """tokens [B, N, D] -> logits [B, num_classes]; parameter names are the official ones.

    `has_unused_proj` defines the output projection that V-JEPA's checkpoints carry and its code never applies.
    """

    def __init__(self, dim: int, num_classes: int, *, depth: int = 1, num_heads: int = 16, mlp_ratio: float = 4.0,
                 has_unused_proj: bool = False, generator: torch.Generator | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if depth < 1 or num_classes < 1:
            raise ValueError(f"depth and num_classes must be at least 1, got {depth} and {num_classes}")
        self.num_heads = num_heads
        self.pooler = nn.Module()
        self.pooler.query_tokens = nn.Parameter(torch.empty(1, 1, dim))
        if depth > 1:
            self.pooler.blocks = nn.ModuleList(_block(dim, mlp_ratio, attn={"qkv": 3, "proj": 1})
                                               for _ in range(depth - 1))
        xattn = {"q": 1, "kv": 2} | ({"proj": 1} if has_unused_proj else {})
        self.pooler.cross_attention_block = _block(dim, mlp_ratio, xattn=xattn)
        self.linear = nn.Linear(dim, num_classes)
        self._init(depth, has_unused_proj, generator)

    @torch.no_grad()
    def _init(self, depth: int, has_unused_proj: bool, generator: torch.Generator | None) -> None:
        """Official: weights normal of 0.02, biases 0; what block l adds is divided by sqrt(2 l), the last two sharing l."""
        for name, parameter in self.pooler.named_parameters():
            if parameter.dim() > 1:
                # officially cut at +-2, 100 standard deviations
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
        for parameter in self.linear.parameters():   # as nn.Linear starts, from the generator
            bound = self.linear.in_features ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
        for layer, block in enumerate(getattr(self.pooler, "blocks", []), start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
        last = self.pooler.cross_attention_block
        for linear in (last.mlp.fc2, last.xattn.proj) if has_unused_proj else (last.mlp.fc2,):
            linear.weight.div_(math.sqrt(2 * max(1, depth - 1)))

    def forward(self, tokens: Tensor) -> Tensor:
        stacked = {name: parameter.unsqueeze(0) for name, parameter in self.named_parameters()}
        return attentive_logits(stacked, tokens, self.num_heads)[0]


def _block(dim: int, mlp_ratio: float, **attention: dict[str, int]) -> nn.Module:
    """The parameters of a block; `attention` names its Linears, with their outputs in units of dim."""
    block, (name, linears) = nn.Module(), *attention.items()
    block.norm1 = nn.LayerNorm(dim, eps=_EPS)
    block.add_module(name, nn.ModuleDict({key: nn.Linear(dim, width * dim) for key, width in linears.items()}))
    block.norm2 = nn.LayerNorm(dim, eps=_EPS)
    hidden = int(dim * mlp_ratio)
    block.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
    return block


def attentive_logits(parameters: Mapping[str, Tensor], tokens: Tensor, num_heads: int) -> Tensor:
    """G probes at once on the same tokens [B, N, D] -> logits [G, B, num_classes].

    `parameters` are those of AttentiveProbe by name, each with G in front. Equal to G calls up to rounding.
    """
    x = tokens.unsqueeze(0)                                     # [1, B, N, D] until the probes differ
    depth = 1 + sum(name.endswith("attn.qkv.weight") for name in parameters)
    for i in range(depth - 1):
        x = _self_attention_block(_part(parameters, f"pooler.blocks.{i}."), x, num_heads)
    block = _part(parameters, "pooler.cross_attention_block.")
    query = parameters["pooler.query_tokens"].squeeze(1)        # [G, 1, D]
    pooled = query + _cross_attention(block, query, x, num_heads)
    pooled = pooled + _mlp(block, pooled)                       # [G, B, D]
    return _linear(pooled, parameters["linear.weight"], parameters["linear.bias"])


def _self_attention_block(p: Mapping[str, Tensor], x: Tensor, num_heads: int) -> Tensor:
    """x [G or 1, B, N, D] -> [G, B, N, D]."""
    G, (_, B, N, D) = len(p["norm1.weight"]), x.shape
    qkv = _normed_linear(_standardise(x), p, "norm1", "attn.qkv")
    q, k, v = qkv.view(G * B, N, 3, num_heads, D // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(G, B, N, D)
    x = x + _linear(attended, p["attn.proj.weight"], p["attn.proj.bias"])
    return x + _mlp(p, x)


def _cross_attention(p: Mapping[str, Tensor], query: Tensor, x: Tensor, num_heads: int) -> Tensor:
    """query [G, 1, D], x [G or 1, B, N, D] -> [G, B, D], without keys and values of the tokens."""
    G, D, H = len(query), query.shape[-1], num_heads
    shared, B = G // len(x), x.shape[1]                         # G where x is one for all probes, else 1
    x = _standardise(x)
    gamma, beta = p["norm1.weight"], p["norm1.bias"]
    key_weight, value_weight = p["xattn.kv.weight"].view(G, 2, H, D // H, D).unbind(1)
    value_bias = p["xattn.kv.bias"].view(G, 2, H, D // H)[:, 1]
    q = _linear(query, p["xattn.q.weight"], p["xattn.q.bias"]).view(G, H, 1, D // H)
    direction = (q @ key_weight).squeeze(2) * gamma.unsqueeze(1) * (D // H) ** -0.5              # [G, H, D]
    weights = (direction.view(len(x), 1, shared * H, D) @ x.mT).softmax(-1)                      # [., B, shared * H, N]
    mean = (weights @ x).view(len(x), B, shared, H, D).transpose(1, 2).reshape(G, B, H, D)
    # [G, H, B, D] x [G, H, D, D / H]
    mean = mean * gamma[:, None, None] + beta[:, None, None]
    values = mean.transpose(1, 2) @ value_weight.mT + value_bias.unsqueeze(2)
    return values.transpose(1, 2).reshape(G, B, D)


def _mlp(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.gelu(_normed_linear(_standardise(x), p, "norm2", "mlp.fc1"))
    return _linear(hidden, p["mlp.fc2.weight"], p["mlp.fc2.bias"])


def _standardise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def _normed_linear(x: Tensor, p: Mapping[str, Tensor], norm: str, linear: str) -> Tensor:
    """linear(norm(.)) of what `_standardise` gave: weight and bias of the norm go into the smaller factor."""
    weight, bias = p[f"{linear}.weight"], p[f"{linear}.bias"]
    gamma, beta = p[f"{norm}.weight"], p[f"{norm}.bias"]
    if len(x) == len(weight) and x.numel() <= weight.numel():
        shape = (len(x), *[1] * (x.dim() - 2), -1)
        return _linear(x * gamma.view(shape) + beta.view(shape), weight, bias)
    return _linear(x, weight * gamma.unsqueeze(1), bias + (weight @ beta.unsqueeze(2)).squeeze(2))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [G or 1, ..., in], weight [G, out, in], bias [G, out] -> [G, ..., out]."""
    rows = x.reshape(len(x), -1, x.shape[-1]).expand(len(weight), -1, -1)
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT).view(len(weight), *x.shape[1:-1], -1)


def _part(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
