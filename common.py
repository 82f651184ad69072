"""What the scripts share: the data, the plots, a checkpoint's save and load, and the command line.

Images are uint8 tensors (N, C, H, W) where they are stored, and floats in [0, 1] where they are drawn.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure  # used without pyplot: no window, no global state
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from torchvision import datasets
from tqdm import tqdm

# torchrun starts several processes: which one is this, on its machine, of how many
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, alone))
                           for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
MINE = slice(RANK, None, WORLD)  # this process's images of a batch


class InputError(SystemExit):
    """Something the user can mend.  The message is one line: what is wrong, and what to do."""

    def __init__(self, message):
        super().__init__("error: " + " ".join(str(message).split()))


# ---- data

SETS = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "kmnist": datasets.KMNIST,
        "cifar10": datasets.CIFAR10}
NAMES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR-10"}  # in titles
DATA_DIR = Path(__file__).resolve().parent / "data"  # MNIST comes with the repository


def load_data(args, device):
    """The data of --data, on device -> x_train, y_train, x_test, y_test.

    x (N, C, H, W) uint8 in 0 ... 255; y (N,) int64, the labels, None for a folder of pictures.  Training data
    are the first args.limit.  Raises InputError where there are none, or damaged ones.
    """
    if args.data in SETS:
        if args.size:
            raise InputError(f"--size is for a folder of pictures, and --data {args.data} has its own")
        data = _read_set(args.data, args.data_dir)
    elif Path(args.data).is_dir():
        if (args.size or 32) % 4:
            raise InputError(f"--size {args.size} is not a multiple of 4: choose one that is")
        data = _read_folder(Path(args.data), args.size or 32, args.seed)
    else:
        raise InputError(f"no data called {args.data}, and no folder: choose {', '.join(SETS)} or a folder")
    x_train, y_train, x_test, y_test = (part if part is None else part.to(device) for part in data)
    return x_train[:args.limit], y_train if y_train is None else y_train[:args.limit], x_test, y_test


@functools.lru_cache
def _read_set(name, root):
    if WORLD > 1 and LOCAL_RANK:
        dist.barrier()  # one process of a machine unpacks the files before the others read them
    data, before = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds for each answer: a dead network is an error, not a wait
    try:
        for train in True, False:
            with contextlib.redirect_stdout(io.StringIO()):  # of a download's progress
                part = SETS[name](root, train=train, download=True)
            x, y = torch.as_tensor(part.data), torch.as_tensor(part.targets)
            x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)  # (N, C, H, W)
            if len(x) != len(y) or len(x) < 1 or x.dtype != torch.uint8:
                raise ValueError(f"{len(x)} images, {len(y)} labels")
            if not 0 <= y.min() <= y.max() <= 9:
                raise ValueError("a label that is none of 0 ... 9")
            data += [x.contiguous(), y]
    except Exception as error:  # no network, full disk, truncated file: torchvision has a type for each
        folder = Path(root) / ("cifar-10-batches-py" if name == "cifar10" else f"{SETS[name].__name__}/raw")
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(": ")
        if isinstance(error, OSError) or reason.startswith("Error downloading") or not folder.is_dir():
            raise InputError(f"{NAMES[name]} can be neither read nor downloaded ({reason}): put its original "
                             f"files into {folder}, or say with --data-dir where they are") from None
        raise InputError(f"{NAMES[name]} in {folder} is damaged ({reason}): delete what is not a .gz there, "
                         "then run again") from None
    finally:
        socket.setdefaulttimeout(before)
        if WORLD > 1 and not LOCAL_RANK:
            dist.barrier()  # also where it failed: then the others find out, too
    return data


@functools.lru_cache
def _read_folder(folder, size, seed):
    """All pictures below folder as squares of size pixels, a tenth held out by the seed -> as load_data."""
    known, ours = (*datasets.folder.IMG_EXTENSIONS, ".gif"), ("vae_", "ddpm_")  # ours: an earlier run drew it
    paths = sorted(path for path in folder.rglob("*")
                   if path.suffix.lower() in known and not path.name.startswith(ours))

    def read(path):
        try:
            with Image.open(path) as picture:
                picture.draft("RGB", (2 * size, 2 * size))  # a large JPEG need not be decoded whole
                picture = ImageOps.exif_transpose(picture)
                gray = picture.mode in ("1", "L", "LA") or picture.mode.startswith("I")
                if picture.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
                    picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
                if picture.has_transparency_data:  # on white
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return gray, np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size)))
        except Exception as error:  # Pillow's plugins raise what they like
            return str(error) or repr(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(tqdm(pool.map(read, paths), "reading", len(paths), unit="picture", disable=RANK > 0))
    good = [each for each in found if not isinstance(each, str)]
    bad = [f"{path} ({each})" for path, each in zip(paths, found) if isinstance(each, str)]
    if bad:
        say(f"skipped {len(bad)} of {len(paths)} pictures that cannot be read: {', '.join(bad[:3])}")
    if len(good) < 2:
        raise InputError(f"{len(good)} pictures below {folder} can be read: at least 2 are needed, better "
                         "thousands, one for training and one for testing")
    x = torch.from_numpy(np.stack([pixels for _, pixels in good])).permute(0, 3, 1, 2)
    x = x[:, :1] if all(gray for gray, _ in good) else x
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))].contiguous()
    held_out = math.ceil(len(x) / 10)
    return x[held_out:], None, x[:held_out], None


def title(settings):
    """What a model was trained on and for how long, for titles."""
    name = NAMES.get(settings["data"]) or Path(settings["data"]).resolve().name.replace("$", r"\$")
    return f"{name}, {settings['epochs']} epoch{'s' * (settings['epochs'] > 1)}"


# ---- plots

def mosaic(x, columns, gap):
    """(N, C, H, W) in [0, 1], C = 1 or 3 -> (height, width, 3): row by row, `gap` white pixels between."""
    x = x.detach().cpu().float().clamp(0, 1).expand(-1, 3, -1, -1)
    N, C, H, W = x.shape
    rows = math.ceil(N / columns)
    cells = torch.ones(rows * columns, C, H + gap, W + gap)
    cells[:N, :, :H, :W] = x
    pixels = cells.view(rows, columns, C, H + gap, W + gap).permute(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * (H + gap), columns * (W + gap), C)
    return pixels[:rows * (H + gap) - gap, :columns * (W + gap) - gap].numpy()


def _picture(pixels, title):
    """A figure of (height, width, 3) pixels, each enlarged by a whole number, and nothing else yet."""
    height, width, _ = pixels.shape
    zoom = max(1, min(4, 1200 // width, 60000 // height))  # 65535 pixels are the most that matplotlib draws
    figure = Figure(figsize=(width * zoom / 130, height * zoom / 130), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))  # the title and the labels lie outside: _save makes room for them
    axes.imshow(pixels, interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    return figure, axes


def _save(figure, path):
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)


def plot_grid(x, path, title, columns=10):
    """Images (N, C, H, W) in [0, 1], row by row."""
    figure, _ = _picture(mosaic(x, min(columns, len(x)), gap=2), title)
    _save(figure, path)


def plot_rows(rows, path, title, columns=None):
    """One row of images for each item of `rows`, {label: x (N, C, H, W) in [0, 1]}, all of the same shape.

    `columns` are N labels for the top.
    """
    x = torch.stack([row.detach().cpu().float() for row in rows.values()])
    _, N, _, H, W = x.shape
    figure, axes = _picture(mosaic(x.flatten(0, 1), N, gap=2), title)
    axes.set_yticks([i * (H + 2) + H / 2 for i in range(len(rows))], rows.keys())
    if columns:
        axes.set_xticks([i * (W + 2) + W / 2 for i in range(N)], columns)
    _save(figure, path)


def plot_curves(epochs, curves, path, title, ylabel):
    """One line over the epochs for each item of `curves`, {label: values}."""
    figure = Figure(figsize=(6, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(epochs, values, marker=".", markersize=4, linewidth=1.2, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_latent(mu, labels, path, title):
    """Points mu (N, 2), coloured by labels (N,) in 0...9, or None, over one and two sigma of N(0, I)."""
    mu = mu.detach().cpu().float()
    labels = torch.zeros(len(mu)) if labels is None else labels.cpu()
    figure = Figure(figsize=(6, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    kinds = labels.unique().int().tolist()
    for kind in kinds:
        points = mu[labels == kind].numpy()
        axes.scatter(*points.T, s=3, alpha=0.6, linewidth=0, color=f"C{kind}", label=kind)
    for radius in 1, 2:
        axes.add_patch(Circle((0, 0), radius, fill=False, color="black", alpha=0.4, linewidth=0.8))
    axes.set(title=title, xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    if len(kinds) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4, frameon=False)
    _save(figure, path)


def equal_mass_grid(n):
    """z (n², 2): an n x n grid that cuts the prior N(0, I) into cells of equal mass -> float32.

    Along each axis Φ⁻¹((i + ½) / n), i = 0...n-1   (Kingma & Welling 2014, figure 4). In the order of a
    picture's rows: the first point has the smallest z_1 and the largest z_2.
    """
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()
    z_2, z_1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([z_1, z_2], dim=-1).view(n * n, 2)


def plot_manifold(x, path, title):
    """The images x (n², C, H, W) in [0, 1] that equal_mass_grid(n) decodes to, as one seamless picture."""
    n = math.isqrt(len(x))
    H, W = x.shape[-2:]
    figure, axes = _picture(mosaic(x, n, gap=0), title)
    ticks = np.unique(np.linspace(0, n - 1, 7).round().astype(int))
    quantiles = [f"{q:.2f}" for q in equal_mass_grid(n)[:n, 0][ticks]]
    axes.set_xticks(ticks * W + W / 2, quantiles)
    axes.set_yticks((n - 1 - ticks) * H + H / 2, quantiles)
    axes.tick_params(labeltop=False, labelbottom=True)
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    _save(figure, path)


def save_gif(panels, path, title, labels):
    """Panels side by side that change together: {label: x (F, C, H, W) in [0, 1]}, and a label per frame."""
    x = torch.stack([panel.detach().cpu().float() for panel in panels.values()], dim=1)
    W, pictures = x.shape[-1], []
    figure, axes = _picture(mosaic(x[0], len(panels), gap=2), title)
    axes.set_xticks([i * (W + 2) + W / 2 for i in range(len(panels))], panels.keys())
    axes.set_xlabel(max(labels, key=len))
    frame = figure.get_tightbbox().padded(0.1)  # inches, the same for all: with the longest label
    for images, label in zip(x, labels):
        axes.images[0].set_data(mosaic(images, len(panels), gap=2))
        axes.set_xlabel(label)
        file = io.BytesIO()
        figure.savefig(file, bbox_inches=frame)
        pictures.append(Image.open(file).convert("L" if x.shape[2] == 1 else "RGB"))
    durations = [100] * (len(pictures) - 1) + [2000]  # ms; the last one is there to be looked at
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


# ---- a run's settings and its checkpoint

def settle(args, path, **defaults):
    """Fills in what args leave open -> the settings as a dict, and the checkpoint to go on from or None.

    With --resume by the settings of the checkpoint, else by defaults.  Raises InputError where the command
    line contradicts the checkpoint, and where a new run would overwrite one.
    """
    saved = load(path, path.stem) if args.resume else None
    if saved and not {"history", "model", "optimizer"} <= saved.keys():
        raise InputError(f"{path} holds weights alone: draw from it by --sample, or choose another --out")
    if saved is None and path.exists():
        raise InputError(f"{path} holds an earlier run: go on with it by --resume, delete it, or choose "
                         "another --out")
    settings = dict(data="mnist", size=None, limit=None, seed=0) | defaults
    for name in settings:
        given = getattr(args, name)
        if saved and name not in saved["settings"]:
            raise InputError(f"{path} is of another version of this code: delete it, or choose another --out")
        if saved and given not in (None, saved["settings"][name]):
            raise InputError(f"{path} was made with {name} {saved['settings'][name]}, not {given}: leave the "
                             "flag out, or choose another --out")
        settings[name] = saved["settings"][name] if saved else settings[name] if given is None else given
        setattr(args, name, settings[name])
    return settings, saved


def restore(saved, path, **parts):
    """Loads model, optimizer and the like from a checkpoint of settle -> its history; [] for None."""
    try:
        for name, part in parts.items() if saved else ():
            part.load_state_dict(saved[name])
        return saved["history"] if saved else []
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be resumed ({repr(error)[:80]}): choose another "
                         "--out") from None


def save(path, **content):
    """Saves a checkpoint whole or not at all: `path` is replaced in one step, by one process of several.

    content: kind, settings, history and state dicts, of which "model" is one.  Raises InputError where the
    disk is full, and where the last epoch ended with a loss or with weights that are not finite.
    """
    row, unfinished = content["history"][-1], path.with_suffix(".tmp")
    if not all(map(math.isfinite, row.values())) or not all(
            weight.isfinite().all() for weight in content["model"].values()):
        kept = f"{path} keeps epoch {row['epoch'] - 1}" if row["epoch"] > 1 else "nothing is saved"
        raise InputError(f"loss or weights are not finite in epoch {row['epoch']} with --lr "
                         f"{content['settings']['lr']}: lower it; {kept}")
    if RANK > 0:
        return
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
        raise InputError(f"cannot save {path} ({error}); what was there before is as it was") from None
    finally:
        unfinished.unlink(missing_ok=True)


def load(path, kind):
    """The checkpoint of `save`, on the CPU -> dict.  Runs no code that a file might carry.

    Raises InputError for a file that is missing, damaged or foreign, or whose "kind" is not `kind`.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # a wrong checksum, at which torch does not look
            raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, _ = checkpoint["kind"], checkpoint["settings"].items()
    except FileNotFoundError:
        raise InputError(f"no checkpoint {path}: train first, or say with --out where it is") from None
    except Exception as error:  # damage shows as almost any type: UnpicklingError, RuntimeError, EOFError
        raise InputError(f"{path} is damaged or no checkpoint of these scripts ({type(error).__name__}): "
                         "delete it and train anew, or choose another --out") from None
    if found != kind:
        raise InputError(f"{path} holds a {found}, not a {kind}: choose another --out")
    return checkpoint


