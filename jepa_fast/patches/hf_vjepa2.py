"""V-JEPA 2 of Hugging Face transformers, 4.57 and 5."""

import functools
import inspect

import torch
from torch import Tensor, nn

from ..ops import gather_tokens
from . import _hf
from ._block import BlockParts, is_transformed, run_block
from ._report import Report, check_signature
from ._rotary import RotaryTables


def matches(model: nn.Module) -> bool:
    return _hf.has_parts_of(model, "vjepa2")


def apply(model: nn.Module | None = None, *, strict_numerics: bool = False) -> Report:
    """Make `VJEPA2Model` and what is built on it fast: all of them (model None), or a model that is there already.

    Replaced in transformers.models.vjepa2.modeling_vjepa2: `VJEPA2Layer.forward` (encoder and predictor) and
    `VJEPA2PoolerSelfAttentionLayer.forward`, by one fused block on the same parameters; `apply_masks` (also for a model:
    in the module, where its forward looks it up), `VJEPA2PredictorEmbeddings.forward`, and `sort_tokens` and
    `unsort_tokens` of `VJEPA2Predictor`; in a model, `attn_implementation` "sdpa" by "jepa_fast".

    Rotary angles are computed in float32, also where activations are 16-bit: closer to float64 than the original's.
    strict_numerics=True rounds them as the original does.
    """
    module = _hf.modeling("vjepa2")
    with Report.of("hf_vjepa2") as report:
        is_v4 = _check(module)
        layer = functools.partial(_layer, weights=() if is_v4 else (None,), strict=strict_numerics)
        pooler_layer = functools.partial(_pooler_layer, weights=() if is_v4 else (None,))
        _hf.replace_layer(report, module.VJEPA2Layer, layer, model)
        _hf.replace_layer(report, module.VJEPA2PoolerSelfAttentionLayer, pooler_layer, model)
        report.replace_method(module.VJEPA2PredictorEmbeddings, "forward", _predictor_embeddings, model)
        sort = functools.partial(_sort_tokens, is_v4=is_v4)
        report.replace_method(module.VJEPA2Predictor, "sort_tokens", sort, model)
        report.replace_method(module.VJEPA2Predictor, "unsort_tokens", _unsort_tokens, model)
        if not getattr(module.apply_masks, "is_of_jepa_fast", False):
            report.replace_everywhere(module.apply_masks, _apply_masks(module.apply_masks), [module])
        report.keep("VJEPA2Layer", _hf.WHERE_ORIGINAL.format(""))
        report.keep("VJEPA2PoolerSelfAttentionLayer", _hf.WHERE_ORIGINAL.format(" and in bfloat16 inference"))
        if not is_v4:
            report.note('a layer that runs "eager" returns no attention weights unless they are asked for or it has hooks')
        if not strict_numerics:
            report.note("rotary angles are float32 where the original rounds them to the dtype of the activations")
        _hf.use_attention(report, model)
    return report


def _check(module) -> bool:
    """Compare what is relied on. Returns whether this is transformers 4."""
    forward = module.VJEPA2Layer.forward
    is_v4 = "output_attentions" in inspect.signature(forward).parameters
    sort, pooler = module.VJEPA2Predictor.sort_tokens, module.VJEPA2PoolerSelfAttentionLayer.forward
    if is_v4:
        check_signature(forward, lambda self, hidden_states, position_mask=None, head_mask=None, output_attentions=False: 0,
                        "VJEPA2Layer.forward")
        check_signature(sort, lambda self, hidden_states, position_masks, argsort, head_mask=None: 0,
                        "VJEPA2Predictor.sort_tokens")
        check_signature(pooler, lambda self, hidden_states, attention_mask, output_attentions=False: 0,
                        "VJEPA2PoolerSelfAttentionLayer.forward")
    else:
        check_signature(forward, lambda self, hidden_states, position_mask=None, **kwargs: 0, "VJEPA2Layer.forward")
        check_signature(sort, lambda self, hidden_states, position_masks, argsort: 0, "VJEPA2Predictor.sort_tokens")
        check_signature(pooler, lambda self, hidden_states, attention_mask: 0, "VJEPA2PoolerSelfAttentionLayer.forward")
    check_signature(module.VJEPA2Predictor.unsort_tokens, lambda self, hidden_states, argsort: 0,
                    "VJEPA2Predictor.unsort_tokens")
    embeddings = module.VJEPA2PredictorEmbeddings.forward
    check_signature(embeddings, lambda self, hidden_states, context_mask, target_mask, mask_index=1: 0,
                    "VJEPA2PredictorEmbeddings.forward")
    check_signature(module.VJEPA2RopeAttention.get_position_ids, lambda self, x, masks=None: 0,
                    "VJEPA2RopeAttention.get_position_ids")
    check_signature(module.apply_masks, lambda tensor, masks: 0, "apply_masks")
    config = module.VJEPA2Config(hidden_size=8, num_attention_heads=1)
    _hf.check_parts(module.VJEPA2Layer, _parts, config, hidden_size=8, num_attention_heads=1)
    _hf.check_parts(module.VJEPA2PoolerSelfAttentionLayer, _pooler_parts, config)
    return is_v4


def _layer(original, self, hidden_states, position_mask=None, *masks, weights, strict, **options):
    parts, attention = _parts(self), self.attention
    if (_hf.has_options(masks, options) or (attention.dropout_prob and attention.training)
            or _hf.runs_itself(self, parts, hidden_states, has_rotary=True) or _may_want_weights(self)):
        return original(self, hidden_states, position_mask, *masks, **options)
    rotary = (_original_rotary if strict else _rotary)(attention, hidden_states, position_mask)
    return run_block(hidden_states, parts, rotary), *weights


