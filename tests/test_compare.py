"""compare.py: each measure against an oracle of its own; then the command line."""

import contextlib
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import common
import compare
import ddpm
import vae

CPU = torch.device("cpu")
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def mnist():
    """All of MNIST, shuffled: x_train, y_train, x_test, y_test."""
    settings = Namespace(data="mnist", size=32, limit=None, seed=0)
    data = common.load_data(settings, compare.parse([]), CPU)
    train = torch.randperm(60000, generator=torch.Generator().manual_seed(1))
    test = torch.randperm(10000, generator=torch.Generator().manual_seed(2))
    return data[0][train], data[1][train], data[2][test], data[3][test]


# ---- distances


def gaussian(mean, covariance, n=200):
    """n points (n, 2) whose own mean and covariance are exactly these."""
    points = torch.randn(n, 2, dtype=F64)
    points = points - points.mean(0)
    root = torch.linalg.cholesky(torch.cov(points.T))
    white = torch.linalg.solve_triangular(root, points.T, upper=False)
    values, vectors = torch.linalg.eigh(torch.tensor(covariance, dtype=F64))
    half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return white.T @ half + torch.tensor(mean, dtype=F64)


def test_frechet_of_normals_whose_covariances_do_not_commute():
    A = torch.tensor([[2, 1.2], [1.2, 1]], dtype=F64)
    B = torch.tensor([[1, -0.9], [-0.9, 3]], dtype=F64)
    assert (A @ B - B @ A).norm() > 1
    # For 2 x 2 matrices, tr √(AB) is √(tr AB + 2 √det AB).
    cross = ((A @ B).trace() + 2 * (A @ B).det().sqrt()).sqrt()
    expected = 25 + (A + B).trace() - 2 * cross
    a = gaussian([3.0, 0.0], A.tolist())
    b = gaussian([0.0, 4.0], B.tolist())
    assert compare.frechet(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert compare.frechet(b, a) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_of_equal_and_shifted_sets_and_of_dead_features():
    a = gaussian([0.0, 0.0], [[2.0, 0.5], [0.5, 1.0]])
    assert compare.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert compare.frechet(a + torch.tensor([0, 3]), a) == pytest.approx(9)
    a = gaussian([0.0, 7.0], [[1.0, 0.0], [0.0, 0.0]])
    b = gaussian([0.0, 5.0], [[4.0, 0.0], [0.0, 0.0]])
    assert compare.frechet(a, b) == pytest.approx((2 - 1) ** 2 + 2**2, abs=1e-6)


def test_nearest_and_coverage_against_all_pairs():
    samples = torch.randn(700, 3)
    real = 2 * torch.randn(1100, 3)  # more than one part
    pairs = (real[:, None] - samples).norm(dim=2)
    distances, which = compare.nearest(real, samples)
    torch.testing.assert_close(distances, pairs.amin(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pairs[torch.arange(1100), which], pairs.amin(1))
    own = (real[:, None] - real).norm(dim=2).sort(1).values  # the first is 0, to itself
    for k in 1, 5:
        expected = (pairs.amin(1) <= own[:, k]).double().mean().item()
        assert 0.2 < expected < 0.98
        assert compare.coverage(samples, real, k) == pytest.approx(expected, abs=2e-3)


# ---- the two-sample test


def blurred(x):
    return F.avg_pool2d(x.float(), 3, 1, 1).round().byte()


@pytest.fixture(scope="module")
def sets(mnist):
    """3,000 digits to compare with, and sets of 3,000 others, each with one fault."""
    x, y, *_ = mnist
    other = x[3000:6000]
    lost = x[6000:][(y[6000:] != 3) & (y[6000:] != 8)][:3000]
    gray = other.clamp(min=4)  # of 255
    faults = {"none": other, "lost": lost, "gray": gray}
    faults |= {"shifted": other.roll(1, 3), "blurred": blurred(other)}
    return x[:3000], faults


@pytest.mark.parametrize(
    "fault, low, high, shape_only",
    [
        ("none", 0.47, 0.53, False),
        ("none", 0.47, 0.53, True),
        # At most 0.6: only the real 3s and 8s, a fifth, can be recognized.
        ("lost", 0.53, 0.62, False),
        ("shifted", 0.8, 1, False),
        ("blurred", 0.9, 1, False),
        ("gray", 0.9, 1, False),
        ("gray", 0.47, 0.53, True),
    ],
)
def test_the_two_sample_test_detects_each_fault(sets, monkeypatch, fault, low, high, shape_only):
    monkeypatch.setitem(compare.UPDATES, "critic", 80)
    real, faults = sets
    fake = faults[fault]
    if shape_only:
        real, fake = compare.by_shape(real), compare.by_shape(fake)
    state = torch.get_rng_state()
    told = compare.told_apart(lambda: compare.Classifier((1, 28, 28), 2, 16), real, fake, 0)
    assert low <= told <= high
    assert torch.equal(torch.get_rng_state(), state)


def test_images_by_shape_are_black_and_white():
    images = torch.tensor([0, 1, 127, 128, 255]).byte()
    assert compare.by_shape(images).tolist() == [0, 0, 0, 255, 255]
    assert compare.by_shape(images).dtype == torch.uint8


# ---- the yardstick


@pytest.fixture(scope="module")
def yardstick(mnist):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.UPDATES, "reader", 150)
        x_train, y_train, x_test, y_test = mnist
        return compare.Yardstick(x_train[:14000], y_train[:14000], x_test, y_test, 0, 1000)


@pytest.fixture(scope="module")
def measured(yardstick, mnist):
    x, y, x_test, _ = mnist
    other = x[20000:21000]
    images = {
        "real": other,
        "test": yardstick.test,
        "lost": x[20000:][(y[20000:] != 3) & (y[20000:] != 8)][:1000],
        "blurred": blurred(blurred(other)),
        "copies": x[:50].repeat(20, 1, 1, 1),  # of the yardstick's training images
        "noise": torch.randint(0, 256, other.shape).byte(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.UPDATES, "critic", 60)
        return {name: yardstick.measure(each)[0] for name, each in images.items()}


def test_the_parts_of_the_yardstick_are_disjoint(yardstick, mnist):
    def rows(part):
        return {each.numpy().tobytes() for each in part.flatten(1)}

    critics = rows(yardstick.critics)
    control = rows(yardstick.control)
    assert yardstick.n == len(critics) == len(control) == len(yardstick.test) == 1000
    assert not critics & control and len(yardstick.known_features) == 12000
    for part in yardstick.critics, yardstick.control:
        far, _ = compare.nearest(yardstick.read(part)[0], yardstick.known_features)
        assert far.min() > 1e-3
    assert yardstick.accuracy > 0.93
    far, _ = compare.nearest(yardstick.test_features, yardstick.known_features)
    assert (far > yardstick.far).sum() == 10  # 1 % of the test digits


def test_each_fault_is_caught_by_its_column(measured):
    real = measured["real"]
    assert real["coverage"] > 0.9 and real["classes off by"] < 0.06 and real["degenerate"] < 0.3
    assert measured["test"]["Fréchet distance"] == pytest.approx(0, abs=1e-3)
    assert 0.15 < measured["lost"]["classes off by"] < 0.25
    assert measured["lost"]["coverage"] < real["coverage"] - 0.05
    assert measured["copies"]["coverage"] < 0.5
    assert measured["noise"]["degenerate"] > 0.95 and measured["noise"]["coverage"] < 0.1
    assert measured["copies"]["copied"] == 1
    assert measured["test"]["copied"] == pytest.approx(0.01, abs=0.002)
    assert measured["real"]["copied"] < 0.03  # the yardstick has not seen these
    assert measured["noise"]["copied"] == 0
    for row in measured.values():
        assert max(row["unsure"], row["far"]) <= row["degenerate"] <= row["unsure"] + row["far"]
    for name in "lost", "blurred", "copies", "noise":
        assert measured[name]["Fréchet distance"] > 1.5 * real["Fréchet distance"], name


@pytest.mark.parametrize("column", compare.RULES)
def test_no_rule_tells_samples_from_real_better_than_the_critics(measured, column):
    rows = {**measured, compare.REAL: measured["real"]}
    found = compare.audit(rows)
    assert found["noise"]["degenerate"] > 0.85 and found[compare.REAL][column] == 0.5
    for name, rules in found.items():
        # 0.03 is two standard errors of an accuracy on 1,000 held-out images.
        assert rows[name]["told from real"] > rules[column] - 0.03, name


def test_the_critic_of_features_sees_what_the_reader_is_unsure_about(
    yardstick, mnist, monkeypatch
):
    """Three in ten images are halves of two digits, of which the reader is often unsure."""
    monkeypatch.setitem(compare.UPDATES, "critic", 60)
    x = mnist[0][20000:21000]
    halves = torch.cat([x[:500, :, :14], x[500:, :, 14:]], dim=2)  # upper and lower, of two digits
    images = torch.cat([x[:700], halves[:300]])[torch.randperm(1000)]
    _, more = yardstick.measure(images)
    unsure = [compare.share(yardstick.know(each)[:, -2] < 0.9) for each in (images, x)]
    gain = (unsure[0] - unsure[1]) / 2
    assert gain > 0.05 and more["told"]["MLP"] > 0.5 + 0.8 * gain


# ---- bits


def every_level(n):
    """One-pixel images (256, n, 1, 1) and their bins, with every level in every bin."""
    levels = torch.arange(256).byte().view(256, 1, 1, 1).expand(256, n, 1, 1)
    return levels, torch.arange(n).view(1, n, 1, 1).expand(256, n, 1, 1)


def test_the_histogram_is_a_distribution_over_256_levels():
    counted = torch.tensor([0, 0, 0, 255, 7, 7]).byte().view(6, 1, 1, 1)
    bins = torch.tensor([0, 0, 0, 0, 2, 2]).view(6, 1, 1, 1)
    images, which = every_level(3)
    probability = torch.empty(256, 3)
    for level in range(256):
        for b in range(3):
            pixel = images[level : level + 1, b : b + 1]
            bits = compare.histogram_bits(pixel, which[:1, b : b + 1], counted, bins, 3)
            probability[level, b] = 2 ** -bits.item()
    assert probability.min() > 0
    torch.testing.assert_close(probability.sum(0), torch.ones(3))
    torch.testing.assert_close(probability[:, 1], torch.full((256,), 1 / 256))  # nothing counted
    assert probability[0, 0] == pytest.approx(3.1 / (4 + 25.6))
    assert probability[7, 2] == pytest.approx(2.1 / (2 + 25.6))


@pytest.mark.parametrize("sigma, few", [(0.2, False), (0.02, False), (0.2, True)])
def test_the_histogram_comes_near_the_true_decoder(sigma, few):
    """x_0 is normal around the mean; few: the histograms are counted on 20 images."""
    n = {"counted": 20 if few else 2000, "chosen": 100, "test": 50}
    means = {name: torch.rand(count, 1, 28, 28) for name, count in n.items()}
    parts = {}
    for name, mean in means.items():
        x0 = 2 * mean - 1 + sigma * torch.randn_like(mean)
        parts[name] = ((x0 + 1) * 127.5).round().clamp(0, 255).byte()
    in_order = iter([part for mean in means.values() for part in mean.split(500)])
    bits, chosen, bins = compare.decoder_bits(lambda _: next(in_order), parts)

    images = parts["test"]
    p = Normal(2 * means["test"].double() - 1, sigma)
    high = torch.where(images == 255, 1.0, p.cdf((images + 0.5) / 127.5 - 1))
    low = torch.where(images == 0, 0.0, p.cdf((images - 0.5) / 127.5 - 1))
    true = -(high - low).log2().flatten(1).mean().item()
    assert bits.shape == (50,)
    assert true < bits.mean().item() < true + (0.5 if few else 0.05)
    assert chosen == pytest.approx(bits.mean().item(), abs=0.02)
    # The more the decoder knows, the more finer bins pay off; with little data, they cost.
    assert (bins < 100) if few else (bins > 100 if sigma < 0.1 else bins <= 256)


def test_bits_of_positions_are_those_of_their_own_counts():
    counted = (torch.rand(400, 1, 2, 2) < torch.tensor([[0.0, 0.1], [0.5, 1.0]])).byte() * 200
    images = counted[:3]
    share = ((counted == 200).double().sum(0) + 0.1) / (400 + 25.6)  # of level 200
    rest = ((counted == 0).double().sum(0) + 0.1) / (400 + 25.6)
    expected = -torch.where(images == 200, share, rest).log2().flatten(1).mean(1)
    bits = compare.position_bits(images, counted)
    torch.testing.assert_close(bits.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_bits_of_the_vae_are_its_kl_and_those_of_the_counts(mnist, monkeypatch):
    monkeypatch.setattr(compare, "BINS", (64,))
    model = vae.VAE().requires_grad_(False)
    parts = {"counted": mnist[0][:40], "chosen": mnist[0][40:44], "test": mnist[2][:6]}
    found = compare.vae_bits(model, parts, seed=3)
    mu, logvar = model.encode(parts["test"] / 255)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
    assert found["KL"] == pytest.approx(kl.mean().item() / 784 / math.log(2), rel=1e-4)
    torch.manual_seed(3)
    counts = torch.full((64, 256), 0.1, dtype=F64)
    nats = []
    for name, part in parts.items():
        mu, logvar = model.encode(part / 255)
        mean = model.decode(mu + (logvar / 2).exp() * torch.randn(len(part), 2))
        for image, levels in zip(mean.flatten(1).tolist(), part.flatten(1).tolist(), strict=True):
            bins = [min(63, int(64 * value)) for value in image]
            cells = list(zip(bins, levels, strict=True))
            if name == "counted":
                for b, level in cells:
                    counts[b, level] += 1
            elif name == "test":
                nats.append(-sum(math.log(counts[b, v] / counts[b].sum()) for b, v in cells))
    decoder = torch.tensor(nats, dtype=F64) / 784 / math.log(2)
    assert found["decoder"] == pytest.approx(decoder.mean().item(), rel=1e-4)
    total = decoder + kl.double() / 784 / math.log(2)
    assert found["total"] == pytest.approx(total.mean().item(), rel=1e-4)
    assert found["standard error"] == pytest.approx(total.std().item() / 6**0.5, rel=1e-3)


SHAPE = (1, 8, 8)


class BlackAndWhite(torch.nn.Module):
    """ε_θ of the best x̂_0, made worse by a tenth, where 19 of 20 pixels are white."""

    def __init__(self, T):
        super().__init__()
        self.alpha_bar = ddpm.DDPM(None, T=T).alpha_bar

    def forward(self, xt, t):
        a = self.alpha_bar[t].view(-1, 1, 1, 1).to(xt.dtype)
        # The log odds of white are log 19 + 2 √ᾱ x_t / (1-ᾱ).
        x0_hat = 0.9 * torch.tanh(math.log(19) / 2 + a.sqrt() * xt / (1 - a))
        return (xt - a.sqrt() * x0_hat) / (1 - a).sqrt()


@pytest.fixture(scope="module")
def toy():
    """A chain of 20 steps, black-and-white images, and what ddpm_bits says of them."""
    torch.manual_seed(0)
    model = ddpm.DDPM(BlackAndWhite(20), T=20, shape=SHAPE)
    model.settings = {"precision": "float32"}
    n = {"counted": 2000, "chosen": 400, "test": 80}
    parts = {name: 255 * (torch.rand(count, *SHAPE) < 0.95).byte() for name, count in n.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "FIRST", (1, 3, 8, 30))
        rows, chains = compare.ddpm_bits(model, parts, seed=0)
    return model, parts, rows, chains


def test_the_parts_of_the_bound_add_up_to_the_whole_chain(toy):
    _, _, rows, chains = toy
    assert list(chains) == [1, 2, 5, 10, 20]
    whole = rows["DDPM"]["decoder"] + rows["DDPM"]["KL"]
    assert whole == pytest.approx(chains[20]["total"]) == rows["DDPM"]["total"]
    assert rows["DDPM, the best chain of at most 20 steps"] == chains[20]
    entropy = -(0.95 * math.log2(0.95) + 0.05 * math.log2(0.05))
    assert all(entropy - 0.03 < chain["total"] < 2 for chain in chains.values())
    by_13 = rows["DDPM, Ho's decoder (13)"]
    own = rows["DDPM, Ho's decoder and variances"]
    assert by_13["KL"] == rows["DDPM"]["KL"] <= own["KL"] and by_13["decoder"] == own["decoder"]
    assert rows["DDPM"]["total"] < by_13["total"]


def test_the_bound_is_that_of_ddpm_with_another_decoder_and_variance(toy, monkeypatch):
    model, parts, rows, _ = toy
    x0 = ddpm.to_model(parts["test"] / 255)
    # ddpm_bits draws in this order: errors of "test", errors of "chosen", L_0.
    torch.manual_seed(0)
    errors = compare.x0_errors(model, x0)
    mse = compare.x0_errors(model, ddpm.to_model(parts["chosen"][:32] / 255)).mean(0) / 64
    monkeypatch.setattr(ddpm, "x0_error", lambda model, x0, t: errors[:, t])
    own = ddpm.vlb_terms(model, x0).sum(1).mean().item()
    found = rows["DDPM, Ho's decoder and variances"]["total"]
    assert found == pytest.approx(own / 64 / math.log(2), rel=1e-6)

    p_mean_variance = model.p_mean_variance
    for times in [20, 7, 0], model.times(5), model.times():

        def bits_with(factor, times=times):
            """Bits of the KLs, with each variance but L_0's being factor times the best one."""

            def step(xt, t, s, x0_hat=None):
                mean, variance = p_mean_variance(xt, t, s, x0_hat)
                a, b = model.alpha_bar[[t, s]].tolist()
                beta_tilde = (1 - b) / (1 - a) * (1 - a / b)  # Ho (7), for ᾱ_t and ᾱ_s
                of_x0 = math.sqrt(b) * (1 - a / b) / (1 - a)
                best = beta_tilde + of_x0**2 * mse[t].item()
                return mean, factor * best if s > 0 else variance

            monkeypatch.setattr(model, "p_mean_variance", step)
            terms = ddpm.vlb_terms(model, x0, times)[:, 1:-1]
            return terms.sum(1) / 64 / math.log(2)

        expected = bits_with(1)
        for factor in 0.9, 1.1:  # no other variance is better
            assert bits_with(factor).mean() > expected.mean()
        monkeypatch.setattr(model, "p_mean_variance", p_mean_variance)
        torch.testing.assert_close(compare.chain_kl(model, times, errors, mse), expected)


def test_the_best_chains_are_the_best_of_all_chains():
    """Against every chain of T = 8, whose costs come from compare.chain_kl."""
    model = ddpm.DDPM(None, T=8, shape=SHAPE)
    mse = torch.cat([torch.zeros(1), torch.rand(8).sort().values / 10]).double()
    decoders = {1: 0.5, 3: 0.52, 5: 0.7, 8: 1.3}

    def cost(times):
        kl = compare.chain_kl(model, times, 64 * mse[None], mse)
        return kl.item() + decoders[times[-2]]

    least = {}
    for K in range(1, 9):
        between = itertools.combinations(range(7, 0, -1), K - 1)
        chains = [[8, *each, 0] for each in between]
        least[K] = min(cost(times) for times in chains if times[-2] in decoders)
    found = compare.best_chains(model, mse, decoders)
    assert list(found) == [1, 2, 5]
    costs = [cost(times) for times in found.values()]
    expected = [min(least[k] for k in range(1, K + 1)) for K in found]
    assert costs == pytest.approx(expected, rel=1e-9)
    assert costs == sorted(costs, reverse=True)


def test_the_errors_of_the_bound_are_those_of_each_time():
    model = ddpm.DDPM(BlackAndWhite(6), T=6, shape=SHAPE)
    x0 = ddpm.to_model((torch.rand(3, *SHAPE) < 0.95).float())
    errors = compare.x0_errors(model, x0)
    torch.manual_seed(0)
    torch.rand(3, *SHAPE)
    assert errors.shape == (3, 7) and not errors[:, 0].any()
    for t in range(1, 7):
        a = model.alpha_bar[t].item()
        xt = math.sqrt(a) * x0 + math.sqrt(1 - a) * torch.randn_like(x0)
        eps_hat = model.net(xt, torch.tensor([t] * 3))
        x0_hat = ((xt - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)).clamp(-1, 1)
        expected = (x0 - x0_hat).square().sum((1, 2, 3))
        torch.testing.assert_close(errors[:, t], expected, rtol=1e-4, atol=1e-4)


# ---- reconstruction


@pytest.mark.parametrize("steps, close", [(1000, 0.01), (100, 0.1)])
def test_an_image_encoded_by_ddim_comes_back(steps, close):
    alpha_bar = ddpm.DDPM(None).alpha_bar

    def eps(xt, t):  # for x_0 ~ N(0, 0.5²)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        x0_hat = a.sqrt() * 0.25 / (a * 0.25 + 1 - a) * xt
        return (xt - a.sqrt() * x0_hat) / (1 - a).sqrt()

    model = ddpm.DDPM(eps, clip=False)
    times = model.times(steps)
    x0 = 0.5 * torch.randn(20, 1, 4, 4, dtype=F64)
    xT = compare.ddim_encode(model, times, x0)
    # For normals the flow is a scaling, from the first noisy image's spread to x_T's.
    noisy = alpha_bar[[times[-2], times[0]]]
    first, last = noisy * 0.25 + 1 - noisy
    torch.testing.assert_close(xT, x0 * (last / first).sqrt(), rtol=close, atol=0)
    *_, (_, back, _) = model.trajectory(xT, times, eta=0)
    torch.testing.assert_close(back, x0, rtol=close, atol=0)


# ---- times and claims

CURVE = [
    {"epoch": i, "seconds": 10 * i, "excess": f} for i, f in ((1, 90), (2, 30), (3, 24), (4, 20))
]


def test_the_seconds_until_an_excess():
    for excess, found in (
        (100, (10, True)),
        (45, (17.5, False)),
        (20, (40, False)),
        (19, (None, False)),
    ):
        assert compare.seconds_until(CURVE, excess) == found
    rough = [*CURVE[:2], {"seconds": 25}, {"seconds": 27, "excess": 31}, CURVE[3]]
    assert compare.seconds_until(rough, 25.5) == (33.5, False)
    shown = {(10.2, True): "at most 10 s", (0.44, False): "0.4 s", (None, False): "never"}
    assert {value: compare.until(value) for value in shown} == shown
    assert compare.until(None) == "not resolved"


def test_the_columns_about_training():
    model = vae.VAE()
    model.settings = {"batch_size": 256}
    row = compare.training_numbers(model, CURVE, [{"seconds": 1, "excess": 95.0}], 1000)
    assert row[compare.EQUAL] == (10, True) and row[compare.OWN] == (20, False)  # 30 = 1.5 · 20
    assert row["training, s"] == 40 and row["s per epoch"] == 10 and row["epochs"] == 4
    assert row["batch"] == 256 and row["updates"] == 4 * 3
    layers = ((784, 512), (512, 256), (256, 4), (2, 256), (256, 512), (512, 784))
    assert row["multiply-adds"] == sum(i * o for i, o in layers)
    assert row["parameters"] == sum(i * o + o for i, o in layers)
    # Without a curve, or if the last excess is within the noise, there is no target.
    for last in {}, {"excess": -0.3}:
        history = [{"epoch": 1, "seconds": 8.0, **last}]
        row = compare.training_numbers(model, history, [{"seconds": 1.0}], 100)
        assert row[compare.EQUAL] is row[compare.OWN] is None
        assert row["batch"] == 100 and row["updates"] == 1
    row = compare.training_numbers(model, CURVE, [{"seconds": 1, "excess": 5.0}], 1000)
    assert row[compare.EQUAL] == (None, False)  # never


def test_multiply_adds_of_a_convolution_are_those_of_its_kernel():
    class Conv(torch.nn.Module):
        shape = (3, 8, 8)

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)

        def forward(self, x):
            return self.conv(x)

    assert compare.multiply_adds(Conv()) == 4 * 4 * 5 * 3 * 9


@pytest.mark.parametrize(
    "last, expected",
    [(12, [1, 2, 3, 5, 7, 10, 12]), (31, [1, 2, 3, 5, 7, 10, 15, 20, 30, 31]), (1, [1])],
)
def test_the_epochs_of_the_curve(monkeypatch, last, expected):
    monkeypatch.setitem(compare.CURVE_OF, "cpu", 60)
    drawn = []

    def draw_samples(*args):
        drawn.append(args)
        return 5.0

    monkeypatch.setattr(compare, "draw_samples", draw_samples)
    control = torch.zeros(70)
    yardstick = Namespace(n=70, seed=3, control=control)
    yardstick.distance = lambda images: 2.0 if torch.is_tensor(images) else images
    watch = compare.watcher(yardstick, last, CPU, "float32")
    seen = {epoch: watch("model", epoch) for epoch in range(1, last + 1)}
    assert [epoch for epoch, row in seen.items() if row] == expected
    point = {"images": 60, "frechet": 5.0, "excess": 3.0, "device": compare.describe(CPU)}
    assert seen[last] == point and "CPU" in point["device"]
    assert drawn == len(expected) * [("model", 60, 3, CPU, "float32")]


def test_the_compilers_time_is_not_counted():
    seconds = [25, 28, 31, 59, 62]
    rows = [{"epoch": i, "seconds": s} for i, s in enumerate(seconds, 1)]
    assert [row["seconds"] for row in compare.steady(rows)] == [3, 6, 9, 12, 15]


def test_samples_are_timed_until_they_fill_a_fifth_of_a_second(monkeypatch):
    drawn = []

    def draw_samples(model, n, *more):
        drawn.append(n)
        time.sleep(0.03)
        return torch.zeros(n)

    monkeypatch.setattr(compare, "draw_samples", draw_samples)
    images, ms = compare.timed_samples("model", 50, 0, CPU)
    assert len(images) == 50 and drawn[0] == 1 and set(drawn[1:]) == {50}
    assert 4 <= len(drawn) <= 8 and 0.5 < ms < 2


def test_verdicts_need_their_margin():
    for gain, expected in (
        (0.11, "holds"),
        (0.06, "holds, close"),
        (0.04, "about the same"),
        (-0.04, "about the same"),
        (-0.06, "does not hold, close"),
        (-0.2, "does not hold"),
    ):
        assert compare.verdict(gain, 0.05) == expected


@pytest.mark.parametrize(
    "d, v, expected",
    [
        (41, 10, "holds"),
        (21, 10, "holds, close"),
        (19, 10, "about the same"),
        (10, 19, "about the same"),
        (10, 21, "does not hold, close"),
        (10, 41, "does not hold"),
        (None, 10, "cannot tell"),
        (10, None, "cannot tell"),
    ],
)
def test_what_takes_longer(d, v, expected):
    def row(seconds, at_most=False):
        return {"s": (seconds, at_most)}

    assert compare.longer(row(d), row(v), "s") == expected
    # "At most" leaves open whether it is less.
    sure = {"holds": "cannot tell", "about": "about the same or shorter"}
    assert compare.longer(row(d, True), row(v), "s") == sure.get(expected[:5], expected)
    sure = {"does ": "cannot tell", "about": "about the same or longer"}
    assert compare.longer(row(d), row(v, True), "s") == sure.get(expected[:5], expected)
    assert compare.longer(row(d, True), row(v, True), "s") == "cannot tell"
    assert compare.longer({"s": None}, row(v), "s") == "cannot tell"


def rows_of(d, v):
    """Rows with one value in every column: d for the DDPM, v for the VAEs, 0.5 for real digits."""
    rows = {}
    for name, value in {"DDPM": d, "2-D VAE": v, "conv VAE": v, compare.REAL: 0.5}.items():
        rows[name] = dict.fromkeys([*compare.SAMPLES, "bits/dim"], value)
        rows[name] |= {compare.EQUAL: (value, False), compare.OWN: (value, False)}
    return rows


def verdicts(rows, d, v):
    found = compare.claims(rows, {"DDPM": d, "2-D VAE": v, "conv VAE": v})
    assert all(each.keys() == {"claim", "verdict", "measured", "figure"} for each in found)
    return [each["verdict"] for each in found]


def test_claims():
    same = "about the same"
    times = "to equal quality: {0}; to its own best: {0}"
    found = verdicts(rows_of(1.0, 1.0), 1, 1)
    assert found == [same, same, "holds", times.format(same), same, same]
    no = "does not hold"
    found = verdicts(rows_of(0.5, 2.5), 1, 5)
    assert found == ["holds", "holds", no, times.format(no), no, "holds"]
    rows = rows_of(2.5, 0.5)
    rows["conv VAE"]["bits/dim"] = 3.0  # the better one counts
    found = verdicts(rows, 5, 1)
    assert found == [no, no, "holds", times.format("holds"), "holds", no]
    rows = rows_of(0.9, 1.0)
    rows["DDPM"]["by shape alone"] = 1.08  # an advantage in one column, lost in the other
    assert verdicts(rows, 1, 1)[0] == f"{no}, close"
    for coverage, off, expected in (
        (0.3, 0.5, "holds"),
        (0.44, 0.5, "holds, close"),
        (0.5, 0.56, "holds, close"),
        (0.46, 0.5, f"{no}, close"),
        (0.5, 0.5, no),
        (0.9, 0.1, no),
    ):
        rows["DDPM"] |= {"coverage": coverage, "classes off by": off}
        assert verdicts(rows, 1, 1)[2] == expected


# ---- samplers


def test_the_samplers_are_those_of_ddpm_from_the_same_noise(monkeypatch):
    model = ddpm.DDPM(BlackAndWhite(60), T=60, shape=SHAPE)
    yardstick = Namespace(n=48, distance=lambda images: images.double().mean().item())
    distances, rows, n = compare.compare_samplers(model, yardstick, 3, CPU, "float32")
    assert (
        n == 12
        and list(rows)[-1] == "Ho's, 60 steps"
        and list(distances) == list(compare.SAMPLERS)
    )
    torch.manual_seed(3)
    xT = torch.randn(12, *SHAPE)
    *_, (_, x0, _) = model.trajectory(xT, model.times(10), eta=0)  # draws no random numbers
    images = (255 * ddpm.to_image(x0)).round()
    assert distances["DDIM"][10] == pytest.approx(images.mean().item(), rel=1e-4)
    torch.testing.assert_close(255 * rows["DDIM, 10 steps"], images[:10], rtol=0, atol=1)
    for sampler in compare.SAMPLERS:
        assert list(distances[sampler]) == [5, 10, 20, 50]
    assert not torch.equal(rows["Ho's, 10 steps"], rows["second order, 10 steps"])


# ---- all of it


def flags(out, folder, *more):
    given = ["--device", "cpu", "--limit", "200", "--batch-size", "100"]
    return [*given, "--data-dir", str(folder), "--out", str(out), *more]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Everything is real except the sizes; the chain has 60 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ddpm.SETTINGS, "T", 60)
        patch.setitem(ddpm.RECIPES["short"], "width", 8)
        patch.setitem(compare.CURVE_OF, "cpu", 60)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, digits):
    """The folder of a comparison of models of one epoch, and what it printed."""
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "UPDATES", {"reader": 40, "critic": 5})
        with contextlib.redirect_stdout(io.StringIO()) as said:
            compare.main(flags(out, digits, "--epochs", "1", "--seed", "7"))
        yield out, said.getvalue()


