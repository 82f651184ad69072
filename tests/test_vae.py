import contextlib
import copy
import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributions as td
from PIL import Image
from torch import nn

import common
import vae

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
D = 784


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Function(nn.Module):
    """An encoder or a decoder that is written down, in place of the network."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def random_model(**kwargs):
    """Weights large enough that q(z|x) is far from the prior and the decoder is far from linear."""
    model = vae.VAE(**kwargs).requires_grad_(False)
    for p in model.parameters():
        p.mul_(1.5)
    model.encoder[-1].bias.copy_(torch.linspace(-1.5, 1, 2 * model.latent_dim))
    return model


@pytest.fixture
def images(digits):
    """x_train, x_test: 1,100 and 600 digits in [0, 1]."""
    x_train, _, x_test, _ = common.load_data(vae.parse(["--data", "mnist", "--data-dir", str(digits)]), CPU)
    return x_train / 255, x_test / 255


def importance_bound(model, x, k):
    """log of the mean weight of k draws: between the ELBO and log p(x).  Burda et al. 2016"""
    return model.log_weights(x, k).logsumexp(0) - math.log(k)


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


# ---- the model

def test_shapes_and_ranges():
    for C, n, likelihood in (1, 5, "bernoulli"), (3, 1, "gaussian"):
        model, x = vae.VAE(n, likelihood, (C, 8, 8)), torch.rand(3, C, 8, 8)
        mu, logvar = model.encode(x)
        assert mu.shape == logvar.shape == model.reparameterize(mu, logvar).shape == (3, n)
        decoded = model.decode(2000 * torch.randn(4, 3, n))
        assert decoded.shape == (4, 3, C, 8, 8) and decoded.min() >= 0 and decoded.max() <= 1
        assert [term.shape for term in model.elbo_terms(x, 4)] == [(3,), (3,)]
        assert model.log_weights(x, 6).shape == (6, 3) and model.sample(7).shape == (7, C, 8, 8)
    with pytest.raises(ValueError, match="'poisson'"):
        vae.VAE(2, "poisson")


def test_reparameterize():
    mu, logvar = torch.tensor([[-3.0, 0.5], [-4.0, 1.0]]).requires_grad_()
    n = 100_000
    z = vae.VAE().reparameterize(mu.expand(n, 2), logvar.expand(n, 2))
    sigma = logvar.exp().sqrt()
    assert ((z.mean(0) - mu).abs() < 5 * sigma / n ** 0.5).all()  # five standard errors, here and below
    assert ((z.std(0) / sigma - 1).abs() < 5 / (2 * n) ** 0.5).all()
    grad_mu, grad_logvar = torch.autograd.grad(z.sum(), [mu, logvar])
    torch.testing.assert_close(grad_mu, torch.full((2,), float(n)))
    torch.testing.assert_close(grad_logvar, (0.5 * (z - mu)).sum(0), rtol=1e-3, atol=0.1)  # 1e5 float32
    eps = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(vae.VAE().reparameterize(mu, logvar, eps), mu + sigma * eps)


def test_sample_decodes_the_prior():
    model, seen, n = vae.VAE(3), [], 20_000
    model.decoder = Function(lambda z: seen.append(z) or z.new_zeros(len(z), D))
    model.sample(n)
    z, = seen
    assert (z.mean(0).abs() < 5 / n ** 0.5).all() and ((z.std(0) - 1).abs() < 5 / (2 * n) ** 0.5).all()
    assert (z.T.corrcoef() - torch.eye(3)).abs().max() < 5 / n ** 0.5


# ---- the estimators

@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_estimators_a_and_b_agree_and_b_is_less_noisy(likelihood, images):
    model, n = random_model(latent_dim=8, likelihood=likelihood), 4000
    for p in model.decoder.parameters():  # quieter, or the reconstruction's noise hides the KL's
        p.mul_(0.6)
    x = images[0][:1].expand(n, -1, -1, -1)
    a, (reconstruction, kl) = model.log_weights(x).mean(0), model.elbo_terms(x)
    b = reconstruction - kl
    assert kl.min() > 3 and (b < reconstruction).all()
    assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / n).sqrt()
    assert b.var() < 0.9 * a.var()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_samples_average_log_likelihoods_not_latents(likelihood, images):
    model, x, z = random_model(likelihood=likelihood), images[0][:2], 2 * torch.randn(4, 2, 2)
    mu, logvar = model.encode(x)
    flat, sigma = x.flatten(1), logvar.exp().sqrt()

    def log_likelihood(z):  # one draw for each image
        p = model.decode(z).flatten(1)
        if likelihood == "bernoulli":
            return (flat * p.log() + (1 - flat) * (1 - p).log()).sum(1)
        return td.Normal(p, model.logvar_x.exp().sqrt()).log_prob(flat).sum(1)

    each = torch.stack([log_likelihood(draw) for draw in z])
    reconstruction, kl = model.elbo_terms(x, samples=4, eps=(z - mu) / sigma)
    torch.testing.assert_close(reconstruction, each.mean(0))
    torch.testing.assert_close(kl, td.kl_divergence(td.Normal(mu, sigma), td.Normal(0.0, 1.0)).sum(1))
    assert ((reconstruction - log_likelihood(z.mean(0))).abs() > 0.1).all()  # what the slip would give
    model.reparameterize = lambda mu, logvar, eps=None: z
    log_q, log_prior = td.Normal(mu, sigma).log_prob(z).sum(-1), td.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(model.log_weights(x, 4), each + log_prior - log_q)


def test_a_decoder_that_ignores_z_has_a_known_log_p(images):
    logits, x, q = torch.randn(D), images[0][:3], torch.tensor([0.5, -1.0, 0.2, -0.7])
    model = vae.VAE(likelihood="gaussian").requires_grad_(False)
    model.encoder, model.decoder = (Function(lambda x, output=output: output.expand(*x.shape[:-1], -1))
                                    for output in (q, logits))
    log_p = td.Normal(logits.sigmoid(), math.exp(-1)).log_prob(x.flatten(1)).sum(1)  # logvar_x = -2
    kl = td.kl_divergence(td.Normal(q[:2], (q[2:] / 2).exp()), td.Normal(0.0, 1.0)).sum()
    reconstruction, actual_kl = model.elbo_terms(x)
    torch.testing.assert_close(reconstruction - actual_kl, log_p - kl)
    # the relative error of the mean weight is about 1.5 / √50000
    torch.testing.assert_close(importance_bound(model, x[:1], 50_000), log_p[:1], rtol=0, atol=0.04)


def test_the_bounds_against_log_p_integrated_on_a_grid():
    W, noise = 0.4 * torch.randn(2, D), 1.0
    decoder = Function(lambda z: torch.sin(z @ W) + 0.5 * (z @ W.flip(0)) ** 2)
    q = torch.tensor([0.3, -0.2, -1.0, -1.5])
    model = vae.VAE(likelihood="gaussian").requires_grad_(False)
    model.encoder, model.decoder = Function(lambda x: q.expand(len(x), -1)), decoder
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
    bounds = [reconstruction - kl, *(importance_bound(model, many[:n // k], k) for k in (4, 40))]
    errors = [5 * (bound.std() / len(bound) ** 0.5).item() for bound in bounds]  # five standard errors
    means = [bound.double().mean() for bound in bounds]
    assert abs(log_p - means[0] - gap) < errors[0] < gap / 3
    assert means[0] + errors[0] < means[1] < means[2] < log_p + errors[2]
    assert abs(importance_bound(model, x, 20_000) - log_p) < 0.05  # weights' spread / √20000, times five


# ---- training, on 1,030 digits: 3 epochs of 10 steps, 30 images left out of each

def flags(digits, out, *more):
    return [str(flag) for flag in ("--data-dir", digits, "--out", out, "--limit", 1030, "--batch-size", 100,
                                   "--epochs", 3, "--device", "cpu", *more)]


def train(digits, out, *more, watch=None):
    common.pick_device("cpu")
    return vae.train(vae.parse(flags(digits, out, *more)), CPU, watch)


def checkpoint(out):
    return torch.load(out / "vae.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The folder of an undisturbed run, and what the run said."""
    out = tmp_path_factory.mktemp("run") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        vae.main(flags(digits, out))
    return out, printed.getvalue()


