"""I-JEPA as facebookresearch/ijepa computes it (arXiv:2301.08243).

    report = jepa_fast.patches.ijepa.apply()         # before main(): everything of the checkout that is loaded
    report = jepa_fast.patches.ijepa.apply(model)    # an encoder or predictor that is there already

Replaced: the transformer blocks (one fused node of the autograd graph, attention without its matrix in memory), the
predictor's input, `apply_masks` and `repeat_interleave_batch` wherever they were imported to, and the mask collator.
"""

import threading
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..drop_in.collators import IJEPAMaskCollator
from ..drop_in.masks import apply_masks, repeat_interleave_batch
from ._block import has_inner_hooks, is_transformed, product_dtype, run_block, run_last_rows
from ._meta import ON_CPUS, Checkout, CodeBase, block_parts, say_what_stays, why_not_block
from ._report import PatchError, Report, check_signature

IJEPA = CodeBase("ijepa", "src.models.vision_transformer",
                 ("VisionTransformer", "VisionTransformerPredictor", "Block", "Attention", "MLP", "DropPath"))


def matches(model: nn.Module) -> bool:
    """Whether parts of a model are of facebookresearch/ijepa."""
    return bool(IJEPA.find_behind(model))


def apply(model: nn.Module | None = None, *, modules: ModuleType | Iterable[ModuleType] | None = None,
          strict_numerics: bool = False) -> Report:
    """Make I-JEPA's official code fast: of a model, or of whole checkouts before models are built.

    modules: any module of the checkout; not given, all loaded checkouts are found by what their modules define. Raises
    PatchError where there is none, and where a signature is not the expected one. The official code has no numerics to
    be put right, so strict_numerics changes nothing.
    """
    checkouts = IJEPA.find(modules) if model is None else IJEPA.find_behind(model)
    if not checkouts:
        raise PatchError(f"ijepa: model must have parts of facebookresearch/ijepa, got a {type(model).__name__}")
    with Report.of("ijepa") as report:
        for checkout in checkouts:
            _check(checkout)
        for checkout in checkouts:
            _apply(checkout, model, report)
        say_what_stays(report, "src.train")
        report.note(ON_CPUS)
    return report


def _check(checkout: Checkout) -> None:
    core = checkout.core
    for cls, expected in (("Block", lambda self, x, return_attention=False: 0), ("Attention", lambda self, x: 0),
                          ("MLP", lambda self, x: 0), ("VisionTransformerPredictor", lambda self, x, masks_x, masks: 0)):
        check_signature(vars(core)[cls].forward, expected, f"{core.__name__}.{cls}.forward")
    for name, expected in (("apply_masks", lambda x, masks: 0), ("repeat_interleave_batch", lambda x, B, repeat: 0)):
        for function in checkout.holders(name):
            if function not in (apply_masks, repeat_interleave_batch):
                check_signature(function, expected, name)
    for collator in _collators(checkout):
        check_signature(collator.__init__, lambda self, input_size=(224, 224), patch_size=16, enc_mask_scale=(0.2, 0.8),
                        pred_mask_scale=(0.2, 0.8), aspect_ratio=(0.3, 3.0), nenc=1, npred=2, min_keep=4,
                        allow_overlap=False: 0, f"{collator.__module__}.MaskCollator")


def _collators(checkout: Checkout) -> list[type]:
    return [cls for cls in checkout.definitions("MaskCollator") if cls.__module__.endswith("masks.multiblock")]


def _apply(checkout: Checkout, model: nn.Module | None, report: Report) -> None:
    core = checkout.core
    Block, Attention, MLP = core.Block, core.Attention, core.MLP

    def block(original, self, x, return_attention=False):
        why = "attention weights are asked for" if return_attention else _why_not(self, x, Attention, MLP)
        if why is None:
            return run_block(x, block_parts(self))
        if return_attention or is_transformed():
            return original(self, x, return_attention)
        with _unread:
            return original(self, x)

    def predictor(original, self, x, masks_x, masks):
        *_, last = self.predictor_blocks
        is_short = type(last) is Block and not has_inner_hooks(self)
        return _predictor(original, self, x, masks_x, masks,
                          lambda x: is_short and _why_not(last, x, Attention, MLP) is None)

    report.replace_method(Block, "forward", block, model)
    report.replace_method(Attention, "forward", _attention, model)
    report.replace_method(core.VisionTransformerPredictor, "forward", predictor, model)
    for name, new in (("apply_masks", apply_masks), ("repeat_interleave_batch", repeat_interleave_batch)):
        checkout.replace_function(report, name, new)
    for collator in _collators(checkout):
        report.replace_everywhere(collator, IJEPAMaskCollator, checkout.modules)
        report.note("MaskCollator refuses settings with which the original may never end, by an error when it is made")


def _why_not(block: nn.Module, x: Tensor, attention: type, mlp: type) -> str | None:
    why, attn = why_not_block(block, x, attention, mlp), block.attn
    if why is None and attn.scale != (attn.proj.in_features // attn.num_heads) ** -0.5:
        why = f"its scale is {attn.scale}"
    return why


class _Unread(threading.local):
    """While a block runs that drops the attention weights which it gets."""

    is_on = False

    def __enter__(self) -> None:
        self.is_on = True

    def __exit__(self, *exception) -> None:
        self.is_on = False


_unread = _Unread()


def _attention(original, self, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [B, N, D] -> [B, N, D] and None for the weights, where a block asks, that reads only the first."""
    drops = self.attn_drop.p > 0 and self.attn_drop.training
    is_slow = x.device.type == "cpu" and product_dtype(x).itemsize < 4  # its backward pass
    if is_transformed() or not _unread.is_on or drops or is_slow or self._forward_hooks or has_inner_hooks(self):
        return original(self, x)
    B, N, D = x.shape
    q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).reshape(B, N, D)
    return self.proj_drop(self.proj(out)), None


def _predictor(original, self, x: Tensor, masks_x, masks, is_short: Callable[[Tensor], bool]) -> Tensor:
    """Context tokens [E * B, K, D] at masks_x -> predictions [M * E * B, K', D] at masks, lists of [B, K] int64.

    The input is written once, with rows of the position table where the original repeats the table for every sample. Where
    is_short(x), x the input of the last block, that block computes the predicted tokens only.
    """
    contexts, targets = ([mask] if isinstance(mask, Tensor) else mask for mask in (masks_x, masks))
    if is_transformed() or not contexts or not targets:
        return original(self, x, masks_x, masks)
    E, M, B = len(contexts), len(targets), len(x) // len(contexts)
    if any(mask.dim() != 2 or len(mask) != B for mask in (*contexts, *targets)):
        return original(self, x, masks_x, masks)
    positions = self.predictor_pos_embed[0]
    x = self.predictor_embed(x)
    x += F.embedding(torch.cat(contexts), positions)
    _, K, D = x.shape
    tokens = self.mask_token + F.embedding(torch.cat(targets), positions)
    tokens = tokens.view(M, 1, B, -1, D).expand(-1, E, -1, -1, -1).reshape(M, E * B, -1, D)
    x = torch.cat([x.expand(M, -1, -1, -1), tokens], dim=2).flatten(0, 1)
    *blocks, last = self.predictor_blocks
    for block in blocks:
        x = block(x)
    if is_short(x):
        return self.predictor_proj(self.predictor_norm(run_last_rows(x, block_parts(last), K)))
    return self.predictor_proj(self.predictor_norm(last(x))[:, K:])
