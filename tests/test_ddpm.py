"""The DDPM against oracles that share little code with it; its training, its command line."""

import copy
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence

import common
import ddpm
import vae
from ddpm import DDPM, VARIANCES

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = (1, 4, 4)
F64 = torch.float64
BOTH_VARIANCES = pytest.mark.parametrize("variance", VARIANCES)
CLIPPED_OR_NOT = pytest.mark.parametrize("clip", [True, False])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    """Asserts equality up to float64's rounding, unless told otherwise."""
    actual, expected = (torch.as_tensor(x, dtype=F64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


SINGLE = {"rtol": 1e-6, "atol": 1e-6}  # for one t per image, whose tables are float32


def column(table):
    return table.view(-1, 1, 1, 1)


def linear(T=1000):
    """β_0 ... β_T and ᾱ_0 ... ᾱ_T of Ho, section 4."""
    beta = [0.0]
    beta += [min(0.999, (1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T) for i in range(T)]
    alpha_bar = [math.prod(1 - b for b in beta[: t + 1]) for t in range(T + 1)]
    return torch.tensor(beta, dtype=F64), torch.tensor(alpha_bar, dtype=F64)


def variances(variance, T):
    """σ_t² for t = 1 ... T.  β̃_t: the precisions of q(x_{t-1}|x_0) and q(x_t|x_{t-1}) add."""
    beta, alpha_bar = linear(T)
    if variance == "beta":
        return beta[1:]
    tilde = 1 / (1 / (1 - alpha_bar[1:-1]) + (1 - beta[2:]) / beta[2:])
    return F.pad(tilde, (1, 0))  # β̃_1 = 0


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
    """μ̃ from ε, or μ_θ from ε_θ.  Course report, (68) and (72)"""
    return (k.xt - k.beta / k.noise * eps) / (1 - k.beta).sqrt()


def levels(*shape):
    """8-bit pixels, black and white among them, on the scale of the model."""
    x = torch.randint(0, 256, shape)
    x.view(-1)[:2] = torch.tensor([0, 255])
    return 2 * x.double() / 255 - 1


def wrong(xt, t, T):
    """A guess at ε that is wrong at each t in its own way."""
    return torch.tanh(xt) * (0.5 + t / T)


def spied(variance="beta", T=12, clip=False):
    """A chain whose network is wrong, and a list of what the network saw."""
    seen = []

    def net(xt, t):
        seen.append((xt, t))
        return wrong(xt, column(t).to(xt.dtype), T)

    return DDPM(net, T, variance=variance, clip=clip, shape=TINY), seen


def small(T=4, width=4):
    """A chain with a U-Net of which nothing is zero, as after training."""
    alpha_bar = ddpm.make_alpha_bar("linear", T)
    net = ddpm.Preconditioned(ddpm.UNet(3, 1, width), alpha_bar)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return DDPM(net, schedule=alpha_bar, weighting="v")


# ---- schedules


def test_the_linear_chain_is_that_of_the_paper():
    close(DDPM(None).alpha_bar, linear()[1])


def test_the_defaults_are_those_of_the_trained_models():
    model = DDPM(None)
    assert (model.T, model.variance, model.clip) == (1000, "posterior", True)
    assert model.shape == (1, 28, 28)
    assert not model.state_dict()  # tables are computed, not loaded


def test_the_cosine_schedule():
    f = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(100)]
    expected = [f_t / f[0] for f_t in [*f, 1e-3 * f[-1]]]  # β_T is cut to 0.999
    close(DDPM(None, 100, "cosine").alpha_bar, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("T", [2, 10, 4000])
def test_a_chain_of_any_length_ends_in_noise(T, schedule):
    model = DDPM(None, T, schedule)
    assert model.T == T and len(model.alpha_bar) == T + 1
    assert model.alpha_bar.diff().max() < 0 < model.alpha_bar[-1].sqrt() < 0.1


@pytest.mark.parametrize("kind", [list, torch.Tensor.numpy, torch.Tensor.clone, torch.Tensor.half])
def test_a_table_can_be_a_list_an_array_or_a_tensor(kind):
    table = kind(torch.tensor([1.0, 0.75, 0.5, 0.125], dtype=F64))
    model = DDPM(wrong, T=7, schedule=table, shape=TINY)
    table[1] = 0.6  # the model has its own
    assert model.T == 3 and model.alpha_bar.tolist() == [1, 0.75, 0.5, 0.125]
    assert model.alpha_bar.dtype == F64 and model.times() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    "table, words",
    [
        ([1, 0.5, 0.6, 0.1], "must fall"),
        ([1, 0.5, 0.5, 0.1], "must fall"),
        ([1, 1.5, 0.5], "must fall"),
        ([1, 0.5, 0], "stay above 0"),
        ([1, 0.5, -0.1], "stay above 0"),
        ([1, 0.5, math.nan], "must fall"),
        ([1, math.nan, 0.5], "must fall"),
        ([math.nan, 0.9, 0.5], "begins with ᾱ_0 = 1, not nan"),
        (linear()[1][1:], "begins with ᾱ_0 = 1, not 0.9999: prepend 1"),  # as diffusers has it
        (linear()[0][1:], "begins with ᾱ_0 = 1, not 0.0001.* product of 1 - β"),
        (linear()[0], "begins with ᾱ_0 = 1, not 0"),
        (linear()[1].flip(0), "begins with ᾱ_0 = 1"),
        ([[1, 0.5], [0.4, 0.3]], r"table .*not of shape \(2, 2\)"),
        ([1.0], r"table .*not of shape \(1,\)"),
        ([], r"table .*not of shape \(0,\)"),
        (0.5, r"table .*not of shape \(\)"),
    ],
)
def test_an_invalid_table_of_alpha_bar_is_refused(table, words):
    with pytest.raises(ValueError, match=words):
        DDPM(None, schedule=table)


# ---- q and p


def test_q_sample_is_the_chain_run_step_by_step():
    T, n = 8, 200_000
    beta, _ = linear(T)
    x0 = torch.full((n, 1, 1, 1), 0.7, dtype=F64)
    x = x0
    for t in range(1, T + 1):
        x = (1 - beta[t]).sqrt() * x + beta[t].sqrt() * torch.randn_like(x)  # Ho (2)
        xt = DDPM(None, T).q_sample(x0, torch.full((n,), t), torch.randn_like(x0))
        assert abs(xt.mean() - x.mean()) < 5 * x.std() * math.sqrt(2 / n)  # five standard errors
        assert abs(xt.var() / x.var() - 1) < 5 * math.sqrt(4 / n)


def test_q_sample_takes_one_t_or_one_for_each_image(k):
    model = DDPM(None)
    close(model.q_sample(k.x0, k.t, k.eps), k.xt, **SINGLE)
    for t in 1, 2, 500, 1000:
        one = slice(t - 1, t)
        close(model.q_sample(k.x0[one], t, k.eps[one]), k.xt[one])


@pytest.mark.parametrize("t, s", [(2, 1), (500, 499), (1000, 999), (500, 100), (1000, 1)])
def test_q_posterior_is_bayes_rule(t, s):
    _, alpha_bar = linear()
    before, now = alpha_bar[s], alpha_bar[t]
    alpha = now / before
    x0, xt = 0.3, now.sqrt() * 0.3 + 0.8 * (1 - now).sqrt()
    x = torch.linspace(-8, 8, 400_001, dtype=F64)  # x_s
    of_x0 = -((x - before.sqrt() * x0) ** 2) / (2 * (1 - before))  # log q(x_s|x_0)
    of_xt = -((xt - alpha.sqrt() * x) ** 2) / (2 * (1 - alpha))  # log q(x_t|x_s)
    p = torch.softmax(of_x0 + of_xt, 0)
    mean = (p * x).sum()
    image = torch.ones(1, 1, 1, 1, dtype=F64)
    q_mean, q_variance = DDPM(None).q_posterior(x0 * image, xt * image, t, s)
    close(q_mean.item(), mean, rtol=1e-8)
    close(q_variance, (p * (x - mean) ** 2).sum(), rtol=1e-8)
    assert isinstance(q_variance, float)


@BOTH_VARIANCES
def test_p_has_the_mean_of_ho_11_and_the_chosen_variance(k, variance):
    model = DDPM(lambda *_: k.eps_hat[one], variance=variance, clip=False)
    expected, sigma2 = mean_of(k, k.eps_hat), variances(variance, 1000)
    for t in range(1, 1001):
        one = slice(t - 1, t)
        mean, found = model.p_mean_variance(k.xt[one], t, t - 1)
        close(mean, expected[one], rtol=1e-9, atol=1e-9)
        close(found, sigma2[t - 1])


def test_predict_x0_inverts_q_sample(k):
    model = DDPM(lambda *_: k.eps_hat, clip=False)
    scaled = k.xt - k.noise * k.eps_hat
    close(k.signal * model.predict_x0(k.xt, k.t), scaled, **SINGLE)
    for t in 1, 2, 500, 1000:
        close(model.predict_x0(k.xt, t), (k.xt - k.noise[t - 1] * k.eps_hat) / k.signal[t - 1])


def test_clipping_keeps_x0_hat_in_range(k):
    model = DDPM(lambda *_: k.eps[one])
    for t in range(1, 1001):
        one = slice(t - 1, t)
        close(model.predict_x0(k.xt[one], t), k.x0[one].clamp(-1, 1), rtol=1e-9, atol=1e-9)


# ---- every step of every chain.  Where an oracle would lose digits, it counts in fractions.

CHAINS = [1000, 50, 10, 1]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def root(fraction):
    return math.sqrt(float(fraction))


def pairs_of(model, steps):
    """(t, s), ᾱ_t and ᾱ_s of each step, in fractions."""
    table = [Fraction(value) for value in model.alpha_bar.tolist()]
    times = model.times(steps)
    assert times[0] == 1000 and times[-1] == 0 and len(times) == steps + 1
    return [(t, s, table[t], table[s]) for t, s in itertools.pairwise(times)]


def ho_6(x0, xt, now, before):
    """q(x_s|x_t, x_0) of the chain with β = 1 - ᾱ_t/ᾱ_s: two precisions add."""
    alpha = now / before
    beta = 1 - alpha
    if before == 1:
        return x0, 0.0  # x_s is x_0
    variance = 1 / (1 / (1 - before) + alpha / beta)
    of_x0 = float(variance / (1 - before)) * root(before)
    of_xt = float(variance / beta) * root(alpha)
    return of_x0 * x0 + of_xt * xt, float(variance)


def guess(xt, t, now, clip):
    """x̂_0 of `wrong`: Ho (4), solved for x_0."""
    x0_hat = (xt - root(1 - now) * wrong(xt, t, 1000)) / root(now)
    return x0_hat.clamp(-1, 1) if clip else x0_hat


@CLIPPED_OR_NOT
@pytest.mark.parametrize("steps", CHAINS)
def test_each_step_is_that_of_hos_chain_with_the_same_alpha_bar(steps, clip):
    model, _ = spied("posterior", 1000, clip)
    x0, xt = torch.randn(2, 2, *TINY, dtype=F64)
    for t, s, now, before in pairs_of(model, steps):
        mean, variance = model.q_posterior(x0, xt, t, s)
        expected_mean, expected_variance = ho_6(x0, xt, now, before)
        close(mean, expected_mean, **EXACT)
        close(variance, expected_variance, rtol=3e-12, atol=0)  # β = 1 - α rounds
        mean, variance = model.p_mean_variance(xt, t, s)
        x0_hat = guess(xt, t, now, clip)
        expected_mean, _ = ho_6(x0_hat, xt, now, before)
        close(mean, expected_mean, **EXACT)
        close(variance, expected_variance, rtol=3e-12, atol=0)
        if not clip:  # line 4 of Algorithm 2
            beta = float(1 - now / before)
            line_4 = (xt - beta / root(1 - now) * wrong(xt, t, 1000)) / root(now / before)
            close(mean, line_4, **EXACT)


@CLIPPED_OR_NOT
@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("steps", CHAINS)
def test_each_step_is_that_of_song_12_and_16(steps, eta, clip):
    model, _ = spied("posterior", 1000, clip)
    for t, s, now, before in pairs_of(model, steps):
        xt = torch.randn(2, *TINY, dtype=F64)
        torch.manual_seed(t)
        (_, _, x0_hat), (_, xs, _) = model.trajectory(xt, [t, s], eta)
        torch.manual_seed(t)
        z = torch.randn_like(xt)
        close(x0_hat, guess(xt, t, now, clip), **EXACT)
        variance = Fraction(eta) ** 2 * (1 - before) / (1 - now) * (1 - now / before)  # (16)
        eps_hat = (xt - root(now) * x0_hat) / root(1 - now)
        mean = root(before) * x0_hat + root(1 - before - variance) * eps_hat
        close(xs, mean + root(variance) * z, **EXACT)  # (12)


# ---- the loss: each weight makes it the mean squared error of another quantity


def check_loss(k, error, weighting, variance="posterior"):
    """Asserts that the loss is the mean of `error`, for a network that gives the wrong ε̂."""

    def net(xt, t):
        close(xt, k.xt, **SINGLE)
        assert torch.equal(t, k.t)
        return k.eps_hat

    model = DDPM(net, weighting=weighting, variance=variance)
    weight = ddpm.loss_weights(model.alpha_bar, weighting, variance)
    close(column(weight[1:]) * (k.eps_hat - k.eps) ** 2, error, rtol=1e-9, atol=1e-12)
    loss = model.loss(k.x0, k.t, k.eps)
    assert torch.equal(model(k.x0, k.t, k.eps), loss)  # forward is the loss
    close(loss, error.mean(), rtol=1e-6)


def test_loss_simple_is_the_error_of_eps(k):
    check_loss(k, (k.eps_hat - k.eps) ** 2, "simple")


@BOTH_VARIANCES
def test_loss_bound_is_the_kl_divergence_of_two_normals(k, variance):
    sigma2 = variances(variance, 1000)
    sigma2[0] = sigma2[0] or sigma2[1]  # β̃_1 = 0 would leave no decoder, so it is β̃_2
    q, p = (Normal(mean_of(k, eps), column(sigma2.sqrt())) for eps in (k.eps, k.eps_hat))
    check_loss(k, kl_divergence(q, p), "bound", variance)  # Ho (12) without its constant


def test_loss_mu_is_the_error_of_the_mean(k):
    check_loss(k, (mean_of(k, k.eps_hat) - mean_of(k, k.eps)) ** 2, "mu")


def test_loss_x0_is_the_error_of_x0(k):
    x0_hat = (k.xt - k.noise * k.eps_hat) / k.signal
    check_loss(k, (x0_hat - k.x0) ** 2, "x0")


def test_loss_v_is_the_error_of_v(k):
    v = k.signal * k.eps - k.noise * k.x0  # Salimans & Ho, appendix D
    v_hat = torch.randn_like(v)
    k.eps_hat = k.noise * k.xt + k.signal * v_hat
    check_loss(k, (v_hat - v) ** 2, "v")


def test_the_loss_draws_t_uniformly_and_its_own_noise():
    model, seen = spied(T=10)
    model.loss(torch.zeros(20000, *TINY))
    ((xt, t),) = seen
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() == 10
    assert (t.bincount()[1:] - 2000).abs().max() < 5 * math.sqrt(2000 * 0.9)
    eps = xt / column(1 - linear(10)[1][t]).sqrt()
    assert abs(eps.mean()) < 0.009 and abs(eps.std() - 1) < 0.006  # five standard errors


def test_focused_times_have_the_documented_distribution():
    n, T = 20000, 1000
    t = ddpm.draw_t(n, T, "focused")
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() <= T
    for bound in 1, 10, 100, 200, 400, 600, 900:
        u = 2 * math.log(bound / (T - bound)) + 1.2  # at which T sigmoid(u/2 - 0.6) = bound
        middle = 0.5 + 0.5 * math.erf(u / math.sqrt(2))
        fine = math.log(bound + 1) / math.log(T + 1)  # P((T+1)^u < bound + 1)
        share = 0.75 * middle + 0.25 * fine
        error = math.sqrt(share * (1 - share) / n)
        assert (t <= bound).double().mean().item() == pytest.approx(share, abs=5 * error)


# ---- the bound


def discretized(x0, mean, variance):
    """-log P(x0) in nats, which has tests of its own."""
    return -ddpm.log_discretized_normal(x0, mean, math.sqrt(variance))


@BOTH_VARIANCES
@CLIPPED_OR_NOT
@pytest.mark.parametrize("steps", [None, 50, 10, 2, 1])
def test_vlb_terms_are_the_kl_divergences_of_the_steps(steps, clip, variance):
    model, seen = spied(variance, 60, clip)
    a, x0 = linear(60)[1], levels(5, *TINY)
    times = model.times(steps)
    torch.manual_seed(2)
    terms = model.vlb_terms(x0, times)
    assert terms.shape == (5, len(times)) and terms.dtype == F64 and terms.min() >= 0
    assert sorted(t[0].item() for _, t in seen) == times[-2::-1]
    asked = {t[0].item(): xt for xt, t in seen}
    sigma2 = {}
    for i, (s, t) in enumerate(itertools.pairwise(reversed(times))):
        alpha, xt = a[t] / a[s], asked[t]
        x0_hat = (xt - (1 - a[t]).sqrt() * wrong(xt, t, 60)) / a[t].sqrt()
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        tilde = 1 / (1 / (1 - a[s]) + alpha / (1 - alpha))  # precisions add; 0 for s = 0
        sigma2[t] = 1 - alpha if variance == "beta" else tilde
        if s > 0:
            of = tilde * a[s].sqrt() / (1 - a[s]), tilde * alpha.sqrt() / (1 - alpha)
            q, p = (
                Normal(of[0] * x + of[1] * xt, v.sqrt())
                for x, v in ((x0, tilde), (x0_hat, sigma2[t]))
            )
            close(terms[:, i], kl_divergence(q, p).flatten(1).sum(1), rtol=1e-8)
        else:
            of_x1 = alpha.sqrt() * (1 - a[s]) / (1 - a[t])
            first = x0_hat + of_x1 * xt
    # In place of β̃_1 = 0: that of the next larger t, or that of q(x_T|x_0).
    if variance == "posterior":
        sigma2[times[-2]] = sigma2[times[-3]] if len(times) > 2 else 1 - a[-1]
    close(terms[:, 0], discretized(x0, first, sigma2[times[-2]]), rtol=1e-8)
    L_T = kl_divergence(Normal(a[-1].sqrt() * x0, (1 - a[-1]).sqrt()), Normal(0.0, 1.0))
    # The oracle loses digits by cancellation.
    close(terms[:, -1], L_T.flatten(1).sum(1), rtol=1e-7)
    if steps is None:
        torch.manual_seed(2)
        assert torch.equal(model.vlb_terms(x0), terms)  # all times are the default


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
    # The oracle has no more digits.
    close(ddpm.log_discretized_normal(x0, mean, sigma), mass, rtol=1e-6)


# ---- data whose best network is known: each pixel ~ N(0, S²)

S = 0.25
COUNT = 10_000


def closed_form(a, variance):
    """Of a chain with ᾱ: E L_{t-1} for t = 2 ... T, and E L_0 of a density, per pixel.

    All is normal: Var x_t = ᾱ_t S² + 1 - ᾱ_t, E(x_0 - x̂_0)² = S² (1-ᾱ_t) / Var x_t, and
    precisions add.
    """
    before, a = a[:-1], a[1:]
    alpha = a / before
    mse = S**2 * (1 - a) / (a * S**2 + 1 - a)
    tilde = 1 / (1 / (1 - before) + alpha / (1 - alpha))  # of x_{t-1} given x_t and x_0
    shift = (tilde * before.sqrt() / (1 - before)) ** 2 * mse  # E of the means' squared distance
    v = 1 - alpha if variance == "beta" else torch.cat([tilde[1:2], tilde[1:]])
    L_0 = ((2 * math.pi * v[0]).log() + mse[0] / v[0]) / 2
    return ((v / tilde).log() + (tilde + shift) / v - 1)[1:] / 2, L_0


def gaussian(variance):
    """A chain of 200 steps with the best network for these data."""
    a = column(linear(200)[1])
    slope = (1 - a).sqrt() / (a * S**2 + 1 - a)  # E[ε|x_t] = slope x_t: the regression on x_t
    net = lambda xt, t: slope[t] * xt  # noqa: E731
    return DDPM(net, T=200, variance=variance, clip=False, shape=TINY)


def test_the_bound_is_exact_and_improves_with_more_steps():
    x0, gaps = S * torch.randn(COUNT, *TINY, dtype=F64), {"beta": [], "posterior": []}
    truth = math.log(2 * math.pi * math.e * S**2) / 2  # E[-log p(x_0)]
    for steps, variance in itertools.product((2, 5, 20, 200), gaps):
        model = gaussian(variance)
        times = model.times(steps)
        a = linear(200)[1][times[::-1]]
        L, L_0 = closed_form(a, variance)
        # Without column 0, which is for 8-bit pixels, while L_0 here is that of a density.
        terms = model.vlb_terms(x0, times)[:, 1:].mean(0) / 16
        close(terms[:-1], L, rtol=0.02)
        close(terms[-1], (a[-1] * S**2 - a[-1] - torch.log1p(-a[-1])) / 2, rtol=0.02)  # E L_T
        gaps[variance].append((terms.sum() + L_0).item() - truth)
    assert min(gaps["beta"] + gaps["posterior"]) > 0.01
    # Does not hold for "posterior", with β̃_2 at t = 1.
    assert gaps["beta"] == sorted(gaps["beta"], reverse=True)


def test_samples_have_nearly_the_spread_of_the_data():
    model = gaussian("beta")
    trajectory = model.trajectory(torch.randn(COUNT, *TINY, dtype=F64), model.times())
    (_, _, x0_hat), (_, x0, _) = deque(trajectory, maxlen=2)
    assert torch.equal(x0, x0_hat)  # no noise in the last step
    assert x0.std().item() == pytest.approx(S, rel=0.07)


# ---- sampling


@BOTH_VARIANCES
def test_the_sampler_is_algorithm_2_line_by_line(variance):
    model, seen = spied(variance)
    beta, alpha_bar = linear(12)
    near = {"rtol": 1e-5, "atol": 1e-6}  # at ᾱ_T = 1e-8, going through x̂_0 loses half the digits
    x = torch.randn(2, *TINY, dtype=F64)  # line 1
    torch.manual_seed(3)
    ours = list(model.trajectory(x, model.times()))
    assert [t for t, _, _ in ours] == list(range(12, -1, -1))
    assert [t.tolist() for _, t in seen] == [[t, t] for t in range(12, 0, -1)]
    torch.manual_seed(3)
    for t, xt, x0_hat in ours[:-1]:  # line 2
        close(xt, x, **near)
        eps = wrong(x, t, 12)
        noise = (1 - alpha_bar[t]).sqrt()
        close(x0_hat, (x - noise * eps) / alpha_bar[t].sqrt(), **near)
        z = torch.randn_like(x) if t > 1 else 0  # line 3: none at t = 1, even where σ_1² = β_1
        mean = (x - beta[t] / noise * eps) / (1 - beta[t]).sqrt()
        x = mean + variances(variance, 12)[t - 1].sqrt() * z  # line 4
    close(ours[-1][1], x, **near)  # line 6


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_eta_below_1_is_ddim_in_any_number_of_steps(steps, eta):
    model, seen = spied(T=30)
    tau, a = model.times(steps), linear(30)[1]
    x = torch.randn(3, *TINY, dtype=F64)
    torch.manual_seed(4)
    ours = list(model.trajectory(x, tau, eta))
    assert torch.equal(ours[0][1], x) and [t[0].item() for _, t in seen] == tau[:-1]
    assert [t for t, _, _ in ours] == tau
    torch.manual_seed(4)
    for (t, s), (_, after, _) in zip(itertools.pairwise(tau), ours[1:], strict=True):
        now, before = a[t], a[s]
        eps = wrong(x, t, 30)
        sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()  # (16)
        x0_hat = (x - (1 - now).sqrt() * eps) / now.sqrt()
        towards = (1 - before - sigma**2).sqrt() * eps
        x = before.sqrt() * x0_hat + towards + sigma * torch.randn_like(x)  # (12)
        close(after, x, rtol=1e-5, atol=1e-6)


def test_a_sampler_can_start_and_end_anywhere():
    model, seen = spied("posterior", 100)
    x = torch.randn(2, *TINY, dtype=F64)
    assert [t for t, _, _ in model.trajectory(x, [40, 7, 2])] == [40, 7, 2]
    assert [t.tolist() for _, t in seen] == [[40, 40], [7, 7]]


def test_the_chosen_times_fall_and_no_two_are_alike():
    model, _ = spied("posterior", T=100)
    assert model.times(5) == [100, 64, 36, 16, 4, 0]  # 100 (i/5)²
    assert model.times() == model.times(100) == list(range(100, -1, -1))
    for steps in range(1, 101):
        times = model.times(steps)
        assert len(times) == steps + 1 and times[0] == 100 and times[-1] == 0
        assert all(s < t and isinstance(s, int) for t, s in itertools.pairwise(times))


@BOTH_VARIANCES
@CLIPPED_OR_NOT
def test_sample_is_bit_for_bit_the_trajectory_through_all_times(clip, variance):
    model, _ = spied(variance, 60, clip)
    torch.manual_seed(5)
    x = model.sample(3)
    torch.manual_seed(5)
    *_, (t, x0, _) = model.trajectory(torch.randn(3, *TINY), range(60, -1, -1))
    assert t == 0 and torch.equal(x, ((x0 + 1) / 2).clamp(0, 1))
    torch.manual_seed(5)
    assert torch.equal(model.sample(3, steps=60), x)


@pytest.mark.parametrize("steps, eta, expected", [(None, 1, 60), (None, 0.5, 60), (6, 0, 6)])
def test_sample_takes_one_evaluation_a_step(steps, eta, expected):
    model, seen = spied(T=60)
    torch.manual_seed(5)
    x = model.sample(2, steps, eta)
    assert len(seen) == expected
    torch.manual_seed(5)
    xt = torch.randn(2, *TINY)
    *_, (_, x0, _) = model.trajectory(xt, model.times(expected), eta)
    close(x, (x0 / 2 + 0.5).clamp(0, 1), rtol=1e-6, atol=1e-6)


def test_sample_many_draws_every_image_in_20_second_order_steps():
    model, seen = spied(T=60)
    x = ddpm.sample_many(model, 1003)
    assert x.shape == (1003, *TINY) and x.unique(dim=0).shape == x.shape
    assert [len(t) for _, t in seen] == [500] * 20 + [500] * 20 + [3] * 20
    for steps, order in (4, 2), (60, 1):  # all T steps are Ho's
        seen.clear()
        torch.manual_seed(3)
        x = ddpm.sample_many(model, 2, steps, 0.5)
        assert len(seen) == steps
        torch.manual_seed(3)
        expected = ddpm.sample_beyond(model, 2, steps, 0.5, order)
        assert torch.equal(x, expected)
        assert not torch.equal(x, ddpm.sample_beyond(model, 2, steps, 0.5, 3 - order))


# ---- another implementation: float32 tables, t from 0


@pytest.mark.parametrize("s", [1, 2, 500, 1000])
def test_q_and_p_agree_with_diffusers(s):
    diffusers = pytest.importorskip("diffusers")
    kind = {"variance_type": "fixed_small", "clip_sample": False}
    other = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", **kind)
    x0, eps, xt = torch.randn(3, 1, *TINY)
    model, t = DDPM(lambda *_: eps, clip=False), torch.tensor([s])
    close(model.q_sample(x0, t, eps), other.add_noise(x0, eps, t - 1), rtol=1e-4, atol=1e-4)
    mean, variance = model.p_mean_variance(xt, s, s - 1)
    torch.manual_seed(1)
    after = other.step(eps, s - 1, xt).prev_sample
    torch.manual_seed(1)
    z = torch.randn_like(xt) if s > 1 else 0
    close(after, mean + variance**0.5 * z, rtol=1e-4, atol=1e-4)


# ---- the network


@pytest.fixture(params=[(1, 28, 28), (3, 32, 20)], ids=str)
def unet(request):
    """A U-Net of which nothing is zero, four inputs, four t."""
    net = ddpm.UNet(request.param[0], 2, width=8).requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return net, torch.randn(4, *request.param), torch.tensor([1, 2, 500, 1000])


def test_unet_sees_every_image_alone(unet):
    net, x, t = unet
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    assert alone.shape == (4, 2, *x.shape[2:]) and alone.dtype == x.dtype
    close(alone, net(x, t), rtol=1e-4, atol=1e-4)  # other kernels, in float32


def test_unet_sees_t_and_all_of_the_image(unet):
    net, x, t = unet
    v = net(0 * x, t)
    assert all((v[i] - v[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, t)[:, :, 13, 9].sum(), x)
    assert (gradient != 0).all()  # one output pixel depends on every input pixel


def test_unet_knows_nothing_of_alpha_bar():
    net = ddpm.UNet(3, 1, width=4)
    assert not list(net.buffers())
    assert not any(
        isinstance(value, torch.Tensor) for m in net.modules() for value in vars(m).values()
    )
    x = torch.randn(2, 3, 8, 8)
    assert net(x, torch.tensor([1, 5000])).shape == (2, 1, 8, 8)  # any t will do


def test_a_new_unet_gives_a_constant():
    net = ddpm.UNet(3, 2, width=4).requires_grad_(False)
    net.conv_out.bias.copy_(torch.arange(8.0))
    pattern = torch.arange(8.0).view(2, 2, 2).tile(2, 4)  # of 2 x 2 pixels
    found = net(torch.randn(5, 3, 4, 8), torch.randint(1, 1000, (5,)))
    assert torch.equal(found, pattern.expand(5, -1, -1, -1))


def preconditioned(k, net):
    return ddpm.Preconditioned(net, DDPM(None).alpha_bar)(k.xt, k.t)


def test_preconditioned_turns_v_into_eps(k):
    asked = []
    v = torch.randn_like(k.xt)
    found = preconditioned(k, lambda x, t: asked.append((x, t)) or v)
    close(found, k.noise * k.xt + k.signal * v, **SINGLE)
    ((x, t),) = asked
    assert x.shape == (1000, 3, 4, 4) and torch.equal(t, k.t)
    exact = preconditioned(k, lambda *_: k.signal * k.eps - k.noise * k.x0)
    close(exact, k.eps, **SINGLE)  # with the right v


def test_preconditioned_shows_the_noise_of_a_black_and_of_a_white_pixel(k):
    asked = []
    k.x0 = k.x0.sign()
    k.xt = k.signal * k.x0 + k.noise * k.eps
    preconditioned(k, lambda x, t: asked.append(x) or 0)
    xt, if_black, if_white = asked[0].split(1, dim=1)
    assert torch.equal(xt, k.xt)
    near = {"rtol": 0, "atol": 1e-5}  # 1/√(1-ᾱ_1) is 100
    black, white, inside = k.x0 < 0, k.x0 > 0, k.eps.clamp(-3, 3)
    close(if_black[black], inside[black], **near)
    close(if_white[white], inside[white], **near)
    close(if_black, ((k.xt + k.signal) / k.noise).clamp(-3, 3), **near)
    close(if_white, ((k.xt - k.signal) / k.noise).clamp(-3, 3), **near)


def test_preconditioned_takes_images_of_three_channels():
    asked = []
    net = ddpm.Preconditioned(lambda x, t: asked.append(x) or x[:, :3], linear(9)[1])
    x = torch.randn(2, 3, 8, 4)
    assert net(x, torch.tensor([1, 9])).shape == x.shape
    assert asked[0].shape == (2, 9, 8, 4) and torch.equal(asked[0][:, :3], x)


def test_bfloat16_agrees_with_float32():
    model, x0, gradients = small(T=50, width=16), levels(8, 1, 28, 28).float(), []
    for fast in False, True:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = model.loss(x0)
        assert loss.dtype == torch.float32
        parts = torch.autograd.grad(loss, model.parameters())
        gradients.append(torch.cat([part.flatten() for part in parts]))
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.02 * exact.norm()


# ---- any other network


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(785, 64), nn.SiLU(), nn.Linear(64, 785))

    def forward(self, xt, t):
        inputs = torch.cat([xt.flatten(1), t[:, None] / 1000], dim=1)
        eps, share = self.layers(inputs).split([784, 1], dim=1)
        return eps.view_as(xt) + column(share) * xt


def test_an_mlp_of_ten_lines_trains_and_samples(digits):
    model = DDPM(MLP())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for batch in digits_of(digits)[0][:300].split(5):
        loss = model.loss(2 * (batch / 255) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.8 * min(first, 1)  # guessing no noise at all gives 1
    x = model.sample(4, steps=5)
    assert x.shape == (4, 1, 28, 28) and x.min() >= 0 and x.max() <= 1  # and nothing is nan


def test_a_mix_of_two_networks_samples():
    """Guidance: with weight 0 it is the first network, with -1 the second."""
    first, second = small().net, small().net

    def drawn(net):
        torch.manual_seed(6)
        return DDPM(net, 4).sample(2)

    def mixed(w):
        return drawn(lambda xt, t: (1 + w) * first(xt, t) - w * second(xt, t))

    close(mixed(0), drawn(first), rtol=1e-5, atol=1e-5)
    close(mixed(-1), drawn(second), rtol=1e-5, atol=1e-5)
    assert (mixed(2) - mixed(0)).abs().max() > 0.01


# ---- used from Python


def test_every_function_works_in_float64():
    model, x, t = DDPM(lambda xt, t: xt / 2, 3), levels(2, 1, 28, 28), torch.tensor([1, 3])
    found = [model.loss(x), model(x, t), model.q_sample(x, t, x), model.q_posterior(x, x, 3, 1)[0]]
    found += [model.predict_x0(x, t), model.predict_x0(x, 2), model.p_mean_variance(x, 2, 0)[0]]
    for steps, eta in (3, 1.0), (2, 0.5):
        found += [xt for _, xt, _ in model.trajectory(x, model.times(steps), eta)]
    assert all(each.dtype == F64 and each.isfinite().all() for each in found)


def test_every_function_works_with_the_unet():
    model, x = small(T=3), levels(2, 1, 28, 28).float()
    images, terms = model.sample(2, 2), model.vlb_terms(x)
    assert images.shape == (2, 1, 28, 28) and images.isfinite().all()
    assert terms.shape == (2, 4) and terms.dtype == F64 and terms.isfinite().all()


@pytest.mark.parametrize("steps", [None, 2])
def test_no_samples_are_an_empty_batch(steps):
    assert small(T=3).sample(0, steps).shape == (0, 1, 28, 28)


def test_a_copy_is_the_same_chain():
    model = small(T=8)
    again = copy.deepcopy(model)
    xt = torch.randn(2, 1, 28, 28)
    assert torch.equal(again.alpha_bar, model.alpha_bar)
    assert torch.equal(again.predict_x0(xt, 5), model.predict_x0(xt, 5))


NOISE = torch.randn(1, 1, 32, 32)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.sample(2, 4, eta=2.0), "eta .* 0 to 1, not 2.0"),
        (lambda m: m.sample(2, eta=-1), "eta .* 0 to 1, not -1"),
        (lambda m: m.sample(2, eta=math.nan), "eta .* 0 to 1, not nan"),
        (lambda m: m.sample(-1), "n .* 0, not -1"),
        (lambda m: m.sample(2, 0), "steps .* 1 to 4, not 0"),
        (lambda m: m.times(5), "steps .* 1 to 4, not 5"),
        (lambda m: m.net.net(NOISE[..., 2:, 2:], torch.tensor([1])), "of 4, .*30, 30"),
        (lambda m: DDPM(None, T=0), "T .* 1, not 0"),
        (lambda m: DDPM(None, 9, "sqrt"), "schedule .*linear, cosine, not 'sqrt'"),
        (lambda m: DDPM(None, variance="tilde"), "variance .*posterior, beta, not 'tilde'"),
        (
            lambda m: DDPM(None, weighting="l1"),
            "weighting .*simple, bound, mu, x0, v, not 'l1'",
        ),
        (lambda m: ddpm.draw_t(3, 10, "early"), "way .*uniform, focused, not 'early'"),
    ],
)
def test_a_wrong_value_is_named_with_its_range(call, words):
    with pytest.raises(ValueError, match=words):
        call(small())


