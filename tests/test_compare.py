import contextlib
import functools
import io
import json
import math
import re
import shutil
from argparse import Namespace
from collections import Counter

import pytest
import torch
from torch import nn

import common
import compare
import ddpm
import vae


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@functools.lru_cache
def digits():
    return *common.synthetic_digits(2000, seed=0), *common.synthetic_digits(300, seed=1)


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    """All scripts find these digits where there would be 60,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_load", lambda name, root: digits())
        yield


# ---- the Fréchet distance

def gaussian(mean, covariance, n=200):
    """n points whose own mean and covariance are exactly these: what frechet says of them is exact, too."""
    points = torch.randn(n, len(mean), dtype=torch.float64)
    points = points - points.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(points.T)), points.T, upper=False)
    values, vectors = torch.linalg.eigh(torch.as_tensor(covariance, dtype=torch.float64))
    return white.T @ (vectors * values.clamp(min=0).sqrt()).T + torch.tensor(mean, dtype=torch.float64)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def test_frechet_of_diagonal_normals():
    a = gaussian([0.0, 1, 2], torch.tensor([1.0, 4, 9]).diag())
    b = gaussian([1.0, 1, 0], torch.tensor([4.0, 4, 0.25]).diag())
    expected = 1 + 0 + 4 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 0.5) ** 2
    assert compare.frechet(a, b) == pytest.approx(expected, rel=1e-9) == compare.frechet(b, a)


def test_frechet_of_normals_whose_covariances_do_not_commute():
    A, B = (torch.tensor(m, dtype=torch.float64) for m in ([[2, 1.2], [1.2, 1]], [[1, -0.9], [-0.9, 3]]))
    assert (A @ B - B @ A).norm() > 1
    expected = 25 + (A + B - 2 * root(root(A) @ B @ root(A))).trace().item()
    assert compare.frechet(gaussian([3.0, 0], A), gaussian([0.0, 4], B)) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_zero_for_the_same_set_and_grows_with_the_mean():
    a = gaussian([0.0, 0], [[2, 0.5], [0.5, 1]])
    assert compare.frechet(a, a) == pytest.approx(0, abs=1e-9)
    for shift in 1, 2, 3:
        assert compare.frechet(a + torch.tensor([0, shift]), a) == pytest.approx(shift ** 2, rel=1e-9)


def test_frechet_of_sets_smaller_than_their_space_and_with_dead_features():
    a, b = gaussian([0.0, 7], [[1, 0], [0, 0]]), gaussian([0.0, 5], [[4, 0], [0, 0]])
    assert compare.frechet(a, b) == pytest.approx(1 + 4, abs=1e-6)  # √ of rounding is 1e-8
    few = torch.randn(20, 128, dtype=torch.float64).clamp(min=0)
    few[:, :30] = 0
    assert compare.frechet(few, few) == pytest.approx(0, abs=1e-4)


# ---- precision and recall

def precision_recall(real, fake, k=3):
    return tuple(hits.mean().item() for hits in compare.precision_recall(real, fake, k))


def test_precision_and_recall_of_equal_and_of_far_clouds():
    a = torch.randn(100, 4)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)


def test_a_lost_mode_costs_recall_and_not_precision():
    mode, other, fake = torch.randn(3, 300, 2)
    precision, recall = precision_recall(torch.cat([mode, other + 50]), fake)
    assert precision > 0.9 and 0.4 < recall <= 0.5
    precision, recall = precision_recall(fake, torch.cat([mode, other + 50]))
    assert recall > 0.9 and 0.4 < precision <= 0.5


def test_copies_of_a_few_real_points_are_precise_and_cover_little():
    real = torch.randn(200, 4, dtype=torch.float64)
    precision, recall = precision_recall(real, real[:5].repeat(40, 1))
    assert precision == 1 and recall <= 5 / 200


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_loops(k):
    real, fake = torch.randn(30, 2, dtype=torch.float64), 1.7 * torch.randn(27, 2, dtype=torch.float64)

    def share(points, manifold):
        points, manifold, inside = points.tolist(), manifold.tolist(), 0
        for p in points:
            for i, m in enumerate(manifold):
                others = sorted(math.dist(m, o) for j, o in enumerate(manifold) if j != i)
                if math.dist(p, m) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)
    expected = share(fake, real), share(real, fake)
    assert precision_recall(real, fake, k) == pytest.approx(expected) and expected[0] != expected[1]


# ---- what is said of samples

class Reader(nn.Module):
    """A classifier of pictures whose first pixels are the class itself: brightly lit, it is sure of it."""

    def features(self, x):
        return x[:, 0, 0, :10]

    def leave(self, features):
        return 10 * features


def pictures(labels, light=1.0):
    x = torch.rand(len(labels), 1, 28, 28)
    x[:, 0, 0, :10] = 0.02 * torch.rand(len(labels), 10)
    x[torch.arange(len(labels)), 0, 0, labels] = light
    return x


def measured(x, shares=None, train=None, real=None, close=1.0):
    shares = torch.full((10,), 0.1, dtype=torch.float64) if shares is None else shares
    real = Reader().features(pictures(torch.arange(500) % 10)).double() if real is None else real
    train = {"x": (x if train is None else train).flatten(1), "shares": shares, "close": close}
    return compare.measure_samples(Reader(), x, real, train, seed=0)


@pytest.mark.parametrize("chi2, p", [(14.684, 0.10), (16.919, 0.05), (21.666, 0.01), (27.877, 0.001)])
def test_class_histogram_its_distance_and_the_table_of_chi2(chi2, p):
    k = math.sqrt(1e4 * chi2 / (200 + chi2))  # χ² of two classes seen 100 times each and expected 100 ± k times
    shares = torch.full((10,), 0.1, dtype=torch.float64)
    shares[3] += k / 1000
    shares[8] -= k / 1000
    said = measured(pictures(torch.arange(1000) % 10), shares)
    assert said["n"] == 1000 and said["classes"] == [0.1] * 10
    assert said["class_distance"] == pytest.approx(k / 1000) and said["class_p"] == pytest.approx(p, rel=2e-3)


def test_share_of_pictures_the_classifier_is_unsure_of():
    x = torch.cat([pictures(torch.arange(75) % 10), pictures(torch.arange(25) % 10, light=0.3)])
    said = measured(x)
    assert said["degenerate"] == 0.25 and said["degenerate_error"] == pytest.approx(math.sqrt(0.25 * 0.75 / 100), rel=0.48)  # 3 errors of 20 draws


def test_samples_are_compared_with_the_real_features():
    labels = torch.arange(500) % 10
    real = Reader().features(pictures(labels)).double()
    same, other = measured(pictures(labels), real=real), measured(pictures(labels % 5), real=real)
    assert same["frechet"] < 0.01 < 0.3 < other["frechet"] and 0 < other["frechet_error"] < 0.1
    assert same["precision"] > 0.9 and same["recall"] > 0.9
    assert other["precision"] > 0.9 and 0.4 < other["recall"] < 0.6


def test_memorized_images_are_seen():
    train, fresh = pictures(torch.arange(300) % 10), pictures(torch.arange(300) % 10)
    copied = measured(torch.cat([train[:100], fresh]), train=train)
    assert copied["copies"] == 100 / 400 and measured(train[:100], train=train)["nearest"] == pytest.approx(0, abs=0.02)
    nearest = sorted(min((x - y).norm().item() for y in train[:50]) for x in fresh[:9])[4]
    assert measured(fresh[:9], train=train[:50])["nearest"] == pytest.approx(nearest, rel=1e-4)


# ---- the classifier

def arguments(out, **changes):
    return Namespace(**{"data": "synthetic", "data_dir": "", "limit": None, "out": str(out)} | changes)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier")
    return compare.train_classifier(arguments(out), torch.device("cpu")), out


def test_the_classifier_reads_digits_it_has_not_seen(classifier):
    _, _, x, labels = digits()
    features, probabilities = compare.look(classifier[0], x / 255)
    assert (probabilities.argmax(1) == labels).double().mean() > 0.9 and not classifier[0].training
    assert features.shape == (300, 128) and features.dtype == torch.float64
    torch.testing.assert_close(probabilities.sum(1), torch.ones(300))


def test_the_classifier_is_kept_and_made_anew_for_other_settings(classifier, tmp_path, monkeypatch):
    model, out = classifier
    shutil.copy(out / "classifier.pt", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(common, "load_labels", lambda *_: pytest.fail("trained again"))
        again = compare.train_classifier(arguments(tmp_path), torch.device("cpu"))
    assert torch.equal(again.leave.weight, model.leave.weight) and not again.training
    other = compare.train_classifier(arguments(tmp_path, limit=100), torch.device("cpu"))
    assert not torch.equal(other.leave.weight, model.leave.weight)
    assert common.load(tmp_path / "classifier.pt", "classifier")["settings"] == {"data": "synthetic", "limit": 100}


def test_noise_and_lost_classes_are_far_from_digits(classifier):
    x, labels, real, _ = digits()
    x, real = x / 255, compare.look(classifier[0], real / 255)[0]
    train = {"x": x.flatten(1), "shares": torch.full((10,), 0.1, dtype=torch.float64), "close": 1.0}
    whole, some, noise = (compare.measure_samples(classifier[0], images, real, train, 0)
                          for images in (x[:300], x[labels < 5][:300], torch.rand(300, 1, 28, 28)))
    assert 2 * whole["frechet"] < some["frechet"] < noise["frechet"] / 2
    assert some["class_p"] < 1e-9 < whole["class_p"] and some["class_distance"] > 0.3 > whole["class_distance"]
    assert whole["recall"] > 0.9 > 0.7 > some["recall"] > noise["recall"] == 0
    assert noise["degenerate"] > 0.9 and noise["nearest"] > 10


# ---- the bounds

def test_bits_and_standard_errors():
    assert compare.bits(784 * 8 * math.log(2)) == pytest.approx(8)  # 784 pixels of 256 equally likely levels
    assert compare.mean_and_error(torch.tensor([1.0, 2, 3, 6])) == pytest.approx((3, math.sqrt(14 / 3 / 4)))


def levels(n):
    """8-bit noise: its entropy is 8 bits/dim, below which no bound may lie."""
    return torch.randint(0, 256, (n, 1, 28, 28)) / 255


def few():
    x, _, y, _ = digits()
    return x[:5] / 255, y[:4] / 255


def test_the_bound_of_the_vae_is_the_sum_of_its_terms():
    model, (x_train, x) = vae.VAE().eval(), few()
    state = torch.get_rng_state()
    bound = compare.vae_bound(model, x_train, x, seed=3)
    assert bound["bits_per_dim"] == pytest.approx(bound["reconstruction"] + bound["kl"]) and bound["n"] == 4
    assert bound["gap"] == pytest.approx(bound["bits_per_dim"] - bound["importance_weighted_256"], abs=1e-6)
    assert torch.equal(torch.get_rng_state(), state) and compare.vae_bound(model, x_train, x, seed=3) == bound
    assert bound["bits_per_dim"] != compare.vae_bound(model, x_train, x, seed=4)["bits_per_dim"]
    noise = compare.vae_bound(model, levels(5), levels(4), seed=0)
    assert 7.98 < noise["importance_weighted_256"] <= noise["bits_per_dim"] + 1e-3 < 8.3 and noise["error"] < 0.1


class Watch(nn.Module):
    """Notes what the network is asked about the test images, of which there are four."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, []

    def forward(self, xt, t):
        if len(xt) == 4:
            self.asked.append((t[0].item(), xt))
        return self.net(xt, t)


