"""Mask collators with the signatures, calls and outputs of I-JEPA's, V-JEPA's and V-JEPA 2's, drawn in C++.

    IJEPAMaskCollator     src.masks.multiblock.MaskCollator of facebookresearch/ijepa
    VJEPAMaskCollator     src.masks.multiblock3d.MaskCollator of facebookresearch/jepa
    VJEPA2MaskCollator    src.masks.multiseq_multiblock3d.MaskCollator of facebookresearch/vjepa2, also for V-JEPA 2.1

compat="official", the default: the same masks bit for bit. Positions are the next numbers of PyTorch's global generator,
which moves on as if the official code had drawn them; block sizes come from the counter that the loader's processes share.
Settings with which the official code may never end are refused when the collator is made.

compat="unbiased": any grid of two tokens or more, every position as likely as any other, and lists shortened to those of
the batch at random instead of by their last tokens. The masks of a batch follow from one number of the global generator
and the counter.
"""

import dataclasses
import math
from multiprocessing import Value

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..masking import BlockMask, MultiBlock, MultiBlock3D, multiblock, multiblock_plain
from ..masking.masks import Masks

Lists = list[Tensor]


class _Counter:
    """The number of the batch, one for all of a loader's processes; -1 before the first."""

    def __init__(self):
        self._itr_counter = Value("i", -1)

    def step(self) -> int:
        with self._itr_counter.get_lock():
            self._itr_counter.value += 1
            return self._itr_counter.value


class IJEPAMaskCollator(_Counter):
    """A batch of samples -> (collated batch, nenc context lists, npred target lists), each list [B, K] int64."""

    def __init__(self, input_size=(224, 224), patch_size=16, enc_mask_scale=(0.2, 0.8), pred_mask_scale=(0.2, 0.8),
                 aspect_ratio=(0.3, 3.0), nenc=1, npred=2, min_keep=4, allow_overlap=False, *, compat: str = "official"):
        super().__init__()
        height, width = _pair(input_size)
        self.patch_size, self.height, self.width = patch_size, height // patch_size, width // patch_size
        self.enc_mask_scale, self.pred_mask_scale, self.aspect_ratio = enc_mask_scale, pred_mask_scale, aspect_ratio
        self.nenc, self.npred, self.min_keep, self.allow_overlap = nenc, npred, min_keep, allow_overlap
        self._config = MultiBlock(
            num_targets=npred, num_contexts=nenc, target_scale=tuple(pred_mask_scale), context_scale=tuple(enc_mask_scale),
            aspect_ratio=tuple(aspect_ratio), min_keep=min_keep, allow_overlap=allow_overlap, mode=_mode(compat))
        self._config.check_grid((self.height, self.width))

    def __call__(self, batch):
        collated, counter = default_collate(batch), self.step()
        if self._config.mode == "official":
            masks = _next_official(self._config, (self.height, self.width), counter, len(batch))
            return collated, masks.context_lists(), masks.target_lists()
        masks = self._config.sample((self.height, self.width), len(batch), seed=_seed(), step=counter)
        contexts, targets = _ragged(masks)
        return collated, _shorten(contexts, _shortest(contexts)), _shorten(targets, _shortest(targets))


