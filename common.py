"""What the scripts share: the data, the plots, the checkpoint and the command line.

Images are uint8 (N, C, H, W) when stored, and floats in [0, 1] when plotted.
"""

import argparse
import ast
import contextlib
import functools
import gzip
import hashlib
import io
import math
import mimetypes
import os
import socket
import sys
import tempfile
import textwrap
import time
import weakref
import zipfile
from argparse import Namespace
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure  # pyplot would open windows and keep global state
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.utils import make_grid
from tqdm import tqdm

# torchrun starts several processes.  These are whether it did, the rank of this process, its rank
# on its own machine, and the number of processes.
TORCHRUN = dist.is_available() and dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1


class InputError(Exception):
    """An error that the user can fix.  Its message says what is wrong and what to do."""


# ---- data

SETS = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
DATA_DIR = Path(__file__).resolve().parent / "data"  # MNIST comes with the repository
SIZE = 32  # of a folder's pictures, unless --size says otherwise
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def load_data(settings, args, device):
    """The images and labels of a run, on device -> x_train, y_train, x_test, y_test.

    x is uint8 (N, C, H, W).  y is int64 (N,), or None for a folder with any picture outside its
    subfolders.  settings: data, pictures, size, limit (of x_train), seed.  args: data_dir, where
    the data sets are, and out.  InputError if the data are missing or damaged.
    """
    if settings.data in SETS:
        data = _read_set(settings.data, args.data_dir)
    else:
        chosen = settings.data, settings.size, settings.seed, args.out, settings.pictures
        data = _read_folder(*chosen)[:4]
    x_train, y_train, x_test, y_test = data
    x_train = x_train[: settings.limit].to(device)
    if y_train is not None:
        y_train = y_train[: settings.limit].to(device)
        y_test = y_test.to(device)
    return x_train, y_train, x_test.to(device), y_test


@functools.lru_cache
def _read_set(name, root):
    """The images and labels in a data set's four files, which are downloaded if missing."""
    folder = Path(root) / SETS[name].__name__ / "raw"
    if not all(_idx_paths(folder, each) for each in FILES):
        _download(name, root, folder)
    data = []
    for images, labels in (FILES[:2], FILES[2:]):
        x = _read_idx(_idx_paths(folder, images)[0], 3)
        y = _read_idx(_idx_paths(folder, labels)[0], 1)
        highest = y.max(initial=0)
        if not 0 < len(x) == len(y) or highest > 9:
            raise InputError(
                f"{folder}: {images}-ubyte and {labels}-ubyte do not belong together ({len(x)} "
                f"images, {len(y)} labels up to {highest}): put the original files there"
            )
        data += [torch.from_numpy(x)[:, None], torch.from_numpy(y).long()]
    return data


def _idx_paths(folder, name):
    paths = folder / f"{name}-ubyte.gz", folder / f"{name}-ubyte"
    return [path for path in paths if os.path.exists(path)]