def same(out, other):
    """Both runs ended with the same bits, but for the seconds that they took."""
    a, b = checkpoint(out), checkpoint(other)
    for row in a["history"] + b["history"]:
        del row["seconds"]
    assert a.pop("settings") == b.pop("settings") and a.pop("kind") == b.pop("kind") == "vae"
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_training_learns_and_writes_what_it_says(trained, images):
    out, said = trained
    named = said.split("wrote ")[1].split(" in ")[0].split(", ")
    assert sorted(os.listdir(out)) == sorted(["vae.pt", *named]) and len(named) == 5
    assert all(Image.open(out / name).convert("L").getextrema()[1] > 100 for name in named)
    for words in "parameters on cpu", "10 steps an epoch", "latent_dim 2", "likelihood bernoulli", "epochs 3":
        assert words in said.split("epoch 1")[0]
    settings, history = checkpoint(out)["settings"], checkpoint(out)["history"]
    assert settings == dict(data="mnist", size=None, limit=1030, seed=0, latent_dim=2, likelihood="bernoulli",
                            kl_weight=1.0, epochs=3, batch_size=100, lr=1e-3, shape=[1, 28, 28])
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert list(history[0]) == ["epoch", "train_reconstruction", "train_kl", "test_reconstruction", "test_kl",
                                "seconds"]
    assert 0 < history[0]["seconds"] < history[1]["seconds"] < history[2]["seconds"]
    elbo = [row["test_reconstruction"] - row["test_kl"] for row in history]
    untrained = vae.evaluate(vae.VAE(), (images[1] * 255).round().byte(), seed=0)
    assert untrained[0] - untrained[1] + 200 < elbo[0] < elbo[1] < elbo[2]


