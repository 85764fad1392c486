"""V-JEPA 2.1 (facebookresearch/vjepa2, its `app.vjepa_2_1` package): encoder, predictor and wrappers."""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..drop_in.attention import attend, grid_of, grid_positions, tables
from ..masking import Masks, nearest_target
from ..nn.block_function import Activations
from ..ops import gather_tokens
from ._block import is_transformed, run_block
from ._meta import Checkout, CodeBase, say_what_stays
from ._report import PatchError, Report
from ._vjepa2 import (
    FUNCTIONS,
    NOTE,
    Family,
    block_parts,
    classes_of,
    cross_attention,
    family_of,
    own_code_only,
    plain_attention,
    replace_all,
    why_not_fused,
)
from ._vjepa2_packed import (
    Group,
    Packed,
    Prediction,
    encode,
    has_masks,
    is_plain,
    nested,
    predicts_unsorted,
    run_predictor,
    single,
    with_mask_tokens,
)

CODE = CodeBase("vjepa2_1", "app.vjepa_2_1.models.utils.modules",
                ("RoPEAttention", "rotate_queries_or_keys", "Lambda_LinearWarmupHold"), lacks=("ACRoPEAttention",))
_SIGNATURES = {
    "RoPEAttention": lambda self, x, mask=None, T=None, H_patches=None, W_patches=None, return_attn=False: 0,
    "Attention": lambda self, x: 0,
    "Block": lambda self, x, mask=None, T=None, H_patches=None, W_patches=None, return_attn=False, mode="video": 0,
    "CrossAttention": lambda self, q, x: 0,
    "VisionTransformer": lambda self, x, masks=None, training=False: 0,
    "VisionTransformerPredictor": lambda self, x, masks_x, masks_y, mod="video", mask_index=1: 0,
    "MultiSeqWrapper": lambda self, x, masks=None, gram_mode=False, training_mode=False: 0,
    "PredictorMultiSeqWrapper": lambda self, x, masks_x, masks_y, mod="video": 0,
}


def matches(model: nn.Module) -> bool:
    return bool(CODE.find_behind(model))


def apply(model: nn.Module | None = None, *, modules: ModuleType | Iterable[ModuleType] | None = None,
          strict_numerics: bool = False, activations: Activations | None = None) -> Report:
    """Make V-JEPA 2.1 fast: the classes of a checkout (`modules`: any of it; all that are loaded), or one model.

    Replaced are the forwards of
        models.utils.modules   Block                  one autograd node each, one rotary table for all layers
                               RoPEAttention, Attention, CrossAttention     where a block is not fused
        models.predictor       no Python loops over samples, no sorting
        wrappers               all masks as one packed batch, only visible tokens embedded
    and apply_masks, repeat_interleave_batch and compute_mask_distance (exact, no loop over tokens) wherever they were
    imported to. V-JEPA 2's own tree in the same checkout is the patch vjepa2's.

    Rotary angles are float32, or wider where the model is, and q and k keep their dtype; attention drops in training only.
    strict_numerics: angles in the dtype of q and k (in float16, and in bfloat16 on CPUs, by the original's own attention),
    and attention dropout in eval too, as in the original. activations: what the packed blocks keep for the backward pass
    (`nn.block_function`); None: as the model is configured, with its activation checkpointing. PatchError where the code
    is not loaded or has other signatures.
    """
    with Report.of("vjepa2_1") as report:
        found = CODE.find(modules) if model is None or modules is not None else CODE.find_behind(model)
        if not found:
            raise PatchError(f"vjepa2_1: model must have parts of V-JEPA 2.1, got a {type(model).__qualname__}")
        for checkout_ in found:
            _patch(report, checkout_, model, family_of(checkout_.core, strict_numerics, "interleaved", _grid_positions,
                                                       activations))
        report.keep("blocks with SwiGLU, causal attention, dropout or hooks inside", "run their own code with our attention")
        say_what_stays(report, "app.vjepa_2_1.train")
        if not strict_numerics:
            report.note(NOTE)
    return report


def _patch(report: Report, found: Checkout, model: nn.Module | None, family: Family) -> None:
    classes = {name: classes_of(found, name, _SIGNATURES[name]) for name in _SIGNATURES}
    predictors, encoders = classes["VisionTransformerPredictor"], classes["VisionTransformer"]
    fast = {"RoPEAttention": _rope_attention(family), "Attention": _plain_attention(family), "Block": _block(family),
            "CrossAttention": cross_attention, "VisionTransformerPredictor": _predictor(family),
            "MultiSeqWrapper": _multi_seq_encoder(family, encoders),
            "PredictorMultiSeqWrapper": _multi_seq_predictor(family, predictors)}
    distance = mask_distance, lambda masks_pred, masks_enc, grid_size, offset_context_loss: 0
    replace_all(report, found, model, classes, fast, FUNCTIONS | {"compute_mask_distance": distance})


