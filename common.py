"""What the scripts share: the data, the plots and the command line.

Images are uint8 tensors (N, 1, 28, 28) where they are stored, and floats in [0, 1] where they are drawn.
"""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import io
import math
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure  # used without pyplot: no window, no global state
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets import MNIST
from tqdm import tqdm


NAMES = {"mnist": "MNIST", "synthetic": "SYNTHETIC digits"}  # of the data, in titles
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # it starts several processes: which one is this, of how many
RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) if TORCHRUN else alone
                           for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


class InputError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""


# ---- data

# The four files under ROOT/MNIST/raw in the order train images, train labels, test images, test labels.
MNIST_SHAPES = {
    "train-images-idx3-ubyte": (60000, 28, 28),
    "train-labels-idx1-ubyte": (60000,),
    "t10k-images-idx3-ubyte": (10000, 28, 28),
    "t10k-labels-idx1-ubyte": (10000,),
}


def read_idx(path):
    """One of the four MNIST files, checked -> a uint8 tensor of its shape in MNIST_SHAPES.

    Raises InputError for a damaged file: torchvision looks at the names alone and trips over the content.
    """
    shape = MNIST_SHAPES[path.name]
    # An idx file of bytes: the magic number 0x0800 + (number of dimensions), each dimension, the values.
    header = np.array([0x0800 + len(shape), *shape], dtype=">u4").tobytes()
    size = len(header) + math.prod(shape)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    wrong = None
    if not content:
        wrong = "it is empty"
    elif content[:4] != header[:4]:
        wrong = f"its magic number is {int.from_bytes(content[:4], 'big')}, not {0x0800 + len(shape)}"
    elif len(content) != size:
        wrong = f"it has {len(content)} bytes, not {size}"
    elif content[:len(header)] != header:
        wrong = f"its header does not say {' x '.join(map(str, shape))}"
    elif len(shape) == 1 and max(content[len(header):]) > 9:
        wrong = "it has labels above 9"
    if wrong:
        raise InputError(f"{path} is damaged: {wrong}; delete it and it is downloaded anew")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).view(shape)


