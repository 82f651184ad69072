"""The comparison of the course report, measured: trains or loads a VAE and a DDPM, draws and measures both.

Writes into OUT: report.md (the verdicts, the tables and the figures, readable on its own), results.json (all
numbers), the figures, and what vae.py and ddpm.py write.  A model that has a finished checkpoint in OUT is
loaded, not trained.  Beside the two, in folders of OUT: a VAE with 20 latent numbers, an autoencoder, and a
DDPM trained by the report's own optimizer, for half the epochs.  On a CPU all are trained for fewer epochs than
the report's 100, and fewer images are measured (SIZES); the log says so.
"""
import datetime
import json
import math
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
import ddpm
import vae

EXAMPLES = """\
  python compare.py                                  everything, with the defaults of vae.py and ddpm.py
  python compare.py --limit 2000 --epochs 1 --out quick   a quick look
  python compare.py --benchmark                      how fast all of it is here
  python compare.py --seeds 3 --out seeds            three trained pairs, for the spread between trainings
  python ddpm.py --epochs 20 && python compare.py    with a DDPM that was trained for longer"""

# The course report's own statements, for the tables' last column: an RTX 3090, 100 epochs of each.
REPORT = {"vae": {"minutes": 45}, "ddpm": {"minutes": 180}}
DIM = 28 * 28
SCRIPTS = {"vae": vae, "ddpm": ddpm}

# How many images each measurement takes: where there is a GPU, and where minutes count.
SIZES = {
    "cuda": {"samples": 10000, "batch": 1000, "bound": 2000, "curve": 2000, "steps": 2000, "encoded": 1000},
    "cpu": {"samples": 1000, "batch": 250, "bound": 64, "curve": 500, "steps": 250, "encoded": 100}}
STEPS = (5, 10, 20, 50, 100, 1000)  # network evaluations for a sample, in the figure of sampling's cost


def bits(nats):
    """nats per image -> bits/dim."""
    return nats / (DIM * math.log(2))


def mean_and_error(values):
    """(n,) -> their mean and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


# The yardstick: what a classifier of real digits sees in an image.

class Classifier(nn.Module):
    """Digits, from images (B, 1, 28, 28) in [0, 1]; features (B, 128) is its last layer but one."""

    def __init__(self):
        super().__init__()
        conv = lambda cin, cout, size, stride: (
            nn.Conv2d(cin, cout, size, stride, padding=size // 2), nn.BatchNorm2d(cout), nn.ReLU())
        self.features = nn.Sequential(
            *conv(1, 24, 5, 2), *conv(24, 48, 3, 1), nn.MaxPool2d(2), *conv(48, 96, 3, 1), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(96 * 9, 128), nn.ReLU())
        self.leave = nn.Linear(128, 10)

    def forward(self, x):
        return self.leave(self.features(x))  # (B, 10)


def train_classifier(args, device):
    """The classifier, trained on the training labels for 3 epochs, or from OUT/classifier.pt.

    Plain cross-entropy: label smoothing would draw each class together to a point, and the distances between
    features would see no shapes any more.
    """
    path = Path(args.out) / "classifier.pt"
    settings = {"data": args.data, "limit": args.limit}
    if path.exists() and (saved := common.load(path, "classifier"))["settings"] == settings:
        return common.restored(lambda _: Classifier(), saved, "model", path).to(device)
    torch.manual_seed(0)  # one yardstick for all seeds
    x_train, y_train = (load(args.data, args.data_dir, device)[0][:args.limit]
                        for load in (common.load_data, common.load_labels))
    model = Classifier().to(device, memory_format=torch.channels_last)
    optimizer, batch = torch.optim.Adam(model.parameters(), fused=True), 128
    steps = 3 * math.ceil(len(x_train) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(x_train), device=device) for _ in range(3)])
    for indices in tqdm(order.split(batch)[:steps], desc="classifier", unit="step"):
        shift = torch.randint(-2, 3, (2,)).tolist()  # the only augmentation
        x = (x_train[indices] / 255).roll(shift, (2, 3)).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), y_train[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    common.save({"kind": "classifier", "settings": settings, "model": model.state_dict()}, path)
    return model.eval().requires_grad_(False)


def look(classifier, x):
    """Images (N, 1, 28, 28) in [0, 1] -> features (N, 128) in float64, class probabilities (N, 10)."""
    features = torch.cat([classifier.features(batch) for batch in x.split(500)])
    return features.double(), classifier.leave(features).softmax(1)


def frechet(a, b):
    """Fréchet distance of the normals fitted to features (n, d), (m, d): |Δμ|² + tr(A + B - 2√(AB)).

    Heusel et al. 2017 (6), on this classifier's features: comparable only within one run, at one n.
    """
    A, B = torch.cov(a.T).cpu(), torch.cov(b.T).cpu()
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # √A
    overlap = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()  # tr √(AB)
    return ((a.mean(0) - b.mean(0)).square().sum().cpu() + A.trace() + B.trace() - 2 * overlap).item()


def precision_recall(real, fake, k=3):
    """Which of fake lie within real's manifold, which of real within fake's: 0 or 1, (n,) and (m,).

    Their means are precision and recall; features (m, d), (n, d).  A manifold is the union of balls around
    its points, each reaching to its k-th neighbour.  Kynkäänniemi et al. 2019 (1) and (2)
    """
    def within(points, manifold):
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1).values  # the nearest is the point itself
        return (torch.cdist(points, manifold) <= radius).any(1).double()
    return within(fake, real), within(real, fake)


def nearest(x, flat):
    """Euclidean distance from each image of x (n, 1, 28, 28) to the nearest of flat (m, 784), and which."""
    least = [torch.cdist(batch.flatten(1), flat).min(1) for batch in x.split(1000)]
    return torch.cat([each.values for each in least]), torch.cat([each.indices for each in least])


def measure_samples(classifier, x, real, train, seed):
    """What the yardstick says of images x (n, 1, 28, 28) in [0, 1]: a dict of numbers.

    real: features of the test digits.  train: "x", the training images, flat; "shares" of their labels;
    "close", the distance to the nearest training image that only 1 % of the test digits fall below.
    Each KEY has a KEY_error: its standard deviation over 20 resamples of the images.
    """
    features, probabilities = look(classifier, x)
    inside, covered = precision_recall(real[:len(x)], features)
    distance, _ = nearest(x, train["x"])
    classes, unsure = probabilities.argmax(1), (probabilities.amax(1) < 0.9).double()
    expected = train["shares"] * len(x)  # of each class

    def counts(i):
        return torch.bincount(classes[i], minlength=10).double().cpu()

    def numbers(i, j):  # i of x, j of as many test digits
        return {"frechet": frechet(features[i], real),
                "precision": inside[i].mean().item(), "recall": covered[j].mean().item(),
                "degenerate": unsure[i].mean().item(),
                "class_distance": ((counts(i) - expected).abs().sum() / 2 / len(x)).item(),  # total variation
                "nearest": distance[i].median().item(),
                "copies": (distance[i] < train["close"]).double().mean().item()}

    generator = torch.Generator().manual_seed(seed)
    resampled = [numbers(*(torch.randint(len(each), (len(each),), generator=generator).to(x.device)
                           for each in (x, covered))) for _ in range(20)]
    every = slice(None)
    result = numbers(every, every)
    for key in list(result):
        result[f"{key}_error"] = torch.tensor([each[key] for each in resampled]).std().item()
    chi2 = ((counts(every) - expected) ** 2 / expected).sum()
    return {"n": len(x), **result, "classes": (counts(every) / len(x)).tolist(),
            "class_p": torch.special.gammaincc(torch.tensor(4.5).double(), chi2 / 2).item(),  # χ², 9 degrees
            "nearest_histogram": (torch.histc(distance.cpu().clamp(max=11.9), 48, 0, 12) / len(x)).tolist()}


# The bound of both models in bits/dim, on the same test images.

@torch.no_grad()
def vae_bound(model, x_train, x_test, seed):
    """The VAE's terms on x_test (N, 1, 28, 28) in [0, 1] in bits/dim under the discretized normal -> dict."""
    with common.own_randomness(seed, x_test.device):
        sigma = model.fit_sigma(x_train)
        terms = [torch.stack(model.elbo_terms(x, samples=8, sigma=sigma)) for x in x_test.split(500)]
        reconstruction, kl = torch.cat(terms, dim=1)
        tighter = torch.cat([model.importance_bound(x, 256, sigma) for x in x_test.split(16)])
    total, error = mean_and_error(bits(kl - reconstruction))
    return {"n": len(x_test), "sigma": sigma, "bits_per_dim": total, "error": error,
            "reconstruction": bits(-reconstruction).mean().item(), "kl": bits(kl).mean().item(),
            "importance_weighted_256": bits(-tighter).mean().item(),
            "gap": bits(reconstruction - kl - tighter).neg().mean().item()}  # ≤ the KL of KW (1)