def load_model(path, kind, part, device, build):
    """build(settings) with the weights of a checkpoint's `part`, in eval mode, with .settings and .title."""
    saved = load(path, kind)
    try:
        model = build(saved["settings"])
        model.load_state_dict(saved[part])
        model.title = title(saved["settings"])
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} is of another version of this code ({repr(error)[:60]}): train "
                         "anew") from None
    model.settings = saved["settings"]
    return model.eval().requires_grad_(False).to(device)


def batch_size(args, x):
    """args.batch_size, or the number of images where there are fewer.  The processes must divide it."""
    size = min(args.batch_size, len(x))
    if size % WORLD:
        raise InputError(f"--batch-size {size} is no multiple of the {WORLD} processes: choose one that is")
    return size


# ---- what is said while it trains

def say(line):
    """Prints a line, or a dict of numbers, beside the progress bar, in one process of several."""
    if isinstance(line, dict):
        line = "  ".join(f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in line.items())
    if RANK == 0:
        tqdm.write(line)


def show(bar, step, loss, epochs):
    """Every 50 steps, beside an epoch's bar: the loss, and how long the run and the report's would take."""
    if step % 50 == 49:
        loss = loss.item()  # the only wait for a GPU
        minutes = bar.format_dict["elapsed"] / (step + 1) * bar.total / 60  # of an epoch
        lasts = {f"{n} epochs": f"{n * minutes:.1f} min" for n in (epochs, 100)}
        bar.set_postfix({"loss": f"{loss:.4g}"} | lasts)


