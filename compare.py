"""The comparison of the course report, measured: trains or loads a VAE and a DDPM, draws and measures both.

Writes into OUT: report.md (the table and the figures, readable on its own), results.json (all numbers), the
figures, and what vae.py and ddpm.py write.  A model that has a finished checkpoint in OUT is loaded, not
trained.  On a CPU both are trained for fewer epochs than the report's 100, and fewer samples are measured;
the log says so.
"""
import datetime
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import nn
from tqdm import tqdm

import common
import ddpm
import vae

EXAMPLES = """\
  python compare.py                                  everything, with the defaults of vae.py and ddpm.py
  python compare.py --limit 2000 --epochs 1 --out quick   a quick look
  python ddpm.py --epochs 20 && python compare.py    with a DDPM that was trained for longer"""

# The course report's own statements, for the table's last column: an RTX 3090, 100 epochs of each.
REPORT = {"vae": {"minutes": 45}, "ddpm": {"minutes": 180}}
DIM = 28 * 28


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

    Heusel et al. 2017 (6), on this classifier's features: comparable only within one run.
    """
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()  # tr √(AB)
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root).item()


def precision_recall(real, fake, k=3):
    """Shares of fake within real's manifold and of real within fake's; features (n, d), (m, d).

    A manifold is the union of balls around its points, each reaching to its k-th neighbour.
    Kynkäänniemi et al. 2019 (1) and (2)
    """
    def within(points, manifold):
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1).values  # the nearest is the point itself
        return (torch.cdist(points, manifold) <= radius).any(1).double().mean().item()
    return within(fake, real), within(real, fake)


def nearest_distance(x, flat):
    """From each image of x (n, 1, 28, 28) the Euclidean distance to the nearest of flat (m, 784): (n,)."""
    return torch.cat([torch.cdist(batch.flatten(1), flat).amin(1) for batch in x.split(1000)])


def measure_samples(classifier, x, real, train, seed):
    """What the classifier says of images x (n, 1, 28, 28): a dict of numbers.

    real: features of the test digits; train: flattened training images and their labels' counts.
    """
    features, probabilities = look(classifier, x)
    generator = torch.Generator().manual_seed(seed)
    again = [features[torch.randint(len(x), (len(x),), generator=generator)] for _ in range(10)]
    precision, recall = precision_recall(real[:len(x)], features)
    counts = torch.bincount(probabilities.argmax(1), minlength=10).double().cpu()
    expected = train["shares"] * len(x)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    nearest = nearest_distance(x, train["x"])
    unsure = (probabilities.amax(1) < 0.9).double()
    return {
        "n": len(x),
        "frechet": frechet(features, real),
        "frechet_error": torch.tensor([frechet(f, real) for f in again]).std().item(),  # over resamples of x
        "precision": precision, "recall": recall,
        "degenerate": unsure.mean().item(), "degenerate_error": (unsure.std() / len(x) ** 0.5).item(),
        "classes": (counts / len(x)).tolist(),
        "class_distance": ((counts - expected).abs().sum() / 2 / len(x)).item(),  # total variation
        "class_p": torch.special.gammaincc(torch.tensor(4.5).double(), chi2 / 2).item(),  # χ², 9 degrees
        "nearest_training_image": nearest.median().item()}


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
            "gap": bits(reconstruction - kl - tighter).neg().mean().item()}


@torch.no_grad()
def ddpm_bound(model, x_train, x_test, seed):
    """The DDPM's bound on x_test in bits/dim -> dict: each way to set the variances, each length of chain.

    The network is asked once for every image and t: its squared errors give the bound of every variance and
    of every respaced chain (ddpm.DDPM.vlb_terms), all on the same draws.
    """
    x0_train, x0 = ddpm.to_model(x_train), ddpm.to_model(x_test)
    before, steps = model.sigma, {}
    with common.own_randomness(seed, x0.device):
        errors = model.x0_errors(x0)

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

def seconds_to_sample(sample, device, repeats):
    """The median of repeats, after one to warm up, with the device's work finished."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        sample()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def training_time(path, model):
    """From a checkpoint: parameters, epochs, seconds, peak memory."""
    saved = common.load(path, path.stem)
    seconds = saved["history"][-1]["seconds"]
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "epochs": saved["epoch"], "batch_size": saved["settings"]["batch_size"],
            "seconds": seconds, "seconds_per_epoch": seconds / saved["epoch"],
            "peak_memory_mb": saved["memory"] / 1e6, "final": saved["history"][-1]}


