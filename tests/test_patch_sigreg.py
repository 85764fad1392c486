"""The patches of lejepa, eb_jepa and stable-pretraining, on stand-ins with their names and formulas."""

import copy
import sys
import types

import pytest
import ranks
import torch
import torch.distributed as dist
from stand_ins import eb_jepa as eb
from stand_ins import lejepa as lj
from stand_ins import stable_pretraining as spt
from torch import nn

from jepa_fast import ops, patches
from jepa_fast.patches import PatchError

N, D, K = 24, 6, 1024
FLOOR = 4 * torch.finfo(torch.float32).eps


@pytest.fixture
def importable(monkeypatch):
    """The stand-ins under the names that the patches import."""
    for name, module in {"lejepa.multivariate.slicing": lj, "lejepa.univariate.epps_pulley": lj,
                         "stable_pretraining.methods.lejepa": spt, "stable_pretraining.backbone.utils": spt}.items():
        monkeypatch.setitem(sys.modules, name, module)


def embeddings(*shape, seed=0):
    return 1.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    loss = out["loss"] if isinstance(out, dict) else out.square().sum()
    loss.backward()
    return [loss.detach(), *(x.grad for x in inputs)]


def error(value, exact):
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def assert_rule(ours, theirs, exact):
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype and error(a, e) <= 2 * error(b, e) + FLOOR


def in_float64(module, monkeypatch):
    """A copy that computes in float64 with the same random numbers."""
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: randn(*args, **kwargs).double())
    return copy.deepcopy(module).double()


def module_of(name, **options):
    return {"lejepa": lambda: lj.SlicingUnivariateTest(lj.EppsPulley(), K, **options), "eb_jepa": lambda: eb.BCS(K),
            "stable_pretraining": lambda: spt.SlicedEppsPulley(K)}[name]()


def inputs_of(name):
    shapes = {"lejepa": [(3, N, D)], "eb_jepa": [(N, D), (N, D)], "stable_pretraining": [(N, D)]}[name]
    return [embeddings(*shape, seed=seed) for seed, shape in enumerate(shapes)]


NAMES = ("lejepa", "eb_jepa", "stable_pretraining")


