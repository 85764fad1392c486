"""Every op x backend x dtype against the reference in float64, and what every op must survive.

Cases and ops come from jepa_fast.testing.OPS: a new op is covered the moment its spec exists.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jepa_fast import ops, testing

INTERPRETED = ("triton", "cuda")  # GPU kernels, here run on the CPU: right or wrong, but slow


def native_backends(spec):
    return [backend for backend in spec.backends() if backend not in INTERPRETED]


def cases_for(spec, backend, every=1):
    """All cases, of an interpreted backend the small ones, and of those one in `every`."""
    return [case for case in spec.cases if not case.is_large][::every] if backend in INTERPRETED else spec.cases


ALL = [pytest.param(spec, case, backend, dtype, id=f"{spec.name}-{case}-{backend}-{str(dtype).split('.')[1]}")
       for spec in testing.OPS.values() for backend in spec.backends() for case in cases_for(spec, backend)
       for dtype in spec.dtypes]
SPECS = [pytest.param(spec, id=spec.name) for spec in testing.OPS.values()]
FAST = [pytest.param(spec, backend, id=f"{spec.name}-{backend}")
        for spec in testing.OPS.values() for backend in spec.backends()]
NATIVE = [param for param in FAST if param.values[1] not in INTERPRETED]
FROM_GPU = [param for param in FAST if param.values[1] in INTERPRETED]


def can_run(spec, arguments, backend) -> bool:
    try:
        testing.run(spec, arguments, backend)
    except RuntimeError as error:
        if "asked for, but" in str(error):
            return False
        raise
    return True


def skip_unless_supported(spec, case, backend, dtype):
    if not can_run(spec, testing.make(spec, case, dtype), backend):
        pytest.skip(f"{backend} has no {dtype} version")


@pytest.mark.parametrize("spec, case, backend, dtype", ALL)
def test_op_matches_reference(spec, case, backend, dtype):
    skip_unless_supported(spec, case, backend, dtype)
    assert_rule(spec, *testing.run_three_ways(spec, case, backend, dtype))


def assert_rule(spec, ours, plain, exact):
    assert set(ours) == set(plain) == set(exact)
    if spec.copies:
        for name in ours:
            torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=0, equal_nan=True, msg=name)
    testing.assert_within_error_rule(ours, plain, exact, spec.floor)


def guarded(value):
    """The same numbers, non-contiguous, inside memory full of NaN: reading beside them shows."""
    if isinstance(value, list):
        return [guarded(item) for item in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() == 0:
        return value
    room = torch.full([2 * size + 2 for size in value.shape], float("nan"), dtype=value.dtype)
    view = room[tuple(slice(1, 1 + 2 * size, 2) for size in value.shape)]
    view.copy_(value)
    return view


# the order in which a BLAS library sums depends on the strides
@pytest.mark.parametrize("spec, backend", [param for param in FAST if param.id not in ("matmul-plain", "matmul-torch")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides_and_surroundings_do_not_matter(spec, backend, dtype):
    """Non-contiguous inputs in NaN-filled memory, and NaN-filled fresh outputs, give the same bits."""
    for case in cases_for(spec, backend, every=3):
        if dtype not in spec.dtypes or not can_run(spec, testing.make(spec, case, dtype), backend):
            continue
        expected = testing.run(spec, testing.make(spec, case, dtype), backend)
        arguments = testing.make(spec, case, dtype)
        arguments = {name: value if name in spec.mutates else guarded(value) for name, value in arguments.items()}
        torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
        try:
            ours = testing.run(spec, arguments, backend)
        finally:
            torch.use_deterministic_algorithms(False)
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=f"{case} {name}")


@pytest.mark.parametrize("spec, backend", FAST)
def test_two_runs_are_bit_equal(spec, backend):
    case = cases_for(spec, backend)[-1]
    dtype = next(dtype for dtype in spec.dtypes if can_run(spec, testing.make(spec, case, dtype), backend))
    first, second = (testing.run(spec, testing.make(spec, case, dtype), backend) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("spec, backend", NATIVE)
def test_number_of_threads_does_not_matter(spec, backend):
    case, before = spec.cases[-1], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(testing.run_three_ways(spec, case, backend, torch.float32))
    finally:
        torch.set_num_threads(before)
    for ours, plain, exact in results:
        assert_rule(spec, ours, plain, exact)


@pytest.mark.parametrize("spec", SPECS)
def test_compiles_as_one_graph(spec):
    case = spec.cases[len(spec.cases) // 2]
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    expected = testing.run(spec, testing.make(spec, case, torch.float32), native_backends(spec)[-1])
    arguments = testing.make(spec, case, torch.float32)
    ours = testing.run(testing.replace_function(spec, compiled), arguments, native_backends(spec)[-1])
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("spec", [p for p in SPECS if p.values[0].gradients])
def test_gradcheck(spec):
    """The hand-written backward against finite differences, in float64."""
    for case in spec.cases[: len(spec.cases) - 1]:  # the last one has the size of a real run
        arguments = testing.make(spec, case, torch.float64)
        arguments = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                     for n, v in arguments.items()}
        names = [n for n in spec.gradients if isinstance(arguments.get(n), torch.Tensor)]
        if not names or not all(arguments[n].numel() for n in names):
            continue
        inputs = [arguments[n].requires_grad_() for n in names]

        def call(*tensors, names=names, arguments=arguments):
            return spec.function(**arguments | dict(zip(names, tensors, strict=True)))

        with ops.use_backend("plain"):
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True, raise_exception=True), case


@pytest.mark.parametrize("spec", SPECS)
def test_opcheck(spec):
    """PyTorch's own checks of schema, fake, autograd registration and functionalisation, on recorded calls."""
    for call in testing.record_calls(spec, spec.cases[len(spec.cases) // 2]):
        torch.library.opcheck(*call)


def check_random_case(spec, case, backends):
    for dtype in spec.dtypes:
        for backend in backends:
            if can_run(spec, testing.make(spec, case, dtype), backend):
                assert_rule(spec, *testing.run_three_ways(spec, case, backend, dtype))


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(spec, data):
    case = spec.random_case(lambda low, high: data.draw(st.integers(low, high)))
    check_random_case(spec, case, native_backends(spec)[1:])


@pytest.mark.parametrize("spec, backend", FROM_GPU)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_interpreted(spec, backend, data):
    case = spec.random_case(lambda low, high: data.draw(st.integers(low, high)))
    check_random_case(spec, case, [backend])


@pytest.mark.parametrize("spec", [p.values[0] for p in FROM_GPU if p.values[1] == "triton"], ids=lambda s: s.name)
def test_triton_touches_its_tensors_only(spec):
    """No load or store outside the arguments, and no element stored by two programs."""
    from triton_interpreter import check_memory
    for case in cases_for(spec, "triton", every=2):
        arguments = testing.make(spec, case, torch.float32)
        if can_run(spec, arguments, "triton"):
            arguments = testing.make(spec, case, torch.float32)
            with check_memory(*(value for value in arguments.values() if isinstance(value, list))):
                testing.run(spec, arguments, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_fuzz_10000(spec):
    for seed in range(10_000):
        try:
            check_random_case(spec, spec.random_case(testing.random_draw(seed)), native_backends(spec)[1:])
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.skipif(ops.COMPILED_MISSING is not None, reason=str(ops.COMPILED_MISSING))
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The same cases on the code paths that this machine would not choose, in a process of its own."""
    lanes = torch.ops.jepa_fast_C.capability_lanes(torch.empty(0))
    if lanes <= {"default": 4, "avx2": 8}[capability]:
        pytest.skip(f"this machine runs {lanes} lanes: {capability} is its own choice or beyond it")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "test_op_matches_reference and cpp",
         "-p", "no:cacheprovider"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
