"""The page cannot rot: its snippets stand in the source, its commands parse, its pictures exist."""
import re
import shlex
from pathlib import Path

import pytest

import compare
import ddpm
import vae

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCE = "\n".join((ROOT / f"{name}.py").read_text() for name in ("vae", "ddpm", "common", "compare"))
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if code.startswith(" ")]
COMMANDS = re.findall(r"python (\w+)\.py([^#\n`|&)]*)", README)


def test_there_are_ten_equations():
    assert len(SNIPPETS) == 10


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_stand_in_the_source(snippet):
    assert snippet in SOURCE


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_commands_are_understood(script, flags):
    {"vae": vae, "ddpm": ddpm, "compare": compare}[script].parse(shlex.split(flags))


def test_flags_exist():
    known = set(re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', SOURCE))
    for flag in re.findall(r"`(--[\w-]+)", README):
        assert flag in known or flag == "--batch_size"  # the published code's


def test_names_exist():
    for name in re.findall(r"`(\w+)`", README):
        if name not in ("DATA_DIR", "s"):
            assert re.search(rf"\b{name}\b", SOURCE), name


def test_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 3e6
    assert {ROOT / picture for picture in pictures} == {p for p in (ROOT / "figures").iterdir()}


def test_no_line_is_too_long():
    for path in [*ROOT.glob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            margin = path.name == "compare.py" and line[:1] not in (" ", "")  # there stands the text of report.md
            assert len(line) <= 110 or margin, f"{path.name}:{number}"
