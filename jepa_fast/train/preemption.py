"""A scheduler's signal: finish the step, save, and leave with an exit code that says to start again."""

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from .distributed import World

EXIT_CODE = 75            # EX_TEMPFAIL of sysexits.h: not an error, try again
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # of a scheduler that stops the job; SLURM's --signal; submitit's
SAME_S = 5.0              # a scheduler may signal a launcher and its children, and the launcher its children again


class Preempted(RuntimeError):
    """The run has saved and stopped because a signal asked for it; the message says how to go on."""

    exit_code = EXIT_CODE


class Preemption:
    """Turns the first signal into `requested()`; another one, SAME_S later or more, ends the process at once.

    As a context manager it installs its handlers and puts the old ones back. All ranks answer alike in the same step,
    though one may get the signal earlier than others: what each has seen is added up by gloo while a step is taken and
    read after it, so that nothing waits for the device, and nearly never for other ranks.
    """

    def __init__(self, world: World):
        self.world = world
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pid = os.getpid()
        self._first: float | None = None
        self._sum: tuple[torch.Tensor, dist.Work] | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for name in SIGNALS:
                number = getattr(signal, name)
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def requested(self) -> bool:
        """Whether to save and stop now; called once after every step by every rank."""
        seen = self._first is not None
        if self._group is None:
            return seen
        before, flag = self._sum, torch.tensor([int(seen)])
        self._sum = flag, dist.all_reduce(flag, group=self._group, async_op=True)
        if before is None:
            return False
        total, work = before
        work.wait()
        return bool(total)

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if os.getpid() != self._pid:  # a loader's process, forked from this one
            os._exit(128 + number)
        if self._first is None:
            self._first = now
            if self.world.is_main:
                print(f"\njepa-fast: {signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
        elif now - self._first >= SAME_S:
            os._exit(128 + number)
