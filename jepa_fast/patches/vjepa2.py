"""facebookresearch/vjepa2 (V-JEPA 2 and 2-AC, its `src` package): encoder, predictors, wrappers and attentive poolers."""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..drop_in.attention import action_table, attend, frame_masks, frame_size_of, grid_of, grid_positions, rope_table
from ..drop_in.collators import VJEPA2MaskCollator
from ..nn.block_function import Activations
from ._block import gains, has_inner_hooks, is_transformed, run_block
from ._meta import Checkout, CodeBase, say_what_stays
from ._report import PatchError, Report, check_signature
from ._vjepa2 import (
    FUNCTIONS,
    NOTE,
    Family,
    block_parts,
    classes_of,
    cross_attention,
    family_of,
    is_rotary,
    own_code_only,
    plain_attention,
    replace_all,
    why_not_fused,
)
from ._vjepa2_packed import multi_seq_encoder, multi_seq_predictor, video_predictor

CODE = CodeBase("vjepa2", "src.models.utils.modules", ("RoPEAttention", "ACRoPEAttention", "rotate_queries_or_keys"))
_SIGNATURES = {
    "RoPEAttention": lambda self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None: 0,
    "ACRoPEAttention": lambda self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0: 0,
    "Attention": lambda self, x, mask=None, attn_mask=None: 0,
    "Block": lambda self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None: 0,
    "ACBlock": lambda self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0: 0,
    "CrossAttention": lambda self, q, x: 0,
    "VisionTransformer": lambda self, x, masks=None: 0,
    "VisionTransformerPredictor": lambda self, x, masks_x, masks_y, mask_index=1, has_cls=False: 0,
    "VisionTransformerPredictorAC": lambda self, x, actions, states, extrinsics=None: 0,
    "MultiSeqWrapper": lambda self, x, masks=None: 0,
    "PredictorMultiSeqWrapper": lambda self, x, masks_x, masks_y, has_cls=False: 0,
}


def matches(model: nn.Module) -> bool:
    return bool(CODE.find_behind(model))


def apply(model: nn.Module | None = None, *, modules: ModuleType | Iterable[ModuleType] | None = None,
          strict_numerics: bool = False, activations: Activations | None = None) -> Report:
    """Make V-JEPA 2 fast: the classes of a checkout (`modules`: any of it; all that are loaded), or one model.

    Replaced are the forwards of
        models.utils.modules   Block, ACBlock        one autograd node each, one rotary table for all layers
                               RoPEAttention, ACRoPEAttention, Attention, CrossAttention     where a block is not fused
        models.predictor       no Python loops over samples, no sorting where positions are explicit
        models.ac_predictor    its dense mask recognised as frame-causal attention
        utils.wrappers         all masks as one packed batch, only visible tubelets embedded
    and apply_masks, repeat_interleave_batch and the mask collator wherever they were imported to.

    Rotary angles are float32, or wider where the model is; attention drops in training only. strict_numerics: angles in
    the dtype of q and k (in float16, and in bfloat16 on CPUs, by the original's own attention), and attention dropout in
    eval too, as in the original. The frequencies stay tiled: they are part of the trained weights. activations: what the
    packed blocks keep for the backward pass (`nn.block_function`); None: as the model is configured, with its activation
    checkpointing. PatchError where the code is not loaded or has other signatures.
    """
    with Report.of("vjepa2") as report:
        found = CODE.find(modules) if model is None or modules is not None else CODE.find_behind(model)
        if not found:
            raise PatchError(f"vjepa2: model must have parts of V-JEPA 2, got a {type(model).__qualname__}")
        for checkout in found:
            _patch(report, checkout, model, family_of(checkout.core, strict_numerics, "tiled", _positions, activations))
        report.keep("blocks with SwiGLU, causal attention, dropout or hooks inside", "run their own code with our attention")
        say_what_stays(report, "app.vjepa.train and app.vjepa_droid.train")
        if not strict_numerics:
            report.note(NOTE)
    return report


def _patch(report: Report, checkout: Checkout, model: nn.Module | None, family: Family) -> None:
    classes = {name: classes_of(checkout, name, _SIGNATURES[name]) for name in _SIGNATURES}
    predictors, encoders = classes["VisionTransformerPredictor"], classes["VisionTransformer"]
    fast = {"RoPEAttention": _rope_attention(family), "ACRoPEAttention": _action_attention(family),
            "Attention": plain_attention(family), "Block": _block(family), "ACBlock": _action_block(family),
            "CrossAttention": cross_attention, "VisionTransformerPredictor": video_predictor(family),
            "VisionTransformerPredictorAC": _action_predictor, "MultiSeqWrapper": multi_seq_encoder(family, encoders),
            "PredictorMultiSeqWrapper": multi_seq_predictor(family, predictors)}
    for collator in checkout.definitions("MaskCollator"):
        _replace_collator(report, checkout, collator)
    replace_all(report, checkout, model, classes, fast, FUNCTIONS)