@pytest.fixture
def results(compared):
    return json.loads((compared[0] / "results.json").read_text(encoding="utf-8"))


def test_the_results_are_complete_and_finite(results):
    json.dumps(results, allow_nan=False)
    assert results["seed"] == 7 and results["n"] == 50 and results["bits n"] == 2
    rows = results["rows"]
    assert list(rows) == [*compare.RUNS, compare.REAL, compare.TEST]
    for name, row in rows.items():
        missing = {"Fréchet distance", "coverage"} if name == compare.TEST else set()
        assert row.keys() >= compare.SAMPLES.keys() - missing and not row.keys() & missing
        assert results["audit"][name].keys() == set(compare.RULES)
        assert max(results["told"][name]["told"].values()) == row["told from real"]
    assert rows[compare.REAL]["copied"] == 1 and rows[compare.TEST]["copied"] <= 0.02
    for name in compare.RUNS:
        assert rows[name].keys() >= {*compare.TIMES, "bits/dim"}
        assert rows[name]["trained on"] == results["device"] == compare.describe(CPU)
        assert rows[name]["evaluations per sample"] == (20 if name == "DDPM" else 1)
        assert rows[name]["epochs"] == 1 and rows[name]["ms per sample"] > 0
        assert rows[name]["updates"] == 2 and rows[name]["batch"] == 100
        assert results["settings"][name]["limit"] == 200
        point = results["histories"][name][0]
        assert point["images"] == 50
        floor = point["frechet"] - point["excess"]
        assert floor == pytest.approx(results["curve floor"])
        assert sum(results["classes"][name]) == pytest.approx(1)
        parts = results["bits"][name]
        assert parts["decoder"] + parts["KL"] == pytest.approx(parts["total"])
        assert parts["total"] == rows[name]["bits/dim"] and parts["standard error"] > 0
        assert parts["bins"] in compare.BINS and results["returned"][name] > 0
    chains = results["chains"]
    assert list(chains) == ["1", "2", "5", "10", "20", "50", "60"]
    assert chains["60"]["times"] == list(range(60, -1, -1))
    assert results["bits"]["DDPM, the best chain of at most 20 steps"] == chains["20"]
    assert list(results["samplers"]["DDIM"]) == ["5", "10", "20", "50"]


