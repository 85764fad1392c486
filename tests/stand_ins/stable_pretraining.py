"""What a patch replaces in stable-pretraining: names, buffers, random numbers and formulas; the words are ours."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn import all_reduce


class EppsPulley(nn.Module):
    def __init__(self, t_max: float = 3.0, n_points: int = 17):
        super().__init__()
        self._is_ddp = dist.is_initialized()
        self.world_size = dist.get_world_size() if self._is_ddp else 1
        self.register_buffer("t", torch.linspace(0, t_max, n_points))
        self.register_buffer("phi", (-self.t**2 / 2).exp())
        step = torch.full((n_points,), 2 * t_max / (n_points - 1))
        step[0] = step[-1] = t_max / (n_points - 1)
        self.register_buffer("weights", step * self.phi)

    def forward(self, x):
        phase = x.unsqueeze(-1) * self.t
        cos, sin = phase.cos().mean(0), phase.sin().mean(0)
        if self._is_ddp:  # a new tensor that nobody takes
            all_reduce(cos, dist.ReduceOp.AVG)
            all_reduce(sin, dist.ReduceOp.AVG)
        return ((cos - self.phi).square() + sin.square()) @ self.weights * len(x) * self.world_size


class SlicedEppsPulley(nn.Module):
    def __init__(self, num_slices: int = 1024, t_max: float = 3.0, n_points: int = 17):
        super().__init__()
        self._is_ddp, self.num_slices = dist.is_initialized(), num_slices
        self.ep = EppsPulley(t_max, n_points)
        self.register_buffer("global_step", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        with torch.no_grad():
            step = self.global_step.clone()
            if self._is_ddp:
                dist.broadcast(step, 0)
            generator = torch.Generator(x.device).manual_seed(step.item())
            directions = torch.randn(x.shape[-1], self.num_slices, device=x.device, generator=generator)
            directions = directions / directions.norm(dim=0)
            self.global_step.add_(1)
        return self.ep(x @ directions).mean()


class TeacherStudentWrapper(nn.Module):
    def __init__(self, student, base_ema_coefficient=0.996):
        super().__init__()
        self.student, self.teacher = student, copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("ema_coefficient", torch.tensor(base_ema_coefficient))

    @torch.no_grad()
    def update_teacher(self):
        if not self.training or self.ema_coefficient.item() in (0.0, 1.0):
            return
        for kind in ("parameters", "buffers"):
            for t, s in zip(getattr(self.teacher, kind)(), getattr(self.student, kind)(), strict=True):
                t.mul_(self.ema_coefficient.to(t.dtype))
                t.add_((1.0 - self.ema_coefficient).to(t.dtype) * s)
