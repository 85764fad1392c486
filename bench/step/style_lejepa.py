"""LeJEPA's models in plain PyTorch: all views of one size as one batch, SIGReg with every cosine and sine in memory."""

import torch
from torch import Tensor, nn

from .style_blocks import Manner, blocks, run
from .style_image import Patches


class Encoder(nn.Module):
    def __init__(self, config, manner: Manner):
        super().__init__()
        self.manner, D = manner, config.embed_dim
        self.patch_embed = Patches(config.patch_size, config.in_chans, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid[0] * config.grid[1] + 1, D))
        self.blocks = blocks(config, D, config.num_heads, manner)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, config.num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(run(self.blocks, x, self.manner))[:, 0])


def projector(width: int, widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out in widths[:-1]:
        layers += [nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, widths[-1]))


class ViewStep(nn.Module):
    def __init__(self, objective, manner: Manner):
        super().__init__()
        self.config, config = objective, objective.sigreg
        self.encoder = Encoder(objective.encoder, manner)
        self.projector = projector(objective.encoder.num_features, objective.projector)
        t = torch.linspace(0, config.t_max, config.num_knots)
        weights = torch.full_like(t, 2 * config.t_max / (config.num_knots - 1))
        weights[0] = weights[-1] = weights[1] / 2
        for name, value in {"t": t, "window": torch.exp(-t.square() / 2), "weights": weights}.items():
            self.register_buffer(name, value, persistent=False)

    def loss(self, batch: dict, masks: dict) -> Tensor:
        views = batch["images"]
        z = self.projector(self.encoder(torch.stack(views, 1).flatten(0, 1)))
        z = z.view(-1, len(views), z.shape[-1]).transpose(0, 1)  # [V, B, D]
        invariance = (z.mean(0) - z).square().mean()
        return (1 - self.config.lamb) * invariance + self.config.lamb * self.sigreg(z)

    def sigreg(self, z: Tensor) -> Tensor:
        directions = torch.randn(z.shape[-1], self.config.sigreg.num_slices, device=z.device)
        phase = (z @ (directions / directions.norm(dim=0))).unsqueeze(-1) * self.t
        error = (phase.cos().mean(-3) - self.window).square() + phase.sin().mean(-3).square()
        return (error @ (self.weights * self.window)).mean() * z.shape[-2]
