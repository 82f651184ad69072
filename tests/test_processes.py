"""The scripts as they are started: by torchrun, and from a copy that somebody edits.

Under torchrun two processes share each batch; rank 0 alone speaks and writes.  A copy goes on with
a checkpoint only if its code is that which trained it.
"""

import ast
import functools
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn

import common
import ddpm
import vae

REPO = Path(__file__).resolve().parent.parent
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NAMES = ["ddpm", "vae"]
SMALL = {"ddpm": "--T 4 --width 4", "vae": "--latent-dim 2"}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="not tried")


def begin(*command, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, **pipes)


def end(process):
    """-> exit code, stdout, stderr."""
    try:
        said, err = process.communicate(timeout=200)
    finally:
        process.terminate()  # a launcher ends its workers
    return process.returncode, said, err


def launch(*command, **more):
    """Runs it in two processes -> exit code, lines of stdout, the scripts' part of stderr."""
    code, said, err = end(begin(*LAUNCHER, *command, **more))
    own, *_ = err.partition("torch/distributed/")[0].rpartition("\n")
    return code, said.splitlines(), own


# ---- what each process runs, when this file is launched


def gradients(args):
    """Saves both models' gradients: one process on all images, and two on half of them each."""
    x, t = torch.rand(6, 1, 28, 28).double(), torch.tensor([1, 2, 3, 4, 1, 2])
    noise, latent = torch.randn_like(x), torch.randn(6, 2).double()
    net = nn.Conv2d(1, 1, 3, padding=1)
    net.forward = lambda xt, t: nn.Conv2d.forward(net, xt) * ddpm.per_image(t)
    model = ddpm.DDPM(net, schedule=[1, 0.9, 0.6, 0.3, 0.1], weighting="v")
    model, coder = model.double(), vae.VAE().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    found, mine = [], slice(3 * common.RANK, 3 * common.RANK + 3)
    for common.WORLD, share in (1, slice(6)), (2, mine):
        elbo_terms, loss_of = common.wrap(coder, args), common.wrap(model, args)
        eps = latent[share]
        coder.reparameterize = functools.partial(vae.VAE.reparameterize, coder, eps=eps)
        reconstruction, kl = elbo_terms(x[share])
        (kl - reconstruction).mean().backward()
        loss_of(x[share], t[share], noise[share]).backward()
        found.append([p.grad for p in [*model.parameters(), *coder.parameters()]])
        model.zero_grad()
        coder.zero_grad()
    torch.save(found, f"{args.out}/gradients.rank{common.RANK}")


def program(out, data):
    torch.manual_seed(0)
    args = vae.parse(["--out", out, "--device", "cpu"])
    common.start(args)
    gradients(args)
    # One group serves all runs.
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    rank, save, write = common.RANK, common.save_checkpoint, torch.save

    def hooked(path, settings, history, *code, **parts):
        if folder == "stop" and len(history) == 2:
            raise KeyboardInterrupt
        save(path, settings, history, *code, **parts)
        write(parts["model"].state_dict(), f"{path}.rank{rank}")

    common.save_checkpoint = hooked
    if rank > 0:  # nothing to write with
        torch.save = Figure.savefig = None
    commands = ("whole", ""), ("stop", ""), ("parts", ""), ("parts", "--sample 3")
    for name, (folder, more) in itertools.product(NAMES, commands):
        flags = f"--data-dir {data} --out {out}/{folder.replace('stop', 'parts')} --device cpu "
        flags += "--precision float32 "
        if not more:
            flags += f"--limit 70 --epochs 2 --batch-size 32 {SMALL[name]} "
        sys.argv = [name, *flags.split(), *more.split()]
        try:
            runpy.run_path(str(REPO / f"{name}.py"), run_name="__main__")
        except SystemExit as stopped:
            assert "stopped" in str(stopped)