@pytest.fixture(scope="module")
def ladder():
    torch.manual_seed(0)
    model, (x_train, x) = ddpm.DDPM(Watch(ddpm.UNet()), T=20, sigma="posterior", clip=True), few()
    model.estimate_mse(ddpm.to_model(x_train))
    return model, compare.ddpm_bound(model, x_train, x, seed=0)


def test_the_bound_of_the_ddpm_is_the_sum_of_its_terms(ladder):
    model, bound = ladder
    assert list(bound["steps"]) == ["beta", "posterior", "optimal", "optimal, fitted decoder"]
    for rung in bound["steps"].values():
        assert rung["bits_per_dim"] == pytest.approx(rung["L_0"] + rung["L_t"] + rung["L_T"]) and rung["error"] > 0
    assert sum(bound["per_t"]) == pytest.approx(bound["bits_per_dim"]) and len(bound["per_t"]) == 21
    assert bound["bits_per_dim"] == bound["steps"]["optimal, fitted decoder"]["bits_per_dim"]
    assert model.sigma == "posterior" and bound["n"] == 4


def test_every_rung_of_the_ladder_stands_on_the_same_draws_and_below_the_last(ladder):
    model, bound = ladder
    beta, posterior, optimal, fitted = bound["steps"].values()
    assert fitted["bits_per_dim"] < optimal["bits_per_dim"] < posterior["bits_per_dim"]
    assert fitted["L_t"] == optimal["L_t"] < min(posterior["L_t"], beta["L_t"])
    assert beta["L_T"] == posterior["L_T"] == fitted["L_T"]
    # each t is asked once for the errors; L_0 at t = 1 by four rungs and K = 20, at t = 20/K by the shorter chains
    asked = model.net.asked
    assert Counter(t for t, _ in asked) == Counter([*range(1, 21), 1, 1, 1, 1, 1, 2, 4, 10, 20])
    assert len({tuple(xt.flatten().tolist()) for t, xt in asked[20:] if t == 1}) == 1


