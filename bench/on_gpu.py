"""Everything that needs a GPU, in one command of less than ten minutes that works offline:

    python -m bench.on_gpu --out DIR            build, ceilings, prove, time, sweep, blocks, sanitize, page
    python -m bench.on_gpu --out DIR --stages step page [--official CHECKOUTS]   whole steps at official sizes, nine more
    python -m bench.on_gpu --out DIR --rehearse the same script on the CPU with little to do, to see that it runs

Each stage runs in processes of its own with a time limit, and every row is on disk before the next is measured: a crash
or a kill loses one row. Rows are JSON lines in DIR/<stage>*.jsonl; DIR/index.html and DIR/results.json gather them.
Needs torch >= 2.10 and nothing else: what is not installed (triton, nvcc, peers, matplotlib) is left out and said.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parent.parent
LIMIT_S = {"build": 110, "ceilings": 30, "prove": 130, "time": 110, "sweep": 80, "blocks": 60, "sanitize": 40}
STEP_LIMIT_S = 530  # of a call; the next one goes on with the recipes that are left
WORKERS = 14   # of the proofs: they share the GPU, and compiling is what takes their time
PART = 6       # cases that one of them proves


class Rows:
    """A file of JSON lines; what an earlier process wrote, or began and did not finish, is known."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.done = {line["key"] for line in lines if "key" in line}
        for key in dict.fromkeys(line["began"] for line in lines if "began" in line):
            if key not in self.done:
                self.add(key, error="the process died here, or ran out of time")

    def measure(self, key: str, call: Callable[[], dict]) -> None:
        """Add the row that `call` makes under `key`, or its error; nothing where the row is there."""
        if key in self.done:
            return
        self._write({"began": key})
        try:
            row = call()
        except Exception as error:  # what cannot be measured is a row too
            row = {"error": f"{type(error).__name__}: {error}"[:600]}
            if "CUDA error" in str(error):
                self.add(key, **row)
                sys.exit(3)  # nothing that this process would measure now can be trusted
        self.add(key, **row)

    def add(self, key: str, **row) -> None:
        self.done.add(key)
        self._write({"key": key, **row})

    def _write(self, line: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with little to do")
    parser.add_argument("--stages", nargs="*", default=[*LIMIT_S, "page"], choices=[*LIMIT_S, "step", "page"])
    parser.add_argument("--official", type=pathlib.Path, help="folder with checkouts named ijepa, jepa, vjepa2, lejepa")
    parser.add_argument("--op", default="", help="ops whose name contains this")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        from . import gpu_stages
        getattr(gpu_stages, arguments.worker)(arguments)
        return
    begin = time.monotonic()
    for stage in arguments.stages:
        start = time.monotonic()
        own = {"build": build, "prove": prove, "sweep": sweep, "sanitize": sanitize, "step": step}
        own.get(stage, one_worker(stage))(arguments)
        print(f"{stage}: {time.monotonic() - start:.0f} s, {time.monotonic() - begin:.0f} s in all", flush=True)


def build(arguments: argparse.Namespace) -> None:
    """The extension, for this GPU only; without a compiler the other stages go on without it."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = dict(os.environ)
    if not arguments.rehearse:
        query = "import torch; print(''.join(map(str, torch.cuda.get_device_capability())))"
        arch = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
        environment["JEPA_FAST_CUDA_ARCHS"] = arch + ("a" if arch in ("90", "100") else "")
    elif (ROOT / "jepa_fast/_C.so").exists():
        return
    run(command, LIMIT_S["build"], arguments.out / "build.log", environment)


def prove(arguments: argparse.Namespace) -> None:
    """Processes for parts of the cases of an op, several at a time: the first parts of all ops, then the second ones."""
    from jepa_fast import testing

    parts = [(first, spec.name) for spec in testing.OPS.values() if arguments.op in spec.name
             for first in range(0, len(spec.cases), PART)]
    waiting = [f"{name}-{first}" for first, name in sorted(parts)]
    side_by_side("prove", waiting[:2] if arguments.rehearse else waiting, arguments, LIMIT_S["prove"])


def side_by_side(stage: str, waiting: list[str], arguments: argparse.Namespace, limit_s: float) -> None:
    """A worker for each name, WORKERS of them at a time."""
    deadline, running = time.monotonic() + limit_s, {}
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < WORKERS:
            name = waiting.pop(0)
            running[name] = start(worker(stage, arguments, name), arguments.out / f"{stage}-{name}.log")
        for name in [name for name, process in running.items() if process.poll() is not None]:
            if running.pop(name).returncode == 3:  # the device was left in a bad state: go on behind that case
                waiting.append(name)
        time.sleep(0.2)
    for process in running.values():
        process.kill()


def sweep(arguments: argparse.Namespace) -> None:
    """Compile what is to be tried side by side, then time it alone."""
    if importlib.util.find_spec("triton") is None:
        Rows(arguments.out / "sweep.jsonl").add("sweep", error="triton is not installed")
        return
    parts = [str(part) for part in range(1 if arguments.rehearse else WORKERS)]
    side_by_side("compile_part", parts, arguments, LIMIT_S["sweep"] / 2)
    one_worker("sweep")(arguments)


def one_worker(stage: str) -> Callable[[argparse.Namespace], None]:
    def run_stage(arguments: argparse.Namespace) -> None:
        deadline = time.monotonic() + LIMIT_S.get(stage, 60)
        while time.monotonic() < deadline:
            code = run(worker(stage, arguments, arguments.op), deadline - time.monotonic(), arguments.out / f"{stage}.log")
            if code != 3:
                return
    return run_stage


def sanitize(arguments: argparse.Namespace) -> None:
    """NVIDIA's memory and race checkers over the small CUDA cases, where they are installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    rows = Rows(arguments.out / "sanitize.jsonl")
    if arguments.rehearse or not pathlib.Path(tool).exists():
        rows.add("sanitize", error="compute-sanitizer is not installed")
        return
    for check in ("memcheck", "racecheck"):
        log = arguments.out / f"sanitize-{check}.log"
        code = run([tool, "--tool", check, "--error-exitcode", "9", *worker("sanitized", arguments, "")],
                   LIMIT_S["sanitize"] / 2, log)
        said = {0: "no errors", 9: "errors: see its log", None: "ran out of time"}
        rows.add(check, result=said.get(code, f"status {code}"))


def step(arguments: argparse.Namespace) -> None:
    """The official code, tuned PyTorch and ours, whole steps."""
    from .step.on_gpu import steps

    steps(arguments, STEP_LIMIT_S)


def worker(stage: str, arguments: argparse.Namespace, op: str) -> list[str]:
    command = [sys.executable, "-m", "bench.on_gpu", "--out", str(arguments.out.resolve()), "--worker", stage, "--op", op]
    return command + ["--rehearse"] * arguments.rehearse


def start(command: list[str], log: pathlib.Path, environment: dict | None = None) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)


def run(command: list[str], limit_s: float, log: pathlib.Path, environment: dict | None = None) -> int | None:
    """The exit status; None where it ran out of time."""
    process = start(command, log, environment)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


if __name__ == "__main__":
    main()
