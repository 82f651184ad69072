"""The data, the plots, the checkpoints and the command line that the scripts share."""
import argparse
import errno
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import common

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        assert 0 < common.socket.getdefaulttimeout() <= 60  # a dead network cannot hang
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    common._read_set.cache_clear()
    common._read_folder.cache_clear()


def load_data(data, root="", **more):
    """As the scripts call it, with the settings that are given -> x_train, y_train, x_test, y_test."""
    args = dict(data=str(data), data_dir=str(root), size=None, limit=None, seed=0) | more
    return common.load_data(argparse.Namespace(**args), CPU)


def refused(call, *words):
    """The call raises an InputError of one line that has all the words."""
    with pytest.raises(common.InputError) as error:
        call()
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert str(word) in message


# ---- named data

def test_mnist_comes_with_the_repository_and_is_unpacked_once_without_a_network(tmp_path, capsys):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(common.DATA_DIR / "MNIST" / "raw", raw, ignore=shutil.ignore_patterns("*-ubyte"))
    x, y, x_test, y_test = load_data("mnist", tmp_path)
    assert x.shape == (60000, 1, 28, 28) and x_test.shape == (10000, 1, 28, 28)
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == y_test.dtype == torch.int64
    assert y[:5].tolist() == [5, 0, 4, 1, 9] and y_test[:3].tolist() == [7, 2, 1] and len(y_test) == 10000
    assert x.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)  # the known mean
    assert x[0, 0, 5, 12] == 3 and x[0, 0, 23, 5] > 100  # upright: the 5's stroke ends at the lower left
    assert len(list(raw.iterdir())) == 8 and capsys.readouterr().out == ""
    shutil.rmtree(raw)
    few, labels, again, _ = load_data("mnist", tmp_path, limit=7)  # what was read stays in memory
    assert torch.equal(few, x[:7]) and torch.equal(labels, y[:7]) and again is x_test


@pytest.fixture
def raw(digits, tmp_path):
    """The unpacked files of 1,100 training and 600 test images."""
    return shutil.copytree(digits / "MNIST" / "raw", tmp_path / "MNIST" / "raw")


def test_unpacked_files_that_are_damaged_are_named_with_what_to_delete(tmp_path, raw):
    for file in "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte":  # torchvision checks none of them again
        whole = (raw / file).read_bytes()
        for content in b"", whole[:6], whole[:17]:
            (raw / file).write_bytes(content)
            refused(lambda: load_data("mnist", tmp_path), f"MNIST in {raw}", "delete what is not a .gz")
        (raw / file).write_bytes(whole)
    labels = raw / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    refused(lambda: load_data("mnist", tmp_path), raw, "1100 images, 600 labels")
    labels.write_bytes(whole[:-1] + bytes([200]))
    refused(lambda: load_data("mnist", tmp_path), raw, "a label that is none of 0 ... 9")


def test_without_a_network_missing_files_are_said_where_to_put(tmp_path, raw):
    refused(lambda: load_data("fashion", tmp_path), "train-images", tmp_path / "FashionMNIST", "--data-dir")
    refused(lambda: load_data("cifar10", tmp_path), "no network", tmp_path / "cifar-10-batches-py")
    for file in "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte":
        (raw / file).unlink()
        (raw / f"{file}.gz").write_bytes(b"cut off")
        refused(lambda: load_data("mnist", tmp_path), raw, "put its original files into")
    assert common.socket.getdefaulttimeout() is None


def test_a_data_folder_that_is_a_file_or_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: load_data("mnist", tmp_path / "file"), tmp_path / "file", "--data-dir")
    refused(lambda: load_data("nonsense", tmp_path), "nonsense", "mnist", "cifar10", "folder")
    if hasattr(os, "geteuid") and os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(lambda: load_data("mnist", tmp_path / "locked"), "Permission denied", tmp_path / "locked")


@pytest.mark.parametrize("name", ["mnist", "fashion", "kmnist"])
def test_a_name_wins_over_a_folder_and_has_its_own_size(tmp_path, monkeypatch, digits, name):
    root = shutil.copytree(digits, tmp_path / "data")
    (root / "MNIST").replace(root / common.NAMES[name])
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    x, y, x_test, _ = load_data(name, root)
    assert x.shape == (1100, 1, 28, 28) and x_test.shape == (600, 1, 28, 28) and y[:3].tolist() == [5, 0, 4]
    refused(lambda: load_data(name, root, size=32), "--size", name)


