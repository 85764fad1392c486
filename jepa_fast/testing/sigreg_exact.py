"""Cases for `sigreg_exact`."""

import torch

from .. import ops
from ._spec import Case, OpSpec
from .sigreg import QUADRATURES


def _case(name, lead, N, D, *, quadrature="official", spread=1.0, mean=0.0, mask=None, **options):
    def make(g):
        arguments = {"x": mean + spread * torch.randn(*lead, N, D, generator=g), "quadrature": QUADRATURES[quadrature]}
        if mask is not None:
            arguments["row_mask"] = torch.rand(*lead, N, generator=g) < mask
            if lead and lead[0] > 1:
                arguments["row_mask"][0] = False
        return arguments | {"reduction": None} | options

    return Case(name, make)


def _random(draw):
    lead, N, D = [(), (3,), (2, 2)][draw(0, 2)], draw(2, 40), draw(1, 40)
    quadrature = sorted(QUADRATURES)[draw(0, len(QUADRATURES) - 1)]
    spread, masked, flat = [0.01, 1.0, 10.0][draw(0, 2)], draw(0, 1) == 1, draw(0, 1) == 1
    return _case(f"fuzz-{lead}-{N}-{D}-{quadrature}-{spread}-{masked}-{flat}", lead, N, D, quadrature=quadrature,
                 spread=spread, mask=0.7 if masked else None, group_dims="flatten" if flat else "leading")


SPECS = [OpSpec(
    function=ops.sigreg_exact,
    ops=("sigreg_exact", "sigreg_exact_backward"),
    gradients=("x",),
    dtypes=(torch.float32, torch.bfloat16, torch.float64),
    cases=[
        _case("no-groups", (0,), 5, 3),
        _case("no-rows", (2,), 0, 12),
        _case("one-row", (), 1, 16),
        _case("one-dim", (2,), 33, 1),
        _case("two-dims", (2,), 12, 2, quadrature="bcs", scale="none"),
        _case("mask", (3,), 37, 10, mask=0.6),
        _case("flatten", (3,), 17, 20, group_dims="flatten", mask=0.6),
        _case("second-start", (3,), 20, 12, quadrature="lewm_paper", scale=2.5),
        _case("collapsed", (2,), 24, 16, spread=1e-3, mean=5.0),
        _case("wide", (2,), 24, 16, spread=12.0, quadrature="wide-33"),
        _case("mean", (4,), 24, 64, reduction="mean"),
        _case("lejepa-2x256x128", (2,), 256, 128),
    ],
    random_case=_random,
    bench=[_case("lejepa-8x256x128", (8,), 256, 128, reduction="mean")],
)]
