"""A variational autoencoder (VAE) of handwritten digits, beside the equations of the paper.

  python vae.py                                    train, or resume a stopped run; then draw
  python vae.py --latent-dim 20 --out results/z20  better images, but no map of the latent space
  python vae.py --network conv --latent-dim 20 --out results/conv   with convolutions
  python vae.py --sample 64 --seed 1               draw 64 images from the checkpoint in results/

KW is Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114).

x is an image and z its latent.  The encoder gives q(z|x), the decoder gives p(x|z), and the prior
is p(z) = N(0, I).  Encoder and decoder are trained together to raise a lower bound on log p(x):

    log p(x)  >=  ELBO  =  E_q(z|x)[log p(x|z)]  -  KL(q(z|x) ‖ p(z))     KW (3)

The first term rewards a good reconstruction of x.  The second keeps q(z|x) close to the prior, so
that decoding a draw from the prior yields something that looks like an image, too.

Images are (B, C, H, W) in [0, 1].  Both terms are in nats per image.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---- settings

SETTINGS = {
    "latent_dim": 2,  # small enough to draw a map of the latent space
    "network": "mlp",  # as in the course report; "conv" uses convolutions
    "likelihood": "bernoulli",  # p(x|z); "gaussian" is the other one
    "kl_weight": 1.0,  # weight of the KL in the loss, which is -ELBO only if this is 1
    "epochs": 100,  # as in the course report whose experiment this repository repeats
    "batch_size": 256,
    "lr": 1e-3,  # at the start; it falls to 0 along half a cosine
}
NETWORKS = ("mlp", "conv")
LIKELIHOODS = ("bernoulli", "gaussian")


# ---- the terms of the bound


def kl_to_prior(mu, logvar):
    """KL(N(mu, σ²) ‖ N(0, I)) with σ² = exp(logvar), in nats: (..., n) -> (...).

    Derived in KW, appendix B.
    """
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)  # KW (10)


def log_bernoulli(x, logits):
    """log Π_i y_i^x_i (1 - y_i)^(1 - x_i) with y = sigmoid(logits), in nats: (..., D) -> (...).

    It is a likelihood if x is in {0, 1}.  For gray x it is only a widely used score: its
    "probabilities" of the 256 gray levels do not sum to 1, so its nats cannot be compared with a
    true log-likelihood.
    """
    x = x.expand_as(logits)
    nats = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return -nats.sum(-1)  # KW (11)


def log_normal(x, mu, logvar):
    """log N(x; mu, σ²) with σ² = exp(logvar), in nats: (..., n) -> (...)."""
    squared = (x - mu) ** 2 / logvar.exp()
    return -0.5 * (math.log(2 * math.pi) + logvar + squared).sum(-1)  # KW (12)


# ---- the model


def mlp(latent_dim, shape):
    """An encoder (B, D) -> (B, 2 latent_dim) and a decoder (B, latent_dim) -> (B, D).

    Each has three layers.
    """
    D = math.prod(shape)
    down = [nn.Linear(D, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()]
    up = [nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU()]
    return (
        nn.Sequential(*down, nn.Linear(256, 2 * latent_dim)),
        nn.Sequential(*up, nn.Linear(512, D)),
    )


class VAE(nn.Module):
    """An encoder, a decoder and the bound.

    latent_dim: the size of z.  likelihood: "bernoulli", where the decoder gives the probability
    that each pixel is white, or "gaussian", where it gives each pixel's mean.  shape: (C, H, W) of
    an image.  network: "mlp" or "conv".  ValueError for any other value.
    """

    def __init__(self, latent_dim=2, likelihood="bernoulli", shape=(1, 28, 28), network="mlp"):
        super().__init__()
        common.check_range("latent_dim", latent_dim, 1)
        common.check_choice("likelihood", likelihood, LIKELIHOODS)
        common.check_choice("network", network, NETWORKS)
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.shape = tuple(shape)
        make = mlp if network == "mlp" else conv
        self.encoder, self.decoder = make(latent_dim, shape)
        if likelihood == "gaussian":
            # log σ² of p(x|z), one number for all pixels, is learned (Rybkin et al. 2021).
            self.logvar_x = nn.Parameter(torch.tensor(-2.0))

    def encode(self, x):
        """q(z|x) = N(mu, σ²), σ² = exp(logvar): x (B, C, H, W) -> mu, logvar, (B, latent_dim)."""
        h = self.encoder(x.flatten(1)).to(x.dtype)  # (B, 2 latent_dim); autocast gives bfloat16
        mu, logvar = h.chunk(2, dim=-1)  # KW (9)
        return mu, logvar

    def reparameterize(self, mu, logvar, eps=None):
        """A draw z from q(z|x), shaped like mu, made from the noise eps ~ N(0, I).  KW (4)

        All randomness is in eps, which does not depend on the encoder.  So z is a differentiable
        function of mu and logvar, and gradients flow through it to the encoder.
        """
        if eps is None:
            eps = torch.randn_like(mu)
        sigma = (0.5 * logvar).exp()
        return mu + sigma * eps  # KW (10)

    def decode(self, z):
        """The mean image of p(x|z): z (..., latent_dim) -> (..., C, H, W) in [0, 1]."""
        return torch.sigmoid(self.logits(z)).unflatten(-1, self.shape)

    def logits(self, z):
        """The decoder's output before the sigmoid: z (..., latent_dim) -> (..., D)."""
        h = self.decoder(z.reshape(-1, self.latent_dim))  # convolutions accept only one batch axis
        return h.to(z.dtype).view(*z.shape[:-1], math.prod(self.shape))

    def log_likelihood(self, x, z):
        """log p(x|z) in nats: x (B, C, H, W), z (..., B, latent_dim) -> (..., B)."""
        x = x.flatten(1)  # (B, D)
        if self.likelihood == "bernoulli":
            return log_bernoulli(x, self.logits(z))  # KW (11)
        return log_normal(x, torch.sigmoid(self.logits(z)), self.logvar_x)  # KW (12)

    def forward(self, x):
        """The ELBO's two terms from one draw of z: x (B, C, H, W) -> reconstruction, kl.

        Each is (B,), in nats.  One draw per image is enough for training, because the mean over
        the batch averages over draws, too (KW, section 2.3).
        """
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.log_likelihood(x, z), kl_to_prior(mu, logvar)  # L = 1 in KW (7)

    @torch.no_grad()
    def sample(self, n):
        """n images (n, C, H, W) in [0, 1]: means of p(x|z) for z ~ p(z).  ValueError for n < 0."""
        common.check_range("n", n, 0)
        device = self.encoder[-1].weight.device
        z = torch.randn(n, self.latent_dim, device=device)  # z ~ p(z) = N(0, I)
        return self.decode(z)

    # ---- other estimators of the bound, for measuring rather than training

    def elbo_terms(self, x, samples=1, eps=None):
        """The ELBO's two terms from `samples` draws of z: estimator B.  KW (5) and (7)

        x (B, C, H, W) -> reconstruction, kl, each (B,) in nats.  The reconstruction is the mean of
        the draws' log-likelihoods.  samples: the paper's L.  eps: the noise of the draws,
        (samples, B, latent_dim).  ValueError for samples < 1.
        """
        common.check_range("samples", samples, 1)
        mu, logvar = self.encode(x)
        each = (samples, *mu.shape)
        z = self.reparameterize(mu.expand(each), logvar.expand(each), eps)  # (L, B, latent_dim)
        return self.log_likelihood(x, z).mean(0), kl_to_prior(mu, logvar)  # KW (7)

    def log_weights(self, x, samples=1):
        """log p(x, z) - log q(z|x) for z ~ q(z|x): x (B, C, H, W) -> (samples, B) in nats.

        Its mean over draws is estimator A of the ELBO, which is usually noisier than B, because it
        estimates the KL from the draws, too.  Its logsumexp over draws, minus log(samples),
        estimates a tighter bound (Burda et al. 2016).  KW (2) and (6)
        """
        common.check_range("samples", samples, 1)
        mu, logvar = self.encode(x)
        each = (samples, *mu.shape)
        z = self.reparameterize(mu.expand(each), logvar.expand(each))
        log_prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))  # log N(z; 0, I)
        log_q = log_normal(z, mu, logvar)
        return self.log_likelihood(x, z) + log_prior - log_q  # KW (6)


