"""The paper model of training on many GPUs, against numbers worked out by hand and those of the performance model."""

import dataclasses
import json
import math

import pytest

from bench.scale import Links, Run, Step, communication_s, memory_gb, predict, table
from bench.scale_command import main
from bench.scale_inputs import activation_bytes, empty_batch, step_of
from jepa_fast import recipes

IDEAL = Links(efficiency=1.0, latency_us=0.0)
STEP = Step(ms=100.0, batch_size=10, backward_share=0.5, deviation=0.0, trained=10**9, averaged=5 * 10**8,
            largest_unit=10**7, activation_bytes=20e9)
RUN = Run(samples=3.6e6, global_batch=None, overlap=0.5, jitter=0.0, samples_per_core_s=50.0)


@pytest.mark.parametrize(("name", "gradients_gb", "all_reduce_ms"), [("ijepa_vith14", 2.6, 10), ("vjepa2_vitg16", 4.1, 16)])
def test_gradients_of_a_node_as_the_performance_model_has_them(name, gradients_gb, all_reduce_ms):
    step = step_of(recipes.get_recipe(name), 100.0, 2, num_batches=1)
    assert 4e-9 * step.trained == pytest.approx(gradients_gb, abs=0.05)
    assert 1e3 * IDEAL.all_reduce_s(4 * step.trained, 8) == pytest.approx(all_reduce_ms, abs=0.5)


@pytest.mark.parametrize(("name", "state_gb"), [("ijepa_vith14", 15.5), ("ijepa_vitl16", 7.8)])
def test_state_as_the_performance_model_has_it(name, state_gb):
    assert step_of(recipes.get_recipe(name), 1.0, 1, num_batches=1).state_bytes() / 1e9 == pytest.approx(state_gb, rel=0.02)


def test_collectives_by_hand():
    links = Links(gpus_per_node=4, node_gb_s=100.0, network_gb_s=10.0, efficiency=0.5, latency_us=1000.0)
    # 3/4 of 8 GB at 50 GB/s in the node, 1/2 of a GPU's 2 GB at 5 GB/s between two nodes, 2 + 1 rounds of a millisecond
    assert links.all_gather_s(8e9, 4, 2) == pytest.approx(0.12 + 0.2 + 0.003)
    assert links.all_reduce_s(8e9, 4, 2) == pytest.approx(2 * 0.323)
    assert links.all_gather_s(8e9, 1) == 0.0


def test_communication_by_hand():
    links = dataclasses.replace(IDEAL, gpus_per_node=2, node_gb_s=100.0, network_gb_s=10.0)
    # float32 gradients, 4 GB: half of it within the node, half of a GPU's 2 GB between nodes, there and back
    assert communication_s(STEP, links, "DDP", 4, 3.0) == pytest.approx((0.0, 2 * (0.02 + 0.1)))
    # bfloat16 weights, 2 GB twice and the average's 1 GB once for each of 3 micro-batches; gradients scattered once
    assert communication_s(STEP, links, "FSDP2", 4, 3.0) == pytest.approx((3 * (2 * 0.06 + 0.03), 0.12))
    # within the node only, and then the 2 GB that a GPU has of the gradients between nodes
    assert communication_s(STEP, links, "HSDP", 4, 3.0) == pytest.approx((3 * (2 * 0.01 + 0.005), 0.02 + 2 * 0.1))
    assert communication_s(STEP, links, "FSDP2", 1, 3.0) == (0.0, 0.0)


def test_a_row_by_hand():
    # 4 GB by 8 GPUs: 2 * 7/8 * 4 / 450 s, half of which can be hidden in a backward pass of 50 ms
    row = predict(STEP, RUN, IDEAL, "DDP", 8)
    all_reduce = 1e3 * 2 * 7 / 8 * 4 / 450
    assert row["communication_ms"] == pytest.approx(all_reduce)
    assert row["step_ms"] == pytest.approx(100 + all_reduce / 2)
    assert row["samples_per_s"] == pytest.approx(80 / row["step_ms"] * 1e3)
    assert row["efficiency_percent"] == pytest.approx(100 * 100 / row["step_ms"])
    assert row["hours"] == pytest.approx(3.6e6 / row["samples_per_s"] / 3600)
    assert row["gpu_hours"] == pytest.approx(8 * row["hours"])
    assert row["cores_per_gpu"] == pytest.approx(row["samples_per_s"] / 8 / 50)
    assert row["memory_gb"] == pytest.approx(18 + 0.5 * 6 + 20)


def test_what_cannot_be_hidden_is_what_computation_does_not_last_for():
    slow = dataclasses.replace(IDEAL, node_gb_s=10.0)
    row = predict(STEP, dataclasses.replace(RUN, overlap=1.0), slow, "DDP", 8)
    assert row["communication_ms"] == pytest.approx(700.0)
    assert row["exposed_ms"] == pytest.approx(650.0)     # 50 ms of backward pass
    # with two micro-batches it is the last one's
    row = predict(STEP, dataclasses.replace(RUN, overlap=1.0, global_batch=160), slow, "DDP", 8)
    assert (row["micro_batches"], row["compute_ms"], row["exposed_ms"]) == pytest.approx((2, 200.0, 650.0))
    # and half as many samples as measured take half as long
    row = predict(STEP, dataclasses.replace(RUN, overlap=1.0, global_batch=40), slow, "DDP", 8)
    assert (row["micro_batches"], row["compute_ms"], row["exposed_ms"]) == pytest.approx((1, 50.0, 675.0))
    assert row["is_smaller_than_measured"]


