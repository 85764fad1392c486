"""SIGReg as each code base writes it, against their formulas written anew in float64, and lightly's against lightly."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jepa_fast.nn import host_values
from jepa_fast.nn import sigreg_sources as sources
from jepa_fast.nn.sigreg import PRESETS, SIGReg

V, N, D, K = 3, 20, 6, 32


def knots(t_min, t_max, num_knots, dtype):
    """t, the normal's characteristic function, trapezoid weights times that."""
    t = torch.linspace(t_min, t_max, num_knots, dtype=dtype)
    phi, weights = (-t**2 / 2).exp(), torch.full_like(t, (t_max - t_min) / (num_knots - 1))
    weights[[0, -1]] /= 2
    return t, phi, weights * phi


def statistic(x, directions, t_max=3.0, num_knots=33, t_min=None):
    """x [..., N, D] -> [..., K], times nothing; the whole line from -t_max to t_max."""
    t, phi, weights = knots(-t_max if t_min is None else t_min, t_max, num_knots, x.dtype)
    phase = (x @ directions.to(x.dtype)).unsqueeze(-1) * t
    means = torch.polar(torch.ones_like(phase), phase).mean(-3)
    return (means - phi).abs().square() @ weights


def drawn(generator=None, dim=D, num_slices=K):
    directions = torch.randn(dim, num_slices, generator=generator)
    return directions / directions.norm(dim=0)


def seeded(step):
    return drawn(torch.Generator().manual_seed(step))


def mean_times_rows(x, directions, **options):
    return (statistic(x, directions, **options) * x.shape[-2]).mean()


# name -> (module, what it computes of x [V, N, D] in the dtype of x, called as often as the module)
def the_sources():
    half_line = {"official": lambda: SIGReg.from_source("official", sources.EppsPulley(), K),
                 "minimal": lambda: SIGReg.from_source("minimal"),
                 "lewm": lambda: SIGReg.from_source("lewm", num_proj=K),
                 "lightly": lambda: SIGReg.from_source("lightly", num_vectors=K),
                 "stable_pretraining": lambda: SIGReg.from_source("stable_pretraining", K),
                 "bcs": lambda: SIGReg.from_source("bcs", K)}
    assert half_line.keys() == sources.SOURCES.keys()
    return half_line


EXACT = {
    "official": lambda x, step: mean_times_rows(x, seeded(step)),
    "minimal": lambda x, step: mean_times_rows(x, drawn(num_slices=256)),
    "lewm": lambda x, step: mean_times_rows(x, drawn()),
    "lightly": lambda x, step: mean_times_rows(x, drawn()),
    "stable_pretraining": lambda x, step: mean_times_rows(x.flatten(0, -2), seeded(step)),
    "bcs": lambda x, step: statistic(x[:2], seeded(step), num_knots=10).mean() * 10 + (x[0] - x[1]).square().mean(),
}


def call(name, module, x):
    if name == "bcs":
        return module(x[0], x[1])["loss"]
    return module(x.flatten(0, -2) if name == "stable_pretraining" else x)


def with_gradient(function, x):
    x = x.clone().requires_grad_()
    loss = function(x)
    loss.backward()
    return loss.detach(), x.grad


def error(value, exact):
    return float((value.double() - exact).norm() / exact.norm())


def assert_rule(ours, original, exact, dtype=torch.float32):
    floor = 4 * torch.finfo(dtype).eps
    for a, b, e in zip(ours, original, exact, strict=True):
        assert error(a, e) <= 2 * error(b, e) + floor


def embeddings(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sources.SOURCES)
def test_two_calls_of_a_source(name):
    """Values and gradients, with the random numbers it draws."""
    module, x = the_sources()[name](), 1.3 * embeddings(V, N, D)
    torch.manual_seed(5)
    ours = [with_gradient(lambda x: call(name, module, x), x) for _ in range(2)]
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(5)
        results = [with_gradient(lambda x, step=step: EXACT[name](x, step), x.to(dtype)) for step in range(2)]
        if dtype == torch.float64:
            exact = results
    for step in range(2):
        assert ours[step][0].dtype == torch.float32
        assert_rule(ours[step], results[step], exact[step])


STATE = {
    "official": ["global_step", "univariate_test.t", "univariate_test.phi", "univariate_test.weights"],
    "stable_pretraining": ["global_step", "ep.t", "ep.phi", "ep.weights"],
    "minimal": ["t", "phi", "weights"], "lewm": ["t", "phi", "weights"], "lightly": ["t", "phi", "weights"], "bcs": [],
}


