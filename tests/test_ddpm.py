import contextlib
import copy
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

import common
import ddpm
from ddpm import DDPM

REPO = Path(__file__).resolve().parent.parent
TINY = (1, 4, 4)
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    """Equal to the rounding of float64, unless told otherwise."""
    actual, expected = (x if torch.is_tensor(x) else torch.tensor(x, dtype=F64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def linear(T=1000):
    """β_0 ... β_T and ᾱ_0 ... ᾱ_T of Ho, section 4, for all that the tests compute by themselves."""
    beta = [0.0] + [min(0.999, (1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T) for i in range(T)]
    alpha_bar = [math.prod(1 - b for b in beta[:t + 1]) for t in range(T + 1)]
    return beta, alpha_bar


def levels(*shape):
    """8-bit pixels, black and white among them, on the scale of the model."""
    x = torch.randint(0, 256, shape)
    x.view(-1)[:2] = torch.tensor([0, 255])
    return ddpm.to_model(x.double() / 255)


def fake(out, T=1000, **kwargs):
    """A chain whose network always answers `out`."""
    return DDPM(lambda xt, t: out, T=T, shape=out.shape[1:], **kwargs)


# ---- schedules

def test_linear_schedule_is_that_of_the_paper():
    model = DDPM(None)
    beta, alpha_bar = linear()
    close(model.beta, beta)
    close(model.alpha_bar, alpha_bar)
    close(model.alpha, [1 - b for b in beta])
    assert model.beta[[0, 1, 1000]].tolist() == pytest.approx([0, 1e-4, 0.02], rel=1e-10)
    assert model.alpha_bar[0] == 1 and len(model.beta) == 1001 and model.beta.dtype == F64


def test_cosine_and_logsnr_schedules():
    def f(t):
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2
    cosine, logsnr = (DDPM(None, 100, schedule).alpha_bar for schedule in ("cosine", "logsnr"))
    close(cosine, [f(t) / f(0) for t in range(100)] + [1e-3 * f(99) / f(0)])  # β_T is clipped to 0.999
    close((logsnr / (1 - logsnr)).log()[1:], [13.3 - 18.3 * i / 99 for i in range(100)], rtol=1e-9)


@pytest.mark.parametrize("T", [2, 10, 100, 1000, 4000])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "logsnr"])
def test_a_chain_of_any_length_ends_in_noise(schedule, T):
    model = DDPM(None, T=T, schedule=schedule)
    assert model.alpha_bar[-1].sqrt() < 0.1 and model.T == T
    assert (model.alpha_bar.diff() < 0).all() and (model.beta[1:] > 0).all() and (model.beta < 1).all()


# ---- q

def test_q_sample_is_the_chain_run_step_by_step():
    T, n = 8, 400_000
    beta, _ = linear(T)
    model, x0 = DDPM(None, T=T), torch.full((n, 1, 1, 1), 0.7, dtype=F64)
    x = x0
    for t in range(1, T + 1):
        x = math.sqrt(1 - beta[t]) * x + math.sqrt(beta[t]) * torch.randn_like(x)  # Ho (2)
        xt = model.q_sample(x0, torch.full((n,), t), torch.randn_like(x0))
        # Five standard errors of a difference of two means, and of two variances, of n draws.
        sd = x.std().item()
        assert abs(xt.mean() - x.mean()) < 5 * sd * math.sqrt(2 / n)
        assert abs(xt.var() / x.var() - 1) < 5 * math.sqrt(4 / n)


@pytest.mark.parametrize("t", [2, 500, 1000])
def test_q_posterior_is_bayes_rule(t):
    beta, alpha_bar = linear()
    x0, xt = 0.3, math.sqrt(alpha_bar[t]) * 0.3 + 0.8 * math.sqrt(1 - alpha_bar[t])
    x = torch.linspace(-8, 8, 400_001, dtype=F64)  # x_{t-1}: 170 points a standard deviation at t = 2
    p = torch.softmax(-(x - math.sqrt(alpha_bar[t - 1]) * x0) ** 2 / (2 * (1 - alpha_bar[t - 1]))  # q(x_{t-1}|x_0)
                      - (xt - math.sqrt(1 - beta[t]) * x) ** 2 / (2 * beta[t]), 0)  # times q(x_t|x_{t-1})
    mean = (p * x).sum()
    image = torch.ones(1, 1, 1, 1, dtype=F64)
    q_mean, q_variance = DDPM(None).q_posterior(x0 * image, xt * image, torch.tensor([t]))
    close(q_mean.item(), mean.item(), rtol=1e-8)
    close(q_variance.item(), (p * (x - mean) ** 2).sum().item(), rtol=1e-8)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "logsnr"])
