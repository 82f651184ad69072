"""vae.py: its math against torch.distributions and integrals, its training, stopped runs."""

import copy
import filecmp
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributions as td
from torch import nn
from torch.testing import assert_close

import common
import vae

SCRIPT = Path(__file__).resolve().parent.parent / "vae.py"
CPU = torch.device("cpu")
D = 784
PRIOR = td.Normal(0.0, 1.0)
BOTH = pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def module(function):
    """An encoder or a decoder given as a function, in place of the network."""
    written = nn.Module()
    written.forward = function
    return written


def random_model(**options):
    """A VAE whose q(z|x) is far from p(z)."""
    model = vae.VAE(**options).requires_grad_(False)
    for p in model.encoder.parameters():
        p.mul_(1.5)
    model.encoder[-1].bias.copy_(torch.linspace(-1.5, 1, 2 * model.latent_dim))
    return model


@pytest.fixture
def data(digits):
    """x_train, x_test, y_test of 1,100 and 600 digits, x in [0, 1]."""
    settings = Namespace(data="mnist", size=32, limit=None, seed=0)
    where = Namespace(data_dir=str(digits), out="")
    x_train, _, x_test, y_test = common.load_data(settings, where, CPU)
    return x_train / 255, x_test / 255, y_test


def normal(mu, logvar):
    return td.Normal(mu, logvar.exp().sqrt())


def p_x(mean, model):
    """p(x|z) with this mean."""
    if model.likelihood == "gaussian":
        return normal(mean, model.logvar_x)
    return td.Bernoulli(mean, validate_args=False)  # x is gray


def kl_from_prior(q):
    return td.kl_divergence(q, PRIOR).sum(-1)


# ---- the terms of the bound


def test_log_normal():
    x, mu, logvar = 2 * torch.randn(3, 5, 4, 20).double()
    expected = normal(mu, logvar).log_prob(x).sum(-1)
    assert_close(vae.log_normal(x, mu, logvar), expected)


def test_kl_to_prior():
    mu, logvar = 2 * torch.randn(2, 5, 20).double()
    assert_close(vae.kl_to_prior(mu, logvar), kl_from_prior(normal(mu, logvar)))


def test_log_bernoulli():
    p, gray = torch.rand(2, 5, D).double()
    expected = td.Bernoulli(p).log_prob(gray.round()).sum(-1)
    assert_close(vae.log_bernoulli(gray.round(), p.logit()), expected)
    expected = (gray * p.log() + (1 - gray) * (1 - p).log()).sum(-1)
    assert_close(vae.log_bernoulli(gray, p.logit()), expected)
    x = torch.tensor([[1.0], [0], [1]])
    extreme = torch.tensor([[1e4], [-1e4], [-1e4]])
    assert vae.log_bernoulli(x, extreme).tolist() == [0, 0, -1e4]  # no infinity, no nan


# ---- the model


@pytest.mark.parametrize("network", vae.NETWORKS)
@BOTH
def test_shapes_and_ranges(likelihood, network):
    model = vae.VAE(5, likelihood, (3, 8, 4), network)
    x = torch.rand(2, 3, 8, 4)
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == model.reparameterize(mu, logvar).shape == (2, 5)
    mean = model.decode(2000 * torch.randn(4, 2, 5))
    assert mean.shape == (4, 2, 3, 8, 4) and mean.min() >= 0 and mean.max() <= 1
    assert [term.shape for term in model.elbo_terms(x, samples=4)] == [(2,), (2,)]
    assert model.log_weights(x, samples=6).shape == (6, 2)
    assert [model.sample(n).shape for n in (7, 0)] == [(7, 3, 8, 4), (0, 3, 8, 4)]