def build(settings):
    """The VAE for a run's settings (a dict).  To try another network, change this function."""
    network = settings.get("network", "mlp")  # older checkpoints do not name it
    model = VAE(settings["latent_dim"], settings["likelihood"], settings["shape"], network)
    return model.to(memory_format=torch.channels_last)  # the fastest layout for convolutions


# ---- the training loop


def get_lr(done, peak):
    """The learning rate after a fraction `done`, in (0, 1), of the run: half a cosine.

    It falls to 0, so that the last steps average out the noise of the batches.
    """
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train(args, device, watch=None):
    """Trains a VAE, or resumes a run that was stopped -> model, history.

    KW, Algorithm 1.  With a kl_weight of 1 this maximizes the ELBO.  args: as parse returns them.
    device: as common.start(args) returns it.  history is a list with one dict per epoch: epoch,
    both terms of the ELBO on training and on test images (nats per image), seconds of training
    since the start, and what watch(model, epoch) returns.  Everything is saved in OUT/vae.pt after
    each epoch.
    """
    path = Path(args.out) / "vae.pt"
    settings, saved = common.open_run(args, path, defaults(args, device), CODE)
    if saved and len(saved["history"]) == settings.epochs:
        return load(path, device), saved["history"]
    x_train, _, x_test, _ = common.load_data(settings, args, device)  # uint8 (N, C, H, W)
    settings.shape = list(x_train.shape[1:])

    torch.manual_seed(10**6 * settings.seed)
    model = build(vars(settings)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    history = []
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    wrapped = common.wrap(model, args)  # for several GPUs, or compiled; else the model itself

    N = len(x_train)
    B = min(settings.batch_size, N)
    updates = N // B  # per epoch; the N % B images that do not fill a batch are left out
    seconds = history[-1]["seconds"] if history else 0.0
    common.log({"VAE on": device, "updates per epoch": updates, **vars(settings)})
    bar = common.progress(total=updates * settings.epochs, initial=updates * len(history))
    for epoch in range(len(history) + 1, settings.epochs + 1):
        started = time.perf_counter()
        total = torch.zeros(2, device=device)
        # Each epoch has its own seed, so that a resumed run draws the same random numbers as one
        # that was never stopped.
        torch.manual_seed(10**6 * settings.seed + epoch)
        order = torch.randperm(N, device=device)[: updates * B].view(updates, B)
        for step, batch in enumerate(common.share(order), start=updates * (epoch - 1)):
            done = (step + 0.5) / (updates * settings.epochs)
            optimizer.param_groups[0]["lr"] = get_lr(done, settings.lr)

            x = x_train[batch] / 255  # (B, C, H, W) in [0, 1]
            with common.autocast(device, settings.precision):
                reconstruction, kl = wrapped(x)  # (B,) nats each
            # If the weight is 1, this is the mean of -ELBO, which is -1/N times KW (8)
            loss = (settings.kl_weight * kl - reconstruction).mean()

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += torch.stack([reconstruction.mean(), kl.mean()]).detach()
            bar.update()
            if step % 50 == 0 or (step + 1) % updates == 0:
                bar.set_description(f"VAE, epoch {epoch}, loss {loss.item():.4g}", refresh=False)

        train_reconstruction, train_kl = (total / updates).tolist()
        seconds += time.perf_counter() - started
        test_reconstruction, test_kl = evaluate(model, x_test, settings.seed)
        row = {
            "epoch": epoch,
            "train_reconstruction": train_reconstruction,
            "train_kl": train_kl,
            "test_reconstruction": test_reconstruction,
            "test_kl": test_kl,
            "seconds": seconds,
        }
        if watch:
            row |= watch(model, epoch)
        history.append(row)
        parts = {"model": model, "optimizer": optimizer}
        common.save_checkpoint(path, vars(settings), history, CODE, **parts)
        common.log(row)
    bar.close()
    model.settings = vars(settings)
    return model.eval(), history


@torch.no_grad()
def evaluate(model, images, seed):
    """Both terms of the ELBO in nats: means over images, uint8 (N, C, H, W), by one draw each."""
    torch.manual_seed(seed)
    terms = [torch.stack(model.elbo_terms(batch / 255)) for batch in images.split(1000)]
    return torch.cat(terms, dim=1).mean(1).tolist()


# ---- beyond the course report: convolutions


def conv(latent_dim, shape, width=32):
    """An encoder and a decoder like those of mlp, but with convolutions.

    The encoder reduces the resolution to a quarter, and the decoder restores it.  ValueError
    unless the images' height and width are multiples of 4.
    """
    C, H, W = shape
    if H % 4 or W % 4:
        raise ValueError(f"height and width must be multiples of 4, not {H} and {W}")
    low = (2 * width, H // 4, W // 4)
    resize = {"kernel_size": 4, "stride": 2, "padding": 1}  # halves or doubles the resolution
    encoder = nn.Sequential(
        nn.Unflatten(1, tuple(shape)),
        nn.Conv2d(C, width, **resize),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, **resize),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(math.prod(low), 2 * latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, math.prod(low)),
        nn.ReLU(),
        nn.Unflatten(1, low),
        nn.ConvTranspose2d(2 * width, width, **resize),
        nn.ReLU(),
        nn.ConvTranspose2d(width, C, **resize),
        nn.Flatten(),
    )
    return encoder, decoder


# ---- pictures


def draw_samples(model, n, args, path):
    """Draws n samples into the picture `path`; the same seed gives the same samples."""
    torch.manual_seed(model.settings["seed"] if args.seed is None else args.seed)
    title = f"VAE, {model.latent_dim}-D latent, {common.title(model.settings)}: {n} samples"
    common.plot_grid(model.sample(n), path, title)


@torch.no_grad()
def draw(model, history, args, device):
    """Draws the pictures of a trained model, into OUT."""
    out = Path(args.out)
    name = f"VAE, {model.latent_dim}-D latent, {common.title(model.settings)}"
    draw_samples(model, 100, args, out / "vae_samples.png")

    settings = common.Namespace(**model.settings)
    _, _, x_test, y_test = common.load_data(settings, args, device)
    x = x_test[:12] / 255
    rows = {"test images": x, "decoded μ(x)": model.decode(model.encode(x)[0])}
    common.plot_rows(rows, out / "vae_reconstructions.png", f"{name}: reconstructions")
    likelihood = {"training images": "train_reconstruction", "test images": "test_reconstruction"}
    kl = {"training images": "train_kl", "test images": "test_kl"}
    curves = {"E log p(x|z), nats": likelihood, "KL, nats": kl}
    common.plot_curves(history, curves, out / "vae_curves.png", f"{name}: the ELBO's terms")
    (out / "vae_latent.png").unlink(missing_ok=True)  # a model that was replaced may have left it
    if model.latent_dim == 2:
        mu = torch.cat([model.encode(batch / 255)[0] for batch in x_test.split(1000)])
        title = f"{name}:\nμ(x) of the test images; circles: 1 and 2 σ of the prior"
        common.plot_latent(mu, y_test, out / "vae_latent.png", title)


# ---- the command line

# Stored in checkpoints, so that changed code does not continue a run that older code began.
CODE = common.fingerprint(__file__)


def defaults(args, device):
    """The settings of a new run, unless a flag says otherwise."""
    return common.defaults(device) | SETTINGS


def load(path, device="cpu"):
    """The trained VAE of a checkpoint, without gradients.  common.InputError for other files."""
    return common.load_model(path, "vae", "model", device, build)


def parse(argv):
    """The command line -> args, with None for each setting that no flag sets."""
    parser = common.arguments(__doc__)
    add = parser.add_argument
    weight = "weight of the KL in the loss (default: 1)"
    add("--latent-dim", type=common.number(int, 1, 512), help="size of z (default: 2)")
    add("--network", choices=NETWORKS, help="type of encoder and decoder (default: mlp)")
    add("--likelihood", choices=LIKELIHOODS, help="form of p(x|z) (default: bernoulli)")
    add("--kl-weight", type=common.number(float, 0, 1000), help=weight)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = common.start(args)
    out = Path(args.out)
    if args.sample:
        model = common.load_for_sampling(args, out / "vae.pt", load, device)
        draw_samples(model, args.sample, args, out / "vae_sample.png")
        common.log(f"wrote {out / 'vae_sample.png'}")
    else:
        model, history = train(args, device)
        if common.RANK == 0:
            draw(model, history, args, device)
        common.log(f"wrote the pictures vae_* in {out}/")


if __name__ == "__main__":
    common.run(main)
