"""Saving while training goes on: steps wait for a copy to the CPU, a thread writes it."""

import os
import pathlib
import shutil
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import nn

from . import checkpoint, sharded
from .distributed import World


class Saver:
    """Writes checkpoints of a run to FOLDER/last.pt: a file from one process, from several a link to their folder.

    The link and the file are replaced atomically when the new checkpoint is complete, and the old one is removed then:
    a kill at any moment leaves a whole one. An error in the thread is raised by the next `save` or `wait`.
    """

    def __init__(self, folder: pathlib.Path, world: World):
        self.path, self.world = folder / "last.pt", world
        self._pending: Future | None = None
        self._published: Future | None = None
        self._step: int | None = None
        self._stager = None
        # a group of its own, since its thread speaks while others do
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, recipe: str, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state of this step and write it in the background, once the one before is written. All ranks call."""
        if step == self._step:
            return
        self.wait()
        self._step = step
        if self.world.size == 1:
            state = {"step": step, "recipe": recipe, "objective": objective.state_dict(),
                     "optimizer": optimizer.state_dict()}
            self._pending = self._thread.submit(checkpoint.save, self.path, self._copier().stage(state))
            return
        tensors, groups = sharded.flat(objective, optimizer)
        folder = self.path.with_name(f"step_{step:08d}")
        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote there
        self._pending = sharded.start_writing(folder, tensors, {"step": step, "recipe": recipe, "param_groups": groups},
                                              self._group, self._copier())
        if self.world.is_main:
            self._published = self._thread.submit(self._publish, self._pending, folder)

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk, or raise CheckpointError."""
        pending, published = self._pending, self._published
        self._pending = self._published = None
        try:
            for future in (pending, published):
                if future is not None:
                    future.result()
        except (checkpoint.CheckpointError, KeyboardInterrupt):
            raise
        # torch.distributed.checkpoint raises a BaseException
        except BaseException as error:
            kept = f"; the previous checkpoint {self.path} is unchanged" if self.path.exists() else ""
            reason = " ".join(str(cause_of(error)).split())
            raise checkpoint.CheckpointError(f"cannot save step {self._step}: {reason}{kept}") from error

    def _publish(self, written: Future, folder: pathlib.Path) -> None:
        """Name the folder as the last checkpoint when it is whole; remove the others."""
        written.result()
        checkpoint.flush_folder(folder)
        link = self.path.with_name(f".{self.path.name}.tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, self.path)
        checkpoint.flush_folder(self.path.parent)
        checkpoint.remove_folders(self.path.parent, but=folder.name)

    def _copier(self):
        """Copies to the CPU, to pinned memory from a GPU, which is kept for the next time."""
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            on_gpu = self.world.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(use_pinned_memory=on_gpu, use_shared_memory=False,
                                                        use_async_staging=False, use_non_blocking_copy=on_gpu))
        return self._stager


def cause_of(error: BaseException) -> BaseException:
    """The first error of the first rank that had one, out of what torch.distributed.checkpoint wraps around it."""
    failures = getattr(error, "failures", None)
    return cause_of(next(iter(failures.values()))[0]) if failures else error
