import contextlib
import io
import json
import math
import re
import shutil
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import common
import compare
import ddpm
import vae

CPU, F64 = torch.device("cpu"), torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def mnist():
    """MNIST in an order of our own: its writers are in blocks, and its first test digits are neater."""
    data = common.load_data(compare.parse(["--data", "mnist"]), CPU)
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (60000, 10000)]
    return data[0][orders[0]], data[1][orders[0]], data[2][orders[1]], data[3][orders[1]]


@pytest.fixture(scope="module")
def classifier(mnist):
    return compare.train_classifier(mnist[0][:6000], mnist[1][:6000], epochs=2)


# ---- the numbers of the yardstick and their errors

def gaussian(mean, covariance, n=200):
    """n points whose own mean and covariance are exactly these: what frechet says of them is exact, too."""
    points = torch.randn(n, len(mean), dtype=F64)
    points = points - points.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(points.T)), points.T, upper=False)
    values, vectors = torch.linalg.eigh(torch.as_tensor(covariance, dtype=F64))
    return white.T @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T + torch.tensor(mean, dtype=F64)


def test_frechet_of_normals_whose_covariances_do_not_commute():
    A, B = (torch.tensor(m, dtype=F64) for m in ([[2, 1.2], [1.2, 1]], [[1, -0.9], [-0.9, 3]]))
    assert (A @ B - B @ A).norm() > 1
    # tr √(AB) is the sum of the roots of AB's eigenvalues, which for 2 x 2 is √(tr AB + 2 √det AB)
    cross = ((A @ B).trace() + 2 * (A @ B).det().sqrt()).sqrt()
    expected = 25 + (A + B).trace().item() - 2 * cross.item()
    a, b = gaussian([3.0, 0], A), gaussian([0.0, 4], B)
    assert compare.frechet(a, b)[0] == pytest.approx(expected, rel=1e-9) == compare.frechet(b, a)[0]


def test_frechet_of_shifted_sets_of_dead_features_and_of_few_points():
    a = gaussian([0.0, 0], [[2, 0.5], [0.5, 1]])
    assert compare.frechet(a, a) == pytest.approx((0, 0), abs=1e-9)
    for shift in 1, 2, 3:  # an image's share is 2 shift (x - mean), and the variance of x is 1
        assert compare.frechet(a + torch.tensor([0, shift]), a) == pytest.approx(
            (shift ** 2, 2 * shift / math.sqrt(200)), rel=1e-9)
    a, b = gaussian([0.0, 7], [[1, 0], [0, 0]]), gaussian([0.0, 5], [[4, 0], [0, 0]])
    assert compare.frechet(a, b)[0] == pytest.approx((1 - 2) ** 2 + 4, abs=1e-6)  # √ of rounding is 1e-8
    few, other = torch.randn(2, 20, 128, dtype=F64).clamp(min=0)
    few[:, :30] = other[:, :30] = 0
    assert compare.frechet(few, few)[0] == pytest.approx(0, abs=1e-4)
    assert all(map(math.isfinite, compare.frechet(few, other)))


@pytest.mark.parametrize("shift, scale, relu", [(0.5, 1.0, False), (0.0, 1.2, False), (0.3, 1.3, True),
                                                (0.0, 1.0, True)])
def test_two_errors_of_the_frechet_distance_cover_19_of_20_draws(shift, scale, relu):
    # relu: like the classifier's features no normals, which the error does not ask for
    mix = torch.eye(8, dtype=F64) + torch.randn(8, 8, dtype=F64) / 8 ** 0.5
    act = torch.relu if relu else torch.clone
    b = act(torch.randn(1000, 8, dtype=F64) @ mix)
    normals = (scale * torch.randn(1000, 8, dtype=F64) @ mix + shift for _ in range(400))
    draws = [compare.frechet(act(a), b) for a in normals]
    distances, errors = torch.tensor(draws, dtype=F64).T
    covered = ((distances - distances.mean()).abs() <= 2 * errors).double().mean().item()
    assert 0.90 <= covered <= 1.0  # of 400 draws: 95 % ± 1.1 %; where both are the same, more
    assert 0.8 < errors.mean() / distances.std() < 1.6


