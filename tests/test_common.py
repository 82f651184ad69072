"""common.py: the data, the plots, devices and processes, the checkpoint, the command line."""

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
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.testing import assert_close

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


def load_data(data, root="", size=32, limit=None, seed=0):
    """As the scripts call it -> x_train, y_train, x_test, y_test."""
    args = Namespace(data=str(data), data_dir=str(root), size=size, limit=limit, seed=seed)
    return common.load_data(args, CPU)


def refused(call, *words):
    """The call raises an InputError that has all the words."""
    with pytest.raises(common.InputError) as error:
        call()
    for word in words:
        assert str(word) in str(error.value)


# ---- named data


def test_mnist_comes_with_the_repository_and_is_unpacked_once(tmp_path, capsys):
    raw = tmp_path / "MNIST" / "raw"
    packed = common.DATA_DIR / "MNIST" / "raw"
    shutil.copytree(packed, raw, ignore=shutil.ignore_patterns("*-ubyte"))
    x, y, x_test, y_test = load_data("mnist", tmp_path)
    assert x.shape == (60000, 1, 28, 28) and x_test.shape == (10000, 1, 28, 28)
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == torch.int64
    assert y[:5].tolist() == [5, 0, 4, 1, 9] and y_test[:3].tolist() == [7, 2, 1]
    assert x.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)  # the known mean
    assert x[0, 0, 5, 12] == 3 and x[0, 0, 23, 5] > 100  # upright: a 5 ends at the lower left
    assert len(os.listdir(raw)) == 8 and capsys.readouterr().out == ""
    shutil.rmtree(raw)
    few, labels, again, _ = load_data("mnist", tmp_path, limit=7)
    assert torch.equal(few, x[:7]) and torch.equal(labels, y[:7]) and again is x_test


@pytest.fixture
def raw(digits, tmp_path):
    """The unpacked files of 1,100 training and 600 test images."""
    return shutil.copytree(digits / "MNIST" / "raw", tmp_path / "MNIST" / "raw")


def test_damaged_files_are_refused_with_their_folder(tmp_path, raw):
    for file in "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte":
        whole = (raw / file).read_bytes()
        for content in b"", whole[:6], whole[:17]:
            (raw / file).write_bytes(content)
            refused(lambda: load_data("mnist", tmp_path), raw, "original files")
        (raw / file).write_bytes(whole)
    (raw / file).write_bytes(whole[:-1] + b"\n")
    refused(lambda: load_data("mnist", tmp_path), raw, "labels above 9")
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")  # 600 for 1,100
    refused(lambda: load_data("mnist", tmp_path), raw, "original files")


def test_without_a_network_missing_files_are_said_where_to_put(tmp_path, raw):
    refused(lambda: load_data("fashion", tmp_path), "train-images", tmp_path / "FashionMNIST")
    (raw / "t10k-labels-idx1-ubyte").unlink()
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut off")
    refused(lambda: load_data("mnist", tmp_path), raw, "original files")
    assert common.socket.getdefaulttimeout() is None
    refused(lambda: load_data("nonsense", tmp_path), "nonsense", "mnist", "kmnist", "folder")
    (tmp_path / "file").touch()
    refused(lambda: load_data("mnist", tmp_path / "file"), tmp_path / "file")


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
    """The bytes of a picture's file of this name."""
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


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "webp", "gif", "bmp"])
def test_formats(tmp_path, suffix):
    for picture in RED, GRAY:
        file = encoded(picture, f"a.{suffix}")
        x = pictures(tmp_path / picture.mode, {f"a.{suffix}": file, f"b.{suffix}": file})
        pixels = np.moveaxis(np.array(picture.convert("RGB")), 2, 0)[: x.shape[1]]
        np.testing.assert_allclose(x, [pixels, pixels], atol=6)
        assert (x.shape[1] == 1) == (picture is GRAY and suffix != "webp")  # nearly gray


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
TURNED[0x0112] = 8  # to be shown turned: the upper half on the left
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
    x, _ = pictures(tmp_path, {name: file, f"below/{name}": file})  # two are the fewest
    assert x[:, 1, 30].tolist() == pytest.approx(upper_right, abs=4)
    assert x[:, 30, 1].tolist() == pytest.approx(lower_left, abs=4)


def test_gray_pictures_among_coloured_ones_become_coloured(tmp_path):
    GRAY_16.save(tmp_path / "a.png")
    RED.save(tmp_path / "b.png")
    x = pictures(tmp_path, {})
    gray = torch.from_numpy(RAMP).expand(3, 32, 32)
    assert x.shape == (2, 3, 32, 32) and sum(torch.equal(each, gray) for each in x) == 1


