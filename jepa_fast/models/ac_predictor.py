"""V-JEPA 2-AC's predictor: the next frame's representation from all frames, actions and states so far.

arXiv:2506.09985, section 3. The tokens of a frame are its action, its state and its patches; they see each other and all
frames before, so the keys and values of a frame never change and a rollout computes each frame once (`extend`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..nn.block import Block, Sequences
from ..nn.init import init_vit_, rescale_blocks_
from ..nn.rotary import axis_widths, grid_positions, rotary_table


@dataclass(frozen=True, kw_only=True)
class ACPredictorConfig:
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    action_dim: int = 7                   # of actions and of states
    use_extrinsics: bool = False          # a token of the camera's pose (6) after the state's
    angle_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: round angles as the official code under autocast

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and {self.num_heads}")


class ACPredictor(nn.Module):
    """Frame-causal predictor over n = rows x columns patches per frame; parameter names are the official ones."""

    def __init__(self, config: ACPredictorConfig, encoder_dim: int, grid: tuple[int, int]):
        super().__init__()
        D, A = config.embed_dim, config.action_dim
        self.config, self.grid = config, grid
        self.num_conditions = 3 if config.use_extrinsics else 2
        self.predictor_embed = nn.Linear(encoder_dim, D)
        self.action_encoder = nn.Linear(A, D)
        self.state_encoder = nn.Linear(A, D)
        self.extrinsics_encoder = nn.Linear(A - 1, D)
        self.predictor_blocks = nn.ModuleList(Block(D, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.predictor_norm = nn.LayerNorm(D, eps=1e-6)
        self.predictor_proj = nn.Linear(D, encoder_dim)
        init_vit_(self)
        rescale_blocks_(self.predictor_blocks)
        # in the official files, but without extrinsics nothing reaches it
        self.extrinsics_encoder.requires_grad_(config.use_extrinsics)

    @property
    def frame_size(self) -> int:
        """Tokens of a frame."""
        return self.num_conditions + self.grid[0] * self.grid[1]

    def forward(self, features: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None = None) -> Tensor:
        """features [B, T, n, D_encoder], actions and states [B, T, A], extrinsics [B, T, A - 1] -> the frame after each
        of the T, [B, T, n, D_encoder]."""
        return self.forward_and_keep(features, actions, states, extrinsics, num_frames=0)[0]

    def forward_and_keep(self, features: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None = None, *,
                         num_frames: int) -> tuple[Tensor, list[Tensor]]:
        """forward(...), and each block's keys and values of the first `num_frames` frames, for `extend`."""
        x = self._tokens(features, actions, states, extrinsics)
        sequences = self._sequences(*x.shape[:2], 0)
        (B, T), x, kept = x.shape[:2], x.flatten(0, 2), []
        for block in self.predictor_blocks:
            x, block_kept = block.forward_and_keep(x, sequences, num_frames * self.frame_size)
            kept.append(block_kept)
        return self._predictions(x, B, T), kept

    def extend(self, features: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None = None, *,
               kept: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """forward(...) at T further frames, after those whose keys and values are `kept` (None: none); and what is kept
        of them all. Gradients flow into both."""
        x = self._tokens(features, actions, states, extrinsics)
        B, T = x.shape[:2]
        before = 0 if kept is None else kept[0].shape[1] // self.frame_size
        new, whole = self._sequences(B, T, before), self._sequences(B, before + T, 0)
        x, extended = x.flatten(0, 2), []
        for i, block in enumerate(self.predictor_blocks):
            x, block_kept = block.extend(x, None if kept is None else kept[i], new, whole)
            extended.append(block_kept)
        return self._predictions(x, B, T), extended

    def _tokens(self, features: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None) -> Tensor:
        """[B, T, frame_size, D]: action, state, extrinsics where used, patches."""
        self._check(features, actions, states, extrinsics)
        conditions = [self.action_encoder(actions), self.state_encoder(states)]
        if self.config.use_extrinsics:
            conditions.append(self.extrinsics_encoder(extrinsics))
        return torch.cat([torch.stack(conditions, 2), self.predictor_embed(features)], 2)

    def _predictions(self, x: Tensor, B: int, T: int) -> Tensor:
        x = x.view(B, T, self.frame_size, -1)[:, :, self.num_conditions:]
        return self.predictor_proj(self.predictor_norm(x))

    def _sequences(self, B: int, T: int, first_frame: int) -> Sequences:
        rotary = self._rotary(T, first_frame).repeat(B, 1, 1)
        return Sequences.uniform(B, T * self.frame_size, rotary.device, rotary, self.frame_size)

    def _rotary(self, T: int, first_frame: int) -> Tensor:
        """[T * frame_size, 2, R]: patches at (frame, row, column), conditions at (frame, 0, 0), which turns only time.

        Officially columns are scaled to as many as there are rows; on a square grid that is nothing.
        """
        rows, columns = self.grid
        weight = self.predictor_embed.weight
        patches = grid_positions((T, rows, columns), device=weight.device).view(T, rows * columns, 3)
        patches = patches * torch.tensor([1.0, 1.0, rows / columns], device=weight.device)
        conditions = patches[:, :1] * torch.tensor([1.0, 0.0, 0.0], device=weight.device)
        positions = torch.cat([conditions.expand(-1, self.num_conditions, -1), patches], 1)
        positions[..., 0] += first_frame
        dtype = torch.float64 if weight.dtype == torch.float64 else getattr(torch, self.config.angle_dtype)
        widths = axis_widths(self.config.embed_dim // self.config.num_heads)
        return rotary_table(positions.flatten(0, 1), widths, "tiled", angle_dtype=dtype)

    def _check(self, features: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None) -> None:
        n, width, A = self.grid[0] * self.grid[1], self.predictor_embed.in_features, self.config.action_dim
        if features.dim() != 4 or features.shape[2:] != (n, width):
            raise ValueError(f"features must be [B, T, {n}, {width}], got {list(features.shape)}")
        expected = {"actions": (actions, A), "states": (states, A)}
        if self.config.use_extrinsics or extrinsics is not None:
            expected["extrinsics"] = (extrinsics, A - 1)
        for name, (value, size) in expected.items():
            shape = None if value is None else list(value.shape)
            if shape != [*features.shape[:2], size]:
                raise ValueError(f"{name} must be [B, T, {size}] = {[*features.shape[:2], size]}, got {shape}")
        if extrinsics is not None and not self.config.use_extrinsics:
            raise ValueError("extrinsics are given but predictor.use_extrinsics is False")
