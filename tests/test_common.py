import argparse
import errno
import io
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST

import common

REPO = Path(__file__).resolve().parent.parent
MNIST_ROOTS = [Path(p) for p in (os.environ.get("DATA_DIR"), REPO.parent / "shared" / "data") if p]
MNIST_ROOT = next((root for root in MNIST_ROOTS if (root / "MNIST" / "raw").is_dir()), None)
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = common.MNIST_SHAPES


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def download(self):
        raise RuntimeError("Error downloading:\nno network")
    monkeypatch.setattr(MNIST, "download", download)


def idx(shape, values=None):
    header = np.array([0x0800 + len(shape), *shape], dtype=">u4").tobytes()
    return header + (bytes(math.prod(shape)) if values is None else values.astype(np.uint8).tobytes())


def tree(root, **files):
    """A whole MNIST tree of black images, except for `files`: {file name with _: content, or None}."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, shape in common.MNIST_SHAPES.items():
        content = files.get(name.replace("-", "_"), idx(shape))
        if content is not None:
            (raw / name).write_bytes(content)
    return root


def refused(call, *words):
    """The call raises an InputError of one line that has all the words."""
    with pytest.raises(common.InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


# ---- data

def test_whole_mnist_is_loaded_once(tmp_path, monkeypatch):
    digits = np.arange(60000) % 10
    pixels = np.zeros((60000, 28, 28))
    pixels[7, 1, 2] = 99
    tree(tmp_path, train_labels_idx1_ubyte=idx((60000,), digits),
         train_images_idx3_ubyte=idx((60000, 28, 28), pixels))
    assert common.find_data("auto", tmp_path) == common.find_data("mnist", str(tmp_path)) == "mnist"
    train, test = common.load_data("auto", tmp_path, "cpu")
    assert train.shape == (60000, 1, 28, 28) and test.shape == (10000, 1, 28, 28)
    assert train.dtype == test.dtype == torch.uint8
    assert train[7, 0, 1, 2] == 99 and train.sum() == 99
    labels, _ = common.load_labels("mnist", tmp_path, "cpu")
    assert labels.dtype == torch.int64 and labels.tolist() == digits.tolist()
    monkeypatch.setattr(common, "read_idx", None)
    assert common.load_data("mnist", tmp_path, "cpu")[0] is train


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("file, content, why", [
    (IMAGES, b"", "empty"),
    (IMAGES, idx((60000, 28, 28))[:1000], "1000 bytes, not 47040016"),
    (IMAGES, idx((60000,)), "magic number is 2049, not 2051"),
    (LABELS, idx((60000, 28, 28))[:60008], "magic number is 2051, not 2049"),
    (LABELS, b"\x1f\x8b" + bytes(100), "magic"),
    (LABELS, idx((10000,)), "10008 bytes, not 60008"),
    (TEST_LABELS, idx((9999,)) + b"\0", "10000"),
    (TEST_LABELS, idx((10000,), np.full(10000, 200)), "above 9"),
])
def test_damaged_mnist_is_named_and_never_replaced(tmp_path, name, file, content, why):
    # The other files are missing, which alone would be a reason to fall back.
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / file).write_bytes(content)
    refused(lambda: common.load_data(name, tmp_path, "cpu"), raw / file, why, "delete")


def test_damage_among_whole_files(tmp_path):
    tree(tmp_path, t10k_images_idx3_ubyte=idx((10000, 28, 28))[:-1])
    refused(lambda: common.find_data("auto", tmp_path), TEST_IMAGES, "7840015")


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "MNIST" / "raw" / IMAGES).mkdir(parents=True)
    refused(lambda: common.find_data("auto", tmp_path), IMAGES, "cannot be read")


def test_offline(tmp_path, capsys):
    tree(tmp_path, train_images_idx3_ubyte=None, t10k_labels_idx1_ubyte=None)
    refused(lambda: common.find_data("mnist", tmp_path),
            "no network", IMAGES, TEST_LABELS, tmp_path / "MNIST" / "raw", "--data synthetic")
    capsys.readouterr()
    assert common.find_data("auto", tmp_path) == "synthetic"
    out, err = capsys.readouterr()
    assert out == "" and "WARNING" in err and "SYNTHETIC" in err and IMAGES in err and LABELS not in err


def test_the_download_is_checked_and_cannot_hang(tmp_path, monkeypatch):
    timeouts = []

    def download(self):
        timeouts.append(common.socket.getdefaulttimeout())
        print("chatter")
        tree(Path(self.root), train_labels_idx1_ubyte=b"")
    monkeypatch.setattr(MNIST, "download", download)
    monkeypatch.setattr(MNIST, "_load_data", lambda self: (None, None))
    before = common.socket.getdefaulttimeout()
    refused(lambda: common.find_data("auto", tmp_path), LABELS, "empty")
    assert 0 < timeouts[0] <= 20 and common.socket.getdefaulttimeout() == before


def test_data_folder_that_is_no_folder(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for name in "auto", "mnist":
        refused(lambda: common.find_data(name, file), file, "Not a directory", "--data-dir")
    monkeyless = file / "below"  # cannot be created
    assert common.find_data("synthetic", monkeyless) == "synthetic"
    refused(lambda: common.find_data("cifar", tmp_path), "cifar")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for folder in file / "below", loop, tmp_path / ("a" * 300):  # never a reason for synthetic digits
        refused(lambda: common.find_data("auto", folder), folder, "--data-dir")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


@pytest.mark.skipif(MNIST_ROOT is None, reason="no MNIST under $DATA_DIR or ../shared/data")
def test_real_mnist():
    train, test = common.load_data("mnist", MNIST_ROOT, "cpu")
    labels, test_labels = common.load_labels("mnist", MNIST_ROOT, "cpu")
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:3].tolist() == [7, 2, 1]
    assert train.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)  # the known mean
    assert len(test) == 10000


def test_synthetic_digits():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    images, labels = common.synthetic_digits(2000, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = common.synthetic_digits(2000, seed=3)
    assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    assert not torch.equal(common.synthetic_digits(2000, seed=4)[0], images)

    assert images.shape == (2000, 1, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [200] * 10
    assert not torch.equal(labels, labels.sort().values) and len(labels[:50].unique()) > 5
    black, white = (images == 0).float().mean(), (images == 255).float().mean()
    assert black > 0.7 and white > 0.02 and 0.05 < 1 - black - white < 0.2  # antialiased edges
    assert (images.flatten(1).amax(1) > 200).all()
    mass = images.float().sum((0, 1))
    rows = torch.arange(28.0)
    assert (mass.sum(1) @ rows / mass.sum()).item() == pytest.approx(13.5, abs=0.5)
    assert (mass.sum(0) @ rows / mass.sum()).item() == pytest.approx(13.5, abs=0.5)
    assert len(images.flatten(1).unique(dim=0)) == 2000


def test_synthetic_labels_say_what_is_shown():
    # The nearest class mean knows most digits; with wrong labels it would know one in ten.
    x, labels = common.synthetic_digits(3000, seed=0)
    y, truth = common.synthetic_digits(500, seed=1)
    means = torch.stack([x[labels == digit].float().flatten(1).mean(0) for digit in range(10)])
    assert (torch.cdist(y.float().flatten(1), means).argmin(1) == truth).float().mean() > 0.7


def test_synthetic_data_are_made_once(monkeypatch):
    calls = []

    def digits(n, seed):
        calls.append((n, seed))
        return torch.zeros(n, 1, 28, 28, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
    monkeypatch.setattr(common, "synthetic_digits", digits)
    common._load.cache_clear()
    train, test = common.load_data("synthetic", "a", "cpu")
    assert len(common.load_labels("synthetic", "b", "cpu")[1]) == len(test)
    assert [n for n, _ in calls] == [len(train), len(test)] and calls[0][1] != calls[1][1]
    common._load.cache_clear()


# ---- plots

def pixels(path):
    assert path.stat().st_size < 300_000
    picture = np.asarray(Image.open(path).convert("L"))
    assert picture.std() > 5
    return picture


def test_every_plot_draws(tmp_path):
    x = common.synthetic_digits(100, seed=0)[0] / 255
    path = tmp_path / "plot.png"
    common.plot_grid(x[:95], path, "grid")
    assert pixels(path).shape[0] > 1000
    common.plot_grid(torch.rand(3, 3, 32, 32), path, "colour, fewer than a row")
    pixels(path)
    common.plot_rows({"data": x[:4], "model": x[4:8]}, path, "rows", [f"t = {t}" for t in range(4)])
    pixels(path)
    common.plot_curves({"a": ([1, 2, 3], [3.0, math.nan, 1.0]), "b": ([1], [2.0])}, path, "curves", "nats")
    pixels(path)
    common.plot_latent(torch.randn(500, 2, requires_grad=True), torch.arange(500) % 10, path, "latent")
    pixels(path)
    common.plot_manifold(x, path, "manifold")
    pixels(path)
    assert os.listdir(tmp_path) == ["plot.png"]
    with pytest.raises(OSError):
        common.plot_grid(x, tmp_path / "no folder" / "plot.png", "title")


def test_images_are_upright_in_order_and_not_rescaled():
    x = torch.zeros(3, 1, 4, 5)
    x[0, 0, 0, 4] = 0.25  # top right of the first image
    x[2, 0, 3, 0] = 7  # clipped to 1, bottom left of the third, which opens the second row
    mosaic = common._mosaic(x, 2, gap=1)
    assert mosaic.shape == (9, 11, 3)
    assert (mosaic[0, 4] == 0.25).all() and (mosaic[8, 0] == 1).all() and (mosaic[0, 0] == 0).all()
    assert mosaic[:4, :5].sum() == 0.75 and mosaic[5:, :5].sum() == 3
    assert (mosaic[4] == 1).all() and (mosaic[:, 5] == 1).all() and (mosaic[5:, 6:] == 1).all()


def test_equal_mass_grid():
    z = common.equal_mass_grid(4)
    assert z.shape == (16, 2) and z.dtype == torch.float32
    assert z[0, 0] == z[:, 0].min() and z[0, 1] == z[:, 1].max()
    assert z[1, 0] > z[0, 0] and z[1, 1] == z[0, 1] and z[4, 1] < z[0, 1]
    mass = torch.distributions.Normal(0.0, 1.0).cdf(z[:4, 0])
    torch.testing.assert_close(mass, torch.tensor([1, 3, 5, 7]) / 8)


def test_gif_has_every_frame_and_holds_the_last(tmp_path):
    path = tmp_path / "sample.gif"
    panels = {"x": torch.rand(60, 1, 28, 28), "x0": torch.rand(60, 1, 28, 28)}
    common.save_gif(panels, path, "title", [f"t = {1000 - 10 * f}" for f in range(60)])
    gif = Image.open(path)
    assert gif.n_frames == 60 and path.stat().st_size < 1_000_000
    first, duration = np.asarray(gif.convert("L")), gif.info["duration"]
    gif.seek(59)
    assert gif.info["duration"] > 5 * duration
    assert np.abs(first - np.asarray(gif.convert("L")).astype(float)).mean() > 5


# ---- the command line

@pytest.mark.parametrize("kind, text, value", [(int, "1", 1), (int, "10", 10), (float, "2.5", 2.5)])
def test_number_takes(kind, text, value):
    assert common.number(kind, 1, 10)(text) == value


@pytest.mark.parametrize("kind, text", [
    (int, "0"), (int, "11"), (int, "2.5"), (int, "x"), (int, ""), (float, "nan"), (float, "inf")])
def test_number_refuses(kind, text):
    name = "a whole number" if kind is int else "a number"
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be {name} from 1 to 10, not '{text}'$"):
        common.number(kind, 1, 10)(text)


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/vae.py"])
    monkeypatch.setenv("DATA_DIR", "/my data")
    parser = common.arguments("What it does.", "  python vae.py --limit 10", None, 128, 1e-3)
    args = vars(parser.parse_args([]))
    assert args == dict(data="auto", data_dir="/my data", limit=None, out="results", epochs=None,
                        batch_size=128, lr=1e-3, seed=0, device="auto", resume=False, overwrite=False)
    help = parser.format_help()
    for words in "What it does.", "  python vae.py --limit 10", "128", "0.001", "/my data", "(default: 0)":
        assert words in help
    assert "default: None" not in help and "default: False" not in help
    for wrong in ["--epochs", "0"], ["--lr", "nan"], ["--data", "cifar"], ["--nonsense"], ["--seed", "-1"]:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(wrong)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("vae.py: error: ") and err.count("\n") == 1


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.pick_device("auto") == common.pick_device("cpu") == torch.device("cpu")
    for name in "cuda", "cuda:0", "tpu", "cuda:", "cuda:-1", "":
        refused(lambda: common.pick_device(name), name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert common.pick_device("auto").type == "cuda" and common.pick_device("cuda:1").index == 1
    refused(lambda: common.pick_device("cuda:7"), "cuda:7", "2")


def test_output_folder(tmp_path):
    folder = common.output_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b" and folder.is_dir() and not os.listdir(folder)
    (tmp_path / "file").write_text("kept")
    refused(lambda: common.output_folder(tmp_path / "file"), tmp_path / "file", "--out")
    refused(lambda: common.output_folder(tmp_path / "file" / "below"), "--out")
    assert (tmp_path / "file").read_text() == "kept"


def test_output_folder_without_room(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(common.tempfile, "TemporaryFile", full)
    refused(lambda: common.output_folder(tmp_path), "No space left", "--out")


CHECKPOINT = {"kind": "vae", "settings": {}, "weight": torch.arange(1000.0), "epoch": 3, "args": {"lr": 1e-3, "out": None}}


def test_save_and_load(tmp_path):
    path = tmp_path / "vae.pt"
    common.save(CHECKPOINT, path)
    (tmp_path / "vae.pt.123.tmp").write_text("of a process that was killed in the middle")
    common.save(CHECKPOINT | {"epoch": 4}, path)
    checkpoint = common.load(path, "vae")
    assert torch.equal(checkpoint["weight"], CHECKPOINT["weight"]) and checkpoint["epoch"] == 4
    assert checkpoint["args"] == CHECKPOINT["args"] and os.listdir(tmp_path) == ["vae.pt"]


@pytest.mark.parametrize("step, error", [
    ("torch.save", RuntimeError("torn")), ("os.fsync", OSError(errno.ENOSPC, "No space left on device")),
    ("os.replace", OSError("torn")), ("os.fsync", KeyboardInterrupt())])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "vae.pt"
    common.save(CHECKPOINT, path)

    def fail(*_):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        if isinstance(error, Exception):
            refused(lambda: common.save({"kind": "vae"}, path), path, error)
        else:
            with pytest.raises(KeyboardInterrupt):
                common.save({"kind": "vae"}, path)
    assert os.listdir(tmp_path) == ["vae.pt"]
    assert common.load(path, "vae")["epoch"] == 3


def test_a_checkpoint_out_of_reach_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(lambda: common.load(tmp_path / "file" / "vae.pt", "vae"), "Not a directory")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(common.zipfile, "ZipFile", denied)
    refused(lambda: common.load(tmp_path / "vae.pt", "vae"), tmp_path / "vae.pt", "Permission denied")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")  # unpickled, it would leave a file


def test_load_refuses(tmp_path):
    path, trap = tmp_path / "vae.pt", str(tmp_path / "trap")
    refused(lambda: common.load(path, "vae"), path, "no checkpoint")
    refused(lambda: common.load(tmp_path, "vae"), tmp_path)
    whole = io.BytesIO()
    torch.save(CHECKPOINT, whole)
    whole = whole.getvalue()
    trapped = io.BytesIO()
    torch.save({"kind": "vae", "x": Trap(trap)}, trapped)
    noise = np.random.default_rng(0).bytes(5000)
    pickled = pickle.dumps({"kind": "vae", "x": Trap(trap)}, protocol=2)
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]  # within the 4000 bytes of the weight
    for content in b"", whole[:100], whole[:-100], flipped, noise, b"text\n", trapped.getvalue(), pickled:
        path.write_bytes(content)
        refused(lambda: common.load(path, "vae"), path, "damaged")
    assert not os.path.exists(trap)
    torch.load(io.BytesIO(trapped.getvalue()), weights_only=False)
    assert os.path.exists(trap)  # so the trap works


@pytest.mark.parametrize("foreign", [[1, 2], torch.ones(3), {"weight": 3}, {"kind": torch.ones(3)}])
def test_load_refuses_foreign_checkpoints(tmp_path, foreign):
    torch.save(foreign, tmp_path / "x.pt")
    refused(lambda: common.load(tmp_path / "x.pt", "vae"), "x.pt", "no checkpoint of these scripts")


def test_load_names_both_kinds(tmp_path):
    common.save(CHECKPOINT, tmp_path / "x.pt")
    refused(lambda: common.load(tmp_path / "x.pt", "ddpm"), "a vae", "a ddpm")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_names_what_to_lower(error):
    def call():
        with common.enough_memory("--batch-size", 512):
            raise error
    refused(call, "out of memory", "--batch-size 512", "lower")


def test_other_errors_of_torch_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), common.enough_memory("--batch-size", 512):
        raise RuntimeError("shapes do not match")


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error, code, words", [
    (common.InputError("no data"), 2, "no data"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "--batch-size"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"),
    (KeyboardInterrupt(), 130, "")])
def test_run(handler, monkeypatch, capsys, error, code, words):
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/ddpm.py"])
    with pytest.raises(SystemExit) as stop:
        common.run(main)
    err = capsys.readouterr().err
    assert stop.value.code == code and words in err
    assert err == "" if code == 130 else err.startswith("ddpm.py: error: ") and err.count("\n") == 1


def test_run_leaves_bugs_alone_and_ends_on_sigterm(handler):
    common.run(lambda: None)
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stop.value.code == 143


def test_import_is_free_of_side_effects():
    code = "import torch, sys; s = torch.get_rng_state(); import common; " \
           "assert torch.equal(s, torch.get_rng_state()); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


class Broken(torch.autograd.Function):
    """What compiles forwards, but not backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("Cannot find a working triton installation.\nmore")


