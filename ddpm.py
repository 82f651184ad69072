"""A denoising diffusion model (DDPM) of handwritten digits, in the order of the paper.

  python ddpm.py                            train, or resume a stopped run; then draw pictures
  python ddpm.py --recipe paper             Ho's own loss, L_simple, for 100 epochs
  python ddpm.py --sample 64 --seed 1       draw 64 images from the checkpoint in results/

On an NVIDIA GPU the default recipe is `paper`.  Elsewhere it is `short`, which trains a smaller
network for fewer epochs, within minutes on a CPU.  `short` does NOT minimize L_simple: it draws t
from another distribution, and weights the same error differently at each t.  For L_simple on a
CPU: `--recipe paper --width 32 --epochs 6 --lr 4e-3`.

Ho is Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239).

A VAE has one latent z, and learns both its encoder q(z|x) and its decoder p(x|z).  A DDPM has T
latents x_1 ... x_T, each of the size of the image x_0.  Its encoder q(x_t|x_{t-1}) is fixed: it
mixes in a little Gaussian noise, until x_T is almost nothing but noise.  Its decoder
p(x_{t-1}|x_t) removes a little noise.  A single network, which is told t, serves as the decoder in
all T steps.  It is trained to guess the noise.  The bound is the VAE's with its sign reversed and
with a KL for each latent; apart from L_0, it is a weighted sum of the errors of this guess, plus
constants:

    -log p(x_0)  <=  L_T + Σ_{t=2..T} L_{t-1} + L_0                       Ho (3) and (5)

    L_T     = KL(q(x_T|x_0) ‖ N(0, I))                       nothing to learn
    L_{t-1} = E_q KL(q(x_{t-1}|x_t, x_0) ‖ p(x_{t-1}|x_t))   of two Gaussians: a squared error
    L_0     = E_q[-log p(x_0|x_1)]                           the decoder of the image itself

Outside the U-Net, x is a batch of images (B, C, H, W) in [0, 1], and x0 and xt are on the scale
[-1, 1].  A time t is an int64 tensor (B,) in training and an int in sampling, where it is the same
for all images.  It runs from 1 to T, as in the paper; t = 0 is the image without noise.

The file has, in this order, the forward process, Algorithms 1 and 2, the network and the training
loop; then what goes beyond the paper, and the bound, which is for measuring.
"""

import copy
import itertools
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---- settings

RECIPES = {
    # Ho's loss and the course report's 100 epochs.
    "paper": {"weighting": "simple", "t": "uniform", "width": 64, "epochs": 100, "lr": 1e-3},
    # A narrower network and fewer epochs, for a CPU.  "t" says how training draws t: this recipe
    # concentrates on the t that matter most to how samples look.  See draw_t and loss_weights,
    # below the training loop.
    "short": {"weighting": "v", "t": "focused", "width": 32, "epochs": 6, "lr": 4e-3},
}
SETTINGS = {
    "T": 1000,  # Ho, section 4
    "schedule": "linear",  # of β_t; "cosine" is Nichol & Dhariwal's
    "variance": "posterior",  # σ_t² = β̃_t.  "beta" is Ho's other choice, β_t; see section 3.2
    "batch_size": 64,  # larger batches need a larger learning rate
    "labels": False,  # whether the network is told which digit it draws
    "classes": [],  # the names of the labels, if so
}
WARM_UP = 0.02  # fraction of the run in which the learning rate rises: first steps are erratic
AVERAGED = 0.05  # sampling uses weights averaged over about this last fraction of the updates
STEPS = 20  # sampling steps on the command line; these are of second order: see trajectory

# ---- the forward process q


def make_alpha_bar(schedule, T):
    """The table ᾱ_0 = 1, ᾱ_1 ... ᾱ_T in float64, (T+1,).  ValueError for T < 1.

    "linear": β_t rises from 1e-4 to 0.02.  Ho has T = 1000; for another T, all β_t are scaled by
    1000/T, so that x_T is still noise (for T > 1).  No β_t exceeds 0.999.  "cosine": cosine_beta.
    """
    common.check_range("T", T, 1)
    common.check_choice("schedule", schedule, SCHEDULES)
    if schedule == "cosine":
        beta = cosine_beta(T)
    else:
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    alpha_bar = (1 - beta.clamp(max=0.999)).cumprod(0)  # ᾱ_t = Π_{s=1..t} (1 - β_s)   Ho (4)
    return F.pad(alpha_bar, (1, 0), value=1.0)


def per_image(values):
    """(B,) -> (B, 1, 1, 1): one factor for each image of a batch."""
    return values.view(-1, 1, 1, 1)


