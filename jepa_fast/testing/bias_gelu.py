"""Cases for `bias_gelu`."""

import torch

from .. import ops
from ._spec import Case, OpSpec


def _case(name, *shape, scale=1.0, shift=0.0, low=None, high=None):
    """x of the shape, normal or uniform in [low, high]; its last dimension is D."""

    def make(g):
        x = scale * torch.randn(shape, generator=g) + shift
        if low is not None:
            x = low + (high - low) * torch.rand(shape, generator=g)
        return {"x": x, "bias": 0.3 * torch.randn(shape[-1], generator=g)}

    return Case(name, make)


def _mixed(name, *shape):
    """Float32 bias in every dtype of x, as under autocast."""

    def make(g):
        return {"x": torch.randn(shape, generator=g), "float32_bias": 0.3 * torch.randn(shape[-1], generator=g)}

    return Case(name, make)


def _random(draw):
    # wide enough that the norm over D of the bias gradient, whose sums cancel, is no matter of luck; narrow ones are
    # compared element by element in tests/test_bias_gelu.py
    P, D, scale, shift = draw(0, 80), draw(40, 130), (0.01, 1.0, 8.0)[draw(0, 2)], (0.0, -6.0, 6.0)[draw(0, 2)]
    make = _mixed if draw(0, 3) == 0 else _case
    options = {} if make is _mixed else {"scale": scale, "shift": shift}
    return make(f"fuzz-{P}-{D}-{scale}-{shift}-{make.__name__}", P, D, **options)


def _call(x, bias=None, float32_bias=None):
    return ops.bias_gelu(x, bias if float32_bias is None else float32_bias)


BIAS_GELU = OpSpec(
    function=_call,
    ops=("bias_gelu", "bias_gelu_backward"),
    gradients=("x", "bias", "float32_bias"),
    keep_dtype=("float32_bias",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cases=[
        _case("empty", 0, 16),
        _case("no-columns", 3, 0),
        _case("one", 1, 1),
        _case("one-row", 1, 45),
        _case("odd", 33, 7),
        _case("three-dimensions", 2, 19, 45),
        _mixed("float32-bias", 70, 33),
        _case("large", 40, 64, low=-30.0, high=30.0),
        _case("negative-tail", 40, 64, low=-13.0, high=-3.0),
        _case("small", 40, 50, scale=1e-4),
        _case("tiles", 37, 1100),
        _case("one-sign", 300, 24, low=2.0, high=4.0),
        _case("vits16-224-b1", 196, 1536),
    ],
    random_case=_random,
    gate={torch.bfloat16: [_mixed("vith14", 64, 5120), _mixed("vits16", 64, 1536)],
          torch.float32: [_case("vith14", 64, 5120)]},
    bench=[_case(f"vits16-224-b16-{rows}", rows, 1536) for rows in (6080, 3136, 960)],
)

SPECS = [BIAS_GELU]
