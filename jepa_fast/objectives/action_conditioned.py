"""V-JEPA 2-AC: predict the next frame's representation under a frozen encoder from frames, actions and states.

arXiv:2506.09985, section 3. Loss: the mean absolute difference of teacher-forced predictions, from the true frames so
far, plus that of a rollout of `auto_steps` steps, from its own predictions. Frame 0 of the rollout is frame 0 of teacher
forcing, so its keys and values are taken from there: each frame is computed once.
"""

import functools
import pathlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.ac_predictor import ACPredictor, ACPredictorConfig
from ..models.video_encoder import VideoTransformer, VideoTransformerConfig
from ..nn.block import at_least_float32
from ..nn.fingerprint import fingerprint
from ..ops import latent_loss


@dataclass(frozen=True, kw_only=True)
class ActionConditionedConfig:
    encoder: VideoTransformerConfig = field(default_factory=lambda: VideoTransformerConfig(positions="rotary"))
    predictor: ACPredictorConfig = field(default_factory=ACPredictorConfig)
    encoder_weights: str = ""              # V-JEPA 2 checkpoint of the frozen encoder; "random": none, for tests
    encoder_key: str = "target_encoder"    # its entry there
    auto_steps: int = 2                    # steps of the rollout

    def __post_init__(self):
        if self.auto_steps < 1:
            raise ValueError(f"auto_steps must be at least 1, got {self.auto_steps}")

    def build(self) -> "ActionConditioned":
        return ActionConditioned(self)


class ActionConditioned(nn.Module):
    def __init__(self, config: ActionConditionedConfig):
        super().__init__()
        self.config = config
        self.encoder: VideoTransformer = config.encoder.build().requires_grad_(False)
        self.predictor = ACPredictor(config.predictor, config.encoder.embed_dim, config.encoder.grid[1:])
        # on the meta device there is nothing to load into: parameters are only counted
        if config.encoder_weights != "random" and next(self.encoder.parameters()).device.type != "meta":
            load_encoder_(self.encoder, config.encoder_weights, config.encoder_key)

    def prepare(self, batch: dict, *, seed: int, step: int, first_sample: int) -> dict:
        return batch

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.encoder, self.config.encoder)

    def encoder_name(self) -> str:
        """Whose features `encode` gives here: settings, weights, precision."""
        device = next(self.encoder.parameters()).device.type
        return f"{self._fingerprint} {'autocast' if torch.is_autocast_enabled(device) else 'as it is'}"

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """{"clips": [B, C, T, H, W] or "features": [B, T, n, D] of "encoder", "actions": [B, T - 1, A], "states": [B, T, A]}
        -> {"loss": 0-dim, its two terms, scalars and features to watch}."""
        if "features" in batch and batch.get("encoder") != self.encoder_name():
            raise ValueError(f"the feature cache is of encoder {batch.get('encoder')!r}, this one is "
                             f"{self.encoder_name()!r}: write it again")
        tokens = batch["features"] if "features" in batch else self.encode(batch["clips"])
        self._check(tokens, batch["actions"], batch["states"])
        forced, rollout = self.predict(tokens, batch["actions"], batch["states"], batch.get("extrinsics"))
        loss_forced, statistics = _distance(forced, tokens[:, 1:], return_stats=True)
        loss_rollout = _distance(rollout, tokens[:, 1:1 + self.config.auto_steps])
        return {"loss": loss_forced + loss_rollout, "loss_teacher_forcing": loss_forced.detach(),
                "loss_rollout": loss_rollout.detach(), **statistics, "features": forced.detach().flatten(0, 2)}

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """clips [B, C, T, H, W] -> tokens [B, T, n, D], each frame alone, as a clip of that frame twice.

        The patch kernel summed over time does that without the copies: equal but for the order of one sum.
        """
        if clips.dim() != 5:
            raise ValueError(f"clips must be [B, C, T, H, W], got {list(clips.shape)}")
        B, T = clips.shape[0], clips.shape[2]
        tokens = self.encoder.frames(clips.transpose(1, 2).flatten(0, 1))
        return at_least_float32(tokens).view(B, T, *tokens.shape[1:])

    def predict(self, tokens: Tensor, actions: Tensor, states: Tensor,
                extrinsics: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens [B, T, n, D] -> layer-normalised predictions of frames 1 .. T - 1 (teacher forcing), and of frames
        1 .. auto_steps (rollout)."""
        features, steps = normalise(tokens), self.config.auto_steps
        camera = (lambda frames: None) if extrinsics is None else (lambda frames: extrinsics[:, frames])
        before = slice(0, tokens.shape[1] - 1)
        forced, kept = self.predictor.forward_and_keep(features[:, before], actions, states[:, before], camera(before),
                                                       num_frames=1 if steps > 1 else 0)
        forced = normalise(forced)
        rollout = [forced[:, :1]]
        for k in range(1, steps):
            now = slice(k, k + 1)
            prediction, kept = self.predictor.extend(rollout[-1], actions[:, now], states[:, now], camera(now), kept=kept)
            rollout.append(normalise(prediction))
        return forced, torch.cat(rollout, 1)

    def averages(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def roles(self) -> dict[str, nn.Module]:
        """The predictor alone: the official optimizer also holds an encoder that nothing uses."""
        return {"predictor": self.predictor}

    def evaluation_encoder(self) -> nn.Module:
        return self.encoder

    def _check(self, tokens: Tensor, actions: Tensor, states: Tensor) -> None:
        A = self.config.predictor.action_dim
        B, T = tokens.shape[:2]
        if T < self.config.auto_steps + 1:
            raise ValueError(f"clips must have at least auto_steps + 1 = {self.config.auto_steps + 1} frames, got {T}")
        for name, value, shape in (("actions", actions, (B, T - 1, A)), ("states", states, (B, T, A))):
            if value.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} for {T} frames, got {list(value.shape)}")


def normalise(tokens: Tensor) -> Tensor:
    """Layer norm over D without weight and bias, epsilon 1e-5, in float32 at least: official `normalize_reps`."""
    tokens = at_least_float32(tokens)
    return F.layer_norm(tokens, tokens.shape[-1:])


def _distance(prediction: Tensor, tokens: Tensor, return_stats: bool = False):
    """Mean absolute difference of [B, T, n, D] from the layer-normalised `tokens`."""
    return latent_loss(prediction.flatten(0, 2), tokens.flatten(0, 2), beta=0.0, return_stats=return_stats)


def load_encoder_(encoder: VideoTransformer, path: str, key: str) -> None:
    """Put the encoder of an official V-JEPA 2 checkpoint into ours, strictly; its unused position table is left out."""
    if not path:
        raise ValueError("objective.encoder_weights is empty: pass --objective.encoder-weights FILE, the V-JEPA 2 "
                         'checkpoint of the frozen encoder, or "random" to try things out')
    if not pathlib.Path(path).is_file():
        raise ValueError(f"objective.encoder_weights: no such file: {path}")
    roles = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if key not in roles:
        raise ValueError(f"{path} has no {key}; it holds {', '.join(map(str, roles))}")
    theirs = {name.replace("module.", "").replace("backbone.", ""): value for name, value in roles[key].items()}
    theirs.pop("pos_embed", None)
    ours = encoder.state_dict()
    for name in [*ours, *theirs]:
        sizes = ["absent" if name not in side else str(list(side[name].shape)) for side in (theirs, ours)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{path}: {key} {name} is {sizes[0]} in the file and {sizes[1]} in the model")
    encoder.load_state_dict(theirs)
