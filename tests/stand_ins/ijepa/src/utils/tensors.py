"""Stand-in for the module of this name in facebookresearch/ijepa, which has a second apply_masks."""

import torch


def apply_masks(x, masks):
    return torch.cat([torch.gather(x, 1, mask[..., None].repeat(1, 1, x.shape[-1])) for mask in masks])


def repeat_interleave_batch(x, B, repeat):
    return torch.cat([batch for i in range(len(x) // B) for batch in [x[i * B:(i + 1) * B]] * repeat])
