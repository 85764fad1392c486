"""Checkpoint files as the official repositories write them, of tiny models with random weights."""

import torch
from torch import Tensor

from jepa_fast.nn.positions import sincos_2d, sincos_3d

D, DEPTH, HEADS, PREDICTOR_D = 48, 2, 4, 24
PATCH, SIDE, FRAMES = 8, 4, 4  # 32 pixels


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def blocks(name: str, dim: int, depth: int = DEPTH) -> dict[str, tuple[int, ...]]:
    out = {}
    for i in range(depth):
        at = f"{name}.{i}"
        out |= norm(f"{at}.norm1", dim) | linear(f"{at}.attn.qkv", 3 * dim, dim) | linear(f"{at}.attn.proj", dim, dim)
        out |= norm(f"{at}.norm2", dim) | linear(f"{at}.mlp.fc1", 4 * dim, dim) | linear(f"{at}.mlp.fc2", dim, 4 * dim)
    return out


def encoder_shapes(family: str, with_table: bool = False) -> dict[str, tuple[int, ...]]:
    tokens = SIDE * SIDE * (1 if family == "ijepa" else FRAMES // 2)
    kernel = (PATCH, PATCH) if family == "ijepa" else (2, PATCH, PATCH)
    out = {"pos_embed": (1, tokens, D)} if with_table or family in ("ijepa", "vjepa") else {}
    if family == "vjepa2_1":
        out |= {"img_mod_embed": (1, 1, D), "video_mod_embed": (1, 1, D)}
    out |= {"patch_embed.proj.weight": (D, 3, *kernel), "patch_embed.proj.bias": (D,)}
    if family == "vjepa2_1":
        out |= {"patch_embed_img.proj.weight": (D, 3, 1, PATCH, PATCH), "patch_embed_img.proj.bias": (D,)}
    out |= blocks("blocks", D, 4 if family == "vjepa2_1" else DEPTH)
    if family == "vjepa2_1":
        return out | {k: v for level in range(4) for k, v in norm(f"norms_block.{level}", D).items()}
    return out | norm("norm", D)


def predictor_shapes(family: str, with_table: bool = False, num_mask_tokens: int = 4) -> dict[str, tuple[int, ...]]:
    d = PREDICTOR_D
    if family == "vjepa2_ac":
        out = linear("predictor_embed", d, D) | linear("action_encoder", d, 7) | linear("state_encoder", d, 7)
        out |= linear("extrinsics_encoder", d, 6) | blocks("predictor_blocks", d) | norm("predictor_norm", d)
        return out | linear("predictor_proj", D, d)
    tokens = SIDE * SIDE * (1 if family == "ijepa" else FRAMES // 2)
    out = {"mask_token": (1, 1, d)} if family == "ijepa" else {}
    if with_table or family in ("ijepa", "vjepa"):
        out["predictor_pos_embed"] = (1, tokens, d)
    if family == "vjepa2_1":
        out |= {"video_mod_embed": (1, 1, d), "img_mod_embed": (1, 1, d)}
        out |= linear("predictor_embed.0", D, 4 * D) | linear("predictor_embed.2", d, D)
    else:
        out |= linear("predictor_embed", d, D)
    if family != "ijepa":
        count = 2 if family == "vjepa" else num_mask_tokens
        out |= {f"mask_tokens.{j}": (1, 1, d) for j in range(count)}
    out |= blocks("predictor_blocks", d) | norm("predictor_norm", d)
    if family == "vjepa2_1":
        return out | linear("predictor_proj", 4 * D, d) | linear("predictor_proj_context", 4 * D, d)
    return out | linear("predictor_proj", D, d)


def random(shapes: dict[str, tuple[int, ...]], family: str, seed: int) -> dict[str, Tensor]:
    """Every parameter matters: no zero biases, norms away from one; position tables are the official ones."""
    generator = torch.Generator().manual_seed(seed)
    out = {name: 0.2 * torch.randn(shape, generator=generator) + ("norm" in name and name.endswith("weight"))
           for name, shape in shapes.items()}
    for name in out:
        if name.endswith("pos_embed"):
            dim = shapes[name][-1]
            table = sincos_2d(dim, (SIDE, SIDE)) if family == "ijepa" else sincos_3d(dim, (FRAMES // 2, SIDE, SIDE))
            out[name] = table.float().unsqueeze(0)
    return out


def roles(family: str, with_table: bool = False, num_mask_tokens: int = 4) -> dict[str, dict[str, Tensor]]:
    """Bare names: encoder, predictor, target_encoder, all different."""
    return {"encoder": random(encoder_shapes(family, with_table), family, 1),
            "predictor": random(predictor_shapes(family, with_table, num_mask_tokens), family, 2),
            "target_encoder": random(encoder_shapes(family, with_table), family, 3)}


def official_file(family: str, with_table: bool = False, num_mask_tokens: int = 4) -> dict:
    """The dict that torch.save writes."""
    prefix = "module." if family in ("ijepa", "vjepa2_ac") else "module.backbone."
    named = {role: {prefix + name: value for name, value in state.items()}
             for role, state in roles(family, with_table, num_mask_tokens).items()}
    return named | {"opt": None, "scaler": None, "epoch": 3, "loss": 0.25, "batch_size": 24, "world_size": 8, "lr": 1e-3}
