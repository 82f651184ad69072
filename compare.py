"""Repeats the course report's comparison of a VAE and a DDPM, and measures both.

Trains three models, or resumes those that OUT already has: a DDPM, the course report's VAE (an MLP
with a 2-D latent) and a convolutional VAE with a 20-D latent (in OUT/conv).  It compares them with
real digits, and writes report.md, results.json and figures into OUT.

  python compare.py                  ddpm.py's default recipe: paper on an NVIDIA GPU, else short
  python compare.py --recipe paper   Ho's loss, L_simple, and the course report's 100 epochs

In this file, images are uint8 (N, C, H, W), as in the data, unless a function says otherwise.
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

MOST = 10000  # images per row of the table, at most
CURVE_OF = {"cuda": 10000, "cpu": 2000}  # images per point of the quality curve
BITS_OF = {"cuda": 2000, "cpu": 128}  # test images for the bound: each takes 1000 evaluations
SAMPLERS_OF = {"cuda": 10000, "cpu": 500}  # images per cell of the table of samplers
NOISE = 0.2  # as a fraction of real digits' Fréchet distance; a smaller excess is noise
COUNTED = 20000  # training images on which the histograms of the bound are counted
COPIES = 2000  # images that are searched for copies: comparing all pixels of all pairs is slow
RETURNED = 500  # test images that are encoded and decoded
UPDATES = {"reader": 480, "critic": 250}  # training updates of the networks that measure

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
SHORT_EPOCHS = {"2-D VAE": 30, "conv VAE": 10}  # of the VAEs, if the recipe is "short"
SHARED = ("data", "size", "limit", "seed", "precision")  # settings that all models have in common


def open_runs(args, device):
    """{name: the args to train it with} for each of RUNS; also completes the shared flags in args.

    A flag that is not given takes its value from the models already in OUT, else the default.
    InputError if flags or models contradict one another, or if a model's script has changed.
    """
    out = Path(args.out)
    stored = {}  # the settings of the models that OUT already has
    for name, (script, file, own) in RUNS.items():
        if (out / file).exists() and not args.fresh:
            # Without other flags, so that changed code is reported before settings are compared.
            run = script.parse(["--out", args.out])
            settings, _ = common.find_run(run, out / file, {}, script.CODE)
            stored[name] = vars(settings)
            if any(stored[name][flag] != value for flag, value in own.items()):
                wanted = ", ".join(f"{flag} {value}" for flag, value in own.items())
                raise common.InputError(f"{out / file} lacks {wanted}: choose another --out")

    for flag in SHARED:
        values = [settings[flag] for settings in stored.values()]
        if any(value != values[0] for value in values):
            values = ", ".join(map(str, values))
            raise common.InputError(
                f"the models in {out} differ in {flag} ({values}): choose another --out"
            )
        if getattr(args, flag) is None:
            setattr(args, flag, values[0] if values else common.defaults(device)[flag])
    if args.limit and args.limit < 100:
        raise common.InputError(f"--limit {args.limit} is too few images: give 100 or more")
    if args.data not in common.SETS:
        raise common.InputError(f"compare.py takes no folder: choose {', '.join(common.SETS)}")
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
    _, history = script.train(run, device, watch)
    model = script.load(Path(run.out) / Path(file).name, device)
    script.draw(model, history, run, device)
    return model, history


# ---- samples


def to_bytes(x):
    """[0, 1] -> the nearest of 256 levels, uint8."""
    return (255 * x).round().byte()


def evaluations(model):
    """Network evaluations per sample, by the sampler that draws the pictures."""
    return ddpm.steps_and_order(model)[0] if isinstance(model, ddpm.DDPM) else 1


@contextlib.contextmanager
def seeded(seed, device):
    """Inside, random numbers start from this seed; outside, they continue as if undisturbed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def draw_samples(model, n, seed, device, precision=None):
    """n images from the seed.  A VAE's are decoder means."""
    with seeded(seed, device), common.autocast(device, precision):
        is_vae = isinstance(model, vae.VAE)
        return to_bytes(model.sample(n) if is_vae else ddpm.sample_many(model, n))


