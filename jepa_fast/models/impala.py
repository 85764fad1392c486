"""IMPALA's residual network for small observations.  Espeholt et al., arXiv:1802.01561; as EB-JEPA builds it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ImpalaConfig:
    image_size: int = 65                     # pixels, square
    in_chans: int = 2
    widths: tuple[int, ...] = (16, 32, 32)   # channels of each stage; every stage halves the image
    num_blocks: int = 2                      # residual blocks per stage
    num_outputs: int = 512                   # width of the embedding, after a layer norm

    @property
    def num_features(self) -> int:
        return self.num_outputs

    def build(self) -> "Impala":
        return Impala(self)


class Impala(nn.Module):
    def __init__(self, config: ImpalaConfig):
        super().__init__()
        self.config = config
        stages, in_chans, size = [], config.in_chans, config.image_size
        for width in config.widths:
            stages += [nn.Conv2d(in_chans, width, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1),
                       *(ResidualBlock(width) for _ in range(config.num_blocks))]
            in_chans, size = width, (size + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(in_chans * size * size, config.num_outputs)
        self.norm = nn.LayerNorm(config.num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, C, H, W] -> embeddings [N, D]."""
        # few channels: convolutions take half as long on a CPU with the channels last
        images = images.contiguous(memory_format=torch.channels_last)
        return self.norm(self.head(F.relu(self.stages(images)).flatten(1)))

    features = forward


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)
