"""The authors' own `main`, run for a few steps on random data with everything that a test need not have taken out."""

import contextlib
import csv
import pathlib
import types

import numpy as np
import torch
from torch.utils.data import DataLoader

STUBS = ("decord",)  # imported by their data sets


class Sampler:
    def set_epoch(self, epoch: int) -> None:
        pass


def losses(train: types.ModuleType, settings: dict, make_loader: str, samples: list, folder: pathlib.Path,
           monkeypatch) -> list[float]:
    """What their main(settings) logs as loss, step by step; `make_loader` names what it makes its loader with."""
    def loader(*, collator, batch_size, **_):
        batches = DataLoader(samples, batch_size, collate_fn=collator)
        return (None, batches, Sampler()) if make_loader == "make_imagenet1k" else (batches, Sampler())

    with monkeypatch.context() as patch, contextlib.suppress(FileExistsError):
        folder.mkdir()
        settings["logging"] |= {"folder": str(folder), "write_tag": "run"}
        patch.setattr(train, make_loader, loader)
        patch.setattr(train, "DistributedDataParallel", lambda model, **_: model)
        patch.setattr(train, "init_distributed", lambda: (1, 0))
        patch.setattr(train.mp, "set_start_method", lambda method: None)
        patch.setattr(torch, "save", lambda *_: None)
        np.random.seed(0)
        torch.manual_seed(0)
        train.main(settings)
    rows = list(csv.reader((folder / "run_r0.csv").open()))
    return [float(row[rows[0].index("loss")]) for row in rows[1:]]