# ---- the parts of training


def test_the_learning_rate_rises_for_a_fiftieth_and_falls_to_0():
    done = torch.linspace(0.0005, 0.9995, 1000, dtype=F64)
    rate = torch.tensor([ddpm.get_lr(share, 3e-3) for share in done.tolist()], dtype=F64)
    ramp = (done / 0.02).clamp(max=1)
    close(rate, 3e-3 * ramp * (math.pi / 2 * done).cos() ** 2)
    assert rate.argmax() == 20 and rate.max() > 0.998 * 3e-3
    assert rate[0] < 1e-4 and rate[-1] < 1e-8


def test_the_average_is_over_about_the_last_twentieth():
    """After n updates, the k-th weights have about the factor C k^19; k/n averages 20/21."""
    n = 400
    model, average = nn.Linear(n, 1).double(), nn.Linear(n, 1).double().requires_grad_(False)
    for step in range(n):  # weights that say which update they come from
        model.weight.data = F.one_hot(torch.tensor([step]), n).double()
        ddpm.update_average(average, model, step)
    factors = average.weight[0]
    share = [Fraction(20, 20 + step) for step in range(n)]
    kept, expected = Fraction(1), []
    for each in reversed(share):
        expected.append(float(each * kept))
        kept *= 1 - each
    close(factors, expected[::-1], atol=1e-15)
    assert kept == 0 and factors.sum().item() == pytest.approx(1)  # nothing is left of the start
    assert (factors @ torch.arange(1.0, n + 1).double()).item() / n == pytest.approx(20 / 21, 0.01)


