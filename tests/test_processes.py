"""Several processes: torchrun's against a single one, runs that meet in one folder, a disk that fills up."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common

REPO = Path(__file__).resolve().parent.parent
PYTHON = {"vae": ["vae.py"], "ddpm": ["ddpm.py", "--T", "8", "--schedule", "cosine"]}
# All in float32: in bfloat16 a sum that is rounded in parts differs by 1/500. Each rank keeps its weights.
FLOAT32 = """
import sys
sys.path.insert(0, {repo!r})
import torch, common, {script} as script
common.has_bfloat16 = lambda device: False
save = common.Run.save
def save_and_tell(run):
    save(run)
    torch.save(run.parts["model"].state_dict(), {out!r} + f"/rank{{common.RANK}}of{{common.WORLD}}")
common.Run.save = save_and_tell
common.run(script.main)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with synthetic digits under MNIST's names: files are read far faster than digits are drawn."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    parts = [part for seed in (0, 1) for part in common.synthetic_digits(500, seed)]
    for (name, shape), part in zip(common.MNIST_SHAPES.items(), parts):
        header = b"".join(n.to_bytes(4, "big") for n in (0x0800 + len(shape), *shape))
        (raw / name).write_bytes(header + part.to(torch.uint8).numpy().tobytes() * (shape[0] // 500))
    return raw.parent.parent


def start(data, out, command, *flags, launcher=(sys.executable,)):
    command = [*launcher, *command, "--data", "mnist", "--data-dir", data, "--out", out, "--device", "cpu", *flags]
    return subprocess.Popen([str(word) for word in command], cwd=REPO, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ended(process):
    said, _ = process.communicate(timeout=90)
    return process.returncode, said.replace("\r", "\n").splitlines()


def torchrun(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def checkpoint(out, name):
    saved = common.load(out / f"{name}.pt", name)
    for row in saved["history"]:
        del row["seconds"]
    return saved


def same(a, b, name):
    a, b = checkpoint(a, name), checkpoint(b, name)
    assert a["history"] == b["history"]
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())


# ---- torchrun

@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_two_processes_take_the_steps_of_one(data, tmp_path, name):
    flags = ["--limit", "100", "--batch-size", "33", "--epochs", "2"]  # the last batch has one image
    script = tmp_path / "script.py"
    for processes in 1, 2:
        out = tmp_path / str(processes)
        script.write_text(FLOAT32.format(repo=str(REPO), script=name, out=str(tmp_path)))
        launcher = torchrun(2) if processes == 2 else [sys.executable]
        code, said = ended(start(data, out, [script, *PYTHON[name][1:]], *flags, launcher=launcher))
        assert code == 0, said
        assert sum("parameters on cpu" in line for line in said) == 1  # rank 0 alone speaks
    one, two = checkpoint(tmp_path / "1", name), checkpoint(tmp_path / "2", name)
    assert torch.equal(one["rng"], two["rng"]) and one["model"].keys() == two["model"].keys()
    for part in {"model", "ema"} & one.keys():  # wrong shares or noise: 1e-2
        assert max((value - two[part][key]).abs().max() for key, value in one[part].items()) < 2e-4
    for a, b in zip(one["history"], two["history"]):
        assert all(a[term] == pytest.approx(b[term], rel=1e-4) for term in a)
    ranks = [torch.load(tmp_path / f"rank{rank}of2", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, ranks[1][key]) for key, value in ranks[0].items())


def test_torchrun_is_stopped_resumed_and_refused(data, tmp_path):
    flags = ["--limit", "1500", "--batch-size", "32", "--epochs", "4"]
    assert ended(start(data, tmp_path / "whole", ["vae.py"], *flags, launcher=torchrun(2)))[0] == 0
    out = tmp_path / "parts"
    for number in signal.SIGTERM, signal.SIGINT:
        process = start(data, out, ["vae.py"], *flags, "--resume", launcher=torchrun(2))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while "parameters on cpu" not in process.stdout.readline():
            assert process.poll() is None
        workers = children.read_text().split() if children.exists() else []
        time.sleep(0.3)
        process.send_signal(number)
        code, said = ended(process)
        assert code != 0 and sum("--resume goes on" in line for line in said) == 1, said
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    code, said = ended(start(data, out, ["vae.py"], *flags, "--resume", launcher=torchrun(2)))
    assert code == 0 and "vae: epoch 4" in "\n".join(said)
    same(tmp_path / "whole", out, "vae")

    before = (out / "vae.pt").read_bytes()
    code, said = ended(start(data, out, ["vae.py"], *flags, launcher=torchrun(2)))
    assert code != 0 and sum("vae.py: error:" in line for line in said) == 1  # not one for each process
    assert (out / "vae.pt").read_bytes() == before


def test_of_several_processes_each_takes_its_own_gpu_and_not_a_shared_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(common, "WORLD", 4)
    monkeypatch.setattr(common, "LOCAL_RANK", 3)
    assert common.pick_device("auto") == common.pick_device("cuda") == torch.device("cuda", 3) and chosen == [3, 3]
    with pytest.raises(common.InputError, match="cuda:1"):
        common.pick_device("cuda:1")


# ---- two runs into one folder

def test_a_second_run_into_a_folder_is_refused_until_the_first_is_gone(data, tmp_path):
    first = start(data, tmp_path, ["vae.py"], "--epochs", "1000")
    try:
        assert "parameters on cpu" in first.stdout.readline()
        for name in "vae", "ddpm":
            code, said = ended(start(data, tmp_path, PYTHON[name], "--overwrite", "--epochs", "1", "--limit", "32"))
            assert code == 2 and len(said) == 1 and f"another run is writing to {tmp_path}" in said[0]
        assert not (tmp_path / "ddpm.pt").exists()
    finally:
        first.kill()
        first.communicate()
    code, said = ended(start(data, tmp_path, ["vae.py"], "--overwrite", "--epochs", "1", "--limit", "32"))
    assert code == 0 and checkpoint(tmp_path, "vae")["settings"]["epochs"] == 1


def test_a_process_does_not_lock_itself_out(tmp_path):
    other = [sys.executable, "-c", f"import common\nwith common.locked({str(tmp_path)!r}): print('mine')"]
    with common.locked(tmp_path), common.locked(tmp_path / "."):  # as compare.py trains in its own folder
        assert b"InputError: another run" in subprocess.run(other, cwd=REPO, capture_output=True).stderr
    with common.locked(tmp_path):
        pass
    assert subprocess.run(other, cwd=REPO, capture_output=True).stdout == b"mine\n" and not os.listdir(tmp_path)


# ---- a full disk

def test_a_disk_that_fills_up_leaves_the_last_checkpoint(data, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=20m tmpfs {disk}"  # room for one checkpoint and half of the next
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mounts allowed here")
    shell = ["unshare", "-rm", "sh", "-c", f'{mount} && "$@"; code=$?; cp {disk}/vae.pt* {tmp_path}; exit $code', "sh"]
    flags = ["--limit", "100", "--epochs", "3"]
    code, said = ended(start(data, disk, ["vae.py"], *flags, launcher=[*shell, sys.executable]))
    assert code == 2 and "vae.py: error: cannot save" in said[-1] and "No space left" in said[-1]
    assert checkpoint(tmp_path, "vae")["epoch"] == 1 and sorted(os.listdir(tmp_path)) == ["disk", "vae.pt"]
