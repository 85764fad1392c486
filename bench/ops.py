"""Ops against eager PyTorch doing the same work: times interleaved in one process, results compared first."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_fast import ops, testing
from jepa_fast.masking import MultiBlock, MultiBlock3D, multiblock3d_plain, multiblock_plain

from .measure import agree, interleaved, peak_memory_bytes


@dataclass(frozen=True)
class Bench:
    """Providers of one case; the first is the baseline. `results(call)` are tensors to compare, `moved_bytes` per call."""

    name: str
    case: str
    providers: dict[str, Callable[[], object]]
    results: dict[str, Callable[[], list[Tensor]]]
    rtol: float = 1e-5
    moved_bytes: int | None = None
    has_memory: bool = False


def measure(bench: Bench, repeats: int = 7) -> list[dict]:
    agree({name: call() for name, call in bench.results.items()}, bench.rtol)
    timings = interleaved(bench.providers, repeats=repeats)
    memory = {name: peak_memory_bytes(call) for name, call in bench.providers.items()} if bench.has_memory else {}
    base = next(iter(timings.values())).median
    rows = []
    for name, t in timings.items():
        row = {"bench": bench.name, "case": bench.case, "provider": name, "ms": t.median * 1e3, "p20_ms": t.p20 * 1e3,
               "p80_ms": t.p80 * 1e3, "ratio": base / t.median}
        if bench.moved_bytes:
            row["gb_per_s"] = bench.moved_bytes / t.median / 1e9
        if memory:
            row["peak_mb"] = memory[name] / 1e6
        rows.append(row)
    return rows


def gather_tokens(B: int, N: int, K: int, D: int, case: str) -> Bench:
    x, index = torch.randn(B, N, D), torch.stack([torch.randperm(N)[:K].sort().values for _ in range(B)])

    def eager():  # as the official code: an index as wide as the rows
        return torch.gather(x, 1, index.unsqueeze(-1).repeat(1, 1, D))

    def ours():
        return ops.gather_tokens(x, index)

    return Bench("gather_tokens", case, {"torch.gather, index expanded to D": eager, "ours": ours},
                 {"eager": lambda: [eager()], "ours": lambda: [ours()]}, 0.0, 2 * 4 * B * K * D)


def patch_embed(B: int, size: int, patch: int, K: int, D: int, case: str) -> Bench:
    """Embed the kept patches, forward and backward to the weights."""
    images, N = torch.randn(B, 3, size, size), (size // patch) ** 2
    conv = torch.nn.Conv2d(3, D, patch, patch)
    index = torch.stack([torch.randperm(N)[:K].sort().values for _ in range(B)])
    upstream = torch.randn(B, K, D)
    weights = (conv.weight, conv.bias)

    def eager():
        x = conv(images).flatten(2).transpose(1, 2)
        return torch.autograd.grad(torch.gather(x, 1, index.unsqueeze(-1).repeat(1, 1, D)), weights, upstream)

    def ours():
        x = ops.gather_patches(images, index, (patch, patch))
        return torch.autograd.grad(F.linear(x, conv.weight.flatten(1), conv.bias), weights, upstream)

    return Bench("patch_embed", case, {"convolution of all, then gather": eager, "ours": ours},
                 {"eager": lambda: list(eager()), "ours": lambda: list(ours())})


def latent_loss(B: int, N: int, M: int, K: int, D: int, case: str) -> Bench:
    target, prediction = torch.randn(B, N, D), torch.randn(M * B, K, D, requires_grad=True)
    lists = [torch.stack([torch.randperm(N)[:K].sort().values for _ in range(B)]) for _ in range(M)]
    rows = torch.cat([(index + torch.arange(B)[:, None] * N).flatten() for index in lists])

    def eager():
        h = F.layer_norm(target, (D,))
        h = torch.cat([torch.gather(h, 1, index.unsqueeze(-1).repeat(1, 1, D)) for index in lists])
        loss = F.smooth_l1_loss(prediction, h)
        return [loss.detach(), *torch.autograd.grad(loss, prediction)]

    def ours():
        loss = ops.latent_loss(prediction.flatten(0, 1), target.flatten(0, 1), rows)
        return [loss.detach(), *torch.autograd.grad(loss, prediction)]

    return Bench("latent_loss", case, {"eager": eager, "ours": ours}, {"eager": eager, "ours": ours})


def varlen_attention(S: int, N: int, H: int, d: int, case: str, dtype: torch.dtype = torch.float32) -> Bench:
    """Self-attention forward and backward from one packed qkv, equal lengths."""
    qkv = torch.randn(S * N, 3, H, d).to(dtype).requires_grad_()
    upstream = torch.randn(S * N, H, d).to(dtype)
    ends = torch.arange(0, (S + 1) * N, N, dtype=torch.int32)

    def unfused():
        q, k, v = qkv.view(S, N, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
        out = ((q @ k.transpose(-2, -1)) * d**-0.5).softmax(-1) @ v
        return torch.autograd.grad(out.transpose(1, 2).reshape(S * N, H, d), qkv, upstream)

    def sdpa():
        q, k, v = qkv.view(S, N, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out.transpose(1, 2).reshape(S * N, H, d), qkv, upstream)

    def ours():
        return torch.autograd.grad(ops.varlen_attention_qkv(qkv, ends, N), qkv, upstream)

    providers = {"unfused": unfused, "F.scaled_dot_product_attention": sdpa, "ours": ours}
    return Bench("varlen_attention", case, providers,
                 {name: (lambda call=call: list(call())) for name, call in providers.items()},
                 1e-5 if dtype == torch.float32 else 3e-2)


def matmul(P: int, K: int, N: int, case: str) -> Bench:
    """The three products of a linear layer, forward and backward: x W^T + bias, g W, g^T x."""
    x, weight, bias, g = torch.randn(P, K), torch.randn(N, K), torch.randn(N), torch.randn(P, N)

    def blas():
        return [torch.addmm(bias, x, weight.T), g @ weight, g.T @ x]

    def ours():
        return [ops.matmul(x, weight.T, bias), ops.matmul(g, weight), ops.matmul(g.T, x)]

    return Bench("matmul", case, {"torch.mm": blas, "ours": ours}, {"torch.mm": blas, "ours": ours}, 1e-6)


def sampler(batch_size: int, grid: tuple[int, ...], case: str) -> Bench:
    """A batch of masks of images or clips; the baseline is the per-sample Python algorithm of the official collator."""
    is_video = len(grid) == 3
    config = (MultiBlock3D if is_video else MultiBlock)(mask_group_size=batch_size)
    sample_plain = (multiblock3d_plain if is_video else multiblock_plain).sample_official

    def plain():
        return sample_plain(config, grid, 0, 3, 0, batch_size)

    def ours():
        return config.sample(grid, batch_size, seed=0, step=3)

    def tensors(masks):
        return [masks.context_idx, masks.target_idx]

    return Bench("mask_sampler", case, {"per sample, Python and torch": plain, "ours": ours},
                 {"plain": lambda: tensors(plain()), "ours": lambda: tensors(ours())}, 0.0)


def sigreg(V: int, N: int, D: int, K: int, case: str) -> Bench:
    """Loss and gradient of x, the same directions for both."""
    from jepa_fast.testing.sigreg import eager_sigreg

    x, directions = torch.randn(V, N, D, requires_grad=True), F.normalize(torch.randn(D, K), dim=0)

    def eager():
        loss = eager_sigreg(x, directions)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    def ours():
        loss = ops.sigreg(x, directions)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    return Bench("sigreg", case, {"eager": eager, "ours": ours}, {"eager": eager, "ours": ours}, 1e-5, has_memory=True)


def adamw_ema(case: str, config) -> Bench:
    """The optimizer step and the moving average over all parameters of an objective."""
    from jepa_fast.optim import AdamWEMA

    torch.manual_seed(0)
    baseline, fused = config.build(), config.build()
    fused.load_state_dict(baseline.state_dict())
    for a, b in zip(baseline.parameters(), fused.parameters(), strict=True):
        if a.requires_grad:
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
    trained = [p for p in baseline.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.04, foreach=True)
    pairs = baseline.averages()
    ours = AdamWEMA([{"params": [p for p in fused.parameters() if p.requires_grad]}], lr=1e-4, weight_decay=0.04,
                    averages=fused.averages())
    ours.momentum = 0.996

    @torch.no_grad()
    def eager():
        adamw.step()
        for parameter, average in pairs:
            average.mul_(0.996).add_((1.0 - 0.996) * parameter)

    count = sum(p.numel() for p in trained) * 28 + sum(a.numel() for _, a in pairs) * 8
    return Bench("adamw_ema", case, {"AdamW foreach + EMA loop": eager, "ours": ours.step},
                 {"eager": lambda: [eager(), *(p.detach() for p in baseline.parameters())][1:],
                  "ours": lambda: [ours.step(), *(p.detach() for p in fused.parameters())][1:]}, 1e-6, count)


def crop_resize(B: int, V: int, size: int, scale: tuple[float, float], case: str) -> Bench:
    """V views of each of B photographs, from bytes to normalised float32. kornia's has no antialiasing: not compared."""
    H, W, (low, high) = 375, 500, scale
    images = torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    length = (torch.rand(B * V) * (high - low) + low).sqrt()[:, None] * torch.tensor([H, W])
    boxes = torch.cat([(torch.rand(B * V, 2) * (torch.tensor([H, W]) - length)).floor(), length.floor()], 1)
    index, flips = torch.arange(B).repeat(V), torch.rand(B * V) < 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def finish(views):
        views = torch.where(flips[:, None, None, None], views.flip(-1), views)
        return ((views.float() / 255) - mean[:, None, None]) / std[:, None, None]

    def each():  # torchvision's resized_crop of bytes
        views = [F.interpolate(images[i:i + 1, :, top:top + h, left:left + w], size=(size, size), mode="bilinear",
                               antialias=True)
                 for i, (top, left, h, w) in zip(index.tolist(), boxes.int().tolist(), strict=True)]
        return finish(torch.cat(views))

    def kornia():
        from kornia.geometry.transform import crop_and_resize

        (top, left), (bottom, right) = boxes[:, :2].T, (boxes[:, :2] + boxes[:, 2:] - 1).T
        corners = torch.stack([torch.stack(point, 1) for point in ((left, top), (right, top), (right, bottom),
                                                                   (left, bottom))], 1)
        return finish(crop_and_resize(images[index].float(), corners, (size, size)))

    def ours(backend: str | None = None):
        with ops.use_backend(backend, "crop_resize") if backend else contextlib.nullcontext():
            return ops.crop_resize(images, boxes, index, (size, size), flips=flips, mean=mean, std=std)

    compared = {"torchvision's resized_crop of each": each, "plain": lambda: ours("plain"), "ours": ours}
    others = {"kornia, not antialiased": kornia} if importlib.util.find_spec("kornia") else {}
    # torchvision's views are rounded to whole levels, and the mean of noise is nearly what is subtracted
    results = {name: (lambda call=call: [call()]) for name, call in compared.items()}
    return Bench("crop_resize", case, compared | others, results, 2e-2)


