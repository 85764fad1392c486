"""The multilayer perceptron between an encoder and a loss."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Linear, batch norm and ReLU for each hidden width, then a Linear; batch statistics over all ranks."""

    def __init__(self, in_features: int, widths: tuple[int, ...]):
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Linear(in_features, width), GlobalBatchNorm(width), nn.ReLU()]
            in_features = width
        super().__init__(*layers, nn.Linear(in_features, widths[-1]))


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all ranks, on any device (PyTorch's SyncBatchNorm needs a GPU).

    Same parameters, buffers and numbers as BatchNorm1d on the global batch; equal rows per rank.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        count = x.shape[0] * dist.get_world_size()
        values = x.float()
        mean = dist_nn.all_reduce(values.sum(0)) / count
        variance = dist_nn.all_reduce((values - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        out = (values - mean) * torch.rsqrt(variance + self.eps)
        return (out * self.weight + self.bias).to(x.dtype)
