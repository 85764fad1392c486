import torch


def compute_mask_distance(masks_pred, masks_enc, grid_size, offset_context_loss):
    def places(ids):
        return torch.stack([ids // grid_size**2, ids % grid_size**2 // grid_size, ids % grid_size], -1).float()

    unit = grid_size // 16 if offset_context_loss else 1
    return [[((places(enc).unsqueeze(2) - places(pred).unsqueeze(1)).square().sum(-1).sqrt().min(-1)[0] / unit).sqrt()
             for pred, enc in zip(*rows, strict=True)] for rows in zip(masks_pred, masks_enc, strict=True)]
