"""V-JEPA as facebookresearch/jepa computes it (arXiv:2404.08471).

    report = jepa_fast.patches.jepa.apply()         # before main(): everything of the checkout that is loaded
    report = jepa_fast.patches.jepa.apply(model)    # an encoder or predictor that is there already, in its wrapper or not

Replaced: the transformer blocks (one fused node of the autograd graph), the wrapper of several masks, which embeds a clip
once instead of once per mask, the predictor's input, `apply_masks` and `repeat_interleave_batch` wherever they were imported
to, and the mask collator.
"""

from collections.abc import Callable, Iterable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..drop_in.collators import VJEPAMaskCollator
from ..drop_in.masks import apply_masks, repeat_interleave_batch
from ._block import has_inner_hooks, is_transformed, run_block, run_last_rows
from ._meta import ON_CPUS, Checkout, CodeBase, block_parts, say_what_stays, why_not_block
from ._report import PatchError, Report, check_signature

JEPA = CodeBase("jepa", "src.models.utils.modules", ("MLP", "Attention", "Block", "CrossAttention", "CrossAttentionBlock"),
                lacks=("RoPEAttention", "ACRoPEAttention"))


def matches(model: nn.Module) -> bool:
    """Whether parts of a model are of facebookresearch/jepa."""
    return bool(JEPA.find_behind(model))


def apply(model: nn.Module | None = None, *, modules: ModuleType | Iterable[ModuleType] | None = None,
          strict_numerics: bool = False) -> Report:
    """Make V-JEPA's official code fast: of a model, or of whole checkouts before models are built.

    modules: any module of the checkout; not given, all loaded checkouts are found by what their modules define. Raises
    PatchError where there is none, and where a signature is not the expected one. strict_numerics keeps the original's
    dropout of attention weights in eval mode.
    """
    checkouts = JEPA.find(modules) if model is None else JEPA.find_behind(model)
    if not checkouts:
        raise PatchError(f"jepa: model must have parts of facebookresearch/jepa, got a {type(model).__name__}")
    with Report.of("jepa") as report:
        for checkout in checkouts:
            _check(checkout)
        for checkout in checkouts:
            _apply(checkout, model, strict_numerics, report)
        report.keep("CrossAttentionBlock.forward", "attentive probes have one query per clip: nothing to gain")
        report.keep("PredictorMultiMaskWrapper.forward", "its masks have no computation in common")
        report.keep("VisionTransformerPredictor.diffusion", "predictors without mask tokens run their own code")
        report.keep("the random-tube MaskCollator", "no official configuration uses it")
        say_what_stays(report, "app.vjepa.train")
        report.note(ON_CPUS)
        if not strict_numerics:
            report.note("with drop > 0 the original drops attention weights in eval mode too: put right (no official "
                        "configuration has it)")
    return report


_METHODS = {
    "Block": {"forward": lambda self, x, return_attention=False, mask=None: 0},
    "Attention": {"forward": lambda self, x, mask=None: 0},
    "MLP": {"forward": lambda self, x: 0},
    "CrossAttention": {"forward": lambda self, q, x: 0},
    "VisionTransformer": {"forward": lambda self, x, masks=None: 0,
                          "interpolate_pos_encoding": lambda self, x, pos_embed: 0},
    "VisionTransformerPredictor": {"forward": lambda self, ctxt, tgt, masks_ctxt, masks_tgt, mask_index=1: 0},
    "MultiMaskWrapper": {"forward": lambda self, x, masks=None: 0},
}


def _check(checkout: Checkout) -> None:
    for name, methods in _METHODS.items():
        for cls in checkout.definitions(name):
            for method, expected in methods.items():
                check_signature(getattr(cls, method), expected, f"{cls.__module__}.{name}.{method}")
    for function in checkout.holders("apply_masks"):
        # a copy beside repeat_interleave_batch has no concat
        has_concat = not function.__module__.endswith("utils.tensors")
        if function is not apply_masks:
            check_signature(function, (lambda x, masks, concat=True: 0) if has_concat else (lambda x, masks: 0),
                            f"{function.__module__}.apply_masks")
    for function in checkout.holders("repeat_interleave_batch"):
        check_signature(function, lambda x, B, repeat: 0, "repeat_interleave_batch")
    for collator in _collators(checkout):
        check_signature(collator.__init__, lambda self, cfgs_mask, crop_size=(224, 224), num_frames=16, patch_size=(16, 16),
                        tubelet_size=2: 0, f"{collator.__module__}.MaskCollator")


def _collators(checkout: Checkout) -> list[type]:
    return [cls for cls in checkout.definitions("MaskCollator") if cls.__module__.endswith("masks.multiblock3d")]


def _apply(checkout: Checkout, model: nn.Module | None, strict: bool, report: Report) -> None:
    core = checkout.core
    Attention, MLP = core.Attention, core.MLP

    def block(original, self, x, return_attention=False, mask=None):
        if return_attention or _why_not(self, x, Attention, MLP, strict):
            return original(self, x, return_attention, mask)
        return run_block(x, block_parts(self))

    def attention(original, self, x, mask=None):
        return _attention(original, self, x, mask, strict)

    def predictor(original, self, ctxt, tgt, masks_ctxt, masks_tgt, mask_index=1):
        *_, last = self.predictor_blocks
        is_short = type(last) is core.Block and not has_inner_hooks(self)
        return _predictor(original, self, ctxt, tgt, masks_ctxt, masks_tgt, mask_index,
                          lambda x: is_short and _why_not(last, x, Attention, MLP, strict) is None)

    report.replace_method(core.Block, "forward", block, model)
    report.replace_method(Attention, "forward", attention, model)
    report.replace_method(core.CrossAttention, "forward", _cross_attention, model)
    for cls in checkout.definitions("VisionTransformerPredictor"):
        report.replace_method(cls, "forward", predictor, model)
    for encoder in checkout.definitions("VisionTransformer"):
        for wrapper in checkout.definitions("MultiMaskWrapper"):
            report.replace_method(wrapper, "forward", _multi_mask(encoder), model)
    for name, new in (("apply_masks", apply_masks), ("repeat_interleave_batch", repeat_interleave_batch)):
        checkout.replace_function(report, name, new)
    for collator in _collators(checkout):
        report.replace_everywhere(collator, VJEPAMaskCollator, checkout.modules)
        report.note("MaskCollator refuses settings with which the original may never end, by an error when it is made")