def test_the_longest_chain_is_the_last_rung_of_the_ladder(ladder):
    _, bound = ladder
    # the decoder is fitted once more, with other draws
    assert bound["chains"][20]["bits_per_dim"] == pytest.approx(bound["bits_per_dim"], rel=0.01)


def test_every_chain_is_that_of_its_own_steps(ladder, monkeypatch):
    model, bound = ladder
    monkeypatch.setattr(model, "sigma", "optimal")
    x_train, x = map(ddpm.to_model, few())
    assert list(bound["chains"]) == [1, 2, 5, 10, 20]
    for K in 2, 5, 10:
        chain = model.respace(K)
        chain.fit_decoder(x_train)
        measured = compare.bits(chain.vlb_terms(x)).sum(1).mean().item()  # other draws, asked of the chain itself
        assert bound["chains"][K]["bits_per_dim"] == pytest.approx(measured, rel=0.03)


def test_no_ddpm_codes_noise_in_less_than_its_entropy():
    model = ddpm.DDPM(ddpm.UNet(), T=5, clip=True)
    model.estimate_mse(ddpm.to_model(levels(4)))
    x_train, x = levels(4), levels(4)
    bound = compare.ddpm_bound(model, x_train, x, seed=0)
    assert compare.ddpm_bound(model, x_train, x, seed=0) == bound  # the first one leaves nothing behind
    assert all(7.98 < chain["bits_per_dim"] for chain in [*bound["steps"].values(), *bound["chains"].values()])


