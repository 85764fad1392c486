"""The I-JEPA step written plainly, the way the official code does it: the baseline of `bench step`.

An own writing after a description of that code, to be honest about what it does: unfused attention that returns its
probabilities, one convolution over all patches before the kept ones are picked by an index expanded to the width,
tables and mask tokens repeated over the batch, context copied for every target block, per-weight gradient norms read on
the host, AdamW, and the moving average tensor by tensor. Modules carry the official parameter names, so the same
weights go into both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.objectives.latent_prediction import LatentPredictionConfig


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        probabilities = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((probabilities @ v).transpose(1, 2).reshape(B, N, D)), probabilities


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attn(self.norm1(x))
        x = x + out
        return x + self.mlp(self.norm2(x))


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, D], index [B, K] -> [B, K, D] through an index as wide as the rows."""
    return torch.gather(x, 1, index.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def pick_lists(x: Tensor, lists: list[Tensor]) -> Tensor:
    return torch.cat([pick(x, index) for index in lists], dim=0)


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, config.embed_dim)
        rows, columns = config.grid
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, config.embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config.embed_dim, config.num_heads, config.mlp_ratio)
                                    for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)

    def forward(self, images: Tensor, context: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        if context is not None:
            x = pick_lists(x, context)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self, config: LatentPredictionConfig):
        super().__init__()
        dim, encoder = config.predictor.embed_dim, config.encoder
        self.predictor_embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        rows, columns = encoder.grid
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, rows * columns, dim), requires_grad=False)
        heads = config.predictor.num_heads or encoder.num_heads
        self.predictor_blocks = nn.ModuleList(Block(dim, heads, config.predictor.mlp_ratio)
                                              for _ in range(config.predictor.depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder.embed_dim)

    def forward(self, context_tokens: Tensor, context: list[Tensor], target: list[Tensor]) -> Tensor:
        B = context[0].shape[0]
        x = self.predictor_embed(context_tokens)
        x = x + pick_lists(self.predictor_pos_embed.repeat(B, 1, 1), context)
        num_context = x.shape[1]
        masks = pick_lists(self.predictor_pos_embed.repeat(B, 1, 1), target)
        masks = self.mask_token.repeat(masks.shape[0], masks.shape[1], 1) + masks
        x = torch.cat([x.repeat(len(target), 1, 1), masks], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, num_context:])


class OfficialStyleStep:
    """One training step on one context list; the same arithmetic as ours, in the official order of operations."""

    def __init__(self, config: LatentPredictionConfig, lr: float, weight_decay: float, momentum: float):
        self.encoder, self.target_encoder = Encoder(config.encoder), Encoder(config.encoder)
        self.predictor = Predictor(config)
        self.target_encoder.requires_grad_(False)
        self.momentum = momentum
        models = (self.encoder, self.predictor)
        weights = [[p for n, p in m.named_parameters() if "bias" not in n and p.ndim != 1] for m in models]
        others = [[p for n, p in m.named_parameters() if "bias" in n or p.ndim == 1] for m in models]
        groups = [{"params": g, "weight_decay": weight_decay} for g in weights]
        self.optimizer = torch.optim.AdamW(groups + [{"params": g, "weight_decay": 0.0} for g in others], lr=lr)

    def load(self, objective) -> None:
        """Take the weights of a `LatentPrediction`."""
        self.encoder.load_state_dict(objective.encoder.state_dict())
        self.predictor.load_state_dict(objective.predictor.state_dict())
        self.target_encoder.load_state_dict(objective.target_encoder.encoder.state_dict())

    def loss(self, images: Tensor, context: list[Tensor], target: list[Tensor]) -> Tensor:
        with torch.no_grad():
            h = self.target_encoder(images)
            h = pick_lists(F.layer_norm(h, (h.shape[-1],)), target)
        z = self.predictor(self.encoder(images, context), context, target)
        return F.smooth_l1_loss(z, h)

    def step(self, images: Tensor, context: list[Tensor], target: list[Tensor]) -> float:
        loss = self.loss(images, context, target)
        loss.backward()
        self.optimizer.step()
        # the gradient logger of the official loop reads one norm per weight of the encoder
        for name, parameter in self.encoder.named_parameters():
            if parameter.grad is not None and not (name.endswith(".bias") or parameter.ndim == 1):
                float(torch.norm(parameter.grad))
        self.optimizer.zero_grad()
        with torch.no_grad():
            for q, k in zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True):
                k.mul_(self.momentum).add_((1.0 - self.momentum) * q)
        return float(loss.detach())
