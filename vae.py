"""A variational autoencoder on MNIST, in the order of the paper: bound, model, training.

KW is Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), report the course
report whose experiment this redoes (README.md).  x is an image, z its latent; the encoder gives
q(z|x), the decoder p(x|z), and both are trained to raise a lower bound on log p(x):

    log p(x)  >=  ELBO  =  E_q(z|x)[log p(x|z)]  -  KL(q(z|x) || p(z))     KW (3), report (16)

p(z) = N(0, I); images are (B, C, H, W) in [0, 1]; a bound is in nats per image.

  python vae.py                                    train, or go on; then draw pictures
  python vae.py --latent-dim 20 --out results/z20  better images, no map of the latents
  python vae.py --sample 64                        draw 64 images from the checkpoint in results/
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

# ---- the bound


def log_normal(x, mu, logvar):
    """log N(x; mu, exp(logvar) I), nats: (..., n) -> (...).  Report (26)"""
    log_density = math.log(2 * math.pi) + logvar + (x - mu) ** 2 / logvar.exp()
    return -0.5 * log_density.sum(-1)  # KW (9)


def kl_to_prior(mu, logvar):
    """KL(N(mu, exp(logvar) I) || N(0, I)) in nats: (..., n) -> (...).  KW, appendix B"""
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)  # KW (10), report (24)


def log_bernoulli(x, logits):
    """log Π_m ν_m^x_m (1 - ν_m)^(1 - x_m), ν = sigmoid(logits), in nats: (..., D) -> (...).

    A likelihood for x in {0, 1}; for gray x a customary score, which does not sum to 1 over the
    256 levels: another model's nats cannot be held against it.
    Report (28) and (29)
    """
    x = x.expand_as(logits)
    nats = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return -nats.sum(-1)  # KW (11), report (30)


# ---- the model

LIKELIHOODS = ("bernoulli", "gaussian")


class VAE(nn.Module):
    """Encoder and decoder, each an MLP of three layers, and the bounds on log p(x) they give.

    latent_dim: size of z.  likelihood: "bernoulli", the decoder giving each pixel's probability of
    white, or "gaussian", giving its mean.  shape: (C, H, W).  ValueError for other values.
    """

    def __init__(self, latent_dim=2, likelihood="bernoulli", shape=(1, 28, 28)):
        super().__init__()
        common.check_range("latent_dim", latent_dim, 1)
        common.check_choice("likelihood", likelihood, LIKELIHOODS)
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.shape = tuple(shape)
        D = math.prod(shape)
        down = [nn.Linear(D, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()]
        up = [nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU()]
        self.encoder = nn.Sequential(*down, nn.Linear(256, 2 * latent_dim))
        self.decoder = nn.Sequential(*up, nn.Linear(512, D))
        if likelihood == "gaussian":
            # log σ² of p(x|z)   (σ-VAE, Rybkin et al. 2021)
            self.logvar_x = nn.Parameter(torch.tensor(-2.0))

    def encode(self, x):
        """q(z|x) = N(mu, exp(logvar) I): x (B, C, H, W) -> mu, logvar, each (B, latent_dim)."""
        h = common.in_own_dtype(self.encoder, x.flatten(1))  # (B, 2 latent_dim)
        mu, logvar = h.chunk(2, dim=-1)  # KW (9), report (22)
        return mu, logvar

    def reparameterize(self, mu, logvar, eps=None):
        """A draw from q(z|x), like mu, with its gradient.  KW (4), report (18)"""
        if eps is None:
            eps = torch.randn_like(mu)
        sigma = (0.5 * logvar).exp()
        return mu + sigma * eps  # z = μ + σ ⊙ ε, ε ~ N(0, I)   KW (10)

    def decode(self, z):
        """The mean of p(x|z): z (..., latent_dim) -> (..., C, H, W) in [0, 1]."""
        logits = common.in_own_dtype(self.decoder, z)  # (..., D)
        return torch.sigmoid(logits).unflatten(-1, self.shape)

    def log_likelihood(self, x, z):
        """log p(x|z) in nats: x (B, C, H, W), z (..., B, latent_dim) -> (..., B)."""
        logits = common.in_own_dtype(self.decoder, z)  # (..., B, D)
        x = x.flatten(1).to(logits.dtype)  # (B, D)
        if self.likelihood == "bernoulli":
            return log_bernoulli(x, logits)
        mean = torch.sigmoid(logits)
        return log_normal(x, mean, self.logvar_x)  # one σ² for all   KW (12), report (26)

    def elbo_terms(self, x, samples=1, eps=None):
        """The ELBO's two terms, by the mean log-likelihood of L = samples draws: estimator B.

        x (B, C, H, W) -> reconstruction, kl, each (B,) in nats per image.  eps: the draws' noise
        (samples, B, latent_dim).  ValueError for samples < 1.
        KW (5), (7) and (10), report (19), (21), (23) and (24); report (27) and (31)
        """
        common.check_range("samples", samples, 1)
        mu, logvar = self.encode(x)
        # (L, B, latent_dim)
        z = self.reparameterize(mu.expand(samples, -1, -1), logvar.expand(samples, -1, -1), eps)
        reconstruction = self.log_likelihood(x, z).mean(0)  # KW (7), report (21)
        return reconstruction, kl_to_prior(mu, logvar)

    def forward(self, x, eps=None):
        """What DistributedDataParallel and torch.compile wrap."""
        return self.elbo_terms(x, eps=eps)

    def log_weights(self, x, samples=1):
        """log p(x, z) - log q(z|x) for z ~ q(z|x): x (B, C, H, W) -> (samples, B) in nats.

        Its mean is estimator A of the ELBO, noisier than B: its KL is a draw.
        KW (2) and (6), report (8) and (20)
        """
        common.check_range("samples", samples, 1)
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu.expand(samples, -1, -1), logvar.expand(samples, -1, -1))
        log_prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))  # log N(z; 0, I)
        log_q = log_normal(z, mu, logvar)
        return self.log_likelihood(x, z) + log_prior - log_q  # KW (6), report (20)

    @torch.no_grad()
    def sample(self, n):
        """n images (n, C, H, W) in [0, 1]: means of p(x|z), z ~ p(z).  Report, section 2.4"""
        common.check_range("n", n, 0)
        device = self.encoder[0].weight.device
        return self.decode(torch.randn(n, self.latent_dim, device=device))  # z ~ p(z)


def build(settings):
    """The model that a run's settings describe."""
    return VAE(settings["latent_dim"], settings["likelihood"], settings["shape"])