# The figures.

@torch.no_grad()
def figure_reparameterization(model, x, labels, path, data):
    """Report figure 1: ε, z = μ + σ ⊙ ε and the decoded image, for digits x (N, 1, 28, 28) and the same ε."""
    eps = torch.randn(60, model.latent_dim, device=x.device)
    mu, logvar = model.encode(x)
    z = mu[:, None] + (0.5 * logvar).exp()[:, None] * eps  # (N, 60, latent_dim): KW (10)
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
        figure.text(x_text - 0.012, 0.69, text, ha="center", va="bottom", fontsize=7)
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
    axes.set_yticks([1, 2, 3, 4, 6, 8], ["1", "2", "3", "4", "6", "8"], minor=False)
    axes.set_yticks([], minor=True)
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


# The report.

def table(results):
    """The rows of report.md: (name, VAE, DDPM, real digits, the report)."""
    v, d, real = results["vae"], results["ddpm"], results["real"]
    sv, sd = v["samples"], d["samples"]
    bv, bd = v["bound"], d["bound"]
    n = sv["n"]

    def both(name, key, form, error=None):
        text = lambda s: form.format(s[key]) + (f" ± {form.format(s[error])}" if error else "")
        return name, text(sv), text(sd), text(real), ""

    def timing(name, form, f, report=""):
        return name, form.format(f(v)), form.format(f(d)), "", report

    reported = (f"VAE about {REPORT['vae']['minutes']} min, DDPM over {REPORT['ddpm']['minutes'] // 60} h "
                "(RTX 3090, 100 epochs)")
    large, final = v["sampling"]["large_batch"], v["training"]["final"]
    return [
        timing("parameters", "{:,}", lambda m: m["training"]["parameters"], ""),
        timing("epochs", "{}", lambda m: m["training"]["epochs"], "100"),
        timing("training, s per epoch", "{:.1f}", lambda m: m["training"]["seconds_per_epoch"], ""),
        timing("training, s in all", "{:.0f}", lambda m: m["training"]["seconds"], reported),
        timing("peak memory of the process in training, MB", "{:.0f}",
               lambda m: m["training"]["peak_memory_mb"], ""),
        timing("network evaluations per sample", "{}", lambda m: m["sampling"]["evaluations"], ""),
        timing("ms per sample, batch of 1", "{:.2f}", lambda m: m["sampling"]["ms_batch_1"], ""),
        timing(f"ms per sample, batch of {large}", "{:.3f}", lambda m: m["sampling"]["ms_large_batch"], ""),
        both(f"Fréchet distance to the test digits, n = {n}", "frechet", "{:.1f}", "frechet_error"),
        ("the same, as a multiple of real digits'",
         f"{sv['frechet'] / real['frechet']:.1f}", f"{sd['frechet'] / real['frechet']:.1f}", "1", ""),
        both("precision (share of samples among real digits)", "precision", "{:.3f}"),
        both("recall (share of real digits among samples)", "recall", "{:.3f}"),
        both("degenerate: classifier under 90 % sure", "degenerate", "{:.3f}", "degenerate_error"),
        both("class histogram, total variation from the data's", "class_distance", "{:.3f}"),
        both("pixel distance to the nearest training image, median", "nearest_training_image", "{:.2f}"),
        (f"-ELBO in bits/dim, n = {bv['n']} and {bd['n']}", f"{bv['bits_per_dim']:.3f} ± {bv['error']:.3f}",
         f"{bd['bits_per_dim']:.3f} ± {bd['error']:.3f}", "", ""),
        ("-ELBO of the trained likelihood, nats (a score on gray pixels)",
         f"{final['test_kl'] - final['test_reconstruction']:.1f}", "", "", ""),
    ]