@pytest.mark.parametrize("name", sources.SOURCES)
def test_state_dict_and_copies(name):
    module, x = the_sources()[name](), embeddings(V, N, D)
    state = module.state_dict()
    assert list(state) == STATE[name]
    for key, value in zip(("t", "phi", "weights"), knots(0.0, 3.0, 17, torch.float64), strict=True):
        for found in (value for name, value in state.items() if name.endswith(key)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), value * (2 if key == "weights" else 1), rtol=2e-7, atol=0)
    call(name, module, x)
    twin = the_sources()[name]()
    twin.load_state_dict(state)
    if name == "bcs":
        twin.step = module.step
    expected, ours = (seeded_call(name, one, x) for one in (module, twin))
    assert ours == expected


def seeded_call(name, module, x):
    torch.manual_seed(1)
    return call(name, module, x)


def test_knots_are_those_of_the_buffers():
    module, x = SIGReg.from_source("lewm", num_proj=K), embeddings(V, N, D)
    t, phi, weights = knots(0.0, 5.0, 4, torch.float32)
    module.t, module.phi, module.weights = t, phi, 2 * weights
    torch.manual_seed(0)
    ours = module(x)
    torch.manual_seed(0)
    assert error(ours, mean_times_rows(x.double(), drawn(), t_max=5.0)) > 1e-3  # too coarse
    torch.manual_seed(0)
    assert error(ours, mean_times_rows(x.double(), drawn(), t_max=5.0, num_knots=7)) < 1e-6
    module.t[3] = 0.2
    with pytest.raises(ValueError, match="t must be evenly spaced, positive, or from 0 on where phi is 1; got t = "):
        module(x)


@pytest.mark.parametrize("reduction", ["mean", "sum", None])
def test_clip_and_reduction(reduction):
    x, directions = embeddings(V, N, D), seeded(0)
    exact = statistic(x.double(), directions) * N
    clip = 1.0001 * exact.median().item()
    module = sources.SlicingUnivariateTest(sources.EppsPulley(), K, reduction, clip_value=clip)
    exact = exact.where(exact >= clip, 0)
    assert error(module(x), exact if reduction is None else getattr(exact, reduction)()) < 1e-6


def test_any_univariate_test():
    """SlicingUnivariateTest takes one that is no EppsPulley, and an EppsPulley alone takes projections."""
    x, module = embeddings(V, N, D), sources.EppsPulley()
    ours, grad = with_gradient(lambda p: module(p).sum(), x)
    exact, exact_grad = with_gradient(lambda p: (statistic(p, torch.eye(D)) * N).sum(), x.double())
    assert error(ours, exact) < 1e-6 and error(grad, exact_grad) < 1e-6
    sliced = sources.SlicingUnivariateTest(nn.Flatten(0, -2), K)  # the identity, and a mean of projections
    assert error(sliced(x), (x.double() @ seeded(0).double()).mean()) < 1e-5


def test_the_step_is_read_where_somebody_wrote_it(monkeypatch):
    module, x = sources.SlicingUnivariateTest(sources.EppsPulley(), K), embeddings(N, D)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.dtype) or tolist(tensor))

    def losses(first, num_steps, num_reads):
        reads.clear()
        ours = torch.stack([module(x) for _ in range(num_steps)])
        exact = torch.stack([mean_times_rows(x.double(), seeded(first + step)) for step in range(num_steps)])
        assert error(ours, exact) < 1e-6 and module.global_step == first + num_steps
        assert reads.count(torch.int64) == num_reads

    losses(0, 3, 1)
    losses(3, 2, 0)
    module.load_state_dict(module.state_dict() | {"global_step": torch.tensor(40)})
    losses(40, 3, 1)
    module.global_step = torch.tensor(7)
    losses(7, 2, 1)
    with torch.inference_mode():
        module.global_step = torch.tensor(3)
        losses(3, 2, 2)
    assert host_values.host_value(torch.tensor([1.5, 2.0])) == [1.5, 2.0]


@pytest.mark.parametrize("name", ["lewm", "lightly"])
def test_compiles_as_one_graph(name):
    module, x = the_sources()[name](), embeddings(V, N, D)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled):
        torch.manual_seed(2)
        results.append(with_gradient(function, x))
    assert error(results[1][0], results[0][0].double()) < 1e-6 and error(results[1][1], results[0][1].double()) < 1e-6


# ---- lightly, as it is on PyPI