def test_radii_within_and_nearest_by_all_pairs():
    def pairs(x, y):
        return (x[:, None] - y).norm(dim=2)
    a, b = torch.randn(1300, 3, dtype=F64), 4 * torch.randn(1100, 3, dtype=F64)  # more than one part
    for k in 1, 3:
        radius = compare.radii(a, k)
        torch.testing.assert_close(radius, pairs(a, a).sort(1).values[:, k], rtol=1e-6, atol=1e-6)
    assert torch.equal(radius, compare.radii(a))
    hits = (pairs(b, a) <= radius).any(1)
    assert compare.within(b, a, radius).tolist() == hits.tolist() and 100 < hits.sum() < 1000
    x, flat = torch.rand(700, 1, 3, 3), torch.rand(800, 9)
    far, which = compare.nearest(x, flat)
    torch.testing.assert_close(far, pairs(x.flatten(1), flat).amin(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((x.flatten(1) - flat[which]).norm(dim=1), far, rtol=1e-4, atol=1e-4)


def test_two_errors_of_a_share_cover_19_of_20_draws():
    for n, p in (300, 0.01), (300, 0.05), (300, 0.2), (300, 0.5), (1000, 0.99):
        chance = [math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1)]  # exact: no draws
        said = [compare.share(torch.arange(n) < k) for k in range(n + 1)]
        assert all(share == pytest.approx(k / n) and error > 0 for k, (share, error) in enumerate(said))
        assert 0.92 < sum(c for c, (share, error) in zip(chance, said) if abs(share - p) <= 2 * error) < 0.98


def test_standard_errors_bits_grayness_and_how_numbers_are_printed():
    assert compare.mean_and_error(torch.tensor([1.0, 2, 3, 6])) == pytest.approx((3, math.sqrt(14 / 3 / 4)))
    assert compare.bits(784 * 8 * math.log(2), (1, 28, 28)) == pytest.approx(8)  # pixels of 256 equal levels
    x = torch.tensor([[0.5, 0.5], [0, 1], [1, 0.25], [0, 0]]).view(4, 1, 1, 2)
    assert compare.grayness(x).tolist() == pytest.approx([0.5, 0, 0.1875 / 1.25, 0])
    for value, printed in (0.0, "< 0.003"), (1.0, "> 0.9970"), (0.25, "0.250 (0.014)"):  # 0 and 1: bounds
        assert compare.number({"recall": value, "recall_error": 0.0137, "n": 1000}, "recall") == printed
    assert compare.number({"gray": 0.0, "gray_error": 0.01, "n": 1000}, "gray") == "0.000 (0.010)"  # no share


def test_two_errors_cover_the_draw_of_the_images():
    def draw(n):  # 3 pixels, the first of which tells the class
        return torch.cat([torch.randint(10, (n, 1)) / 10, torch.rand(n, 2)], dim=1).view(n, 1, 1, 3)
    classifier = Namespace(features=lambda x: x.flatten(1),
                           leave=lambda x: 99 * F.one_hot((10 * x[:, 0]).round().long(), 10).float())
    def yardstick():
        return compare.Yardstick(classifier, 255 * draw(900), torch.arange(900) % 10, draw(300), 0, 900)
    one = yardstick()
    samples = [one.measure(draw(300)) for _ in range(200)]
    all_drawn = [yardstick().measure(draw(300)) for _ in range(200)]
    for key in [*compare.METRICS, "recall_short"]:  # which depends on the draw of the real images, too
        rows = all_drawn if key == "recall_short" else samples
        values, errors = torch.tensor([(row[key], row[f"{key}_error"]) for row in rows], dtype=F64).T
        covered = ((values - values.mean()).abs() <= 2 * errors).double().mean()
        assert 0.9 < covered < 0.99 and 0.85 < errors.mean() / values.std() < 1.3, key


# ---- the yardstick, on images that are known to be good or bad

@pytest.fixture(scope="module")
def yardstick(classifier, mnist):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "MOST", 1200)
        return compare.Yardstick(classifier, mnist[0][:12000], mnist[1][:12000], mnist[2] / 255, 0, 12000)


@pytest.fixture(scope="module")
def measured(yardstick, mnist):
    """What is said of 1,200 images of each kind; all digits are others than those of the yardstick."""
    x, y = mnist[0][20000:23000] / 255, mnist[1][20000:23000]
    images = {"real": x[:1200], "lost": x[(y != 3) & (y != 8)][:1200],
              "blurred": F.avg_pool2d(F.avg_pool2d(x[:1200], 3, 1, 1), 3, 1, 1),
              "copied": torch.cat([yardstick.seen[:600].view(-1, 1, 28, 28), x[:600]]),
              "noise": torch.rand(x[:1200].shape, generator=torch.Generator().manual_seed(0)),
              "other": yardstick.other}
    return {name: yardstick.measure(each) for name, each in images.items()}


def away(row, key, value):
    """By how many standard errors a measured number is above a value, or above another row's."""
    if isinstance(value, dict):
        return (row[key] - value[key]) / math.hypot(row[f"{key}_error"], value[f"{key}_error"])
    return (row[key] - value) / row[f"{key}_error"]


