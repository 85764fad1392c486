"""Cases for `assemble_predictor_input`."""

import torch

from .. import ops
from ._spec import Case, OpSpec


def _case(name, R, P, D, L, *, masked=0.4, wide=False, is_large=False):
    """masked: the share of mask tokens; wide: mask token and positions stay float32, as under autocast."""

    def make(g):
        index = torch.randint(0, R, (P,), generator=g) if R else torch.zeros(P, dtype=torch.int64)
        index[torch.rand(P, generator=g) < masked] = R
        prefix = "wide_" if wide else ""
        return {"context": torch.randn(R, D, generator=g), f"{prefix}mask_token": torch.randn(D, generator=g),
                "index": index, f"{prefix}positions": torch.randn(L, D, generator=g),
                "position_index": torch.randint(0, L, (P,), generator=g)}

    return Case(name, make, is_large)


def _call(**arguments):
    return ops.assemble_predictor_input(**{name.removeprefix("wide_"): value for name, value in arguments.items()})


def _random(draw):
    R, P, D, L, wide = draw(1, 40), draw(0, 90), draw(1, 70), draw(1, 20), draw(0, 1) == 1
    return _case(f"fuzz-{R}-{P}-{D}-{L}-{wide}", R, P, D, L, masked=draw(0, 10) / 10, wide=wide)


ASSEMBLE_PREDICTOR_INPUT = OpSpec(
    function=_call,
    ops=("assemble_predictor_input", "assemble_predictor_input_backward", "scatter_tokens"),
    gradients=("context", "mask_token", "positions", "wide_mask_token", "wide_positions"),
    keep_dtype=("wide_mask_token", "wide_positions"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cases=[
        _case("empty", 5, 0, 16, 4),
        _case("no-context", 0, 9, 16, 4, masked=1.0),
        _case("one", 1, 1, 1, 1, masked=0.0),
        _case("odd", 19, 37, 45, 11),
        _case("float32-stream", 19, 70, 24, 11, wide=True),
        _case("repeated", 3, 200, 33, 5, wide=True),
        _case("many-rows", 60, 1500, 8, 5, wide=True),
        _case("wide", 3, 7, 1100, 2, wide=True),
        _case("vits16-224-b1", 90, 4 * (90 + 33), 384, 196, masked=0.27, wide=True, is_large=True),
    ],
    random_case=_random,
    bench=[_case("vits16-224-b16", 16 * 90, 16 * 4 * (90 + 33), 384, 196, masked=0.27)],
)

SPECS = [ASSEMBLE_PREDICTOR_INPUT]
