"""The DDPM against oracles that share no code with it; then its training and its command."""

import copy
import itertools
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Normal, kl_divergence

import common
import ddpm
import vae
from ddpm import DDPM, SIGMAS

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = (1, 4, 4)
F64 = torch.float64
BOTH_SIGMAS = pytest.mark.parametrize("sigma", SIGMAS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    """Equal to the rounding of float64, unless told otherwise."""
    actual, expected = (torch.as_tensor(x, dtype=F64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def column(table):
    return table.view(-1, 1, 1, 1)


def linear(T=1000):
    """β_0 ... β_T and ᾱ_0 ... ᾱ_T of Ho, section 4."""
    beta = [0.0]
    beta += [min(0.999, (1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T) for i in range(T)]
    alpha_bar = [math.prod(1 - b for b in beta[: t + 1]) for t in range(T + 1)]
    return torch.tensor(beta, dtype=F64), torch.tensor(alpha_bar, dtype=F64)


def variances(sigma, T):
    """σ_t² for t = 1 ... T.  β̃_t: the precisions of q(x_{t-1}|x_0) and q(x_t|x_{t-1}) add."""
    beta, alpha_bar = linear(T)
    if sigma == "beta":
        return beta[1:]
    tilde = 1 / (1 / (1 - alpha_bar[1:-1]) + (1 - beta[2:]) / beta[2:])
    return torch.cat([tilde[:1], tilde])  # β̃_1 = 0 would be no decoder: β̃_2


@pytest.fixture
def k():
    """For each t = 1 ... 1000: x_0, ε, x_t, and the ε̂ of a network that is wrong."""
    k = SimpleNamespace(t=torch.arange(1, 1001))
    k.x0, k.eps, k.eps_hat = torch.randn(3, 1000, *TINY, dtype=F64)
    k.beta, k.alpha_bar = (column(table[1:]) for table in linear())
    k.signal, k.noise = k.alpha_bar.sqrt(), (1 - k.alpha_bar).sqrt()
    k.xt = k.signal * k.x0 + k.noise * k.eps  # Ho (4)
    return k


def mean_of(k, eps):
    """μ̃ of ε, μ_θ of ε_θ.  Report (68) and (72)"""
    return (k.xt - k.beta / k.noise * eps) / (1 - k.beta).sqrt()


def levels(*shape):
    """8-bit pixels, black and white among them, on the scale of the model."""
    x = torch.randint(0, 256, shape)
    x.view(-1)[:2] = torch.tensor([0, 255])
    return 2 * x.double() / 255 - 1


def spied(sigma="beta", T=12, clip=False):
    """A chain whose network is wrong at each t in its own way; what it saw."""
    seen = []

    def net(xt, t):
        seen.append((xt, t))
        return torch.tanh(xt) * (0.5 + column(t) / T)

    return DDPM(net, T=T, sigma=sigma, clip=clip, shape=TINY), seen


def small(T=4, width=4):
    """A chain with a U-Net of which nothing is zero, as after training."""
    model = DDPM(ddpm.UNet(width=width, T=T), T=T, loss="v")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


# ---- schedules


def test_the_linear_chain_is_that_of_the_paper():
    model, (beta, alpha_bar) = DDPM(None), linear()
    close(model.beta, beta)
    close(model.alpha_bar, alpha_bar)


def test_the_defaults_are_those_of_the_trained_models():
    model = DDPM(None)
    assert (model.T, model.sigma, model.clip) == (1000, "posterior", True)
    assert not model.state_dict()  # tables are computed, not loaded


def test_the_cosine_schedule():
    f = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(100)]
    expected = [f_t / f[0] for f_t in [*f, 1e-3 * f[-1]]]  # β_T is cut to 0.999
    close(DDPM(None, 100, "cosine").alpha_bar, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("T", [2, 10, 4000])
def test_a_chain_of_any_length_ends_in_noise(T, schedule):
    model = DDPM(None, T, schedule)
    assert model.T == T and model.beta[1:].min() > 0 and model.beta.max() < 1
    assert model.alpha_bar[-1].sqrt() < 0.1


# ---- q and p


def test_q_sample_is_the_chain_run_step_by_step():
    T, n = 8, 200_000
    beta, _ = linear(T)
    x0 = torch.full((n, 1, 1, 1), 0.7, dtype=F64)
    x = x0
    for t in range(1, T + 1):
        x = (1 - beta[t]).sqrt() * x + beta[t].sqrt() * torch.randn_like(x)  # Ho (2)
        xt = DDPM(None, T).q_sample(x0, torch.full((n,), t), torch.randn_like(x0))
        assert abs(xt.mean() - x.mean()) < 5 * x.std() * math.sqrt(2 / n)  # standard errors
        assert abs(xt.var() / x.var() - 1) < 5 * math.sqrt(4 / n)


@pytest.mark.parametrize("t", [2, 500, 1000])
def test_q_posterior_is_bayes_rule(t):
    beta, alpha_bar = linear()
    before, now = alpha_bar[t - 1], alpha_bar[t]
    x0, xt = 0.3, now.sqrt() * 0.3 + 0.8 * (1 - now).sqrt()
    x = torch.linspace(-8, 8, 400_001, dtype=F64)  # x_{t-1}
    of_x0 = -((x - before.sqrt() * x0) ** 2) / (2 * (1 - before))  # log q(x_{t-1}|x_0)
    of_xt = -((xt - (1 - beta[t]).sqrt() * x) ** 2) / (2 * beta[t])  # log q(x_t|x_{t-1})
    p = torch.softmax(of_x0 + of_xt, 0)
    mean = (p * x).sum()
    image = torch.ones(1, 1, 1, 1, dtype=F64)
    q_mean, q_variance = DDPM(None).q_posterior(x0 * image, xt * image, torch.tensor([t]))
    close(q_mean.item(), mean, rtol=1e-8)
    close(q_variance.item(), (p * (x - mean) ** 2).sum(), rtol=1e-8)


@BOTH_SIGMAS
def test_p_has_the_mean_of_ho_11_and_the_chosen_variance(k, sigma):
    model = DDPM(lambda *_: k.eps_hat, sigma=sigma, clip=False)
    mean, variance = model.p_mean_variance(k.xt, k.t)
    close(mean, mean_of(k, k.eps_hat), rtol=1e-9, atol=1e-9)
    close(variance, column(variances(sigma, 1000)))


def test_clipping_keeps_x0_hat_in_range(k):
    x0_hat = DDPM(lambda *_: k.eps).predict_x0(k.xt, k.t)
    close(x0_hat, k.x0.clamp(-1, 1), rtol=1e-9, atol=1e-9)


# ---- the loss: each weight makes it the mean squared error of another quantity


def loss_of(k, name, sigma="posterior"):
    """DDPM's, for the ε_θ = ε̂ that is wrong."""

    def net(xt, t):
        close(xt, k.xt)
        assert torch.equal(t, k.t)
        return k.eps_hat

    model = DDPM(net, loss=name, sigma=sigma)
    loss = model.loss(k.x0, k.t, k.eps)
    assert torch.equal(model(k.x0, k.t, k.eps), loss)  # forward is the loss
    return loss


def test_loss_simple_is_the_error_of_eps(k):
    close(loss_of(k, "simple"), F.mse_loss(k.eps_hat, k.eps))


@BOTH_SIGMAS
def test_loss_bound_is_the_kl_divergence_of_two_means(k, sigma):
    deviation = column(variances(sigma, 1000)).sqrt()
    q, p = (Normal(mean_of(k, eps), deviation) for eps in (k.eps, k.eps_hat))
    close(loss_of(k, "bound", sigma), kl_divergence(q, p).mean())  # Ho (12) without its constant


def test_loss_mu_is_the_error_of_the_mean(k):
    close(loss_of(k, "mu"), F.mse_loss(mean_of(k, k.eps_hat), mean_of(k, k.eps)))


def test_loss_x0_is_the_error_of_x0(k):
    x0_hat = (k.xt - k.noise * k.eps_hat) / k.signal
    close(loss_of(k, "x0"), F.mse_loss(x0_hat, k.x0))


def test_loss_v_is_the_error_of_v(k):
    v = k.signal * k.eps - k.noise * k.x0  # Salimans & Ho, appendix D
    v_hat = torch.randn_like(v)
    k.eps_hat = k.noise * k.xt + k.signal * v_hat
    close(loss_of(k, "v"), F.mse_loss(v_hat, v))


def test_the_loss_draws_t_uniformly_and_its_own_noise():
    model, seen = spied(T=10)
    model.loss(torch.zeros(20000, *TINY))
    ((xt, t),) = seen
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() == 10
    assert (t.bincount()[1:] - 2000).abs().max() < 5 * math.sqrt(2000 * 0.9)
    eps = xt / column(1 - linear(10)[1][t]).sqrt()
    assert abs(eps.mean()) < 0.009 and abs(eps.std() - 1) < 0.006  # five standard errors


def test_focused_times_have_the_distribution_that_is_said():
    n, T = 20000, 1000
    t = ddpm.draw_t(n, T, "focused")
    assert t.min() == 1 and t.max() <= T
    for bound in 1, 10, 100, 200, 400, 600, 900:
        u = 2 * math.log(bound / (T - bound)) + 1.2  # at which T sigmoid(u/2 - 0.6) = bound
        middle = 0.5 + 0.5 * math.erf(u / math.sqrt(2))
        fine = math.log(bound + 1) / math.log(T + 1)  # P((T+1)^u < bound + 1)
        share = 0.75 * middle + 0.25 * fine
        error = math.sqrt(share * (1 - share) / n)
        assert (t <= bound).double().mean().item() == pytest.approx(share, abs=5 * error)


# ---- the bound


@BOTH_SIGMAS
def test_vlb_terms_are_the_kl_divergences(sigma):
    model, seen = spied(sigma, T=50)
    x0 = levels(5, *TINY)
    terms = model.vlb_terms(x0)
    assert terms.shape == (5, model.T + 1) and terms.min() >= 0
    asked = {t[0].item(): (xt, t) for xt, t in seen}  # at t = 1 the last counts: that of L_0
    assert sorted(asked) == list(range(1, model.T + 1))
    for s, (xt, t) in asked.items():
        mean, variance = model.p_mean_variance(xt, t)
        if s == 1:
            L = -ddpm.log_discretized_normal(x0, mean, variance.sqrt())
        else:
            q_mean, q_variance = model.q_posterior(x0, xt, t)
            q = Normal(q_mean, q_variance.sqrt())
            L = kl_divergence(q, Normal(mean, variance.sqrt())).flatten(1).sum(1)
        close(terms[:, s - 1], L, rtol=1e-8)
    a = linear(model.T)[1][-1]
    L_T = kl_divergence(Normal(a.sqrt() * x0, (1 - a).sqrt()), Normal(0.0, 1.0))
    close(terms[:, -1], L_T.flatten(1).sum(1), rtol=1e-7)  # the oracle cancels


@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.999, 0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.05, 0.5, 3.0])
def test_the_256_levels_share_the_whole_probability(mean, sigma):
    x0 = column(torch.arange(256.0) / 127.5 - 1)  # float32, as the images are
    log_p = ddpm.log_discretized_normal(x0, torch.full_like(x0, mean), torch.tensor(sigma))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_a_level_has_the_mass_between_its_edges():
    x0, sigma = levels(7, 1, 6, 6), torch.rand(7, 1, 1, 1, dtype=F64) + 0.05
    mean = x0 + 2 * sigma * torch.randn_like(x0)
    normal = Normal(mean, sigma)
    high = torch.where(x0 > 0.999, 1.0, normal.cdf(x0 + 1 / 255))
    low = torch.where(x0 < -0.999, 0.0, normal.cdf(x0 - 1 / 255))
    mass = (high - low).log().flatten(1).sum(1)
    close(ddpm.log_discretized_normal(x0, mean, sigma), mass, rtol=1e-6)  # the oracle's digits


# ---- data whose best network is known: each pixel ~ N(0, S²)

S = 0.25
COUNT = 10_000


def closed_form(a, sigma):
    """Of a chain with ᾱ: E L_{t-1} for t = 2 ... T, and E L_0 of a density, per pixel.

    All is normal: Var x_t = ᾱ_t S² + 1 - ᾱ_t, E(x_0 - x̂_0)² = S² (1-ᾱ_t) / Var x_t, and
    precisions add.
    """
    before, a = a[:-1], a[1:]
    alpha = a / before
    mse = S**2 * (1 - a) / (a * S**2 + 1 - a)
    tilde = 1 / (1 / (1 - before) + alpha / (1 - alpha))  # of x_{t-1} given x_t and x_0
    shift = (tilde * before.sqrt() / (1 - before)) ** 2 * mse  # E of the means' squared distance
    v = 1 - alpha if sigma == "beta" else torch.cat([tilde[1:2], tilde[1:]])
    L_0 = ((2 * math.pi * v[0]).log() + mse[0] / v[0]) / 2
    return ((v / tilde).log() + (tilde + shift) / v - 1)[1:] / 2, L_0


def gaussian(sigma, steps):
    """A chain of 200 steps with the best network for these data, respaced."""
    a = column(linear(200)[1])
    slope = (1 - a).sqrt() / (a * S**2 + 1 - a)  # E[ε|x_t] = slope x_t: the regression on x_t
    model = DDPM(lambda xt, t: slope[t] * xt, T=200, sigma=sigma, clip=False, shape=TINY)
    return model.respace(steps)


def test_the_bound_is_exact_and_gains_from_steps():
    x0, gaps = S * torch.randn(COUNT, *TINY, dtype=F64), {"beta": [], "posterior": []}
    truth = math.log(2 * math.pi * math.e * S**2) / 2  # E[-log p(x_0)]
    for steps, sigma in itertools.product((2, 5, 20, 200), gaps):
        chain = gaussian(sigma, steps)
        (L, L_0), a = closed_form(chain.alpha_bar, sigma), chain.alpha_bar[-1]
        # but for column 0, which is for 8-bit pixels: here L_0 is of a density
        terms = ddpm.vlb_terms(chain, x0, ddpm.x0_errors(chain, x0))[:, 1:].mean(0) / 16
        close(terms[:-1], L, rtol=0.02)
        close(terms[-1], (a * S**2 - a - torch.log1p(-a)) / 2, rtol=0.02)  # E L_T
        gaps[sigma].append((terms.sum() + L_0).item() - truth)
    assert min(gaps["beta"] + gaps["posterior"]) > 0.01
    assert gaps["beta"] == sorted(gaps["beta"], reverse=True)  # not so β̃_2 at t = 1


def test_samples_have_nearly_the_spread_of_the_data():
    trajectory = gaussian("beta", 200).trajectory(torch.randn(COUNT, *TINY, dtype=F64))
    (_, _, x0_hat), (_, x0, _) = deque(trajectory, maxlen=2)
    assert torch.equal(x0, x0_hat)  # no noise in the last step
    assert x0.std().item() == pytest.approx(S, rel=0.07)


# ---- sampling


@BOTH_SIGMAS
def test_the_sampler_is_algorithm_2_line_by_line(sigma):
    model, seen = spied(sigma)
    beta, alpha_bar = linear(12)
    near = {"rtol": 1e-5, "atol": 1e-6}  # at ᾱ_T = 1e-8 the way over x̂_0 loses half the digits
    x = torch.randn(2, *TINY, dtype=F64)  # line 1
    torch.manual_seed(3)
    ours = list(model.trajectory(x))
    assert [t for t, _, _ in ours] == list(range(12, -1, -1))
    assert [t.tolist() for _, t in seen] == [[t, t] for t in range(12, 0, -1)]
    torch.manual_seed(3)
    for t, xt, x0_hat in ours[:-1]:  # line 2
        close(xt, x, **near)
        eps = torch.tanh(x) * (0.5 + t / 12)  # ε_θ(x_t, t) of spied
        noise = (1 - alpha_bar[t]).sqrt()
        close(x0_hat, (x - noise * eps) / alpha_bar[t].sqrt(), **near)
        z = torch.randn_like(x) if t > 1 else 0  # line 3
        mean = (x - beta[t] / noise * eps) / (1 - beta[t]).sqrt()
        x = mean + variances(sigma, 12)[t - 1].sqrt() * z  # line 4
    close(ours[-1][1], x, **near)  # line 6
    assert [t for t, _, _ in model.trajectory(x, start=4)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_eta_below_1_is_ddim_in_any_number_of_steps(steps, eta):
    model, seen = spied(T=30)
    chain = model.respace(steps)
    tau, a = chain.tau.tolist(), linear(30)[1]
    x = torch.randn(3, *TINY, dtype=F64)
    torch.manual_seed(4)
    ours = list(chain.trajectory(x, eta))
    assert torch.equal(ours[0][1], x) and [t[0].item() for _, t in seen] == tau[:0:-1]
    torch.manual_seed(4)
    for i in range(steps, 0, -1):
        now, before = a[tau[i]], a[tau[i - 1]]
        eps = torch.tanh(x) * (0.5 + tau[i] / 30)
        sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()  # (16)
        x0_hat = (x - (1 - now).sqrt() * eps) / now.sqrt()
        towards = (1 - before - sigma**2).sqrt() * eps
        x = before.sqrt() * x0_hat + towards + sigma * torch.randn_like(x)  # (12)
        close(ours[steps - i + 1][1], x, rtol=1e-5, atol=1e-6)


def test_a_respaced_chain_repeats_no_time():
    model, _ = spied("posterior", T=100)
    assert model.respace(5).tau.tolist() == [0, 9, 25, 46, 72, 100]  # 100 (i/5)^1.5
    close(model.respace(1).variance[1], model.respace(1).beta[1])  # without β̃_2
    for steps in range(1, 101):
        tau = model.respace(steps).tau
        assert len(tau) == steps + 1 and tau[0] == 0 and tau[-1] == 100 and tau.diff().min() > 0


def test_a_respaced_chain_is_the_chain_at_its_times():
    model, _ = spied("posterior", T=100, clip=True)
    t, xt = torch.tensor([1, 2]), torch.randn(2, *TINY, dtype=F64)
    chain = model.respace(5).respace(2)
    times = torch.tensor([25, 100])  # 5 (1/2)^1.5 is 2
    close(chain.alpha_bar[t], linear(100)[1][times])
    close(chain.predict_x0(xt, t), model.predict_x0(xt, times))
    assert (chain.T, chain.clip, chain.sigma, chain.shape) == (2, True, "posterior", TINY)


def test_a_respaced_chain_can_be_pickled():
    chain = small(T=8).respace(4).respace(2)
    again = pickle.loads(pickle.dumps(chain))
    xt, t = torch.randn(1, 1, 28, 28), torch.tensor([2])
    assert torch.equal(again.predict_x0(xt, t), chain.predict_x0(xt, t))


@pytest.mark.parametrize("steps, eta, expected", [(None, 1, 60), (None, 0.5, 60), (6, 0, 6)])
def test_sample_takes_one_evaluation_a_step(steps, eta, expected):
    model, seen = spied(T=60)
    torch.manual_seed(5)
    x = model.sample(2, steps, eta)
    assert len(seen) == expected
    torch.manual_seed(5)
    *_, (_, x0, _) = model.respace(expected).trajectory(torch.randn(2, *TINY), eta)
    close(x, (x0 / 2 + 0.5).clamp(0, 1), rtol=1e-6, atol=1e-6)


# ---- another implementation: float32 tables, t from 0


@pytest.mark.parametrize("s", [1, 2, 500, 1000])
def test_q_and_p_agree_with_diffusers(s):
    diffusers = pytest.importorskip("diffusers")
    kind = {"variance_type": "fixed_small", "clip_sample": False}
    other = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", **kind)
    x0, eps, xt = torch.randn(3, 1, *TINY)
    model, t = DDPM(lambda *_: eps, clip=False), torch.tensor([s])
    close(model.q_sample(x0, t, eps), other.add_noise(x0, eps, t - 1), rtol=1e-4, atol=1e-4)
    mean, variance = model.p_mean_variance(xt, t)
    torch.manual_seed(1)
    after = other.step(eps, s - 1, xt).prev_sample
    torch.manual_seed(1)
    z = torch.randn_like(xt) if s > 1 else 0
    close(after, mean + variance.sqrt() * z, rtol=1e-4, atol=1e-4)


# ---- the network


@pytest.fixture(params=[(1, 28, 28), (3, 32, 20)], ids=str)
def unet(request):
    """A U-Net of which nothing is zero, four images, four t."""
    net = ddpm.UNet(request.param[0], width=8).requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return net, torch.randn(4, *request.param), torch.tensor([1, 2, 500, 1000])


def test_unet_sees_every_image_alone(unet):
    net, x, t = unet
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    assert alone.shape == x.shape and alone.dtype == x.dtype
    close(alone, net(x, t), rtol=1e-4, atol=1e-4)  # other kernels, in float32


def test_unet_sees_t(unet):
    net, x, t = unet
    v = net(0 * x, t) / column(linear()[1][t]).sqrt()
    assert all((v[i] - v[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_unet_ends_with_the_step_from_v_to_eps(k, dtype):
    """Its last convolution being only a bias, v is a pattern of 2 x 2 pixels."""
    xt = torch.randn(1000, 3, 4, 4)
    net = DDPM(ddpm.UNet(3, width=4)).to(dtype).requires_grad_(False).net
    assert not net.leave.weight.any()  # at first, ε_θ is √(1-ᾱ_t) x_t, plus a constant
    pattern = torch.arange(12) / 4
    net.leave.bias.copy_(pattern)
    eps = k.noise * xt + k.signal * pattern.view(3, 2, 2).tile(2, 2)
    close(net(xt, k.t), eps, rtol=1e-5, atol=1e-5)


def test_bfloat16_agrees_with_float32():
    model, x0, gradients = small(T=50, width=16), levels(8, 1, 28, 28).float(), []
    for fast in False, True:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = model.loss(x0)
        parts = torch.autograd.grad(loss, model.parameters())
        gradients.append(torch.cat([part.flatten() for part in parts]))
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.02 * exact.norm()


# ---- used from Python

NOISE = torch.randn(1, 1, 32, 32)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_every_function_works_in_any_dtype(dtype):
    model, x, t = small(T=3).to(dtype), levels(2, 1, 28, 28).to(dtype), torch.tensor([1, 3])
    found = [model.loss(x), model(x, t), model.q_sample(x, t, x), *model.q_posterior(x, x, t)]
    found += [model.predict_x0(x, t), *model.p_mean_variance(x, t)]
    for chain, eta in (model, 1.0), (model.respace(2), 0.5):
        found += [xt for _, xt, _ in chain.trajectory(x, eta)]
    assert all(each.dtype == dtype and each.isfinite().all() for each in found)
    images, terms = model.sample(2, 2), model.vlb_terms(x)
    assert images.shape == (2, 1, 28, 28) and images.isfinite().all()
    assert model.sample(0).shape == (0, 1, 28, 28)
    assert terms.shape == (2, 4) and terms.dtype == F64 and terms.isfinite().all()


def test_tables_keep_their_precision():
    model, exact = small(T=50), DDPM(None, T=50, loss="v")
    model.double().bfloat16().half().float()
    for name, table in exact.named_buffers():
        assert torch.equal(getattr(model, name), table), name
    close(model.net.noise_rate, exact.noise_rate)


def test_gradients_follow_their_weights():
    model = small().double()
    model(torch.zeros(1, 1, 28, 28)).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.float().parameters())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.sample(2, 4, eta=2.0), "eta .* 0 to 1, not 2.0"),
        (lambda m: m.sample(2, eta=-1), "eta .* 0 to 1, not -1"),
        (lambda m: m.sample(2, eta=math.nan), "eta .* 0 to 1, not nan"),
        (lambda m: m.sample(-1), "n .* 0 .*not -1"),
        (lambda m: m.sample(2, 0), "steps .* 1 to 4, not 0"),
        (lambda m: m.respace(5), "steps .* 1 to 4, not 5"),
        (lambda m: next(m.trajectory(NOISE, start=5)), "start .* 1 to 4, not 5"),
        (lambda m: m.net(NOISE[..., 2:, 2:], torch.tensor([1])), "of 4, .*30, 30"),
        (lambda m: DDPM(None, T=0), "T .* 1 .*not 0"),
        (lambda m: DDPM(None, 9, "sqrt"), "schedule .*linear, cosine, not 'sqrt'"),
        (lambda m: DDPM(None, sigma="tilde"), "sigma .*posterior, beta, not 'tilde'"),
        (lambda m: DDPM(None, loss="l1"), "loss .*simple, bound, mu, x0, v, not 'l1'"),
        (lambda m: ddpm.draw_t(3, 10, "early"), "times .*uniform, focused, not 'early'"),
    ],
)
def test_a_wrong_value_is_named_with_its_range(call, words):
    with pytest.raises(ValueError, match=words):
        call(small())


# ---- training, on 300 digits: 3 epochs of 18 steps, 12 images left out of each


def flags(digits, out, *more):
    text = "--limit 300 --epochs 3 --batch-size 16 --lr 4e-3 --T 8 --schedule cosine --width 8"
    given = ["--data-dir", digits, "--out", out, "--device", "cpu", *text.split(), *more]
    return [str(flag) for flag in given]


def checkpoint(out):
    return torch.load(out / "ddpm.pt", weights_only=True)


def digits_of(folder):
    args = ddpm.parse(["--data", "mnist", "--data-dir", str(folder)])
    x_train, _, x_test, _ = common.load_data(args, CPU)
    return x_train, x_test


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """An undisturbed run's folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    ddpm.main(flags(digits, out))
    return out


@pytest.fixture
def quick(monkeypatch):
    """Float32, and no pictures."""
    monkeypatch.setattr(common, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(common, "plot_grid", lambda *_: None)


def train(digits, out, more="", watch=None):
    args = ddpm.parse(flags(digits, out, "--width", 4, *more.split()))
    return ddpm.train(args, common.start(args), watch)


def test_the_pictures_of_a_run(trained):
    names = ["ddpm_loss.png", "ddpm_samples.png", "ddpm_trajectory.gif", "ddpm_trajectory.png"]
    assert sorted(os.listdir(trained)) == ["ddpm.pt", *names]
    pictures = [Image.open(trained / name) for name in names]
    assert pictures[2].n_frames == 9  # x_8 ... x_0
    assert all(picture.convert("L").getextrema()[1] > 100 for picture in pictures)  # not black


def test_load_takes_the_averaged_weights(trained):
    saved, model = checkpoint(trained), ddpm.load(trained / "ddpm.pt")
    for name, p in model.named_parameters():
        assert torch.equal(p, saved["ema"][name]) and not torch.equal(p, saved["model"][name])
    assert model.settings == saved["settings"] and model.settings["limit"] == 300


def test_the_test_loss_is_of_all_images_and_averaged_weights(trained, digits):
    model = ddpm.load(trained / "ddpm.pt")
    torch.manual_seed(0)
    with common.autocast(CPU):
        five, one = (model.loss(2 * (x / 255) - 1) for x in digits_of(digits)[1].split(500))
    found = checkpoint(trained)["history"][-1]["test_loss"]
    assert found == pytest.approx((5 * five + one).item() / 6, rel=1e-6)


@pytest.mark.parametrize("recipe, times", [("short", "focused"), ("paper", "uniform")])
def test_training_is_algorithm_1(digits, tmp_path, quick, recipe, times):
    """Two epochs of 27 steps, with a decaying rate and an average: the same to rounding."""
    more = "--seed 3 --batch-size 11 --T 100 --lr 5e-3 --schedule linear --epochs 2"
    result, history = train(digits, tmp_path, f"{more} --recipe {recipe}")
    saved = checkpoint(tmp_path)

    torch.manual_seed(3_000_000)
    net = ddpm.UNet(1, 4, T=100)
    start, average = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters())
    for epoch in range(2):
        torch.manual_seed(3_000_001 + epoch)
        order, losses = torch.randperm(300), []  # 297 of them are seen
        for step in range(27):
            before = 27 * epoch + step
            done = (before + 0.5) / 54
            rate = 5e-3 * min(1, 50 * done) * (1 + math.cos(math.pi * done)) / 2
            optimizer.param_groups[0]["lr"] = rate
            x = digits_of(digits)[0][order[11 * step : 11 * (step + 1)]]
            x0 = 2 * x.float() / 255 - 1
            t = ddpm.draw_t(11, 100, times)
            eps = torch.randn(x0.shape)
            a = column(linear(100)[1].float()[t])
            signal, noise = a.sqrt(), (1 - a).sqrt()
            xt = signal * x0 + noise * eps
            out, target = net(xt, t), eps
            if recipe == "short":  # the same network as one that predicts v
                out, target = (out - noise * xt) / signal, signal * eps - noise * x0
            loss = F.mse_loss(out, target)
            net.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                for mean, p in zip(average.parameters(), net.parameters(), strict=True):
                    mean.copy_(mean + 20 / (20 + before) * (p - mean))
        assert history[epoch]["train_loss"] == pytest.approx(sum(losses) / 27, rel=1e-3)
    for part, expected in ("model", net.state_dict()), ("ema", average.state_dict()):
        for name, value in expected.items():
            moved = (value - start[name]).norm()
            assert (saved[part][f"net.{name}"] - value).norm() < 2e-3 * moved + 1e-6, name
    assert all(torch.equal(p, saved["ema"][name]) for name, p in result.named_parameters())


SHORT = "--loss=v --times=focused --width=32 --epochs=12 --lr=4e-3 --T=1000 --schedule=linear"
SHORT += " --sigma=posterior --batch-size=64"
BEST = SHORT + " --width=64 --epochs=100 --lr=1e-3"
PAPER = BEST + " --loss=simple --times=uniform"
OTHER = "--loss=bound --times=uniform --width=4 --epochs=7 --lr=0.5 --T=30 --schedule=cosine"
OTHER += " --sigma=beta --batch-size=5"


@pytest.mark.parametrize(
    "given, meant",
    [("", SHORT), ("--recipe=paper", PAPER), ("--recipe=best", BEST), (OTHER, OTHER)],
)
def test_recipes_are_defaults_and_flags_win(monkeypatch, digits, tmp_path, capsys, given, meant):
    drawn = []

    def stop(*inputs):
        drawn.extend(inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(DDPM, "forward", stop)
    where = ["--data-dir", str(digits), "--out", str(tmp_path)]
    args, expected = (ddpm.parse([*where, *text.split()]) for text in (given, meant))
    with pytest.raises(KeyboardInterrupt):
        ddpm.train(args, CPU)
    assert capsys.readouterr().out.startswith(f"recipe {args.recipe}")
    expected = {name: value for name, value in vars(expected).items() if value is not None}
    assert expected.items() <= vars(args).items()
    model, *inputs = drawn
    same = DDPM(model.net, args.T, args.schedule, args.sigma, loss=args.loss)
    assert torch.equal(model.loss(*inputs), same.loss(*inputs))
    assert (model.net.width, len(inputs[0])) == (args.width, args.batch_size)


def test_a_batch_is_at_most_the_data_and_watch_adds_a_column(digits, tmp_path, quick):
    seen = []
    watch = lambda *given: seen.append(given) or {"n": 5}  # noqa: E731
    model, _ = train(digits, tmp_path, "--limit 50 --batch-size 999", watch)
    assert seen == [(model, 1), (model, 2), (model, 3)]
    assert [row["n"] for row in checkpoint(tmp_path)["history"]] == [5, 5, 5]


def test_compile_wraps_the_model_once(digits, tmp_path, quick, monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: wrapped.append(model) or model)
    train(digits, tmp_path, "--limit 16 --epochs 2 --compile")
    assert [type(model) for model in wrapped] == [DDPM]


COMMITTED_LOSS = 0.02054  # of the run of 100 epochs, on 600 test digits
COMMITTED_ELBO = 139.4  # nats


def test_the_committed_weights_are_of_the_long_run(digits):
    paths = [REPO / "pretrained" / name for name in ("ddpm.pt", "vae.pt")]
    assert sum(path.stat().st_size for path in paths) < 6e6
    model, autoencoder = ddpm.load(paths[0]), vae.load(paths[1])
    assert model.settings["epochs"] == autoencoder.settings["epochs"] == 100
    _, x = digits_of(digits)
    assert ddpm.evaluate(model, x, seed=0) == pytest.approx(COMMITTED_LOSS, rel=0.02)
    reconstruction, kl = autoencoder.elbo_terms(x / 255, samples=8)
    assert (kl - reconstruction).mean().item() == pytest.approx(COMMITTED_ELBO, rel=0.01)


# ---- the same command goes on


def same_end(out, other):
    """Both runs ended with the same bits: weights, their average, optimizer, history."""
    a, b = checkpoint(out), checkpoint(other)
    for row in a["history"] + b["history"]:
        row["seconds"] = 0
    assert a.pop("settings") == b.pop("settings") and a.pop("kind") == b.pop("kind")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_killed_run_goes_on_to_the_same_bits(trained, digits, tmp_path):
    command = [sys.executable, str(REPO / "ddpm.py"), *flags(digits, tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=one_thread, stdout=subprocess.PIPE, text=True) as child:
        assert any(line.startswith("epoch 1 ") for line in child.stdout)
        child.kill()
    assert child.returncode != 0 and len(checkpoint(tmp_path)["history"]) < 3
    ddpm.main(flags(digits, tmp_path))
    same_end(tmp_path, trained)


def at_step(patch, number, action):
    """In training step `number`, counted from 1, the loss becomes action(loss)."""
    steps = itertools.count(1)

    def forward(self, *given):
        loss = self.loss(*given)
        return action(loss) if next(steps) == number else loss

    patch.setattr(DDPM, "forward", forward)


def test_after_ctrl_c_it_goes_on_to_the_same_bits(digits, tmp_path, quick, monkeypatch):
    def interrupt(loss):
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "parts"
    train(digits, whole, "--recipe paper")
    for step in 19, 20:  # in epoch 2; then in epoch 3
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            at_step(patch, step, interrupt)
            common.run(lambda: train(digits, out, "--recipe paper"))
        assert "\nstopped: the same command goes on after the last" in stop.value.code
    assert len(checkpoint(out)["history"]) == 2 and os.listdir(out) == ["ddpm.pt"]
    train(digits, out)  # the recipe is the checkpoint's
    same_end(out, whole)


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the checkpoint, which must stay as it is."""
    path = Path(shutil.copy(trained / "ddpm.pt", tmp_path))
    yield path
    assert path.read_bytes() == (trained / "ddpm.pt").read_bytes()


def test_a_finished_run_draws_again(finished, digits, capsys):
    ddpm.main(flags(digits, finished.parent, "--steps", 2))
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{finished} is finished: delete it or choose another --out to train anew"
    assert last == f"wrote the pictures ddpm_* in {finished.parent}/"


@pytest.mark.parametrize(
    "change",
    ["recipe short paper", "loss v mu", "times focused uniform", "width 8 9", "T 8 9", "seed 0 1"]
    + ["sigma posterior beta", "epochs 3 4", "data mnist kmnist"],
)
def test_a_contradicting_flag_is_one_line(finished, change):
    name, value, other = change.split()
    for more in f"--{name}={other}", f"--{name}={other} --sample=4":
        with pytest.raises(common.InputError) as stop:
            ddpm.main(f"--out {finished.parent} --device=cpu {more}".split())
        expected = f"{finished} has {name} {value}, not {other}: choose another --out"
        assert str(stop.value) == expected


def test_sample_draws_from_the_checkpoint(finished, monkeypatch):
    drawn, out = [], finished.parent
    monkeypatch.setattr(common, "plot_grid", lambda x, path, _: drawn.append(x) or path.touch())
    for more in "3", "3", "3 --eta 0", "2", "8", "99":
        ddpm.main(f"--out {out} --device cpu --sample 12 --steps {more}".split())
    first, again, ddim, fewer, whole, more = drawn
    assert torch.equal(first, again) and torch.equal(whole, more)  # T = 8 steps are all
    assert not torch.equal(first, ddim) and not torch.equal(first, fewer)
    model = ddpm.load(finished)
    torch.manual_seed(0)
    with common.autocast(CPU):
        assert torch.equal(first, model.sample(12, 3))


def test_a_diverging_run_ends_before_it_is_saved(digits, tmp_path, quick, monkeypatch):
    at_step(monkeypatch, 36, lambda loss: loss * math.inf)  # the last of epoch 2
    try:
        train(digits, tmp_path)
    except Exception as error:  # a library's user can catch it
        assert "not finite in epoch 2: lower --lr" in str(error)
    assert len(checkpoint(tmp_path)["history"]) == 1


@pytest.mark.parametrize(
    "wrong",
    ["--epochs 0", "--batch-size 0", "--lr nan", "--T 1", "--steps 0", "--recipe long", "--eta 2"]
    + ["--eta nan", "--schedule sqrt", "--sigma learned", "--loss l1", "--times late", "--width 3"]
    + ["--device tpu", "--sample 0", "--data cifar", "--size 7", "--resume"],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, wrong):
    monkeypatch.delattr(DDPM, "forward")  # no long work comes first
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: ddpm.main(["--out", str(tmp_path / "out"), *wrong.split()]))
    message = capsys.readouterr().err or str(stop.value)
    assert stop.value.code != 0 and "\n" not in message.strip()
    assert message.startswith("error: ") and wrong.split()[0] in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # nothing is written
