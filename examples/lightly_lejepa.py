"""LeJEPA with timm's ViT and lightly's loss, patched while it is there:  python examples/lightly_lejepa.py"""

import time

import timm
import torch
from lightly.loss import LeJEPALoss
from torch import nn

import jepa_fast


class LeJEPA(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0, drop_path_rate=0.1)
        self.head = nn.Sequential(nn.Linear(192, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))
        self.loss = LeJEPALoss()

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """views [V, B, 3, 64, 64], the first two global -> the loss."""
        proj = self.head(self.backbone(views.flatten(0, 1))).unflatten(0, views.shape[:2])
        return self.loss(global_proj=proj[:2], local_proj=proj[2:])


def train(is_patched: bool, num_steps: int = 3) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = LeJEPA()
    if is_patched:
        print(jepa_fast.patches.auto(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, start = [], time.perf_counter()
    for _ in range(num_steps):
        loss = model(torch.randn(4, 16, 3, 64, 64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, 1e3 * (time.perf_counter() - start) / num_steps


if __name__ == "__main__":
    for is_patched in (False, True):  # the same random numbers: directions and stochastic depth are drawn alike
        losses, ms = train(is_patched)
        print("patched " if is_patched else "original", [f"{loss:.5f}" for loss in losses], f"{ms:.0f} ms per step")
