"""The bench of whole steps: all do the same work, who does not is refused, and what is read off a profile is right."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from bench import report
from bench.step import command, official, ours, page, plain_loop, providers, run, work
from bench.step.profile import COMPONENTS, take_apart
from bench.step.worker import Batches, Stop
from jepa_fast.recipes import get_recipe

RECIPES = {"ijepa": "ijepa_vits16", "vjepa": "vjepa_vitl16", "vjepa2": "vjepa2_vitl16", "ac": "vjepa2_ac_vitg",
           "lejepa": "lejepa_minimal"}
CHECKOUTS = {"ijepa": "ijepa", "vjepa": "jepa", "vjepa2": "vjepa2", "ac": "vjepa2", "lejepa": "lejepa"}
SIZES = {"ijepa": work.Size(batch_size=2, image_size=160), "vjepa": work.Size(batch_size=2, image_size=96, num_frames=8),
         "vjepa2": work.Size(batch_size=2, image_size=96, num_frames=8), "ac": work.Size(batch_size=2, image_size=32),
         "lejepa": work.Size(batch_size=8, image_size=32)}


class ThreeSteps(Batches):
    """In this process, without a clock."""

    def __init__(self, task: work.Work):
        super().__init__(task, None)

    def _answer(self) -> None:
        pass

    def _wait(self) -> None:
        if self.step:
            raise Stop
        self.remaining = 3


def losses_of(loop, task: work.Work, **options) -> list[float]:
    batches = ThreeSteps(task)
    with pytest.raises(Stop):
        loop(task, batches, **options)
    return [float(loss) for loss in batches.losses]


def narrow(family: str):
    """The recipe with two narrow blocks everywhere."""
    recipe, size = get_recipe(RECIPES[family]), dict(embed_dim=32, depth=2, num_heads=2)
    objective = recipe.objective
    changes = {"encoder": dataclasses.replace(objective.encoder, **size)}
    if family == "lejepa":
        changes["projector"] = (64, 64, 16)
    else:
        changes["predictor"] = dataclasses.replace(objective.predictor, **size)
    return dataclasses.replace(recipe, objective=dataclasses.replace(objective, **changes))


@pytest.mark.parametrize("family", RECIPES)
def test_plain_loops_do_what_ours_does(family, tmp_path):
    task = work.make(tmp_path, narrow(family), SIZES[family], precision="fp32", device="cpu", num_steps=3)
    expected = losses_of(ours.loop, task)
    for manner in (plain_loop.official(task), plain_loop.tuned(is_compiled=False)):
        losses = losses_of(plain_loop.loop, task, manner=manner)
        assert losses == pytest.approx(expected, rel=run.SIGREG_TOLERANCE if family == "lejepa" else 2e-5)
    assert len(set(expected)) == 3


@pytest.fixture(scope="module")
def result() -> dict:
    """Official style, tuned and ours in processes, of a narrow model; model FLOPs of the step that they are counted in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "get_recipe", lambda name: narrow("ijepa"))
        patch.setattr(run, "measure_ceilings", lambda *device: {"flop_per_s": 1e11, "copy_bytes_per_s": 1e10})
        patch.setattr(command, "provenance", lambda: {"device": "cpu: x", "torch": "2", "python": "3", "commit": "0"})
        counted = run.CHECKED_STEPS + 2  # after the checked steps, a round of one and the profiled one
        patch.setattr(run, "flops", functools.partial(_flops_of_step, run.flops, counted))
        return command.bench(command.Arguments(size=SIZES["ijepa"], device="cpu", rounds=1, warmup=0))


def test_cached_features_are_the_same_step(tmp_path):
    task = work.make(tmp_path, narrow("ac"), SIZES["ac"], precision="fp32", device="cpu", num_steps=3)
    assert losses_of(ours.loop, task, has_features=True) == losses_of(ours.loop, task)