# ---- training, on 300 digits: 3 epochs of 18 steps, 12 images left out of each


def flags(digits, out, *more):
    text = "--limit 300 --epochs 3 --batch-size 16 --lr 4e-3 --T 8 --schedule cosine --width 8"
    given = ["--data-dir", digits, "--out", out, "--device", "cpu", "--precision", "float32"]
    return [str(flag) for flag in [*given, *text.split(), *more]]


def checkpoint(out):
    return torch.load(out / "ddpm.pt", weights_only=True)


def digits_of(folder):
    settings = Namespace(data="mnist", size=32, limit=None, seed=0)
    where = Namespace(data_dir=str(folder), out="")
    x_train, _, x_test, _ = common.load_data(settings, where, CPU)
    return x_train, x_test


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("run") / "out"
    ddpm.main(flags(digits, out))
    return out


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
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_test_loss_is_of_all_images_and_averaged_weights(trained, digits):
    model = ddpm.load(trained / "ddpm.pt")
    torch.manual_seed(0)
    five, one = (model.loss(2 * (x / 255) - 1) for x in digits_of(digits)[1].split(500))
    found = checkpoint(trained)["history"][-1]["test_loss"]
    assert found == pytest.approx((5 * five + one).item() / 6, rel=1e-6)


@pytest.mark.parametrize("recipe, times", [("short", "focused"), ("paper", "uniform")])
def test_training_is_algorithm_1(digits, tmp_path, recipe, times):
    """Two epochs of 27 steps, with a decaying rate and an average: equal up to rounding."""
    more = "--seed 3 --batch-size 11 --T 100 --lr 5e-3 --schedule linear --epochs 2"
    result, history = train(digits, tmp_path, f"{more} --recipe {recipe}")
    saved = checkpoint(tmp_path)

    torch.manual_seed(3_000_000)
    net = ddpm.Preconditioned(ddpm.UNet(3, 1, 4), linear(100)[1])
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


