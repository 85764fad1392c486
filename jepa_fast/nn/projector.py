"""The multilayer perceptron between an encoder and a loss."""

from torch import nn

from .batch_norm import GlobalBatchNorm


class Projector(nn.Sequential):
    """Linear, batch norm and ReLU for each hidden width, then a Linear; batch statistics over all ranks."""

    def __init__(self, in_features: int, widths: tuple[int, ...]):
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Linear(in_features, width), GlobalBatchNorm(width), nn.ReLU()]
            in_features = width
        super().__init__(*layers, nn.Linear(in_features, widths[-1]))