def _read_idx(path, dimensions):
    """The array of bytes in an IDX file.  Its header is a magic number and the array's shape."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
        sizes = np.frombuffer(content, ">u4", 1 + dimensions)
        if sizes[0] != 0x800 + dimensions:
            raise ValueError("it does not have the header of an IDX file of bytes")
        array = np.frombuffer(content, np.uint8, offset=4 * len(sizes))
        return array.reshape(sizes[1:]).copy()
    except Exception as error:  # the file may be truncated, unreadable, not gzip, ...
        raise InputError(f"cannot read {path} ({error}): put the original file there") from None


def _download(name, root, folder):
    """Has torchvision download the files of a data set into folder."""
    wanted = ", ".join(f"{each}-ubyte.gz" for each in FILES)
    if WORLD > 1:
        raise InputError(f"{folder} lacks files of {name}: run once without torchrun to get them")
    socket.setdefaulttimeout(20)  # seconds, so that a dead network makes it fail, not hang
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            SETS[name](root, download=True)
    except Exception as error:  # there may be no network, a full disk, a read-only folder, ...
        raise InputError(f"cannot download {name} ({error}): put {wanted} into {folder}") from None
    finally:
        socket.setdefaulttimeout(None)


def find_pictures(folder, out):
    """The files under folder that may be pictures, and the number of other files.

    Symbolic links are followed.  Hidden files and folders are ignored, and so are files directly
    in out whose names begin with vae_ or ddpm_, because the scripts write those.  An unreadable
    folder is listed among the pictures, so that it gets reported.
    """
    Image.init()
    known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    out = Path(out).resolve()
    pictures = []
    others = 0
    seen = set()
    unreadable = lambda error: pictures.append(Path(error.filename))  # noqa: E731
    for where, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        where = Path(where)
        if where.resolve() in seen:  # by a link, which may form a loop
            folders.clear()
            continue
        seen.add(where.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (where / name for name in files if not name.startswith(".")):
            drawn = where.resolve() == out and path.name.startswith(("vae_", "ddpm_"))
            kind = mimetypes.guess_type(path.name)[0] or ""
            if not drawn and (path.suffix.lower() in known or kind.startswith("image/")):
                pictures.append(path)
            else:
                others += not drawn
    return sorted(pictures), others


def _digest(folder, out):
    """A digest of the names and sizes of all pictures under folder, and their number."""
    pictures, _ = find_pictures(folder, out)
    pictures = [path for path in pictures if os.path.exists(path)]  # a link may be broken
    listed = [(str(path.relative_to(folder)), path.stat().st_size) for path in pictures]
    listing = repr(listed).encode("utf-8", "surrogateescape")
    return hashlib.sha256(listing).hexdigest()[:16], len(listed)


def _read_picture(path, size):
    """The central square, resized to uint8 (size, size, 3), or a text: why it is unreadable."""
    try:
        if path.is_fifo():
            raise ValueError("it is a named pipe, and reading it could hang")
        with Image.open(path) as picture:
            # TIFF's tag 339 is 1 for unsigned pixels, which Pillow reads as signed ones.
            unsigned = getattr(picture, "tag_v2", {}).get(339) == (1,)
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith(("I", "F")):
                picture = Image.fromarray(_to_8_bits(np.asarray(picture), unsigned))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            return np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size)))
    except Exception as error:  # Pillow's plugins can raise any exception
        return " ".join(f"{type(error).__name__}: {error}".split())


def _to_8_bits(pixels, unsigned=False):
    """Gray pixels with more than 8 bits, or floats -> uint8.

    White is the smallest of 1, 255, 4095 and 65535 that no pixel exceeds, or the highest pixel if
    one exceeds them all.  If a pixel is below 0, the image is scaled from its lowest pixel to its
    highest.
    """
    pixels = pixels.astype(np.float64)
    if unsigned:
        pixels = pixels % 2**32
    if not np.isfinite(pixels).all():
        raise ValueError("some pixels are not finite numbers")
    black = min(pixels.min(), 0)
    white = pixels.max()
    if black == 0:
        white = next((scale for scale in (1, 255, 4095, 65535) if white <= scale), white)
    return (255 * (pixels - black) / (white - black or 1)).round().astype(np.uint8)


@functools.lru_cache
def _read_folder(folder, size, seed, out, digest):
    """All pictures under folder, a random tenth of them held out -> as load_data, and class names.

    seed: decides which tenth.  digest: only a key of the cache, so that changed pictures are read
    again.
    """
    paths, others = find_pictures(folder, out)
    labels = []
    good = []
    bad = []
    for path in progress(paths, "reading"):
        pixels = _read_picture(path, size)
        if isinstance(pixels, str):
            bad.append(f"{path.relative_to(folder)} ({pixels})")
        else:
            good.append(pixels)
            labels.append(_label(path, folder))
    said = f"{folder}: {len(good)} pictures read, {others} other files, {len(bad)} skipped"
    more = [f"and {len(bad) - 20} more"] if len(bad) > 20 else []
    log(f"{said}: {'; '.join(bad[:20] + more)}" if bad else said)
    if len(good) < 2:
        raise InputError(f"{folder} needs at least 2 readable pictures, but has {len(good)}")
    x = torch.from_numpy(np.stack(good)).permute(0, 3, 1, 2)
    if (x == x[:, :1]).all():
        x = x[:, :1]  # all pictures are gray, so one channel is enough
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x = x[order].contiguous()
    held_out = math.ceil(len(x) / 10)
    names = [] if None in labels else sorted(set(labels))
    if not names:
        return x[held_out:], None, x[:held_out], None, names
    y = torch.tensor([names.index(label) for label in labels])[order]
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out], names


def _label(path, folder):
    """The top-level subfolder that a picture is in, or None if it is in folder itself."""
    return (path.relative_to(folder).parts[:-1] or [None])[0]


def class_names(settings, args):
    """The names of the classes 0, 1, ... of a run, or [] if it does not use labels.

    InputError if it does, but its pictures have none.
    """
    if not settings.labels:
        return []
    if settings.data in SETS:
        return [str(label) for label in range(10)]
    chosen = settings.data, settings.size, settings.seed, args.out, settings.pictures
    names = _read_folder(*chosen)[4]
    if not names:
        raise InputError(
            f"{settings.data} has no labels: put every picture into a subfolder for its class"
        )
    return names


def labels_to_draw(classes, name, n):
    """The labels of the samples, or None without classes; and how many images make a row.

    name: the class that all n samples show.  If it is None, n is rounded up so that each class
    fills a row.  InputError for an unknown name.
    """
    if name is not None:
        if name not in classes:
            names = ", ".join(classes)
            raise InputError(f"there is no --digit {name} in this model: choose {names}")
        return torch.full((n,), classes.index(name)), 10
    if not classes:
        return None, 10
    columns = math.ceil(n / len(classes))
    return torch.arange(len(classes) * columns) // columns, columns


def title(settings):
    """What a model was trained on, and for how long, as the title of a picture."""
    name = caption(Path(settings["data"]).name)
    if settings["data"] in SETS:
        name = SETS[settings["data"]].__name__
    n = settings["epochs"]
    return f"{name}, {n} epoch{'s' * (n != 1)}"


def caption(name):
    """A name, escaped for a plot, in which a $ would begin a formula."""
    return _readable(name).replace("$", r"\$")


def _readable(text):
    """The text, with a ? for each byte that could not be decoded as UTF-8."""
    return text.encode("utf-8", "replace").decode()


# ---- plots: x is a batch of images (N, C, H, W) in [0, 1]

# Pictures do not depend on the user's matplotlibrc, which could even turn them upside down.
plain_style = matplotlib.style.context("default")


def _picture(x, columns, title, gap=2, top=(), left=()):
    """A figure of the images, row by row, with labels above and to the left -> figure, axes."""
    pixels = make_grid(x.detach().cpu().float().clamp(0, 1), columns, gap, pad_value=1)
    pixels = pixels.permute(1, 2, 0).numpy()  # (height, width, 3)
    height, width, _ = pixels.shape
    zoom = max(1, min(4, 1200 // width, 60000 // height))
    figure = Figure(figsize=(width * zoom / 130, height * zoom / 130), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))  # the title and the labels lie outside the axes
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title)
    H, W = x.shape[2:]
    axes.set_xticks([gap + i * (W + gap) + W / 2 for i in range(len(top))], top)
    axes.set_yticks([gap + i * (H + gap) + H / 2 for i in range(len(left))], left)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    return figure, axes


def write_file(path, write):
    """Calls write(path), in the first process only.  InputError if it fails, as on a full disk."""
    if RANK > 0:
        return
    try:
        write(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error}): free some space, or choose another --out; what has "
            "been trained is kept"
        ) from None


def save_figure(figure, path):
    write_file(path, lambda path: figure.savefig(path, bbox_inches="tight", pad_inches=0.1))


@plain_style
def plot_grid(x, path, title, columns=10):
    """Plots the images row by row, in longer rows if the picture would otherwise be too tall."""
    # matplotlib cannot draw pictures of 2**16 or more pixels in height.
    columns = max(columns, math.ceil(len(x) * (x.shape[2] + 2) / 60000))
    figure, _ = _picture(x, min(columns, len(x)), title)
    save_figure(figure, path)


@plain_style
def plot_rows(rows, path, title, columns=(), notes=None):
    """Plots one row of images for each entry of rows, {label: x}.

    columns: labels above the columns.  notes: {label: texts}, at the bottom of a row's images.
    """
    x = torch.cat([row.detach().cpu().float() for row in rows.values()])
    H, W = x.shape[2:]
    figure, axes = _picture(x, len(x) // len(rows), title, top=columns, left=list(rows))
    for row, label in enumerate(rows):
        for column, text in enumerate((notes or {}).get(label, ())):
            position = 2 + column * (W + 2) + W / 2, (row + 1) * (H + 2) - 1
            style = {"color": "white", "fontsize": 7, "ha": "center", "va": "bottom"}
            box = {"facecolor": "black", "edgecolor": "none", "pad": 0.5}
            axes.text(*position, text, **style, bbox=box)
    save_figure(figure, path)


@plain_style
def plot_curves(history, curves, path, title, yscale="linear"):
    """Plots lines over the epochs, in a panel for each entry of curves.

    curves: {label of the panel: {label of the line: its key in a row of history}}.
    """
    figure = Figure(figsize=(6, 2 + 2 * len(curves)), dpi=130, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    epochs = [row["epoch"] for row in history]
    for axes, (ylabel, lines) in zip(panels, curves.items(), strict=True):
        for label, key in lines.items():
            axes.plot(epochs, [row[key] for row in history], marker=".", label=label)
        locator = MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
        axes.xaxis.set_major_locator(locator)
        axes.set(ylabel=ylabel, yscale=yscale)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    axes.set_xlabel("epoch")
    save_figure(figure, path)


@plain_style
def plot_latent(mu, labels, path, title):
    """Plots points mu (N, 2), with circles at 1 and 2 sigma of N(0, I).

    The points are colored by their labels (N,), or all alike if labels is None.
    """
    labels = torch.zeros(len(mu)) if labels is None else labels.cpu()
    figure = Figure(figsize=(6, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for label in labels.unique().int().tolist():
        points = mu.detach().cpu()[labels == label].numpy()
        axes.scatter(*points.T, s=3, alpha=0.6, linewidth=0, color=f"C{label}", label=label)
    for radius in 1, 2:
        axes.add_patch(Circle((0, 0), radius, fill=False, alpha=0.4))
    axes.set(title=title, xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    if len(axes.collections) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4, frameon=False)
    save_figure(figure, path)


@plain_style
def save_gif(panels, path, title, labels):
    """Saves an animation of panels side by side, {label: x (F, C, H, W)}.

    labels: the texts below the F frames.
    """
    pictures = []
    for images, label in zip(zip(*panels.values(), strict=True), labels, strict=True):
        figure, axes = _picture(torch.stack(images), len(panels), title, top=list(panels))
        axes.set_xlabel(label)
        if not pictures:
            frame = figure.get_tightbbox().padded(0.1)
        file = io.BytesIO()
        figure.savefig(file, bbox_inches=frame)
        pictures.append(Image.open(file).convert("L" if len(images[0]) == 1 else "RGB"))
    first, *others = pictures
    options = {"append_images": others, "duration": [100] * len(others) + [2000], "loop": 0}  # ms
    write_file(path, lambda path: first.save(path, save_all=True, **options))


# ---- checks of arguments


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")


def check_range(name, value, low, high=math.inf):
    if not low <= value <= high:  # this way round, nan is refused, too
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, not {value}")


def check_shape(name, value, like):
    """ValueError unless value is shaped like `like`: a wrong shape might broadcast in silence."""
    if value.shape != like.shape:
        shapes = f"{tuple(like.shape)}, not {tuple(value.shape)}"
        raise ValueError(f"{name} must have the shape {shapes}")


# ---- device, processes, progress


def pick_device(name):
    """auto, cpu, cuda, cuda:N or mps -> torch.device.  InputError if it cannot be used."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"  # each process of torchrun takes its own GPU
    try:
        device = torch.zeros(1).to(name).device
        torch.zeros(1, device=device).cpu()  # fails for the device "meta", which holds no data
        return device
    except Exception as error:
        reason = textwrap.shorten(str(error), 80)
        raise InputError(f"no --device {name} ({reason}): choose cpu, or leave it out") from None