def test_the_classifier_reads_digits_it_has_not_seen(classifier, mnist):
    features, probabilities = compare.look(classifier, mnist[2][:1000] / 255)
    assert (probabilities.argmax(1) == mnist[3][:1000]).double().mean() > 0.94 and not classifier.training
    assert features.shape == (1000, 128) and features.dtype == F64
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1000))


def test_the_images_of_the_yardstick_are_apart(yardstick, classifier, mnist, monkeypatch):
    def images(part):
        return {each.numpy().tobytes() for each in part.flatten(1)}
    seen, other = images(yardstick.seen), images(yardstick.other)
    assert len(seen) == len(other) == len(yardstick.radius) == yardstick.n == 1200 and not seen & other
    for part in yardstick.seen.view(-1, 1, 28, 28), yardstick.other:
        assert torch.cdist(compare.look(classifier, part)[0], yardstick.manifold).min() > 1e-3
    monkeypatch.setattr(compare, "MOST", 40)
    few = compare.Yardstick(classifier, mnist[0][:500], mnist[1][:500], mnist[2][:100] / 255, 0, 25)
    assert images(few.seen) == images(mnist[0][:25] / 255)  # only these count as seen
    assert len(few.held_out) == 25 and few.n == 40


def test_real_digits_are_found_nothing_wrong_with(measured):
    real, other = measured["real"], measured["other"]
    assert abs(away(real, "nearer", 0.5)) < 3 and abs(away(real, "class_off", 0)) < 3
    assert all(abs(away(real, key, other)) < 4 for key in compare.METRICS)
    assert real["precision"] > 0.8 and real["recall"] > 0.8 and real["recall_short"] < 0 < other["recall"]
    assert compare.lacks_diversity(real) == "does not hold"
    assert compare.higher_fidelity(real, other, other) == "cannot tell"
    assert compare.fewer_degenerate(real, other) == "cannot tell"


def test_each_fault_is_caught_by_its_own_column(measured):
    real, other, lost, blurred, copied, noise = (
        measured[name] for name in ("real", "other", "lost", "blurred", "copied", "noise"))
    assert noise["degenerate"] > 0.95 and noise["recall"] < 0.01 and noise["frechet"] > 20 * real["frechet"]
    assert compare.fewer_degenerate(noise, real) == "holds"

    assert blurred["gray"] > 2 * real["gray"] and away(blurred, "gray", real) > 20
    assert compare.higher_fidelity(blurred, real, other) == "holds"
    assert compare.higher_fidelity(real, blurred, other) == "does not hold"

    assert 0.14 < lost["class_off"] < 0.24 and away(lost, "class_off", 0.05) > 5  # two tenths
    assert lost["recall"] < real["recall"] - 0.05 and away(lost, "precision", real) > -3
    assert lost["classes"][3] + lost["classes"][8] < 0.03 and sum(lost["classes"]) == pytest.approx(1)
    assert compare.lacks_diversity(lost) == "holds"

    assert copied["nearer"] == pytest.approx(0.75, abs=0.05) and away(copied, "nearer", real) > 5  # one half
    assert all(abs(away(copied, key, real)) < 4 for key in ("frechet", "precision", "recall", "gray"))

    for row in measured.values():  # degenerate is unsure or outside, or both
        outside = 1 - row["precision"]
        assert max(row["unsure"], outside) - 1e-9 <= row["degenerate"] <= row["unsure"] + outside + 1e-9


# ---- the bounds