def claims(results):
    """The report's sentences as (claim, what was measured, verdict)."""
    v, d, real = results["vae"], results["ddpm"], results["real"]
    sv, sd = v["samples"], d["samples"]

    def verdict(margin, error):  # holds if the margin is above zero by more than twice its standard error
        return "holds" if margin > 2 * error else "does not hold" if margin < -2 * error else "cannot tell"

    def error(key):
        return math.hypot(sv[key], sd[key])

    n = sd["n"]
    share_error = math.sqrt(0.5 / n)  # the largest that the difference of two shares of n can have
    nearer = verdict(sv["frechet"] - sd["frechet"], error("frechet_error"))
    inside = verdict(sd["precision"] - sv["precision"], share_error)
    fidelity = nearer if inside in (nearer, "cannot tell") else "cannot tell"  # one says yes, the other no
    slower = d["training"]["seconds_per_epoch"] / v["training"]["seconds_per_epoch"]
    return [
        ("the DDPM's samples have higher fidelity than the VAE's",
         f"Fréchet distance {sd['frechet']:.0f} against {sv['frechet']:.0f}, "
         f"real digits {real['frechet']:.1f}; precision {sd['precision']:.2f} against {sv['precision']:.2f}, "
         f"real digits {real['precision']:.2f}", fidelity),
        ("it does not produce as many degenerate images",
         f"the classifier is under 90 % sure of {100 * sd['degenerate']:.1f} % against "
         f"{100 * sv['degenerate']:.1f} %, real digits {100 * real['degenerate']:.1f} %",
         verdict(sv["degenerate"] - sd["degenerate"], error("degenerate_error"))),
        ("its samples lack diversity",
         f"recall {sd['recall']:.2f}, real digits {real['recall']:.2f}, the VAE {sv['recall']:.2f}; classes "
         f"{sd['class_distance']:.3f} from the data's, p = {sd['class_p']:.2g}",
         verdict(real["recall"] - sd["recall"], share_error)),
        ("it takes substantially longer to train (over 3 h against about 45 min: 4 times as long)",
         f"{slower:.0f} times as long, epoch for epoch", "holds" if slower > 1 else "does not hold")]


