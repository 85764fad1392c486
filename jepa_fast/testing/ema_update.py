"""Cases for `ema_update_`."""

import torch

from .. import ops
from ._spec import Case, OpSpec
from ._vit import vit_shapes


def _lists(name, shapes, momentum=0.996, is_large=False):
    def make(g):
        return {"target": [torch.randn(shape, generator=g) for shape in shapes],
                "source": [torch.randn(shape, generator=g) for shape in shapes], "momentum": momentum}

    return Case(name, make, is_large)


def _random(draw):
    shapes = [tuple(draw(0, 40) for _ in range(draw(0, 3))) for _ in range(draw(0, 6))]
    return _lists(f"fuzz-{shapes}", shapes, draw(0, 1000) / 1000)


EMA_UPDATE = OpSpec(
    function=ops.ema_update_,
    ops=("ema_update_",),
    mutates=("target",),
    keep_dtype=("target",),
    copies=True,
    cases=[
        _lists("no-tensors", []),
        _lists("empty-tensors", [(0,), (3, 0), (5,)]),
        _lists("scalars", [(), (1,), (1, 1)]),
        _lists("stays", [(7, 5)], momentum=1.0),
        _lists("replaced", [(7, 5)], momentum=0.0),
        _lists("odd", [(1,), (63,), (64,), (65,), (7, 19), (3, 5, 11), (1001,)]),
        _lists("many-small", [(17,)] * 300),
        _lists("two-threads", [(300, 301), (5,), (129, 1000)], momentum=0.99925, is_large=True),
        _lists("several-blocks", [(50, 101), (5,), (64, 64)], momentum=0.99925),
        _lists("vits16-block", vit_shapes(384, 1), is_large=True),
    ],
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    random_case=_random,
    bench=[_lists("vits16-encoder", vit_shapes(384, 12))],
)

SPECS = [EMA_UPDATE]