def test_fit_scale_finds_the_true_scale():
    mean = torch.rand(50, 1, 28, 28) - 0.5
    for sigma in 0.02, 0.1, 0.5:
        x0 = ((mean + sigma * torch.randn_like(mean) + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        assert compare.fit_scale(x0, mean) == pytest.approx(sigma, rel=0.07)  # the values are 13.5 % apart


def test_the_bound_of_the_vae_is_the_sum_of_its_terms_and_that_of_normals(mnist):
    model, x_train, x = vae.VAE().eval(), mnist[0][:20] / 255, mnist[2][:4] / 255
    bound, total = compare.vae_bound(model, x_train, x, seed=3)
    assert bound["bits_per_dim"] == pytest.approx(bound["reconstruction"] + bound["kl"]) and bound["n"] == 4
    assert bound["gap"] == pytest.approx(bound["bits_per_dim"] - bound["importance_weighted_256"], abs=1e-6)
    assert total.shape == (4,) and total.mean().item() == pytest.approx(bound["bits_per_dim"])
    mean, logvar = (part.detach().double() for part in model.encode(x))
    q, sigma = Normal(mean, (0.5 * logvar).exp()), bound["sigma"]

    def log_likelihood(z):  # (samples, 4, 2) -> (samples, 4)
        p = Normal(2 * model.decode(z.float()).detach().double() - 1, sigma)
        level = (x * 255).round().double()
        high = torch.where(level == 255, 1.0, p.cdf((level + 0.5) / 127.5 - 1))
        low = torch.where(level == 0, 0.0, p.cdf((level - 0.5) / 127.5 - 1))
        return (high - low).log().flatten(2).sum(2)

    torch.manual_seed(3)  # the draws of the bound
    z, many = (mean + q.scale * torch.randn(n, 4, 2) for n in (8, 256))
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    elbo = log_likelihood(z).mean(0) - kl
    weights = log_likelihood(many) + Normal(0.0, 1.0).log_prob(many).sum(2) - q.log_prob(many).sum(2)
    tighter = (weights - weights.amax(0)).exp().mean(0).log() + weights.amax(0)
    scale = 784 * math.log(2)
    assert bound["kl"] == pytest.approx(kl.mean().item() / scale, rel=1e-4)
    torch.testing.assert_close(total.double(), -elbo / scale, rtol=1e-5, atol=1e-6)
    assert bound["importance_weighted_256"] == pytest.approx(-tighter.mean().item() / scale, rel=1e-5)


def test_the_importance_weighted_bound_rises_from_the_elbo_to_the_truth():
    # p(z) = N(0, 1), p(x|z) = N(z, 1), so p(x) = N(0, 2) and p(z|x) = N(x/2, 1/2); q is off by 0.5
    x = torch.tensor([0.3, 1.5], dtype=F64)
    q, truth = Normal(x / 2 + 0.5, 0.5 ** 0.5), Normal(0.0, 2 ** 0.5).log_prob(x)
    z = q.sample((64000,))
    weights = Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x) - q.log_prob(z)
    bounds = [compare.importance_bound(weights.view(L, -1, 2)).mean(0) for L in (1, 4, 64, 6400)]
    assert all((low < high).all() for low, high in zip(bounds, bounds[1:]))
    kl = 0.5 ** 2 / (2 * 0.5)  # KL(q || p(z|x))
    torch.testing.assert_close(bounds[0], truth - kl, rtol=0, atol=0.02)
    torch.testing.assert_close(bounds[-1], truth, rtol=0, atol=0.01)


SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def ladder():
    """Images of black and white pixels, white with 19 of 20: their entropy is known, and so is E[x_0|x_t]."""
    torch.manual_seed(0)
    asked, alpha_bar = [], ddpm.DDPM(None, T=20).alpha_bar

    def net(xt, t):
        """The best x̂_0, made worse by a tenth: the log odds of white are log 19 + 2 √ᾱ x_t / (1-ᾱ)."""
        asked.append((len(xt), t[0].item()))
        a = alpha_bar[t].view(-1, 1, 1, 1).to(xt.dtype)
        return 0.9 * torch.tanh(math.log(19) / 2 + a.sqrt() * xt / (1 - a))
    model = ddpm.DDPM(net, T=20, predict="x0", sigma="posterior", shape=SHAPE)
    x_train, x = ((torch.rand(n, *SHAPE) < 0.95).float() for n in (200, 60))
    bound = compare.ddpm_bound(model, x_train, x, seed=0, device=CPU)
    return model, x_train, x, asked.copy(), *bound


def test_the_bound_of_the_ddpm_is_the_sum_of_its_terms(ladder):
    model, _, x, asked, bound, total = ladder
    beta, posterior, optimal = rungs = list(bound["variances"].values())
    for rung in rungs:
        assert rung["bits_per_dim"] == pytest.approx(rung["L_0"] + rung["L_t"] + rung["L_T"])
    assert beta["L_t"] > posterior["L_t"] > optimal["L_t"] and beta["L_T"] == optimal["L_T"]
    assert beta["bits_per_dim"] > posterior["bits_per_dim"] > optimal["bits_per_dim"]
    for sigma, rung in ("beta", beta), ("posterior", posterior):  # the model's own bound on the same draws
        own = ddpm.DDPM(model.net, T=20, predict="x0", sigma=sigma, shape=SHAPE)
        torch.manual_seed(0)
        errors = own.x0_errors(ddpm.to_model(x))
        torch.manual_seed(0)
        terms = compare.bits(own.vlb_terms(ddpm.to_model(x), errors), SHAPE).sum(1)
        assert compare.mean_and_error(terms) == pytest.approx((rung["bits_per_dim"], rung["error"]))
    last = {key: optimal[key] for key in ("bits_per_dim", "error")}
    assert bound["chains"][20] == last == {key: bound[key] for key in last} and bound["n"] == 60
    assert compare.mean_and_error(total) == pytest.approx(tuple(last.values()))
    assert sum(bound["per_t"]) == pytest.approx(last["bits_per_dim"]) and len(bound["per_t"]) == 21
    gain = bound["chains"][1]["bits_per_dim"] - last["bits_per_dim"]
    assert bound["one_minus_all"][0] == pytest.approx(gain) and list(bound["chains"]) == [1, 2, 5, 10, 20]
    # the network is asked once about each t, and for each of eight L_0 once more
    assert sorted(t for n, t in asked if n == 60) == sorted([*range(1, 21), 1, 1, 1, 20, 10, 4, 2, 1])


def test_every_chain_is_that_of_its_own_steps_and_codes_in_no_less_than_the_entropy(ladder):
    model, x_train, x, _, bound, _ = ladder
    x_train, x = ddpm.to_model(x_train), ddpm.to_model(x)
    entropy, one = -(0.95 * math.log2(0.95) + 0.05 * math.log2(0.05)), torch.ones(200, dtype=torch.int64)
    for each in [*bound["variances"].values(), *bound["chains"].values()]:
        assert each["bits_per_dim"] > entropy - 3 * each["error"]
    for K in 1, 2, 5, 10:
        chain = model.respace(K)  # other draws, asked of the chain itself
        mse = chain.x0_errors(x_train).mean(0) / 64
        chain.variance = chain.beta_tilde + chain.c_x0 ** 2 * mse
        x0_hat = chain.predict_x0(chain.q_sample(x_train, one, torch.randn_like(x_train)), one)
        chain.variance[1] = compare.fit_scale(x_train, x0_hat) ** 2
        total, error = compare.mean_and_error(compare.bits(chain.vlb_terms(x), SHAPE).sum(1))
        assert abs(bound["chains"][K]["bits_per_dim"] - total) < 4 * error


def test_the_optimal_variance_is_the_least_of_a_grid(ladder):
    model, _, x, *_ = ladder
    chain, errors = model.respace(20), model.x0_errors(ddpm.to_model(x))
    optimal, t = compare.optimal_variance(chain, errors.mean(0) / 64), torch.arange(2, 21)
    bounds = []
    for factor in 0.9, 0.98, 1.0, 1.02, 1.1:
        chain.variance = optimal * factor
        bounds.append(chain.L_between(errors[:, 2:], t, 64).mean(0))
    assert (torch.stack(bounds).argmin(0) == 2).all()


# ---- reconstructions

def test_wiener_is_the_conditional_mean_of_a_gaussian():
    A = torch.randn(4, 4, dtype=F64)
    mu, cov = torch.tensor([0.2, -0.5, 0, 0.7], dtype=F64), A @ A.T + 0.1 * torch.eye(4, dtype=F64)
    x_train = gaussian(mu.tolist(), cov).view(-1, 1, 2, 2)
    for a in 0.05, 0.5, 0.99:
        xt = torch.randn(7, 1, 2, 2, dtype=F64)
        # jointly normal: E[x_0|x_t] = μ + Cov(x_0, x_t) Var(x_t)^-1 (x_t - √ᾱ μ)
        gain = a ** 0.5 * cov @ torch.linalg.inv(a * cov + (1 - a) * torch.eye(4, dtype=F64))
        expected = mu + (xt.flatten(1) - a ** 0.5 * mu) @ gain.T
        torch.testing.assert_close(compare.wiener(x_train, xt, a), expected.view_as(xt))


@pytest.mark.parametrize("steps, close", [(1000, 0.01), (100, 0.1)])
def test_an_image_encoded_by_ddim_comes_back(steps, close):
    alpha_bar = ddpm.DDPM(None).alpha_bar

    def best(xt, t):  # of x_0 ~ N(0, 0.5²)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return a.sqrt() * 0.25 / (a * 0.25 + 1 - a) * xt
    chain = ddpm.DDPM(best, predict="x0").respace(steps)
    x0 = 0.5 * torch.randn(20, 1, 4, 4, dtype=F64)
    xT = compare.ddim_encode(chain, x0)
    # the flow of normals is a scaling: from the variance of x_1 to that of x_T
    first, last = chain.alpha_bar[[1, -1]] * 0.25 + 1 - chain.alpha_bar[[1, -1]]
    torch.testing.assert_close(xT, x0 * (last / first).sqrt(), rtol=close, atol=0)
    a, later = chain.alpha_bar[1:-1], chain.alpha_bar[2:]  # the finite steps, from x_1 on, are known
    step = ((later * a).sqrt() * 0.25 + ((1 - later) * (1 - a)).sqrt()) / (a * 0.25 + 1 - a)
    torch.testing.assert_close(xT, x0 * step.prod(), rtol=1e-9, atol=0)
    *_, (_, back, _) = chain.trajectory(xT, eta=0)
    torch.testing.assert_close(back, x0, rtol=close, atol=0)


def test_the_reconstructions_of_figure_2_are_picked_by_their_error(monkeypatch):
    x, fade = torch.rand(300, 1, 4, 4), torch.rand(300)
    labels, read = torch.randint(0, 10, (2, 300))
    model = Namespace(encode=lambda x: (x, None), decode=lambda x: x * (1 - fade).view(-1, 1, 1, 1))
    monkeypatch.setattr(compare, "look", lambda *_: (None, F.one_hot(read, 10)))
    drawn = []
    monkeypatch.setattr(common, "plot_rows", lambda rows, *_: drawn.extend(rows.values()))
    said = compare.figure_reconstructions(model, None, x, labels, None, "")
    wrong, right = (sorted(fade[which].tolist()) for which in (read != labels, read == labels))
    ranks = (wrong, 0.99), (wrong, 0.1), (right, 0.1)
    shown = [group[int(share * (len(group) - 1))] for group, share in ranks]
    picks = [fade.tolist().index(each) for each in shown]
    assert said["relative_error"] == pytest.approx([each ** 2 for each in shown], rel=1e-4)
    assert said["class"] == labels[picks].tolist() and said["read_as"] == read[picks].tolist()
    assert said["misread"] == pytest.approx(len(wrong) / 300)
    torch.testing.assert_close(drawn, [x[picks], model.decode(x)[picks]])


# ---- the rules of the verdicts

def test_longer_to_converge_is_twice_as_long_between_all_points_of_the_curves():
    falling = [[10, 101.0], [20, 51.0], [30, 13.1], [40, 13.0], [50, 11.5], [60, 11.0]]
    assert compare.converged(falling, 1) == (30, 40)  # the excess ends at 10: 12 is within 20 %, 12.1 not
    assert compare.converged(falling, 10.5) == (50, 60) and compare.converged(falling, -100) == (20, 30)
    assert compare.converged([[5, 9.0], [10, 9.1]], 1) == (0.0, 5) == compare.converged([[5, 9.0]], 1)
    assert compare.converged([[5, 3.0], [10, 9.0], [15, 3.0]], 1) == (10, 15)  # a relapse: it has to stay
    assert compare.converged(falling, 11) is None and compare.converged([], 1) is None
    for v, d, expected in (
            ((10, 20), (40, 50), YES), ((10, 20), (39, 50), OPEN), ((10, 20), (0.0, 19), NO),
            ((10, 20), (0.0, 20), OPEN), ((0.0, 20), (0.0, 1), OPEN), (None, (40, 50), OPEN),
            ((10, 20), None, OPEN)):
        assert compare.longer_to_converge(v, d) == expected


def numbers(**values):
    row = {"precision": 0.8, "gray": 0.2, "degenerate": 0.2, "recall_short": 0.0, "class_off": 0.05} | values
    return row | {f"{key}_error": 0.01 for key in row}


YES, NO, OPEN = "holds", "does not hold", "cannot tell"
TURN = 0.01 * 2 ** 1.5  # two errors of a difference of two


@pytest.mark.parametrize("v, d, expected", [
    (dict(precision=0.7, gray=0.3), dict(), YES),
    (dict(precision=0.7, gray=0.02), dict(), YES),  # too sharp is no better than too gray
    (dict(), dict(precision=0.7, gray=0.3), NO), (dict(precision=0.7), dict(gray=0.3), OPEN),
    (dict(precision=0.7), dict(), OPEN), (dict(gray=0.3), dict(), OPEN), (dict(), dict(), OPEN),
    (dict(precision=0.79 - TURN, gray=0.21 + 3 ** 0.5 * TURN), dict(), YES),
    (dict(precision=0.81 - TURN, gray=0.3), dict(), OPEN),
    (dict(precision=0.7, gray=0.19 + 3 ** 0.5 * TURN), dict(), OPEN)])
def test_fidelity_is_precision_and_sharpness(v, d, expected):
    assert compare.higher_fidelity(numbers(**v), numbers(**d), {"gray": 0.15, "gray_error": 0.01}) == expected


def test_degenerate_images_diversity_and_expressiveness_are_decided_by_two_standard_errors():
    for of_v, expected in ((0.21 + TURN, YES), (0.19 + TURN, OPEN), (0.2, OPEN), (0.21 - TURN, OPEN),
                           (0.19 - TURN, NO)):
        assert compare.fewer_degenerate(numbers(degenerate=of_v), numbers()) == expected
    for short, off, expected in (
            (0.03, 0.0, YES), (-0.1, 0.08, YES), (0.03, 0.05, YES), (0.03, 0.08, YES), (-0.03, 0.02, NO),
            (-0.03, 0.05, OPEN), (0.0, 0.02, OPEN), (0.01, 0.06, OPEN)):
        assert compare.lacks_diversity(numbers(recall_short=short, class_off=off)) == expected
    for steps, vae_minus_ddpm, expected in ((0.21, 0.21, YES), (-0.21, -0.21, NO), (0.19, 0.19, OPEN),
                                            (0.21, 0.19, OPEN), (0.21, -0.21, OPEN), (0.19, 0.21, OPEN)):
        assert compare.more_expressive((steps, 0.1), (vae_minus_ddpm, 0.1)) == expected


# ---- all of it

def flags(out, folder):
    return [*"--device cpu --limit 200 --batch-size 100 --data-dir".split(), str(folder), "--out", str(out)]


@pytest.fixture(scope="module", autouse=True)
def small():
    """All sizes but those of the networks, and a chain of 10 steps."""
    with pytest.MonkeyPatch.context() as patch:
        parse = ddpm.parse
        patch.setattr(ddpm, "parse", lambda argv: Namespace(**vars(parse(argv)) | {"T": 10}))
        patch.setitem(compare.SIZES, "cpu", {"bound": 16, "encoded": 20})
        patch.setattr(compare, "STEPS", (2, 5))
        patch.setattr(compare, "MOST", 120)
        patch.setattr(compare, "CURVE", 60)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, digits):
    """The folder of a comparison of models of one epoch, and what it said."""
    out = tmp_path_factory.mktemp("compared")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compare.main([*flags(out, digits), "--epochs", "1", "--seed", "7"])
    return out, said.getvalue()