def start(args):
    """Sets up the folder of --out, the device and the processes -> the device."""
    if args.load and not args.sample:
        raise InputError("--load only goes with --sample: add --sample, or leave out --load")
    if args.fresh and args.sample:
        raise InputError("--fresh trains, but --sample does not: leave out one of them")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # only writing reveals a read-only disk
    except OSError as error:
        raise InputError(
            f"cannot write to --out ({error}): choose another folder (to sample from a "
            "checkpoint in this one, name it with --load)"
        ) from None
    # In a notebook, an earlier command may have been stopped.
    _locks.clear()
    for bar in list(_bars):
        bar.close()
    device = pick_device(args.device)
    # Adam's averages for dead units decay to denormal numbers, which slow a CPU a hundredfold.
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def wrap(model, args):
    """The model, wrapped to average gradients over torchrun's processes, or compiled, or both."""
    if WORLD > 1:
        model = DistributedDataParallel(model)
    return torch.compile(model, mode="reduce-overhead") if args.compile else model


def share(order):
    """Batches of image indices (steps, B) -> this process's part of each, (steps, B / WORLD).

    It also seeds torch, so that from here on each process draws its own random numbers.
    """
    if order.shape[1] % WORLD:
        raise InputError(
            f"{WORLD} processes cannot share {order.shape[1]} images per update equally: "
            "change --batch-size"
        )
    if RANK > 0:
        torch.manual_seed(torch.initial_seed() + 10**12 * RANK)
    return order[:, RANK::WORLD]


