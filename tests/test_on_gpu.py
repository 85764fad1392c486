"""The command for a machine with a GPU, rehearsed on one without: every stage runs and leaves its rows."""

import json
import pathlib
import subprocess
import sys

from bench.gpu_page import floor_us, goals

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
