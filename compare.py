"""The comparison of the course report, measured: a VAE and a DDPM beside real digits.

Trains a DDPM and VAEs of 2 and of 20 latents (OUT/vae20), or goes on with them, and writes
report.md, results.json and figures into OUT.

  python compare.py                  with the defaults of ddpm.py
  python compare.py --recipe paper   Ho's and the report's objective, epochs
"""

import contextlib
import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision.utils import make_grid

import common
import ddpm
import vae
from ddpm import to_image, to_model

MOST = 10000  # images of a row
CURVE = 500  # images of a point of the curve of quality
BITS_OF = {"cuda": 2000, "cpu": 128}  # test images of the bound
STEPS = {"reader": 480, "critic": 250}

REAL = "real training digits"
TEST = "real test digits"
POSITION = "histogram for each pixel, no model"
EQUAL = "s until the 2-D VAE's best"
OWN = "s until 1.2 times its last"
EVALUATIONS = "evaluations per sample"
SAMPLED = "bits/dim in so many steps"

# ---- train or load

RUNS = {  # script, checkpoint in OUT, latent numbers
    "DDPM": (ddpm, "ddpm.pt", None),
    "VAE, 2-D": (vae, "vae.pt", 2),
    "VAE, 20-D": (vae, "vae20/vae.pt", 20),
}
VAES = ("VAE, 2-D", "VAE, 20-D")


SHARED = ("data", "size", "limit", "seed", "precision")  # settings that all models have in common


def open_runs(args, device):
    """{name: args of its train} for each of RUNS; fills in the shared flags that args leave open.

    They are as in the models that OUT has already, else the defaults.
    InputError where flags or models contradict one another, or a model's script has changed.
    """
    out = Path(args.out)
    found = {}
    for name, (script, file, _) in RUNS.items():
        if (out / file).exists() and not args.fresh:
            # Without flags: before settings are compared, they must be those of the present code.
            run = script.parse(["--out", args.out])
            settings, _ = common.find_run(run, out / file, {}, script.CODE)
            found[name] = vars(settings)

    def settle(flag, names, default):
        """The value of a flag for the models of these names, if it is not given."""
        values = [found[name][flag] for name in names if name in found]
        if any(value != values[0] for value in values):
            raise common.InputError(f"{out} has {flag} {values}: choose another --out")
        return values[0] if values else default

    for flag in SHARED:
        value = settle(flag, RUNS, common.defaults(device)[flag])
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.data not in common.SETS:
        raise common.InputError(f"{args.data} has no labels: choose {', '.join(common.SETS)}")
    args.recipe = args.recipe or settle("recipe", ["DDPM"], ddpm.defaults(args, device)["recipe"])
    # With --epochs, a VAE that is done already may have more of them than the other one as yet.
    default = 30 if args.recipe == "short" else 100
    vae_epochs = args.epochs or settle("epochs", VAES, default)

    runs = {}
    for name, (script, file, latent_dim) in RUNS.items():
        run = script.parse([])
        for flag in vars(run).keys() & vars(args).keys():
            setattr(run, flag, getattr(args, flag))
        run.out = str((out / file).parent)
        if script is vae:
            run.latent_dim = latent_dim
            run.epochs = vae_epochs
        default = script.defaults(run, device)
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


# ---- samples and times


def to_bytes(x):
    """[0, 1] -> the nearest of 256 levels, uint8."""
    return (255 * x).round().byte()


def evaluations(model):
    """Evaluations per sample."""
    return min(ddpm.STEPS, model.T) if isinstance(model, ddpm.DDPM) else 1


@contextlib.contextmanager
def seeded(seed, device):
    """Random numbers from this seed inside; outside they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def draw_samples(model, n, seed, device):
    """The first n images from the seed, (n, C, H, W) uint8; of a VAE the decoder's means."""
    with seeded(seed, device), common.autocast(device):
        is_vae = isinstance(model, vae.VAE)
        return to_bytes(model.sample(n) if is_vae else ddpm.sample_many(model, n))


