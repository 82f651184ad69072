"""A denoising diffusion model on MNIST, in the order of the paper: math, network, training, pictures.

Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), is Ho in the comments;
report is the course report whose experiment this redoes (see README.md).  q adds noise to an image x_0 in T
fixed steps, p takes it away again in T learned ones, and p is trained to raise a lower bound on log p(x_0):

    -log p(x_0)  <=  L_T + Σ_{t=2..T} L_{t-1} + L_0     Ho (3) and (5), report (54) and (64)
    L_T     = KL(q(x_T|x_0) || N(0, I))
    L_{t-1} = E_q KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t))
    L_0     = E_q[-log p(x_0|x_1)], which is -L_0 in the report

x are images (B, C, H, W) in [0, 1]; x0 and xt are on the scale [-1, 1]; t is (B,) int64 in 1 ... T, the
paper's t: every table has T+1 entries, and entry 0 stands for "no noise yet".

  python ddpm.py                           train, then draw samples, a trajectory and the loss curve
  python ddpm.py --recipe paper            Ho's and the report's objective, 100 epochs; short: CPU minutes
  python ddpm.py --sample 64 --steps 20    draw 64 images from the checkpoint in results/, in 20 steps
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


def to_model(x):
    """[0, 1] -> [-1, 1].  Ho, section 3.3"""
    return 2 * x - 1


def to_image(x0):
    """[-1, 1] -> [0, 1], clamped."""
    return ((x0 + 1) / 2).clamp(0, 1)


def at(table, t, x):
    """table[t] for a batch of t, shaped to multiply x: (T+1,), (B,), (B, C, H, W) -> (B, 1, 1, 1)."""
    return table[t].to(x.dtype).view(-1, *[1] * (x.dim() - 1))


# The math.

def make_beta(schedule, T):
    """β_1 ... β_T in float64, (T,): the variance of the noise that step t adds.  Ho (2), report (32)

    linear: from 1e-4 to 0.02 (Ho, section 4); where T is not 1000, times 1000/T, so that x_T is always noise.
    cosine: Nichol & Dhariwal 2021 (17).  Raises ValueError for another schedule.
    """
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    elif schedule == "cosine":
        t = torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - f[1:] / f[:-1]
    else:
        raise ValueError(f"schedule must be linear or cosine, not {schedule!r}")
    return beta.clamp(max=0.999)


def log_discretized_normal(x0, mean, sigma):
    """log P(x0) in nats of 8-bit pixels: each level gets the normal's mass within half a level of it.

    x0 (B, C, H, W) in {-1, -1 + 2/255, ..., 1}, mean like x0, sigma > 0 broadcastable; returns (B,).  The
    levels -1 and 1 also get the tail beyond them, so that the 256 levels' probabilities sum to 1.
    """
    level, mean = ((x0.double() + 1) * 127.5).round(), mean.double()  # 0 ... 255; neighbours share their edge
    high, low = ((level + 0.5) / 127.5 - 1 - mean) / sigma, ((level - 0.5) / 127.5 - 1 - mean) / sigma
    high = torch.where(level == 255, math.inf, high)  # δ_+(1) = ∞   Ho (13)
    low = torch.where(level == 0, -math.inf, low)  # δ_-(-1) = -∞   Ho (13)
    # Φ(high) - Φ(low) = Φ(-low) - Φ(-high): in the upper tail, where Φ is 1 to all digits, take the second
    high, low = torch.where(low > 0, -low, high), torch.where(low > 0, -high, low)
    # log(Φ(high) - Φ(low)) = log Φ(high) + log(1 - exp(log Φ(low) - log Φ(high)))
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return (log_high + torch.log(-torch.expm1(log_low - log_high))).flatten(1).sum(1)  # Ho (13)


class DDPM(nn.Module):
    """q, p, the losses, the bound and the sampler for a network net(xt, t).

    T: number of steps.  schedule: of make_beta; or the table ᾱ_0 ... ᾱ_T itself, which then gives T.
    predict: what the network's output stands for: "eps" (ε), "x0" (x_0), "mu" (μ̃) or "v" (see v_from_x0).
    sigma: the variance of p(x_{t-1}|x_t): "beta" (β_t) or "posterior" (β̃_t).
    clip: keep the predicted x_0 within [-1, 1], as Ho's code does, when sampling and in the bound.
    shape: (C, H, W) of an image, on which sample starts.
    """

    def __init__(self, net, T=1000, schedule="linear", predict="eps", sigma="beta", clip=False,
                 shape=(1, 28, 28)):
        super().__init__()
        if predict not in ("eps", "x0", "mu", "v"):
            raise ValueError(f"predict must be eps, x0, mu or v, not {predict!r}")
        if sigma not in ("beta", "posterior"):
            raise ValueError(f"sigma must be beta or posterior, not {sigma!r}")
        self.net, self.predict, self.sigma, self.clip, self.shape = net, predict, sigma, clip, tuple(shape)
        if isinstance(schedule, str):
            alpha_bar = (1 - make_beta(schedule, T)).cumprod(0)  # ᾱ_t = Π_{s=1..t} α_s   Ho (4)
            schedule = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])
        alpha_bar = schedule.double()
        self.T = len(alpha_bar) - 1
        alpha_bar_prev = torch.cat([alpha_bar[:1], alpha_bar[:-1]])  # ᾱ_{t-1}, in entry 0 ᾱ_0
        alpha = alpha_bar / alpha_bar_prev  # 1 in entry 0, and so β_0 = 0
        beta = 1 - alpha
        one_minus = (1 - alpha_bar).clamp(min=1e-300)  # 1 - ᾱ_t, without 0/0 in entry 0
        beta_tilde = (1 - alpha_bar_prev) / one_minus * beta  # β̃_t   Ho (7)
        # σ_t²: β_t is the best for x_0 ~ N(0, I), β̃_t for an x_0 that is one point (Ho, section 3.2).
        # β̃_1 = 0 cannot be a decoder's: β̃_2 is used at t = 1
        variance = beta.clone() if sigma == "beta" else beta_tilde.clone()
        variance[1] = beta[1] if sigma == "beta" or self.T == 1 else beta_tilde[2]
        tables = dict(
            alpha_bar=alpha_bar, alpha_bar_prev=alpha_bar_prev, alpha=alpha, beta=beta,
            beta_tilde=beta_tilde, variance=variance,
            c_x0=alpha_bar_prev.sqrt() * beta / one_minus,  # μ̃_t = c_x0 x_0 + c_xt x_t   Ho (7)
            c_xt=alpha.sqrt() * (1 - alpha_bar_prev) / one_minus)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)  # (T+1,)
        self.register_buffer("tau", torch.arange(self.T + 1), persistent=False)  # see respace

    # The forward process.

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t|x_0) made from the noise eps ~ N(0, I), which is like x0.  Report (40) and (41)"""
        return at(self.alpha_bar.sqrt(), t, x0) * x0 + at((1 - self.alpha_bar).sqrt(), t, x0) * eps  # Ho (4)

    def q_posterior(self, x0, xt, t):
        """q(x_{t-1}|x_t, x_0): mean like xt, and variance (B, 1, 1, 1).  Ho (6), report (65)"""
        mean = at(self.c_x0, t, xt) * x0 + at(self.c_xt, t, xt) * xt  # μ̃_t   Ho (7)
        return mean, at(self.beta_tilde, t, xt)  # β̃_t   Ho (7), report (66)

    # Given x_t, each of ε, x_0, μ̃ and v determines the others.

    def x0_from_eps(self, xt, t, eps):
        """x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t"""
        noise = at((1 - self.alpha_bar).sqrt(), t, xt) * eps
        return (xt - noise) / at(self.alpha_bar.sqrt(), t, xt)  # Ho (15), report (67)

    def eps_from_x0(self, xt, t, x0):
        """ε = (x_t - √ᾱ_t x_0) / √(1-ᾱ_t)"""
        return (xt - at(self.alpha_bar.sqrt(), t, xt) * x0) / at((1 - self.alpha_bar).sqrt(), t, xt)  # Ho (4)

    def mu_from_eps(self, xt, t, eps):
        """μ̃_t = (x_t - β_t/√(1-ᾱ_t) ε) / √α_t, which is μ_θ for ε = ε_θ(x_t, t): report (72)"""
        scale = self.beta / (1 - self.alpha_bar).clamp(min=1e-300).sqrt()
        return (xt - at(scale, t, xt) * eps) / at(self.alpha.sqrt(), t, xt)  # Ho (10) and (11), report (68)

    def x0_from_mu(self, xt, t, mu):
        """μ̃ solved for x_0.  The way back, x_0 -> μ̃, is q_posterior."""
        return (mu - at(self.c_xt, t, xt) * xt) / at(self.c_x0, t, xt)  # Ho (7)

    def v_from_x0(self, xt, t, x0):
        """v = √ᾱ_t ε - √(1-ᾱ_t) x_0, which is also (√ᾱ_t x_t - x_0) / √(1-ᾱ_t).

        ‖v - v_θ‖² = ‖ε - ε_θ‖² / ᾱ_t = ‖x_0 - x̂_0‖² / (1-ᾱ_t): as a loss it is Ho (14) with more weight on
        the noisy steps.  Salimans & Ho 2022, appendix D
        """
        return (at(self.alpha_bar.sqrt(), t, xt) * xt - x0) / at((1 - self.alpha_bar).sqrt(), t, xt)

    def x0_from_v(self, xt, t, v):
        """x_0 = √ᾱ_t x_t - √(1-ᾱ_t) v"""
        return at(self.alpha_bar.sqrt(), t, xt) * xt - at((1 - self.alpha_bar).sqrt(), t, xt) * v

    # The reverse process.

    def predict_x0(self, xt, t):
        """x̂_0(x_t, t), the network's guess at x_0, whatever it predicts: like xt."""
        out = self.net(xt, t).to(xt.dtype)
        if self.predict != "x0":
            convert = {"eps": self.x0_from_eps, "mu": self.x0_from_mu, "v": self.x0_from_v}[self.predict]
            out = convert(xt, t, out)
        return out.clamp(-1, 1) if self.clip else out

    def p_mean_variance(self, xt, t, x0_hat=None):
        """p(x_{t-1}|x_t) = N(mean, variance I): mean like xt, variance (B, 1, 1, 1).  Ho (1), report (42)

        The mean is q's with x̂_0 for x_0; for predict="eps" without clipping that is Ho (11), report (72)
        x0_hat: of predict_x0, if already computed.
        """
        x0_hat = self.predict_x0(xt, t) if x0_hat is None else x0_hat
        mean, _ = self.q_posterior(x0_hat, xt, t)  # μ_θ: μ̃_t with x̂_0 for x_0   Ho (7) and (11)
        return mean, at(self.variance, t, xt)

    # The loss and the bound.

    def draw_t(self, n, focused=False):
        """Steps for n images, (n,): t ~ U{1 ... T}.  Ho, Algorithm 1

        focused: three quarters are instead T sigmoid(u/2 - 0.6) with u ~ N(0, 1), mostly from 0.2 T to 0.6 T,
        where under the linear schedule a digit takes its shape (after Esser et al. 2024, section 3.1); the
        others (T+1)^u, u ~ U(0, 1), as many from each power of ten: most bits are paid at the finest steps.
        """
        device = self.beta.device
        if not focused:
            return torch.randint(1, self.T + 1, (n,), device=device)  # 1 ... T, both inclusive
        middle = (self.T * torch.sigmoid(torch.randn(n, device=device) / 2 - 0.6)).ceil()
        fine = ((self.T + 1) ** torch.rand(n, device=device)).floor()
        t = torch.where(torch.rand(n, device=device) < 0.75, middle, fine)
        return t.long().clamp(1, self.T)

    def loss(self, x0, t=None, eps=None):
        """L_simple: the mean squared error per pixel of what the network predicts; x0 (B, C, H, W) -> scalar.

        t and eps are drawn unless given.  The bound itself weighs each t by bound_weight: Ho (12).
        Ho, Algorithm 1 and (14), report (74)
        """
        t = self.draw_t(len(x0)) if t is None else t  # (B,)
        eps = torch.randn_like(x0) if eps is None else eps  # like x0
        xt = self.q_sample(x0, t, eps)
        if self.predict == "eps":
            target = eps
        elif self.predict == "x0":
            target = x0
        elif self.predict == "mu":
            target, _ = self.q_posterior(x0, xt, t)
        else:
            target = self.v_from_x0(xt, t, x0)
        return F.mse_loss(self.net(xt, t).to(xt.dtype), target)  # per pixel   Ho (14)

    def bound_weight(self, t):
        """The weight of ‖ε - ε_θ‖² in L_{t-1}, that L_simple sets to 1: (B,) -> (B,), for t > 1."""
        beta, alpha, alpha_bar, variance = self.beta[t], self.alpha[t], self.alpha_bar[t], self.variance[t]
        return beta ** 2 / (2 * variance * alpha * (1 - alpha_bar))  # Ho (12), report (73)

    def L_between(self, error, t, dim):
        """L_{t-1} for t > 1 in nats, closed form, from error = ‖x_0 - x̂_0‖²: error and t (...) -> (...).

        KL(N(μ̃_t, β̃_t I) || N(μ_θ, σ_t² I)), whose means differ by c_x0 (x_0 - x̂_0), in dim dimensions.
        Ho (8), report (69); its last term, written in ε, is Ho (12), report (73)
        """
        ratio = (self.beta_tilde / self.variance)[t]
        gap = self.c_x0[t] ** 2 * error  # ‖μ̃_t - μ_θ‖²
        return 0.5 * (dim * (ratio - 1 - ratio.log()) + gap / self.variance[t])  # with its constant   Ho (8)

    @torch.no_grad()
    def x0_errors(self, x0):
        """‖x_0 - x̂_0(x_t, t)‖² for one draw of each x_t: x0 (B, C, H, W) -> (B, T+1), column t for t.

        Column 0 is 0.  It is all that the network contributes to L_1 ... L_{T-1}, under any variance and for
        any respaced chain.
        """
        errors = torch.zeros(len(x0), self.T + 1, dtype=torch.float64, device=x0.device)
        for s in range(1, self.T + 1):
            t = torch.full((len(x0),), s, device=x0.device)
            xt = self.q_sample(x0, t, torch.randn_like(x0))
            errors[:, s] = (x0 - self.predict_x0(xt, t)).double().pow(2).flatten(1).sum(1)
        return errors

    @torch.no_grad()
    def vlb_terms(self, x0, errors=None):
        """Every term of the bound, one Monte Carlo draw of each x_t: x0 (B, C, H, W) -> (B, T+1) in nats.

        Column 0 is L_0, column t-1 is L_{t-1}, column T is L_T; their sum is >= -log P(x0) in expectation;
        bits/dim are nats / (C·H·W·ln 2).  x0 holds 8-bit levels.  errors: of x0_errors, if already computed.
        Ho (5), report (54) with L_0's sign as in Ho
        """
        errors = self.x0_errors(x0) if errors is None else errors
        one = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
        mean, variance = self.p_mean_variance(self.q_sample(x0, one, torch.randn_like(x0)), one)
        L_0 = -log_discretized_normal(x0, mean, variance.double().sqrt())  # Ho (13)
        t = torch.arange(2, self.T + 1, device=x0.device)
        L_between = self.L_between(errors[:, 2:], t, x0[0].numel())  # Ho (8)
        a = self.alpha_bar[-1]  # ᾱ_T
        # KL(N(√a x_0, (1-a) I) || N(0, I)) = ½ Σ (a x_0² - a - log(1-a)), over the pixels
        L_T = 0.5 * (a * x0.double() ** 2 - a - torch.log1p(-a)).flatten(1).sum(1)
        return torch.cat([L_0[:, None], L_between, L_T[:, None]], dim=1)

    # Sampling.

    def respace(self, steps):
        """The chain that visits only `steps` of the T times, as a DDPM of its own with the same network.

        Its step i is at time tau[i] of this one.  q(x_t|x_0) stays what it was there, so the network need not
        be trained anew.  Raises ValueError unless steps is in 1 ... T.
        Nichol & Dhariwal 2021, section 4; Song et al. 2021, section 4.2
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be from 1 to T = {self.T}, not {steps}")
        # τ_0 = 0 < τ_1 < ... < τ_steps = T
        tau = torch.linspace(0, self.T, steps + 1, dtype=torch.float64).round().long().to(self.beta.device)
        chain = DDPM(lambda xt, t: self.predict_x0(xt, tau[t]), schedule=self.alpha_bar[tau], predict="x0",
                     sigma=self.sigma, clip=self.clip, shape=self.shape).to(self.beta.device)
        chain.tau = self.tau[tau]
        return chain

    def ddim_mean_variance(self, xt, t, x0_hat, eta):
        """√ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-η²β̃_t) ε̂, and η²β̃_t: x_{t-1} keeps the variance of q(x_{t-1}|x_0).

        For η = 1 the mean is μ̃_t, for η = 0 there is no noise at all: DDIM.  Song et al. 2021 (12) and (16)
        """
        variance = eta ** 2 * self.beta_tilde
        spread = (1 - self.alpha_bar_prev - variance).clamp(min=0)  # rounding could leave it below 0
        eps_hat = self.eps_from_x0(xt, t, x0_hat)
        mean = at(self.alpha_bar_prev.sqrt(), t, xt) * x0_hat + at(spread.sqrt(), t, xt) * eps_hat
        return mean, at(variance, t, xt)

    @torch.no_grad()
    def trajectory(self, xt, eta=1.0, start=None):
        """Yields (t, x_t, x̂_0) for t = start ... 1, last (0, x_0, x_0): like xt, on the scale [-1, 1].

        xt (B, C, H, W) is x_start; start=None stands for T.
        eta = 1: Ho, Algorithm 2, a draw from Ho (1), report (43); less: see ddim_mean_variance.
        """
        for s in range(self.T if start is None else start, 0, -1):  # line 2
            t = torch.full((len(xt),), s, device=xt.device)  # (B,)
            x0_hat = self.predict_x0(xt, t)
            yield s, xt, x0_hat
            if eta == 1:
                mean, variance = self.p_mean_variance(xt, t, x0_hat)
            else:
                mean, variance = self.ddim_mean_variance(xt, t, x0_hat, eta)
            z = torch.randn_like(xt) if s > 1 else torch.zeros_like(xt)  # line 3
            xt = mean + variance.sqrt() * z  # line 4, the mean by way of x̂_0
        yield 0, xt, xt

    def sample(self, n, steps=None, eta=1.0):
        """n images (n, C, H, W) in [0, 1].  Ho, Algorithm 2

        steps: how many network evaluations, None for T.  eta: 1 is ancestral, 0 is deterministic DDIM.
        """
        chain = self if steps in (None, self.T) else self.respace(steps)
        xt = torch.randn(n, *self.shape, device=self.beta.device)  # line 1
        for _, xt, _ in chain.trajectory(xt, eta):
            pass
        return to_image(xt)


# The network.

class Block(nn.Module):
    """Two convolutions, between them a scale and a shift by t (FiLM, Perez et al. 2018), added to the input.

    h (B, cin, H, W), e (B, embed), which is t embedded -> (B, cout, H, W).
    """

    def __init__(self, cin, cout, embed):
        super().__init__()
        # GroupNorm and not BatchNorm: a batch mixes all t, whose statistics have nothing in common.  One
        # group is as good here as eight, and 5 to 10 times as fast on a CPU in bfloat16 and channels_last
        self.norm1, self.conv1 = nn.GroupNorm(1, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(1, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.film = nn.Linear(embed, 2 * cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a new block is the identity

    def forward(self, h, e):
        scale, shift = self.film(e)[:, :, None, None].chunk(2, dim=1)  # (B, cout, 1, 1) each
        y = self.conv1(F.silu(self.norm1(h)))  # (B, cout, H, W)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.skip(h) + y


class UNet(nn.Module):
    """net(xt, t): (B, channels, H, W), (B,) -> like xt; H and W are multiples of 2^len(widths).

    widths: channels of each level.  The first works at half the resolution, on 2x2 pixels folded into
    channels (at the full one most of the time would go into the cheapest features), each further one at half
    of the one before: 14 x 14 and 7 x 7 for a digit.
    """

    def __init__(self, channels=1, widths=(64, 128), embed=128):
        super().__init__()
        self.first = first = widths[0]
        self.time = nn.Sequential(nn.Linear(2 * first, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU())
        self.enter = nn.Conv2d(4 * channels, first, 3, padding=1)
        pairs = list(zip(widths, widths[1:]))  # of each level and the one below
        self.down = nn.ModuleList(Block(high, high, embed) for high, low in pairs)
        self.pool = nn.ModuleList(nn.Conv2d(high, low, 3, stride=2, padding=1) for high, low in pairs)
        self.middle = nn.ModuleList(Block(widths[-1], widths[-1], embed) for _ in range(2))
        self.unpool = nn.ModuleList(nn.Conv2d(low, high, 3, padding=1) for high, low in reversed(pairs))
        self.join = nn.ModuleList(Block(2 * high, high, embed) for high, low in reversed(pairs))
        self.up = nn.ModuleList(Block(high, high, embed) for high, low in reversed(pairs))
        self.norm, self.leave = nn.GroupNorm(1, first), nn.Conv2d(first, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, xt, t):
        # sin and cos of t 10000^(-i/first), i = 0 ... first-1: Vaswani et al. 2017, section 3.5
        frequency = torch.exp(-math.log(10000) * torch.arange(self.first, device=t.device) / self.first)
        angle = t[:, None] * frequency  # (B, first)
        e = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, embed)
        h = F.pixel_unshuffle(xt, 2)  # (B, 4·channels, H/2, W/2)
        h = h.contiguous(memory_format=torch.channels_last)  # the layout in which convolutions are fast
        h, skips = self.enter(h), []  # (B, widths[0], H/2, W/2)
        for down, pool in zip(self.down, self.pool):
            h = down(h, e)
            skips.append(h)
            h = pool(h)  # (B, widths[1], H/4, W/4), and so on
        for block in self.middle:
            h = block(h, e)
        for unpool, join, up in zip(self.unpool, self.join, self.up):
            h = unpool(F.interpolate(h, scale_factor=2))
            h = join(torch.cat([h, skips.pop()], dim=1), e)
            h = up(h, e)  # (B, widths[0], H/2, W/2) in the end
        return F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)  # (B, channels, H, W)


class Eps(nn.Module):
    """ε_θ(x_t, t) = √(1-ᾱ_t) x_t + √ᾱ_t net(x_t, t), so that what is left to net is v (see v_from_x0).

    At large t, x_t is ε to within a hundredth, and x̂_0 divides the error of ε_θ by √ᾱ_t: a network that
    first has to learn to copy x_t gives, for many epochs, a worse x̂_0 there than one that ignores x_t.
    """

    def __init__(self, net, alpha_bar):
        super().__init__()
        self.net = net
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)

    def forward(self, xt, t):
        v = self.net(xt, t)  # like xt
        return at((1 - self.alpha_bar).sqrt(), t, xt) * xt + at(self.alpha_bar.sqrt(), t, xt) * v


# Training.

RECIPES = {
    # Ho's and the report's objective and chain; network, learning-rate decay and averaging are ours
    "paper": dict(predict="eps", focused=False, widths=(64, 128), epochs=100, batch_size=64, lr=1e-3),
    # the same for a few CPU minutes: v and focused t learn digits in fewer steps
    "short": dict(predict="v", focused=True, widths=(32, 64), epochs=12, batch_size=64, lr=4e-3)}


def build(settings):
    """The model that settings, a dict with recipe, T, schedule, sigma and shape, describe."""
    recipe, size = RECIPES[settings["recipe"]], min(settings["shape"][1:]) // 4
    widths = recipe["widths"]
    while size > 8 and size % 2 == 0:  # a larger image takes more levels, for the lowest to see it whole
        size, widths = size // 2, (*widths, widths[-1])
    net = UNet(settings["shape"][0], widths).to(memory_format=torch.channels_last)
    model = DDPM(net, settings["T"], settings["schedule"], recipe["predict"], settings["sigma"], clip=True,
                 shape=settings["shape"])
    if model.predict == "eps":
        model.net = Eps(net, model.alpha_bar)
    return model


def train(args, device, watch=None):
    """Ho, Algorithm 1 -> the model with its averaged weights, the history.

    args: of parse; what it leaves open is filled in, by the recipe.  A row of the history: the epoch, the
    mean loss on training images, that of the averaged weights on test images, the seconds of training so far.
    watch(averaged model, epoch) -> a dict of more numbers for the row.  OUT/ddpm.pt is written each epoch.
    """
    path, default = Path(args.out) / "ddpm.pt", "paper" if device.type == "cuda" else "short"
    why = "the checkpoint's" if args.resume else "as given" if args.recipe else f"default on {device.type}"
    recipe = RECIPES[args.recipe or default]
    settings, saved = common.settle(  # fills in args, too
        args, path, recipe=args.recipe or default, T=1000, schedule="linear", sigma="posterior",
        epochs=recipe["epochs"], batch_size=recipe["batch_size"], lr=recipe["lr"])
    recipe = RECIPES[args.recipe]  # the checkpoint's, if one is resumed
    evaluations(args.steps, args.T, device)  # does --steps fit?  Before the long work
    x_train, _, x_test, _ = common.load_data(args, device)  # uint8 (N, C, H, W)
    settings["shape"] = list(x_train.shape[1:])
    torch.manual_seed(10**6 * args.seed)
    model = build(settings).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()  # the moving average of the weights
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    history = common.restore(saved, path, model=model, ema=ema, optimizer=optimizer)
    loss_of = torch.compile(model.loss) if args.compile else model.loss

    N, B = len(x_train), common.batch_size(args, x_train)
    steps, seconds = N // B, history[-1]["seconds"] if history else 0.0
    parameters = sum(p.numel() for p in model.parameters())
    common.say(f"DDPM, recipe {args.recipe} ({why}): {parameters:,} parameters on {device}, "
               f"{steps} steps an epoch")
    common.say(settings)
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(10**6 * args.seed + epoch)  # an epoch is the same after a resume
        started, total = time.perf_counter(), torch.zeros((), device=device)
        order = torch.randperm(N, device=device)[:steps * B].view(steps, B)  # drops the last, smaller batch
        bar = tqdm(order, f"DDPM, epoch {epoch}/{args.epochs}", leave=False, disable=common.RANK > 0)
        for step, batch in enumerate(bar):  # Algorithm 1, line 1
            before = (epoch - 1) * steps + step  # steps of the run before this one
            done = (before + 0.5) / (steps * args.epochs)  # share of the whole run, 0 ... 1
            warm_up, decay = min(1, 50 * done), 0.5 * (1 + math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = args.lr * warm_up * decay

            x0 = to_model(x_train[batch] / 255)  # (B, C, H, W) in [-1, 1], line 2
            t = model.draw_t(B, recipe["focused"])  # (B,) in 1 ... T, line 3
            eps = torch.randn_like(x0)  # line 4
            x0, t, eps = x0[common.MINE], t[common.MINE], eps[common.MINE]  # processes share a batch
            with common.autocast(device):
                loss = loss_of(x0, t, eps)  # line 5

            optimizer.zero_grad()
            loss.backward()
            common.average(p.grad for p in model.parameters())  # over the processes, if there are several
            optimizer.step()
            for mean, p in zip(ema.parameters(), model.parameters()):
                mean.lerp_(p.detach(), 20 / (20 + before))  # over about the last twentieth of all so far
            total += loss.detach()
            common.show(bar, step, loss, args.epochs)

        common.average([total])
        loss = total.item() / steps
        seconds += time.perf_counter() - started
        row = {"epoch": epoch, "train_loss": loss, "test_loss": evaluate(ema, x_test, args.seed),
               "seconds": seconds}
        history.append(row | (watch(ema, epoch) if watch else {}))
        common.save(path, kind="ddpm", settings=settings, history=history, model=model.state_dict(),
                    ema=ema.state_dict(), optimizer=optimizer.state_dict())
        common.say(history[-1])
        if epoch % math.ceil(args.epochs / 10) == 0 and common.RANK == 0:
            with common.fork_seed(args.seed, device):  # the same noise each time: one sees it learn
                x = samples(ema, 40, device, min(20, args.T))
            common.plot_grid(x, path.with_name(f"ddpm_epoch_{epoch:03d}.png"),
                             f"DDPM, {common.title(settings)}: after epoch {epoch}")
    return ema, history


@torch.no_grad()
def evaluate(model, images, seed):
    """The loss on all images, uint8 (N, C, H, W), with t uniform, and t and ε the same at every call."""
    with common.fork_seed(seed, images.device), common.autocast(images.device):
        losses = [model.loss(to_model(batch / 255)) * len(batch) for batch in images.split(500)]
    return torch.stack(losses).sum().item() / len(images)


# Pictures.

def evaluations(steps, T, device):
    """The network evaluations that a sample takes: steps, for None all T on a GPU and at most 50 on a CPU.

    Raises common.InputError where there are fewer than `steps`.
    """
    if steps and steps > T:
        raise common.InputError(f"--steps {steps} is more than the chain's T = {T}: choose fewer")
    return steps or (T if device.type == "cuda" else min(T, 50))


def samples(model, n, device, steps=None, eta=1.0):
    """n images (n, C, H, W) in [0, 1], so many at a time, with a progress bar where it takes long."""
    steps, size = evaluations(steps, model.T, device), 2000 if device.type == "cuda" else 500
    sizes = [size] * (n // size) + [n % size] * (n % size > 0)
    sizes = tqdm(sizes, "sampling", leave=False, disable=len(sizes) < 5)
    with common.autocast(device):
        return torch.cat([model.sample(k, steps, eta) for k in sizes])


@torch.no_grad()
def draw(model, history, args, device):
    """The pictures of a trained model in OUT -> their names."""
    out, name = Path(args.out), f"DDPM, {common.title(vars(args))}"
    steps = evaluations(args.steps, model.T, device)
    rule = f"{steps} steps, η = {args.eta:g}"
    _, _, x_test, _ = common.load_data(args, device)
    torch.manual_seed(args.seed)
    common.plot_grid(samples(model, 100, device, steps, args.eta), out / "ddpm_samples.png",
                     f"{name}: 100 samples, {rule}")

    chain = model.respace(steps)
    with common.autocast(device):
        frames = list(chain.trajectory(torch.randn(1, *model.shape, device=device), args.eta))
    frames = frames[:-1:math.ceil(steps / 50)] + frames[-1:]  # x_T, every so many steps, x_0
    labels = [f"t = {chain.tau[s]}" for s, _, _ in frames]
    noisy, guess = (to_image(torch.cat(images)) for images in list(zip(*frames))[1:])
    common.save_gif({"$x_t$": noisy, "$\\hat{x}_0(x_t, t)$": guess}, out / "ddpm_trajectory.gif",
                    f"{name}, {rule}", labels)
    some = torch.linspace(0, len(labels) - 1, min(11, len(labels))).round().int().tolist()
    common.plot_rows({"$x_t$": noisy[some], "$\\hat{x}_0$": guess[some]}, out / "ddpm_trajectory.png",
                     f"{name}: one sample on its way from noise, {rule}", [labels[i] for i in some])

    x0 = to_model(x_test[:1] / 255).expand(11, -1, -1, -1)
    t = torch.linspace(0, model.T, 11, device=device).round().long()
    xt = model.q_sample(x0, t, torch.randn_like(x0))
    common.plot_rows({"$q(x_t|x_0)$": to_image(xt)}, out / "ddpm_forward.png",
                     f"{name}: a test image on its way to noise", [f"t = {t}" for t in t.tolist()])
    recipe, epochs = RECIPES[args.recipe], [row["epoch"] for row in history]
    times, target = "focused" if recipe["focused"] else "uniform", recipe["predict"].replace("eps", "ε")
    curves = {f"training, t {times}": [row["train_loss"] for row in history],
              "test, averaged weights, t uniform": [row["test_loss"] for row in history]}
    common.plot_curves(epochs, curves, out / "ddpm_loss.png", f"{name}: $L_{{simple}}$ on {target}",
                       "squared error per pixel")
    return ["ddpm_samples.png", "ddpm_trajectory.gif", "ddpm_trajectory.png", "ddpm_forward.png",
            "ddpm_loss.png"]


def load(path, device="cpu", **changes):
    """The trained DDPM of a checkpoint with its averaged weights, ready to sample.

    changes: settings to sample with other than those of the checkpoint: sigma.
    Raises common.InputError for any other file.
    """
    return common.load_model(path, "ddpm", "ema", device, lambda settings: build(settings | changes))


def parse(argv):
    """The command line -> args; None stands for what train fills in."""
    parser = common.arguments(__doc__)
    add, number = parser.add_argument, common.number
    add("--recipe", choices=list(RECIPES), help="paper: Ho's objective, 100 epochs; short: v and focused t, "
        "12 epochs of a smaller network (default: paper where there is a GPU, short on a CPU)")
    add("--T", metavar="N", type=number(int, 2, 10000), help="steps of the chain (default: 1000)")
    add("--schedule", choices=["linear", "cosine"], help="of the noise (default: linear)")
    add("--sigma", choices=["beta", "posterior"], help="σ² of the reverse steps: β, or β̃, better in few "
        "steps (default: posterior)")
    add("--steps", metavar="K", type=number(int, 1, 10000),
        help="network evaluations a sample takes, at most T (default: T on a GPU, 50 on a CPU)")
    add("--eta", metavar="X", type=number(float, 0, 1), default=1.0,
        help="1: ancestral sampling; 0: DDIM (default: 1)")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--resume", action="store_true", help="go on from OUT/ddpm.pt, with its settings")
    add("--sample", metavar="N", type=number(int, 1, 10000), help="only draw N samples from OUT/ddpm.pt")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device, out = common.pick_device(args.device), common.output_folder(args.out)
    if args.sample:
        model = load(out / "ddpm.pt", device, **({"sigma": args.sigma} if args.sigma else {}))
        torch.manual_seed(args.seed or 0)
        x = samples(model, args.sample, device, args.steps, args.eta)
        common.plot_grid(x, out / "ddpm_sample.png", f"DDPM, {model.title}: samples, η = {args.eta:g}")
        pictures = ["ddpm_sample.png"]
    else:
        model, history = train(args, device)
        pictures = draw(model, history, args, device) if common.RANK == 0 else []
    common.say(f"wrote {', '.join(pictures)} in {out}/")


if __name__ == "__main__":
    common.run(main)
