"""common.py: the data, the plots, devices and processes, the checkpoint, the command line."""

import contextlib
import gzip
import io
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, features
from torch import nn
from torch.testing import assert_close
from tqdm import tqdm

import common
import vae

REPO = Path(__file__).resolve().parent.parent
RAW = common.DATA_DIR / "MNIST" / "raw"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        # So that a dead network cannot hang the run.
        assert 0 < common.socket.getdefaulttimeout() <= 60
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    common._read_set.cache_clear()
    common._read_folder.cache_clear()


def load_data(data, root="", out="", **given):
    """Calls common.load_data as the scripts do -> x_train, y_train, x_test, y_test."""
    settings = Namespace(**common.defaults(CPU) | {"data": str(data)} | given)
    if data not in common.SETS:
        settings.pictures, _ = common._digest(data, out)
    return common.load_data(settings, Namespace(data_dir=str(root), out=str(out)), CPU)


def refused(call, *words):
    """Asserts that the call raises an InputError whose message has all the words."""
    with pytest.raises(common.InputError) as error:
        call()
    for word in words:
        assert str(word) in str(error.value)


# ---- named data


@pytest.fixture
def packed(tmp_path):
    """A copy of MNIST as it comes with the repository."""
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(RAW, raw, ignore=shutil.ignore_patterns("*-ubyte"))
    return raw


def test_mnist_comes_with_the_repository_and_is_read_as_it_is(tmp_path, packed, capsys):
    x, y, x_test, y_test = load_data("mnist", tmp_path)
    assert x.shape == (60000, 1, 28, 28) and x_test.shape == (10000, 1, 28, 28)
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == y_test.dtype == torch.int64
    assert y[:5].tolist() == [5, 0, 4, 1, 9] and y_test[:3].tolist() == [7, 2, 1]
    assert x.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)  # the known mean
    assert x[0, 0, 5, 12] == 3 and x[0, 0, 23, 5] > 100  # upright: a 5 ends at the lower left
    assert sorted(os.listdir(packed)) == sorted(f"{name}-ubyte.gz" for name in common.FILES)
    assert capsys.readouterr().out == ""
    shutil.rmtree(packed)
    few, labels, again, _ = load_data("mnist", tmp_path, limit=7)
    assert torch.equal(few, x[:7]) and torch.equal(labels, y[:7]) and again is x_test


def test_packed_and_unpacked_files_are_the_same(tmp_path, packed):
    name = "t10k-images-idx3-ubyte"
    test = load_data("mnist", tmp_path)[2]
    (packed / name).write_bytes(gzip.decompress((packed / f"{name}.gz").read_bytes()))
    (packed / f"{name}.gz").unlink()
    common._read_set.cache_clear()
    assert torch.equal(load_data("mnist", tmp_path)[2], test)


@pytest.fixture
def raw(digits, tmp_path):
    """The unpacked files of 1,100 training and 600 test images."""
    return shutil.copytree(digits / "MNIST" / "raw", tmp_path / "MNIST" / "raw")


def test_damaged_files_are_refused_with_their_folder(tmp_path, raw):
    for file in "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte":
        whole = (raw / file).read_bytes()
        for content in b"", whole[:6], whole[:17], whole[:-1], whole + b"x", b"x" + whole[1:]:
            (raw / file).write_bytes(content)
            refused(lambda: load_data("mnist", tmp_path), raw / file, "original file")
        (raw / file).write_bytes(whole)
    (raw / file).write_bytes(whole[:-1] + b"\n")
    refused(lambda: load_data("mnist", tmp_path), raw, "600 labels up to 10", "original files")
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    refused(lambda: load_data("mnist", tmp_path), raw, "1100 images, 600 labels")
    for file, dimensions in ("train-images-idx3-ubyte", 3), ("train-labels-idx1-ubyte", 1):
        (raw / file).write_bytes(bytes([0, 0, 8, dimensions]) + bytes(4 * dimensions))
    refused(lambda: load_data("mnist", tmp_path), raw, "0 images, 0 labels")


def test_without_a_network_the_error_says_where_to_put_missing_files(tmp_path, raw):
    names = [f"{name}-ubyte.gz" for name in common.FILES]
    refused(lambda: load_data("fashion", tmp_path), tmp_path / "FashionMNIST" / "raw", *names)
    assert common.socket.getdefaulttimeout() is None
    (raw / "t10k-labels-idx1-ubyte").unlink()
    refused(lambda: load_data("mnist", tmp_path), raw, *names)
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut off")
    refused(lambda: load_data("mnist", tmp_path), raw / "t10k-labels-idx1-ubyte.gz")
    (tmp_path / "file").touch()
    refused(lambda: load_data("mnist", tmp_path / "file"), tmp_path / "file")


def test_several_processes_download_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "WORLD", 2)
    refused(lambda: load_data("fashion", tmp_path), "fashion", "without torchrun")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["mnist", "fashion", "kmnist"])
def test_a_name_wins_over_a_folder(tmp_path, monkeypatch, raw, name):
    (tmp_path / "MNIST").replace(tmp_path / common.SETS[name].__name__)
    (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    x, y, x_test, _ = load_data(name, tmp_path)
    assert x.shape == (1100, 1, 28, 28) and len(x_test) == 600 and y[:3].tolist() == [5, 0, 4]


# ---- folders of pictures

RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))  # black on the left, 248 right
GRAY = Image.fromarray(RAMP)
GRAY_16 = Image.fromarray(RAMP.astype(np.uint16) * 257)
RED = Image.new("RGB", (32, 32), (200, 10, 10))


def encoded(picture, name, **options):
    """The bytes of a picture saved under this name."""
    file = io.BytesIO()
    file.name = name
    picture.save(file, **options)
    return file.getvalue()