def _grid_positions(attn: nn.Module, ids: Tensor, H: int | None, W: int | None, dtype: torch.dtype) -> Tensor:
    """(time, row, column) of each token, rows and columns spread over those of the pretrained grid where they are."""
    rows, columns = grid_of(attn, H, W)
    at = grid_positions(ids, rows, columns, dtype)
    if attn.interpolate_rope:
        for axis, size in ((1, H or attn.grid_size), (2, W or attn.grid_size)):
            at[..., axis] *= (attn.pretrained_grid_size - 1) / (size - 1) if size > 1 else float("nan")  # as 0 / 0 there
    return at


def _table(attn: nn.Module, x: Tensor, mask: Tensor | None, H: int | None, W: int | None, strict: bool) -> Tensor:
    """The rotary table of x; a CLS token before and registers after the patches are at position 0, which turns nothing."""
    before, after = int(attn.has_cls_first), attn.n_registers

    def positions(ids: Tensor, dtype: torch.dtype) -> Tensor:
        if mask is None:
            ids = ids[:len(ids) - before - after]
        return nn.functional.pad(_grid_positions(attn, ids, H, W, dtype), (0, 0, before, after))

    key = "rope 2.1", H, W, attn.grid_size, attn.interpolate_rope and attn.pretrained_grid_size, before, after
    return tables.of(key, attn, x, mask, strict, "interleaved", positions)


