"""The command for a machine with a GPU, rehearsed on one without: every stage runs and leaves its rows."""

import argparse
import functools
import json
import pathlib
import subprocess
import sys

import pytest

from bench import gpu_cases
from bench.gpu_page import floor_us, goals
from jepa_fast import testing

ROOT = pathlib.Path(__file__).parent.parent


def test_rehearsal(tmp_path):
    done = subprocess.run([sys.executable, "-m", "bench.on_gpu", "--out", str(tmp_path), "--rehearse", "--op", "gather"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "Traceback" not in logs, logs[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["proofs"] and not [row for row in results["proofs"] if row.get("error")]
    providers = {row["provider"] for row in results["times"] if row["op"] == "gather_tokens"}
    assert {"eager", "torch.compile"} <= providers
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in results["times"])
    attention = [goal for goal in results["goals"] if goal["op"] == "varlen_attention_qkv"]
    assert attention and all(goal["measured"] is None and goal["met"] is None for goal in attention)
    assert "not measured" in (tmp_path / "index.html").read_text()


def small_cases():
    cases = gpu_cases
    return [cases._attention("apart", [16, 16], 2, 24), cases._attention("rotary", [32, 32], 2, 64, (2, 4, 4)),
            cases._attention("frames", [32, 32], 2, 64, (2, 4, 4), frame_size=16),
            cases._optimizer("step", [(3, 4), (5,)], 1), cases._ema("average", [(3, 4)]),
            cases._layer_norm("rows", 10, 64, False), cases._layer_norm("stream", 10, 64, True),
            cases._latent_loss("smooth", 20, 30, 64, 1.0), cases._latent_loss("l1", 20, 30, 64, 0.0),
            cases._gather("rows", 2, 9, 4, 16), cases._scatter("rows", 2, 9, 4, 16), cases._patches("rows", 2, 28, 14, 2),
            cases._bias_gelu("rows", 8, 64), cases._sigreg("views", 2, 16, 8, 32), cases._directions("unit", 8, 16),
            cases._multiblock("masks", 3, (8, 8))]


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: f"{case.op}-{case.name}")
def test_peers_do_the_same_work(case):
    """On small shapes, as far as they run on a CPU: a peer that computes something else is no peer."""
    from bench.gpu_stages import Provider, agree_with, providers_of

    arguments = gpu_cases.arguments_of(case, "cpu")
    expected = Provider("plain", functools.partial(testing.OPS[case.op].function, **arguments), "plain")
    results = [t.detach() for t in expected.with_gradients(case, arguments)]
    peers = [provider for provider in providers_of(case, arguments) if provider.backend is None]
    compared = 0
    for peer in [peer for peer in peers if peer.name != "torch.compile"]:
        try:
            theirs = peer.with_gradients(case, arguments)
        except NotImplementedError:  # has no version for a CPU
            continue
        compared += 1
        assert case.rtol is None or agree_with([t.detach() for t in theirs], results, case.rtol) is None, peer.name
    assert compared or case.op == "adamw_ema_"
    assert case.forward[0] > 0 and (not case.gradients or case.backward[0] > 0)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    from bench.on_gpu import Rows
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    rows.measure("a", lambda: {"us": 1.0})
    with path.open("a") as file:
        file.write('{"began": "b"}\n')  # and then the process died
    rows = Rows(path)
    rows.measure("a", lambda: 1 / 0)
    rows.measure("b", lambda: 1 / 0)
    rows.measure("c", lambda: 1 / 0)
    found = {line["key"]: line for line in map(json.loads, path.read_text().splitlines()) if "key" in line}
    assert found["a"]["us"] == 1.0
    assert "died" in found["b"]["error"] and "ZeroDivisionError" in found["c"]["error"]


def test_floor_and_goals():
    ceilings = {"copy_bytes_per_s": 4e12, "bf16_flop_per_s": 8e14, "multiprocessors": 132}
    row = {"op": "gather_tokens", "case": "x", "what": "forward", "provider": "triton", "us": 12.5, "bytes": 4e7,
           "flops": 0.0, "exponentials": 0.0}
    row["floor_us"] = floor_us(row, ceilings)
    assert row["floor_us"] == 10.0
    assert floor_us(row | {"flops": 8e10}, ceilings) == 100.0
    met = {goal["op"]: goal for goal in goals([row])}
    assert met["gather_tokens"]["measured"] == 0.8 and met["gather_tokens"]["met"] is False
    assert met["sigreg_sums"]["measured"] is None
    memory = row | {"op": "sigreg_sums", "case": "tokens-1x65536x384-k1024", "what": "forward and backward", "peak_mb": 80.0}
    (goal,) = [goal for goal in goals([memory]) if goal["against"] == "100 MB"]
    assert goal["measured"] == 1.25 and goal["met"] is True


def test_sweep(tmp_path, monkeypatch):
    """Trials are compiled, timed and compared; what computes something else or fails cannot win."""
    pytest.importorskip("triton")
    from bench import gpu_stages, gpu_sweep

    case = gpu_cases._attention("tiny", [20, 7], 1, 16)
    monkeypatch.setattr(gpu_stages, "OURS", {"cpu": ("triton",)})
    monkeypatch.setattr(gpu_sweep, "swept_cases", lambda: [case])
    monkeypatch.setattr(gpu_sweep, "SPACES", {"backward": {"BLOCK_M": (16,)}, "short": {"BLOCK_M": (16, 32, 17)}})
    monkeypatch.setattr(gpu_sweep._tuned, "architecture", lambda: "sm_90")
    monkeypatch.setattr(gpu_sweep, "KEEP", 0.0)
    monkeypatch.setattr(gpu_sweep, "WORKERS", 1)
    arguments = argparse.Namespace(out=tmp_path, rehearse=True, op="0")
    gpu_sweep.compile_part(arguments)
    gpu_sweep.sweep(arguments)
    rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    swept = {row["tuned"]: row for row in rows if "tuned" in row}
    assert len(swept) == 2 and all(row["us"] <= row["default_us"] for row in swept.values())
    failures = [json.loads(line) for line in (tmp_path / "sweep-compile-0.jsonl").read_text().splitlines()]
    assert any("BLOCK_M=17" in line["key"] for line in failures if line.get("error"))
    winners = json.loads((tmp_path / "tuned.json").read_text())
    for constants in winners.get("varlen_attention", {}).get("sm_90", {}).values():
        assert constants["BLOCK_M"] in (16, 32)
