"""Imports point one way, and importing does nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jepa_fast"

# room -> rooms it may import; a room may always import itself
MAY_IMPORT = {
    "reference": set(),
    "kernels": set(),
    "ops": {"reference", "kernels"},
    "optim": {"ops"},
    "masking": set(),
    "data": {"ops"},
    "planning": {"reference", "ops", "nn", "models", "objectives", "data"},
    "nn": {"ops"},
    "tokenizers": {"nn", "ops"},
    "models": {"tokenizers", "nn", "ops", "masking"},
    "objectives": {"models", "tokenizers", "nn", "optim", "ops", "masking"},
    "recipes": {"objectives", "models", "nn", "optim", "masking", "data"},
    "eval": {"recipes", "objectives", "models", "masking", "data", "info", "train", "planning"},
    "checkpoints": {"recipes", "models", "nn", "train"},
    "drop_in": {"ops", "nn", "masking"},
    "patches": {"ops", "nn", "optim", "masking", "drop_in"},
    "train": {"recipes", "objectives", "models", "nn", "optim", "data", "eval"},
    "info": {"ops"},
    "cli": {"train", "recipes", "eval", "ops", "info", "checkpoints"},
    "testing": {"ops", "reference", "optim", "masking"},
    "__init__": set(),
}


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: pathlib.Path) -> set[str]:
    """Rooms of jepa_fast that a file imports, anywhere in it."""
    package = ("jepa_fast", *path.relative_to(PACKAGE).parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "jepa_fast" and len(parts) > 1:
                rooms.add(parts[1])
            assert parts[0] not in ("bench", "tests") or room_of(path) == "cli", f"{path} imports {name}"
    return rooms


SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    if room == "__main__":
        return
    assert room in MAY_IMPORT, f"new room {room}: say in this table what it may import"
    known_rooms = {room_of(source) for source in SOURCES}
    forbidden = (imported_rooms(path) & known_rooms) - MAY_IMPORT[room] - {room}
    assert not forbidden, f"{path.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"


PLAIN = ("collections", "dataclasses", "functools", "math", "typing")
SHARED_BY_REFERENCES = {"quadrature"}  # what several ops mean the same by


def test_reference_imports_torch_only():
    for path in (PACKAGE / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in ("torch", *PLAIN), path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch", *PLAIN}, path


def test_an_op_has_one_file_name_in_every_room():
    ops = {path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")}
    for room, pattern in (("reference", "*.py"), ("testing", "*.py")):
        files = {path.stem for path in (PACKAGE / room).glob(pattern) if not path.stem.startswith("_")}
        assert files - SHARED_BY_REFERENCES == ops, f"{room}: {files ^ ops}"
    # a long op may be split: sigreg.cpp, sigreg_statistic.cpp
    for path in [*(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/cuda").glob("*.cu")]:
        assert any(path.stem == op or path.stem.startswith(f"{op}_") for op in ops), path


def test_importing_touches_nothing():
    """No CUDA start-up, no random numbers, no output, no triton, no thread-count change."""
    code = ("import torch; state = torch.get_rng_state(); threads = torch.get_num_threads();"
            "import jepa_fast, jepa_fast.cli, jepa_fast.ops, jepa_fast.recipes, jepa_fast.train.loop, sys;"
            "[getattr(jepa_fast.patches, name) for name in jepa_fast.patches._names()];"
            "assert not {'transformers', 'timm', 'lightly'} & sys.modules.keys();"
            "jepa_fast.recipes.all_recipes();"
            "assert torch.equal(state, torch.get_rng_state()); assert threads == torch.get_num_threads();"
            "assert not torch.cuda.is_initialized(); assert 'matplotlib' not in sys.modules;"
            "assert 'mlxtend' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