def _covers(attn: nn.Module, x: Tensor, mask: Tensor | None, T: int | None, H: int | None, W: int | None) -> bool:
    """Whether the patches have as many positions as there are patches; the original says what is wrong if not."""
    patches = x.shape[1] - int(attn.has_cls_first) - attn.n_registers
    if mask is not None:
        return mask.dim() == 2 and mask.shape[1] == patches and mask.shape[0] in (1, x.shape[0])
    area = attn.grid_size ** 2
    return patches == ((x.shape[1] - attn.n_registers) // area * area if None in (T, H, W) else T * H * W)


def _rope_attention(family: Family):
    def forward(original, self, x, mask=None, T=None, H_patches=None, W_patches=None, return_attn=False):
        if (own_code_only(self, x, family.strict) or return_attn and not self.use_sdpa
                or not _covers(self, x, mask, T, H_patches, W_patches)):
            return original(self, x, mask, T, H_patches, W_patches, return_attn)
        return attend(self, x, _table(self, x, mask, H_patches, W_patches, family.strict), strict=family.strict), None
    return forward


def _plain_attention(family: Family):
    plain = plain_attention(family)

    def forward(original, self, x):
        return plain(lambda self, x, mask, attn_mask: original(self, x), self, x)
    return forward


def _block(family: Family):
    def forward(original, self, x, mask=None, T=None, H_patches=None, W_patches=None, return_attn=False, mode="video"):
        where = mask, T, H_patches, W_patches
        if why_not_fused(family, self, x) is not None or return_attn and not self.attn.use_sdpa:
            return original(self, x, *where, return_attn, mode)
        table = None
        if self.use_rope:
            if not _covers(self.attn, x, mask, T, H_patches, W_patches):
                return original(self, x, *where, return_attn, mode)
            table = _table(self.attn, x, mask, H_patches, W_patches, family.strict)
        return run_block(x, block_parts(self), table), None
    return forward


def _embed(vit: nn.Module, clips: Tensor) -> nn.Module:
    return vit.patch_embed_img if vit.check_temporal_dim(clips.shape) else vit.patch_embed


def _multi_seq_encoder(family: Family, encoders: list[type]):
    """`MultiSeqWrapper.forward`: with masks, one packed batch; each level is normalised by its own norm, side by side."""
    def forward(original, self, x, masks=None, gram_mode=False, training_mode=False):
        vit, done = self.backbone, None
        if (masks is not None and not is_transformed() and type(vit) in encoders and vit.out_layers is None
                and not vit.attn_out and vit.use_rope):
            is_whole = training_mode or vit.return_hierarchical
            levels = vit.out_layers_distillation if is_whole else []
            done = encode(family, self, vit, x, masks, _embed, levels, _modality)
        if done is None:
            return original(self, x, masks, gram_mode, training_mode)
        packed, outs, calls = done
        if is_whole:
            norms = [vit.norms_block[vit.hierarchical_layers.index(level)] for level in levels]
            out = torch.cat([norm(tokens) for norm, tokens in zip(norms, outs, strict=False)], 1)
        else:
            out = vit.norms_block[-1](outs[-1])
        return nested(packed.split(out), calls, len(x))
    return forward


def _modality(vit: nn.Module, clips: Tensor) -> Tensor | None:
    """[1, 1, D], what says whether tokens are an image's or a clip's."""
    if not vit.modality_embedding:
        return None
    return vit.img_mod_embed if vit.check_temporal_dim(clips.shape) else vit.video_mod_embed


def _predictor_modality(predictor: nn.Module, mod: str) -> Tensor | None:
    if not predictor.modality_embedding:
        return None
    return predictor.img_mod_embed if mod == "image" else predictor.video_mod_embed


def _multi_seq_predictor(family: Family, predictors: list[type]):
    """`PredictorMultiSeqWrapper.forward`: one packed batch; the mask token goes by the clip length."""
    def forward(original, self, x, masks_x, masks_y, mod="video"):
        predictor = self.backbone
        if is_transformed() or type(predictor) not in predictors or not predictor.use_rope:
            return original(self, x, masks_x, masks_y, mod)
        calls = [Prediction(z, single(mask_x), single(mask_y), i)
                 for i, of_clips in enumerate(zip(x, masks_x, masks_y, strict=False))
                 for z, mask_x, mask_y in zip(*of_clips, strict=False)]
        if not predicts_unsorted(family, self, predictor, calls):
            return original(self, x, masks_x, masks_y, mod)
        predictions, contexts = [[] for _ in x], [[] for _ in x]
        for call, *outs in zip(calls, *_predict(family, predictor, calls, mod), strict=True):
            predictions[call.mask_index].append(outs[0])
            contexts[call.mask_index].append(outs[1])
        return predictions, contexts
    return forward


def _predictor(family: Family):
    """`VisionTransformerPredictor.forward` without Python loops over samples."""
    def forward(original, self, x, masks_x, masks_y, mod="video", mask_index=1):
        if not is_plain(x) or not self.use_rope:
            return original(self, x, masks_x, masks_y, mod, mask_index)
        call = Prediction(x, single(masks_x), single(masks_y), mask_index)
        if not has_masks(call, x.shape[1]):
            return original(self, x, masks_x, masks_y, mod, mask_index)
        if predicts_unsorted(family, self, self, [call]):
            (prediction,), (context,) = _predict(family, self, [call], mod)
            return prediction, context
        return _predict_in_order(self, call, mod)
    return forward


def _predict(family: Family, predictor: nn.Module, calls: list[Prediction], mod: str) -> tuple[list, list]:
    """Of each call the targets [B, K_t, D], and the context [B, K, D] or None."""
    packed, x = run_predictor(family, predictor, calls, _predictor_modality(predictor, mod))

    def projected(proj: nn.Module, masks: list[Tensor], part) -> list[Tensor]:
        rows = [tokens[part(call)].flatten(0, 1) for call, tokens in zip(calls, packed.split(x), strict=True)]
        return Packed(family, [Group(mask) for mask in masks]).split(proj(predictor.predictor_norm(torch.cat(rows))))

    predictions = projected(predictor.predictor_proj, [call.mask_y for call in calls],
                            lambda call: (slice(None), slice(call.x.shape[1], None)))
    if not predictor.return_all_tokens:
        return predictions, [None] * len(calls)
    return predictions, projected(predictor.predictor_proj_context, [call.mask_x for call in calls],
                                  lambda call: (slice(None), slice(call.x.shape[1])))


def _predict_in_order(predictor: nn.Module, call: Prediction, mod: str) -> tuple[Tensor, Tensor | None]:
    """The original's own order of tokens and of calls, each sample's rows gathered at once."""
    context = predictor.predictor_embed(call.x)
    num_context = context.shape[1]
    order = torch.argsort(torch.cat([call.mask_x, call.mask_y], 1), dim=1)
    kept = order[:, :order.shape[1] - predictor.chop_last_n_tokens]
    ids = torch.cat([call.mask_x, call.mask_y], 1).gather(1, kept)
    x = gather_tokens(with_mask_tokens(predictor, context, call, None), kept)
    modality = _predictor_modality(predictor, mod)
    if modality is not None:
        x += modality
    for block in predictor.predictor_blocks:
        x, _ = checkpoint(block, x, ids, use_reentrant=False) if predictor.use_activation_checkpointing else block(
            x, mask=ids)
    x = gather_tokens(predictor.predictor_norm(x), torch.argsort(order, dim=1))
    prediction = predictor.predictor_proj(x[:, num_context:])
    return prediction, predictor.predictor_proj_context(x[:, :num_context]) if predictor.return_all_tokens else None


@torch.no_grad()
def mask_distance(masks_pred: list[list[Tensor]], masks_enc: list[list[Tensor]], grid_size: int,
                  offset_context_loss: bool) -> list[list[Tensor]]:
    """`compute_mask_distance`: for each pair of masks [B, K_t], [B, K] the root of the distance from every context token to
    its nearest target, [B, K] float32."""
    unit = grid_size // 16 if offset_context_loss else 1

    def distance(targets: Tensor, context: Tensor) -> Tensor:
        depth = int(torch.stack([targets.max(), context.max()]).max()) // grid_size ** 2 + 1
        masks = Masks.from_lists([context], [targets], depth * grid_size ** 2, is_paired=True)
        squared = nearest_target(masks, (depth, grid_size, grid_size)).view(context.shape)
        return (squared.float().sqrt() * (1.0 / unit)).sqrt()

    return [[distance(*pair) for pair in zip(*of_clips, strict=False)]
            for of_clips in zip(masks_pred, masks_enc, strict=False)]
