"""The batches of a run, as a function of (seed, step): the same for any number of workers and ranks, from any step on.

    {"images": float32 [B, C, H, W], or a list with one such tensor per view where there are several,
     "labels": int64 [B] (-1: none),  "index": int64 [B] on the CPU: the image's place in the data set,
     "bad_files": messages for files first found unreadable in this batch,  "num_bad_files": so far}

A data set of videos (see video.py) has "clips" [B, C, T, H, W] in place of "images".

Each epoch is a permutation drawn from (seed, epoch), or what the data set's own `order` draws, cut into whole batches
of `global_batch_size`; the rest is dropped. Rank r gets the r-th of `world_size` equal slices of a batch. The views of
an image depend on (seed, epoch, place in the data set, view) alone, a clip on (seed, epoch, place) and how often the
place came before in this epoch; the views of a TensorAugment or a DeviceMultiCrop on (seed, step, row of the global batch).

The loader's processes live as long as the run. What they make, mostly uint8, is page-locked and copied one step ahead of
the trainer; crops on the device and normalisation follow there (see Prefetcher).

An unreadable file is replaced by the next readable one, in the order of the data set, so that batches keep their size.
Each rank judges the files that it has seen: see `BadFiles`.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .clip_transform import ClipTransform, EvalClipTransform, Region, pack, unpack
from .device_crops import DeviceMultiCrop, Whole, pack_whole
from .pixels import normalise, to_uint8
from .prefetch import Batch, Prefetcher
from .seeds import generator_for, mix_seed
from .tensor_augment import TensorAugment
from .transforms import Transform

ClipTransforms = ClipTransform | EvalClipTransform
AnyTransform = Transform | TensorAugment | DeviceMultiCrop | ClipTransforms


class BadFile(ValueError):
    """A file that cannot be read as what it should be; the message names it."""


def load_batches(dataset, transform: AnyTransform, *, global_batch_size: int, seed: int = 0,
                 start_step: int = 0, num_steps: int | None = None, rank: int = 0, world_size: int = 1,
                 num_workers: int = 0, prefetch_factor: int = 2, pin_memory: bool = True,
                 device: torch.device | str = "cpu", is_normalised: bool = True,
                 max_bad_fraction: float = 0.01) -> Prefetcher:
    """Training batches of one rank for the steps from `start_step` to `num_steps` (None: endless).

    is_normalised = False leaves out mean and std: uint8, or float32 in [0, 1] of views made on the device.
    Each of `num_workers` processes has `prefetch_factor` batches under way; pin_memory counts for a GPU only.
    Raises ValueError at once for arguments that do not fit together, and on the way for too many unreadable files.
    """
    num_epoch_steps = steps_per_epoch(dataset, global_batch_size)
    if world_size < 1 or global_batch_size % world_size:
        raise ValueError("global_batch_size must be a multiple of world_size, got "
                         f"{global_batch_size} and {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if start_step < 0:
        raise ValueError(f"start_step must be at least 0, got {start_step}")
    B = global_batch_size // world_size
    rows = _TrainingRows(dataset, seed, num_epoch_steps, global_batch_size, rank * B, B, start_step, num_steps)
    finish = _Finish(dataset, transform, seed, device, is_normalised, rank * B, global_batch_size)
    bad_files = BadFiles(len(dataset), max_bad_fraction, _noun(dataset))
    loader = _loader(dataset, transform, seed, rows, num_workers, prefetch_factor, pin_memory, device, max_bad_fraction)
    return Prefetcher(_judged(loader, bad_files, finish, start_step), device, finish=finish, start_step=start_step)


def load_in_order(dataset, transform: AnyTransform, *, batch_size: int, seed: int = 0,
                  num_workers: int = 0, device: torch.device | str = "cpu", is_normalised: bool = True,
                  max_bad_fraction: float = 0.01) -> Prefetcher:
    """Every image once, in the order of the data set, the last batch shorter: for probes and pictures."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = ([(0, index) for index in range(start, min(start + batch_size, len(dataset)))]
            for start in range(0, len(dataset), batch_size))
    finish = _Finish(dataset, transform, seed, device, is_normalised, 0, None)
    bad_files = BadFiles(len(dataset), max_bad_fraction, _noun(dataset))
    loader = _loader(dataset, transform, seed, rows, num_workers, 2, True, device, max_bad_fraction)
    return Prefetcher(_judged(loader, bad_files, finish, 0), device, finish=finish)


def steps_per_epoch(dataset, global_batch_size: int) -> int:
    """Whole batches in the data set; ValueError where there is not even one."""
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}")
    if len(dataset) < global_batch_size:
        raise ValueError(f"the data set must hold at least one global batch: {len(dataset)} {_noun(dataset)} < "
                         f"global_batch_size = {global_batch_size}")
    return len(dataset) // global_batch_size


