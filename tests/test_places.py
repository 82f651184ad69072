"""The scripts where people run them: notebooks, logs, other folders, full disks, an Apple GPU."""

import ast
import contextlib
import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import ddpm
import vae

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SCRIPTS = [vae, ddpm]
SMALL = {vae: [], ddpm: ["--T", "4", "--width", "4"]}
LATIN_1 = os.fsdecode(b"caf\xe9")
posix = pytest.mark.skipif(os.name == "nt", reason="not tried")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """No locks and no images that an earlier test has read."""
    monkeypatch.setattr(common, "_locks", {})
    common._read_folder.cache_clear()


def small(digits):
    """The beginning of every command line here: 70 digits, one epoch of two steps."""
    run = ["--limit", "70", "--batch-size", "32", "--epochs", "1", "--precision", "float32"]
    return ["--device", "cpu", "--data-dir", str(digits), *run]


@pytest.fixture
def flags(digits):
    return small(digits)


@pytest.fixture
def pics(tmp_path):
    """A folder of ten gray pictures."""
    folder = tmp_path / "pics"
    folder.mkdir()
    for i in range(10):
        Image.new("L", (16, 16), 20 * i).save(folder / f"{i}.png")
    return folder


def command(script, *flags):
    return [sys.executable, str(REPO / f"{script.__name__}.py"), *map(str, flags)]


def popen(words, **options):
    """Starts a process with its output in pipes."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=env, **pipes | options)


def finish(process):
    """Waits for a process -> exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, out, err


def fails(script, *flags):
    """Runs the script in this process, which must end with a one-line error -> that line."""
    with pytest.raises(SystemExit) as end:
        common.run(lambda: script.main([str(flag) for flag in flags]))
    assert isinstance(end.value.code, str) and end.value.code.startswith("error: ")
    assert "\n" not in end.value.code
    return end.value.code


def pictures(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.suffix != ".pt"}


# ---- notebooks, and other places without a terminal