@pytest.fixture(scope="module")
def launched(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    code, said, err = launch(__file__, out, digits)
    assert code == 0, err
    return out, said


def test_the_averaged_gradient_is_that_of_one_process_on_all_images(launched):
    for rank in 0, 1:
        one, several = torch.load(launched[0] / f"gradients.rank{rank}")
        assert all(gradient.abs().max() > 0 for gradient in one)
        torch.testing.assert_close(several, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_both_processes_end_with_the_same_weights_even_after_a_stop(launched, name):
    paths = [launched[0] / folder / f"{name}.pt" for folder in ("whole", "parts")]
    whole, parts = (torch.load(path, weights_only=True) for path in paths)
    for path, rank in itertools.product(paths, (0, 1)):
        weights = torch.load(f"{path}.rank{rank}", weights_only=True)
        torch.testing.assert_close(weights, whole["model"], rtol=0, atol=0)
    assert len(whole["history"]) == len(parts["history"]) == 2


def test_only_rank_0_prints_and_writes(launched):
    _, said = launched
    counts = {"DDPM on": 3, "VAE on": 3, "epoch 1": 4, "epoch 2": 4, "wrote": 6}
    counts |= {"going on after epoch 1 of 2": 2}
    assert {words: sum(line.startswith(words) for line in said) for words in counts} == counts


def test_an_odd_batch_gives_a_one_line_error(digits, tmp_path):
    flags = "--device", "cpu", "--data-dir", digits, "--out", tmp_path, "--batch-size", 33
    code, _, err = launch(REPO / "ddpm.py", *flags)
    assert code != 0 and "Traceback" not in err and os.listdir(tmp_path) == []
    assert "error: 2 processes cannot share 33 images" in err


def test_missing_data_give_a_one_line_error(tmp_path):
    flags = "--device", "cpu", "--data", "fashion", "--data-dir", tmp_path, "--out", tmp_path
    code, _, err = launch(REPO / "vae.py", *flags)
    assert code != 0 and "Traceback" not in err and "Connection closed" not in err
    assert "lacks files of fashion: run once without torchrun to get them" in err
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


# ---- a copy of a script, which somebody edits: the same command again

LOSS = {
    "ddpm": ("error = (eps - guess)", "error = 2 * (eps - guess)"),
    "vae": ("(settings.kl_weight * kl - recon", "(2 * settings.kl_weight * kl - recon"),
}
LAYER = {"ddpm": ("embed = 128", "embed = 96"), "vae": ("256", "250")}
CPU = "--device", "cpu", "--precision", "float32"
FIRST_STEP = "            optimizer.zero_grad()\n"
STOP = f"            raise KeyboardInterrupt\n{FIRST_STEP}"
BOTH = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A checkpoint of each script after two epochs, trained in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    runs = [
        begin(sys.executable, REPO / f"{name}.py", *flags(name, digits, folder)) for name in NAMES
    ]
    for run in runs:
        code, _, err = end(run)
        assert code == 0, err
    return folder


def flags(name, digits, out, epochs=2):
    given = f"--device cpu --precision float32 --limit 64 --batch-size 32 {SMALL[name]}"
    return ["--data-dir", digits, "--out", out, "--epochs", epochs, *given.split()]


@pytest.fixture
def copied(tmp_path):
    for name in "common", *NAMES:
        shutil.copy(REPO / f"{name}.py", tmp_path)
    return tmp_path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def written_anew(path):
    """Rewrites a script: other comments, docstrings and line breaks, but the same code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body[0].value.value = "Something else is said here."
    text = re.sub(r"^( *\w+) = ", r"\1 = \\\n    ", ast.unparse(tree), flags=re.MULTILINE)
    path.write_text(f"# A comment.\n\n{text}\n\n\n# Another one.\n", encoding="utf-8")


def finished(trained, name, out):
    """Copies the finished checkpoint into the new folder out -> the path of the copy."""
    out.mkdir()
    return Path(shutil.copy(trained / f"{name}.pt", out))


def unfinished(trained, name, out):
    """The same, as if the run had been stopped after epoch 2 of 3."""
    path = finished(trained, name, out)
    saved = torch.load(path, weights_only=True)
    saved["settings"]["epochs"] = 3
    torch.save(saved, path)
    return path


def state(folder):
    """All files in it, and when they were written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def is_one_line(err):
    """An error that the user can read, and nothing else."""
    return err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")


@pytest.fixture
def command(copied, monkeypatch, capsys):
    """Runs a script's copy in this process -> exit code or message, stdout."""

    def run(name, *given):
        monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
        try:
            runpy.run_path(str(copied / f"{name}.py"), run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().out

    return run


def own_process(copied, name, *given):
    """The same in a process of its own -> exit code, stdout, stderr."""
    return end(begin(sys.executable, copied / f"{name}.py", *given))


@BOTH
def test_an_edited_loss_does_not_resume_from_old_weights(copied, trained, digits, command, name):
    done = finished(trained, name, copied / "done")
    half = unfinished(trained, name, copied / "half")
    before = state(done.parent), state(half.parent)
    edit(copied / f"{name}.py", *LOSS[name])
    says = f"error: {name}.py has changed since %s was trained: --fresh trains anew, another --out"
    message, said = command(name, *flags(name, digits, done.parent))
    assert message.startswith(says % done) and is_one_line(f"{message}\n") and said == ""
    code, said, err = own_process(copied, name, *flags(name, digits, half.parent, epochs=3))
    assert code == 1 and err.startswith(says % half) and is_one_line(err) and said == ""
    assert (state(done.parent), state(half.parent)) == before


@BOTH
def test_comments_docstrings_and_breaks_change_nothing(copied, trained, digits, command, name):
    done = finished(trained, name, copied / "done")
    half = unfinished(trained, name, copied / "half")
    before = done.read_bytes()
    written_anew(copied / f"{name}.py")
    code, said = command(name, *flags(name, digits, done.parent))
    assert code == 0 and said.startswith(f"{done} is finished: drawing its pictures again")
    assert done.read_bytes() == before and len(os.listdir(done.parent)) > 3
    code, said, err = own_process(copied, name, *flags(name, digits, half.parent, epochs=3))
    assert code == 0, err
    assert said.startswith("going on after epoch 2 of 3\n")
    assert [line.split()[1] for line in said.splitlines() if line.startswith("epoch ")] == ["3"]
    assert len(torch.load(half, weights_only=True)["history"]) == 3


@BOTH
def test_fresh_replaces_what_is_there_after_an_epoch(copied, trained, digits, command, name):
    """With new code, and other settings."""
    path = finished(trained, name, copied / "out")
    before = state(path.parent)
    script = copied / f"{name}.py"
    given = [*flags(name, digits, path.parent, epochs=1), "--fresh", "--seed", 3]
    edit(script, FIRST_STEP, STOP)
    code, _, err = own_process(copied, name, *given)
    assert code == 1 and "\nstopped" in err and "Traceback" not in err
    assert state(path.parent) == before
    edit(script, STOP, FIRST_STEP)
    edit(script, *LOSS[name])
    code, said = command(name, *given)
    assert code == 0 and "going on" not in said and "\nepoch 1 " in said
    old, new = (
        torch.load(folder / f"{name}.pt", weights_only=True) for folder in (trained, path.parent)
    )
    assert [row["epoch"] for row in new["history"]] == [1]
    assert new["settings"] == old["settings"] | {"epochs": 1, "seed": 3}
    assert new["code"] != old["code"]
    assert any(not torch.equal(new["model"][key], p) for key, p in old["model"].items())


# ---- a copy of a script: samples


@BOTH
def test_weights_that_do_not_fit_give_a_one_line_error(copied, trained, command, name):
    path = finished(trained, name, copied / "out")
    before = state(path.parent)
    edit(copied / f"{name}.py", *LAYER[name])
    message, said = command(name, *CPU, "--out", path.parent, "--sample", 4)
    assert is_one_line(f"{message}\n") and said == ""
    assert f"the weights in {path} do not fit the network of {name}.py" in message
    assert "--fresh" in message and state(path.parent) == before


@BOTH
def test_samples_are_those_of_the_seed(copied, trained, command, name):
    """From a checkpoint in --out or given by --load, even by code that trains differently."""
    path = finished(trained, name, copied / "out")
    edit(copied / f"{name}.py", *LOSS[name])
    before = path.read_bytes()
    drawn = {}
    for seed in "", "--seed 0", "--seed 1", "--seed 2":
        code, said = command(name, *CPU, "--out", path.parent, "--sample", 4, *seed.split())
        assert code == 0 and said == f"wrote {path.parent / f'{name}_sample.png'}\n"
        drawn[seed] = (path.parent / f"{name}_sample.png").read_bytes()
    assert drawn[""] == drawn["--seed 0"]
    assert len(set(drawn.values())) == 3
    other = copied / "other"
    code, _ = command(name, *CPU, "--out", other, "--load", path, "--sample", 4, "--seed", 1)
    assert code == 0 and os.listdir(other) == [f"{name}_sample.png"]
    assert (other / f"{name}_sample.png").read_bytes() == drawn["--seed 1"]
    assert path.read_bytes() == before


@BOTH
def test_a_file_of_the_other_script_is_no_checkpoint(copied, trained, command, name):
    (other,) = set(NAMES) - {name}
    path = finished(trained, other, copied / "out")
    message, _ = command(name, *CPU, "--out", copied / "new", "--load", path, "--sample", 4)
    assert is_one_line(f"{message}\n") and f"{path} is not a checkpoint of {name}.py" in message
    message, _ = command(name, *CPU, "--out", copied / "new", "--load", path)
    assert is_one_line(f"{message}\n") and "--load only goes with --sample" in message
    assert os.listdir(copied / "new") == []


@BOTH
def test_a_contradicting_flag_names_both_values(copied, trained, command, name):
    path = finished(trained, name, copied / "out")
    before = state(path.parent)
    for more in "--epochs 1", "--epochs 1 --sample 4":
        message, said = command(name, *CPU, "--out", path.parent, *more.split())
        assert is_one_line(f"{message}\n") and said == ""
        assert f"{path} has epochs 2, not 1: leave out --epochs" in message
    message, _ = command(name, *CPU, "--out", path.parent, "--seed", 1)
    assert f"{path} has seed 0, not 1: leave out --seed" in message
    assert state(path.parent) == before


if __name__ == "__main__":
    program(*sys.argv[1:])