def _why_not(block: nn.Module, x: Tensor, attention: type, mlp: type, strict: bool) -> str | None:
    why = why_not_block(block, x, attention, mlp)
    if why is not None:
        return why
    attn = block.attn
    if strict and attn.proj_drop_prob > 0:
        return "its attention drops weights"
    # scaled_dot_product_attention is called without the scale
    if not attn.use_sdpa and attn.scale != (attn.proj.in_features // attn.num_heads)**-0.5:
        return f"its scale is {attn.scale}"
    return None


def _attention(original, self, x: Tensor, mask: Tensor | None, strict: bool) -> tuple[Tensor, None]:
    """x [B, N, D] -> [B, N, D] and None: of blocks that are not fused. Drops in training only, unless `strict`."""
    dropout_p = self.proj_drop_prob if strict or self.training else 0.0
    if not self.use_sdpa or (dropout_p == self.proj_drop_prob and is_transformed()):
        return original(self, x, mask)
    B, N, D = x.shape
    q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, N, D))), None


def _cross_attention(original, self, q: Tensor, x: Tensor) -> Tensor:
    """q [B, n, D] attends to x [B, N, D] -> [B, n, D], without the context manager that PyTorch is about to drop."""
    if not self.use_sdpa or is_transformed():
        return original(self, q, x)
    heads = (self.num_heads, q.shape[-1] // self.num_heads)
    query = self.q(q).unflatten(-1, heads).transpose(1, 2)
    k, v = self.kv(x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, k, v).transpose(1, 2).reshape(q.shape)


def _multi_mask(encoder: type) -> Callable:
    """The encoder's wrapper: its tokens are embedded once for all masks."""
    def forward(original, self, x: Tensor, masks: Tensor | list[Tensor] | None = None) -> Tensor | list[Tensor]:
        backbone = self.backbone
        is_one = not isinstance(masks, list) or len(masks) < 2
        if is_one or type(backbone) is not encoder or is_transformed() or has_inner_hooks(self):
            return original(self, x, masks)
        positions = backbone.pos_embed
        if positions is not None:
            positions = backbone.interpolate_pos_encoding(x, positions)
        tokens = backbone.patch_embed(x)
        if positions is not None:
            tokens += positions  # in place, so that under autocast tokens keep its dtype
        return [_encode(backbone, apply_masks(tokens, [mask]), mask) for mask in masks]
    return forward


def _encode(encoder: nn.Module, x: Tensor, mask: Tensor) -> Tensor | list[Tensor]:
    """Tokens [B, K, D] of one mask -> [B, K, D], or a list of what the encoder's `out_layers` put out."""
    outs = []
    for i, block in enumerate(encoder.blocks):
        x = block(x, mask=mask)
        if encoder.out_layers is not None and i in encoder.out_layers:
            outs.append(encoder.norm(x))
    if encoder.out_layers is not None:
        return outs
    return x if encoder.norm is None else encoder.norm(x)


def _predictor(original, self, ctxt: Tensor, tgt: Tensor, masks_ctxt, masks_tgt, mask_index: int,
               is_short: Callable[[Tensor], bool]) -> Tensor:
    """Context tokens [B, K, D] at masks_ctxt -> predictions [B, K', D] at masks_tgt, [B, K] int64 or lists of one.

    Mask tokens and positions are made where they are needed; the original makes them for every token of every clip. Where
    is_short(x), x the input of the last block, that block computes the predicted tokens only.
    """
    contexts, targets = ([mask] if isinstance(mask, Tensor) else mask for mask in (masks_ctxt, masks_tgt))
    is_plain = not is_transformed() and self.mask_tokens is not None and self.predictor_pos_embed is not None
    if not is_plain or not contexts or not targets or len(contexts) != 1 or len(targets) != 1:
        return original(self, ctxt, tgt, masks_ctxt, masks_tgt, mask_index)
    (context,), (target,), positions = contexts, targets, self.predictor_pos_embed[0]
    if any(mask.dim() != 2 or len(mask) != len(ctxt) for mask in (context, target)):
        return original(self, ctxt, tgt, masks_ctxt, masks_tgt, mask_index)
    x = self.predictor_embed(ctxt)
    x += F.embedding(context, positions)
    tokens = self.mask_tokens[mask_index % self.num_mask_tokens] + F.embedding(target, positions)
    num_context, masks = x.shape[1], torch.cat([context, target], dim=1)
    x = torch.cat([x, tokens], dim=1)
    *blocks, last = self.predictor_blocks
    for block in blocks:
        x = block(x, mask=masks)
    if is_short(x):
        return self.predictor_proj(self.predictor_norm(run_last_rows(x, block_parts(last), num_context)))
    return self.predictor_proj(self.predictor_norm(last(x, mask=masks))[:, num_context:])