def test_the_slowest_gpu_by_hand():
    step, run = dataclasses.replace(STEP, deviation=0.03), dataclasses.replace(RUN, jitter=0.04)
    assert predict(step, run, IDEAL, "DDP", 16)["straggling_ms"] == pytest.approx(100 * 0.05 * math.sqrt(2 * math.log(16)))
    # the masks of four micro-batches even out, a slow GPU does not
    run = dataclasses.replace(run, global_batch=640)
    assert predict(step, run, IDEAL, "DDP", 16)["straggling_ms"] == pytest.approx(
        400 * math.hypot(0.015, 0.04) * math.sqrt(2 * math.log(16)))
    assert predict(step, run, IDEAL, "DDP", 1)["straggling_ms"] == 0


def test_sharded_state_by_hand():
    unit = 10**7 * 8 / 1e9      # two gathered in bfloat16, one gradient in float32
    assert memory_gb(STEP, IDEAL, "FSDP2", 64, 10) == pytest.approx(21 / 64 + unit + 20)
    assert memory_gb(STEP, IDEAL, "HSDP", 64, 5) == pytest.approx(21 / 8 + unit + 10)
    assert memory_gb(dataclasses.replace(STEP, precision="fp32"), IDEAL, "DDP", 64, 20) == pytest.approx(16 + 2 + 20)


def test_rows_go_as_far_as_the_batch_can_be_divided():
    rows = table(STEP, dataclasses.replace(RUN, global_batch=96), Links(gpus_per_node=4))
    assert [(row["gpus"], row["mode"]) for row in rows] == [
        (1, "DDP"), (2, "DDP"), (2, "FSDP2"), (4, "DDP"), (4, "FSDP2"), (8, "DDP"), (8, "FSDP2"), (8, "HSDP"),
        (16, "DDP"), (16, "FSDP2"), (16, "HSDP"), (32, "DDP"), (32, "FSDP2"), (32, "HSDP")]


def test_activations_by_hand():
    recipe = recipes.get_recipe("ijepa_vits16")
    batch = empty_batch(recipe, 4)
    batch["masks"] = recipe.objective.masking.sample((14, 14), 4, seed=0, step=0).pack()
    counts = batch["masks"].counts
    one_block = 4 * 196 * 384 * 36
    for activations, kept in (("all", 36), ("lean", 24), ("checkpoint", 4)):
        changed = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, activations=activations))
        expected = kept * 384 * (12 * counts.context + 6 * counts.predictor) + one_block
        assert activation_bytes(changed, batch) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["vjepa_vitl16", "vjepa2_1_vitb16", "vjepa2_ac_vitg", "lejepa_vitl14", "lejepa_minimal"])
def test_every_objective_has_a_step(name):
    step = step_of(recipes.get_recipe(name), 50.0, 2, num_batches=2)
    assert 0.2 < step.backward_share <= 2 / 3 + 1e-9 and step.activation_bytes > 1e8
    assert (step.averaged == 0) == name.startswith("lejepa")


def test_the_command_writes_and_prints_its_assumptions(tmp_path, capsys):
    result = {"recipe": "ijepa_vits16", "batch_size": 16, "precision": "fp32", "device": "NVIDIA H200",
              "rows": [{"provider": "official", "ms": 40.0}, {"provider": "ours", "ms": 20.0}]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    main(["--config", "ijepa_vits16", "--from", str(tmp_path / "result.json"), "--out", str(tmp_path), "--max-gpus", "16",
          "--links.node-gb-s", "900"])
    out = capsys.readouterr().out
    assert "20 ms, measured: ours on NVIDIA H200" in out and "900 GB/s in a node of 8" in out and "not measured" in out
    saved = json.loads((tmp_path / "scale.json").read_text())
    assert saved["step"]["precision"] == "fp32"
    assert saved["rows"][0]["samples_per_s"] == pytest.approx(16 / 0.020)
    assert len((tmp_path / "scale.csv").read_text().splitlines()) == 1 + len(saved["rows"]) == 11
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config", "ijepa_vits16"], "pass either --step-ms MS"),
    (["--config", "eb_jepa_two_rooms", "--step-ms", "1", "--batch-size", "2"], "scale is for I-JEPA"),
    (["--config", "lejepa_vitl14", "--step-ms", "1"], "pass --batch-size"),
    (["--config", "ijepa_vits16", "--step-ms", "-1"], "step_ms must be above 0 and batch_size at least 1, got -1.0 and 128"),
    (["--config", "ijepa_vits16", "--step-ms", "1", "--overlap", "2"], r"overlap must be in \[0, 1\], got 2.0")])
def test_mistakes_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--out", str(tmp_path)])


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"recipe": "vjepa_vitl16", "rows": [{"provider": "tuned", "ms": 3}]}))
    source = ["--from", str(tmp_path / "result.json"), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="has no row of provider 'ours'; it has tuned"):
        main(["--config", "vjepa_vitl16", *source])
    with pytest.raises(ValueError, match="is of vjepa_vitl16, not of ijepa_vits16: pass --config vjepa_vitl16"):
        main(["--config", "ijepa_vits16", "--provider", "tuned", *source])
    small = {"batch_size": 2, "is_official_size": False, "case": "vits16-112", "rows": [{"provider": "ours", "ms": 3}]}
    (tmp_path / "result.json").write_text(json.dumps(small))
    with pytest.raises(ValueError, match="was measured at another size than the recipe's: vits16-112"):
        main(["--config", "ijepa_vits16", *source])


@pytest.mark.parametrize(("change", "message"), [
    ({"gpus_per_node": 0}, "gpus_per_node must be at least 1, got 0"), ({"node_gb_s": 0.0}, "node_gb_s must be above 0"),
    ({"efficiency": 1.5}, "efficiency must be in"), ({"latency_us": -1.0}, "latency_us must be at least")])
def test_links_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        Links(**change)
