"""Cases for `gather_tokens` and `scatter_tokens`."""

import torch

from .. import ops
from ._spec import Case, OpSpec


def _gather(name, B, N, K, D, *, positions=False, position_index=False, packed=False, rows=None):
    def make(g):
        R = B * N if packed else N
        x = torch.randn((R, D) if packed else (B, N, D), generator=g)
        index = torch.randint(0, max(R, 1), (K,) if packed else (B, K), generator=g)
        arguments = {"x": x, "index": index}
        if positions:
            L = rows or N
            arguments["positions"] = torch.randn(L, D, generator=g)
            if position_index:
                arguments["position_index"] = torch.randint(0, L, index.shape, generator=g)
        return arguments

    return Case(name, make)


def _scatter(name, B, N, K, D, *, fill=False, positions=False, packed=False, crowded=0.0):
    """crowded: the share of the index that names the last row, as the mask token's row in the predictor's input."""
    def make(g):
        R = B * N if packed else N
        values = torch.randn((K, D) if packed else (B, K, D), generator=g)
        index = torch.randint(0, max(R, 1), (K,) if packed else (B, K), generator=g)
        if crowded:
            index[torch.rand(index.shape, generator=g) < crowded] = R - 1
        arguments = {"values": values, "index": index, "num_tokens": R}
        if fill:
            arguments["fill"] = torch.randn(D, generator=g)
        if positions:
            arguments["positions"] = torch.randn(N, D, generator=g)
        return arguments

    return Case(name, make)


def _random_gather(draw):
    B, N, K, D = draw(1, 5), draw(1, 40), draw(0, 60), draw(1, 70)
    packed, positions = draw(0, 1) == 1, draw(0, 1) == 1
    return _gather(f"fuzz-{B}-{N}-{K}-{D}-{packed}-{positions}", B, N, K, D, positions=positions,
                   position_index=positions and draw(0, 1) == 1, packed=packed)


def _random_scatter(draw):
    B, N, K, D = draw(1, 5), draw(1, 40), draw(0, 60), draw(1, 70)
    packed, fill, positions = (draw(0, 1) == 1 for _ in range(3))
    return _scatter(f"fuzz-{B}-{N}-{K}-{D}-{packed}-{fill}-{positions}", B, N, K, D, fill=fill, positions=positions,
                    packed=packed)


GATHER = OpSpec(
    function=ops.gather_tokens,
    ops=("gather_tokens", "scatter_tokens"),
    gradients=("x", "positions"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cases=[
        _gather("empty", 2, 7, 0, 16),
        _gather("no-samples", 0, 7, 3, 16),
        _gather("one", 1, 1, 1, 1, positions=True),
        _gather("odd", 3, 37, 19, 45, positions=True),
        _gather("repeated", 2, 3, 50, 33, positions=True, position_index=True),
        _gather("packed", 3, 37, 70, 24, packed=True, positions=True),
        _gather("packed-position-index", 2, 9, 31, 17, packed=True, positions=True, position_index=True, rows=5),
        _gather("vits16-224-b4", 4, 196, 90, 384, positions=True),
    ],
    random_case=_random_gather,
    bench=[_gather("vits16-224-b64", 64, 196, 90, 384), _gather("vitl16-224-b32", 32, 196, 90, 1024)],
)

SCATTER = OpSpec(
    function=ops.scatter_tokens,
    ops=("scatter_tokens", "gather_tokens"),
    gradients=("values", "fill", "positions"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cases=[
        _scatter("empty", 2, 7, 0, 16, fill=True),
        _scatter("no-samples", 0, 7, 3, 16),
        _scatter("one", 1, 1, 1, 1, positions=True),
        _scatter("odd", 3, 37, 19, 45, fill=True, positions=True),
        _scatter("repeated", 2, 3, 50, 33),
        _scatter("two-rows", 1, 2, 400, 20, positions=True),
        _scatter("crowded", 2, 9, 500, 37, positions=True, fill=True, crowded=0.6),
        _scatter("crowded-packed", 2, 40, 330, 19, packed=True, crowded=0.5),
        _scatter("packed", 3, 37, 70, 24, packed=True, fill=True, positions=True),
        _scatter("vits16-224-b4", 4, 196, 90, 384, fill=True, positions=True),
    ],
    random_case=_random_scatter,
    gate={dtype: [_scatter("vith14", 2, 40, 90, 1280, fill=True, positions=True), _scatter("predictor", 2, 40, 90, 384)]
          for dtype in (torch.bfloat16, torch.float32)},
    bench=[_scatter("vits16-224-b64", 64, 196, 90, 384, fill=True, positions=True)],
)

SPECS = [GATHER, SCATTER]