def timed_samples(model, n, seed, device):
    """draw_samples, and the ms that each took."""
    for count in n if isinstance(model, vae.VAE) else 1, n:  # first a warm-up
        started = time.perf_counter()
        images = draw_samples(model, count, seed, device)
        images.sum().item()  # waits until a GPU has finished
    return images, 1000 * (time.perf_counter() - started) / n


def watcher(yardstick, last, device):
    """What train calls after each epoch: points of a curve at 1, 2, 3, 5, 7, 10, ... and last."""

    def watch(model, epoch):
        scale = 10 ** (len(str(epoch)) - 1)
        if epoch != last and epoch / scale not in (1, 1.5, 2, 3, 5, 7):
            return {}
        images = draw_samples(model, min(CURVE, yardstick.n), yardstick.seed, device)
        return {"frechet": yardstick.distance(images)}

    return watch


def seconds_until(history, distance):
    """Seconds until the Fréchet distance was this, on the curve's lines; None if never."""
    curve = [row for row in history if "frechet" in row]
    for before, row in zip(curve[:1] + curve, curve, strict=False):
        if row["frechet"] <= distance:
            fall = max(before["frechet"] - row["frechet"], 1e-9)
            share = (before["frechet"] - distance) / fall
            return before["seconds"] + share * (row["seconds"] - before["seconds"])
    return None


def steady(history):
    """The history with the median epoch's seconds for each: some wait for the compiler."""
    ends = torch.tensor([0.0, *(row["seconds"] for row in history)])
    typical = ends.diff().median().item()
    return [{**row, "seconds": typical * row["epoch"]} for row in history]


def training_numbers(history, vae_history):
    """The columns about training; the aim is the best of vae_history."""
    seconds = history[-1]["seconds"]
    best = min([row["frechet"] for row in vae_history if "frechet" in row], default=-math.inf)
    last = history[-1].get("frechet", -math.inf)
    return {
        "epochs": len(history),
        "training, s": seconds,
        "s per epoch": seconds / len(history),
        EQUAL: seconds_until(history, best),
        OWN: seconds_until(history, 1.2 * last),
    }


# ---- measures: images are uint8 (N, C, H, W), as the data


class Classifier(nn.Module):
    """Classes of images (B, C, H, W) in [0, 1]; features (B, 128) is its last layer but one."""

    def __init__(self, shape, classes, width):
        super().__init__()
        C, H, W = shape
        layers = []
        for cin, cout, kernel in (C, width, 5), (width, 2 * width, 3), (2 * width, 4 * width, 3):
            conv = nn.Conv2d(cin, cout, kernel, stride=2, padding=kernel // 2)
            layers += [conv, nn.BatchNorm2d(cout), nn.ReLU()]
        area = math.ceil(H / 8) * math.ceil(W / 8)
        hidden = nn.Linear(4 * width * area, 128)
        self.features = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU())
        self.leave = nn.Linear(128, classes)
        self.to(memory_format=torch.channels_last)  # many times faster in bfloat16 on a CPU

    def forward(self, x):
        return self.leave(self.features(x))  # (B, classes)