@pytest.fixture
def results(compared):
    return json.loads((compared[0] / "results.json").read_text(encoding="utf-8"))


def test_the_results_are_complete_and_finite(results):
    json.dumps(results, allow_nan=False)
    assert results["seed"] == 7 and results["torch"] == torch.__version__ and results["data"] == "mnist"
    for row in results["noise"], results["vae"]["samples"], results["ddpm"]["samples"]:
        assert row["n"] == 120 and all(f"{key}_error" in row for key in compare.METRICS)
    for name, evaluations in ("vae", 1), ("ddpm", 10):
        model = results[name]
        assert model["settings"]["limit"] == 200 and len(model["training"]["curve"]) == 1
        assert model["sampling"]["evaluations"] == evaluations and model["sampling"]["ms_alone"] > 0
    assert list(results["others"]) == ["VAE, 20-D"] and results["seen"] == 120
    assert results["few_steps"]["n"] == 60 and list(results["few_steps"]["ddpm"]["DDIM"]) == ["2", "5"]
    one, many = (results[name]["bound"]["bits_per_dim"] for name in ("vae", "ddpm"))
    assert results["difference"][0] == pytest.approx(one - many)
    rms = results["encoded"]["rms"]
    assert len(rms) == 9 and 0.2 < rms["all black"][0] < 0.5