SHORT = {"recipe": "short", "weighting": "v", "t": "focused", "width": 32, "epochs": 6}
SHORT |= {"lr": 4e-3, "T": 1000, "schedule": "linear", "variance": "posterior", "batch_size": 64}
SHORT |= {"data": "mnist", "size": 32, "seed": 0, "limit": None, "pictures": None}
SHORT |= {"precision": "float32", "shape": [1, 28, 28]}
PAPER = SHORT | {"recipe": "paper", "weighting": "simple", "t": "uniform"}
PAPER |= {"width": 64, "epochs": 100, "lr": 1e-3}
OTHER = {"weighting": "bound", "width": 4, "epochs": 7, "lr": 0.5, "T": 30, "batch_size": 5}
OTHER |= {"schedule": "cosine", "seed": 9, "limit": 77, "precision": "bfloat16"}
OTHER_FLAGS = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in OTHER.items())


@pytest.mark.parametrize(
    "given, meant",
    [
        ("", SHORT),
        ("--recipe=short", SHORT),
        ("--recipe=paper", PAPER),
        (OTHER_FLAGS, SHORT | OTHER),
        (f"--recipe=paper {OTHER_FLAGS}", PAPER | OTHER),
    ],
)
def test_recipes_are_defaults_and_flags_win(monkeypatch, digits, tmp_path, given, meant):
    built = []

    def stop(settings):
        built.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm, "build", stop)
    monkeypatch.setattr(common, "best_precision", lambda device: "float32")
    args = ddpm.parse(["--data-dir", str(digits), "--out", str(tmp_path), *given.split()])
    with pytest.raises(KeyboardInterrupt):
        ddpm.train(args, CPU)
    assert meant.items() <= built[0].items()


