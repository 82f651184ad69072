"""A variational autoencoder on MNIST, in the order of the paper: bound, model, training, pictures.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), is KW in the comments; report
is the course report whose experiment this redoes (see README.md).  x is an image, z its latent; the
encoder gives q(z|x), the decoder p(x|z), and both are trained to raise a lower bound on log p(x):

    log p(x)  >=  ELBO  =  E_q(z|x)[log p(x|z)]  -  KL(q(z|x) || p(z)),  p(z) = N(0, I)   KW (3), report (16)

Images are float tensors (B, C, H, W) in [0, 1]; a bound is in nats per image.

  python vae.py                                    train, then draw samples, latent space and curves
  python vae.py --latent-dim 20 --out results/z20  a wider latent: better reconstructions, no latent map
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
    return -F.binary_cross_entropy_with_logits(
        logits, x.expand_as(logits), reduction="none").sum(-1)  # KW (11), report (30)


# The model.

class VAE(nn.Module):
    """Encoder and decoder, each an MLP of three layers, and the bounds on log p(x) that they give.

    latent_dim: size of z.  likelihood: p(x|z) is "bernoulli", with the decoder's output as each pixel's
    probability of white, or "gaussian", with it as the mean and one learned variance for all pixels.
    shape: (C, H, W) of an image.
    """

    def __init__(self, latent_dim=2, likelihood="bernoulli", shape=(1, 28, 28)):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be bernoulli or gaussian, not {likelihood!r}")
        self.latent_dim, self.likelihood, self.shape = latent_dim, likelihood, tuple(shape)
        D = math.prod(shape)
        self.encoder = nn.Sequential(
            nn.Linear(D, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, D))
        # log σ² of p(x|z): learning it weighs the squared error against the KL (σ-VAE, Rybkin et al. 2021)
        self.logvar_x = nn.Parameter(torch.tensor(-2.0)) if likelihood == "gaussian" else None

    def encode(self, x):
        """q(z|x) = N(mu, exp(logvar) I): x (B, C, H, W) -> mu, logvar, each (B, latent_dim)."""
        mu, logvar = self.encoder(x.flatten(1)).float().chunk(2, dim=-1)  # KW (9), report (22)
        return mu, logvar

    def reparameterize(self, mu, logvar, eps=None):
        """A sample of q(z|x), like mu; the gradient passes to mu and logvar.  KW (4), report (18)

        eps: its noise, drawn unless given.
        """
        eps = torch.randn_like(mu) if eps is None else eps
        return mu + (0.5 * logvar).exp() * eps  # z = μ + σ ⊙ ε, ε ~ N(0, I)   KW (10)

    def decode(self, z):
        """The mean of p(x|z): z (..., latent_dim) -> (..., C, H, W) in [0, 1]."""
        return torch.sigmoid(self.decoder(z).float()).unflatten(-1, self.shape)

    def log_likelihood(self, x, z):
        """log p(x|z) in nats: x (B, C, H, W), z (..., B, latent_dim) -> (..., B)."""
        x, logits = x.flatten(1), self.decoder(z).float()  # (B, D), (..., B, D)
        if self.likelihood == "bernoulli":
            return log_bernoulli(x, logits)
        return log_normal(x, torch.sigmoid(logits), self.logvar_x)  # one σ² for all   KW (12), report (26)

    def elbo_terms(self, x, samples=1, eps=None):
        """The two terms of the bound, with L = samples draws of z: estimator B.

        x (B, C, H, W) -> reconstruction, kl, each (B,) in nats per image; ELBO = reconstruction - kl.
        The mean is over log-likelihoods, never over latents.  eps: the draws' noise
        (samples, B, latent_dim), drawn unless given.
        KW (5), (7) and (10), report (19), (21), (23) and (24); with either likelihood report (27) and (31)
        """
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu.expand(samples, -1, -1), logvar.expand(samples, -1, -1), eps)  # (L, B, n)
        return self.log_likelihood(x, z).mean(0), kl_to_prior(mu, logvar)  # KW (7), report (21)

    def log_weights(self, x, samples=1):
        """log p(x, z) - log q(z|x) for z ~ q(z|x): x (B, C, H, W) -> (samples, B) in nats.

        Its expectation is the ELBO.  Its mean over the draws is estimator A, in which the KL is a draw too:
        it is noisier than B, with which we train.  KW (2) and (6), report (8) and (20)
        """
        mu, logvar = self.encode(x)
        mu, logvar = mu.expand(samples, -1, -1), logvar.expand(samples, -1, -1)
        z = self.reparameterize(mu, logvar)
        log_prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))  # log N(z; 0, I)
        return self.log_likelihood(x, z) + log_prior - log_normal(z, mu, logvar)  # KW (6), report (20)

    @torch.no_grad()
    def sample(self, n):
        """n images (n, C, H, W) in [0, 1]: means of p(x|z) for z from the prior.  Report, section 2.4"""
        z = torch.randn(n, self.latent_dim, device=next(self.parameters()).device)
        return self.decode(z)


# Training.

def train(args, device, watch=None):
    """Maximizes the ELBO by Adam -> the model, the history.  KW, Algorithm 1; report (15)

    args: of parse; what it leaves open is filled in.  A row of the history: the epoch, the two terms of the
    ELBO in nats per image on training and test images, and the seconds of training so far.
    watch(model, epoch) -> a dict of more numbers for the row.  OUT/vae.pt is written after each epoch.
    """
    path = Path(args.out) / "vae.pt"
    settings, saved = common.settle(  # fills in args, too
        args, path, latent_dim=2, likelihood="bernoulli", kl_weight=1.0,
        epochs=100 if device.type == "cuda" else 30, batch_size=256, lr=1e-3)
    x_train, _, x_test, _ = common.load_data(args, device)  # uint8 (N, C, H, W)
    settings["shape"] = list(x_train.shape[1:])
    torch.manual_seed(10**6 * args.seed)
    model = VAE(args.latent_dim, args.likelihood, settings["shape"]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    history = common.restore(saved, path, model=model, optimizer=optimizer)

    N, B = len(x_train), common.batch_size(args, x_train)
    steps, seconds = N // B, history[-1]["seconds"] if history else 0.0
    parameters = sum(p.numel() for p in model.parameters())
    common.say(f"VAE: {parameters:,} parameters on {device}, {steps} steps an epoch")
    common.say(settings)
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(10**6 * args.seed + epoch)  # an epoch is the same after a resume
        started, terms = time.perf_counter(), torch.zeros(2, device=device)
        order = torch.randperm(N, device=device)[:steps * B].view(steps, B)  # drops the last, smaller batch
        bar = tqdm(order, f"VAE, epoch {epoch}/{args.epochs}", leave=False, disable=common.RANK > 0)
        for step, batch in enumerate(bar):
            done = (epoch - 1 + (step + 0.5) / steps) / args.epochs  # share of the whole run, 0 ... 1
            optimizer.param_groups[0]["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * done))  # decays to 0

            x = x_train[batch] / 255  # (B, C, H, W) in [0, 1]
            eps = torch.randn(1, B, args.latent_dim, device=device)
            x, eps = x[common.MINE], eps[:, common.MINE]  # processes share a batch
            with common.autocast(device):
                reconstruction, kl = model.elbo_terms(x, eps=eps)  # (B,) nats each
            loss = (args.kl_weight * kl - reconstruction).mean()  # if the weight is 1, -1/N of KW (8)

            optimizer.zero_grad()
            loss.backward()
            common.average(p.grad for p in model.parameters())  # over the processes, if there are several
            optimizer.step()
            terms += torch.stack([reconstruction.mean(), kl.mean()]).detach()
            common.show(bar, step, loss, args.epochs)

        common.average([terms])
        reconstruction, kl = (terms / steps).tolist()
        seconds += time.perf_counter() - started
        test_reconstruction, test_kl = evaluate(model, x_test, args.seed)
        row = {"epoch": epoch, "train_reconstruction": reconstruction, "train_kl": kl,
               "test_reconstruction": test_reconstruction, "test_kl": test_kl, "seconds": seconds}
        history.append(row | (watch(model, epoch) if watch else {}))
        common.save(path, kind="vae", settings=settings, history=history, model=model.state_dict(),
                    optimizer=optimizer.state_dict())
        common.say(history[-1])
    return model.eval(), history


@torch.no_grad()
def evaluate(model, images, seed):
    """The two terms of the ELBO in nats per image, means over all images, uint8 (N, C, H, W)."""
    with common.fork_seed(seed, images.device):
        terms = [torch.stack(model.elbo_terms(batch / 255)) for batch in images.split(1000)]
    return torch.cat(terms, dim=1).double().mean(1).tolist()


# Pictures.

@torch.no_grad()
def draw(model, history, args, device):
    """The pictures of a trained model in OUT -> their names."""
    out, name = Path(args.out), f"VAE, {model.latent_dim}-D latent, {common.title(vars(args))}"
    _, _, x_test, y_test = common.load_data(args, device)
    torch.manual_seed(args.seed)
    common.plot_grid(model.sample(100), out / "vae_samples.png",
                     f"{name}: means of p(x|z) for 100 z from the prior")
    x = x_test[:12] / 255
    mu, _ = model.encode(x)
    common.plot_rows({"test image": x, "decoded μ(x)": model.decode(mu)}, out / "vae_reconstructions.png",
                     f"{name}: reconstructions")
    epochs = [row["epoch"] for row in history]
    curves = {f"{label}, {split}": [sign * row[f"{split}_{term}"] for row in history]
              for label, sign, term in (("-reconstruction", -1, "reconstruction"), ("KL", 1, "kl"))
              for split in ("train", "test")}
    common.plot_curves(epochs, curves, out / "vae_curves.png", f"{name}: the two terms of -ELBO",
                       "nats per image")
    pictures = ["vae_samples.png", "vae_reconstructions.png", "vae_curves.png"]
    if model.latent_dim == 2:
        mu = torch.cat([model.encode(batch / 255)[0] for batch in x_test.split(1000)])
        common.plot_latent(mu, y_test, out / "vae_latent.png", f"{name}:\nμ(x) of the test images")
        z = common.equal_mass_grid(20).to(device)
        common.plot_manifold(model.decode(z), out / "vae_manifold.png", f"{name}:\ndecoded equal-mass grid")
        pictures += ["vae_latent.png", "vae_manifold.png"]
    return pictures


def load(path, device="cpu"):
    """The trained VAE of a checkpoint, ready to sample.  Raises common.InputError for any other file."""
    return common.load_model(path, "vae", "model", device, lambda s: VAE(
        s["latent_dim"], s["likelihood"], s["shape"]))


def parse(argv):
    """The command line -> args; None stands for what train fills in."""
    parser = common.arguments(__doc__)
    add = parser.add_argument
    add("--latent-dim", metavar="N", type=common.number(int, 1, 512), help="size of z (default: 2)")
    add("--likelihood", choices=["bernoulli", "gaussian"], help="p(x|z) (default: bernoulli)")
    add("--kl-weight", metavar="X", type=common.number(float, 0, 1000),
        help="of the KL in the loss (default: 1); 0 makes it a plain autoencoder")
    add("--resume", action="store_true", help="go on from OUT/vae.pt, with its settings")
    add("--sample", metavar="N", type=common.number(int, 1, 10000),
        help="only draw N samples from OUT/vae.pt")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device, out = common.pick_device(args.device), common.output_folder(args.out)
    if args.sample:
        model = load(out / "vae.pt", device)
        torch.manual_seed(args.seed or 0)
        common.plot_grid(model.sample(args.sample), out / "vae_sample.png",
                         f"VAE, {model.latent_dim}-D latent, {model.title}: means of p(x|z), z from p(z)")
        pictures = ["vae_sample.png"]
    else:
        model, history = train(args, device)
        pictures = draw(model, history, args, device) if common.RANK == 0 else []
    common.say(f"wrote {', '.join(pictures)} in {out}/")


if __name__ == "__main__":
    common.run(main)