def test_the_report_is_written_from_results_json_alone(compared, results, tmp_path):
    out, said = compared
    compare.write_report(results, tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report == (out / "report.md").read_text(encoding="utf-8")
    samples, claims = compare.sample_rows(results), compare.claims(results)
    assert all(f"| {' | '.join(row)} |" in report for row in [*samples, *claims])
    named = set(re.findall(r"\]\((.+?\.png)\)", report))
    assert all((out / name).stat().st_size > 1000 for name in named) and "vae_latent.png" in named
    assert all(claim in said and figure in named for claim, _, _, figure in claims)
    tested = dict(zip(compare.METRICS, samples[4][1:]))  # the test images are not held against themselves
    assert len(samples) == 6 and tested["frechet"] == tested["recall"] == tested["nearer"] == ""
    results["vae"]["settings"]["latent_dim"] = 20  # as many as the other one has
    rows = compare.sample_rows(results)
    assert [row[0].split(", 1 epoch")[0] for row in rows[:3]] == ["VAE, 20-D", "DDPM", "VAE, 20-D"]
    results["vae"]["settings"]["latent_dim"] = 5  # there are no maps of it
    compare.write_report(results, tmp_path)
    assert "vae_latent.png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_claims_are_judged_by_the_rules(results):
    def verdicts():  # one claim is a procedure, with no verdict
        return [judged for _, _, judged, _ in compare.claims(results) if judged in (YES, NO, OPEN)]

    vs, ds = results["vae"]["samples"], results["ddpm"]["samples"]
    curves, floor = [results[name]["training"] for name in ("vae", "ddpm")], results["curve_floor"]
    good = numbers(recall_short=-0.1, class_off=0.0, degenerate=0.0, gray=results["real"]["gray"])
    bad = numbers(precision=0.3, gray=0.6, recall_short=0.1, degenerate=0.5)
    quick = [[10, floor + 9], [20, floor + 1], [30, floor + 1]]
    slow = [[seconds * 5, value] for seconds, value in quick]
    for v, d, *two, gain, expected in ((bad, good, quick, slow, 1.0, [YES, YES, NO, YES, YES]),
                                       (good, bad, slow, quick, -1.0, [NO, NO, YES, NO, NO])):
        vs.update(v), ds.update(d)
        for run, curve in zip(curves, two):
            run["curve"] = curve
        results["ddpm"]["bound"]["one_minus_all"] = results["difference"] = [gain, 0.1]
        assert verdicts() == expected
    curves[0]["curve"] = []  # trained by vae.py, without a curve
    assert verdicts()[3] == OPEN


@pytest.fixture
def copied(compared, tmp_path, monkeypatch):
    """A folder with the three checkpoints alone; no pictures are drawn."""
    for path in compared[0].rglob("*.pt"):
        new = tmp_path / path.relative_to(compared[0])
        new.parent.mkdir(exist_ok=True)
        shutil.copy(path, new)
    for script in vae, ddpm:
        monkeypatch.setattr(script, "draw", lambda *_: [])
    monkeypatch.setattr(compare.Figure, "savefig", lambda *_, **__: None)
    return tmp_path


def test_the_curves_end_with_the_last_epoch(tmp_path, digits, monkeypatch):
    def trained(script, given, device, watch):
        given.epochs = 12  # as train fills it in
        assert [epoch for epoch in range(1, 13) if watch(None, epoch)] == [*range(1, 11), 12]
        raise KeyboardInterrupt
    monkeypatch.setattr(compare, "trained", trained)
    monkeypatch.setattr(compare, "draw_samples", lambda model, n, device: torch.rand(n, 1, 28, 28))
    with pytest.raises(KeyboardInterrupt):
        compare.main(flags(tmp_path, digits))


def test_a_second_comparison_trains_nothing_and_says_the_same(compared, results, copied, digits):
    compare.main([*flags(copied, digits), "--seed", "7"])
    for name in "vae.pt", "ddpm.pt", "vae20/vae.pt":
        assert (copied / name).read_bytes() == (compared[0] / name).read_bytes()
    again = json.loads((copied / "results.json").read_text(encoding="utf-8"))
    for each in again, results:  # times are others
        del each["seconds"], each["date"], each["vae"]["sampling"], each["ddpm"]["sampling"]
    assert again == results


def change(path, **settings):
    """Other settings in a checkpoint -> what was saved before."""
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | settings}, path)
    return saved


