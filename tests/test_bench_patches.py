"""The bench of patches: before is the original, after is patched, who computes something else is not timed."""

import contextlib
import json

import plain_lewm
import pytest
import torch
from torch import nn

from bench import report
from bench.patches import command
from bench.patches.sigregs import OfEmbeddings
from bench.patches.task import Case, Switch, Task, inference, measure, training
from jepa_fast.patches import Report, lewm


@contextlib.contextmanager
def sigreg():
    torch.manual_seed(0)
    model = OfEmbeddings(plain_lewm.SIGReg(num_proj=16), torch.randn(2, 200, 4))
    yield Task(model, training(lambda model: model()), lewm.apply,
               (("AdamWEMA", lewm.apply,
                 training(lambda model: model(), optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1))),))


CASE = Case("lewm", "SIGReg 2 x 200 x 4", "forward + backward", sigreg, goal=1e9)


def test_a_case_in_both_manners():
    rows = measure(CASE, "fp32", None, repeats=1)
    assert [row["provider"] for row in rows] == ["before", "after", "after, AdamWEMA"]
    assert rows[0]["ratio"] == 1 and rows[0]["peak_mb"] > rows[1]["peak_mb"] > 0
    assert rows[1]["ratio"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    assert rows[1]["goal"] == 1e9 and "goal" not in rows[2]
    assert rows[0]["case"] == "SIGReg 2 x 200 x 4, forward + backward, fp32"


class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x


def doubling(factor):
    """A patch after which it multiplies by another factor."""
    calls = []

    def fast(original, self, x):
        calls.append("patched")
        return factor * x

    def apply(model):
        with Report.of("test") as report:
            report.replace_method(Doubles, "forward", fast)
        return report

    @contextlib.contextmanager
    def make():
        yield Task(nn.Sequential(Doubles()), inference(lambda model: model(torch.ones(3))), apply)

    return Case("test", "doubles", "inference", make), calls


def test_the_original_runs_without_the_patch():
    case, calls = doubling(2)
    original = Doubles.forward
    measure(case, "fp32", None, repeats=1)
    assert calls and Doubles.forward is original
    with case.make() as task:
        switch = Switch(task.apply(task.model))
        assert Doubles.forward is original
        with switch.on():
            assert Doubles.forward is not original


def test_who_computes_something_else_is_not_timed(monkeypatch):
    case, _ = doubling(2.1)
    monkeypatch.setitem(command.FAMILIES, "timm", type("family", (), {"cases": staticmethod(lambda: [case])}))
    with pytest.raises(SystemExit, match="not timed: test: doubles, inference, fp32: after and before disagree"):
        command.main(["timm", "--precision", "fp32"])
    with pytest.raises(SystemExit, match="bf16: after is further from float32 than before on result 0: 5.00e-02"):
        command.main(["timm", "--precision", "bf16"])


def test_what_cannot_run_is_left_out_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(command.FAMILIES, "lewm", type("family", (), {"cases": staticmethod(lambda: [CASE])}))
    out = tmp_path / "rows.json"
    command.main(["lewm", "--repeats", "1", "--precision", "fp32", "--out", str(out)])
    command.main(["ijepa", "--only", "inference", "--out", str(out), "--add"])
    data = json.loads(out.read_text())
    assert len(data["rows"]) == 3 and list(data["left_out"]) == ["ijepa: ViT-S/16 224, batch 16, inference"]
    assert "left out: ijepa: ViT-S/16 224, batch 16, inference (--official must have ijepa)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no case of lewm contains 'nothing'"):
        command.main(["lewm", "--only", "nothing"])


def test_the_table_names_what_is_missed_and_what_is_slower(monkeypatch, tmp_path):
    def row(provider, ms, **more):
        return {"bench": "timm", "case": "ViT, fp32", "provider": provider, "ms": ms, "p20_ms": ms, "p80_ms": ms,
                "ratio": 200 / ms, "peak_mb": 3.0} | more

    results = tmp_path / "bench/results"
    results.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert "Not measured yet" in report.patches_table()
    where = {"device": "a CPU", "torch": "2", "python": "3", "commit": "abc", "timm": "1.0"}
    (results / "patches-cpu.json").write_text(json.dumps({"provenance": where, "rows": [
        row("before", 200.0), row("after", 250.0, goal=1.5), row("after, AdamWEMA", 100.0)]}))
    table = report.patches_table()
    assert "patched: timm 1.0" in table
    assert ("| timm | ViT, fp32 | 200 (200 – 200) | 250 (250 – 250) | 0.80 (slower) | 1.5 (missed) | 3 | 3 "
            "| AdamWEMA 2.00 (3 MB) |") in table
