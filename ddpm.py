"""A denoising diffusion model on MNIST: its math and sampling, network, training, and its bound.

Ho is Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), report
the course report whose experiment this redoes (README.md).  q adds noise to an image x_0 in T
fixed steps; p takes it away in T learned ones, trained to lower a bound on -log p(x_0):

    -log p(x_0)  <=  L_T + Σ_{t=2..T} L_{t-1} + L_0     Ho (3) and (5), report (54) and (64)
    L_T     = KL(q(x_T|x_0) || N(0, I))
    L_{t-1} = E_q KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t))
    L_0     = E_q[-log p(x_0|x_1)], which is -L_0 in the report

x are images (B, C, H, W) in [0, 1]; x0 and xt are on the scale [-1, 1]; t is (B,) int64 in
1 ... T, the paper's t: every table has T+1 entries, and entry 0 stands for "no noise yet".

  python ddpm.py                           train, or go on; then draw pictures
  python ddpm.py --recipe paper            Ho's and the report's objective, 100 epochs
  python ddpm.py --sample 64 --steps 20    draw 64 images from the checkpoint in results/
"""

import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

SCHEDULES = ("linear", "cosine")
SIGMAS = ("posterior", "beta")  # σ_t² = β̃_t or β_t
LOSSES = ("simple", "bound", "mu", "x0", "v")
TIMES = ("uniform", "focused")


def to_model(x):
    """[0, 1] -> [-1, 1].  Ho, section 3.3"""
    return 2 * x - 1


def to_image(x0):
    """[-1, 1] -> [0, 1], clamped."""
    return ((x0 + 1) / 2).clamp(0, 1)


def at(table, t, x):
    """table[t], shaped to multiply x: (T+1,), (B,), (B, C, H, W) -> (B, 1, 1, 1)."""
    return table[t].to(x.dtype).view(-1, 1, 1, 1)


# ---- the math


def make_alpha_bar(schedule, T):
    """ᾱ_0 = 1, ᾱ_1 ... ᾱ_T in float64, (T+1,), from the variances β_t of the steps' noise.

    linear: β from 1e-4 to 0.02 (Ho, section 4), times 1000/T, so that x_T is noise for all T > 1.
    cosine: Nichol & Dhariwal 2021 (17).  ValueError for another schedule, and for T < 1.
    Ho (2), report (32)
    """
    common.check_range("T", T, 1)
    common.check_choice("schedule", schedule, SCHEDULES)
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    else:
        t = torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - f[1:] / f[:-1]
    alpha = 1 - beta.clamp(max=0.999)
    return F.pad(alpha.cumprod(0), (1, 0), value=1.0)  # ᾱ_t = Π_{s=1..t} α_s   Ho (4)


def draw_t(n, T, times="uniform", device="cpu"):
    """Steps to train n images at, (n,) in 1 ... T.  Ho, Algorithm 1

    focused: three quarters are T sigmoid(u/2 - 0.6), u ~ N(0, 1), half of them within 0.28 T and
    0.43 T, where a digit takes its shape (after Esser et al. 2024, section 3.1); the others
    (T+1)^u, u ~ U(0, 1), for most bits are paid at the finest steps.
    """
    common.check_choice("times", times, TIMES)
    if times == "uniform":
        return torch.randint(1, T + 1, (n,), device=device)  # t ~ U{1 ... T}
    middle = (T * torch.sigmoid(torch.randn(n, device=device) / 2 - 0.6)).ceil()
    fine = ((T + 1) ** torch.rand(n, device=device)).floor()
    t = torch.where(torch.rand(n, device=device) < 0.75, middle, fine)
    return t.long().clamp(1, T)