def timed_samples(model, n, seed, device, precision=None):
    """draw_samples, and the ms per image: the median of draws that are repeated for 0.2 s."""
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
    """The images that one of SAMPLERS draws from the noise xT in this many steps."""
    images = []
    with common.autocast(xT.device, precision):
        for part in xT.split(500):
            for _, xt, _ in model.trajectory(part, model.times(steps), *SAMPLERS[sampler]):
                x0 = xt
            images.append(to_bytes(to_image(x0)))
    return torch.cat(images)


def compare_samplers(model, yardstick, seed, device, precision):
    """Draws with each sampler in 5, 10, 20 and 50 steps, from the same x_T.

    -> {sampler: {steps: Fréchet distance}}, {label: the first ten images}, and the number of
    images behind each distance.  Ho's sampler also takes all T steps, on a CPU only for the
    picture.
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
            rows[f"{sampler}, {steps} steps"] = images[:10] / 255
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
    """What train calls after each epoch, to measure how good the samples are by then.

    It measures at epochs 1, 2, 3, 5, 7, 10, 15, 20, 30, ... and last.  Each point of this curve
    has the samples' Fréchet distance, its excess over the distance of as many real training digits
    (this is what is left to learn), the number of images, and the device that trains.
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
    """Seconds of training until the excess falls to this value, interpolated between the points.

    -> seconds, and whether the first point was already that low ("at most").  (None, False) if the
    excess never falls that far.
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
    """The history as if every epoch took the median time, because some include compiling."""
    ends = torch.tensor([0.0, *(row["seconds"] for row in history)])
    typical = ends.diff().median().item()
    return [{**row, "seconds": typical * row["epoch"]} for row in history]


def training_numbers(model, history, vae_history, images):
    """The columns about training on this many images.

    The target of EQUAL is the least excess in vae_history.
    """
    usual = steady(history)
    reached = [row["excess"] for row in history if "excess" in row]
    vae_reached = [row["excess"] for row in vae_history if "excess" in row]
    equal = own = None
    if reached and vae_reached:
        equal = seconds_until(usual, min(vae_reached))
    if reached and reached[-1] > 0:  # an excess of 0 or less is noise, not a target
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
        "training, s, with compiling": history[-1]["seconds"],
        EQUAL: equal,
        OWN: own,
    }


@torch.no_grad()
def multiply_adds(model):
    """Multiply-adds of one image in training's forward pass: convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *model.shape, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2


# ---- measures