@functools.lru_cache
@torch.enable_grad()
def best_precision(device):
    """The precision for this device: "bfloat16" if it is clearly faster, else "float32".

    On a GPU that depends on what it supports; a CPU is timed on a convolution.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    if device.type != "cpu" or WORLD > 1:  # processes that time themselves might disagree
        return "float32"
    # Ones are used, because drawing random numbers would change those that the caller draws next.
    x = torch.ones(32, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    seconds = {}
    for precision in PRECISIONS:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            with autocast(device, precision):
                torch.conv2d(x, weight, padding=1).sum().backward()
            times.append(time.perf_counter() - started)
        seconds[precision] = min(times[1:])
    # It must be clearly faster, so that noise in the timing does not decide.
    return "bfloat16" if 1.3 * seconds["bfloat16"] < seconds["float32"] else "float32"


PRECISIONS = ("float32", "bfloat16")


def autocast(device, precision=None):
    """A context in which convolutions and matrix products have this precision.

    The default is the faster one.
    """
    precision = precision or best_precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def log(line):
    """Prints a line, or a dict, above the progress bar, in the first process."""
    if isinstance(line, dict):
        values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()}
        line = "  ".join(f"{name} {value}" for name, value in values.items())
    if RANK == 0 and sys.stdout:
        write = tqdm.write if _on_screen() else print
        write(_readable(line), file=sys.stdout)
        sys.stdout.flush()  # so that a log file always shows how far the run is


def _on_screen():
    """Whether somebody can see the progress bar, in a terminal or in a notebook."""
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def progress(items=None, description=None, **options):
    """A tqdm bar over items, or up to total=...

    Where nobody can see it, as in a log file, it prints a line every half minute instead.
    """
    if not _on_screen():
        options |= {
            "position": 0,
            "mininterval": 30,
            "maxinterval": 30,
            "bar_format": "{l_bar}{r_bar}\n",
        }
    hidden = RANK > 0 or sys.stderr is None
    # A bar over items vanishes when it is done, and only appears after two seconds.
    short = {"leave": False, "delay": 2} if items is not None else {}
    bar = tqdm(items, description, disable=hidden, **short, **options)
    _bars.add(bar)
    return bar


_bars = weakref.WeakSet()  # for start, which closes what a stopped command left open


# ---- running the same command again resumes: a run's settings and its checkpoint


def defaults(device):
    """The settings that all scripts share, unless a flag says otherwise."""
    return {
        "data": "mnist",
        "pictures": None,  # for a folder: a digest of its pictures
        "size": SIZE,
        "limit": None,
        "seed": 0,
        "precision": best_precision(device),
    }


def fingerprint(file):
    """A digest of a script's syntax tree: comments, docstrings and formatting do not count."""

    def plain(node):
        if isinstance(node, list):
            return [plain(each) for each in node if not is_text(each)]
        if not isinstance(node, ast.AST):
            return repr(node)
        # Empty fields are left out, because which of them exist depends on the version of Python.
        fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, {name: plain(value) for name, value in fields.items()}]

    def is_text(node):  # a docstring, or a string that stands alone
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return alone and isinstance(node.value.value, str)

    tree = plain(ast.parse(Path(file).read_bytes()))
    return hashlib.sha256(repr(tree).encode()).hexdigest()[:16]


