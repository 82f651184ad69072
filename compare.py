"""The comparison of the course report, measured: trains or loads a VAE and a DDPM, draws and measures both.

Writes into OUT: report.md (the verdicts, the tables and the figures, readable on its own), results.json (all
numbers), the figures, and what vae.py and ddpm.py write.  A finished checkpoint in OUT is used as it is, an
unfinished one is resumed.  Beside the two, in OUT/vae20: a VAE with 20 latent numbers.

  python compare.py                                       everything, with the defaults of vae.py and ddpm.py
  python compare.py --recipe paper --epochs 100           Ho's and the report's objective and epochs
  python compare.py --limit 4000 --epochs 2 --out quick   a quick look
"""
import argparse
import copy
import datetime
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common
import ddpm
import vae
from ddpm import to_image, to_model

MOST = 10000  # images in the tables of samples
CURVE = 2000  # images of each point of a curve, as for the cost of steps
STEPS = 5, 10, 20, 50, 100  # evaluations per sample whose cost and quality are shown
SIZES = {"cuda": {"bound": 2000, "encoded": 1000}, "cpu": {"bound": 256, "encoded": 500}}


def mean_and_error(values):
    """(n,) -> their mean and its standard error."""
    return values.double().mean().item(), (values.double().std() / len(values) ** 0.5).item()


# The yardstick: what a classifier of real digits sees in an image, and pixels.

