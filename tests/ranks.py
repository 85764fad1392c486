"""Real processes for tests: a function run by several gloo ranks, forked from one server that has imported everything."""

import multiprocessing
import os
import pathlib
import socket
from collections.abc import Callable

CONTEXT = multiprocessing.get_context("forkserver")
STARTED: list = []
CONTEXT.set_forkserver_preload(["ranks", "jepa_fast.cli", "jepa_fast.train.loop", "torch._dynamo", "torch.distributed.fsdp",
                                "torch.distributed.checkpoint.staging"])


def start(function: Callable, num_ranks: int, *arguments, folder: pathlib.Path) -> list:
    """Processes that run function(*arguments) as torchrun would start them; rank r writes to FOLDER/r.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=_run, args=(function, arguments, rank, num_ranks, port, folder))
                 for rank in range(num_ranks)]
    for process in processes:
        process.start()
    STARTED.extend(processes)
    return processes


def kill_all() -> None:
    """What tests that failed have left."""
    for process in STARTED:
        process.kill()
    STARTED.clear()


def run(function: Callable, num_ranks: int, *arguments, folder: pathlib.Path, timeout_s: float = 120) -> list[str]:
    """Wait for `start`; AssertionError with what a rank wrote where one fails. What each rank wrote."""
    processes = start(function, num_ranks, *arguments, folder=folder)
    for process in processes:
        process.join(timeout_s)
    written = output(folder, num_ranks)
    for rank, process in enumerate(processes):
        if process.exitcode != 0:
            process.kill()
            raise AssertionError(f"rank {rank} ended with {process.exitcode}:\n{written[rank][-3000:]}")
    return written


def output(folder: pathlib.Path, num_ranks: int) -> list[str]:
    return [(folder / f"{rank}.txt").read_text() if (folder / f"{rank}.txt").exists() else "" for rank in range(num_ranks)]


def _run(function: Callable, arguments: tuple, rank: int, num_ranks: int, port: int, folder: pathlib.Path) -> None:
    file = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    raise SystemExit(function(*arguments) or 0)
