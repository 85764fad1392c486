"""Images in WebDataset shards: against the files, against the webdataset package, resumed; what is wrong in one line."""

import dataclasses
import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_fast import recipes
from jepa_fast.cli import on_image_source
from jepa_fast.data import HfImagesData, ImageFolderData, ImageShards, ImageShardsData, load_batches, shards
from jepa_fast.data.loader import BadFile
from jepa_fast.data.seeds import generator_for
from jepa_fast.data.transforms import IjepaTransform

SMALL = IjepaTransform(image_size=8)


def content(i, kind="png", mode="RGB"):
    pixels = torch.randint(0, 256, (9 + i % 3, 11, 3), dtype=torch.uint8, generator=generator_for(i)).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, {"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, value in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))


@pytest.fixture
def folder(tmp_path):
    """Three shards of 4, 4 and 3 images of several formats; the label of image i is i % 5."""
    kinds = ("png", "jpg", "webp")
    for s, numbers in enumerate((range(4), range(4, 8), range(8, 11))):
        members = {}
        for i in numbers:
            members[f"a/{i:04}.{kinds[i % 3]}"] = content(i, kinds[i % 3], "L" if i == 5 else "RGB")
            members |= {f"a/{i:04}.json": json.dumps({"label": i % 5, "caption": "x"}).encode()} if s == 1 else \
                {f"a/{i:04}.cls": str(i % 5).encode(), f"a/{i:04}.json": b'{"caption": "y"}'}
        write(tmp_path / f"train-{s:03}.tar", members)
    return tmp_path


def test_images_are_those_that_webdataset_reads(folder):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    ours = ImageShards([f"{folder}/train-{{000..002}}.tar"])
    theirs = list(wds.WebDataset([f"{folder}/train-{s:03}.tar" for s in range(3)], shardshuffle=False, empty_check=False))
    assert len(ours) == len(theirs) == 11 and ours.class_names == ["0", "1", "2", "3", "4"]
    for i, sample in enumerate(theirs):
        kind = next(kind for kind in ("png", "jpg", "webp") if kind in sample)
        label = int(sample["cls"]) if "cls" in sample else json.loads(sample["json"])["label"]
        expected = Image.open(io.BytesIO(sample[kind])).convert("RGB")
        assert ours.labels[i] == label == i % 5 and np.array_equal(ours.image(i), expected)
        assert ours.shards.name(i) == f"{folder}/train-{i // 4:03}.tar/{sample['__key__']}.{kind}"


def test_shards_written_by_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with wds.ShardWriter(f"{tmp_path}/i-%03d.tar", maxcount=3, verbose=0) as writer:
        for i in range(7):
            writer.write({"__key__": f"n01/{i:05}", "png": content(i), "cls": i})
    data = ImageShards([f"{tmp_path}/i-*.tar"], in_chans=1)
    assert data.labels.tolist() == list(range(7)) and data.shards.shard_sizes == [3, 3, 1]
    for i in range(7):
        assert np.array_equal(data.image(i), Image.open(io.BytesIO(content(i))).convert("L"))


def test_batches_are_a_function_of_seed_and_step(folder, monkeypatch):
    monkeypatch.setattr(shards, "SHUFFLE_SHARDS", 2)
    config = ImageShardsData(shards=(f"{folder}/train-*.tar",), transform=SMALL, num_workers=0)
    data = config.build()
    whole = list(config.batches(data, global_batch_size=4, seed=3, num_steps=6))
    assert len(torch.cat([batch["index"] for batch in whole[:2]]).unique()) == 8
    assert [batch["index"].tolist() for batch in whole[:2]] != [batch["index"].tolist() for batch in whole[2:4]]
    for batch in whole:
        assert torch.equal(batch["labels"], batch["index"] % 5)
    with_workers = load_batches(data, SMALL, global_batch_size=4, seed=3, start_step=3, num_steps=6, rank=1, world_size=2,
                                num_workers=1, prefetch_factor=1)
    for batch, rest in zip(whole[3:], with_workers, strict=True):
        assert torch.equal(rest["images"], batch["images"][2:]) and torch.equal(rest["index"], batch["index"][2:])
    # an epoch opens two shards, then the third
    for seed in range(10):
        order = data.order(generator_for(seed))
        assert order.sort().values.tolist() == list(range(11))
        first = {int(i) // 4 for i in order[:7]}
        assert len(first) == 2 or len({int(i) // 4 for i in order[:8]}) == 2


def test_damaged_members_are_skipped(folder):
    write(folder / "bad.tar", {"1.jpg": b"no image", "2.jpg": content(2, "jpg")})
    data = ImageShards([f"{folder}/bad.tar"])
    assert data.labels.tolist() == [-1, -1]
    with pytest.raises(BadFile, match=r"/bad\.tar/1\.jpg: not an image$"):
        data.image(0)
    (folder / "bad.tar").unlink()
    with pytest.raises(BadFile, match=r"/bad\.tar/2\.jpg: No such file or directory$"):
        data.image(1)
    with pytest.raises(IndexError, match=r"index must be in \[0, 2\), got 2"):
        data.image(2)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
def test_members_are_those_that_tarfile_finds(tmp_path, kind):
    """Long and foreign names, times with fractions, folders, links, sizes around a block."""
    long = "n" * 90
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for i, name in enumerate(("a.jpg", f"{long}/{long}.jpg", "d", "ü.png", "link", f"{long}.cls", "last.webp")):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = (0, 1, 511, 512, 513, 1500, 1024)[i], 1.5 if kind == tarfile.PAX_FORMAT else 1
            if name == "d":
                info.type, info.size = tarfile.DIRTYPE, 0
            if name == "link":
                info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, long * 2 if kind == tarfile.GNU_FORMAT else "a.jpg"
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(tmp_path / "x.tar") as tar, open(tmp_path / "x.tar", "rb") as file:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
        assert len(expected) == 5 and list(shards._members(file.fileno())) == expected


@pytest.mark.parametrize("damage, message", [
    (lambda content: content[:1400], "no header at byte 1024"),
    (lambda content: content[:800], "it ends within the member at byte 512"),
    (lambda content: content[:1600], "it ends within the member at byte 1536"),
    (lambda content: b"x" + content[1:], "no header at byte 0"),
    (lambda content: content[:1024] + b"q" * 600 + content[1624:], "no number in a header: b'qqqqqqqqqqqq'"),
    (lambda content: content[:10], "no header at byte 0"),
])
def test_damaged_archives(tmp_path, damage, message):
    write(tmp_path / "x.tar", {"a.jpg": bytes(300), "b.jpg": bytes(300)})
    (tmp_path / "x.tar").write_bytes(damage((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(ValueError, match=f"x.tar: expected an uncompressed tar file of images \\({re.escape(message)}\\)$"):
        ImageShards([str(tmp_path / "x.tar")])


@pytest.mark.parametrize("members, arguments, message", [
    (None, {}, "data.shards is empty: pass --data.shards 'train-{000..127}.tar'"),
    ({"a.txt": b"x"}, {}, "no images in PATH; expected members named .jpg, .jpeg, .png, .webp"),
    ({"a.jpg": b"x", "a.png": b"x"}, {}, "PATH: expected one image per sample, got a.jpg and a.png"),
    ({"a.jpg": b"x", "a.cls": b"cat"}, {}, "PATH/a.cls: expected an integer label, got b'cat'"),
    ({"a.jpg": b"x"}, {"in_chans": 2}, "in_chans must be 1 or 3, got 2"),
])
def test_one_clear_line(tmp_path, members, arguments, message):
    path = tmp_path / "x.tar"
    if members:
        write(path, members)
    message = re.escape(message).replace("PATH", re.escape(str(path)))
    with pytest.raises(ValueError, match=f"^{message}$"):
        ImageShardsData(shards=(str(path),) if members else (), **arguments).build()


def test_options_choose_the_source(tmp_path):
    recipe = recipes.get_recipe("ijepa_vits16")
    shared = {field.name for field in dataclasses.fields(ImageFolderData)} - {"root"}
    for options, kind in ((["--data.root", "x"], ImageFolderData), (["--data.shards", "x.tar"], ImageShardsData),
                          (["--data.path=y", "--data.label-column=z", "--data.num-workers", "3"], HfImagesData),
                          (["--optim.eps", "1"], ImageFolderData), (["--data.nothing", "x"], ImageFolderData)):
        chosen = on_image_source(recipe, options)
        assert type(chosen.data) is kind
        assert all(getattr(chosen.data, name) == getattr(recipe.data, name) for name in shared)
    # and a saved recipe comes back as it was
    chosen = dataclasses.replace(recipe, data=ImageShardsData(shards=("a.tar", "b.tar"), views_on="device"))
    recipes.save(chosen, tmp_path / "recipe.yaml")
    loaded = recipes.load(tmp_path / "recipe.yaml")
    assert loaded == chosen