class Classifier(nn.Module):
    """Ten classes, from images (B, C, H, W) in [0, 1]; features (B, 128) is its last layer but one."""

    def __init__(self, shape):
        super().__init__()
        conv = lambda cin, cout, size, stride: (
            nn.Conv2d(cin, cout, size, stride, padding=size // 2), nn.BatchNorm2d(cout), nn.ReLU())
        C, H, W = shape
        self.features = nn.Sequential(
            *conv(C, 24, 5, 2), *conv(24, 48, 3, 1), nn.MaxPool2d(2), *conv(48, 96, 3, 1), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(96 * (H // 8) * (W // 8), 128), nn.ReLU())
        self.leave = nn.Linear(128, 10)

    def forward(self, x):
        return self.leave(self.features(x))  # (B, 10)


def train_classifier(x_train, y_train, epochs=3):
    """The classifier, trained on uint8 images (N, C, H, W) and their labels (N,).

    Plain cross-entropy: label smoothing would draw each class together to a point, and the distances between
    features would see no shapes any more.
    """
    torch.manual_seed(0)  # one yardstick for all seeds
    device, batch = x_train.device, min(128, len(x_train))
    model = Classifier(x_train.shape[1:]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    order = torch.cat([torch.randperm(len(x_train), device=device) for _ in range(epochs)])
    order = order[:len(order) // batch * batch].view(-1, batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=len(order))
    for indices in tqdm(order, desc="classifier", unit="step"):
        shift = torch.randint(-2, 3, (2,)).tolist()  # the only augmentation
        x = (x_train[indices] / 255).roll(shift, (2, 3)).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), y_train[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def look(classifier, x):
    """Images (N, C, H, W) in [0, 1] -> features (N, 128) in float64, class probabilities (N, 10)."""
    features = torch.cat([classifier.features(batch) for batch in x.split(500)])
    return features.double(), classifier.leave(features).softmax(1)


def frechet(a, b):
    """Fréchet distance of the normals fitted to features (n, d), (m, d), and its error from the draw of a.

    |Δμ|² + tr(A + B - 2 √(√B A √B)): Heusel et al. 2017 (6), on this classifier's features: comparable only
    within one run, at one n, for its expectation falls with n.  The error is that of the delta method: each
    image's share in the derivative by μ, which is 2 Δμ, and by A, which is I - M with the optimal map M.
    """
    n, shift, d = len(a), a.mean(0) - b.mean(0), a - a.mean(0)
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(B)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # √B
    values, vectors = torch.linalg.eigh(root @ A @ root)
    values = values.clamp(min=0)
    distance = shift.square().sum() + A.trace() + B.trace() - 2 * values.sqrt().sum()
    inverse = torch.where(values > 1e-12 * values.max(), values.rsqrt(), 0)  # dead features have no share
    M = root @ (vectors * inverse) @ vectors.T @ root
    influence = 2 * d @ shift + (d * (d - d @ M)).sum(1)
    return distance.item(), (influence.std() / n ** 0.5).item()


def radii(points, k=3):
    """Distance from each of points (n, d) to its k-th neighbour, (n,): the balls of its manifold."""
    return torch.cat([torch.cdist(part, points).kthvalue(k + 1).values  # the nearest is the point itself
                      for part in points.split(1000)])


def within(points, manifold, radius):
    """Which of points (n, d) lie in the ball of one of manifold (m, d): (n,) of 0 and 1.

    Precision: the share of samples within the real manifold; recall: of real images within that of the
    samples.  Kynkäänniemi et al. 2019 (1) and (2)
    """
    return torch.cat([(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1000)]).double()


def nearest(x, flat):
    """Euclidean distance from each image of x (n, C, H, W) to the nearest of flat (m, C·H·W), and which."""
    least = [torch.cdist(part.flatten(1), flat).min(1) for part in x.split(500)]
    return torch.cat([each.values for each in least]), torch.cat([each.indices for each in least])


def grayness(x):
    """How much of the ink is gray: Σ x(1-x) / Σ x over each image (n, C, H, W) in [0, 1] -> (n,).

    0 where every pixel is black or white; blur makes it grow.
    """
    return (x * (1 - x)).flatten(1).sum(1) / x.flatten(1).sum(1).clamp(min=1e-6)


def share(hits):
    """(n,) of 0, ½ and 1 -> their share, its binomial standard error, which is not 0 for 0 of n either."""
    n, p = len(hits), hits.double().mean().item()
    q = (n * p + 1) / (n + 2)
    return p, (q * (1 - q) / n) ** 0.5


class Yardstick:
    """Measures samples against real images: x_test, and three sets of training images apart from each other.

    manifold: whose features' balls are the real ones; seen: some that the models were trained on, to which a
    copy would be near; other: real images that stand beside the samples in the tables.  As many of each as of
    x_test, at most MOST.  seen_by: how many of the first training images the models have seen.
    """

    def __init__(self, classifier, x_train, y_train, x_test, seed, seen_by):
        n = self.n = min(MOST, len(x_test), len(x_train) // 3)
        order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed)).to(x_train.device)
        seen = order[order < seen_by][:n]
        apart = order[~torch.isin(order, seen)]
        self.classifier, self.x_test = classifier, x_test[:n]
        self.other = x_train[apart[n:2 * n]] / 255
        self.seen, self.held_out = x_train[seen].flatten(1) / 255, x_test[:len(seen)].flatten(1)
        self.test, _ = look(classifier, self.x_test)
        self.manifold, _ = look(classifier, x_train[apart[:n]] / 255)
        self.radius = radii(self.manifold)
        self.classes = torch.bincount(y_train, minlength=10).double() / len(y_train)
        real, _ = look(classifier, self.other)
        self.covered = within(self.test, real, radii(real))  # test images in their manifold
        self.real_spread = self.spread(real)

    def spread(self, features):
        """What the draw of all samples adds to the error of recall, from five parts of them."""
        recalls = torch.stack([within(self.test, part, radii(part)).mean() for part in features.chunk(5)])
        return (recalls.std() / 5 ** 0.5).item()

    def distance(self, x):
        """Fréchet distance of images x to the test images."""
        return frechet(look(self.classifier, x)[0], self.test)[0]

    def measure(self, x):
        """What images x (n, C, H, W) in [0, 1] are -> a dict of numbers, with KEY_error, a standard error.

        Of each model and image set: "frechet"; "precision"; "gray", see grayness; "recall"; "degenerate", the
        share that is unsure (under 90 %) or outside the real manifold; "class_off", the total variation of
        the classes from the training labels', 0 on average where there is none; "nearer", the share that is
        nearer to an image seen in training than to one held out: where nothing is copied that of real images,
        on MNIST a little over ½, for its test digits are by other writers.
        """
        features, probabilities = look(self.classifier, x)
        inside, unsure = within(features, self.manifold, self.radius), probabilities.amax(1) < 0.9
        covered = within(self.test, features, radii(features))  # the same test images as self.covered
        to_seen, to_held_out = nearest(x, self.seen)[0], nearest(x, self.held_out)[0]
        nearer = (to_seen < to_held_out).double() + (to_seen == to_held_out).double() / 2
        classes = F.one_hot(probabilities.argmax(1), 10).double()
        # ½ Σ|off| grows with chance alone: so one half of the images gives the signs, the other the sizes
        off = [classes[i::2].mean(0) - self.classes for i in (0, 1)]
        class_off = ((off[0].sign() * off[1] + off[1].sign() * off[0]).sum() / 4).item()
        class_error = mean_and_error(classes @ (off[0] + off[1]).sign() / 2)[1] * 2 ** 0.5  # drawn signs, too
        spread = self.spread(features)
        short, short_error = mean_and_error(0.9 * self.covered - covered)
        numbers = {
            "frechet": frechet(features, self.test), "precision": share(inside),
            "gray": mean_and_error(grayness(x)),
            "recall": (share(covered)[0], math.hypot(share(covered)[1], spread)),
            "degenerate": share(unsure | (inside == 0)), "class_off": (class_off, class_error),
            "nearer": share(nearer),
            # how far recall is below 90 % of real images' own, image by image
            "recall_short": (short, math.hypot(short_error, spread, 0.9 * self.real_spread))}
        result = {"n": len(x), "classes": classes.mean(0).tolist(), "unsure": share(unsure)[0]}
        for key, (number, error) in numbers.items():
            result |= {key: number, f"{key}_error": error}
        return result


# The bound of both models in bits/dim, on the same test images, with one family of decoders: a discretized
# normal around the mean that the model gives, with one scale fitted on training images.

def bits(nats, shape):
    """nats per image -> bits/dim."""
    return nats / (math.prod(shape) * math.log(2))


def fit_scale(x0, mean):
    """The σ under which images x0 (B, C, H, W) in [-1, 1] with these means are likeliest, of 61 values."""
    return max(torch.logspace(-3, 0.3, 61).tolist(),
               key=lambda sigma: ddpm.log_discretized_normal(x0, mean, sigma).sum().item())


def importance_bound(log_weights):
    """log p(x) >= E log 1/L Σ_l p(x, z_l) / q(z_l|x) >= ELBO: (L, B) -> (B,) nats; it rises with L.

    Its distance from the ELBO estimates KL(q(z|x) || p(z|x)) from below.  KW (1), report (11)
    Burda et al. 2016, eq. 8
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))


@torch.no_grad()
def vae_bound(model, x_train, x_test, seed):
    """The VAE's bound on x_test (N, C, H, W) in [0, 1] in bits/dim -> dict, and -ELBO of each image (N,)."""
    with common.fork_seed(seed, x_test.device):
        mean = model.decode(model.reparameterize(*model.encode(x_train)))
    sigma = fit_scale(to_model(x_train), to_model(mean))

    def log_likelihood(x, z):  # of the 8-bit image, whichever likelihood was trained
        means = to_model(model.decode(z))  # (samples, B, C, H, W)
        return torch.stack([ddpm.log_discretized_normal(to_model(x), mean, sigma) for mean in means])

    discrete = copy.copy(model)
    discrete.log_likelihood = log_likelihood
    with common.fork_seed(seed, x_test.device):
        terms = [torch.stack(discrete.elbo_terms(x, samples=8)) for x in x_test.split(100)]
        reconstruction, kl = bits(torch.cat(terms, dim=1), model.shape)
        tighter = torch.cat([importance_bound(discrete.log_weights(x, 256)) for x in x_test.split(100)])
    total, gap = kl - reconstruction, kl - reconstruction + bits(tighter, model.shape)
    black = bits(-ddpm.log_discretized_normal(to_model(x_test), -torch.ones_like(x_test), sigma), model.shape)
    return {"n": len(x_test), "sigma": sigma, "bits_per_dim": mean_and_error(total)[0],
            "error": mean_and_error(total)[1], "reconstruction": -reconstruction.mean().item(),
            "kl": kl.mean().item(), "importance_weighted_256": (total - gap).mean().item(),
            "gap": mean_and_error(gap)[0], "gap_error": mean_and_error(gap)[1],
            "black": black.mean().item()}, total


def optimal_variance(chain, mse):
    """σ_t² under which the expected KL is smallest, (T+1,), from the mean's squared error per pixel (T+1,).

    That of q plus the error of the mean, which is c_x0 times that of x̂_0.  After Bao et al. 2022
    """
    return chain.beta_tilde + chain.c_x0 ** 2 * mse


@torch.no_grad()
def ddpm_bound(model, x_train, x_test, seed, device):
    """The DDPM's bound on x_test in bits/dim -> dict: each way to set the variances, each length of chain;
    and -ELBO of each image (N,) for the last way and, for each length, how much it is below that of one step.

    The network is evaluated once for every image and t: its squared errors give the bound of every variance
    and of every respaced chain (ddpm.DDPM.vlb_terms), all on the same draws.
    """
    x0_train, x0, few = to_model(x_train), to_model(x_test), to_model(x_train[:32])
    with common.fork_seed(seed, device), common.autocast(device):
        errors = torch.cat([model.x0_errors(part) for part in tqdm(x0.split(256), "bound", leave=False)])
        mse = model.x0_errors(few).mean(0) / few[0].numel()

    def bound(steps, sigma):
        chain = model.respace(steps)
        chain.variance = {"β": chain.beta, "β̃": chain.beta_tilde,
                          "optimal": optimal_variance(chain, mse[chain.tau])}[sigma].clone()
        if sigma == "β̃":  # β̃_1 = 0 cannot be a decoder's
            chain.variance[1] = chain.beta_tilde[2] if steps > 1 else chain.beta[1]
        with common.fork_seed(seed, device):
            if sigma == "optimal":  # and a decoder fitted as the VAE's is
                t = torch.ones(len(x0_train), dtype=torch.int64, device=device)
                x0_hat = chain.predict_x0(chain.q_sample(x0_train, t, torch.randn_like(x0_train)), t)
                chain.variance[1] = fit_scale(x0_train, x0_hat) ** 2
            return bits(chain.vlb_terms(x0, errors[:, chain.tau]), model.shape), chain

    ways = {}
    for sigma in "β", "β̃", "optimal":
        terms, chain = bound(model.T, sigma)
        total, error = mean_and_error(terms.sum(1))
        ways[sigma] = {"bits_per_dim": total, "error": error, "L_0": terms[:, 0].mean().item(),
                       "L_t": terms[:, 1:-1].sum(1).mean().item(), "L_T": terms[:, -1].mean().item()}
    lengths = sorted({min(K, model.T) for K in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, model.T)})
    totals = {K: bound(K, "optimal")[0].sum(1) for K in lengths}
    chains = {K: dict(zip(("bits_per_dim", "error"), mean_and_error(total))) for K, total in totals.items()}
    return {"n": len(x0), "variances": ways, "per_t": terms.mean(0).tolist(), "chains": chains,
            **ways["optimal"], "sigma": chain.variance[1].sqrt().item(),
            "one_minus_all": mean_and_error(totals[1] - totals[model.T])}, terms.sum(1)


# Time.

def converged(curve, floor):
    """From when on the excess over floor stays within 20 % of its last value: the seconds between which that
    happened, (of the point before, of the first such point).  curve: [[seconds, distance], ...].

    None where the last value is no more than the floor, or there is no curve.
    """
    excess = [distance - floor for _, distance in curve]
    if not curve or excess[-1] <= 0:
        return None
    first = max((i + 1 for i, each in enumerate(excess) if abs(each - excess[-1]) > 0.2 * excess[-1]),
                default=0)
    return (curve[first - 1][0] if first else 0.0), curve[first][0]


def draw_samples(model, n, device, **rule):
    """n images (n, C, H, W) in [0, 1] from a VAE or a DDPM.  rule: a DDPM's steps and eta."""
    if isinstance(model, ddpm.DDPM):
        return ddpm.samples(model, n, device, **rule)
    return model.sample(n)


def timed_samples(model, n, device):
    """n images, and what they cost: evaluations of the network, ms per image of all n, and of one alone."""
    def took(n):
        start = time.perf_counter()
        x = draw_samples(model, n, device)
        x.sum().item()  # waits until all work is finished
        return x, 1000 * (time.perf_counter() - start) / n
    x, together = took(n)
    alone = sorted(took(1)[1] for _ in range(5))[2]
    steps = 1 if isinstance(model, vae.VAE) else ddpm.evaluations(None, model.T, device)
    return x, {"evaluations": steps, "n": n, "ms_alone": alone, "ms_together": together}


def few_steps(model, x, yardstick, seed, device):
    """Fréchet distance for each rule and number of evaluations, from one seed: {rule: {K: ...}}.

    x: the samples of the table, from that seed, too: ancestral with the default K.
    """
    n, result = min(CURVE, yardstick.n), {"ancestral": {}, "DDIM": {}}
    for rule, eta in (("ancestral", 1.0), ("DDIM", 0.0)):
        for K in sorted({min(K, model.T) for K in STEPS}):
            with common.fork_seed(seed, device):
                result[rule][K] = yardstick.distance(draw_samples(model, n, device, steps=K, eta=eta))
    result["ancestral"][ddpm.evaluations(None, model.T, device)] = yardstick.distance(x[:n])
    return result


# Reconstruction, which a DDPM can do in two ways.

@torch.no_grad()
def ddim_encode(chain, x0):
    """The x_T from which the chain with eta = 0 comes back to x0, but for the error of finite steps.

    x_{t+1} = √ᾱ_{t+1} x̂_0 + √(1-ᾱ_{t+1}) ε̂, both from x_t; like x0.  x_0 is taken for x_1, since no
    network was trained at t = 0.  Song et al. 2021, section 4.3
    """
    xt = x0
    for s in range(1, chain.T):
        t = torch.full((len(x0),), s, device=x0.device)
        x0_hat = chain.predict_x0(xt, t)
        xt = chain.q_sample(x0_hat, t + 1, chain.eps_from_x0(xt, t, x0_hat))
    return xt


def wiener(x_train, xt, alpha_bar):
    """The best linear guess at x_0 from x_t, given the training images' mean and covariance: like xt.

    μ + Σ (Σ + s² I)⁻¹ (x_t/√ᾱ_t - μ) with s² = (1-ᾱ_t)/ᾱ_t; x_train (N, C, H, W) in [-1, 1].
    """
    flat, y = x_train.flatten(1).double(), xt.flatten(1).double() / alpha_bar ** 0.5
    mu, cov = flat.mean(0), torch.cov(flat.T)
    noisy = cov + (1 - alpha_bar) / alpha_bar * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    return (mu + (y - mu) @ torch.linalg.solve(noisy, cov)).view_as(xt).to(xt.dtype)


@torch.no_grad()
def reconstructions(models, d, x, x_train, device):
    """What the VAEs and the DDPM d make of images x (N, C, H, W) in [0, 1] -> {name: images like x}.

    The DDPM encodes to x_T and comes back, both by DDIM; or it adds noise up to about T/4, T/2 and 3T/4 and
    takes it away again by ancestral sampling.  From the x_t of T/4 there are also the guesses at x_0 of the
    network, in one evaluation, and of the best linear denoiser.
    """
    rows = {name: model.decode(model.encode(x)[0]) for name, model in models.items()}
    chain, x0 = d.respace(min(50, d.T)), to_model(x)
    with common.autocast(device):
        *_, (_, back, _) = chain.trajectory(ddim_encode(chain, x0), eta=0)
        rows["DDPM, DDIM to $x_T$ and back"] = to_image(back)
        for quarters in 1, 2, 3:
            start = (chain.tau - d.T * quarters / 4).abs()[1:].argmin().item() + 1
            t = torch.full((len(x),), start, device=device)
            xt, name = chain.q_sample(x0, t, torch.randn_like(x0)), f"t = {chain.tau[start]}"
            *_, (_, back, _) = chain.trajectory(xt, start=start)
            rows[f"DDPM, noise to {name} and back"] = to_image(back)
            if quarters == 1:
                rows[f"DDPM, one guess from {name}"] = to_image(chain.predict_x0(xt, t))
                guess = wiener(to_model(x_train), xt, chain.alpha_bar[start].item())
                rows[f"linear guess from {name}"] = to_image(guess)
    return rows


# The figures.

@torch.no_grad()
def figure_reparameterization(model, x, labels, path, title):
    """Report figure 1: ε, z = μ + σ ⊙ ε and the decoded image, for images x (N, C, H, W) and the same ε."""
    eps = torch.randn(60, model.latent_dim, device=x.device)
    mu, logvar = model.encode(x)
    z = mu[:, None] + (0.5 * logvar).exp()[:, None] * eps  # (N, 60, latent_dim)   KW (10)
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    figure.suptitle(f"The reparameterization trick in the latent space of the {title}")
    left, middle, right = figure.subplots(1, 3)
    left.scatter(*eps[:, :2].cpu().numpy().T, s=8, color="gray")
    left.scatter(*eps[:3, :2].cpu().numpy().T, s=40, color=["black"], marker="x")
    left.set(title=r"noise $\epsilon \sim N(0, I)$", xlabel=r"$\epsilon_1$", ylabel=r"$\epsilon_2$",
             xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
    pale = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}  # or the dots hide the digit
    for i, label in enumerate(labels.tolist()):
        middle.scatter(*z[i, :, :2].cpu().numpy().T, s=5, color=f"C{label}")
        middle.annotate(str(label), mu[i, :2].tolist(), xytext=(9, 5), textcoords="offset points",
                        color=f"C{label}", weight="bold", bbox=pale)
    middle.set(title=r"latent $z = \mu(x) + \sigma(x) \odot \epsilon$", xlabel="$z_1$", ylabel="$z_2$")
    rows = torch.cat([x[:, None], model.decode(z[:, :3])], dim=1)  # (N, 4, C, H, W): x, then three decoded z
    N, (_, H, W) = len(x), model.shape
    right.imshow(common.mosaic(rows.flatten(0, 1), 4, gap=0))
    right.set(title="mean of $p(x|z)$", xticks=[W / 2, 2.5 * W],
              xticklabels=["$x$", r"decoded, 3 $\epsilon$"], yticks=[H * i + H / 2 for i in range(N)])
    right.set_yticklabels(labels.tolist())
    for label, tick in zip(labels.tolist(), right.get_yticklabels()):
        tick.set_color(f"C{label}")
    figure.supxlabel(r"the gradient flows from the decoded image into $z$, on to $\mu(x)$ and $\sigma(x)$; "
                     r"$\epsilon$ enters from outside and needs none", fontsize=9)
    figure.savefig(path)


@torch.no_grad()
def figure_reconstructions(model, classifier, x, labels, path, title):
    """Report figure 2, picked by a rule from x (N, C, H, W) in [0, 1] -> dict of what it shows.

    By relative squared error ‖x - x̂‖² / ‖x‖²: of the images whose reconstruction the classifier misreads,
    those at 99 % (degenerate) and at 10 % (near miss); of those that it reads right, at 10 % (faithful).
    """
    again = torch.cat([model.decode(model.encode(batch)[0]) for batch in x.split(1000)])
    error = (x - again).square().flatten(1).sum(1) / x.square().flatten(1).sum(1)
    seen = look(classifier, again)[1].argmax(1)
    order = error.argsort()

    def pick(group, quantile):
        group = order[group[order]] if group.any() else order
        return group[int(quantile * (len(group) - 1))]

    wrong = seen != labels
    picks = torch.stack([pick(wrong, 0.99), pick(wrong, 0.1), pick(~wrong, 0.1)])
    read = seen[picks].tolist()
    names = [f"{name}\n{label}, read as {digit}" for name, label, digit in
             zip(("degenerate", "near miss", "faithful"), labels[picks].tolist(), read)]
    common.plot_rows({"test image": x[picks], "reconstruction": again[picks]}, path,
                     f"{title}: reconstructions, misread (99th and\n10th percentile of the error), "
                     "read right (10th)", names)
    return {"misread": wrong.double().mean().item(), "relative_error": error[picks].tolist(),
            "class": labels[picks].tolist(), "read_as": read}


def figure_bridge(results, path):
    """bits/dim against the number of latents K of the respaced chain, and the VAE's as a line across."""
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    chains, one = results["ddpm"]["bound"]["chains"], results["vae"]["bound"]
    K, value, error = zip(*[(int(k), c["bits_per_dim"], c["error"]) for k, c in chains.items()])
    axes.errorbar(K, value, error, marker="o", markersize=4, capsize=3,
                  label="DDPM, one network, K of its steps")
    axes.axhline(one["bits_per_dim"], color="C1",
                 label=f"VAE, one latent layer of {results['vae']['settings']['latent_dim']} numbers")
    axes.set(xscale="log", yscale="log", xlabel="latent layers K",
             ylabel="-ELBO in bits/dim, lower is better",
             title=f"From one latent layer to {max(K)}: {one['n']} test images of {results['name']}")
    axes.set_ylim(0.85 * min(value), 1.2 * max(*value, one["bits_per_dim"]))
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.5, 0.7, 1, 1.5, 2, 2.5, 3, 4, 6, 8, 10) if low < tick < high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def figure_bits(results, path):
    """L_{t-1} against t."""
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes, bound = figure.subplots(), results["ddpm"]["bound"]
    axes.plot(range(2, len(bound["per_t"])), bound["per_t"][1:-1], linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="t", ylabel="$L_{t-1}$ in bits/dim",
             title=f"DDPM, {results['name']}, {bound['n']} test images: where the bits go\n"
                   f"($L_0$ = {bound['L_0']:.2f} and $L_T$ = {bound['L_T']:.5f} not drawn)")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def figure_quality(results, path):
    """Fréchet distance beyond real images' own: against training time, and against sampling's evaluations."""
    figure = Figure(figsize=(6.4, 8.4), dpi=130, layout="constrained")
    upper, lower = figure.subplots(2, 1)
    floor, few = results["curve_floor"], results["few_steps"]
    for i, (label, curve) in zip((1, 0), results["curves"].items()):
        if curve:
            seconds, distances = zip(*curve)
            upper.plot(seconds, [each - floor for each in distances], marker="o", markersize=3,
                       linewidth=1.2, color=f"C{i}", label=label)
    upper.set(xlabel="seconds of training",
              title=f"Time against quality, {results['name']}, n = {few['n']}, DDPM by 20 evaluations")
    for i, (rule, distances) in enumerate(few["ddpm"].items()):
        lower.plot([int(K) for K in distances], [each - floor for each in distances.values()], marker="o",
                   markersize=4, color=f"C{i + 4}", label=f"DDPM, {rule}")
    lower.plot([1], [few["vae"] - floor], "s", color="C1", label="VAE")
    lower.set(xlabel="network evaluations per sample",
              title=f"Sampling's cost, {results['name']}, n = {few['n']}")
    for axes in upper, lower:
        axes.set(xscale="log", yscale="log", ylabel="Fréchet distance minus real images' own")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    counts = sorted({1, *map(int, few["ddpm"]["ancestral"])})
    lower.set_xticks(counts, counts)
    lower.set_xticks([], minor=True)
    figure.savefig(path)


def figure_diversity(results, path):
    """The classes that the classifier reads in real images and in each model's samples."""
    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    rows = {"real images": results["real"], "DDPM": results["ddpm"]["samples"],
            "VAE": results["vae"]["samples"]}
    for i, (label, row) in enumerate(rows.items()):
        axes.bar([c + 0.27 * (i - 1) for c in range(10)], row["classes"], 0.27, label=label,
                 color=("gray", "C0", "C1")[i])
    axes.set(xlabel="class that the classifier reads", ylabel="share", xticks=range(10),
             title=f"Classes of {row['n']} images each, {results['name']}")
    axes.legend()
    figure.savefig(path)


@torch.no_grad()
def figure_neighbours(rows, classifier, x_train, path, title):
    """For each class the image read as it that is nearest to a training image: {name: x (n, C, H, W)}."""
    shown, flat = {}, x_train.flatten(1)
    for name, x in rows.items():
        far, which = nearest(x, flat)
        classes = look(classifier, x)[1].argmax(1)
        first = torch.stack([torch.where(classes == c, far, math.inf).argmin() for c in range(10)])
        found = (classes[first] == torch.arange(10, device=x.device)).view(-1, 1, 1, 1)  # else it stays black
        shown |= {name: x[first] * found, f"training image\nnearest to {name}": x_train[which[first]] * found}
    common.plot_rows(shown, path, title, [f"read as {c}" for c in range(10)])


# The report's claims.

def verdict(margin, error):
    """Holds if the margin is above zero by more than twice its standard error."""
    return "holds" if margin > 2 * error else "does not hold" if margin < -2 * error else "cannot tell"


def higher_fidelity(v, d, real):
    """Precision, and sharpness: whose grayness is nearer to real images'.  Both must agree."""
    precise = verdict(d["precision"] - v["precision"], math.hypot(v["precision_error"], d["precision_error"]))
    errors = math.hypot(v["gray_error"], d["gray_error"], 2 * real["gray_error"])
    sharp = verdict(abs(v["gray"] - real["gray"]) - abs(d["gray"] - real["gray"]), errors)
    return precise if precise == sharp else "cannot tell"


def fewer_degenerate(v, d):
    error = math.hypot(v["degenerate_error"], d["degenerate_error"])
    return verdict(v["degenerate"] - d["degenerate"], error)


def lacks_diversity(d, margin=0.05):
    """Recall below 90 % of real images' own, or classes off by more than the margin."""
    found = {verdict(d["recall_short"], d["recall_short_error"]),
             verdict(d["class_off"] - margin, d["class_off_error"])}
    return "holds" if "holds" in found else found.pop() if len(found) == 1 else "cannot tell"


def longer_to_converge(v, d):
    """Twice as long or more; v and d are of converged."""
    if not v or not d:
        return "cannot tell"
    return "holds" if d[0] >= 2 * v[1] else "does not hold" if d[1] < 2 * v[0] else "cannot tell"


def more_expressive(one_minus_all, vae_minus_ddpm):
    """All steps over one step of the same chain, and over the VAE, which was trained for its one layer."""
    found = {verdict(*one_minus_all), verdict(*vae_minus_ddpm)}
    return found.pop() if len(found) == 1 else "cannot tell"


def claims(results):
    """The report's sentences as (claim, what was measured, verdict, the figure that shows it)."""
    v, d, real, test = results["vae"], results["ddpm"], results["real"], results["test"]
    vs, ds = v["samples"], d["samples"]

    def three(key):
        return f"{number(ds, key)} against {number(vs, key)}, real images {number(real, key)}"

    runs, floor = (v["training"], d["training"]), results["curve_floor"]
    ends = [converged(run["curve"], floor) for run in runs]
    spans = ["at a time that cannot be told" if end is None else
             f"in {end[0]:.0f} to {end[1]:.0f} s, {end[1] / run['seconds']:.0%} of its run"
             for end, run in zip(ends, runs)]
    best = min((distance for _, distance in v["training"]["curve"]), default=-math.inf)
    passed = [seconds for seconds, distance in d["training"]["curve"] if distance < best]
    when = f"; the DDPM passes the VAE's best distance within {passed[0]:.0f} s" if passed else ""
    steps = [f"{run['seconds']:.0f} s in all, {run['seconds_per_epoch']:.1f} s an epoch of batches of "
             f"{run['batch_size']}" for run in runs]
    errors = {name: f"{mean:.3f}" for name, (mean, _) in results["encoded"]["rms"].items()}
    back, guess, linear = (next(name for name in errors if name.startswith(start))
                           for start in ("DDPM, noise", "DDPM, one", "linear"))
    chains = list(d["bound"]["chains"].items())
    (fewest, one), (most, every) = chains[0], chains[-1]
    return [
        ("the DDPM's outputs are of higher fidelity than the VAE's",
         f"precision {three('precision')}; gray share of the ink {three('gray')}; Fréchet distance (overall) "
         f"{three('frechet')}", higher_fidelity(vs, ds, real), "figure3_samples.png"),
        ("it does not produce as many degenerate images",
         f"degenerate {three('degenerate')}, test images {number(test, 'degenerate')}, uniform noise "
         f"{number(results['noise'], 'degenerate')}", fewer_degenerate(vs, ds), "figure3_samples.png"),
        ("its samples lack diversity",
         f"recall {three('recall')}; 90 % of real images' own less the DDPM's: "
         f"{ds['recall_short']:.3f} ({ds['recall_short_error']:.3f}); classes off by "
         f"{three('class_off')}, the margin being 0.05",
         lacks_diversity(ds), "diversity.png"),
        ("it takes substantially longer to converge (over 3 h against about 45 min)",
         "distance above real images' in quality.png (by 20 evaluations) within 20 % of its last value: the "
         f"DDPM {spans[1]}, the VAE {spans[0]} (the rate decays to zero, which draws this time towards the "
         f"run's length). DDPM {steps[1]}; VAE {steps[0]}{when}",
         longer_to_converge(*ends), "quality.png"),
        ("its outputs cannot be compared with given images, for it starts from noise",
         f"error per pixel {errors[back]} ({back}), the VAE's {errors['VAE']}, black images' "
         f"{errors['all black']}; from the same noise one guess of the DDPM {errors[guess]}, of a linear "
         f"denoiser {errors[linear]}",
         "a procedure: no verdict", "reconstructions.png"),
        ("its many steps potentially allow for more expressiveness",
         f"bits/dim of one network: {one['bits_per_dim']:.2f} in {fewest} step, {every['bits_per_dim']:.2f} "
         f"in {most}; the VAE {v['bound']['bits_per_dim']:.2f}. A network trained for {most} steps and "
         f"cut to K is not a model trained for K",
         more_expressive(d["bound"]["one_minus_all"], results["difference"]), "bound_bridge.png")]


# The report.

METRICS = {  # of samples: the column's head, and the digits that are printed, None for a share of n
    "frechet": ("Fréchet distance", 1), "precision": ("precision", None), "gray": ("gray share of ink", 3),
    "recall": ("recall", None), "degenerate": ("degenerate", None), "class_off": ("classes off by", 3),
    "nearer": ("nearer to training", None)}


def number(row, key):
    """A metric of a row of measure and its error, in words."""
    (_, digits), value, n = METRICS[key], row[key], row["n"]
    if digits is None and value in (0, 1):
        return f"> {1 - 3 / n:.4f}" if value else f"< {3 / n:.1g}"
    return f"{value:.{digits or 3}f} ({row[f'{key}_error']:.{digits or 3}f})"


def sample_rows(results):
    """The table of samples: for each kind of image its name and the METRICS."""
    models = [(f"VAE, {results['vae']['settings']['latent_dim']}-D", results["vae"]),
              ("DDPM", results["ddpm"]), *results["others"].items()]
    rows = [(f"{name}, {row['training']['epochs']} epochs", row["samples"]) for name, row in models]
    rows += [("real images, training", results["real"]), ("real images, test", results["test"]),
             ("uniform noise", results["noise"])]
    return [[name, *(number(row, key) if key in row else "" for key in METRICS)] for name, row in rows]


def time_rows(results):
    """The table of time and of the bounds: (name, VAE, DDPM, the report)."""
    def row(name, form, part, key, report=""):
        return name, *(form.format(results[model][part][key]) for model in ("vae", "ddpm")), report

    final, n = results["vae"]["training"]["final"], results["vae"]["bound"]["n"]
    return [
        row("parameters", "{:,}", "training", "parameters"),
        row("epochs", "{}", "training", "epochs", "100"),
        row("images per step", "{}", "training", "batch_size"),
        row("training, s per epoch", "{:.1f}", "training", "seconds_per_epoch"),
        row("training, s in all", "{:.0f}", "training", "seconds",
            "VAE about 45 min, DDPM over 3 h (RTX 3090)"),
        row("network evaluations per sample", "{}", "sampling", "evaluations"),
        row("ms per sample, one at a time", "{:.2f}", "sampling", "ms_alone"),
        row("ms per sample, many at a time", "{:.3f}", "sampling", "ms_together"),
        row(f"-ELBO in bits/dim, {n} test images", "{:.3f}", "bound", "bits_per_dim"),
        row("its standard error", "{:.3f}", "bound", "error"),
        ("VAE minus DDPM on the same images", "{:.3f} ({:.3f})".format(*results["difference"]), "", ""),
        ("-ELBO of the trained likelihood, nats (a score on gray pixels)",
         f"{final['test_kl'] - final['test_reconstruction']:.1f}", "", "")]


def markdown(head, rows):
    """A table from a list of cells for the head and one for each row."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows))


def write_report(results, out):
    """OUT/report.md, from results alone."""
    r, v, d = results, results["vae"], results["ddpm"]
    one, many, encoded, few = v["bound"], d["bound"], r["encoded"], r["few_steps"]
    n, floor, latents = v["samples"]["n"], r["curve_floor"], v["settings"]["latent_dim"]
    judged = markdown(["the report says", "measured", "", "figure"], claims(r))
    samples = markdown(["", *(head for head, _ in METRICS.values())], sample_rows(r))
    times = markdown(["", f"VAE, {latents}-D", "DDPM", "the report"], time_rows(r))
    ladder = markdown(["DDPM", "L_0", "Σ L_(t-1)", "L_T", "total"], [
        [f"σ² {label}", f"{s['L_0']:.3f}", f"{s['L_t']:.3f}", f"{s['L_T']:.5f}",
         f"{s['bits_per_dim']:.3f} ({s['error']:.3f})"] for label, s in many["variances"].items()])
    errors = markdown(["reconstruction", "error per pixel"], [
        [name, f"{mean:.3f} ({error:.3f})"] for name, (mean, error) in encoded["rms"].items()])
    steps = markdown(["network evaluations", *few["ddpm"]["ancestral"]], [
        [rule, *(f"{distance - floor:.1f}" for distance in distances.values())]
        for rule, distances in few["ddpm"].items()])
    maps = """![1: the reparameterization trick](figure1_reparameterization.png)
![Latent space](vae_latent.png)
![Manifold](vae_manifold.png)
""" if latents == 2 else ""  # what only a map can show
    (out / "report.md").write_text(f"""# VAE and DDPM on {r['name']}

{r['date']}, {r['device']}, torch {r['torch']}, seed {v['settings']['seed']},
{r['seconds'] / 60:.1f} min with what was trained in this run. In parentheses: the standard error over images.
Samples are the first from the seed, none is left out.

## The report's claims

The VAE: an MLP with {latents} latent numbers, {v['training']['epochs']} epochs. The DDPM: a U-Net of
{d['training']['parameters']:,} parameters, recipe `{d['settings']['recipe']}`, {d['training']['epochs']} epochs.
One trained pair: the verdicts are about these two networks, not about all VAEs and DDPMs.

{judged}

*Fidelity* holds if precision and sharpness both favour the DDPM by more than twice the error of the difference;
sharper is whose gray share of the ink is nearer to real images'. *Diversity* lacks if recall is below 90 % of
real images' own, or the classes are off by more than 0.05. *Longer to converge* holds from twice the time on.
*Expressiveness* holds if the bound of all steps beats that of one step and that of the VAE.

## Samples, n = {n}

{samples}

The VAEs' samples are decoder means. The yardstick is a classifier, trained on training images, that reads
{100 * r['classifier_accuracy']:.2f} % of the test images. Fréchet distance: of its 128 features to those of
{n} test images; it falls with n. Precision: the share of samples within the manifold of as many training images.
Gray share of ink: Σ x(1-x) / Σ x. Recall: the share of test images within the samples' manifold. Degenerate: the
classifier is under 90 % sure, or the sample is outside the real manifold (of uniform noise
{r['noise']['unsure']:.3f} is unsure). Classes off by: total variation from the training labels' shares, 0 on
average where there is none. Nearer to training: the share that is nearer to one of {r['seen']} images seen in
training than to as many test images; without copies as large as that of real training images.

![Ten samples of each](figure3_samples.png)
![Classes](diversity.png)
![The samples nearest to a training image](neighbours.png)

## Time

{times}

![Time against quality](quality.png)

Fréchet distance minus real images' own ({floor:.1f}), n = {few['n']}, by network evaluations; the VAE with its
one: {few['vae'] - floor:.1f}.

{steps}

## Reconstructions of the same {encoded['n']} test images

{errors}

Root mean square of the difference of images in [0, 1]. The DDPM's chain has {encoded['steps']} steps. By DDIM
even an untrained network comes back: x_T has as many numbers as the image. The way back from noise ends in a draw,
whose error is up to √2 that of a guess at the mean; the linear guess knows mean and covariance alone.

![Reconstructions](reconstructions.png)

## The bound, term by term, in bits/dim

{ladder}

The VAE: reconstruction {one['reconstruction']:.3f}, KL {one['kl']:.3f}, total {one['bits_per_dim']:.3f}
({one['error']:.3f}). Both decoders are one discretized normal with one scale, fitted on training images: on
[-1, 1] σ = {one['sigma']:.3f} for the VAE, under which a decoder that says black would cost {one['black']:.3f}, and
{many['sigma']:.4f} for the DDPM. σ² optimal is fitted for each t on training images, after Bao et al. 2022; all
other bits/dim of the DDPM are with it. The VAE's importance-weighted bound with 256 samples is
{one['importance_weighted_256']:.3f}, so KL(q(z|x) || p(z|x)) is at least {one['gap']:.4f}
({one['gap_error']:.4f}) of it.

![Where the bits go](bound_terms.png)
![From one latent layer to many](bound_bridge.png)

## The report's figures

{maps}![2: three reconstructions](figure2_reconstructions.png)
![Trajectory](ddpm_trajectory.png)
![The forward process](ddpm_forward.png)
![VAE's curves](vae_curves.png)
![DDPM's curve](ddpm_loss.png)
""", encoding="utf-8")


# All of it.

def settings_for(script, args, out, **own):
    """args for the train of script (vae or ddpm) in out; own: settings other than those of args."""
    given, path = script.parse([]), common.output_folder(out) / f"{script.__name__}.pt"
    vars(given).update({name: value for name, value in vars(args).items() if name in given})
    if path.exists() and args.epochs is None:
        own.pop("epochs", None)  # a default of new runs alone
    vars(given).update(own, out=out, resume=path.exists())
    if given.resume:  # does it fit?  Before any long work
        common.settle(given, path, **dict.fromkeys(script.load(path).settings.keys() - {"shape"}))
    return given


def trained(script, given, device, watch=None):
    """The model of script (vae or ddpm), trained, resumed or loaded, and its pictures in given.out.

    The model's .training_run is what results.json tells of its training; curve: [[seconds, distance], ...].
    """
    with torch.enable_grad():
        _, history = script.train(given, device, watch)
    model = script.load(Path(given.out) / f"{script.__name__}.pt", device)
    script.draw(model, history, given, device)
    epochs, seconds = len(history), history[-1]["seconds"]
    model.training_run = {
        "parameters": sum(p.numel() for p in model.parameters()), "epochs": epochs,
        "batch_size": model.settings["batch_size"], "seconds": seconds, "seconds_per_epoch": seconds / epochs,
        "final": history[-1],
        "curve": [[row["seconds"], row["frechet"]] for row in history if "frechet" in row]}
    return model


@torch.no_grad()
def measure(args, device, out):
    """Everything that goes into results.json, and the figures that compare.py adds."""
    plan = {"vae": settings_for(vae, args, out), "ddpm": settings_for(ddpm, args, out)}
    few = args.epochs if device.type == "cuda" else min(args.epochs or 10, 10)  # where minutes count
    plan["VAE, 20-D"] = settings_for(vae, args, out / "vae20", epochs=few, latent_dim=20)
    for name, default in (("data", "mnist"), ("limit", None), ("seed", 0)):  # one for all: the checkpoints'
        made = {getattr(each, name) for each in plan.values() if each.resume}
        if len(made) > 1:
            raise common.InputError(f"the checkpoints in {out} were made with different {name} ({made}): "
                                    "choose another --out")
        value = made.pop() if made else getattr(args, name)
        for each in (args, *plan.values()):
            setattr(each, name, default if value is None else value)

    if args.data not in common.SETS and Path(args.data).is_dir():
        raise common.InputError(f"the comparison needs labels, which the pictures in {args.data} have not: "
                                "give --data a name, or run vae.py and ddpm.py")
    everything = argparse.Namespace(**vars(args) | {"limit": None})
    x_train, y_train, x_test, y_test = common.load_data(everything, device)
    with torch.enable_grad():
        classifier = train_classifier(x_train[:args.limit], y_train[:args.limit])
    seed = args.seed
    mixed = torch.randperm(len(x_test), generator=torch.Generator().manual_seed(seed)).to(device)
    x_test, y_test = x_test[mixed] / 255, y_test[mixed]  # MNIST's first test digits are the neater ones
    yardstick = Yardstick(classifier, x_train, y_train, x_test, seed, args.limit or len(x_train))
    n, size = yardstick.n, SIZES[device.type]

    def watch(model, epoch):  # for the curves of quality against time; the time is that of training alone
        if epoch > 10 and epoch % 5 and epoch not in (plan["vae"].epochs, plan["ddpm"].epochs):  # the last
            return {}
        rule = {"steps": min(20, model.T)} if isinstance(model, ddpm.DDPM) else {}
        with common.fork_seed(seed, device), torch.no_grad():
            x = draw_samples(model, min(CURVE, n), device, **rule)
        return {"frechet": yardstick.distance(x) if x.isfinite().all() else math.nan}  # which save refuses

    v = trained(vae, plan["vae"], device, watch)
    d = trained(ddpm, plan["ddpm"], device, watch)
    others = {"VAE, 20-D": trained(vae, plan["VAE, 20-D"], device)}
    models = {"vae": v, "ddpm": d, **others}

    common.say("samples")
    samples, costs = {}, {}
    for name, model in models.items():
        with common.fork_seed(seed, device):
            samples[name], costs[name] = timed_samples(model, n, device)
    torch.manual_seed(seed)
    test = yardstick.measure(yardstick.x_test)
    results = {
        "data": v.settings["data"], "name": common.NAMES[v.settings["data"]], "device": describe(device),
        "torch": torch.__version__, "seed": seed, "date": datetime.date.today().isoformat(),
        "classifier_accuracy": (look(classifier, x_test)[1].argmax(1) == y_test).double().mean().item(),
        "real": yardstick.measure(yardstick.other),
        "noise": yardstick.measure(torch.rand_like(yardstick.x_test)),
        # of the test images nothing for which they would be held against themselves
        "test": {key: number for key, number in test.items() if key.split("_error")[0] not in (
            "frechet", "recall", "recall_short", "nearer")},
        "seen": len(yardstick.seen), "curve_floor": yardstick.distance(yardstick.other[:CURVE]),
        "curves": {f"VAE, {v.latent_dim}-D": v.training_run["curve"], "DDPM": d.training_run["curve"]},
        "few_steps": {"n": min(CURVE, n), "vae": yardstick.distance(samples["vae"][:CURVE]),
                      "ddpm": few_steps(d, samples["ddpm"], yardstick, seed, device)}}

    common.say("bounds and reconstructions")
    seen = x_train[:args.limit]
    some = seen[torch.randperm(len(seen), device=device)[:250]] / 255
    x = x_test[:size["bound"]]
    vae_result, vae_total = vae_bound(v, some, x, seed)
    ddpm_result, ddpm_total = ddpm_bound(d, some, x, seed, device)
    for name, model, bound in (("vae", v, vae_result), ("ddpm", d, ddpm_result)):
        results[name] = {"settings": model.settings, "training": model.training_run, "bound": bound,
                         "sampling": costs[name],
                         "samples": yardstick.measure(samples[name])}
    results["difference"] = mean_and_error(vae_total - ddpm_total)
    results["others"] = {name: {"training": model.training_run, "samples": yardstick.measure(samples[name])}
                         for name, model in others.items()}
    x = x_test[:size["encoded"]]
    with common.fork_seed(seed, device):
        rows = reconstructions({"VAE": v, **others}, d, x, seen[:10000] / 255, device)
    rms = {name: (x - back).square().flatten(1).mean(1).sqrt()
           for name, back in {**rows, "all black": torch.zeros_like(x)}.items()}
    results["encoded"] = {"n": len(x), "steps": min(50, d.T),
                          "rms": {name: mean_and_error(error) for name, error in rms.items()}}

    # The figures.
    name = results["name"]
    common.plot_rows({"test image": x[:10], **{name: row[:10] for name, row in rows.items()}},
                     out / "reconstructions.png", f"Reconstructions of ten test images of {name}")
    rows = {"real": x_test, "DDPM": samples["ddpm"], "VAE (decoder means)": samples["vae"],
            **{label: samples[label] for label in others}}
    common.plot_rows({label: row[:10] for label, row in rows.items()}, out / "figure3_samples.png",
                     f"The first ten samples from seed {seed}, {name}")
    rows = {"DDPM": samples["ddpm"], "VAE": samples["vae"], "test image": x_test}
    figure_neighbours({label: x[:CURVE] for label, x in rows.items()}, classifier, seen / 255,
                      out / "neighbours.png", f"Of {min(CURVE, n)} images, for each class the one read as it "
                      f"that is nearest to a training image, {name}")
    if v.latent_dim == 2:
        picks = torch.stack([(y_test == c).nonzero()[0, 0] for c in range(0, 10, 2)])  # the first of each
        figure_reparameterization(v, x_test[picks], y_test[picks], out / "figure1_reparameterization.png",
                                  f"VAE, {name}")
    results["vae"]["reconstructions"] = figure_reconstructions(
        v, classifier, x_test, y_test, out / "figure2_reconstructions.png", f"VAE, {name}")
    for draw, file in ((figure_bridge, "bound_bridge"), (figure_bits, "bound_terms"),
                       (figure_quality, "quality"), (figure_diversity, "diversity")):
        draw(results, out / f"{file}.png")
    return results


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    bfloat16 = "with" if common.has_bfloat16(device) else "without"
    return (f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, "
            f"{torch.backends.cpu.get_cpu_capability()} {bfloat16} bfloat16")


def parse(argv):
    parser = common.arguments(__doc__)
    parser.add_argument("--recipe", choices=list(ddpm.RECIPES), help="of ddpm.py (default: as there)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if common.WORLD > 1:
        raise common.InputError("one process compares: give torchrun vae.py and ddpm.py, then run this")
    device, out = common.pick_device(args.device), common.output_folder(args.out)
    started = time.perf_counter()
    results = measure(args, device, out)
    results["seconds"] = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_report(results, out)
    for claim, measured, judged, figure in claims(results):
        print(f"{judged:>14}: {claim}: {measured} ({figure})")
    print(f"wrote report.md, results.json and the figures in {out}/")


if __name__ == "__main__":
    common.run(main)