def test_build_makes_what_the_settings_say():
    base = ddpm.defaults(ddpm.parse([]), CPU)
    for change in SHORT | OTHER, PAPER | {"variance": "beta", "T": 40, "shape": [3, 8, 8]}:
        settings = base | change
        model = ddpm.build(settings)
        same = DDPM(None, settings["T"], settings["schedule"])
        assert torch.equal(model.alpha_bar, same.alpha_bar)
        weight = ddpm.loss_weights(same.alpha_bar, settings["weighting"], settings["variance"])
        close(model.weight, weight, rtol=1e-6)
        assert model.variance == settings["variance"] and model.clip
        assert model.shape == tuple(settings["shape"])
        assert model.net.net.width == settings["width"]
        channels = settings["shape"][0]  # 2 x 2 pixels are folded
        assert model.net.net.conv_in.in_channels == 4 * 3 * channels
        assert model.net.net.conv_out.out_channels == 4 * channels
        close(model.net.signal_rate, same.alpha_bar.sqrt(), **SINGLE)
        close(model.net.noise_rate, (1 - same.alpha_bar).sqrt(), **SINGLE)


@pytest.mark.parametrize("kind, recipe", [("cuda", "paper"), ("cpu", "short"), ("mps", "short")])
def test_paper_is_the_default_recipe_on_a_gpu(monkeypatch, kind, recipe):
    monkeypatch.setattr(common, "best_precision", lambda device: "float32")
    found = ddpm.defaults(ddpm.parse([]), torch.device(kind))
    assert found["recipe"] == recipe


