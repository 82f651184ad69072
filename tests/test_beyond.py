"""ddpm.py beyond the paper: second-order sampling, labels, guidance, continued training."""

import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common
import ddpm

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = (1, 4, 4)
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- the second-order sampler

S = 0.25  # The data: each pixel is from N(0, S²), for which the best network is known.


def gaussian(T):
    """A DDPM with the best network for these data, its ᾱ, and the spread of x_t."""
    alpha_bar = ddpm.make_alpha_bar("linear", T)

    def eps(xt, t):  # E[ε|x_t]
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() / (a * S**2 + 1 - a) * xt

    model = ddpm.DDPM(eps, schedule=alpha_bar, clip=False, shape=TINY)
    return model, alpha_bar, (alpha_bar * S**2 + 1 - alpha_bar).sqrt()


def order_of(order):
    """The deterministic sampler's empirical order of convergence, between 10 and 80 steps."""
    T = 20000
    model, alpha_bar, spread = gaussian(T)
    log_ratio = 0.5 * (alpha_bar[1:] / (1 - alpha_bar[1:])).log()
    xT = torch.randn(1, *TINY, dtype=F64)
    errors = []
    for steps in 10, 80:
        grid = torch.linspace(log_ratio[-1], 2.0, steps + 1, dtype=F64)  # steps of one size in λ
        times = [(log_ratio - at).abs().argmin().item() + 1 for at in grid]
        *_, (t, xt, _) = model.trajectory(xT, times, 0.0, order)
        exact = xT * spread[t] / spread[T]  # for normals, the probability flow is a scaling
        errors.append((xt - exact).abs().max().item())
    return math.log(errors[0] / errors[1]) / math.log(8)


def test_the_error_falls_with_the_order_of_the_sampler():
    assert 0.9 < order_of(1) < 1.1
    assert order_of(2) > 1.8


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_second_order_step_takes_the_extrapolated_guess(eta):
    """Each step by Song et al. 2021, (12) and (16), with x̂_0 replaced as in Lu et al. 2022."""
    model = ddpm.DDPM(
        lambda xt, t: torch.tanh(3 * xt) + t.double().view(-1, 1, 1, 1) / 50, T=50, shape=TINY
    )
    times = [50, 31, 12, 5, 0]
    a = ddpm.make_alpha_bar("linear", 50)
    lam = [0.5 * math.log(a[t] / (1 - a[t])) if t else math.inf for t in times]
    x = torch.randn(3, *TINY, dtype=F64)
    torch.manual_seed(1)
    found = [xt for _, xt, _ in model.trajectory(x, times, eta, order=2)]
    torch.manual_seed(1)
    guesses = []
    for i, (t, s) in enumerate([(50, 31), (31, 12), (12, 5), (5, 0)]):
        torch.testing.assert_close(found[i], x, rtol=1e-10, atol=1e-10)
        eps = torch.tanh(3 * x) + t / 50
        guesses.append(((x - (1 - a[t]).sqrt() * eps) / a[t].sqrt()).clamp(-1, 1))
        x0 = guesses[-1]
        if i in (1, 2):  # not in the first step, nor in the last
            ratio = (lam[i + 1] - lam[i]) / (2 * (lam[i] - lam[i - 1]))
            x0 = x0 + ratio * (x0 - guesses[-2])
        sigma2 = eta**2 * (1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])
        towards = (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        x = a[s].sqrt() * x0 + (1 - a[s] - sigma2).clamp(min=0).sqrt() * towards
        if s > 0:
            x = x + sigma2.sqrt() * torch.randn_like(x)
    torch.testing.assert_close(found[-1], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"steps": 50}, {"order": 2}])
def test_sampling_keeps_no_trajectory(options):
    seen = []
    alive = []

    def net(xt, t):
        seen.append(weakref.ref(xt))
        alive.append(sum(each() is not None for each in seen))
        return 0 * xt

    ddpm.DDPM(net, T=50, shape=TINY).sample(2, **options)
    assert len(seen) == 50 and max(alive) <= 3


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order .*1, 2, not 3"):
        gaussian(10)[0].sample(1, 5, order=3)


# ---- labels