def open_run(args, path, default, code):
    """The settings of a run, and its checkpoint at path, or None: see find_run.

    This locks path, unless the run is finished, and logs where the run resumes.  InputError as in
    find_run, and if another process is writing to path.
    """
    settings, saved = find_run(args, path, default, code)
    done = len(saved["history"]) if saved else 0
    if done == settings.epochs:
        log(f"{path} is finished: drawing its pictures again (--fresh trains anew)")
        return settings, saved
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        _lock(path)
        # Read it again, because another run may have ended just before this one took the lock.
        settings, saved = find_run(args, path, default, code)
        done = len(saved["history"]) if saved else 0
    if saved:
        log(f"going on after epoch {done} of {settings.epochs}")
        if settings.epochs != saved["settings"]["epochs"]:
            log(f"the learning rate now follows the schedule for {settings.epochs} epochs")
    return settings, saved


def find_run(args, path, default, code):
    """The settings of a run, and its checkpoint at path (a dict), or None for a new run.

    settings is a Namespace.  Each value is the flag's if it is given, else the checkpoint's, or in
    a new run the default; a new run on a folder gets epochs to suit its size.  InputError if the
    folder is missing, or if a flag, the pictures or the code (a fingerprint) contradict the
    checkpoint.
    """
    saved = load_checkpoint(path, path.stem) if path.exists() and not args.fresh else None
    settings = Namespace(**(saved["settings"] if saved else default))
    if saved:
        done = len(saved["history"])
        # A run may be extended or cut short, but not to fewer epochs than are done.
        allowed = args.epochs is not None and args.epochs >= done
        check_flags(args, saved["settings"], path, but=("epochs",) if allowed else ())
        if saved.get("code") != code:
            raise InputError(
                f"{path.stem}.py has changed since {path} was trained: --fresh trains anew, "
                "another --out keeps both"
            )
    for name in vars(settings):
        if getattr(args, name, None) is not None:
            setattr(settings, name, getattr(args, name))
    if settings.data in SETS:
        if settings.size != SIZE:
            raise InputError("--size is only for a folder's pictures: leave it out")
    else:
        folder = Path(settings.data)
        if not os.path.isdir(folder):
            names = ", ".join(SETS)
            raise InputError(f"there is no folder --data {folder}: choose {names} or a folder")
        settings.pictures, count = _digest(folder, args.out)
        if not saved and args.epochs is None:
            # A folder gets about as many updates as MNIST, with its 60,000 images, would get: a
            # small one more epochs (at most 1,000), a large one fewer.
            count = max(1, min(count, settings.limit or count))
            settings.epochs = min(1000, math.ceil(settings.epochs * 60000 / count))
        if saved and settings.pictures != saved["settings"]["pictures"]:
            raise InputError(
                f"the pictures in {folder} have changed since {path} was trained: --fresh trains "
                "anew, another --out keeps both"
            )
    return settings, saved