def test_eps_x0_mu_and_v_tell_the_same(schedule):
    model, t = DDPM(None, schedule=schedule), torch.tensor([1, 2, 500, 999, 1000])
    x0, eps = torch.randn(2, 5, 1, 3, 3, dtype=F64)
    xt = model.q_sample(x0, t, eps)
    mu, variance = model.q_posterior(x0, xt, t)
    close(mu[0], x0[0])
    assert variance.shape == (5, 1, 1, 1) and variance[0] == 0 and (variance[1:] > 0).all()
    close(model.mu_from_eps(xt, t, eps), mu, rtol=1e-9, atol=1e-9)  # rounding, times up to 1/√ᾱ_T
    close(model.x0_from_eps(xt, t, eps), x0, rtol=1e-9, atol=1e-9)
    close(model.eps_from_x0(xt, t, x0), eps, rtol=1e-9, atol=1e-9)
    close(model.x0_from_mu(xt, t, mu), x0, rtol=1e-9, atol=1e-9)
    a = model.alpha_bar[t].view(-1, 1, 1, 1)
    v = model.v_from_x0(xt, t, x0)
    close(v, a.sqrt() * eps - (1 - a).sqrt() * x0, rtol=1e-9, atol=1e-9)
    close(model.x0_from_v(xt, t, v), x0, rtol=1e-9, atol=1e-9)


# ---- p and the losses

def test_p_mean_variance_of_each_parameterization():
    beta, alpha_bar = (torch.tensor(table, dtype=F64).view(-1, 1, 1, 1) for table in linear())
    t = torch.tensor([1, 2, 500, 1000])
    xt, out = torch.randn(2, 4, *TINY, dtype=F64)
    mean, variance = fake(out).p_mean_variance(xt, t)
    close(mean, (xt - beta[t] / (1 - alpha_bar[t]).sqrt() * out) / (1 - beta[t]).sqrt(), rtol=1e-9)  # Ho (11)
    close(variance, beta[t])
    close(fake(out, predict="mu").p_mean_variance(xt, t)[0], out, rtol=1e-9, atol=1e-9)
    # q(x_{t-1}|x_0) times q(x_t|x_{t-1}), two normals: their precisions add, and weigh their means.
    t, xt, out = t[1:], xt[1:], out[1:]
    a, b = 1 / (1 - alpha_bar[t - 1]), (1 - beta[t]) / beta[t]
    mean, variance = fake(out, predict="x0", sigma="posterior").p_mean_variance(xt, t)
    close(mean, (a * alpha_bar[t - 1].sqrt() * out + b * xt / (1 - beta[t]).sqrt()) / (a + b), rtol=1e-9)
    close(variance, 1 / (a + b), rtol=1e-9)
    clipped, _ = fake(5 * out, predict="x0", clip=True).p_mean_variance(xt, t)
    close(clipped, fake((5 * out).clamp(-1, 1), predict="x0").p_mean_variance(xt, t)[0])


def test_sigma_tables():
    beta, alpha_bar = linear()
    tilde = [0.0] * 2 + [1 / (1 / (1 - alpha_bar[t - 1]) + (1 - beta[t]) / beta[t]) for t in range(2, 1001)]
    close(DDPM(None, sigma="beta").variance, beta)
    close(DDPM(None, sigma="posterior").variance[1:], [tilde[2], *tilde[2:]])  # β̃_1 = 0 would be no decoder
    model = DDPM(None, sigma="optimal")
    close(model.variance[1:], [tilde[2], *tilde[2:]])
    model.mse[1:] = torch.rand(1000)
    c = [0.0] + [math.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t]) for t in range(1, 1001)]
    close(model.variance[1], tilde[2])
    close(model.variance[2:], [tilde[t] + c[t] ** 2 * model.mse[t].item() for t in range(2, 1001)], rtol=1e-9)
    for wrong in dict(predict="score"), dict(sigma="learned"), dict(schedule="sqrt"):
        with pytest.raises(ValueError):
            DDPM(None, **wrong)


def test_the_vlb_loss_reaches_pixels_that_sampling_would_clip():
    x0, eps = levels(2, *TINY).requires_grad_(), torch.randn(2, *TINY, dtype=F64)
    for t in (1, 500, 1000):
        gradients = []
        for clip in (True, False):
            out = (5 + eps).requires_grad_()  # far outside [-1, 1]
            loss = fake(out, predict="x0", clip=clip).vlb_loss(x0.detach(), torch.tensor([t, t]), eps)
            gradients.append(torch.autograd.grad(loss, out)[0])
        close(*gradients)
        assert t == 1 or (gradients[0] != 0).all()  # at t = 1 a white pixel may be guessed as bright as one likes


def test_the_decoder_has_two_fitted_scales():
    """Gray pixels are off by 0.1, black ones by nothing: each finds its own scale, on images that it is shown."""
    x0 = torch.where(torch.rand(40, *TINY) < 0.5, -1.0, torch.rand(40, *TINY) - 0.5)
    x0 = (x0 * 127.5 + 127.5).round() / 127.5 - 1
    guess = torch.where(x0 == -1, x0, x0 + 0.1 * torch.randn(x0.shape))
    model = fake(guess, T=10, predict="x0")
    before = model.vlb_terms(x0, torch.zeros(40, 11))[:, 0]
    close(model.decoder_scale(guess) ** 2, model.variance[1].expand_as(guess))
    model.fit_decoder(x0)
    assert 0.08 < model.decoder_sigma[0] < 0.12 and model.decoder_sigma[1] < 0.0015
    scale = model.decoder_scale(guess)
    assert (scale[guess == -1] == model.decoder_sigma[1]).all() and (scale[guess != -1] == model.decoder_sigma[0]).all()
    assert (model.vlb_terms(x0, torch.zeros(40, 11))[:, 0] < before).all()


