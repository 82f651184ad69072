"""What the scripts share: data and plots; at the end, command line, device and checkpoint.

Images are uint8 (N, C, H, W) where they are stored, floats in [0, 1] where they are drawn.
"""

import argparse
import contextlib
import functools
import io
import math
import os
import socket
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.utils import make_grid
from tqdm import tqdm

# torchrun starts several processes: which one is this, on its machine, of how many
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class InputError(Exception):
    """Something the user can mend: what is wrong, and what to do."""


# ---- data

SETS = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
DATA_DIR = Path(__file__).resolve().parent / "data"  # MNIST comes with the repository


def load_data(args, device):
    """The data of --data, on device -> x_train, y_train, x_test, y_test.

    x (N, C, H, W) uint8; y (N,) int64, labels, None for a folder of pictures.  x_train has the
    first args.limit.  InputError where they are missing or damaged.
    """
    if args.data in SETS:
        data = _read_set(args.data, args.data_dir)
    elif Path(args.data).is_dir():
        data = _read_folder(Path(args.data), args.size, args.seed)
    else:
        raise InputError(f"no --data {args.data}: choose {', '.join(SETS)} or a folder")
    x_train, y_train, x_test, y_test = data
    x_train = x_train[: args.limit].to(device)
    if y_train is not None:
        y_train = y_train[: args.limit].to(device)
        y_test = y_test.to(device)
    return x_train, y_train, x_test.to(device), y_test


@functools.lru_cache
def _read_set(name, root):
    if LOCAL_RANK > 0:
        dist.barrier()  # one process of a machine unpacks the files first
    data = []
    socket.setdefaulttimeout(20)  # seconds: a dead network is an error, not a wait
    try:
        for train in True, False:
            with contextlib.redirect_stdout(io.StringIO()):
                part = SETS[name](root, train=train, download=True)
            assert len(part.data) == len(part.targets), "labels of other images"
            assert part.targets.max() < 10, "labels above 9"
            data += [part.data[:, None], part.targets]  # (N, 1, H, W), (N,)
    except Exception as error:  # no network, full disk, cut file, ...
        folder = Path(root) / SETS[name].__name__ / "raw"
        raise InputError(
            f"cannot read or download {name} ({error}): put its original files, and no others, "
            f"into {folder}"
        ) from None
    finally:
        socket.setdefaulttimeout(None)
        if WORLD > 1 and LOCAL_RANK == 0:
            dist.barrier()
    return data