def check_flags(args, settings, path, but=()):
    """InputError if a flag that is given contradicts the settings of the checkpoint at path."""
    for name, value in settings.items():
        given = getattr(args, name, None)
        if name not in but and given is not None and given != value:
            flag = "--" + name.replace("_", "-")
            ways = f"leave out {flag}, choose another --out, or train anew with --fresh"
            if getattr(args, "sample", None):
                ways = f"leave out {flag}, choose another --out or --load"
            raise InputError(f"{path} has {name} {value}, not {given}: {ways}")


_locks = {}


def _lock(path):
    """Locks path for this process, until it ends or the last epoch is saved.

    InputError if another process holds the lock.  The lock file is in the system's folder for
    temporary files, and the lock does not outlive a crash.  Whoever has the lock also deletes
    unfinished files that killed runs left behind.  On Windows, which has no fcntl, nothing is
    locked, and the last process to write wins.
    """
    path = path.resolve()
    if os.name == "nt" or path in _locks:
        return
    import fcntl  # not on Windows

    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    try:
        file = open(Path(tempfile.gettempdir()) / f"vae-ddpm-{name}.lock", "a")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is writing {path}: wait, or choose another --out") from None
    except OSError:  # the file is another user's, or the disk has no locks: go on without one
        return
    _locks[path] = file
    for unfinished in path.parent.glob(f"{path.name}.*.tmp"):
        unfinished.unlink()  # a run that was killed left it behind