class DDPM(nn.Module):
    """The forward process, the loss and the sampler for any network that guesses the noise.

    net: net(xt, t) with t (B,) returns ε_θ(x_t, t), shaped like xt.  It can be any callable, such
    as a network of your own, or the average of the networks of two DDPMs, a and b:
        DDPM(my_transformer)
        DDPM(lambda xt, t: (a.net(xt, t) + b.net(xt, t)) / 2, schedule=a.alpha_bar)
    schedule: "linear" or "cosine", for T steps; or a table ᾱ_0 ... ᾱ_T, which falls from 1 and
    whose length gives T.
    variance: σ_t² of p, "posterior" or "beta" (Ho, section 3.2).
    clip: whether to keep the guess x̂_0 within [-1, 1], as Ho's code does.
    weighting: how the loss is weighted over t; "simple" is Ho (14).
    shape: (C, H, W) of an image.
    ValueError for an unknown name, for T < 1 or for an invalid table.
    """

    def __init__(
        self,
        net,
        T=1000,
        schedule="linear",
        variance="posterior",
        clip=True,
        weighting="simple",
        shape=(1, 28, 28),
    ):
        super().__init__()
        common.check_choice("variance", variance, VARIANCES)
        if isinstance(schedule, str):
            schedule = make_alpha_bar(schedule, T)
        self.net = net
        # Everything else follows from this one table.  It stays on the CPU, because not all
        # devices have float64.
        self.alpha_bar = check_alpha_bar(schedule)
        self.T = len(self.alpha_bar) - 1
        self.variance = variance
        self.clip = clip
        self.shape = tuple(shape)
        # In training each image has its own t, so these factors are looked up on the device.
        weight = loss_weights(self.alpha_bar, weighting, variance)
        self.register_buffer("signal_rate", self.alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise_rate", (1 - self.alpha_bar).sqrt().float(), persistent=False)
        self.register_buffer("weight", weight.float(), persistent=False)

    def rates(self, t):
        """√ᾱ_t and √(1-ᾱ_t): two floats for an int t, two tensors (B, 1, 1, 1) for t (B,)."""
        if isinstance(t, int):
            alpha_bar = self.alpha_bar[t].item()
            return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        return per_image(self.signal_rate[t]), per_image(self.noise_rate[t])

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t|x_0), shaped like x0, made from the noise eps ~ N(0, I)."""
        signal_rate, noise_rate = self.rates(t)
        return signal_rate * x0 + noise_rate * eps  # Ho (4)

    # ---- a training step (the loop is train): Ho, Algorithm 1

    def loss(self, x0, t=None, eps=None, *more):
        """The mean over images and pixels of w_t (ε - ε_θ(x_t, t))²: a scalar.

        Ho, Algorithm 1, for images x0 (B, C, H, W).  If t (B,) and eps are not given, t is uniform
        and eps is Gaussian noise, shaped like x0; train gives both.  The weighting "simple" has
        w_t = 1: with uniform t this is L_simple, per pixel.  more: further inputs of the network,
        such as labels.
        """
        if t is None:  # train gives t and eps
            t = torch.randint(1, self.T + 1, (len(x0),), device=x0.device)  # line 3
        if eps is None:
            eps = torch.randn_like(x0)  # line 4
        xt = self.q_sample(x0, t, eps)
        guess = self.net(xt, t, *more)  # ε_θ
        common.check_shape("net(xt, t)", guess, xt)
        error = (eps - guess) ** 2  # line 5
        return (per_image(self.weight[t]) * error).mean()  # with weights of 1, Ho (14)

    def forward(self, x0, t=None, eps=None, *more):
        """The loss, because DistributedDataParallel and torch.compile wrap forward."""
        return self.loss(x0, t, eps, *more)

    # ---- sampling, from t to s = t-1 (what `sample` uses works for any s < t): Ho, Algorithm 2

    @torch.no_grad()
    def sample(self, n, steps=None, eta=1.0, **more):
        """n images (n, C, H, W) in [0, 1], in all T steps: Ho, Algorithm 2.

        x̂_0 is clipped, as in Ho's code; with clip=False, line 4 is exactly the paper's (a test
        compares them line by line).  The other arguments go beyond the paper: fewer `steps`, less
        noise with `eta` < 1, and whatever else sample_beyond takes.  The command line does not
        come here: it draws by `trajectory`, by default with steps=20 and order=2, and with
        --steps 1000 the same images bit for bit.  ValueError for a value out of range.
        """
        common.check_range("n", n, 0)
        if n == 0 or steps is not None or eta != 1 or more:
            return sample_beyond(self, n, steps, eta, **more)
        xt = torch.randn(n, *self.shape, device=self.signal_rate.device)  # line 1
        for t in range(self.T, 0, -1):  # line 2
            mean, variance = self.p_mean_variance(xt, t, t - 1)
            z = torch.randn_like(xt) if t > 1 else 0  # line 3
            xt = mean + variance**0.5 * z  # line 4, a draw from Ho (1)
        return to_image(xt)  # line 6

    def p_mean_variance(self, xt, t, s, x0_hat=None):
        """p(x_s|x_t) = N(mean, variance I): mean shaped like xt, variance a float.  Ho (1)

        The mean is that of q(x_s|x_t, x_0) with the guess x̂_0 in place of x_0.  If (15) is
        inserted into (7), with s = t-1, the coefficient of x_t becomes
            of_xt + of_x0/√ᾱ_t = 1/√α_t,
        and that of -ε_θ becomes
            of_x0 √(1-ᾱ_t)/√ᾱ_t = (1-α_t)/(√α_t √(1-ᾱ_t)).
        So unless x̂_0 is clipped, this is the mean in line 4.  x0_hat: the guess, if it is already
        known.
        """
        if x0_hat is None:
            x0_hat = self.predict_x0(xt, t)
        mean, variance = self.q_posterior(x0_hat, xt, t, s)  # variance β̃_t, mean Ho (11)
        if self.variance == "beta":
            variance = 1 - (self.alpha_bar[t] / self.alpha_bar[s]).item()  # σ_t² = β_t
        return mean, variance

    def predict_x0(self, xt, t):
        """x̂_0, the guess at the image, from ε_θ, the guess at the noise: shaped like xt.

        It is clipped to [-1, 1] if self.clip.
        """
        signal_rate, noise_rate = self.rates(t)
        if isinstance(t, int):
            t = torch.full((len(xt),), t, device=xt.device)
        x0_hat = (xt - noise_rate * self.net(xt, t)) / signal_rate  # Ho (15)
        return x0_hat.clamp(-1, 1) if self.clip else x0_hat

    def q_posterior(self, x0, xt, t, s):
        """q(x_s|x_t, x_0) = N(mean, variance I): mean shaped like xt, variance a float.  Ho (6)

        t and s < t are ints.  In the paper s = t-1, and then alpha and beta are its α_t and β_t.
        """
        alpha_bar_t = self.alpha_bar[t].item()
        alpha_bar_s = self.alpha_bar[s].item()
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        of_x0 = alpha_bar_s**0.5 * beta / (1 - alpha_bar_t)
        of_xt = alpha**0.5 * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        mean = of_x0 * x0 + of_xt * xt  # μ̃_t   Ho (7)
        variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta  # β̃_t   Ho (7)
        return mean, variance

    # ---- beyond the paper: these call functions below the training loop

    def times(self, steps=None):
        """T, ..., 0: the steps+1 times that a sampler visits, all of them by default."""
        return choose_times(self.T, steps)

    def trajectory(self, xt, times, eta=1.0, order=1):
        """Samples at `times`, from xt on; yields (t, x_t, x̂_0).  See the function of that name."""
        return trajectory(self, xt, times, eta, order)

    def vlb_terms(self, x0, times=None):
        """All terms of the bound in nats, (B, K+1).  See the function `vlb_terms`."""
        return vlb_terms(self, x0, times)


def to_model(x):
    """[0, 1] -> [-1, 1].  Ho, section 3.3"""
    return 2 * x - 1


def to_image(x0):
    """[-1, 1] -> [0, 1], clamped."""
    return ((x0 + 1) / 2).clamp(0, 1)


# ---- the network: a plain U-Net


class Block(nn.Module):
    """Two convolutions and a skip connection.

    h (B, cin, H, W), embedding (B, embed) -> (B, cout, H, W).  Between the convolutions, the
    embedding of t scales and shifts each channel (FiLM, Perez et al. 2018).
    """

    def __init__(self, cin, cout, embed):
        super().__init__()
        # GroupNorm is used because BatchNorm would mix images of different t.  On a CPU, one group
        # takes a fifth of the time that eight take.
        self.norm1 = nn.GroupNorm(1, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.film = nn.Linear(embed, 2 * cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a new block adds only a constant to its skip

    def forward(self, h, embedding):
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(h)))
        y = self.norm2(y) * (1 + scale) + shift
        y = self.conv2(F.silu(y))
        return self.skip(h) + y


class UNet(nn.Module):
    """A small U-Net: x (B, cin, H, W), t (B,) -> (B, cout, H, W).  It knows nothing of ᾱ_t.

    It has `width` channels at half the resolution and twice as many at a quarter: 14×14 and 7×7
    for a digit.  Layers at full resolution would dominate the run time, so each square of 2×2
    pixels is folded into channels.  ValueError unless H and W are multiples of 4.
    """

    def __init__(self, cin=1, cout=1, width=64):
        super().__init__()
        self.width = width
        embed = 128
        layers = [nn.Linear(2 * width, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU()]
        self.embed_t = nn.Sequential(*layers)
        self.conv_in = nn.Conv2d(4 * cin, width, 3, padding=1)
        self.block_in = Block(width, width, embed)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.mid = nn.ModuleList(Block(2 * width, 2 * width, embed) for _ in range(3))
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.block_join = Block(2 * width, width, embed)
        self.block_out = Block(width, width, embed)
        self.norm_out = nn.GroupNorm(1, width)
        self.conv_out = nn.Conv2d(width, 4 * cout, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # an untrained network outputs a constant

    def embed(self, t):
        """t (B,) -> its embedding (B, embed), by sines and cosines.  Vaswani et al. 2017, 3.5"""
        i = torch.arange(self.width, device=t.device)
        angle = t[:, None] * torch.exp(-math.log(10000) * i / self.width)  # (B, width)
        return self.embed_t(torch.cat([angle.sin(), angle.cos()], dim=1))

    def forward(self, x, t, *more):
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"height and width must be multiples of 4, not {tuple(x.shape[2:])}")
        embedding = self.embed(t, *more)
        h = F.pixel_unshuffle(x, 2)  # (B, 4 cin, H/2, W/2)
        h = h.contiguous(memory_format=torch.channels_last)  # the fastest layout for convolutions
        h = self.conv_in(h)  # (B, width, H/2, W/2)
        skip = self.block_in(h, embedding)
        h = self.down(skip)  # (B, 2 width, H/4, W/4)
        for block in self.mid:
            h = block(h, embedding)
        h = self.up(F.interpolate(h, scale_factor=2))  # (B, width, H/2, W/2)
        h = self.block_join(torch.cat([h, skip], dim=1), embedding)
        h = self.block_out(h, embedding)
        h = self.conv_out(F.silu(self.norm_out(h)))  # (B, 4 cout, H/2, W/2)
        return F.pixel_shuffle(h, 2)  # (B, cout, H, W)


def build(settings):
    """The DDPM for a run's settings (a dict).  To try another network, change this function."""
    alpha_bar = make_alpha_bar(settings["schedule"], settings["T"])
    channels = settings["shape"][0]
    # Preconditioned, below the training loop, gives the U-Net three planes for each channel, and
    # turns its output, which is v, into ε_θ.
    if settings["classes"]:
        net = LabelledUNet(3 * channels, channels, settings["width"], len(settings["classes"]))
    else:
        net = UNet(3 * channels, channels, settings["width"])
    net.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
    chosen = {name: settings[name] for name in ("variance", "weighting", "shape")}
    return DDPM(Preconditioned(net, alpha_bar), schedule=alpha_bar, **chosen)


