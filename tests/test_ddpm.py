import contextlib
import copy
import io
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Normal, kl_divergence

import common
import ddpm
import vae
from ddpm import DDPM

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = (1, 4, 4)
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    """Equal to the rounding of float64, unless told otherwise."""
    actual, expected = (torch.as_tensor(x, dtype=F64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def linear(T=1000):
    """β_0 ... β_T and ᾱ_0 ... ᾱ_T of Ho, section 4, for all that the tests compute by themselves."""
    beta = [0.0] + [min(0.999, (1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T) for i in range(T)]
    alpha_bar = [math.prod(1 - b for b in beta[:t + 1]) for t in range(T + 1)]
    return torch.tensor(beta, dtype=F64), torch.tensor(alpha_bar, dtype=F64)


def tilde(beta, alpha_bar, t):
    """β̃_t for t > 1: the precisions of q(x_{t-1}|x_0) and q(x_t|x_{t-1}) add."""
    return 1 / (1 / (1 - alpha_bar[t - 1]) + (1 - beta[t]) / beta[t])


def column(table):
    return table.view(-1, 1, 1, 1)


def levels(*shape):
    """8-bit pixels, black and white among them, on the scale of the model."""
    x = torch.randint(0, 256, shape)
    x.view(-1)[:2] = torch.tensor([0, 255])
    return ddpm.to_model(x.double() / 255)


def spied(sigma="beta", predict="eps", T=12, **kwargs):
    """A chain whose network is wrong in its own way at each t, and the list of what it was asked."""
    seen = []

    def net(xt, t):
        seen.append((xt, t))
        return torch.tanh(xt) * (0.5 + column(t) / T)
    return DDPM(net, T=T, predict=predict, sigma=sigma, shape=TINY, **kwargs), seen


# ---- schedules

def test_the_chain_of_the_constructor_is_that_of_the_paper():
    model = DDPM(None)
    beta, alpha_bar = linear()
    close(model.beta, beta)
    close(model.alpha_bar, alpha_bar)
    close(model.alpha, 1 - beta)
    assert model.beta[[0, 1, 1000]].tolist() == pytest.approx([0, 1e-4, 0.02], rel=1e-10)
    assert (model.T, model.predict, model.sigma, model.clip) == (1000, "eps", "beta", False)
    assert model.shape == (1, 28, 28) and model.beta.dtype == F64 and not model.state_dict()
    for wrong in dict(predict="score"), dict(sigma="learned"), dict(schedule="sqrt"):
        with pytest.raises(ValueError, match=repr(*wrong.values())):
            DDPM(None, **wrong)


def test_the_cosine_schedule_and_chains_of_any_length():
    def f(t):
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2
    cosine = DDPM(None, 100, "cosine").alpha_bar
    close(cosine, [f(t) / f(0) for t in range(100)] + [1e-3 * f(99) / f(0)])  # β_T is clipped to 0.999
    for T, schedule in itertools.product((2, 10, 4000), ("linear", "cosine")):
        model = DDPM(None, T, schedule)
        assert (model.alpha_bar.diff() < 0).all() and (model.beta[1:] > 0).all() and (model.beta < 1).all()
        assert model.T == T and model.alpha_bar[-1].sqrt() < 0.1  # it ends in noise


# ---- q

def test_q_sample_is_the_chain_run_step_by_step():
    T, n = 8, 200_000
    beta, _ = linear(T)
    model, x0 = DDPM(None, T=T), torch.full((n, 1, 1, 1), 0.7, dtype=F64)
    x = x0
    for t in range(1, T + 1):
        x = (1 - beta[t]).sqrt() * x + beta[t].sqrt() * torch.randn_like(x)  # Ho (2)
        xt = model.q_sample(x0, torch.full((n,), t), torch.randn_like(x0))
        # Five standard errors of a difference of two means, and of two variances, of n draws.
        assert abs(xt.mean() - x.mean()) < 5 * x.std() * math.sqrt(2 / n)
        assert abs(xt.var() / x.var() - 1) < 5 * math.sqrt(4 / n)


@pytest.mark.parametrize("t", [2, 500, 1000])
def test_q_posterior_is_bayes_rule(t):
    beta, alpha_bar = linear()
    x0, xt = 0.3, alpha_bar[t].sqrt() * 0.3 + 0.8 * (1 - alpha_bar[t]).sqrt()
    x = torch.linspace(-8, 8, 400_001, dtype=F64)  # x_{t-1}: 170 points a standard deviation at t = 2
    before = alpha_bar[t - 1]
    p = torch.softmax(-(x - before.sqrt() * x0) ** 2 / (2 * (1 - before))  # q(x_{t-1}|x_0)
                      - (xt - (1 - beta[t]).sqrt() * x) ** 2 / (2 * beta[t]), 0)  # times q(x_t|x_{t-1})
    mean = (p * x).sum()
    image = torch.ones(1, 1, 1, 1, dtype=F64)
    q_mean, q_variance = DDPM(None).q_posterior(x0 * image, xt * image, torch.tensor([t]))
    close(q_mean.item(), mean, rtol=1e-8)
    close(q_variance.item(), (p * (x - mean) ** 2).sum(), rtol=1e-8)


# ---- p and the losses

@pytest.mark.parametrize("predict", ["eps", "x0", "mu", "v"])
def test_p_is_q_with_the_guess_at_x0_in_whichever_form_it_comes(predict):
    beta, alpha_bar = linear()
    t, late = torch.arange(1, 1001), torch.arange(2, 1001)
    xt, x0 = torch.randn(2, 1000, *TINY, dtype=F64)
    a, b = column(alpha_bar[t]), column(beta[t])
    eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()  # Ho (4)
    mu = (xt - b / (1 - a).sqrt() * eps) / (1 - b).sqrt()  # Ho (11)
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    out = {"eps": eps, "x0": x0, "mu": mu, "v": v}[predict]
    beta_tilde = column(tilde(beta, alpha_bar, late))
    # β̃_1 = 0 would be no decoder
    for sigma, variance in ("beta", b), ("posterior", torch.cat([beta_tilde[:1], beta_tilde])):
        model, clipped = (DDPM(lambda *_: out, predict=predict, sigma=sigma, clip=clip)
                          for clip in (False, True))
        close(model.predict_x0(xt, t), x0, rtol=1e-9, atol=1e-9)  # rounding, times up to 1/√ᾱ_T
        mean, p_variance = model.p_mean_variance(xt, t)
        close(mean, mu, rtol=1e-9, atol=1e-9)
        close(p_variance, variance)
        x0_hat = x0.clamp(-1, 1)
        close(clipped.predict_x0(xt, t), x0_hat, rtol=1e-9, atol=1e-9)
        mean, _ = model.p_mean_variance(xt, t, x0_hat)
        close(clipped.p_mean_variance(xt, t)[0], mean, rtol=1e-9, atol=1e-9)
    mean, variance = model.q_posterior(x0, xt, t)
    close(mean, mu, rtol=1e-9, atol=1e-9)
    close(variance, torch.cat([torch.zeros(1, 1, 1, 1), beta_tilde]))
    close(model.mu_from_eps(xt, t, eps), mu, rtol=1e-9, atol=1e-9)
    close(model.eps_from_x0(xt, t, x0), eps, rtol=1e-9, atol=1e-9)
    close(model.v_from_x0(xt, t, x0), v, rtol=1e-9, atol=1e-9)


def test_simple_loss_is_the_mean_squared_error_of_what_is_predicted():
    x0, eps, out = torch.randn(3, 4, *TINY, dtype=F64)
    t = torch.tensor([1, 2, 9, 10])
    beta, alpha_bar = (column(table[t]) for table in linear(10))
    noise = (1 - alpha_bar).sqrt()
    xt = alpha_bar.sqrt() * x0 + noise * eps
    mu = (xt - beta / noise * eps) / (1 - beta).sqrt()  # Ho (11)
    for predict, target in ("eps", eps), ("x0", x0), ("mu", mu), ("v", alpha_bar.sqrt() * eps - noise * x0):
        asked = []
        model = DDPM(lambda *inputs: asked.append(inputs) or out, T=10, predict=predict)
        close(model.loss(x0, t, eps), ((out - target) ** 2).sum() / out.numel(), rtol=1e-9)
        close(asked[0][0], xt)
        assert torch.equal(asked[0][1], t)


def test_the_loss_draws_t_uniformly_from_1_to_T_and_its_own_noise():
    asked = []
    DDPM(lambda *inputs: asked.append(inputs) or inputs[0], T=10).loss(torch.zeros(20000, *TINY))
    (xt, t), = asked
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() == 10
    assert (t.bincount()[1:] - 2000).abs().max() < 5 * math.sqrt(20000 * 0.1 * 0.9)
    eps = xt / column(1 - linear(10)[1][t]).sqrt()
    assert abs(eps.mean()) < 5 / math.sqrt(320_000) and abs(eps.std() - 1) < 5 / math.sqrt(640_000)


def test_t_is_drawn_with_focus():
    n, normal = 20000, Normal(0.0, 1.0)
    t = DDPM(None).draw_t(n, focused=True)
    assert t.min() == 1 and t.max() <= 1000 and t.dtype == torch.int64
    for bound in 1, 10, 100, 200, 400, 600, 900:
        # P(T sigmoid(u/2 - 0.6) <= bound) = Φ(2 logit(bound/T) + 1.2)
        shape = normal.cdf(torch.tensor(2 * math.log(bound / (1000 - bound)) + 1.2)).item()
        share = 0.75 * shape + 0.25 * math.log(bound + 1) / math.log(1001)  # P((T+1)^u < bound + 1)
        error = math.sqrt(share * (1 - share) / n)
        assert (t <= bound).double().mean().item() == pytest.approx(share, abs=5 * error)
    for T in 2, 3:
        t = DDPM(None, T=T).draw_t(n, focused=True)
        assert t.min() == 1 and (t.bincount()[1:] > 100).all() and len(t.bincount()) == T + 1


# ---- the bound

@pytest.mark.parametrize("sigma, predict", [
    ("beta", "eps"), ("posterior", "x0"), ("beta", "mu"), ("posterior", "v")])
def test_vlb_terms_are_the_kl_divergences(sigma, predict):
    """Of a wrong network, on the inputs that it saw, against torch's KL."""
    model, seen = spied(sigma, predict)
    x0, alpha_bar = levels(5, *TINY), linear(model.T)[1]
    terms = model.vlb_terms(x0)
    assert terms.shape == (5, model.T + 1) and (terms >= 0).all()
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
        noise = (xt - alpha_bar[s].sqrt() * x0) / (1 - alpha_bar[s]).sqrt()  # the input is of q(x_t|x_0)
        assert abs(noise.mean()) < 5 / math.sqrt(80) and abs(noise.std() - 1) < 5 / math.sqrt(160)
    a = alpha_bar[-1]
    L_T = kl_divergence(Normal(a.sqrt() * x0, (1 - a).sqrt()), Normal(0.0, 1.0)).flatten(1).sum(1)
    close(terms[:, -1], L_T, rtol=1e-7, atol=1e-10)  # the oracle's cancellation


@pytest.mark.parametrize("sigma", ["beta", "posterior"])
def test_the_weighted_error_in_eps_is_the_bound_without_its_constant(sigma):
    model, t = DDPM(None, sigma=sigma), torch.arange(2, 1001)
    beta, alpha_bar = (table[t] for table in linear())
    weight = beta ** 2 / (2 * model.variance[t] * (1 - beta) * (1 - alpha_bar))  # report (73)
    close(model.bound_weight(t), weight, rtol=1e-9)
    of_eps = torch.rand(999, dtype=F64)  # ‖ε - ε_θ‖²
    of_x0 = (1 - alpha_bar) / alpha_bar * of_eps  # ‖x_0 - x̂_0‖²: Ho (4) at the same x_t
    constant = model.L_between(torch.zeros(999, dtype=F64), t, 16)
    close(model.L_between(of_x0, t, 16) - constant, weight * of_eps, rtol=1e-6)


@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.999, 0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.05, 0.5, 3.0])
def test_the_256_levels_share_the_whole_probability(mean, sigma):
    x0 = column(torch.arange(256.0) / 127.5 - 1)  # float32, as the images are
    means = torch.full_like(x0, mean, requires_grad=True)
    log_p = ddpm.log_discretized_normal(x0, means, torch.tensor(sigma))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    log_p.sum().backward()
    assert means.grad.isfinite().all()


def test_a_level_has_the_mass_between_its_edges():
    x0, sigma = levels(7, 1, 6, 6), torch.rand(7, 1, 1, 1, dtype=F64) + 0.05
    mean = x0 + 2 * sigma * torch.randn_like(x0)
    normal = Normal(mean, sigma)
    high = torch.where(x0 > 0.999, 1.0, normal.cdf(x0 + 1 / 255))
    low = torch.where(x0 < -0.999, 0.0, normal.cdf(x0 - 1 / 255))
    # Differences of cdfs near 1 lose up to 10 of 16 digits: the oracle's error, not the code's.
    close(ddpm.log_discretized_normal(x0, mean, sigma), (high - low).log().flatten(1).sum(1), rtol=1e-6)


# ---- data whose best network is known: x_0 ~ N(0, S²) for each pixel

S = 0.25
COUNT = 10_000  # images of 16 pixels: a mean squared error is known to √(2/160000) = 0.35 %


def closed_form(a, sigma):
    """Of a chain with ᾱ: σ_t², t = 1 ... T; E L_{t-1}, t > 1; E L_0 of a density (nats/pixel).

    All is normal: Var x_t = ᾱ_t S² + 1 - ᾱ_t, E(x_0 - x̂_0)² = S² (1-ᾱ_t) / Var x_t, and precisions add.
    """
    before, a = a[:-1], a[1:]
    alpha = a / before
    mse = S ** 2 * (1 - a) / (a * S ** 2 + 1 - a)
    tilde = 1 / (1 / (1 - before) + alpha / (1 - alpha))  # of x_{t-1} given x_t and x_0
    shift = (tilde * before.sqrt() / (1 - before)) ** 2 * mse  # E of the squared distance of the two means
    v = 1 - alpha if sigma == "beta" else torch.cat([tilde[1:2], tilde[1:]])
    L_0 = ((2 * math.pi * v[0]).log() + mse[0] / v[0]) / 2
    return v, ((v / tilde).log() + (tilde + shift) / v - 1)[1:] / 2, L_0


def gaussian(sigma):
    """A chain of 200 steps with the best network for these data."""
    a = column(linear(200)[1])
    net = (1 - a).sqrt() / (a * S ** 2 + 1 - a)  # E[ε|x_t] = net_t x_t: the regression of ε on x_t
    return DDPM(lambda xt, t: net[t].to(xt.dtype) * xt, T=200, sigma=sigma, shape=TINY)


def test_the_bound_is_what_it_must_be_never_beats_the_truth_and_gains_from_steps():
    x0, gaps = S * torch.randn(COUNT, *TINY, dtype=F64), {"beta": [], "posterior": []}
    truth = math.log(2 * math.pi * math.e * S ** 2) / 2  # E[-log p(x_0)]
    for K in 2, 5, 20, 200:
        for sigma in gaps:
            chain = gaussian(sigma).respace(K)
            (_, L, L_0), a = closed_form(chain.alpha_bar, sigma), chain.alpha_bar[-1]
            # Column 0 is for 8-bit pixels: here L_0 of a density takes its place.
            terms = chain.vlb_terms(x0, chain.x0_errors(x0))[:, 1:].mean(0) / 16
            close(terms[:-1], L, rtol=0.02)  # five standard errors
            close(terms[-1], (a * S ** 2 - a - torch.log1p(-a)) / 2, rtol=0.02)  # E KL(q(x_T|x_0) || N(0, 1))
            gaps[sigma].append((terms.sum() + L_0).item() - truth)
    assert min(gaps["beta"] + gaps["posterior"]) > 0.01
    assert gaps["beta"] == sorted(gaps["beta"], reverse=True)  # not so "posterior": β̃_2 is no good decoder


@pytest.mark.parametrize("sigma, steps", [("beta", 200), ("posterior", 10)])
def test_samples_have_the_spread_that_the_chain_gives_them(sigma, steps):
    chain = gaussian(sigma).respace(steps)
    trajectory = deque(chain.trajectory(torch.randn(COUNT, *TINY, dtype=F64)), maxlen=2)
    (_, _, x0_hat), (_, x0, _) = trajectory
    assert torch.equal(x0, x0_hat)  # no noise in the last step
    a, spread = chain.alpha_bar, 1.0  # of x_T
    variance, _, _ = closed_form(a, sigma)
    for t in range(steps, 0, -1):
        # of p's mean, x̂_0 being linear in x_t: that of q(x_{t-1}|x_t), by regression
        slope = (a[t] / a[t - 1]).sqrt() * (a[t - 1] * S ** 2 + 1 - a[t - 1]) / (a[t] * S ** 2 + 1 - a[t])
        spread = slope ** 2 * spread + (variance[t - 1] if t > 1 else 0)
    close(x0.std(), math.sqrt(spread), rtol=0.009)  # five standard errors of 1 / √(2 · 160000)
    assert abs(x0.mean()) < 5 * S / math.sqrt(x0.numel())
    assert steps < 200 or math.sqrt(spread) == pytest.approx(S, rel=0.07)  # and that is nearly the data's


# ---- sampling

@pytest.mark.parametrize("sigma", ["beta", "posterior"])
def test_the_sampler_is_algorithm_2_line_by_line(sigma):
    model, seen = spied(sigma)
    beta, alpha_bar = linear(12)
    start = torch.randn(2, *TINY, dtype=F64)
    torch.manual_seed(3)
    ours = list(model.trajectory(start))
    assert [t for t, _, _ in ours] == list(range(12, -1, -1)) and torch.equal(ours[0][1], start)
    assert [t.tolist() for _, t in seen] == [[t, t] for t in range(12, 0, -1)]
    torch.manual_seed(3)
    x = start  # line 1
    for t, xt, x0_hat in ours[:-1]:  # line 2
        close(xt, x, rtol=1e-5, atol=1e-6)  # at ᾱ_T = 1e-8 the way over x̂_0 loses half of the digits
        eps = torch.tanh(x) * (0.5 + t / 12)  # ε_θ(x_t, t) of spied
        close(x0_hat, (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt(), rtol=1e-5, atol=1e-6)
        z = torch.randn_like(x) if t > 1 else 0  # line 3
        variance = beta[t] if sigma == "beta" else tilde(beta, alpha_bar, max(t, 2))
        mean = (x - beta[t] / (1 - alpha_bar[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
        x = mean + variance.sqrt() * z  # line 4
    close(ours[-1][1], x, rtol=1e-5, atol=1e-6)  # line 6
    assert [t for t, _, _ in model.trajectory(start, start=4)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_eta_below_1_is_ddim_as_published_in_any_number_of_steps(steps, eta):
    """Song et al. 2021, for a chain of its times τ."""
    model, seen = spied(T=30)
    tau = [round(30 * i / steps) for i in range(steps + 1)]
    _, a = linear(30)
    x = torch.randn(3, *TINY, dtype=F64)
    torch.manual_seed(4)
    ours = list(model.respace(steps).trajectory(x, eta))
    assert torch.equal(ours[0][1], x) and [t[0].item() for _, t in seen] == tau[:0:-1]
    torch.manual_seed(4)
    for i in range(steps, 0, -1):
        now, before = a[tau[i]], a[tau[i - 1]]
        eps = torch.tanh(x) * (0.5 + tau[i] / 30)
        sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()  # Song et al. (16)
        x = before.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() \
            + (1 - before - sigma ** 2).sqrt() * eps + sigma * torch.randn_like(x)  # Song et al. (12)
        close(ours[steps - i + 1][1], x, rtol=1e-5, atol=1e-6)


def test_a_respaced_chain_is_the_chain_at_the_picked_times():
    model, _ = spied("posterior", T=100, clip=True)
    for K in range(1, 101):
        tau = model.respace(K).tau
        assert len(tau) == K + 1 and tau[0] == 0 and tau[-1] == 100 and (tau.diff() >= 1).all()
    chain = model.respace(7)
    twice, t, xt = chain.respace(3), torch.tensor([1, 2, 3]), torch.randn(3, *TINY, dtype=F64)
    assert twice.tau.tolist() == chain.tau[[0, 2, 5, 7]].tolist()  # of the first chain's times
    close(twice.predict_x0(xt, t), model.predict_x0(xt, twice.tau[t]))
    assert (twice.T, twice.clip, twice.sigma, twice.shape) == (3, True, "posterior", TINY)
    close(model.respace(1).variance[1], 1 - linear(100)[1][100])  # β_1, where there is no β̃_2
    for steps in 0, -1, 101:
        with pytest.raises(ValueError, match="1 to T = 100"):
            model.sample(1, steps)


def test_sample_gives_images_and_takes_one_network_evaluation_a_step():
    model, seen = spied(T=60)
    for steps, eta, evaluations in (None, 1.0, 60), (None, 0.5, 60), (6, 0.0, 6), (1, 0.5, 1):
        seen.clear()
        torch.manual_seed(5)
        x = model.sample(2, steps, eta)
        assert len(seen) == evaluations
        torch.manual_seed(5)
        *_, (_, x0, _) = model.respace(evaluations).trajectory(torch.randn(2, *TINY), eta)
        close(x, (x0 / 2 + 0.5).clamp(0, 1), rtol=1e-6, atol=1e-6)
    seen.clear()
    assert ddpm.samples(model, 1001, CPU).shape == (1001, *TINY)  # on a CPU by default at most 50 steps
    assert len(seen) == 150 and {len(xt) for xt, _ in seen} == {500, 1}
    close(ddpm.to_model(torch.tensor([0.0, 0.25, 1.0])), [-1.0, -0.5, 1.0])


# ---- another implementation, where it is installed: float32 tables, t from 0

def test_q_p_and_ddim_agree_with_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="an optional second opinion, not installed")
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="fixed_small",
                                        clip_sample=False)
    x0, eps, xt = torch.randn(3, 1, *TINY)
    model = DDPM(lambda *_: eps)
    for s in 1, 2, 500, 1000:
        t = torch.tensor([s])
        close(model.q_sample(x0, t, eps), scheduler.add_noise(x0, eps, t - 1), rtol=1e-4, atol=1e-4)
        mean, _ = model.p_mean_variance(xt, t)
        after = scheduler.step(eps, s - 1, xt, torch.Generator().manual_seed(1)).prev_sample
        z = torch.randn(xt.shape, generator=torch.Generator().manual_seed(1)) if s > 1 else 0
        _, variance = model.q_posterior(x0, xt, t)
        close(after, mean + variance.sqrt() * z, rtol=1e-4, atol=1e-4)
        close(variance.item(), scheduler._get_variance(s - 1).item() if s > 1 else 0, rtol=1e-3)
    model, _ = spied(T=10)
    scheduler = diffusers.DDIMScheduler(10, trained_betas=model.beta[1:].numpy(), clip_sample=False)
    scheduler.set_timesteps(10)
    ours = list(model.trajectory(torch.randn(3, *TINY), eta=0.0))
    for (s, xt, _), (_, expected, _) in zip(ours, ours[1:]):
        after = scheduler.step(model.net(xt, torch.full((3,), s)), s - 1, xt, eta=0.0).prev_sample
        close(after, expected, rtol=1e-3, atol=1e-3)


# ---- the network

@pytest.mark.parametrize("channels, size, widths", [
    (1, 28, (64, 128)), (3, 32, (16, 32)), (1, 64, (16, 16, 16))])
@torch.no_grad()
def test_unet_sees_t_and_every_image_alone_in_any_memory_layout(channels, size, widths):
    net = ddpm.UNet(channels, widths)
    x, t = torch.randn(4, channels, size, size), torch.tensor([1, 2, 500, 1000])
    for p in net.parameters():  # the last layer of the network and of each block starts at zero
        p.add_(0.05 * torch.randn_like(p))
    batch = net(x, t)
    assert batch.shape == x.shape and batch.dtype == x.dtype
    for i in range(4):
        close(net(x[i:i + 1], t[i:i + 1]), batch[i:i + 1], rtol=1e-4, atol=1e-4)  # other kernels, float32
    same = net(x[:1].expand(4, -1, -1, -1), t)
    assert all((same[i] - same[j]).abs().max() > 1e-2 for i in range(4) for j in range(i))
    close(net.to(memory_format=torch.channels_last)(x, t), batch, rtol=1e-4, atol=1e-4)


def test_eps_is_exact_where_its_network_finds_v():
    model = DDPM(None, T=50)
    x0, eps, t = *torch.randn(2, 50, *TINY, dtype=F64), torch.arange(1, 51)
    xt = model.q_sample(x0, t, eps)
    close(ddpm.Eps(lambda xt, t: model.v_from_x0(xt, t, x0), model.alpha_bar)(xt, t), eps)
    close(ddpm.Eps(lambda xt, t: 0 * xt, model.alpha_bar)(xt, t), (1 - column(model.alpha_bar[1:])).sqrt() * xt)


def test_bfloat16_agrees_with_float32():
    net, runs = ddpm.UNet(widths=(16, 32), embed=16), []
    for p in net.parameters():  # as after training: nothing is zero
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    model, x0 = DDPM(net, T=50, predict="v", sigma="posterior", clip=True), levels(8, 1, 28, 28).float()
    for fast in False, True:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss, x = model.loss(x0), model.sample(8, 10)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())])
        runs.append((loss.detach(), gradient, x))
    (loss, gradient, x), (fast_loss, fast_gradient, fast_x) = runs
    assert abs(fast_loss / loss - 1) < 1e-3 and (fast_gradient - gradient).norm() < 0.02 * gradient.norm()
    assert (fast_x - x).abs().mean() < 0.005  # gray levels from 0 to 1, after ten steps


# ---- training, on 300 digits: 3 epochs of 18 steps, 12 images left out of each

def flags(digits, out, *more):
    return [str(flag) for flag in (
        "--data-dir", digits, "--out", out, "--limit", 300, "--epochs", 3, "--batch-size", 16, "--lr", 2e-3,
        "--T", 8, "--schedule", "cosine", "--device", "cpu", *more)]


def checkpoint(out):
    return torch.load(out / "ddpm.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """An undisturbed run -> its folder and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ddpm.main(flags(digits, out))
    return out, printed.getvalue()


@pytest.fixture
def quick(monkeypatch):
    """A network as small as it goes, in float32, and no pictures."""
    for recipe in ddpm.RECIPES.values():
        monkeypatch.setitem(recipe, "widths", (4, 8))
    monkeypatch.setattr(common, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(common, "plot_grid", lambda *_: None)


def train(digits, out, *more, watch=None):
    args = ddpm.parse(flags(digits, out, *more))
    common.pick_device("cpu")
    out.mkdir(exist_ok=True)
    return ddpm.train(args, CPU, watch)


def test_training_learns_in_54_steps_and_says_so(trained):
    out, printed = trained
    history = checkpoint(out)["history"]
    for loss in "train_loss", "test_loss":
        assert 1 > history[0][loss] > history[1][loss] > history[2][loss]
    assert history[2]["test_loss"] < 0.5  # that of the averaged weights; 1 where nothing is learned
    assert 0 < history[0]["seconds"] < history[1]["seconds"] < history[2]["seconds"]
    first, settings, *epochs, last = printed.splitlines()
    for words in "recipe short (default on cpu)", "parameters on cpu", "18 steps an epoch":
        assert words in first
    for words in "recipe short", "T 8", "epochs 3", "lr 0.002":
        assert words in settings
    assert [line.split("  train_loss ")[0] for line in epochs] == ["epoch 1", "epoch 2", "epoch 3"]
    assert [list(row) for row in history] == [["epoch", "train_loss", "test_loss", "seconds"]] * 3
    said = re.search(r"wrote (.*) in", last)[1].split(", ")
    said += [f"ddpm_epoch_{row['epoch']:03d}.png" for row in history]
    assert sorted(os.listdir(out)) == sorted(["ddpm.pt", *said])
    for name in said:
        assert Image.open(out / name).convert("L").getextrema()[1] > 100  # and not all black
    with Image.open(out / "ddpm_trajectory.gif") as gif:
        assert gif.n_frames == 9  # x_8 ... x_0


def test_load_and_the_test_loss_take_the_averaged_weights(trained, digits):
    saved, model = checkpoint(trained[0]), ddpm.load(trained[0] / "ddpm.pt", sigma="beta")
    for name, p in model.named_parameters():
        assert torch.equal(p, saved["ema"][name]) and not torch.equal(p, saved["model"][name])
    assert (model.variance == model.beta).all()
    assert [model.settings[name] for name in ("data", "lr", "limit")] == ["mnist", 2e-3, 300]
    model = ddpm.load(trained[0] / "ddpm.pt")
    assert (model.T, model.sigma, model.predict, model.clip) == (8, "posterior", "v", True)
    close(model.beta[1:], ddpm.make_beta("cosine", 8))
    _, _, x_test, _ = common.load_data(ddpm.parse(flags(digits, ".", "--data", "mnist")), CPU)
    losses = []
    torch.manual_seed(0)
    with torch.no_grad(), common.autocast(CPU):
        for x in x_test.split(500):  # 500 and 100
            x0, t = 2 * x.float() / 255 - 1, torch.randint(1, 9, (len(x),))  # uniform
            a, eps = column(model.alpha_bar[t].float()), torch.randn(x.shape)
            v, xt = a.sqrt() * eps - (1 - a).sqrt() * x0, a.sqrt() * x0 + (1 - a).sqrt() * eps
            losses.append((model.net(xt, t).float() - v).square().flatten(1).mean(1))
    losses = torch.cat(losses)
    assert len(losses) == 600
    assert saved["history"][-1]["test_loss"] == pytest.approx(losses.mean().item(), rel=1e-3)
    before = torch.get_rng_state()
    first = ddpm.evaluate(model, x_test, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert ddpm.evaluate(model, x_test, seed=1) == first != ddpm.evaluate(model, x_test, seed=2)


@pytest.mark.parametrize("recipe", ["short", "paper"])
def test_training_is_algorithm_1_with_a_decaying_rate_and_an_average(digits, tmp_path, quick, recipe):
    """Two epochs of 27 steps, again, from the first line of the paper: the same weights to rounding."""
    seed, B, T, epochs, lr = 3, 11, 20, 2, 5e-3
    result, history = train(digits, tmp_path, "--seed", seed, "--batch-size", B, "--T", T, "--lr", lr,
                            "--schedule", "linear", "--epochs", epochs, "--recipe", recipe)
    saved = checkpoint(tmp_path)

    x_train, _, _, _ = common.load_data(ddpm.parse(flags(digits, tmp_path, "--data", "mnist")), CPU)
    alpha_bar = linear(T)[1].float()
    torch.manual_seed(10 ** 6 * seed)
    net = ddpm.UNet(1, (4, 8))
    start, average = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    optimizer, total = torch.optim.Adam(net.parameters(), lr=lr), 27 * epochs
    for epoch in range(epochs):
        torch.manual_seed(10 ** 6 * seed + epoch + 1)
        order, losses = torch.randperm(300), []  # 297 of them are seen
        for step in range(27):
            done = (27 * epoch + step + 0.5) / total
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, 50 * done) * (1 + math.cos(math.pi * done)) / 2
            x0 = 2 * x_train[order[B * step:B * (step + 1)]].float() / 255 - 1
            t = DDPM(None, T=T).draw_t(B, focused=recipe == "short")
            eps = torch.randn(x0.shape)
            a = column(alpha_bar[t])
            target = eps if recipe == "paper" else a.sqrt() * eps - (1 - a).sqrt() * x0
            xt = a.sqrt() * x0 + (1 - a).sqrt() * eps
            out = net(xt, t)
            loss = F.mse_loss(a.sqrt() * out + (1 - a).sqrt() * xt if recipe == "paper" else out, target)
            net.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                for mean, p in zip(average.parameters(), net.parameters()):
                    mean.copy_(mean + 20 / (20 + 27 * epoch + step) * (p - mean))
        assert history[epoch]["train_loss"] == pytest.approx(sum(losses) / 27, rel=1e-4)
    for part, expected in ("model", net.state_dict()), ("ema", average.state_dict()):
        for name, value in expected.items():
            moved = (value - start[name]).norm()
            name = f"net.net.{name}" if recipe == "paper" else f"net.{name}"
            assert (saved[part][name] - value).norm() < 2e-3 * moved + 1e-6, name
    assert all(torch.equal(p, saved["ema"][name]) for name, p in result.named_parameters())
    assert not result.training and len(history) == epochs


@pytest.mark.parametrize("given, expected", [
    ("", ("short", 4e-3, 12, 64, 1000, "linear", "posterior", "v", True, 0.3)),
    ("--recipe paper", ("paper", 1e-3, 100, 64, 1000, "linear", "posterior", "eps", False, 1.2)),
    ("--recipe paper --lr 0.5 --epochs 7 --batch-size 5 --T 30 --schedule cosine --sigma beta",
     ("paper", 0.5, 7, 5, 30, "cosine", "beta", "eps", False, 1.2))], ids=["CPU", "paper", "flags"])
def test_the_recipes_are_what_is_trained_and_flags_win(monkeypatch, digits, tmp_path, given, expected):
    drawn = []

    def stop(self, *how):
        drawn.extend([self, *how])
        raise KeyboardInterrupt
    monkeypatch.setattr(DDPM, "draw_t", stop)
    args = ddpm.parse(["--data-dir", str(digits), "--out", str(tmp_path), *given.split()])
    with pytest.raises(KeyboardInterrupt):
        ddpm.train(args, CPU)
    model, n, focused = drawn
    millions = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert (args.recipe, args.lr, args.epochs, n, model.T, args.schedule, model.sigma, model.predict, focused,
            millions) == expected
    assert model.clip and model.shape == (1, 28, 28) and args.batch_size == n
    close(model.beta[1:], ddpm.make_beta(args.schedule, args.T))
    larger = ddpm.build(vars(args) | {"shape": [3, 64, 64]})
    assert larger.shape == (3, 64, 64) and len(getattr(larger.net, "net", larger.net).down) == 2  # a level more: 32, 16 and 8 pixels wide


def test_a_batch_is_at_most_the_data_compiled_if_asked_and_watch_adds_to_a_row(
        digits, tmp_path, quick, monkeypatch):
    seen, compiled, shown = [], [], []
    monkeypatch.setattr(torch, "compile", lambda f: lambda *args: compiled.append(f.__name__) or f(*args))
    monkeypatch.setattr(common, "show", lambda bar, step, _, epochs: shown.append((bar.total, step, epochs)))
    model, history = train(digits, tmp_path, "--limit", 50, "--batch-size", 999, "--epochs", 2, "--compile",
                           watch=lambda model, epoch: seen.append(model) or {"n": epoch})
    assert [row["n"] for row in history] == [1, 2] and seen == [model, model]
    assert compiled == ["loss"] * 2 and shown == [(1, 0, 2)] * 2  # one step an epoch, of 50 images
    assert checkpoint(tmp_path)["history"] == history


# ---- weights alone

def test_weights_alone_in_half_precision_draw_but_cannot_be_resumed(trained, digits, tmp_path, monkeypatch):
    saved, path = checkpoint(trained[0]), tmp_path / "ddpm.pt"
    half = {name: value.half() for name, value in saved["ema"].items()}
    torch.save({"kind": "ddpm", "settings": saved["settings"], "ema": half}, path)
    before = path.read_bytes()
    ddpm.main(["--sample", "2", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert (tmp_path / "ddpm_sample.png").exists()
    for name, p in ddpm.load(path).named_parameters():
        close(p.detach(), saved["ema"][name], rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(common, "load_data", lambda *_: pytest.fail("went on"))
    for more, words in ("--resume", "weights alone"), ("--seed=0", "holds an earlier run"):
        with pytest.raises(common.InputError, match=words) as error:
            ddpm.main(flags(digits, tmp_path, more))
        assert "\n" not in str(error.value) and path.read_bytes() == before


def test_the_committed_weights_are_those_of_the_long_run(digits):
    vae_path, path = REPO / "pretrained" / "vae.pt", REPO / "pretrained" / "ddpm.pt"
    assert vae_path.stat().st_size + path.stat().st_size < 6e6
    model, autoencoder = ddpm.load(path), vae.load(vae_path)
    assert [model.settings[name] for name in ("recipe", "epochs", "seed")] == ["paper", 100, 0]
    assert [autoencoder.settings[name] for name in ("latent_dim", "epochs", "seed")] == [2, 100, 0]
    _, _, x, _ = common.load_data(ddpm.parse(flags(digits, ".", "--data", "mnist")), CPU)  # 600 test digits
    assert ddpm.evaluate(model, x, seed=0) == pytest.approx(0.0211, rel=0.02)  # at epoch 20, 7 % more
    reconstruction, kl = autoencoder.elbo_terms(x / 255, samples=8)
    assert (kl - reconstruction).mean().item() == pytest.approx(138.9, rel=0.01)  # nats; at epoch 10, 146


# ---- stopped and gone on

def same(out, other):
    """Both runs ended with the same bits: weights, their average, optimizer, history."""
    a, b = checkpoint(out), checkpoint(other)
    for row in a["history"] + b["history"]:
        del row["seconds"]
    assert a.pop("settings") == b.pop("settings") and a.pop("kind") == b.pop("kind") == "ddpm"
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_run_that_was_killed_ends_where_an_undisturbed_one_does(trained, digits, tmp_path, capsys):
    command = [sys.executable, str(REPO / "ddpm.py"), *flags(digits, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert any(line.startswith("epoch 1 ") for line in child.stdout)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and len(checkpoint(tmp_path)["history"]) < 3
    ddpm.main(flags(digits, tmp_path, "--resume"))
    same(tmp_path, trained[0])
    before = (tmp_path / "ddpm.pt").read_bytes()
    ddpm.main(flags(digits, tmp_path, "--resume", "--lr", "0.002", "--steps", "2"))  # equal flags pass
    assert (tmp_path / "ddpm.pt").read_bytes() == before and "wrote ddpm_samples" in capsys.readouterr().out


def at_step(patch, number, action):
    """In training step `number`, counted over the epochs from 1, the loss becomes action(loss)."""
    loss, steps = DDPM.loss, itertools.count(1)

    def patched(self, *given):
        value = loss(self, *given)
        return action(value) if value.requires_grad and next(steps) == number else value
    patch.setattr(DDPM, "loss", patched)


def test_stopped_by_ctrl_c_it_ends_with_the_same_bits(digits, tmp_path, quick, monkeypatch, capsys):
    train(digits, tmp_path / "whole", "--recipe", "paper")
    out = tmp_path / "parts"
    again = ["--resume", "--out", str(out), "--data-dir", str(digits), "--device", "cpu"]
    for step, argv in (19, flags(digits, out, "--recipe", "paper")), (20, again):  # in epoch 2, in epoch 3
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            at_step(patch, step, lambda _: signal.default_int_handler(signal.SIGINT, None))
            common.run(lambda: ddpm.main(argv))
        said, err = capsys.readouterr()
        assert stop.value.code == 130 and "\nstopped: --resume goes on from the last finished epoch" in err
    assert "recipe paper (the checkpoint's)" in said
    saved = checkpoint(out)
    assert len(saved["history"]) == 2 and os.listdir(out) == ["ddpm.pt"]
    saved["history"][-1]["seconds"] = 1000.0
    torch.save(saved, out / "ddpm.pt")
    ddpm.train(ddpm.parse(again), CPU)
    assert checkpoint(out)["history"][-1]["seconds"] > 1000  # of all that it took
    same(out, tmp_path / "whole")


def test_the_command_draws_from_a_checkpoint(trained, tmp_path, capsys, monkeypatch):
    shutil.copy(trained[0] / "ddpm.pt", tmp_path)
    drawn = []
    monkeypatch.setattr(common, "plot_grid", lambda x, path, title: drawn.append(x) or path.touch())
    command = f"--out {tmp_path} --device cpu --sample 12 --steps"
    for more in "3", "3 --eta 0", "3 --sigma beta", "3 --seed 1", "3":
        ddpm.main([*command.split(), *more.split()])
    assert sorted(os.listdir(tmp_path)) == ["ddpm.pt", "ddpm_sample.png"]
    assert "wrote ddpm_sample.png" in capsys.readouterr().out
    assert [torch.equal(x, drawn[0]) for x in drawn] == [True, False, False, False, True]
    model = ddpm.load(tmp_path / "ddpm.pt")
    torch.manual_seed(0)
    with common.autocast(CPU):
        assert torch.equal(drawn[0], model.sample(12, 3))
    with pytest.raises(common.InputError, match="T = 8"):
        ddpm.main([*command.split(), "9"])


# ---- what cannot be done

def test_a_diverging_run_ends_before_it_is_saved(digits, tmp_path, quick, monkeypatch):
    at_step(monkeypatch, 36, lambda loss: loss.register_hook(lambda gradient: gradient * math.inf) and loss)
    with pytest.raises(common.InputError) as stop:
        train(digits, tmp_path)
    message, saved = str(stop.value), checkpoint(tmp_path)
    assert "\n" not in message and "not finite in epoch 2 with --lr 0.002: " in message
    assert f"{tmp_path / 'ddpm.pt'} keeps epoch 1" in message and len(saved["history"]) == 1
    assert all(value.isfinite().all() for part in ("model", "ema") for value in saved[part].values())


@pytest.mark.parametrize("wrong", [
    "--epochs 0", "--batch-size 0", "--lr nan", "--T 0", "--T 10 --steps 11", "--steps 1001", "--recipe long",
    "--steps 0", "--eta 2", "--eta nan", "--schedule sqrt", "--sigma learned", "--device tpu",
    "--sample 4", "--sample 0", "--data cifar", "--size 7", "--size 32", "--resume"])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, wrong):
    monkeypatch.setattr(DDPM, "loss", None)  # no long work comes first
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--out", str(tmp_path / "out"), *wrong.split()])
    message = capsys.readouterr().err or str(stop.value)
    assert message.startswith("error: ") and "\n" not in message.strip() and stop.value.code != 0
    word = "no checkpoint" if wrong in ("--sample 4", "--resume") else wrong.split()[-2].lstrip("-")
    assert word in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("more, words", [
    ("--resume --T 9", ["T 8", "not 9"]), ("--resume --recipe paper", ["recipe short", "not paper"]),
    ("", ["earlier run", "--resume", "--out"])])
def test_an_earlier_run_is_neither_mixed_up_nor_lost(trained, digits, tmp_path, more, words):
    path = tmp_path / "ddpm.pt"
    shutil.copy(trained[0] / "ddpm.pt", path)
    with pytest.raises(common.InputError) as stop:
        ddpm.main(flags(digits, tmp_path, *more.split()))
    assert all(word in str(stop.value) for word in [str(path), *words])
    assert path.read_bytes() == (trained[0] / "ddpm.pt").read_bytes() and os.listdir(tmp_path) == ["ddpm.pt"]