# ---- the claims

def equal():
    """Results in which everything is equal."""
    samples = {"n": 1000, "class_p": 0.1} | {key: 0.5 for key in compare.METRICS}
    samples |= {f"{key}_error": 0.01 for key in compare.METRICS}
    samples |= {"frechet": 10.0, "frechet_error": 1.0}
    chains = {"1": {"bits_per_dim": 2.0, "error": 0.1}, "1000": {"bits_per_dim": 2.0, "error": 0.1}}
    results = {name: {"samples": dict(samples), "training": {"seconds_per_epoch": 1.0, "curve": []},
                      "bound": {"chains": chains, "bits_per_dim": 2.0}} for name in ("vae", "ddpm")}
    results["pairs"] = [{"seed": 0, **{name: results[name]["samples"] for name in ("vae", "ddpm")}}]
    results["encoded"] = {"rms": {"VAE": [0.2, 0.01], compare.BACK: [0.2, 0.01], compare.QUARTER: [0.2, 0.01],
                                   "all black": [0.4, 0.01]}}
    return results | {"real": dict(samples), "test": dict(samples)}


def outcome(**changes):
    """The verdicts where everything is equal but for what is at these paths."""
    results = json.loads(json.dumps(equal()))
    for path, number in changes.items():
        *parts, key = path.split("__")
        functools.reduce(lambda tree, part: tree[int(part) if part.isdigit() else part], parts, results)[key] = number
    results["vae"]["samples"], results["ddpm"]["samples"] = (results["pairs"][0][name] for name in ("vae", "ddpm"))
    return [verdict for *_, verdict, _ in compare.claims(results)]