@pytest.mark.parametrize("live", [True, False], ids=["model", "class"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, live, importable, monkeypatch):
    """Of several calls, with the original's random numbers; and the original again after undo."""
    inputs, patch = inputs_of(name), getattr(patches, name)
    theirs, ours = module_of(name), module_of(name)
    cls, keys = type(ours), list(ours.state_dict())
    original = cls.forward
    expected = [with_gradients(theirs, *inputs) for _ in range(3)]
    report = patch.apply(ours) if live else patch.apply()
    monkeypatch.setattr(torch, "polar", None)  # nothing of the original runs
    assert patch.matches(ours) and list(ours.state_dict()) == keys
    results = [with_gradients(ours, *inputs) for _ in range(2)]
    report.undo()
    assert cls.forward is original and "forward" not in vars(ours)
    results.append(with_gradients(ours, *inputs))
    exact_module = in_float64(module_of(name), monkeypatch)
    exact = [with_gradients(exact_module, *(x.double() for x in inputs)) for _ in range(3)]
    for step in range(2):
        assert_rule(results[step], expected[step], exact[step])
        assert not torch.equal(results[step][1], expected[step][1])  # another order of sums: the patch was at work
    assert all(map(torch.equal, results[2], expected[2]))


@pytest.mark.parametrize("options", [dict(reduction=None), dict(reduction="sum", clip_value=1.0)], ids=str)
def test_reduction_and_clip(options):
    module, x = module_of("lejepa", **options), embeddings(2, N, D)
    expected = with_gradients(module_of("lejepa", **options), x)
    with patches.lejepa.apply(module):
        for ours, theirs in zip(with_gradients(module, x), expected, strict=True):
            assert error(ours, theirs) < 2e-6


def test_parts_alone():
    """EppsPulley on projections, and epps_pulley wherever it was imported to."""
    x, user = embeddings(N, K), types.ModuleType("user")
    user.test = eb.epps_pulley
    original, modules = eb.epps_pulley, {"lejepa": lj.EppsPulley(), "stable_pretraining": spt.EppsPulley()}
    with patches.eb_jepa.apply() as report:
        assert eb.epps_pulley is not original and user.test is original and report.replaced["epps_pulley"] == 1
    sys.modules["user"] = user
    try:
        with patches.eb_jepa.apply() as report:
            assert user.test is eb.epps_pulley and report.replaced["epps_pulley"] == 2
            for ours, theirs in zip(with_gradients(user.test, x), with_gradients(original, x), strict=True):
                assert error(ours, theirs) < 2e-6
            assert torch.equal(user.test(x, 0, 2), original(x, 0, 2))  # no grid of ours
    finally:
        del sys.modules["user"]
    assert user.test is original
    for name, module in modules.items():
        expected = with_gradients(module, x)
        with getattr(patches, name).apply(module):
            for ours, theirs in zip(with_gradients(module, x), expected, strict=True):
                assert error(ours, theirs) < 2e-6 and not torch.equal(ours, theirs)


OURS = {"lejepa": ["jepa_fast.patches.lejepa.sliced_epps_pulley", "jepa_fast.patches.lejepa.EppsPulley"],
        "eb_jepa": ["jepa_fast.nn.sigreg_sources.bcs"],
        "stable_pretraining": ["jepa_fast.patches.stable_pretraining.flat_sliced_epps_pulley",
                               "jepa_fast.patches.stable_pretraining.FlatEppsPulley"]}


@pytest.fixture
def without_ours(monkeypatch):
    for path in sum(OURS.values(), []):
        monkeypatch.setattr(path, None)


@pytest.mark.parametrize("reason", ["no kernel", "float64", "compiled", "knots", "few"])
@pytest.mark.parametrize("name", NAMES)
def test_its_own_code_where_ours_is_not_faster_or_not_the_same(name, reason, without_ours, monkeypatch):
    inputs, module, twin = inputs_of(name), module_of(name), module_of(name)
    if reason == "float64":
        module, twin = (in_float64(one, monkeypatch) for one in (module, twin))
        inputs = [x.double() for x in inputs]
    if reason == "few":
        inputs = [x[..., :2 if name == "eb_jepa" else 3, :] for x in inputs]
        for one in (module, twin):
            one.num_slices = 40
    if reason == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if reason == "knots":
        if name == "eb_jepa":
            pytest.skip("has no buffers")
        for one in (module, twin):
            (one.ep if name == "stable_pretraining" else one.univariate_test).t[1] += 0.01
    expected = with_gradients(twin, *inputs)
    with getattr(patches, name).apply(module), ops.use_backend("plain") if reason == "no kernel" else patches.Report(""):
        assert all(map(torch.equal, with_gradients(module, *inputs), expected))


def test_compiled(importable):
    """The original is what torch.compile sees."""
    x, module, twin = embeddings(2, N, D), module_of("lejepa"), module_of("lejepa")
    torch._dynamo.reset()
    with patches.lejepa.apply():
        assert error(torch.compile(module, backend="eager")(x), twin(x)) < 2e-6


@pytest.mark.parametrize("name, part", [("lejepa", "univariate_test"), ("stable_pretraining", "ep")])
def test_hooks_of_parts(name, part):
    inputs, module = inputs_of(name), module_of(name)
    seen, expected = [], module_of(name)(*inputs)
    getattr(module, part).register_forward_hook(lambda _, arguments, out: seen.append(arguments[0].shape[-1]))
    with getattr(patches, name).apply(module):
        assert error(module(*inputs), expected) < 2e-6 and seen == [K]


def test_autocast():
    module, x = module_of("lejepa"), embeddings(2, N, D)
    exact = module_of("lejepa")(x)
    with patches.lejepa.apply(module), torch.autocast("cpu", torch.bfloat16):
        ours, _ = with_gradients(module, x)
        assert ours.dtype == torch.float32 and error(ours, exact.square()) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name, importable, tmp_path):
    """Of a patched model, and in a class that is patched."""
    inputs, module = inputs_of(name), module_of(name)
    expected = with_gradients(module_of(name), *inputs)
    with getattr(patches, name).apply(module):
        torch.save(module, tmp_path / "model.pt")
        twin = copy.deepcopy(module)
        assert error(with_gradients(twin, *inputs)[1], expected[1]) < 2e-6
    with getattr(patches, name).apply():
        torch.save(module_of(name), tmp_path / "class.pt")
    for file in ("model.pt", "class.pt"):  # loaded without the patch
        loaded = torch.load(tmp_path / file, weights_only=False)
        assert all(map(torch.equal, with_gradients(loaded, *inputs), expected))


# ---- the teacher of stable-pretraining


def wrapper(momentum):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3).bfloat16(), nn.Linear(3, 2).double())
    student[1].running_mean.uniform_()
    model = spt.TeacherStudentWrapper(student, momentum)
    with torch.no_grad():
        for t in (*model.student.parameters(), *model.student.buffers()):
            t.add_(1)
    return model


