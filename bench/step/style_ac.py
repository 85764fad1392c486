"""V-JEPA 2-AC's models in plain PyTorch.

Officially each frame is doubled into a clip, condition tokens go through the projection of queries, keys and values one
kind at a time, attention has a dense mask, and the rollout computes its first frame again; a second encoder that nothing
uses stays in memory. Tuned, one projection takes all tokens.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .style_blocks import Attention, Ids, Manner, Tables, blocks, rotate, run, tables
from .style_video import Encoder

CONDITIONS = 2  # tokens of a frame before its patches: action, state


class ActionAttention(Attention):
    """The official way: condition tokens apart, rotated in time only."""

    def forward(self, x: Tensor, positions: Ids, mask: Tensor | None = None) -> Tensor:
        B, N, D = x.shape
        T = positions.grid[0]
        x = x.view(B, T, -1, D)
        frames, pieces = torch.arange(T, device=x.device), []
        for i in range(CONDITIONS):
            q, k, v = self._heads(x[:, :, i])
            axis = 2 * (q.shape[-1] // 3 // 2)
            q, k = (torch.cat([rotate(t[..., :axis], frames), t[..., axis:]], -1) for t in (q, k))
            pieces.append([t.unsqueeze(3) for t in (q, k, v)])
        q, k, v = self._heads(x[:, :, CONDITIONS:].flatten(1, 2))
        q, k = positions.turn(q, k)
        pieces.append([t.unflatten(2, (T, -1)) for t in (q, k, v)])
        q, k, v = (torch.cat(parts, 3).flatten(2, 3) for parts in zip(*pieces, strict=True))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))

    def _heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class Predictor(nn.Module):
    def __init__(self, config, encoder, manner: Manner):
        super().__init__()
        self.manner, self.grid, D = manner, encoder.grid[1:], config.embed_dim
        self.width = D // config.num_heads
        self.predictor_embed = nn.Linear(encoder.embed_dim, D)
        self.action_encoder = nn.Linear(config.action_dim, D)
        self.state_encoder = nn.Linear(config.action_dim, D)
        self.extrinsics_encoder = nn.Linear(config.action_dim - 1, D)
        self.predictor_blocks = blocks(config, D, config.num_heads, manner,
                                       Attention if manner.makes_tables else ActionAttention)
        self.predictor_norm = nn.LayerNorm(D, eps=1e-6)
        self.predictor_proj = nn.Linear(D, encoder.embed_dim)

    def forward(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """z [B, T * n, D] -> the frame after each, [B, T * n, D]."""
        (B, T), n = actions.shape[:2], self.grid[0] * self.grid[1]
        conditions = [self.action_encoder(actions).unsqueeze(2), self.state_encoder(states).unsqueeze(2)]
        x = torch.cat([*conditions, self.predictor_embed(z).view(B, T, n, -1)], dim=2).flatten(1, 2)
        frame = torch.arange(T, device=x.device).repeat_interleave(n + CONDITIONS)
        mask = frame.unsqueeze(1) >= frame
        x = run(self.predictor_blocks, x, self.manner, self._positions(T, x), mask)
        x = x.view(B, T, n + CONDITIONS, -1)[:, :, CONDITIONS:].flatten(1, 2)
        return self.predictor_proj(self.predictor_norm(x))

    def _positions(self, T: int, x: Tensor) -> Tables | Ids:
        rows, columns = self.grid
        if not self.manner.makes_tables:
            return Ids(None, (T, rows, columns))
        patches = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in (T, rows, columns)))
        patches = patches.view(T, rows * columns, 3)
        conditions = patches[:, :1] * torch.tensor([1, 0, 0], device=x.device)
        positions = torch.cat([conditions.expand(-1, CONDITIONS, -1), patches], 1).flatten(0, 1)
        is_half = torch.is_autocast_enabled(x.device.type)
        made = tables(positions, self.width, torch.bfloat16 if is_half else torch.float32)
        return Tables(made.cos.squeeze(0), made.sin.squeeze(0))


class ActionStep(nn.Module):
    def __init__(self, objective, manner: Manner):
        super().__init__()
        self.auto_steps = objective.auto_steps
        self.encoder = Encoder(objective.encoder, manner).requires_grad_(False)
        self.unused_encoder = None if manner.makes_tables else copy.deepcopy(self.encoder)
        self.predictor = Predictor(objective.predictor, objective.encoder, manner)
        self.frame_tokens = objective.encoder.grid[1] * objective.encoder.grid[2]

    @torch.no_grad()
    def targets(self, clips: Tensor) -> Tensor:
        B, _, T = clips.shape[:3]
        frames = clips.permute(0, 2, 1, 3, 4).flatten(0, 1).unsqueeze(2).repeat(1, 1, 2, 1, 1)
        h = self.encoder(frames).view(B, T * self.frame_tokens, -1)
        return F.layer_norm(h, h.shape[-1:])

    def loss(self, batch: dict, masks: dict) -> Tensor:
        h, actions, states, n = self.targets(batch["clips"]), batch["actions"], batch["states"], self.frame_tokens
        forced = self.step(h[:, :-n], actions, states[:, :-1])
        z = torch.cat([h[:, :n], forced[:, :n]], dim=1)
        for k in range(2, self.auto_steps + 1):
            z = torch.cat([z, self.step(z, actions[:, :k], states[:, :k])[:, -n:]], dim=1)
        rollout = z[:, n:]
        return F.l1_loss(forced, h[:, n:]) + F.l1_loss(rollout, h[:, n:n + rollout.shape[1]])

    def step(self, z: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        z = self.predictor(z, actions, states)
        return F.layer_norm(z, z.shape[-1:])