def test_simple_loss_is_the_mean_squared_error_of_what_is_predicted():
    x0, eps, out = torch.randn(3, 4, *TINY, dtype=F64)
    t = torch.tensor([1, 2, 9, 10])
    beta, alpha_bar = (torch.tensor(table, dtype=F64).view(-1, 1, 1, 1)[t] for table in linear(10))
    noise = (1 - alpha_bar).sqrt()
    mu = (alpha_bar.sqrt() * x0 + noise * eps - beta / noise * eps) / (1 - beta).sqrt()  # Ho (11)
    v = alpha_bar.sqrt() * eps - noise * x0
    for predict, target in ("eps", eps), ("x0", x0), ("mu", mu), ("v", v):
        close(fake(out, T=10, predict=predict).loss(x0, t, eps), ((out - target) ** 2).sum() / out.numel(), rtol=1e-9)


def test_the_loss_on_v_is_the_loss_on_eps_over_alpha_bar():
    """One guess at x_0, said as ε and as v."""
    x0, eps, guess = torch.randn(3, 1, *TINY, dtype=F64)
    for t in torch.tensor([[1], [500], [900]]):
        by_eps, by_v = (DDPM(None, predict=predict) for predict in ("eps", "v"))
        xt = by_eps.q_sample(x0, t, eps)
        by_eps.net, by_v.net = (lambda *_: by_eps.eps_from_x0(xt, t, guess)), (lambda *_: by_v.v_from_x0(xt, t, guess))
        close(by_v.loss(x0, t, eps), by_eps.loss(x0, t, eps) / by_eps.alpha_bar[t].squeeze(), rtol=1e-9)


def test_t_is_drawn_from_1_to_T():
    seen = []
    model = DDPM(lambda xt, t: seen.append(t) or xt, T=3, shape=TINY)
    for _ in range(30):  # 300 draws: that one of the three is missed has a chance of 1e-52
        model.loss(torch.zeros(10, *TINY))
    counts = torch.cat(seen).bincount(minlength=4).tolist()
    assert counts[0] == 0 and len(counts) == 4 and min(counts[1:]) > 60  # 100 ± 8


def test_t_is_drawn_with_focus():
    n, normal = 20000, Normal(0.0, 1.0)
    t, _ = DDPM(None).draw(torch.zeros(n, 1, 1, 1), focused=True)
    assert t.min() == 1 and t.max() <= 1000 and t.dtype == torch.int64
    for bound in 1, 10, 100, 200, 400, 600, 900:
        # P(T sigmoid(n/2 - 0.6) <= bound) = Φ(2 logit(bound/T) + 1.2); P((T+1)^u < bound + 1) = log(bound+1) / log(T+1)
        shape = normal.cdf(torch.tensor(2 * math.log(bound / (1000 - bound)) + 1.2)).item()
        share = 0.75 * shape + 0.25 * math.log(bound + 1) / math.log(1001)
        assert (t <= bound).double().mean().item() == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
    for T in 2, 3:
        t, _ = DDPM(None, T=T).draw(torch.zeros(n, 1, 1, 1), focused=True)
        assert t.bincount(minlength=T + 1)[0] == 0 and (t.bincount()[1:] > 100).all() and len(t.bincount()) == T + 1


def drawn(out, *flags):
    """Whether `python ddpm.py` with these flags draws a focused t: what its first step asks for, in a list."""
    asked = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def stop(self, x0, focused=False):
            asked.append(focused)
            raise KeyboardInterrupt
        patch.setattr(DDPM, "draw", stop)
        patch.setattr(common, "find_data", lambda *_: "synthetic")
        patch.setattr(common, "load_data", lambda *_: [torch.zeros(20, 1, 28, 28, dtype=torch.uint8)] * 2)
        ddpm.main(["--device", "cpu", "--out", str(out), *flags])
    return asked


@pytest.mark.parametrize("given, focused", [
    ([], True), (["--times", "uniform"], False), (["--predict", "eps"], False), (["--schedule", "logsnr"], False),
    (["--loss", "vlb"], False), (["--predict", "eps", "--times", "focused"], True)])
def test_only_l_simple_on_v_is_focused_by_itself(tmp_path, given, focused):
    assert drawn(tmp_path, *given) == [focused]


# The bound of a network that is wrong in its own way at each t: on the inputs that it saw, against torch's KL.

def spied(sigma, predict="eps", T=12):
    seen = []

    def net(xt, t):
        seen.append((xt, t))
        return torch.tanh(xt) * (0.5 + t.view(-1, 1, 1, 1) / T)
    return DDPM(net, T=T, predict=predict, sigma=sigma, shape=TINY), seen


@pytest.mark.parametrize("sigma, predict", [("beta", "eps"), ("posterior", "eps"), ("optimal", "x0"), ("beta", "mu"),
                                            ("posterior", "v")])