class _Clips(_Counter):
    """The masks of clips of one length: for each of `cfgs_mask` one context list and one target list."""

    def __init__(self, cfgs_mask, crop_size, num_frames, patch_size, tubelet_size, has_complements: bool, compat: str):
        super().__init__()
        (height, width), (rows, columns) = _pair(crop_size), _pair(patch_size)
        self.grid = (num_frames // tubelet_size, height // rows, width // columns)
        masks = tuple(_block_mask(fields, has_complements) for fields in cfgs_mask)
        self.masks, mode = masks, _mode(compat)
        if mode == "unbiased":  # what shortens and swaps lists is done here, after they were drawn
            masks = tuple(dataclasses.replace(mask, max_keep=None, full_complement=False, pred_full_complement=False,
                                              inv_block=False) for mask in masks)
        self._config = MultiBlock3D(masks=masks, mode=mode)
        self._config.check_grid(self.grid)

    def draw(self, batch_size: int) -> tuple[Lists, Lists]:
        counter = self.step()
        if self._config.mode == "official":
            masks = _next_official(self._config, self.grid, counter, batch_size)
            return masks.context_lists(), masks.target_lists()
        masks = self._config.sample(self.grid, batch_size, seed=_seed(), step=counter)
        pairs = [self._finish(mask, *lists) for mask, *lists in zip(self.masks, *_ragged(masks), strict=True)]
        return [context for context, _ in pairs], [target for _, target in pairs]

    def _finish(self, mask: BlockMask, context: Lists, target: Lists) -> tuple[Tensor, Tensor]:
        (context,), (target,) = (_shorten([lists], min(_shortest([lists]), keep))
                                 for lists, keep in ((context, mask.max_keep or math.prod(self.grid)),
                                                     (target, math.prod(self.grid))))
        if mask.full_complement:
            target = _complement(context, math.prod(self.grid))
        elif mask.pred_full_complement:
            context = _complement(target, math.prod(self.grid))
        return (target, context) if mask.inv_block else (context, target)


class VJEPAMaskCollator:
    """A batch of clips -> (collated batch, context lists, target lists), one [B, K] int64 for each of `cfgs_mask`."""

    def __init__(self, cfgs_mask, crop_size=(224, 224), num_frames=16, patch_size=(16, 16), tubelet_size=2, *,
                 compat: str = "official"):
        self.clips = _Clips(cfgs_mask, crop_size, num_frames, patch_size, tubelet_size, False, compat)

    def step(self) -> None:
        self.clips.step()

    def __call__(self, batch):
        return default_collate(batch), *self.clips.draw(len(batch))


class VJEPA2MaskCollator:
    """A batch of clips of several lengths -> a list with what V-JEPA's collator returns for the clips of each length.

    The length of a sample is that of its last clip's frame numbers, len(sample[-1][-1]), one of `dataset_fpcs`.
    """

    def __init__(self, cfgs_mask, dataset_fpcs, crop_size=(224, 224), patch_size=(16, 16), tubelet_size=2, *,
                 compat: str = "official"):
        self.clips = {fpc: _Clips(cfgs_mask, crop_size, fpc, patch_size, tubelet_size, True, compat)
                      for fpc in dataset_fpcs}

    def step(self) -> None:
        for clips in self.clips.values():
            clips.step()

    def __call__(self, batch):
        samples = {fpc: [] for fpc in self.clips}
        for sample in batch:
            samples[len(sample[-1][-1])].append(sample)
        return [(default_collate(group), *self.clips[fpc].draw(len(group))) for fpc, group in samples.items() if group]


# ---- settings


def _pair(size) -> tuple:
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def _mode(compat: str) -> str:
    if compat not in ("official", "unbiased"):
        raise ValueError(f'compat must be "official" or "unbiased", got {compat!r}')
    return compat


def _block_mask(fields: dict, has_complements: bool) -> BlockMask:
    """A mask from an entry of the official `cfgs_mask`; V-JEPA knows no complements and ignores them."""
    missing = [name for name in ("num_blocks", "spatial_scale", "temporal_scale", "aspect_ratio") if name not in fields]
    if missing:
        raise ValueError(f"cfgs_mask must give num_blocks, spatial_scale, temporal_scale and aspect_ratio of every mask, "
                         f"got one without {', '.join(missing)}")
    flags = ("full_complement", "pred_full_complement", "inv_block") if has_complements else ()
    return BlockMask(num_blocks=fields["num_blocks"], max_temporal_keep=fields.get("max_temporal_keep", 1.0),
                     max_keep=fields.get("max_keep"), **{name: fields.get(name, False) for name in flags},
                     **{name: tuple(fields[name]) for name in ("spatial_scale", "temporal_scale", "aspect_ratio")})


# ---- official: the numbers that the global generator would give next


def _next_official(config: MultiBlock | MultiBlock3D, grid: tuple[int, ...], counter: int, batch_size: int) -> Masks:
    positions = _continue_global() if multiblock.backend() == "compiled" else None
    if positions is None:
        positions = multiblock_plain.PositionStream(0)
        positions.generator = torch.default_generator
        return config._next(grid, positions, counter, batch_size)
    masks = config._next(grid, positions, counter, batch_size)
    torch.randint(0, 2, (positions.draws,), device="cpu")   # the global generator moves on by as many
    return masks


def _continue_global():
    """A compiled generator that goes on where PyTorch's global one stands; None if that has an unknown layout."""
    state = torch.get_rng_state().numpy()
    if len(state) != 5056 or int(state[:8].view(np.uint64)[0]) != torch.initial_seed() % 2**64:
        return None
    num_left, is_seeded = (int(number) for number in state[8:16].view(np.int32))
    words = state[24:24 + 624 * 8].view(np.uint64)
    if is_seeded != 1 or not 1 <= num_left <= 624 or int(words.max()) >= 2**32:
        return None
    return multiblock._masking.PositionStream.continue_from(words.astype(np.uint32), 625 - num_left)


# ---- unbiased: lists of one length for a batch


def _seed() -> int:
    return int(torch.randint(0, 2**63 - 1, (), device="cpu"))


def _ragged(masks: Masks) -> tuple[list[Lists], list[Lists]]:
    """Contexts and targets, by list and sample."""
    def split(idx: Tensor, lengths: Tensor) -> list[Lists]:
        tokens, B = idx.split(lengths.flatten().tolist()), lengths.shape[1]
        return [list(tokens[i:i + B]) for i in range(0, len(tokens), B)]

    return split(masks.context_idx, masks.context_lengths), split(masks.target_idx, masks.target_lengths)


def _shortest(lists: list[Lists]) -> int:
    return min(len(tokens) for samples in lists for tokens in samples)


def _shorten(lists: list[Lists], keep: int) -> Lists:
    """`keep` tokens of each, any of them as likely as any other, in their order: one [B, keep] per list."""
    return [torch.stack([tokens[torch.randperm(len(tokens))[:keep].sort().values] for tokens in samples])
            for samples in lists]


def _complement(lists: Tensor, num_tokens: int) -> Tensor:
    """[B, K] -> [B, num_tokens - K]: the other tokens."""
    is_other = torch.ones(len(lists), num_tokens, dtype=torch.bool).scatter_(1, lists, False)
    return is_other.nonzero()[:, 1].view(len(lists), -1)
