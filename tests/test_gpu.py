"""What only a GPU can show: `make gpu-test`."""

import subprocess
import sys

import pytest
import torch
from test_train import tiny

from jepa_fast import ops, testing
from jepa_fast.train.loop import train
from jepa_fast.train.run import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ON_GPU = [pytest.param(spec, case, backend, id=f"{spec.name}-{case}-{backend}")
          for spec in testing.OPS.values() for backend in spec.backends("cuda") if backend != "plain"
          for case in spec.cases]


@pytest.mark.parametrize("spec, case, backend", ON_GPU)
def test_op_matches_reference(spec, case, backend):
    for dtype in dict.fromkeys((*spec.dtypes, torch.float16)):
        try:
            ours, plain, exact = testing.run_three_ways(spec, case, backend, dtype, "cuda")
        except RuntimeError as error:
            if "asked for, but" in str(error):
                continue
            raise
        testing.assert_within_error_rule(ours, plain, exact, spec.floor)
        again = testing.run(spec, testing.make(spec, case, dtype, "cuda"), backend)
        for name in ours:
            torch.testing.assert_close(again[name], ours[name], rtol=0, atol=0, equal_nan=True, msg=f"{dtype} {name}")


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in testing.OPS.values()])
def test_automatic_choice_runs_and_does_not_stop_the_device(spec):
    """No op waits for the GPU, whatever backend is chosen."""
    case = spec.cases[len(spec.cases) // 2]
    arguments = testing.make(spec, case, torch.bfloat16, "cuda")
    spec.function(**arguments)
    arguments = testing.make(spec, case, torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        spec.function(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["ijepa_mnist", "lejepa_mnist"])
def test_training_is_that_of_the_cpu(name, tmp_path):
    """The same recipe in float32, some steps: our kernels there, our C++ here."""
    losses = {}
    for device in ("cpu", "cuda"):
        run = train(tiny(name, device=device, max_steps=5), tmp_path / device)
        losses[device] = [float(row["loss"]) for row in read_metrics(run.metrics_path)]
    assert len(losses["cpu"]) == 5
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("call", [
    "gather_tokens(torch.zeros(1, 4, 8, device='cuda'), torch.tensor([[0, 4]], device='cuda'))",
    "varlen_attention_qkv(torch.zeros(4, 3, 1, 16, device='cuda'), torch.tensor([0, 5, 4], device='cuda').int(), 5)",
])
def test_values_are_checked_on_the_device(call):
    """In a process of its own: the assertion ends the device's context. PyTorch does not print its message on a GPU."""
    code = f"import torch; from jepa_fast import ops\nwith ops.checks_on_device(): ops.{call}\ntorch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_step_takes_new_scalars(backend):
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
    with ops.use_backend(backend):
        ops.adamw_ema_scalars_(*captured, scalars, 0.9, 0.999, 1e-8)  # kernel and tables are loaded before the capture
        for lists, fresh in zip(captured, spare, strict=True):
            for x, y in zip(lists, fresh, strict=True):
                x.copy_(y)
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