def test_vlb_terms_and_the_vlb_loss_are_the_kl_divergences(sigma, predict):
    model, seen = spied(sigma, predict)
    model.mse[1:] = 0.1
    x0 = levels(5, *TINY)
    terms = model.vlb_terms(x0)
    assert terms.shape == (5, model.T + 1) and (terms >= 0).all()
    asked = {t[0].item(): (xt, t) for xt, t in seen}  # at t = 1 the last counts: that of L_0
    for s, (xt, t) in asked.items():
        mean, variance = model.p_mean_variance(xt, t)
        if s == 1:
            L = -ddpm.log_discretized_normal(x0, mean, variance.sqrt())
        else:
            q_mean, q_variance = model.q_posterior(x0, xt, t)
            L = kl_divergence(Normal(q_mean, q_variance.sqrt()), Normal(mean, variance.sqrt())).flatten(1).sum(1)
        close(terms[:, s - 1], L, rtol=1e-8)
        loss = model.vlb_loss(x0, t, model.eps_from_x0(xt, t, x0))
        close(loss, model.T * L.mean() / (16 * math.log(2)), rtol=1e-8)  # bits/dim
    a = linear(model.T)[1][-1]
    L_T = kl_divergence(Normal(math.sqrt(a) * x0, math.sqrt(1 - a)), Normal(0.0, 1.0)).flatten(1).sum(1)
    close(terms[:, -1], L_T, rtol=1e-7, atol=1e-10)  # the oracle's cancellation
    assert sorted(asked) == list(range(1, model.T + 1))


@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.999, 0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.05, 0.5, 3.0])
def test_the_256_levels_share_the_whole_probability(mean, sigma):
    x0 = (torch.arange(256.0) / 127.5 - 1).view(256, 1, 1, 1)  # float32, as the images are
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
COUNT = 20_000  # images of 16 pixels: a mean squared error is known to √(2/320000) = 0.25 %


def closed_form(a):
    """Of a chain with ᾱ, by sigma: σ_t² for t = 1 ... T, E L_{t-1} for t = 2 ... T and E L_0 of a density (nats/pixel).

    All is normal: Var x_t = ᾱ_t S² + 1 - ᾱ_t, E(x_0 - x̂_0)² = S² (1-ᾱ_t) / Var x_t, and precisions add.
    """
    before, a = a[:-1], a[1:]
    alpha = a / before
    marginal, marginal_before = a * S ** 2 + 1 - a, before * S ** 2 + 1 - before
    mse = S ** 2 * (1 - a) / marginal
    tilde = 1 / (1 / (1 - before) + alpha / (1 - alpha))  # of x_{t-1} given x_t and x_0
    optimal = 1 / (1 / marginal_before + alpha / (1 - alpha))  # of x_{t-1} given x_t alone
    shift = (tilde * before.sqrt() / (1 - before)) ** 2 * mse  # E of the squared distance of the two means
    variances = {"beta": 1 - alpha, "posterior": tilde.clone(), "optimal": optimal}
    variances["posterior"][0] = tilde[1]
    return variances, {
        sigma: ((v / tilde).log() + (tilde + shift) / v - 1)[1:] / 2 for sigma, v in variances.items()}, {
        sigma: ((2 * math.pi * v[0]).log() + mse[0] / v[0]) / 2 for sigma, v in variances.items()}


@pytest.fixture(scope="module")
def trained_gaussian():
    torch.manual_seed(0)
    a = torch.tensor(linear(200)[1], dtype=F64).view(-1, 1, 1, 1)
    net = (1 - a).sqrt() / (a * S ** 2 + 1 - a)  # E[ε|x_t] = net_t x_t: the regression of ε on x_t
    model = DDPM(lambda xt, t: net[t].to(xt.dtype) * xt, T=200, sigma="optimal", shape=TINY)
    model.estimate_mse(S * torch.randn(COUNT, *TINY, dtype=F64))
    return model


def test_the_optimal_variance_is_that_of_the_true_reverse_step(trained_gaussian):
    variances, _, _ = closed_form(trained_gaussian.alpha_bar)
    close(trained_gaussian.variance[2:], variances["optimal"][1:], rtol=0.0125)  # five standard errors of mse
    ratio = trained_gaussian.variance[2:] / variances["optimal"][1:]
    assert abs(ratio.mean() - 1) < 1e-3  # the steps' errors are independent: five of 0.25 % / √200


def test_the_bound_is_what_it_must_be_never_beats_the_truth_and_gains_from_steps(trained_gaussian):
    x0, gaps = S * torch.randn(COUNT, *TINY, dtype=F64), {"beta": [], "posterior": [], "optimal": []}
    truth = math.log(2 * math.pi * math.e * S ** 2) / 2  # E[-log p(x_0)]
    for K in 2, 5, 10, 50, 200:
        chain = trained_gaussian.respace(K)
        errors, (_, L, L_0), a = chain.x0_errors(x0), closed_form(chain.alpha_bar), chain.alpha_bar[-1]
        L_T = (a * S ** 2 - a - torch.log1p(-a)) / 2  # E KL(q(x_T|x_0) || N(0, 1))
        for sigma in gaps:
            chain.sigma = sigma
            # Column 0 is for 8-bit pixels: here L_0 of a density takes its place.
            terms = chain.vlb_terms(x0, errors)[:, 1:].mean(0) / 16
            close(terms[:-1], L[sigma], rtol=0.01)
            close(terms[-1], L_T, rtol=0.01)
            gaps[sigma].append((terms.sum() + L_0[sigma]).item() - truth)
    # The true reverse steps are normal, so the best variance leaves no gap but KL(q(x_T) || N(0, 1)) < 1e-8,
    # however few the steps; 0.004 is five standard errors of the terms' sum.
    assert max(map(abs, gaps["optimal"])) < 0.004
    assert gaps["beta"] == sorted(gaps["beta"], reverse=True)  # not so "posterior": β̃_2 is no good decoder
    assert all(min(others) > best + 0.01 for *others, best in zip(*gaps.values()))