def fit(model, images, labels, steps, lr, weight_decay=0.0, shift=0):
    """Trains a Classifier, on batches of images that are shifted by up to so many pixels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for _ in common.progress(range(steps), "classifier"):
        batch = torch.randint(len(images), (256,), device=images.device)
        move = torch.randint(-shift, shift + 1, (2,)).tolist()
        x = (images[batch] / 255).roll(move, (2, 3))
        with common.autocast(images.device):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


def told_apart(images, real, seed, shape_only=False):
    """How often a network that saw half of both sets is right about the rest; ½: it cannot tell.

    shape_only: cut at ½, so that it sees neither blur nor gray.  Lopez-Paz & Oquab 2017, section 3
    """
    n = len(images) // 2
    real = real[: 2 * n]
    x = torch.cat([real[:n], images[:n], real[n:], images[n : 2 * n]])
    if shape_only:
        x = 255 * (x > 127)
    labels = (torch.arange(4 * n, device=x.device) // n) % 2  # 0 where real
    with seeded(seed, x.device):
        critic = Classifier(x.shape[1:], 2, width=16).to(x.device)
        fit(critic, x[: 2 * n], labels[: 2 * n], STEPS["critic"], lr=4e-3, weight_decay=0.05)
    found = torch.cat([critic(batch / 255).argmax(1) for batch in x[2 * n :].split(500)])
    return (found == labels[2 * n :]).double().mean().item()


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

    known: the classifier's, in whose features one measures; critics: the two-sample tests';
    control: a row of the table.  n: images of all but the first.
    """

    def __init__(self, x_train, y_train, x_test, y_test, seed, most):
        n = min(most, len(x_train) // 4, len(x_test))
        order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed))
        order = order.to(x_train.device)
        known = order[2 * n :]
        self.n = n
        self.seed = seed
        self.critics = x_train[order[:n]]
        self.control = x_train[order[n : 2 * n]]
        self.test = x_test[:n]
        self.classes = torch.bincount(y_train, minlength=10) / len(y_train)
        with seeded(0, x_train.device):  # one classifier for all seeds
            self.reader = Classifier(x_train.shape[1:], 10, width=24).to(x_train.device)
            fit(self.reader, x_train[known], y_train[known], STEPS["reader"], 4e-3, shift=2)
        self.known_features, _ = self.read(x_train[known])
        self.test_features, probabilities = self.read(self.test)
        self.accuracy = (probabilities.argmax(1) == y_test[:n]).double().mean().item()
        self.limit = nearest(self.test_features, self.known_features)[0].quantile(0.99)

    def read(self, images):
        """-> features (N, 128) and probabilities of the ten classes (N, 10)."""
        features = torch.cat([self.reader.features(part / 255) for part in images.split(500)])
        return features, self.reader.leave(features).softmax(1)

    def distance(self, images):
        """Fréchet distance to the test images."""
        return frechet(self.read(images)[0], self.test_features)

    def measure(self, images):
        """The columns about images, and the ten classes' shares."""
        features, probabilities = self.read(images)
        classes = torch.bincount(probabilities.argmax(1), minlength=10) / len(images)
        unsure = probabilities.amax(1) < 0.9
        far, _ = nearest(features, self.known_features)
        row = {
            "told from real": told_apart(images, self.critics, self.seed),
            "by shape alone": told_apart(images, self.critics, self.seed, shape_only=True),
            "Fréchet distance": frechet(features, self.test_features),
            "coverage": coverage(features, self.test_features),
            "degenerate": (unsure | (far > self.limit)).double().mean().item(),
            "classes off by": (classes - self.classes).abs().sum().item() / 2,  # total variation
        }
        return row, classes.tolist()


# ---- the bound, of both models by one kind of decoder

BINS = 256  # of the decoder's mean: one for each level


def bits(nats, shape):
    """nats per image -> bits/dim."""
    return nats / (math.prod(shape) * math.log(2))


