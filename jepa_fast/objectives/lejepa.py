"""LeJEPA: views of one image agree, and embeddings are an isotropic Gaussian (SIGReg). No teacher, no predictor.

Balestriero and LeCun, arXiv:2511.08544:  loss = (1 - lamb) * invariance + lamb * sigreg, with
invariance = mean((mean over views of z - z)^2).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.encoder import VisionTransformerConfig
from ..models.resnet import ResNetConfig
from ..nn.block import at_least_float32
from ..nn.projector import Projector
from ..nn.sigreg import SIGReg


@dataclass(frozen=True, kw_only=True)
class SIGRegConfig:
    num_slices: int = 1024   # random directions per step
    t_max: float = 3.0       # the characteristic function is compared on [-t_max, t_max]
    num_knots: int = 17      # at so many points of [0, t_max]

    def __post_init__(self):
        if self.num_knots < 2 or self.num_slices < 1 or not self.t_max > 0:
            raise ValueError(f"num_knots must be at least 2, num_slices at least 1 and t_max above 0, got {self}")


@dataclass(frozen=True, kw_only=True)
class LeJEPAConfig:
    encoder: VisionTransformerConfig | ResNetConfig = field(default_factory=VisionTransformerConfig)
    projector: tuple[int, ...] = (2048, 2048, 128)  # widths of the projector's layers; the last is the embedding's
    lamb: float = 0.05                              # weight of SIGReg, in [0, 1]
    sigreg: SIGRegConfig = field(default_factory=SIGRegConfig)
    num_global_views: int | None = None             # the first so many views make the invariance centre; None: all

    def __post_init__(self):
        if not 0 <= self.lamb <= 1:
            raise ValueError(f"lamb must be in [0, 1], got {self.lamb}")

    def build(self) -> "LeJEPA":
        return LeJEPA(self)


class LeJEPA(nn.Module):
    is_capturable = True  # steps differ in tensors only, so that a CUDA graph can replay them

    def __init__(self, config: LeJEPAConfig):
        super().__init__()
        self.config = config
        self.encoder = config.encoder.build()
        self.projector = Projector(config.encoder.num_features, config.projector)
        # counter-based directions: the same on every rank and device, and nothing for the host to read
        self.sigreg = SIGReg.from_preset("official", num_slices=config.sigreg.num_slices, t_max=config.sigreg.t_max,
                                         num_knots=config.sigreg.num_knots, rng="philox")

    def prepare(self, batch: dict, *, seed: int, step: int, first_sample: int) -> dict:
        return batch

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """{"images": list of V views [B, C, H_v, W_v]} -> {"loss": 0-dim, "invariance", "sigreg", "features"}."""
        features = self.encoder.views(batch["images"])
        embeddings = at_least_float32(self.projector(torch.cat(features)))
        embeddings = embeddings.view(len(features), -1, self.config.projector[-1])
        centre = embeddings[: self.config.num_global_views].mean(0)
        invariance = (centre - embeddings).square().mean()
        sigreg = self.sigreg(embeddings)
        loss = (1 - self.config.lamb) * invariance + self.config.lamb * sigreg
        return {"loss": loss, "invariance": invariance.detach(), "sigreg": sigreg.detach(),
                "features": embeddings.detach().flatten(0, 1)}

    def averages(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def roles(self) -> dict[str, nn.Module]:
        return {"model": self}

    def evaluation_encoder(self) -> nn.Module:
        return self.encoder
