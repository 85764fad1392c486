"""Images of a Hugging Face data set: Arrow files, read at random places, in the order that our own sampler draws.

Needs `pip install "jepa_fast[hf]"`. Only data sets with a length and an index: a stream has neither, and its shuffle buffer
is no function of (seed, step).
"""

import importlib.util
import os
from dataclasses import dataclass

import torch
from PIL import Image

from .images import ImageData, check_in_chans, decode
from .loader import BadFile


class HfImages:
    """The images of a `datasets.Dataset`, as `ImageFolder` gives those of a folder.

    The column holds images (`datasets.Image`) or the bytes of image files; the label column integers (None: -1), or is ""
    for a data set without labels. Raises ValueError for columns that are not there or hold something else.
    """

    def __init__(self, dataset, image_column: str = "image", label_column: str = "", in_chans: int = 3):
        import datasets

        check_in_chans(in_chans)
        if not isinstance(dataset, datasets.Dataset):
            hint = "; streams have no random access" if isinstance(dataset, datasets.IterableDataset) else ""
            raise ValueError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}{hint}")
        features = dataset.features
        for name in filter(None, (image_column, label_column)):
            if name not in features:
                raise ValueError(f"the data set must have a column {name!r}, got {', '.join(features)}")
        feature = features[image_column]
        if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
            raise ValueError(f"column {image_column!r} must hold images or bytes, got {feature}")
        self.in_chans, self.image_column = in_chans, image_column
        self.labels, self.class_names = _labels(dataset, label_column)
        images = dataset.select_columns([image_column])
        # decoded here, so that a damaged image has a name and modes are ours
        self._images = images.cast_column(image_column, datasets.Image(decode=False)) \
            if isinstance(feature, datasets.Image) else images

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        """Raises BadFile for an entry that is no image."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        value, name = self._images[index][self.image_column], f"row {index}"
        content = value["bytes"] if isinstance(value, dict) else value
        if isinstance(value, dict):
            name = f"{name} ({value['path']})" if value["path"] else name
            if content is None and value["path"]:
                if not os.path.isfile(value["path"]):
                    raise BadFile(f"{name}: no such file")
                with open(value["path"], "rb") as file:
                    content = file.read()
        if content is None:
            raise BadFile(f"{name}: empty")
        return decode(name, content, self.in_chans)


def _labels(dataset, column: str) -> tuple[torch.Tensor, list[str]]:
    if not column:
        return torch.full((len(dataset),), -1), []
    feature = dataset.features[column]
    if "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(f"column {column!r} must hold integers, got {feature}")
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    labels = torch.from_numpy(values.combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False).astype("int64"))
    names = getattr(feature, "names", None) or [str(label) for label in range(int(labels.max()) + 1)]
    return labels, list(names)


@dataclass(frozen=True, kw_only=True)
class HfImagesData(ImageData):
    """A Hugging Face data set of images, from a folder or the hub; see HfImages."""

    path: str = ""                                          # what load_from_disk or load_dataset takes: a folder or a name
    name: str = ""                                          # of a configuration, where there are several
    split: str = "train"
    image_column: str = "image"
    label_column: str = "label"                             # "": no labels
    cache_dir: str = ""                                     # where downloads go; "": the library's own place

    def build(self) -> HfImages:
        if not self.path:
            raise ValueError("data.path is empty: pass --data.path with a data set's folder or name")
        if importlib.util.find_spec("datasets") is None:
            raise ValueError("Hugging Face data sets need the datasets package: pip install 'jepa_fast[hf]'")
        return HfImages(self._load(), self.image_column, self.label_column, self.in_chans)

    def _load(self):
        import datasets

        path = os.path.expanduser(self.path)
        # what save_to_disk writes
        if not any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(path, self.name or None, split=self.split, cache_dir=self.cache_dir or None)
        dataset = datasets.load_from_disk(path)
        if isinstance(dataset, datasets.Dataset):
            return dataset
        if self.split not in dataset:
            raise ValueError(f"data.split must be one of {', '.join(dataset)}, got {self.split!r}")
        return dataset[self.split]
