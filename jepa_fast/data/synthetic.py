"""Random images and clips that need no file: for benches and tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .clip_transform import ClipTransform, EvalClipTransform
from .loader import Prefetcher, load_batches
from .seeds import generator_for
from .transforms import IMAGENET_MEAN, IMAGENET_STD, AsIs, Transform


class SyntheticImages:
    """`num_images` images of uniform noise, uint8 [in_chans, image_size, image_size]; labels count 0, 1, ... in turn.

    Image i depends on (seed, i, in_chans, image_size) alone, on every machine.
    """

    def __init__(self, num_images: int = 1000, image_size: int = 224, in_chans: int = 3, num_classes: int = 10,
                 seed: int = 0):
        for name, value in (("num_images", num_images), ("image_size", image_size), ("in_chans", in_chans),
                            ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_images, self.image_size, self.in_chans, self.seed = num_images, image_size, in_chans, seed
        self.labels = torch.arange(num_images) % num_classes
        self.class_names = [str(label) for label in range(num_classes)]

    def __len__(self) -> int:
        return self.num_images

    def image(self, index: int) -> Tensor:
        shape = (self.in_chans, self.image_size, self.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator_for(self.seed, index))


@dataclass(frozen=True, kw_only=True)
class SyntheticData:
    """Noise images; see SyntheticImages."""

    num_images: int = 1000
    image_size: int = 224                                   # pixels
    in_chans: int = 3
    num_classes: int = 10
    seed: int = 0
    transform: Transform = AsIs(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    eval_transform: Transform = AsIs(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    num_workers: int = 0                                    # loader processes per rank

    def build(self) -> SyntheticImages:
        return SyntheticImages(self.num_images, self.image_size, self.in_chans, self.num_classes, self.seed)

    def batches(self, dataset, **run) -> Prefetcher:
        """Training batches; `run` as `load_batches` takes it."""
        return load_batches(dataset, self.transform, num_workers=self.num_workers, **run)


class SyntheticVideos:
    """`num_videos` clips of uniform noise, uint8 [in_chans, num_frames, image_size, image_size]; labels as above.

    Clip i depends on (seed, i) and its shape alone, on every machine: all draws of a video give the same clip.
    """

    def __init__(self, num_videos: int = 1000, num_frames: int = 16, image_size: int = 224, in_chans: int = 3,
                 num_classes: int = 10, seed: int = 0):
        for name, value in (("num_videos", num_videos), ("num_frames", num_frames), ("image_size", image_size),
                            ("in_chans", in_chans), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_videos, self.in_chans, self.seed = num_videos, in_chans, seed
        self.shape = (in_chans, num_frames, image_size, image_size)
        self.labels = torch.arange(num_videos) % num_classes
        self.class_names = [str(label) for label in range(num_classes)]

    def __len__(self) -> int:
        return self.num_videos

    def clip(self, index: int, generator: torch.Generator | None = None, *, num_clips: int = 1,
             allow_overlap: bool = False) -> Tensor:
        clip = torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=generator_for(self.seed, index))
        return clip.repeat(1, num_clips, 1, 1)


@dataclass(frozen=True, kw_only=True)
class SyntheticVideoData:
    """Noise clips; see SyntheticVideos. Transforms with the same image_size and resize_ratio = 1 leave them as they are."""

    num_videos: int = 1000
    num_frames: int = 16                                    # per clip
    image_size: int = 224                                   # pixels
    in_chans: int = 3
    num_classes: int = 10
    seed: int = 0
    transform: EvalClipTransform | ClipTransform = EvalClipTransform(resize_ratio=1.0)
    eval_transform: EvalClipTransform = EvalClipTransform(resize_ratio=1.0)
    num_workers: int = 0                                    # loader processes per rank

    def build(self) -> SyntheticVideos:
        return SyntheticVideos(self.num_videos, self.num_frames, self.image_size, self.in_chans, self.num_classes,
                               self.seed)

    def batches(self, dataset, **run) -> Prefetcher:
        """Training batches; `run` as `load_batches` takes it."""
        return load_batches(dataset, self.transform, num_workers=self.num_workers, **run)
