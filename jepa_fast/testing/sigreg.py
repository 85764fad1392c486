"""Cases for `sigreg`, and the eager formulation it replaces."""

import torch
from torch import Tensor

from .. import ops
from ..ops import Quadrature
from ._spec import Case, OpSpec

OFFICIAL = Quadrature.half_line(3.0, 17)
QUADRATURES = {
    "official": OFFICIAL,
    "wide-33": Quadrature.half_line(5.0, 33),
    "two-knots": Quadrature.half_line(3.0, 2),
    "bcs": Quadrature.trapezoid(-3.0, 3.0, 10),
    "lewm_paper": Quadrature.trapezoid(0.2, 4.0, 17),
}


def _case(name, lead, N, D, K, *, quadrature="official", spread=1.0, mean=0.0, mask=None, is_large=False,
          **options):
    """mask: the share of rows that count; the first group of several has none."""
    options = {"reduction": None, "quadrature": QUADRATURES.get(quadrature, quadrature)} | options

    def make(g):
        arguments = {"x": mean + spread * torch.randn(*lead, N, D, generator=g)}
        directions = torch.randn(D, K, generator=g)
        arguments["directions"] = directions / directions.norm(dim=0)
        if mask is not None:
            arguments["row_mask"] = torch.rand(*lead, N, generator=g) < mask
            if lead and lead[0] > 1:
                arguments["row_mask"][0] = False
        return arguments | options

    return Case(name, make, is_large)


def _random(draw):
    # more than a handful of numbers in every result: of a single one, plain sometimes hits the last bit by luck
    lead, N, D, K = [(), (1,), (3,), (2, 2)][draw(0, 3)], draw(2, 90), draw(3, 40), draw(8, 70)
    quadrature = sorted(QUADRATURES)[draw(0, len(QUADRATURES) - 1)]
    spread, masked, flat = [0.01, 1.0, 10.0][draw(0, 2)], draw(0, 1) == 1, draw(0, 1) == 1
    return _case(f"fuzz-{lead}-{N}-{D}-{K}-{quadrature}-{spread}-{masked}-{flat}", lead, N, D, K, quadrature=quadrature,
                 spread=spread, mask=0.7 if masked else None, group_dims="flatten" if flat else "leading")


SPECS = [OpSpec(
    function=ops.sigreg,
    ops=("sigreg_sums", "sigreg_sums_backward", "sigreg_statistic", "sigreg_statistic_backward"),
    gradients=("x",),
    dtypes=(torch.float32, torch.bfloat16, torch.float64),
    cases=[
        _case("no-groups", (0,), 5, 3, 4),
        _case("no-rows", (2,), 0, 3, 4),
        _case("one-row", (), 1, 8, 40),
        _case("one-dim", (2,), 33, 1, 40),
        _case("one-slice", (9,), 50, 12, 1),
        _case("two-knots", (2,), 19, 7, 33, quadrature="two-knots"),
        _case("33-knots", (2, 2), 21, 9, 17, quadrature="wide-33"),
        _case("half-integer-grid", (2,), 48, 20, 24, quadrature="bcs", scale="none"),
        _case("second-start", (3,), 20, 12, 30, quadrature="lewm_paper", scale=2.5),
        _case("mask", (3,), 37, 10, 20, mask=0.6),
        _case("flatten-mask", (3,), 37, 10, 20, mask=0.6, group_dims="flatten", scale="N"),
        _case("mean", (4,), 64, 16, 256, reduction="mean"),
        _case("sum", (3,), 17, 9, 300, reduction="sum", is_large=True),
        _case("collapsed", (2,), 64, 16, 50, spread=1e-3, mean=0.5),
        _case("wide", (2,), 64, 16, 50, spread=12.0, quadrature="wide-33"),
        _case("pieces", (3,), 1500, 5, 300, is_large=True),
        _case("tokens-65536", (), 65536, 8, 16, is_large=True),
    ],
    random_case=_random,
    # a sum of squared differences C - phi: the roundings of C grow in it, ours and those of plain not always alike
    floor=4.0,
    bench=[
        _case("lejepa-8x256x128-1024", (8,), 256, 128, 1024, reduction="mean"),
        _case("lewm-4x128x192-1024", (4,), 128, 192, 1024, reduction="mean"),
        _case("minimal-4x256x16-256", (4,), 256, 16, 256, reduction="mean"),
        _case("lejepa-8x256x512-1024", (8,), 256, 512, 1024, reduction="mean"),
    ],
    gate={torch.bfloat16: [_case("minimal", (2,), 128, 16, 256), _case("lewm", (2,), 128, 192, 256),
                           _case("lejepa", (2,), 128, 512, 256), _case("mask", (2,), 128, 192, 256, mask=0.5),
                           _case("bcs", (2,), 128, 128, 256, quadrature="bcs")],
          torch.float32: [_case("lewm", (2,), 128, 192, 256), _case("mask", (2,), 128, 192, 256, mask=0.5)]},
)]


def eager_sigreg(x: Tensor, directions: Tensor, quadrature: Quadrature = OFFICIAL) -> Tensor:
    """The official formulation, for benches: x [V, N, D] -> mean of the statistic times N, all tensors in full.

    Like the official code it evaluates the knot t = 0 as well, which adds nothing.
    """
    t = x.new_tensor((0.0, *quadrature.knots))
    phi, weights = x.new_tensor((1.0, *quadrature.phi)), x.new_tensor((quadrature.t_step, *quadrature.weights))
    phase = (x @ directions).unsqueeze(-1) * t  # [V, N, K, J]
    cos, sin = phase.cos().mean(-3), phase.sin().mean(-3)
    error = (cos - phi).square() + sin.square()
    return (error @ weights * x.shape[-2]).mean()
