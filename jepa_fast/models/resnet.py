"""Residual networks, for objectives that take any backbone (LeJEPA).  He et al., arXiv:1512.03385."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.batch_norm import GlobalBatchNorm


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    image_size: int = 224                        # pixels; only for data, the network takes any size
    in_chans: int = 3
    depths: tuple[int, ...] = (2, 2, 2, 2)       # blocks per stage: ResNet-18; (3, 4, 6, 3): ResNet-50 with bottleneck
    width: int = 64                              # channels of the first stage, doubled by each further one
    bottleneck: bool = False
    stem: Literal["imagenet", "small"] = "imagenet"  # small: one 3x3 convolution, no pooling, for images up to 64 pixels
    small_stride: int = 1                        # of the small stem
    num_outputs: int = 0                         # Linear head on the pooled feature; 0: none

    @property
    def num_features(self) -> int:
        return self.num_outputs or self.width * 2 ** (len(self.depths) - 1) * (4 if self.bottleneck else 1)

    def build(self) -> "ResNet":
        return ResNet(self)


def conv_norm(in_chans: int, out_chans: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, GlobalBatchNorm(out_chans))


class ResidualBlock(nn.Module):
    def __init__(self, in_chans: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        out_chans = width * 4 if bottleneck else width
        if bottleneck:
            self.convs = nn.ModuleList([conv_norm(in_chans, width, 1), conv_norm(width, width, 3, stride),
                                        conv_norm(width, out_chans, 1)])
        else:
            self.convs = nn.ModuleList([conv_norm(in_chans, width, 3, stride), conv_norm(width, width, 3)])
        is_same = stride == 1 and in_chans == out_chans
        self.shortcut = nn.Identity() if is_same else conv_norm(in_chans, out_chans, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv in self.convs[:-1]:
            out = F.relu(conv(out))
        return F.relu(self.convs[-1](out) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        if config.stem == "imagenet":
            self.stem = nn.Sequential(conv_norm(config.in_chans, config.width, 7, 2), nn.ReLU(),
                                      nn.MaxPool2d(3, 2, padding=1))
        else:
            self.stem = nn.Sequential(conv_norm(config.in_chans, config.width, 3, config.small_stride), nn.ReLU())
        blocks, in_chans = [], config.width
        for stage, depth in enumerate(config.depths):
            width = config.width * 2**stage
            for i in range(depth):
                blocks.append(ResidualBlock(in_chans, width, 2 if stage > 0 and i == 0 else 1, config.bottleneck))
                in_chans = width * 4 if config.bottleneck else width
        self.blocks = nn.Sequential(*blocks)
        if config.num_outputs:
            self.head = nn.Linear(in_chans, config.num_outputs)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, N, D]: the positions of the last feature map, row-major."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.blocks(self.stem(images)).flatten(2).transpose(1, 2)

    def patch_features(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, N, D] and its grid (rows, columns): the deepest map with at least 7 rows, or the first one."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        chosen = None
        for block in self.blocks:
            x = block(x)
            if chosen is None or x.shape[-2] >= 7:
                chosen = x
        return chosen.flatten(2).transpose(1, 2), tuple(chosen.shape[-2:])

    def views(self, views: list[Tensor]) -> list[Tensor]:
        """Views of any sizes -> pooled features [B_v, num_features] each; views of one size run as one batch."""
        sizes = sorted({view.shape[-2:] for view in views})
        out: list[Tensor] = [None] * len(views)  # type: ignore[list-item]
        for size in sizes:
            members = [i for i, view in enumerate(views) if view.shape[-2:] == size]
            features = self.features(torch.cat([views[i] for i in members]))
            for i, part in zip(members, features.split([len(views[i]) for i in members]), strict=True):
                out[i] = part
        return out

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, num_features]: the mean over positions, then the head."""
        pooled = self(images).mean(1)
        return self.head(pooled) if self.config.num_outputs else pooled