def histogram_bits(images, bins, counted, counted_bins, n):
    """-log p(level | bin) of images in bits/dim, (B,), where p is counted on other images.

    bins: in 0 ... n-1, as the images.  A tenth of a count more, so that no p is 0.
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


def decoder_bits(mean_of, images, counted):
    """-log p(images | mean) in bits/dim, (B,), by a histogram for each bin of the mean.

    mean_of: images -> the model's means in [0, 1] after one draw of the latents.
    """

    def bins_of(part):
        return (BINS * mean_of(part)).long().clamp(0, BINS - 1)

    counted_bins = torch.cat([bins_of(part) for part in counted.split(500)])
    return histogram_bits(images, bins_of(images), counted, counted_bins, BINS)


def vae_bits(model, images, counted, seed):
    """Both terms of -ELBO on images in bits/dim -> {"decoder", "KL"}.  KW (7)"""

    def mean_of(part):
        mu, logvar = model.encode(part / 255)
        return model.decode(model.reparameterize(mu, logvar))

    with seeded(seed, images.device):
        decoder = decoder_bits(mean_of, images, counted).mean().item()  # -E_q log p(x|z)
    kl = vae.kl_to_prior(*model.encode(images / 255)).mean().item()
    return {"decoder": decoder, "KL": bits(kl, model.shape)}


def x0_errors(model, x0):
    """ddpm.x0_error at every time: x0 (B, C, H, W) -> (B, T+1), column t for t."""
    times = common.progress(range(1, model.T + 1), "bound")
    columns = [ddpm.x0_error(model, x0, t) for t in times]
    return torch.stack([torch.zeros_like(columns[0]), *columns], dim=1)


def chain_bits(model, K, errors, mse, images, counted):
    """ddpm.vlb_terms of K steps in bits/dim, (N, K+1), with a histogram as decoder.

    σ_t² is the best: β̃ plus the mean's squared error (Bao et al. 2022).
    errors: of x0_errors, (N, T+1); mse: the same per pixel on training images, (T+1,)
    """
    times = model.times(K)
    first = times[-2]

    def mean_of(part):
        x0 = to_model(part / 255)
        xt = model.q_sample(x0, first, torch.randn_like(x0))
        mean, _ = model.p_mean_variance(xt, first, 0)
        return to_image(mean)

    nats = []
    for t, s in list(itertools.pairwise(times))[-2::-1]:  # small t first, without the last step
        of_x0, beta_tilde = model.q_posterior(1.0, 0.0, t, s)
        variance = beta_tilde + of_x0**2 * mse[t].item()
        nats.append(ddpm.kl_of_step(model, t, s, errors[:, t], variance))
    nats.append(ddpm.last_term(model, to_model(images / 255), times))
    terms = [bits(each.cpu(), model.shape) for each in nats]
    return torch.stack([decoder_bits(mean_of, images, counted).cpu(), *terms], dim=1)  # L_0 first


def ddpm_bits(model, images, counted, seed):
    """The bound in bits/dim: its parts, for each number K of steps, and by Ho's L_0 (13)."""
    x0 = to_model(images / 255)
    lengths = {min(K, model.T) for K in (1, 2, 5, 10, 20, 50, 100, 200, 500, model.T)}
    chains = {}
    with seeded(seed, x0.device), common.autocast(x0.device):
        errors = torch.cat([x0_errors(model, part) for part in x0.split(500)])
        mse = x0_errors(model, to_model(counted[:32] / 255)).mean(0) / math.prod(model.shape)
        own = ddpm.first_term(model, x0, model.times()) + ddpm.last_term(model, x0, model.times())
        for t in range(2, model.T + 1):
            own += ddpm.kl_of_step(model, t, t - 1, errors[:, t]).cpu()
        for K in common.progress(sorted(lengths), "chains"):
            terms = chain_bits(model, K, errors, mse, images, counted).mean(0).tolist()
            chains[K] = sum(terms)
    L_0, *rest = terms  # of the whole chain
    own = bits(own, model.shape).mean().item()
    return {"decoder": L_0, "KL": sum(rest), "chains": chains, "Ho": own}


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


def reconstructions(models, x):
    """Images x in [0, 1], encoded and decoded -> {label: like x}."""
    rows = {TEST: x}
    for name in VAES:
        rows[name] = models[name].decode(models[name].encode(x)[0])
    model = models["DDPM"]
    times = model.times(evaluations(model))
    x0 = to_model(x)
    with common.autocast(x.device):
        xT = ddim_encode(model, times, x0)
        *_, (_, back, _) = model.trajectory(xT, times, eta=0)
        rows["DDPM, DDIM to $x_T$ and back"] = to_image(back)
        for share in 0.25, 0.5, 0.75:
            start = min(range(len(times) - 1), key=lambda i: abs(times[i] - share * model.T))
            t = times[start]
            xt = model.q_sample(x0, t, torch.randn_like(x0))
            *_, (_, back, _) = model.trajectory(xt, times[start:])
            rows[f"DDPM, noise to t = {t} and back"] = to_image(back)
    return rows