class DDPM(nn.Module):
    """q, p, the loss and the sampler for a network net(xt, t), which is ε_θ(x_t, t).

    T: number of steps.  schedule: "linear", "cosine", or a table ᾱ_0 ... ᾱ_T, which gives T.
    sigma: σ_t², the variance of p, is "posterior" (β̃_t) or "beta" (β_t).  Ho, section 3.2
    clip: keep x̂_0 within [-1, 1], as Ho's code does, when sampling and in the bound.
    loss: how the loss weighs each t.  shape: (C, H, W) of an image.  ValueError for other values.
    """

    def __init__(
        self,
        net,
        T=1000,
        schedule="linear",
        sigma="posterior",
        clip=True,
        loss="simple",
        shape=(1, 28, 28),
    ):
        super().__init__()
        common.check_choice("sigma", sigma, SIGMAS)
        common.check_choice("loss", loss, LOSSES)
        alpha_bar = make_alpha_bar(schedule, T) if isinstance(schedule, str) else schedule
        self.net = net
        self.T = len(alpha_bar) - 1
        self.sigma = sigma
        self.clip = clip
        self.shape = tuple(shape)

        before = torch.cat([alpha_bar[:1], alpha_bar[:-1]])  # ᾱ_{t-1}, in entry 0 ᾱ_0
        alpha = alpha_bar / before
        beta = 1 - alpha
        rest = (1 - alpha_bar).clamp(min=1e-300)  # 1 - ᾱ_t, no 0/0 in entry 0
        beta_tilde = (1 - before) / rest * beta  # β̃_t   Ho (7)
        variance = beta.clone()  # σ_t²
        if sigma == "posterior" and self.T > 1:
            variance = beta_tilde.clone()
            variance[1] = beta_tilde[2]  # β̃_1 = 0 cannot be a decoder's
        variance[0] = 1
        weights = {
            "simple": torch.ones_like(beta),  # Ho (14), report (74)
            "bound": beta**2 / (2 * variance * alpha * rest),  # Ho (12), report (73)
            "mu": beta**2 / (alpha * rest),
            "x0": rest / alpha_bar,
            "v": 1 / alpha_bar,
        }
        tables = {
            "tau": torch.arange(self.T + 1),  # see respace
            "alpha": alpha,
            "alpha_bar": alpha_bar,
            "alpha_bar_before": before,
            "beta": beta,
            "beta_tilde": beta_tilde,
            "variance": variance,
            "signal_rate": alpha_bar.sqrt(),  # x_t = signal_rate x_0 + noise_rate ε   Ho (4)
            "noise_rate": (1 - alpha_bar).sqrt(),
            "mu_x0": before.sqrt() * beta / rest,  # μ̃_t = mu_x0 x_0 + mu_xt x_t   Ho (7)
            "mu_xt": alpha.sqrt() * (1 - before) / rest,
            "weight": weights[loss],
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn, recurse=True):
        """What .to() and .bfloat16() call: tables follow the device, but keep their precision."""
        tables = set(self.buffers())

        def keep(x):
            return x.to(fn(x).device) if x in tables else fn(x)

        return super()._apply(keep, recurse)

    # The forward process q.

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t|x_0) by the noise eps ~ N(0, I): like x0.  Report (40) and (41)"""
        return at(self.signal_rate, t, x0) * x0 + at(self.noise_rate, t, x0) * eps  # Ho (4)

    def q_posterior(self, x0, xt, t):
        """q(x_{t-1}|x_t, x_0): mean like xt, variance (B, 1, 1, 1).  Ho (6), report (65)"""
        mean = at(self.mu_x0, t, xt) * x0 + at(self.mu_xt, t, xt) * xt  # μ̃_t   Ho (7)
        return mean, at(self.beta_tilde, t, xt)  # β̃_t   Ho (7), report (66)

    # The reverse process p.

    def predict_x0(self, xt, t):
        """x̂_0(x_t, t), the guess at x_0 that ε_θ means: like xt.  Report (67)"""
        noise = at(self.noise_rate, t, xt) * self.net(xt, self.tau[t])  # t unless respaced
        x0_hat = (xt - noise) / at(self.signal_rate, t, xt)  # Ho (15)
        return x0_hat.clamp(-1, 1) if self.clip else x0_hat

    def p_mean_variance(self, xt, t, x0_hat=None):
        """p(x_{t-1}|x_t) = N(mean, variance I): mean like xt, variance (B, 1, 1, 1).

        Without clipping the mean is Ho (11), report (72).  x0_hat: of predict_x0, if computed.
        Ho (1), report (42)
        """
        if x0_hat is None:
            x0_hat = self.predict_x0(xt, t)
        mean, _ = self.q_posterior(x0_hat, xt, t)  # μ_θ(x_t, t)   Ho (7) and (11)
        return mean, at(self.variance, t, xt)

    def loss(self, x0, t=None, eps=None):
        """mean(w_t ‖ε - ε_θ(x_t, t)‖²) per pixel: x0 (B, C, H, W) -> scalar.

        To predict μ̃, x_0 or v is to weigh the error of ε_θ (Kingma & Gao 2023, section 2), by w_t
        of the constructor's `loss`.  simple: 1, Ho's L_simple.  bound: that of L_{t-1}.
        mu: ‖μ̃ - μ_θ‖².  x0: ‖x_0 - x̂_0‖².  v: ‖v - v_θ‖², v = √ᾱ_t ε - √(1-ᾱ_t) x_0
        (Salimans & Ho 2022).  t (B,) is uniform, eps normal, unless given.
        Ho, Algorithm 1, (12) and (14), report (73) and (74)
        """
        if t is None:
            t = draw_t(len(x0), self.T, device=x0.device)
        if eps is None:
            eps = torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)  # (B, C, H, W)
        error = (eps - self.net(xt, self.tau[t])) ** 2
        return (at(self.weight, t, xt) * error).mean()  # Ho (14)

    forward = loss  # what DistributedDataParallel and torch.compile wrap

    # Sampling.

    def respace(self, steps):
        """The chain that visits only `steps` of the T times, tau, as a DDPM of its own.

        Its t = 1 ... steps is the network's tau[t], whose q(x_t|x_0) it keeps.
        ValueError unless steps is in 1 ... T.
        Nichol & Dhariwal 2021, section 4; Song et al. 2021, section 4.2 and appendix D.2
        """
        common.check_range("steps", steps, 1, self.T)
        # closer together at small t, where the last gray goes, but no two alike
        i = torch.arange(steps + 1, dtype=torch.float64, device=self.tau.device)
        tau = (self.T * (i / steps) ** 1.5).round().maximum(i).long()
        alpha_bar = self.alpha_bar[tau]
        chain = DDPM(self.net, steps, alpha_bar, self.sigma, self.clip, shape=self.shape)
        chain.tau = self.tau[tau]
        return chain

    def ddim_mean_variance(self, xt, t, x0_hat, eta):
        """√ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-η²β̃_t) ε̂, and η²β̃_t, which for η = 0 is DDIM.

        Song et al. 2021 (12) and (16)
        """
        variance = eta**2 * self.beta_tilde
        eps_rate = (1 - self.alpha_bar_before - variance).clamp(min=0).sqrt()
        # ε by x̂_0, maybe clipped
        eps_hat = (xt - at(self.signal_rate, t, xt) * x0_hat) / at(self.noise_rate, t, xt)
        signal = at(self.alpha_bar_before.sqrt(), t, xt) * x0_hat
        return signal + at(eps_rate, t, xt) * eps_hat, at(variance, t, xt)

    @torch.no_grad()
    def trajectory(self, xt, eta=1.0, start=None):
        """Yields (t, x_t, x̂_0) for t = start ... 1, last (0, x_0, x_0): like xt.

        xt (B, C, H, W) is x_start, by default x_T.  eta: 1 is Ho, Algorithm 2; see
        ddim_mean_variance.  ValueError for eta not in [0, 1], start not in 1 ... T.
        """
        start = self.T if start is None else start
        common.check_range("eta", eta, 0, 1)
        common.check_range("start", start, 1, self.T)
        for step in range(start, 0, -1):  # line 2
            t = torch.full((len(xt),), step, device=xt.device)  # (B,)
            x0_hat = self.predict_x0(xt, t)
            yield step, xt, x0_hat
            if eta == 1:
                mean, variance = self.p_mean_variance(xt, t, x0_hat)
            else:
                mean, variance = self.ddim_mean_variance(xt, t, x0_hat, eta)
            z = torch.randn_like(xt) if step > 1 else torch.zeros_like(xt)  # line 3
            xt = mean + variance.sqrt() * z  # line 4, a draw from Ho (1), report (43)
        yield 0, xt, xt

    def sample(self, n, steps=None, eta=1.0):
        """n images (n, C, H, W) in [0, 1] in `steps` network evaluations, by default T, Ho's.

        eta: 1 is ancestral, 0 DDIM.  ValueError as in respace, trajectory.  Ho, Algorithm 2
        """
        common.check_range("n", n, 0)
        chain = self if steps is None else self.respace(steps)
        xT = torch.randn(n, *self.shape, device=self.beta.device)  # line 1
        if n == 0:
            return xT
        for _, xt, _ in chain.trajectory(xT, eta):
            x0 = xt
        return to_image(x0)


# ---- the network


class Block(nn.Module):
    """Two convolutions, between them a scale and a shift by t (FiLM, Perez et al. 2018).

    h (B, cin, H, W), t embedded as e (B, embed) -> (B, cout, H, W).
    """

    def __init__(self, cin, cout, embed):
        super().__init__()
        # not BatchNorm: a batch mixes all t.  One group is 5 times as fast on a CPU as eight
        self.norm1 = nn.GroupNorm(1, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.film = nn.Linear(embed, 2 * cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a new block is its skip, plus a constant

    def forward(self, h, e):
        film = self.film(e)[:, :, None, None]  # (B, 2 cout, 1, 1)
        scale, shift = film.chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(h)))  # (B, cout, H, W)
        y = self.norm2(y) * (1 + scale) + shift
        y = self.conv2(F.silu(y))
        return self.skip(h) + y


class UNet(nn.Module):
    """ε_θ(x_t, t): (B, channels, H, W), (B,) -> like xt.  ValueError unless 4 divides H and W.

    width channels at half the resolution, 2x2 pixels being folded into channels, twice as many at
    a quarter: 14 x 14 and 7 x 7 for a digit.  schedule and T are the chain's.
    """

    def __init__(self, channels=1, width=64, T=1000, schedule="linear"):
        super().__init__()
        self.width = width
        embed = 128
        layers = [nn.Linear(2 * width, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU()]
        self.time = nn.Sequential(*layers)
        self.enter = nn.Conv2d(12 * channels, width, 3, padding=1)
        self.down = Block(width, width, embed)
        self.pool = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle1 = Block(2 * width, 2 * width, embed)
        self.middle2 = Block(2 * width, 2 * width, embed)
        self.middle3 = Block(2 * width, 2 * width, embed)
        self.unpool = nn.Conv2d(2 * width, width, 3, padding=1)
        self.join = Block(2 * width, width, embed)
        self.up = Block(width, width, embed)
        self.norm = nn.GroupNorm(1, width)
        self.leave = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        alpha_bar = make_alpha_bar(schedule, T)
        self.register_buffer("signal_rate", alpha_bar.sqrt(), persistent=False)
        self.register_buffer("noise_rate", (1 - alpha_bar).sqrt(), persistent=False)

    def forward(self, xt, t):
        if xt.shape[2] % 4 or xt.shape[3] % 4:
            raise ValueError(f"height and width must be multiples of 4, not {xt.shape[2:]}")
        dtype = self.leave.weight.dtype
        # sin and cos of t 10000^(-i/width), i = 0 ... width-1: Vaswani et al. 2017, section 3.5
        i = torch.arange(self.width, device=t.device)
        angle = t[:, None] * torch.exp(-math.log(10000) * i / self.width)  # (B, width)
        e = torch.cat([angle.sin(), angle.cos()], dim=1)
        e = self.time(e.to(dtype))  # (B, embed)
        # ε, were each pixel black or white, as most are: near these it grows with x_t by
        # 1/√(1-ᾱ_t), 100 at t = 1, which is hard to learn
        signal_rate = at(self.signal_rate, t, xt)
        noise_rate = at(self.noise_rate, t, xt)
        black = ((xt + signal_rate) / noise_rate).clamp(-3, 3)
        white = ((xt - signal_rate) / noise_rate).clamp(-3, 3)
        h = torch.cat([xt, black, white], dim=1)  # (B, 3 channels, H, W)
        h = F.pixel_unshuffle(h.to(dtype), 2)  # (B, 12 channels, H/2, W/2)
        h = h.contiguous(memory_format=torch.channels_last)  # fast convolutions
        h = self.enter(h)  # (B, width, H/2, W/2)
        skip = self.down(h, e)
        h = self.pool(skip)  # (B, 2 width, H/4, W/4)
        h = self.middle1(h, e)
        h = self.middle2(h, e)
        h = self.middle3(h, e)
        h = self.unpool(F.interpolate(h, scale_factor=2))  # (B, width, H/2, W/2)
        h = self.join(torch.cat([h, skip], dim=1), e)
        h = self.up(h, e)
        h = self.leave(F.silu(self.norm(h)))  # (B, 4 channels, H/2, W/2)
        v = F.pixel_shuffle(h, 2).to(xt.dtype)  # (B, channels, H, W)
        # at large t, x_t is nearly ε: what is left to learn is v
        return noise_rate * xt + signal_rate * v


# ---- training

RECIPES = {
    # Ho's and the report's objective; network, decay of the rate and averaging are ours
    "paper": {"loss": "simple", "times": "uniform", "width": 64, "epochs": 100, "lr": 1e-3},
    # minutes on two CPU cores
    "short": {"loss": "v", "times": "focused", "width": 32, "epochs": 12, "lr": 4e-3},
    # better digits in few epochs
    "best": {"loss": "v", "times": "focused", "width": 64, "epochs": 100, "lr": 1e-3},
}
CHAIN = {"T": 1000, "schedule": "linear", "sigma": "posterior", "batch_size": 64}
WARM_UP = 0.02  # share of the run in which the learning rate rises
AVERAGED = 0.05  # share of the steps so far over which weights are averaged


def build(settings):
    """The model that a run's settings describe."""
    T = settings["T"]
    schedule = settings["schedule"]
    shape = settings["shape"]
    net = UNet(shape[0], settings["width"], T, schedule)
    net.to(memory_format=torch.channels_last)
    return DDPM(net, T, schedule, settings["sigma"], loss=settings["loss"], shape=shape)