def test_the_history_holds_the_terms_of_the_saved_model(trained, images):
    model, x = vae.load(trained[0] / "vae.pt"), images[1]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    mu, logvar = model.encode(x)
    torch.manual_seed(0)
    z = mu + logvar.exp().sqrt() * torch.randn(1, 600, 2)[0]
    p = model.decode(z).double()
    reconstruction = (x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3)).mean().item()
    kl = td.kl_divergence(td.Normal(mu, logvar.exp().sqrt()), td.Normal(0.0, 1.0)).sum(1).mean().item()
    last = checkpoint(trained[0])["history"][-1]
    assert last["test_reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
    assert last["test_kl"] == pytest.approx(kl, rel=1e-5)


def test_evaluate_has_random_numbers_of_its_own_and_weighs_images(images):
    model, state = random_model(), torch.get_rng_state()
    x = (images[0] * 255).round().byte()  # 1,100: parts of 1,000 and 100
    _, kl = vae.evaluate(model, x, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert kl == pytest.approx(model.elbo_terms(images[0])[1].double().mean().item(), rel=1e-5)


@pytest.mark.parametrize("likelihood, kl_weight", [("bernoulli", 1), ("gaussian", 0.5)])
def test_training_is_adam_on_the_bound_with_a_decaying_rate(digits, images, tmp_path, monkeypatch, likelihood,
                                                            kl_weight):
    """Two epochs of 10 steps, again, in plain float32: the same weights to rounding."""
    monkeypatch.setattr(common, "has_bfloat16", lambda device: False)
    model, history = train(digits, tmp_path, "--seed", 3, "--epochs", 2, "--lr", 2e-3, "--latent-dim", 3,
                           "--likelihood", likelihood, "--kl-weight", kl_weight)
    torch.manual_seed(3_000_000)
    twin = vae.VAE(3, likelihood)
    start, x_train = copy.deepcopy(twin.state_dict()), images[0][:1030]
    optimizer, prior = torch.optim.Adam(twin.parameters(), lr=2e-3), td.Normal(0.0, 1.0)
    for epoch in 1, 2:
        torch.manual_seed(3_000_000 + epoch)
        order, rows = torch.randperm(1030), []  # 1,000 of them are seen
        for step in range(10):
            done = (10 * (epoch - 1) + step + 0.5) / 20
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * done)) / 2
            x = x_train[order[100 * step:100 * (step + 1)]].flatten(1)
            eps = torch.randn(1, 100, 3)[0]
            mu, logvar = twin.encoder(x)[:, :3], twin.encoder(x)[:, 3:]
            logits = twin.decoder(mu + (logvar / 2).exp() * eps)
            p = td.Bernoulli(logits=logits, validate_args=False) if likelihood == "bernoulli" else td.Normal(
                logits.sigmoid(), (twin.logvar_x / 2).exp())
            reconstruction = p.log_prob(x).sum(1).mean()
            kl = td.kl_divergence(td.Normal(mu, (logvar / 2).exp()), prior).sum(1).mean()
            twin.zero_grad()
            (kl_weight * kl - reconstruction).backward()
            optimizer.step()
            rows.append((reconstruction.item(), kl.item()))
        row = history[epoch - 1]
        assert row["train_reconstruction"] == pytest.approx(sum(r for r, _ in rows) / 10, rel=1e-4)
        assert row["train_kl"] == pytest.approx(sum(k for _, k in rows) / 10, rel=1e-3)
    for name, value in twin.state_dict().items():
        assert (model.state_dict()[name] - value).norm() < 5e-3 * (value - start[name]).norm(), name
    assert len(history) == 2 and not model.training