def test_the_first_line_says_what_is_minimized(digits, tmp_path, capsys):
    short = "recipe short: its loss is not Ho's L_simple, which is --recipe paper"
    paper = "recipe paper: its loss is Ho's L_simple"
    for recipe, said in ("short", short), ("paper", paper):
        train(digits, tmp_path / recipe, f"--limit 16 --epochs 1 --recipe {recipe}")
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert first == said
        assert second.startswith("DDPM on cpu  updates per epoch 1  ")


def test_a_batch_is_at_most_the_data_set_and_watch_adds_a_column(digits, tmp_path):
    seen = []
    watch = lambda *given: seen.append(given) or {"n": 5}  # noqa: E731
    model, _ = train(digits, tmp_path, "--limit 50 --batch-size 999", watch)
    assert seen == [(model, 1), (model, 2), (model, 3)]
    assert [row["n"] for row in checkpoint(tmp_path)["history"]] == [5, 5, 5]


def test_compile_wraps_the_model_once(digits, tmp_path, monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: wrapped.append(model) or model)
    train(digits, tmp_path, "--limit 16 --epochs 2 --compile")
    assert [type(model) for model in wrapped] == [DDPM]


COMMITTED_LOSS = 0.02054  # of the run of 100 epochs, on 600 test digits
COMMITTED_ELBO = 139.4  # nats