# ---- training


DEFAULTS = {
    **common.DEFAULTS,
    "latent_dim": 2,
    "likelihood": "bernoulli",
    "kl_weight": 1.0,
    "epochs": 100,
    "batch_size": 256,
    "lr": 1e-3,
}


def train(args, device, watch=None):
    """Maximizes the ELBO by Adam, or goes on with it -> the model, the history.

    args: of parse.  A row of the history: both terms of the ELBO, nats per image, in training and
    on test images, the seconds of training, what watch(model, epoch) gives.  OUT/vae.pt is written
    after each epoch.  KW, Algorithm 1; report (15)
    """
    path = Path(args.out) / "vae.pt"
    settings, saved = common.open_run(args, path, DEFAULTS)  # fills in args
    x_train, _, x_test, _ = common.load_data(args, device)  # uint8 (N, C, H, W)
    if saved and len(saved["history"]) == args.epochs:
        return load(path, device), saved["history"]  # finished
    settings["shape"] = list(x_train.shape[1:])
    torch.manual_seed(10**6 * args.seed)
    model = build(settings).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    history = common.restore(saved, model=model, optimizer=optimizer)
    elbo_terms = common.wrap(model, args)  # its forward

    N = len(x_train)
    B = min(args.batch_size, N)
    steps = N // B
    seconds = history[-1]["seconds"] if history else 0.0
    common.log({"VAE on": device, "steps an epoch": steps, **settings})
    bar = tqdm(total=steps * args.epochs, initial=steps * len(history), disable=common.RANK > 0)
    for epoch in range(len(history) + 1, args.epochs + 1):
        started = time.perf_counter()
        total = torch.zeros(2, device=device)
        torch.manual_seed(10**6 * args.seed + epoch)  # the same after a stop
        order = torch.randperm(N, device=device)[: steps * B].view(steps, B)
        for step, batch in enumerate(common.share(order)):
            done = (epoch - 1 + (step + 0.5) / steps) / args.epochs  # share of the run
            decay = 0.5 * (1 + math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = args.lr * decay

            x = x_train[batch] / 255  # (B, C, H, W) in [0, 1]
            with common.autocast(device):
                reconstruction, kl = elbo_terms(x)  # (B,) nats each
            loss = (args.kl_weight * kl - reconstruction).mean()  # for weight 1, -1/N of KW (8)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += torch.stack([reconstruction.mean(), kl.mean()]).detach()
            bar.update()
            if step % 50 == 0:
                bar.set_description(f"VAE, epoch {epoch}, loss {loss.item():.4g}")

        reconstruction, kl = (total / steps).tolist()
        seconds += time.perf_counter() - started
        row = {"epoch": epoch, "train_reconstruction": reconstruction, "train_kl": kl}
        reconstruction, kl = evaluate(model, x_test, args.seed)
        row |= {"test_reconstruction": reconstruction, "test_kl": kl, "seconds": seconds}
        if watch:
            row |= watch(model, epoch)
        history.append(row)
        common.save_checkpoint(path, settings, history, model=model, optimizer=optimizer)
        common.log(row)
    bar.close()
    return model.eval(), history


@torch.no_grad()
def evaluate(model, images, seed):
    """Both terms of the ELBO in nats, means over images, uint8 (N, C, H, W)."""
    with common.fork_seed(seed, images.device):
        terms = [torch.stack(model.elbo_terms(batch / 255)) for batch in images.split(1000)]
    return torch.cat(terms, dim=1).double().mean(1).tolist()


# ---- pictures


@torch.no_grad()
def draw(model, history, args, device):
    """A model's pictures, in OUT."""
    out = Path(args.out)
    name = f"VAE, {model.latent_dim}-D latent, {common.title(vars(args))}"
    _, _, x_test, y_test = common.load_data(args, device)
    torch.manual_seed(args.seed)
    common.plot_grid(model.sample(100), out / "vae_samples.png", f"{name}: 100 samples")
    x = x_test[:12] / 255
    rows = {"test image": x, "decoded μ(x)": model.decode(model.encode(x)[0])}
    common.plot_rows(rows, out / "vae_reconstructions.png", f"{name}: reconstructions")
    curves = {
        "log-likelihood, training": "train_reconstruction",
        "log-likelihood, test": "test_reconstruction",
        "KL, training": "train_kl",
        "KL, test": "test_kl",
    }
    common.plot_curves(
        history, curves, out / "vae_curves.png", name, "ELBO's terms, nats an image"
    )
    if model.latent_dim == 2:
        mu = torch.cat([model.encode(batch / 255)[0] for batch in x_test.split(1000)])
        common.plot_latent(mu, y_test, out / "vae_latent.png", f"{name}:\nμ(x) of the test images")


def load(path, device="cpu"):
    """The VAE of a checkpoint.  common.InputError for any other file."""
    return common.load_model(path, "vae", "model", device, build)


def parse(argv):
    """The command line -> args, None for what train fills in."""
    parser = common.arguments(__doc__)
    add = parser.add_argument
    add("--latent-dim", type=common.number(int, 1, 512), help="size of z (2)")
    add("--likelihood", choices=LIKELIHOODS, help="p(x|z) (bernoulli)")
    add("--kl-weight", type=common.number(float, 0, 1000), help="of the KL in the loss (1)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = common.start(args)
    path = Path(args.out) / "vae.pt"
    if not args.sample:
        model, history = train(args, device)
    if common.RANK > 0:
        return  # one process draws
    if args.sample:
        common.open_run(args, path, DEFAULTS)
        model = load(path, device)
        torch.manual_seed(args.seed)
        name = f"VAE, {model.latent_dim}-D latent, {model.title}: samples"
        common.plot_grid(model.sample(args.sample), path.with_name("vae_sample.png"), name)
    else:
        draw(model, history, args, device)
    common.log(f"wrote the pictures vae_* in {path.parent}/")


if __name__ == "__main__":
    common.run(main)
