"""csrc/cuda: it compiles for every GPU without spills, touches its tensors only, and the emulator that runs it is right."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess

import cuda_host
import pytest
import setuptools
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_fast import ops, testing

ROOT = pathlib.Path(__file__).parent.parent
HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which(f"{HOME}/bin/nvcc")
# every run compiles for one; run with -m slow where kernels changed: all three take minutes
ARCHITECTURES = [pytest.param("80", marks=pytest.mark.slow), "90a", pytest.param("100a", marks=pytest.mark.slow)]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu")) + [ROOT / "tests/cuda_host/self_test.cu"]
GUARD = 64  # bytes on each side of a tensor

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: csrc/cuda is not compiled for GPUs here")
needs_compiler = pytest.mark.skipif(torch.cuda.is_available() or cuda_host.compiler() is None,
                                    reason="no C++ compiler, or a GPU: csrc/cuda is not run on the host")


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_compiles_without_warnings_and_spills(source, architecture, tmp_path):
    include = pathlib.Path(torch.__file__).parent / "include"
    done = subprocess.run(
        [NVCC, "-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}", f"-I{ROOT}/csrc",
         "-Werror", "all-warnings", "-Xptxas", "-v", "-Xcompiler", "-Wall", "-c", str(source), "-o", str(tmp_path / "o"),
         "-keep", "-keep-dir", str(tmp_path),
         f"-gencode=arch=compute_{architecture},code=sm_{architecture}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    assert spills and all(pair == ("0", "0") for pair in spills), done.stdout
    (ptx,) = tmp_path.glob("*.ptx")
    if "load<" in source.read_text():  # nvcc may take 16 bytes apart
        assert re.search(r"ld\.global\S*\.v4", ptx.read_text()) and "st.global.v4" in ptx.read_text()


@needs_nvcc
def test_failed_build_leaves_the_cpu_extension(monkeypatch, capsys):
    """One line says why there are no CUDA kernels; JEPA_FAST_REQUIRE_NATIVE=1 makes it an error."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setenv("JEPA_FAST_CUDA_ARCHS", "90a")
    build = runpy.run_path(str(ROOT / "setup.py"))["build_tensor_ops"]
    commands = []

    def run(command):
        commands.append(command)
        if any(word.endswith(".cu") for word in command):
            raise RuntimeError("nvcc -c x.cu\nx.cu(1): error: unsupported host compiler\nmore")

    monkeypatch.setitem(build.__globals__, "run", run)
    build(["g++"], pathlib.Path("/nowhere/_C.so"), pathlib.Path("/nowhere"))
    assert "plain PyTorch: x.cu(1): error: unsupported host compiler\n" in capsys.readouterr().err
    assert commands[-1][:2] == ["g++", "-shared"] and not any(word.endswith(".cu.o") for word in commands[-1])
    monkeypatch.setenv("JEPA_FAST_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match="unsupported host compiler"):
        build(["g++"], pathlib.Path("/nowhere/_C.so"), pathlib.Path("/nowhere"))


class Guarded(TorchDispatchMode):
    """Every tensor that a raw op gets lies between bytes of NaN, which must be there afterwards."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "jepa_fast_cuda_host":
            return func(*args, **(kwargs or {}))
        self.calls += 1
        pairs = []

        def guard(value):
            if isinstance(value, (list, tuple)):
                return [guard(item) for item in value]
            if not isinstance(value, torch.Tensor):
                return value
            size = value.untyped_storage().nbytes()
            room = torch.full((size + 2 * GUARD,), 255, dtype=torch.uint8)
            room[GUARD: GUARD + size] = torch.tensor([], dtype=torch.uint8).set_(value.untyped_storage())
            inner = torch.tensor([], dtype=value.dtype).set_(
                room.untyped_storage(), value.storage_offset() + GUARD // value.element_size(), value.shape, value.stride())
            pairs.append((value, inner, room))
            return inner

        result = func(*map(guard, args), **(kwargs or {}))
        for value, inner, room in pairs:
            assert (room[:GUARD] == 255).all() and (room[-GUARD:] == 255).all(), f"{func} wrote outside a tensor"
            value.copy_(inner)
        return result


SPECS = [pytest.param(spec, id=spec.name) for spec in testing.OPS.values() if "cuda" in spec.backends()]


@needs_compiler
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_touches_its_tensors_only(spec, dtype):
    for case in spec.cases:
        if case.is_large or dtype not in spec.dtypes:
            continue
        arguments = testing.make(spec, case, dtype)
        try:
            expected = testing.run(spec, testing.make(spec, case, dtype), "cuda")
        except RuntimeError as error:
            assert "asked for, but" in str(error), error
            continue
        with Guarded():
            ours = testing.run(spec, arguments, "cuda")
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=f"{case} {name}")


@needs_compiler
@pytest.mark.parametrize("spec", [param for param in SPECS if param.values[0].name != "directions"])
def test_float16(spec):
    """Every case by the same error rule."""
    for case in spec.cases:
        if case.is_large:
            continue
        try:
            ours, plain, exact = testing.run_three_ways(spec, case, "cuda", torch.float16)
        except RuntimeError as error:
            if "asked for, but" in str(error):  # a width that CUDA does not take
                continue
            raise
        testing.assert_within_error_rule(ours, plain, exact, spec.floor)


@needs_compiler
@pytest.mark.parametrize("is_sorted", [False, True])
def test_rows_are_found_in_a_long_index(is_sorted):
    """An index of several spans: the rows of scatters, in their order, whether it ascends or not."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 40, (1, 2500), generator=g)
    index = index.sort(1).values if is_sorted else index
    values = torch.randn(1, 2500, 9, generator=g)
    expected = torch.zeros(40, 9).index_add_(0, index[0], values[0])  # in order, on the CPU
    with ops.use_backend("cuda"):
        ours = ops.scatter_tokens(values, index, 41)
    assert torch.equal(ours[0, :40], expected) and not ours[0, 40].any()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("inner", [16, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_twins_of_tensor_cores(dtype, inner, transposed):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, inner, generator=g).to(dtype) for rows in (16, 8))
    out = torch.full((16, 8), torch.nan)
    torch.ops.jepa_fast_cuda_self_test.product(a, b, transposed, out)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_polynomial_exp2():
    x = torch.cat([torch.linspace(-126, 127, 100_001), torch.tensor([-126.0, -127.0, -1e30, -torch.inf])])
    out = torch.empty_like(x)
    torch.ops.jepa_fast_cuda_self_test.exp2(x, out)
    exact = x.double().exp2()
    assert ((out - exact).abs() <= 1.02e-4 * exact + 2.0**-126).all() and (out[-4:] == 0).all()
    torch.ops.jepa_fast_cuda_self_test.exp2(torch.tensor([torch.nan, 0.0]), out[:2])
    assert out[0].isnan() and out[1] == 1


@needs_compiler
@pytest.mark.parametrize("which, message", [
    (0, r"thread 5 of block \(0, 0, 0\) has left the kernel"),
    (1, "threads of a block meet in different places|others that do not come"),
    (2, "waits in __syncwarp at .*self_test.cu"),
    (3, "dynamic shared memory of 256 bytes written at byte 256"),
    (4, "not in the mask of __shfl_sync"),
])
def test_mistakes_are_found(which, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.jepa_fast_cuda_self_test.mistake(which, torch.empty(64))
    out = torch.empty(64)  # and what comes afterwards is right
    torch.ops.jepa_fast_cuda_self_test.mistake(5, out)
    assert torch.equal(out, torch.arange(64.0))


@needs_compiler
def test_shared_memory_starts_as_nan_and_order_shows():
    out = torch.zeros(64)
    torch.ops.jepa_fast_cuda_self_test.mistake(6, out)
    assert out.isnan().all()
    for shift in (1, -1):
        right, wrong = (torch.zeros(2, 64, dtype=torch.int32) for _ in range(2))
        torch.ops.jepa_fast_cuda_self_test.race(shift, True, right)
        torch.ops.jepa_fast_cuda_self_test.race(shift, False, wrong)
        assert torch.equal(right, (torch.arange(64, dtype=torch.int32) + shift).remainder(64).expand(2, 64))
        assert not torch.equal(right, wrong)


@needs_compiler
def test_warps():
    x = torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    out = torch.zeros(12, 64, dtype=torch.int32)
    torch.ops.jepa_fast_cuda_self_test.warps(x, out)
    i = torch.arange(64)
    lane = i % 32
    ballots = [sum(1 << k for k in range(32) if x[w + k] & 1) for w in (0, 32)]
    expected = [torch.full((64,), 31), x[i // 8 * 8 + 3], x[torch.where(lane == 0, i, i - 1)],
                x[torch.where(lane < 27, i + 5, i)], x[i ^ 16], x[torch.where(lane < 16, i ^ 1, i ^ 2)],
                torch.tensor(ballots).repeat_interleave(32).to(torch.int32),
                torch.stack([(x[w: w + 32] == 7).any() for w in (0, 32)]).repeat_interleave(32),
                torch.ones(64), torch.stack([x[w: w + 32].sum() for w in (0, 32)]).repeat_interleave(32),
                (x & 1).sum().expand(64), (x == 40).any().expand(64)]
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours, theirs.to(torch.int32))

