"""SIGReg against the official numbers, lightly, formulas written anew, and its own promises."""

import contextlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_data import config, error, golden, under

from jepa_fast import ops
from jepa_fast.nn.sigreg import PRESETS, SIGReg
from jepa_fast.ops import Quadrature
from jepa_fast.testing import OPS
from jepa_fast.testing.sigreg import eager_sigreg

BACKENDS = [backend for backend in OPS["sigreg_sums"].backends() if backend != "triton"]  # see test_sigreg_triton.py
CALLS = [(case, call) for case, setting in config("lejepa_sigreg")["cases"].items()
         for call in range(1, setting["calls"] + 1)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    # the best one is not forced: what it lacks, float64, runs on the next
    with ops.use_backend("plain") if request.param == "plain" else contextlib.nullcontext():
        yield request.param


def with_gradient(function, x):
    x = x.clone().requires_grad_()
    loss = function(x)
    loss.backward()
    return loss.detach(), x.grad


def directions_of(dim, num_slices, seed=0):
    return ops.directions(seed, 0, dim, num_slices)


# ---- the official code


def assert_drawn_as_official(drawn, golden_directions):
    """To the bit; PyTorch's own normal numbers have other last bits where there is no AVX2."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(drawn, golden_directions)
    torch.testing.assert_close(drawn, golden_directions, rtol=1e-5, atol=1e-6)


def official(case):
    setting = config("lejepa_sigreg")["cases"][case]
    module = SIGReg.from_preset("official", t_max=setting["t_max"], num_knots=setting["knots"],
                                num_slices=setting["slices"], reduction=setting["reduction"],
                                clip=setting.get("clip_value"))
    module.global_step.fill_(setting["step"])
    return setting, module


@pytest.mark.parametrize("case", config("lejepa_sigreg")["cases"])
def test_golden_calls(case, backend):
    tensors = golden("lejepa_sigreg")
    setting, module = official(case)
    tolerance = 2e-2 if setting["autocast"] else 5e-6
    for call in range(1, setting["calls"] + 1):
        expected, exact = under(tensors, f"{case}/call{call}/"), under(tensors, f"f64/{case}/call{call}/")
        drawn = ops.directions(0, module.global_step.clone(), setting["shape"][-1], setting["slices"], "torch")
        assert_drawn_as_official(drawn, expected["directions"])
        with torch.autocast("cpu", torch.bfloat16, enabled=setting["autocast"]):
            statistic = ops.sigreg(expected["x"], drawn, quadrature=module.quadrature, reduction=None)
            loss, grad = with_gradient(module, expected["x"])
        assert loss.dtype == statistic.dtype == torch.float32
        for name, ours in {"statistic": statistic, "loss": loss, "grad_x": grad}.items():
            assert error(ours, expected[name]) < tolerance, name
            assert error(ours, exact[name]) < 5e-6, name  # with autocast too: ours stays in float32
    assert module.global_step == tensors[f"{case}/global_step_after"]


@pytest.mark.parametrize("case, call", CALLS)
def test_golden_float64(case, call):
    """The same formula in float64, with the official float32 constants, to the last digits."""
    tensors = golden("lejepa_sigreg")
    expected, exact = under(tensors, f"{case}/call{call}/"), under(tensors, f"f64/{case}/call{call}/")
    t, phi, weights = (tensors[f"{case}/quadrature/{name}"].double() for name in ("t", "phi", "weights"))
    quadrature = Quadrature(t[1].item(), t[1].item(), tuple(phi[1:].tolist()), tuple(weights[1:].tolist()))
    setting = config("lejepa_sigreg")["cases"][case]
    x, directions = expected["x"].double(), expected["directions"].double()
    options = {"clip": setting.get("clip_value"), "reduction": setting["reduction"]}
    loss, grad = with_gradient(lambda x: ops.sigreg(x, directions, quadrature=quadrature, **options), x)
    statistic = ops.sigreg(x, directions, quadrature=quadrature, reduction=None)
    for name, ours in {"statistic": statistic, "loss": loss, "grad_x": grad}.items():
        assert error(ours, exact[name]) < 1e-10, name


@pytest.mark.parametrize("knots", [17, 9])
def test_golden_minimal(knots, backend):
    tensors, lamb = under(golden("lejepa_minimal"), f"knots{knots}/"), config("lejepa_minimal")["lamb"]
    module = SIGReg.from_preset("minimal", num_knots=knots)
    loss, grad = with_gradient(lambda x: module(x, directions=tensors["directions"]), tensors["x"])
    assert error(loss, tensors["sigreg"]) < 5e-6
    assert error(grad, tensors["grad_sigreg"]) < 5e-6

    def whole(x):
        return lamb * module(x, directions=tensors["directions"]) + (1 - lamb) * (x.mean(0) - x).square().mean()

    loss, grad = with_gradient(whole, tensors["x"])
    assert error(loss, tensors["loss"]) < 5e-6
    assert error(grad, tensors["grad_loss"]) < 5e-6


def test_golden_bcs(backend):
    module = SIGReg.from_preset("bcs", num_slices=config("eb_jepa_losses")["slices"])
    for call in (1, 2, 3):
        tensors = under(golden("eb_jepa_losses"), f"bcs/call{call}/")
        drawn = ops.directions(0, module.global_step.clone(), *tensors["directions"].shape, "torch")
        assert_drawn_as_official(drawn, tensors["directions"])
        z1, z2 = tensors["z1"].clone().requires_grad_(), tensors["z2"].clone().requires_grad_()
        bcs = module(torch.stack([z1, z2]))
        assert error(bcs, tensors["bcs_loss"]) < 5e-6
        loss = (z1 - z2).square().mean() + 10 * bcs
        loss.backward()
        assert error(loss, tensors["loss"]) < 5e-6
        assert error(z1.grad, tensors["grad_z1"]) < 5e-6 and error(z2.grad, tensors["grad_z2"]) < 5e-6


def test_golden_epps_pulley(backend):
    """Ten knots from -3 to 3 on numbers that are projections already."""
    tensors = golden("eb_jepa_losses")
    x, quadrature = tensors["epps_pulley/x"].clone().requires_grad_(), Quadrature.trapezoid(-3.0, 3.0, 10)
    statistic = ops.sigreg(x, torch.eye(7), quadrature=quadrature, scale="none", reduction=None)
    statistic.backward(tensors["epps_pulley/upstream"])
    assert error(statistic, tensors["epps_pulley/out"]) < 5e-6
    assert error(statistic, tensors["f64/epps_pulley/out"]) < 5e-6
    assert error(x.grad, tensors["epps_pulley/grad_x"]) < 5e-6


def test_lightly():
    """lightly's SIGReg and LeJEPALoss, given the same directions: values and gradients."""
    from lightly.loss.lejepa_loss import LeJEPALoss

    local_views, global_views = torch.randn(4, 32, 24), torch.randn(2, 32, 24)
    directions = directions_of(24, 64)
    theirs, ours = LeJEPALoss(sigreg_num_vectors=64), SIGReg.from_preset("lightly")
    theirs.sigreg._generate_unit_vectors = lambda device, dtype, num_features: directions
    both = torch.cat([global_views, local_views])
    (expected, expected_grad), (loss, grad) = (
        with_gradient(theirs.sigreg, both), with_gradient(lambda x: ours(x, directions=directions), both))
    assert error(loss, expected) < 2e-6 and error(grad, expected_grad) < 5e-6
    invariance = (both[:2].mean(0) - both).square().mean()
    whole = 0.05 * ours(both, directions=directions) + 0.95 * invariance
    assert error(whole, theirs(local_proj=local_views, global_proj=global_views)) < 2e-6


# ---- formulas written anew: complex exponentials on the whole, unfolded grid, in float64


def brute_force(x, directions, knots, weights, factor):
    """x [V, N, D]; mean over groups and slices of factor * sum of weights * f |E exp(itp) - f|^2, f = exp(-t^2 / 2)."""
    p = np.asarray(x, np.float64) @ np.asarray(directions, np.float64)
    total = 0.0
    for t, weight in zip(knots, weights, strict=True):
        target = math.exp(-t * t / 2)
        total = total + weight * target * abs(np.exp(1j * t * p).mean(1) - target) ** 2
    return factor * total.mean()


def trapezoid_weights(knots):
    weights = np.full(len(knots), knots[1] - knots[0])
    weights[[0, -1]] /= 2
    return weights


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, backend):
    x, N = torch.randn(3, 40, 11, generator=torch.Generator().manual_seed(1)), 40
    directions = directions_of(11, 29)
    flat = preset == "stable_pretraining"
    knots = {"paper": np.linspace(-5, 5, 17), "bcs": np.linspace(-3, 3, 10), "lewm_paper": np.linspace(0.2, 4, 17)}.get(
        preset, np.linspace(-3, 3, 33))
    factor = {"lewm_paper": 1, "bcs": 1, "stable_pretraining": 3 * N}.get(preset, N)
    expected = brute_force(x.reshape(1, 3 * N, 11) if flat else x, directions, knots, trapezoid_weights(knots), factor)
    assert float(SIGReg.from_preset(preset)(x, directions=directions)) == pytest.approx(expected, rel=1e-6)
    num_slices = {"minimal": 256, "paper": 256, "bcs": 256}.get(preset, 1024)
    statistic = SIGReg.from_preset(preset, reduction=None)(x)
    assert statistic.shape == ((num_slices,) if flat else (3, num_slices))