def _read_picture(path, size):
    """The picture's middle square, (size, size, 3) uint8, or what keeps it from being read."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
                picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            return np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size)))
    except Exception as error:  # Pillow's plugins raise what they like
        return repr(error)


@functools.lru_cache
def _read_folder(folder, size, seed):
    """All pictures below folder, a tenth held out -> as load_data."""
    known = (*datasets.folder.IMG_EXTENSIONS, ".gif")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in known]
    paths = [path for path in paths if not path.name.startswith(("vae_", "ddpm_"))]  # drawn here
    found = [_read_picture(path, size) for path in tqdm(paths, "reading", disable=RANK > 0)]
    good = [pixels for pixels in found if not isinstance(pixels, str)]
    bad = [f"{p} ({why})" for p, why in zip(paths, found, strict=True) if isinstance(why, str)]
    if bad:
        log(f"skipped {len(bad)} of {len(paths)}, unreadable: {', '.join(bad[:3])}")
    if len(good) < 2:
        raise InputError(f"{len(good)} pictures can be read below {folder}: 2 are the least")
    x = torch.from_numpy(np.stack(good)).permute(0, 3, 1, 2)
    if (x == x[:, :1]).all():
        x = x[:, :1]  # all are gray
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))].contiguous()
    held_out = math.ceil(len(x) / 10)
    return x[held_out:], None, x[:held_out], None


def title(settings):
    """What a model was trained on, and for how long."""
    name = Path(settings["data"]).resolve().name.replace("$", r"\$")  # no formula
    if settings["data"] in SETS:
        name = SETS[settings["data"]].__name__
    return f"{name}, {settings['epochs']} epochs"


# ---- plots: x are images (N, C, H, W) in [0, 1]


def _picture(x, columns, title, gap=2, top=(), left=()):
    """A figure of the images, row by row, with labels above and left -> figure, axes."""
    pixels = make_grid(x.detach().cpu().float().clamp(0, 1), columns, gap, pad_value=1)
    pixels = pixels.permute(1, 2, 0).numpy()  # (height, width, 3)
    height, width, _ = pixels.shape
    zoom = max(1, min(4, 1200 // width, 60000 // height))  # matplotlib's limit: 65535
    figure = Figure(figsize=(width * zoom / 130, height * zoom / 130), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))  # title and labels lie outside
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title)
    H, W = x.shape[2:]
    axes.set_xticks([gap + i * (W + gap) + W / 2 for i in range(len(top))], top)
    axes.set_yticks([gap + i * (H + gap) + H / 2 for i in range(len(left))], left)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    return figure, axes


def _save(figure, path):
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)


def plot_grid(x, path, title, columns=10):
    """The images, row by row."""
    figure, _ = _picture(x, min(columns, len(x)), title)
    _save(figure, path)


def plot_rows(rows, path, title, columns=()):
    """One row of images for each of rows, {label: x}; columns: labels on top."""
    x = torch.cat([row.detach().cpu().float() for row in rows.values()])
    figure, _ = _picture(x, len(x) // len(rows), title, top=columns, left=list(rows))
    _save(figure, path)


def plot_curves(history, curves, path, title, ylabel):
    """One line over the epochs for each of curves, {label: key of a row of history}."""
    figure = Figure(figsize=(6, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    for label, key in curves.items():
        axes.plot(epochs, [row[key] for row in history], marker=".", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_latent(mu, labels, path, title):
    """Points mu (N, 2), coloured by labels (N,) or None, over 1 and 2 sigma of N(0, I)."""
    labels = torch.zeros(len(mu)) if labels is None else labels.cpu()
    figure = Figure(figsize=(6, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for label in labels.unique().int().tolist():
        points = mu.detach().cpu()[labels == label].numpy()
        axes.scatter(*points.T, s=3, alpha=0.6, linewidth=0, color=f"C{label}", label=label)
    for radius in 1, 2:
        axes.add_patch(Circle((0, 0), radius, fill=False, alpha=0.4))
    axes.set(title=title, xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4, frameon=False)
    _save(figure, path)


def save_gif(panels, path, title, labels):
    """Panels side by side that change together: {label: x (F, C, H, W)}, a label a frame."""
    pictures = []
    for images, label in zip(zip(*panels.values(), strict=True), labels, strict=True):
        figure, axes = _picture(torch.stack(images), len(panels), title, top=list(panels))
        axes.set_xlabel(label)
        if not pictures:
            frame = figure.get_tightbbox().padded(0.1)
        file = io.BytesIO()
        figure.savefig(file, bbox_inches=frame)
        pictures.append(Image.open(file).convert("L" if len(images[0]) == 1 else "RGB"))
    durations = [100] * (len(pictures) - 1) + [2000]  # ms
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


# ---- what functions are given


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_range(name, value, low, high=math.inf):
    if not low <= value <= high:  # true for nan
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")


def in_own_dtype(module, x):
    """module(x), whatever the precision of its weights; the output has float32's, or more."""
    dtype = next(module.parameters(), x).dtype
    return module(x.to(dtype)).to(torch.promote_types(dtype, torch.float32))


# ---- devices, processes, random numbers


def pick_device(name):
    """auto, cpu, cuda or cuda:N -> torch.device.  InputError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"  # each process of torchrun takes a GPU of its own
    try:
        return torch.zeros(1).to(name).device
    except Exception as error:
        raise InputError(f"no --device {name} ({error!r:.80}): choose cpu or auto") from None


def start(args):
    """Before any work: the folder OUT, the device and the processes -> the device."""
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # a read-only disk shows only now
    except OSError as error:
        raise InputError(f"cannot write ({error}): choose another --out") from None
    device = pick_device(args.device)
    torch.set_flush_denormal(True)  # Adam's averages of dead units slow a CPU 100 times
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def wrap(model, args):
    """The model, whose forward then shares gradients with torchrun's processes, or is compiled."""
    if WORLD > 1:
        model = DistributedDataParallel(model)
    return torch.compile(model, mode="reduce-overhead") if args.compile else model


def share(order):
    """Batches of image numbers (steps, B) -> this process's part of each (steps, B / WORLD).

    From here on each process draws its own random numbers.
    """
    if order.shape[1] % WORLD:
        raise InputError(f"{WORLD} processes cannot share {order.shape[1]} images: --batch-size")
    if RANK > 0:
        torch.manual_seed(torch.initial_seed() + 10**12 * RANK)
    return order[:, RANK::WORLD]


@contextlib.contextmanager
def fork_seed(seed, device):
    """Random numbers from this seed inside; outside they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@functools.lru_cache
def has_bfloat16(device):
    """Whether bfloat16 pays: on a GPU that has it, on a CPU where it is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported():
        return True
    cpu = Path("/proc/cpuinfo")  # Intel's AVX512-BF16 alone is the slower one
    amd = cpu.exists() and "AuthenticAMD" in cpu.read_text()
    return amd and torch.cpu._is_avx512_bf16_supported()