def download_mnist(root):
    """Fetch MNIST into `root` -> None, or the reason why that failed, in one line."""
    print(f"downloading MNIST to {root}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds for each answer: a dead network is an error, not a wait
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(root, download=True)  # holds each archive to its published checksum
    except Exception as error:  # no network, full disk, no permission, bad archive: each has its own type
        return (str(error).strip() or repr(error)).splitlines()[-1]
    finally:
        socket.setdefaulttimeout(timeout)


def find_data(name, root):
    """Settle which data there is: "auto", "mnist" or "synthetic" -> "mnist" or "synthetic".

    MNIST lies in root/MNIST/raw and is downloaded once. Where it cannot be had, "auto" warns and goes on
    with synthetic digits, "mnist" raises InputError. Both raise it for a folder that cannot be used and for
    damaged files: a run on other data than the user believes in would be worse than none.
    """
    if name == "synthetic":
        return name
    if name not in ("auto", "mnist"):
        raise InputError(f"no data called {name!r}: choose auto, mnist or synthetic")
    raw = Path(root) / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with locked(raw, wait=True):  # one of several processes downloads
            return _find_mnist(name, root, raw)
    except OSError as error:
        raise InputError(f"no data in {raw} ({error.strerror}); choose another --data-dir") from error


def _find_mnist(name, root, raw):
    missing = [file for file in MNIST_SHAPES if not os.path.exists(raw / file)]
    if missing:
        for file in MNIST_SHAPES.keys() - missing:
            read_idx(raw / file)
        reason = download_mnist(root)
        if reason:
            problem = f"MNIST cannot be downloaded ({reason}); missing in {raw}: {', '.join(missing)}"
            if name == "mnist":
                raise InputError(f"{problem}; put them there, or choose --data synthetic")
            print(f"WARNING: {problem}\nWARNING: going on with SYNTHETIC digits", file=sys.stderr)
            return "synthetic"
    _load("mnist", Path(root))
    return "mnist"


@functools.lru_cache
def _load(name, root):
    if name == "synthetic":
        return *synthetic_digits(60000, seed=0), *synthetic_digits(10000, seed=1)
    train, train_labels, test, test_labels = (read_idx(root / "MNIST" / "raw" / f) for f in MNIST_SHAPES)
    return train.unsqueeze(1), train_labels.long(), test.unsqueeze(1), test_labels.long()


def _load_found(name, root):
    name = find_data(name, root)
    return _load(name, Path(root) if name == "mnist" else None)


def load_data(name, root, device):
    """The images, on `device`: train (60000, 1, 28, 28) and test (10000, 1, 28, 28), uint8 in 0...255.

    `name` and `root` as in find_data, which says what is raised. The tensors are kept for the next call
    and are the same ones: do not write into them.
    """
    train, _, test, _ = _load_found(name, root)
    return train.to(device), test.to(device)


def load_labels(name, root, device):
    """The digits shown by the images of load_data, on `device`: (60000,) and (10000,), int64 in 0...9."""
    _, train_labels, _, test_labels = _load_found(name, root)
    return train_labels.to(device), test_labels.to(device)


# matplotlib brings these along, so every machine draws the same digits. Left out: DejaVu Sans Mono, whose
# zero has a dot in it and reads as an eight.
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-Italic
    STIXGeneral STIXGeneralItalic cmb10 cmr10 cmss10 cmtt10""".split()


@functools.lru_cache
def _glyphs():
    """(10, fonts, 56, 56): signed distance to the outline, in pixels of the 28 x 28 frame, inside > 0."""
    size, box = 56, 40  # twice the frame and twice MNIST's 20 x 20 box: outlines finer than a pixel
    ink = torch.zeros(10, len(FONTS), size, size, dtype=torch.bool)
    for f, name in enumerate(FONTS):
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size=160)
        for digit in range(10):
            picture = Image.new("L", (300, 300))
            ImageDraw.Draw(picture).text((60, 30), str(digit), font=font, fill=255)
            picture = picture.crop(picture.getbbox())
            w, h = (round(side * box / max(picture.size)) for side in picture.size)
            top, left = (size - h) // 2, (size - w) // 2
            glyph = torch.from_numpy(np.array(picture.resize((w, h))))
            ink[digit, f, top:top + h, left:left + w] = glyph > 127

    def distance(mask):  # to the nearest pixel of the mask, by columns and then by rows
        square = (torch.arange(size)[:, None] - torch.arange(size)).square().float()
        d = torch.where(mask, 0.0, 1e6).flatten(0, 1)
        d = (d[:, None, :, :] + square[None, :, :, None]).amin(2)
        d = (d[:, :, None, :] + square[None, None, :, :]).amin(3)
        return d.sqrt().view(mask.shape)

    return (distance(~ink) - distance(ink)) / 2


def synthetic_digits(n, seed):
    """Digits for where MNIST cannot be had -> images (n, 1, 28, 28) uint8, labels (n,) int64.

    Printed glyphs, each bent like handwriting: rotated, sheared, scaled, shifted, warped, with a pen of its
    own width. White on black, about 20 x 20 pixels in the middle of the frame; n/10 of each digit, shuffled.
    The same n and seed give the same digits, and torch's global random numbers are left alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % 10
    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for start in range(0, n, 1000):  # in parts, for the memory
        label = labels[start:start + 1000]
        B = len(label)
        font = torch.randint(len(FONTS), (B,), generator=generator)
        glyph = _glyphs()[label, font].unsqueeze(1)

        # From a pixel of the image back to the glyph: scale · shear · rotation · pixel + shift.
        angle, shear = uniform(-0.25, 0.25, B), uniform(-0.35, 0.35, B)
        width, height = uniform(0.75, 1.2, B), uniform(0.95, 1.15, B)
        cos, sin, shift = angle.cos(), angle.sin(), uniform(-0.07, 0.07, 2, B)
        affine = torch.stack([
            torch.stack([width * (cos + shear * sin), width * (shear * cos - sin), shift[0]], 1),
            torch.stack([height * sin, height * cos, shift[1]], 1),
        ], 1)
        grid = F.affine_grid(affine, (B, 1, 28, 28), align_corners=False)
        # The elastic warp: random shifts on a 4 x 4 grid, smooth in between. A shift of 1 is half the frame.
        shifts = 0.08 * torch.randn(B, 2, 4, 4, generator=generator)
        warp = F.interpolate(shifts, size=(28, 28), mode="bicubic", align_corners=True)
        grid = grid + warp.permute(0, 2, 3, 1)
        distance = F.grid_sample(glyph, grid, padding_mode="border", align_corners=False)

        # A constant added to the distance widens all strokes alike: here until the thickest is as wide as a
        # random pen, but never so much narrower that hairlines vanish. Edges fade over 1.5 pixels.
        pen = uniform(1.1, 2.1, B) - glyph.amax((1, 2, 3))
        ink = (0.5 + (distance + pen.clamp(-0.1, 1.0).view(B, 1, 1, 1)) / 1.5).clamp(0, 1)
        images[start:start + 1000] = (255 * ink).round().to(torch.uint8)
    return images, labels


# ---- plots

def _mosaic(x, columns, gap):
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
    figure, _ = _picture(_mosaic(x, min(columns, len(x)), gap=2), title)
    _save(figure, path)


def plot_rows(rows, path, title, columns=None):
    """One row of images for each item of `rows`, {label: x (N, C, H, W) in [0, 1]}, all of the same shape.

    `columns` are N labels for the top.
    """
    x = torch.stack([row.detach().cpu().float() for row in rows.values()])
    _, N, _, H, W = x.shape
    figure, axes = _picture(_mosaic(x.flatten(0, 1), N, gap=2), title)
    axes.set_yticks([i * (H + 2) + H / 2 for i in range(len(rows))], rows.keys())
    if columns:
        axes.set_xticks([i * (W + 2) + W / 2 for i in range(N)], columns)
    _save(figure, path)


def plot_curves(curves, path, title, ylabel, xlabel="epoch"):
    """One line for each item of `curves`, {label: (xs, ys)}. Points that are NaN are left out."""
    figure = Figure(figsize=(6, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for label, (xs, ys) in curves.items():
        xs, ys = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
        axes.plot(xs[~np.isnan(ys)], ys[~np.isnan(ys)], marker=".", markersize=4, linewidth=1.2, label=label)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_latent(mu, labels, path, title):
    """Points mu (N, 2), coloured by their digit, labels (N,) in 0...9, over one and two sigma of N(0, I)."""
    mu, labels = mu.detach().cpu().float(), labels.cpu()
    figure = Figure(figsize=(6, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for digit in range(10):
        points = mu[labels == digit].numpy()
        axes.scatter(*points.T, s=3, alpha=0.6, linewidth=0, color=f"C{digit}", label=digit)
    for radius in 1, 2:
        axes.add_patch(Circle((0, 0), radius, fill=False, color="black", alpha=0.4, linewidth=0.8))
    axes.set(title=title, xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
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
    figure, axes = _picture(_mosaic(x, n, gap=0), title)
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
    figure, axes = _picture(_mosaic(x[0], len(panels), gap=2), title)
    axes.set_xticks([i * (W + 2) + W / 2 for i in range(len(panels))], panels.keys())
    axes.set_xlabel(max(labels, key=len))
    frame = figure.get_tightbbox().padded(0.1)  # inches, the same for all: with the longest label
    for images, label in zip(x, labels):
        axes.images[0].set_data(_mosaic(images, len(panels), gap=2))
        axes.set_xlabel(label)
        file = io.BytesIO()
        figure.savefig(file, bbox_inches=frame)
        pictures.append(Image.open(file).convert("L" if x.shape[2] == 1 else "RGB"))
    durations = [100] * (len(pictures) - 1) + [2000]  # ms; the last one is there to be looked at
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


# ---- training runs: numbers, precision, checkpoints, signals

@contextlib.contextmanager
def own_randomness(seed, device):
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


def restored(build, checkpoint, part, path):
    """build(settings) with the weights of checkpoint[part], in eval mode, and with .settings -> the model."""
    try:
        model = build(checkpoint["settings"])
        model.load_state_dict(checkpoint[part])
        NAMES[checkpoint["settings"]["data"]]  # pictures are titled with it
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} is of another version of this code ({repr(error)[:60]})") from None
    model.settings = checkpoint["settings"]
    return model.eval().requires_grad_(False)


def peak_memory(device):
    """The most bytes held so far: on the GPU by torch, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compiled(f, model, device):
    """f, a loss of model, for a GPU: fewer kernels, each of several operations.  On a CPU it is f itself.

    Where that fails (no Triton, no C compiler), one line says so and f is called as it is; so it is for a
    smaller batch, the last of an epoch, since compiling again takes longer than it saves.
    """
    if device.type != "cuda":
        return f
    fast, size = torch.compile(f, dynamic=False), 0

    def attempt(x, *args, **kwargs):
        nonlocal size
        if len(x) > size:
            try:
                out = fast(x, *args, **kwargs)  # the backward pass is only compiled when it is called
                total = sum(each.sum() for each in (out if isinstance(out, tuple) else (out,)))
                torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
                size = len(x)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the compiler's own stack may raise
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                tqdm.write(f"not compiled, so slower: {reason[:120]}", file=sys.stderr)
                size = math.inf  # no batch is compiled
        return (fast if len(x) == size else f)(x, *args, **kwargs)
    return attempt


def captured(step, device):
    """step, a training step as a function of tensors, for a GPU: recorded as a CUDA graph, then replayed.

    Small kernels take longer to launch one by one than to run; a graph launches all of a step at once.  It
    repeats the same kernels on the same memory, so all that changes from step to step must be in tensors on
    the device, the learning rate too, and what step returns holds until the next call.  The first three calls
    run as they are: they compile, and fill in the optimizer's state and the libraries' workspaces.  So does a
    smaller batch, the last of an epoch.  On a CPU or under torchrun it is step itself.
    """
    if device.type != "cuda" or TORCHRUN:
        return step
    stream, size, calls, graph, inputs, out = torch.cuda.Stream(device), 0, 0, None, None, None

    def call(*new):
        nonlocal size, calls, graph, inputs, out
        if len(new[0]) > size:
            size, calls, inputs = len(new[0]), 0, [x.clone() for x in new]
        calls += len(new[0]) == size
        if len(new[0]) < size or calls <= 3:
            stream.wait_stream(torch.cuda.current_stream(device))  # the stream on which it will be recorded
            with torch.cuda.stream(stream):
                result = step(*new)
            torch.cuda.current_stream(device).wait_stream(stream)
            return result
        if calls == 4:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):  # runs nothing yet
                    out = step(*inputs)
            except RuntimeError as error:  # no way back: allocator and random numbers are still recording
                cause = error.__context__ or error  # ending the graph fails, too
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause
                reason, script = (str(cause).strip() or repr(cause)).splitlines()[0], Path(sys.argv[0]).name
                raise InputError(f"no CUDA graph of the training step ({reason[:90]}): torchrun "
                                 f"--nproc-per-node=1 {script} does without") from error
        for held, x in zip(inputs, new):
            held.copy_(x)
        graph.replay()
        return out
    return call


class Run:
    """Where a training run stands: all that its checkpoint holds, to go on from as if it had never stopped.

    path: of the checkpoint; its stem is the model's name. settings: names in args that shape the run; a
    checkpoint made with others is refused. images: how many to train on. terms: names of what each step
    reports. parts: all that has a state_dict, by name, "model" among them. A training loop reads

        for epoch in run.epochs():
            for progress, batch in run.batches():
                x, noise = run.share(x, noise)  # this process's part of the batch
                ...
                (run.weight * loss).backward()
                run.log(loss)
            run.end_epoch(test_loss=...)
    """

    def __init__(self, path, args, settings, images, terms, device, **parts):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.path, self.name, self.terms, self.device = Path(path), Path(path).stem, terms, device
        self.parts, self.settings = parts, {name: getattr(args, name) for name in settings}
        self.total, self.images, self.batch_size = args.epochs, images, args.batch_size
        self.steps = math.ceil(images / args.batch_size)  # in an epoch
        self.epoch, self.step = 0, 0  # finished epochs, and steps of the next
        self.seconds, self.history = 0.0, []  # of training alone; a row for each epoch
        self.order, self.values = torch.empty(0), torch.empty(0)  # the epoch's permutation, the terms so far
        self.weight = 1.0  # of this process's loss
        self.pace = 50 if device.type == "cuda" or WORLD == 1 else 5  # steps; a CPU makes few a second
        saved = None
        if RANK == 0 and self.path.exists():  # rank 0's folder is the one that counts
            if args.resume:
                saved = load(self.path, self.name)
            elif not args.overwrite:
                raise InputError(f"{self.path} holds an earlier run: go on with it by --resume, replace it "
                                 f"by --overwrite, or choose another --out")
        if WORLD > 1:
            both = [saved, self.settings]
            dist.broadcast_object_list(both)
            saved, settings = both
            self._compare(settings, "rank 0 runs")
        if saved:
            self._resume(saved)
        trained = sum(p.numel() for p in parts["model"].parameters())
        precision = "bfloat16" if has_bfloat16(device) else "float32"  # by what the device can do
        print(f"{self.name}: {trained:,} parameters on {device} in {precision}, {self.total} epochs of "
              f"{self.steps} steps, {images:,} images of {self.settings['data']}; {self.epoch} epochs done",
              flush=True)

    def _compare(self, settings, who):
        for name, value in self.settings.items():
            if settings[name] != value:
                why = "a run cannot be extended, for its learning rate has fallen to zero at its end; "
                raise InputError(f"{who} with {name} {settings[name]}, not {value}: "
                                 f"{why * (name == 'epochs')}use its own settings, or choose another --out")

    def _resume(self, saved):
        try:
            self._compare(saved["settings"], f"{self.path} was made")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.epoch, self.step = saved["epoch"], saved["step"]
            self.seconds, self.history = saved["seconds"], saved["history"]
            self.order, self.values = saved["order"].to(self.device), saved["values"].to(self.device)
            torch.set_rng_state(saved["rng"])
            if self.device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.path} is of another version of this code ({repr(error)[:60]}): "
                             f"start over with --overwrite") from None

    def save(self):
        if RANK:
            return
        save({"kind": self.name, "settings": self.settings, "epoch": self.epoch, "step": self.step,
              "seconds": self.seconds, "memory": peak_memory(self.device), "history": self.history,
              "order": self.order, "values": self.values, "rng": torch.get_rng_state(),
              "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
              **{name: part.state_dict() for name, part in self.parts.items()}}, self.path)

    def share(self, *whole):
        """This process's part of tensors for a whole batch, as many images each; sets its loss's weight.

        DistributedDataParallel averages the processes' gradients alike, so a process weighs by its images.
        """
        n = len(whole[0])
        start, stop = RANK * n // WORLD, (RANK + 1) * n // WORLD
        self.weight = (stop - start) * WORLD / n
        return [tensor[start:stop] if self.weight else tensor[:1] for tensor in whole]  # never none at all

    def epochs(self):
        """1 ... the last epoch, from where the run stands, with a checkpoint after each."""
        begun = self.epoch * self.images + self.step * self.batch_size
        bar = {"total": self.total * self.images, "initial": begun, "unit": "img", "unit_scale": True}
        with _deferred_signals() as self.signals, tqdm(desc=self.name, **bar) as self.bar:
            while self.epoch < self.total:
                yield self.epoch + 1
                self.epoch, self.step = self.epoch + 1, 0
                self.order = self.values = torch.empty(0)
                self.save()
                self._stop_if_asked()

    def batches(self):
        """(share of the whole run that is done, indices of a batch) through one permutation of the images."""
        if self.step == 0:
            self.order = torch.randperm(self.images, device=self.device)
            self.values = torch.zeros(self.steps, len(self.terms), device=self.device)
        started, first = time.perf_counter(), self.step
        self.looked = first  # the terms of the steps before are known to be finite
        for batch in self.order.split(self.batch_size)[first:]:
            yield (self.epoch + self.step / self.steps) / self.total, batch
            self.step += 1
            self.bar.update(len(batch))
            if self.step % self.pace == 0 or self.step == self.steps or (self.signals and WORLD == 1):
                self._look()  # the only wait for the device
                self._stop_if_asked(since=started)
            if self.step - first == 10:  # the first steps also set things up
                steady = time.perf_counter()
            if self.step - first == 50 and self.epoch == 0 and self.total < 100:
                epoch = (time.perf_counter() - steady) / 40 * self.steps / 60  # minutes
                tqdm.write(f"{self.name}: {epoch:.1f} min an epoch here, {epoch * self.total:.1f} min for "
                           f"these {self.total}; the report's 100 take {epoch * 100:.0f} min (--epochs 100)")
        self.seconds += time.perf_counter() - started

    def _stop_if_asked(self, since=None):
        """since: when the training of the part of an epoch began that is not saved yet."""
        stop = torch.tensor(max(self.signals, default=0))
        if WORLD > 1:  # a signal may reach them at different steps, or only one of them
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        if stop:
            if since:
                self.seconds += time.perf_counter() - since
                self.save()
            self.bar.close()
            print(f"{self.name}: stopped after {self.epoch} epochs and {self.step} steps; the same command "
                  f"with --resume goes on from {self.path}", file=sys.stderr)
            sys.exit(128 + stop.item())

    def _diverged(self, what):
        kept = f"{self.path} keeps epoch {self.epoch}" if self.epoch else "nothing is saved yet"
        lr = self.settings["lr"]
        raise InputError(f"{what} of epoch {self.epoch + 1} with --lr {lr}: lower it; {kept}")

    def log(self, *values):
        """This step's terms, scalars on the device; they are kept there, so that no step waits for them."""
        self.values[self.step] = torch.stack([value.detach() for value in values]) * (self.weight / WORLD)

    def _look(self):
        if WORLD > 1:
            dist.all_reduce(self.values[self.looked:self.step])  # from here on they are of whole batches
        self.looked = self.step
        wrong = ~self.values[:self.step].isfinite().all(1)
        if wrong.any():
            self._diverged(f"the loss is not finite at step {int(wrong.int().argmax()) + 1}")
        finite = torch.stack([p.isfinite().all() for p in self.parts["model"].parameters()])  # to wait once
        if not finite.all():
            self._diverged(f"the weights are not finite after step {self.step}")
        latest = zip(self.terms, self.values[self.step - 1].tolist())
        self.bar.set_postfix({term: f"{value:.4g}" for term, value in latest})

    def end_epoch(self, **more):
        """A row of the history: the terms' means over all images of the epoch, and `more` numbers."""
        sizes = torch.tensor([len(batch) for batch in self.order.split(self.batch_size)], device=self.device)
        means = (self.values.double() * sizes[:, None]).sum(0) / self.images
        row = dict(zip(self.terms, means.tolist())) | more
        row = {"epoch": self.epoch + 1} | row | {"seconds": self.seconds}
        self.history.append(row)
        tqdm.write(f"{self.name}: " + "  ".join(f"{name} {value:.5g}" for name, value in row.items()))


@contextlib.contextmanager
def _deferred_signals():
    """Inside, Ctrl-C and SIGTERM only leave their numbers in the list: no step is torn in the middle."""
    caught = []
    before = {each: signal.signal(each, lambda number, _: caught.append(number))
              for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def farewell(name, out, files, data):
    """Say what was written where, and once more if the data were not the real ones."""
    print(f"{name}: wrote {', '.join(files)} in {out}/")
    if data == "synthetic":
        print("WARNING: all of this is about SYNTHETIC digits, not MNIST", file=sys.stderr)


# ---- several processes

_locked = set()  # folders: compare.py trains in its own


@contextlib.contextmanager
def locked(folder, wait=False):
    """Inside, the folder is this process's: another one waits for it, or without `wait` ends by InputError.

    The lock ends with the process, however that ends, and leaves no file.
    """
    key = os.path.realpath(folder)
    if key in _locked or (RANK and not wait):  # rank 0 alone writes
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"another run is writing to {folder}: let it end, or choose another --out") from None
    except OSError:
        pass  # a network disk without locks
    _locked.add(key)
    try:
        yield
    finally:
        _locked.remove(key)
        os.close(handle)


def for_training(model, method, device):
    """method of model, a loss; under torchrun with the mean of all processes' gradients."""
    if not TORCHRUN:
        return method
    loss = torch.nn.Module()  # DistributedDataParallel calls forward, and nothing else
    loss.weights, loss.forward = torch.nn.ParameterList(model.parameters()), method
    return torch.nn.parallel.DistributedDataParallel(loss, [device] if device.type == "cuda" else None)


# ---- the command line

def _fail(message):
    if RANK:  # rank 0 mostly says the same, and then torchrun ends this process: one line, not WORLD
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def number(kind, low, high):
    """A `type=` for argparse: text -> an int or a float, `kind`, in [low, high]; anything else is refused."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:  # false for nan
                return kind(text)
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {name} from {low} to {high}, not {text!r}")
    return parse


class _Manual(argparse.RawDescriptionHelpFormatter):
    """Help with the line breaks of the docstring, and with the default of every flag that has one."""

    def _get_help_string(self, action):
        silent = action.default in (None, argparse.SUPPRESS) or action.nargs == 0
        return action.help if silent else f"{action.help} (default: %(default)s)"


def arguments(doc, examples, epochs, batch_size, lr):
    """An ArgumentParser with the flags that all scripts share -> add your own, then parse_args().

    `doc` opens the help and `examples` end it. epochs=None: the script chooses by the device.
    """
    parser = argparse.ArgumentParser(
        description=doc.strip(), epilog=f"examples:\n{examples.rstrip()}", formatter_class=_Manual)
    parser.error = _fail  # one line, without the usage: -h has that
    add = parser.add_argument
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto",
        help="auto: MNIST, or synthetic digits where it cannot be had")
    add("--data-dir", metavar="DIR", type=os.path.expanduser, default=os.environ.get("DATA_DIR") or "data",
        help="where MNIST is or is downloaded to; the variable DATA_DIR sets the default")
    add("--limit", metavar="N", type=number(int, 1, 60000),
        help="train on the first N images only, for a quick look (default: all)")
    add("--out", metavar="DIR", type=os.path.expanduser, default="results",
        help="folder for checkpoints and pictures")
    add("--epochs", metavar="N", type=number(int, 1, 100000), default=epochs,
        help="passes over the training images" + " (default: by the device)" * (epochs is None))
    add("--batch-size", metavar="N", type=number(int, 1, 60000), default=batch_size,
        help="images per step" + " (default: by the device)" * (batch_size is None))
    add("--lr", metavar="X", type=number(float, 1e-8, 1), default=lr, help="learning rate of Adam")
    add("--seed", metavar="N", type=number(int, 0, 2**32 - 1), default=0, help="of all random numbers")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto is cuda where there is one")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, with the same settings")
    add("--overwrite", action="store_true", help="start over, replacing the checkpoint in --out")
    return parser


def pick_device(name):
    """"auto", "cpu", "cuda" or "cuda:N" -> torch.device. Raises InputError where there is no such device."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"no device called {name!r}: choose auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cpu":
        # Adam's averages of dead units shrink until a CPU computes with them a hundred times slower: then 0
        torch.set_flush_denormal(True)
        with contextlib.suppress(AttributeError):  # glibc alone has it
            # it would return the memory of large tensors at each step, and fetch it zeroed at the next
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, 1 << 30), mallopt(-3, 1 << 25)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
        return torch.device("cpu")
    if name != "cuda" and WORLD > 1:
        raise InputError(f"--device {name} is one GPU for {WORLD} processes: choose cuda or auto")
    index = int(name[5:] or LOCAL_RANK)
    if index >= gpus:
        raise InputError(f"no device {name}: torch sees {gpus} CUDA GPUs here; choose --device auto")
    if WORLD > 1:
        torch.cuda.set_device(index)
    return torch.device("cuda", index)


def output_folder(path):
    """Create the folder if need be -> pathlib.Path. Raises InputError if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # permission bits do not tell: root, read-only disks
    except OSError as error:
        raise InputError(f"cannot write to {path} ({error.strerror}); choose another --out") from error
    return path


def save(obj, path):
    """Save a checkpoint: all of it, or InputError and `path` as it was before.

    For `load` to take it back: a dict with "kind", of tensors, numbers, strings, None, lists and dicts.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        for left in path.parent.glob(f"{path.name}.*.tmp"):  # by a process that was killed
            left.unlink()
        content = io.BytesIO()  # to memory first: on a full disk torch.save's own error says nothing of it
        torch.save(obj, content)
        with open(unfinished, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # the content is on the disk before the name points to it
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot save {path} ({error}); what was there before is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def load(path, kind):
    """The checkpoint that `save` wrote, on the CPU -> dict. Runs no code that a file might carry.

    Raises InputError for a file that is missing, damaged or foreign, or whose "kind" is not `kind`.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # a wrong checksum, at which torch does not look
            raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint {path}; train first, or say with --out where it is") from error
    except (PermissionError, NotADirectoryError) as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # damage shows as almost any type: UnpicklingError, RuntimeError, EOFError
        raise InputError(f"{path} is damaged or no checkpoint ({type(error).__name__}); train anew") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("kind"), str):
        raise InputError(f"{path} is no checkpoint of these scripts; train anew")
    if checkpoint["kind"] != kind:
        raise InputError(f"{path} holds a {checkpoint['kind']}, not a {kind}")
    if not isinstance(checkpoint.get("settings"), dict):
        raise InputError(f"{path} is of another version of this code; train anew, with --overwrite")
    return checkpoint


@contextlib.contextmanager
def enough_memory(flag, value):
    """Where the memory of the device does not suffice inside: InputError with the flag to lower."""
    try:
        yield
    except RuntimeError as error:  # of a CPU; torch.OutOfMemoryError is one, too
        if re.search("out of memory|allocate memory", str(error)):
            raise InputError(f"out of memory with {flag} {value}: lower it") from None
        raise


def run(main):
    """Call main() and end as a program should: one line for what the user can mend, a traceback for a bug.

    Exit codes: 2 for an error, 130 for Ctrl-C, 143 for SIGTERM.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if TORCHRUN:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        quiet = open(os.devnull, "w") if RANK else None  # rank 0 alone prints
        with contextlib.redirect_stdout(quiet or sys.stdout), contextlib.redirect_stderr(quiet or sys.stderr):
            main()
        if TORCHRUN:
            time.sleep(1)  # destroy holds Python's lock, and gloo's threads still need it for a moment
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        _fail("the GPU is out of memory; lower --batch-size if it was training, else --sample")
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that went away
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
