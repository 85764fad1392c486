"""What is timed on a GPU: the ops on the shapes of official runs, what they must move and compute, and their peers.

Shapes and counts are those of one GPU of the official configurations: I-JEPA ViT-H/14 batch 128, V-JEPA ViT-L/16
batch 24, V-JEPA 2 ViT-L and ViT-g/16 batch 24, V-JEPA 2-AC batch 8, LeJEPA.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F

from jepa_fast.nn.rotary import axis_widths, grid_positions, rotary_table

from . import gpu_peers as peers


@dataclass(frozen=True)
class GpuCase:
    """One op on one shape. Costs are the fewest bytes to move and FLOPs to do; exponentials are special-function ops."""

    op: str                                          # as in testing.OPS
    name: str
    make: Callable[[str], dict]                      # device -> arguments
    gradients: tuple[str, ...] = ()
    forward: tuple[float, float] = (0.0, 0.0)        # bytes, FLOPs
    backward: tuple[float, float] = (0.0, 0.0)       # bytes, FLOPs beyond the forward's
    exponentials: float = 0.0                        # of the forward
    peers: dict[str, Callable[[dict], Callable | None]] = field(default_factory=dict)
    rtol: float = 2e-2                               # between providers


def _attention(name: str, lengths: list[int], H: int, d: int, grid: tuple[int, ...] = (), frame_size: int = 0) -> GpuCase:
    P = sum(lengths)

    def make(device: str) -> dict:
        qkv = torch.randn(P, 3, H, d, device=device, dtype=torch.bfloat16)
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        rotary = None
        if grid:
            positions = torch.cat([grid_positions(grid, torch.arange(n, device=device) % torch.Size(grid).numel())
                                   for n in lengths])
            rotary = rotary_table(positions, axis_widths(d, len(grid)), "tiled")
        return {"qkv": qkv, "cu_seqlens": ends, "max_seqlen": max(lengths), "rotary": rotary, "frame_size": frame_size}

    pairs = sum(_visible(n, frame_size) for n in lengths)
    flops, row = 4.0 * H * d * pairs, P * H * d * 2
    return GpuCase("varlen_attention_qkv", name, make, ("qkv",), (4 * row, flops), (8 * row, 2.5 * flops), H * pairs,
                   {"SDPA": peers.sdpa, "torch varlen": peers.torch_varlen, "flash-attn": peers.flash_attn,
                    "xformers": peers.xformers, "flex attention": peers.flex})


def _visible(n: int, frame_size: int) -> float:
    if not frame_size:
        return n * n
    return sum(min(n, (i // frame_size + 1) * frame_size) for i in range(n))


def _ragged(count: int, mean: float, spread: float) -> list[int]:
    """Lengths as masks give them: the same every time, evenly over mean - spread .. mean + spread."""
    return [round(mean - spread + 2 * spread * ((i * 37) % count) / max(count - 1, 1)) for i in range(count)]


def _gather(name: str, B: int, N: int, K: int, D: int) -> GpuCase:
    def make(device: str) -> dict:
        index = torch.stack([torch.randperm(N, device=device)[:K].sort().values for _ in range(B)])
        return {"x": torch.randn(B, N, D, device=device, dtype=torch.bfloat16), "index": index,
                "positions": torch.randn(N, D, device=device, dtype=torch.bfloat16)}

    kept = B * K * D * 2
    return GpuCase("gather_tokens", name, make, ("x",), (2 * kept + N * D * 2 + 8 * B * K, 0.0),
                   (kept + B * N * D * 2 + 8 * B * K, 0.0), 0.0, peers.eager_and_compiled(peers.gather_tokens))


def _scatter(name: str, B: int, N: int, K: int, D: int) -> GpuCase:
    def make(device: str) -> dict:
        index = torch.stack([torch.randperm(N, device=device)[:K].sort().values for _ in range(B)])
        return {"values": torch.randn(B, K, D, device=device, dtype=torch.bfloat16), "index": index, "num_tokens": N}

    return GpuCase("scatter_tokens", name, make, ("values",), ((B * K + B * N) * D * 2 + 8 * B * K, 0.0),
                   (2 * B * K * D * 2 + 8 * B * K, 0.0), 0.0, peers.eager_and_compiled(peers.scatter_tokens))


def _patches(name: str, B: int, size: int, patch: int, K: int) -> GpuCase:
    def make(device: str) -> dict:
        N = (size // patch) ** 2
        index = torch.stack([torch.randperm(N, device=device)[:K].sort().values for _ in range(B)])
        return {"pixels": torch.randn(B, 3, size, size, device=device, dtype=torch.bfloat16), "index": index,
                "patch_size": [patch, patch]}

    return GpuCase("gather_patches", name, make, (), (2 * B * K * 3 * patch * patch * 2 + 8 * B * K, 0.0), (0.0, 0.0), 0.0,
                   peers.eager_and_compiled(peers.gather_patches))


def _latent_loss(name: str, rows: int, targets: int, D: int, beta: float) -> GpuCase:
    def make(device: str) -> dict:
        return {"prediction": torch.randn(rows, D, device=device, dtype=torch.bfloat16),
                "target": torch.randn(targets, D, device=device, dtype=torch.bfloat16),
                "target_idx": torch.randint(0, targets, (rows,), device=device), "beta": beta}

    once = rows * D * 2
    return GpuCase("latent_loss", name, make, ("prediction",), (once + min(rows, targets) * D * 2, 0.0),
                   (2 * once + min(rows, targets) * D * 2, 0.0), 0.0, peers.eager_and_compiled(peers.latent_loss))


def _layer_norm(name: str, rows: int, D: int, residual: bool) -> GpuCase:
    def make(device: str) -> dict:
        x = torch.randn(rows, D, device=device, dtype=torch.bfloat16)
        weight, bias = torch.randn(D, device=device), torch.randn(D, device=device)
        stream = torch.randn(rows, D, device=device) if residual else None
        return {"x": x, "weight": weight, "bias": bias} | ({"residual": stream} if residual else {})

    once = rows * D * 2
    forward = 2 * once + (4 * once if residual else 0)
    return GpuCase("layer_norm", name, make, ("x", "weight", "bias"), (forward, 0.0), (3 * once + 4 * once * residual, 0.0),
                   0.0, peers.eager_and_compiled(peers.layer_norm))


def _bias_gelu(name: str, rows: int, D: int) -> GpuCase:
    def make(device: str) -> dict:
        return {"x": torch.randn(rows, D, device=device, dtype=torch.bfloat16), "bias": torch.randn(D, device=device)}

    once = rows * D * 2
    return GpuCase("bias_gelu", name, make, ("x", "bias"), (2 * once, 0.0), (3 * once, 0.0), 0.0,
                   peers.eager_and_compiled(peers.bias_gelu))


def _sigreg(name: str, V: int, N: int, D: int, K: int) -> GpuCase:
    def make(device: str) -> dict:
        return {"x": torch.randn(V, N, D, device=device, dtype=torch.bfloat16),
                "directions": F.normalize(torch.randn(D, K, device=device), dim=0)}

    product = 2.0 * V * N * D * K
    touched = V * N * D * 2 + D * K * 2
    # 64 float32 operations per projection and direction of the pass, spec: 33.4 T/s against 790 for products
    vector = 64 * V * N * K * 790 / 33.4
    return GpuCase("sigreg_sums", name, make, ("x",), (touched, max(product, vector)),
                   (touched + V * N * D * 2, 2 * product + vector), 0.0, peers.sigreg_peers)


def _optimizer(name: str, shapes: list[tuple[int, ...]], averaged: int) -> GpuCase:
    def make(device: str) -> dict:
        params = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
        count = len(params)
        return {"params": params, "grads": [torch.randn_like(p) * 1e-3 for p in params],
                "exp_avg": [torch.zeros_like(p) for p in params], "exp_avg_sq": [torch.zeros_like(p) for p in params],
                "average": [p.clone() for p in params[:averaged]], "shadow": [p.bfloat16() for p in params],
                "average_shadow": [p.bfloat16() for p in params[:averaged]], "lr": [1e-4] * count,
                "weight_decay": [0.04] * count, "step": [10] * count, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
                "momentum": 0.996}

    total = sum(torch.Size(shape).numel() for shape in shapes)
    part = sum(torch.Size(shape).numel() for shape in shapes[:averaged])
    return GpuCase("adamw_ema_", name, make, (), (total * (28 + 2) + part * (8 + 2), 0.0), (0.0, 0.0), 0.0,
                   {"AdamW fused + foreach EMA + casts": peers.adamw_fused}, rtol=1e-5)


def _ema(name: str, shapes: list[tuple[int, ...]]) -> GpuCase:
    def make(device: str) -> dict:
        source = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
        return {"target": [s.clone() for s in source], "source": source, "momentum": 0.996}

    total = sum(torch.Size(shape).numel() for shape in shapes)
    return GpuCase("ema_update_", name, make, (), (total * 12, 0.0), (0.0, 0.0), 0.0, {"foreach": peers.ema_foreach},
                   rtol=1e-6)


def all_cases() -> list[GpuCase]:
    """The heart first: a run that is cut short has it."""
    from jepa_fast.testing._vit import predictor_shapes, vit_shapes

    H14 = vit_shapes(1280, 32, 14, 256)
    return [
        _attention("ijepa-h14-b128-predictor", [114] * 512, 16, 24),
        _attention("ijepa-h14-b128-target", [256] * 128, 16, 80),
        _attention("ijepa-h14-b128-context", _ragged(128, 70, 20), 16, 80),
        _attention("vjepa2-l16-b24-target", [2048] * 24, 16, 64, (8, 16, 16)),
        _attention("vjepa2-l16-b24-predictor", [1468] * 24 + [1568] * 24, 12, 32, (8, 16, 16)),
        _attention("vjepa-l16-b24-predictor", [1117] * 24 + [1201] * 24, 16, 24),
        _attention("ijepa-g16-b16-target", [196] * 16, 16, 88),
        _attention("vjepa2-g16-384-64f-b1-target", [18432], 22, 64, (32, 24, 24)),
        _attention("vjepa2ac-g-b8-predictor", [8 * 258] * 8, 16, 64, (8, 16, 16), frame_size=258),
        _optimizer("ijepa-h14", H14 + predictor_shapes(1280, 384, 12), len(H14)),
        _ema("ijepa-h14", H14),
        _layer_norm("ijepa-h14-b128-target", 32768, 1280, False),
        _layer_norm("ijepa-h14-b128-context-residual", 8922, 1280, True),
        _latent_loss("ijepa-h14-b128", 4 * 128 * 44, 32768, 1280, 1.0),
        _latent_loss("vjepa2-l16-b24", 24 * (973 + 1438), 24 * 2048, 1024, 0.0),
        _gather("ijepa-h14-b128-context", 128, 256, 70, 1280),
        _scatter("ijepa-h14-b128-context", 128, 256, 70, 1280),
        _patches("ijepa-h14-b128-context", 128, 224, 14, 70),
        _bias_gelu("ijepa-h14-b128-target", 32768, 5120),
        _bias_gelu("ijepa-h14-b128-predictor", 58112, 1536),
        _sigreg("lejepa-8x256x512-k4096", 8, 256, 512, 4096),
        _sigreg("lejepa-8x256x128-k1024", 8, 256, 128, 1024),
        _sigreg("tokens-1x65536x384-k1024", 1, 65536, 384, 1024),
    ]


def arguments_of(case: GpuCase, device: str) -> dict:
    torch.manual_seed(0)
    arguments = case.make(device)
    for name in case.gradients:
        arguments[name].requires_grad_()
    return arguments
