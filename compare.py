"""The comparison of the course report, measured: a VAE and a DDPM beside real digits.

Trains a DDPM, the report's VAE (an MLP with 2 latent numbers) and a convolutional VAE with 20
(in OUT/conv), or resumes those that are there.  It writes report.md, results.json and
figures into OUT.

  python compare.py                  with the defaults of ddpm.py
  python compare.py --recipe paper   Ho's loss, L_simple, and 100 epochs, as in the course report

In this file, images are uint8 (N, C, H, W), as the data are, unless a function says otherwise.
"""

import contextlib
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid

import common
import ddpm
import vae
from ddpm import to_image, to_model

# ---- settings

MOST = 10000  # images per row of the table
CURVE_OF = {"cuda": 10000, "cpu": 2000}  # images per point of the quality curve
BITS_OF = {"cuda": 2000, "cpu": 128}  # test images for the bound, a thousand evaluations each
SAMPLERS_OF = {"cuda": 10000, "cpu": 500}  # images per cell of the table of samplers
NOISE = 0.2  # of real digits' own distance: an excess below that comes and goes between epochs
COUNTED = 20000  # training images on which the histograms of the bound are counted
COPIES = 2000  # images that are searched for copies: comparing all pixels of all pairs is slow
RETURNED = 500  # test images that are encoded and decoded
TRAINING = {"reader": 480, "critic": 250}  # updates of the networks that measure

REAL = "real training digits"
TEST = "real test digits"
POSITION = "histogram for each pixel, no model"
HOS_DECODER = "DDPM, Ho's decoder (13)"
HOS_OWN = "DDPM, Ho's decoder and variances"
EQUAL = "until the 2-D VAE's best"
OWN = "until 1.5 times its last"
EVALUATIONS = "evaluations per sample"

# ---- train or load

RUNS = {  # script, checkpoint in OUT, settings of its own
    "DDPM": (ddpm, "ddpm.pt", {}),
    "2-D VAE": (vae, "vae.pt", {"latent_dim": 2, "network": "mlp"}),
    "conv VAE": (vae, "conv/vae.pt", {"latent_dim": 20, "network": "conv"}),
}
VAES = ("2-D VAE", "conv VAE")
SHORT_EPOCHS = {"2-D VAE": 30, "conv VAE": 10}  # beside the DDPM's recipe "short"
SHARED = ("data", "size", "limit", "seed", "precision")  # settings that all models have in common


def open_runs(args, device):
    """{name: args of its train} for each of RUNS; fills in the shared flags that args leave open.

    A flag that is not given is as in the models that OUT has already, else the default.
    InputError where flags or models contradict one another, or a model's script has changed.
    """
    out = Path(args.out)
    stored = {}  # the settings of the models that are there
    for name, (script, file, own) in RUNS.items():
        if (out / file).exists() and not args.fresh:
            # Without flags, so that changed code is reported before the settings are compared.
            run = script.parse(["--out", args.out])
            settings, _ = common.find_run(run, out / file, {}, script.CODE)
            stored[name] = vars(settings)
            if any(stored[name][flag] != value for flag, value in own.items()):
                raise common.InputError(f"{out / file} differs from {own}: choose another --out")

    for flag in SHARED:
        values = [settings[flag] for settings in stored.values()]
        if any(value != values[0] for value in values):
            raise common.InputError(f"{out} has {flag} {values}: choose another --out")
        if getattr(args, flag) is None:
            setattr(args, flag, values[0] if values else common.defaults(device)[flag])
    if args.limit and args.limit < 100:
        raise common.InputError(f"--limit {args.limit} is too few: give 100 or more")
    if args.data not in common.SETS:
        raise common.InputError(f"{args.data} has no labels: choose {', '.join(common.SETS)}")
    if args.recipe is None:
        default = ddpm.defaults(args, device)
        args.recipe = stored.get("DDPM", default)["recipe"]

    runs = {}
    for name, (script, file, own) in RUNS.items():
        run = script.parse([])
        given = {flag: value for flag, value in vars(args).items() if flag in run}
        vars(run).update(given, out=str((out / file).parent), **own)
        default = script.defaults(run, device)
        if args.recipe == "short" and name in SHORT_EPOCHS:
            default["epochs"] = SHORT_EPOCHS[name]
        settings, _ = common.find_run(run, out / file, default, script.CODE)
        run.epochs = settings.epochs
        runs[name] = run
    return runs


def trained(name, run, device, watch):
    """The model of a run, trained or loaded, and its history; draws its pictures."""
    script, file, _ = RUNS[name]
    Path(run.out).mkdir(exist_ok=True)
    _, history = script.train(run, device, watch)
    model = script.load(Path(run.out) / Path(file).name, device)
    script.draw(model, history, run, device)
    return model, history


# ---- samples


def to_bytes(x):
    """[0, 1] -> the nearest of 256 levels, uint8."""
    return (255 * x).round().byte()


def evaluations(model):
    """Network evaluations for a sample, as the pictures are drawn."""
    return ddpm.steps_and_order(model)[0] if isinstance(model, ddpm.DDPM) else 1


@contextlib.contextmanager
def seeded(seed, device):
    """Random numbers from this seed inside; outside they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def draw_samples(model, n, seed, device, precision=None):
    """n images from the seed; of a VAE the decoder's means."""
    with seeded(seed, device), common.autocast(device, precision):
        is_vae = isinstance(model, vae.VAE)
        return to_bytes(model.sample(n) if is_vae else ddpm.sample_many(model, n))


def timed_samples(model, n, seed, device, precision=None):
    """draw_samples, and the ms for each: the median of repeated draws that fill 0.2 s."""
    draw_samples(model, 1, seed, device, precision)  # to warm up
    seconds = []
    while sum(seconds) < 0.2:
        started = time.perf_counter()
        images = draw_samples(model, n, seed, device, precision)
        images.sum().item()  # waits until a GPU has finished
        seconds.append(time.perf_counter() - started)
    return images, 1000 * statistics.median(seconds) / n


SAMPLERS = {  # eta and order of ddpm.trajectory
    "Ho's": (1, 1),
    "DDIM": (0, 1),
    "second order": (1, 2),
}


@torch.no_grad()
def draw_by(model, sampler, steps, xT, precision=None):
    """The images that one of SAMPLERS draws from the noise xT in so many steps."""
    images = []
    with common.autocast(xT.device, precision):
        for part in xT.split(500):
            for _, xt, _ in model.trajectory(part, model.times(steps), *SAMPLERS[sampler]):
                x0 = xt
            images.append(to_bytes(to_image(x0)))
    return torch.cat(images)


