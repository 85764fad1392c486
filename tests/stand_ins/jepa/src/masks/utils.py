"""Stand-in for the module of this name in facebookresearch/jepa."""

import torch


def apply_masks(x, masks, concat=True):
    tokens = [torch.gather(x, 1, mask[..., None].repeat(1, 1, x.shape[-1])) for mask in masks]
    return torch.cat(tokens) if concat else tokens