def test_samples_have_the_spread_of_the_data(trained_gaussian):
    (_, _, x0_hat), (_, x0, _) = deque(trained_gaussian.trajectory(torch.randn(COUNT, *TINY, dtype=F64)), maxlen=2)
    assert torch.equal(x0, x0_hat)  # no noise in the last step
    variances, _, _ = closed_form(trained_gaussian.alpha_bar)
    # so its variance is missing; 0.625 % is five standard errors of 1 / √(2 · 320000)
    assert x0.std().item() == pytest.approx(math.sqrt(S ** 2 - variances["optimal"][0]), rel=0.00625)
    assert abs(x0.mean()) < 5 * S / math.sqrt(x0.numel())


# ---- sampling

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_each_step_of_any_eta_has_the_marginal_q(eta):
    # Song et al. 2021, lemma 1: with the right x_0, x_t ~ q(x_t|x_0) for all t.
    n, T = 400_000, 8
    model = DDPM(lambda xt, t: torch.full_like(xt, 0.5), T=T, predict="x0", sigma="posterior", shape=(1, 1, 1))
    _, alpha_bar = linear(T)
    assert alpha_bar[T] < 1e-6  # so that starting from N(0, 1) is as good
    for t, xt, _ in model.trajectory(torch.randn(n, *model.shape), eta):
        sd = math.sqrt(1 - alpha_bar[t])
        assert xt.mean().item() == pytest.approx(math.sqrt(alpha_bar[t]) * 0.5, abs=1e-6 + 5 * sd / math.sqrt(n))
        assert xt.std().item() == pytest.approx(sd, rel=5 / math.sqrt(2 * n), abs=1e-6)


@pytest.mark.parametrize("sigma", ["beta", "posterior"])
def test_an_ancestral_step_is_the_mean_plus_sigma_z(sigma):
    model, _ = spied(sigma)
    torch.manual_seed(3)
    (t, x, _), (_, after, _), *_ = model.trajectory(torch.randn(2, *model.shape))
    torch.manual_seed(3)
    close(x, torch.randn(2, *TINY), rtol=0, atol=0)
    mean, variance = model.p_mean_variance(x, torch.full((2,), t))
    close(after, mean + variance.sqrt() * torch.randn(2, *TINY), rtol=1e-5, atol=1e-5)  # float32


def test_ddim_is_deterministic_given_x_T(monkeypatch):
    model, _ = spied("beta")
    ends = []
    for eta, noise in (0.0, 0.0), (0.0, 9.0), (1.0, 9.0):  # the same x_T
        torch.manual_seed(0)
        monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, noise))
        ends.append(deque(model.trajectory(torch.randn(2, *model.shape), eta), maxlen=1)[0][1])
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])


def test_ddim_encodes_to_noise_and_comes_back(trained_gaussian):
    x0 = S * torch.randn(500, *TINY, dtype=F64)
    ends = {}
    for steps in 20, 200:
        chain = trained_gaussian.respace(steps)
        xT = chain.ddim_encode(x0)
        *_, (_, back, _) = chain.trajectory(xT, eta=0)
        ends[steps] = (back - x0).square().mean().sqrt().item()
    assert xT.std().item() == pytest.approx(1, rel=0.05)
    assert ends[200] < ends[20] / 5  # of first order


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_second_order_loses_less_of_the_spread_in_few_steps(trained_gaussian, eta):
    for steps in 10, 20, 40:
        chain, error = trained_gaussian.respace(steps), {}
        chain.sigma = "posterior"
        for order in 1, 2:
            torch.manual_seed(0)
            *_, (_, x0, _) = chain.trajectory(torch.randn(5000, *TINY, dtype=F64), eta, order=order)
            error[order] = abs(x0.std().item() - S)
        assert error[2] < 0.96 * error[1]


def test_the_second_order_takes_a_straight_line_exactly():
    """x̂_0 that is linear in λ: its value in the middle of the step is known."""
    model, used = DDPM(None, T=50, sigma="posterior", shape=TINY), []
    half_log_snr = 0.5 * (model.alpha_bar / (1 - model.alpha_bar)).log()
    model.predict_x0 = lambda xt, t: half_log_snr[t].view(-1, 1, 1, 1).expand_as(xt)
    model.q_posterior = lambda x0, xt, t: (used.append(x0.mean().item()) or xt, None)
    list(model.trajectory(torch.randn(1, *TINY, dtype=F64), order=2))
    middles = (half_log_snr[1:] + half_log_snr[:-1]) / 2  # entry s-1: between s-1 and s
    close(used[0], half_log_snr[50]), close(used[-1], half_log_snr[1])
    close(used[1:-1], [middles[s - 1] for s in range(49, 1, -1)])


def test_a_trajectory_may_start_on_the_way():
    model, seen = spied("beta", T=10)
    x = torch.randn(2, *TINY, dtype=F64)
    times = [t for t, _, _ in model.trajectory(x, start=4)]
    assert times == [4, 3, 2, 1, 0] and torch.equal(seen[0][0], x)


