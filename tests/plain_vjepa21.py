"""V-JEPA 2.1's loss once more, sample by sample and token by token, from the weights by their official names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [H, n, d] at positions [n, 3]: pairs (2i, 2i + 1) of every axis turned by p * 10000^(-2i / width)."""
    d = x.shape[-1]
    width = 2 * (d // 3 // 2)
    angle = torch.zeros(x.shape[1], d // 2, dtype=x.dtype)
    for axis in range(3):
        omega = 10000.0 ** (-torch.arange(width // 2, dtype=x.dtype) / (width / 2))
        angle[:, axis * width // 2:(axis + 1) * width // 2] = positions[:, axis:axis + 1] * omega
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def block(w: dict, prefix: str, x: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{prefix}.{name}.weight"].T + w[f"{prefix}.{name}.bias"]

    def norm(name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{prefix}.{name}.weight"], w[f"{prefix}.{name}.bias"], eps=1e-6)

    n, D = x.shape
    q, k, v = linear("attn.qkv", norm("norm1")).view(n, 3, num_heads, -1).permute(1, 2, 0, 3)
    scores = rotate(q, positions) @ rotate(k, positions).transpose(1, 2) / math.sqrt(D // num_heads)
    x = x + linear("attn.proj", (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, D))
    hidden = linear("mlp.fc1", norm("norm2"))
    return x + linear("mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def places(grid: tuple[int, ...]) -> Tensor:
    """[N, 3], whole numbers."""
    return torch.tensor([(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])])


def stretched(grid: tuple[int, ...], side: int) -> Tensor:
    scale = [1.0, (side - 1) / (grid[1] - 1), (side - 1) / (grid[2] - 1)]
    return places(grid).double() * torch.tensor(scale, dtype=torch.float64)


def grid_of(sample: Tensor, config) -> tuple[int, int, int]:
    T, H, W = sample.shape[1:]
    return T // (1 if T == 1 else config.tubelet_size), H // config.patch_size, W // config.patch_size


def encode(w: dict, config, sample: Tensor, tokens: Tensor | None = None) -> list[Tensor]:
    """sample [C, T, H, W] -> its levels, [N, D] each, or of `tokens` alone."""
    is_image, grid = sample.shape[1] == 1, grid_of(sample, config)
    stem, modality = ("patch_embed_img", "img_mod_embed") if is_image else ("patch_embed", "video_mod_embed")
    kernel = w[f"{stem}.proj.weight"]
    x = F.conv3d(sample.unsqueeze(0), kernel, w[f"{stem}.proj.bias"], stride=kernel.shape[2:])[0].flatten(1).T
    x, positions = x + w[modality][0, 0], stretched(grid, config.side)
    if tokens is not None:
        x, positions = x[tokens], positions[tokens]
    out = []
    for number in range(config.depth):
        x = block(w, f"blocks.{number}", x, positions, config.num_heads)
        if number in config.levels:
            name = f"norms_block.{config.levels.index(number)}"
            out.append(F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6))
    return out


def predict(w: dict, config, encoder, levels: list[Tensor], context: Tensor, target: Tensor, grid,
            is_image: bool) -> tuple[Tensor, Tensor]:
    """-> [K_p, levels * D] at the targets, [K_c, levels * D] at the context."""
    x = torch.cat(levels, 1)
    x = F.gelu(x @ w["predictor_embed.0.weight"].T + w["predictor_embed.0.bias"])
    x = x @ w["predictor_embed.2.weight"].T + w["predictor_embed.2.bias"]
    x = torch.cat([x, w["mask_tokens.0"][0].expand(len(target), -1)])
    x = x + w["img_mod_embed" if is_image else "video_mod_embed"][0, 0]
    positions = stretched(grid, encoder.side)[torch.cat([context, target])]
    for number in range(config.depth):
        x = block(w, f"predictor_blocks.{number}", x, positions, config.num_heads)
    x = F.layer_norm(x, x.shape[-1:], w["predictor_norm.weight"], w["predictor_norm.bias"], eps=1e-6)
    return (x[len(context):] @ w["predictor_proj.weight"].T + w["predictor_proj.bias"],
            x[:len(context)] @ w["predictor_proj_context.weight"].T + w["predictor_proj_context.bias"])


def distance(context: Tensor, target: Tensor, grid) -> Tensor:
    """[K_c] float64: the square root of how far each context token is from the nearest target."""
    place = places(grid).double()
    out = [min(math.dist(place[c].tolist(), place[t].tolist()) for t in target.tolist()) for c in context.tolist()]
    return torch.tensor(out, dtype=torch.float64).sqrt()


def loss(weights: dict[str, dict], config, pixels: Tensor, contexts: list[Tensor], targets: list[Tensor],
         context_weight: float) -> Tensor:
    """pixels [B, C, T, H, W]; contexts and targets: of each kind of mask [B, K]. The loss of one modality."""
    terms = []
    for sample, *masks in zip(pixels, *contexts, *targets, strict=True):
        grid, is_image = grid_of(sample, config.encoder), sample.shape[1] == 1
        with torch.no_grad():
            full = encode(weights["target_encoder"], config.encoder, sample)
            h = torch.cat([F.layer_norm(level, level.shape[-1:]) for level in full], 1)
        for context, target in zip(masks[:len(contexts)], masks[len(contexts):], strict=True):
            levels = encode(weights["encoder"], config.encoder, sample, context)
            z, z_context = predict(weights["predictor"], config.predictor, config.encoder, levels, context, target, grid,
                                   is_image)
            term = (z - h[target]).abs().mean()
            if context_weight:
                d = distance(context, target, grid) if config.weight_by_distance else torch.ones(len(context)).double()
                term = term + context_weight * ((z_context - h[context]).abs() / d.unsqueeze(1)).mean()
            terms.append(term)
    return sum(terms) / len(terms)