@pytest.mark.parametrize("forwards", [True, False])
def test_what_does_not_compile_runs_as_it_is(monkeypatch, capsys, forwards):
    model, made = torch.nn.Linear(1, 1), []

    def broken(f, **_):
        made.append(f)
        return lambda x: (Broken.backward(None, x) if forwards else (Broken.apply(f(x)[0]), f(x)[1]))

    def loss(x):
        return model(x).sum(), model(x).sum()
    monkeypatch.setattr(torch, "compile", broken)
    f, x = common.compiled(loss, model, torch.device("cuda")), torch.ones(2, 1)
    assert [f(x)[0].item(), f(x)[1].item()] == [loss(x)[0].item()] * 2 and len(made) == 1
    f(x)[0].backward()
    said = capsys.readouterr().err
    assert said.splitlines() == ["not compiled, so slower: Cannot find a working triton installation."]
    fail = common.compiled(lambda x: 1 / 0, model, torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):  # its own errors are not hidden
        fail(x)
    assert common.compiled(loss, model, torch.device("cpu")) is loss


def test_what_compiles_is_called_once_for_trial(monkeypatch):
    model, calls = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: calls.append(1) or f(x))
    f = common.compiled(lambda x: model(x).sum(), model, torch.device("cuda"))
    f(torch.ones(2, 1)), f(torch.ones(2, 1))
    assert len(calls) == 3 and model.weight.grad is None


