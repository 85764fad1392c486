"""V-JEPA's and V-JEPA 2's models in plain PyTorch: encoder and predictor once per kind of mask.

Officially each run of the encoder begins with a convolution over the whole clip, and V-JEPA 2's predictor sorts its tokens
sample by sample and undoes it; tuned, patches are embedded once and nothing is sorted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .style_blocks import Ids, Manner, Tables, blocks, pick, run, tables


class Patches(nn.Module):
    def __init__(self, config):
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, kernel, kernel)

    def forward(self, clips: Tensor) -> Tensor:
        return self.proj(clips).flatten(2).transpose(1, 2)


def positions_of(ids: Tensor | None, grid, width: int, x: Tensor, manner: Manner) -> Tables | Ids:
    if not manner.makes_tables:
        return Ids(ids, grid)
    _, rows, columns = grid
    ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0) if ids is None else ids
    xyz = torch.stack([ids // (rows * columns), ids // columns % rows, ids % columns], -1)
    is_half = torch.is_autocast_enabled(x.device.type)
    return tables(xyz, width, torch.bfloat16 if is_half else torch.float32)


class Encoder(nn.Module):
    def __init__(self, config, manner: Manner):
        super().__init__()
        self.config, self.manner = config, manner
        self.patch_embed = Patches(config)
        if config.positions == "sincos":
            self.pos_embed = nn.Parameter(torch.zeros(1, torch.Size(config.grid).numel(), config.embed_dim),
                                          requires_grad=False)
        self.blocks = blocks(config, config.embed_dim, config.num_heads, manner)
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)

    def embed(self, clips: Tensor) -> Tensor:
        x = self.patch_embed(clips)
        return x + self.pos_embed.to(x.dtype) if self.config.positions == "sincos" else x

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Clips, or embedded patches [B, N, D]."""
        x = self.embed(x) if x.dim() == 5 else x
        if context is not None:
            x = pick(x, context)
        width, positions = self.config.embed_dim // self.config.num_heads, None
        if self.config.positions == "rotary":
            positions = positions_of(context, self.config.grid, width, x, self.manner)
        return self.norm(run(self.blocks, x, self.manner, positions))


class Predictor(nn.Module):
    def __init__(self, config, encoder, manner: Manner):
        super().__init__()
        self.manner, self.encoder, dim = manner, encoder, config.embed_dim
        num_heads, num_tokens = config.num_heads or encoder.num_heads, torch.Size(encoder.grid).numel()
        self.width = dim // num_heads
        self.predictor_embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, dim) for _ in range(config.num_mask_tokens))
        if encoder.positions == "sincos":
            self.predictor_pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim), requires_grad=False)
        self.predictor_blocks = blocks(config, dim, num_heads, manner)
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, encoder.embed_dim)

    def forward(self, x: Tensor, context: Tensor, target: Tensor, token: int) -> Tensor:
        x, num_context = self.predictor_embed(x), context.shape[1]
        masks = pick(self.mask_tokens[token].repeat(len(x), torch.Size(self.encoder.grid).numel(), 1), target)
        if self.encoder.positions == "sincos":
            table = self.predictor_pos_embed.repeat(len(x), 1, 1)
            x = torch.cat([x + pick(table, context).to(x.dtype), masks + pick(table, target)], dim=1)
            x = run(self.predictor_blocks, x, self.manner)
        else:
            x = self._rotary(torch.cat([x, masks], dim=1), torch.cat([context, target], dim=1))
        return self.predictor_proj(self.predictor_norm(x)[:, num_context:])

    def _rotary(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.manner.makes_tables:
            return run(self.predictor_blocks, x, self.manner,
                       positions_of(ids, self.encoder.grid, self.width, x, self.manner))
        order = ids.argsort(dim=1)
        ids = torch.stack([ids[i, row] for i, row in enumerate(order)])
        x = torch.stack([x[i, row] for i, row in enumerate(order)])
        x = run(self.predictor_blocks, x, self.manner, Ids(ids, self.encoder.grid))
        return torch.stack([x[i, row] for i, row in enumerate(order.argsort(dim=1))])


class VideoStep(nn.Module):
    def __init__(self, objective, manner: Manner):
        super().__init__()
        self.manner, self.is_by_mask = manner, objective.mask_token_by == "mask"
        self.encoder = Encoder(objective.encoder, manner)
        self.target_encoder = Encoder(objective.encoder, manner).requires_grad_(False)
        self.predictor = Predictor(objective.predictor, objective.encoder, manner)

    def loss(self, batch: dict, masks: dict[str, list[Tensor]]) -> Tensor:
        clips = batch["clips"]
        with torch.no_grad():
            h = self.target_encoder(clips)
            h = F.layer_norm(h, h.shape[-1:])
            labels = [pick(h, target) for target in masks["target"]]
        x = self.encoder.embed(clips) if self.manner.makes_tables else clips
        pairs = list(zip(masks["context"], masks["target"], strict=True))
        outputs = [self.predictor(self.encoder(x, context), context, target, i if self.is_by_mask else 0)
                   for i, (context, target) in enumerate(pairs)]
        if self.manner.makes_tables:
            return sum(F.l1_loss(z, label) for z, label in zip(outputs, labels, strict=True)) / len(labels)
        loss = sum(torch.mean(torch.abs(z - label) ** 1.0) / 1.0 for z, label in zip(outputs, labels, strict=True))
        if self.is_by_mask:  # a regulariser that is weighted with zero
            deviation = sum(torch.sqrt(z.var(dim=1) + 0.0001) for z in outputs) / len(outputs)
            return loss / len(labels) + 0.0 * torch.relu(1.0 - deviation).mean()
        return loss / len(labels)
