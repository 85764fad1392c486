"""The V-JEPA 2 step written plainly, the way the official code does it: the baseline of `bench video-step`.

An own writing after a description of that code, to be honest about what it does: the encoder and the predictor run once
per kind of mask, each over a convolution of the whole clip; rotary angles, sines and cosines are made anew in every
layer, for queries and keys, axis by axis, for every head; the predictor sorts its tokens sample by sample and undoes it;
every block is recomputed in the backward pass (activation checkpointing is on in all published configurations); targets
are picked by an index expanded to the width; AdamW and the moving average run over lists of tensors. Attention is
PyTorch's, as there. Modules carry the official parameter names, so the same weights go into both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_fast.objectives.video_prediction import VideoPrediction, VideoPredictionConfig

from .official_style import Mlp, pick


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, H, N, n], positions [B, H, N]: the tiled map of one axis."""
    n = x.shape[-1]
    omega = torch.arange(n // 2, dtype=x.dtype, device=x.device) / (n / 2)
    angles = torch.einsum("...,f->...f", positions.to(x.dtype), 1.0 / 10000**omega)
    sin, cos = angles.sin().repeat(1, 1, 1, 2), angles.cos().repeat(1, 1, 1, 2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int, int]):
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.axis = 2 * (dim // num_heads // 3 // 2)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        B, N, D = x.shape
        _, rows, columns = self.grid
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        ids = torch.arange(N, device=x.device).view(1, N) if ids is None else ids
        ids = ids.unsqueeze(1).repeat(B // ids.shape[0], self.num_heads, 1)
        frame = ids // (rows * columns)
        row = (ids - frame * rows * columns) // columns
        column = ids - frame * rows * columns - row * columns
        turned = []
        for heads in (q, k):
            parts = [rotate(heads[..., i * self.axis:(i + 1) * self.axis], positions)
                     for i, positions in enumerate((frame, row, column))]
            turned.append(torch.cat([*parts, heads[..., 3 * self.axis:]], dim=-1))
        out = F.scaled_dot_product_attention(*turned, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, grid: tuple[int, int, int]):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads, grid)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), ids)
        return x + self.mlp(self.norm2(x))


def run(blocks: nn.ModuleList, x: Tensor, ids: Tensor | None, is_checkpointed: bool) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, ids, use_reentrant=False) if is_checkpointed else block(x, ids)
    return x


class PatchEmbed3D(nn.Module):
    def __init__(self, config):
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, kernel, kernel)


class Encoder(nn.Module):
    def __init__(self, config, is_checkpointed: bool):
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.patch_embed = PatchEmbed3D(config)
        self.blocks = nn.ModuleList(Block(config.embed_dim, config.num_heads, config.mlp_ratio, config.grid)
                                    for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)

    def forward(self, clips: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.patch_embed.proj(clips).flatten(2).transpose(1, 2)
        if context is not None:
            x = pick(x, context)
        return self.norm(run(self.blocks, x, context, self.is_checkpointed and torch.is_grad_enabled()))


class Predictor(nn.Module):
    def __init__(self, config: VideoPredictionConfig, is_checkpointed: bool):
        super().__init__()
        self.is_checkpointed = is_checkpointed
        predictor, encoder = config.predictor, config.encoder
        dim, heads = predictor.embed_dim, predictor.num_heads or encoder.num_heads
        self.num_tokens = torch.Size(encoder.grid).numel()
        self.predictor_embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, dim) for _ in range(predictor.num_mask_tokens))
        self.predictor_blocks = nn.ModuleList(Block(dim, heads, predictor.mlp_ratio, encoder.grid)
                                              for _ in range(predictor.depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder.embed_dim)

    def forward(self, x: Tensor, context: Tensor, target: Tensor) -> Tensor:
        x = self.predictor_embed(x)
        B, num_context, _ = x.shape
        masks = pick(self.mask_tokens[0].repeat(B, self.num_tokens, 1), target)
        ids = torch.cat([context, target], dim=1)
        order = ids.argsort(dim=1)
        ids = torch.stack([ids[i, row] for i, row in enumerate(order)])
        x = torch.cat([x, masks], dim=1)
        x = torch.stack([x[i, row] for i, row in enumerate(order)])
        x = self.predictor_norm(run(self.predictor_blocks, x, ids, self.is_checkpointed))
        x = torch.stack([x[i, row] for i, row in enumerate(order.argsort(dim=1))])
        return self.predictor_proj(x[:, num_context:])


class OfficialStyleVideoStep:
    """One training step on one clip length; the same arithmetic as ours, in the official order of operations."""

    def __init__(self, config: VideoPredictionConfig, lr: float, weight_decay: float, momentum: float, *,
                 is_checkpointed: bool = True):
        self.encoder = Encoder(config.encoder, is_checkpointed)
        self.target_encoder = Encoder(config.encoder, False).requires_grad_(False)
        self.predictor = Predictor(config, is_checkpointed)
        self.momentum = momentum
        models = (self.encoder, self.predictor)
        weights = [[p for n, p in m.named_parameters() if "bias" not in n and p.ndim != 1] for m in models]
        others = [[p for n, p in m.named_parameters() if "bias" in n or p.ndim == 1] for m in models]
        groups = [{"params": g, "weight_decay": weight_decay} for g in weights]
        self.optimizer = torch.optim.AdamW(groups + [{"params": g, "weight_decay": 0.0} for g in others], lr=lr)

    def load(self, objective: VideoPrediction) -> None:
        """Take the weights of a `VideoPrediction`."""
        self.encoder.load_state_dict(objective.encoder.state_dict())
        self.predictor.load_state_dict(objective.predictor.state_dict())
        self.target_encoder.load_state_dict(objective.target_encoder.encoder.state_dict())

    def loss(self, clips: Tensor, contexts: list[Tensor], targets: list[Tensor]) -> Tensor:
        with torch.no_grad():
            h = self.target_encoder(clips)
            h = F.layer_norm(h, (h.shape[-1],))
            h = [pick(h, target) for target in targets]
        loss = 0.0
        for context, target, label in zip(contexts, targets, h, strict=True):
            z = self.predictor(self.encoder(clips, context), context, target)
            loss = loss + torch.mean(torch.abs(z - label) ** 1.0) / 1.0
        return loss / len(h)

    def step(self, clips: Tensor, contexts: list[Tensor], targets: list[Tensor]) -> float:
        loss = self.loss(clips, contexts, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            sources, averages = list(self.encoder.parameters()), list(self.target_encoder.parameters())
            torch._foreach_mul_(averages, self.momentum)
            torch._foreach_add_(averages, sources, alpha=1 - self.momentum)
        return float(loss.detach())
