"""The rounds: providers as processes, losses compared first, steps timed in turn, one step of each taken apart."""

import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from jepa_fast.objectives.flops import step_work
from jepa_fast.train.peaks import device_peak

from .work import Work

ROOT = pathlib.Path(__file__).parents[2]
CHECKED_STEPS = 3
# largest relative difference of a loss from the first provider's, over the checked steps
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
FP8_TOLERANCE = 5e-2
SIGREG_TOLERANCE = 5e-2  # of LeJEPA, whose random directions no two codes share


OPTIONAL = ("tuned, compiled", "ours+fp8")  # a row is lost where they do not run


class Failed(RuntimeError):
    """A provider's process ended or refused."""


class Provider:
    """A worker process and its pipe."""

    def __init__(self, name: str, work: Work, official: pathlib.Path | None):
        self.name, self.log = name, work.folder / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        command = [sys.executable, "-m", "bench.step.worker", name, str(work.folder)]
        command += ["--official", str(official)] * (name == "official")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            text=True)
        self.answer()

    def ask(self, what: str, steps: int, **options) -> dict:
        self.process.stdin.write(json.dumps({"do": what, "steps": steps, **options}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process died; {self._last_words()}"}
        if "error" in answer:
            self.stop()
            raise Failed(f"{self.name}: {answer['error']} (log: {self.log})")
        return answer

    def stop(self) -> None:
        """Ask it to end, and make it."""
        try:
            self.process.communicate('{"do": "stop"}\n', timeout=20)
        except (subprocess.TimeoutExpired, ValueError, BrokenPipeError):
            self.process.kill()
            self.process.wait()

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


@dataclass(frozen=True, kw_only=True)
class Plan:
    providers: tuple[str, ...]
    official: pathlib.Path | None = None
    rounds: int = 5
    steps: int = 1               # of each provider in a round
    warmup: int = 2              # steps after the checked ones, before the first round
    one_at_a_time: bool = False  # where not all fit on the device: no interleaving

    @property
    def num_steps(self) -> int:
        """Of one provider."""
        return CHECKED_STEPS + self.warmup + self.rounds * self.steps + 2


def measure(work: Work, plan: Plan) -> tuple[list[dict], dict[str, str]]:
    """A row for each provider, and why others are left out: those that are ours to choose, compiled and float8, may fail.

    Raises Failed, or ValueError where losses differ: what computes something else is not timed.
    """
    results: dict[str, dict] = {}
    left_out: dict[str, str] = {}
    groups = [(name,) for name in plan.providers] if plan.one_at_a_time else [plan.providers]
    for names in groups:
        workers: list[Provider] = []
        try:
            for name in names:
                try:
                    workers.append(Provider(name, work, plan.official))
                    losses = workers[-1].ask("run", CHECKED_STEPS)["losses"]
                except Failed as error:
                    if name not in OPTIONAL:
                        raise
                    left_out[name] = str(error)
                    workers = [worker for worker in workers if worker.name != name]
                    continue
                results[name] = {"losses": losses, "seconds": [], "peaks": []}
            check_losses({name: result["losses"] for name, result in results.items()}, work)
            for worker in workers:
                if plan.warmup:
                    worker.ask("run", plan.warmup)
            for _ in range(plan.rounds):
                for worker in workers:
                    answer = worker.ask("run", plan.steps)
                    results[worker.name]["seconds"].append(answer["seconds"] / plan.steps)
                    results[worker.name]["peaks"].append(answer["peak_bytes"])
                    results[worker.name]["last_loss"] = answer["losses"][-1]
            for worker in workers:
                results[worker.name] |= worker.ask("profile", 1)["profile"]
                if worker.name in ("official", "official style", "tuned"):
                    results[worker.name]["flops"] = worker.ask("profile", 1, flops=True)["profile"]["flops"]
        finally:
            for worker in workers:
                worker.stop()
    return [row(name, result, work) for name, result in results.items()], left_out


def check_losses(losses: dict[str, list[float]], work: Work) -> None:
    """ValueError unless all agree with the first, each within its tolerance."""
    names = list(losses)
    for name in names[1:]:
        for step, (theirs, ours) in enumerate(zip(losses[names[0]], losses[name], strict=True)):
            difference, allowed = abs(ours - theirs) / max(abs(theirs), 1e-12), tolerance(name, work)
            if not difference <= allowed:
                raise ValueError(f"{name} and {names[0]} do not do the same: loss {ours:.6f} and {theirs:.6f} in step "
                                 f"{step}, a difference of {difference:.1e}, allowed {allowed:.0e}; not timed")


def tolerance(name: str, work: Work) -> float:
    if work.family == "lejepa":
        return SIGREG_TOLERANCE
    return FP8_TOLERANCE if name == "ours+fp8" else TOLERANCE[work.recipe.train.precision]


def row(name: str, result: dict, work: Work) -> dict:
    seconds = sorted(result["seconds"])
    median = statistics.median(seconds)
    kept = ("components", "step_ms", "launches", "stops", "host_ms", "idle_ms", "flops", "last_loss")
    return {"provider": name, "ms": median * 1e3, "p20_ms": _percentile(seconds, 0.2) * 1e3,
            "p80_ms": _percentile(seconds, 0.8) * 1e3, "samples_per_s": work.recipe.train.batch_size / median,
            "peak_bytes": max(result["peaks"]), "first_losses": result["losses"]} \
        | {key: result[key] for key in kept if key in result}


def _percentile(values: list[float], fraction: float) -> float:
    return values[round(fraction * (len(values) - 1))]


def measure_ceilings(device: torch.device, precision: str) -> dict[str, float]:
    """What this device does at best: bytes per second of a large copy (read and written), FLOP/s of large products."""
    is_cuda, dtype = device.type == "cuda", torch.bfloat16 if precision == "bf16" else torch.float32
    size, elements = (8192, 1 << 28) if is_cuda else (2048, 1 << 25)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)

    def best(call) -> float:
        times = []
        for _ in range(7):
            if is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return {"flop_per_s": 2 * size**3 / best(lambda: torch.mm(a, b)),
            "copy_bytes_per_s": 2 * 4 * elements / best(lambda: target.copy_(source))}


def peak_of(device: torch.device, precision: str, ceilings: dict[str, float]) -> tuple[float, str]:
    """FLOP/s that utilisation is of: the data sheet's, or this run's large product where there is none."""
    peak = device_peak(device, precision)
    return (peak, f"{peak / 1e12:.0f} TFLOP/s") if peak else (ceilings["flop_per_s"], "that product")


def flops(work: Work, steps: Iterable[int]) -> tuple[float, float]:
    """What the algorithm asks for in one step, and what our engine executes: means over the masks of these."""
    recipe, counts = work.recipe, []
    inputs = {name: value.to("meta") if name in ("images", "clips") else value for name, value in work.inputs()[0].items()}
    if work.family == "lejepa":
        inputs["images"] = list(inputs["images"].unbind(1))
    masking = getattr(recipe.objective, "masking", None)
    for step in steps:
        batch = dict(inputs)
        if masking:
            batch["masks"] = masking.sample(recipe.objective.encoder.grid, recipe.train.batch_size, seed=recipe.train.seed,
                                            step=step, first_sample=0).pack()
        counted = step_work(recipe.objective, batch, recompute=recipe.train.activations == "checkpoint")
        counts.append((counted.model_flops, counted.hardware_flops))
    return tuple(statistics.mean(values) for values in zip(*counts, strict=True))


def commit_of(checkout: pathlib.Path | None) -> str | None:
    """The commit of the official code, with a plus where its files were changed."""
    if checkout is None:
        return None
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"
