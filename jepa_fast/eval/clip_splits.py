"""Labelled clips to fit probes on and others to judge them, as batches that are read once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from ..data import MixedData, MovingDigitsData, SyntheticVideoData, VideoData, load_in_order

BATCH_SIZE = 32


@dataclass(frozen=True)
class Split:
    """Batches (normalised clips [B, C, T, H, W], {question: labels [B]}), and what the classes of each are called."""

    batches: Iterator[tuple[Tensor, dict[str, Tensor]]]
    class_names: dict[str, list[str]]
    mean: Tensor                             # [C, 1, 1, 1] of clips in [0, 1]
    std: Tensor


def is_video(data) -> bool:
    return isinstance(data, (MixedData, MovingDigitsData, SyntheticVideoData, VideoData))


def mean_and_std(data, device: torch.device) -> tuple[Tensor, Tensor]:
    """[C, 1, 1, 1] each, of a data config's clips."""
    of = data if isinstance(data, MovingDigitsData) else data.eval_transform
    return tuple(torch.tensor(value, device=device)[:, None, None, None] for value in (of.mean, of.std))


def splits(data, max_train: int, max_test: int, image_size: int, device: torch.device) -> tuple[Split, Split]:
    """To fit and to judge: of a data set without a test part every fifth labelled video is held out.

    Videos are seen as one clip, one square of image_size pixels; several of them, over which the official evaluation
    averages, are left out.
    """
    if isinstance(data, MovingDigitsData):
        return _digits(data, "train", max_train, device), _digits(data, "test", max_test, device)
    dataset = data.build()
    labelled = torch.nonzero(dataset.labels >= 0).flatten()
    if len(labelled) < 10 or len(dataset.labels[labelled].unique()) < 2:
        raise ValueError("probes need labels: put the videos of each class into a sub-folder of data.root, or list them")
    order = labelled[torch.randperm(len(labelled), generator=Generator().manual_seed(0))]
    is_test = torch.arange(len(order)) % 5 == 0
    return (_videos(dataset, order[~is_test][:max_train], data, image_size, device),
            _videos(dataset, order[is_test][:max_test], data, image_size, device))


def _digits(data: MovingDigitsData, split: str, num_clips: int, device: torch.device) -> Split:
    dataset = data.build_probe(split, num_clips)

    def batches():
        for part in torch.arange(len(dataset)).split(BATCH_SIZE):
            yield data.normalise(dataset.clips(part).to(device)), {question: labels[part] for question, (labels, _)
                                                                   in dataset.targets.items()}

    return Split(batches(), {question: names for question, (_, names) in dataset.targets.items()},
                 *mean_and_std(data, device))


def _videos(dataset, indices: Tensor, data, image_size: int, device: torch.device) -> Split:
    transform = replace(data.eval_transform, num_clips=1, num_crops=1, image_size=image_size)
    loader = load_in_order(_Subset(dataset, indices), transform, batch_size=BATCH_SIZE, num_workers=data.num_workers,
                           device=device)
    return Split(((batch["clips"], {"class": batch["labels"]}) for batch in loader), {"class": dataset.class_names},
                 *mean_and_std(data, device))


class _Subset:
    """Some videos of a data set, as a data set."""

    def __init__(self, dataset, indices: Tensor):
        self.dataset, self.indices = dataset, indices.tolist()
        self.labels, self.class_names, self.in_chans = dataset.labels[indices], dataset.class_names, dataset.in_chans

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, index: int, generator: Generator | None = None, **how) -> Tensor:
        return self.dataset.clip(self.indices[index], generator, **how)