def defaults(args, device):
    """The settings, unless flags or a checkpoint say otherwise."""
    recipe = args.recipe or ("paper" if device.type == "cuda" else "short")
    return {**common.DEFAULTS, **CHAIN, "recipe": recipe, **RECIPES[recipe]}


def train(args, device, watch=None):
    """Ho, Algorithm 1, or what is left of it -> the model with averaged weights, the history.

    args: of parse.  A row of the history: the mean loss in training, the averaged weights' on test
    images, the seconds of training, and what watch(averaged model, epoch) gives.
    OUT/ddpm.pt is written after each epoch.
    """
    path = Path(args.out) / "ddpm.pt"
    settings, saved = common.open_run(args, path, defaults(args, device))  # fills in args
    if saved and len(saved["history"]) == args.epochs:
        return load(path, device), saved["history"]  # finished
    x_train, _, x_test, _ = common.load_data(args, device)  # uint8 (N, C, H, W)
    settings["shape"] = list(x_train.shape[1:])
    torch.manual_seed(10**6 * args.seed)
    model = build(settings).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()  # averages of the weights
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    history = common.restore(saved, model=model, ema=ema, optimizer=optimizer)
    averages = list(ema.parameters())
    parameters = [p.detach() for p in model.parameters()]
    loss_of = common.wrap(model, args)  # its forward

    N = len(x_train)
    B = min(args.batch_size, N)
    steps = N // B
    seconds = history[-1]["seconds"] if history else 0.0
    common.log(f"recipe {args.recipe}; for another, give --recipe and --out")
    common.log({"DDPM on": device, "steps an epoch": steps, **settings})
    bar = tqdm(total=steps * args.epochs, initial=steps * len(history), disable=common.RANK > 0)
    for epoch in range(len(history) + 1, args.epochs + 1):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        torch.manual_seed(10**6 * args.seed + epoch)  # the same after a stop
        order = torch.randperm(N, device=device)[: steps * B].view(steps, B)
        for step, batch in enumerate(common.share(order)):  # Algorithm 1, line 1
            past = (epoch - 1) * steps + step  # updates before this one
            done = (past + 0.5) / (steps * args.epochs)  # share of the run
            warm_up = min(1, done / WARM_UP)
            decay = 0.5 * (1 + math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = args.lr * warm_up * decay

            x0 = to_model(x_train[batch] / 255)  # (B, C, H, W) in [-1, 1], line 2
            t = draw_t(len(x0), args.T, args.times, device)  # (B,) in 1 ... T, line 3
            eps = torch.randn_like(x0)  # line 4
            with common.autocast(device):
                loss = loss_of(x0, t, eps)  # line 5

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch._foreach_lerp_(averages, parameters, 1 / (1 + AVERAGED * past))
            total += loss.detach()
            bar.update()
            if step % 50 == 0:
                bar.set_description(f"DDPM, epoch {epoch}, loss {loss.item():.4g}")

        row = {"epoch": epoch, "train_loss": total.item() / steps}
        seconds += time.perf_counter() - started
        row |= {"test_loss": evaluate(ema, x_test, args.seed), "seconds": seconds}
        if watch:
            row |= watch(ema, epoch)
        history.append(row)
        common.save_checkpoint(path, settings, history, model=model, ema=ema, optimizer=optimizer)
        common.log(row)
    bar.close()
    return ema, history


@torch.no_grad()
def evaluate(model, images, seed):
    """The loss on all images, uint8 (N, C, H, W), t uniform; t and ε are the same each time."""
    total = 0
    with common.fork_seed(seed, images.device), common.autocast(images.device):
        for batch in images.split(500):
            loss = model.loss(to_model(batch / 255))
            total += loss * len(batch)
    return total.item() / len(images)


# ---- the bound


def log_discretized_normal(x0, mean, sigma):
    """log P(x0) of 8-bit pixels, (B,) nats: a level has the normal's mass within half a level.

    x0 (B, C, H, W) in {-1, -1 + 2/255, ..., 1}, mean like x0, sigma > 0 broadcastable.  The levels
    -1 and 1 have the tails, too, so that the 256 probabilities sum to 1.
    """
    level = ((x0.double() + 1) * 127.5).round()  # 0 ... 255; neighbours share their edge
    high = ((level + 0.5) / 127.5 - 1 - mean.double()) / sigma
    low = ((level - 0.5) / 127.5 - 1 - mean.double()) / sigma
    high = torch.where(level == 255, math.inf, high)  # δ_+(1) = ∞   Ho (13)
    low = torch.where(level == 0, -math.inf, low)  # δ_-(-1) = -∞   Ho (13)
    # Φ(high) - Φ(low) = Φ(-low) - Φ(-high), the more exact one in the upper tail
    upper = low > 0
    log_high = torch.special.log_ndtr(torch.where(upper, -low, high))
    log_low = torch.special.log_ndtr(torch.where(upper, -high, low))
    # log(Φ(high) - Φ(low)) = log Φ(high) + log(1 - exp(log Φ(low) - log Φ(high)))
    log_mass = log_high + torch.log(-torch.expm1(log_low - log_high))
    return log_mass.flatten(1).sum(1)  # Ho (13)


@torch.no_grad()
def x0_errors(model, x0):
    """‖x_0 - x̂_0(x_t, t)‖² for one draw of each x_t: (B, C, H, W) -> (B, T+1), column t for t.

    All that the network gives to L_1 ... L_{T-1}, for any variance and any respaced chain.
    """
    errors = torch.zeros(len(x0), model.T + 1, dtype=torch.float64, device=x0.device)
    for step in tqdm(range(1, model.T + 1), "bound", leave=False, delay=2):
        t = torch.full((len(x0),), step, device=x0.device)
        xt = model.q_sample(x0, t, torch.randn_like(x0))
        error = x0 - model.predict_x0(xt, t)
        errors[:, step] = error.double().pow(2).flatten(1).sum(1)
    return errors


@torch.no_grad()
def vlb_terms(model, x0, errors=None):
    """Every term of the bound, by one draw of each x_t: x0 (B, C, H, W) -> (B, T+1) in nats.

    Column 0 is L_0, t-1 is L_{t-1}, T is L_T; bits/dim are nats / (C·H·W·ln 2).  x0 holds 8-bit
    levels.  errors: of x0_errors, if already computed.
    Ho (5), report (54)
    """
    if errors is None:
        errors = x0_errors(model, x0)
    D = x0[0].numel()
    one = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
    x1 = model.q_sample(x0, one, torch.randn_like(x0))
    mean, variance = model.p_mean_variance(x1, one)
    L_0 = -log_discretized_normal(x0, mean, variance.double().sqrt())  # Ho (13)
    # L_{t-1} = KL(N(μ̃_t, β̃_t I) || N(μ_θ, σ_t² I)), mean part: Ho (12), report (73)
    ratio = (model.beta_tilde / model.variance)[2:]
    gap = model.mu_x0[2:] ** 2 * errors[:, 2:]  # ‖μ̃_t - μ_θ‖², (B, T-1)
    L = 0.5 * (D * (ratio - 1 - ratio.log()) + gap / model.variance[2:])  # Ho (8), report (69)
    # KL(N(√a x_0, (1-a) I) || N(0, I)) = ½ Σ (a x_0² - a - log(1-a)) over the pixels, a = ᾱ_T
    a = model.alpha_bar[-1]
    L_T = 0.5 * (a * x0.double() ** 2 - a - torch.log1p(-a)).flatten(1).sum(1)
    return torch.cat([L_0[:, None], L, L_T[:, None]], dim=1)


DDPM.vlb_terms = vlb_terms  # a method that reads better down here


# ---- pictures


def samples(model, n, steps=None, eta=1.0):
    """DDPM.sample, 500 at a time, with a bar; steps: 50, not T."""
    steps = min(steps or 50, model.T)
    counts = [500] * (n // 500) + [n % 500]
    with common.autocast(model.beta.device):
        bar = tqdm(counts, "sampling", leave=False, delay=2)
        return torch.cat([model.sample(count, steps, eta) for count in bar])


def draw_samples(model, n, args, name):
    """n samples in OUT/name, the same at every call for one seed."""
    with common.fork_seed(args.seed, model.beta.device):
        x = samples(model, n, args.steps, args.eta)
    common.plot_grid(x, Path(args.out) / name, f"DDPM, {common.title(vars(args))}: {n} samples")


@torch.no_grad()
def draw(model, history, args, device):
    """The pictures of a trained model, in OUT."""
    out = Path(args.out)
    name = f"DDPM, {common.title(vars(args))}"
    draw_samples(model, 100, args, "ddpm_samples.png")

    torch.manual_seed(args.seed)
    chain = model.respace(min(args.steps or 50, model.T))
    xt = torch.randn(1, *model.shape, device=device)
    with common.autocast(device):
        frames = list(chain.trajectory(xt, args.eta))
    frames = frames[: -1 : math.ceil(chain.T / 50)] + frames[-1:]
    steps, noisy, guess = zip(*frames, strict=True)
    times = [f"t = {chain.tau[step]}" for step in steps]
    panels = {"$x_t$": to_image(torch.cat(noisy)), "$\\hat{x}_0$": to_image(torch.cat(guess))}
    title = f"{name}: from noise to a sample"
    common.save_gif(panels, out / "ddpm_trajectory.gif", title, times)
    first = (len(times) - 1) % 5  # to x_0
    rows = {label: x[first::5] for label, x in panels.items()}
    common.plot_rows(rows, out / "ddpm_trajectory.png", title, times[first::5])

    curves = {f"training, t {args.times}": "train_loss", "test, averaged weights": "test_loss"}
    path = out / "ddpm_loss.png"
    common.plot_curves(history, curves, path, name, f"loss {args.loss}, per pixel")


def load(path, device="cpu"):
    """The trained DDPM of a checkpoint.  common.InputError for any other file."""
    return common.load_model(path, "ddpm", "ema", device, build)


def parse(argv):
    """The command line -> args, None for what train fills in."""
    parser = common.arguments(__doc__)
    add = parser.add_argument
    number = common.number
    add("--recipe", choices=list(RECIPES), help="other defaults (GPU: paper, CPU: short)")
    add("--loss", choices=LOSSES, help="weight of each t in the loss")
    add("--times", choices=TIMES, help="how t is drawn in training")
    add("--width", type=number(int, 4, 1024), help="channels of the U-Net")
    add("--T", type=number(int, 2, 10000), help="steps of the chain (1000)")
    add("--schedule", choices=SCHEDULES, help="of the noise (linear)")
    add("--sigma", choices=SIGMAS, help="σ_t²: β̃_t or β_t (posterior); η²β̃_t for --eta below 1")
    add("--steps", type=number(int, 1, 10000), help="evaluations per sample (50)")
    add("--eta", type=number(float, 0, 1), default=1.0, help="1: ancestral sampling, 0: DDIM (1)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = common.start(args)
    path = Path(args.out) / "ddpm.pt"
    if not args.sample:
        model, history = train(args, device)
    if common.RANK > 0:
        return  # one process draws
    if args.sample:
        common.open_run(args, path, defaults(args, device))
        draw_samples(load(path, device), args.sample, args, "ddpm_sample.png")
    else:
        draw(model, history, args, device)
    common.log(f"wrote the pictures ddpm_* in {path.parent}/")


if __name__ == "__main__":
    common.run(main)
