"""The pictures and the page of a run, read back: components, colours, curves, escaped text, links that exist."""

import csv
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch

from jepa_fast import eval as room
from jepa_fast.eval import curves, pictures


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# pictures

def test_principal_components_are_those_of_the_svd_with_a_fixed_sign():
    x = random(50, 6) * torch.tensor([5.0, 4, 3, 2, 1, 0.5])
    components, fraction = room.principal_components(x, 3)
    centred = (x.double() - x.double().mean(0)).numpy()
    _, s, axes = np.linalg.svd(centred, full_matrices=False)
    axes *= np.sign(axes[np.arange(6), np.abs(axes).argmax(1)])[:, None]
    np.testing.assert_allclose(components.numpy(), centred @ axes[:3].T, atol=1e-10)
    np.testing.assert_allclose(fraction.numpy(), (s**2 / (s**2).sum())[:3], rtol=1e-10)
    components, fraction = room.principal_components(torch.ones(4, 2), 3)   # fewer features than components, constant
    assert components.shape == (4, 3) and not components.any() and not fraction.any()


def read_png(path):
    """[H, W, 3] uint8."""
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def shows(picture, colour):
    """The number of pixels of one colour."""
    return int((picture == np.array(colour, dtype=np.uint8)).all(-1).sum())


def test_pca_picture_paints_patches_where_they_are(tmp_path):
    # left patch and right patch differ along one direction: component 1 is all there is, red from 0 to 1
    patches = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).expand(4, 2, 2)
    images = torch.zeros(4, 1, 16, 16)
    picture = read_png(room.pca_features(patches, (1, 2), images, tmp_path / "pca.png"))
    low, high = (0, 127, 127), (255, 127, 127)
    assert shows(picture, low) > 5000 and abs(shows(picture, low) / shows(picture, high) - 1) < 0.05
    columns = (picture == np.array(low)).all(-1).any(0).nonzero()[0]
    assert columns.min() < (picture == np.array(high)).all(-1).any(0).nonzero()[0].min()
    assert shows(picture, (0, 0, 0)) > 10000   # the images themselves, black


def test_pca_colours_run_from_percentile_1_to_99():
    ramp = torch.arange(101.0)[:, None] * torch.tensor([0.6, 0.8])
    colours, fraction = pictures._colours("ramp", ramp[None], (1, 101), 1)
    torch.testing.assert_close(colours[0, 0, :, 0], ((torch.arange(101.0) - 1) / 98).clamp(0, 1).double())
    assert fraction == pytest.approx(1.0)