# ---- the training loop


def train(args, device, watch=None):
    """Trains a DDPM, or resumes a run that was stopped -> model, history.

    Ho, Algorithm 1.  args: as parse returns them.  device: as common.start(args) returns it.  The
    returned model has the averaged weights.  history is a list with one dict per epoch: epoch,
    train_loss, test_loss (of the averaged weights, with uniform t), seconds of training since the
    start, and what watch(model, epoch) returns.  Everything is saved in OUT/ddpm.pt after each
    epoch.
    """
    path = Path(args.out) / "ddpm.pt"
    settings, saved = common.open_run(args, path, defaults(args, device), CODE)
    if saved and len(saved["history"]) == settings.epochs:
        return load(path, device), saved["history"]
    x_train, y_train, x_test, _ = common.load_data(settings, args, device)  # uint8 (N, C, H, W)
    settings.shape = list(x_train.shape[1:])
    settings.classes = common.class_names(settings, args)

    torch.manual_seed(10**6 * settings.seed)
    model = build(vars(settings)).to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    history = []
    if saved:
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    wrapped = common.wrap(model, args)  # for several GPUs, or compiled; else the model itself

    N = len(x_train)
    B = min(settings.batch_size, N)
    updates = N // B  # per epoch; the N % B images that do not fill a batch are left out
    seconds = history[-1]["seconds"] if history else 0.0
    common.log(objective(settings))
    common.log({"DDPM on": device, "updates per epoch": updates, **vars(settings)})
    bar = common.progress(total=updates * settings.epochs, initial=updates * len(history))
    for epoch in range(len(history) + 1, settings.epochs + 1):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        # Each epoch has its own seed, so that a resumed run draws the same random numbers as one
        # that was never stopped.
        torch.manual_seed(10**6 * settings.seed + epoch)
        order = torch.randperm(N, device=device)[: updates * B].view(updates, B)
        for step, batch in enumerate(common.share(order), start=updates * (epoch - 1)):  # line 1
            done = (step + 0.5) / (updates * settings.epochs)
            optimizer.param_groups[0]["lr"] = get_lr(done, settings.lr)

            x0 = to_model(x_train[batch] / 255)  # line 2: (B, C, H, W) in [-1, 1]
            t = draw_t(len(x0), model.T, settings.t, device)  # line 3: (B,) in 1 ... T
            eps = torch.randn_like(x0)  # line 4
            more = some_labels(y_train, batch, settings)  # empty without --labels
            with common.autocast(device, settings.precision):
                loss = wrapped(x0, t, eps, *more)  # the loss in line 5: DDPM.loss

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # the step in line 5, by Adam
            update_average(average, model, step)
            total += loss.detach()
            bar.update()
            if step % 50 == 0 or (step + 1) % updates == 0:
                bar.set_description(f"DDPM, epoch {epoch}, loss {loss.item():.4g}", refresh=False)

        row = {"epoch": epoch, "train_loss": total.item() / updates}
        seconds += time.perf_counter() - started
        test_loss = evaluate(average, x_test, settings.seed, settings.precision)
        row |= {"test_loss": test_loss, "seconds": seconds}
        if watch:
            row |= watch(average, epoch)
        history.append(row)
        parts = {"model": model, "ema": average, "optimizer": optimizer}
        common.save_checkpoint(path, vars(settings), history, CODE, **parts)
        common.log(row)
    bar.close()
    average.settings = vars(settings)
    return average, history