FOUR = ["holds", "cannot tell", "cannot tell", "does not hold"]


@pytest.mark.parametrize("claim, path, values", [  # at 2√2 errors
    (0, "pairs__0__vae__frechet", (12.9, 12.8, 7.2, 7.1)),
    (0, "pairs__0__ddpm__frechet", (7.1, 7.2, 12.8, 12.9)),
    (1, "pairs__0__vae__degenerate", (0.529, 0.528, 0.472, 0.471)),
    (1, "pairs__0__ddpm__degenerate", (0.471, 0.472, 0.528, 0.529)),
    (2, "pairs__0__ddpm__recall", (0.471, 0.472, 0.528, 0.529)),
    (2, "real__recall", (0.529, 0.528, 0.472, 0.471))])
def test_a_claim_is_decided_by_two_standard_errors(claim, path, values):
    verdicts = [outcome(**{path: number}) for number in values]
    assert [v[claim] for v in verdicts] == FOUR
    assert all(other == "cannot tell" for v in verdicts for i, other in enumerate(v[:3]) if i != claim)


def test_fidelity_is_undecided_where_its_two_measures_disagree():
    assert outcome(pairs__0__vae__frechet=50.0)[0] == "holds"
    assert outcome(pairs__0__vae__frechet=50.0, pairs__0__vae__precision=0.4)[0] == "holds"
    assert outcome(pairs__0__vae__frechet=50.0, pairs__0__vae__precision=0.6)[0] == "cannot tell"
    assert outcome(pairs__0__vae__frechet=2.0, pairs__0__vae__precision=0.4)[0] == "cannot tell"
    assert outcome(pairs__0__vae__frechet=2.0, pairs__0__vae__precision=0.6)[0] == "does not hold"


def test_diversity_is_lacking_where_the_classes_are_off():
    assert [outcome(pairs__0__ddpm__class_p=p)[2] for p in (0.0011, 0.0009)] == ["cannot tell", "holds"]


def test_the_claims_about_time_reconstruction_and_steps():
    assert [outcome(ddpm__training__seconds_per_epoch=s)[3] for s in (0.9, 4)] == ["does not hold", "holds"]
    path = "encoded__rms__" + compare.QUARTER
    assert [outcome(**{path: [e, 0.01]})[4] for e in (0.221, 0.219, 0.181, 0.179)] == FOUR
    path = "ddpm__bound__chains"
    chains = [{"1": {"bits_per_dim": bits, "error": 0.1}, "1000": {"bits_per_dim": 2.0, "error": 0.1}}
              for bits in (2.3, 2.2, 1.8, 1.7)]
    assert [outcome(**{path: each})[5] for each in chains] == FOUR


def test_one_pair_shows_sampling_noise_and_more_their_spread():
    results = equal()
    assert compare.value(results, "ddpm", "frechet") == (10.0, 1.0, "10.0 (1.0)")
    for seed, distance in (1, 12.0), (2, 14.0):
        ddpm = results["ddpm"]["samples"] | {"frechet": distance}
        results["pairs"].append({"seed": seed, "vae": results["vae"]["samples"], "ddpm": ddpm})
    mean, error, text = compare.value(results, "ddpm", "frechet")
    assert mean == 12 and error == pytest.approx(2.15 * 2 / math.sqrt(3)) and text == "12.0 ± 2.0"