@torch.no_grad()
def ddpm_bound(model, x_train, x_test, seed):
    """The DDPM's bound on x_test in bits/dim -> dict: each way to set the variances, each length of chain.

    The network is asked once for every image and t: its squared errors give the bound of every variance and
    of every respaced chain (ddpm.DDPM.vlb_terms), all on the same draws.
    """
    x0_train, x0 = ddpm.to_model(x_train), ddpm.to_model(x_test)
    before, steps = model.sigma, {}
    with common.own_randomness(seed, x0.device):
        errors = torch.cat([model.x0_errors(batch) for batch in x0.split(1000)])

        def bound(chain, errors, fit):
            chain.decoder_sigma.zero_()
            if fit:
                chain.fit_decoder(x0_train)
            with common.own_randomness(seed, x0.device):
                return bits(chain.vlb_terms(x0, errors))

        ways = (("beta", "beta", False), ("posterior", "posterior", False), ("optimal", "optimal", False),
                ("optimal, fitted decoder", "optimal", True))
        for label, sigma, fit in ways:
            model.sigma = sigma
            terms = bound(model, errors, fit)
            total, error = mean_and_error(terms.sum(1))
            steps[label] = {"bits_per_dim": total, "error": error, "L_0": terms[:, 0].mean().item(),
                            "L_t": terms[:, 1:-1].sum(1).mean().item(), "L_T": terms[:, -1].mean().item()}
        per_t = terms.mean(0).tolist()
        model.sigma, chains = "optimal", {}
        for K in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
            if K <= model.T:
                chain = model.respace(K)
                total, error = mean_and_error(bound(chain, errors[:, chain.tau], True).sum(1))
                chains[K] = {"bits_per_dim": total, "error": error}
        model.sigma = before
    return {"n": len(x0), "steps": steps, "per_t": per_t, "chains": chains,
            **steps["optimal, fitted decoder"], "decoder_sigma": model.decoder_sigma.tolist()}


# Time.

def training_run(path, model):
    """From a checkpoint: parameters, epochs, seconds, peak memory, and the curve of what was watched."""
    saved = common.load(path, path.stem)
    history = saved["history"]
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "epochs": saved["epoch"], "batch_size": saved["settings"]["batch_size"],
            "seconds": history[-1]["seconds"], "seconds_per_epoch": history[-1]["seconds"] / saved["epoch"],
            "peak_memory_mb": saved["memory"] / 1e6, "final": history[-1],
            "curve": [[row["seconds"], row["frechet"]] for row in history if "frechet" in row]}


def evaluations(model, device):
    """Of the network for one sample, as compare.py draws them: all T only where that takes no minutes."""
    return 1 if isinstance(model, vae.VAE) else model.T if device.type == "cuda" else min(model.T, 20)


def draw_samples(model, n, batch, device, **rule):
    """n images (n, 1, 28, 28) from a VAE or a DDPM, so many at a time.  rule: a DDPM's steps and eta."""
    if not rule and isinstance(model, ddpm.DDPM):
        rule = {"steps": evaluations(model, device)}
    starts = tqdm(range(0, n, batch), desc="sampling", leave=False, disable=n < 4 * batch)
    with common.autocast(device):
        return torch.cat([model.sample(min(batch, n - start), **rule).float() for start in starts])


