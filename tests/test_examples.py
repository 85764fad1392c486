"""Every script of examples/ runs, offline and on a CPU, and prints what its docstring promises."""

import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys

import checkouts
import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_official_ijepa(capsys, monkeypatch):
    """Around a stand-in for the checkout."""
    path = pathlib.Path(__file__).parent / "stand_ins/ijepa"
    with checkouts.checkout(path):
        out = run("official_ijepa.py", capsys, monkeypatch, str(path))
    before, after = (numbers(line) for line in out.splitlines() if line.startswith("losses"))
    assert len(before) == 3 and after == pytest.approx(before, rel=1e-4)
    assert "ijepa: replaced" in out and "Block.forward" in out


def test_hugging_face(capsys, monkeypatch):
    pytest.importorskip("transformers")
    out = run("hugging_face.py", capsys, monkeypatch)
    assert "hf_vjepa2" in out and float(re.search(r"at most (\S+)", out)[1]) < 1e-4


def test_lightly_lejepa(capsys, monkeypatch):
    pytest.importorskip("lightly")
    out = run("lightly_lejepa.py", capsys, monkeypatch)
    before, after = (numbers(line) for line in out.splitlines() if line.startswith(("original", "patched ")))
    assert len(before) == 3 and after == pytest.approx(before, rel=1e-4) and "SIGReg.forward" in out


def test_by_hand(capsys, monkeypatch):
    lines = run("by_hand.py", capsys, monkeypatch).splitlines()
    losses = [float(line.split()[3]) for line in lines]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_sigreg_ddp(capsys, monkeypatch):
    """Two processes as torchrun starts them, of which this is one, have the losses of one alone."""
    monkeypatch.delenv("RANK", raising=False)
    alone = run("sigreg_ddp.py", capsys, monkeypatch).splitlines()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    other = subprocess.Popen([sys.executable, str(EXAMPLES / "sigreg_ddp.py")], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"RANK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    try:
        together = run("sigreg_ddp.py", capsys, monkeypatch).splitlines()
        assert other.communicate(timeout=120)[0] == "" and other.returncode == 0
    finally:
        other.kill()
    assert len(alone) == len(together) == 5 and "(2 x 32 samples)" in together[0]
    for line, same in zip(alone, together, strict=True):
        assert numbers(line) == pytest.approx(numbers(same), abs=2e-5)
