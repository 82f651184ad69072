"""A denoising diffusion model on MNIST, in the order of the paper: math with its sampler, network, training.

Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), is Ho in the comments;
report is the course report whose experiment this redoes (see README.md).  q adds noise to an image x_0 in T
fixed steps, p takes it away again in T learned ones, and p is trained to raise a lower bound on log p(x_0):

    -log p(x_0)  <=  L_T + Σ_{t=2..T} L_{t-1} + L_0               Ho (3) and (5), report (54) and (64)
    L_T     = KL(q(x_T|x_0) || N(0, I))
    L_{t-1} = E_q KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t))
    L_0     = E_q[-log p(x_0|x_1)]

x are images (B, 1, 28, 28) in [0, 1]; x0 and xt are on the scale [-1, 1]; t is (B,) int64 in 1 ... T, the
paper's t: every table has T+1 entries, and entry 0 stands for "no noise yet".
"""
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

EXAMPLES = """\
  python ddpm.py                           train, then draw samples, a trajectory and the loss curve
  python ddpm.py --sample 64 --steps 20    draw 64 digits from the checkpoint in results/, in 20 steps
  python ddpm.py --predict eps --optimizer adam --out results/report    as in the report
  python ddpm.py --predict eps --schedule logsnr --fourier --out results/bits     for likelihood"""


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

def make_alpha_bar(schedule, T):
    """ᾱ_0 ... ᾱ_T in float64, (T+1,), falling from 1: the share of x_0's variance that is left at t.

    β_t is the variance of the noise that step t adds.  Ho (2), report (32)
    linear: β_t from 1e-4 to 0.02 (Ho, section 4); where T is not 1000, times 1000/T, so that x_T is always
    noise.  cosine: Nichol & Dhariwal 2021 (17).  logsnr: log ᾱ_t/(1-ᾱ_t) falls linearly from 13.3 to -5, so
    that L_simple on ε is the bound up to constants (Kingma et al. 2021): the schedule for likelihood.
    """
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T  # β_1 ... β_T, (T,)
    elif schedule == "cosine":
        t = torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - f[1:] / f[:-1]
    elif schedule == "logsnr":
        log_snr = torch.linspace(13.3, -5, T, dtype=torch.float64)
        return torch.cat([torch.ones(1, dtype=torch.float64), log_snr.sigmoid()])  # log ᾱ/(1-ᾱ) solved for ᾱ
    else:
        raise ValueError(f"schedule must be linear, cosine or logsnr, not {schedule!r}")
    alpha = 1 - beta.clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha.cumprod(0)])  # ᾱ_t = Π_{s=1..t} α_s   Ho (4)


def log_discretized_normal(x0, mean, sigma):
    """log P(x0) in nats of 8-bit pixels: each level gets the normal's mass within half a level of it.

    x0 (B, C, H, W) in {-1, -1 + 2/255, ..., 1}, mean like x0, sigma > 0 broadcastable; returns (B,).  The
    levels -1 and 1 also get the tail beyond them, so that the 256 levels' probabilities sum to 1.
    """
    level, mean = ((x0.double() + 1) * 127.5).round(), mean.double()  # 0 ... 255; neighbours share their edge
    high, low = ((level + 0.5) / 127.5 - 1 - mean) / sigma, ((level - 0.5) / 127.5 - 1 - mean) / sigma
    high = torch.where(level == 255, math.inf, high)  # δ_+(x_0)   Ho (13)
    low = torch.where(level == 0, -math.inf, low)  # δ_-(x_0)   Ho (13)
    # Φ(high) - Φ(low) = Φ(-low) - Φ(-high): in the upper tail, where Φ is 1 to all digits, take the second
    high, low = torch.where(low > 0, -low, high), torch.where(low > 0, -high, low)
    # log(Φ(high) - Φ(low)) = log Φ(high) + log(1 - exp(log Φ(low) - log Φ(high)))
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return (log_high + torch.log(-torch.expm1(log_low - log_high))).flatten(1).sum(1)  # Ho (13)