def test_respaced_chain_is_the_chain_at_the_picked_times():
    model, seen = spied("beta", T=100)
    model.mse[1:] = torch.rand(100)
    model.decoder_sigma.fill_(0.25)
    for K in range(1, 101):
        assert (model.respace(K).tau.diff() >= 1).all()
    chain = model.respace(7)
    assert chain.T == 7 and chain.tau[[0, -1]].tolist() == [0, 100] and (chain.decoder_sigma == 0).all()
    close(chain.alpha_bar, torch.tensor(linear(100)[1], dtype=F64)[chain.tau])
    close(chain.mse, model.mse[chain.tau])
    x0, eps, t = torch.randn(3, *TINY, dtype=F64), torch.randn(3, *TINY, dtype=F64), torch.tensor([1, 4, 7])
    xt = chain.q_sample(x0, t, eps)
    close(xt, model.q_sample(x0, chain.tau[t], eps))
    close(chain.predict_x0(xt, t), model.predict_x0(xt, chain.tau[t]))
    whole = model.respace(100)
    assert (whole.decoder_sigma == 0.25).all()
    for name in "beta", "alpha_bar", "beta_tilde", "variance", "mse":
        close(getattr(whole, name), getattr(model, name))
    close(whole.p_mean_variance(xt, t)[0], model.p_mean_variance(xt, t)[0])


def test_sample_gives_images():
    calls = []
    model = DDPM(lambda xt, t: calls.append(t) or 3 * xt, T=20)
    for steps, eta, evaluations in (None, 1.0, 20), (20, 1.0, 20), (6, 0.0, 6), (1, 0.5, 1):
        calls.clear()
        x = model.sample(2, steps, eta)
        assert x.shape == (2, 1, 28, 28) and 0 <= x.min() and x.max() <= 1 and len(calls) == evaluations
    for steps in 0, -1, 21:
        with pytest.raises(ValueError, match="1 to T = 20"):
            model.sample(1, steps)
    x = torch.tensor([0.0, 0.25, 1.0])
    close(ddpm.to_model(x), [-1.0, -0.5, 1.0])
    close(ddpm.to_image(torch.tensor([-3.0, -0.5, 3.0])), x)


# ---- the network

@pytest.mark.parametrize("channels, size", [(1, 28), (3, 28), (3, 32)])
def test_unet_sees_t_and_every_image_alone(channels, size):
    net = ddpm.UNet(channels)
    assert sum(p.numel() for p in net.parameters()) < 2_000_000
    x, t = torch.randn(4, channels, size, size), torch.tensor([1, 2, 500, 1000])
    assert net(x, t).shape == x.shape and net(x, t).dtype == x.dtype
    with torch.no_grad():
        for p in net.parameters():  # the last layer of the network and of each block starts at zero
            p.add_(0.05 * torch.randn_like(p))
        batch = net(x, t)
        for i in range(4):
            close(net(x[i:i + 1], t[i:i + 1]), batch[i:i + 1], rtol=1e-4, atol=1e-4)  # other kernels, float32
        same = net(x[:1].expand(4, -1, -1, -1), t)
        assert all((same[i] - same[j]).abs().max() > 1e-2 for i in range(4) for j in range(i))


