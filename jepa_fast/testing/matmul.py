"""Cases for `matmul`."""

import torch

from .. import ops
from ._spec import Case, OpSpec


def _case(name, M, K, N, *, has_bias=False, transposed=(), scale=1.0, powers=0, cancels=0.0):
    """`transposed`: which of a and b are the transposes of contiguous matrices.

    `powers`: columns of a are up to so many powers of two larger or smaller, rows of b the other way round. `cancels`: the
    second half of each sum takes away the first but for this share.
    """
    def make(g):
        a, b = scale * torch.randn(M, K, generator=g), torch.randn(K, N, generator=g)
        factor = torch.exp2((powers * (2 * torch.rand(K, generator=g) - 1)).round())
        a, b = a * factor, b / factor[:, None]
        if cancels:
            a, b = torch.cat([a, -a], 1), torch.cat([b, b + cancels * torch.randn(K, N, generator=g)])
        arguments = {"a": a, "b": b, "bias": torch.randn(N, generator=g) if has_bias else None}
        return arguments | {name: arguments[name].T.contiguous().T for name in transposed}

    return Case(name, make)


def _random(draw):
    M, K, N = (draw(0, 9) and draw(1, 100) for _ in range(3))
    transposed = [(), ("a",), ("b",), ("a", "b")][draw(0, 3)]
    scale, powers, has_bias = (1.0, 1e-8, 1e8)[draw(0, 2)], (0, 30)[draw(0, 1)], draw(0, 1) == 1
    return _case(f"fuzz-{M}-{K}-{N}-{'-'.join(transposed)}-{scale}-{powers}-{has_bias}", M, K, N, has_bias=has_bias,
                 transposed=transposed, scale=scale, powers=powers)


MATMUL = OpSpec(
    function=ops.matmul,
    ops=("matmul",),
    gradients=("a", "b", "bias"),
    dtypes=(torch.float32, torch.bfloat16),
    cases=[
        _case("no-rows", 0, 3, 5, has_bias=True),
        _case("nothing-to-sum", 4, 0, 5, has_bias=True),
        _case("no-columns", 4, 3, 0),
        _case("one", 1, 1, 1),
        _case("row", 1, 70, 33, has_bias=True),
        _case("column", 35, 70, 1),
        _case("tiles", 32, 64, 32, has_bias=True),
        _case("beyond-tiles", 33, 65, 49, has_bias=True, transposed=("b",)),
        _case("both-transposed", 47, 81, 70, transposed=("a", "b")),
        _case("cancels", 40, 50, 60, cancels=1e-4),
        _case("long-sum", 20, 900, 36, transposed=("a",)),
        _case("vits16-224-b1", 196, 384, 1536, has_bias=True, transposed=("b",)),
    ],
    random_case=_random,
    bench=[_case(f"vits16-224-b16-{rows}-{name}", *shape, has_bias=name == "forward", transposed=transposed)
           for rows in (6080, 800)
           for name, shape, transposed in (("forward", (rows, 384, 1536), ("b",)), ("grad-x", (rows, 1536, 384), ()),
                                           ("grad-weight", (1536, rows, 384), ("a",)))],
)

SPECS = [MATMUL]