# ---- numbers, devices, processes

@contextlib.contextmanager
def fork_seed(seed, device):
    """Random numbers of its own inside, from `seed`; outside they go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def has_bfloat16(device):
    """Whether the hardware multiplies in bfloat16: GPUs since 2020, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device):
    """Inside, matrix products and convolutions are in bfloat16 where that is fast, else in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def average(tensors):
    """Replaces each tensor by its mean over the processes."""
    if WORLD > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)  # the sum: gloo has no mean
            tensor /= WORLD


def pick_device(name):
    """"auto", "cpu", "cuda" or "cuda:N" -> torch.device, this process's own under torchrun, which then joins.

    Raises InputError where there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA GPU")
        if device.type == "cuda":
            if WORLD > 1 and device.index is not None:
                raise RuntimeError("each process takes a GPU of its own")
            device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
        torch.zeros(1, device=device)  # is there such a one?
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}): choose auto, cpu, cuda or "
                         "cuda:N") from None
    torch.set_flush_denormal(True)  # Adam's averages of dead units shrink until a CPU is 100 times slower
    if WORLD > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


# ---- the command line

def number(kind, low, high):
    """A `type=` for argparse: text -> an int or a float, `kind`, in [low, high]; anything else is refused."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:  # false for nan
                return kind(text)
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {name} from {low} to {high}, not {text!r}")
    return parse


def arguments(doc):
    """An ArgumentParser with the flags that all scripts share; `doc` is what -h says first."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line: -h has the usage
    add = parser.add_argument
    add("--data", metavar="NAME", help=f"{', '.join(SETS)}, or a folder of pictures (default: mnist)")
    add("--data-dir", metavar="DIR", type=os.path.expanduser, default=str(DATA_DIR),
        help="where the named data are or are downloaded to (default: data/ beside the scripts)")
    add("--size", metavar="N", type=number(int, 16, 128),
        help="pictures of a folder become N x N pixels, a multiple of 4 (default: 32)")
    add("--limit", metavar="N", type=number(int, 1, 10**9), help="train on the first N images (default: all)")
    add("--out", metavar="DIR", type=os.path.expanduser, default="results",
        help="folder for checkpoints and pictures (default: results)")
    add("--epochs", metavar="N", type=number(int, 1, 100000), help="passes over the training images")
    add("--batch-size", metavar="N", type=number(int, 1, 10**6), help="images per step, of all processes")
    add("--lr", metavar="X", type=number(float, 1e-8, 1), help="learning rate of Adam")
    add("--seed", metavar="N", type=number(int, 0, 10**9), help="of all random numbers (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, cuda where there is one)")
    return parser


def output_folder(path):
    """Creates the folder if need be -> pathlib.Path.  Raises InputError if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # permission bits do not tell: root, read-only disks
    except OSError as error:
        raise InputError(f"cannot write to {path} ({error.strerror}): choose another --out") from None
    return path


def run(main):
    """Calls main(); Ctrl-C, a lack of memory and a full disk end it with one line, as InputError does."""
    sys.stdout.reconfigure(errors="replace")  # -h on a terminal without Greek letters
    try:
        main()
        if WORLD > 1:
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print("\nstopped: --resume goes on from the last finished epoch (compare.py does so by itself)",
              file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, MemoryError) or "out of memory" in str(error)
        if not memory and "allocate memory" not in str(error):
            raise
        raise InputError("out of memory: lower --batch-size if it was training, else --sample") from None
    except OSError as error:
        raise InputError(error) from None