def _parts(layer: nn.Module) -> BlockParts:
    attention, mlp = layer.attention, layer.mlp
    return BlockParts(layer.norm1, (attention.query, attention.key, attention.value), attention.proj, layer.norm2, mlp.fc1,
                      mlp.activation, mlp.fc2, attention.num_attention_heads, layer.drop_path, layer.drop_path)


def _may_want_weights(layer: nn.Module) -> bool:
    """Whether somebody's hook sees the attention weights that a layer returns where it runs "eager"."""
    return (layer.config._attn_implementation == "eager"
            and not all(map(_hf.is_idle, layer._forward_hooks.values())))


def _pooler_layer(original, self, hidden_states, attention_mask, *masks, weights, **options):
    parts, attention = _pooler_parts(self), self.self_attn
    if (_hf.has_options((attention_mask, *masks), options) or (attention.dropout and attention.training)
            or _hf.runs_itself(self, parts, hidden_states, has_rotary=False)):
        return original(self, hidden_states, attention_mask, *masks, **options)
    return run_block(hidden_states, parts), *weights


def _pooler_parts(layer: nn.Module) -> BlockParts:
    attention, mlp = layer.self_attn, layer.mlp
    return BlockParts(layer.layer_norm1, (attention.q_proj, attention.k_proj, attention.v_proj), attention.out_proj,
                      layer.layer_norm2, mlp.fc1, mlp.activation, mlp.fc2, attention.num_heads)


_of_all, _of_some = RotaryTables(), RotaryTables()  # the encoder's outlives a forward pass, the predictor's cannot


def _rotary(attention: nn.Module, x: Tensor, position_mask: Tensor | None) -> Tensor:
    """The table [B * N, 2, R] of tokens at position_mask [B, N], or of the first N."""
    B, N, _ = x.shape
    grid = (2 ** 31, attention.grid_size, attention.grid_size)  # any number of frames
    tables, ids = (_of_all, _first(B, N, x.device)) if position_mask is None else (_of_some, position_mask)
    return tables.of_grid(B, grid, ids, attention.attention_head_size, x.device, pairing="tiled",
                          angle_dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@functools.lru_cache(maxsize=16)
def _first(B: int, N: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept from call to call: of training, too
        return torch.arange(N, device=device).repeat(B, 1)


@torch.no_grad()
def _original_rotary(attention: nn.Module, x: Tensor, position_mask: Tensor | None) -> Tensor:
    """The same table as the original rounds it: what its rotation makes of (1, 0) and (0, 1)."""
    B, N, _ = x.shape
    R = attention.d_dim + attention.h_dim + attention.w_dim
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    ids = [p[:, :1] if p.dim() == 3 else p for p in attention.get_position_ids(x, position_mask)]  # alike for all heads
    basis = x.new_zeros(2, B, 1, N, attention.attention_head_size, dtype=dtype)
    basis[0, ..., 0::2] = 1
    basis[1, ..., 1::2] = 1
    of_even, of_odd = (attention.apply_rotary_embeddings(rows, ids)[..., :R].reshape(B * N, R // 2, 2) for rows in basis)
    cos = torch.stack([of_even[..., 0], of_odd[..., 1]], -1)
    signed_sin = torch.stack([of_odd[..., 0], of_even[..., 1]], -1)
    table = torch.stack([cos, signed_sin], 1).flatten(2)
    return table if dtype == torch.float64 else table.float()


def _predictor_embeddings(original, self, hidden_states, context_mask, target_mask, mask_index=1):
    """The mask token, once per target: not repeated up to the last position, which the host would have to be told."""
    if is_transformed() or not len(context_mask) == len(target_mask) == 1 or target_mask[0].dim() != 2:
        return original(self, hidden_states, context_mask, target_mask, mask_index)
    context = self.predictor_embeddings(hidden_states)
    token = self.mask_tokens[mask_index % self.num_mask_tokens]
    target = token.expand(*target_mask[0].shape, -1)
    return torch.cat([context, target], dim=1), torch.cat([context_mask[0], target_mask[0]], dim=1)


def _sort_tokens(original, self, hidden_states, position_masks, argsort, head_mask=None, *, is_v4):
    head_masks = [head_mask] if is_v4 else []
    if is_transformed() or (head_mask is not None and head_mask[0] is not None) or not _can_gather(hidden_states, argsort):
        return original(self, hidden_states, position_masks, argsort, *head_masks)
    with torch.inference_mode(False):  # so that layers can tell whether it was written to
        position_masks = position_masks.gather(1, argsort)
    return gather_tokens(hidden_states, argsort), position_masks, *head_masks


def _unsort_tokens(original, self, hidden_states, argsort):
    if is_transformed() or not _can_gather(hidden_states, argsort):
        return original(self, hidden_states, argsort)
    return gather_tokens(hidden_states, argsort.argsort(dim=1))


def _apply_masks(original):
    @functools.wraps(original)
    def apply_masks(tensor, masks):
        if is_transformed() or not masks or not all(_can_gather(tensor, mask) for mask in masks):
            return original(tensor, masks)
        return torch.cat([gather_tokens(tensor, mask) for mask in masks])

    apply_masks.is_of_jepa_fast = True
    return apply_masks


def _can_gather(x: Tensor, index: Tensor) -> bool:
    return (x.dim() == 3 and x.is_floating_point() and index.dim() == 2 and index.dtype == torch.int64
            and index.shape[0] == x.shape[0] and index.device == x.device)
