"""Cases for `gather_patches` and `scatter_patches`."""

import math

import torch

from .. import ops
from ._spec import Case, OpSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _index(g, kind, B, N, K):
    """kind: "tokens" [B, K], "packed" [B * K], or "all"."""
    if kind == "all":
        return None
    packed = kind == "packed"
    return torch.randint(0, max(B * N, 1) if packed else N, (B * K,) if packed else (B, K), generator=g)


def _case(name, B, C, size, patch_size, K, kind="tokens", *, scatter=False, channels_last=False, is_large=False):
    def make(g):
        N = math.prod(s // p for s, p in zip(size, patch_size, strict=True))
        index = _index(g, kind, B, N, K)
        if scatter:
            rows = (B, N) if index is None else index.shape
            patches = torch.randn(*rows, C * math.prod(patch_size), generator=g)
            return {"patches": patches, "index": index, "shape": [B, C, *size], "patch_size": patch_size}
        pixels = torch.randn(B, C, *size, generator=g)
        if channels_last:
            pixels = pixels.movedim(1, -1).contiguous().movedim(-1, 1)
        return {"pixels": pixels, "index": index, "patch_size": patch_size}

    return Case(name, make, is_large)


def _cases(**kind):
    return [
        _case("empty", 2, 3, (8, 8), (4, 4), 0, **kind),
        _case("no-samples", 0, 3, (8, 8), (4, 4), 2, **kind),
        _case("no-samples-packed", 0, 3, (8, 8), (4, 4), 2, "packed", **kind),
        _case("one", 1, 1, (1, 1), (1, 1), 1, **kind),
        _case("odd-remainder", 3, 3, (23, 17), (5, 3), 7, **kind),
        _case("repeated", 2, 2, (6, 9), (3, 3), 40, **kind),
        _case("all", 2, 3, (13, 20), (3, 5), 0, "all", **kind),
        _case("clip", 2, 3, (5, 14, 21), (2, 7, 7), 5, **kind),
        _case("clip-packed", 3, 2, (4, 9, 8), (2, 3, 4), 11, "packed", **kind),
        _case("clip-all", 2, 1, (4, 6, 6), (2, 3, 2), 0, "all", **kind),
        _case("packed", 3, 3, (32, 48), (16, 16), 4, "packed", **kind),
        _case("patches-of-14", 1, 3, (42, 30), (14, 14), 5, **kind),
        _case("vits16-224-b2", 2, 3, (224, 224), (16, 16), 50, is_large=True, **kind),
    ]


def _gate(**options):
    """Patches of 14, 16 and of two frames."""
    cases = [_case("vith14", 1, 3, (42, 42), (14, 14), 5, **options),
             _case("vits16", 1, 3, (48, 48), (16, 16), 5, **options),
             _case("vitl16-clip", 1, 3, (4, 48, 48), (2, 16, 16), 5, **options)]
    return {torch.float32: cases, torch.bfloat16: cases[:2]}


def _random(**options):
    def random_case(draw):
        B, C, axes = draw(1, 4), draw(1, 4), draw(2, 3)
        patch_size = tuple(draw(1, 18 if axes == 2 and axis == 1 else 5) for axis in range(axes))
        size = tuple(p * draw(1, 4) + draw(0, p - 1) for p in patch_size)
        K, kind = draw(0, 20), ("tokens", "packed", "all")[draw(0, 2)]
        last = not options and draw(0, 1) == 1
        extra = {"channels_last": last} if last else {}
        name = f"fuzz-{B}-{C}-{size}-{patch_size}-{K}-{kind}-{last}"
        return _case(name, B, C, size, patch_size, K, kind, **options, **extra)

    return random_case


GATHER = OpSpec(
    function=ops.gather_patches,
    ops=("gather_patches", "scatter_patches"),
    gradients=("pixels",),
    dtypes=_DTYPES,
    copies=True,
    cases=[_case("channels-last", 2, 3, (12, 20), (4, 5), 9, channels_last=True),
           _case("clip-channels-last", 2, 3, (4, 8, 8), (2, 4, 4), 5, channels_last=True), *_cases()],
    random_case=_random(),
    gate=_gate(),
    bench=[_case("vits16-224-b16", 16, 3, (224, 224), (16, 16), 50),
           _case("vith14-224-b16", 16, 3, (224, 224), (14, 14), 70),
           _case("vitl16-clip-b2", 2, 3, (16, 224, 224), (2, 16, 16), 365)],
)

SCATTER = OpSpec(
    function=ops.scatter_patches,
    ops=("scatter_patches", "gather_patches"),
    gradients=("patches",),
    dtypes=_DTYPES,
    copies=True,
    cases=_cases(scatter=True),
    random_case=_random(scatter=True),
    gate=_gate(scatter=True),
    bench=[_case("vits16-224-b16", 16, 3, (224, 224), (16, 16), 50, scatter=True)],
)

SPECS = [GATHER, SCATTER]
