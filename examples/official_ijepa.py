"""Meta's I-JEPA code, unedited:  python examples/official_ijepa.py PATH/TO/ijepa

The patch comes before the models are built; a run of their `main.py` begins with the same two lines.
"""

import copy
import sys
import time

import torch
import torch.nn.functional as F

import jepa_fast
from jepa_fast.drop_in.collators import IJEPAMaskCollator

sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__))
import src.models.vision_transformer as vit  # noqa: E402  (of their checkout)


def train(num_steps: int = 3) -> tuple[list[float], float]:
    """Losses and seconds per step: context encoder, predictor, target encoder, AdamW, moving average."""
    torch.manual_seed(0)
    encoder = vit.VisionTransformer(img_size=[96], patch_size=16, embed_dim=96, depth=2, num_heads=3, qkv_bias=True)
    predictor = vit.vit_predictor(num_patches=36, embed_dim=96, predictor_embed_dim=48, depth=2, num_heads=3)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=1e-3)
    collate = IJEPAMaskCollator(input_size=(96, 96), patch_size=16, pred_mask_scale=(0.15, 0.2), nenc=1, npred=4,
                                enc_mask_scale=(0.85, 1.0), min_keep=2)
    losses, start = [], time.perf_counter()
    for _ in range(num_steps):
        images, context, target = collate([torch.randn(3, 96, 96) for _ in range(16)])
        with torch.no_grad():
            h = vit.apply_masks(F.layer_norm(target_encoder(images), (96,)), target)
        loss = F.smooth_l1_loss(predictor(encoder(images, context), context, target), h)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        jepa_fast.ema_update_(list(target_encoder.parameters()), list(encoder.parameters()), 0.996)
        losses.append(loss.item())
    return losses, (time.perf_counter() - start) / num_steps


if __name__ == "__main__":
    before, seconds_before = train()
    report = jepa_fast.patches.ijepa.apply()
    print(report)
    after, seconds_after = train()
    report.undo()
    print("losses before", [f"{loss:.6f}" for loss in before], f"{1e3 * seconds_before:.0f} ms per step")
    print("losses after ", [f"{loss:.6f}" for loss in after], f"{1e3 * seconds_after:.0f} ms per step")