@common.plain_style
def figure_1(model, x, labels, out, title):
    """The report's, of x (N, C, H, W) in [0, 1]: ε, the same for all, z, the mean of p(x|z)."""
    eps = torch.randn(60, 2, device=x.device)
    mu, logvar = model.encode(x)
    z = model.reparameterize(mu[:, None], logvar[:, None], eps)  # (N, 60, 2)
    figure = Figure(figsize=(11, 4), dpi=130, layout="constrained")
    figure.suptitle(rf"{title}: gradients flow through $z$ to $\mu$ and $\sigma$, past $\epsilon$")
    left, middle, right = figure.subplots(1, 3)
    left.plot(*eps.cpu().T, ".", color="gray")
    left.plot(*eps[:3].cpu().T, "kx")
    left.set(title=r"$\epsilon \sim N(0, I)$", xlabel=r"$\epsilon_1$", ylabel=r"$\epsilon_2$")
    for points, label in zip(z.cpu(), labels.tolist(), strict=True):
        middle.plot(*points.T, ".", color=f"C{label}", label=label)
    middle.set(title=r"$z = \mu(x) + \sigma(x) \odot \epsilon$", xlabel="$z_1$", ylabel="$z_2$")
    middle.legend()
    rows = torch.cat([x[:, None], model.decode(z[:, :3])], dim=1)  # (N, 4, C, H, W)
    right.imshow(make_grid(rows.flatten(0, 1).cpu(), 4, padding=0).permute(1, 2, 0).numpy())
    right.set(title="$x$, and means of $p(x|z)$ for the crosses")
    right.set_axis_off()
    common.save_figure(figure, out / "figure1_reparameterization.png")


