"""Two processes under torchrun take the steps of one, and rank 0 alone speaks and writes."""
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import common
import ddpm
import vae

REPO = Path(__file__).resolve().parent.parent
MODELS = {"vae": (vae, ["--kl-weight", "0.5"]), "ddpm": (ddpm, ["--T", "4", "--schedule", "cosine"])}


def program(out, data, patch):
    """What each process runs: two epochs of two steps, in float64.  Two stop, go on, and draw."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(common, "has_bfloat16", lambda device: False)
    load, average, save, averages = common.load_data, common.average, torch.save, []
    patch.setattr(common, "load_data", lambda *given: [part[:70] for part in load(*given)])
    if common.RANK > 0:
        torch.save = Figure.savefig = None  # nothing to write with

    def kept(tensors):
        tensors = list(tensors)
        average(tensors)
        averages.append([tensor.clone() for tensor in tensors])
    patch.setattr(common, "average", kept)

    several, cpu = common.WORLD > 1, common.pick_device("cpu")
    for name, (script, more) in MODELS.items():
        flags = ["--data-dir", data, "--out", out, "--device", "cpu", "--batch-size", "32", "--epochs", "2",
                 "--lr", "1e-4", *more]
        averages.clear()
        if several:
            with contextlib.suppress(SystemExit):
                script.train(script.parse(flags), cpu, lambda model, epoch: sys.exit() if epoch > 1 else {})
        model, _ = script.train(script.parse(flags + ["--resume"] * several), cpu)
        save([averages[0], model.state_dict()], f"{out}/{name}.rank{common.RANK}")
        if several:
            torch.distributed.barrier()  # until rank 0 has saved the last epoch
            script.main(flags + ["--resume"])
    if several:
        torch.distributed.barrier()  # until rank 0 has drawn
        vae.main(["--data-dir", data, "--out", f"{out}/none", "--device", "cpu", "--batch-size", "33"])


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """The folders of a run by one process and of the same by two; exit code, stdout and stderr of the two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen([*launcher, __file__, str(two), str(digits)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)})
    try:
        with pytest.MonkeyPatch.context() as patch:
            torch.set_default_dtype(torch.float64)
            program(str(one), str(digits), patch)
        said, err = process.communicate(timeout=200)
    finally:  # the end must not hang
        torch.set_default_dtype(torch.float32)
        process.terminate()  # the launcher then ends its workers; killed, it would leave them
    return one, two, process.returncode, said.replace("\r", "\n").splitlines(), err


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_take_the_steps_of_one(runs, name):
    one, two, _, _, err = runs
    assert (two / "ddpm.rank0").exists() and (two / "ddpm.rank1").exists(), err
    (gradients, model), *ranks = (torch.load(folder / f"{name}.rank{rank}", weights_only=True)
                                  for folder, rank in ((one, 0), (two, 0), (two, 1)))
    for first_step, weights in ranks:
        torch.testing.assert_close(first_step, gradients, rtol=0, atol=1e-10)
        torch.testing.assert_close(weights, model, rtol=0, atol=1e-9)  # a step is 1e-4
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    one, two = (common.load(folder / f"{name}.pt", name) for folder in (one, two))
    for a, b in zip(one["history"], two["history"], strict=True):
        assert all(a[term] == pytest.approx(b[term], rel=1e-9) for term in a if term != "seconds")
    assert one["settings"] == two["settings"] and len(one["history"]) == 2


def test_rank_0_alone_speaks_and_writes(runs):
    _, two, _, said, _ = runs
    assert sum("parameters on cpu" in line for line in said) == 6  # stopped, gone on with, drawn: two models
    for words in "epoch 1 ", "epoch 2 ", "wrote ":
        assert sum(line.startswith(words) for line in said) == 2
    assert {"vae.pt", "vae_samples.png", "ddpm.pt", "ddpm_trajectory.gif"} <= set(os.listdir(two))


def test_a_batch_that_the_processes_do_not_divide_is_one_clear_line(runs, monkeypatch):
    _, two, code, _, err = runs
    assert code == 1 and not os.listdir(two / "none")
    line = "error: --batch-size 33 is no multiple of the 2 processes: choose one that is"
    ours, _, _ = err.partition("torch/distributed/")[0].rpartition("\n")  # what its launcher adds is long
    assert line in ours and "Traceback" not in ours
    monkeypatch.setattr(common, "WORLD", 4)
    assert common.batch_size(vae.parse(["--batch-size", "64"]), range(100)) == 64
    with pytest.raises(common.InputError, match="--batch-size 30 is no multiple of the 4"):
        common.batch_size(vae.parse(["--batch-size", "64"]), range(30))  # fewer images than that


def test_missing_data_are_said_by_each_process(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--data", "fashion", "--data-dir", str(tmp_path), "--out", str(tmp_path), "--device", "cpu"]
    err = subprocess.run([*launcher, str(REPO / "vae.py"), *flags], text=True, timeout=200,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9",
                                           "https_proxy": "http://127.0.0.1:9"}).stderr
    ours, _, _ = err.partition("torch/distributed/")[0].rpartition("\n")
    assert "Traceback" not in ours and "Connection closed" not in err
    assert err.count("error: FashionMNIST can be neither read nor downloaded") == 2


def test_each_process_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(common, "LOCAL_RANK", 3)
    assert common.pick_device("auto") == common.pick_device("cuda") == torch.device("cuda", 3) == chosen[0]
    assert common.pick_device("cuda:1") == torch.device("cuda", 1)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    common.run(lambda: program(*sys.argv[1:], pytest.MonkeyPatch()))
