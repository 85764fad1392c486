"""Cases for `multiblock`."""

import torch

from .. import ops
from ._spec import Case, OpSpec


def _case(name, grid, batch_size, *, seed=0, step=0, **settings):
    def make(g):
        return {"step": torch.tensor(step), "grid": grid, "batch_size": batch_size, "seed": seed} | settings

    return Case(name, make)


def _random(draw):
    def interval(low, high):  # in hundredths
        return tuple(sorted((draw(low, high) / 100, draw(low, high) / 100)))

    grid, seed, step, first_sample = (draw(2, 12), draw(1, 12)), draw(0, 2**63 - 1), draw(0, 2**32 - 1), draw(0, 2**20)
    settings = {"num_targets": draw(1, 5), "num_contexts": draw(1, 3), "target_scale": interval(1, 100),
                "context_scale": interval(30, 100), "aspect_ratio": interval(30, 300), "min_keep": draw(0, 40),
                "allow_overlap": draw(0, 1) == 1}
    return _case(f"fuzz-{grid}-{seed}-{step}-{first_sample}-{settings}", grid, draw(1, 4), seed=seed, step=step,
                 first_sample=first_sample, **settings)


SPECS = [OpSpec(
    function=ops.multiblock,
    ops=("multiblock",),
    dtypes=(torch.float32,),
    copies=True,
    cases=[
        _case("two-tokens", (1, 2), 3),
        _case("column", (7, 1), 2, min_keep=0),
        _case("one-sample", (14, 14), 1, seed=2**63 - 1, step=2**32 - 1, first_sample=2**32 - 3),
        _case("wide", (5, 19), 4, num_contexts=3, num_targets=2),
        _case("overlap", (12, 10), 4, allow_overlap=True),
        _case("never-enough", (6, 6), 5, target_scale=(0.6, 1.0), min_keep=20),
        _case("never-enough-overlap", (6, 6), 3, context_scale=(0.3, 0.4), min_keep=34, allow_overlap=True),
        _case("vits16-224-b8", (14, 14), 8, step=7),
    ],
    random_case=_random,
    bench=[_case("vits16-224-b16", (14, 14), 16), _case("vith14-224-b128", (16, 16), 128)],
)]