# ---- training, on 256 digits

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with synthetic digits under MNIST's names, so that each child process need not make its own."""
    root = tmp_path_factory.mktemp("data")
    (root / "MNIST" / "raw").mkdir(parents=True)
    parts = [part for seed in (0, 1) for part in common.synthetic_digits(500, seed)]
    for (name, shape), part in zip(common.MNIST_SHAPES.items(), parts):
        header = b"".join(n.to_bytes(4, "big") for n in (0x0800 + len(shape), *shape))
        content = part.to(torch.uint8).numpy().tobytes()
        (root / "MNIST" / "raw" / name).write_bytes(header + content * (shape[0] // 500))
    return root


def flags(data, out, *more):
    return [str(flag) for flag in ("--data", "mnist", "--data-dir", data, "--out", out, "--limit", 256, "--epochs", 2,
                                   "--batch-size", 8, "--T", 8, "--schedule", "cosine", "--sigma", "optimal",
                                   "--lr", 2e-3, "--device", "cpu", *more)]


def checkpoint(out):
    return torch.load(out / "ddpm.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """An undisturbed run, in this process -> its folder and what it printed."""
    out, printed, threads = tmp_path_factory.mktemp("run") / "out", io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child processes below
    with contextlib.redirect_stdout(printed):
        ddpm.main(flags(data, out))
    torch.set_num_threads(threads)
    return out, printed.getvalue()


@pytest.mark.parametrize("more", [(), ("--loss", "vlb", "--sigma", "beta"), ("--predict", "mu", "--optimizer", "adam")])
def test_a_captured_step_trains_to_the_same_bits(data, tmp_path, monkeypatch, cuda_graphs, more):
    capture, ends = common.captured, []
    more = [*more, "--limit", 60, "--epochs", 3]  # 8 batches, the last of 4 images
    for out in tmp_path / "plain", tmp_path / "captured":
        torch.manual_seed(0)
        ddpm.main(flags(data, out, *more))
        ends.append(checkpoint(out))
        monkeypatch.setattr(common, "captured", lambda step, device: capture(step, torch.device("cuda")))
    assert len(cuda_graphs) == 1 and len(cuda_graphs[0].kernels) > 300
    plain, fast = ends
    for part in "model", "ema":
        for name, weight in plain[part].items():
            assert torch.equal(weight, fast[part][name]), name
    for a, b in zip(plain["history"], fast["history"]):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_training_learns_in_64_steps(trained):
    history = checkpoint(trained[0])["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[1]["train_loss"] < history[0]["train_loss"] < 1 and history[1]["train_loss"] < 0.5
    assert history[1]["test_loss"] < 0.5  # that of the averaged weights; 1 where nothing is learned


def test_all_that_is_said_to_be_written_is_there(trained):
    out, printed = trained
    said, = re.findall(r"wrote (.*) in", printed)
    said = said.split(", ")
    epochs = [f"ddpm_epoch_{epoch:03d}.png" for epoch in (1, 2)]
    assert sorted(os.listdir(out)) == sorted(said + epochs)
    for name in said[1:] + epochs:
        assert Image.open(out / name).convert("L").getextrema()[1] > 100  # and not all black
    assert said[0] == "ddpm.pt" and any(name.endswith(".gif") for name in said)


def test_load_takes_the_averaged_weights_and_the_settings(trained):
    saved, model = checkpoint(trained[0]), ddpm.load(trained[0] / "ddpm.pt")
    assert not model.training and (model.T, model.sigma, model.predict) == (8, "optimal", "v")
    assert model.settings["data"] == "mnist" and model.settings["lr"] == 2e-3 and model.settings["limit"] == 256
    close(model.alpha_bar, ddpm.make_alpha_bar("cosine", 8))
    assert (model.mse[1:] > 0).all() and model.sample(2).shape == (2, 1, 28, 28)
    for name, p in model.net.named_parameters():
        assert torch.equal(p, saved["ema"][f"net.{name}"]) and not torch.equal(p, saved["model"][f"net.{name}"])


def test_the_command_draws_from_a_checkpoint(trained, tmp_path, capsys):
    shutil.copy(trained[0] / "ddpm.pt", tmp_path)
    ddpm.main(["--out", str(tmp_path), "--device", "cpu", "--sample", "12", "--steps", "3", "--eta", "0"])
    assert sorted(os.listdir(tmp_path)) == ["ddpm.pt", "ddpm_sample.png"]
    assert "wrote ddpm_sample.png" in capsys.readouterr().out
    with pytest.raises(common.InputError, match="T = 8"):
        ddpm.main(["--out", str(tmp_path), "--device", "cpu", "--sample", "12", "--steps", "9"])


def test_a_run_that_was_stopped_again_and_again_ends_where_an_undisturbed_one_does(trained, data, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(REPO / "ddpm.py"), *flags(data, tmp_path, "--resume")]
    for number in signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, None:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as child:
            if number:
                assert "parameters on cpu" in child.stdout.readline(), child.stderr.read()
                while number == signal.SIGTERM and checkpoint(tmp_path)["epoch"] == 0:
                    time.sleep(0.01)  # the others come in the first epoch, this one in the second
                time.sleep(random.uniform(0, 0.2))  # an epoch takes longer: the first kill leaves no checkpoint
                child.send_signal(number)
            _, err = child.communicate(timeout=300)
        if number in (signal.SIGINT, signal.SIGTERM):
            assert child.returncode == 128 + number and "--resume" in err.splitlines()[-1]
        else:
            assert child.returncode == (-number if number else 0), err
    resumed, undisturbed = checkpoint(tmp_path), checkpoint(trained[0])
    for part in "model", "ema":
        assert resumed[part].keys() == undisturbed[part].keys()
        assert all(torch.equal(value, undisturbed[part][name]) for name, value in resumed[part].items())
    for row in resumed["history"] + undisturbed["history"]:
        del row["seconds"]
    assert resumed["history"] == undisturbed["history"]


# ---- bad input

@pytest.mark.parametrize("wrong", [
    "--epochs 0", "--epochs -1", "--epochs x", "--batch-size 0", "--lr 0", "--lr nan", "--lr inf", "--lr -1", "--T 0",
    "--T 10 --steps 11", "--loss vlb --times focused", "--times early", "--steps 0", "--eta 2", "--eta nan",
    "--schedule sqrt", "--predict score", "--sigma learned",
    "--loss l1", "--device tpu", "--device cuda:99", "--sample 4", "--sample 0", "--seed -1", "--limit 0",
    "--data cifar"])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, wrong):
    with pytest.raises((SystemExit, common.InputError)) as stop:
        ddpm.main(["--out", str(tmp_path / "out"), "--data", "synthetic", *wrong.split()])
    message = capsys.readouterr().err or str(stop.value)
    assert "\n" not in message.strip()
    assert ("no checkpoint" if wrong == "--sample 4" else wrong.split()[-2].lstrip("-")) in message
    assert stop.type is common.InputError or stop.value.code == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("more, words", [
    (["--resume", "--lr", "0.01"], ["lr", "0.002", "0.01"]), (["--resume", "--T", "9"], ["T 8", "9"]),
    ([], ["--resume", "--overwrite"])])
def test_an_earlier_run_is_neither_mixed_up_nor_lost(trained, data, tmp_path, more, words):
    path = tmp_path / "ddpm.pt"
    shutil.copy(trained[0] / "ddpm.pt", path)
    before = path.read_bytes()
    with pytest.raises(common.InputError) as stop:
        ddpm.main(flags(data, tmp_path, *more))
    assert all(word in str(stop.value) for word in words)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ddpm.pt"]


# ---- another implementation, where it is installed: float32 tables, t from 0

def test_q_and_p_agree_with_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: an optional second opinion")
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="fixed_small", clip_sample=False)
    x0, eps, xt = torch.randn(3, 1, *TINY)
    for s in 1, 2, 500, 1000:
        t, model = torch.tensor([s]), fake(eps)
        close(model.q_sample(x0, t, eps), scheduler.add_noise(x0, eps, t - 1), rtol=1e-4, atol=1e-4)
        mean, _ = model.p_mean_variance(xt, t)
        after = scheduler.step(eps, s - 1, xt, torch.Generator().manual_seed(1)).prev_sample
        z = torch.randn(xt.shape, generator=torch.Generator().manual_seed(1)) if s > 1 else 0
        _, variance = model.q_posterior(x0, xt, t)
        close(after, mean + variance.sqrt() * z, rtol=1e-4, atol=1e-4)
        close(variance.item(), scheduler._get_variance(s - 1).item() if s > 1 else 0, rtol=1e-3)


def test_ddim_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: an optional second opinion")
    model, _ = spied("beta", T=10)
    scheduler = diffusers.DDIMScheduler(10, trained_betas=model.beta[1:].numpy(), clip_sample=False)
    scheduler.set_timesteps(10)
    xt = None
    for s, ours, _ in model.trajectory(torch.randn(3, *model.shape), eta=0.0):
        if xt is not None:
            close(ours, xt, rtol=1e-3, atol=1e-3)
        if s:
            xt = scheduler.step(model.net(ours, torch.full((3,), s)), s - 1, ours, eta=0.0).prev_sample


def test_fourier_features_show_noise_below_a_gray_level():
    """A step of a hundredth of a level must change the features far more than it changes the pixel."""
    net = ddpm.UNet(fourier=True)
    seen = []
    net.enter.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, t = torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.int64)
    assert net(x, t).shape == x.shape and net(x + 0.01 * 2 / 255, t).shape == x.shape
    step = (seen[1] - seen[0]).abs()[0, :, 0, 0].view(5, 4).amax(1)  # of the pixel and of its four waves
    assert step[0] < 1e-4 and step.max() > 0.05
    settings = {"T": 10, "schedule": "logsnr", "predict": "eps", "sigma": "beta", "fourier": True}
    assert ddpm.build(settings).net.fourier


# ---- the fast path against plain float32: the same weights, the same noise

@pytest.fixture(scope="module")
def network():
    """A network with weights as after training: nothing is zero."""
    torch.manual_seed(0)
    net = ddpm.UNet(width=16, deep=16, embed=16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    return net


def relative(a, b):
    return ((a.float() - b).norm() / b.norm()).item()


def test_bfloat16_agrees_with_float32(network):
    model, x0 = DDPM(network, T=50, predict="v", sigma="posterior", clip=True), levels(8, 1, 28, 28).float()
    t, eps = model.draw(x0)
    ends, gradients = [], []
    for fast in False, True:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = model.loss(x0, t, eps)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            ends.append((loss.detach(), model.sample(8, 10)))
    (loss, x), (fast_loss, fast_x) = ends
    assert relative(fast_loss, loss) < 1e-3 and relative(gradients[1], gradients[0]) < 0.02
    assert (fast_x - x).abs().mean() < 0.005  # gray levels from 0 to 1, after ten steps


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling on a CPU takes a C++ compiler")
def test_the_compiled_loss_agrees_with_the_plain_one(network):
    model, x0 = DDPM(network, T=50, predict="v"), levels(4, 1, 28, 28).float()
    t, eps = model.draw(x0)
    results = []
    for loss_of in model.loss, torch.compile(model.loss, dynamic=False):
        loss = loss_of(x0, t, eps)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
        results.append((loss.detach(), gradient))
    (loss, gradient), (fast_loss, fast_gradient) = results
    assert relative(fast_loss, loss) < 1e-5 and relative(fast_gradient, gradient) < 1e-4


@pytest.mark.parametrize("predict, loss", [("v", "simple"), ("eps", "vlb"), ("mu", "simple"), ("x0", "vlb")])
def test_a_step_takes_nothing_from_the_host(on_device, predict, loss):
    settings = {"T": 50, "schedule": "linear", "predict": predict, "sigma": "optimal", "fourier": True}
    model, x0 = ddpm.build(settings).to("meta"), torch.rand(8, 1, 28, 28, device="meta")
    _, muon = ddpm.make_optimizers(model.net, "muon", 1e-3)
    muon.param_groups[0]["lr"] = torch.zeros((), device="meta")
    noise = model.draw(x0, focused=True)
    with on_device():
        (model.loss if loss == "simple" else model.vlb_loss)(x0, *noise).backward()
        muon.step()  # Adam is torch's, which says capturable
    with pytest.raises(AssertionError, match="host"), on_device():
        torch.tensor(1.0, device="meta")
    with pytest.raises(AssertionError, match="meta.*cpu|cpu.*meta"), on_device():
        x0 + torch.zeros(3, 1, 1, 1).to("meta")


def test_channels_last_agrees_with_the_plain_layout(network):
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 40])
    plain = network(x, t)
    close(copy.deepcopy(network).to(memory_format=torch.channels_last)(x, t), plain, rtol=1e-4, atol=1e-5)