def test_a_batch_is_at_most_the_data_and_watch_adds_to_the_history(digits, tmp_path):
    _, history = train(digits, tmp_path, "--limit", 50, "--batch-size", 999, "--epochs", 2,
                       watch=lambda model, epoch: {"n": 10 * epoch})
    assert [row["n"] for row in history] == [10, 20] and checkpoint(tmp_path)["history"] == history
    assert checkpoint(tmp_path)["optimizer"]["state"][0]["step"] == 2  # one step an epoch, of 50 images


def test_the_defaults_are_the_reports(digits, tmp_path):
    args = vae.parse(["--data-dir", str(digits), "--out", str(tmp_path), "--limit", "1"])
    with pytest.raises(ZeroDivisionError):
        vae.train(args, CPU, watch=lambda model, epoch: 1 / 0)
    assert (args.latent_dim, args.likelihood, args.kl_weight) == (2, "bernoulli", 1)
    assert (args.data, args.lr, args.epochs, args.batch_size, args.seed) == ("mnist", 1e-3, 30, 256, 0)
    assert [layer.out_features for layer in vae.VAE().encoder[::2]] == [512, 256, 4]


def test_sample_draws_from_the_checkpoint(trained, tmp_path, monkeypatch):
    shutil.copy(trained[0] / "vae.pt", tmp_path)
    model, drawn = vae.load(tmp_path / "vae.pt"), []
    monkeypatch.setattr(common, "plot_grid", lambda x, path, title: drawn.append(x) or path.touch())
    for seed, more in (0, []), (1, ["--seed", "1"]):
        vae.main(["--out", str(tmp_path), "--device", "cpu", "--sample", "5", *more])
        torch.manual_seed(seed)
        assert torch.equal(drawn.pop(), model.sample(5))
    assert sorted(os.listdir(tmp_path)) == ["vae.pt", "vae_sample.png"]


def test_the_pictures_show_what_they_say(trained, digits, images, tmp_path, monkeypatch):
    shown, model, history = {}, vae.load(trained[0] / "vae.pt"), checkpoint(trained[0])["history"]
    for name in "plot_grid", "plot_rows", "plot_curves", "plot_latent", "plot_manifold":
        monkeypatch.setattr(common, name, lambda *given, name=name: shown.update({name: given}))
    args = vae.parse(flags(digits, tmp_path, "--data", "mnist", "--seed", 0))
    vae.draw(model, history, args, CPU)
    _, _, _, labels = common.load_data(args, CPU)
    x, (mu, _) = images[1], model.encode(images[1])
    torch.testing.assert_close(shown["plot_latent"][:2], (mu, labels))
    torch.testing.assert_close(list(shown["plot_rows"][0].values()), [x[:12], model.decode(mu[:12])])
    torch.testing.assert_close(shown["plot_manifold"][0], model.decode(common.equal_mass_grid(20)))
    epochs, curves, *_ = shown["plot_curves"]
    assert epochs == [1, 2, 3] and curves["KL, train"] == [row["train_kl"] for row in history]
    assert curves["-reconstruction, test"] == [-row["test_reconstruction"] for row in history]


# ---- stopped and gone on