@torch.no_grad()
def evaluate(model, images, seed, precision=None):
    """The loss on all images, uint8 (N, C, H, W), with uniform t and without labels.

    t and ε depend only on the seed.
    """
    total = 0
    torch.manual_seed(seed)
    with common.autocast(images.device, precision):
        for batch in images.split(500):
            total += model.loss(to_model(batch / 255)) * len(batch)
    return total.item() / len(images)


# ---- beyond the paper: the learning rate's schedule, averaged weights, what the U-Net sees


def get_lr(done, peak):
    """The learning rate after a fraction `done`, in (0, 1), of the run: up, then half a cosine.

    It falls to 0, so that the last steps average out the noise of the batches.
    """
    warm_up = min(1, done / WARM_UP)
    decay = 0.5 * (1 + math.cos(math.pi * done))
    return peak * warm_up * decay


def update_average(average, model, step):
    """Moves the averaged weights toward the model's after update `step` = 0, 1, 2, ...

    This is an exponential moving average.  Its rate 1 / (1 + AVERAGED * step) makes it cover about
    the last twentieth of the updates so far.  With Ho's constant rate of 0.0001 it would remember
    the random initialization for the first 10,000 updates.
    """
    rate = 1 / (1 + AVERAGED * step)
    averages = list(average.parameters())
    weights = [p.detach() for p in model.parameters()]
    # All weights move in one call, because a GPU is slow at many small ones.
    torch._foreach_lerp_(averages, weights, rate)