def compare_samplers(model, yardstick, seed, device, precision):
    """Each sampler in 5, 10, 20 and 50 steps, from the same x_T.

    -> {sampler: {steps: Fréchet distance}}, {label: its first ten images}, and the number of
    images behind each distance.  Ho's takes all T steps, too: on a CPU only for the picture.
    """
    n = min(SAMPLERS_OF[device.type], yardstick.n // 4)
    distances = {sampler: {} for sampler in SAMPLERS}
    rows = {}
    with seeded(seed, device):
        xT = torch.randn(n, *model.shape, device=device)
        few = [steps for steps in (5, 10, 20, 50) if steps < model.T]
        pairs = [(sampler, steps) for sampler in SAMPLERS for steps in few]
        for sampler, steps in common.progress([*pairs, ("Ho's", model.T)], "samplers"):
            whole = steps < model.T or device.type == "cuda"
            images = draw_by(model, sampler, steps, xT if whole else xT[:10], precision)
            rows[f"{sampler}, {steps}"] = images[:10] / 255
            if whole:
                distances[sampler][steps] = yardstick.distance(images)
    return distances, rows, n


# ---- time


def describe(device):
    """The device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"a CPU, {n} thread{'s' * (n != 1)}"


def watcher(yardstick, last, device, precision=None):
    """What train calls after each epoch: points of a curve at 1, 2, 3, 5, 7, 10, 15, ... and last.

    A point has the samples' Fréchet distance, its excess over that of as many real training digits
    (this is what is left to learn), and the device that trains.
    """
    n = min(CURVE_OF[device.type], yardstick.n)
    floor = yardstick.distance(yardstick.control[:n])

    def watch(model, epoch):
        scale = 10 ** (len(str(epoch)) - 1)
        if epoch != last and epoch / scale not in (1, 1.5, 2, 3, 5, 7):
            return {}
        distance = yardstick.distance(draw_samples(model, n, yardstick.seed, device, precision))
        excess = distance - floor
        return {"images": n, "frechet": distance, "excess": excess, "device": describe(device)}

    return watch


def seconds_until(history, excess):
    """Seconds of training until the excess falls to this value, between a curve's points linearly.

    -> seconds, whether the first point was below already ("at most"); None, False if never.
    """
    curve = [row for row in history if "excess" in row]
    for before, row in zip([None, *curve], curve, strict=False):
        if row["excess"] <= excess:
            if before is None:
                return row["seconds"], True
            share = (before["excess"] - excess) / (before["excess"] - row["excess"])
            return before["seconds"] + share * (row["seconds"] - before["seconds"]), False
    return None, False


def steady(history):
    """The history as if every epoch took the median time: some include a compiler's time."""
    ends = torch.tensor([0.0, *(row["seconds"] for row in history)])
    typical = ends.diff().median().item()
    return [{**row, "seconds": typical * row["epoch"]} for row in history]


def training_numbers(model, history, vae_history, images):
    """The columns about training on so many images; EQUAL aims at vae_history's least excess."""
    usual = steady(history)
    reached = [row["excess"] for row in history if "excess" in row]
    vae_reached = [row["excess"] for row in vae_history if "excess" in row]
    equal = own = None
    if reached and vae_reached:
        equal = seconds_until(usual, min(vae_reached))
    if reached and reached[-1] > 0:  # an excess below 0 is noise, and no target
        own = seconds_until(usual, 1.5 * reached[-1])
    batch_size = min(model.settings["batch_size"], images)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply-adds": multiply_adds(model),
        "epochs": len(history),
        "batch": batch_size,
        "updates": len(history) * (images // batch_size),
        "training, s": usual[-1]["seconds"],
        "s per epoch": usual[-1]["seconds"] / len(history),
        "training, s, with all waiting": history[-1]["seconds"],
        EQUAL: equal,
        OWN: own,
    }


@torch.no_grad()
def multiply_adds(model):
    """Those of one image in training's forward pass, in convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *model.shape, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2


# ---- measures


class Classifier(nn.Module):
    """Classes of images (B, C, H, W) with levels 0 ... 255, (B, classes).

    features (B, 128) is what comes before the last layer.
    """

    def __init__(self, shape, classes, width):
        super().__init__()
        C, H, W = shape
        layers = []
        for cin, cout, kernel in (C, width, 5), (width, 2 * width, 3), (2 * width, 4 * width, 3):
            conv = nn.Conv2d(cin, cout, kernel, stride=2, padding=kernel // 2)
            layers += [conv, nn.BatchNorm2d(cout), nn.ReLU()]
        area = math.ceil(H / 8) * math.ceil(W / 8)
        hidden = nn.Linear(4 * width * area, 128)
        self.layers = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU())
        self.leave = nn.Linear(128, classes)
        self.to(memory_format=torch.channels_last)  # many times faster in bfloat16 on a CPU

    def features(self, images):
        return self.layers((images / 255).contiguous(memory_format=torch.channels_last))

    def forward(self, images):
        return self.leave(self.features(images))


def fit(model, inputs, labels, steps, lr, weight_decay, shift=0):
    """Trains a classifier, on batches of images that are shifted by up to so many pixels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for _ in common.progress(range(steps), "classifier"):
        batch = torch.randint(len(inputs), (256,), device=inputs.device)
        x = inputs[batch]
        if shift:
            x = x.roll(torch.randint(-shift, shift + 1, (2,)).tolist(), (2, 3))
        loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


def told_apart(make_critic, real, fake, seed):
    """How often a critic that was trained on half of both sets is right about the other halves.

    ½: it cannot tell them apart.  real and fake, (N, ...) each, are inputs of the network that
    make_critic() returns.  Lopez-Paz & Oquab 2017, section 3
    """
    n = min(len(real), len(fake)) // 2
    learned = torch.cat([real[:n], fake[:n]])
    asked = torch.cat([real[n : 2 * n], fake[n : 2 * n]])
    labels = torch.arange(2 * n, device=real.device) // n  # 0 where real
    with seeded(seed, real.device):
        critic = make_critic().to(real.device)
        fit(critic, learned, labels, TRAINING["critic"], lr=4e-3, weight_decay=0.05)
    found = torch.cat([critic(batch).argmax(1) for batch in asked.split(500)])
    return (found == labels).double().mean().item()


def frechet(a, b):
    """|Δμ|² + tr(A + B - 2 √(√B A √B)) of features (n, d) and (m, d), which falls with n.

    The Fréchet distance of fitted normals.  Heusel et al. 2017 (6), there of other features
    """
    a = a.double()
    b = b.double()
    A = torch.cov(a.T)
    B = torch.cov(b.T)
    values, vectors = torch.linalg.eigh(B)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # √B
    cross = torch.linalg.eigvalsh(root @ A @ root).clamp(min=0).sqrt().sum()
    shift = a.mean(0) - b.mean(0)
    return (shift @ shift + A.trace() + B.trace() - 2 * cross).item()


def nearest(a, b):
    """Distance from each of a (n, d) to the nearest of b (m, d), and which that is: (n,) each."""
    found = [torch.cdist(part, b).min(1) for part in a.split(500)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def coverage(samples, real, k=5):
    """Share of real (n, d) with one of samples (m, d) as near as the k-th neighbour among real.

    Naeem et al. 2020 (5)
    """
    # the first is the point itself
    radii = [torch.cdist(part, real).kthvalue(k + 1).values for part in real.split(500)]
    distances, _ = nearest(real, samples)
    return (distances <= torch.cat(radii)).double().mean().item()


class Yardstick:
    """Measures images against test images and three parts of the training images.

    The parts are the same for all seeds.  known: the reader, a classifier of
    digits, is trained on these, and "far" is the distance to them; critics: the critics learn to
    tell samples from these; control: a row of the table.  n: images in each part but the first.
    """

    def __init__(self, x_train, y_train, x_test, y_test, seed, most):
        n = min(most, len(x_train) // 4, len(x_test))
        order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(0))
        order = order.to(x_train.device)
        known = order[2 * n :]
        self.n = n
        self.seed = seed
        self.critics = x_train[order[:n]]
        self.control = x_train[order[n : 2 * n]]
        self.test = x_test[:n]
        self.classes = torch.bincount(y_train, minlength=10) / len(y_train)
        with seeded(0, x_train.device):
            self.reader = Classifier(x_train.shape[1:], 10, width=24).to(x_train.device)
            steps = TRAINING["reader"]
            fit(self.reader, x_train[known], y_train[known], steps, 4e-3, 0.0, shift=2)
        self.known_features, _ = self.read(x_train[known])
        self.test_features, probabilities = self.read(self.test)
        self.accuracy = (probabilities.argmax(1) == y_test[:n]).double().mean().item()
        self.far = nearest(self.test_features, self.known_features)[0].quantile(0.99)
        self.pixels = x_train.flatten(1).float()
        self.copied = nearest(self.test[:COPIES].flatten(1).float(), self.pixels)[0].quantile(0.01)
        self.critics_known = self.know(self.critics)
        self.critics_known_by_shape = self.know(by_shape(self.critics))

    def read(self, images):
        """-> features (N, 128) and probabilities of the ten classes (N, 10)."""
        features = torch.cat([self.reader.features(part) for part in images.split(500)])
        return features, self.reader.leave(features).softmax(1)

    def know(self, images):
        """All that the columns know of an image: features, confidence, distance, (N, 130)."""
        features, probabilities = self.read(images)
        distance, _ = nearest(features, self.known_features)
        known = [features, probabilities.amax(1, keepdim=True), distance[:, None]]
        return torch.cat(known, dim=1)

    def distance(self, images):
        """Fréchet distance to the test images."""
        return frechet(self.read(images)[0], self.test_features)

    def told(self, images, known, real, real_known):
        """told_apart by a CNN, which sees gray and blur, and by an MLP, which sees what is shown.

        known, real_known: what know says of images and of real.
        """
        # log1p, because distances have a long tail
        inputs = [
            torch.cat([each[:, :-1], each[:, -1:].log1p()], 1) for each in (known, real_known)
        ]
        mean = inputs[1].mean(0)
        sigma = inputs[1].std(0) + 1e-3  # some features are always 0
        known, real_known = (((each - mean) / sigma).clamp(-10, 10) for each in inputs)

        def mlp():
            layers = nn.Linear(known.shape[1], 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 2)
            return nn.Sequential(*layers)

        def cnn():
            return Classifier(images.shape[1:], 2, width=16)

        return {
            "CNN": told_apart(cnn, real, images, self.seed),
            "MLP": told_apart(mlp, real_known, known, self.seed),
        }

    def measure(self, images):
        """The columns about images; and a dict of what else is known about them."""
        known = self.know(images)
        features = known[:, :-2]
        confidence, far = known[:, -2:].unbind(1)
        read = self.reader.leave(features).argmax(1)
        classes = torch.bincount(read, minlength=10) / len(images)
        unsure = confidence < 0.9
        far = far > self.far
        copied, _ = nearest(images[:COPIES].flatten(1).float(), self.pixels)
        told = self.told(images, known, self.critics, self.critics_known)
        cut = by_shape(images)
        real = by_shape(self.critics)
        told_by_shape = self.told(cut, self.know(cut), real, self.critics_known_by_shape)
        row = {
            "told from real": max(told.values()),
            "by shape alone": max(told_by_shape.values()),
            "Fréchet distance": frechet(features, self.test_features),
            "coverage": coverage(features, self.test_features),
            "unsure": share(unsure),
            "far": share(far),
            "degenerate": share(unsure | far),
            "copied": share(copied < self.copied),
            "classes off by": (classes - self.classes).abs().sum().item() / 2,  # total variation
        }
        more = {"told": told, "told by shape": told_by_shape, "classes": classes.tolist()}
        return row, more


def share(which):
    """The share of true values, a float."""
    return which.double().mean().item()


def by_shape(images):
    """Cut at ½, so that neither blur nor gray can be seen."""
    return 255 * (images > 127).byte()


RULES = ("unsure", "far", "degenerate")


def audit(rows):
    """The accuracy of rules such as "unsure, therefore not real": {row: {column: accuracy}}.

    No column may tell samples from real digits better than the critics do, but for "copied": the
    real digits here are themselves training digits.
    """
    found = {}
    for name, row in rows.items():
        gaps = {column: row[column] - rows[REAL][column] for column in RULES}
        found[name] = {column: 0.5 + gap / 2 for column, gap in gaps.items()}
    return found


# ---- the bound, of both models by one kind of decoder

BINS = (32, 64, 128, 256, 512, 1024)  # of the decoder's mean, to choose from
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # chains of so many steps, and of all
FIRST = (1, 8, 64)  # times at which a chain's decoder may stand


def bits(nats, shape):
    """nats per image -> bits/dim."""
    return nats / (math.prod(shape) * math.log(2))


def histogram_bits(images, bins, counted, counted_bins, n):
    """-log p(level | bin) of images in bits/dim, (B,), where p is counted on other images.

    bins: in 0 ... n-1, as the images.  Every count is raised by 0.1, so that no p is 0.
    """
    cells = 256 * counted_bins + counted.long()
    counts = torch.bincount(cells.flatten(), minlength=256 * n).view(n, 256) + 0.1
    log_p = (counts / counts.sum(1, keepdim=True)).log2()
    return -log_p[bins, images.long()].flatten(1).mean(1)


def position_bits(images, counted):
    """bits/dim of images (B,) without a model: by a histogram for each pixel's position."""
    D = math.prod(images.shape[1:])
    bins = torch.arange(D, device=images.device).view(1, *images.shape[1:])
    return histogram_bits(images, bins, counted, bins, D)


def decoder_bits(mean_of, parts):
    """-log p(images | mean) in bits/dim, by a histogram of the levels for each bin of the mean.

    mean_of: images -> the model's means in [0, 1] after one draw of the latents.
    parts: {"counted", "chosen", "test"}: images on which the histograms are counted, others on
    which the best of BINS is chosen, and those of the result.
    -> (B,) of "test", the mean of "chosen", the number of bins.
    """
    means = {}
    for name, images in parts.items():
        means[name] = torch.cat([mean_of(part) for part in images.split(500)])

    def cost(name, n):
        bins, counted = [(n * means[each]).long().clamp(0, n - 1) for each in (name, "counted")]
        return histogram_bits(parts[name], bins, parts["counted"], counted, n)

    costs = {n: cost("chosen", n).mean().item() for n in BINS}
    n = min(costs, key=costs.get)
    return cost("test", n), costs[n], n


def mean_and_error(values):
    """(B,) -> their mean and its standard error."""
    error = values.double().std() / len(values) ** 0.5
    return values.mean().item(), error.item()


def bound(decoder, kl):
    """A row of the table of bits: both parts (B,), their sum and its standard error."""
    total, error = mean_and_error(decoder.cpu() + kl.cpu())
    parts = {"decoder": decoder.mean().item(), "KL": kl.mean().item()}
    return parts | {"total": total, "standard error": error}


def vae_bits(model, parts, seed):
    """Both terms of -ELBO in bits/dim, and the decoder's bins.  KW (7)"""

    def mean_of(part):
        mu, logvar = model.encode(part / 255)
        return model.decode(model.reparameterize(mu, logvar))

    with seeded(seed, parts["test"].device):
        decoder, _, bins = decoder_bits(mean_of, parts)  # -E_q log p(x|z)
    kl = vae.kl_to_prior(*model.encode(parts["test"] / 255))
    return bound(decoder, bits(kl, model.shape)) | {"bins": bins}


def x0_errors(model, x0):
    """ddpm.x0_error at every time: x0 (B, C, H, W) -> (B, T+1), column t for t."""
    times = common.progress(range(1, model.T + 1), "bound")
    columns = [ddpm.x0_error(model, x0, t) for t in times]
    return torch.stack([torch.zeros_like(columns[0]), *columns], dim=1)


def chain_kl(model, times, errors, mse):
    """The KLs of ddpm.vlb_terms through times, all but L_T, summed, in bits/dim, (B,).

    σ_t² is the best: β̃ plus the mean's squared error (Bao et al. 2022).
    errors: of x0_errors, (B, T+1); mse: the same for each pixel on training images, (T+1,)
    """
    nats = torch.zeros(len(errors), dtype=torch.float64)
    for t, s in list(itertools.pairwise(times))[:-1]:  # but the last step, which is the decoder
        of_x0, beta_tilde = model.q_posterior(1.0, 0.0, t, s)
        variance = beta_tilde + of_x0**2 * mse[t].item()
        nats += ddpm.kl_of_step(model, t, s, errors[:, t], variance).cpu().double()
    return bits(nats, model.shape)


def best_chains(model, mse, decoders):
    """{K: the K+1 times T ... 0 of the chain of at most K steps with the least bound}.

    mse: of chain_kl; decoders: {t: bits of the decoder at t}, both of training images.
    With the best variance, a step from t to s costs ½ log(1 + mse_t (SNR_s - SNR_t)), with the
    signal-to-noise ratio SNR = ᾱ / (1-ᾱ).  So the best path is found step by step (Watson et al.
    2021).
    """
    T = model.T
    alpha_bar = model.alpha_bar[1:]
    snr = alpha_bar / (1 - alpha_bar)  # of t = 1 ... T
    gain = (snr[None, :] - snr[:, None]).clamp(min=0)
    cost = 0.5 * torch.log2(1 + mse[1:, None].cpu().double() * gain)  # [t - 1, s - 1]
    t, s = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    cost[s >= t] = math.inf

    reached = torch.full((T,), math.inf, dtype=torch.float64)  # cost of the way from T to each t
    reached[-1] = 0
    came_from = []  # for each number of steps
    chains = {}
    least = math.inf
    for K in range(1, max(LENGTHS) + 1):
        for first, decoder in decoders.items():
            if reached[first - 1] + decoder < least:
                least = reached[first - 1] + decoder
                best = [0, first]
                for where in reversed(came_from):
                    best.append(where[best[-1] - 1].item() + 1)
        if K in LENGTHS and K < T:
            chains[K] = best[::-1]
        reached, where = (reached[:, None] + cost).min(0)
        came_from.append(where)
    return chains


def ddpm_bits(model, parts, seed):
    """The bound of chains of several lengths, in bits/dim.

    -> rows of the table of bits, and {K: {"total", "standard error", "times"}}: the best chain of
    at most K of the T steps, and that of all steps, which is the row "DDPM".
    """
    x0 = to_model(parts["test"] / 255)
    T = model.T
    D = math.prod(model.shape)

    def mean_at(first):
        def mean_of(part):
            x0 = to_model(part / 255)
            xt = model.q_sample(x0, first, torch.randn_like(x0))
            mean, _ = model.p_mean_variance(xt, first, 0)
            return to_image(mean)

        return mean_of

    firsts = sorted({T, *(t for t in FIRST if t < T)})
    with seeded(seed, x0.device), common.autocast(x0.device, model.settings["precision"]):
        errors = torch.cat([x0_errors(model, part) for part in x0.split(500)])
        mse = x0_errors(model, to_model(parts["chosen"][:32] / 255)).mean(0) / D
        hos_decoder = bits(ddpm.first_term(model, x0, model.times()), model.shape)
        decoders = {}
        for first in common.progress(firsts, "decoders"):
            decoders[first] = decoder_bits(mean_at(first), parts)

    last = bits(ddpm.last_term(model, x0, model.times()), model.shape).cpu()  # L_T
    lengths = best_chains(model, mse, {t: chosen for t, (_, chosen, _) in decoders.items()})
    lengths[T] = model.times()
    chains = {}
    for K, times in lengths.items():
        decoder, _, bins = decoders[times[-2]]
        row = bound(decoder, chain_kl(model, times, errors, mse) + last) | {"bins": bins}
        chains[K] = {name: row[name] for name in ("total", "standard error")} | {"times": times}
    own = [ddpm.kl_of_step(model, t, t - 1, errors[:, t]) for t in range(2, T + 1)]
    own = bits(torch.stack(own).double().sum(0), model.shape).cpu() + last
    sampled = max(length for length in lengths if length <= evaluations(model))
    rows = {
        "DDPM": row,
        f"DDPM, the best of at most {sampled} steps": chains[sampled],
        HOS_DECODER: bound(hos_decoder, chain_kl(model, times, errors, mse) + last),
        HOS_OWN: bound(hos_decoder, own),
    }
    return rows, chains


# ---- figures


def ddim_encode(model, times, x0):
    """The x_T, like x0, from which DDIM through times comes back to x0, or nearly so.

    times: T ... 0.  It takes DDIM's steps backwards; the first noisy image is x0 itself.
    Song et al. 2021, section 4.3
    """
    xt = x0
    for t, later in itertools.pairwise(times[-2::-1]):
        x0_hat = model.predict_x0(xt, t)
        signal_rate, noise_rate = model.rates(t)
        eps_hat = (xt - signal_rate * x0_hat) / noise_rate
        xt = model.q_sample(x0_hat, later, eps_hat)
    return xt


@torch.no_grad()
def there_and_back(model, x):
    """Images x in [0, 1], encoded and decoded: like x.  The DDPM's code is x_T, by DDIM."""
    if isinstance(model, vae.VAE):
        return model.decode(model.encode(x)[0])
    times = model.times(min(50, model.T))
    with common.autocast(x.device, model.settings["precision"]):
        xT = ddim_encode(model, times, to_model(x))
        *_, (_, back, _) = model.trajectory(xT, times, eta=0)
    return to_image(back)


def relative_error(x, back):
    """‖x - x̂‖² / ‖x‖² of images (B, C, H, W) in [0, 1], (B,)."""
    return (x - back).square().flatten(1).sum(1) / x.square().flatten(1).sum(1)


@torch.no_grad()
def reconstructions(models, x):
    """Images x in [0, 1], encoded and decoded -> {label: like x}."""
    rows = {TEST: x}
    for name in VAES:
        rows[f"{name}: {models[name].latent_dim} numbers"] = there_and_back(models[name], x)
    model = models["DDPM"]
    rows[f"DDPM, DDIM: {math.prod(model.shape)} numbers"] = there_and_back(model, x)
    times = model.times(evaluations(model))
    with common.autocast(x.device, model.settings["precision"]):
        for part in 0.25, 0.5, 0.75:
            start = min(range(len(times) - 1), key=lambda i: abs(times[i] - part * model.T))
            t = times[start]
            x0 = to_model(x)
            xt = model.q_sample(x0, t, torch.randn_like(x0))
            *_, (_, back, _) = model.trajectory(xt, times[start:], order=2)
            rows[f"DDPM, noise to t = {t} and back"] = to_image(back)
    return rows


@common.plain_style
def figure_1(model, x, labels, out, title):
    """The report's figure 1, for x (N, C, H, W) in [0, 1]: ε (one for all), z, means of p(x|z)."""
    eps = torch.randn(200, 2, device=x.device)
    eps = eps[eps[:, 0].argsort()]
    crosses = [0, 100, 199]  # the least, the median and the greatest ε_1
    mu, logvar = model.encode(x)
    z = model.reparameterize(mu[:, None], logvar[:, None], eps)  # (N, 200, 2)
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    figure.suptitle(
        f"{title}: " + r"gradients flow through $z$ to $\mu$ and $\sigma$, not to $\epsilon$"
    )
    left, middle, right = figure.subplots(1, 3)
    left.plot(*eps.cpu().T, ".", color="gray", markersize=3)
    left.plot(*eps[crosses].cpu().T, "kx")
    left.set(title=r"$\epsilon \sim N(0, I)$", xlabel=r"$\epsilon_1$", ylabel=r"$\epsilon_2$")
    for points, label in zip(z.cpu(), labels.tolist(), strict=True):
        middle.plot(*points.T, ".", color=f"C{label}", label=label, markersize=3)
        middle.plot(*points[crosses].T, "kx")
    middle.set(title=r"$z = \mu(x) + \sigma(x) \odot \epsilon$", xlabel="$z_1$", ylabel="$z_2$")
    middle.legend(title="$x$ shows a", markerscale=3)
    rows = torch.cat([x[:, None], model.decode(z[:, crosses])], dim=1)  # (N, 4, C, H, W)
    right.imshow(make_grid(rows.flatten(0, 1).cpu(), 4, padding=0).permute(1, 2, 0).numpy())
    right.set_title("$x$, and the decoded crosses")
    right.set_axis_off()
    common.save_figure(figure, out / "figure1_reparameterization.png")


@torch.no_grad()
def figure_2(model, yardstick, images, labels, out, title):
    """The report's figure 2, for images picked by relative_error."""
    x = images / 255
    again = torch.cat([there_and_back(model, batch) for batch in x.split(1000)])
    error = relative_error(x, again)
    found = yardstick.read(to_bytes(again))[1].argmax(1)
    order = error.argsort()
    wrong = order[(found != labels)[order]]
    right = order[(found == labels)[order]]
    picks = torch.cat([wrong[-1:], wrong[:1], right[len(right) // 2 :][:1]]).tolist()
    kinds = ("lost", "near miss", "faithful")[-len(picks) :]  # no digit may be misread
    names = []
    for kind, i in zip(kinds, picks, strict=True):
        names.append(f"{kind}:\n{labels[i]}, read as {found[i]}")
    title = f"{title}: misread digits with the largest\nand smallest error; median of the others"
    rows = {TEST: x[picks], "reconstructions": again[picks]}
    common.plot_rows(rows, out / "figure2_reconstructions.png", title, names)


@common.plain_style
def plot_lines(lines, levels, path, title, xlabel, ylabel, yscale="log"):
    """Lines {label: (x, y)} and horizontal ones {label: y}; x is logarithmic."""
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for label, (x, y) in lines.items():
        axes.plot(x, y, marker="o", markersize=9 / (1 + len(x)) ** 0.4, label=label)
    for i, (label, y) in enumerate(levels.items()):
        axes.axhline(y, color=f"C{len(lines) + i}", linestyle="--", label=label)
    axes.set(xscale="log", yscale=yscale, title=title, xlabel=xlabel, ylabel=ylabel)
    for axis in (axes.xaxis, axes.yaxis) if yscale == "log" else (axes.xaxis,):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    common.save_figure(figure, path)


@common.plain_style
def draw_figures(results, out):
    """The figures of numbers."""
    name = results["name"]
    noise = NOISE * results["curve floor"]
    lines = {}
    for label, history in results["histories"].items():
        curve = [row for row in steady(history) if "excess" in row]
        if curve:
            excess = [max(row["excess"], noise) for row in curve]
            line = [row["seconds"] for row in curve], excess
            lines[f"{label}, {results['rows'][label]['trained on']}"] = line
    title = f"{name}: quality against training time"
    ylabel = f"Fréchet distance of {results['curve n']} samples\nminus that of real digits"
    levels = {"below this: noise": noise}
    plot_lines(lines, levels, out / "quality.png", title, "seconds of training", ylabel)

    rows = results["bits"]
    chains = results["chains"]
    points = [(int(K), chain["total"]) for K, chain in chains.items()]
    lines = {"DDPM, the best of at most K steps": zip(*points[:-1], strict=True)}
    lines["DDPM, all its steps"] = zip(points[-1], strict=True)
    for label in VAES:
        lines[label] = [1], [rows[label]["total"]]
    levels = {POSITION: rows[POSITION]["total"]}
    title = f"{name}: from one latent layer to {max(map(int, chains))}"
    axes = ("latent layers K", "-ELBO in bits/dim, lower is better")
    plot_lines(lines, levels, out / "bound_bridge.png", title, *axes, "linear")

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate((REAL, *RUNS)):
        places = [c + 0.2 * (i - 1.5) for c in range(10)]
        axes.bar(places, results["classes"][label], 0.2, label=label)
    title = f"{name}: classes of {results['n']} images each"
    axes.set(title=title, xlabel="class read by the classifier", ylabel="share", xticks=range(10))
    figure.legend(loc="outside lower center", ncols=4)
    common.save_figure(figure, out / "diversity.png")


@torch.no_grad()
def draw_pictures(models, samples, yardstick, data, name, out):
    """The figures of images."""
    x_train, x_test, y_test = data
    every = {TEST: yardstick.test, **samples}
    title = f"{name}: the first ten from the seed (VAEs: decoder means)"
    rows = {label: images[:10] / 255 for label, images in every.items()}
    common.plot_rows(rows, out / "figure3_samples.png", title)
    title = f"{name}: the first {min(30, yardstick.n)}"
    thirty = {label: images[:30] / 255 for label, images in every.items()}
    common.plot_rows(thirty, out / "thirty_samples.png", title)

    known = x_train.flatten(1) / 255
    shown = {}
    notes = {}
    for label, x in rows.items():
        distances, which = nearest(x.flatten(1), known)
        shown[label] = x
        shown[f"nearest to {label}"] = x_train[which] / 255
        notes[f"nearest to {label}"] = [f"{distance:.1f}" for distance in distances]
    title = f"{name}: the nearest of {len(known)} training images, and its distance"
    common.plot_rows(shown, out / "neighbours.png", title, notes=notes)

    title = f"{name}: test images, encoded and decoded"
    common.plot_rows(
        reconstructions(models, x_test[:10] / 255), out / "reconstructions.png", title
    )
    model = models["2-D VAE"]
    title = f"2-D VAE, {name}"
    picks = [(y_test == c).nonzero()[0].item() for c in range(0, 10, 2)]  # the first of each
    figure_1(model, x_test[picks] / 255, y_test[picks], out, title)
    figure_2(model, yardstick, x_test, y_test, out, title)


# ---- what the course report says, judged

SAMPLES = {
    "told from real": "{:.1%}",
    "by shape alone": "{:.1%}",
    "Fréchet distance": "{:.1f}",
    "coverage": "{:.1%}",
    "unsure": "{:.1%}",
    "far": "{:.1%}",
    "degenerate": "{:.1%}",
    "copied": "{:.1%}",
    "classes off by": "{:.3f}",
}


def until(value):
    """What seconds_until gives, in words."""
    if value is None:
        return "not resolved"
    seconds, at_most = value
    if seconds is None:
        return "never"
    words = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"at most {words}" if at_most else words


TIMES = {
    "parameters": "{:,}".format,
    "multiply-adds": "{:,}".format,
    "trained on": "{}".format,
    "epochs": "{}".format,
    "batch": "{}".format,
    "updates": "{:,}".format,
    "training, s": "{:.0f}".format,
    "s per epoch": "{:.1f}".format,
    EQUAL: until,
    OWN: until,
    EVALUATIONS: "{}".format,
    "ms per sample": "{:.3g}".format,
}
BITS = dict.fromkeys(("decoder", "KL", "total", "standard error"), "{:.3f}") | {"bins": "{}"}


def verdict(gain, margin):
    """Whether a claim holds by a gain; beyond the margin, but within twice that, it is close."""
    if abs(gain) <= margin:
        return "about the same"
    word = "holds" if gain > 0 else "does not hold"
    return f"{word}, close" if abs(gain) < 2 * margin else word


def longer(d, v, column):
    """Whether the DDPM (row d) takes at least twice as long as the VAE (row v)."""
    if d[column] is None or v[column] is None:
        return "cannot tell"
    d_seconds, d_at_most = d[column]
    v_seconds, v_at_most = v[column]
    if d_seconds is None or v_seconds is None or (d_at_most and v_at_most):
        return "cannot tell"
    gain = math.log2(d_seconds / v_seconds)
    # An upper bound leaves open how much less it is.
    if d_at_most and gain > -1:
        return "about the same or shorter" if gain <= 1 else "cannot tell"
    if v_at_most and gain < 1:
        return "about the same or longer" if gain >= -1 else "cannot tell"
    return verdict(gain, 1)


def claims(rows, returned):
    """The course report's sentences on the DDPM, each with a verdict.

    rows: of the table.  returned: {model: relative_error of images encoded and decoded}.
    """
    d = rows["DDPM"]
    v = rows["2-D VAE"]
    real = rows[REAL]

    def numbers(column):
        shown = {"DDPM": d, **{name: rows[name] for name in VAES}, "real": real}
        cells = [f"{name} {SAMPLES[column].format(row[column])}" for name, row in shown.items()]
        return f"{column}: {', '.join(cells)}"

    def seconds(column):
        return f"DDPM {until(d[column])}, 2-D VAE {until(v[column])}"

    fidelity = min(v[column] - d[column] for column in ("told from real", "by shape alone"))
    lack = max(real["coverage"] - d["coverage"], d["classes off by"] - real["classes off by"])
    diversity = verdict(lack, 0.05)
    if lack <= 0.05:
        diversity = "does not hold, close" if lack > 0 else "does not hold"
    least = min(rows[name]["bits/dim"] for name in VAES)
    all_bits = [f"{name} {rows[name]['bits/dim']:.2f}" for name in RUNS]
    codes = {"DDPM": "x_T", "2-D VAE": "2 numbers", "conv VAE": "20 numbers"}
    errors = [f"{name} {error:.1%} ({codes[name]})" for name, error in returned.items()]
    return [
        {
            "claim": "the DDPM's outputs are of higher fidelity than the VAE's",
            "verdict": verdict(fidelity, 0.05),
            "measured": f"{numbers('told from real')}; {numbers('by shape alone')}",
            "figure": "figure3_samples.png",
        },
        {
            "claim": "it does not produce as many degenerate images",
            "verdict": verdict(v["degenerate"] - d["degenerate"], 0.05),
            "measured": numbers("degenerate"),
            "figure": "thirty_samples.png",
        },
        {
            "claim": "its samples lack diversity",
            "verdict": diversity,
            "measured": f"{numbers('coverage')}; {numbers('classes off by')}",
            "figure": "diversity.png",
        },
        {
            "claim": "it takes substantially longer to converge",
            "verdict": f"to equal quality: {longer(d, v, EQUAL)}; "
            f"to its own best: {longer(d, v, OWN)}",
            "measured": f"to the 2-D VAE's best: {seconds(EQUAL)}; "
            f"to 1.5 times its own last: {seconds(OWN)}",
            "figure": "quality.png",
        },
        {
            "claim": "its outputs cannot be compared with given images, for it starts from noise",
            "verdict": verdict(math.log2(returned["DDPM"] / returned["2-D VAE"]), 1),
            "measured": f"error of images encoded and decoded: {', '.join(errors)}",
            "figure": "reconstructions.png",
        },
        {
            "claim": "its many steps potentially allow for more expressiveness",
            "verdict": verdict(least / d["bits/dim"] - 1, 0.05),
            "measured": f"bits/dim, each with a histogram as decoder: {', '.join(all_bits)}",
            "figure": "bound_bridge.png",
        },
    ]


# ---- the report


def table(rows, columns):
    """Markdown of {row: {column: value}} for {column: its format, or a function}."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        cells = []
        for column, form in columns.items():
            show = form.format if isinstance(form, str) else form
            cells.append("" if row.get(column) is None else show(row[column]))
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LEGEND = """
Lower is better, except for coverage.  "Told from real", "by shape alone" and "copied" are best
at the value of real digits.

- **told from real**: how often a small network that has to tell these images from real training
  digits is right.  It learns from one half of each set and is asked about the other half; 50 % is
  guessing.  There are two such networks, and the one that is right more often counts, which makes
  the column up to a percent too high for real digits; better networks might tell more.  A
  convolutional one looks at the pixels.  The other,
  an MLP, is given what a classifier of digits makes of the image: its features, its confidence,
  and the distance to the nearest training digit.
- **by shape alone**: the same for images cut to black and white at ½.  That a VAE's decoder means
  are gray does not count here.
- **Fréchet distance**: how far apart the mean and the covariance of the classifier's features are,
  between these images and the test digits.  Real digits are not at 0, because two samples differ.
- **coverage**: the share of test digits that have one of these images at least as near as their
  own fifth neighbour among the test digits.
- **unsure**: the share that the classifier reads with less than 90 % confidence.
- **far**: the share that is farther from every training digit than 99 % of the test digits are.
  Near and far are distances in the classifier's features, to the {known} digits it learned from.
- **degenerate**: unsure, far, or both.
- **copied**: the share of {copies} images that are nearer to a training digit, pixel by pixel,
  than 99 % of the test digits are.  It is 1 % for digits that were never seen, and 100 % for
  training digits, and so for a model that recites them.  A blurred image, too, is near to many.
- **classes off by**: the total variation between the digits that are read and the training labels.
""".strip()


def write_report(results, out):
    """OUT/report.md."""
    r = results
    models = {name: r["rows"][name] for name in RUNS}
    judged = {each["claim"]: each for each in r["claims"]}
    columns = {"measured": "{}", "verdict": "**{}**", "figure": "[{0}]({0})"}
    whole, hos, own = (r["bits"][name] for name in ("DDPM", HOS_DECODER, HOS_OWN))
    firsts = ", ".join(map(str, FIRST)) + " or the last t"
    legend = LEGEND.format(known=f"{r['known']:,}", copies=f"{r['copies n']:,}")
    steps = {K for distances in r["samplers"].values() for K in distances}
    steps = dict.fromkeys(sorted(steps, key=int), "{:.1f}")
    returned = [f"{name} {error:.1%}" for name, error in r["returned"].items()]
    text = f"""# VAE and DDPM on {r["name"]}

{r["date"]}, measured on {r["device"]}, seed {r["seed"]}, recipe `{r["recipe"]}`.
This command took {r["seconds"] / 60:.1f} min, not counting earlier training.

## The report's claims

{table(judged, columns)}

A verdict needs a margin: 0.05 in a share, a factor of 2 in seconds and in errors, 5 % in bits/dim.
"Close" is less than twice the margin: another seed may decide otherwise.  Verdicts compare the
DDPM with the 2-D VAE, as in the course report; in bits, with the better of the two VAEs.  Fidelity
must be higher in both columns, told from real and by shape alone; diversity is lacking if either
number says so, compared with real digits.  It is "close" there if the lack is within the margin.

## Samples

{table(r["rows"], SAMPLES)}

Each row uses {r["n"]:,} images.  The DDPM's are drawn in {models["DDPM"][EVALUATIONS]}
second-order steps, and the VAEs' are decoder means.  The classifier reads
{r["accuracy"]:.1%} of the test digits correctly.  For the DDPM, the rule "degenerate, therefore
not real" is right {r["audit"]["DDPM"]["degenerate"]:.1%} of the time, and the better network
{r["rows"]["DDPM"]["told from real"]:.1%}.

![Samples](figure3_samples.png)
![Thirty samples](thirty_samples.png)
![Classes](diversity.png)
![Neighbours](neighbours.png)

## What the columns mean

{legend}

## Time

{table(models, TIMES)}

Seconds of training alone, based on the median epoch: the first one, and each one after a stop, may
wait for a compiler.  Multiply-adds are those of one image's forward pass.  The times depend on the
device and on the batch size.  "Its last" and "best" are the excess of the Fréchet distance of
{r["curve n"]:,} samples over that of real digits ({r["curve floor"]:.1f}).  An excess below
{NOISE:.0%} of that is noise, and is drawn at that level.  In all runs the learning rate falls to 0
over the epochs that were chosen, so a longer run reaches a given quality later: "its own best"
depends on that choice.  On one RTX 3090, the course report's VAE took 45 minutes, and its DDPM
over 3 hours.

![Quality](quality.png)

## Samplers

Fréchet distance of {r["samplers n"]:,} samples by the number of network evaluations (real digits:
{r["samplers floor"]:.1f}):

{table(r["samplers"], steps)}

![Samplers](samplers.png)

## The bound in bits/dim

{table(r["bits"], BITS)}

-ELBO on {r["bits n"]:,} test images.  The first row of each model has the same kind of decoder: a
histogram of the 256 levels for each bin of the mean.  It is counted on {r["counted"]:,} training
images, and the number of bins is chosen on other training images.  The DDPM's KL, which is all
terms but L_0, has the best variances there, by the errors of 32 training images.  Ho's decoder
(13), one normal for all pixels, costs {hos["total"] - whole["total"]:.3f} more, and his variances
another {own["total"] - hos["total"]:.3f}.  A chain of at most K steps is the best one of those
whose last step starts at t = {firsts}, chosen on training images by dynamic programming.

![Bridge](bound_bridge.png)

## More figures

After encoding and decoding {r["returned n"]} test images, the mean error ‖x - x̂‖² / ‖x‖² is
{", ".join(returned)}.

![Reconstructions](reconstructions.png)
![Figure 1](figure1_reparameterization.png)
![Figure 2](figure2_reconstructions.png)
![Latent space](vae_latent.png)
![Trajectory](ddpm_trajectory.png)
"""
    common.write_file(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


# ---- all of it


def compare(args, device):
    """Everything that goes into results.json; draws the pictures of images."""
    runs = open_runs(args, device)
    seed = args.seed
    whole = common.Namespace(data=args.data, size=args.size, limit=None, seed=seed)
    x_train, y_train, x_test, y_test = common.load_data(whole, args, device)  # for the measures
    mixed = torch.randperm(len(x_test), generator=torch.Generator().manual_seed(0))
    mixed = mixed.to(device)  # MNIST's first test digits are the neater ones
    x_test = x_test[mixed]
    y_test = y_test[mixed]
    seen = x_train[: args.limit]  # by the models
    most = min(MOST, (args.limit or 4 * MOST) // 4)
    yardstick = Yardstick(x_train, y_train, x_test, y_test, seed, most)

    models = {}
    histories = {}
    for name, run in runs.items():
        watch = watcher(yardstick, run.epochs, device, args.precision)
        models[name], histories[name] = trained(name, run, device, watch)

    samples = {}
    rows = {}
    for name, model in models.items():
        rows[name] = training_numbers(model, histories[name], histories["2-D VAE"], len(seen))
        drawn, ms = timed_samples(model, yardstick.n, seed, device, args.precision)
        samples[name] = drawn
        rows[name] |= {EVALUATIONS: evaluations(model), "ms per sample": ms}
        rows[name]["trained on"] = histories[name][-1].get("device", describe(device))

    images = {**samples, REAL: yardstick.control, TEST: yardstick.test}
    more = {}
    for name, each in common.progress(images.items(), "measures"):
        row, more[name] = yardstick.measure(each)
        rows[name] = rows.get(name, {}) | row
    del rows[TEST]["Fréchet distance"], rows[TEST]["coverage"]  # they are the yardstick's own

    samplers, sampled, samplers_n = compare_samplers(
        models["DDPM"], yardstick, seed, device, args.precision
    )

    given = x_test[:RETURNED] / 255
    with seeded(seed, device):
        backs = {name: there_and_back(model, given) for name, model in models.items()}
    returned = {name: relative_error(given, back).mean().item() for name, back in backs.items()}

    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    chosen = min(2000, len(seen) // 10)
    parts = {
        "counted": seen[order[chosen : chosen + COUNTED].to(device)],
        "chosen": seen[order[:chosen].to(device)],
        "test": x_test[: min(BITS_OF[device.type], max(2, yardstick.n // 20))],
    }
    bits_rows, chains = ddpm_bits(models["DDPM"], parts, seed)
    for name in VAES:
        bits_rows[name] = vae_bits(models[name], parts, seed)
    total, error = mean_and_error(position_bits(parts["test"], parts["counted"]))
    bits_rows[POSITION] = {"total": total, "standard error": error}
    for name in RUNS:
        rows[name]["bits/dim"] = bits_rows[name]["total"]

    name = common.SETS[args.data].__name__
    out = Path(args.out)
    title = f"{name}: samples from the same $x_T$ by the number of steps"
    common.plot_rows(sampled, out / "samplers.png", title)
    draw_pictures(models, samples, yardstick, (x_train, x_test, y_test), name, out)
    curve = [row for row in histories["DDPM"] if "excess" in row]
    last = curve[-1] if curve else {"images": 0, "frechet": 0.0, "excess": 0.0}
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "device": describe(device),
        "torch": torch.__version__,
        "precision": args.precision,
        "seed": seed,
        "recipe": args.recipe,
        "n": yardstick.n,
        "known": len(yardstick.known_features),
        "copies n": min(COPIES, yardstick.n),
        "curve n": last["images"],
        "curve floor": last["frechet"] - last["excess"],
        "samplers n": samplers_n,
        "samplers floor": yardstick.distance(yardstick.control[:samplers_n]),
        "bits n": len(parts["test"]),
        "counted": len(parts["counted"]),
        "returned n": len(given),
        "accuracy": yardstick.accuracy,
        "claims": claims(rows, returned),
        "rows": rows,
        "audit": audit(rows),
        "told": {
            name: {key: each[key] for key in ("told", "told by shape")}
            for name, each in more.items()
        },
        "samplers": samplers,
        "returned": returned,
        "bits": bits_rows,
        "chains": chains,
        "classes": {name: each["classes"] for name, each in more.items()},
        "settings": {name: model.settings for name, model in models.items()},
        "histories": histories,
    }


def parse(argv):
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--recipe", choices=list(ddpm.RECIPES), help="recipe of ddpm.py (default as there)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if common.WORLD > 1:
        raise common.InputError("run it without torchrun")
    if args.sample:
        raise common.InputError("--sample is for vae.py and ddpm.py")
    started = time.perf_counter()
    device = common.start(args)
    if device.type not in BITS_OF:
        common.log(f"{device} has no float64 for the measures: all of it is done by the CPU")
        device = torch.device("cpu")
    results = compare(args, device)
    results["seconds"] = time.perf_counter() - started
    out = Path(args.out)
    text = json.dumps(results, indent=1)
    common.write_file(out / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    results = json.loads(text)  # so that the report says what the file holds
    draw_figures(results, out)
    write_report(results, out)
    for each in results["claims"]:
        print("{claim}: {verdict} ({measured})".format(**each))
    print(f"wrote report.md and more in {out}/")


if __name__ == "__main__":
    common.run(main)