@pytest.fixture(scope="module")
def lightly_loss():
    return pytest.importorskip("lightly.loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_as_lightly(lightly_loss, dtype):
    theirs, ours = lightly_loss.SIGReg(num_vectors=K), sources.LightlySIGReg(num_vectors=K)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(sources.LightlySIGReg(num_vectors=K).state_dict())
    for key, value in lightly_loss.SIGReg(num_vectors=K).state_dict().items():
        assert torch.equal(value, ours.state_dict()[key])
    x = embeddings(V, N, D).to(dtype)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(4)
        results.append(with_gradient(module, x))
    torch.manual_seed(4)
    directions = torch.randn(D, K, dtype=dtype)
    directions = directions / directions.norm(dim=0)
    exact = with_gradient(lambda x: mean_times_rows(x, directions), x.double())
    assert results[0][0].dtype == results[1][0].dtype
    assert_rule(*results, exact, dtype)


def test_training_as_with_lightly(lightly_loss):
    """The same losses, step by step, of a loss that holds one."""
    losses = []
    for sigreg in (None, sources.LightlySIGReg(num_vectors=K)):
        torch.manual_seed(0)
        loss_of, model = lightly_loss.LeJEPALoss(lambda_param=0.5, sigreg_num_vectors=K), nn.Linear(D, D)
        loss_of.sigreg = sigreg or loss_of.sigreg
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for step in range(5):
            z = model(embeddings(V, N, D, seed=step))
            loss = loss_of(local_proj=z[1:], global_proj=z[:1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


@pytest.mark.parametrize("arguments, message", [
    (("lejepa",), "source must be one of official, minimal, lewm, lightly, stable_pretraining, bcs, got 'lejepa'"),
    (("lewm", 1), r"at least 2 knots on \[0, t_max\] with t_max > 0, got 1"),
    (("stable_pretraining", 8, 3.0, 16), "n_points must be odd, got 16"),
])
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        SIGReg.from_source(*arguments)


def test_bad_lightly():
    with pytest.raises(ValueError, match="num_vectors must be a positive integer, got 0"):
        sources.LightlySIGReg(num_vectors=0)


# ---- data parallelism, in real processes


def of_global_batch(name, x, rank, world, rows):
    """The loss whose gradient DDP should give on x [V, N, D] of all ranks."""
    if name == "bcs":
        return EXACT["bcs"](x, 0)
    torch.manual_seed(0)  # LightlySIGReg: the directions of rank 0
    if name not in ("minimal", "lewm"):
        return EXACT[name](x, 0)
    losses = []  # of each rank's samples alone
    for other in range(world):
        torch.manual_seed(other)
        losses.append(EXACT[name](x.split(rows, 1)[other], 0))
    return torch.stack(losses).mean()


def check_ranks(world):
    dist.init_process_group("gloo")
    rank, rows = dist.get_rank(), 5
    torch.manual_seed(0)
    model, x = nn.Linear(D, D), embeddings(V, world * rows, D)
    local = x.split(rows, 1)[rank]
    parallel = DistributedDataParallel(model)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def assert_step(loss, expected, what):
        ours = gradients(loss)
        assert error(ours, gradients(expected).double()) < 2e-6, f"{what}: {error(ours, gradients(expected).double())}"

    for name, make in the_sources().items():
        module = SIGReg.from_source("lightly", num_vectors=K, gather_distributed=True) if name == "lightly" else make()
        torch.manual_seed(rank)
        loss = call(name, module, parallel(local))
        if name in ("official", "lightly", "stable_pretraining"):
            assert error(loss.detach(), of_global_batch(name, model(x), rank, world, rows).double().detach()) < 2e-6, name
        assert_step(loss, of_global_batch(name, model(x), rank, world, rows), name)
    for name in PRESETS:
        options = dict(num_slices=K, rng="philox")
        together = SIGReg.from_preset(name, process_group="auto", scale=PRESETS[name].get("scale", "N_global"), **options)
        factor = 1 / world if PRESETS[name].get("scale") == "N" else 1
        alone = SIGReg.from_preset(name, process_group=None, **options)
        assert_step(together(parallel(local)), factor * alone(model(x)), f"preset {name}")
    module = the_sources()["official"]()  # a rank that is ahead takes the others along
    module.global_step.fill_(rank)
    assert error(module(local), mean_times_rows(x.double(), seeded(world - 1))) < 2e-6
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_step_of_the_global_batch(world, tmp_path):
    ranks.run(check_ranks, world, world, folder=tmp_path)