def test_odd_and_even_symmetric_grids_fold():
    assert Quadrature.trapezoid(-5.0, 5.0, 17).num_knots == 8  # and t = 0, which adds nothing
    assert Quadrature.trapezoid(-3.0, 3.0, 10).knots == pytest.approx([1 / 3, 1, 5 / 3, 7 / 3, 3])
    half, whole = Quadrature.half_line(3.0, 17), Quadrature.trapezoid(-3.0, 3.0, 33)
    assert half == whole and half.knots[0] == 3 / 16


@pytest.mark.parametrize("spread, offset", [(1.0, 0.0), (1e-3, 0.0), (5.0, 0.0), (1.0, 3.0)],
                         ids=["gauss", "collapsed", "wide", "shifted"])
def test_strict_float32(spread, offset, backend):
    """As near to float64 as the recommendation asks, and no further from it than the eager formulation by much."""
    x = offset + spread * torch.randn(2, 256, 128, generator=torch.Generator().manual_seed(2))
    directions = directions_of(128, 256)
    exact, exact_grad = with_gradient(lambda x: ops.sigreg(x, directions), x.double())
    loss, grad = with_gradient(lambda x: ops.sigreg(x, directions), x)
    eager, eager_grad = with_gradient(lambda x: eager_sigreg(x, directions), x)
    assert error(loss, exact) < 2e-6 and error(grad, exact_grad) < 5e-6
    assert error(grad, exact_grad) <= 2 * error(eager_grad, exact_grad)
    assert error(loss, exact) <= 2 * error(eager, exact) + 2e-7


