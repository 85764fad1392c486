"""Patched models of Hugging Face transformers, by value against the same models unpatched: version 5 here, 4.57 apart."""

import os
import pathlib
import subprocess
import sys

import hf_checks
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", hf_checks.ALL)
def test_patched(name):
    with hf_checks.for_any_size():
        hf_checks.ALL[name]()


def test_small_layers_run_as_they_were():
    model = hf_checks.build("ijepa")
    with hf_checks.hf_ijepa.apply(model), hf_checks.counted() as count:
        hf_checks.outputs(model, "ijepa")
    assert not count


def test_transformers_4(request):
    """The same checks; `make test` installs it beside the environment."""
    given = dict(pair.partition("=")[::2] for pair in request.config.getoption("--upstream"))
    folder = pathlib.Path(given.get("transformers4", pathlib.Path(sys.prefix) / "transformers4"))
    if not (folder / "transformers").is_dir():
        pytest.skip(f"needs transformers 4.57 in {folder}, where `make test` puts it, or --upstream transformers4=PATH")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "hf_checks.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("transformers 4.57"), done.stdout
