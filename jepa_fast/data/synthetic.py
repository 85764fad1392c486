"""Random images that need no file: for benches and tests."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .loader import Batch, load_batches
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

    def batches(self, dataset, **run) -> Iterator[Batch]:
        """Training batches; `run` as `load_batches` takes it."""
        return load_batches(dataset, self.transform, num_workers=self.num_workers, **run)