def test_many_rows_stay_exact(backend):
    """65,536 rows of a normal: the statistic is a difference 300 times smaller than the sums it comes from."""
    x = torch.randn(65536, 8, generator=torch.Generator().manual_seed(3))
    directions = directions_of(8, 16)
    exact, exact_grad = with_gradient(lambda x: ops.sigreg(x, directions), x.double())
    loss, grad = with_gradient(lambda x: ops.sigreg(x, directions), x)
    assert error(loss, exact) < 1e-5 and error(grad, exact_grad) < 2e-5


def test_half_precision_is_computed_in_float32(backend):
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
        directions = directions_of(32, 64)
        exact, exact_grad = with_gradient(lambda x, d=directions: ops.sigreg(x, d), x.double())
        loss, grad = with_gradient(lambda x, d=directions: ops.sigreg(x, d), x)
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        assert error(loss, exact) < 1e-5 and error(grad, exact_grad) < torch.finfo(dtype).eps
    # more rows than bfloat16 can count
    x = torch.randn(1000, 4).bfloat16()
    assert error(ops.sigreg(x, directions_of(4, 8)), ops.sigreg(x.double(), directions_of(4, 8))) < 1e-5


# ---- masks, groups, NaN


@pytest.mark.parametrize("group_dims", ["leading", "flatten"])
def test_row_mask_equals_dropping_rows(group_dims, backend):
    g = torch.Generator().manual_seed(5)
    x, mask = torch.randn(3, 50, 9, generator=g), torch.rand(3, 50, generator=g) < 0.5
    mask[1] = True
    directions = directions_of(9, 33)
    garbage = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    statistic, grad = with_gradient(
        lambda x: ops.sigreg(x, directions, row_mask=mask, group_dims=group_dims, reduction="sum"), garbage)
    expected_grad = torch.zeros_like(x)
    if group_dims == "flatten":
        expected, expected_grad[mask] = with_gradient(lambda x: ops.sigreg(x, directions, reduction="sum"), x[mask])
    else:
        expected = 0
        for v in range(3):
            part, expected_grad[v, mask[v]] = with_gradient(
                lambda x: ops.sigreg(x, directions, reduction="sum"), x[v, mask[v]])
            expected = expected + part
    assert error(statistic, expected) < 1e-6 and error(grad, expected_grad) < 1e-6
    assert (grad[~mask] == 0).all()