def pictures(folder, files):
    """Writes {name: bytes} and reads the folder -> all of it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    x, y, x_test, y_test = load_data(folder)
    assert y is None and y_test is None and x.dtype == torch.uint8 and x.is_contiguous()
    return torch.cat([x, x_test])


SUFFIXES = ["png", "PNG", "jpg", "jpeg", "jfif", "webp", "gif", "bmp", "tif", "ppm"]


@pytest.mark.parametrize("suffix", SUFFIXES + ["avif"] * features.check("avif"))
def test_formats(tmp_path, suffix):
    for picture in RED, GRAY:
        file = encoded(picture, f"a.{suffix}")
        x = pictures(tmp_path / picture.mode, {f"a.{suffix}": file, f"b.{suffix}": file})
        pixels = np.moveaxis(np.array(picture.convert("RGB")), 2, 0)[: x.shape[1]]
        np.testing.assert_allclose(x, [pixels, pixels], atol=6)
        # WebP is only nearly gray.
        assert (x.shape[1] == 1) == (picture is GRAY and suffix != "webp")


def halves(mode, upper, lower, size=(40, 40)):
    picture = Image.new(mode, size, lower)
    picture.paste(upper, (0, 0, size[0], size[1] // 2))
    return picture


CLEAR = halves("RGBA", (255, 0, 0, 127), (0, 0, 0, 0))
PALETTE = halves("P", 0, 1)
PALETTE.putpalette([10, 20, 30, 40, 50, 60])
WIDE = halves("L", 50, 90, (900, 400))
WIDE.paste(255, (0, 0, 200, 400))  # beside the square in the middle that is cut out
TURNED = Image.Exif()
TURNED[0x0112] = 8  # Exif orientation 8: shown rotated, with the upper half on the left
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "blue")]}


@pytest.mark.parametrize(
    "name, picture, options, upper_right, lower_left",
    [
        ("clear.png", CLEAR, {}, [255, 128, 128], [255, 255, 255]),
        ("palette.png", PALETTE, {"transparency": 0}, [255, 255, 255], [40, 50, 60]),
        ("turned.jpg", halves("L", 255, 0), {"exif": TURNED}, [0], [255]),
        ("16_bits.png", GRAY_16, {}, [240], [8]),
        ("inks.jpg", RED.convert("CMYK"), {}, [200, 10, 10], [200, 10, 10]),
        ("bits.png", halves("1", 1, 0), {}, [255], [0]),
        ("thin.png", Image.new("L", (1, 500), 77), {}, [77], [77]),
        ("wide.jpg", WIDE, {}, [50], [90]),
        ("first_frame.gif", RED, FRAMES, [200, 10, 10], [200, 10, 10]),
    ],
)
def test_what_a_picture_shows(tmp_path, name, picture, options, upper_right, lower_left):
    file = encoded(picture, name, **options)
    x, _ = pictures(tmp_path, {name: file, f"below/{name}": file})  # at least two are needed
    assert x[:, 1, 30].tolist() == pytest.approx(upper_right, abs=4)
    assert x[:, 30, 1].tolist() == pytest.approx(lower_left, abs=4)


def test_gray_pictures_among_colored_ones_become_colored(tmp_path):
    GRAY_16.save(tmp_path / "a.png")
    RED.save(tmp_path / "b.png")
    x = pictures(tmp_path, {})
    gray = torch.from_numpy(RAMP).expand(3, 32, 32)
    assert x.shape == (2, 3, 32, 32) and sum(torch.equal(each, gray) for each in x) == 1


ODD = {
    "float32, 0 to 1": (np.float32, 0, 1),
    "float32, 0 to 255": (np.float32, 0, 255),
    "float32, 0 to 65535": (np.float32, 0, 65535),
    "float32, around 0": (np.float32, -3, 3),
    "int32, 0 to 255": (np.int32, 0, 255),
    "int32, 0 to 65535": (np.int32, 0, 65535),
    "int32, up to 100000": (np.int32, 0, 100000),
    "int32, all": (np.int32, -(2**31), 2**31 - 1),
    "uint32, all": (np.uint32, 0, 2**32 - 1),
    "16 bits": (np.uint16, 0, 65535),
    "12 bits in 16": (np.uint16, 0, 4095),
    "8 bits in 16": (np.uint16, 0, 255),
    "big endian": (np.dtype(">u2"), 0, 65535),
    "signed 16 bits": (np.int16, -32768, 32767),
}


def tiff(pixels):
    """An uncompressed TIFF, byte by byte, because Pillow does not write all kinds."""
    H, W = pixels.shape
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    tags = {256: W, 257: H, 258: 8 * pixels.itemsize, 259: 1, 262: 1, 273: 0, 277: 1, 278: H}
    tags |= {279: pixels.nbytes, 339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels begin
    entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items()]
    mark = b"MM" if order == ">" else b"II"
    head = mark + struct.pack(order + "HIH", 42, 8, len(tags))
    return head + b"".join(entries) + bytes(4) + pixels.tobytes()


@pytest.mark.parametrize("kind", ODD)
def test_a_ramp_is_a_ramp_whatever_its_pixels_are(tmp_path, kind):
    dtype, black, white = ODD[kind]
    ramp = np.linspace(black, white, 32, dtype=np.float64)
    file = tiff(np.tile(ramp.astype(dtype), (32, 1)))
    x = pictures(tmp_path, {"a.tif": file, "b.tiff": file})
    assert x.shape == (2, 1, 32, 32)
    np.testing.assert_allclose(x[0, 0], np.tile(np.linspace(0, 255, 32), (32, 1)), atol=1)


def test_a_dark_picture_stays_dark_and_a_mask_is_white(tmp_path):
    dark = tiff(np.full((32, 32), 6000, np.uint16))
    mask = tiff(np.tile(np.arange(32) > 15, (32, 1)).astype(np.int32))
    x = pictures(tmp_path, {"dark.tif": dark, "mask.tif": mask})
    assert sorted(x[:, 0, 5, 25].tolist()) == [round(255 * 6000 / 65535), 255]


def test_pictures_with_nan_pixels_are_skipped_by_name(tmp_path, capsys):
    good = encoded(GRAY, "a.png")
    nan = np.zeros((32, 32), np.float32)
    nan[3, 3] = math.nan
    pictures(tmp_path, {"a.png": good, "b.png": good, "nan.tif": tiff(nan)})
    assert "1 skipped" in (out := capsys.readouterr().out)
    assert "nan.tif (ValueError: some pixels are not finite numbers)" in out


def test_one_line_says_what_was_read_and_what_was_skipped_and_why(tmp_path, capsys):
    good = encoded(GRAY, "a.png")
    size = 2 * (20000).to_bytes(4, "big")  # 400 megapixels, which Pillow refuses to decode
    checksum = zlib.crc32(good[12:16] + size + good[24:29]).to_bytes(4, "big")
    huge = good[:16] + size + good[24:29] + checksum + good[33:]
    bad = {"bad.jpg": b"\x89PNG nothing", "half.png": good[:-40], "huge.png": huge}
    bad |= {"drawing.svg": b"<svg/>", "below/phone.heic": b"ftypheic"}
    other = {"notes.txt": b"", "below/labels.csv": b""}
    x = pictures(tmp_path, bad | other | {"a.png": good, "b.png": good})
    assert x.shape == (2, 1, 32, 32)
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: 2 pictures read, 2 other files, 5 skipped: ")
    assert out.count("\n") == 1 and "400000000 pixels" in out
    assert all(f"{name} (" in out for name in bad) and not any(name in out for name in other)


def test_file_names_matter_only_in_out(tmp_path, capsys):
    good = encoded(GRAY, "a.png")
    ours = ["vae_samples.png", "ddpm_loss.png", "vae.pt", "ddpm.pt"]
    out = tmp_path / "out"
    for folder in tmp_path, out, out / "deeper":
        folder.mkdir(exist_ok=True)
        for name in ours:
            (folder / name).write_bytes(good)
    x, _, x_test, _ = load_data(tmp_path, out=tmp_path / "deeper" / ".." / "out")
    assert len(x) + len(x_test) == 4
    assert "4 pictures read, 6 other files, 0 skipped" in capsys.readouterr().out


def test_hidden_files_and_folders_do_not_count(tmp_path, capsys):
    good = encoded(GRAY, "a.png")
    hidden = [".ipynb_checkpoints/a-checkpoint.png", ".a.png", "._a.png", "b/.git/c/d.png"]
    folder = tmp_path / ".cache" / "pictures"  # a hidden folder above does not count
    assert len(pictures(folder, dict.fromkeys([*hidden, "a.png", "b/b.png"], good))) == 2
    assert "2 pictures read, 0 other files, 0 skipped" in capsys.readouterr().out


def test_links_are_followed_and_loops_end(tmp_path, capsys):
    folder = tmp_path / "pictures"
    elsewhere = tmp_path / "elsewhere"
    for path in folder / "a.png", elsewhere / "b.png", elsewhere / "below" / "c.png":
        path.parent.mkdir(parents=True, exist_ok=True)
        GRAY.save(path)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "d.png").symlink_to(elsewhere / "b.png")
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    (elsewhere / "up").symlink_to(tmp_path)
    (elsewhere / "itself").symlink_to(elsewhere)
    (elsewhere / "below" / "loop").symlink_to(folder)
    assert len(pictures(folder, {})) == 4
    assert "4 pictures read, 0 other files, 1 skipped: gone.png (" in capsys.readouterr().out
    seen = [path.relative_to(folder) for path in common.find_pictures(folder, "")[0]]
    # Followed under its first name in sorted order, on any disk.
    assert Path("again/below/c.png") in seen


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    good = encoded(GRAY, "a.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    pictures(tmp_path, {"a.png": good, "b.png": good, "closed/c.png": good})
    assert "2 pictures read, 0 other files, 1 skipped: closed (" in capsys.readouterr().out


def test_pictures_that_have_changed_are_read_again(tmp_path):
    good = encoded(GRAY, "a.png")
    assert len(pictures(tmp_path, {"a.png": good, "b.png": good})) == 2
    assert len(pictures(tmp_path, {"c.png": good})) == 3


def test_the_digest_is_of_names_and_sizes(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    GRAY.save(folder / "a.png")
    before = common._digest(folder, "")
    assert before[1] == 1
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    (folder / "gone.png").symlink_to("nothing")
    (folder / "vae_samples.png").touch()
    assert common._digest(folder, folder) == before == common._digest(f"{folder}/", folder)
    assert common._digest(folder, "") != before
    copy = shutil.copytree(folder, tmp_path / "b", symlinks=True)
    assert common._digest(copy, copy) == before
    for change in lambda: (copy / "b.png").touch(), lambda: RED.save(copy / "a.png"):
        digest = common._digest(copy, copy)
        change()
        assert common._digest(copy, copy) != digest


def test_too_few_pictures(tmp_path):
    refused(lambda: load_data(tmp_path), "0", tmp_path)
    good = encoded(GRAY, "a.png")
    refused(lambda: pictures(tmp_path, {"a.png": good, "b.png": b""}), "1", tmp_path)


def test_a_tenth_is_held_out_by_the_seed(tmp_path):
    for i in range(30):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i:02}.png")
    splits = []
    for seed in 0, 0, 1:
        common._read_folder.cache_clear()
        x, _, x_test, _ = load_data(tmp_path, size=16, seed=seed)
        assert x.shape == (27, 1, 16, 16) and x_test.shape == (3, 1, 16, 16)
        assert sorted(torch.cat([x, x_test])[:, 0, 0, 0].tolist()) == list(range(30))
        splits.append(x_test[:, 0, 0, 0].tolist())
    assert splits[0] == splits[1] != splits[2]
    assert len(load_data(tmp_path, size=16, limit=5)[0]) == 5


# ---- plots


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure, in place of its file."""
    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.append(figure.axes[0]))
    return axes