def autocast(device):
    """Inside, matrix products and convolutions are in bfloat16 where that is fast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def log(line):
    """Prints a line, or a dict, above the bar, in the first process."""
    if isinstance(line, dict):
        values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()}
        line = "  ".join(f"{name} {value}" for name, value in values.items())
    if RANK == 0:
        tqdm.write(line)


# ---- the same command goes on: a run's settings and its checkpoint

DEFAULTS = {"data": "mnist", "size": 32, "limit": None, "seed": 0}  # of all scripts
VERSION = ", edition 3.1"  # of a checkpoint: changes when older ones would not fit


def open_run(args, path, defaults):
    """Fills in what args leave open: as in the checkpoint, if there is one, else the defaults.

    -> the settings, a dict, and the checkpoint or None.  InputError where a flag contradicts it,
    and for --sample without one.
    """
    saved = load_checkpoint(path, path.stem) if path.exists() or args.sample else None
    settings = dict(saved["settings"] if saved else defaults)
    for name, value in settings.items():
        given = getattr(args, name, None)
        if given is None:
            setattr(args, name, value)
        elif saved and given != value:
            raise InputError(f"{path} has {name} {value}, not {given}: choose another --out")
        settings[name] = getattr(args, name)
    if saved and len(saved["history"]) == args.epochs and not args.sample:
        log(f"{path} is finished: delete it or choose another --out to train anew")
    return settings, saved


def restore(saved, **parts):
    """Loads model, optimizer, ... from a checkpoint of open_run, if any -> its history."""
    if saved is None:
        return []
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["history"]


def save_checkpoint(path, settings, history, **parts):
    """Replaces `path` in one step, or leaves it as it was; the first process alone writes.

    parts: what has a state_dict, model among them.  InputError where the disk is full, or the last
    losses or weights are not finite.
    """
    values = [torch.tensor(list(history[-1].values())), *parts["model"].parameters()]
    if not all(value.isfinite().all() for value in values):
        raise InputError(f"not finite in epoch {len(history)}: lower --lr; {path} is as it was")
    if RANK > 0:
        return
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"kind": path.stem + VERSION, "settings": settings, "history": history}
    unfinished = path.with_suffix(".tmp")
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch's of a full disk
        raise InputError(f"cannot save {path} ({error}), which is as it was") from None
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(path, kind):
    """The checkpoint of save_checkpoint, on the CPU -> dict.  Runs no code that a file carries.

    InputError for a file that is missing, damaged, foreign or of another kind.
    """
    if not Path(path).exists():
        raise InputError(f"no checkpoint {path}: train first, or say with --out where it is")
    try:
        if zipfile.ZipFile(path).testzip():  # a wrong checksum, at which torch does not look
            raise zipfile.BadZipFile
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["kind"]
    except Exception as error:
        raise InputError(f"{path} is damaged ({error!r:.80}): delete it and train anew") from None
    if found != kind + VERSION:
        raise InputError(f"{path} is {found!r:.80}, not {kind + VERSION}: choose another --out")
    return saved


def load_model(path, kind, part, device, build):
    """build(settings) with a checkpoint's weights; .settings are the run's, .title is of it."""
    saved = load_checkpoint(path, kind)
    model = build(saved["settings"])
    model.load_state_dict(saved[part])
    model.settings = saved["settings"]
    model.title = title(model.settings)
    return model.eval().requires_grad_(False).to(device)


# ---- the command line


def number(kind, low, high):
    """A `type=` for argparse: text -> an int or a float, in [low, high]."""

    def parse(text):
        value = kind(text)  # argparse names its ValueError
        check_range("it", value, low, high)
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high}"
    return parse


def arguments(doc):
    """An ArgumentParser with the flags that all scripts share."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # -h has the usage
    add = parser.add_argument
    add("--data", metavar="NAME", help=f"{', '.join(SETS)} or a folder of pictures (mnist)")
    add("--data-dir", default=str(DATA_DIR), help="where named data are (data/)")
    add("--size", type=int, choices=(16, 32, 64), help="width of a folder's pictures (32)")
    add("--limit", type=number(int, 1, 10**9), help="train on that many images (all)")
    add("--out", default="results", help="folder for checkpoint and pictures (results)")
    add("--epochs", type=number(int, 1, 10**5), help="passes over the images")
    add("--batch-size", type=number(int, 1, 10**6), help="images a step, in all")
    add("--lr", type=number(float, 1e-8, 1), help="learning rate of Adam")
    add("--seed", type=number(int, 0, 10**9), help="of all random numbers (0)")
    add("--device", default="auto", help="cpu, cuda or cuda:N (cuda where there is one)")
    add("--compile", action="store_true", help="torch.compile, for a GPU")
    add("--sample", type=number(int, 1, 10000), help="only draw that many images")
    return parser


def run(main):
    """main(), which what the user can mend ends with one line."""
    sys.stdout.reconfigure(errors="replace")  # -h on a terminal without Greek letters
    try:
        main()
    except InputError as error:
        sys.exit("error: " + " ".join(str(error).split()))  # one line
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on after the last finished epoch")
    if WORLD > 1:
        dist.destroy_process_group()