def test_a_stopped_run_goes_on_to_the_same_bits_and_a_finished_one_only_draws(trained, digits, tmp_path):
    def stop(model, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return {}
    with pytest.raises(KeyboardInterrupt):
        train(digits, tmp_path, watch=stop)
    saved = checkpoint(tmp_path)
    assert len(saved["history"]) == 1 and os.listdir(tmp_path) == ["vae.pt"]
    saved["history"][0]["seconds"] = 1000.0
    torch.save(saved, tmp_path / "vae.pt")
    vae.train(vae.parse(["--resume", "--out", str(tmp_path), "--data-dir", str(digits)]), CPU)
    same(trained[0], tmp_path)
    assert 1000 < checkpoint(tmp_path)["history"][1]["seconds"] < 1100  # goes on, too
    before = (tmp_path / "vae.pt").read_bytes()
    vae.main(flags(digits, tmp_path, "--resume", "--kl-weight", 1))  # equal flags pass
    assert (tmp_path / "vae.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(trained[0]))


# ---- what cannot be done

def refused(capsys, argv, *words):
    """`python vae.py` with argv ends with one line that has all the words, and a code that is not 0."""
    with pytest.raises(SystemExit) as stop:
        vae.main([str(arg) for arg in argv])
    message = str(stop.value) if isinstance(stop.value, common.InputError) else capsys.readouterr().err
    assert message.startswith("error: ") and "\n" not in message.strip() and stop.value.code != 0
    for word in words:
        assert str(word) in message


def test_bad_values_are_one_line_and_nothing_is_written(tmp_path, capsys):
    for wrong in ("--latent-dim=0", "--latent-dim=1000000000", "--kl-weight=-1", "--kl-weight=nan", "--T=5",
                  "--likelihood=poisson", "--sample=0", "--size=32", "--data=cifar", "--device=tpu"):
        refused(capsys, ["--out", tmp_path / "out", wrong], wrong.split("=")[0].strip("-"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_no_checkpoint_is_one_line_on_stderr_of_the_program(tmp_path, capsys):
    refused(capsys, ["--out", tmp_path, "--resume"], "no checkpoint", tmp_path / "vae.pt")
    result = subprocess.run([sys.executable, str(REPO / "vae.py"), "--out", str(tmp_path), "--sample", "1"],
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert f"no checkpoint {tmp_path / 'vae.pt'}" in result.stderr and os.listdir(tmp_path) == []


def test_an_earlier_or_a_foreign_run_is_neither_mixed_up_nor_overwritten(trained, digits, tmp_path, capsys):
    path = tmp_path / "vae.pt"
    shutil.copy(trained[0] / "vae.pt", path)
    refused(capsys, flags(digits, tmp_path), path, "--resume", "delete", "--out")
    for flag, value, words in (("--latent-dim", 3, "latent_dim 2, not 3"),
                               ("--likelihood", "gaussian", "likelihood bernoulli, not gaussian"),
                               ("--kl-weight", 2, "kl_weight 1.0, not 2.0")):
        refused(capsys, flags(digits, tmp_path, "--resume", flag, value), path, words)
    assert path.read_bytes() == (trained[0] / "vae.pt").read_bytes() and os.listdir(tmp_path) == ["vae.pt"]
    for change, more, words in (({"kind": "ddpm"}, "--resume", "holds a ddpm, not a vae"),
                                ({"kind": "ddpm"}, "--sample=1", "holds a ddpm, not a vae"),
                                ({"optimizer": {}}, "--resume", "cannot be resumed"),
                                ({"model": {}}, "--sample=1", "is of another version")):
        torch.save(checkpoint(trained[0]) | change, path)
        before = path.read_bytes()
        refused(capsys, ["--data-dir", digits, "--out", tmp_path, more], path, words)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["vae.pt"]


def test_a_diverging_run_ends_before_it_is_saved(digits, tmp_path, monkeypatch, capsys):
    calls = []

    def average(tensors):
        calls.append(1)
        for tensor in tensors if len(calls) == 10 else ():  # the last step of the first epoch
            tensor.fill_(math.inf)
    monkeypatch.setattr(common, "average", average)
    refused(capsys, flags(digits, tmp_path), "not finite in epoch 1 with --lr 0.001", "nothing is saved")
    assert os.listdir(tmp_path) == []
