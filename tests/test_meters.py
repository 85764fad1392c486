"""What a run costs: rates, utilisation, waiting, energy and compilations, against numbers worked out by hand."""

import dataclasses
import json
import sys
import types

import pytest
import torch

from jepa_fast import recipes
from jepa_fast.models.flops import Work
from jepa_fast.train import meters as meters_module
from jepa_fast.train.distributed import World
from jepa_fast.train.energy import EnergyCounter
from jepa_fast.train.meters import Meters, data_hint, describe, percentile
from jepa_fast.train.peaks import device_peak, peak_of
from jepa_fast.train.recompiles import Recompilations

CPU = World(0, 1, torch.device("cpu"))


class Time:
    """A clock that is set by hand, for the host and for the device, which is a second behind."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(meters_module.time, "perf_counter", lambda: self.now)

    def mark(self):
        return self.now + 1.0

    def seconds(self, begin, end):
        return end - begin


class Battery:
    """3 J used up per second."""

    reason = ""

    def __init__(self, time):
        self.time = time

    def joules(self):
        return 3 * self.time.now


def batches(time, waits):
    for wait in waits:
        time.now += wait
        yield {"clips": None, "index": None}


def test_rates_by_hand(monkeypatch):
    """Steps of 2 s, the first of 8; every batch is waited for 0.5 s, the first one 4 s."""
    recipe, time = recipes.get_recipe("vjepa2_vitl16"), Time(monkeypatch)   # 3,072 clips a step
    meters = Meters(recipe, World(0, 4, torch.device("cpu")), time, Battery(time))
    meters.peak = 1e12
    monkeypatch.setattr(meters_module, "peak_memory_mib", lambda device: 640.0)
    monkeypatch.setattr(meters, "_over_ranks", lambda *numbers: numbers)
    meters.start(10)
    rows = []
    for step, _ in enumerate(meters.watch(batches(time, [4.0, 0.5, 0.5, 0.5])), start=11):
        time.now += 4.0 if step == 11 else 1.5
        meters.step(step, Work(1000, 5e11, 8e11, padding_tokens=50))
        if step in (11, 14):
            rows.append(meters.read(step, meters.note()))
    first, rest = rows
    assert rest == {"clips_per_s": 1536.0, "tokens_per_s": 4 * 500.0, "mfu_percent": 25.0, "hfu_percent": 40.0,
                    "step_ms": 2000.0, "energy_j_per_sample": round(3 * 6 / (3 * 3072 / 4), 3), "data_wait_percent": 25.0,
                    "peak_memory_mib": 640.0}
    assert (first["clips_per_s"], first["data_wait_percent"]) == (384.0, 50.0)
    summary = meters.summary()
    assert (summary["first_step"], summary["last_step"], summary["clips"]) == (10, 14, 4 * 3072)
    # the first log window is warm-up
    assert (summary["steady_steps"], summary["clips_per_s"], summary["mfu_percent"]) == (3, 1536.0, 25.0)
    assert (summary["data_wait_percent"], summary["step_ms_p99"], summary["wall_s"]) == (25.0, 2000.0, 14.0)
    assert (summary["energy_j"], summary["energy_j_per_sample"]) == (42.0, pytest.approx(42 / 4 / 3072, rel=1e-5))
    assert (summary["model_tflop_per_step"], summary["peak_tflop_per_s"]) == (0.5, 1.0)
    assert summary["padding_percent"] == 5.0
    line, hint = describe(summary, recipe)
    for part in ("MFU 25.0 %, HFU 40.0 %", "25 % waiting for data", "1536 clips/s", "5.0 % padding"):
        assert part in line
    assert hint == data_hint(recipe)


def test_the_summary_is_of_all_ranks(monkeypatch):
    """The other rank waited twice as long, took half the memory and half the energy."""
    meters = Meters(recipes.get_recipe("ijepa_vith14"), World(0, 2, torch.device("cpu")))
    other = torch.tensor([2.0, 0.5, 0.5], dtype=torch.float64)

    def all_gather(ranks, mine):
        for rank, value in zip(ranks, (mine, mine * other), strict=True):
            rank.copy_(value)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    assert meters._over_ranks(3.0, 640.0, 10.0) == (6.0, 640.0, 15.0)
    assert meters._over_ranks(3.0, 640.0, None) == (6.0, 640.0, None)


def test_a_prefetcher_says_itself_how_long_it_was_waited_for(monkeypatch):
    time = Time(monkeypatch)

    class Prefetcher:
        waited_s = 0.0

        def __iter__(self):
            for _ in range(3):
                time.now += 9.0      # its own work, on another stream
                self.waited_s += 0.25
                yield {"images": None}

    meters = Meters(recipes.get_recipe("ijepa_vith14"), CPU, time)
    meters.start(0)
    for step, _ in enumerate(meters.watch(Prefetcher()), start=1):
        time.now += 1.0
        meters.step(step, Work())
    row = meters.read(3, meters.note())
    assert row["data_wait_percent"] == round(100 * 0.75 / 30, 3)
    assert row["images_per_s"] == round(3 * 2048 / 30, 3)
    assert "tokens_per_s" not in row and "mfu_percent" not in row


@pytest.mark.parametrize(("name", "precision", "tflops"), [
    ("NVIDIA A100-SXM4-80GB", "bf16", 312), ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "bf16", 756),
    ("NVIDIA H200", "tf32", 495), ("NVIDIA H200 NVL", "bf16", 835), ("NVIDIA GH200 480GB", "bf16", 989),
    ("NVIDIA B200", "bf16", 2250), ("NVIDIA L40S", "bf16", 362), ("NVIDIA L4", "bf16", 121), ("NVIDIA A10G", "bf16", None),
    ("NVIDIA GeForce RTX 4090", "fp32", 82.6), ("Tesla T4", "bf16", None)])
def test_peaks_by_device_name(name, precision, tflops):
    assert peak_of(name, precision) == (None if tflops is None else tflops * 1e12)


def test_single_precision_counts_by_what_products_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda", 0)
    assert [device_peak(cuda, precision) for precision in ("bf16", "fp32")] == [989e12, 67e12]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peak(cuda, "fp32") == 495e12
    assert device_peak(torch.device("cpu"), "bf16") is None


def fake_nvml(millijoules: list[int]):
    class NVMLError(Exception):
        pass

    def by_uuid(uuid):
        if uuid != "GPU-1234":
            raise NVMLError(f"not found: {uuid}")
        return "handle"

    return types.SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules.pop(0) if handle == "handle" else 1 / 0)


def test_energy_is_of_the_device_with_the_same_identity(monkeypatch):
    cuda = torch.device("cuda", 1)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([0, 5000, 7500]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    counter = EnergyCounter(cuda)
    assert (counter.joules(), counter.joules(), counter.reason) == (5.0, 7.5, "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="99"))
    counter = EnergyCounter(cuda)
    assert (counter.joules(), counter.reason) == (None, "NVML: not found: GPU-99")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyCounter(cuda).reason == 'needs pip install "jepa_fast[energy]"'
    assert EnergyCounter(torch.device("cpu")).joules() is None


def test_the_hint_names_the_fields_to_change():
    image, mixed = (recipes.get_recipe(name) for name in ("ijepa_vith14", "vjepa2_1_vitl16"))
    assert "raise data.num_workers (now 10);" in data_hint(image)
    assert "raise data.videos.num_workers (now 8) and data.images.num_workers (now 8)" in data_hint(mixed)
    none = dataclasses.replace(image, data=dataclasses.replace(image.data, num_workers=0))
    assert "(now 0): 0 loads in the training process" in data_hint(none)
    assert "num_workers" not in data_hint(recipes.get_recipe("eb_jepa_two_rooms"))


def test_recompilations_count_after_warm_up_only():
    recompilations, captured = Recompilations(), [0]
    recompilations.watch(lambda: captured[0])
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=True)
    double(torch.ones(4))
    assert recompilations.count == 0
    recompilations.warmed_up()
    double(torch.ones(5))
    assert recompilations.count == 0
    double(torch.ones(5, dtype=torch.float64))
    assert recompilations.count == 1
    captured[0] = 3      # CUDA graphs
    assert recompilations.count == 4


def test_percentiles_are_values_that_occurred():
    assert [percentile([1.0, 2.0, 3.0, 9.0], fraction) for fraction in (0.0, 0.5, 0.99, 1.0)] == [1.0, 3.0, 9.0, 9.0]
    assert percentile([], 0.5) == 0.0


def test_train_ends_with_the_summary(tmp_path, capsys):
    from jepa_fast import cli

    assert cli.main(["train", "ijepa_mnist", "--run-dir", str(tmp_path), "--train.max-steps", "3", "--train.batch-size", "8",
                     "--train.log-every", "1", "--objective.encoder.depth", "1", "--objective.predictor.depth", "1",
                     "--objective.masking.mask-group-size", "8"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["last_step"], summary["images"], summary["steady_steps"], summary["recompilations"]) == (3, 24, 2, 0)
    # 49 tokens of 192 in the target, as many at most in the context, four predictor sequences; forward and backward
    assert 0 < summary["model_tflop_per_step"] < 8 * 49 * (1 + 3 + 4 * 3) * 24 * 192**2 / 1e12
    steps_per_s = summary["images_per_s"] / 8
    assert summary["model_tflop_per_s"] == pytest.approx(summary["model_tflop_per_step"] * steps_per_s, rel=1e-4)
    out = capsys.readouterr().out
    assert out.startswith("ijepa_mnist, steps 0 to 3: ") and "TFLOP/s" in out and "run folder" in out
