"""Stand-in for the module of this name in facebookresearch/ijepa."""

import torch


def apply_masks(x, masks):
    return torch.cat([torch.gather(x, 1, mask[..., None].repeat(1, 1, x.shape[-1])) for mask in masks])