# ---- all of it

FLAGS = ["--data", "synthetic", "--device", "cpu", "--epochs", "1", "--limit", "200", "--batch-size", "50", "--out"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison, for which the VAE is trained and a DDPM of two steps is found; what it said."""
    out = tmp_path_factory.mktemp("compared")
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as warned:
        ddpm.main([*FLAGS, str(out), "--T", "2"])
        compare.main([*FLAGS, str(out), "--seed", "7"])
    return out, said.getvalue(), warned.getvalue()


def read(out):
    return json.loads((out / "results.json").read_text())


def test_the_results_are_complete_and_finite(compared):
    results = read(compared[0])
    assert {"data", "device", "torch", "seed", "date", "vae", "ddpm"} <= results.keys()
    assert results["seed"] == 7 and results["torch"] == torch.__version__
    assert results["vae"]["training"]["epochs"] == 1 and results["vae"]["settings"]["limit"] == 200
    assert results["ddpm"]["settings"]["T"] == results["ddpm"]["sampling"]["evaluations"] == 2
    assert results["vae"]["samples"]["n"] == results["ddpm"]["samples"]["n"]
    assert list(results["ddpm"]["bound"]["chains"]) == ["1", "2"]
    assert 0 < results["real"]["frechet"] < min(results[m]["samples"]["frechet"] for m in ("vae", "ddpm"))
    shown = results["vae"]["reconstructions"]
    assert shown["relative_error"][0] > shown["relative_error"][1] and 0 < shown["misread"] < 1
    assert [a == b for a, b in zip(shown["digit"], shown["read_as"])] == [False, False, True]
    assert "NaN" not in (compared[0] / "results.json").read_text()


def test_every_figure_of_the_report_is_there(compared):
    out, said, _ = compared
    named = re.findall(r"\]\((.+?)\)", (out / "report.md").read_text())
    assert len(named) == len(set(named)) == 15 and all((out / name).stat().st_size > 1000 for name in named)
    assert all(claim in said and (out / figure).exists() for claim, _, _, figure in compare.claims(read(out)))


def test_synthetic_digits_are_never_taken_for_mnist(compared):
    out, _, warned = compared
    report = (out / "report.md").read_text()
    assert read(out)["data"] == "synthetic" and "SYNTHETIC" in warned.splitlines()[-1]
    assert "SYNTHETIC" in report.splitlines()[0] and "**These are SYNTHETIC digits, not MNIST.**" in report


def test_the_report_is_written_from_results_json_alone(compared, tmp_path):
    compare.write_report(read(compared[0]), tmp_path)
    assert (tmp_path / "report.md").read_text() == (compared[0] / "report.md").read_text()


def test_the_table_says_zero_where_zero_was_measured(compared):
    results = read(compared[0])
    results["real"].update(degenerate=0.0, class_distance=0.0)
    row, = [row for row in compare.sample_rows(results) if row[0] == "real digits, training"]
    columns = list(compare.METRICS)
    for key in "degenerate", "class_distance":
        assert row[1 + columns.index(key)].startswith("0.000")


def test_every_sentence_has_its_numbers(compared):
    results = read(compared[0])
    assert list(results["others"]) == ["VAE, 20-D", "autoencoder"]
    assert [len(curve) for curve in results["curves"].values()] == [1, 1, 0, 1]  # the DDPM was there before
    assert results["few_steps"]["ddpm"].keys() > {"ancestral", "DDIM"}
    assert len(results["encoded"]["rms"]) == 8 and results["encoded"]["rms"]["all black"][0] > 0.1
    assert results["floors"].keys() == {"samples", "curve", "steps"} and min(results["floors"].values()) > 0
    assert results["test"]["copies"] < 0.05 < results["real"]["copies"]


def test_a_second_comparison_trains_nothing_and_says_the_same(compared, tmp_path, monkeypatch):
    for name in "vae.pt", "ddpm.pt", "classifier.pt":
        shutil.copy(compared[0] / name, tmp_path)
    for script in vae, ddpm:
        monkeypatch.setattr(script, "draw", lambda *_: [])
    monkeypatch.setattr(compare.Figure, "savefig", lambda *_, **__: None)  # the pictures are slow and there already
    compare.main([*FLAGS, str(tmp_path), "--seed", "7"])
    first, second = read(compared[0]), read(tmp_path)
    for name in "vae", "ddpm":
        assert (tmp_path / f"{name}.pt").read_bytes() == (compared[0] / f"{name}.pt").read_bytes()
        assert first[name]["training"] == second[name]["training"]
        assert second[name]["bound"]["bits_per_dim"] == pytest.approx(first[name]["bound"]["bits_per_dim"], rel=1e-4)
        assert second[name]["samples"]["frechet"] == pytest.approx(first[name]["samples"]["frechet"], rel=1e-3)


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_a_model_of_other_data_is_refused_before_anything_is_measured(compared, tmp_path, monkeypatch, name):
    for other in "vae.pt", "ddpm.pt":
        shutil.copy(compared[0] / other, tmp_path)
    saved = common.load(tmp_path / f"{name}.pt", name)
    torch.save(saved | {"settings": saved["settings"] | {"data": "mnist"}}, tmp_path / f"{name}.pt")
    monkeypatch.setattr(compare, "train_classifier", lambda *_: pytest.fail("went on"))
    with pytest.raises(common.InputError, match=f"{name}.pt was trained on mnist, not synthetic.*--out") as error:
        compare.main([*FLAGS, str(tmp_path)])
    assert "\n" not in str(error.value) and not (tmp_path / "results.json").exists()


# ---- the benchmark

def test_the_reports_network_is_as_described():
    net = compare.ReportNet()
    widths = [1, 64, 128, 256, 512, 256, 128, 64]
    kernels = sum(49 * a * b for a, b in zip(widths, widths[1:])) + 9 * 64
    assert sum(p.numel() for p in net.parameters()) == kernels + sum(widths[1:]) + 1 + 2 * sum(widths[1:])
    assert 16.8e6 < kernels < 17e6
    x = torch.randn(2, 1, 28, 28)
    assert net(x, None).shape == x.shape


def test_work_and_time_are_counted(monkeypatch):
    a, clock = torch.randn(64, 32), [0.0]
    assert compare.flops(lambda: a.T @ a) == 2 * 32 * 64 * 32
    kernel = torch.randn(8, 4, 3, 3)
    assert compare.flops(lambda: nn.functional.conv2d(torch.ones(2, 4, 6, 6), kernel, padding=1)) == 2 * 2 * 36 * 8 * 4 * 9
    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    job = lambda: clock.__setitem__(0, clock[0] + 0.5)
    assert compare.per_call(job, torch.device("cpu"), seconds=2.0) == 0.5 and clock[0] == (2 + 4) * 0.5


@pytest.mark.parametrize("name, way, called", [
    ("vae", "", {"captured"}), ("vae", ", compiled", {"captured", "compiled"}), ("vae", ", not captured", set()),
    ("ddpm", "", {"captured", "compiled"}), ("ddpm", ", not compiled, not captured", set())])
def test_a_step_is_timed_in_each_way(tmp_path, monkeypatch, name, way, called):
    seen = set()
    for each in "compiled", "captured":
        monkeypatch.setattr(common, each, lambda f, *_, each=each: seen.add(each) or f)
    monkeypatch.setattr(common, "for_training", common.for_training)  # to have it back
    monkeypatch.setattr(compare.SCRIPTS[name], "draw", lambda *_: [])
    monkeypatch.setattr(ddpm.DDPM, "estimate_mse", lambda *_: None)  # takes long
    assert way in compare.WAYS[name]
    row, = compare.benchmark_training(name, "synthetic", "", torch.device("cpu"), str(tmp_path), way)
    history = common.load(tmp_path / f"{name}.pt", name)["history"]
    assert seen == called and row["what"] == f"training {name}.py{way}" and row["flops"] > 1e6
    assert row["setup"] == pytest.approx(2 * history[0]["seconds"] - history[1]["seconds"])