def figure_2(model, yardstick, images, labels, out, title):
    """The report's, of images picked by their relative error ‖x - x̂‖² / ‖x‖²."""
    x = images / 255
    again = torch.cat([model.decode(model.encode(batch)[0]) for batch in x.split(1000)])
    error = (x - again).square().flatten(1).sum(1) / x.square().flatten(1).sum(1)
    found = yardstick.read(to_bytes(again))[1].argmax(1)
    order = error.argsort()
    wrong = order[(found != labels)[order]]
    right = order[(found == labels)[order]]
    picks = torch.cat([wrong[-1:], wrong[:1], right[len(right) // 2 :][:1]]).tolist()
    names = []
    for kind, i in zip(("degenerate", "near miss", "faithful"), picks, strict=False):
        names.append(f"{kind}\n{labels[i]}, read as {found[i]}")
    title = f"{title}: misread with most\nand least error, others' median"
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
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    common.save_figure(figure, path)


@common.plain_style
def draw_figures(results, out):
    """The figures of numbers."""
    name = results["name"]
    lines = {}
    for label, history in results["histories"].items():
        curve = [row for row in history if "frechet" in row]
        seconds = [row["seconds"] for row in curve]
        lines[label] = (seconds, [row["frechet"] for row in curve])
    title = f"{name}: quality against time, n = {results['curve n']}"
    axes = ("seconds of training", "Fréchet distance to test images")
    plot_lines(lines, {REAL: results["curve floor"]}, out / "quality.png", title, *axes)

    rows = results["bits"]
    chains = rows["DDPM"]["chains"]
    K = results["rows"]["DDPM"][EVALUATIONS]
    lines = {"DDPM, K of its steps": (list(chains), list(chains.values()))}
    lines[f"K = {K}, with which it is sampled"] = ([K], [chains[K]])
    levels = {label: rows[label]["total"] for label in (*VAES, POSITION)}
    title = f"{name}: from one latent layer to {max(chains)}"
    axes = ("latent layers K", "-ELBO in bits/dim, lower is better")
    plot_lines(lines, levels, out / "bound_bridge.png", title, *axes, "linear")

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate((REAL, *RUNS)):
        places = [c + 0.2 * (i - 1.5) for c in range(10)]
        axes.bar(places, results["classes"][label], 0.2, label=label)
    title = f"{name}: classes of {results['n']} images each"
    axes.set(title=title, xlabel="class that is read", ylabel="share", xticks=range(10))
    figure.legend(loc="outside lower center", ncols=4)
    common.save_figure(figure, out / "diversity.png")


def draw_pictures(models, samples, yardstick, data, name, out):
    """The figures of images."""
    x_train, x_test, y_test = data
    rows = {label: images[:10] / 255 for label, images in samples.items()}
    rows = {TEST: x_test[:10] / 255, **rows}
    title = f"{name}: the first ten from the seed; of VAEs, decoder means"
    common.plot_rows(rows, out / "figure3_samples.png", title)
    known = x_train.flatten(1) / 255
    shown = {}
    for label, x in rows.items():
        _, which = nearest(x.flatten(1), known)
        shown[label] = x
        shown[f"nearest to {label}"] = x_train[which] / 255
    title = f"{name}: the same, and the nearest of {len(known)} training images"
    common.plot_rows(shown, out / "neighbours.png", title)
    rows = reconstructions(models, x_test[:10] / 255)
    common.plot_rows(rows, out / "reconstructions.png", f"{name}: test images, there and back")
    model = models["VAE, 2-D"]
    title = f"2-D VAE, {name}"
    picks = [(y_test == c).nonzero()[0].item() for c in range(0, 10, 2)]  # the first of each
    figure_1(model, x_test[picks] / 255, y_test[picks], out, title)
    figure_2(model, yardstick, x_test, y_test, out, title)


# ---- report

SAMPLES = {
    "told from real": "{:.1%}",
    "by shape alone": "{:.1%}",
    "Fréchet distance": "{:.1f}",
    "coverage": "{:.1%}",
    "degenerate": "{:.1%}",
    "classes off by": "{:.3f}",
}
TIMES = {
    "epochs": "{}",
    "training, s": "{:.0f}",
    "s per epoch": "{:.1f}",
    EQUAL: "{:.0f}",
    OWN: "{:.0f}",
    EVALUATIONS: "{}",
    "ms per sample": "{:.4f}",
}
BITS = dict.fromkeys(("decoder", "KL", "total"), "{:.3f}")


def verdict(gain, margin):
    if gain > margin:
        return "holds"
    return "does not hold" if gain < -margin else "about the same"


def longer(d, v, column):
    """Whether the DDPM takes twice the seconds, to an epoch -> verdict, words."""
    if d[column] is None or v[column] is None:
        return "cannot tell", "not reached"
    words = f"DDPM {d[column]:.0f}, VAE {v[column]:.0f} s"
    if d[column] - d["s per epoch"] > 2 * v[column]:
        return "holds", words
    return "does not hold" if 2 * d[column] < v[column] else "about the same", words


def claims(rows):
    """The report's sentences -> [{"claim", "verdict", "measured", "figure"}]."""
    d = rows["DDPM"]
    v = rows["VAE, 2-D"]
    real = rows[REAL]

    def three(column):
        numbers = [SAMPLES[column].format(row[column]) for row in (d, v, real)]
        return "{}: DDPM {}, 2-D VAE {}, real {}".format(column, *numbers)

    gains = [v[column] - d[column] for column in ("told from real", "by shape alone")]
    fidelity = max(gains) if min(gains) > -0.05 else min(gains)  # no gain at the other's cost
    lack = max(real["coverage"] - d["coverage"], d["classes off by"] - real["classes off by"])
    equal, to_equal = longer(d, v, EQUAL)
    own, to_own = longer(d, v, OWN)
    least = min(rows[name]["bits/dim"] for name in VAES)
    all_bits = ", ".join(f"{name} {rows[name]['bits/dim']:.2f}" for name in RUNS)
    text = f"""
the DDPM's outputs are of higher fidelity than the VAE's
{verdict(fidelity, 0.05)}
{three("told from real")}; {three("by shape alone")}
figure3_samples.png
it does not produce as many degenerate images
{verdict(v["degenerate"] - d["degenerate"], 0.05)}
{three("degenerate")}
figure3_samples.png
its samples lack diversity
{"holds" if lack > 0.05 else "about as real digits"}
{three("coverage")}; {three("classes off by")}
diversity.png
it takes substantially longer to converge
to equal quality: {equal}; to its own best: {own}
to the VAE's best distance: {to_equal}; to 1.2 times its last: {to_own}
quality.png
its outputs cannot be compared with given images, for it starts from noise
a procedure: no verdict
it can start from an image's x_T, or its noisy x_t
reconstructions.png
its many steps potentially allow for more expressiveness
{verdict(least / d["bits/dim"] - 1, 0.05)}
bits/dim: {all_bits}; DDPM in {d[EVALUATIONS]} steps {d[SAMPLED]:.2f}
bound_bridge.png"""
    lines = text.split("\n")[1:]
    keys = ("claim", "verdict", "measured", "figure")
    return [dict(zip(keys, lines[i : i + 4], strict=True)) for i in range(0, len(lines), 4)]


def table(rows, columns):
    """Markdown of {row: {column: value}} for {column: format}."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        values = [(form, row.get(column)) for column, form in columns.items()]
        cells = ["" if value is None else form.format(value) for form, value in values]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(results, out):
    """OUT/report.md."""
    r = results
    models = {name: r["rows"][name] for name in RUNS}
    judged = {each["claim"]: each for each in r["claims"]}
    columns = {"measured": "{}", "verdict": "**{}**", "figure": "[{0}]({0})"}
    text = f"""# VAE and DDPM on {r["name"]}

{r["date"]}, {r["device"]}, seed {r["seed"]}, recipe `{r["recipe"]}`,
{r["seconds"] / 60:.1f} min in all.

## The report's claims

{table(judged, columns)}

A verdict needs a margin, 0.05 in a share, 2 times in seconds, 5 % in bits/dim: the draw of
{r["n"]} images alone changes a share by up to {r["n"] ** -0.5:.2f}.

## Samples

{table(r["rows"], SAMPLES)}

Of {r["n"]} images (VAEs: decoder means): how often a network that saw half of them, and as many
training digits, is right about the rest (50 %: a guess), in 256 levels and cut at ½; then,
in the features of a classifier that reads {r["accuracy"]:.1%} of the test digits, the distance to
these, the share of these with an image as near as their fifth neighbour, of images read with under
90 % confidence or farther from all training digits than 99 % of test digits, and the total
variation of the classes from the training labels.

![Samples](figure3_samples.png)
![Classes](diversity.png)
![Neighbours](neighbours.png)

## Time

{table(models, TIMES)}

In one precision, by the median epoch, many samples at a time; distances are of
{r["curve n"]} (real digits: {r["curve floor"]:.1f}). The course report: 45 min and over 3 h.

![Quality](quality.png)

## The bound in bits/dim

{table(r["bits"], BITS)}

-ELBO on {r["bits n"]} test images, each decoder a histogram p(level | mean) of {BINS} bins of the
mean, counted on training images (KL: of the DDPM all but L_0, by the best variances); Ho's own, of
all steps, has the decoder (13) and its own σ_t².

![Bridge](bound_bridge.png)

## More figures

![Figure 1](figure1_reparameterization.png)
![Figure 2](figure2_reconstructions.png)
![Reconstructions](reconstructions.png)
![Latent space](vae_latent.png)
![Trajectory](ddpm_trajectory.png)
"""
    common.write_file(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


# ---- all of it


def compare(args, device):
    """Everything that goes into results.json; draws the pictures."""
    runs = open_runs(args, device)
    seed = args.seed
    whole = common.Namespace(data=args.data, size=args.size, limit=None, seed=seed)
    x_train, y_train, x_test, y_test = common.load_data(whole, args, device)  # for the measures
    mixed = torch.randperm(len(x_test), generator=torch.Generator().manual_seed(seed))
    mixed = mixed.to(device)  # MNIST's first test digits are the neater ones
    x_test = x_test[mixed]
    y_test = y_test[mixed]
    most = min(MOST, (args.limit or 4 * MOST) // 4)
    yardstick = Yardstick(x_train, y_train, x_test, y_test, seed, most)
    models = {}
    histories = {}
    samples = {}
    rows = {}
    for name in RUNS:
        run = runs[name]
        watch = watcher(yardstick, run.epochs, device)
        models[name], history = trained(name, run, device, watch)
        histories[name] = steady(history)
    for name, model in models.items():
        samples[name], ms = timed_samples(model, yardstick.n, seed, device)
        rows[name] = training_numbers(histories[name], histories["VAE, 2-D"])
        rows[name] |= {EVALUATIONS: evaluations(model), "ms per sample": ms}

    torch.manual_seed(seed)
    noise = to_bytes(torch.rand(yardstick.test.shape, device=device))
    images = {REAL: yardstick.control, TEST: yardstick.test, "uniform noise": noise}
    classes = {}
    for name, each in common.progress({**samples, **images}.items(), "measures"):
        row, classes[name] = yardstick.measure(each)
        rows[name] = rows.get(name, {}) | row
    del rows[TEST]["Fréchet distance"], rows[TEST]["coverage"]  # they are the yardstick's own

    seen = x_train[: args.limit]
    counted = seen[torch.randperm(len(seen), device=device)[:2000]]
    x = x_test[: BITS_OF[device.type]]
    bound = {"DDPM": ddpm_bits(models["DDPM"], x, counted, seed)}
    for name in VAES:
        bound[name] = vae_bits(models[name], x, counted, seed)
    for name, parts in bound.items():
        parts["total"] = parts["decoder"] + parts["KL"]
        rows[name]["bits/dim"] = parts["total"]
    sampled = bound["DDPM"]["chains"][evaluations(models["DDPM"])]
    rows["DDPM"][SAMPLED] = sampled
    bound["DDPM, in as many steps as sampled"] = {"total": sampled}
    bound["DDPM, Ho's own"] = {"total": bound["DDPM"].pop("Ho")}
    bound[POSITION] = {"total": position_bits(x, x_train).mean().item()}

    device_name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    name = common.SETS[args.data].__name__
    data = (x_train, x_test, y_test)
    draw_pictures(models, samples, yardstick, data, name, Path(args.out))
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name,
        "seed": seed,
        "recipe": args.recipe,
        "n": yardstick.n,
        "curve n": min(CURVE, yardstick.n),
        "curve floor": yardstick.distance(yardstick.control[:CURVE]),
        "bits n": len(x),
        "accuracy": yardstick.accuracy,
        "rows": rows,
        "claims": claims(rows),
        "bits": bound,
        "classes": classes,
        "settings": {name: model.settings for name, model in models.items()},
        "histories": histories,
    }


def parse(argv):
    parser = common.arguments(__doc__)
    parser.add_argument("--recipe", choices=list(ddpm.RECIPES), help="of ddpm.py (as there)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if common.WORLD > 1:
        raise common.InputError("run it without torchrun")
    if args.limit and args.limit < 100:
        raise common.InputError(f"--limit {args.limit} is too few: give 100 or more")
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
    draw_figures(results, out)
    write_report(results, out)
    for each in results["claims"]:
        print("{claim}: {verdict} ({measured})".format(**each))
    print(f"wrote report.md and more in {out}/")


if __name__ == "__main__":
    common.run(main)