def test_the_report_has_every_table_and_picture(compared, results):
    out, said = compared
    report = (out / "report.md").read_text(encoding="utf-8")
    compare.write_report(results, out)
    assert report == (out / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((.+?\.png)\)", report)
    assert len(set(named)) >= 11
    assert all((out / name).stat().st_size > 1000 for name in named)
    for each in results["claims"]:
        assert all(f"{value}" in report for value in each.values())
        assert each["claim"] in said and each["figure"] in named
    for name, row in results["rows"].items():
        cells = [compare.SAMPLES[c].format(row[c]) if c in row else "" for c in compare.SAMPLES]
        assert f"| {' | '.join([name, *cells])} |" in report
    for column in compare.SAMPLES:  # one legend explains them all
        assert report.count(f"- **{column}**:") == 1


@pytest.fixture
def copied(compared, tmp_path, monkeypatch):
    """A folder with only the three checkpoints.  No pictures are drawn."""
    for path in compared[0].rglob("*.pt"):
        new = tmp_path / path.relative_to(compared[0])
        new.parent.mkdir(exist_ok=True)
        shutil.copy(path, new)
    for script in vae, ddpm:
        monkeypatch.setattr(script, "draw", lambda *_: None)
    monkeypatch.setattr(compare, "draw_figures", lambda *_: None)
    monkeypatch.setattr(compare, "draw_pictures", lambda *_: None)
    return tmp_path


def test_a_second_comparison_trains_nothing(results, copied, digits, monkeypatch):
    monkeypatch.setattr(common, "save_checkpoint", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(torch.optim, "Adam", lambda *_, **__: pytest.fail("trained"))
    compare.main(["--device", "cpu", "--data-dir", str(digits), "--out", str(copied)])
    again = json.loads((copied / "results.json").read_text(encoding="utf-8"))
    for each in again, results:  # times differ from run to run
        del each["seconds"], each["date"]
        for name in compare.RUNS:
            del each["rows"][name]["ms per sample"]
    assert again == results


def test_the_scripts_resume_in_the_same_folder(copied, digits, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "load", lambda *_: "finished")
    for script in vae, ddpm:
        script.main(["--device", "cpu", "--data-dir", str(digits), "--out", str(copied)])
        assert "finished" in capsys.readouterr().out


def rewrite(path, **parts):
    torch.save(torch.load(path, weights_only=True) | parts, path)


def change(path, **settings):
    rewrite(path, settings=torch.load(path, weights_only=True)["settings"] | settings)


def said_at_the_end(job):
    """What common.run(job) prints at an error that the user can fix."""
    with pytest.raises(SystemExit) as stopped:
        common.run(job)
    return stopped.value.code


FILES = [file for _, file, _ in compare.RUNS.values()]


@pytest.mark.parametrize("file", FILES)
def test_an_edited_script_is_refused_in_one_line(copied, digits, monkeypatch, file):
    monkeypatch.setattr(compare, "Yardstick", lambda *_: pytest.fail("went on"))
    # The present script may not know the old one's recipe and settings.
    settings = {"recipe": "mine"} if file == "ddpm.pt" else {"temperature": 1}
    rewrite(copied / file, code="another", settings=settings)
    for more in [], ["--epochs", "1"]:
        line = said_at_the_end(lambda more=more: compare.main(flags(copied, digits, *more)))
        assert line.startswith("error: ") and "\n" not in line
        assert f"{Path(file).stem}.py has changed" in line and str(copied / file) in line
        assert "--fresh" in line


def test_an_edited_comparison_still_uses_the_models(copied, digits, tmp_path):
    source = Path(compare.__file__).read_text(encoding="utf-8")
    edited = tmp_path / "edited.py"
    edited.write_text(source.replace("COUNTED = 20000", "COUNTED = 10000"), encoding="utf-8")
    assert common.fingerprint(edited) != common.fingerprint(compare.__file__)
    spec = importlib.util.spec_from_file_location("edited", edited)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.COUNTED == 10000
    before = [(copied / file).read_bytes() for file in FILES]
    runs = other.open_runs(other.parse(flags(copied, digits)), CPU)
    for name, run in runs.items():
        _, history = other.trained(name, run, CPU, lambda *_: pytest.fail("trained"))
        assert len(history) == 1
    assert [(copied / file).read_bytes() for file in FILES] == before


def test_fresh_trains_all_models_anew(copied, digits):
    rewrite(copied / "ddpm.pt", code="another")
    change(copied / "vae.pt", epochs=9, seed=5)  # they would contradict one another
    args = compare.parse(flags(copied, digits, "--fresh", "--epochs", "1", "--seed", "8"))
    runs = compare.open_runs(args, CPU)
    args = compare.parse(flags(copied / "empty", digits, "--epochs", "1", "--seed", "8"))
    (copied / "empty").mkdir()
    runs_of_the_empty_folder = compare.open_runs(args, CPU)
    for file, (name, run) in zip(FILES, runs.items(), strict=True):
        model, history = compare.trained(name, run, CPU, lambda *_: {"frechet": 1.5})
        saved = torch.load(copied / file, weights_only=True)
        assert [row["frechet"] for row in history] == [1.5] and saved["history"] == history
        compare.trained(name, runs_of_the_empty_folder[name], CPU, None)
        expected = torch.load(copied / "empty" / file, weights_only=True)
        torch.testing.assert_close(saved["model"], expected["model"], rtol=0, atol=0)
        assert model.settings == saved["settings"] == expected["settings"]
        assert saved["settings"]["seed"] == 8 and saved["code"] == expected["code"]
    args = compare.parse(flags(copied, digits))  # without --fresh, the models are used as they are
    for name, run in compare.open_runs(args, CPU).items():
        compare.trained(name, run, CPU, lambda *_: pytest.fail("trained"))


def test_fresh_takes_no_setting_from_the_models_that_are_there(copied, digits):
    change(copied / "ddpm.pt", recipe="paper")
    for file in FILES:
        change(copied / file, data="kmnist", precision="bfloat16")
    args = compare.parse(flags(copied, digits, "--fresh"))
    runs = compare.open_runs(args, CPU)
    assert (args.data, args.seed, args.recipe) == ("mnist", 0, "short")
    assert args.precision == common.best_precision(CPU)
    assert [run.epochs for run in runs.values()] == [ddpm.RECIPES["short"]["epochs"], 30, 10]


def test_what_cannot_be_compared_is_refused_before_any_work(copied, digits, monkeypatch):
    def fail(*_):
        pytest.fail("went on")

    for place, name in (compare, "Yardstick"), (vae, "train"), (ddpm, "train"):
        monkeypatch.setattr(place, name, fail)
    (copied / "conv/vae.pt").unlink()
    history = torch.load(copied / "ddpm.pt", weights_only=True)["history"]
    change(copied / "ddpm.pt", epochs=3)
    rewrite(copied / "ddpm.pt", history=3 * history)
    for flag, value, has in (
        ("epochs", "2", "epochs 3"),
        ("limit", "300", "limit 200"),
        ("seed", "8", "seed 7"),
        ("data", "kmnist", "data mnist"),
        ("recipe", "paper", "recipe short"),
    ):
        with pytest.raises(common.InputError, match=has):
            compare.main(flags(copied, digits, f"--{flag}", value))
    change(copied / "ddpm.pt", seed=8)
    with pytest.raises(common.InputError, match="seed"):
        compare.main(["--device", "cpu", "--out", str(copied)])
    change(copied / "vae.pt", latent_dim=20)
    with pytest.raises(common.InputError, match="vae.pt lacks latent_dim 2"):
        compare.main(["--device", "cpu", "--out", str(copied)])
    change(copied / "vae.pt", latent_dim=2)
    for path in copied.rglob("*.pt"):
        change(path, seed=7, limit=50)  # trained by ddpm.py and vae.py
    with pytest.raises(common.InputError, match="--limit 50 is too few"):
        compare.main(["--device", "cpu", "--out", str(copied)])
    for path in copied.rglob("*.pt"):
        change(path, limit=200)
    change(copied / "ddpm.pt", limit=None)
    with pytest.raises(common.InputError, match="limit"):
        compare.main(["--device", "cpu", "--out", str(copied)])
    with pytest.raises(common.InputError, match="takes no folder"):
        compare.main(flags(copied / "new", digits, "--data", str(digits)))  # a folder
    with pytest.raises(common.InputError, match="too few"):
        compare.main(flags(copied / "new", digits, "--limit", "99"))
    with pytest.raises(common.InputError, match="--sample"):
        compare.main(flags(copied, digits, "--sample", "5"))
    monkeypatch.setattr(common, "WORLD", 2)
    with pytest.raises(common.InputError, match="torchrun"):
        compare.main(flags(copied, digits))


def test_a_device_without_float64_leaves_the_work_to_the_cpu(tmp_path, monkeypatch):
    class StopHereError(Exception):
        pass

    def stop(args, device):
        assert device == CPU
        raise StopHereError

    monkeypatch.setattr(common, "start", lambda args: torch.device("mps"))
    monkeypatch.setattr(compare, "compare", stop)
    with pytest.raises(StopHereError):
        compare.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    "more, epochs",
    [([], (30, 10)), (["--recipe", "paper"], (100, 100)), (["--epochs", "3"], (3, 3))],
)
def test_the_epochs_of_the_vaes(tmp_path, more, epochs):
    args = compare.parse(["--out", str(tmp_path), "--device", "cpu", *more])
    runs = compare.open_runs(args, CPU)
    assert tuple(runs[name].epochs for name in compare.VAES) == epochs
    assert [runs[name].latent_dim for name in compare.VAES] == [2, 20]
    assert [runs[name].network for name in compare.VAES] == ["mlp", "conv"]
    assert not list(tmp_path.iterdir())


def test_flags_left_out_are_taken_from_the_checkpoints(copied):
    (copied / "ddpm.pt").unlink()
    (copied / "conv/vae.pt").unlink()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[common.best_precision(CPU)]
    change(copied / "vae.pt", data="kmnist", seed=5, limit=150, precision=other)
    args = compare.parse(["--out", str(copied), "--device", "cpu"])
    runs = compare.open_runs(args, CPU)
    for run in (args, *runs.values()):
        assert (run.data, run.seed, run.limit, run.precision) == ("kmnist", 5, 150, other)
    assert runs["2-D VAE"].epochs == 1 and runs["conv VAE"].epochs == 10
    assert runs["DDPM"].epochs == ddpm.RECIPES["short"]["epochs"]


def test_a_recipe_left_out_is_that_of_the_ddpm(copied):
    (copied / "vae.pt").unlink()
    (copied / "conv/vae.pt").unlink()
    change(copied / "ddpm.pt", recipe="paper", epochs=4, lr=0.002, T=40)
    runs = compare.open_runs(compare.parse(["--out", str(copied), "--device", "cpu"]), CPU)
    run = runs["DDPM"]
    settings, saved = common.find_run(run, copied / "ddpm.pt", {}, ddpm.CODE)
    assert (run.recipe, run.epochs, settings.lr, settings.T) == ("paper", 4, 0.002, 40)
    assert len(saved["history"]) == 1
    for name in compare.VAES:  # with the recipe "paper", they have the course report's 100 epochs
        assert runs[name].epochs == 100 and runs[name].seed == 7


def test_more_epochs_resume_where_a_comparison_was_stopped(copied, digits):
    args = compare.parse(flags(copied, digits, "--epochs", "2"))
    first, *_, last = compare.open_runs(args, CPU).items()
    compare.trained(*first, CPU, lambda *_: {"frechet": 1.5})  # and here it is stopped
    change(copied / "vae.pt", epochs=2)  # or after this one
    args = compare.parse(flags(copied, digits, "--epochs", "2"))
    runs = compare.open_runs(args, CPU)
    assert [run.epochs for run in runs.values()] == [2, 2, 2] and list(runs)[-1] == last[0]
    _, history = compare.trained(*last, CPU, lambda *_: {"frechet": 1.5})
    assert [row["epoch"] for row in history] == [1, 2]


def test_an_unfinished_model_is_resumed(copied, digits):
    change(copied / "vae.pt", epochs=2)
    args = compare.parse(flags(copied, digits))
    run = compare.open_runs(args, CPU)["2-D VAE"]
    before = torch.load(copied / "vae.pt", weights_only=True)["history"]
    watch = {"frechet": 1.5}
    model, history = compare.trained("2-D VAE", run, CPU, lambda *_: watch)
    assert len(history) == 2 == run.epochs and history[0] == before[0]
    assert history[1]["frechet"] == 1.5 and model.latent_dim == 2