def test_the_committed_weights_are_from_the_long_run(digits):
    paths = [REPO / "pretrained" / name for name in ("ddpm.pt", "vae.pt")]
    assert sum(path.stat().st_size for path in paths) < 6e6
    model, autoencoder = ddpm.load(paths[0]), vae.load(paths[1])
    assert model.settings["epochs"] == autoencoder.settings["epochs"] == 100
    _, x = digits_of(digits)
    found = ddpm.evaluate(model, x, seed=0, precision="float32")
    assert found == pytest.approx(COMMITTED_LOSS, rel=0.02)
    reconstruction, kl = autoencoder.elbo_terms(x / 255, samples=8)
    assert (kl - reconstruction).mean().item() == pytest.approx(COMMITTED_ELBO, rel=0.01)


# ---- the same command goes on


def same_end(out, other):
    """Asserts that both runs ended bit for bit alike: weights, average, optimizer, history."""
    a, b = checkpoint(out), checkpoint(other)
    for row in a["history"] + b["history"]:
        row["seconds"] = 0
    for name in "settings", "kind", "code":
        assert a.pop(name) == b.pop(name)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_killed_run_resumes_bit_for_bit(trained, digits, tmp_path, capsys):
    command = [sys.executable, str(REPO / "ddpm.py"), *flags(digits, tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=one_thread, stdout=subprocess.PIPE, text=True) as child:
        assert any(line.startswith("epoch 1 ") for line in child.stdout)
        time.sleep(random.random())
        child.kill()
    done = len(checkpoint(tmp_path)["history"])
    ddpm.main(flags(digits, tmp_path))
    same_end(tmp_path, trained)
    said = capsys.readouterr().out
    if done < 3:
        assert said.startswith(f"going on after epoch {done} of 3\n")
    assert said.count("test_loss") == 3 - done  # only the other epochs


def at_step(patch, number, action):
    """In training step `number`, counted from 1, the loss becomes action(loss)."""
    steps = itertools.count(1)

    def forward(self, *given):
        loss = self.loss(*given)
        return action(loss) if next(steps) == number else loss

    patch.setattr(DDPM, "forward", forward)


def test_after_ctrl_c_it_resumes_bit_for_bit(digits, tmp_path, monkeypatch, capsys):
    def interrupt(loss):
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "parts"
    train(digits, whole, "--recipe paper")
    for step in 19, 20:  # in epoch 2; then in epoch 3
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            at_step(patch, step, interrupt)
            common.run(lambda: train(digits, out, "--recipe paper"))
        assert "\nstopped: run the same command to resume after the last" in stop.value.code
    assert len(checkpoint(out)["history"]) == 2 and os.listdir(out) == ["ddpm.pt"]
    capsys.readouterr()
    train(digits, out)  # the recipe is the checkpoint's
    assert capsys.readouterr().out.startswith("going on after epoch 2 of 3\nrecipe paper: ")
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
    assert first == f"{finished} is finished: drawing its pictures again (--fresh trains anew)"
    assert last == f"wrote the pictures ddpm_* in {finished.parent}/"


@pytest.mark.parametrize(
    "change",
    ["recipe short paper", "weighting v mu", "width 8 9", "T 8 9", "schedule cosine linear"]
    + ["epochs 3 2", "batch_size 16 17", "lr 0.004 0.5", "limit 300 301", "data mnist kmnist"],
)
def test_a_contradicting_flag_gives_a_one_line_error(finished, change):
    name, value, other = change.split()
    flag = "--" + name.replace("_", "-")
    for more in f"{flag}={other}", f"{flag}={other} --sample=4":
        with pytest.raises(common.InputError) as stop:
            ddpm.main(f"--out {finished.parent} --device=cpu {more}".split())
        expected = f"{finished} has {name} {value}, not {other}: leave out {flag}, choose another"
        assert str(stop.value).startswith(expected)
        assert ("--fresh" in str(stop.value)) == ("--sample" not in more)  # which never trains


def test_another_seed_contradicts_a_run(finished, digits):
    with pytest.raises(common.InputError, match="has seed 0, not 1"):
        ddpm.main(flags(digits, finished.parent, "--seed", 1))


def test_sample_draws_from_the_checkpoint(finished, monkeypatch):
    drawn, out = [], finished.parent
    monkeypatch.setattr(common, "plot_grid", lambda x, path, *_: drawn.append(x) or path.touch())
    for more in "3", "3 --seed 0", "3 --seed 1", "3 --eta 0", "2", "8":
        flag = f"--out {out} --device cpu --precision float32 --sample 12 --steps {more}"
        ddpm.main(flag.split())
    first, same_seed, *others = drawn
    assert torch.equal(first, same_seed)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations([first, *others], 2))
    assert (out / "ddpm_sample.png").exists()
    model = ddpm.load(finished)
    torch.manual_seed(0)
    assert torch.equal(first, model.sample(12, 3, order=2))
    torch.manual_seed(1)
    assert torch.equal(others[0], model.sample(12, 3, order=2))
    torch.manual_seed(0)
    assert torch.equal(others[1], model.sample(12, 3, eta=0.0, order=2))