def test_pictures_that_cannot_be_read_are_skipped_and_named(tmp_path, capsys):
    good = encoded(GRAY, "a.png")
    size = 2 * (20000).to_bytes(4, "big")  # 400 megapixels, which are not decoded
    checksum = zlib.crc32(good[12:16] + size + good[24:29]).to_bytes(4, "big")
    huge = good[:16] + size + good[24:29] + checksum + good[33:]
    bad = {"bad.jpg": b"\x89PNG nothing", "half.png": good[:-40], "huge.png": huge}
    other = {"notes.txt": b"", "own/ddpm_samples.png": good, "own/vae_latent.png": good}
    x = pictures(tmp_path, bad | other | {"a.png": good, "b.png": good})
    assert x.shape == (2, 1, 32, 32)
    out = capsys.readouterr().out
    assert "skipped 3 of 5" in out and out.count("\n") == 1 and "400000000 pixels" in out
    assert all(str(tmp_path / name) in out for name in bad)


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
    common.plot_latent(mu, None, "", "")  # of a folder, which has no labels
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


# ---- what functions are given


def test_a_wrong_value_is_named_with_what_is_possible():
    common.check_choice("colour", "red", ("red", "blue"))
    with pytest.raises(ValueError, match="colour .*red, blue.*'green'"):
        common.check_choice("colour", "green", ("red", "blue"))
    common.check_range("eta", 0, 0, 1)
    common.check_range("eta", 1, 0, 1)
    for value in -0.5, 1.5, math.nan:
        with pytest.raises(ValueError, match=f"eta .*0 .*1.*{value}"):
            common.check_range("eta", value, 0, 1)


# ---- devices, processes, random numbers