class Classifier(nn.Module):
    """Logits (B, classes) of the classes of images (B, C, H, W) with levels 0 ... 255.

    features (B, 128) is what comes before the last layer, which is `head`.
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
        self.head = nn.Linear(128, classes)
        self.to(memory_format=torch.channels_last)  # many times faster in bfloat16 on a CPU

    def features(self, images):
        return self.layers((images / 255).contiguous(memory_format=torch.channels_last))

    def forward(self, images):
        return self.head(self.features(images))


def fit(model, inputs, labels, steps, lr, weight_decay, shift=0):
    """Trains a classifier in `steps` updates; each batch is rolled by up to `shift` pixels."""
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
    """How often a critic that was trained on one half of each set is right about the other halves.

    This is a classifier two-sample test (Lopez-Paz & Oquab 2017, section 3): ½ means that it
    cannot tell the sets apart.  real and fake, (N, ...) each, are inputs of the network that
    make_critic() returns.
    """
    n = min(len(real), len(fake)) // 2
    learned = torch.cat([real[:n], fake[:n]])
    asked = torch.cat([real[n : 2 * n], fake[n : 2 * n]])
    labels = torch.arange(2 * n, device=real.device) // n  # 0 where real
    with seeded(seed, real.device):
        critic = make_critic().to(real.device)
        fit(critic, learned, labels, UPDATES["critic"], lr=4e-3, weight_decay=0.05)
    found = torch.cat([critic(batch).argmax(1) for batch in asked.split(500)])
    return (found == labels).double().mean().item()


def frechet(a, b):
    """The Fréchet distance between normals fitted to features a (n, d) and b (m, d).

    It is |Δμ|² + tr(A + B - 2 √(√B A √B)).  Few samples make it too large, so only distances of
    equal n can be compared.  Heusel et al. 2017 (6), there with another network's features
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
    """For each of a (n, d), the distance to the nearest of b (m, d), and its index: (n,) each."""
    found = [torch.cdist(part, b).min(1) for part in a.split(500)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def coverage(samples, real, k=5):
    """The share of real (n, d) that one of samples (m, d) is near to.

    That is, at least as near as its own k-th neighbor among real.  Naeem et al. 2020 (5)
    """
    # k + 1, because the nearest of all is the point itself.
    radii = [torch.cdist(part, real).kthvalue(k + 1).values for part in real.split(500)]
    distances, _ = nearest(real, samples)
    return (distances <= torch.cat(radii)).double().mean().item()


class Yardstick:
    """Measures images against the test images and three disjoint parts of the training images.

    The parts do not depend on the seed.  known: the reader, a classifier of digits, is trained on
    these, and "far" is measured from them.  critics: the critics learn to tell samples from these.
    control: the real digits that have a row of their own in the table.  n: the number of images in
    critics, in control and in test.
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
            steps = UPDATES["reader"]
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
        return features, self.reader.head(features).softmax(1)

    def know(self, images):
        """What the reader says of images: features, confidence, distance to known, (N, 130)."""
        features, probabilities = self.read(images)
        distance, _ = nearest(features, self.known_features)
        known = [features, probabilities.amax(1, keepdim=True), distance[:, None]]
        return torch.cat(known, dim=1)

    def distance(self, images):
        """Fréchet distance to the test images."""
        return frechet(self.read(images)[0], self.test_features)

    def told(self, images, known, real, real_known):
        """told_apart by a CNN, from the pixels, and by an MLP, from what the reader says of them.

        known, real_known: know(images) and know(real).
        """
        # The last column, the distance, has a long tail, hence log1p.
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
        """The columns about these images, and a dict of what else was measured."""
        known = self.know(images)
        features = known[:, :-2]
        confidence, far = known[:, -2:].unbind(1)
        read = self.reader.head(features).argmax(1)
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
            # the total variation distance
            "classes off by": (classes - self.classes).abs().sum().item() / 2,
        }
        more = {"told": told, "told by shape": told_by_shape, "classes": classes.tolist()}
        return row, more


def share(which):
    """The share of true values, a float."""
    return which.double().mean().item()


def by_shape(images):
    """Images thresholded at ½, so that neither blur nor gray can be seen."""
    return 255 * (images > 127).byte()


RULES = ("unsure", "far", "degenerate")


def audit(rows):
    """The accuracy of rules such as "unsure, therefore not real": {row: {column: accuracy}}.

    No such rule should tell samples from real digits better than the critics do.  "copied" is not
    among RULES, because the real digits it would be compared with are training digits themselves.
    """
    found = {}
    for name, row in rows.items():
        gaps = {column: row[column] - rows[REAL][column] for column in RULES}
        found[name] = {column: 0.5 + gap / 2 for column, gap in gaps.items()}
    return found


# ---- the bound, for all models with the same kind of decoder

BINS = (32, 64, 128, 256, 512, 1024)  # numbers of bins for the decoder's mean, to choose from
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # numbers of steps of the chains; T is added
FIRST = (1, 8, 64)  # times from which a chain's last step, the decoder, may start; T is added


def bits(nats, shape):
    """nats per image -> bits/dim."""
    return nats / (math.prod(shape) * math.log(2))


def histogram_bits(images, bins, counted, counted_bins, n):
    """-log p(level | bin) of images in bits/dim, (B,), where p is counted on other images.

    bins: ints in 0 ... n-1, shaped like images.  0.1 is added to every count, so that no p is 0.
    """
    cells = 256 * counted_bins + counted.long()
    counts = torch.bincount(cells.flatten(), minlength=256 * n).view(n, 256) + 0.1
    log_p = (counts / counts.sum(1, keepdim=True)).log2()
    return -log_p[bins, images.long()].flatten(1).mean(1)


def position_bits(images, counted):
    """bits/dim (B,) of images without a model: by one histogram for each pixel's position."""
    D = math.prod(images.shape[1:])
    bins = torch.arange(D, device=images.device).view(1, *images.shape[1:])
    return histogram_bits(images, bins, counted, bins, D)


def decoder_bits(mean_of, parts):
    """-log p(images | mean) in bits/dim, by a histogram of the levels for each bin of the mean.

    mean_of: images -> the model's means in [0, 1] after one draw of the latents.
    parts: {"counted", "chosen", "test"}: the images whose levels the histograms count, others that
    decide which of BINS is best, and those whose bits are asked for.
    -> the bits (B,) of "test", the mean bits of "chosen", and the number of bins.
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
    """(B,) -> the mean and its standard error."""
    error = values.double().std() / len(values) ** 0.5
    return values.mean().item(), error.item()


def bound(decoder, kl):
    """A row of the table of bits, from both terms (B,): their means, the total and its error."""
    total, error = mean_and_error(decoder.cpu() + kl.cpu())
    parts = {"decoder": decoder.mean().item(), "KL": kl.mean().item()}
    return parts | {"total": total, "standard error": error}


def vae_bits(model, parts, seed):
    """A row of the table of bits: both terms of -ELBO, and the number of bins.  KW (7)"""

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
    """The sum of the KLs of ddpm.vlb_terms along times, without L_T, in bits/dim, (B,).

    Each σ_t² is the best one: β̃ plus the mean squared error of the mean (Bao et al. 2022).
    errors: what x0_errors gives, (B, T+1); mse: the same per pixel, on training images, (T+1,)
    """
    nats = torch.zeros(len(errors), dtype=torch.float64)
    for t, s in list(itertools.pairwise(times))[:-1]:  # the last step is the decoder
        of_x0, beta_tilde = model.q_posterior(1.0, 0.0, t, s)
        variance = beta_tilde + of_x0**2 * mse[t].item()
        nats += ddpm.kl_of_step(model, t, s, errors[:, t], variance).cpu().double()
    return bits(nats, model.shape)


def best_chains(model, mse, decoders):
    """{K: the times T ... 0 of the chain with the least bound among those of at most K steps}.

    mse: as for chain_kl; decoders: {t: bits of the decoder at t}, both on training images.  With
    the best variance, a step from t to s costs ½ log2(1 + mse_t (SNR_s - SNR_t)) bits/dim, where
    SNR = ᾱ / (1-ᾱ) is the signal-to-noise ratio.  So dynamic programming finds the best chain
    (Watson et al. 2021).
    """
    T = model.T
    alpha_bar = model.alpha_bar[1:]
    snr = alpha_bar / (1 - alpha_bar)  # of t = 1 ... T
    gain = (snr[None, :] - snr[:, None]).clamp(min=0)
    cost = 0.5 * torch.log2(1 + mse[1:, None].cpu().double() * gain)  # [t - 1, s - 1]
    t, s = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    cost[s >= t] = math.inf

    reached = torch.full((T,), math.inf, dtype=torch.float64)  # the least cost from T to each t
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
        f"DDPM, the best chain of at most {sampled} steps": chains[sampled],
        HOS_DECODER: bound(hos_decoder, chain_kl(model, times, errors, mse) + last),
        HOS_OWN: bound(hos_decoder, own),
    }
    return rows, chains


# ---- figures


def ddim_encode(model, times, x0):
    """The x_T, shaped like x0, from which DDIM along times leads back to x0, or nearly so.

    times: T ... 0.  It takes DDIM's steps backwards, with x0 in place of the least noisy x_t.
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
    """Images x in [0, 1], encoded and decoded.  The DDPM's code is ddim_encode's x_T."""
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
    """Images x in [0, 1], encoded and decoded -> {label: images shaped like x}."""
    rows = {TEST: x}
    for name in VAES:
        rows[f"{name}: {models[name].latent_dim}-D code"] = there_and_back(models[name], x)
    model = models["DDPM"]
    rows[f"DDPM by DDIM: {math.prod(model.shape)}-D code"] = there_and_back(model, x)
    times = model.times(evaluations(model))
    with common.autocast(x.device, model.settings["precision"]):
        for part in 0.25, 0.5, 0.75:
            start = min(range(len(times) - 1), key=lambda i: abs(times[i] - part * model.T))
            t = times[start]
            x0 = to_model(x)
            xt = model.q_sample(x0, t, torch.randn_like(x0))
            *_, (_, back, _) = model.trajectory(xt, times[start:], order=2)
            rows[f"DDPM, noised to t = {t} and denoised"] = to_image(back)
    return rows


@common.plain_style
def figure_1(model, x, labels, out, title):
    """The course report's figure 1, for x (N, C, H, W) in [0, 1].

    From left to right: ε, the same for all x; z; and means of p(x|z).
    """
    eps = torch.randn(200, 2, device=x.device)
    eps = eps[eps[:, 0].argsort()]
    crosses = [0, 100, 199]  # the least, the median and the greatest ε_1
    mu, logvar = model.encode(x)
    z = model.reparameterize(mu[:, None], logvar[:, None], eps)  # (N, 200, 2)
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    figure.suptitle(
        f"{title}: " + r"the reparameterization trick; only $\mu$ and $\sigma$ are learned"
    )
    left, middle, right = figure.subplots(1, 3)
    left.plot(*eps.cpu().T, ".", color="gray", markersize=3)
    left.plot(*eps[crosses].cpu().T, "kx")
    left.set(title=r"$\epsilon \sim N(0, I)$", xlabel=r"$\epsilon_1$", ylabel=r"$\epsilon_2$")
    for points, label in zip(z.cpu(), labels.tolist(), strict=True):
        middle.plot(*points.T, ".", color=f"C{label}", label=label, markersize=3)
        middle.plot(*points[crosses].T, "kx")
    middle.set(title=r"$z = \mu(x) + \sigma(x) \odot \epsilon$", xlabel="$z_1$", ylabel="$z_2$")
    middle.legend(title="digit", markerscale=3)
    rows = torch.cat([x[:, None], model.decode(z[:, crosses])], dim=1)  # (N, 4, C, H, W)
    right.imshow(make_grid(rows.flatten(0, 1).cpu(), 4, padding=0).permute(1, 2, 0).numpy())
    right.set_title("$x$, then the decoded crosses")
    right.set_axis_off()
    common.save_figure(figure, out / "figure1_reparameterization.png")


@torch.no_grad()
def figure_2(model, yardstick, images, labels, out, title):
    """The course report's figure 2, for images picked by relative_error."""
    x = images / 255
    again = torch.cat([there_and_back(model, batch) for batch in x.split(1000)])
    error = relative_error(x, again)
    found = yardstick.read(to_bytes(again))[1].argmax(1)
    order = error.argsort()
    wrong = order[(found != labels)[order]]
    right = order[(found == labels)[order]]
    picks = torch.cat([wrong[-1:], wrong[:1], right[len(right) // 2 :][:1]]).tolist()
    kinds = ("lost", "near miss", "faithful")[-len(picks) :]  # fewer if no digit is misread
    names = []
    for kind, i in zip(kinds, picks, strict=True):
        names.append(f"{kind}:\n{labels[i]}, read\nas {found[i]}")
    title += ": misread digits with the largest\nand smallest error, and the median of the others"
    rows = {TEST: x[picks], "reconstructions": again[picks]}
    common.plot_rows(rows, out / "figure2_reconstructions.png", title, names)


COLORS = {"DDPM": "C0", "2-D VAE": "C1", "conv VAE": "C2", REAL: "gray"}  # the same in all figures


@common.plain_style
def plot_lines(lines, levels, path, title, xlabel, ylabel, yscale="log"):
    """Lines {label: (x, y)} and horizontal lines {label: y}, over a logarithmic x axis.

    The label of a line begins with the name of its model.
    """
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for label, (x, y) in lines.items():
        style = {"marker": "o", "markersize": 9 / (1 + len(x)) ** 0.4}
        axes.plot(x, y, **style, color=COLORS[label.partition(",")[0]], label=label)
    for label, y in levels.items():
        axes.axhline(y, color="gray", linestyle="--", label=label)
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
    """The figures that plot numbers."""
    name = results["name"]
    noise = NOISE * results["curve floor"]
    lines = {}
    for label, history in results["histories"].items():
        curve = [row for row in steady(history) if "excess" in row]
        if curve:
            excess = [max(row["excess"], noise) for row in curve]
            line = [row["seconds"] for row in curve], excess
            lines[f"{label}, {results['rows'][label]['trained on']}"] = line
    title = f"{name}: sample quality against training time"
    ylabel = (
        f"Fréchet distance of {results['curve n']:,} samples minus\n"
        "that of real digits (lower is better)"
    )
    levels = {"noise (lower values are drawn here)": noise}
    plot_lines(lines, levels, out / "quality.png", title, "seconds of training", ylabel)

    rows = results["bits"]
    chains = results["chains"]
    points = [(int(K), chain["total"]) for K, chain in chains.items()]
    lines = {"DDPM, the best chain of at most K steps": zip(*points[:-1], strict=True)}
    lines["DDPM, all T steps"] = zip(points[-1], strict=True)
    for label in VAES:
        lines[label] = [1], [rows[label]["total"]]
    levels = {POSITION: rows[POSITION]["total"]}
    title = f"{name}: the bound with 1 to {max(map(int, chains))} latent layers"
    axes = ("latent layers K", "-ELBO in bits/dim (lower is better)")
    plot_lines(lines, levels, out / "bound_bridge.png", title, *axes, "linear")

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate((REAL, *RUNS)):
        places = [c + 0.2 * (i - 1.5) for c in range(10)]
        axes.bar(places, results["classes"][label], 0.2, color=COLORS[label], label=label)
    title = f"{name}: the classes of {results['n']:,} images each"
    xlabel = "class that the classifier reads"
    axes.set(title=title, xlabel=xlabel, ylabel="share of images", xticks=range(10))
    figure.legend(loc="outside lower center", ncols=4)
    common.save_figure(figure, out / "diversity.png")


@torch.no_grad()
def draw_pictures(models, samples, yardstick, data, name, out):
    """The figures that show images."""
    x_train, x_test, y_test = data
    every = {TEST: yardstick.test, **samples}
    title = f"{name}: the first ten of each (VAEs: decoder means)"
    rows = {label: images[:10] / 255 for label, images in every.items()}
    common.plot_rows(rows, out / "figure3_samples.png", title)
    count = min(30, yardstick.n // 10 * 10)  # a small --limit leaves fewer than thirty
    title = f"{name}: the first {count} of each (VAEs: decoder means)"
    thirty = {}
    for label, images in every.items():
        for i in range(0, count, 10):
            thirty[f"{label}, {i + 1} to {i + 10}"] = images[i : i + 10] / 255
    common.plot_rows(thirty, out / "thirty_samples.png", title)

    known = x_train.flatten(1) / 255
    shown = {}
    notes = {}
    for label, x in rows.items():
        distances, which = nearest(x.flatten(1), known)
        shown[label] = x
        shown[f"{label}: nearest in training"] = x_train[which] / 255
        notes[f"{label}: nearest in training"] = [f"{distance:.1f}" for distance in distances]
    title = f"{name}: images, each above its nearest of {len(known):,} training images"
    common.plot_rows(shown, out / "neighbors.png", title, notes=notes)

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
    """What seconds_until gives, in words; value is None if there was no target."""
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
    """Whether a gain supports a claim.  Between one and two margins, it is "close"."""
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
    # An upper bound leaves open how much shorter the true time is.
    if d_at_most and gain > -1:
        return "about the same or shorter" if gain <= 1 else "cannot tell"
    if v_at_most and gain < 1:
        return "about the same or longer" if gain >= -1 else "cannot tell"
    return verdict(gain, 1)


def claims(rows, returned):
    """The course report's claims about the DDPM, each with a verdict.

    rows: as in results.json.  returned: {model: mean relative_error after encoding and decoding}.
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
    codes = {"DDPM": "x_T", "2-D VAE": "2-D code", "conv VAE": "20-D code"}
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
            "measured": f"to the 2-D VAE's best quality: {seconds(EQUAL)}; "
            f"to 1.5 times its own last excess: {seconds(OWN)}",
            "figure": "quality.png",
        },
        {
            "claim": "its outputs cannot be compared with given images, as it starts from noise",
            "verdict": verdict(math.log2(returned["DDPM"] / returned["2-D VAE"]), 1),
            "measured": f"error after encoding and decoding: {', '.join(errors)}",
            "figure": "reconstructions.png",
        },
        {
            "claim": "its many steps potentially allow for more expressiveness",
            "verdict": verdict(least / d["bits/dim"] - 1, 0.05),
            "measured": f"bits/dim, each with a histogram as its decoder: {', '.join(all_bits)}",
            "figure": "bound_bridge.png",
        },
    ]


# ---- the report


def table(rows, columns):
    """A Markdown table of {row: {column: value}}; columns: {column: a format or a function}."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        cells = []
        for column, form in columns.items():
            show = form.format if isinstance(form, str) else form
            cells.append("" if row.get(column) is None else show(row[column]))
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LEGEND = """
Lower is better, except for coverage.  "Told from real" and "by shape alone" are best at 50%, and
"copied" at 1%, its value for digits that were never seen.

- **told from real**: how often a small network, trained to tell these images from real training
  digits, is right.  It is trained on one half of each set and tested on the other; 50% is
  guessing.  There are two: a convolutional network that sees the pixels, and an MLP that is given
  what a digit classifier makes of the image: its features, its confidence, and the distance to the
  nearest training digit.  The column shows the one that is right more often, which puts it up to a
  percentage point too high for real training digits.  Better networks might find more differences.
- **by shape alone**: the same after thresholding all images to black and white at ½, so that the
  gray of a VAE's decoder means does not count.
- **Fréchet distance**: how far the mean and the covariance of the classifier's features for these
  images are from those for the test digits.  Real digits do not score 0, because any two samples
  differ.
- **coverage**: the share of test digits that have one of these images at least as near as their
  fifth-nearest neighbor among the test digits.
- **unsure**: the share of images that the classifier reads with less than 90% confidence.
- **far**: the share of images that are farther from their nearest training digit than 99% of the
  test digits are from theirs.  Distances are between the classifier's features, here to the
  {known} digits that it was trained on.
- **degenerate**: unsure, far, or both.
- **copied**: the share of {copies} images that are nearer to a training digit, pixel by pixel,
  than 99% of the test digits are.  The share is 1% for digits that were never seen, and 100% for
  training digits, and so for a model that memorizes them.  Blurred images, too, are near many
  training digits.
- **classes off by**: the total variation distance between the frequencies of the classes that the
  classifier reads and those of the training labels.
""".strip()


def write_report(results, out):
    """OUT/report.md."""
    r = results
    models = {name: r["rows"][name] for name in RUNS}
    judged = {each["claim"]: each for each in r["claims"]}
    columns = {"measured": "{}", "verdict": "**{}**", "figure": "[{0}]({0})"}
    whole, hos, own = (r["bits"][name] for name in ("DDPM", HOS_DECODER, HOS_OWN))
    firsts = ", ".join(map(str, FIRST)) + " or T"
    legend = LEGEND.format(known=f"{r['known']:,}", copies=f"{r['copies n']:,}")
    steps = {K for distances in r["samplers"].values() for K in distances}
    steps = dict.fromkeys(sorted(steps, key=int), "{:.1f}")
    returned = [f"{error:.1%} for the {name}" for name, error in r["returned"].items()]
    text = f"""# VAE and DDPM on {r["name"]}

Measured on {r["device"]} ({r["date"]}, seed {r["seed"]}, recipe `{r["recipe"]}`).
The command took {r["seconds"] / 60:.1f} min, not counting earlier training.

## The course report's claims

{table(judged, columns)}

A verdict requires a margin: 0.05 for shares, a factor of 2 for times and errors, 5% for bits/dim.
"Close" means a gain of less than twice the margin: another seed may change the verdict.  Verdicts
compare the DDPM with the 2-D VAE, as in the course report; for bits/dim, with the better of the
two VAEs.  Fidelity must be higher by both measures, "told from real" and "by shape alone".
Diversity is lacking if coverage or "classes off by" is worse than for real digits by more than the
margin.  If it is worse by less, the verdict is "does not hold, close".

## Samples

{table(r["rows"], SAMPLES)}

Each row uses {r["n"]:,} images.  The DDPM's are drawn in {models["DDPM"][EVALUATIONS]}
second-order steps, and the VAEs' are decoder means.  The digit classifier behind the columns is
right on {r["accuracy"]:.1%} of the test digits.  For the DDPM, the rule "degenerate, therefore not
real" is right {r["audit"]["DDPM"]["degenerate"]:.1%} of the time, and the better of the two
networks behind "told from real" {r["rows"]["DDPM"]["told from real"]:.1%}.

![Samples](figure3_samples.png)
![Thirty samples](thirty_samples.png)
![The classes of the samples](diversity.png)
![The nearest training images, with Euclidean distances between pixels in [0, 1]](neighbors.png)

## What the columns mean

{legend}

## Time

{table(models, TIMES)}

Times are seconds of training alone, extrapolated from the median epoch, because the first epoch,
and the first after each restart, may include compilation.  They depend on the device and on the
batch size.  Multiply-adds are for one image's forward pass.  The two "until" columns judge quality
by the excess of the Fréchet distance of {r["curve n"]:,} samples over that of as many real digits
({r["curve floor"]:.1f}).  They give the time until the excess falls to the 2-D VAE's lowest, and
to 1.5 times the model's own last value, which the verdict calls its own best.  An excess below
{NOISE:.0%} of the real digits' distance is noise, and is drawn at that level.  If a model's last
excess is 0 or less, the time to its own best is "not resolved".  In all runs the learning rate
falls to 0 over the chosen number of epochs, so a longer run reaches a given quality later: "its
own best" depends on that choice.  On one RTX 3090, the course report's VAE took 45 minutes, and
its DDPM over 3 hours.

![Sample quality against training time](quality.png)

## Samplers

Fréchet distance of {r["samplers n"]:,} samples, by sampler and number of network evaluations (of
as many real digits: {r["samplers floor"]:.1f}):

{table(r["samplers"], steps)}

![Samplers](samplers.png)

## The bound in bits/dim

{table(r["bits"], BITS)}

The table shows the -ELBO of {r["bits n"]:,} test images.  In the first row of each model, the
decoder is of the same kind: for each bin of the predicted mean, a histogram of the 256 levels.
The histograms are counted on {r["counted"]:,} training images, and the number of bins is chosen on
others.  The DDPM's KL is the sum of all terms but L_0, with the best variances, which are
estimated from the errors on 32 training images.  Ho's decoder (13), a normal with one σ for all
pixels, costs {hos["total"] - whole["total"]:.3f} more, and Ho's variances another
{own["total"] - hos["total"]:.3f}.  Among the chains of at most K steps whose last step starts at
t = {firsts}, the best is found on training images by dynamic programming.

![The bound against the number of latent layers](bound_bridge.png)

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
    """All of results.json but its "seconds"; also draws the figures that show images."""
    runs = open_runs(args, device)
    seed = args.seed
    whole = common.Namespace(data=args.data, size=args.size, limit=None, seed=seed)
    x_train, y_train, x_test, y_test = common.load_data(whole, args, device)  # for the measures
    # Shuffled, because MNIST's first test digits are neater than the others.
    mixed = torch.randperm(len(x_test), generator=torch.Generator().manual_seed(0))
    mixed = mixed.to(device)
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
    del rows[TEST]["Fréchet distance"], rows[TEST]["coverage"]  # these compare with test digits

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
    title = f"{name}: samples from the same $x_T$, by sampler and number of steps"
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
    recipe = "recipe of ddpm.py (default: that of the DDPM in --out, else as there)"
    parser.add_argument("--recipe", choices=list(ddpm.RECIPES), help=recipe)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if common.WORLD > 1:
        raise common.InputError("compare.py runs in one process: start it without torchrun")
    if args.sample:
        raise common.InputError("--sample is for vae.py and ddpm.py")
    started = time.perf_counter()
    device = common.start(args)
    if device.type not in BITS_OF:
        common.log(f"{device} has no float64, which the measures need: the CPU does all the work")
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
    print(f"wrote report.md, results.json and figures in {out}/")


if __name__ == "__main__":
    common.run(main)
