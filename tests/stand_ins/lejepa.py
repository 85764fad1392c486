"""The classes of lejepa that a patch replaces: names, buffers, random numbers and formulas; the words are ours."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn import all_reduce


def over_ranks(x):
    return all_reduce(x, dist.ReduceOp.AVG) if dist.is_initialized() else x


class EppsPulley(nn.Module):
    def __init__(self, t_max: float = 3, n_points: int = 17, integration: str = "trapezoid"):
        super().__init__()
        self.register_buffer("t", torch.linspace(0, t_max, n_points))
        self.register_buffer("phi", (-self.t**2 / 2).exp())
        step = torch.full((n_points,), 2 * t_max / (n_points - 1))
        step[0] = step[-1] = t_max / (n_points - 1)
        self.register_buffer("weights", step * self.phi)

    @property
    def world_size(self):
        return dist.get_world_size() if dist.is_initialized() else 1

    def forward(self, x):
        phase = x.unsqueeze(-1) * self.t
        cos, sin = (over_ranks(part.mean(-3)) for part in (phase.cos(), phase.sin()))
        return ((cos - self.phi).square() + sin.square()) @ self.weights * x.shape[-2] * self.world_size


class SlicingUnivariateTest(nn.Module):
    def __init__(self, univariate_test, num_slices: int, reduction: str = "mean", sampler: str = "gaussian",
                 clip_value: float = None):
        super().__init__()
        self.univariate_test, self.num_slices = univariate_test, num_slices
        self.reduction, self.clip_value = reduction, clip_value
        self.register_buffer("global_step", torch.zeros((), dtype=torch.long))
        self._generator = self._generator_device = None

    def _get_generator(self, device, seed):
        if self._generator is None or self._generator_device != device:
            self._generator, self._generator_device = torch.Generator(device), device
        self._generator.manual_seed(seed)
        return self._generator

    def forward(self, x):
        with torch.no_grad():
            step = self.global_step.clone()
            if dist.is_initialized():
                dist.all_reduce(step, dist.ReduceOp.MAX)
            generator = self._get_generator(x.device, step.item())
            directions = torch.randn(x.shape[-1], self.num_slices, device=x.device, generator=generator)
            directions /= directions.norm(dim=0)
            self.global_step.add_(1)
        statistic = self.univariate_test(x @ directions)
        if self.clip_value is not None:
            statistic[statistic < self.clip_value] = 0
        return statistic if self.reduction is None else getattr(statistic, self.reduction)()
