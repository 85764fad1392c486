"""All masks of a batch as one packed batch: the encoders, predictors and wrappers of V-JEPA 2 and 2.1."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..drop_in.attention import angle_dtype
from ..nn.block import Sequences
from ..nn.linear import linear
from ..nn.rotary import axis_widths, rotary_table
from ..ops import gather_patches, gather_tokens
from ._block import has_inner_hooks, is_transformed, run_packed
from ._vjepa2 import Family, block_parts, is_rotary, why_not_fused


def why_not_packed(family: Family, owner: nn.Module, blocks: Sequence[nn.Module], like: Tensor) -> str | None:
    """Why sequences of several lengths cannot go through all blocks of a model together. like: of the stream's dtype."""
    if has_inner_hooks(owner):
        return "its parts have hooks"
    if any(part._compiled_call_impl is not None for part in owner.modules() if part is not owner):
        return "its parts are compiled"
    probe = like.new_empty(0, 0, 0)
    for block in blocks:
        if type(block) is not family.layers.Block:
            return f"a block is a {type(block).__name__}"
        why = why_not_fused(family, block, probe)
        if why is None and block.training and getattr(block.drop_path, "drop_prob", None):
            why = "stochastic depth draws its numbers mask by mask"
        if why is not None:
            return why
    first = blocks[0].attn
    if getattr(first, "n_registers", 0) or getattr(first, "has_cls_first", False):
        return "it has tokens without a position"
    same = all(type(block.attn) is type(first) and block.attn.num_heads == first.num_heads
               and getattr(block.attn, "grid_size", None) == getattr(first, "grid_size", None) for block in blocks)
    return None if same else "its blocks differ"


class Group(NamedTuple):
    """Sequences of one length: tokens ids [B, N] of a grid with frames of H x W."""

    ids: Tensor
    H: int | None = None
    W: int | None = None


class Packed:
    """Groups of sequences end to end, B * N rows of each, through the blocks of a model."""

    def __init__(self, family: Family, groups: list[Group]):
        self.family, self.groups = family, groups
        self.shapes = [tuple(group.ids.shape) for group in groups]
        self.starts = [0]
        for B, N in self.shapes:
            self.starts.append(self.starts[-1] + B * N)

    def split(self, x: Tensor) -> list[Tensor]:
        """x [P, D] -> a view [B, N, D] for each group."""
        return [x[start:start + B * N].view(B, N, -1) for start, (B, N) in zip(self.starts, self.shapes, strict=False)]

    def sequences(self, attn: nn.Module, like: Tensor) -> Sequences:
        device = like.device
        ends = [torch.arange(B, device=device) * N + start
                for start, (B, N) in zip(self.starts, self.shapes, strict=False)]  # made there, not copied there
        ends.append(torch.full((1,), self.starts[-1], device=device))
        rotary = None
        if is_rotary(attn):
            dtype = angle_dtype(like, self.family.strict)
            wide = torch.promote_types(dtype, torch.float32)
            positions = torch.cat([self.family.positions(attn, group.ids.flatten(), group.H, group.W, wide)
                                   for group in self.groups])
            rotary = rotary_table(positions, axis_widths(attn.head_dim), self.family.pairing, angle_dtype=dtype)
        return Sequences(torch.cat(ends).int(), max(N for _, N in self.shapes), rotary)

    def run(self, x: Tensor, blocks: Sequence[nn.Module], checkpoints: bool, levels: Sequence[int] = ()) -> list[Tensor]:
        """x [P, D] through the blocks -> what comes out of each block in `levels`, and of the last."""
        sequences = self.sequences(blocks[0].attn, x)
        activations = self.family.activations or ("checkpoint" if checkpoints else "all")
        outs = []
        for i, block in enumerate(blocks):
            x = run_packed(x, block_parts(block), sequences, activations)
            if i in levels:
                outs.append(x)
        return [*outs, x]


def as_list(masks) -> list:
    return list(masks) if isinstance(masks, (list, tuple)) else [masks]


def single(masks) -> Tensor | None:
    """The one mask of a call; None where there are more."""
    masks = as_list(masks)
    return masks[0] if len(masks) == 1 else None


def fits(mask: Tensor | None, x: Tensor) -> bool:
    """Whether mask is [B, K] int64 for x [B, ...], where x is."""
    return (isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.int64 and mask.shape[0] == x.shape[0]
            and mask.device == x.device and 0 not in mask.shape)


def visible_tokens(proj: nn.Module, clips: Tensor, masks: list[Tensor]) -> Tensor:
    """The patch embedding (a convolution with stride = kernel) of the tokens that any mask [B, K] names: [P, D]."""
    num_tokens = 1
    for size, unit in zip(clips.shape[2:], proj.kernel_size, strict=True):
        num_tokens *= size // unit
    first = torch.arange(clips.shape[0], device=clips.device).unsqueeze(1) * num_tokens
    rows = torch.cat([(mask + first).flatten() for mask in masks])
    return linear(gather_patches(clips, rows, proj.kernel_size), proj.weight.flatten(1), proj.bias)