def test_a_convolution_sees_all_of_the_image_and_each_image_alone():
    model = vae.VAE(3, shape=(2, 8, 12), network="conv")
    x = torch.rand(4, 2, 8, 12, requires_grad=True)
    mu, logvar = model.encode(x)
    (gradient,) = torch.autograd.grad(mu[1, 0], x, retain_graph=True)
    assert (gradient[1] != 0).float().mean() > 0.9 and not gradient[[0, 2, 3]].any()
    assert_close(model.encode(x[1:2])[0], mu[1:2], rtol=1e-4, atol=1e-5)
    z = torch.randn(5, 4, 3)
    assert_close(model.decode(z)[3, 2], model.decode(z[3, 2]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 4, not 8 and 10"):
        vae.VAE(shape=(1, 8, 10), network="conv")
    with pytest.raises(ValueError, match="network must be one of mlp, conv"):
        vae.VAE(network="transformer")


def outputs(model, x, eps):
    """What every function of the model gives."""
    torch.manual_seed(0)
    terms = [*model.elbo_terms(x, eps=eps), *model(x), model.log_weights(x, 5)]
    return [*model.encode(x), model.decode(eps), model.log_likelihood(x, eps), *terms]


@BOTH
def test_every_function_works_in_float64(likelihood):
    x, eps = torch.rand(3, 1, 8, 8), torch.randn(1, 3, 2)
    model = vae.VAE(2, likelihood, (1, 8, 8)).requires_grad_(False)
    single = outputs(model, x, eps)
    double = outputs(model.double(), x.double(), eps.double())
    assert all(each.dtype == torch.float64 for each in double)
    # The draws differ, so only what needs none of them can be compared.
    assert_close(single[:6], double[:6], rtol=1e-5, atol=1e-5, check_dtype=False)


@BOTH
def test_autocast_rounds_the_network_and_nothing_else(likelihood):
    x, eps = torch.rand(3, 1, 8, 8), torch.randn(1, 3, 2)
    model = vae.VAE(2, likelihood, (1, 8, 8)).requires_grad_(False)
    exact = outputs(model, x, eps)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outputs(model, x, eps)
    assert all(each.dtype == torch.float32 for each in rounded)
    assert_close(rounded, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(rounded[0], exact[0])


def test_a_value_out_of_range_is_named_with_the_range():
    model = vae.VAE()
    x = torch.rand(2, 1, 28, 28)
    with pytest.raises(ValueError, match="latent_dim .*1, not 0"):
        vae.VAE(latent_dim=0)
    with pytest.raises(ValueError, match="likelihood .*bernoulli, gaussian.*'poisson'"):
        vae.VAE(likelihood="poisson")
    for estimator in model.elbo_terms, model.log_weights:
        with pytest.raises(ValueError, match="samples .*1, not 0"):
            estimator(x, samples=0)
    with pytest.raises(ValueError, match="n .*0, not -1"):
        model.sample(-1)


def test_reparameterize():
    mu, logvar = torch.tensor([[-3.0, 0.5], [-4.0, 1.0]]).requires_grad_()
    sigma = logvar.exp().sqrt()
    n = 100_000
    z = vae.VAE().reparameterize(mu.expand(n, 2), logvar.expand(n, 2))
    # Five standard errors, here and below.
    assert ((z.mean(0) - mu).abs() < 5 * sigma / n**0.5).all()
    assert ((z.std(0) / sigma - 1).abs() < 5 / (2 * n) ** 0.5).all()
    eps = torch.tensor([1.0, -2.0])
    z = vae.VAE().reparameterize(mu, logvar, eps)
    assert_close(z, mu + sigma * eps)
    gradients = torch.autograd.grad(z.sum(), [mu, logvar])
    assert_close(gradients, (torch.ones(2), 0.5 * sigma * eps))


def test_sample_decodes_the_prior():
    model, seen, n = vae.VAE(3), [], 10_000
    model.decoder = module(lambda z: seen.append(z) or z.new_zeros(len(z), D))
    model.sample(n)
    (z,) = seen
    assert z.mean(0).abs().max() < 5 / n**0.5
    assert (z.T.cov() - torch.eye(3)).abs().max() < 5 * (2 / n) ** 0.5


# ---- the estimators


@BOTH
def test_estimators_a_and_b_agree_and_b_is_less_noisy(likelihood, data):
    model = random_model(latent_dim=8, likelihood=likelihood)
    n = 4000
    x = data[0][:1].expand(n, -1, -1, -1)
    a = model.log_weights(x).mean(0)
    reconstruction, kl = model.elbo_terms(x)
    b = reconstruction - kl
    assert kl.min() > 3
    assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / n).sqrt()
    assert b.var() < 0.9 * a.var()


@BOTH
def test_training_uses_one_draw_of_estimator_b(likelihood, data):
    model, x = random_model(likelihood=likelihood), data[0][:7]
    torch.manual_seed(5)
    trained = model(x)
    torch.manual_seed(5)
    assert_close(trained, model.elbo_terms(x, samples=1), rtol=1e-6, atol=1e-4)
    assert [term.shape for term in trained] == [(7,), (7,)]


@BOTH
def test_samples_average_log_likelihoods_not_latents(likelihood, data):
    model = random_model(likelihood=likelihood)
    x = data[0][:2]
    z = 5 * torch.randn(4, 2, 2)
    mu, logvar = model.encode(x)
    q = normal(mu, logvar)

    def log_likelihood(z):  # one draw for each image
        return p_x(model.decode(z), model).log_prob(x).flatten(1).sum(1)

    each = torch.stack([log_likelihood(draw) for draw in z])
    reconstruction, kl = model.elbo_terms(x, samples=4, eps=(z - mu) / q.scale)
    assert_close(reconstruction, each.mean(0))
    assert_close(kl, kl_from_prior(q))
    # What averaging the latents would give.
    assert ((reconstruction - log_likelihood(z.mean(0))).abs() > 0.1).all()
    model.reparameterize = lambda mu, logvar, eps=None: z
    expected = each + PRIOR.log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    assert_close(model.log_weights(x, 4), expected)


def test_the_bounds_against_log_p_integrated_on_a_grid():
    W = 0.4 * torch.randn(2, D)
    mu, logvar = torch.tensor([[0.3, -0.2], [-1.0, -1.5]])
    model = vae.VAE(likelihood="gaussian").requires_grad_(False)
    model.encoder = module(lambda x: torch.cat([mu, logvar]).expand(len(x), -1))
    model.decoder = module(lambda z: torch.sin(z @ W) + 0.5 * (z @ W.flip(0)) ** 2)
    model.logvar_x.fill_(0.0)  # σ = 1
    x = model.decode(torch.tensor([[0.5, 0.1]])) + torch.randn(1, 1, 28, 28)

    axis = torch.linspace(-5, 5, 101)
    z = torch.cartesian_prod(axis, axis)
    p = td.Normal(model.decoder(z).sigmoid().double(), 1.0)
    log_joint = p.log_prob(x.flatten()).sum(1) + PRIOR.log_prob(z).sum(1)
    log_p = log_joint.logsumexp(0) + 2 * math.log(0.1)
    log_q = normal(mu, logvar).log_prob(z).sum(1).double()
    gap = (log_q.exp() * (log_q - (log_joint - log_p))).sum() * 0.1**2  # KL(q(z|x) || p(z|x))

    n = 10_000
    reconstruction, kl = model.elbo_terms(x.expand(n, -1, -1, -1))
    elbo = reconstruction - kl
    error = 5 * elbo.std() / n**0.5
    assert abs(log_p - elbo.double().mean() - gap) < error < gap / 3
    mean_weight = model.log_weights(x, n).logsumexp(0) - math.log(n)  # Burda et al. 2016
    assert abs(mean_weight - log_p) < 0.05


# ---- training, on 1,030 digits: epochs of 10 steps, 30 images left out of each


def flags(digits, out, *more):
    given = ["--data-dir", digits, "--out", out, "--device", "cpu"]
    given += ["--limit", 1030, "--batch-size", 100, "--epochs", 5, "--precision", "float32"]
    given += more
    return [str(flag) for flag in given]


def train(argv, watch=None):
    args = vae.parse(argv)
    return vae.train(args, common.start(args), watch)


def checkpoint(out):
    return torch.load(out / "vae.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("run") / "out"
    vae.main(flags(digits, out))
    return out


def assert_same(out, other):
    """Both runs ended with the same bits, but for the seconds that they took."""
    a, b = checkpoint(out), checkpoint(other)
    for row in a["history"] + b["history"]:
        del row["seconds"]
    for name in "kind", "settings", "code":
        assert a.pop(name) == b.pop(name)
    assert_close(a, b, rtol=0, atol=0)


SHARED = {"data": "mnist", "pictures": None, "size": 32, "limit": None, "seed": 0}
SHARED |= {"precision": "float32"}
REPORTS = {"network": "mlp", "latent_dim": 2, "likelihood": "bernoulli", "kl_weight": 1}
REPORTS |= {"epochs": 100, "batch_size": 256, "lr": 1e-3}


def test_the_defaults_are_those_of_the_course_report(monkeypatch):
    monkeypatch.setattr(common, "best_precision", lambda device: "float32")
    args = vae.parse([])
    assert vae.defaults(args, CPU) == SHARED | REPORTS
    assert not any(getattr(args, name, None) for name in SHARED | REPORTS)
    assert [layer.out_features for layer in vae.VAE().encoder[::2]] == [512, 256, 4]


def test_the_learning_rate_falls_to_0_along_half_a_cosine():
    done = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    rate = torch.tensor([vae.get_lr(share, 3e-3) for share in done.tolist()])
    assert_close(rate.double(), 3e-3 * (math.pi / 2 * done).cos() ** 2, rtol=1e-6, atol=1e-9)


def test_training_learns(trained, data):
    given = {"limit": 1030, "epochs": 5, "batch_size": 100, "shape": [1, 28, 28]}
    assert checkpoint(trained)["settings"] == SHARED | REPORTS | given
    history = checkpoint(trained)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    assert 0 < history[0]["seconds"] < history[1]["seconds"]
    elbo = [row["test_reconstruction"] - row["test_kl"] for row in history]
    untrained, _ = vae.VAE().elbo_terms(data[1])
    assert untrained.mean() + 200 < elbo[0] < elbo[1] < elbo[2]


def test_the_history_holds_the_terms_of_the_saved_model(trained, data):
    model = vae.load(trained / "vae.pt")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    x = data[1]
    mu, logvar = model.encode(x)
    q = normal(mu, logvar)
    torch.manual_seed(0)
    p = p_x(model.decode(mu + q.scale * torch.randn(1, 600, 2)[0]), model)
    reconstruction = p.log_prob(x).sum((1, 2, 3)).mean().item()
    last = checkpoint(trained)["history"][-1]
    assert last["test_reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
    assert last["test_kl"] == pytest.approx(kl_from_prior(q).mean().item(), rel=1e-5)


def test_evaluate_depends_on_the_seed_alone(data):
    model = random_model()
    x = data[0]  # 1,100: parts of 1,000 and 100
    images = (x * 255).round().byte()
    reconstruction, kl = vae.evaluate(model, images, seed=1)
    torch.randn(5)
    assert vae.evaluate(model, images, seed=1) == [reconstruction, kl]
    assert vae.evaluate(model, images, seed=2)[0] != reconstruction
    expected = [term.mean().item() for term in model.elbo_terms(x, samples=8)]
    assert kl == pytest.approx(expected[1], rel=1e-5)
    assert reconstruction == pytest.approx(expected[0], rel=0.01)  # by one draw an image


@pytest.mark.parametrize("likelihood, kl_weight", [("bernoulli", 1), ("gaussian", 0.5)])
def test_training_again(digits, data, tmp_path, likelihood, kl_weight):
    """Against a plain loop: two epochs of Adam on the loss, in float32."""
    more = ["--seed", 3, "--lr", 2e-3, "--latent-dim", 3, "--kl-weight", kl_weight]
    argv = flags(digits, tmp_path, "--epochs", 2, "--likelihood", likelihood, *more)
    model, history = train(argv)
    torch.manual_seed(3_000_000)
    twin = vae.VAE(3, likelihood)
    start = copy.deepcopy(twin.state_dict())
    optimizer = torch.optim.Adam(twin.parameters(), lr=2e-3)
    x_train = data[0][:1030].flatten(1)
    for epoch in 1, 2:
        torch.manual_seed(3_000_000 + epoch)
        order = torch.randperm(1030)  # 1,000 of them are seen
        terms = []
        for step in range(10):
            done = (10 * (epoch - 1) + step + 0.5) / 20
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * done)) / 2
            x = x_train[order[100 * step : 100 * (step + 1)]]
            eps = torch.randn(100, 3)
            mu, logvar = twin.encoder(x).split(3, dim=1)
            q = normal(mu, logvar)
            p = p_x(twin.decoder(mu + q.scale * eps).sigmoid(), twin)
            reconstruction = p.log_prob(x).sum(1).mean()
            kl = kl_from_prior(q).mean()
            twin.zero_grad()
            (kl_weight * kl - reconstruction).backward()
            optimizer.step()
            terms.append([reconstruction.item(), kl.item()])
        reconstruction, kl = torch.tensor(terms).mean(0).tolist()
        row = history[epoch - 1]
        assert row["train_reconstruction"] == pytest.approx(reconstruction, rel=1e-4)
        assert row["train_kl"] == pytest.approx(kl, rel=1e-3)
    for name, value in twin.state_dict().items():
        difference = model.state_dict()[name] - value
        assert difference.norm() < 5e-3 * (value - start[name]).norm(), name


def test_the_pictures_show_what_they_say(trained, digits, data, tmp_path, monkeypatch):
    shown = {}
    for name in "plot_grid", "plot_rows", "plot_curves", "plot_latent":
        monkeypatch.setattr(common, name, lambda *given, name=name: shown.update({name: given}))
    model = vae.load(trained / "vae.pt")
    history = checkpoint(trained)["history"]
    args = vae.parse(flags(digits, tmp_path, "--data", "mnist", "--seed", 7))
    vae.draw(model, history, args, CPU)
    _, x, y = data
    mu, _ = model.encode(x)
    assert_close(shown["plot_latent"][:2], (mu, y))
    assert_close([*shown["plot_rows"][0].values()], [x[:12], model.decode(mu[:12])])
    torch.manual_seed(7)
    assert_close(shown["plot_grid"][0], model.sample(100))
    rows, curves, *_ = shown["plot_curves"]
    keys = [key for panel in curves.values() for key in panel.values()]
    assert rows == history and set(keys) == set(history[0]) - {"epoch", "seconds"}
    assert curves["KL, nats"] == {"training images": "train_kl", "test images": "test_kl"}


# ---- the same command goes on


def test_a_killed_run_resumes_bit_for_bit(trained, digits, tmp_path, capsys):
    argv = flags(digits, tmp_path)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, SCRIPT, *argv], env=one_thread)
    try:
        while not (tmp_path / "vae.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.5 * random.random())
    finally:
        process.kill()  # SIGKILL
        assert process.wait() != 0
    done = len(checkpoint(tmp_path)["history"])
    vae.main(argv)
    assert_same(trained, tmp_path)
    said = capsys.readouterr().out
    assert said.count("test_kl") == 5 - done  # only the other epochs
    if done < 5:
        assert said.startswith(f"going on after epoch {done} of 5\n")
    assert set(os.listdir(tmp_path)) == set(os.listdir(trained))


def test_ctrl_c_gives_one_line_and_the_same_command_resumes(trained, digits, tmp_path):
    def stop(model, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return {}

    argv = flags(digits, tmp_path)
    line = "^\\s*stopped: run the same command to resume after the last finished epoch$"
    with pytest.raises(SystemExit, match=line):
        common.run(lambda: train(argv, watch=stop))
    saved = checkpoint(tmp_path)
    assert len(saved["history"]) == 2 and os.listdir(tmp_path) == ["vae.pt"]
    saved["history"][-1]["seconds"] = 1000.0
    torch.save(saved, tmp_path / "vae.pt")
    train(argv)
    assert_same(trained, tmp_path)
    # The seconds continue from the saved ones.
    assert 1000 < checkpoint(tmp_path)["history"][2]["seconds"] < 1100


def test_a_finished_run_draws_its_pictures_again(trained, digits, tmp_path, capsys):
    shutil.copy(trained / "vae.pt", tmp_path)
    vae.main(flags(digits, tmp_path, "--kl-weight", 1))  # an equal value may be given
    line = f"{tmp_path / 'vae.pt'} is finished: drawing its pictures again (--fresh trains anew)\n"
    assert capsys.readouterr().out.startswith(line)
    names = os.listdir(trained)
    assert "vae_latent.png" in names and set(os.listdir(tmp_path)) == set(names)
    assert filecmp.cmpfiles(trained, tmp_path, names, shallow=False) == (names, [], [])


def test_sample_draws_from_the_checkpoint(trained, tmp_path, monkeypatch):
    model = vae.load(shutil.copy(trained / "vae.pt", tmp_path))
    drawn = []
    monkeypatch.setattr(common, "plot_grid", lambda *given: drawn.append(given))
    for more in [], ["--seed", "0"], ["--seed", "1"]:
        vae.main(["--out", str(tmp_path), "--device", "cpu", "--sample", "5", *more])
    for (x, path, *_), seed in zip(drawn, (0, 0, 1), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(x, model.sample(5))
        assert path == tmp_path / "vae_sample.png"


# ---- what cannot be done


def refused(capsys, argv, *words):
    """`python vae.py` with argv ends with one line that has all the words."""
    with pytest.raises(SystemExit) as end:
        common.run(lambda: vae.main([str(arg) for arg in argv]))
    code = end.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err
    assert code and message.startswith("error: ") and "\n" not in message.strip()
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", message), (word, message)


def test_bad_values_give_a_one_line_error_and_write_nothing(tmp_path, capsys):
    wrong = "--latent-dim=0 --kl-weight=nan --likelihood=poisson --data=cifar --device=tpu "
    wrong += "--seed=-1 --precision=half --lr=0 --load=x.pt"
    for flag in wrong.split():
        argv = ["--out", tmp_path, "--limit=1", "--epochs=1", flag]
        refused(capsys, argv, flag.split("=")[0].strip("-"))
    refused(capsys, ["--out", tmp_path, "--sample", 1], tmp_path / "vae.pt", "train first")
    refused(capsys, ["--out", tmp_path, "--sample", 1, "--fresh"], "--fresh", "--sample")
    assert os.listdir(tmp_path) == []


def test_a_flag_that_contradicts_the_checkpoint(trained, digits, tmp_path, capsys):
    path = Path(shutil.copy(trained / "vae.pt", tmp_path))

    def contradicts(flag, given, saved, *more):
        argv = [*flags(digits, tmp_path), *more, flag, given]
        name = flag.strip("-").replace("-", "_")
        anew = () if "--sample" in more else ("--fresh",)
        refused(capsys, argv, f"{path} has {name} {saved}, not {given}", "leave out", *anew)

    contradicts("--latent-dim", 3, 2)
    contradicts("--latent-dim", 20, 2, "--sample", 64)
    contradicts("--likelihood", "gaussian", "bernoulli")
    contradicts("--kl-weight", 2.5, 1.0)
    contradicts("--epochs", 4, 5)
    contradicts("--seed", 1, 0)
    contradicts("--lr", 0.5, 0.001)
    assert os.listdir(tmp_path) == ["vae.pt"]
    assert filecmp.cmp(path, trained / "vae.pt", shallow=False)