def all_benches() -> list[Callable[[], Bench]]:
    from jepa_fast.recipes import get_recipe

    vits16 = get_recipe("ijepa_vits16").objective
    return [
        lambda: sigreg(8, 256, 128, 1024, "lejepa-8x256x128-k1024"),
        lambda: sigreg(4, 128, 192, 1024, "lewm-4x128x192-k1024"),
        lambda: sigreg(4, 256, 16, 256, "minimal-4x256x16-k256"),
        lambda: adamw_ema("vits16", dataclasses.replace(vits16, predictor=dataclasses.replace(vits16.predictor, depth=12))),
        lambda: sampler(128, (16, 16), "vith14-224-b128"),
        lambda: sampler(16, (14, 14), "vits16-224-b16"),
        lambda: sampler(24, (8, 14, 14), "vjepa-16x224-b24"),
        lambda: sampler(12, (32, 16, 16), "vjepa2-64x256-b12"),
        lambda: gather_tokens(64, 196, 90, 384, "vits16-224-b64"),
        lambda: gather_tokens(32, 196, 90, 1024, "vitl16-224-b32"),
        lambda: crop_resize(16, 2, 224, (0.3, 1.0), "imagenet-b16-2x224"),
        lambda: crop_resize(16, 8, 96, (0.05, 0.3), "imagenet-b16-8x96"),
        lambda: patch_embed(16, 224, 16, 50, 384, "vits16-224-b16"),
        lambda: latent_loss(16, 196, 4, 33, 384, "vits16-224-b16"),
        *(lambda P=P, K=K, N=N: matmul(P, K, N, f"vits16-224-b16-{P}x{K}x{N}") for P in (800, 3136, 6080)
          for K, N in ((384, 1152), (384, 384), (384, 1536), (1536, 384), (768, 384))),
        lambda: varlen_attention(16, 196, 6, 64, "vits16-224-b16-target"),
        lambda: varlen_attention(64, 83, 6, 64, "vits16-224-b16-predictor"),
        lambda: varlen_attention(64, 114, 16, 24, "vith14-224-b16-predictor"),
        lambda: varlen_attention(16, 196, 6, 64, "vits16-224-b16-target-bf16", torch.bfloat16),
    ]


def op_calls() -> list[tuple[str, Callable[[], object]]]:
    """(name, call) for pytest-benchmark: every op on its bench cases, every backend."""
    calls = []
    for spec in testing.OPS.values():
        for case in spec.bench or spec.cases[-1:]:
            for backend in spec.backends():
                arguments = testing.make(spec, case, torch.float32)
                calls.append((f"{spec.name}-{case}-{backend}",
                              lambda spec=spec, arguments=arguments, backend=backend:
                              testing.run(spec, arguments, backend)))
    return calls