def test_more_steps_than_T_give_a_one_line_error(finished, digits, tmp_path):
    words = "--steps 9 exceeds T = 8"
    with pytest.raises(common.InputError, match=words):
        ddpm.main(f"--out {finished.parent} --device cpu --sample 12 --steps 9".split())
    with pytest.raises(common.InputError, match=words):
        ddpm.main(flags(digits, tmp_path / "new", "--steps", 9))
    assert not any((tmp_path / "new").iterdir())


def test_a_diverging_run_ends_before_it_is_saved(digits, tmp_path, monkeypatch):
    at_step(monkeypatch, 36, lambda loss: loss * math.inf)  # the last of epoch 2
    with pytest.raises(common.InputError, match="not finite in epoch 2: lower --lr"):
        train(digits, tmp_path)
    assert len(checkpoint(tmp_path)["history"]) == 1 and os.listdir(tmp_path) == ["ddpm.pt"]


@pytest.mark.parametrize(
    "wrong",
    ["--epochs 0", "--batch-size 0", "--lr nan", "--T 1", "--steps 0", "--recipe best", "--eta 2"]
    + ["--eta nan", "--schedule sqrt", "--weighting l1", "--width 3", "--device tpu", "--sample 0"]
    + ["--data cifar", "--size 7", "--resume", "--sigma beta", "--load x.pt", "--fresh --sample 3"]
    + ["--seed -1", "--limit 0", "--precision half"],
)
def test_bad_input_gives_a_one_line_error(tmp_path, capsys, monkeypatch, wrong):
    monkeypatch.delattr(DDPM, "forward")  # so that no training can come first
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: ddpm.main(["--out", str(tmp_path / "out"), *wrong.split()]))
    message = capsys.readouterr().err or str(stop.value)
    assert stop.value.code != 0 and "\n" not in message.strip()
    assert message.startswith("error: ") and wrong.split()[0] in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # nothing is written
