"""Cases for `latent_loss`."""

import torch
import torch.nn.functional as F

from .. import ops
from ._spec import Case, OpSpec


def _case(name, P, R, D, *, beta=1.0, weight=False, index=True, stats=True, offset=1.0, spread=0.7):
    """Predictions around their normalised targets, `spread` away: both pieces of smooth L1 are met.

    Rows of target have a mean of about `offset`, which is what makes their variance hard.
    """

    def make(g):
        target = 1.5 * torch.randn(R, D, generator=g) + offset * torch.randn(R, 1, generator=g)
        target_idx = torch.randint(0, max(R, 1), (P,), generator=g) if index else None
        rows = target[target_idx] if index else target
        prediction = F.layer_norm(rows, (D,)) + spread * torch.randn(P, D, generator=g)
        arguments = {"prediction": prediction, "target": target, "target_idx": target_idx, "beta": beta,
                     "return_stats": stats}
        if weight:
            arguments["weight"] = torch.rand(P, generator=g) / max(P, 1)
        return arguments

    return Case(name, make)


def _loss_and_stats(**arguments):
    out = ops.latent_loss(**arguments)
    return (out[0], *out[1].values()) if arguments["return_stats"] else out


def _random(draw):
    P, R, D = draw(0, 40), draw(1, 30), draw(1, 90)
    beta, weight, index = (0.0, 0.1, 1.0, 2.0)[draw(0, 3)], draw(0, 1) == 1, draw(0, 1) == 1
    R = R if index else P
    return _case(f"fuzz-{P}-{R}-{D}-{beta}-{weight}-{index}", P, R, D, beta=beta, weight=weight, index=index)


LATENT_LOSS = OpSpec(
    function=_loss_and_stats,
    ops=("latent_loss", "latent_loss_backward"),
    gradients=("prediction",),
    keep_dtype=("weight",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cases=[
        _case("empty", 0, 5, 16),
        _case("empty-weight", 0, 5, 16, weight=True),
        _case("one-row", 1, 1, 45),
        _case("one-column", 5, 3, 1),
        _case("odd", 6, 4, 7, weight=True),
        _case("l1", 19, 11, 45, beta=0.0),
        _case("l1-weight", 19, 11, 33, beta=0.0, weight=True),
        _case("small-beta", 9, 9, 64, beta=0.05, index=False),
        _case("repeated", 50, 3, 33, beta=2.0),
        _case("no-stats", 8, 5, 24, stats=False),
        _case("far-from-zero", 7, 5, 77, offset=3000.0),
        _case("wide", 3, 2, 5000),
        _case("vits16-224-b2", 2 * 4 * 33, 2 * 196, 384),
    ],
    random_case=_random,
    gate={torch.bfloat16: [_case(f"d{D}", 64, 64, D, weight=True) for D in (384, 1024, 1280, 1408)],
          torch.float32: [_case("l1-d1280", 64, 64, 1280, beta=0.0)]},
    bench=[_case("vits16-224-b16", 16 * 4 * 33, 16 * 196, 384),
           _case("vitl16-clip-b2-l1", 2 * 1400, 2 * 1568, 1024, beta=0.0, weight=True)],
)

SPECS = [LATENT_LOSS]
