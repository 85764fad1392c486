"""Batch norm with the statistics of the global batch, on any device."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops._distributed import sum_over_ranks
from .block import at_least_float32


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm1d or 2d over the rows of all ranks (PyTorch's SyncBatchNorm needs a GPU).

    x [B, C] or [B, C, H, W], as many rows on every rank; same parameters, buffers and numbers as PyTorch's on the
    global batch.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in (2, 4):
            raise ValueError(f"x must be [B, C] or [B, C, H, W], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        dims = [0] if x.dim() == 2 else [0, 2, 3]
        shape = [1, -1] + [1] * (x.dim() - 2)
        values = at_least_float32(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = sum_over_ranks(values.sum(dims), dist.group.WORLD, upstream_sync=True) / count
        centred = values - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(dims), dist.group.WORLD, upstream_sync=True) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
