"""Images of Hugging Face data sets, made here: from memory, Arrow and parquet; resumed; what is wrong in one line."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_fast.data import HfImages, HfImagesData
from jepa_fast.data.loader import BadFile
from jepa_fast.data.seeds import generator_for
from jepa_fast.data.transforms import IjepaTransform

datasets = pytest.importorskip("datasets", reason='datasets is not installed: pip install "jepa_fast[hf]"')


def picture(i):
    pixels = torch.randint(0, 256, (9 + i % 3, 11, 3), dtype=torch.uint8, generator=generator_for(i))
    return Image.fromarray(pixels.numpy())


def png(i):
    file = io.BytesIO()
    picture(i).save(file, "png")
    return file.getvalue()


def dataset(n=9):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel"]),
                                  "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(n)],
            "label": [None if i == 4 else i % 3 for i in range(n)], "text": [str(i) for i in range(n)]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same nine images as `save_to_disk` of one data set, of splits, as parquet, and shuffled."""
    path = tmp_path_factory.mktemp("hf")
    dataset().save_to_disk(path / "one")
    datasets.DatasetDict({"train": dataset(), "validation": dataset(2)}).save_to_disk(path / "splits")
    (path / "parquet").mkdir()
    dataset().to_parquet(path / "parquet" / "train-00000.parquet")
    return path


@pytest.mark.parametrize("source", ["one", "splits", "parquet"])
def test_images_and_labels(folder, source):
    data = HfImagesData(path=f"{folder}/{source}", cache_dir=f"{folder}/cache", in_chans=1 if source == "one" else 3).build()
    assert len(data) == 9 and data.labels.tolist() == [0, 1, 2, 0, -1, 2, 0, 1, 2]
    assert data.class_names == ["cat", "dog", "eel"]
    for i in range(9):
        assert np.array_equal(data.image(i), picture(i).convert("L" if source == "one" else "RGB"))
    if source == "splits":
        assert len(HfImagesData(path=f"{folder}/splits", split="validation").build()) == 2


def test_shuffled_bytes_and_paths(tmp_path):
    """A data set with an index of its own (shuffle, select), a column of bytes, and images that are files elsewhere."""
    shuffled = dataset().shuffle(seed=1).select(range(2, 8))
    expected = [int(text) for text in shuffled["text"]]
    data = HfImages(shuffled, label_column="label")
    assert data.labels.tolist() == [-1 if i == 4 else i % 3 for i in expected]
    assert all(np.array_equal(data.image(row), picture(i)) for row, i in enumerate(expected))
    raw = HfImages(datasets.Dataset.from_dict({"jpg": [png(3), b"no image", None]},
                                              features=datasets.Features({"jpg": datasets.Value("binary")})), "jpg")
    assert np.array_equal(raw.image(0), picture(3)) and raw.labels.tolist() == [-1] * 3 and raw.class_names == []
    picture(5).save(tmp_path / "5.png")
    files = HfImages(datasets.Dataset.from_dict({"image": [str(tmp_path / "5.png"), "/no/such.png"]},
                                                features=datasets.Features({"image": datasets.Image()})))
    assert np.array_equal(files.image(0), picture(5))
    for images, row, message in ((raw, 1, "row 1: not an image"), (raw, 2, "row 2: empty"),
                                 (files, 1, "row 1 (/no/such.png): no such file")):
        with pytest.raises(BadFile, match=f"^{re.escape(message)}$"):
            images.image(row)


def test_batches_are_a_function_of_seed_and_step(folder):
    config = HfImagesData(path=f"{folder}/one", transform=IjepaTransform(image_size=8), num_workers=0)
    whole = list(config.batches(config.build(), global_batch_size=4, seed=3, num_steps=4))
    assert len(torch.cat([batch["index"] for batch in whole[:2]]).unique()) == 8
    rest = config.batches(config.build(), global_batch_size=4, seed=3, start_step=1, num_steps=4, rank=1, world_size=2)
    for batch, part in zip(whole[1:], rest, strict=True):
        assert torch.equal(part["images"], batch["images"][2:]) and torch.equal(part["index"], batch["index"][2:])


@pytest.mark.parametrize("make, message", [
    (lambda path: HfImagesData().build(), "data.path is empty: pass --data.path with a data set's folder or name"),
    (lambda path: HfImages(dataset().to_iterable_dataset()),
     "dataset must be a datasets.Dataset, got IterableDataset; streams have no random access"),
    (lambda path: HfImages([1, 2]), "dataset must be a datasets.Dataset, got list"),
    (lambda path: HfImages(dataset(), "jpg"), "the data set must have a column 'jpg', got image, label, text"),
    (lambda path: HfImages(dataset(), "text"), "column 'text' must hold images or bytes, got Value('string')"),
    (lambda path: HfImages(dataset(), label_column="text"), "column 'text' must hold integers, got Value('string')"),
    (lambda path: HfImages(dataset(), in_chans=2), "in_chans must be 1 or 3, got 2"),
    (lambda path: HfImagesData(path=f"{path}/splits", split="test").build(),
     "data.split must be one of train, validation, got 'test'"),
])
def test_one_clear_line(folder, make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(folder)
