"""LeWorldModel: an end-to-end world model from pixels with two terms, next-embedding prediction and SIGReg.

Maes et al., arXiv:2603.19312:  loss = MSE(prediction, next embedding) + 0.09 SIGReg, where the next embedding gets
gradients too: neither a stop-gradient nor a moving average.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.conditional_predictor import ConditionalPredictor, ConditionalPredictorConfig
from ..models.encoder import VisionTransformerConfig
from ..nn.batch_norm import GlobalBatchNorm
from ..nn.block import at_least_float32
from ..nn.sigreg import SIGReg
from .lejepa import SIGRegConfig
from .world_model import Observations, PlanningConfig, PositionProbe, check_batch, check_channels


@dataclass(frozen=True, kw_only=True)
class LeWorldModelConfig:
    encoder: VisionTransformerConfig = field(default_factory=lambda: VisionTransformerConfig(
        image_size=224, patch_size=14, embed_dim=192, depth=12, num_heads=3, positions="learned", class_token=True))
    predictor: ConditionalPredictorConfig = field(default_factory=ConditionalPredictorConfig)
    action_dim: int = 10                        # a block of 5 actions
    embed_dim: int = 192                        # of what is predicted
    projector_dim: int = 2048                   # hidden width of both projectors, batch-normed
    lamb: float = 0.09                          # weight of SIGReg
    sigreg: SIGRegConfig = field(default_factory=SIGRegConfig)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of the observations' channels, in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    position_mean: tuple[float, float] = (112.0, 112.0)  # of positions, for the probe
    position_std: tuple[float, float] = (50.0, 50.0)
    planning: PlanningConfig = field(default_factory=lambda: PlanningConfig(
        horizon=5, num_samples=300, num_iterations=30, num_elites=30, std=1.0, num_executed=5, distance="last"))

    def __post_init__(self):
        check_channels(self.mean, self.std, self.encoder.in_chans)
        if self.lamb < 0:
            raise ValueError(f"lamb must be at least 0, got {self.lamb}")

    def build(self) -> "LeWorldModel":
        return LeWorldModel(self)


class LeWorldModel(nn.Module):
    def __init__(self, config: LeWorldModelConfig):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.observations = Observations(config.mean, config.std)
        self.encoder = config.encoder.build()
        self.projector = _projector(config.encoder.num_features, config.projector_dim, D)
        self.action_encoder = nn.Sequential(nn.Linear(config.action_dim, config.action_dim),
                                            nn.Linear(config.action_dim, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))
        self.predictor = ConditionalPredictor(config.predictor, D)
        self.prediction_projector = _projector(D, config.projector_dim, D)
        # as official on one GPU; the statistic of the global batch, which official runs on several GPUs lack
        self.sigreg = SIGReg.from_preset("lewm", num_slices=config.sigreg.num_slices, t_max=config.sigreg.t_max,
                                         num_knots=config.sigreg.num_knots, scale="N_global", process_group="auto")
        self.probe = PositionProbe(D, config.position_mean, config.position_std)

    def prepare(self, batch: dict, *, seed: int, step: int, first_sample: int) -> dict:
        return batch

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """observations uint8 [B, T, C, H, W], actions [B, T - 1, A], positions [B, T, 2] -> the loss and its terms."""
        frames, actions = batch["observations"], batch["actions"]
        check_batch(frames, actions, self.config.action_dim, at_least=2)
        states = at_least_float32(self.encode(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])
        prediction = F.mse_loss(self.next_states(states[:, :-1], actions), states[:, 1:])
        sigreg = self.sigreg(states.transpose(0, 1))
        probe_loss, rmse = self.probe.loss(states, batch["positions"])
        return {"loss": prediction + self.config.lamb * sigreg + probe_loss, "prediction": prediction.detach(),
                "sigreg": sigreg.detach(), "position_rmse": rmse, "features": states.detach().flatten(0, 1)}

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames [N, C, H, W] -> states [N, D], all in one pass."""
        return self.projector(self.encoder.features(self.observations(frames)))

    def next_states(self, states: Tensor, actions: Tensor) -> Tensor:
        """States [B, T, D] and the actions [B, T, A] taken in them -> the states after these [B, T, D]; T <= history."""
        predicted = self.predictor(states, self.action_encoder(actions))
        return at_least_float32(self.prediction_projector(predicted.flatten(0, 1))).view_as(states)

    def predict(self, state: Tensor, actions: Tensor) -> Iterator[Tensor]:
        """States [N, D] after each of actions [N, T, A], one by one, from the last `history` states and actions."""
        states, history = state[:, None], self.config.predictor.history
        for step in range(actions.shape[1]):
            first = max(0, step + 1 - history)
            following = self.next_states(states, actions[:, first:step + 1])[:, -1:]
            states = torch.cat([states, following], dim=1)[:, -history:]
            yield following[:, 0]

    def averages(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def roles(self) -> dict[str, nn.Module]:
        model = [self.encoder, self.projector, self.action_encoder, self.predictor, self.prediction_projector]
        return {"model": nn.ModuleList(model), "probe": self.probe}

    def evaluation_encoder(self) -> nn.Module:
        return self.encoder


def _projector(in_features: int, hidden: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, hidden), GlobalBatchNorm(hidden), nn.GELU(), nn.Linear(hidden, out_features))