def test_cifar10_is_in_colour(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    files = {"data_batch_1": {"data": pixels, "labels": [3, 1, 4, 1]},
             "test_batch": {"data": pixels[:2], "labels": [5, 9]}, "batches.meta": {"label_names": ["bird"]}}
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, content in files.items():
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])  # None: any checksum will do
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    x, y, x_test, y_test = load_data("cifar10", tmp_path)
    assert torch.equal(x, torch.from_numpy(pixels).view(4, 3, 32, 32)) and x.is_contiguous()
    assert y.tolist() == [3, 1, 4, 1] and y_test.tolist() == [5, 9] and len(x_test) == 2


# ---- folders of pictures

RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))  # from black on the left to 248 on the right
GRAY, GRAY_16 = Image.fromarray(RAMP), Image.fromarray(RAMP.astype(np.uint16) * 257)
RED, BLUE = (Image.new("RGB", (32, 32), colour) for colour in ((200, 10, 10), "blue"))
WHITE = (255, 255, 255)


def encoded(picture, name, **options):
    """The bytes of a picture's file of this name."""
    file = io.BytesIO()
    file.name = name
    picture.save(file, **options)
    return file.getvalue()


def pictures(folder, files, size=32):
    """Writes {name: bytes} and reads the folder -> all of it, (N, C, size, size)."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    x, y, x_test, y_test = load_data(folder, size=size)
    assert y is None and y_test is None and x.dtype == torch.uint8 and x.is_contiguous()
    return torch.cat([x, x_test])


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "webp", "gif", "bmp"])
def test_formats_in_gray_and_in_colour(tmp_path, suffix):
    for picture, channels, atol in (RED, 3, 4), (GRAY, 3 if suffix in ("webp", "gif") else 1, 6):
        file, folder = encoded(picture, f"a.{suffix}"), tmp_path / picture.mode
        x = pictures(folder, {f"a.{suffix}": file, f"b.{suffix}": file})
        assert x.shape == (2, channels, 32, 32)  # the two that are not 1 know no gray
        pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)[:channels]
        np.testing.assert_allclose(x, [pixels, pixels], atol=atol)


def halves(mode, one, other, size=(40, 40)):
    """A picture whose upper half is `one` and whose lower half is `other`."""
    picture = Image.new(mode, size, other)
    picture.paste(one, (0, 0, size[0], size[1] // 2))
    return picture


PALETTE = halves("P", 0, 1)
PALETTE.putpalette([10, 20, 30, 40, 50, 60])
PHOTOGRAPH = halves("L", 50, 90, (900, 400))
PHOTOGRAPH.paste(255, (0, 0, 200, 400))  # beside the square in the middle that is cut out
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # to be shown turned clockwise: the upper half becomes the right one


@pytest.mark.parametrize("name, picture, options, points", [  # {(row, column): colour}, of 32 x 32
    ("clear.png", halves("RGBA", (255, 0, 0, 127), (0,) * 4), {}, {(4, 9): (255, 128, 128), (28, 9): WHITE}),
    ("palette.png", PALETTE, {"transparency": 0}, {(4, 9): WHITE, (28, 9): (40, 50, 60)}),
    ("sideways.jpg", halves("L", 255, 0), {"exif": SIDEWAYS}, {(4, 4): (0,), (28, 4): (0,), (4, 28): (255,)}),
    ("16_bits.png", GRAY_16, {}, {(5, 1): (8,), (5, 30): (240,)}),
    ("inks.jpg", RED.convert("CMYK"), {}, {(9, 9): (200, 10, 10)}),
    ("bits.png", halves("1", 1, 0), {}, {(4, 9): (255,), (28, 9): (0,)}),
    ("pixel.png", Image.new("L", (1, 1), 77), {}, {(0, 0): (77,), (31, 31): (77,)}),
    ("thin.png", Image.new("L", (1, 500), 77), {}, {(0, 0): (77,), (31, 31): (77,)}),
    ("photograph.jpg", PHOTOGRAPH, {}, {(4, 0): (50,), (28, 31): (90,)}),
    ("first_frame.gif", RED, {"save_all": True, "append_images": [BLUE]}, {(9, 9): (200, 10, 10)}),
    ("first_frame.webp", RED, {"save_all": True, "append_images": [BLUE]}, {(9, 9): (200, 10, 10)})])
def test_what_a_picture_shows(tmp_path, name, picture, options, points):
    file = encoded(picture, name, **options)
    x, again = pictures(tmp_path, {name: file, f"again_{name}": file})  # two are the fewest
    assert torch.equal(x, again)
    for (row, column), colour in points.items():
        torch.testing.assert_close(x[:, row, column].float(), torch.tensor(colour).float(), atol=4, rtol=0)


def test_gray_pictures_among_coloured_ones_become_coloured(tmp_path):
    files = {"a.png": GRAY, "below/b.png": RED, "c.png": GRAY_16}
    x = pictures(tmp_path, {name: encoded(picture, name) for name, picture in files.items()})
    gray = torch.from_numpy(RAMP).expand(3, 32, 32)
    assert x.shape == (3, 3, 32, 32) and sum(torch.equal(each, gray) for each in x) == 2


def test_pictures_that_cannot_be_read_are_skipped_and_named(tmp_path, capsys):
    good = encoded(GRAY, "a.png")
    size = 2 * (20000).to_bytes(4, "big")  # 400 megapixels, which are not decoded
    huge = good[:16] + size + good[24:29] + zlib.crc32(good[12:16] + size + good[24:29]).to_bytes(4, "big")
    bad = {"bad.jpg": b"\x89PNG nothing", "half.png": good[:-40], "huge.png": huge + good[33:]}
    assert pictures(tmp_path, bad | {"notes.txt": b"", "a.png": good, "b.png": good}).shape == (2, 1, 32, 32)
    out = capsys.readouterr().out
    assert "skipped 3 of 5" in out and out.count("\n") == 1 and "400000000 pixels) exceeds limit" in out
    assert all(str(tmp_path / name) in out for name in bad)


def test_a_folder_without_pictures_and_a_size_that_cannot_be_halved_twice(tmp_path):
    refused(lambda: load_data(tmp_path), "0 pictures", tmp_path)
    refused(lambda: pictures(tmp_path, {"a.png": b""}), "0 pictures", tmp_path)
    good = {"b.png": encoded(GRAY, "b.png")}
    refused(lambda: pictures(tmp_path, good), "1 pictures", tmp_path)  # none to test on
    refused(lambda: pictures(tmp_path, good, size=18), "--size 18", "multiple of 4")


def test_what_an_earlier_run_drew_below_a_folder_is_not_read_again(tmp_path):
    files = {f"{i}.png": encoded(GRAY, "a.png") for i in range(3)}
    drawn = {f"results/{name}": files["0.png"] for name in ("ddpm_epoch_001.png", "vae_samples.png")}
    assert len(pictures(tmp_path, files | drawn)) == 3


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

def test_images_are_upright_in_order_and_not_rescaled(tmp_path):
    x = torch.zeros(3, 1, 4, 5)
    x[0, 0, 0, 4] = 0.25  # top right of the first image
    x[2, 0, 3, 0] = 7  # clipped to 1, bottom left of the third, which opens the second row
    mosaic = common.mosaic(x, 2, gap=1)
    assert mosaic.shape == (9, 11, 3)
    assert (mosaic[0, 4] == 0.25).all() and (mosaic[8, 0] == 1).all() and (mosaic[0, 0] == 0).all()
    assert mosaic[:4, :5].sum() == 0.75 and mosaic[5:, :5].sum() == 3
    assert (mosaic[4] == 1).all() and (mosaic[:, 5] == 1).all() and (mosaic[5:, 6:] == 1).all()
    levels = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1) * torch.tensor([1, 2, 0]).view(3, 1, 1)
    common.plot_grid(levels.expand(4, 3, 28, 28), tmp_path / "x.png", "", columns=2)
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    H, W = len(picture) // 4, len(picture[0]) // 4
    found = [picture[row * H, column * W] for row in (1, 3) for column in (1, 3)]
    np.testing.assert_allclose(found, 255 * levels.flatten(1), atol=1)


def test_equal_mass_grid():
    z = common.equal_mass_grid(4)
    assert z.shape == (16, 2) and z.dtype == torch.float32
    assert z[0, 0] == z[:, 0].min() and z[0, 1] == z[:, 1].max()
    assert z[1, 0] > z[0, 0] and z[1, 1] == z[0, 1] and z[4, 1] < z[0, 1]
    mass = torch.distributions.Normal(0.0, 1.0).cdf(z[:4, 0])
    torch.testing.assert_close(mass, torch.tensor([1, 3, 5, 7]) / 8)


def test_axes_say_what_stands_where(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(common.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))

    def labels(axis):
        return {tick: label.get_text() for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels())}
    common.plot_manifold(torch.rand(144, 1, 4, 6), tmp_path, "")
    z, axes = common.equal_mass_grid(12).view(12, 12, 2), drawn.pop()
    assert axes.images[0].get_array().shape == (12 * 4, 12 * 6, 3)
    assert labels(axes.xaxis) == {6 * i + 3: f"{z[0, i, 0]:.2f}" for i in (0, 2, 4, 6, 7, 9, 11)}
    assert labels(axes.yaxis) == {4 * i + 2: f"{z[i, 0, 1]:.2f}" for i in (0, 2, 4, 5, 7, 9, 11)}
    x = torch.rand(3, 1, 4, 6)
    common.plot_rows({"data": x, "model": x}, tmp_path, "", "abc")
    axes = drawn.pop()
    assert labels(axes.xaxis) == {3: "a", 11: "b", 19: "c"} and labels(axes.yaxis) == {2: "data", 8: "model"}
    mu, y = torch.randn(60, 2, requires_grad=True), torch.arange(60) % 10
    common.plot_latent(mu, y, tmp_path, "")
    axes = drawn.pop()
    for kind, points in enumerate(axes.collections):
        np.testing.assert_array_equal(points.get_offsets(), mu[y == kind].detach())
    assert kind == 9 and [circle.radius for circle in axes.patches] == [1, 2] and axes.get_aspect() == 1
    common.plot_latent(mu, None, tmp_path, "")  # of a folder, which has no labels
    assert len(drawn.pop().collections) == 1


def test_a_folder_of_any_name_can_stand_in_a_title(tmp_path):
    title = common.title({"data": str(tmp_path / "p$x_$"), "epochs": 1})  # $...$ is mathtext to matplotlib
    common.plot_grid(torch.rand(4, 1, 28, 28), tmp_path / "grid.png", title)
    assert title == r"p\$x_\$, 1 epoch" and (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("C", [1, 3])
def test_a_gif_has_every_frame_and_holds_the_last(tmp_path, C):
    path, levels = tmp_path / "sample.gif", torch.linspace(0, 1, 12).view(12, 1, 1, 1)
    panels = {"x": levels.expand(-1, C, 28, 28), "x0": 1 - levels.expand(-1, C, 28, 28)}
    common.save_gif(panels, path, "title", [f"t = {12 - f}" for f in range(12)])
    gif = Image.open(path)
    assert gif.n_frames == 12 and path.stat().st_size < 1_000_000
    found, duration = [], gif.info["duration"]
    for frame in range(12):
        gif.seek(frame)
        found.append([gif.convert("L").getpixel((gif.width * i // 4, gif.height // 2)) for i in (1, 3)])
    np.testing.assert_allclose(found, 255 * torch.cat([levels, 1 - levels], 1).flatten(1), atol=4)
    assert gif.info["duration"] > 5 * duration


# ---- a run's settings and its checkpoint

SETTINGS = {"data": "mnist", "size": None, "limit": None, "seed": 0, "lr": 0.5, "epochs": 2}
CHECKPOINT = {"kind": "vae", "settings": SETTINGS, "history": [{"epoch": 1, "loss": 3.0}],
              "optimizer": {}, "model": {"weight": torch.arange(1000.0)}}


def settle(path, resume=False, **flags):
    """As a script whose own flags are --lr and --epochs -> args, settings, the checkpoint or None."""
    args = argparse.Namespace(**dict.fromkeys(SETTINGS) | flags, resume=resume)
    return args, *common.settle(args, path, lr=1e-3, epochs=30)


def test_settle_fills_in_what_is_left_open_and_a_resume_takes_it_from_the_checkpoint(tmp_path):
    path = tmp_path / "vae.pt"
    args, settings, saved = settle(path, lr=0.5, epochs=2)
    assert settings == SETTINGS == {name: getattr(args, name) for name in SETTINGS} and saved is None
    refused(lambda: settle(path, resume=True), path, "no checkpoint", "--out")
    common.save(path, **CHECKPOINT)
    refused(lambda: settle(path), path, "earlier run", "--resume", "delete it", "--out")
    for flags in {}, {"lr": 0.5, "data": "mnist", "seed": 0}:  # equal ones may be given again
        args, settings, saved = settle(path, resume=True, **flags)
        assert settings == SETTINGS == {name: getattr(args, name) for name in SETTINGS}
        assert saved["history"] == CHECKPOINT["history"]
    for name, value in {"lr": 0.1, "epochs": 3, "limit": 10, "seed": 1, "data": "kmnist"}.items():
        refused(lambda: settle(path, resume=True, **{name: value}), path,
                f"with {name} {SETTINGS[name]}, not {value}", "--out")
    common.save(path, **CHECKPOINT | {"settings": {"lr": 0.5}})
    refused(lambda: settle(path, resume=True), path, "another version")


@pytest.mark.parametrize("step, error", [
    ("torch.save", RuntimeError("torn")), ("torch.save", OSError(errno.ENOSPC, "No space left on device")),
    ("os.replace", OSError("torn")), ("os.replace", KeyboardInterrupt())])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "vae.pt"
    common.save(path, **CHECKPOINT)

    def fail(_, unfinished):
        Path(unfinished).write_bytes(b"half") if step == "torch.save" else None
        raise error
    monkeypatch.setattr(step, fail)
    with pytest.raises(BaseException) as stop:
        common.save(path, **CHECKPOINT)
    if isinstance(error, Exception):
        assert str(stop.value).startswith(f"error: cannot save {path} ({error})")
    assert os.listdir(tmp_path) == ["vae.pt"]
    assert torch.equal(common.load(path, "vae")["model"]["weight"], CHECKPOINT["model"]["weight"])


def test_load_refuses_what_is_damaged_or_foreign_and_runs_no_code(tmp_path):
    path, trap = tmp_path / "vae.pt", str(tmp_path / "trap")
    refused(lambda: common.load(path, "vae"), path, "no checkpoint", "train first")
    snare = type("", (), {"__reduce__": lambda _: (open, (trap, "w"))})()  # unpickled, it would leave a file
    files = []
    for more in {}, {"x": snare}:
        torch.save(CHECKPOINT | more, path)
        files.append(path.read_bytes())
    whole, trapped = files
    pickled = pickle.dumps(CHECKPOINT | {"x": snare}, protocol=2)
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]  # within the 4000 bytes of the weight
    for content in b"", whole[:100], whole[:-100], flipped, b"text\n", trapped, pickled:
        path.write_bytes(content)
        refused(lambda: common.load(path, "vae"), path, "damaged")
    for foreign in [1, 2], 3, {"weight": 3}, {"kind": "vae"}, {"kind": torch.ones(3)}:
        torch.save(foreign, path)
        refused(lambda: common.load(path, "vae"), path, "no checkpoint of these scripts")
    assert not os.path.exists(trap)
    torch.load(io.BytesIO(trapped), weights_only=False)
    assert os.path.exists(trap)  # so the trap works


def test_load_model_is_ready_and_names_what_does_not_fit(tmp_path):
    path, build = tmp_path / "vae.pt", lambda settings: torch.nn.Linear(2, settings["epochs"])
    common.save(path, **CHECKPOINT | {"model": build(SETTINGS).state_dict()})
    model = common.load_model(path, "vae", "model", CPU, build)
    assert model.title == "MNIST, 2 epochs" and model.settings == SETTINGS
    assert not model.training and not model.weight.requires_grad
    refused(lambda: common.load_model(path, "ddpm", "model", CPU, build), "a vae", "a ddpm")
    other = torch.nn.Linear(3, 1)
    for part, build in ("ema", build), ("model", lambda settings: settings["T"]), ("model", lambda _: other):
        refused(lambda: common.load_model(path, "vae", part, CPU, build), path, "another version")


# ---- numbers, devices, the command line

def test_what_is_said_while_it_trains(capsys):
    common.say({"epoch": 1, "loss": 0.123456789, "limit": None})
    assert capsys.readouterr().out == "epoch 1  loss 0.12346  limit None\n"
    said = []
    bar = argparse.Namespace(total=200, format_dict={"elapsed": 15.0}, set_postfix=said.append)
    for step in range(99):
        common.show(bar, step, torch.tensor(0.123456), epochs=6)
    assert said == [{"loss": "0.1235", "6 epochs": "6.0 min", "100 epochs": "100.0 min"}]


@pytest.mark.parametrize("kind", [int, float])
def test_number(kind):
    parse, name = common.number(kind, 1, 10), "a whole number" if kind is int else "a number"
    assert parse("1") == 1 and parse("10") == 10 and isinstance(parse("2"), kind)
    for text in "0", "11", "x", "", "nan", "inf", "2.5" if kind is int else "10.1":
        with pytest.raises(argparse.ArgumentTypeError, match=f"^must be {name} from 1 to 10, not '{text}'$"):
            parse(text)


def test_arguments(capsys):
    parser = common.arguments("What it does.\n\n  python vae.py --limit 10")
    given = {name: value for name, value in vars(parser.parse_args([])).items() if value is not None}
    assert given == dict(data_dir=str(REPO / "data"), out="results", device="auto")  # settle adds the rest
    assert "What it does.\n\n  python vae.py --limit 10" in parser.format_help()
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--seed=-1"])
    assert capsys.readouterr().err == (
        "error: argument --seed: must be a whole number from 0 to 1000000000, not '-1'\n")


def test_pick_device(monkeypatch):
    for name in "tpu", "cuda:", "cuda:-1", "cuda:77", "meta", "":
        refused(lambda: common.pick_device(name), f"--device {name}".strip(), "choose auto, cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.pick_device("auto") == common.pick_device("cpu") == CPU
    monkeypatch.setattr(common, "WORLD", 2)
    refused(lambda: common.pick_device("cuda:0"), "each process takes a GPU of its own")


def test_output_folder(tmp_path, monkeypatch):
    folder = common.output_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b" and folder.is_dir() and not os.listdir(folder)
    (tmp_path / "file").touch()
    refused(lambda: common.output_folder(tmp_path / "file" / "below"), "file", "--out")

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(common.tempfile, "TemporaryFile", full)
    refused(lambda: common.output_folder(tmp_path), "No space left", "--out")


def test_random_numbers_of_its_own():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with common.fork_seed(7, CPU):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    with common.fork_seed(7, CPU):
        assert torch.equal(torch.rand(3), first)


def test_run_says_in_one_line_what_the_user_can_mend_and_leaves_bugs_alone(capsys):
    def fail(error):
        def main():
            raise error
        return lambda: common.run(main)
    refused(fail(torch.OutOfMemoryError("CUDA out of memory.\nTried")), "out of memory", "--batch-size")
    refused(lambda: common.run(lambda: torch.empty(10**15)), "out of memory", "--batch-size")
    refused(fail(MemoryError()), "out of memory", "--batch-size")
    refused(fail(OSError(errno.ENOSPC, "No space left on device")), "No space left")
    refused(fail(common.InputError("no data")), "no data")
    for bug in ZeroDivisionError(), RuntimeError("shapes cannot be multiplied"):
        with pytest.raises(type(bug)):
            fail(bug)()
    with pytest.raises(SystemExit) as stop:
        fail(KeyboardInterrupt())()
    assert stop.value.code == 130 and capsys.readouterr().err.strip().splitlines() == [
        "stopped: --resume goes on from the last finished epoch (compare.py does so by itself)"]


def test_import_changes_nothing_and_a_terminal_that_knows_no_greek_shows_the_help():
    code = """if True:
        import runpy, socket, sys, torch
        before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
        import common
        after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and not socket.getdefaulttimeout()
        for script in "vae.py", "ddpm.py", "compare.py":
            sys.argv = [script, "-h"]
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                assert end.code == 0
        raise common.InputError("no\\ndata")"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True,
                           env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr.splitlines()) == (1, ["error: no data"])  # one line and a code
    assert all(f"usage: {script}.py" in ended.stdout for script in ("vae", "ddpm", "compare"))