def test_images_are_upright_in_order_and_not_rescaled(tmp_path):
    quarters = 0.6 * torch.rand(3, 3, 2, 2)
    quarters[0, :, 0] *= 4  # clipped at white
    x = quarters.repeat_interleave(14, dim=2).repeat_interleave(14, dim=3)
    common.plot_grid(x.requires_grad_(), tmp_path / "x.png", "", columns=2)
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    H, W, _ = picture.shape
    found = picture[H // 8 :: H // 4, W // 8 :: W // 4][:4, :4]
    rows = [quarters[:2], torch.stack([quarters[2], torch.ones(3, 2, 2)])]
    expected = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).permute(1, 2, 0)
    np.testing.assert_allclose(found, 255 * expected.clamp(0, 1), atol=1)


def test_labels_stand_where_they_belong(drawn):
    x = 2 * torch.rand(3, 1, 4, 6)
    common.plot_rows({"data": x, "model": x / 2}, "", "the title", "abc")
    (axes,) = drawn
    pixels = torch.tensor(axes.images[0].get_array())
    assert_close(pixels[2:6, 10:16, 0], x[1, 0].clamp(max=1))
    assert_close(pixels[8:12, 10:16, 0], x[1, 0] / 2)
    assert axes.get_title() == "the title"
    assert axes.get_xticks().tolist() == [5, 13, 21] and axes.get_yticks().tolist() == [4, 10]
    labels = axes.get_xticklabels() + axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["a", "b", "c", "data", "model"]