def test_pictures_of_features_hold_many_colours(tmp_path):
    features, images = random(3, 12, 20), torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    path = room.pca_features(features, (3, 4), images, tmp_path / "pca.png", untrained=random(3, 12, 5, seed=1))
    again = room.pca_features(features, (3, 4), images, tmp_path / "again.png", untrained=random(3, 12, 5, seed=1))
    assert path.read_bytes() == again.read_bytes()
    assert len(np.unique(read_png(path).reshape(-1, 3), axis=0)) > 1000
    for num_classes in (3, 40):
        labels = torch.arange(200) % num_classes
        picture = read_png(room.features_scatter(random(200, 8), labels, tmp_path / "scatter.png"))
        assert min(picture.shape[:2]) > 500 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_metrics_are_read_with_holes_and_rewritten_steps(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,rank,unused\n1,4.0,,\n2,3.0,7.5,\n3,9.0,1.0,\n2,2.5,,\n4,1e-3\n")
    steps, columns = room.read_curves(path)
    assert steps.tolist() == [1, 2, 3, 4] and list(columns) == ["loss", "rank"]
    np.testing.assert_array_equal(columns["loss"], [4.0, 2.5, 9.0, 1e-3])
    np.testing.assert_array_equal(columns["rank"], [np.nan, np.nan, 1.0, np.nan])


def test_learning_curves_choose_scale_and_smooth_noise(tmp_path):
    from matplotlib.figure import Figure

    steps = np.arange(400.0)
    decay, noise = np.exp(-steps / 40), 2 + random(400, dtype=torch.float64).numpy()
    panels = {}
    for name, values in {"loss": decay, "noise_s": noise, "ramp": np.minimum(steps, 400 - steps)}.items():
        panels[name] = Figure().subplots()
        curves._panel(panels[name], name, steps, values)
    assert [panel.get_yscale() for panel in panels.values()] == ["log", "linear", "linear"]
    assert [len(panel.lines) for panel in panels.values()] == [1, 2, 1]
    assert panels["noise_s"].get_ylabel() == "seconds"
    smooth = panels["noise_s"].lines[1].get_ydata()
    np.testing.assert_allclose(smooth[[0, 200, 399]], [noise[:5].mean(), noise[195:205].mean(), noise[394:].mean()])
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        rows = [{"step": int(step), "loss": decay[i], "noise_s": noise[i] if i % 7 == 0 else "", "epoch": int(i // 100)}
                for i, step in enumerate(steps)]
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture = read_png(room.learning_curves(tmp_path / "metrics.csv", tmp_path / "curves.png"))
    assert picture.shape[1] > 1000 and shows(picture, (0x1F, 0x5F, 0xA8)) > 500   # lines in the accent colour


# table and page

def test_table_is_aligned_text():
    table = room.Table("Scores", ("features", "kNN %"), [("raw", "9.5"), ("trained encoder", "97.25")])
    assert str(table) == ("Scores\nfeatures         kNN %\n----------------------\n"
                          "raw                9.5\ntrained encoder  97.25")


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_page_shows_everything_escaped_with_links_that_exist(tmp_path):
    (tmp_path / "sub").mkdir()
    names = ["curves.png", "sub/a b#1%.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"png")
    nasty = '<script>alert("1 & 2")</script>'
    table = room.Table(nasty + "t", (nasty + "h", "x"), [(nasty + "r", nasty + "c")])
    path = room.write_page(tmp_path, nasty, nasty + "y: 'é'\n", [table], [(name, nasty + "p") for name in names],
                           versions={"commit": nasty + "v"})
    assert path == tmp_path / "index.html"
    page = Page(path)
    assert "script" not in page.tags and {"table", "img", "pre", "dl"} <= set(page.tags)
    for ending in ("", "t", "h", "r", "c", "p", "v", "y: 'é'\n"):
        assert nasty + ending in page.text
    assert "http" not in path.read_text(encoding="utf-8")
    assert [(tmp_path / unquote(urlsplit(link).path)).is_file() for link in page.links] == [True] * 4
    room.write_page(tmp_path, "second", "", [], [])
    assert "second" in Page(path).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "index.html", "sub"]


# errors

X, Y = torch.ones(6, 3), torch.arange(6)
BAD = [
    (lambda p: room.pca_features(X[None], (2, 2), torch.ones(1, 1, 4, 4), p / "x.png"), ValueError,
     r"patch_features must be \[1, 4, D\].*got \[1, 6, 3\]"),
    (lambda p: room.pca_features(X[None], (2, 3), torch.ones(1, 2, 4, 4), p / "x.png"), ValueError,
     r"images must be \[B, 1 or 3, H, W\].*got \[1, 2, 4, 4\]"),
    (lambda p: room.pca_features(X[None], (2, 3), torch.ones(1, 1, 4, 4), p / "x.jpg"), ValueError, "out_png must be"),
    (lambda p: room.features_scatter(X, None, p / "x.png"), TypeError, "labels must be an int64 tensor.*NoneType"),
    (lambda p: room.features_scatter(X, Y, p / "x.png", class_names=["a"]), ValueError, "must name all 6.*got 1"),
    (lambda p: room.learning_curves(csv_file(p, "loss\n1\n"), p / "x.png"), ValueError, "have a column named step"),
    (lambda p: room.learning_curves(csv_file(p, "step,loss\n"), p / "x.png"), ValueError, "at least one row.*got none"),
    (lambda p: room.learning_curves(csv_file(p, "step,loss\n1,\n"), p / "x.png"), ValueError, "column of numbers"),
    (lambda p: room.learning_curves(csv_file(p, "step,loss\n1,2\n2,low\n"), p / "x.png"), ValueError,
     "line 3: loss must be a number or empty, got 'low'"),
    (lambda p: room.learning_curves(csv_file(p, "step,loss\n,2\n"), p / "x.png"), ValueError, "line 2: step must be"),
    (lambda p: room.Table("t", ("a", "b"), [("1",)]), ValueError, "rows of table 't' must have 2 cells"),
    (lambda p: room.write_page(p, "t", "", [], [("gone.png", "")]), ValueError, "pictures must be files under .*gone"),
    (lambda p: room.write_page(p, "t", "", [], [("../" + csv_file(p.parent, "").name, "")]), ValueError,
     r"pictures must be files under .*\.\./metrics.csv"),
]


def csv_file(folder, text):
    (folder / "metrics.csv").write_text(text)
    return folder / "metrics.csv"


@pytest.mark.parametrize("call, kind, message", BAD, ids=[f"{i}-{case[2][:24]}" for i, case in enumerate(BAD)])
def test_bad_input_is_one_clear_line(call, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "index.html").exists()


def test_importing_the_room_does_not_import_matplotlib():
    code = "import sys, jepa_fast.eval; print(sorted({'matplotlib', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