def _replace_collator(report: Report, checkout: Checkout, collator: type) -> None:
    if not collator.__module__.endswith("multiseq_multiblock3d"):
        report.keep(f"{collator.__module__}.MaskCollator", "no official configuration uses it")
    elif "isinstance" in collator.__call__.__code__.co_names:  # V-JEPA 2.1's copy
        report.keep("MaskCollator", "in this version it takes images too")
    else:
        check_signature(collator.__init__, lambda self, cfgs_mask, dataset_fpcs, crop_size=(224, 224), patch_size=(16, 16),
                        tubelet_size=2: 0, "MaskCollator")
        report.replace_everywhere(collator, VJEPA2MaskCollator, checkout.modules)
        report.note("MaskCollator refuses settings with which the original may never end, by an error when it is made")


def _positions(attn: nn.Module, ids: Tensor, H: int | None, W: int | None, dtype: torch.dtype) -> Tensor:
    return grid_positions(ids, *grid_of(attn, H, W), dtype)


def _covers(attn: nn.Module, x: Tensor, mask: Tensor | None, T: int | None, H: int | None, W: int | None) -> bool:
    """Whether the tokens have as many positions as there are tokens; the original says what is wrong if not."""
    B, N, _ = x.shape
    if mask is not None:
        return mask.dim() == 2 and mask.shape[1] == N and mask.shape[0] in (1, B)
    area = attn.grid_size ** 2
    return N == (N // area * area if None in (T, H, W) else T * H * W)


def _rope_attention(family: Family):
    def forward(original, self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        where = mask, attn_mask, T, H_patches, W_patches
        if own_code_only(self, x, family.strict) or not _covers(self, x, mask, T, H_patches, W_patches):
            return original(self, x, *where)
        return attend(self, x, rope_table(self, x, mask, H_patches, W_patches, family.strict), attn_mask,
                      strict=family.strict)
    return forward


def _action_attention(family: Family):
    def forward(original, self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        where = mask, attn_mask, T, H, W, action_tokens
        if own_code_only(self, x, family.strict) or has_inner_hooks(self) or mask is not None and action_tokens:
            return original(self, x, *where)
        table = action_table(self, x, mask, T, H, W, action_tokens, family.strict)
        return attend(self, x, table, attn_mask, frame_size_of(attn_mask, action_tokens + H * W), family.strict)
    return forward


def _block(family: Family):
    def forward(original, self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        where = mask, attn_mask, T, H_patches, W_patches
        # rotary positions are dear enough in the original that any size gains
        if not is_rotary(self.attn) and not gains(x) or why_not_fused(family, self, x, attn_mask) is not None:
            return original(self, x, *where)
        table = None
        if is_rotary(self.attn):
            if not _covers(self.attn, x, mask, T, H_patches, W_patches):
                return original(self, x, *where)
            table = rope_table(self.attn, x, mask, H_patches, W_patches, family.strict)
        return run_block(x, block_parts(self), table)
    return forward


def _action_block(family: Family):
    def forward(original, self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        where = mask, attn_mask, T, H, W, action_tokens
        frame_size = 0 if attn_mask is None or H is None else frame_size_of(attn_mask, action_tokens + H * W)
        if why_not_fused(family, self, x, attn_mask, frame_size) is not None:
            return original(self, x, *where)
        table = None
        if is_rotary(self.attn):
            if mask is not None and action_tokens:
                return original(self, x, *where)
            table = action_table(self.attn, x, mask, T, H, W, action_tokens, family.strict)
        return run_block(x, block_parts(self), table, frame_size)
    return forward


def _action_predictor(original, self, x, actions, states, extrinsics=None):
    """`VisionTransformerPredictorAC.forward` that tells its blocks what its mask is, known from the first call."""
    if is_transformed(x) or self.attn_mask is None:
        return original(self, x, actions, states, extrinsics)
    rows, columns = self.grid_height, self.grid_width
    x = self.predictor_embed(x).unflatten(1, (-1, rows * columns))
    T = x.shape[1]
    conditions = [self.action_encoder(actions), self.state_encoder(states)]
    if self.use_extrinsics:
        conditions.append(self.extrinsics_encoder(extrinsics))
    frame_size = len(conditions) + rows * columns
    x = torch.cat([*(condition.unsqueeze(2) for condition in conditions), x], 2).flatten(1, 2)
    attn_mask = self.attn_mask[:x.shape[1], :x.shape[1]].to(x.device, non_blocking=True)
    frame_masks.same_as(attn_mask, self.attn_mask, frame_size)
    where = dict(mask=None, attn_mask=attn_mask, T=T, H=rows, W=columns, action_tokens=len(conditions))
    for block in self.predictor_blocks:
        if self.use_activation_checkpointing:
            x = checkpoint(block, x, **where, use_reentrant=False)
        else:
            x = block(x, **where)
    x = x.unflatten(1, (T, frame_size))[:, :, len(conditions):].flatten(1, 2)
    return self.predictor_proj(self.predictor_norm(x))