def test_group_without_rows_counts_as_zero(backend):
    x, mask = torch.randn(2, 7, 5), torch.tensor([[True] * 7, [False] * 7])
    for scale in ("N", "N_global", "none", 3.0):
        statistic, grad = with_gradient(
            lambda x, s=scale: ops.sigreg(x, directions_of(5, 6), row_mask=mask, scale=s, reduction=None).sum(1)[1], x)
        assert statistic == 0 and (grad == 0).all()


def test_nan_and_infinity_reach_the_loss_of_their_group(backend):
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(2, 30, 5)
        x[1, 17, 3] = bad
        statistic = ops.sigreg(x, directions_of(5, 40), reduction=None)
        assert statistic[0].isfinite().all() and statistic[1].isnan().all()
        assert ops.sigreg(x, directions_of(5, 40)).isnan()


def test_huge_and_tiny_numbers_stay_finite(backend):
    for size in (1e-40, 1e-30, 1e10, 1e30):
        loss, grad = with_gradient(lambda x: ops.sigreg(x, directions_of(5, 40)), size * torch.randn(2, 30, 5))
        assert loss.isfinite() and grad.isfinite().all()


def test_clipped_statistics_pass_no_gradient(backend):
    x, directions = torch.randn(2, 30, 5), directions_of(5, 6)
    full = ops.sigreg(x, directions, reduction=None)
    clip = full.median().item()
    x.requires_grad_()
    clipped = ops.sigreg(x, directions, reduction=None, clip=clip)
    assert torch.equal(clipped, torch.where(full < clip, 0, full)) and (clipped == 0).any()
    (grad,) = torch.autograd.grad(clipped[full < clip].sum(), x)
    assert (grad == 0).all()


# ---- steps, seeds, promises


def test_step_moves_on_in_training_only_and_is_saved():
    module, x = SIGReg(num_slices=8), torch.randn(20, 4)
    first, second = module(x), module(x)
    assert module.global_step.item() == 2 and first != second
    assert list(module.state_dict()) == ["global_step"]
    again = SIGReg(num_slices=8)
    again.load_state_dict(module.state_dict())
    module.eval()
    assert module(x) == module(x) == again(x) and again(x) != module(x)
    assert first == ops.sigreg(x, step=0, num_slices=8) == ops.sigreg(x, ops.directions(0, 0, 4, 8))
    assert ops.sigreg(x, step=0, num_slices=8, seed=1) != first


@pytest.mark.parametrize("preset", PRESETS)
def test_module_compiles_without_a_graph_break(preset):
    """A graph break, or a tensor read on the host, would be an error here."""
    x = torch.randn(3, 20, 6)
    module, eager = SIGReg.from_preset(preset, num_slices=16), SIGReg.from_preset(preset, num_slices=16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (loss, grad), (expected, expected_grad) = with_gradient(compiled, x), with_gradient(eager, x)
        assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)
    assert module.global_step == 2


