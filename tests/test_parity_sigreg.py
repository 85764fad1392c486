"""SIGReg against checkouts of lejepa, eb_jepa, stable-pretraining, stable-worldmodel; their own tests, patched."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import types

import pytest
import ranks
import torch
import torch.distributed as dist
from checkouts import checkout
from torch import nn

import jepa_fast
from jepa_fast import patches
from jepa_fast.nn import sigreg_sources

N, D, K = 48, 12, 96
MODULES = {"lejepa": ["lejepa.multivariate.slicing", "lejepa.univariate.epps_pulley"], "eb_jepa": ["eb_jepa.losses"],
           "stable-pretraining": ["stable_pretraining.methods.lejepa", "stable_pretraining.backbone.utils"],
           "stable-worldmodel": ["stable_worldmodel.wm.loss"]}


@contextlib.contextmanager
def loaded(name, path):
    """The modules of a checkout; of packages with many dependencies only the files that are needed."""
    with checkout(path) if name.startswith("stable") else checkout(path, *MODULES[name]) as modules:
        if not modules:
            modules = list(_by_file(name, path))
        yield modules


def _by_file(name, path):
    package = MODULES[name][0].partition(".")[0]
    for inner in {module.rpartition(".")[0] for module in MODULES[name]} | {package}:
        stub = sys.modules[inner] = types.ModuleType(inner)
        stub.__path__ = [str(path / inner.replace(".", "/"))]
        stub.Module = stub.MLP = nn.Module
    if "loguru" not in sys.modules:
        sys.modules["loguru"] = types.SimpleNamespace(logger=None)
    for module in MODULES[name]:
        yield importlib.import_module(module)


def make(name, modules, **options):
    return {"lejepa": lambda: modules[0].SlicingUnivariateTest(modules[1].EppsPulley(), K, **options),
            "eb_jepa": lambda: modules[0].BCS(K), "stable-pretraining": lambda: modules[0].SlicedEppsPulley(K),
            "stable-worldmodel": lambda: modules[0].SIGReg(num_proj=K)}[name]()


def ours_of(name):
    return {"lejepa": lambda: sigreg_sources.SlicingUnivariateTest(sigreg_sources.EppsPulley(), K),
            "eb_jepa": lambda: jepa_fast.SIGReg.from_source("bcs", K),
            "stable-pretraining": lambda: jepa_fast.SIGReg.from_source("stable_pretraining", K),
            "stable-worldmodel": lambda: jepa_fast.SIGReg.from_source("lewm", num_proj=K)}[name]()


def inputs_of(name):
    g = torch.Generator().manual_seed(3)
    shapes = {"eb_jepa": [(N, D)] * 2, "stable-pretraining": [(N, D)]}.get(name, [(4, N, D)])
    return [1.1 * torch.randn(*shape, generator=g) for shape in shapes]


def calls(module, inputs, num_calls=3):
    """Losses and gradients of several calls."""
    torch.manual_seed(1)
    results = []
    for _ in range(num_calls):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out = module(*inputs)
        loss = out["loss"] if isinstance(out, dict) else out.square().sum()
        loss.backward()
        results += [loss.detach(), *(x.grad for x in inputs)]
    return results


def error(value, exact):
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def patched(name):
    return importlib.import_module(f"jepa_fast.patches.{ {'stable-worldmodel': 'lewm'}.get(name, name.replace('-', '_'))}")


@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients(name, upstream):
    """Of the patched class, the patched model and our module; the state-dicts fit each other."""
    with loaded(name, upstream(name)) as modules:
        expected, inputs = calls(make(name, modules), inputs_of(name)), inputs_of(name)
        ours, live = ours_of(name), make(name, modules)
        ours.load_state_dict(live.state_dict())
        live.load_state_dict(ours_of(name).state_dict())
        results = [calls(ours, inputs)]
        with patched(name).apply(live):
            results.append(calls(live, inputs))
        with patched(name).apply():
            results.append(calls(make(name, modules), inputs))
        for result in results:
            assert max(error(a, b) for a, b in zip(result, expected, strict=True)) < 3e-6
            assert not all(map(torch.equal, result, expected))
        assert all(map(torch.equal, calls(make(name, modules), inputs), expected))


@pytest.mark.parametrize("options", [dict(reduction=None), dict(reduction="sum", clip_value=0.9)], ids=str)
def test_lejepa_options(options, upstream):
    with loaded("lejepa", upstream("lejepa")) as modules:
        expected, live = calls(make("lejepa", modules, **options), inputs_of("lejepa")), make("lejepa", modules, **options)
        with patches.lejepa.apply(live):
            assert max(map(error, calls(live, inputs_of("lejepa")), expected)) < 3e-6


def test_teacher_of_stable_pretraining(upstream):
    with loaded("stable-pretraining", upstream("stable-pretraining")) as modules:
        results = []
        for is_patched in (False, True):
            torch.manual_seed(0)
            wrapper = modules[1].TeacherStudentWrapper(nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5)))
            with patches.stable_pretraining.apply(wrapper) if is_patched else contextlib.nullcontext():
                for epoch in range(4):
                    wrapper.student(torch.randn(8, 9)).sum().backward()
                    for p in wrapper.student.parameters():
                        p.data -= 0.1 * p.grad
                    wrapper.update_ema_coefficient(epoch, 10)
                    wrapper.update_teacher()
            results.append(wrapper.state_dict())
        assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
        assert not torch.equal(results[0]["teacher.0.weight"], results[0]["student.0.weight"])


def check_ranks(paths):
    """strict_numerics is the original; the default is the gradient of the global batch."""
    dist.init_process_group("gloo")
    rank, world, torchvision = dist.get_rank(), dist.get_world_size(), torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms") if torch.version.cuda is None else ():  # as in conftest.py
        torchvision.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name, path in paths.items():
        with loaded(name, path) as modules:
            inputs = inputs_of(name)
            local = [x.chunk(world, -2)[rank] for x in inputs]
            original, results = calls(make(name, modules), local, 2), {}
            for strict in (True, False):
                live = make(name, modules)
                with patched(name).apply(live, strict_numerics=strict):
                    results[strict] = calls(live, local, 2)
            assert max(map(error, results[True], original)) < 5e-6, name
            value = results[False][0].clone()
            dist.broadcast(value, 0)
            assert name == "eb_jepa" or error(results[False][0], value) < 1e-6, name  # its invariance is of each rank
        print(name, "strict", max(map(error, results[True], original)), "default against original",
              [round(error(a, b), 6) for a, b in zip(results[False], original, strict=True)])
    dist.destroy_process_group()


def test_two_ranks(upstream, tmp_path):
    written = ranks.run(check_ranks, 2, {name: upstream(name) for name in list(MODULES)[:3]}, folder=tmp_path)
    print(written[0])


PLUGIN = """
import sys
sys.path[:0] = {paths}
def pytest_sessionstart(session):
    if {name!r}:
        import jepa_fast
        print(getattr(jepa_fast.patches, {name!r}).apply())
"""


@pytest.mark.parametrize("name", ["lejepa", "eb_jepa"])
def test_their_own_tests(name, upstream, tmp_path):
    """Patched, the same ones pass as before; those of lejepa's EppsPulley are for an interface that is gone."""
    path = upstream(name)
    here = os.path.dirname(os.path.abspath(__file__))
    outcomes = []
    for patch in ("", name):
        (tmp_path / f"plugin{patch}.py").write_text(PLUGIN.format(paths=[str(path), os.path.dirname(here)], name=patch))
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", f"plugin{patch}",
                               f"--rootdir={path}", str(path / "tests")], capture_output=True, text=True, cwd=path,
                              env=os.environ | {"PYTHONPATH": f"{tmp_path}:{here}", "PYTHONDONTWRITEBYTECODE": "1"})
        outcomes.append(sorted(set(re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))))
        assert "error" not in done.stderr.lower(), done.stderr
    print(name, {kind: sum(found == kind for found, _ in outcomes[0]) for kind in ("PASSED", "FAILED", "ERROR")})
    assert outcomes[0] == outcomes[1] and any(kind == "PASSED" for kind, _ in outcomes[0])
    assert all(kind == "PASSED" or "test_epps_pulley" in test for kind, test in outcomes[0])
