"""Two processes under torchrun share each batch; rank 0 alone speaks and writes."""

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

import common
import ddpm
import vae

REPO = Path(__file__).resolve().parent.parent
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NAMES = ["ddpm", "vae"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="not tried")


def launch(*command, **more):
    """Runs it by two processes -> exit code, lines of stdout, own part of stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*LAUNCHER, *map(str, command)], env=environment, **pipes)
    try:
        said, err = process.communicate(timeout=200)
    finally:
        process.terminate()  # the launcher, which ends its workers
    own, *_ = err.partition("torch/distributed/")[0].rpartition("\n")
    return process.returncode, said.splitlines(), own


# ---- what each process runs, when this file is launched


def gradients(args):
    """Of both models, by one process on all images, and averaged over two shares."""
    x, t = torch.rand(6, 1, 28, 28).double(), torch.tensor([1, 2, 3, 4, 1, 2])
    noise, latent = torch.randn_like(x), torch.randn(1, 6, 2).double()
    model, coder = ddpm.DDPM(ddpm.UNet(width=4, T=4), T=4, loss="v").double(), vae.VAE().double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    found, mine = [], slice(3 * common.RANK, 3 * common.RANK + 3)
    for common.WORLD, share in (1, slice(6)), (2, mine):
        elbo_terms, loss_of = common.wrap(coder, args), common.wrap(model, args)
        reconstruction, kl = elbo_terms(x[share], latent[:, share])
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
    dist.init_process_group = dist.destroy_process_group = lambda *_: None  # one is for all
    rank, save, write = common.RANK, common.save_checkpoint, torch.save

    def hooked(path, settings, history, **parts):
        if folder == "stop" and len(history) == 2:
            raise KeyboardInterrupt
        save(path, settings, history, **parts)
        write(parts["model"].state_dict(), f"{path}.rank{rank}")

    common.save_checkpoint = hooked
    if rank > 0:  # nothing to write with
        torch.save = Figure.savefig = None
    small = {"ddpm": "--T 4 --width 4", "vae": "--latent-dim 2"}
    commands = ("whole", ""), ("stop", ""), ("parts", ""), ("parts", "--sample 3")
    for name, (folder, more) in itertools.product(NAMES, commands):
        flags = f"--data-dir {data} --out {out}/{folder.replace('stop', 'parts')} --device cpu "
        flags += f"--limit 70 --epochs 2 --batch-size 32 {small[name]} {more}"
        sys.argv = [name, *flags.split()]
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


def test_the_averaged_gradient_is_that_of_one_on_both_shares(launched):
    for rank in 0, 1:
        one, several = torch.load(launched[0] / f"gradients.rank{rank}")
        torch.testing.assert_close(several, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_both_end_with_the_same_weights_also_after_a_stop(launched, name):
    paths = [launched[0] / folder / f"{name}.pt" for folder in ("whole", "parts")]
    whole, parts = (torch.load(path, weights_only=True) for path in paths)
    for path, rank in itertools.product(paths, (0, 1)):
        weights = torch.load(f"{path}.rank{rank}", weights_only=True)
        torch.testing.assert_close(weights, whole["model"], rtol=0, atol=0)
    assert len(whole["history"]) == len(parts["history"]) == 2


def test_rank_0_alone_speaks_and_writes(launched):
    _, said = launched
    counts = {"DDPM on": 3, "VAE on": 3, "epoch 1": 4, "epoch 2": 4, "wrote": 6}
    assert {words: sum(line.startswith(words) for line in said) for words in counts} == counts


def test_an_odd_batch_is_one_line(digits, tmp_path):
    flags = "--device", "cpu", "--data-dir", digits, "--out", tmp_path, "--batch-size", 33
    code, _, err = launch(REPO / "ddpm.py", *flags)
    assert code != 0 and "Traceback" not in err and os.listdir(tmp_path) == []
    assert "error: 2 processes cannot share 33 images" in err


def test_missing_data_are_one_line(tmp_path):
    flags = "--device", "cpu", "--data", "fashion", "--data-dir", tmp_path, "--out", tmp_path
    nowhere = "http://127.0.0.1:9"
    code, _, err = launch(REPO / "vae.py", *flags, http_proxy=nowhere, https_proxy=nowhere)
    assert code != 0 and "Traceback" not in err and "Connection closed" not in err
    assert "error: cannot read or download fashion" in err


if __name__ == "__main__":
    program(*sys.argv[1:])
