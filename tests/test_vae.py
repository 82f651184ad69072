import contextlib
import functools
import io
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as td
from torch import nn

import common
import vae

REPO = Path(__file__).resolve().parent.parent
D = 784


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, also in the processes below
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Function(nn.Module):
    """An encoder or a decoder that is written down, in place of the network."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def constant(output):
    return Function(lambda x: output.expand(*x.shape[:-1], -1))


def model_with(encoder=None, decoder=None, **kwargs):
    model = vae.VAE(**kwargs)
    model.encoder, model.decoder = encoder or model.encoder, decoder or model.decoder
    return model.requires_grad_(False)


def random_model(**kwargs):
    """Weights large enough that q(z|x) is far from the prior and the decoder is far from linear."""
    model = vae.VAE(**kwargs).requires_grad_(False)
    for p in model.parameters():
        p.mul_(1.5)
    model.encoder[-1].bias.copy_(torch.linspace(-1.5, 1, 2 * model.latent_dim))
    return model


def pictures(n):
    return common.synthetic_digits(n, seed=5)[0] / 255


# ---- the terms of the bound

def test_log_normal():
    x, mu, logvar = 2 * torch.randn(3, 5, 4, 20).double()
    expected = td.Independent(td.Normal(mu, logvar.exp().sqrt()), 1).log_prob(x)
    torch.testing.assert_close(vae.log_normal(x, mu, logvar), expected)
    zero = torch.zeros(2)
    assert vae.log_normal(zero, zero, zero).item() == pytest.approx(-1.8378771)  # -ln 2π


def test_kl_to_prior():
    mu, logvar = 2 * torch.randn(2, 5, 20).double()
    q, prior = td.Normal(mu, logvar.exp().sqrt()), td.Normal(0.0, 1.0)
    torch.testing.assert_close(vae.kl_to_prior(mu, logvar), td.kl_divergence(q, prior).sum(-1))
    assert vae.kl_to_prior(torch.zeros(1, 20), torch.zeros(1, 20)).item() == 0


def test_log_bernoulli():
    x, p = torch.rand(5, D).round().double(), torch.rand(5, D).double()
    torch.testing.assert_close(vae.log_bernoulli(x, p.logit()), td.Bernoulli(probs=p).log_prob(x).sum(-1))
    gray = torch.rand(5, D).double()
    torch.testing.assert_close(vae.log_bernoulli(gray, p.logit()),
                               (gray * p.log() + (1 - gray) * (1 - p).log()).sum(-1))
    x, logits = torch.tensor([[1.0], [0], [1], [0]]), torch.tensor([[1e4], [-1e4], [-1e4], [1e4]])
    assert vae.log_bernoulli(x, logits).tolist() == [0, 0, -1e4, -1e4]  # no infinity, no NaN
    assert vae.log_bernoulli(torch.ones(3, D), torch.zeros(7, 3, D)).shape == (7, 3)


LEVELS = torch.arange(256).view(256, 1) / 255


@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.02, 0.3, 3])
@pytest.mark.parametrize("mean", [-0.5, 0, 0.5 / 255, 0.1, 0.5, 0.9999, 1, 1.5])
def test_discretized_normal_is_a_distribution(mean, sigma):
    mean = torch.full((256, 1), float(mean), requires_grad=True)
    log_p = vae.log_discretized_normal(LEVELS, mean, sigma)
    assert log_p.isfinite().all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)  # float64 inside, however narrow
    log_p.sum().backward()
    assert mean.grad.isfinite().all()


def test_discretized_normal_is_the_mass_of_half_a_level_around():
    mean, half = 0.43, 0.5 / 255
    for sigma in 0.05, 0.3:
        normal = td.Normal(torch.tensor(mean).double(), sigma)
        mass = normal.cdf(LEVELS.double() + half) - normal.cdf(LEVELS.double() - half)
        mass[0], mass[-1] = normal.cdf(torch.tensor(half)), 1 - normal.cdf(torch.tensor(1 - half))
        actual = vae.log_discretized_normal(LEVELS, torch.full((256, 1), mean), sigma).exp()
        torch.testing.assert_close(actual, mass.squeeze(1), rtol=0, atol=1e-8)  # the levels come in float32
    two = vae.log_discretized_normal(LEVELS[[100, 150]].T, torch.full((1, 2), mean), 0.3)
    torch.testing.assert_close(two.exp(), (mass[100] * mass[150]), rtol=1e-6, atol=0)


# ---- the model

def test_shapes_and_ranges():
    x = pictures(3)
    for kwargs in {"latent_dim": 5}, {"latent_dim": 1, "likelihood": "gaussian"}:
        model = random_model(**kwargs)
        mu, logvar = model.encode(x)
        assert mu.shape == logvar.shape == (3, kwargs["latent_dim"])
        assert model.reparameterize(mu, logvar).shape == mu.shape
        images = model.decode(20 * torch.randn(4, 3, kwargs["latent_dim"]))
        assert images.shape == (4, 3, 1, 28, 28) and images.min() >= 0 and images.max() <= 1
        for term in *model.elbo_terms(x), *model.elbo_terms(x, 4, sigma=0.1), model.elbo_a(x, 4):
            assert term.shape == (3,) and term.isfinite().all()
        assert model.log_weights(x, 6).shape == (6, 3) and model.importance_bound(x, 6).shape == (3,)
        assert model.sample(7).shape == (7, 1, 28, 28)
    with pytest.raises(ValueError, match="'poisson'"):
        vae.VAE(2, "poisson")


def test_reparameterize():
    mu, logvar = torch.tensor([-3.0, 0.5]), torch.tensor([-4.0, 1.0])
    mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
    n = 100_000
    z = vae.VAE().reparameterize(mu.expand(n, 2), logvar.expand(n, 2))
    sigma = logvar.exp().sqrt()
    assert ((z.mean(0) - mu).abs() < 5 * sigma / n ** 0.5).all()  # five standard errors, here and below
    assert ((z.std(0) / sigma - 1).abs() < 5 / (2 * n) ** 0.5).all()
    grad_mu, grad_logvar = torch.autograd.grad(z.sum(), [mu, logvar])
    torch.testing.assert_close(grad_mu, torch.full((2,), float(n)))
    torch.testing.assert_close(grad_logvar, (0.5 * (z - mu)).sum(0), rtol=1e-3, atol=0.1)  # sums of 1e5 float32


def test_sample_decodes_the_prior():
    model, seen = model_with(latent_dim=3), []
    model.decoder = Function(lambda z: seen.append(z) or z.new_zeros(len(z), D))
    n = 20_000
    model.sample(n)
    z = seen[0]
    assert (z.mean(0).abs() < 5 / n ** 0.5).all() and ((z.std(0) - 1).abs() < 5 / (2 * n) ** 0.5).all()
    assert (z.T.corrcoef() - torch.eye(3)).abs().max() < 5 / n ** 0.5
    model = random_model()
    torch.manual_seed(3)
    first = model.sample(4)
    torch.manual_seed(3)
    assert torch.equal(model.sample(4), first) and not torch.equal(model.sample(4), first)


# ---- the estimators

@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_estimators_a_and_b_agree_and_b_is_less_noisy(likelihood):
    model, n = random_model(latent_dim=8, likelihood=likelihood), 4000
    for p in model.decoder.parameters():  # quieter, or the reconstruction's noise hides the KL's
        p.mul_(0.6)
    x = pictures(1).expand(n, -1, -1, -1)
    a, (reconstruction, kl) = model.elbo_a(x), model.elbo_terms(x)
    b = reconstruction - kl
    assert kl.min() > 3 and (b < reconstruction).all()
    assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / n).sqrt()
    assert b.var() < 0.9 * a.var()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_samples_average_log_likelihoods_not_latents(likelihood):
    model, x, z = random_model(likelihood=likelihood), pictures(2), 2 * torch.randn(4, 2, 2)
    model.reparameterize = lambda mu, logvar, eps=None: z
    flat = x.flatten(1)

    def log_likelihood(z):  # one draw for each image
        p = model.decode(z).flatten(1)
        if likelihood == "bernoulli":
            return (flat * p.log() + (1 - flat) * (1 - p).log()).sum(1)
        return td.Normal(p, model.logvar_x.exp().sqrt()).log_prob(flat).sum(1)

    reconstruction, kl = model.elbo_terms(x, samples=4)
    torch.testing.assert_close(reconstruction, sum(log_likelihood(draw) for draw in z) / 4)
    assert ((reconstruction - log_likelihood(z.mean(0))).abs() > 0.1).all()  # what the slip would give
    mu, logvar = model.encode(x)
    log_q = td.Normal(mu, logvar.exp().sqrt()).log_prob(z).sum(-1)
    log_prior = td.Normal(0.0, 1.0).log_prob(z).sum(-1)
    weights = torch.stack([log_likelihood(draw) for draw in z]) + log_prior - log_q
    torch.testing.assert_close(model.log_weights(x, 4), weights)
    torch.testing.assert_close(model.elbo_a(x, 4), weights.mean(0))
    largest = weights.max(0).values
    torch.testing.assert_close(model.importance_bound(x, 4), (weights - largest).exp().mean(0).log() + largest)


def test_a_decoder_that_ignores_z_has_a_known_log_p():
    logits, x, q = torch.randn(D), pictures(3), torch.tensor([0.5, -1.0, 0.2, -0.7])
    model = model_with(constant(q), constant(logits), likelihood="gaussian")
    log_p = td.Normal(logits.sigmoid(), math.exp(-1)).log_prob(x.flatten(1)).sum(1)  # logvar_x = -2
    kl = td.kl_divergence(td.Normal(q[:2], (q[2:] / 2).exp()), td.Normal(0.0, 1.0)).sum()
    reconstruction, actual_kl = model.elbo_terms(x)
    torch.testing.assert_close(reconstruction - actual_kl, log_p - kl)
    # the relative error of the mean weight is about 1.5 / √50000
    torch.testing.assert_close(model.importance_bound(x[:1], 50_000), log_p[:1], rtol=0, atol=0.04)


def test_the_bounds_against_log_p_integrated_on_a_grid():
    W, noise = 0.4 * torch.randn(2, D), 1.0
    decoder = Function(lambda z: torch.sin(z @ W) + 0.5 * (z @ W.flip(0)) ** 2)
    q = torch.tensor([0.3, -0.2, -1.0, -1.5])
    model = model_with(constant(q), decoder, likelihood="gaussian")
    model.logvar_x.fill_(2 * math.log(noise))
    x = model.decode(torch.tensor([[0.5, 0.1]])) + noise * torch.randn(1, 1, 28, 28)

    axis = torch.linspace(-6, 6, 121)  # steps of 0.1, a third of the narrowest scale: the sum is the integral
    z = torch.cartesian_prod(axis, axis)
    density = td.Normal(decoder(z).sigmoid().double(), noise)
    log_joint = density.log_prob(x.flatten()).sum(1) + td.Normal(0.0, 1.0).log_prob(z).sum(1)
    log_p = log_joint.logsumexp(0) + 2 * math.log(0.1)
    log_q = td.Normal(q[:2], (q[2:] / 2).exp()).log_prob(z).sum(1).double()
    gap = (log_q.exp() * (log_q - (log_joint - log_p))).sum() * 0.1 ** 2  # KL(q(z|x) || p(z|x))
    assert 0.1 < gap < 3

    n = 10_000
    many = x.expand(n, -1, -1, -1)
    reconstruction, kl = model.elbo_terms(many)
    bounds = [reconstruction - kl, *(model.importance_bound(many[:n // k], k) for k in (4, 40))]
    errors = [5 * (bound.std() / len(bound) ** 0.5).item() for bound in bounds]  # five standard errors
    means = [bound.double().mean() for bound in bounds]
    assert abs(log_p - means[0] - gap) < errors[0] < gap / 3
    assert means[0] + errors[0] < means[1] < means[2] < log_p + errors[2]
    assert abs(model.importance_bound(x, 20_000) - log_p) < 0.05  # weights' spread / √20000, times five


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.27])
def test_fit_sigma(sigma):
    logits = torch.linspace(-4, 4, D)  # means from black to white: clipped noise counts as it should
    model = model_with(decoder=constant(logits))
    x = logits.sigmoid().view(1, 28, 28) + sigma * torch.randn(100, 1, 28, 28)
    x = (x.clamp(0, 1) * 255).round() / 255
    assert model.fit_sigma(x) == pytest.approx(sigma, rel=0.065)  # half a step of the search


# ---- training

@functools.lru_cache
def digits():
    return *common.synthetic_digits(1100, seed=0), *common.synthetic_digits(1200, seed=1)


def train(out, *flags):
    """python vae.py in this process, on few digits: 3 epochs of 11 steps, the last one with 30 images."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(common, "_load", lambda name, root: digits())
        if "--draw" not in flags:
            patch.setattr(vae, "draw", lambda *_: [])
        vae.main(["--data", "synthetic", "--limit", "1030", "--batch-size", "100", "--epochs", "3", "--device", "cpu",
                  "--out", str(out), *(flag for flag in flags if flag != "--draw")])
    return printed.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an undisturbed run, and what the run said."""
    out = tmp_path_factory.mktemp("trained")
    return out, train(out, "--draw")


def same(out, other):
    """Both runs ended with the same bits: weights, optimizer, history."""
    a, b = (common.load(folder / "vae.pt", "vae") for folder in (out, other))
    for row in a["history"] + b["history"]:
        row.pop("seconds")
    assert a["history"] == b["history"] and a["epoch"] == b["epoch"] and torch.equal(a["rng"], b["rng"])
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name])
    for number, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][number][name]) for name, value in state.items())


def test_training_learns_and_writes_what_it_says(trained):
    out, said = trained
    named = said.split("wrote ")[1].split(" in ")[0].split(", ")
    assert sorted(os.listdir(out)) == sorted(named) and len(named) == 6 and "1,030 images" in said
    history = common.load(out / "vae.pt", "vae")["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    elbo = [row["test_reconstruction"] - row["test_kl"] for row in history]
    untrained = vae.evaluate(vae.VAE(), digits()[2], seed=0)
    assert untrained[0] - untrained[1] + 200 < elbo[0] < elbo[1] < elbo[2]
    assert history[0]["train_reconstruction"] < history[2]["train_reconstruction"] < -100


def test_the_history_holds_the_terms_of_the_saved_model(trained):
    model, x = vae.load(trained[0] / "vae.pt"), digits()[2] / 255
    assert not model.training and model.sample(3).shape == (3, 1, 28, 28)
    mu, logvar = model.encode(x)
    torch.manual_seed(0)
    z = torch.cat([model.reparameterize(*part) for part in zip(mu.split(1000), logvar.split(1000))])
    p = model.decode(z).double()
    reconstruction = (x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3)).mean().item()
    kl = td.kl_divergence(td.Normal(mu, logvar.exp().sqrt()), td.Normal(0.0, 1.0)).sum(1).mean().item()
    last = common.load(trained[0] / "vae.pt", "vae")["history"][-1]
    assert last["test_reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
    assert last["test_kl"] == pytest.approx(kl, rel=1e-5)


def test_evaluate_has_random_numbers_of_its_own():
    model, state = random_model(), torch.get_rng_state()
    first = vae.evaluate(model, digits()[2], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert vae.evaluate(model, digits()[2], seed=1) == first != vae.evaluate(model, digits()[2], seed=2)


def test_epoch_means_weigh_images_not_batches(tmp_path):
    args = Namespace(epochs=1, batch_size=2, resume=False, overwrite=False, data="none", lr=1)
    model = nn.Linear(1, 1)
    run = common.Run(tmp_path / "vae.pt", args, ["data", "lr"], 5, ["a", "b"], torch.device("cpu"), model=model)
    for _ in run.epochs():
        for (_, batch), value in zip(run.batches(), [1.0, 2.0, 6.0]):
            run.log(torch.tensor(value), torch.tensor(-value))
        run.end_epoch(more=3)
    assert run.history[0]["a"] == (2 * 1 + 2 * 2 + 6) / 5 == -run.history[0]["b"]
    assert run.history[0]["more"] == 3


def test_without_the_kl_in_the_loss_it_grows(trained, tmp_path):
    train(tmp_path, "--kl-weight", "0")
    with_kl, without = (common.load(out / "vae.pt", "vae")["history"][-1] for out in (trained[0], tmp_path))
    assert without["test_kl"] > 2 * with_kl["test_kl"] and without["train_kl"] > with_kl["train_kl"]


def test_sample_draws_from_the_checkpoint(trained, tmp_path):
    shutil.copy(trained[0] / "vae.pt", tmp_path)
    train(tmp_path, "--sample", "5")
    assert sorted(os.listdir(tmp_path)) == ["vae.pt", "vae_sample.png"]


# ---- stopped and gone on

def test_a_captured_step_trains_to_the_same_bits(trained, tmp_path, monkeypatch, cuda_graphs):
    capture = common.captured
    monkeypatch.setattr(common, "captured", lambda step, device: capture(step, torch.device("cuda")))
    train(tmp_path)
    same(trained[0], tmp_path)
    assert len(cuda_graphs) == 1 and len(cuda_graphs[0].kernels) > 30


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_step_takes_nothing_from_the_host(on_device, likelihood):
    model = vae.VAE(2, likelihood).to("meta")
    x, eps = torch.rand(8, 1, 28, 28, device="meta"), torch.randn(8, 2, device="meta")
    with on_device():
        reconstruction, kl = model.elbo_terms(x, eps=eps)
        (kl - reconstruction).mean().backward()


@pytest.mark.parametrize("step", [6, 21])  # 21: before the last, smaller batch of an epoch
def test_resumed_a_captured_step_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch, cuda_graphs, step):
    capture, log, steps = common.captured, common.Run.log, []

    def stop(self, *values):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, *values)
    monkeypatch.setattr(common, "captured", lambda step, device: capture(step, torch.device("cuda")))
    monkeypatch.setattr(common.Run, "log", stop)
    with pytest.raises(SystemExit):
        train(tmp_path)
    train(tmp_path, "--resume")
    same(trained[0], tmp_path)
    assert len(cuda_graphs) == 2


def at_step(patch, number, action):
    """Call `action` in training step `number`, counted over the epochs from 1, with its two terms."""
    elbo_terms, steps = vae.VAE.elbo_terms, []

    def patched(self, x, **noise):
        terms = elbo_terms(self, x, **noise)
        steps.extend([1] * torch.is_grad_enabled())
        return action(*terms) if torch.is_grad_enabled() and len(steps) == number else terms
    patch.setattr(vae.VAE, "elbo_terms", patched)


@pytest.mark.parametrize("step, number", [(1, signal.SIGINT), (16, signal.SIGTERM), (33, signal.SIGINT)])
def test_stopped_at_any_step_it_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch, capsys, step, number):
    def stop(*terms):
        os.kill(os.getpid(), number)
        return terms
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, step, stop)
        train(tmp_path)
    assert stopped.value.code == 128 + number and "--resume" in capsys.readouterr().err
    saved = common.load(tmp_path / "vae.pt", "vae")
    assert (saved["epoch"], saved["step"]) == ((step - 1) // 11, (step - 1) % 11 + 1)
    train(tmp_path, "--resume")
    same(tmp_path, trained[0])
    before = (tmp_path / "vae.pt").read_bytes()
    train(tmp_path, "--resume")  # nothing is left to do
    assert (tmp_path / "vae.pt").read_bytes() == before


def test_killed_and_stopped_programs_go_on_to_the_same_bits(tmp_path, monkeypatch):
    """Four times in one run, at a random moment; a fifth one ends it. SIGKILL goes back to the last epoch."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = common.synthetic_digits(1000, seed=0)
    for name, shape in common.MNIST_SHAPES.items():  # full-sized files are read far faster than drawn
        header = np.array([0x0800 + len(shape), *shape], dtype=">u4").tobytes()
        content = (pixels if len(shape) == 3 else labels.byte()).numpy().tobytes()
        (raw / name).write_bytes(header + content * (shape[0] // 1000))
    flags = ["--data", "mnist", "--data-dir", str(tmp_path), "--limit", "1200", "--batch-size", "40",
             "--epochs", "6", "--device", "cpu", "--out"]
    monkeypatch.setattr(vae, "draw", lambda *_: [])
    started = time.perf_counter()
    vae.main([*flags, str(tmp_path / "whole")])
    whole = time.perf_counter() - started

    out, log = str(tmp_path / "parts"), tmp_path / "log"
    for number in signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL:
        with open(log, "w") as stderr:
            process = subprocess.Popen([sys.executable, "vae.py", *flags, out, "--resume"], cwd=REPO, stderr=stderr,
                                       stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while "%|" not in log.read_text() and process.poll() is None:  # the progress bar: it trains
            time.sleep(0.01)
        time.sleep(random.uniform(0, whole / 8))
        process.send_signal(number)
        code = process.wait(60)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 128 + number and "--resume" in log.read_text() and "Traceback" not in log.read_text()
    vae.main([*flags, out, "--resume"])
    same(Path(out), tmp_path / "whole")


# ---- what cannot be done

def refused(call, *words):
    """The call raises an InputError of one line, or ends by SystemExit(2), and the message has all the words."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises((common.InputError, SystemExit)) as error:
        call()
    message = err.getvalue() if error.type is SystemExit else str(error.value)
    assert error.type is common.InputError or error.value.code == 2
    assert "\n" not in message.strip() and "%|" not in message
    for word in words:
        assert str(word) in message


@pytest.mark.parametrize("flag, values", [
    ("--epochs", "0 -1 x nan 1.5"), ("--batch-size", "0 -1 60001"), ("--lr", "0 nan inf -1 2"),
    ("--latent-dim", "0 -1 1000000000"), ("--limit", "0 60001"), ("--sample", "0 -3"), ("--kl-weight", "-1 nan inf"),
    ("--likelihood", "poisson"), ("--data", "cifar"), ("--seed", "-1"), ("--device", "tpu cuda:99")])
def test_bad_values_are_named_and_nothing_is_written(tmp_path, flag, values):
    for value in values.split():
        refused(lambda: train(tmp_path / "out", f"{flag}={value}"), flag.strip("-"), value)
    assert not os.listdir(tmp_path)


def test_sample_without_a_checkpoint(tmp_path):
    refused(lambda: train(tmp_path, "--sample", "1"), tmp_path / "vae.pt", "no checkpoint")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("flag, value, name", [
    ("--latent-dim", "3", "latent_dim 2, not 3"), ("--lr", "0.002", "lr 0.001, not 0.002"),
    ("--likelihood", "gaussian", "likelihood bernoulli, not gaussian"), ("--seed", "1", "seed 0, not 1"),
    ("--kl-weight", "2", "kl_weight 1.0, not 2.0"), ("--limit", "1000", "limit 1030, not 1000"),
    ("--epochs", "4", "epochs 3, not 4: a run cannot be extended"), ("--batch-size", "99", "batch_size 100, not 99")])
def test_resume_with_other_settings_names_the_difference(trained, tmp_path, flag, value, name):
    shutil.copy(trained[0] / "vae.pt", tmp_path)
    refused(lambda: train(tmp_path, "--resume", flag, value), tmp_path / "vae.pt", name)
    assert (tmp_path / "vae.pt").read_bytes() == (trained[0] / "vae.pt").read_bytes()


def test_a_checkpoint_is_replaced_only_on_demand(trained, tmp_path):
    shutil.copy(trained[0] / "vae.pt", tmp_path)
    refused(lambda: train(tmp_path), tmp_path / "vae.pt", "--resume", "--overwrite")
    assert (tmp_path / "vae.pt").read_bytes() == (trained[0] / "vae.pt").read_bytes()
    train(tmp_path, "--overwrite", "--epochs", "1")
    assert common.load(tmp_path / "vae.pt", "vae")["epoch"] == 1


@pytest.mark.parametrize("change, words", [
    (lambda whole: whole[:-100], "damaged"), (lambda whole: b"", "damaged"), (lambda whole: whole[:0:-1], "damaged"),
    ({"kind": "ddpm"}, "holds a ddpm, not a vae"), ({"model": {}}, "another version"),
    ({"settings": None}, "another version")])
def test_foreign_and_damaged_checkpoints(trained, tmp_path, change, words):
    path = tmp_path / "vae.pt"
    if isinstance(change, dict):
        torch.save(common.load(trained[0] / "vae.pt", "vae") | change, path)
    else:
        path.write_bytes(change((trained[0] / "vae.pt").read_bytes()))
    content = path.read_bytes()
    for flags in ["--resume"], ["--sample", "1"]:
        refused(lambda: train(tmp_path, *flags), path, words)
    refused(lambda: train(tmp_path), path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["vae.pt"]


def test_a_checkpoint_of_an_older_layout(trained, tmp_path):
    whole = common.load(trained[0] / "vae.pt", "vae")
    without_seed = {name: value for name, value in whole["settings"].items() if name != "seed"}
    without_optimizer = {name: value for name, value in whole.items() if name != "optimizer"}
    for older in whole | {"settings": without_seed}, without_optimizer:
        torch.save(older, tmp_path / "vae.pt")
        refused(lambda: train(tmp_path, "--resume"), tmp_path / "vae.pt", "another version", "--overwrite")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")])
def test_out_of_memory_in_the_loop_names_the_batch_size(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error
    at_step(monkeypatch, 14, fail)
    refused(lambda: train(tmp_path), "--batch-size 100", "lower")
    assert common.load(tmp_path / "vae.pt", "vae")["epoch"] == 1


@pytest.mark.parametrize("step, words", [(14, ["step 4", "epoch 2"]), (22, ["epoch 2"])])  # 22: its last
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, step, words):
    def diverge(reconstruction, kl):  # a gradient that is too much: the step's loss is finite, the next is not
        reconstruction.register_hook(lambda grad: grad * math.inf)
        return reconstruction, kl
    with monkeypatch.context() as patch:
        at_step(patch, step, diverge)
        refused(lambda: train(tmp_path), *words, "--lr 0.001", "finite", tmp_path / "vae.pt")
    saved = common.load(tmp_path / "vae.pt", "vae")
    assert saved["epoch"] == 1 and all(weight.isfinite().all() for weight in saved["model"].values())


def test_ctrl_c_right_after_a_diverging_step_saves_no_broken_weights(tmp_path, monkeypatch):
    def diverge(reconstruction, kl):
        os.kill(os.getpid(), signal.SIGINT)
        reconstruction.register_hook(lambda grad: grad * math.inf)
        return reconstruction, kl
    at_step(monkeypatch, 14, diverge)
    refused(lambda: train(tmp_path), "step 3 of epoch 2", "--lr 0.001", "weights", tmp_path / "vae.pt")
    saved = common.load(tmp_path / "vae.pt", "vae")
    assert (saved["epoch"], saved["step"]) == (1, 0)