class BadFiles:
    """Counts unreadable files and stops the run when they are too many.

    One is always allowed; beyond that, at most `max_fraction` of the distinct files seen. In the first 1,000 files (or
    all, if there are fewer) the fraction is taken of 1,000, so that chance early in a run does not decide.
    """

    def __init__(self, num_files: int, max_fraction: float, noun: str = "images"):
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_fraction}")
        self.max_fraction, self.noun, self.num_seen = max_fraction, noun, 0
        self.messages: dict[int, str] = {}
        self._is_seen = torch.zeros(num_files, dtype=torch.bool)

    def add(self, seen: Tensor, bad: list[tuple[int, str]]) -> list[str]:
        """Record one batch, warn of each new unreadable file; their messages."""
        new = {index: message for index, message in bad if index not in self.messages}
        self.messages |= new
        seen = torch.cat([seen, torch.tensor(list(new), dtype=torch.int64)]).unique()
        self.num_seen += int((~self._is_seen[seen]).sum())
        self._is_seen[seen] = True
        for message in new.values():
            warnings.warn(f"skipped an unreadable file: {message}", RuntimeWarning, stacklevel=4)
        reference = max(self.num_seen, min(len(self._is_seen), 1000))
        if len(self.messages) > max(1, self.max_fraction * reference):
            raise ValueError(self.summary())
        return list(new.values())

    def summary(self) -> str:
        first = "; ".join(list(self.messages.values())[:3])
        return (f"{len(self.messages)} of {self.num_seen} files seen are not readable {self.noun}, more than the "
                f"allowed {self.max_fraction:.3g} of them; the first: {first}")


class _TrainingRows:
    """For each step the (epoch, index) of one rank's rows; a batch sampler for DataLoader.

    Where an index comes again within an epoch: (epoch, index, how often it came before).
    """

    def __init__(self, dataset, seed: int, num_epoch_steps: int, global_batch_size: int, first: int, B: int,
                 start_step: int, num_steps: int | None):
        self.dataset, self.seed, self.num_epoch_steps = dataset, seed, num_epoch_steps
        self.global_batch_size, self.first, self.B = global_batch_size, first, B
        self.start_step, self.num_steps = start_step, num_steps

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        step, order_epoch, order, repeats = self.start_step, -1, None, None
        while self.num_steps is None or step < self.num_steps:
            epoch, row = divmod(step, self.num_epoch_steps)
            if epoch != order_epoch:
                order, order_epoch = self._order(generator_for(self.seed, epoch)), epoch
                repeats = _repeats(order) if getattr(self.dataset, "weights", ()) else torch.zeros_like(order)
            start = row * self.global_batch_size + self.first
            rows = slice(start, start + self.B)
            yield [(epoch, index, repeat) if repeat else (epoch, index)
                   for index, repeat in zip(order[rows].tolist(), repeats[rows].tolist(), strict=True)]
            step += 1

    def _order(self, generator: torch.Generator) -> Tensor:
        if hasattr(self.dataset, "order"):
            return self.dataset.order(generator)
        return torch.randperm(len(self.dataset), generator=generator)


def _repeats(order: Tensor) -> Tensor:
    """For each entry how many equal ones come before it."""
    values, by_value = order.sort(stable=True)
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = values[1:] != values[:-1]
    places = torch.arange(len(order))
    return torch.empty_like(order).scatter_(0, by_value, places - torch.where(is_first, places, 0).cummax(0).values)


def _noun(dataset) -> str:
    return "videos" if hasattr(dataset, "clip") else "images"


class _Samples:
    """(epoch, index) -> views of that image or video, or of the next readable one; what a worker process runs."""

    def __init__(self, dataset, transform: AnyTransform, seed: int, max_bad_fraction: float):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        # one search that meets more unreadable files than this has settled the matter
        self.max_bad = max(1, max_bad_fraction * len(dataset))

    def __getitem__(self, key: tuple[int, ...]) -> tuple[list[Tensor] | Region | Whole | None, int, int, list]:
        index, bad = key[1], []
        for place in range(index, index + len(self.dataset)):
            place %= len(self.dataset)
            try:
                views = self._views(place, key)
            except BadFile as error:
                bad.append((place, str(error)))
                if len(bad) > self.max_bad:
                    break
                continue
            return views, int(self.dataset.labels[place]), place, bad
        return None, -1, index, bad

    def _views(self, place: int, key: tuple[int, ...]) -> list[Tensor] | Region | Whole:
        if isinstance(self.transform, ClipTransforms):
            generator = generator_for(self.seed, *key)
            clip = self.dataset.clip(place, generator, num_clips=self.transform.num_clips,
                                     allow_overlap=self.transform.allow_overlap)
            return self.transform.cut(clip, generator)
        image = self.dataset.image(place)
        if isinstance(self.transform, TensorAugment):
            return [to_uint8(image)]
        if isinstance(self.transform, DeviceMultiCrop):
            return self.transform.cut(image)
        generator, views = torch.Generator(), []
        for view in range(self.transform.num_views):
            generator.manual_seed(mix_seed(self.seed, *key[:2], view))
            views.append(self.transform(image, generator, view))
        return views