def test_pick_device_picks_a_device_and_nothing_else(tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr(torch.distributed, "init_process_group", groups.append)
    monkeypatch.setattr(common, "WORLD", 2)
    can_flush = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    assert common.pick_device("cpu") == CPU
    assert torch.tensor(1e-30) * 1e-10 > 0 and groups == []
    args = Namespace(out=str(tmp_path / "a" / "b"), device="cpu")
    assert common.start(args) == CPU  # which does both
    assert (torch.tensor(1e-30) * 1e-10 == 0) == can_flush and groups == ["gloo"]
    assert os.listdir(args.out) == []


def test_devices_that_are_not_there(monkeypatch):
    for name in "tpu", "cuda:", "cuda:-1", "cuda:77", "":
        refused(lambda name=name: common.pick_device(name), f"--device {name}".strip(), "cpu")
    monkeypatch.setattr(common, "LOCAL_RANK", 77)  # each process takes a GPU of its own
    refused(lambda: common.pick_device("cuda"), "cuda:77")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(lambda: common.pick_device("auto"), "cuda:77")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.pick_device("auto") == CPU


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    args = Namespace(out=str(tmp_path / "file" / "below"), device="cpu")
    refused(lambda: common.start(args), "file", "--out")

    def full(**_):
        raise OSError("No space left")

    monkeypatch.setattr(common.tempfile, "TemporaryFile", full)
    args.out = str(tmp_path)
    refused(lambda: common.start(args), "No space left", "--out")


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


# ---- the same command goes on: a run's settings and its checkpoint

SETTINGS = {**common.DEFAULTS, "lr": 0.5, "epochs": 2}  # of a script with --lr and --epochs
HISTORY = [{"epoch": 1, "loss": 3.0}]


def open_run(path, sample=None, **given):
    args = Namespace(**dict.fromkeys(SETTINGS) | given, sample=sample)
    settings, saved = common.open_run(args, path, SETTINGS)
    assert settings == {name: getattr(args, name) for name in settings}
    return settings, saved


def save(path, settings=SETTINGS, history=HISTORY, **parts):
    model = nn.Linear(1000, 1)
    common.save_checkpoint(path, settings, history, **{"model": model, **parts})
    return model


def test_a_new_run_has_the_defaults_and_what_is_given(tmp_path):
    path = tmp_path / "vae.pt"
    assert common.DEFAULTS == {"data": "mnist", "size": 32, "limit": None, "seed": 0}
    assert open_run(path, lr=0.1, limit=7) == (SETTINGS | {"lr": 0.1, "limit": 7}, None)
    refused(lambda: open_run(path, sample=3), path, "no checkpoint", "--out")


def test_a_run_that_goes_on_has_the_settings_of_its_checkpoint(tmp_path):
    path = tmp_path / "vae.pt"
    kept = SETTINGS | {"lr": 0.25, "seed": 3, "shape": [1, 28, 28]}
    save(path, kept)
    for given in {}, {"lr": 0.25, "data": "mnist"}, {"sample": 5}:
        settings, saved = open_run(path, **given)
        assert settings == kept == saved["settings"] and saved["history"] == HISTORY
    for name, value in ("lr", 0.5), ("epochs", 3), ("limit", 10), ("seed", 0), ("data", "kmnist"):
        for sample in None, 5:
            with pytest.raises(common.InputError, match=f"{name} {kept[name]}.*{value}"):
                open_run(path, sample, **{name: value})


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


def test_what_is_not_finite_and_other_processes_are_not_saved(tmp_path, monkeypatch):
    path = tmp_path / "vae.pt"
    broken = nn.Linear(2, 1)
    broken.bias.data.fill_(math.nan)
    refused(lambda: save(path, model=broken), "epoch 1", "--lr", path)
    history = [*HISTORY, {"epoch": 2, "loss": math.inf}]
    refused(lambda: save(path, history=history), "epoch 2", "--lr", path)
    monkeypatch.setattr(common, "RANK", 1)
    save(path)
    assert os.listdir(tmp_path) == []


def test_what_is_damaged_or_foreign_is_refused_and_its_code_not_run(tmp_path):
    path = tmp_path / "vae.pt"
    trap = tmp_path / "trap"
    weight = save(path).weight.detach().numpy().tobytes()
    whole = path.read_bytes()
    # unpickled, it would leave a file
    snare = type("", (), {"__reduce__": lambda _: (open, (str(trap), "w"))})()
    content = common.load_checkpoint(path, "vae") | {"x": snare}
    torch.save(content, path)
    trapped = path.read_bytes()
    pickled = pickle.dumps(content, protocol=2)
    flipped = whole.replace(weight, weight[:9] + bytes([weight[9] ^ 1]) + weight[10:])
    for damaged in b"", whole[:100], whole[:-100], flipped, b"text\n", trapped, pickled:
        path.write_bytes(damaged)
        refused(lambda: common.load_checkpoint(path, "vae"), path, "damaged")
    for foreign in [1, 2], 3, {"weight": 3}, {"kind": "ddpm"}, {"kind": torch.ones(3)}:
        torch.save(foreign, path)
        refused(lambda: common.load_checkpoint(path, "vae"), path)
    assert not trap.exists()
    torch.load(io.BytesIO(trapped), weights_only=False)
    assert trap.exists()


def test_load_model_is_ready(tmp_path):
    trained = save(tmp_path / "vae.pt")
    path = (tmp_path / "vae.pt").rename(tmp_path / "mine.pt")
    build = lambda settings: nn.Linear(1000, settings["epochs"] - 1)  # noqa: E731
    model = common.load_model(str(path), "vae", "model", CPU, build)
    assert torch.equal(model.weight, trained.weight)
    assert model.title == "MNIST, 2 epochs" and model.settings == SETTINGS
    # a $ would begin a formula
    assert common.title({"data": "my/$cats", "epochs": 3}) == r"\$cats, 3 epochs"
    assert not model.training and not model.weight.requires_grad
    refused(lambda: common.load_model(path, "ddpm", "model", CPU, build), path, "vae", "ddpm")


# ---- the command line


def test_number():
    for kind in int, float:
        parse = common.number(kind, 1, 10)
        assert [parse("1"), parse("10")] == [1, 10] and isinstance(parse("2"), kind)
        for text in "0", "11", "x", "", "nan", "inf", "2.5" if kind is int else "10.1":
            with pytest.raises(ValueError):
                parse(text)


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


def test_run_says_in_one_line_what_the_user_can_mend_and_leaves_bugs_alone():
    def fail():
        raise error

    assert issubclass(common.InputError, Exception)  # which a library's user catches
    for error in OSError("a"), RuntimeError("b"), torch.OutOfMemoryError("c"), MemoryError("d"):
        with pytest.raises(type(error), match=str(error)):
            common.run(fail)
    error = common.InputError("no\ndata:\n\n  do this")
    with pytest.raises(SystemExit, match="^error: no data: do this$"):
        common.run(fail)
    error = KeyboardInterrupt()
    with pytest.raises(SystemExit, match="stopped: the same command goes on"):
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
    assert ended.returncode == 1 and ended.stderr.startswith("error: no --data x")
    assert ended.stderr.count("\n") == 1 and ended.stdout.count("show this help") == 2