def _flops_of_step(count, step, task, steps) -> tuple[float, float]:
    """Officially every patch goes through the context's convolution, forward and for its weights; the model counts kept."""
    encoder, kept = task.recipe.objective.encoder, task.masks()[step]["context"][0].numel()
    unused = task.recipe.train.batch_size * encoder.grid[0] * encoder.grid[1] - kept
    asked, done = count(task, [step])
    return asked + 2 * 2 * unused * encoder.in_chans * encoder.patch_size**2 * encoder.embed_dim, done


def test_every_provider_is_timed_and_taken_apart(result, tmp_path):
    assert [row["provider"] for row in result["rows"]] == ["official style", "tuned", "ours"]
    for row in result["rows"]:
        assert row["ms"] > 0 and row["peak_bytes"] > 0 and row["launches"] > 100
        assert sum(row["components"].values()) == pytest.approx(row["step_ms"], rel=0.02)
        # a part that nobody names any more would be counted elsewhere
        assert all(row["components"][part] > 0 for part in COMPONENTS if part != "host")
    style, tuned, mine = result["rows"]
    assert style["flops"] == pytest.approx(result["model_flops"], rel=0.01)
    assert max(mine["launches"], tuned["launches"]) < style["launches"]
    text = str(page.tables(result))
    assert "target GEMM" in text and "× official" in text
    page.write(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert len((tmp_path / "result.csv").read_text().splitlines()) == 4
    assert (tmp_path / "result.png").stat().st_size > 10_000


def test_ratios_and_readme(result, tmp_path, monkeypatch):
    rows = {row["provider"]: row for row in page.ratios(result)}
    assert rows["ours"]["x_official"] == rows["official style"]["ms"] / rows["ours"]["ms"]
    assert rows["ours"]["x_tuned"] == rows["tuned"]["ms"] / rows["ours"]["ms"]
    mfu = result["model_flops"] / rows["ours"]["ms"] * 1e3 / result["ceilings"]["flop_per_s"]
    assert rows["ours"]["mfu"] == pytest.approx(mfu)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    page.write(result, tmp_path / "bench/results/step/cpu/x")
    assert f"| ours | {rows['ours']['ms']:.0f} (" in report.step_table()


def test_who_computes_something_else_is_not_timed():
    task = SimpleNamespace(family="ijepa", recipe=SimpleNamespace(train=SimpleNamespace(precision="fp32")))
    run.check_losses({"official": [1.0, 0.5], "ours": [1.00009, 0.5]}, task)
    run.check_losses({"official": [1.0, 0.5], "ours+fp8": [1.04, 0.5]}, task)
    for wrong in ([1.0002, 0.5], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="ours and official do not do the same: loss .* not timed"):
            run.check_losses({"official": [1.0, 0.5], "ours": wrong}, task)


def event(name, start, end, parent=None, kernels=(), sequence_nr=-1, device=DeviceType.CPU):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    made = SimpleNamespace(name=name, time_range=span, cpu_parent=parent, cpu_children=[], sequence_nr=sequence_nr,
                           kernels=[SimpleNamespace(duration=duration) for duration in kernels], device_type=device,
                           self_cpu_time_total=float(end - start))
    if parent is not None:
        parent.cpu_children.append(made)
        parent.self_cpu_time_total -= end - start
    return made


def test_a_step_on_a_gpu_is_taken_apart():
    """Forward products by the model they are in, backward ones by the forward operator they belong to; host and stops."""
    target, context = event("region: target", 0, 20), event("region: context", 20, 40)
    node = event("autograd::engine::evaluate_function: AddmmBackward0", 100, 120, sequence_nr=7)
    loss_node = event("autograd::engine::evaluate_function: SmoothL1LossBackward0", 125, 140, sequence_nr=8)
    step = event("Optimizer.step#AdamW.step", 150, 180)
    events = [target, context, node, loss_node, step,
              event("aten::addmm", 5, 10, target, kernels=[1000]),
              event("aten::addmm", 25, 30, context, kernels=[2000], sequence_nr=7),
              event("aten::native_layer_norm", 31, 35, context, kernels=[300]),
              event("aten::scaled_dot_product_attention", 36, 39, context, kernels=[500]),
              event("aten::mm", 105, 110, node, kernels=[4000]),
              event("aten::smooth_l1_loss", 60, 70, kernels=[50]),
              event("aten::mul_", 160, 170, step, kernels=[600]),
              event("aten::norm", 190, 195, kernels=[70]),  # a logger, after the backward pass
              event("aten::view", 24, 25, context, sequence_nr=8), event("aten::smooth_l1_loss", 55, 58, sequence_nr=8),
              event("aten::mul", 130, 135, loss_node, kernels=[30]),
              *(event("cudaLaunchKernel", t, t + 1, kernels=[9]) for t in range(8)),
              event("cudaStreamSynchronize", 200, 3200), event("cudaDeviceSynchronize", 9000, 9500),
              event("gemm", 0, 4000, device=DeviceType.CUDA), event("gemm", 3000, 8520, device=DeviceType.CUDA)]
    found = take_apart(events, 0.010, is_cuda=True)
    assert found["components"] == {"target GEMM": 1.0, "context GEMM": 6.0, "predictor GEMM": 0.0, "attention": 0.5,
                                   "elementwise, norm": 0.3, "patch embed, loss": 0.08, "optimizer, EMA": 0.67,
                                   "host": 1.48}
    assert (found["launches"], found["stops"]) == (8, 1)  # the second stop is the stopwatch's
    assert found["idle_ms"] == pytest.approx(1.48) and found["host_ms"] == pytest.approx(6.5)


@pytest.mark.parametrize("arguments, message", [
    (dict(providers=("theirs",)), "providers must be of official, official style, tuned, .*, got theirs"),
    (dict(providers=("official",)), "needs --official PATH, a checkout of github.com/facebookresearch/ijepa"),
    (dict(providers=("ours, cached features",)), "cached features are V-JEPA 2-AC's, got recipe ijepa_vits16"),
    (dict(rounds=0), "rounds must be at least 1 .*, got 0"),
    (dict(size=work.Size(encoder="resnet")), "encoder must be vit, .* got 'resnet'"),
    (dict(official="x", precision="bf16", device="cpu"), "bfloat16 on a GPU only"),
    (dict(config="eb_jepa_two_rooms"), "got recipe eb_jepa_two_rooms")])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        command.bench(command.Arguments(**arguments))


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(ValueError, match="has no src/train.py: is it a checkout of the right repository"):
        official.import_from(tmp_path, "src.train")


@pytest.mark.parametrize("family", RECIPES)
def test_official_code_does_what_ours_does(family, tmp_path, upstream):
    """The authors' own main, in a process of its own; run with --upstream ijepa=PATH and so on."""
    checkout = upstream(CHECKOUTS[family])
    size = dataclasses.replace(SIZES[family], encoder="vits8" if family == "lejepa" else "vitt16")
    if family != "lejepa":
        size = dataclasses.replace(size, predictor_depth=2, predictor_dim=96)
    task = work.make(tmp_path, get_recipe(RECIPES[family]), size, precision="fp32", device="cpu", num_steps=3)
    provider = run.Provider("official", task, checkout)
    try:
        theirs = provider.ask("run", 3)["losses"]
    finally:
        provider.stop()
    assert losses_of(ours.loop, task) == pytest.approx(theirs, rel=run.SIGREG_TOLERANCE if family == "lejepa" else 2e-5)


def test_default_providers():
    assert providers.NAMES[0] == "official" and command.default_providers(True, True)[0] == "official"
    assert command.default_providers(False, False) == ("official style", "tuned", "ours")
    assert set(command.default_providers(False, True)) <= set(providers.NAMES)
