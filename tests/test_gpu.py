"""On an NVIDIA GPU: every op x case x dtype on every GPU backend, bit-equal reruns, no stops, a CUDA graph."""

import pytest
import torch

from jepa_fast import ops, testing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BACKENDS = ("triton", "cuda")
SPECS = [pytest.param(spec, backend, id=f"{spec.name}-{backend}") for spec in testing.OPS.values()
         for backend in spec.backends("cuda") if backend in BACKENDS]


def supported(spec, backend, dtype):
    """The cases that the backend can compute, with large ones."""
    for case in [*spec.cases, *spec.bench]:
        try:
            testing.run(spec, testing.make(spec, case, dtype, "cuda"), backend)
        except RuntimeError as error:
            if "asked for, but" not in str(error):
                raise
        else:
            yield case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec, backend", SPECS)
def test_op_matches_reference(spec, backend, dtype):
    for case in supported(spec, backend, dtype):
        ours, plain, exact = testing.run_three_ways(spec, case, backend, dtype, "cuda")
        testing.assert_within_error_rule(ours, plain, exact, spec.floor)


@pytest.mark.parametrize("spec, backend", SPECS)
def test_two_runs_are_bit_equal(spec, backend):
    for case in supported(spec, backend, torch.bfloat16):
        first, second = (testing.run(spec, testing.make(spec, case, torch.bfloat16, "cuda"), backend) for _ in range(2))
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=f"{case} {name}")


@pytest.mark.parametrize("spec, backend", SPECS)
def test_nothing_waits_for_the_device(spec, backend):
    for case in supported(spec, backend, torch.float32):
        arguments = testing.make(spec, case, torch.float32, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            with ops.use_backend(backend):
                spec.function(**arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_takes_new_scalars():
    g = torch.Generator().manual_seed(0)
    shapes, changing = [(300, 301), (17,), (129, 1000)], ("lr", "weight_decay", "step", "beta1", "beta2", "momentum")

    def arguments():
        params, grads, average = ([torch.randn(shape, generator=g.manual_seed(i)).cuda() for shape in shapes]
                                  for i in range(3))
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        return [params, grads, *moments, average, [], []]

    def step(count):
        return {"lr": [1e-3 * count] * 3, "weight_decay": [0.05] * 3, "step": [count] * 3, "beta1": 0.9, "beta2": 0.999,
                "momentum": 1 - 0.01 / count}

    scalars = torch.zeros(3, 5, device="cuda")
    captured, eager, spare = arguments(), arguments(), arguments()
    graph = torch.cuda.CUDAGraph()
    with ops.use_backend("cuda"):
        ops.adamw_ema_scalars_(*spare, scalars, 0.9, 0.999, 1e-8)  # the kernel is loaded before the capture
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            ops.adamw_ema_scalars_(*captured, scalars, 0.9, 0.999, 1e-8)
        for count in (1, 2, 3):
            scalars.copy_(ops.adamw_ema_scalars(*(step(count)[name] for name in changing)))
            graph.replay()
            ops.adamw_ema_(*eager, **step(count), eps=1e-8)
    for ours, theirs in zip(captured, eager, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y)