class Preconditioned(nn.Module):
    """ε_θ(x_t, t) from a plain network, whose inputs and output are chosen to ease its task.

    Karras et al. 2022 call such a wrapper preconditioning.  net: net(x, t) with 3C channels in, t
    (B,) int64 and C channels out, such as UNet(3 * C, C).

    Input: besides x_t, what ε would be if the pixel were black (x_0 = -1), and if it were white
    (x_0 = 1).  Most pixels of a digit are one or the other.  For such a pixel, ε is a straight
    line in x_t, of slope 1/√(1-ᾱ_t), which is 100 at t = 1 and hard to learn.  Without the two
    extra inputs, black comes out slightly gray.  They are clamped to [-3, 3], because ε is rarely
    larger: where an input is, the pixel is not black, or not white.

    Output: v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (Salimans & Ho 2022).  At large t, x_t is nearly ε itself,
    and v, which is nearly -x_0 there, is what is left to learn.  With Ho (4) for x_t, x_0 cancels:
        √(1-ᾱ_t) x_t + √ᾱ_t v = (1-ᾱ_t) ε + ᾱ_t ε = ε,
    so a guess at v is also a guess at ε.
    """

    def __init__(self, net, alpha_bar):
        super().__init__()
        self.net = net
        self.register_buffer("signal_rate", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise_rate", (1 - alpha_bar).sqrt().float(), persistent=False)

    def forward(self, xt, t, *more):
        signal_rate = per_image(self.signal_rate[t])
        noise_rate = per_image(self.noise_rate[t])
        if_black = ((xt + signal_rate) / noise_rate).clamp(-3, 3)
        if_white = ((xt - signal_rate) / noise_rate).clamp(-3, 3)
        v = self.net(torch.cat([xt, if_black, if_white], dim=1), t, *more)
        return noise_rate * xt + signal_rate * v


# ---- beyond the paper: other schedules, how training draws t, and how each t is weighted

SCHEDULES = ("linear", "cosine")
WAYS = ("uniform", "focused")  # to draw t
WEIGHTINGS = ("simple", "bound", "mu", "x0", "v")
VARIANCES = ("posterior", "beta")


def cosine_beta(T):
    """β_1 ... β_T of Nichol & Dhariwal 2021, equation (17), (T,) float64."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return 1 - f[1:] / f[:-1]


def draw_t(n, T, way="uniform", device="cpu"):
    """The times t for n training images, (n,) int64 in 1 ... T.

    "uniform": Ho, Algorithm 1, line 3.
    "focused": three quarters are T sigmoid(u/2 - 0.6) with u ~ N(0, 1).  Half of these lie between
    0.28 T and 0.43 T, where a digit takes its shape (after Esser et al. 2024, section 3.1).  The
    remaining quarter are (T+1)^u with u ~ U(0, 1), because most bits are spent at the smallest t.
    ValueError for any other way.
    """
    common.check_choice("way", way, WAYS)
    if way == "uniform":
        return torch.randint(1, T + 1, (n,), device=device)
    middle = (T * torch.sigmoid(torch.randn(n, device=device) / 2 - 0.6)).ceil()
    fine = ((T + 1) ** torch.rand(n, device=device)).floor()
    t = torch.where(torch.rand(n, device=device) < 0.75, middle, fine)
    return t.long().clamp(1, T)


def loss_weights(alpha_bar, weighting, variance="posterior"):
    """The weights w_0 ... w_T of ‖ε - ε_θ‖², (T+1,) float64; w_0 is never used.

    Given x_t, a guess at ε is also a guess at μ̃_t, at x_0 and at v.  The squared error of each is
    that of ε times a factor that depends on t alone, so the weights decide what the loss measures
    (Kingma & Gao 2023, section 2): "bound" is L_{t-1} without its constant, "mu" is ‖μ̃_t - μ_θ‖²,
    "x0" is ‖x_0 - x̂_0‖², and "v" is ‖v - v_θ‖² with v = √ᾱ_t ε - √(1-ᾱ_t) x_0.  The U-Net's
    output is v (see Preconditioned), so "v" is the mean squared error of that output.
    ValueError for any other name.
    """
    common.check_choice("weighting", weighting, WEIGHTINGS)
    now = alpha_bar[1:]  # ᾱ_t
    before = alpha_bar[:-1]  # ᾱ_{t-1}
    alpha = now / before
    beta = 1 - alpha
    sigma2 = beta.clone()  # σ_t²
    if variance == "posterior" and len(now) > 1:
        sigma2 = (1 - before) / (1 - now) * beta  # β̃_t
        sigma2[0] = sigma2[1]  # β̃_1 = 0 would make the weight infinite
    weights = {
        "simple": torch.ones_like(now),  # Ho (14)
        "bound": beta**2 / (2 * sigma2 * alpha * (1 - now)),  # Ho (12)
        "mu": beta**2 / (alpha * (1 - now)),
        "x0": (1 - now) / now,
        "v": 1 / now,
    }
    return F.pad(weights[weighting], (1, 0))


def check_alpha_bar(table):
    """A table ᾱ_0 ... ᾱ_T, as a list, an array or a tensor -> (T+1,) float64 on the CPU.

    ValueError unless it begins with exactly 1, falls at every step and stays above 0.
    """
    table = torch.as_tensor(table, dtype=torch.float64, device="cpu").detach().clone()
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(f"a schedule is a table ᾱ_0 ... ᾱ_T, not of shape {tuple(table.shape)}")
    if table[0] != 1:
        raise ValueError(
            f"a schedule begins with ᾱ_0 = 1, not {table[0].item():g}: prepend 1 to a table that "
            "begins with ᾱ_1; if it is a table of β, take the cumulative product of 1 - β first"
        )
    if not ((table.diff() < 0).all() and table[-1] > 0):  # nan fails, too
        raise ValueError("a schedule ᾱ_0 ... ᾱ_T must fall from step to step and stay above 0")
    return table


# ---- beyond the paper: samples in fewer steps, and with less noise


def choose_times(T, steps=None):
    """The times that a sampler visits, T ... 0: steps+1 decreasing ints.  None: all T+1.

    They are T (i/steps)², rounded to distinct integers, so they lie closer together at small t,
    where the last traces of gray disappear.  ValueError unless steps is in 1 ... T.
    """
    steps = T if steps is None else steps
    common.check_range("steps", steps, 1, T)
    return [max(i, round(T * (i / steps) ** 2)) for i in range(steps, -1, -1)]


@torch.no_grad()
def sample_beyond(model, n, steps=None, eta=1.0, order=1, labels=None, guidance=0.0):
    """n images (n, C, H, W) in [0, 1].

    steps: how many to take, in 1 ... T; None for all T.  eta and order: see trajectory.
    labels, an int or (n,), and guidance: see guided.  ValueError for a value out of range.
    """
    xT = torch.randn(n, *model.shape, device=model.signal_rate.device)
    if n == 0:
        return xT
    if labels is not None or guidance:
        model = guided(model, labels, guidance)
    for _, xt, _ in trajectory(model, xT, model.times(steps), eta, order):
        x0 = xt  # only the last one is kept, because a long trajectory would take gigabytes
    return to_image(x0)


@torch.no_grad()
def trajectory(model, xt, times, eta=1.0, order=1):
    """Samples at decreasing `times`: yields (t, x_t, x̂_0) before each step.

    xt (B, C, H, W) is x_t at times[0].  After the last step it yields (times[-1], x_t, x_t), which
    is (0, x_0, x_0) if the last time is 0.
    eta: with 1, as in Ho, a step draws x_s from p(x_s|x_t).  Below 1, its noise has the variance
    η² β̃; with 0 there is none, and first-order steps are DDIM's (Song et al. 2021).
    order: 2 replaces x̂_0 with a guess for the middle of the step, extrapolated from x̂_0 at this
    time and at the one before.  This is DPM-Solver++(2M) with eta = 0, and its SDE version with
    eta = 1 (Lu et al. 2022).  The first step, which has none before it, and the step to 0, where λ
    is infinite, use x̂_0 itself.  A step of either order takes one evaluation of the network.
    ValueError for any other eta or order.
    """
    common.check_range("eta", eta, 0, 1)
    common.check_choice("order", order, (1, 2))
    x0_before = None
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        x0_hat = model.predict_x0(xt, t)
        yield t, xt, x0_hat
        guess = x0_hat
        if order == 2 and i > 0 and s > 0:
            before = log_ratio(model, times[i - 1])
            now = log_ratio(model, t)
            # The length of this step, over that of the one before.
            ratio = (log_ratio(model, s) - now) / (now - before)
            guess = x0_hat + ratio / 2 * (x0_hat - x0_before)
        if eta == 1:
            mean, variance = model.p_mean_variance(xt, t, s, guess)
        else:
            mean, variance = ddim_mean_variance(model, guess, xt, t, s, eta)
        z = torch.randn_like(xt) if s > 0 else 0
        xt = mean + variance**0.5 * z
        x0_before = x0_hat
    yield times[-1], xt, xt


def log_ratio(model, t):
    """λ_t = log(√ᾱ_t / √(1-ᾱ_t)), a float: half the log of the signal-to-noise ratio of x_t."""
    signal_rate, noise_rate = model.rates(t)
    return math.log(signal_rate / noise_rate)


def ddim_mean_variance(model, x0_hat, xt, t, s, eta):
    """A step with fresh noise of variance η² β̃: mean shaped like xt, variance a float.

    The less fresh noise, the more of the noise ε̂ already in x_t is kept, so that x_s is equally
    noisy for every eta.  eta = 1 is q_posterior.  Song et al. 2021, (12) and (16)
    """
    _, beta_tilde = model.q_posterior(x0_hat, xt, t, s)
    variance = eta**2 * beta_tilde
    signal_rate, noise_rate = model.rates(t)
    eps_hat = (xt - signal_rate * x0_hat) / noise_rate  # solved for ε, Ho (4)
    alpha_bar_s = model.alpha_bar[s].item()
    mean = alpha_bar_s**0.5 * x0_hat + (1 - alpha_bar_s - variance) ** 0.5 * eps_hat
    return mean, variance


# ---- beyond the paper: labels and classifier-free guidance


class LabelledUNet(UNet):
    """A UNet that is also told labels (B,) in 0 ... classes, where the last means "no label"."""

    def __init__(self, cin, cout, width, classes):
        super().__init__(cin, cout, width)
        self.classes = classes
        self.label = nn.Embedding(classes + 1, self.embed_t[-2].out_features)

    def embed(self, t, labels=None):
        labels = torch.full_like(t, self.classes) if labels is None else labels
        return super().embed(t) + self.label(labels)


def some_labels(labels, batch, settings):
    """The further inputs of a LabelledUNet: labels[batch], about a tenth replaced by "no label".

    Thus the network learns to guess the noise both with a label and without.  A run without
    --labels has no further inputs.  Ho & Salimans 2022, algorithm 1
    """
    if not settings.labels:
        return ()
    left_out = torch.rand(len(batch), device=batch.device) < 0.1
    return (torch.where(left_out, len(settings.classes), labels[batch]),)


def guided(model, labels, guidance=0.0):
    """A DDPM that draws images of these labels, an int or (n,), with classifier-free guidance.

    Its ε_θ is (1+w) ε_θ(x_t, t, label) - w ε_θ(x_t, t) with w = guidance.  w = 0 draws each class
    as the network learned it.  A larger w favors images that look least like any other class:
    clearer, but less varied.  ValueError for guidance without labels, or for a label out of range.
    Ho & Salimans 2022, equation 6
    """
    if labels is None:
        raise ValueError("guidance needs labels: pass labels as well")
    if isinstance(model.net, Preconditioned):  # nothing is known about any other network
        classes = getattr(model.net.net, "classes", 0)
        if not classes:
            raise ValueError("this model was trained without labels")
        for label in torch.as_tensor(labels).flatten().tolist():
            common.check_range(f"of {classes} classes, a label", label, 0, classes - 1)

    def eps(xt, t):
        label = torch.as_tensor(labels, device=xt.device).expand(len(xt))
        conditional = model.net(xt, t, label)
        if guidance == 0:
            return conditional
        return (1 + guidance) * conditional - guidance * model.net(xt, t)

    options = {"variance": model.variance, "clip": model.clip, "shape": model.shape}
    return DDPM(eps, schedule=model.alpha_bar, **options).to(model.weight.device)


# ---- beyond sampling: the bound, term by term


def log_discretized_normal(x0, mean, sigma):
    """log P(x0) of 8-bit pixels, (B,) nats: a level has the normal's mass within half a level.

    x0 (B, C, H, W) in {-1, -1 + 2/255, ..., 1}; mean shaped like x0; sigma > 0, a number or a
    tensor.  The lowest and the highest level also get the tails, so that the 256 probabilities sum
    to 1.  Ho (13)
    """
    level = ((x0.cpu().double() + 1) * 127.5).round()  # 0 ... 255
    mean = mean.cpu().double()
    high = ((level + 0.5) / 127.5 - 1 - mean) / sigma
    low = ((level - 0.5) / 127.5 - 1 - mean) / sigma
    high = torch.where(level == 255, math.inf, high)  # δ_+(1) = ∞   Ho (13)
    low = torch.where(level == 0, -math.inf, low)  # δ_-(-1) = -∞   Ho (13)
    # The mass is Φ(high) - Φ(low) = Φ(-low) - Φ(-high).  If Φ(high) and Φ(low) are both near 1,
    # their difference has no digits left, so above the mean the mirrored form is used.
    upper = low > 0
    log_high = torch.special.log_ndtr(torch.where(upper, -low, high))
    log_low = torch.special.log_ndtr(torch.where(upper, -high, low))
    # log(Φ(high) - Φ(low)) = log Φ(high) + log(1 - exp(log Φ(low) - log Φ(high)))
    log_mass = log_high + torch.log(-torch.expm1(log_low - log_high))
    return log_mass.flatten(1).sum(1)  # Ho (13)


@torch.no_grad()
def x0_error(model, x0, t):
    """‖x_0 - x̂_0(x_t, t)‖² for one draw of x_t: x0 (B, C, H, W) -> (B,).  t is an int.

    The terms L_{t-1} of the bound, t = 2 ... T, depend on the network through this error alone.
    """
    xt = model.q_sample(x0, t, torch.randn_like(x0))
    error = x0 - model.predict_x0(xt, t)
    return error.pow(2).flatten(1).sum(1)


def kl_of_step(model, t, s, error, variance=None):
    """KL(q(x_s|x_t, x_0) ‖ p(x_s|x_t)) in nats, (B,).  error (B,): what x0_error returns.

    For s = t-1 this is L_{t-1}.  variance: σ_t², by default the model's own.
    """
    of_x0, beta_tilde = model.q_posterior(1.0, 0.0, t, s)  # the coefficient of x_0 in μ̃_t
    if variance is None:
        _, variance = model.p_mean_variance(0.0, t, s, x0_hat=0.0)  # σ_t² depends on no image
    gap = of_x0**2 * error  # ‖μ̃_t - μ_θ‖²
    ratio = beta_tilde / variance
    D = math.prod(model.shape)
    return 0.5 * (D * (ratio - 1 - math.log(ratio)) + gap / variance)  # Ho (8)


@torch.no_grad()
def first_term(model, x0, times):
    """L_0 = -log p(x_0|x_t) in nats, (B,), for the smallest t > 0.

    x0 has 8-bit levels in [-1, 1].
    """
    t = times[-2]
    xt = model.q_sample(x0, t, torch.randn_like(x0))
    mean, variance = model.p_mean_variance(xt, t, 0)
    if variance == 0:
        # With β̃_1 = 0 the decoder would be deterministic, so σ_1² = β̃_2, as in Ho's code.  A
        # sampler does not need this, because it adds no noise in its last step.
        if len(times) > 2:
            _, variance = model.q_posterior(0.0, 0.0, times[-3], t)
        else:
            variance = 1 - model.alpha_bar[t].item()  # a single step has only β_1
    return -log_discretized_normal(x0, mean, variance**0.5)  # Ho (13)


def last_term(model, x0, times):
    """L_T = KL(q(x_T|x_0) ‖ N(0, I)) in nats, (B,)."""
    a = model.alpha_bar[times[0]].item()
    # This is Kingma & Welling's KL to N(0, I) for the mean √a x_0 and the variance 1-a.  KW (10)
    nats = 0.5 * (a * x0.cpu().double() ** 2 - a - math.log1p(-a))
    return nats.flatten(1).sum(1)


@torch.no_grad()
def vlb_terms(model, x0, times=None):
    """Every term of the bound, from one draw of each x_t: x0 (B, C, H, W) -> (B, K+1) in nats.

    times: K+1 decreasing ints, T ... 0, by default all of them.  Column 0 is L_0, column K is L_T,
    and between them are the KLs, from small t to large.  x0 has 8-bit levels in [-1, 1].  Bits per
    dimension are the sum of a row divided by C·H·W·ln 2.  Ho (5)
    """
    times = model.times() if times is None else list(times)
    columns = [first_term(model, x0, times)]
    pairs = list(itertools.pairwise(times))[:-1]  # all but the last, which leads to x_0
    for t, s in common.progress(pairs[::-1], "bound"):
        columns.append(kl_of_step(model, t, s, x0_error(model, x0, t)))
    columns.append(last_term(model, x0, times))
    return torch.stack([column.cpu().double() for column in columns], dim=1)


# ---- pictures


def steps_and_order(model, steps=None):
    """How pictures are drawn: in second-order steps, or by Ho's sampler if all T are taken."""
    steps = steps or min(STEPS, model.T)
    return steps, 1 if steps == model.T else 2


def sample_many(model, n, steps=None, eta=1.0, labels=None, guidance=0.0):
    """n images (n, C, H, W), 500 at a time, with a progress bar.  labels: (n,), or None."""
    steps, order = steps_and_order(model, steps)
    images = []
    for i in common.progress(range(0, n, 500), "sampling"):
        part = None if labels is None else labels[i : i + 500]
        count = min(500, n - i)
        images.append(sample_beyond(model, count, steps, eta, order, part, guidance))
    return torch.cat(images)


def draw_samples(model, n, args, device, path):
    """Draws n samples into the picture `path`; the same seed gives the same samples.

    With labels, all samples show --digit if it is given; else each class fills a row (n is rounded
    up).
    """
    torch.manual_seed(model.settings["seed"] if args.seed is None else args.seed)
    labels, columns = common.labels_to_draw(model.settings["classes"], args.digit, n)
    n = n if labels is None else len(labels)
    with common.autocast(device, args.precision):
        x = sample_many(model, n, args.steps, args.eta, labels, args.guidance)
    title = f"DDPM, {common.title(model.settings)}: {n} samples"
    common.plot_grid(x, path, title, columns)


def draw_guidance(model, args, device, path):
    """Draws five samples of each class from the same noise, with guidance 0, 1 and 4 in turn."""
    classes = model.settings["classes"]
    labels = torch.arange(5 * len(classes)) // 5
    panels = []
    columns = []
    for guidance in 0, 1, 4:
        torch.manual_seed(model.settings["seed"])
        with common.autocast(device, args.precision):
            x = sample_many(model, len(labels), args.steps, args.eta, labels, guidance)
        x = x.unflatten(0, (len(classes), 5))
        panels += [x, torch.ones_like(x[:, :1])]  # a white column separates the panels
        columns += ["", "", f"guidance {guidance}", "", "", ""]
    names = [common.caption(name) for name in classes]
    rows = dict(zip(names, torch.cat(panels[:-1], dim=1), strict=True))
    title = f"DDPM, {common.title(model.settings)}: the effect of guidance"
    common.plot_rows(rows, path, title, columns[:-1])


@torch.no_grad()
def draw(model, history, args, device):
    """Draws the pictures of a trained model, into OUT."""
    out = Path(args.out)
    name = f"DDPM, {common.title(model.settings)}"
    draw_samples(model, 100, args, device, out / "ddpm_samples.png")
    (out / "ddpm_labels.png").unlink(missing_ok=True)  # a model that was replaced may have left it
    if model.settings["classes"]:
        draw_guidance(model, args, device, out / "ddpm_labels.png")

    torch.manual_seed(model.settings["seed"])
    steps, order = steps_and_order(model, args.steps)
    times = model.times(steps)
    xt = torch.randn(1, *model.shape, device=device)
    with common.autocast(device, args.precision):
        frames = list(model.trajectory(xt, times, args.eta, order))
    every = math.ceil(len(times) / 51)  # about 50 frames, of which the last is x_0
    t, noisy, guess = zip(*frames[:-1:every], frames[-1], strict=True)
    labels = [f"t = {each}" for each in t]
    panels = {"$x_t$": to_image(torch.cat(noisy)), "$\\hat{x}_0$": to_image(torch.cat(guess))}
    title = f"{name}: from noise to a sample"
    common.save_gif(panels, out / "ddpm_trajectory.gif", title, labels)
    every = math.ceil(len(labels) / 11)  # at most 11 columns, of which the last is x_0
    first = (len(labels) - 1) % every
    rows = {label: x[first::every] for label, x in panels.items()}
    common.plot_rows(rows, out / "ddpm_trajectory.png", title, labels[first::every])

    drawn = f"training images, {model.settings['t']} t"
    lines = {drawn: "train_loss", "test images, uniform t, averaged weights": "test_loss"}
    curves = {f"loss ({model.settings['weighting']}), mean over pixels": lines}
    common.plot_curves(history, curves, out / "ddpm_loss.png", name, yscale="log")


# ---- the command line

# Stored in checkpoints, so that changed code does not continue a run that older code began.
CODE = common.fingerprint(__file__)


def defaults(args, device):
    """The settings of a new run, unless a flag says otherwise."""
    recipe = args.recipe or ("paper" if device.type == "cuda" else "short")
    return common.defaults(device) | SETTINGS | {"recipe": recipe} | RECIPES[recipe]


def objective(settings):
    """A line that says which loss a run minimizes, because a CPU's default is not the paper's."""
    simple = settings.weighting == "simple" and settings.t == "uniform"
    loss = "Ho's L_simple" if simple else "not Ho's L_simple, which is --recipe paper"
    return f"recipe {settings.recipe}: its loss is {loss}"


def check_sampling(args, settings):
    """InputError if a model with these settings cannot be sampled as args say."""
    T = settings["T"]
    if args.steps and args.steps > T:
        raise common.InputError(f"--steps {args.steps} exceeds T = {T}: choose at most {T}")
    if args.digit is not None or args.guidance:
        if not args.sample:
            raise common.InputError("--digit and --guidance are for drawing: add --sample")
        if not settings["labels"]:
            raise common.InputError("--digit and --guidance need a model trained with --labels")


def load(path, device="cpu"):
    """The trained DDPM of a checkpoint, without gradients.  common.InputError for other files."""
    return common.load_model(path, "ddpm", "ema", device, build)


def parse(argv):
    """The command line -> args, with None for each setting that no flag sets."""
    parser = common.arguments(__doc__)
    add = parser.add_argument
    number = common.number
    recipe = "set of defaults (default: paper on an NVIDIA GPU, else short)"
    add("--recipe", choices=list(RECIPES), help=recipe)
    add("--weighting", choices=WEIGHTINGS, help="weights of the loss (default: the recipe's)")
    add("--width", type=number(int, 4, 1024), help="channels of the U-Net (default: the recipe's)")
    add("--T", type=number(int, 2, 10000), help="number of diffusion steps (default: 1000)")
    add("--schedule", choices=SCHEDULES, help="noise schedule (default: linear)")
    add("--labels", **common.SWITCH, help="tell the network the labels, to draw chosen digits")
    add("--digit", help="with --sample: the label to draw (default: a row of each)")
    guidance = "with --sample: more gives clearer, less varied images (default: 0)"
    add("--guidance", type=number(float, 0, 100), default=0.0, help=guidance)
    steps = f"steps of the sampler (default: {STEPS}; T gives Ho's sampler)"
    add("--steps", type=number(int, 1, 10000), help=steps)
    eta = "noise added in sampling, from 1, Ho's, to 0, none (default: 1)"
    add("--eta", type=number(float, 0, 1), default=1.0, help=eta)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = common.start(args)
    out = Path(args.out)
    if args.sample:
        model = common.load_for_sampling(args, out / "ddpm.pt", load, device)
        check_sampling(args, model.settings)
        draw_samples(model, args.sample, args, device, out / "ddpm_sample.png")
        common.log(f"wrote {out / 'ddpm_sample.png'}")
    else:
        settings, _ = common.find_run(args, out / "ddpm.pt", defaults(args, device), CODE)
        check_sampling(args, vars(settings))
        model, history = train(args, device)
        if common.RANK == 0:
            draw(model, history, args, device)
        common.log(f"wrote the pictures ddpm_* in {out}/")


if __name__ == "__main__":
    common.run(main)