def write_report(results, out):
    """OUT/report.md, from results alone."""
    r, bound = results, results["ddpm"]["bound"]
    real_data = "" if r["data"] == "mnist" else "\n**These are SYNTHETIC digits, not MNIST.**\n"
    rows = "\n".join("| " + " | ".join(row) + " |" for row in table(r))
    ladder = "\n".join(f"| σ² = {label} | {s['L_0']:.3f} | {s['L_t']:.3f} | {s['L_T']:.5f} "
                       f"| {s['bits_per_dim']:.3f} ± {s['error']:.3f} |"
                       for label, s in bound["steps"].items())
    judged = "\n".join(f"| {claim} | {measured} | {verdict} |" for claim, measured, verdict in claims(r))
    v = r["vae"]["bound"]
    seeds = f"{r['vae']['settings']['seed']} (VAE) and {r['ddpm']['settings']['seed']} (DDPM)"
    drawn = """![1: the reparameterization trick](figure1_reparameterization.png)
![Latent space](vae_latent.png)
![Manifold](vae_manifold.png)
""" if r["vae"]["latent_dim"] == 2 else ""  # what only a map can show
    (out / "report.md").write_text(f"""# VAE and DDPM on {common.NAMES[r['data']]}

{r['date']}, {r['device']}, torch {r['torch']}, seeds {seeds}, one trained pair.  ± is the standard error over
images, not over trainings.  Nothing is compiled.  Samples are the first from the seed, none is left out.
{real_data}
| | VAE, {r['vae']['latent_dim']}-D | DDPM | real digits | the report |
| --- | --- | --- | --- | --- |
{rows}

Real digits are as many training images (which the classifier has seen), measured as if they were samples. Uniform noise scores a precision of
{r['noise']['precision']:.3f} and a recall of {r['noise']['recall']:.3f} here, so a precision counts only together with its recall.
The Fréchet distance is on the features of a classifier that reads {100 * r['classifier_accuracy']:.2f} % of the test digits, so it means something only beside theirs.

## The report's claims

| the report says | measured | |
| --- | --- | --- |
{judged}

## Samples

![Ten samples of each](figure3_samples.png)

## The bound, term by term, in bits/dim

| DDPM | L_0 | Σ L_(t-1) | L_T | total |
| --- | --- | --- | --- | --- |
{ladder}

The VAE: reconstruction {v['reconstruction']:.3f}, KL {v['kl']:.3f}, total {v['bits_per_dim']:.3f} ± {v['error']:.3f}, under a discretized normal of
σ = {v['sigma']:.3f} fitted on training images; its importance-weighted bound with 256 samples is {v['importance_weighted_256']:.3f}, so at
least {v['gap']:.3f} of it is KL(q(z|x) || p(z|x)).

![Where the bits go](bound_terms.png)
![From one latent layer to a thousand](bound_bridge.png)

## The report's figures

{drawn}![2: three reconstructions](figure2_reconstructions.png)
![Trajectory](ddpm_trajectory.png)
![The forward process](ddpm_forward.png)
![VAE's curves](vae_curves.png)
![DDPM's curve](ddpm_loss.png)
""")


# All of it.

def trained(script, args, out):
    """The model of script (vae or ddpm), trained or loaded, its pictures in OUT; and its checkpoint."""
    path = out / f"{script.__name__}.pt"
    flags = {"data": args.data, "data-dir": args.data_dir, "out": out,
             "device": args.device, "seed": args.seed}
    if path.exists() and not args.overwrite:  # go on with its own settings: if it is finished, only draw
        settings = common.load(path, script.__name__)["settings"]
        flags.update((name.replace("_", "-"), value) for name, value in settings.items())
        print(f"compare: {path} as it is, {settings['epochs']} epochs, seed {settings['seed']}", flush=True)
    else:
        flags.update({"limit": args.limit, "epochs": args.epochs,
                      "batch-size": args.batch_size, "lr": args.lr})
    argv = []
    for name, value in flags.items():
        if value is not None and value is not False:  # 0 is a value
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    script.main(argv + ["--overwrite" if args.overwrite else "--resume"])
    return script.load(path, common.pick_device(args.device)), path


