"""One provider in a process of its own:  python -m bench.step.worker PROVIDER FOLDER [--official PATH]

Commands come as JSON lines on standard input, answers go as JSON lines to standard output; what the provider prints goes
to standard error. Between commands the process waits in a read and holds no GPU memory that it does not need.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import work
from .profile import Profile, mark


class Stop(BaseException):
    """Ends a provider's loop; not an Exception, which some loops catch to try again."""


class Batches:
    """What a provider's training loop iterates over, and the stopwatch: asking for a batch ends the step before.

    A provider calls `record` with the loss of each step. Batches are made by `convert(inputs, masks)`: the inputs once
    for all steps, as data-loading processes would have them ready, in pinned memory where there is a GPU.
    """

    def __init__(self, task: work.Work, answers, convert: Callable = lambda inputs, masks: (inputs, masks)):
        self.work, self.answers, self.convert = task, answers, convert
        self.is_cuda = task.device.type == "cuda"
        self.masks = [_pinned(masks, self.is_cuda) for masks in task.masks()]
        self.inputs: list | None = None
        self.step = self.remaining = 0
        self.command: dict | None = None
        self.losses: list = []
        self.profile: Profile | None = None
        self.base_bytes: int | None = None

    def prepare(self, make: Callable[[dict[str, Tensor]], object]) -> None:
        """Make every batch's pixels into what the provider's data loader would hand over; called before models are built."""
        self.inputs = [_pinned(make(inputs), self.is_cuda) for inputs in self.work.inputs()]
        if self.base_bytes is None:
            self.base_bytes = resident_bytes()

    def regions(self, **functions: tuple[object, str] | list[tuple[object, str]]) -> None:
        """Name what belongs to a part of the model in profiles: (object, name of its method)."""
        for region, pairs in functions.items():
            for owner, name in pairs if isinstance(pairs, list) else [pairs]:
                setattr(owner, name, mark(region, getattr(owner, name)))

    def record(self, loss: Tensor | float) -> None:
        self.losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def __iter__(self) -> Iterator:
        return self

    def __len__(self) -> int:
        """Of an epoch, for schedules; there is no end."""
        return self.work.steps_per_epoch

    def __next__(self):
        if self.remaining == 0:
            self._answer()
            self._wait()
        self.remaining -= 1
        masks = self.masks[self.step]
        inputs = self.inputs[self.step % len(self.inputs)]
        self.step += 1
        return self.convert(inputs, masks)

    def _answer(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()
        if self.command is None:
            self._say({"ready": True})
            return
        row = {"seconds": time.perf_counter() - self.began, "steps": self.command["steps"],
               "losses": [float(loss) for loss in self.losses]}
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if self.is_cuda else peak_bytes() - self.base_bytes
        if self.profile is not None:
            row["profile"] = self.profile.stop(row["seconds"] / row["steps"])
            self.profile = None
        self._say(row)

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()
        line = sys.stdin.readline()
        self.command = json.loads(line) if line.strip() else {"do": "stop"}
        if self.command["do"] == "stop":
            raise Stop
        self.remaining, self.losses = self.command["steps"], []
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        else:
            reset_peak()
        if self.command["do"] == "profile":
            self.profile = Profile(self.is_cuda, count_flops=self.command.get("flops", False))
            self.profile.start()
        self.began = time.perf_counter()

    def _say(self, row: dict) -> None:
        self.answers.write(json.dumps(row) + "\n")
        self.answers.flush()


def _pinned(value, is_cuda: bool):
    if not is_cuda:
        return value
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {key: _pinned(item, is_cuda) for key, item in value.items()}
    return type(value)(_pinned(item, is_cuda) for item in value) if isinstance(value, (list, tuple)) else value


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    """Most memory that was resident since `reset_peak`; where the system cannot reset it, since the process began."""
    return _status("VmHWM")


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("provider")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--official", type=pathlib.Path)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a provider prints may be taken for an answer
    from .providers import loop_of

    try:
        task = work.load(arguments.folder)
        loop = loop_of(arguments.provider, task, arguments.official)
        with contextlib.suppress(Stop):
            loop(task, Batches(task, answers))
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}) + "\n")
        answers.flush()
        raise


if __name__ == "__main__":
    main()