def _collate(samples: list) -> Batch:
    """Samples -> {"views", "labels", "index", "bad"}; what is wrong travels as "error": workers add tracebacks."""
    views, labels, index, bad = zip(*samples, strict=True)
    batch = {"views": None, "labels": torch.tensor(labels), "index": torch.tensor(index), "bad": sum(bad, [])}
    if any(sample is None for sample in views):
        return batch
    if isinstance(views[0], Region):
        return batch | {"views": pack(views)}
    if isinstance(views[0], Whole):
        return batch | {"views": pack_whole(views)}
    sizes = sorted({tuple(sample[0].shape) for sample in views})
    if len(sizes) > 1:
        return batch | {"error": f"the images of a batch must have one size, got {sizes[0]} and {sizes[-1]}: choose a "
                                 "transform that crops"}
    return batch | {"views": [torch.stack(view) for view in zip(*views, strict=True)]}


def _loader(dataset, transform, seed: int, rows, num_workers: int, prefetch_factor: int, pin_memory: bool, device,
            max_bad_fraction: float) -> DataLoader:
    for name, value, least in (("num_workers", num_workers, 0), ("prefetch_factor", prefetch_factor, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    # one pass for the whole run, so workers outlive epochs; a generator, or DataLoader draws from the global one
    return DataLoader(_Samples(dataset, transform, seed, max_bad_fraction), batch_sampler=rows, collate_fn=_collate,
                      num_workers=num_workers, prefetch_factor=prefetch_factor if num_workers else None,
                      generator=torch.Generator(), pin_memory=pin_memory and torch.device(device).type == "cuda")


def _judged(loader: DataLoader, bad_files: BadFiles, finish: "_Finish", start_step: int) -> Iterator[Batch]:
    """Host batches; what a view on the device needs to know is drawn here."""
    # no variable holds the loader's iterator: kept alive by a traceback, each of its workers takes 5 s to end
    for step, batch in enumerate(loader, start_step):
        new = bad_files.add(batch["index"], batch.pop("bad"))
        if batch["views"] is None:
            raise ValueError(batch.get("error") or bad_files.summary())
        yield finish.drawn(batch, step) | {"bad_files": new, "num_bad_files": len(bad_files.messages)}


class _Finish:
    """What follows the workers and the copy to the device: augment whole batches, normalise.

    The rows are `first` and following of a global batch of `total` (None: of each batch itself).
    """

    def __init__(self, dataset, transform, seed: int, device, is_normalised: bool, first: int, total: int | None):
        self.transform, self.seed, self.device = transform, seed, torch.device(device)
        self.is_normalised, self.first, self.total = is_normalised, first, total
        if isinstance(transform, ClipTransforms) != hasattr(dataset, "clip"):
            raise ValueError(f"{_noun(dataset)} need a transform of their own, got {type(transform).__name__}")
        for name in ("mean", "std"):
            if is_normalised and len(getattr(transform, name)) != dataset.in_chans:
                raise ValueError(f"transform.{name} must have one number per channel, got {getattr(transform, name)} "
                                 f"for in_chans = {dataset.in_chans}")
        self.mean, self.std = (torch.tensor(values, device=self.device)[:, None, None]
                               for values in (transform.mean, transform.std))

    def drawn(self, batch: Batch, step: int) -> Batch:
        if not isinstance(self.transform, DeviceMultiCrop):
            return batch
        return batch | {"views": self.transform.draw(batch["views"], self.seed, step, self.first)}

    def __call__(self, batch: Batch, step: int) -> Batch:
        is_video = isinstance(self.transform, ClipTransforms)
        views = self._clips(batch["views"]) if is_video else self._images(batch["views"], step, len(batch["index"]))
        return {"clips" if is_video else "images": views[0] if len(views) == 1 else views, "index": batch["index"],
                "labels": batch["labels"].to(self.device, non_blocking=True),
                "bad_files": batch["bad_files"], "num_bad_files": batch["num_bad_files"]}

    def _images(self, views: list[Tensor] | dict, step: int, B: int) -> list[Tensor]:
        if isinstance(self.transform, DeviceMultiCrop):
            statistics = (self.mean.flatten(), self.std.flatten()) if self.is_normalised else (None, None)
            return self.transform.views(views, *statistics)
        views = [view.to(self.device, non_blocking=True) for view in views]
        if isinstance(self.transform, TensorAugment):
            views = self.transform(views[0], self.seed, step, self.first, self.total or B)
        return [normalise(view, self.mean, self.std) for view in views] if self.is_normalised else views

    def _clips(self, packed: dict) -> list[Tensor]:
        # in units of the pixel levels, as the official code does
        mean, std = (255 * values[..., None] for values in (self.mean, self.std))
        views = unpack(packed, self.transform, self.device)
        return [view.sub_(mean).div_(std) if self.is_normalised else view.div_(255) for view in views]