def embeds_patches(embed: nn.Module, clips: Tensor) -> bool:
    """Whether `visible_tokens` computes what a patch embedding would."""
    proj = getattr(embed, "proj", None)
    return (type(embed).__name__ in ("PatchEmbed", "PatchEmbed3D") and type(proj) in (nn.Conv2d, nn.Conv3d)
            and proj.stride == proj.kernel_size and proj.groups == 1 and not any(proj.padding)
            and set(proj.dilation) == {1} and clips.dim() == 2 + len(proj.kernel_size)
            and clips.shape[1] == proj.in_channels)


def calls_of(x: list[Tensor], masks) -> list[list[list[Tensor]]] | None:
    """The masks of each call of the encoder, by clip length; None where one is not [B, K] int64 with one K per call."""
    calls = [[as_list(call) for call in of_clips] for _, of_clips in zip(x, masks, strict=False)]
    for clips, of_clips in zip(x, calls, strict=False):
        for call in of_clips:
            if not call or not all(fits(mask, clips) and mask.shape == call[0].shape for mask in call):
                return None
    return calls if any(calls) else None


def encode(family: Family, owner: nn.Module, vit: nn.Module, x: list[Tensor], masks, embed_of: Callable,
           levels: Sequence[int] = (), modality_of: Callable = lambda vit, clips: None
           ) -> tuple[Packed, list[Tensor], list[list]] | None:
    """The blocks of a vision transformer on the visible tokens of all masks; None where its own code must run.

    -> how they are packed, the outputs of blocks `levels` and of the last, and the calls that they answer.
    """
    if not isinstance(x, (list, tuple)) or not x or not all(map(is_plain, x)):
        return None
    calls, embeds = calls_of(x, masks), [embed_of(vit, clips) for clips in x]
    if calls is None or not all(map(embeds_patches, embeds, x)) or why_not_packed(family, owner, vit.blocks, x[0]):
        return None
    tokens, groups = [], []
    for clips, embed, of_clips in zip(x, embeds, calls, strict=False):
        flat = [mask for call in of_clips for mask in call]
        if not flat:
            continue
        visible = visible_tokens(embed.proj, clips, flat)
        if not vit.use_rope:
            visible += vit.interpolate_pos_encoding(clips, vit.pos_embed)[0][torch.cat([m.flatten() for m in flat])]
        modality = modality_of(vit, clips)
        if modality is not None:
            visible += modality[0]
        tokens.append(visible)
        grid = [size // vit.patch_size if vit.handle_nonsquare_inputs else None for size in clips.shape[-2:]]
        groups += [Group(torch.cat(call), *grid) for call in of_clips]
    packed = Packed(family, groups)
    return packed, packed.run(torch.cat(tokens), vit.blocks, vit.use_activation_checkpointing, levels), calls


def nested(parts: list, calls: list[list], num_clips: int) -> list[list]:
    """A part for each call, as the wrappers return them."""
    parts = iter(parts)
    return [[next(parts) for _ in of_clips] for of_clips in calls] + [[] for _ in range(num_clips - len(calls))]


def multi_seq_encoder(family: Family, encoders: list[type]):
    """`MultiSeqWrapper.forward`: with masks, one packed batch."""
    def forward(original, self, x, masks=None):
        vit = self.backbone
        if masks is None or is_transformed() or type(vit) not in encoders or vit.out_layers is not None:
            return original(self, x, masks)
        done = encode(family, self, vit, x, masks, lambda vit, clips: vit.patch_embed)
        if done is None:
            return original(self, x, masks)
        packed, (out,), calls = done
        return nested(packed.split(out if vit.norm is None else vit.norm(out)), calls, len(x))
    return forward


def multi_seq_predictor(family: Family, predictors: list[type]):
    """`PredictorMultiSeqWrapper.forward`: one packed batch; the mask token goes by the clip length."""
    def forward(original, self, x, masks_x, masks_y, has_cls=False):
        predictor = self.backbone
        if is_transformed() or type(predictor) not in predictors or has_cls:
            return original(self, x, masks_x, masks_y, has_cls)
        rows = [(i, *row) for i, of_clips in enumerate(zip(x, masks_x, masks_y, strict=False))
                for row in zip(*of_clips, strict=False)]
        calls = [Prediction(z, single(mask_x), single(mask_y), i) for i, z, mask_x, mask_y in rows]
        if not predicts_unsorted(family, self, predictor, calls):
            return original(self, x, masks_x, masks_y, has_cls)
        outs = [[] for _ in x]
        for call, targets in zip(calls, predict(family, predictor, calls), strict=True):
            outs[call.mask_index].append(targets)
        return outs
    return forward


class Prediction(NamedTuple):
    """One call of a predictor."""

    x: Tensor                   # [B, K, D] context
    mask_x: Tensor | None       # [B, K] int64
    mask_y: Tensor | None       # [B, K_t] int64
    mask_index: int


def is_plain(x) -> bool:
    return type(x) in (Tensor, nn.Parameter) and not is_transformed(x)


def predicts_unsorted(family: Family, owner: nn.Module, predictor: nn.Module, calls: list[Prediction]) -> bool:
    """Whether `predict` answers: positions are explicit and all tokens stay, so that their order changes nothing."""
    if not calls or predictor.chop_last_n_tokens or predictor.num_mask_tokens < 1:
        return False
    return all(is_plain(call.x) and has_masks(call, call.x.shape[1]) for call in calls) and why_not_packed(
        family, owner, predictor.predictor_blocks, calls[0].x) is None


def has_masks(call: Prediction, num_context: int) -> bool:
    return fits(call.mask_x, call.x) and fits(call.mask_y, call.x) and call.mask_x.shape[1] == num_context


def predict(family: Family, predictor: nn.Module, calls: list[Prediction]) -> list[Tensor]:
    """The targets [B, K_t, D] of each call."""
    packed, x = run_predictor(family, predictor, calls)
    targets = [tokens[:, call.x.shape[1]:] for tokens, call in zip(packed.split(x), calls, strict=True)]
    flat = targets[0].flatten(0, 1) if len(targets) == 1 else torch.cat([tokens.flatten(0, 1) for tokens in targets])
    out = predictor.predictor_proj(predictor.predictor_norm(flat))
    return Packed(family, [Group(call.mask_y) for call in calls]).split(out)


def run_predictor(family: Family, predictor: nn.Module, calls: list[Prediction],
                  modality: Tensor | None = None) -> tuple[Packed, Tensor]:
    """Context and mask tokens of all calls through the blocks of a predictor: packed, sequence by sequence."""
    context = predictor.predictor_embed(torch.cat([call.x.flatten(0, 1) for call in calls]))
    table = None if predictor.use_rope else predictor.predictor_pos_embed[0]
    if table is not None:
        context += table[torch.cat([call.mask_x.flatten() for call in calls])]
    contexts = Packed(family, [Group(call.mask_x) for call in calls]).split(context)
    x = torch.cat([with_mask_tokens(predictor, tokens, call, table).flatten(0, 1)
                   for tokens, call in zip(contexts, calls, strict=True)])
    if modality is not None:
        x += modality[0]
    packed = Packed(family, [Group(torch.cat([call.mask_x, call.mask_y], 1)) for call in calls])
    return packed, packed.run(x, predictor.predictor_blocks, predictor.use_activation_checkpointing)[-1]


def with_mask_tokens(predictor: nn.Module, context: Tensor, call: Prediction, table: Tensor | None) -> Tensor:
    """Context [B, K, D], then the mask token, with its position where there is a table, of every target."""
    token = predictor.mask_tokens[call.mask_index % predictor.num_mask_tokens]
    if table is not None:
        token = token + table[call.mask_y]
    return torch.cat([context, token.expand(*call.mask_y.shape, -1)], 1)


def video_predictor(family: Family):
    """`VisionTransformerPredictor.forward` without Python loops over samples."""
    def forward(original, self, x, masks_x, masks_y, mask_index=1, has_cls=False):
        if not is_plain(x):
            return original(self, x, masks_x, masks_y, mask_index, has_cls)
        call = Prediction(x, single(masks_x), single(masks_y), mask_index)
        if not has_masks(call, x.shape[1] - bool(has_cls)):
            return original(self, x, masks_x, masks_y, mask_index, has_cls)
        if not has_cls and not self.return_all_tokens and predicts_unsorted(family, self, self, [call]):
            return predict(family, self, [call])[0]
        return predict_in_order(self, call, has_cls)
    return forward


def predict_in_order(predictor: nn.Module, call: Prediction, has_cls: bool) -> Tensor:
    """The original's own order of tokens and of calls, each sample's rows gathered at once."""
    x = predictor.predictor_embed(call.x)
    cls, x = x[:, :int(has_cls)], x[:, int(has_cls):]
    num_context, table = x.shape[1], None if predictor.use_rope else predictor.predictor_pos_embed[0]
    if table is not None:
        x += table[call.mask_x]
    ids = torch.cat([call.mask_x, call.mask_y], 1)
    order = torch.argsort(ids, dim=1)
    kept = order[:, :order.shape[1] - predictor.chop_last_n_tokens]
    ids, x = ids.gather(1, kept), gather_tokens(with_mask_tokens(predictor, x, call, table), kept)
    x = torch.cat([cls, x], 1) if has_cls else x
    for block in predictor.predictor_blocks:
        x = checkpoint(block, x, ids, None, use_reentrant=False) if predictor.use_activation_checkpointing else block(
            x, mask=ids, attn_mask=None)
    x = predictor.predictor_norm(x)[:, int(has_cls):]
    if not predictor.return_all_tokens:
        x = gather_tokens(x, torch.argsort(order, dim=1)[:, num_context:])
    return predictor.predictor_proj(x)