class Told(torch.nn.Module):
    """A network whose two answers are known: 2 with a label, and 0.5 without one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, xt, t, labels=None):
        self.seen.append(None if labels is None else labels.tolist())
        return torch.full_like(xt, 0.5 if labels is None else 2.0)


@pytest.mark.parametrize("guidance, eps, calls", [(0, 2.0, 1), (1, 3.5, 2), (1.5, 4.25, 2)])
def test_guidance_extrapolates_past_the_guess_with_a_label(guidance, eps, calls):
    net = Told()
    model = ddpm.DDPM(net, T=10, clip=False, shape=TINY)
    guided = ddpm.guided(model, torch.tensor([1, 0]), guidance)
    xt = torch.randn(2, *TINY)
    found = guided.net(xt, torch.tensor([3, 3]))
    torch.testing.assert_close(found, torch.full_like(xt, eps))
    assert net.seen == [[1, 0], None][:calls]
    assert torch.equal(guided.alpha_bar, model.alpha_bar) and guided.clip is False


def test_sample_hands_each_image_its_label():
    net = Told()
    model = ddpm.DDPM(net, T=4, shape=TINY)
    assert model.sample(3, labels=[7, 2, 2]).shape == (3, *TINY)
    model.sample(2, steps=2, labels=5)
    assert net.seen == 4 * [[7, 2, 2]] + 2 * [[5, 5]]


def test_a_tenth_of_the_labels_is_left_out():
    labels = torch.arange(10).repeat(2000)
    settings = SimpleNamespace(labels=True, classes=[str(i) for i in range(10)])
    batch = torch.randperm(len(labels))
    (told,) = ddpm.some_labels(labels, batch, settings)
    left_out = told == 10
    assert torch.equal(told[~left_out], labels[batch][~left_out])
    settings.labels = False
    assert ddpm.some_labels(None, batch, settings) == ()
    share = left_out.double().mean().item()
    assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 20000))


def test_no_label_is_the_last_index_and_the_rest_of_the_network_is_as_before():
    torch.manual_seed(3)
    plain = ddpm.UNet(1, 1, width=4)
    torch.manual_seed(3)
    told = ddpm.LabelledUNet(1, 1, width=4, classes=10)
    for name, p in plain.named_parameters():
        assert torch.equal(p, dict(told.named_parameters())[name]), name
    torch.nn.init.normal_(told.conv_out.weight)
    for block in told.modules():
        if isinstance(block, ddpm.Block):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 9])
    assert torch.equal(told(x, t), told(x, t, torch.tensor([10, 10])))
    assert (told(x, t, torch.tensor([3, 3])) - told(x, t)).abs().max() > 1e-3


# ---- over the command line


def flags(digits, out, *more):
    text = "--limit 200 --batch-size 20 --T 20 --width 8 --steps 4 --device cpu"
    return ["--data-dir", str(digits), "--out", str(out), *text.split(), *map(str, more)]


@pytest.fixture(scope="module")
def labelled(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("labelled")
    ddpm.main(flags(digits, out, "--labels", "--epochs", 1))
    return out


def test_a_run_with_labels_draws_three_guidance_weights(labelled):
    picture = Image.open(labelled / "ddpm_labels.png").convert("L")
    assert picture.getextrema()[1] > 100 and picture.width > picture.height


def sampled(monkeypatch, out, *more):
    """The images, columns, labels and guidance of --sample."""
    drawn, asked = [], []
    guided = ddpm.guided
    monkeypatch.setattr(
        common, "plot_grid", lambda x, path, title, columns=10: drawn.append((x, columns))
    )
    monkeypatch.setattr(
        ddpm,
        "guided",
        lambda m, labels, w=0.0: asked.append((labels.tolist(), w)) or guided(m, labels, w),
    )
    ddpm.main(["--out", str(out), "--device", "cpu", "--steps", "3", *more])
    return *drawn[0], *asked[0]


def test_each_class_fills_a_row_unless_a_digit_is_given(labelled, monkeypatch):
    x, columns, labels, guidance = sampled(monkeypatch, labelled, "--sample", "20")
    assert (len(x), columns, guidance) == (20, 2, 0.0)
    assert labels == [label for label in range(10) for _ in range(2)]
    more = "--sample", "6", "--digit", "7", "--guidance", "1.5"
    x, columns, labels, guidance = sampled(monkeypatch, labelled, *more)
    assert (len(x), labels, guidance) == (6, 6 * [7], 1.5)


@pytest.mark.parametrize("more, words", [(["--digit", "x"], "--digit x .*choose 0, 1, 2")])
def test_an_unknown_digit_is_refused(labelled, more, words):
    with pytest.raises(common.InputError, match=words):
        ddpm.main(["--out", str(labelled), "--device", "cpu", "--sample", "2", *more])


def test_a_digit_needs_a_model_with_labels(digits, tmp_path):
    ddpm.main(flags(digits, tmp_path, "--epochs", 1))
    for more in ["--digit", "3"], ["--labels"]:
        with pytest.raises(common.InputError, match="labels"):
            ddpm.main(["--out", str(tmp_path), "--device", "cpu", "--sample", "2", *more])


def pictures(folder, names):
    for name in names:
        for i in range(6):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 30 * (1 + len(name)) + i).save(path)
    return folder


def test_sub_folders_are_the_labels_of_pictures(tmp_path):
    folder = pictures(tmp_path / "pets", ["ox", "cat", "parrot"])
    args = ddpm.parse(f"--data {folder} --size 16 --out {tmp_path} --device cpu".split())
    settings = SimpleNamespace(
        data=args.data, size=16, limit=None, seed=0, pictures=None, labels=True
    )
    x, y, x_test, y_test = common.load_data(settings, args, CPU)
    names = common.class_names(settings, args)
    assert names == ["cat", "ox", "parrot"] and len(x) == len(y) == 16 and len(y_test) == 2
    for images, labels in (x, y), (x_test, y_test):
        for image, label in zip(images, labels, strict=True):
            assert image.float().mean() // 30 - 1 == len(names[label])
    Image.new("L", (16, 16)).save(folder / "loose.png")  # which has no label
    settings.pictures = "other"
    assert common.load_data(settings, args, CPU)[1] is None
    with pytest.raises(common.InputError, match="subfolder"):
        common.class_names(settings, args)


def test_only_pictures_that_can_be_read_have_labels(tmp_path):
    folder = pictures(tmp_path / "pets", ["ox", "cat"])
    (folder / "logo.svg").write_bytes(b"<svg/>")
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"cut")
    args = ddpm.parse(f"--data {folder} --size 16 --out {tmp_path} --device cpu".split())
    settings = SimpleNamespace(
        data=args.data, size=16, limit=None, seed=0, pictures=0, labels=True
    )
    assert common.class_names(settings, args) == ["cat", "ox"]


def test_an_unknown_label_is_refused_with_the_range():
    model = ddpm.DDPM(
        ddpm.Preconditioned(ddpm.LabelledUNet(3, 1, 4, 10), ddpm.DDPM(None).alpha_bar)
    )
    for label in -1, 10, [3, 12]:
        with pytest.raises(ValueError, match="of 10 classes, a label .*0 to 9"):
            model.sample(2, 2, labels=label)
    with pytest.raises(ValueError, match="guidance needs labels"):
        model.sample(2, 2, guidance=1.0)
    model.net.net = ddpm.UNet(3, 1, 4)
    with pytest.raises(ValueError, match="trained without labels"):
        model.sample(2, labels=7)


def test_samples_of_a_folders_label_can_be_drawn(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pets", ["dog", "$cat_$"])
    out = tmp_path / "out"
    more = "--size 16 --labels --epochs 1 --batch-size 5 --T 10 --width 4 --steps 2 --device cpu"
    ddpm.main(["--data", str(folder), "--out", str(out), *more.split()])
    *_, labels, _ = sampled(monkeypatch, out, "--sample", "3", "--digit", "dog", "--steps", "2")
    assert labels == [1, 1, 1]


# ---- training on


def checkpoint(out):
    return torch.load(out / "ddpm.pt", weights_only=True)


def same(a, b):
    for row in a["history"] + b["history"]:
        row["seconds"] = 0
    for name in "kind", "code", "settings":
        assert a.pop(name) == b.pop(name)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def train(digits, out, epochs, watch=None):
    args = ddpm.parse(flags(digits, out, "--epochs", epochs))
    return ddpm.train(args, common.start(args), watch)


def test_more_epochs_continue_a_run_and_a_stop_changes_nothing(digits, tmp_path, capsys):
    first = tmp_path / "first"
    train(digits, first, 2)
    capsys.readouterr()
    whole = Path(shutil.copytree(first, tmp_path / "whole"))
    parts = Path(shutil.copytree(first, tmp_path / "parts"))
    train(digits, whole, 5)
    said = capsys.readouterr().out
    assert "going on after epoch 2 of 5" in said and said.count("the schedule for 5 epochs") == 1

    def stop(model, epoch):
        if epoch == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(digits, parts, 5, stop)
    assert len(checkpoint(parts)["history"]) == 3
    train(digits, parts, 5)
    same(checkpoint(whole), checkpoint(parts))


def test_a_stopped_run_can_end_where_it_is(digits, tmp_path, capsys):
    def stop(model, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(digits, tmp_path, 5, stop)
    _, history = train(digits, tmp_path, 2)
    assert len(history) == 2 and "is finished" in capsys.readouterr().out


def test_fewer_epochs_than_are_done_is_an_error(digits, tmp_path):
    train(digits, tmp_path, 2)
    before = (tmp_path / "ddpm.pt").read_bytes()
    with pytest.raises(common.InputError, match="epochs 2, not 1"):
        train(digits, tmp_path, 1)
    assert (tmp_path / "ddpm.pt").read_bytes() == before


# ---- change it yourself: the changes that README.md names, each made in a copy

CHANGES = {
    "another network": (
        'net = UNet(3 * channels, channels, settings["width"])',
        "net = nn.Sequential(nn.Conv2d(3 * channels, 8, 3, padding=1), nn.SiLU(), "
        "nn.Conv2d(8, channels, 3, padding=1))\n"
        "        net.forward = lambda x, t: net[2](net[1](net[0](x)))",
    ),
    "another loss": (
        "error = (eps - guess) ** 2",
        "error = (eps - guess).abs()",
    ),
    "another output": (
        "return noise_rate * xt + signal_rate * v",
        "return v",
    ),
    "another data set": (
        "x_train, y_train, x_test, _ = common.load_data(settings, args, device)",
        "x_train, y_train, x_test, _ = 2 * (torch.randint(256, (200, 1, 16, 16)).byte(), None)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_takes_one_edit_and_runs(change, digits, tmp_path):
    for name in "ddpm.py", "common.py":
        shutil.copy(REPO / name, tmp_path)
    source = (tmp_path / "ddpm.py").read_text("utf-8")
    old, new = CHANGES[change]
    assert source.count(old) == 1
    (tmp_path / "ddpm.py").write_text(source.replace(old, new), "utf-8")
    command = [sys.executable, "ddpm.py", *flags(digits, "out", "--epochs", 1)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "out" / "ddpm_samples.png").stat().st_size > 1000


def test_a_network_whose_output_would_broadcast_is_refused():
    x0 = torch.zeros(4, 1, 8, 8)
    for shape in (4, 3, 8, 8), (4, 8, 8), (4, 1, 1, 1):
        model = ddpm.DDPM(lambda xt, t, shape=shape: torch.zeros(shape), shape=(1, 8, 8))
        with pytest.raises(ValueError, match=r"shape \(4, 1, 8, 8\), not \(4, "):
            model.loss(x0)


def test_dropout_is_off_in_the_model_that_is_evaluated(digits, tmp_path, monkeypatch):
    evaluate = ddpm.evaluate
    modes = []

    def watched(model, *rest):
        modes.append(model.training)
        return evaluate(model, *rest)

    monkeypatch.setattr(ddpm, "evaluate", watched)
    ddpm.main(flags(digits, tmp_path, "--epochs", 1))
    assert modes == [False]


def test_a_loss_replaced_in_a_notebook_is_the_one_that_trains(monkeypatch):
    monkeypatch.setattr(ddpm.DDPM, "loss", lambda self, x0, *rest: x0.sum())
    x0 = torch.ones(2, 1, 8, 8)
    assert ddpm.DDPM(lambda xt, t: xt)(x0) == 128
