import torch


def apply_masks(x, masks, concat=True):
    kept = [torch.stack([tokens[mask] for tokens, mask in zip(x, of_kind, strict=True)]) for of_kind in masks]
    return torch.cat(kept) if concat else kept
