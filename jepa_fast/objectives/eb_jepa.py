"""EB-JEPA with actions: a recurrent world model from pixels, kept from collapsing by VICReg's terms and inverse dynamics.

Two-Rooms of facebookresearch/eb_jepa, after PLDM, arXiv:2502.14819:
    loss = prediction + 16 std + 8 cov + 12 similarity + 1 inverse dynamics,
where the predictor unrolls from the first frame and both sides of the prediction error get gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.impala import ImpalaConfig
from ..nn.block import at_least_float32
from ..nn.init import init_vit_
from ..nn.vicreg import all_rows, covariance, hinge_std, temporal_similarity
from .world_model import Observations, PlanningConfig, PositionProbe, check_batch, check_channels


@dataclass(frozen=True, kw_only=True)
class EBJEPAConfig:
    encoder: ImpalaConfig = field(default_factory=ImpalaConfig)
    action_dim: int = 2
    unroll: Literal["autoregressive", "parallel"] = "autoregressive"  # from the first frame; from every frame at once
    unroll_steps: int = 8                       # predictions in a row
    std_weight: float = 16.0                    # standard deviations below std_margin
    std_margin: float = 1.0
    cov_weight: float = 8.0                     # covariances
    similarity_weight: float = 12.0             # change from frame to frame
    inverse_dynamics_weight: float = 1.0        # the action from the two frames around it; 0: no such model
    inverse_dynamics_dim: int = 256             # hidden width of that model
    mean: tuple[float, ...] = (0.0026, 0.0989)  # of the observations' channels, in [0, 1]
    std: tuple[float, ...] = (0.0369, 0.2986)
    position_mean: tuple[float, float] = (31.5863, 32.0618)  # of positions, for the probe
    position_std: tuple[float, float] = (16.1025, 16.1353)
    planning: PlanningConfig = field(default_factory=PlanningConfig)

    def __post_init__(self):
        if self.unroll_steps < 1:
            raise ValueError(f"unroll_steps must be at least 1, got {self.unroll_steps}")
        check_channels(self.mean, self.std, self.encoder.in_chans)

    def build(self) -> "EBJEPA":
        return EBJEPA(self)


class EBJEPA(nn.Module):
    def __init__(self, config: EBJEPAConfig):
        super().__init__()
        self.config = config
        D = config.encoder.num_outputs
        self.observations = Observations(config.mean, config.std)
        self.encoder = config.encoder.build()
        # the state is the hidden state: GRU, then the encoder's own last norm
        self.predictor = nn.GRUCell(config.action_dim, D)
        if config.inverse_dynamics_weight > 0:
            width = config.inverse_dynamics_dim
            self.inverse_dynamics = nn.Sequential(nn.Linear(2 * D, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                                  nn.Linear(width, config.action_dim))
            init_vit_(self.inverse_dynamics)
        self.probe = PositionProbe(D, config.position_mean, config.position_std)

    def prepare(self, batch: dict, *, seed: int, step: int, first_sample: int) -> dict:
        return batch

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """observations uint8 [B, T, C, H, W], actions [B, T - 1, A], positions [B, T, 2] -> the loss and its terms."""
        frames, actions, config = batch["observations"], batch["actions"], self.config
        check_batch(frames, actions, config.action_dim, at_least=config.unroll_steps + 1)
        states = at_least_float32(self.encode(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])
        rows = all_rows(states.flatten(0, 1))
        terms = {"prediction": self.prediction_error(states, actions), "std": hinge_std(rows, config.std_margin),
                 "cov": covariance(rows), "similarity": temporal_similarity(states.transpose(0, 1))}
        loss = (terms["prediction"] + config.std_weight * terms["std"] + config.cov_weight * terms["cov"]
                + config.similarity_weight * terms["similarity"])
        if config.inverse_dynamics_weight > 0:
            pairs = torch.cat([states[:, :-1], states[:, 1:]], dim=-1)
            terms["inverse_dynamics"] = F.mse_loss(at_least_float32(self.inverse_dynamics(pairs)), actions)
            loss = loss + config.inverse_dynamics_weight * terms["inverse_dynamics"]
        probe_loss, terms["position_rmse"] = self.probe.loss(states, batch["positions"])
        return {"loss": loss + probe_loss, **{name: term.detach() for name, term in terms.items()},
                "features": states.detach().flatten(0, 1)}

    def prediction_error(self, states: Tensor, actions: Tensor) -> Tensor:
        """Mean squared error of the 1- to `unroll_steps`-step predictions of states [B, T, D], averaged over steps."""
        num_steps, total = self.config.unroll_steps, 0.0
        if self.config.unroll == "autoregressive":
            for step, prediction in enumerate(self.predict(states[:, 0], actions[:, :num_steps])):
                total = total + F.mse_loss(prediction, states[:, step + 1])
            return total / num_steps
        prediction = states
        for step in range(num_steps):
            prediction = self.step(prediction[:, :-1].flatten(0, 1), actions[:, step:].flatten(0, 1))
            prediction = prediction.view(len(states), -1, states.shape[-1])
            total = total + F.mse_loss(prediction, states[:, step + 1:])
        return total / num_steps

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames [N, C, H, W] -> states [N, D], all in one pass."""
        return self.encoder(self.observations(frames))

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """States [N, D] after actions [N, A]."""
        return at_least_float32(self.encoder.norm(self.predictor(action, state)))

    def predict(self, state: Tensor, actions: Tensor) -> Iterator[Tensor]:
        """States [N, D] after each of actions [N, T, A], one by one: nothing but the last is kept here."""
        for action in actions.unbind(1):
            state = self.step(state, action)
            yield state

    def averages(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def roles(self) -> dict[str, nn.Module]:
        roles = {"encoder": self.encoder, "predictor": self.predictor}
        if self.config.inverse_dynamics_weight > 0:
            roles["inverse_dynamics"] = self.inverse_dynamics
        return roles | {"probe": self.probe}

    def evaluation_encoder(self) -> nn.Module:
        return self.encoder
