"""Cases for `layer_norm`, with and without a residual."""

import torch

from .. import ops
from ._spec import Case, OpSpec


def _case(name, *shape, affine="both", wide=(), residual=False, offset=1.0, is_large=False):
    """affine: "both", "weight" or "none"; wide: which of weight, bias and residual stay float32 in every dtype of x."""

    def make(g):
        D = shape[-1]
        arguments = {"x": torch.randn(shape, generator=g) + offset * torch.randn(*shape[:-1], 1, generator=g)}
        if affine != "none":
            arguments["weight"] = 1 + 0.2 * torch.randn(D, generator=g)
        if affine == "both":
            arguments["bias"] = 0.3 * torch.randn(D, generator=g)
        if residual:
            arguments["residual"] = 2 * torch.randn(shape, generator=g)
        return {f"wide_{name}" if name in wide else name: value for name, value in arguments.items()}

    return Case(name, make, is_large)


def _call(x, **options):
    return ops.layer_norm(x, **{name.removeprefix("wide_"): value for name, value in options.items()})


def _random(**options):
    def random_case(draw):
        P, D = draw(0, 40), draw(20, 150)
        affine, wide = ("both", "weight", "none")[draw(0, 2)], (("weight", "bias", "residual"), ())[draw(0, 1)]
        return _case(f"fuzz-{P}-{D}-{affine}-{len(wide)}", P, D, affine=affine, wide=wide, **options)

    return random_case


def _cases(**options):
    return [
        _case("empty", 0, 16, **options),
        _case("one", 1, 2, **options),
        _case("one-row", 1, 45, **options),
        _case("no-affine", 33, 24, affine="none", **options),
        _case("weight-only", 19, 33, affine="weight", **options),
        _case("three-dimensions", 2, 19, 45, **options),
        _case("float32-stream", 70, 40, wide=("weight", "bias", "residual"), **options),
        _case("far-from-zero", 7, 77, offset=300.0, **options),
        _case("many-rows", 600, 8, **options),
        _case("wide", 3, 1999, **options),
        _case("wide-packs", 5, 1536, **options),
        _case("wide-float32-stream", 5, 1408, wide=("weight", "bias", "residual"), **options),
        _case("vits16-224-b1", 196, 384, **options),
    ]


_COMMON = {
    "function": _call,
    "gradients": ("x", "weight", "bias", "residual", "wide_weight", "wide_bias", "wide_residual"),
    "keep_dtype": ("wide_weight", "wide_bias", "wide_residual"),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def _gate(**options):
    """Rows of the official widths, as a block under autocast has them, and in float32."""
    wide = ("weight", "bias", "residual")
    return {torch.bfloat16: [_case(f"d{D}", 64, D, wide=wide, **options) for D in (384, 1024, 1280, 1408, 1664)],
            torch.float32: [_case("d1280", 64, 1280, **options)]}


LAYER_NORM = OpSpec(
    ops=("layer_norm", "layer_norm_backward"), cases=_cases(), random_case=_random(), gate=_gate(),
    bench=[_case("vits16-224-b16", 3136, 384, wide=("weight", "bias"))], **_COMMON)

ADD_LAYER_NORM = OpSpec(
    ops=("add_layer_norm", "layer_norm_backward"), cases=_cases(residual=True), random_case=_random(residual=True),
    gate=_gate(residual=True),
    bench=[_case("vits16-224-b16", 3136, 384, wide=("weight", "bias", "residual"), residual=True)], **_COMMON)

SPECS = [LAYER_NORM, ADD_LAYER_NORM]