def test_latents(drawn):
    mu = torch.randn(60, 2, requires_grad=True)
    y = torch.arange(60) % 10
    common.plot_latent(mu, y, "", "")
    axes = drawn.pop()
    assert len(axes.collections) == 10 and axes.get_aspect() == 1
    for label, points in enumerate(axes.collections):
        np.testing.assert_array_equal(points.get_offsets(), mu[y == label].detach())
        assert points.get_label() == str(label)
    assert [circle.radius for circle in axes.patches] == [1, 2]
    common.plot_latent(mu, None, "", "")  # as for a folder without labels
    assert len(drawn.pop().collections) == 1


@pytest.mark.parametrize("C", [1, 3])
def test_a_gif_has_every_frame_and_holds_the_last(tmp_path, C):
    x = torch.linspace(0, 1, 12).view(12, 1, 1, 1).expand(-1, C, 28, 28)
    common.save_gif({"x": x, "y": 1 - x}, tmp_path / "x.gif", "title", "abcdefghijkl")
    gif = Image.open(tmp_path / "x.gif")
    assert gif.n_frames == 12
    durations = []
    for frame in range(12):
        gif.seek(frame)
        durations.append(gif.info["duration"])
        row = np.asarray(gif.convert("L"))[gif.height // 2]
        level = 255 * frame / 11
        assert row[len(row) // 4] == pytest.approx(level, abs=4)
        assert row[len(row) * 3 // 4] == pytest.approx(255 - level, abs=4)
    assert durations[-1] > 5 * max(durations[:-1])


def test_rows_become_longer_if_a_picture_would_be_too_tall(drawn):
    common.plot_grid(torch.zeros(2000, 1, 400, 1), "", "")
    height, width, _ = drawn[0].images[0].get_array().shape
    assert height < 65000 and height * width > 2000 * 400
    assert 130 * drawn[0].figure.get_figheight() < 65536  # the limit of some matplotlibs


def every_picture(out):
    """Draws one picture of each kind into the folder out -> {name: bytes}."""
    x = torch.linspace(0, 1, 64).view(4, 1, 4, 4)
    common.plot_grid(x, out / "grid.png", "a title")
    common.plot_rows({"a": x, "b": x}, out / "rows.png", "", notes={"b": "1234"})
    common.plot_curves([{"epoch": 1, "loss": 3}], {"y": {"loss": "loss"}}, out / "curves.png", "")
    common.plot_latent(x.view(-1, 2), torch.arange(32) % 10, out / "latent.png", "")
    common.save_gif({"$x_t$": x}, out / "x.gif", "", "abcd")
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_users_style_changes_nothing(tmp_path):
    plain = every_picture(tmp_path)
    assert len(plain) == 5
    style = {"image.origin": "lower", "text.usetex": True, "figure.facecolor": "black"}
    with matplotlib.rc_context(style):
        assert every_picture(tmp_path) == plain
        assert matplotlib.rcParams["image.origin"] == "lower"  # as the user has it


def test_a_disk_that_is_full_when_pictures_are_drawn(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    x = torch.zeros(2, 1, 4, 4)
    monkeypatch.setitem(Image.SAVE_ALL, "GIF", full)
    refused(lambda: common.save_gif({"x": x}, tmp_path / "x.gif", "", "ab"), "x.gif", "No space")
    monkeypatch.setattr(Figure, "savefig", full)
    path = tmp_path / "x.png"
    refused(lambda: common.plot_grid(x, path, ""), path, "No space", "--out", "is kept")
    refused(lambda: common.plot_rows({"a": x}, path, ""), path, "No space")
    curves = {"y": {"loss": "loss"}}
    refused(lambda: common.plot_curves([], curves, path, ""), path, "No space")
    refused(lambda: common.plot_latent(x[0, 0, :, :2], None, path, ""), path, "No space")


def test_titles():
    assert common.title({"data": "kmnist", "epochs": 2}) == "KMNIST, 2 epochs"
    # A $ would begin a formula.
    assert common.title({"data": "/my/$cats", "epochs": 3}) == r"\$cats, 3 epochs"
    latin = os.fsdecode(b"/my/caf\xe9")
    assert common.title({"data": latin, "epochs": 3}) == "caf?, 3 epochs"


# ---- what functions are given


def test_a_wrong_value_is_named_with_the_valid_ones():
    common.check_choice("color", "red", ("red", "blue"))
    with pytest.raises(ValueError, match="color .*red, blue.*'green'"):
        common.check_choice("color", "green", ("red", "blue"))
    common.check_range("eta", 0, 0, 1)
    common.check_range("eta", 1, 0, 1)
    for value in -0.5, 1.5, math.nan:
        with pytest.raises(ValueError, match=f"eta .*0 .*1.*{value}"):
            common.check_range("eta", value, 0, 1)


# ---- devices, processes, random numbers


def arguments(out, **given):
    nothing = {"device": "cpu", "load": None, "sample": None, "fresh": False}
    return Namespace(**nothing | {"out": str(out)} | given)


def test_start_closes_the_bars_of_a_stopped_command_and_no_others(tmp_path):
    left = common.progress(total=5)
    own = tqdm(total=5, disable=False, file=io.StringIO())
    common.start(arguments(tmp_path))
    assert left.disable and not own.disable  # a closed bar is disabled


def test_pick_device_picks_a_device_and_nothing_else(tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr(torch.distributed, "init_process_group", groups.append)
    monkeypatch.setattr(common, "WORLD", 2)
    can_flush = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    assert common.pick_device("cpu") == CPU
    assert torch.tensor(1e-30) * 1e-10 > 0 and groups == []
    args = arguments(tmp_path / "a" / "b")
    assert common.start(args) == CPU  # start, unlike pick_device, does both
    assert (torch.tensor(1e-30) * 1e-10 == 0) == can_flush and groups == ["gloo"]
    assert os.listdir(args.out) == []


def test_devices_that_are_not_there(monkeypatch):
    for name in "tpu", "cuda:", "cuda:-1", "cuda:77", "meta", "":
        refused(lambda name=name: common.pick_device(name), f"--device {name}".strip(), "cpu")
    monkeypatch.setattr(common, "LOCAL_RANK", 77)  # each process takes a GPU of its own
    refused(lambda: common.pick_device("cuda"), "cuda:77")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(lambda: common.pick_device("auto"), "cuda:77")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    refused(lambda: common.pick_device("auto"), "cuda:77")  # cuda is preferred to mps
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: common.pick_device("auto"), "--device mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert common.pick_device("auto") == CPU


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    args = arguments(tmp_path / "file" / "below")
    refused(lambda: common.start(args), "file", "--out")

    def full(**_):
        raise OSError("No space left")

    monkeypatch.setattr(common.tempfile, "TemporaryFile", full)
    args.out = str(tmp_path)
    refused(lambda: common.start(args), "No space left", "--out", "--load")


def test_flags_that_do_not_go_together(tmp_path):
    refused(lambda: common.start(arguments(tmp_path / "a", load="vae.pt")), "--load", "--sample")
    both = arguments(tmp_path / "a", fresh=True, sample=4)
    refused(lambda: common.start(both), "--fresh", "--sample")
    assert os.listdir(tmp_path) == []


def test_processes_share_a_batch_and_draw_their_own_numbers(monkeypatch):
    order = torch.randperm(24).view(3, 8)
    assert torch.equal(common.share(order), order)
    monkeypatch.setattr(common, "WORLD", 4)
    parts, draws = [], []
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        torch.manual_seed(5)
        parts.append(common.share(order))
        draws.append(torch.rand(1).item())
    assert [part.shape for part in parts] == 4 * [(3, 2)]
    assert torch.equal(torch.cat(parts, dim=1).sort()[0], order.sort()[0])
    torch.manual_seed(5)
    assert draws[0] == torch.rand(1) and len(set(draws)) == 4
    refused(lambda: common.share(order[:, :6]), "6", "4 processes")


@torch.no_grad()
def test_measuring_the_precision_draws_no_random_numbers():
    common.best_precision.cache_clear()
    state = torch.get_rng_state()
    assert common.best_precision(CPU) in common.PRECISIONS
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "seconds, best",
    [((2, 1), "bfloat16"), ((1, 2), "float32"), ((1.1, 1), "float32"), ((1, 1), "float32")],
)
def test_the_clearly_faster_precision_is_the_best(monkeypatch, seconds, best):
    cost = dict(zip(common.PRECISIONS, seconds, strict=True))
    now = [0]

    @contextlib.contextmanager
    def autocast(device, precision):
        yield
        now[0] += cost[precision]

    monkeypatch.setattr(common, "autocast", autocast)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    measure = common.best_precision.__wrapped__
    assert measure(CPU) == best
    assert measure(torch.device("mps")) == "float32"


def test_autocast_has_the_precision_that_is_given(monkeypatch):
    x = torch.ones(2, 2)
    for precision in common.PRECISIONS:
        with common.autocast(CPU, precision):
            assert (x @ x).dtype == getattr(torch, precision)
        monkeypatch.setattr(common, "best_precision", lambda device, found=precision: found)
        with common.autocast(CPU):
            assert (x @ x).dtype == getattr(torch, precision)


# ---- what is said


def test_only_the_first_process_prints_and_undecodable_names_are_no_error(monkeypatch, capsys):
    common.log({"epoch": 3, "loss": 1 / 3, "data": "mnist"})
    common.log(f"{os.fsdecode(bytes([99, 233]))}: read")
    assert capsys.readouterr().out == "epoch 3  loss 0.33333  data mnist\nc?: read\n"
    monkeypatch.setattr(common, "RANK", 1)
    common.log("nothing")
    assert list(common.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_streams_that_are_closed_or_replaced(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)

    def main():
        for _ in common.progress(range(3), "reading"):
            common.log("a line")

    common.run(main)
    assert stream is None or stream.getvalue().count("a line\n") == 3


class Screen(io.StringIO):
    isatty = lambda self: True  # noqa: E731


@pytest.mark.parametrize("stream", [io.StringIO, Screen])
def test_a_file_gets_a_line_every_half_minute_and_a_screen_a_bar(monkeypatch, stream):
    now = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream())
    bar = common.progress(total=100)
    for _ in range(100):
        now[0] += 1
        bar.update()
    bar.close()
    said = sys.stderr.getvalue()
    shown = [each.partition("/100 ")[0].split()[-1] for each in said.split("it/s")[:-1]]
    if stream is Screen:
        assert shown == [*map(str, range(101)), "100"] and said.count("\n") == 1
    else:
        assert shown == ["0", "30", "60", "90", "100"]
        assert said.count("\r") == 5 <= said.count("\n") and len(said) < 300


# ---- the same command goes on: a run's settings and its checkpoint

SETTINGS = {**common.defaults(CPU), "lr": 0.5, "epochs": 2}  # of a script with --lr and --epochs
HISTORY = [{"epoch": 1, "loss": 3.0}]


def open_run(path, **given):
    nothing = dict.fromkeys(SETTINGS) | {"out": str(path.parent), "fresh": False}
    settings, saved = common.open_run(Namespace(**nothing | given), path, SETTINGS, "code")
    return vars(settings), saved


def save(path, settings=SETTINGS, history=HISTORY, code="code", **parts):
    model = nn.Linear(1000, 1)
    common.save_checkpoint(path, settings, history, code, **{"model": model, **parts})
    return model


@pytest.fixture(autouse=True)
def no_locks(monkeypatch):
    monkeypatch.setattr(common, "_locks", {})


def test_a_new_run_has_the_defaults_and_what_is_given(tmp_path, capsys):
    path = tmp_path / "vae.pt"
    expected = {"data": "mnist", "pictures": None, "size": 32, "limit": None, "seed": 0}
    expected |= {"precision": common.best_precision(CPU)}
    assert common.defaults(CPU) == expected
    assert open_run(path, lr=0.1, limit=7) == (SETTINGS | {"lr": 0.1, "limit": 7}, None)
    assert capsys.readouterr().out == ""


def test_a_resumed_run_has_the_settings_of_its_checkpoint(tmp_path, capsys):
    path = tmp_path / "vae.pt"
    kept = SETTINGS | {"lr": 0.25, "seed": 3, "shape": [1, 28, 28]}
    save(path, kept)
    for given in {}, {"lr": 0.25, "data": "mnist"}:
        settings, saved = open_run(path, **given)
        assert settings == kept == saved["settings"] and saved["history"] == HISTORY
        assert capsys.readouterr().out == "going on after epoch 1 of 2\n"
    for name, value in ("lr", 0.5), ("size", 64), ("limit", 10), ("seed", 0), ("data", "kmnist"):
        message = f"{name} {kept[name]}.*{value}.*--{name}.*--fresh"
        with pytest.raises(common.InputError, match=message):
            open_run(path, **{name: value})
    assert open_run(path, fresh=True, lr=0.5) == (SETTINGS, None)


def test_a_finished_run_says_so(tmp_path, capsys):
    path = tmp_path / "vae.pt"
    save(path, history=2 * HISTORY)
    assert open_run(path)[1]["history"] == 2 * HISTORY
    assert capsys.readouterr().out.startswith(f"{path} is finished")
    assert common._locks == {}  # nothing will be written


def test_changed_code_and_changed_pictures_are_refused(tmp_path):
    path = tmp_path / "out" / "vae.pt"
    path.parent.mkdir()
    save(path, code="other code")
    refused(lambda: open_run(path), "vae.py has changed", path, "--fresh", "--out")
    pictures(tmp_path / "a", {"a.png": encoded(GRAY, "a.png")} | {"b.png": encoded(RED, "b.png")})
    settings, _ = open_run(path, fresh=True, data=str(tmp_path / "a"))
    save(path, settings)
    assert open_run(path)[0] == settings
    GRAY.save(tmp_path / "a" / "c.png")
    refused(lambda: open_run(path), tmp_path / "a", "have changed", path, "--fresh", "--out")
    fresh, _ = open_run(path, fresh=True, data=str(tmp_path / "a"))
    assert fresh["pictures"] != settings["pictures"]
    shutil.rmtree(tmp_path / "a")
    refused(
        lambda: open_run(path), f"there is no folder --data {tmp_path / 'a'}", "mnist", "kmnist"
    )


@pytest.mark.parametrize(
    "given, epochs",
    [
        ({}, 900),
        ({"limit": 300}, 900),
        ({"limit": 190}, 948),
        ({"limit": 2}, 1000),
        ({"epochs": 4}, 4),
    ],
)
def test_a_folder_is_trained_on_for_as_many_updates_as_mnist(tmp_path, given, epochs):
    (tmp_path / "a").mkdir()
    for i in range(200):
        (tmp_path / "a" / f"{i}.png").touch()
    args = vae.parse(["--data", str(tmp_path / "a"), "--out", str(tmp_path)])
    vars(args).update(given)
    default = common.defaults(CPU) | {"epochs": 3}
    settings, _ = common.find_run(args, tmp_path / "vae.pt", default, "")
    assert settings.epochs == epochs


SCRIPT = """
'''What it is.'''
def f(x, *, y=None):
    '''What it does.'''
    return {"a": x + 1, "b": [], None: ()}
"""


def test_the_fingerprint_is_of_the_code_alone(tmp_path):
    def of(text):
        path = tmp_path / "script.py"
        path.write_text(text, encoding="utf-8")
        return common.fingerprint(path)

    same = SCRIPT.replace("What", "How — ε —").replace("x +", "x  +  # ε\n")
    same = "# a comment\n\n\n" + same.replace("def", "'''Of f.'''\ndef")
    assert same != SCRIPT and of(same) == of(SCRIPT)
    changes = ("+ 1", "+ 2"), ("+", "-"), ("x +", "y +"), ("None:", "0:"), ('"a"', '"c"')
    changes += ("y=None", "y=0"), ("()", "[]"), ("*, ", ""), ("def", "async def")
    digests = {of(SCRIPT.replace(*change)) for change in changes} | {of(SCRIPT)}
    assert len(digests) == len(changes) + 1


@pytest.mark.skipif(os.name == "nt", reason="there are no such locks")
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(tmp_path):
    path = tmp_path / "vae.pt"
    open_run(path)
    open_run(path)  # by the same process, as in a notebook
    common._locks, ours = {}, common._locks  # by another one
    refused(lambda: open_run(path), path, "another run", "--out")
    os.symlink(tmp_path, tmp_path / "link")
    refused(lambda: open_run(tmp_path / "link" / "vae.pt"), "another run")
    open_run(tmp_path / "ddpm.pt")
    common._locks, theirs = ours, common._locks
    save(path, history=2 * HISTORY)  # the last epoch
    assert common._locks == {} and len(theirs) == 1
    open_run(path, fresh=True)


def test_what_a_killed_run_has_left_is_removed(tmp_path):
    (tmp_path / "vae.pt.123.tmp").touch()
    (tmp_path / "ddpm.pt.123.tmp").touch()
    open_run(tmp_path / "vae.pt")
    assert os.listdir(tmp_path) == ["ddpm.pt.123.tmp"]


@pytest.mark.parametrize("step", ["torch.save", "os.replace"])
@pytest.mark.parametrize("kind", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, kind):
    path = tmp_path / "vae.pt"
    save(path)
    before = path.read_bytes()

    def fail(_, target):
        if step == "torch.save":
            Path(target).write_bytes(b"half")
        raise kind("no space")

    monkeypatch.setattr(step, fail)
    end = KeyboardInterrupt if kind is KeyboardInterrupt else common.InputError
    with pytest.raises(end, match="no space"):
        save(path)
    assert os.listdir(tmp_path) == ["vae.pt"] and path.read_bytes() == before


def test_values_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    path = tmp_path / "vae.pt"
    broken = nn.Linear(2, 1)
    broken.bias.data.fill_(math.nan)
    refused(lambda: save(path, model=broken), "epoch 1", "--lr", path)
    history = [*HISTORY, {"epoch": 2, "loss": math.inf}]
    refused(lambda: save(path, history=history), "epoch 2", "--lr", path)
    monkeypatch.setattr(common, "RANK", 1)
    save(path)
    assert os.listdir(tmp_path) == []


def test_damaged_or_foreign_files_are_refused_and_their_code_is_not_run(tmp_path):
    path = tmp_path / "vae.pt"
    trap = tmp_path / "trap"
    weight = save(path).weight.detach().numpy().tobytes()
    whole = path.read_bytes()
    flipped = whole.replace(weight, weight[:9] + bytes([weight[9] ^ 1]) + weight[10:])
    for damaged in b"", whole[:100], whole[:-100], flipped:
        path.write_bytes(damaged)
        refused(lambda: common.load_checkpoint(path, "vae"), path, "damaged", "delete it")
    # If it were unpickled, it would leave a file.
    snare = type("", (), {"__reduce__": lambda _: (open, (str(trap), "w"))})()
    content = {"kind": "vae", "x": snare}
    torch.save(content, path)
    trapped = path.read_bytes()
    old = io.BytesIO()
    torch.save({"kind": "vae"}, old, _use_new_zipfile_serialization=False)
    foreign = [trapped, pickle.dumps(content, protocol=2), old.getvalue(), b"text\n"]
    for other in [1, 2], 3, {"weight": 3}, {"kind": "ddpm"}, {"kind": torch.ones(3)}, Namespace():
        torch.save(other, path)
        foreign.append(path.read_bytes())
    for each in foreign:
        path.write_bytes(each)
        words = f"{path} is not a checkpoint of vae.py"
        refused(lambda: common.load_checkpoint(path, "vae"), words)
    assert not trap.exists()
    torch.load(io.BytesIO(trapped), weights_only=False)
    assert trap.exists()


def test_each_kind_of_file_that_is_no_checkpoint_has_its_own_message(tmp_path, monkeypatch):
    path = tmp_path / "vae.pt"
    refused(lambda: common.load_checkpoint(path, "vae"), path, "no checkpoint", "train first")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    refused(lambda: common.load_checkpoint(path, "vae"), path, "pointer", "git lfs pull")
    refused(lambda: common.load_checkpoint(tmp_path, "vae"), f"cannot read {tmp_path}")

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    refused(lambda: common.load_checkpoint(path, "vae"), f"cannot read {path}", "Permission")


def test_a_loaded_model_is_ready_to_sample(tmp_path):
    trained = save(tmp_path / "vae.pt")
    path = (tmp_path / "vae.pt").rename(tmp_path / "mine.pt")
    build = lambda settings: nn.Linear(1000, settings["epochs"] - 1)  # noqa: E731
    model = common.load_model(str(path), "vae", "model", CPU, build)
    assert torch.equal(model.weight, trained.weight)
    assert model.settings == SETTINGS | {"epochs": 1}  # the run has trained 1 of its 2 epochs
    assert not model.training and not model.weight.requires_grad
    refused(lambda: common.load_model(path, "ddpm", "model", CPU, build), path, "ddpm.py")


def test_weights_that_do_not_fit_give_a_one_line_error(tmp_path):
    path = tmp_path / "vae.pt"
    save(path)

    def refuse(settings):
        raise ValueError("likelihood must be one of")

    other = lambda settings: nn.Linear(10, 1)  # noqa: E731
    deeper = lambda settings: nn.Sequential(nn.Linear(1000, 1))  # noqa: E731
    more = lambda settings: nn.Linear(settings["unknown"], 1)  # noqa: E731
    for build in other, deeper, more, refuse:
        refused(
            lambda build=build: common.load_model(path, "vae", "model", CPU, build),
            path,
            "do not fit the network of vae.py",
            "--fresh",
        )


def test_a_sample_takes_flags_of_its_own_and_a_checkpoint_from_elsewhere(tmp_path):
    path = tmp_path / "vae.pt"
    save(path)
    settings = SETTINGS | {"data": "kmnist"}
    save(tmp_path / "ddpm.pt", settings)
    build = lambda settings: nn.Linear(1000, 1)  # noqa: E731
    kinds = []

    def load(path, device):
        kinds.append(path.stem)
        return common.load_model(path, path.stem, "model", device, build)

    args = Namespace(**dict.fromkeys(SETTINGS) | {"load": None, "seed": 9, "data": "mnist"})
    args.precision = "bfloat16" if SETTINGS["precision"] == "float32" else "float32"
    assert common.load_for_sampling(args, path, load, CPU).settings == SETTINGS | {"epochs": 1}
    args.load = str(tmp_path / "ddpm.pt")
    refused(lambda: common.load_for_sampling(args, path, load, CPU), "data kmnist, not mnist")
    args.data = None
    assert common.load_for_sampling(args, path, load, CPU).settings == settings | {"epochs": 1}
    assert kinds == ["vae", "ddpm", "ddpm"]


# ---- the command line


def test_number():
    for kind in int, float:
        parse = common.number(kind, 1, 10)
        assert [parse("1"), parse("10")] == [1, 10] and isinstance(parse("2"), kind)
        for text in "0", "11", "x", "", "nan", "inf", "2.5" if kind is int else "10.1":
            with pytest.raises(ValueError):
                parse(text)


def test_places_are_expanded_and_never_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    args = common.arguments("").parse_args(["--out=~/runs", "--load=~/x.pt", "--data-dir=~"])
    assert Path(args.out) == tmp_path / "runs" and Path(args.data_dir) == tmp_path
    assert Path(args.load) == tmp_path / "x.pt"
    for text in "", " ":
        for kind in common.place, common.data:
            with pytest.raises(ArgumentTypeError, match="empty"):
                kind(text)


def test_one_folder_has_one_name(tmp_path, monkeypatch):
    (tmp_path / "pics").mkdir()
    (tmp_path / "link").symlink_to("pics")
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for text in "pics", "pics/", "./pics", tmp_path / "pics", "link", "mnist/../pics", "~/pics":
        assert common.data(str(text)) == str((tmp_path / "pics").resolve())
    assert common.data("mnist") == "mnist"  # a name wins
    (tmp_path / "file.png").touch()
    for name in "no", "file.png":
        words = (
            f"there is no folder --data {tmp_path.resolve() / name}",
            "mnist",
            "kmnist",
            "folder",
        )
        folder = common.data(name)
        refused(lambda folder=folder: open_run(tmp_path / "vae.pt", data=folder), *words)


def test_arguments(capsys):
    parser = common.arguments("What it does.\n\n  python vae.py --limit 10")
    assert "What it does.\n\n  python vae.py --limit 10" in parser.format_help()
    given = {name: value for name, value in vars(parser.parse_args([])).items() if value}
    assert given == {"data_dir": str(REPO / "data"), "out": "results", "device": "auto"}
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--seed=-1"])
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in ("--seed", "'-1'", "0 to 1000000000"))


def test_run_says_in_one_line_what_the_user_can_fix_and_leaves_bugs_alone(monkeypatch):
    def fail():
        raise error

    assert issubclass(common.InputError, Exception)  # so that users of the library can catch it
    for error in OSError("a"), RuntimeError("b"), torch.OutOfMemoryError("c"), MemoryError("d"):
        with pytest.raises(type(error), match=str(error)):
            common.run(fail)
    error = common.InputError("no\ndata:\n\n  do this")
    with pytest.raises(SystemExit, match="^error: no data: do this$"):
        common.run(fail)
    error = common.InputError(os.fsdecode(b"no caf\xe9"))
    with pytest.raises(SystemExit, match="^error: no caf\\?$"):
        common.run(fail)
    error = KeyboardInterrupt()
    monkeypatch.setattr(sys, "argv", ["vae.py", "--epochs", "3"])
    with pytest.raises(SystemExit, match="stopped: run the same command to resume"):
        common.run(fail)
    monkeypatch.setattr(sys, "argv", ["vae.py", "--sample=3"])
    with pytest.raises(SystemExit, match="^\nstopped$"):
        common.run(fail)


def test_import_changes_nothing_and_ascii_terminals_show_the_help(tmp_path):
    code = """if True:
        import runpy, socket, sys, torch
        def state():
            return torch.initial_seed(), torch.get_num_threads(), socket.getdefaulttimeout()
        before = state()
        import common
        assert state() == before
        out = sys.argv[1]
        for argv in ["vae.py", "-h"], ["ddpm.py", "-h"], ["vae.py", "--data=x", "--out", out]:
            sys.argv = argv
            try:
                runpy.run_path(argv[0], run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise"""
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, env=ascii, cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith(
        f"error: there is no folder --data {REPO}"
    )
    assert ended.stderr.count("\n") == 1 and ended.stdout.count("show this help") == 2