def test_no_second_derivative():
    x = torch.randn(10, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(ops.sigreg(x, step=0, num_slices=8), x, create_graph=True)


@pytest.mark.skipif("cpp" not in BACKENDS, reason=str(ops.COMPILED_MISSING))
def test_kernel_does_not_depend_on_threads():
    p = torch.randn(3, 333, 77)
    grads = torch.randn(3, 2, 16, 77)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        sums, gradient = torch.zeros(3, 2, 16, 77, dtype=torch.float64), p.clone()
        torch.ops.jepa_fast_C.sigreg_add_sums(p, None, 0.1875, 0.1875, sums)
        torch.ops.jepa_fast_C.sigreg_gradient_(gradient, None, grads, 0.1875, 0.1875)
        results.append((sums, gradient))
    torch.set_num_threads(threads)
    for sums, gradient in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(gradient, results[0][1])


MEMORY = """
import resource, torch
from jepa_fast import ops
def step(V, N, D, K):
    x = torch.randn(V, N, D, requires_grad=True)
    ops.sigreg(x, step=0, num_slices=K).backward()
step(1, 64, 16, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step({})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif("cpp" not in BACKENDS, reason=str(ops.COMPILED_MISSING))
@pytest.mark.parametrize("V, N, D, K", [(8, 256, 128, 1024), (4, 128, 192, 1024), (1, 65536, 16, 256)])
def test_memory(V, N, D, K):
    """At most a twentieth of the six tensors [V, N, K, 17] that the eager formulation holds, all included."""
    code, env = MEMORY.format(f"{V}, {N}, {D}, {K}"), os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= 6 * V * N * K * 17 * 4 / 20


# ---- bad input


@pytest.mark.parametrize("options, message", [
    ({"x": torch.randn(4)}, r"x must be floating point \[..., N, D\], got \[4\] torch.float32"),
    ({"x": torch.ones(4, 3, dtype=torch.int64)}, r"x must be floating point .* got \[4, 3\] torch.int64"),
    ({"directions": torch.randn(4, 8)}, r"directions must be floating point \[D, K\] with D = 3, got \[4, 8\]"),
    ({"directions": torch.randn(3, 8, requires_grad=True)}, "directions are constants"),
    ({"directions": None}, "sigreg needs directions, or step to draw them"),
    ({"directions": None, "step": 0, "num_slices": 0}, "dim and num_slices must be at least 1, got 3 and 0"),
    ({"directions": None, "step": torch.zeros(1)}, r"step must be an int or a 0-dim int64 tensor, got \[1\]"),
    ({"directions": None, "step": 0, "rng": "numpy"}, "rng must be one of philox, torch, got 'numpy'"),
    ({"directions": None, "step": 0, "seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
    ({"row_mask": torch.ones(5, dtype=torch.bool)}, r"row_mask must be \[4\] bool, got \[5\] torch.bool"),
    ({"row_mask": torch.ones(4)}, r"row_mask must be \[4\] bool, got \[4\] torch.float32"),
    ({"group_dims": "views"}, "group_dims must be one of leading, flatten, got 'views'"),
    ({"reduction": "max"}, "reduction must be one of mean, sum, None, got 'max'"),
    ({"scale": "n"}, "scale must be one of N, N_global, none, got 'n'"),
    ({"ddp_weighting": "both"}, "ddp_weighting must be one of rank, sample, got 'both'"),
    ({"process_group": "world"}, "process_group needs torch.distributed.init_process_group to be called first"),
    ({"process_group": "all"}, """process_group must be None, "auto", "world" or a ProcessGroup, got 'all'"""),
])
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        ops.sigreg(**{"x": torch.randn(4, 3), "directions": torch.randn(3, 8)} | options)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_knots must be at least 2, got 1"):
        SIGReg.from_preset("official", num_knots=1)
    with pytest.raises(ValueError, match="t_min must be -t_max or between 0 and t_max, got t_min 4.0 and t_max 3.0"):
        Quadrature.trapezoid(4.0, 3.0, 5)
    with pytest.raises(ValueError, match="preset must be one of official, .*, got 'lejepa'"):
        SIGReg.from_preset("lejepa")
    with pytest.raises(ValueError, match="SIGReg has no option slices"):
        SIGReg(slices=3)
