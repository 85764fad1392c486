"""What a patch replaces in eb_jepa.losses: names, random numbers, formulas and the all-reduce; the words are ours."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def epps_pulley(x, t_min=-3, t_max=3, n_points=10):
    t = torch.linspace(t_min, t_max, n_points, device=x.device)
    normal = (-t**2 / 2).exp()
    empirical = torch.exp(1j * (x[:, :, None] * t)).mean(0)
    if dist.is_initialized():
        dist.all_reduce(empirical, dist.ReduceOp.AVG)
    return torch.trapezoid(normal * (empirical - normal).abs() ** 2, t, dim=1)


class BCS(nn.Module):
    def __init__(self, num_slices=256, lmbd=10.0):
        super().__init__()
        self.num_slices, self.lmbd, self.step = num_slices, lmbd, 0

    def forward(self, z1, z2):
        with torch.no_grad():
            generator = torch.Generator(z1.device).manual_seed(self.step)
            directions = torch.randn(z1.shape[1], self.num_slices, device=z1.device, generator=generator)
            directions /= directions.norm(dim=0)
        self.step += 1
        bcs = (epps_pulley(z1 @ directions).mean() + epps_pulley(z2 @ directions).mean()) / 2
        invariance = F.mse_loss(z1, z2)
        return {"loss": invariance + self.lmbd * bcs, "bcs_loss": bcs, "invariance_loss": invariance}
