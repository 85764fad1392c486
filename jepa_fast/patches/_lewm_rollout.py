"""LeWorldModel's imagined rollout without what it computes twice.

A window of `history` embeddings is predicted from in every step. While it grows, its first embeddings keep their places:
their keys and values are kept from step to step, which causal attention allows. Once it slides, positions move and it is
computed anew. In both cases only the newest embedding is asked for, so the last layer computes one row, and actions are
embedded, and turned into the modulation of each layer, once instead of once per window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._block import has_inner_hooks


def why_not_now(world: nn.Module, predictors: tuple[type, ...], history: int) -> str | None:
    """Why a rollout must run the model's own code; None where `roll` computes the same."""
    predictor, parts = world.predictor, (world.predictor, world.pred_proj, world.action_encoder)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "it is being compiled, traced or transformed"
    if type(predictor) not in predictors:
        return f"its predictor is a {type(predictor).__name__}"
    if any(part.training for part in parts):
        return "it is in training mode"
    if any(has_inner_hooks(part) or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "its parts have hooks"
    if history > predictor.pos_embedding.shape[1]:
        return f"history_size {history} is more than its predictor's {predictor.pos_embedding.shape[1]} positions"
    return None


def roll(world: nn.Module, first: Tensor, actions: Tensor, history: int) -> Tensor:
    """Embeddings first [N, H, D] and those of actions [N, T, A], T >= H -> [N, T + 1, D], the first H as given.

    Action t leads from embedding t to t + 1.
    """
    predictor, transformer = world.predictor, world.predictor.transformer
    condition = transformer.cond_proj(actions)
    modulations = [layer.adaLN_modulation(condition) for layer in transformer.layers]
    states = list(first.unbind(1))
    kept: list = [None] * len(transformer.layers)
    for end in range(first.shape[1], actions.shape[1] + 1):
        begin = max(0, end - history)
        start = end - 1 if any(kept) else begin
        x = torch.stack(states[start:end], 1) + predictor.pos_embedding[:, start - begin:end - begin]
        x = transformer.input_proj(x)
        for i, layer in enumerate(transformer.layers):
            is_last = i == len(transformer.layers) - 1
            x, keys_values = _layer(layer, x, modulations[i][:, start:end], kept[i], is_last)
            kept[i] = keys_values if end < history else None  # then the next window begins where this one does
        states.append(world.pred_proj(transformer.output_proj(transformer.norm(x))[:, -1]))
    return torch.stack(states, 1)


def _layer(layer: nn.Module, x: Tensor, modulation: Tensor, kept: tuple | None, is_last: bool) -> tuple[Tensor, tuple]:
    """x [N, n, D], the newest rows of a window; kept: keys and values [N, heads, rows, head_dim] of those before."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    attn = layer.attn
    h = attn.norm(layer.norm1(x) * (1 + scale1) + shift1)
    q, k, v = attn.to_qkv(h).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    if kept is not None:
        k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
    if is_last:
        q, x, gate1, shift2, scale2, gate2 = (q[:, :, -1:], *(rows[:, -1:] for rows in (x, gate1, shift2, scale2, gate2)))
    # a single row is the newest and sees all
    out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    x = x + gate1 * attn.to_out(out.transpose(1, 2).flatten(2))
    return x + gate2 * layer.mlp(layer.norm2(x) * (1 + scale2) + shift2), (k, v)