def test_a_notebook_runs_the_scripts_and_shows_a_picture(flags, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    words = " ".join(["--out", str(tmp_path), *flags])
    model = " ".join(SMALL[ddpm])
    cells = [
        f"%run vae.py {words}",
        f"%run ddpm.py {words} {model}",
        "import ddpm",
        f"ddpm.main('{words} {model} --fresh'.split())",
        f"from IPython.display import Image\nImage('{tmp_path}/ddpm_samples.png')",
        "%run vae.py --sample 0",
    ]
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    where = {"metadata": {"path": str(REPO)}}
    nbclient.NotebookClient(notebook, timeout=200, resources=where).execute(
        env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    said = [{"stdout": "", "stderr": "", "shown": ""} for _ in cells]
    for cell, outputs in zip(notebook.cells, said, strict=True):
        for output in cell.outputs:
            if output.output_type == "stream":
                outputs[output.name] += output.text
            outputs["shown"] += " ".join(output.get("data", {}))
    for cell, name in (0, "vae"), (1, "ddpm"), (3, "ddpm"):
        assert f"wrote the pictures {name}_* in {tmp_path}" in said[cell]["stdout"]
        assert "100%" in said[cell]["stderr"] and "\r" in said[cell]["stderr"]
    assert "image/png" in said[4]["shown"]
    assert "error: argument --sample" in said[5]["stderr"]


@pytest.fixture(scope="module")
def background(digits, tmp_path_factory):
    """A run as a service starts it: stdout closed, a log, a launcher's and a user's settings.

    -> its flags, its folder, exit code, log, seconds.
    """
    out = tmp_path_factory.mktemp("background")
    style = out / "matplotlibrc"
    style.write_text("image.origin: lower\ntext.usetex: True\nfigure.facecolor: black\n")
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MATPLOTLIBRC": str(style)}
    words = [*small(digits), "--epochs", "20"]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command(vae, *words, "--out", out / "out")]
    started = time.monotonic()
    with open(out / "log", "w") as log:
        code, _, _ = finish(popen(closed, env=env, stderr=log))
    return words, out / "out", code, (out / "log").read_text(), time.monotonic() - started


@posix
def test_a_closed_stdout_is_no_error_and_a_log_is_short(background):
    _, _, code, log, seconds = background
    assert code == 0 and "Traceback" not in log and "40/40" in log
    assert log.count("it/s") <= 3 + seconds / 30 and len(log) < 1000


@posix
def test_a_launchers_variables_and_a_users_style_change_nothing(background, tmp_path):
    words, out, *_ = background
    vae.main([*words, "--out", str(tmp_path)])
    drawn = pictures(tmp_path)
    assert len(drawn) == 4 and pictures(out) == drawn


@posix
def test_a_closed_pipe_gives_a_one_line_error_and_keeps_the_checkpoint(flags, tmp_path):
    words = command(vae, *flags, "--out", tmp_path, "--epochs", "30")
    with open(tmp_path / "log", "w") as log:
        process = popen(words, stderr=log)
        assert process.stdout.readline().startswith("VAE on cpu")
        process.stdout.close()  # as head -1 does
        assert process.wait(200) != 0
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "Exception" not in log and "Broken" not in log
    assert log.splitlines()[-1].startswith("error: the output was closed")
    assert "run the same command to resume" in log
    assert common.load_checkpoint(tmp_path / "vae.pt", "vae")["history"]


# ---- the data


def test_two_first_runs_at_once_read_what_is_there_and_unpack_nothing(flags, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    ignored = shutil.ignore_patterns("*-ubyte")
    shutil.copytree(common.DATA_DIR / "MNIST" / "raw", raw, ignore=ignored)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(raw.parent.rglob("*"))]
    words = [*flags, "--data-dir", raw.parent.parent]
    both = [popen(command(vae, *words, "--out", tmp_path / name)) for name in "ab"]
    for code, out, err in map(finish, both):
        assert code == 0 and "wrote the pictures" in out, err
    assert [(path, path.stat().st_mtime_ns) for path in sorted(raw.parent.rglob("*"))] == before


@pytest.mark.parametrize("script", [common, *SCRIPTS])
def test_no_check_relies_on_assert(script):
    tree = ast.parse(Path(script.__file__).read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def test_a_browser_may_have_unpacked_the_files(flags, digits, tmp_path):
    raw = shutil.copytree(digits / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    for path in sorted(raw.iterdir())[:2]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    vae.main([*flags, "--data-dir", str(tmp_path), "--out", str(tmp_path / "a")])
    vae.main([*flags, "--out", str(tmp_path / "b")])
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_path_is_refused(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flag in "--data", "--out", "--data-dir", "--load":
        with pytest.raises(SystemExit, match="2"):
            script.main([*flags, flag, ""])
        assert (
            capsys.readouterr().err
            == f"error: argument {flag}: the path is empty (-h lists the flags)\n"
        )
    assert os.listdir(tmp_path) == []


def test_one_folder_under_three_names_is_one_data_set(pics, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*flags, "--size", "16", "--out", "out"]
    vae.main([*words, "--data", "pics"])
    assert f"{pics}: 10 pictures read, 0 other files, 0 skipped\n" in capsys.readouterr().out
    for name in "pics/", str(pics):
        vae.main([*words, "--data", name])
        assert capsys.readouterr().out.startswith("out/vae.pt is finished".replace("/", os.sep))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    vae.main([*flags, "--size", "16", "--out", "../out"])
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_pictures_that_change_between_a_stop_and_the_same_command(script, pics, flags, tmp_path):
    def stop(model, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    words = [*flags, "--data", str(pics), "--size", "16", "--epochs", "3", *SMALL[script]]
    args = script.parse([*words, "--out", str(tmp_path / "out")])
    common.start(args)
    with pytest.raises(KeyboardInterrupt):
        script.train(args, CPU, stop)
    path = tmp_path / "out" / f"{script.__name__}.pt"
    before = path.read_bytes()
    shutil.copy(pics / "0.png", pics / "new.png")
    line = fails(script, *words, "--out", tmp_path / "out")
    assert str(pics) in line and "have changed" in line and "--fresh" in line
    assert path.read_bytes() == before
    (pics / "new.png").unlink()
    model, history = script.train(args, CPU)
    assert [row["epoch"] for row in history] == [1, 2, 3]


def test_pictures_of_an_odd_kind_are_trained_on_as_they_look(flags, tmp_path, capsys):
    folder = tmp_path / "pics"
    folder.mkdir()
    for i in range(4):
        ramp = np.linspace(0, 1 / (i + 1), 256, dtype=np.float32).reshape(16, 16)
        Image.fromarray(ramp).save(folder / f"{i}.tiff")
    vae.main([*flags, "--data", str(folder), "--size", "16", "--out", str(tmp_path / "out")])
    assert ": 4 pictures read, 0 other files, 0 skipped\n" in capsys.readouterr().out
    settings = vae.load(tmp_path / "out" / "vae.pt").settings
    args = vae.parse(["--out", str(tmp_path / "out")])
    x_train, _, x_test, _ = common.load_data(common.Namespace(**settings), args, CPU)
    brightest = sorted(torch.cat([x_train, x_test]).amax((1, 2, 3)).tolist())
    assert brightest == [64, 85, 128, 255]


# ---- the folder of a run


@posix
def test_out_in_the_home_folder(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    vae.main([*flags, "--out=~/x"])
    assert os.listdir(tmp_path) == ["home"] and "vae.pt" in os.listdir(tmp_path / "home" / "x")


@posix
def test_two_runs_in_one_folder_and_a_kill(flags, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*flags, "--epochs", "5000", "--out", str(out)]
    process = popen(command(vae, *words))
    try:
        while not (out / "vae.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert "another run is writing" in fails(vae, *words)
        assert "another run is writing" in fails(vae, *words, "--fresh")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        finish(process)
    done = len(common.load_checkpoint(out / "vae.pt", "vae")["history"])

    def stop(model, epoch):
        assert epoch == done + 1
        raise KeyboardInterrupt

    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        vae.train(vae.parse(words), CPU, stop)
    assert capsys.readouterr().out.startswith(f"going on after epoch {done} of 5000")
    assert os.listdir(out) == ["vae.pt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_name_that_is_not_utf_8(script, flags, tmp_path, capsys):
    folder = tmp_path / LATIN_1
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this disk has no such names")
    for i in range(4):
        Image.new("L", (16, 16), 20 * i).save(folder / f"{LATIN_1}{i}.png")
    (folder / f"{LATIN_1}.png").touch()
    words = [*flags, "--data", str(folder), "--size", "16", *SMALL[script]]
    script.main([*words, "--out", str(folder / "out")])
    assert "caf?: 4 pictures read, 0 other files, 1 skipped: caf?.png (" in capsys.readouterr().out
    assert f"{script.__name__}_samples.png" in os.listdir(folder / "out")
    script.main([*words, "--out", str(folder / "out")])
    assert "caf?/out" in capsys.readouterr().out.replace(os.sep, "/")
    assert "caf?" in fails(script, *words, "--seed", "5", "--out", folder / "out")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_fills_up_while_pictures_are_drawn(script, flags, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    words = [*flags, *SMALL[script], "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        line = fails(script, *words)
    assert "No space left" in line and "_samples.png" in line and "is kept" in line
    assert os.listdir(tmp_path) == [f"{script.__name__}.pt"]
    script.main(words)
    assert f"{script.__name__}_samples.png" in os.listdir(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_sampling_leaves_the_checkpoints_folder_alone(script, flags, tmp_path, monkeypatch):
    name = script.__name__
    kept = tmp_path / "kept"
    script.main([*flags, *SMALL[script], "--out", str(kept)])
    (kept / f"{name}.pt").rename(kept / "model.pt")
    before = {path: path.stat().st_mtime_ns for path in [kept, *kept.iterdir()]}
    drawn = []
    monkeypatch.setattr(common, "plot_grid", lambda x, path, *_: drawn.append((x, path)))
    sample = ["--device", "cpu", "--sample", "3", "--load", str(kept / "model.pt")]
    for more in [], ["--seed", "0", "--precision", "float32"], ["--seed", "1"]:
        common.best_precision.cache_clear()
        script.main([*sample, "--out", str(tmp_path / "new"), *more])
    assert {path: path.stat().st_mtime_ns for path in [kept, *kept.iterdir()]} == before
    (x, path), (again, _), (other, _) = drawn
    assert path == tmp_path / "new" / f"{name}_sample.png" and x.shape == (3, 1, 28, 28)
    if common.best_precision(CPU) == "float32":
        assert torch.equal(x, again)
    assert not torch.equal(again, other)
    assert "--load" in fails(script, *flags, "--load", kept / "model.pt", "--out", tmp_path)


def test_more_steps_than_T_are_refused(flags, tmp_path):
    line = fails(ddpm, *flags, "--width", "4", "--steps", "2000", "--out", tmp_path)
    assert "--steps 2000" in line and "T = 1000" in line and os.listdir(tmp_path) == []
    ddpm.main([*flags, *SMALL[ddpm], "--steps", "4", "--out", str(tmp_path)])
    for more in [], ["--sample", "3"]:
        line = fails(ddpm, "--device", "cpu", "--steps", "5", "--out", tmp_path, *more)
        assert "--steps 5" in line and "T = 4" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_that_is_no_checkpoint_has_a_message_of_its_own(script, flags, tmp_path):
    path = tmp_path / f"{script.__name__}.pt"
    kinds = {"git lfs pull": b"version https://git-lfs.github.com/spec/v1\n", "damaged": b""}
    for words, content in (kinds | {"is not a checkpoint of": b"something else"}).items():
        path.write_bytes(content)
        for more in [], ["--sample", "3"]:
            line = fails(script, *flags, "--out", tmp_path, *more)
            assert words in line and str(path) in line
            assert ("delete it" in line) == (words == "damaged")
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    assert "cannot read" in fails(script, *flags, "--out", tmp_path)


# ---- an Apple GPU


class AppleGPU(TorchDispatchMode):
    """Raises RuntimeError at float64 where an Apple GPU, which has none, would see it.

    A table in float64 that lies on the CPU is not on the GPU: float64 may be computed from float64
    alone, and become a number or float32.  It must not be made from, or meet, any other tensor.
    What is inside of cpu() is exempt.
    """

    exempt = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.dtype for x in tree_leaves([args, kwargs]) if isinstance(x, torch.Tensor)}
        made = {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        new = torch.float64 in made and torch.float64 not in given
        if not self.exempt and (new or (torch.float64 in given and len(given) > 1)):
            raise RuntimeError(f"float64 on an Apple GPU: {func}")
        return result

    @contextlib.contextmanager
    def cpu(self):
        before, self.exempt = self.exempt, True
        yield
        self.exempt = before


def on_apple_gpu(monkeypatch, script):
    """An AppleGPU that exempts script.build, because models are built on the CPU."""
    mode = AppleGPU()
    build = script.build

    def build_on_cpu(settings):
        with mode.cpu():
            model = build(settings)
        assert not any(x.dtype == torch.float64 for x in model.state_dict().values())
        assert not any(x.dtype == torch.float64 for x in model.buffers())
        return model

    monkeypatch.setattr(script, "build", build_on_cpu)
    return mode


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_float64_reaches_an_apple_gpu(script, flags, tmp_path, monkeypatch):
    words = [*flags, *SMALL[script], "--out", str(tmp_path)]
    with on_apple_gpu(monkeypatch, script):
        script.main(words)
        script.main([*words, "--sample", "3"])
        if script is ddpm:
            script.main([*words, "--sample", "3", "--eta", "0", "--steps", "2"])
    assert len(pictures(tmp_path)) == 5


def test_float64_on_an_apple_gpu_is_noticed(flags, tmp_path, monkeypatch):
    table = torch.linspace(1, 0.5, 5, dtype=torch.float64)
    x = torch.ones(5)
    with AppleGPU() as mode:
        assert (table[1] / table[0]).item() == 0.875 and table.sqrt().float().dtype == x.dtype
        for wrong in (
            lambda: torch.randn(3, dtype=torch.float64),
            lambda: x.double(),
            lambda: table * x,
            lambda: table[torch.tensor([1, 2])],
            lambda: x.sum(dtype=torch.float64),
        ):
            with pytest.raises(RuntimeError, match="Apple"):
                wrong()
            with mode.cpu():
                wrong()
    rates = lambda model, t: (model.alpha_bar[t].view(-1, 1, 1, 1),) * 2  # noqa: E731
    monkeypatch.setattr(ddpm.DDPM, "rates", rates)
    words = [*flags, *SMALL[ddpm], "--out", str(tmp_path)]
    with on_apple_gpu(monkeypatch, ddpm), pytest.raises(RuntimeError, match="Apple"):
        ddpm.main(words)
