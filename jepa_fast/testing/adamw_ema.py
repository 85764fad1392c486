"""Cases for `adamw_ema_`."""

import torch

from .. import ops
from ._spec import Case, OpSpec
from ._vit import predictor_shapes, vit_shapes


def _step(name, shapes, *, averages=0, shadows=False, scale=None, step=7, beta1=0.9, momentum=0.996, is_large=False):
    def make(g):
        def normal(shapes, size=1.0):
            return [size * torch.randn(shape, generator=g) for shape in shapes]

        count = len(shapes)
        average = normal(shapes[:averages])
        params = normal(shapes)
        steps = [step + i % 3 for i in range(count)]
        return {
            "params": params, "grads": normal(shapes, 1e-2), "average": average,
            "exp_avg": normal(shapes, 1e-3), "exp_avg_sq": [v.square() for v in normal(shapes, 1e-2)],
            "shadow": [p.bfloat16() for p in params] if shadows else [],
            "average_shadow": [a.bfloat16() for a in average] if shadows else [],
            "lr": [1e-3 * (1 + i % 2) for i in range(count)], "weight_decay": [0.05 * (i % 3) for i in range(count)],
            "step": steps, "beta1": beta1, "beta2": 0.999, "eps": 1e-8, "momentum": momentum,
            "grad_scale": None if scale is None else torch.tensor(scale) if scale else torch.rand(count, generator=g),
        }

    return Case(name, make, is_large)


def _random(draw):
    shapes = [tuple(draw(0, 40) for _ in range(draw(0, 3))) for _ in range(draw(0, 6))]
    averages, shadows, scale = draw(0, len(shapes)), draw(0, 1) == 1, (None, 0.0, 0.3)[draw(0, 2)]
    beta1 = (0.9, 0.5, 0.3)[draw(0, 2)]
    return _step(f"fuzz-{shapes}-{averages}-{shadows}-{scale}-{beta1}", shapes, averages=averages, shadows=shadows,
                 scale=scale, step=draw(1, 1000), beta1=beta1, momentum=draw(0, 1000) / 1000)


_VITS = vit_shapes(384, 12)
_PREDICTOR = predictor_shapes(384, 384, 12)
_ODD = [(1,), (63,), (64,), (65,), (7, 19), (3, 5, 11), (1001,)]

ADAMW_EMA = OpSpec(
    function=ops.adamw_ema_,
    ops=("adamw_ema_",),
    mutates=("params", "exp_avg", "exp_avg_sq", "average", "shadow", "average_shadow"),
    keep_dtype=("params", "exp_avg", "exp_avg_sq", "average", "shadow", "average_shadow", "grad_scale"),
    cases=[
        _step("no-tensors", []),
        _step("empty-tensors", [(0,), (3, 0), (5,)], averages=2, shadows=True),
        _step("scalars", [(), (1,), (1, 1)], averages=3),
        _step("first-step", _ODD, averages=4, step=1),
        _step("no-average", _ODD),
        _step("odd", _ODD, averages=4, shadows=True, scale=0.37),
        _step("scale-each", _ODD, averages=7, scale=0.0),
        _step("lerp-from-gradient", _ODD, beta1=0.3),
        _step("many-small", [(17,)] * 200, averages=100, shadows=True),
        _step("two-threads", [(300, 301), (5,), (129, 1000)], averages=2, is_large=True),
        _step("several-blocks", [(50, 101), (5,), (64, 64)], averages=2, shadows=True, scale=0.9),
        _step("vits16-block", _VITS[:15], averages=15, shadows=True, scale=0.9, step=1000, is_large=True),
    ],
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    random_case=_random,
    bench=[_step("vits16", _VITS + _PREDICTOR, averages=len(_VITS)),
           _step("vits16-shadows", _VITS + _PREDICTOR, averages=len(_VITS), shadows=True)],
)


def _from_tensor(case):
    """The same case with the scalars of its step in a tensor."""
    def make(g):
        arguments = case.make(g)
        changing = [arguments.pop(name) for name in ("lr", "weight_decay", "step")]
        momentum = arguments.pop("momentum")
        scalars = ops.adamw_ema_scalars(*changing, arguments["beta1"], arguments["beta2"], momentum)
        return arguments | {"scalars": scalars}

    return Case(case.name, make)


ADAMW_EMA_SCALARS = OpSpec(
    function=ops.adamw_ema_scalars_,
    ops=("adamw_ema_scalars_",),
    mutates=ADAMW_EMA.mutates,
    keep_dtype=(*ADAMW_EMA.keep_dtype, "scalars"),
    cases=[_from_tensor(case) for case in ADAMW_EMA.cases if case.name in (
        "no-tensors", "empty-tensors", "first-step", "odd", "scale-each", "lerp-from-gradient")],
    random_case=lambda draw: _from_tensor(_random(draw)),
)

SPECS = [ADAMW_EMA, ADAMW_EMA_SCALARS]