@torch.no_grad()
def measure(args, device, out):
    """Everything that goes into results.json, and the figures that compare.py adds."""
    for path in () if args.overwrite else (out / "vae.pt", out / "ddpm.pt"):  # before the long work
        if path.exists() and (made_of := common.load(path, path.stem)["settings"].get("data")) != args.data:
            raise common.InputError(f"{path} was trained on {made_of}, not {args.data}: choose another --out")
    with torch.enable_grad():
        models = {script.__name__: trained(script, args, out) for script in (vae, ddpm)}
        classifier = train_classifier(args, device)
    (v, v_path), (d, d_path) = models["vae"], models["ddpm"]
    x_train, x_test = common.load_data(args.data, args.data_dir, device)
    y_train, y_test = common.load_labels(args.data, args.data_dir, device)
    x_test = x_test / 255
    n, steps, large = (10000, d.T, 1000) if device.type == "cuda" else (1000, min(d.T, 50), 250)
    torch.manual_seed(args.seed)

    def ddpm_samples(n, steps):
        starts = tqdm(range(0, n, large), desc="sampling", disable=n < 2 * large)
        with common.autocast(device):
            return torch.cat([d.sample(min(large, n - i), steps) for i in starts])

    data = common.NAMES[args.data]
    print("compare: sampling", flush=True)
    samples = {"vae": v.sample(n), "ddpm": ddpm_samples(n, steps)}
    real, probabilities = look(classifier, x_test)
    mixed = torch.randperm(len(x_test), device=device)  # MNIST's first test digits are the neater ones
    limits = [model.settings["limit"] or len(x_train) for model in (v, d)]  # images that the models have seen
    train = {"x": x_train[:max(limits)].flatten(1) / 255,
             "shares": torch.bincount(y_train, minlength=10).double().cpu() / len(y_train)}
    shuffled = torch.randperm(len(x_train), device=device)[:n]
    correct = (probabilities.argmax(1) == y_test).double().mean().item()
    real = real[mixed]
    results = {"data": args.data, "device": describe(device), "torch": torch.__version__, "seed": args.seed,
               "date": datetime.date.today().isoformat(),
               "classifier_accuracy": correct, "report": REPORT,
               "real": measure_samples(classifier, x_train[shuffled] / 255, real, train, args.seed),
               "noise": measure_samples(classifier, torch.rand_like(x_test[:n]), real, train, args.seed)}
    # a training image's nearest training image is itself: for this one number real digits are test digits
    nearest = nearest_distance(x_test[mixed[:n]], train["x"])
    results["real"]["nearest_training_image"] = nearest.median().item()

    print("compare: bounds", flush=True)
    few = len(x_test) if device.type == "cuda" else 64
    pick = torch.randperm(len(x_test), device=device)[:few]
    some = x_train[torch.randperm(min(limits), device=device)[:4 * few][:1000]] / 255
    for name, (model, path), bound, sample in (
            ("vae", models["vae"], vae_bound, lambda n: v.sample(n)),
            ("ddpm", models["ddpm"], ddpm_bound, lambda n: ddpm_samples(n, steps))):
        results[name] = {
            "settings": model.settings, "training": training_time(path, model),
            "sampling": {"evaluations": 1 if name == "vae" else steps, "large_batch": large,
                         "ms_batch_1": 1000 * seconds_to_sample(lambda: sample(1), device, 5),
                         "ms_large_batch":
                             1000 * seconds_to_sample(lambda: sample(large), device, 1) / large},
            "samples": measure_samples(classifier, samples[name], real, train, args.seed),
            "bound": bound(model, some, x_test[pick], args.seed)}
    results["vae"]["latent_dim"] = v.latent_dim

    rows = {"real": x_test[mixed[:10]], "DDPM": samples["ddpm"][:10], "VAE": samples["vae"][:10]}
    title = f"The first ten samples from seed {args.seed}, {data}"
    common.plot_rows(rows, out / "figure3_samples.png", title)
    if v.latent_dim == 2:
        digits = torch.stack([(y_test == i).nonzero()[0, 0] for i in range(0, 10, 2)])  # the first of each
        path = out / "figure1_reparameterization.png"
        figure_reparameterization(v, x_test[digits], y_test[digits], path, data)
    results["vae"]["reconstructions"] = figure_reconstructions(
        v, classifier, x_test, y_test, out / "figure2_reconstructions.png", data)
    figure_bridge(results, out / "bound_bridge.png", data)
    figure_bits(results, out / "bound_terms.png", data)
    return results


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, {capability}"


def main(argv=None):
    parser = common.arguments(__doc__, EXAMPLES, epochs=None, batch_size=None, lr=None)
    args = parser.parse_args(argv)
    device, args.data = common.pick_device(args.device), common.find_data(args.data, args.data_dir)
    args.out = out = common.output_folder(args.out)
    started = time.perf_counter()
    results = measure(args, device, out)
    results["seconds"] = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps(results, indent=1))
    write_report(results, out)
    for claim, measured, verdict in claims(results):
        print(f"{verdict:>14}: {claim}: {measured}")
    for row in table(results):
        print("  ".join(f"{cell:<24}" if i else f"{cell:<62}" for i, cell in enumerate(row[:4])))
    common.farewell("compare", out, ["report.md", "results.json"], args.data)


if __name__ == "__main__":
    common.run(main)