def test_a_smaller_batch_is_not_compiled(monkeypatch):
    model, calls = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: calls.append(len(x)) or f(x))
    f = common.compiled(lambda x: model(x).sum(), model, torch.device("cuda"))
    for size in 2, 3, 3, 2, 3:  # a run that goes on before the last batch of an epoch begins with that
        x = torch.ones(size, 1)
        assert f(x) == model(x).sum()
    assert calls == [2] * 2 + [3] * 4  # one of each for trial


def test_a_captured_step_repeats_its_kernels_and_nothing_else(cuda_graphs):
    total, factor, called = torch.zeros(()), [1.0], []

    def step(x, weight):
        called.append(len(x))
        total.add_(factor[0] * (weight * x).sum())
        return 2 * total

    captured = common.captured(step, torch.device("cuda"))
    expected = 0.0
    for i, size in enumerate((2, 3, 3, 2, 3, 3, 2, 3)):  # 2: the last batch of an epoch, before which it goes on
        x = torch.full((size,), float(i))
        expected += factor[0] * size * i * 5
        assert captured(x, torch.tensor(5.0)).item() == 2 * expected == 2 * total.item()
    assert called == [2, 3, 3, 2, 3, 3, 2] and len(cuda_graphs) == 1  # of 3: three calls and one recording
    factor[0] = 100.0  # no tensor: it stays what it was
    assert captured(torch.ones(3), torch.tensor(1.0)).item() == 2 * (expected + 3)


def test_a_step_that_waits_for_the_device_is_not_captured(cuda_graphs):
    def step(x):
        if x.sum().item() < 0:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x
    captured = common.captured(step, torch.device("cuda"))
    for _ in range(3):
        captured(torch.ones(2))
    with pytest.raises(AssertionError, match="waits"):  # the emulation's own word
        captured(torch.ones(2))

    def fails(x):
        if torch.utils._python_dispatch._get_current_dispatch_mode():
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x
    captured = common.captured(fails, torch.device("cuda"))
    for _ in range(3):
        captured(torch.ones(2))
    with pytest.raises(common.InputError, match="not permitted.*torchrun"):
        captured(torch.ones(2))


def test_nothing_is_captured_on_a_cpu_or_under_torchrun(monkeypatch):
    step = lambda x: x  # noqa: E731
    assert common.captured(step, torch.device("cpu")) is step
    monkeypatch.setattr(common, "TORCHRUN", True)
    assert common.captured(step, torch.device("cuda")) is step
