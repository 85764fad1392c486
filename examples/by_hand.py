"""The pieces by hand in a plain training loop, around a model of your own:  python examples/by_hand.py"""

import copy
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import jepa_fast
from jepa_fast.drop_in.collators import IJEPAMaskCollator

DIM, GRID = 64, 6


class Encoder(nn.Module):
    """Your model: here a small ViT that keeps the tokens at `masks`."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, kernel_size=16, stride=16)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, GRID * GRID, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images, masks=None):
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.blocks(x if masks is None else jepa_fast.apply_masks(x, masks))


def main() -> None:
    torch.manual_seed(0)
    encoder, predictor = Encoder(), nn.Linear(DIM, DIM)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    # one pass over memory: AdamW's step, and the target encoder's moving average with it
    optimizer = jepa_fast.AdamWEMA([*encoder.parameters(), *predictor.parameters()], lr=1e-3, weight_decay=0.04,
                                   averages=zip(encoder.parameters(), target_encoder.parameters(), strict=True))
    collator = IJEPAMaskCollator(input_size=(96, 96), patch_size=16, nenc=1, npred=4, enc_mask_scale=(0.85, 1.0),
                                 pred_mask_scale=(0.15, 0.2), min_keep=2)
    loader = DataLoader(torch.randn(64, 3, 96, 96), batch_size=16, collate_fn=collator)
    for step, (images, context, target) in enumerate(loader):
        start = time.perf_counter()
        with torch.no_grad():
            h = jepa_fast.apply_masks(F.layer_norm(target_encoder(images), (DIM,)), target)
        z = predictor(encoder(images, context)).mean(1, keepdim=True)
        loss = F.smooth_l1_loss(jepa_fast.repeat_interleave_batch(z, len(z), len(target)).expand_as(h), h)
        optimizer.zero_grad()
        loss.backward()
        optimizer.momentum = 0.996 + 0.004 * step / len(loader)
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}  {1e3 * (time.perf_counter() - start):.0f} ms  "
              f"context {context[0].shape[1]} and targets 4 x {target[0].shape[1]} of {GRID * GRID} tokens")


if __name__ == "__main__":
    main()