def sampling_time(model, batch, device):
    """ms per image, for one image and for a batch: medians, after one to warm up, of all work finished."""
    def took(n, repeats):
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            draw_samples(model, n, n, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return 1000 * sorted(times[1:])[repeats // 2] / n
    return {"evaluations": evaluations(model, device), "large_batch": batch,
            "ms_batch_1": took(1, 3), "ms_large_batch": took(batch, 1)}


def few_steps(model, distance, n, batch, seed, device):
    """distance(n samples) for each number of network evaluations and each rule to sample: {rule: {K: ...}}.

    The same noise starts every chain; the longest is only gone by the papers' rule.
    """
    result = {}
    for rule, eta, order in (("ancestral", 1.0, 1), ("DDIM", 0.0, 1),
                             ("ancestral, second order", 1.0, 2), ("DDIM, second order", 0.0, 2)):
        result[rule], flags = {}, {"eta": eta, "order": order}
        for K in sorted({min(K, model.T) for K in STEPS if K < 1000 or rule == "ancestral"}):
            with common.own_randomness(seed, device):
                result[rule][K] = distance(draw_samples(model, n, batch, device, steps=K, **flags))
    return result


# Reconstruction, which a DDPM can do in two ways.

BACK, QUARTER = "DDPM, DDIM to $x_T$ and back", "DDPM, noise to t = T/4 and back"


@torch.no_grad()
def ddpm_reconstructions(model, x, steps):
    """What the DDPM makes of digits x (N, 1, 28, 28) in [0, 1]: {name: images like x}.

    It encodes to x_T and comes back, both by DDIM; or it adds noise up to t = T/4, T/2, 3T/4 and takes it
    away again by ancestral sampling.
    """
    chain, x0 = model.respace(steps), ddpm.to_model(x)
    *_, (_, back, _) = chain.trajectory(chain.ddim_encode(x0), eta=0)
    rows = {BACK: ddpm.to_image(back)}
    for quarters, name in ((1, QUARTER), (2, QUARTER.replace("T/4", "T/2")), (3, QUARTER.replace("T", "3T"))):
        start = max(1, round(chain.T * quarters / 4))
        t = torch.full((len(x),), start, device=x.device)
        xt = chain.q_sample(x0, t, torch.randn_like(x0))
        *_, (_, back, _) = chain.trajectory(xt, start=start)
        rows[name] = ddpm.to_image(back)
    return rows


# The figures.

@torch.no_grad()
def figure_reparameterization(model, x, labels, path, data):
    """Report figure 1: ε, z = μ + σ ⊙ ε and the decoded image, for digits x (N, 1, 28, 28) and the same ε."""
    eps = torch.randn(60, model.latent_dim, device=x.device)
    mu, logvar = model.encode(x)
    z = mu[:, None] + (0.5 * logvar).exp()[:, None] * eps  # (N, 60, latent_dim)   KW (10)
    images = model.decode(z[:, :3]).cpu()
    figure = Figure(figsize=(11, 4.2), dpi=130)
    figure.suptitle(f"The reparameterization trick in the latent space of the VAE, {data}", y=1.02)
    spans = ((0.05, 0.25), (0.4, 0.27), (0.74, 0.23))  # from, width: the gaps hold the arrows and their words
    left, middle, right = (figure.add_axes((start, 0.14, width, 0.7)) for start, width in spans)
    left.scatter(*eps[:, :2].cpu().numpy().T, s=8, color="gray")
    left.scatter(*eps[:3, :2].cpu().numpy().T, s=40, color=["black"], marker="x")
    left.set(title=r"noise $\epsilon \sim N(0, I)$", xlabel=r"$\epsilon_1$", ylabel=r"$\epsilon_2$",
             xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
    pale = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}  # or the dots hide the digit
    for i, label in enumerate(labels.tolist()):
        middle.scatter(*z[i, :, :2].cpu().numpy().T, s=5, color=f"C{i}")
        middle.annotate(str(label), mu[i, :2].tolist(), xytext=(9, 5), textcoords="offset points",
                        color=f"C{i}", weight="bold", bbox=pale)
    middle.set(title=r"latent $z = \mu(x) + \sigma(x) \odot \epsilon$", xlabel="$z_1$", ylabel="$z_2$")
    rows = torch.cat([x.cpu()[:, None], images], dim=1)  # (N, 4, 1, 28, 28): the digit, then three decoded z
    sheet = rows[:, :, 0].permute(0, 2, 1, 3).reshape(len(x) * 28, 4 * 28)
    right.imshow(sheet, cmap="gray", vmin=0, vmax=1)
    right.set(title="mean of $p(x|z)$", xticks=[14, 70], xticklabels=["$x$", r"decoded, 3 $\epsilon$"],
              yticks=[28 * i + 14 for i in range(len(x))])
    right.set_yticklabels(labels.tolist())
    for i, tick in enumerate(right.get_yticklabels()):
        tick.set_color(f"C{i}")
    after, before, fractions = 1.01, -0.12, ("axes fraction", "axes fraction")  # x beside an axes
    for a, b, text in ((left, middle, r"$\epsilon$ enters" "\nfrom outside"), (middle, right, "decoder")):
        figure.add_artist(ConnectionPatch((after, 0.75), (before, 0.75), *fractions, axesA=a, axesB=b,
                                          arrowstyle="->"))
        x_text = (a.get_position().x1 + b.get_position().x0) / 2
        figure.text(x_text - 0.02, 0.69, text, ha="center", va="bottom", fontsize=7)
    figure.add_artist(ConnectionPatch((before, 0.3), (after, 0.3), *fractions, axesA=right, axesB=middle,
                                      arrowstyle="->", color="C3", linestyle="--"))
    figure.text(0.698, 0.365, "gradient", ha="center", color="C3", fontsize=7)
    caption = (r"red: the gradient of the loss flows back through the decoder into $z$ and on to $\mu(x)$ "
               r"and $\sigma(x)$; $\epsilon$ needs none, so sampling does not block it")
    figure.text(0.5, -0.02, caption, ha="center", color="C3", fontsize=8)
    figure.savefig(path, bbox_inches="tight")


@torch.no_grad()
def figure_reconstructions(model, classifier, x, labels, path, data):
    """Report figure 2, picked by a rule from x (N, 1, 28, 28) in [0, 1] -> dict of what it shows.

    By relative squared error ‖x - x̂‖² / ‖x‖²: of the digits whose reconstruction the classifier misreads,
    those at 99 % (degenerate) and at 10 % (near miss); of those that it reads right, at 10 % (faithful).
    """
    again = torch.cat([model.decode(model.encode(batch)[0]) for batch in x.split(1000)])
    error = (x - again).square().flatten(1).sum(1) / x.square().flatten(1).sum(1)
    seen = torch.cat([classifier(batch).argmax(1) for batch in again.split(1000)])
    order = error.argsort()

    def pick(group, quantile):
        group = order[group[order]] if group.any() else order
        return group[int(quantile * (len(group) - 1))]

    wrong = seen != labels
    picks = torch.stack([pick(wrong, 0.99), pick(wrong, 0.1), pick(~wrong, 0.1)])
    read = seen[picks].tolist()
    names = [f"{name}\na {label}, read as\na {digit}" for name, label, digit in
             zip(("degenerate", "near miss", "faithful"), labels[picks].tolist(), read)]
    title = f"VAE, {data}: reconstructions, misread at 99 and\n10 % of the error, read right at 10 %"
    common.plot_rows({"test digit": x[picks], "reconstruction": again[picks]}, path, title, names)
    return {"misread": wrong.double().mean().item(), "relative_error": error[picks].tolist(),
            "digit": labels[picks].tolist(), "read_as": read, "mean_relative_error": error.mean().item()}


def figure_bridge(results, path, data):
    """bits/dim against the number of latents K of the respaced chain, and the VAE's as a line across."""
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    chains, one = results["ddpm"]["bound"]["chains"], results["vae"]["bound"]
    K, value, error = zip(*[(k, c["bits_per_dim"], c["error"]) for k, c in chains.items()])
    axes.errorbar(K, value, error, marker="o", markersize=4, capsize=3,
                  label="DDPM, one network, K of its steps")
    axes.axhline(one["bits_per_dim"], color="C1",
                 label=f"VAE, one latent layer of {results['vae']['latent_dim']} numbers")
    axes.set(xscale="log", yscale="log",
             xlabel="latent layers K", ylabel="-ELBO in bits/dim, lower is better",
             title=f"From one latent layer to a thousand: {data} test images")
    ticks = [1, 1.5, 2, 2.5, 3, 4, 6, 8]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.85 * min(value), 1.2 * max(*value, one["bits_per_dim"]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def figure_bits(results, path, data):
    """Left: L_{t-1} against t.  Right: the two terms of the VAE's bound beside the three of the DDPM's."""
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    bound, one = results["ddpm"]["bound"], results["vae"]["bound"]
    per_t = bound["per_t"]
    left.plot(range(2, len(per_t)), per_t[1:-1], linewidth=1)
    not_drawn = f"($L_0$ = {bound['L_0']:.2f} and $L_T$ = {bound['L_T']:.5f} not drawn)"
    left.set(xscale="log", yscale="log", xlabel="t", ylabel="$L_{t-1}$ in bits/dim",
             title=f"DDPM, {data}: where the bits go\n{not_drawn}")
    left.grid(alpha=0.3)
    bars = [("VAE", [("reconstruction", one["reconstruction"]), ("KL", one["kl"])])]
    bars += [(f"DDPM,\nσ² {label}".replace("beta", "= β").replace("posterior", "= β̃").replace(", ", ",\n"),
              [("$L_0$", s["L_0"]), (r"$\Sigma L_{t-1}$", s["L_t"]), ("$L_T$", s["L_T"])])
             for label, s in bound["steps"].items()]
    colors = {"reconstruction": "C0", "KL": "C1", "$L_0$": "C2", r"$\Sigma L_{t-1}$": "C3", "$L_T$": "C4"}
    for i, (_, terms) in enumerate(bars):
        bottom = 0
        for term, value in terms:
            right.bar(i, value, 0.6, bottom, color=colors[term], label=term if i < 2 else None)
            bottom += value
        right.text(i, bottom, f"{bottom:.2f}", ha="center", va="bottom")
    right.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    right.set(ylabel="-ELBO in bits/dim", title=f"One bound, term by term: {data} test images")
    right.margins(y=0.1)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def figure_quality(results, path, data):
    """Fréchet distance over real digits' own: against training time, and against sampling's evaluations."""
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    floors, few = results["floors"], results["few_steps"]
    for i, (label, curve) in enumerate(results["curves"].items()):
        if curve:
            seconds, ratios = zip(*[(each, distance / floors["curve"]) for each, distance in curve])
            left.plot(seconds, ratios, marker="o", markersize=3, linewidth=1.2, color=f"C{i}", label=label)
    left.set(xlabel="seconds of training", title=f"Time against quality, {data}, n = {few['n_curve']}")
    for i, (rule, distances) in enumerate(few["ddpm"].items()):
        K, ratios = zip(*[(int(each), distance / floors["steps"]) for each, distance in distances.items()])
        right.plot(K, ratios, marker="o", markersize=4, color=f"C{i + 4}", label=f"DDPM, {rule}")
    right.plot([1], [few["vae"] / floors["steps"]], "s", color="C0", label="VAE")
    right.set(xlabel="network evaluations per sample", title=f"Sampling's cost, {data}, n = {few['n']}")
    for axes in left, right:
        axes.axhline(1, color="black", linestyle="--", linewidth=0.8, label="real digits")
        axes.set(xscale="log", yscale="log", ylabel="Fréchet distance / real digits' own")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path)


def figure_diversity(results, path, data):
    """Predicted classes, and distances to the nearest training image, of the samples and of real digits."""
    figure = Figure(figsize=(11, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = {"test digits": ("gray", results["test"]),
            "DDPM": ("C0", results["ddpm"]["samples"]), "VAE": ("C1", results["vae"]["samples"])}
    for i, (label, (color, row)) in enumerate(rows.items()):
        digits = [digit + 0.27 * (i - 1) for digit in range(10)]
        left.bar(digits, row["classes"], 0.27, color=color, label=label)
        right.stairs(row["nearest_histogram"], [i / 4 for i in range(49)], color=color, label=label)
    left.set(xlabel="digit that the classifier reads", ylabel="share", xticks=range(10),
             title=f"Classes of {results['ddpm']['samples']['n']} images, {data}")
    right.set(xlabel="Euclidean distance to the nearest training image, pixels in [0, 1]", ylabel="share",
              title="Memorization: copies would lie at the left")
    for axes in left, right:
        axes.legend()
    figure.savefig(path)


# The report.

METRICS = {  # of samples: the column's head, and how many digits are worth printing
    "frechet": ("Fréchet distance", 1), "ratio": ("over real digits' own", 1), "precision": ("precision", 3),
    "recall": ("recall", 3), "degenerate": ("degenerate", 3), "class_distance": ("classes off by", 3),
    "nearest": ("nearest training image", 2), "copies": ("copies", 3)}


def written(key, number, spread, form="{} ({})"):
    digits = METRICS[key][1]
    return form.format(f"{number:.{digits}f}", f"{spread:.{digits}f}")


def value(results, name, key):
    """A number of vae's or ddpm's samples -> it, its standard error, and how both are written.

    One trained pair: the number and, in parentheses, its error over resamples of the images.  More: the mean
    and ± the standard deviation over the pairs; the error is then that of the mean.
    """
    values = [pair[name][key] for pair in results["pairs"]]
    if len(values) == 1:
        error = results[name]["samples"][f"{key}_error"]
        return values[0], error, written(key, values[0], error)
    values = torch.tensor(values, dtype=torch.float64)
    mean, std = values.mean().item(), values.std().item()
    # a deviation known from few pairs: Student's t for 95 %, as a multiple of 2
    wider = {2: 6.35, 3: 2.15, 4: 1.59, 5: 1.39, 6: 1.29, 7: 1.22}.get(len(values), 1.15)
    return mean, wider * std / len(values) ** 0.5, written(key, mean, std, "{} ± {}")


def sample_rows(results):
    """The table of samples: for each kind of image its name, the METRICS, and the p of its classes."""
    v, d = results["vae"], results["ddpm"]
    rows = [[label, *(value(results, name, key)[2] for key in METRICS), f"{row['samples']['class_p']:.1g}"]
            for label, name, row in (
                (f"VAE, {v['latent_dim']}-D, {v['settings']['epochs']} epochs", "vae", v),
                (f"DDPM, {d['settings']['epochs']} epochs", "ddpm", d))]
    others = {**{f"{name}, {row['epochs']} epochs": row for name, row in results["others"].items()},
              "real digits, test": results["test"], "real digits, training": results["real"],
              "uniform noise": results["noise"]}
    return rows + [[label, *(written(key, row[key], row[f"{key}_error"]) if key in row else ""
                             for key in METRICS), f"{row['class_p']:.1g}"] for label, row in others.items()]


def time_rows(results):
    """The table of time and of the bounds: (name, VAE, DDPM, the report)."""
    v, d = results["vae"], results["ddpm"]

    def row(name, form, of, report=""):
        return name, form.format(of(v)), form.format(of(d)), report

    reported = (f"VAE about {REPORT['vae']['minutes']} min, DDPM over {REPORT['ddpm']['minutes'] // 60} h "
                "(RTX 3090, 100 epochs)")
    large, final = v["sampling"]["large_batch"], v["training"]["final"]
    return [
        row("parameters", "{:,}", lambda m: m["training"]["parameters"]),
        row("epochs", "{}", lambda m: m["training"]["epochs"], "100"),
        row("training, s per epoch", "{:.1f}", lambda m: m["training"]["seconds_per_epoch"]),
        row("training, s in all", "{:.0f}", lambda m: m["training"]["seconds"], reported),
        row("peak memory of the process by then, MB", "{:.0f}", lambda m: m["training"]["peak_memory_mb"]),
        row("network evaluations per sample", "{}", lambda m: m["sampling"]["evaluations"]),
        row("ms per sample, batch of 1", "{:.2f}", lambda m: m["sampling"]["ms_batch_1"]),
        row(f"ms per sample, batch of {large}", "{:.3f}", lambda m: m["sampling"]["ms_large_batch"]),
        row(f"-ELBO in bits/dim (standard error), n = {v['bound']['n']}",
            "{0[bits_per_dim]:.3f} ({0[error]:.3f})", lambda m: m["bound"]),
        ("-ELBO of the trained likelihood, nats (a score on gray pixels)",
         f"{final['test_kl'] - final['test_reconstruction']:.1f}", "", "")]


def claims(results):
    """The report's sentences as (claim, what was measured, verdict, the figure that shows it)."""
    v, d, real, test = results["vae"], results["ddpm"], results["real"], results["test"]

    def verdict(margin, error):  # holds if the margin is above zero by more than twice its standard error
        return "holds" if margin > 2 * error else "does not hold" if margin < -2 * error else "cannot tell"

    def lower(key):  # is the DDPM's number the lower one?  And both numbers as text
        (a, a_error, a_text), (b, b_error, b_text) = value(results, "vae", key), value(results, "ddpm", key)
        return verdict(a - b, math.hypot(a_error, b_error)), f"{b_text} against {a_text}"

    nearer, distances = lower("frechet")
    outside, precisions = lower("precision")
    agrees = (nearer, outside) in (("holds", "does not hold"), ("does not hold", "holds"))
    recall, error, text = value(results, "ddpm", "recall")
    narrower = verdict(real["recall"] - recall, math.hypot(error, real["recall_error"]))
    classes_p = d["samples"]["class_p"]
    fewer, shares = lower("degenerate")

    slower = d["training"]["seconds_per_epoch"] / v["training"]["seconds_per_epoch"]
    best = min([distance for _, distance in v["training"]["curve"]], default=0)
    passed = [seconds for seconds, distance in d["training"]["curve"] if distance < best]
    when = f"; it passes the VAE's best Fréchet distance within {passed[0]:.0f} s" if passed else ""

    errors = results["encoded"]["rms"]
    chains = list(d["bound"]["chains"].items())
    (fewest, one), (most, every) = chains[0], chains[-1]
    return [
        ("the DDPM's outputs are of higher fidelity than the VAE's",
         f"Fréchet distance {distances}, real digits {real['frechet']:.1f}; precision {precisions}, "
         f"real digits {real['precision']:.3f}",
         nearer if agrees or outside == "cannot tell" else "cannot tell", "figure3_samples.png"),
        ("it does not produce as many degenerate images",
         f"the classifier is under 90 % sure of a share of {shares}, test digits {test['degenerate']:.3f}",
         fewer, "figure3_samples.png"),
        ("its samples lack diversity",
         f"recall {text}, real digits {real['recall']:.3f}, the VAE {value(results, 'vae', 'recall')[2]}; "
         f"classes off by {d['samples']['class_distance']:.3f}, p = {classes_p:.1g}",
         "holds" if classes_p < 0.001 else narrower, "diversity.png"),
        ("it takes substantially longer to train (over 3 h against about 45 min)",
         f"{slower:.0f} times as long, epoch for epoch{when}",
         "holds" if slower > 1 else "does not hold", "quality.png"),
        ("its outputs cannot be compared with given images, for it starts from noise",
         f"test digits come back from t = T/4 with an error of {errors[QUARTER][0]:.3f} (rms per pixel), by "
         f"DDIM from x_T with {errors[BACK][0]:.3f}; the VAE's {errors['VAE'][0]:.3f}, black images "
         f"{errors['all black'][0]:.3f}",
         verdict(errors[QUARTER][0] - errors["all black"][0] / 2, errors[QUARTER][1]), "reconstructions.png"),
        ("its many steps allow for more expressiveness",
         f"bits/dim of one network: {one['bits_per_dim']:.2f} in {fewest} steps, {every['bits_per_dim']:.2f} "
         f"in {most}; the VAE {v['bound']['bits_per_dim']:.2f}",
         verdict(one["bits_per_dim"] - every["bits_per_dim"], math.hypot(one["error"], every["error"])),
         "bound_bridge.png")]


def markdown(head, rows):
    """A table from a list of cells for the head and one for each row."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows))


def write_report(results, out):
    """OUT/report.md, from results alone."""
    r, v, d = results, results["vae"], results["ddpm"]
    one, encoded, few = v["bound"], r["encoded"], r["few_steps"]
    real_data = "" if r["data"] == "mnist" else "\n**These are SYNTHETIC digits, not MNIST.**\n"
    seeds = ", ".join(str(pair["seed"]) for pair in r["pairs"])
    if d["settings"]["seed"] != v["settings"]["seed"]:
        seeds += f" (the DDPM's {d['settings']['seed']})"
    spread = (f"± is the standard deviation over these {len(r['pairs'])} pairs, all else is of the first"
              if len(r["pairs"]) > 1 else "one trained pair, so there is no ±")
    compiled = ("Nothing is compiled" if r["device"].startswith("CPU") else
                "Training times contain the compiling and capturing that was done")
    judged = markdown(["the report says", "measured", "", "figure"], claims(r))
    samples = markdown(["", *(head for head, _ in METRICS.values()), "p of the classes"], sample_rows(r))
    times = markdown(["", f"VAE, {v['latent_dim']}-D", "DDPM", "the report"], time_rows(r))
    ladder = markdown(["DDPM", "L_0", "Σ L_(t-1)", "L_T", "total"], [
        [f"σ² = {label}", f"{s['L_0']:.3f}", f"{s['L_t']:.3f}", f"{s['L_T']:.5f}",
         f"{s['bits_per_dim']:.3f} ({s['error']:.3f})"] for label, s in d["bound"]["steps"].items()])
    errors = markdown(["reconstruction", "error per pixel"], [
        [name, f"{mean:.3f} ({error:.3f})"] for name, (mean, error) in encoded["rms"].items()])
    counts = few["ddpm"]["ancestral"]
    steps = markdown(["network evaluations", *counts], [
        [rule, *(f"{distances[K] / r['floors']['steps']:.1f}" if K in distances else "" for K in counts)]
        for rule, distances in few["ddpm"].items()])
    maps = """![1: the reparameterization trick](figure1_reparameterization.png)
![Latent space](vae_latent.png)
![Manifold](vae_manifold.png)
""" if v["latent_dim"] == 2 else ""  # what only a map can show
    (out / "report.md").write_text(f"""# VAE and DDPM on {common.NAMES[r['data']]}

{r['date']}, {r['device']}, torch {r['torch']}, seeds {seeds}: {spread}.
In parentheses stands the sampling noise: the standard deviation over resamples of the images.  {compiled}.
Samples are the first from the seed, none is left out.
{real_data}
## The report's claims

{judged}

A claim holds, or does not, where a difference is more than twice its standard error. The Fréchet distance decides on fidelity, unless precision
contradicts it. Diversity is lacking where recall is below real digits', or the classes differ from the training labels' with p < 0.001. That
images cannot be compared does not hold if they come back from t = T/4 with less than half the error of black ones; the way by DDIM does not
count, since any network, even an untrained one, leads back to 784 pixels from the 784 numbers of x_T.

## Samples, n = {v['samples']['n']}

{samples}

The yardstick is a classifier that reads {100 * r['classifier_accuracy']:.2f} % of the test digits and was trained on the training digits. Fréchet distance: of its 128
features to those of all test digits; real digits' own is {r['floors']['samples']:.2f} at this n (mean over draws of training digits). Precision: the share of samples
within the manifold of real digits; recall: the share of real digits within the samples'. Degenerate: the classifier is under 90 % sure.
Classes off by: total variation from the training labels' shares, with p of a χ² test. Nearest training image: median Euclidean distance
of images in [0, 1]; copies: the share that is nearer than 99 % of the test digits are. Ratios at different n cannot be compared.

![Ten samples of each](figure3_samples.png)
![Classes and memorization](diversity.png)
![The samples nearest to a training image](neighbours.png)

## Time

{times}

![Time against quality](quality.png)

Fréchet distance as a multiple of real digits' own, n = {few['n']}; the VAE with its one evaluation: {few['vae'] / r['floors']['steps']:.1f}.

{steps}

## Reconstructions of the same {encoded['n']} test digits

{errors}

Root mean square of the difference of images in [0, 1] (standard error). The DDPM's chain has {encoded['steps']} steps.

![Reconstructions](reconstructions.png)

## The bound, term by term, in bits/dim

{ladder}

The VAE: reconstruction {one['reconstruction']:.3f}, KL {one['kl']:.3f}, total {one['bits_per_dim']:.3f} ({one['error']:.3f}), under a discretized normal of σ = {one['sigma']:.3f} fitted on
training images; its importance-weighted bound with 256 samples is {one['importance_weighted_256']:.3f}, so at least {one['gap']:.3f} of it is KL(q(z|x) || p(z|x)).

![Where the bits go](bound_terms.png)
![From one latent layer to a thousand](bound_bridge.png)

## The report's figures

{maps}![2: three reconstructions](figure2_reconstructions.png)
![Trajectory](ddpm_trajectory.png)
![The forward process](ddpm_forward.png)
![VAE's curves](vae_curves.png)
![DDPM's curve](ddpm_loss.png)
""")


# The benchmark: python compare.py --benchmark

class ReportNet(nn.Module):
    """The report's ε-network, rebuilt from its description; like UNet, but it does not look at t.

    Seven 7x7 convolutions with batch norm and ReLU at full resolution, and a 3x3 one: 16.9 M parameters.
    """

    def __init__(self):
        super().__init__()
        widths = (1, 64, 128, 256, 512, 256, 128, 64)
        layers = [layer for cin, cout in zip(widths, widths[1:]) for layer in (
            nn.Conv2d(cin, cout, 7, padding=3), nn.BatchNorm2d(cout), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1))

    def forward(self, xt, t):
        return self.layers(xt)


def per_call(job, device, seconds=3.0):
    """Seconds that a call of job takes, over at least three calls and so many seconds, two calls first."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    job(), job(), wait()
    calls, start = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - start < seconds:
        job(), wait()
        calls += 1
    return (time.perf_counter() - start) / calls


def flops(job):
    """Floating-point operations of all matrix products and convolutions in a call of job."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def peak_flops(device):
    """FLOP/s of this device in its best large matrix product or convolution, in autocast's precision."""
    dtype, best = torch.bfloat16 if common.has_bfloat16(device) else torch.float32, 0
    for side in (2048, 8192) if device.type == "cuda" else (1024, 2048):
        a = torch.randn(side, side, device=device, dtype=dtype)
        best = max(best, 2 * side ** 3 / per_call(lambda: a @ a, device, 1))
    for width in (64, 256):
        x = torch.randn(64, width, 28, 28, device=device, dtype=dtype)
        kernel = torch.randn(width, width, 3, 3, device=device, dtype=dtype)
        x, kernel = (each.contiguous(memory_format=torch.channels_last) for each in (x, kernel))
        job = lambda: F.conv2d(x, kernel, padding=1)
        best = max(best, flops(job) / per_call(job, device, 1))
    return best


def benchmark_report_net(device, fast):
    """Training steps and network evaluations of the report's network: two rows.  fast: as our own runs."""
    model = ddpm.DDPM(ReportNet().to(device), shape=(1, 28, 28)).to(device)
    if fast:
        model.net.to(memory_format=torch.channels_last)
    optimizer, batch = torch.optim.Adam(model.parameters(), lr=1e-3), 128 if device.type == "cuda" else 16
    x0 = torch.rand(batch, 1, 28, 28, device=device) * 2 - 1
    t = torch.ones(batch, dtype=torch.int64, device=device)

    def loss():
        with torch.autocast(device.type, torch.bfloat16, enabled=fast and common.has_bfloat16(device)):
            value = model.loss(x0)
        optimizer.zero_grad()
        value.backward()

    @torch.no_grad()
    def evaluate():
        with torch.autocast(device.type, torch.bfloat16, enabled=fast and common.has_bfloat16(device)):
            model.net(x0, t)

    work, seconds = flops(loss), per_call(lambda: (loss(), optimizer.step()), device)
    memory, name = common.peak_memory(device), "the report's network" + ", bfloat16" * fast
    model.eval()
    return [{"what": f"training {name}", "batch": batch, "seconds": seconds, "flops": work, "memory": memory},
            {"what": f"evaluating {name}", "batch": batch, "seconds": per_call(evaluate, device),
             "flops": flops(evaluate)}]  # its memory would be that of training


# On a GPU: as the script is, and with what else could be done with its step.
WAYS = {"vae": ("", ", compiled", ", not captured"),
        "ddpm": ("", ", not compiled", ", not captured", ", not compiled, not captured")}


def benchmark_training(name, data, data_dir, device, out, way=""):
    """A row: what vae.py or ddpm.py trains in its epochs after the first.  The model stays in out.

    Its "setup" are the seconds by which the first epoch took longer: compiling, capturing, warming up.
    """
    if ", compiled" in way:
        common.for_training = lambda model, method, device: common.compiled(method, model, device)
    if "not compiled" in way:
        common.compiled = lambda method, *_: method
    if "not captured" in way:
        common.captured = lambda step, _: step
    script, (images, epochs) = SCRIPTS[name], (60000, 5) if device.type == "cuda" else (12800, 2)
    script.main(["--data", data, "--data-dir", data_dir, "--device", str(device), "--out", out,
                 "--epochs", str(epochs), "--limit", str(images), "--overwrite"])
    saved = common.load(Path(out) / f"{name}.pt", name)
    first, *_, last = saved["history"]
    model, batch = script.load(Path(out) / f"{name}.pt", device), saved["settings"]["batch_size"]
    x = torch.rand(batch, 1, 28, 28, device=device)
    model.requires_grad_(True)
    job = (lambda: torch.stack(model.elbo_terms(x)).sum().backward()) if name == "vae" else (
        lambda: model.loss(x).backward())
    epoch = (last["seconds"] - first["seconds"]) / (epochs - 1)
    return [{"what": f"training {name}.py{way}", "batch": batch, "seconds": epoch * batch / images,
             "setup": first["seconds"] - epoch, "flops": flops(job), "memory": saved["memory"]}]


@torch.no_grad()
def benchmark_sampling(name, device, out):
    """Network evaluations while sampling: a row."""
    model = SCRIPTS[name].load(Path(out) / f"{name}.pt", device)
    batch, steps = SIZES[device.type]["batch"], 1 if name == "vae" else 10
    rule = {} if name == "vae" else {"steps": steps}
    job = lambda: draw_samples(model, batch, batch, device, **rule)
    return [{"what": f"evaluating {name}.py's, sampling", "batch": batch, "flops": flops(job) / steps,
             "seconds": per_call(job, device) / steps, "memory": common.peak_memory(device)}]


def benchmark(args, device):
    """Prints the table of speeds and writes OUT/benchmark.json.  Each row has a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        jobs = [(benchmark_report_net, device, False)]
        jobs += [(benchmark_report_net, device, True)] if common.has_bfloat16(device) else []
        jobs += [(benchmark_training, name, args.data, args.data_dir, device, out, way) for name in SCRIPTS
                 for way in (WAYS[name] if device.type == "cuda" else ("",))]
        jobs += [(benchmark_sampling, name, device, out) for name in SCRIPTS]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peak = pool.apply(peak_flops, (device,))
            rows = []
            for job, *rest in jobs:
                try:
                    rows += pool.apply(job, rest)
                except common.InputError as error:  # of a way that fails here; the others are still of use
                    print(f"compare: left out {job.__name__}{(*map(str, rest),)}: {error}", file=sys.stderr)
    slow = {row["what"].split()[0]: row["seconds"] / row["batch"] for row in rows[1::-1]}
    print(f"\n{describe(device)}, torch {torch.__version__}, {datetime.date.today()}; best large product or "
          f"convolution: {peak / 1e9:,.0f} GFLOP/s")
    print(f"{'':46} {'batch':>6} {'images/s':>10} {'ms/step':>9} {'setup s':>8} {'MB':>6} {'GFLOP/s':>8} "
          f"{'of best':>8} {'x the report':>13}")
    for row in rows:
        row["images_per_second"] = row["batch"] / row["seconds"]
        row["share"] = row["flops"] / row["seconds"] / peak
        row["ratio"] = slow[row["what"].split()[0]] * row["images_per_second"]
        print(f"{row['what']:46} {row['batch']:6} {row['images_per_second']:10,.1f} "
              f"{1000 * row['seconds']:9.2f} {row.get('setup', math.nan):8.1f} "
              f"{row.get('memory', math.nan) / 1e6:6.0f} "
              f"{row['flops'] / row['seconds'] / 1e9:8,.0f} {row['share']:8.1%} {row['ratio']:13,.1f}")
    results = {"device": describe(device), "torch": torch.__version__, "peak_flops": peak, "rows": rows,
               "date": datetime.date.today().isoformat()}
    (args.out / "benchmark.json").write_text(json.dumps(results, indent=1))
    common.farewell("compare", args.out, ["benchmark.json"], args.data)


# All of it.

def trained(script, args, out, watch, **own):
    """The model of script (vae or ddpm), trained or loaded, its pictures in out.

    own: settings other than those in args.  The model's .training_run is what its checkpoint tells of it.
    """
    path = out / f"{script.__name__}.pt"
    flags = {"data": args.data, "data_dir": args.data_dir, "out": out, "device": args.device}
    if path.exists() and not args.overwrite:  # go on with its own settings: if it is finished, only draw
        settings = common.load(path, script.__name__)["settings"]
        flags |= settings
        print(f"compare: {path} as it is, {settings['epochs']} epochs, seed {settings['seed']}", flush=True)
    else:
        own = own or {name: getattr(args, name) for name in ("limit", "epochs", "batch_size", "lr", "seed")}
        flags |= own
    argv = []
    for name, setting in flags.items():
        if setting is not None and setting is not False:  # 0 is a value
            argv += ["--" + name.replace("_", "-")] + ([] if setting is True else [str(setting)])
    with torch.enable_grad():
        script.main(argv + ["--overwrite" if args.overwrite else "--resume"], watch)
    model = script.load(path, common.pick_device(args.device))
    model.training_run = training_run(path, model)
    return model


@torch.no_grad()
def measure(args, device, out):
    """Everything that goes into results.json, and the figures that compare.py adds."""
    seeds = range(args.seed, args.seed + args.seeds)
    folders = [out] + [out / f"seed_{seed}" for seed in seeds[1:]]
    paths = [folder / name for folder in folders for name in ("vae.pt", "ddpm.pt")]
    paths += [out / "vae20" / "vae.pt", out / "autoencoder" / "vae.pt", out / "adam" / "ddpm.pt"]
    for path in paths if not args.overwrite else ():  # before the long work
        if not path.exists():
            continue
        script = SCRIPTS[path.stem]
        missing = set(script.SETTINGS) - (settings := script.load(path).settings).keys()
        if missing:
            raise common.InputError(f"{path} is of another version of this code: it has no {missing.pop()}")
        if (made_of := settings["data"]) != args.data:
            raise common.InputError(f"{path} was trained on {made_of}, not {args.data}: choose another --out")
        if path.parent == out and args.seeds > 1 and settings["seed"] != args.seed:
            raise common.InputError(f"{path} was trained from seed {settings['seed']}, and --seeds starts "
                                    f"from {args.seed}: give it that --seed, or choose another --out")
    size, data = SIZES[device.type], common.NAMES[args.data]
    with torch.enable_grad():
        classifier = train_classifier(args, device)
    x_train, x_test = common.load_data(args.data, args.data_dir, device)
    y_train, y_test = common.load_labels(args.data, args.data_dir, device)
    torch.manual_seed(args.seed)
    mixed, shuffled = (torch.randperm(len(x), device=device) for x in (x_test, x_train))
    x_test, y_test = x_test[mixed] / 255, y_test[mixed]  # MNIST's first test digits are the neater ones
    real, probabilities = look(classifier, x_test)

    def distance(x):
        return frechet(look(classifier, x)[0], real)

    def watch(model, epoch):  # for the curves of quality against time; the time is that of training alone
        if epoch > 10 and epoch % 5:
            return {}
        rule = {"steps": min(20, model.T)} if isinstance(model, ddpm.DDPM) else {}
        with common.own_randomness(args.seed, device):
            return {"frechet": distance(draw_samples(model, size["curve"], size["batch"], device, **rule))}

    # The models: the pairs, and what stands beside the first of them.
    v, d = (trained(script, args, out, watch) for script in (vae, ddpm))
    pairs = {v.settings["seed"]: {"vae": v, "ddpm": d}}
    for seed, folder in zip(seeds[1:], folders[1:]):
        pairs[seed] = {script.__name__: trained(script, args, folder, watch,
                                                **model.settings | {"seed": seed})
                       for script, model in ((vae, v), (ddpm, d))}
    epochs = v.settings["epochs"]  # rows beside the main one: a short run where minutes count
    short = v.settings | {"epochs": epochs if device.type == "cuda" else min(epochs, 10)}
    wide = trained(vae, args, out / "vae20", watch, **short | {"latent_dim": 20})
    plain = trained(vae, args, out / "autoencoder", watch, **short | {"kl_weight": 0.0})
    as_reported = {"optimizer": "adam", "predict": "eps", "times": "uniform",
                   "epochs": math.ceil(d.settings["epochs"] / 2)}
    adam = trained(ddpm, args, out / "adam", watch, **d.settings | as_reported)

    # What their samples are held against.
    limits = [model.settings["limit"] or len(x_train) for model in (v, d)]  # images that the models have seen
    train = {"x": x_train[:max(limits)].flatten(1) / 255,
             "shares": torch.bincount(y_train, minlength=10).double().cpu() / len(y_train)}
    n = min(size["samples"], len(x_test))
    train["close"] = nearest(x_test[:n], train["x"])[0].quantile(0.01)

    def measured(x):
        return measure_samples(classifier, x, real, train, args.seed)

    def floor(n):  # real digits' own distance: the mean over draws of n training images
        draws = shuffled.split(n)[:10]
        return sum(distance(x_train[draw] / 255) for draw in draws) / len(draws)

    print("compare: samples", flush=True)
    drawn = []
    for seed, pair in pairs.items():
        torch.manual_seed(seed)
        drawn.append({name: draw_samples(model, n, size["batch"], device) for name, model in pair.items()})
    samples, few = drawn[0], min(size["steps"], n)
    others = {"VAE, 20-D": wide, "autoencoder": plain}
    others = {name: draw_samples(model, n, size["batch"], device) for name, model in others.items()}
    results = {
        "data": args.data, "device": describe(device), "torch": torch.__version__, "seed": args.seed,
        "date": datetime.date.today().isoformat(), "report": REPORT,
        "classifier_accuracy": (probabilities.argmax(1) == y_test).double().mean().item(),
        "floors": {name: floor(min(size[name], n)) for name in ("samples", "curve", "steps")},
        "real": measured(x_train[shuffled[:n]] / 255),
        # of the test digits nothing for which they would be held against themselves
        "test": {key: number for key, number in measured(x_test[:n]).items()
                 if not key.startswith(("frechet", "precision", "recall"))},
        "noise": measured(torch.rand_like(x_test[:n])),
        "others": {name: measured(x) | {"epochs": short["epochs"]} for name, x in others.items()},
        "pairs": [{"seed": seed, **{name: measured(x) for name, x in pair.items()}}
                  for seed, pair in zip(pairs, drawn)],
        "curves": {f"VAE, {v.latent_dim}-D": v.training_run["curve"],
                   f"VAE, 20-D, {short['epochs']} epochs": wide.training_run["curve"],
                   "DDPM": d.training_run["curve"],
                   f"DDPM, Adam on ε, {as_reported['epochs']} epochs": adam.training_run["curve"]},
        "few_steps": {"n": few, "n_curve": min(size["curve"], n), "vae": distance(samples["vae"][:few]),
                      "ddpm": few_steps(d, distance, few, size["batch"], args.seed, device)}}
    rows = [results["real"], results["noise"], *results["others"].values()]
    for row in rows + [pair[name] for pair in results["pairs"] for name in ("vae", "ddpm")]:
        row |= {f"ratio{end}": row[f"frechet{end}"] / results["floors"]["samples"] for end in ("", "_error")}

    print("compare: bounds, sampling times and reconstructions", flush=True)
    some = x_train[torch.randperm(min(limits), device=device)[:4 * size["bound"]][:1000]] / 255
    for name, model, bound in (("vae", v, vae_bound), ("ddpm", d, ddpm_bound)):
        results[name] = {
            "settings": model.settings, "training": model.training_run,
            "sampling": sampling_time(model, size["batch"], device), "samples": results["pairs"][0][name],
            "bound": bound(model, some, x_test[:size["bound"]], args.seed)}
    results["vae"]["latent_dim"] = v.latent_dim
    x = x_test[:size["encoded"]]
    rows = {name: model.decode(model.encode(x)[0]) for name, model in (
        ("VAE", v), ("VAE, 20-D", wide), ("autoencoder", plain))}
    with common.autocast(device), common.own_randomness(args.seed, device):
        rows |= ddpm_reconstructions(d, x, min(50, d.T))
    rms = {name: (x - back).square().flatten(1).mean(1).sqrt()
           for name, back in {**rows, "all black": torch.zeros_like(x)}.items()}
    results["encoded"] = {"n": len(x), "steps": min(50, d.T),
                          "rms": {name: mean_and_error(error) for name, error in rms.items()}}

    # The figures.
    common.plot_rows({"test digit": x[:10], **{name: row[:10] for name, row in rows.items()}},
                     out / "reconstructions.png", f"Reconstructions of the first ten test digits, {data}")
    rows = {"real": x_test, "DDPM": samples["ddpm"], "VAE": samples["vae"], **others}
    common.plot_rows({name: row[:10] for name, row in rows.items()}, out / "figure3_samples.png",
                     f"The first ten samples from seed {args.seed}, {data}")
    rows = {}
    for name, x in (("DDPM", samples["ddpm"]), ("VAE", samples["vae"]), ("test digit", x_test[:n])):
        far, which = nearest(x, train["x"])
        classes = look(classifier, x)[1].argmax(1)
        first = torch.stack([torch.where(classes == digit, far, math.inf).argmin() for digit in range(10)])
        found = (classes[first] == torch.arange(10, device=device)).view(-1, 1, 1, 1)  # else it stays black
        close = train["x"][which[first]].view(-1, 1, 28, 28)
        rows |= {name: x[first] * found, f"training image\nnearest to {name}": close * found}
    common.plot_rows(rows, out / "neighbours.png", f"Of {n} images, for each digit the one read as it that "
                     f"is nearest to a training image, {data}", [f"read as {digit}" for digit in range(10)])
    if v.latent_dim == 2:
        digits = torch.stack([(y_test == i).nonzero()[0, 0] for i in range(0, 10, 2)])  # the first of each
        path = out / "figure1_reparameterization.png"
        figure_reparameterization(v, x_test[digits], y_test[digits], path, data)
    results["vae"]["reconstructions"] = figure_reconstructions(
        v, classifier, x_test, y_test, out / "figure2_reconstructions.png", data)
    for draw, name in ((figure_bridge, "bound_bridge"), (figure_bits, "bound_terms"),
                       (figure_quality, "quality"), (figure_diversity, "diversity")):
        draw(results, out / f"{name}.png", data)
    return results


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    bfloat16 = "with" if common.has_bfloat16(device) else "without"
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, {capability} {bfloat16} bfloat16"


def parse(argv):
    parser = common.arguments(__doc__, EXAMPLES, epochs=None, batch_size=None, lr=None)
    parser.add_argument("--seeds", metavar="N", type=common.number(int, 1, 100), default=1,
                        help="train N pairs, from --seed upwards, to see how trainings differ")
    parser.add_argument("--benchmark", action="store_true",
                        help="measure speed instead: training and sampling, against the report's network")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    args.overwrite &= not args.resume  # after Ctrl-C, what is begun anew is not begun once more
    if common.WORLD > 1 or (common.TORCHRUN and args.benchmark):
        raise common.InputError("one process compares: give torchrun vae.py and ddpm.py, then run this")
    device, args.data = common.pick_device(args.device), common.find_data(args.data, args.data_dir)
    args.out = out = common.output_folder(args.out)
    if args.benchmark:
        return benchmark(args, device)
    started = time.perf_counter()
    with common.locked(out):
        results = measure(args, device, out)
        results["seconds"] = time.perf_counter() - started
        (out / "results.json").write_text(json.dumps(results, indent=1))
        write_report(results, out)
    for row in time_rows(results):
        print("  ".join(f"{cell:<24}" if i else f"{cell:<66}" for i, cell in enumerate(row[:3])))
    for row in [["", *METRICS], *(row[:-1] for row in sample_rows(results))]:
        print("  ".join(f"{cell:<14}" if i else f"{cell:<24}" for i, cell in enumerate(row)))
    for claim, measured, verdict, figure in claims(results):
        print(f"{verdict:>14}: {claim}: {measured} ({figure})")
    common.farewell("compare", out, ["report.md", "results.json"], args.data)


if __name__ == "__main__":
    common.run(main)