def test_what_cannot_be_compared_is_refused_before_any_work(copied, digits, monkeypatch):
    for place, name in (compare, "train_classifier"), (vae, "train"), (ddpm, "train"), (common, "load_data"):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("went on"))
    (copied / "vae20/vae.pt").unlink()
    for contradiction in ("epochs 1, not 2", "limit 200, not 300", "seed 7, not 8", "data mnist, not kmnist",
                          "recipe short, not paper"):
        name, _, _, value = contradiction.split()
        with pytest.raises(common.InputError, match=contradiction) as error:
            compare.main([*flags(copied, digits), f"--{name}", value])
        assert "\n" not in str(error.value) and not (copied / "results.json").exists()
    change(copied / "ddpm.pt", seed=8)
    with pytest.raises(common.InputError, match="different seed"):
        compare.main(flags(copied, digits))
    with pytest.raises(common.InputError, match="needs labels"):
        compare.main([*flags(copied / "new", digits), "--data", str(digits)])  # a folder


def test_what_is_left_out_is_that_of_the_checkpoints(copied, digits, monkeypatch):
    for path in copied.rglob("*.pt"):
        change(path, data="kmnist", seed=5, limit=150)
    monkeypatch.setattr(common, "load_data", lambda *_: 1 / 0)  # as far as the data
    args = compare.parse(["--data-dir", str(digits)])
    with pytest.raises(ZeroDivisionError):
        compare.measure(args, CPU, copied)
    assert (args.data, args.seed, args.limit) == ("kmnist", 5, 150)


def test_an_unfinished_model_is_gone_on_with(copied, digits):
    before, = change(copied / "vae.pt", epochs=2)["history"]
    given = compare.settings_for(vae, compare.parse(flags(copied, digits)), copied)
    model = compare.trained(vae, given, CPU, lambda model, epoch: {"frechet": epoch + 0.5})
    run = model.training_run
    assert run["epochs"] == 2 == given.epochs and run["seconds"] > before["seconds"]
    assert run["curve"] == [[before["seconds"], before["frechet"]], [run["seconds"], 2.5]]