def save_checkpoint(path, settings, history, code="", **parts):
    """Replaces `path` as a whole, or leaves it as it was; only the first process writes.

    parts: objects that have a state_dict, including model.  InputError if the disk is full, or if
    the last losses or the weights are not finite.
    """
    numbers = [value for value in history[-1].values() if not isinstance(value, str)]
    values = [torch.tensor(numbers), *parts["model"].parameters()]
    if not all(value.isfinite().all() for value in values):
        raise InputError(
            f"the loss or the weights are not finite in epoch {len(history)}: lower --lr; {path} "
            "is unchanged"
        )
    if RANK > 0:
        return
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"kind": path.stem, "settings": settings, "history": history, "code": code}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # for a full disk, torch raises a RuntimeError
        raise InputError(
            f"cannot save {path} ({error}): free some space; the file is as it was before"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    if len(history) == settings.get("epochs"):
        _locks.pop(path.resolve(), None)


def load_checkpoint(path, kind):
    """Loads what save_checkpoint wrote, with its tensors on the CPU -> dict.

    Code hidden in the file is not run.  InputError if the file is missing, unreadable, damaged or
    not a checkpoint of this kind.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        raise InputError(
            f"there is no checkpoint {path}: train first, or name one with --load"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error})") from None
    foreign = InputError(f"{path} is not a checkpoint of {kind}.py: choose another file or --out")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is only a Git LFS pointer to the file: run git lfs pull")
    if head and not head.startswith(b"PK"):  # torch writes zip files, which begin with PK
        raise foreign
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not check the checksums
            raise zipfile.BadZipFile("wrong checksum")
    except Exception as error:
        raise InputError(f"{path} is damaged ({error!r:.80}): delete it and train anew") from None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise foreign from None
    if not isinstance(saved, dict) or saved.get("kind") != kind:
        raise foreign
    return saved


def load_model(path, kind, part, device, build):
    """build(settings) with the weights of a checkpoint.  InputError if they do not fit.

    model.settings are the run's settings, except that epochs is the number done so far.
    """
    saved = load_checkpoint(path, kind)
    try:
        model = build(saved["settings"])
        model.load_state_dict(saved[part])
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the weights in {path} do not fit the network of {kind}.py, which has changed since: "
            f"--fresh trains anew, another --out keeps both ({error!s:.80})"
        ) from None
    model.settings = saved["settings"] | {"epochs": len(saved["history"])}
    return model.eval().requires_grad_(False).to(device)


def load_for_sampling(args, path, load, device):
    """The model that --sample draws from: the checkpoint in --load, or else the one at path."""
    path = Path(args.load or path)
    model = load(path, device)
    check_flags(args, model.settings, path, but=("seed", "precision"))
    return model


# ---- the command line


def number(kind, low, high):
    """A `type=` for argparse: text -> an int or a float, in [low, high]."""

    def parse(text):
        value = kind(text)
        check_range("it", value, low, high)
        return value

    # For any ValueError, argparse prints "invalid NAME value: 'TEXT'".
    parse.__name__ = f"{kind.__name__} from {low} to {high}"
    return parse


def place(text):
    """A `type=` for argparse: a path, in which ~ is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def data(text):
    """A `type=` for argparse: the name of a data set, or a folder, whose path is made absolute."""
    if text in SETS:
        return text
    return os.path.realpath(place(text))


SWITCH = {"action": "store_const", "const": True}  # None unless it is given, like other settings


def arguments(doc):
    """An ArgumentParser with the flags that all scripts share."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    # Only the message is printed, because -h shows the usage.
    parser.error = lambda message: parser.exit(2, f"error: {message} (-h lists the flags)\n")
    add = parser.add_argument
    add("--data", type=data, help=f"{', '.join(SETS)} or a folder of pictures (default: mnist)")
    folder = "folder of the data sets (default: data/ beside the scripts)"
    add("--data-dir", type=place, default=str(DATA_DIR), help=folder)
    size = "size to which a folder's pictures are cropped and resized (default: 32)"
    add("--size", type=int, choices=(16, 32, 64), help=size)
    add("--limit", type=number(int, 1, 10**9), help="train on this many images (default: all)")
    out = "folder for checkpoints and pictures (default: results)"
    add("--out", type=place, default="results", help=out)
    add("--epochs", type=number(int, 1, 10**5), help="passes over the training images")
    batch = "images per update, in all processes together"
    add("--batch-size", type=number(int, 1, 10**6), help=batch)
    add("--lr", type=number(float, 1e-8, 1), help="highest learning rate of Adam")
    add("--seed", type=number(int, 0, 10**9), help="seed of all random numbers (default: 0)")
    device = "cpu, cuda, cuda:N or mps (default: a GPU if there is one)"
    add("--device", default="auto", help=device)
    precision = "of convolutions and matrix products (default: the faster)"
    add("--precision", choices=PRECISIONS, help=precision)
    add("--compile", action="store_true", help="use torch.compile, which is meant for a GPU")
    add("--fresh", action="store_true", help="train anew, and replace what is in --out")
    add("--sample", type=number(int, 1, 10000), help="only draw this many images, using --seed")
    load = "with --sample: the checkpoint to use (default: the one in --out)"
    add("--load", type=place, help=load)
    return parser


def run(main):
    """Runs main().  An error that the user can fix prints one line and sets an exit code."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a notebook's stream lacks it; a closed one is None
            stream.reconfigure(errors="replace")  # for terminals without Greek letters
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except InputError as error:
        sys.exit("error: " + _readable(" ".join(str(error).split())))  # one line
    except BrokenPipeError:
        sys.stdout = None  # nothing more can be printed there
        sys.exit("error: the output was closed; run the same command to resume")
    except KeyboardInterrupt:
        going_on = ": run the same command to resume after the last finished epoch"
        if "--fresh" in sys.argv:
            going_on = ": without --fresh, the same command resumes from what is saved"
        if any(flag.startswith("--sample") for flag in sys.argv):
            going_on = ""
        sys.exit(f"\nstopped{going_on}")
    finally:
        _locks.clear()  # in a notebook the process lives on, and so would its locks
    if WORLD > 1:
        dist.destroy_process_group()
