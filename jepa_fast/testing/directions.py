"""Cases for `directions`."""

import torch

from .. import ops
from ._spec import Case, OpSpec


def _case(name, dim, num_slices, *, seed=0, step=0, rng="philox"):
    def make(g):
        return {"seed": seed, "step": torch.tensor(step), "dim": dim, "num_slices": num_slices, "rng": rng}

    return Case(name, make)


def _random(draw):
    dim, num_slices, seed, step = draw(1, 70), draw(1, 70), draw(0, 2**63 - 1), draw(0, 2**40)
    return _case(f"fuzz-{dim}-{num_slices}-{seed}-{step}", dim, num_slices, seed=seed, step=step)


SPECS = [OpSpec(
    function=ops.directions,
    ops=("directions",),
    dtypes=(torch.float32,),
    cases=[
        _case("one", 1, 1),
        _case("row", 1, 37, step=3),
        _case("column", 53, 1, seed=1),
        _case("odd", 45, 33, seed=7, step=11),
        _case("large-seed-and-step", 19, 65, seed=2**63 - 1, step=2**40 + 5),
        _case("torch", 16, 32, step=5, rng="torch"),
        _case("lejepa-128-1024", 128, 1024, step=1000),
    ],
    random_case=_random,
    bench=[_case("lejepa-128-1024", 128, 1024), _case("lejepa-512-4096", 512, 4096)],
)]
