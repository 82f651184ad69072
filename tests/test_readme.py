"""The README cannot rot: its snippets stand in the source, its commands parse, its pictures exist, and its
index of equations and the tags in the source agree."""
import ast
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest

import compare
import ddpm
import vae

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"vae": vae, "ddpm": ddpm, "compare": compare}
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in (*SCRIPTS, "common")}
SOURCE = "\n".join(SOURCES.values())
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if code.startswith(" ")]
COMMANDS = re.findall(r"python (\w+)\.py([^#\n`|&)]*)", README)
THEIRS = {"--batch_size", "DATA_DIR", "s"}  # the published code's flag, and what is no name in our source


# ---- the page

def test_there_are_ten_equations():
    assert len(SNIPPETS) == 10


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_stand_in_the_source(snippet):
    assert snippet in SOURCE


def test_there_are_commands_for_each_script():
    assert {script for script, _ in COMMANDS} >= {*SCRIPTS}


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_commands_are_understood(script, flags):
    SCRIPTS[script].parse(shlex.split(flags))


def test_flags_and_names_exist():
    known = set(re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', SOURCE)) | THEIRS
    assert not set(re.findall(r"`(--[\w-]+)", README)) - known
    for name in set(re.findall(r"`(\w+)`", README)) - THEIRS:
        assert re.search(rf"\b{name}\b", SOURCE), name


def test_pictures_exist_and_are_small():
    pictures = {ROOT / picture for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)}
    assert pictures and pictures == set((ROOT / "figures").iterdir())
    assert sum(picture.stat().st_size for picture in pictures) < 3e6


def test_no_line_of_the_source_is_too_long():
    for name, source in SOURCES.items():
        for number, line in enumerate(source.splitlines(), 1):
            margin = name == "compare" and line[:1] not in (" ", "")  # there stands the text of report.md
            assert len(line) <= 110 or margin, f"{name}.py:{number}"


# ---- the index of equations

TAG = r"\b(KW|Ho|[Rr]eport),?\s+(appendix [A-Z]|Algorithm \d|\(\d+\)(?:(?:,| and)\s+\(\d+\))*)"
NUMBER = r"appendix [A-Z]|Algorithm \d|\(\d+\)"


def comments(name):
    """(line, text) of every comment of a script."""
    for token in tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def tags(name):
    """{(text, number, function)} of every tag in the comments and docstrings of a script."""
    scopes, texts = [], []  # (last line - first line, first, last, name); (text, function)

    def visit(node, path):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            path += "." + node.name if hasattr(node, "name") else ""
            first, last = (node.lineno, node.end_lineno) if path != name else (1, len(SOURCES[name]))
            scope = f"{name}.py" if path == name else path
            scopes.append((last - first, first, last, scope))
            texts.append((ast.get_docstring(node) or "", scope))
        for child in ast.iter_child_nodes(node) if not isinstance(node, ast.FunctionDef) else ():
            visit(child, path)  # what stands in a function within a function is the outer one's

    visit(ast.parse(SOURCES[name]), name)
    texts += [(text, min(scope for scope in scopes if scope[1] <= line <= scope[2])[3])
              for line, text in comments(name)]
    return {(paper.replace("R", "r"), number, scope) for text, scope in texts
            for paper, numbers in re.findall(TAG, text) for number in re.findall(NUMBER, numbers)}


def index():
    """{(text, number, function)} of the README's table."""
    page = README.partition("\n## Where each equation is used\n")[2].split("\n## ")[0]
    for line in page.splitlines():
        if line.startswith("| `"):
            _, function, *columns = line.split("|")
            for text, column in zip(("KW", "Ho", "report"), columns):
                for number in re.findall(NUMBER, column):
                    yield text, number, function.strip(" `")


def without_code(text):
    """The numbers that the line under the table lists as having no code."""
    listed = re.search(rf"No code: .*?\b{text} ([^;.]*)", README, re.S)[1]
    for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", listed):
        yield from range(int(first), int(last or first) + 1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_index_and_the_tags_in_the_source_agree(name):
    rows = {row for row in index() if row[2].split(".")[0] == name}
    assert len(rows) > 1 and rows == tags(name)


@pytest.mark.parametrize("text, last", [("KW", 13), ("Ho", 26), ("report", 74)])
def test_every_equation_has_a_function_or_is_said_to_have_none(text, last):
    computed = {int(number[1:-1]) for paper, number, _ in index() if paper == text and number[0] == "("}
    rest = list(without_code(text))
    assert sorted([*computed, *rest]) == list(range(1, last + 1))


def test_the_slips_that_the_page_explains_are_those_of_the_report():
    rows = " ".join(re.findall(r"^\| report([^|]*)\|", README, re.M))
    slips = {int(number) for number in re.findall(r"\((\d+)\)", rows)}
    assert slips == {14, 23, 27, 28, 32, 33, 53, 57, 58, 61, 66}


@pytest.mark.parametrize("name", SCRIPTS)
def test_tags_in_comments_have_one_form_and_end_the_comment(name):
    for line, comment in comments(name):
        if re.search(r"\b(KW|Ho|[Rr]eport)\W+\(", comment):
            assert re.search(rf"{TAG}(, {TAG})*$", comment) and "Report" not in comment, f"{name}.py:{line}"
