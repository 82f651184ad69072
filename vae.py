"""A variational autoencoder on MNIST, in the order of the paper: bound, model, training, pictures.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), is KW in the comments; report
is the course report whose experiment this redoes (see README.md).  x is an image, z its latent; the
encoder gives q(z|x), the decoder p(x|z), and both are trained to raise a lower bound on log p(x):

    log p(x)  >=  ELBO  =  E_q(z|x)[log p(x|z)]  -  KL(q(z|x) || p(z)),  p(z) = N(0, I)   KW (3), report (16)

Images are float tensors (B, 1, 28, 28) in [0, 1]; a bound is in nats per image.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common

D = 28 * 28  # pixels

EXAMPLES = """\
  python vae.py                                    train, then draw samples, latent space and curves
  python vae.py --latent-dim 20 --out results/z20  a wider latent: better reconstructions, no latent map
  python vae.py --sample 64                        draw 64 digits from the checkpoint in results/"""


# The bound.

def log_normal(x, mu, logvar):
    """log N(x; mu, exp(logvar) I) in nats, summed over the last axis: (..., n) -> (...).  Report (26)"""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu) ** 2 / logvar.exp()).sum(-1)  # KW (9)


def kl_to_prior(mu, logvar):
    """KL(N(mu, exp(logvar) I) || N(0, I)) in nats, in closed form: (..., n) -> (...).  KW, appendix B"""
    return -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum(-1)  # KW (10), report (24)


def log_bernoulli(x, logits):
    """log Π_m ν_m^x_m (1 - ν_m)^(1 - x_m) with ν = sigmoid(logits), in nats: (..., D) -> (...).

    A likelihood for x in {0, 1}.  On gray x it is the customary score, but no likelihood: over the 256 gray
    levels it does not sum to 1, so these nats must not be compared with another model's.
    Report (28) and (29)
    """
    x, logits = torch.broadcast_tensors(x, logits)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)  # KW (11), report (30)


def log_discretized_normal(x, mean, sigma):
    """log P(x) in nats of 8-bit pixels: each level gets the normal's mass within half a level of it.

    x (..., D) in {0, 1/255, ..., 1}, mean like x, sigma > 0 a scalar; returns (...).  Black and white also
    get the tail beyond them, so that the 256 levels' probabilities sum to 1.
    On [0, 1], where Ho et al. 2020 (arXiv:2006.11239) have [-1, 1].  Ho (13)
    """
    level, mean = (x.double() * 255).round(), mean.double()  # 0 ... 255; neighbours share their edge
    high = torch.where(level == 255, math.inf, ((level + 0.5) / 255 - mean) / sigma)
    low = torch.where(level == 0, -math.inf, ((level - 0.5) / 255 - mean) / sigma)
    # Φ(high) - Φ(low) = Φ(-low) - Φ(-high): in the upper tail, where Φ is 1 to all digits, take the second
    high, low = torch.where(low > 0, -low, high), torch.where(low > 0, -high, low)
    # log(Φ(high) - Φ(low)) = log Φ(high) + log(1 - exp(log Φ(low) - log Φ(high)))
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return (log_high + torch.log(-torch.expm1(log_low - log_high))).sum(-1)  # Ho (13)


# The model.

class VAE(nn.Module):
    """Encoder and decoder, each an MLP of three layers, and the bounds on log p(x) that they give.

    latent_dim: size of z.  likelihood: p(x|z) is "bernoulli", with the decoder's output as each pixel's
    probability of white, or "gaussian", with it as the mean and one learned variance for all pixels.
    """

    def __init__(self, latent_dim=2, likelihood="bernoulli"):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be bernoulli or gaussian, not {likelihood!r}")
        self.latent_dim, self.likelihood = latent_dim, likelihood
        self.encoder = nn.Sequential(
            nn.Linear(D, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, D))
        # log σ² of p(x|z): learning it weighs the squared error against the KL (σ-VAE, Rybkin et al. 2021)
        self.logvar_x = nn.Parameter(torch.tensor(-2.0)) if likelihood == "gaussian" else None

    def encode(self, x):
        """q(z|x) = N(mu, exp(logvar) I): x (B, 1, 28, 28) -> mu, logvar, each (B, latent_dim)."""
        mu, logvar = self.encoder(x.flatten(1)).float().chunk(2, dim=-1)  # KW (9), report (22)
        return mu, logvar

    def reparameterize(self, mu, logvar, eps=None):
        """A sample of q(z|x), like mu; the gradient passes to mu and logvar.  KW (4), report (18)

        eps: its noise, drawn unless given.
        """
        eps = torch.randn_like(mu) if eps is None else eps
        return mu + (0.5 * logvar).exp() * eps  # z = μ + σ ⊙ ε, ε ~ N(0, I)   KW (10)

    def decode(self, z):
        """The mean of p(x|z): z (..., latent_dim) -> (..., 1, 28, 28) in [0, 1]."""
        return torch.sigmoid(self.decoder(z).float()).unflatten(-1, (1, 28, 28))

    def log_likelihood(self, x, z, sigma=None):
        """log p(x|z) in nats: x (B, 1, 28, 28), z (..., B, latent_dim) -> (..., B).

        With sigma it is instead the discretized normal around the decoder's mean: a likelihood of the 8-bit
        image, comparable between models and convertible to bits/dim, whichever likelihood was trained.
        """
        x, logits = x.flatten(1), self.decoder(z).float()
        if sigma is not None:
            return log_discretized_normal(x, torch.sigmoid(logits), sigma)
        if self.likelihood == "bernoulli":
            return log_bernoulli(x, logits)
        return log_normal(x, torch.sigmoid(logits), self.logvar_x.expand(D))  # KW (12), report (26)

    def elbo_terms(self, x, samples=1, sigma=None, eps=None):
        """The two terms of the bound, with L = samples draws of z: estimator B, the training loss.

        x (B, 1, 28, 28) -> reconstruction, kl, each (B,) in nats per image; ELBO = reconstruction - kl.
        The mean is over log-likelihoods, never over latents.  sigma: see log_likelihood.  eps: the draws'
        noise (samples, B, latent_dim), drawn unless given.
        KW (5), (7) and (10), report (19), (21), (23) and (24); with either likelihood report (27) and (31)
        """
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu.expand(samples, -1, -1), logvar.expand(samples, -1, -1), eps)  # (L, B, n)
        return self.log_likelihood(x, z, sigma).mean(0), kl_to_prior(mu, logvar)  # KW (7), report (21)

    def log_weights(self, x, samples=1, sigma=None):
        """log p(x, z) - log q(z|x) for z ~ q(z|x): x (B, 1, 28, 28) -> (samples, B) in nats.

        Its mean is the ELBO.  KW (2), report (8)
        """
        mu, logvar = self.encode(x)
        mu, logvar = mu.expand(samples, -1, -1), logvar.expand(samples, -1, -1)
        z = self.reparameterize(mu, logvar)
        log_prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))  # log N(z; 0, I)
        return self.log_likelihood(x, z, sigma) + log_prior - log_normal(z, mu, logvar)

    def elbo_a(self, x, samples=1, sigma=None):
        """The bound by estimator A, which draws the KL too: x -> (B,) nats.

        On average it is B, but noisier; training uses B.
        """
        return self.log_weights(x, samples, sigma).mean(0)  # KW (6), report (20)

    def importance_bound(self, x, samples, sigma=None):
        """A bound between ELBO and log p(x) that rises to log p(x) with samples: x -> (B,) nats.

        Its distance from the ELBO estimates KL(q(z|x) || p(z|x)).  KW (1), report (11)
        Burda et al. 2016, eq. 8
        """
        # log 1/L Σ_l p(x, z_l) / q(z_l|x)
        return self.log_weights(x, samples, sigma).logsumexp(0) - math.log(samples)

    def fit_sigma(self, x):
        """The scale of log_discretized_normal under which the images x (B, 1, 28, 28) are likeliest.

        A search over 61 values from 0.001 to 1; pass training images, never test images.
        """
        mean = self.decode(self.reparameterize(*self.encode(x))).flatten(1)
        return max(torch.logspace(-3, 0, 61).tolist(),
                   key=lambda sigma: log_discretized_normal(x.flatten(1), mean, sigma).sum().item())

    @torch.no_grad()
    def sample(self, n):
        """n images (n, 1, 28, 28) in [0, 1]: means of p(x|z) for z from the prior.  Report, section 2.4"""
        z = torch.randn(n, self.latent_dim, device=next(self.parameters()).device)
        return self.decode(z)


# Training.

SETTINGS = ["latent_dim", "likelihood", "kl_weight", "data", "limit", "epochs", "batch_size", "lr", "seed"]


def train(args, device, watch=None):
    """Maximizes the ELBO by Adam.  Returns the model and the run.  KW, Algorithm 1; report (15)

    common.Run shuffles the images, keeps OUT/vae.pt after each epoch and at Ctrl-C, takes it up again, and
    stops where the loss is not finite.  watch(model, epoch) -> a dict of more numbers for the history.
    """
    torch.manual_seed(args.seed)
    x_train, x_test = common.load_data(args.data, args.data_dir, device)  # uint8 (N, 1, 28, 28)
    x_train = x_train[:args.limit]
    model = VAE(args.latent_dim, args.likelihood).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True, capturable=True)
    terms = ["train_reconstruction", "train_kl"]
    run = common.Run(Path(args.out) / "vae.pt", args, SETTINGS, len(x_train), terms, device,
                     model=model, optimizer=optimizer)
    elbo_terms = common.for_training(model, model.elbo_terms, device)
    lr = optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)  # a tensor: see common.captured

    def step(x, eps):
        with common.autocast(device):
            reconstruction, kl = elbo_terms(x, eps=eps)  # (B,) nats each
        loss = (args.kl_weight * kl - reconstruction).mean()  # mean of -ELBO, if the weight is 1   KW (8)
        optimizer.zero_grad()
        (run.weight * loss).backward()
        optimizer.step()
        return reconstruction.mean(), kl.mean()

    step = common.captured(step, device)
    for epoch in run.epochs():
        for progress, batch in run.batches():  # progress: share of the whole run, 0 ... 1
            lr.fill_(args.lr * 0.5 * (1 + math.cos(math.pi * progress)))  # cosine decay to 0
            x = x_train[batch] / 255  # (B, 1, 28, 28) in [0, 1]
            x, eps = run.share(x, torch.randn(len(x), args.latent_dim, device=device))
            run.log(*step(x, eps))
        reconstruction, kl = evaluate(model, x_test, args.seed)
        watched = watch(model, epoch) if watch else {}
        run.end_epoch(test_reconstruction=reconstruction, test_kl=kl, **watched)
    return model.eval(), run


@torch.no_grad()
def evaluate(model, images, seed):
    """The two terms of the ELBO in nats per image, averaged over all images, uint8 (N, 1, 28, 28)."""
    with common.own_randomness(seed, images.device):  # the training's random numbers are left alone
        terms = [torch.stack(model.elbo_terms(batch / 255)) for batch in images.split(1000)]
    return torch.cat(terms, dim=1).double().mean(1).tolist()


# Pictures.

@torch.no_grad()
def draw(model, run, args, device):
    """The pictures of a trained model in OUT -> their names."""
    out = Path(args.out)
    name = f"VAE, {model.latent_dim}-D latent, {common.NAMES[args.data]}, {args.epochs} epochs"
    _, x_test = common.load_data(args.data, args.data_dir, device)
    common.plot_grid(model.sample(100), out / "vae_samples.png", f"{name}: 100 samples from the prior")
    x = x_test[:12] / 255
    mu, _ = model.encode(x)
    common.plot_rows({"test image": x, "decoded μ(x)": model.decode(mu)}, out / "vae_reconstructions.png",
                     f"{name}: reconstructions")
    epochs = [row["epoch"] for row in run.history]
    curves = {f"{label}, {split}": (epochs, [sign * row[f"{split}_{term}"] for row in run.history])
              for label, sign, term in (("-reconstruction", -1, "reconstruction"), ("KL", 1, "kl"))
              for split in ("train", "test")}
    common.plot_curves(curves, out / "vae_curves.png", f"{name}: the two terms of -ELBO", "nats per image")
    pictures = ["vae_samples.png", "vae_reconstructions.png", "vae_curves.png"]
    if model.latent_dim == 2:
        mu, _ = model.encode(x_test / 255)
        _, labels = common.load_labels(args.data, args.data_dir, device)
        common.plot_latent(mu, labels, out / "vae_latent.png", f"{name}:\nμ(x) of the test digits")
        z = common.equal_mass_grid(20).to(device)
        common.plot_manifold(model.decode(z), out / "vae_manifold.png", f"{name}:\ndecoded equal-mass grid")
        pictures += ["vae_latent.png", "vae_manifold.png"]
    return pictures


def load(path, device="cpu"):
    """The trained VAE of a checkpoint, ready to sample.  Raises common.InputError for any other file."""
    saved = common.load(path, "vae")
    return common.restored(lambda s: VAE(s["latent_dim"], s["likelihood"]), saved, "model", path).to(device)


def parse(argv):
    parser = common.arguments(__doc__, EXAMPLES, epochs=None, batch_size=256, lr=1e-3)
    add = parser.add_argument
    add("--latent-dim", metavar="N", type=common.number(int, 1, 512), default=2, help="size of z")
    add("--likelihood", choices=["bernoulli", "gaussian"], default="bernoulli", help="p(x|z)")
    add("--kl-weight", metavar="X", type=common.number(float, 0, 1000), default=1.0,
        help="of the KL in the loss; 0 makes it a plain autoencoder")
    add("--sample", metavar="N", type=common.number(int, 1, 10000),
        help="draw N samples from the checkpoint and stop")
    return parser.parse_args(argv)


def main(argv=None, watch=None):
    args = parse(argv)
    device, out = common.pick_device(args.device), Path(args.out)
    if args.sample:
        model = load(out / "vae.pt", device)
        common.output_folder(out)
        torch.manual_seed(args.seed)
        with common.enough_memory("--sample", args.sample):
            x = model.sample(args.sample)
        common.plot_grid(x, out / "vae_sample.png",
                         f"VAE, {model.latent_dim}-D latent, {common.NAMES[model.settings['data']]}: samples")
        return common.farewell("vae", out, ["vae_sample.png"], model.settings["data"])
    args.data, args.out = common.find_data(args.data, args.data_dir), common.output_folder(out)
    args.epochs = args.epochs or (100 if device.type == "cuda" else 30 if common.has_bfloat16(device) else 20)
    with common.locked(out):
        with common.enough_memory("--batch-size", args.batch_size):
            model, run = train(args, device, watch)
        if common.RANK:
            return
        torch.manual_seed(args.seed)
        pictures = draw(model, run, args, device)
    common.farewell("vae", out, ["vae.pt", *pictures], args.data)


if __name__ == "__main__":
    common.run(main)