@pytest.mark.parametrize("momentum", [0.996, 0.3, 0.0, 1.0])
def test_teacher_to_the_bit(momentum, importable):
    """Parameters and buffers, what is no float32 as well; and a coefficient that moves on."""
    results = []
    for patch in (None, patches.stable_pretraining):
        model = wrapper(momentum)
        with patch.apply(model) if patch else patches.Report(""):
            for step in range(3):
                if step == 2:
                    model.ema_coefficient.copy_(torch.tensor(0.9))
                model.update_teacher()
            model.eval()
            model.update_teacher()
        results.append(model.state_dict())
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
    assert not torch.equal(results[0]["teacher.0.weight"], wrapper(momentum).state_dict()["teacher.0.weight"])


# ---- what a patch refuses, and says


@pytest.mark.parametrize("name", NAMES)
def test_another_signature_is_refused(name, importable, monkeypatch):
    cls = type(module_of(name))
    monkeypatch.setattr(cls, "forward", lambda self, x, y, z: None)
    with pytest.raises(PatchError, match=f"{cls.__name__}.forward must take .* another version of that code"):
        getattr(patches, name).apply()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_patch(name, monkeypatch):
    patch = getattr(patches, name)
    assert not patch.matches(nn.Linear(2, 2))
    with pytest.raises(PatchError, match="model must have"):
        patch.apply(nn.Linear(2, 2))
    monkeypatch.delitem(sys.modules, "stand_ins.eb_jepa")
    with pytest.raises(PatchError, match="must be importable"):
        patch.apply()


def test_what_reports_say():
    module = module_of("stable_pretraining")
    model = nn.ModuleDict({"a": module, "b": module_of("lejepa"), "c": module_of("eb_jepa")})
    with patches.stable_pretraining.apply(module) as report:
        assert report.replaced == {"SlicedEppsPulley.forward": 1, "EppsPulley.forward": 1}
        assert "the original throws its all-reduce away" in str(report)
    with patches.stable_pretraining.apply(module, strict_numerics=True) as report:
        assert "strict: under torch.distributed" in str(report)
    with patches.auto(model) as report:  # each takes its own EppsPulley
        assert report.patch == "auto (eb_jepa, lejepa, stable_pretraining)"
        assert report.replaced == {"BCS.forward": 1, "SlicingUnivariateTest.forward": 1, "EppsPulley.forward": 2,
                                   "SlicedEppsPulley.forward": 1}


def test_a_backbone_of_timm_is_patched_along():
    vit = pytest.importorskip("timm.models.vision_transformer")
    model = nn.ModuleDict({"backbone": vit.VisionTransformer(16, 8, num_classes=0, embed_dim=24, depth=2, num_heads=2),
                           "sigreg": spt.SlicedEppsPulley(K)})
    with patches.stable_pretraining.apply(model) as report:
        assert report.replaced["Block.forward"] == 2
    with patches.auto(model) as report:
        assert report.replaced["Block.forward"] == 2 and "Block.forward" not in report.kept
    assert "forward" not in vars(model["backbone"].blocks[0])


# ---- data parallelism


def check_ranks(world):
    """The right gradient by default, and with strict_numerics that of the original, two known bugs included."""
    made_before = spt.SlicedEppsPulley(K)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in NAMES:
        inputs = inputs_of(name)
        local = [x.chunk(world, -2)[rank] for x in inputs]
        original = with_gradients(module_of(name), *local)
        results = {}
        for strict in (False, True):
            module = module_of(name)
            with getattr(patches, name).apply(module, strict_numerics=strict):
                results[strict] = with_gradients(module, *local)
        for ours, theirs in zip(results[True], original, strict=True):
            assert error(ours, theirs) < 5e-6, name
        if name == "eb_jepa":  # gloo divides the gradient of the statistic by the number of ranks
            of_mean = 2 * (local[0] - local[1]) / local[0].numel()
            assert error(world * (original[1] - of_mean), results[False][1] - of_mean) < 5e-6
        if name == "stable_pretraining":
            assert error(results[False][0], original[0]) > 0.01  # the original's is another value
            value, grad = with_gradients(made_before, *inputs)    # knows of no ranks
            made_before.global_step.zero_()
            with patches.stable_pretraining.apply(made_before):
                for ours in (results[False], with_gradients(made_before, *local)):
                    assert error(ours[0], value) < 5e-6 and error(ours[1], world * grad.chunk(world, -2)[rank]) < 5e-6
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_data_parallelism(world, tmp_path):
    ranks.run(check_ranks, world, world, folder=tmp_path)