class DDPM(nn.Module):
    """q, p and the bound for a network net(xt, t).

    T: number of steps.  schedule: see make_alpha_bar; or the table ᾱ_0 ... ᾱ_T itself, which then gives T.
    predict: what the network's output stands for: "eps" (ε), "x0" (x_0), "mu" (μ̃) or "v" (see v_from_x0).
    sigma: the variance of p(x_{t-1}|x_t): "beta" (β_t), "posterior" (β̃_t) or "optimal" (see variance).
    clip: keep the predicted x_0 within [-1, 1], as Ho's code does, when sampling and in the bound.
    shape: of one image, on which sample starts.
    """

    def __init__(self, net, T=1000, schedule="linear", predict="eps", sigma="beta", clip=False,
                 shape=(1, 28, 28)):
        super().__init__()
        if predict not in ("eps", "x0", "mu", "v"):
            raise ValueError(f"predict must be eps, x0, mu or v, not {predict!r}")
        if sigma not in ("beta", "posterior", "optimal"):
            raise ValueError(f"sigma must be beta, posterior or optimal, not {sigma!r}")
        self.net, self.predict, self.sigma, self.clip, self.shape = net, predict, sigma, clip, shape
        alpha_bar = make_alpha_bar(schedule, T) if isinstance(schedule, str) else schedule.double()
        self.T = len(alpha_bar) - 1
        alpha_bar_prev = torch.cat([alpha_bar[:1], alpha_bar[:-1]])  # ᾱ_{t-1}, in entry 0 ᾱ_0
        alpha = alpha_bar / alpha_bar_prev  # 1 in entry 0, and so β_0 = 0
        beta = 1 - alpha
        one_minus = (1 - alpha_bar).clamp(min=1e-300)  # 1 - ᾱ_t, without 0/0 in entry 0
        tables = dict(
            alpha_bar=alpha_bar, alpha_bar_prev=alpha_bar_prev, alpha=alpha, beta=beta,
            beta_tilde=(1 - alpha_bar_prev) / one_minus * beta,  # β̃_t   Ho (7)
            c_x0=alpha_bar_prev.sqrt() * beta / one_minus,  # μ̃_t = c_x0 x_0 + c_xt x_t   Ho (7)
            c_xt=alpha.sqrt() * (1 - alpha_bar_prev) / one_minus)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        # what only a trained network tells: E‖x_0 - x̂_0(x_t, t)‖² per pixel for each t, and L_0's two scales
        self.register_buffer("mse", torch.zeros(self.T + 1, dtype=torch.float64))
        self.register_buffer("decoder_sigma", torch.zeros(2, dtype=torch.float64))

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
        """Ho (7) solved for x_0.  The way back, x_0 -> μ̃, is q_posterior."""
        return (mu - at(self.c_xt, t, xt) * xt) / at(self.c_x0, t, xt)  # Ho (7)

    def v_from_x0(self, xt, t, x0):
        """v = √ᾱ_t ε - √(1-ᾱ_t) x_0, which is also (√ᾱ_t x_t - x_0) / √(1-ᾱ_t).

        Its error is that of ε over √ᾱ_t: L_simple on v is Ho (14) with the weight 1/ᾱ_t, and so looks more to
        the noisy steps, where ε is nearly x_t itself but the digit's shape is settled.  Salimans & Ho 2022, D
        """
        return (at(self.alpha_bar.sqrt(), t, xt) * xt - x0) / at((1 - self.alpha_bar).sqrt(), t, xt)

    def x0_from_v(self, xt, t, v):
        """x_0 = √ᾱ_t x_t - √(1-ᾱ_t) v"""
        return at(self.alpha_bar.sqrt(), t, xt) * xt - at((1 - self.alpha_bar).sqrt(), t, xt) * v

    # The reverse process.

    def predict_x0(self, xt, t, clip=None):
        """x̂_0(x_t, t), the network's guess at x_0, whatever it predicts: like xt.  clip=None: self.clip."""
        out = self.net(xt, t).to(xt.dtype)
        if self.predict != "x0":
            convert = {"eps": self.x0_from_eps, "mu": self.x0_from_mu, "v": self.x0_from_v}[self.predict]
            out = convert(xt, t, out)
        return out.clamp(-1, 1) if (self.clip if clip is None else clip) else out

    @property
    def variance(self):
        """σ_t² of p(x_{t-1}|x_t), (T+1,).

        "beta" is an upper and "posterior" a lower bound of the best one (Ho, section 3.2).  "optimal" needs
        no training: with the mean given, the variance that makes the expected KL smallest is that of q plus
        the mean's squared error (Bao et al. 2022), and the means differ by c_x0 (x_0 - x̂_0).  Before
        estimate_mse it equals "posterior".  β̃_1 = 0 cannot be a decoder's: β̃_2 is used at t = 1.
        """
        if self.sigma == "beta":
            return self.beta
        variance = self.beta_tilde + (self.c_x0 ** 2 * self.mse if self.sigma == "optimal" else 0)
        variance[1] = self.beta_tilde[2] if self.T > 1 else self.beta[1]
        return variance

    def decoder_scale(self, x0_hat):
        """σ_1 of p(x_0|x_1) for each pixel of its mean x̂_0: like x0_hat.

        That of variance, or after fit_decoder one of two: one where x̂_0 is black or white, and hardly ever
        wrong, and one for the gray between.
        """
        fitted = torch.where(x0_hat.abs() > 1 - 1 / 255, self.decoder_sigma[1], self.decoder_sigma[0])
        return torch.where(self.decoder_sigma[0] > 0, fitted, self.variance[1].sqrt())

    def p_mean_variance(self, xt, t):
        """p(x_{t-1}|x_t) = N(mean, variance I): mean like xt, variance (B, 1, 1, 1).  Ho (1), report (42)

        The mean is q's with x̂_0 for x_0; for predict="eps" without clipping that is Ho (11), report (72)
        """
        mean, _ = self.q_posterior(self.predict_x0(xt, t), xt, t)
        return mean, at(self.variance, t, xt)

    # The losses and the bound.

    def draw(self, x0, focused=False):
        """A random step t ~ U{1 ... T}, (B,), and the noise ε ~ N(0, I), like x0, for each of B images.

        focused: three quarters of t are instead T sigmoid(n/2 - 0.6) with n ~ N(0, 1), mostly from 0.2 T to
        0.6 T, where under the linear schedule a digit takes its shape; the others are (T+1)^u, u ~ U(0, 1),
        as many from each power of ten, for most bits are paid at the finest steps.  The first is after Esser
        et al. 2024, section 3.1, who draw a flow's time so.
        """
        B, device = len(x0), x0.device
        t = torch.randint(1, self.T + 1, (B,), device=device)  # 1 ... T, both inclusive
        if focused:
            shape = (self.T * torch.sigmoid(torch.randn(B, device=device) / 2 - 0.6)).ceil()
            fine = ((self.T + 1) ** torch.rand(B, device=device)).floor()
            t = torch.where(torch.rand(B, device=device) < 0.75, shape, fine).long().clamp(1, self.T)
        return t, torch.randn_like(x0)

    def loss(self, x0, t=None, eps=None):
        """L_simple: the mean squared error per pixel of what the network predicts; x0 (B, C, H, W) -> scalar.

        t and eps are of draw, unless given.  Ho, Algorithm 1 and (14), report (74)
        """
        t, eps = self.draw(x0) if t is None else (t, eps)
        xt = self.q_sample(x0, t, eps)
        target = {"eps": lambda: eps, "x0": lambda: x0, "mu": lambda: self.q_posterior(x0, xt, t)[0],
                  "v": lambda: self.v_from_x0(xt, t, x0)}[self.predict]()
        return F.mse_loss(self.net(xt, t).to(xt.dtype), target)  # per pixel   Ho (14)

    def vlb_loss(self, x0, t=None, eps=None):
        """The bound without its constant L_T, in bits/dim: T L_{t-1} at one t for each image; like loss.

        Ho (5), report (54)
        """
        t, eps = self.draw(x0) if t is None else (t, eps)
        x0_hat = self.predict_x0(self.q_sample(x0, t, eps), t, clip=False)  # what is clipped has no gradient
        error = (x0 - x0_hat).pow(2).flatten(1).sum(1)  # (B,)
        # where t > 1, L_0 is not used; x0 for its mean keeps its gradient from being nan
        mean = torch.where((t == 1).view(-1, 1, 1, 1), x0_hat, x0)
        L_0 = -log_discretized_normal(x0, mean, self.decoder_scale(mean))  # Ho (13)
        dim = x0[0].numel()
        L = torch.where(t == 1, L_0, self.L_between(error, t, dim))  # (B,) nats
        return self.T * L.mean() / (dim * math.log(2))  # E_t[T L_{t-1}] = Σ_t L_{t-1}   Ho (5)

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
        for s in tqdm(range(1, self.T + 1), desc="bound", leave=False, disable=self.T < 100):
            t = torch.full((len(x0),), s, device=x0.device)
            xt = self.q_sample(x0, t, torch.randn_like(x0))
            errors[:, s] = (x0 - self.predict_x0(xt, t)).pow(2).flatten(1).sum(1)
        return errors

    @torch.no_grad()
    def vlb_terms(self, x0, errors=None):
        """Every term of the bound, one Monte Carlo draw of each x_t: x0 (B, C, H, W) -> (B, T+1) in nats.

        Column 0 is L_0, column t-1 is L_{t-1}, column T is L_T; their sum is >= -log P(x0) in the mean, and
        bits/dim are nats / (C·H·W·ln 2).  x0 holds 8-bit levels.  errors: of x0_errors, where at hand.
        Ho (5), report (54) with L_0's sign as in Ho
        """
        errors = self.x0_errors(x0) if errors is None else errors
        one = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
        x0_hat = self.predict_x0(self.q_sample(x0, one, torch.randn_like(x0)), one)  # p's mean at t = 1
        L_0 = -log_discretized_normal(x0, x0_hat, self.decoder_scale(x0_hat))  # Ho (13)
        t = torch.arange(2, self.T + 1, device=x0.device)
        L_between = self.L_between(errors[:, 2:], t, x0[0].numel())  # Ho (8)
        a = self.alpha_bar[-1]  # ᾱ_T
        # KL(N(√a x_0, (1-a) I) || N(0, I)) = ½ Σ (a x_0² - a - log(1-a)), over the pixels
        L_T = 0.5 * (a * x0.double() ** 2 - a - torch.log1p(-a)).flatten(1).sum(1)
        return torch.cat([L_0[:, None], L_between, L_T[:, None]], dim=1)

    def estimate_mse(self, x0):
        """Fills in mse, on which the "optimal" variance rests, from training images x0 (B, C, H, W)."""
        self.mse.copy_(self.x0_errors(x0).mean(0) / x0[0].numel())

    @torch.no_grad()
    def fit_decoder(self, x0):
        """Sets L_0's two scales to the values under which training images x0 are likeliest.

        It tries 49 values for each, from 0.001 to 1.  σ_1 = √β_1 = 0.01 gives a pixel that is surely black
        only a probability of Φ(0.39) = 0.65 of being so, which costs 0.6 bits for most pixels of the image.
        """
        t = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
        x0_hat = self.predict_x0(self.q_sample(x0, t, torch.randn_like(x0)), t)
        self.decoder_sigma.copy_(self.variance[1].sqrt())
        for i in range(2):  # the pixels of one do not depend on the other
            def likelihood(sigma):
                self.decoder_sigma[i] = sigma
                return log_discretized_normal(x0, x0_hat, self.decoder_scale(x0_hat)).sum().item()
            self.decoder_sigma[i] = max(torch.logspace(-3, 0, 49).tolist(), key=likelihood)

    # Sampling.

    def respace(self, steps):
        """The chain that visits only `steps` of the T times, as a DDPM of its own with the same network.

        q(x_τ|x_0) stays what it was, so the network need not be trained anew; steps in 1 ... T.
        Nichol & Dhariwal 2021, section 4; Song et al. 2021, section 4.2
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be from 1 to T = {self.T}, not {steps}")
        # τ_0 = 0 < τ_1 < ... < τ_steps = T: step i of the new chain is at time τ_i of this one
        tau = torch.linspace(0, self.T, steps + 1, dtype=torch.float64).round().long().to(self.beta.device)
        chain = DDPM(lambda xt, t: self.predict_x0(xt, tau[t]), schedule=self.alpha_bar[tau], predict="x0",
                     sigma=self.sigma, clip=self.clip, shape=self.shape).to(self.beta.device)
        chain.tau = tau
        chain.mse.copy_(self.mse[tau])
        if tau[1] == 1:
            chain.decoder_sigma.copy_(self.decoder_sigma)
        return chain

    def ddim_mean(self, x0_hat, xt, t, eta):
        """√ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-η²β̃_t) ε̂: with noise of variance η²β̃_t it is q(x_{t-1}|x_0) again.

        For η = 1 it is μ̃_t, for η = 0 there is no noise at all.  Song et al. 2021 (12)
        """
        spread = (1 - self.alpha_bar_prev - eta ** 2 * self.beta_tilde).clamp(min=0)
        eps = self.eps_from_x0(xt, t, x0_hat)
        return at(self.alpha_bar_prev.sqrt(), t, xt) * x0_hat + at(spread.sqrt(), t, xt) * eps

    @torch.no_grad()
    def trajectory(self, xt, eta=1.0, start=None, order=1):
        """Yields (t, x_t, x̂_0) for t = start ... 1, last (0, x_0, x_0): like xt, on the scale [-1, 1].

        xt (B, C, H, W) is x_start; start=None stands for T.
        eta = 1: Ho, Algorithm 2, a draw from Ho (1), report (43); less: Song et al. 2021 (12)
        order=2: x̂_0 changes on the way to t-1, so it is drawn on to the middle of the step, on the scale of
        half the log-SNR λ, along its last change: fewer steps do as well.  Lu et al. 2022, "DPM-Solver++", 2M
        """
        variance, before = self.variance, None
        half_log_snr = 0.5 * (self.alpha_bar.log() - (1 - self.alpha_bar).log())  # λ_t, infinite at t = 0
        for s in range(start or self.T, 0, -1):  # line 2
            t = torch.full((len(xt),), s, device=xt.device)
            now = x0_hat = self.predict_x0(xt, t)
            yield s, xt, x0_hat
            if order == 2 and before is not None and s > 1:
                h, h_before = half_log_snr[s - 1] - half_log_snr[s], half_log_snr[s] - half_log_snr[s + 1]
                x0_hat = now + (0.5 * h / h_before).to(now.dtype) * (now - before)
            before = now
            if eta == 1:
                mean, _ = self.q_posterior(x0_hat, xt, t)  # μ_θ: μ̃_t with x̂_0 for x_0   Ho (7) and (11)
            else:
                mean = self.ddim_mean(x0_hat, xt, t, eta)
            z = torch.randn_like(xt) if s > 1 else torch.zeros_like(xt)  # line 3
            xt = mean + eta * at(variance.sqrt(), t, xt) * z  # line 4
        yield 0, xt, xt

    @torch.no_grad()
    def ddim_encode(self, x0):
        """The x_T from which the chain with eta = 0 comes back to x0, but for the error of finite steps.

        x_{t+1} = √ᾱ_{t+1} x̂_0 + √(1-ᾱ_{t+1}) ε̂, both from x_t; like x0.  x_0 is taken for x_1, since no
        network was trained at t = 0.  Song et al. 2021, section 4.3
        """
        xt = x0
        for s in range(1, self.T):
            t = torch.full((len(x0),), s, device=x0.device)
            x0_hat = self.predict_x0(xt, t)
            xt = self.q_sample(x0_hat, torch.full_like(t, s + 1), self.eps_from_x0(xt, t, x0_hat))
        return xt

    def sample(self, n, steps=None, eta=1.0, order=None):
        """n images (n, C, H, W) in [0, 1].  Ho, Algorithm 2

        steps: how many network evaluations, None for T.  eta: 1 is ancestral, 0 is deterministic DDIM.
        order: see trajectory; None for 1, as in the papers, in all T steps, and for 2 in fewer.
        """
        chain = self if steps in (None, self.T) else self.respace(steps)
        xt = torch.randn(n, *self.shape, device=self.beta.device)  # line 1
        order = order or (1 if chain is self else 2)
        for _, xt, _ in chain.trajectory(xt, eta, order=order):
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
    """net(xt, t): (B, channels, H, W), (B,) -> like xt; H and W are multiples of 4.

    It works at half and a quarter of the resolution, on 2x2 pixels folded into channels: at the full one most
    of the time would go into the cheapest features.  fourier: the network also sees sin and cos of its input
    with the gray levels' spacing as period, and twice that: else it is blind to noise far below one level, as
    only the likelihood asks it to see (Kingma et al. 2021).
    """

    def __init__(self, channels=1, width=32, deep=64, embed=128, fourier=False):
        super().__init__()
        self.width, self.fourier = width, fourier
        self.time = nn.Sequential(nn.Linear(2 * width, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU())
        self.enter = nn.Conv2d(4 * channels * (5 if fourier else 1), width, 3, padding=1)
        self.down1 = Block(width, width, embed)
        self.pool = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(Block(deep, deep, embed) for _ in range(3))
        self.unpool = nn.Conv2d(deep, width, 3, padding=1)
        self.up1 = Block(2 * width, width, embed)
        self.norm, self.leave = nn.GroupNorm(1, width), nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, xt, t):
        # sin and cos of t 10000^(-i/width), i = 0 ... width-1: Vaswani et al. 2017, section 3.5
        frequency = torch.exp(-math.log(10000) * torch.arange(self.width, device=t.device) / self.width)
        angle = t[:, None] * frequency  # (B, width)
        e = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, embed)
        if self.fourier:
            waves = [wave(2 ** n * math.pi * xt) for n in (7, 8) for wave in (torch.sin, torch.cos)]
            xt = torch.cat([xt, *waves], dim=1)  # (B, 5·channels, H, W)
        h = F.pixel_unshuffle(xt, 2)  # (B, 4·channels, H/2, W/2), five times as many with fourier
        h = h.contiguous(memory_format=torch.channels_last)  # the layout in which convolutions are fast
        h = high = self.down1(self.enter(h), e)  # (B, width, H/2, W/2)
        h = self.pool(h)  # (B, deep, H/4, W/4)
        for block in self.middle:
            h = block(h, e)
        h = self.unpool(F.interpolate(h, scale_factor=2))  # (B, width, H/2, W/2)
        h = self.up1(torch.cat([h, high], dim=1), e)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)  # (B, channels, H, W)


# Training.

class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: all directions of a weight matrix move equally far.

    For convolution kernels, as matrices (out, in · height · width).  Jordan et al. 2024, "Muon"
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}  # kernels of one shape go through together: fewer and larger products
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                shapes.setdefault(p.shape, []).append(p)
            for kernels in shapes.values():
                grads, momenta = [p.grad for p in kernels], [self.state[p]["momentum"] for p in kernels]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                X = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov
                X = X.flatten(2)  # (n, out, in · height · width)
                X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
                # The step's size is set below, and its direction is a rough one anyway: bfloat16 will do
                X = X.bfloat16() if common.has_bfloat16(X.device) else X
                for _ in range(5):  # Newton-Schulz: drives every singular value of X towards 1
                    A = X @ X.mT
                    B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)  # -4.7750 A + 2.0315 A A
                    X = torch.baddbmm(X, B, X, beta=3.4445)  # 3.4445 X + B X
                step = group["lr"] * max(1, X.shape[1] / X.shape[2]) ** 0.5
                for p, x in zip(kernels, X.float()):
                    p.sub_(step * x.view_as(p))


SETTINGS = ["T", "schedule", "predict", "fourier", "sigma", "loss", "times", "optimizer",
            "data", "limit", "epochs", "batch_size", "lr", "seed"]


def make_optimizers(net, kind, lr):
    """[Adam] for all weights, as Ho and the report, or [Adam, Muon] with the inner convolutions for Muon.

    Muon's step has a size of its own: 20 lr.  Adam forgets faster beside it, for the runs are short.
    """
    kernels = [p for p in net.parameters() if p.dim() == 4 and min(p.shape[:2]) > 4] if kind == "muon" else []
    rest = [p for p in net.parameters() if all(p is not k for k in kernels)]
    if not kernels:
        return [torch.optim.Adam(rest, lr=lr, fused=True, capturable=True)]
    adam = torch.optim.Adam(rest, lr=lr, betas=(0.9, 0.99), fused=True, capturable=True)
    return [adam, Muon(kernels, lr=20 * lr)]


def train(args, device, watch=None):
    """Minimizes the loss and keeps an exponential moving average of the weights, which is used for sampling.

    common.Run shuffles the images, keeps OUT/ddpm.pt after each epoch and at Ctrl-C, takes it up again, and
    stops where the loss is not finite.  watch(averaged model, epoch) -> more numbers for the history.
    Returns the averaged model and the run.
    """
    torch.manual_seed(args.seed)
    x_train, x_test = common.load_data(args.data, args.data_dir, device)  # uint8 (N, 1, 28, 28)
    x_train = x_train[:args.limit]
    model = build(vars(args)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizers = make_optimizers(model.net, args.optimizer, args.lr)
    rates = [optimizer.defaults["lr"] for optimizer in optimizers]
    run = common.Run(Path(args.out) / "ddpm.pt", args, SETTINGS, len(x_train), ["train_loss"], device,
                     model=model, ema=ema, **{type(o).__name__.lower(): o for o in optimizers})
    loss_of = common.for_training(model, common.compiled(objective(model, args), model, device), device)
    ema_decay = 1 - 20 / (20 + run.steps * args.epochs)  # averages over about the last twentieth of the run
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)  # a tensor: see common.captured

    def step(x0, t, eps):
        with common.autocast(device):
            loss = loss_of(x0, t, eps)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (run.weight * loss).backward()
        for optimizer in optimizers:
            optimizer.step()
        torch._foreach_lerp_([*ema.parameters()], [p.detach() for p in model.parameters()], 1 - ema_decay)
        return loss

    step = common.captured(step, device)
    for epoch in run.epochs():
        for progress, batch in run.batches():  # progress: share of the whole run, 0 ... 1
            for optimizer, lr in zip(optimizers, rates):  # warm-up over 1/50 of the run, cosine decay to 0
                factor = min(1, 50 * progress) * 0.5 * (1 + math.cos(math.pi * progress))
                optimizer.param_groups[0]["lr"].fill_(lr * factor)
            x0 = to_model(x_train[batch] / 255)  # (B, 1, 28, 28) in [-1, 1]
            run.log(step(*run.share(x0, *model.draw(x0, args.times == "focused"))))
        watched = watch(ema, epoch) if watch else {}
        run.end_epoch(test_loss=evaluate(ema, x_test[::5], args), **watched)
        if epoch % math.ceil(args.epochs / 10) == 0 and common.RANK == 0:
            # the same noise each time: one sees it learn
            with common.own_randomness(args.seed, device), common.autocast(device):
                x = ema.sample(40, min(20, args.T))
            path = Path(args.out) / f"ddpm_epoch_{epoch:03d}.png"
            common.plot_grid(x, path, f"DDPM, {common.NAMES[args.data]}: epoch {epoch} of {args.epochs}")
        if epoch == args.epochs:  # the one thing that "optimal" needs, from training images
            with common.own_randomness(args.seed, device):
                ema.estimate_mse(to_model(x_train[:16] / 255))
    return ema, run


def objective(model, args):
    """What is trained, by --loss."""
    return model.loss if args.loss == "simple" else model.vlb_loss


@torch.no_grad()
def evaluate(model, images, args):
    """The loss on images, uint8 (N, 1, 28, 28), with t uniform, and t and ε the same at every call."""
    with common.own_randomness(args.seed, images.device):
        losses = [objective(model, args)(to_model(batch / 255)) for batch in images.split(1000)]
    return torch.stack(losses).mean().item()


# Pictures.

@torch.no_grad()
def draw(model, run, args, device):
    """The pictures of a trained model in OUT -> their names."""
    out, name = Path(args.out), f"DDPM, {common.NAMES[args.data]}, {args.epochs} epochs"
    _, x_test = common.load_data(args.data, args.data_dir, device)
    x = model.sample(100, args.steps, args.eta)
    common.plot_grid(x, out / "ddpm_samples.png", f"{name}: 100 samples, {args.steps} steps")

    noise = torch.randn(1, *model.shape, device=device)
    frames = {t: (xt, x0) for t, xt, x0 in model.trajectory(noise) if t % math.ceil(model.T / 50) == 0}
    frames = dict(sorted(frames.items(), reverse=True))
    xt, x0 = (to_image(torch.cat(images)) for images in zip(*frames.values()))
    labels = [f"t = {t}" for t in frames]
    panels = {"$x_t$": xt, "$\\hat{x}_0(x_t, t)$": x0}
    common.save_gif(panels, out / "ddpm_trajectory.gif", f"{name}: one sample", labels)
    some = torch.linspace(0, len(labels) - 1, 11).round().int().tolist()
    common.plot_rows({"$x_t$": xt[some], "$\\hat{x}_0$": x0[some]}, out / "ddpm_trajectory.png",
                     f"{name}: one sample on its way from noise", [labels[i] for i in some])

    x0 = to_model(x_test[:1] / 255).expand(11, -1, -1, -1)
    t = torch.linspace(0, model.T, 11, device=device).round().long()
    xt = model.q_sample(x0, t, torch.randn_like(x0))
    common.plot_rows({"$q(x_t|x_0)$": to_image(xt)}, out / "ddpm_forward.png",
                     f"{name}: a test digit on its way to noise", [f"t = {t}" for t in t.tolist()])
    epochs = [row["epoch"] for row in run.history]
    curves = {f"{split}, t {times}": (epochs, [row[f"{split}_loss"] for row in run.history])
              for split, times in (("train", args.times), ("test", "uniform"))}
    common.plot_curves(curves, out / "ddpm_loss.png", f"{name}: training loss",
                       "squared error per pixel" if args.loss == "simple" else "bits/dim")
    return ["ddpm_samples.png", "ddpm_trajectory.gif", "ddpm_trajectory.png", "ddpm_forward.png",
            "ddpm_loss.png"]


def load(path, device="cpu"):
    """The trained DDPM of a checkpoint with its averaged weights, ready to sample.

    Its settings are in .settings.  Raises common.InputError for any other file.
    """
    return common.restored(build, common.load(path, "ddpm"), "ema", path).to(device)


def build(settings):
    """The model that settings, a dict with the names in SETTINGS, describe."""
    s = settings
    model = DDPM(UNet(fourier=s["fourier"]), s["T"], s["schedule"], s["predict"], s["sigma"], clip=True)
    model.net.to(memory_format=torch.channels_last)
    return model


def parse(argv):
    parser = common.arguments(__doc__, EXAMPLES, epochs=None, batch_size=None, lr=1e-3)
    add, number = parser.add_argument, common.number
    add("--T", metavar="N", type=number(int, 2, 10000), default=1000, help="steps of the chain")
    add("--schedule", choices=["linear", "cosine", "logsnr"], default="linear", help="of the noise")
    add("--predict", choices=["v", "eps", "x0", "mu"], default="v",
        help="what the network's output stands for")
    add("--fourier", action="store_true", help="show the network its input's sines too: for likelihood")
    add("--loss", choices=["simple", "vlb"], default="simple", help="Ho's L_simple, or the bound itself")
    add("--times", choices=["uniform", "focused"],
        help="how training draws t: as Ho, or where it teaches most, for better digits in fewer epochs "
             "(default: focused with v, the linear schedule and L_simple, else uniform)")
    add("--sigma", choices=["beta", "posterior", "optimal"],
        help="σ² of the reverse steps: β, β̃, which is better in few steps, or fitted to the network "
             "(default: posterior; with --sample the checkpoint's)")
    add("--optimizer", choices=["muon", "adam"], default="muon",
        help="of the inner convolutions, with 20 times --lr; all else is trained by Adam")
    add("--sample", metavar="N", type=number(int, 1, 10000),
        help="draw N samples from the checkpoint and stop")
    add("--steps", metavar="K", type=number(int, 1, 10000),
        help="network evaluations a sample takes, at most T (default: T on a GPU, 20 on a CPU)")
    add("--eta", metavar="X", type=number(float, 0, 1), default=1.0, help="1: ancestral sampling; 0: DDIM")
    return parser.parse_args(argv)


def main(argv=None, watch=None):
    args = parse(argv)
    device, out = common.pick_device(args.device), Path(args.out)
    model = load(out / "ddpm.pt", device) if args.sample else None
    T = model.T if model else args.T
    args.steps = args.steps or (T if device.type == "cuda" else min(T, 20))
    if args.steps > T:
        raise common.InputError(f"--steps {args.steps} is more than the chain's T = {T}")
    usual = (args.predict, args.schedule, args.loss) == ("v", "linear", "simple")
    args.times = args.times or ("focused" if usual else "uniform")
    if (args.times, args.loss) == ("focused", "vlb"):
        raise common.InputError("--loss vlb is the bound for uniform t alone: leave out --times focused")
    if model:
        common.output_folder(out)
        model.sigma = args.sigma or model.sigma
        torch.manual_seed(args.seed)
        with common.autocast(device), common.enough_memory("--sample", args.sample):
            x = model.sample(args.sample, args.steps, args.eta)
        data = common.NAMES[model.settings["data"]]
        common.plot_grid(x, out / "ddpm_sample.png", f"DDPM, {data}: {args.steps} steps, eta {args.eta:g}")
        return common.farewell("ddpm", out, ["ddpm_sample.png"], model.settings["data"])
    args.data, args.out = common.find_data(args.data, args.data_dir), common.output_folder(out)
    args.sigma = args.sigma or "posterior"
    args.epochs = args.epochs or (100 if device.type == "cuda" else 8 if common.has_bfloat16(device) else 3)
    # a short run learns more from twice the steps of half the size; a GPU would wait for its own launches
    args.batch_size = args.batch_size or (128 if device.type == "cuda" else 64)
    with common.locked(out):
        with common.enough_memory("--batch-size", args.batch_size):
            model, run = train(args, device, watch)
        if common.RANK:
            return
        torch.manual_seed(args.seed)
        with common.autocast(device):
            pictures = draw(model, run, args, device)
    common.farewell("ddpm", out, ["ddpm.pt", *pictures], args.data)


if __name__ == "__main__":
    common.run(main)
