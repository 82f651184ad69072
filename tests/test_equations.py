"""EQUATIONS.md and the tags in the source agree: which function computes which equation of which text."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("vae", "ddpm", "compare")
TAG = r"\b(KW|Ho|[Rr]eport),?\s+(appendix [A-Z]|Algorithm \d|\(\d+\)(?:(?:,| and)\s+\(\d+\))*)"
NUMBER = r"appendix [A-Z]|Algorithm \d|\(\d+\)"


def comments(source):
    """(line, text) of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def tags(name):
    """{(text, number, function)} of every tag in the comments and docstrings of a script."""
    source = (ROOT / f"{name}.py").read_text()
    scopes, texts = [], []  # (last line - first line, first, last, name); (text, function)

    def visit(node, path):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            path += "." + node.name if hasattr(node, "name") else ""
            first, last = (node.lineno, node.end_lineno) if path != name else (1, len(source))
            scope = f"{name}.py" if path == name else path
            scopes.append((last - first, first, last, scope))
            texts.append((ast.get_docstring(node) or "", scope))
        for child in ast.iter_child_nodes(node) if not isinstance(node, ast.FunctionDef) else ():
            visit(child, path)  # what stands in a function within a function is the outer one's

    visit(ast.parse(source), name)
    texts += [(text, min(scope for scope in scopes if scope[1] <= line <= scope[2])[3])
              for line, text in comments(source)]
    return {(paper.replace("R", "r"), number, scope) for text, scope in texts
            for paper, numbers in re.findall(TAG, text) for number in re.findall(NUMBER, numbers)}


def index():
    """The rows of EQUATIONS.md: (text, numbers, what follows the last of them, where)."""
    for section in (ROOT / "EQUATIONS.md").read_text().split("\n## ")[1:]:
        for line in section.splitlines():
            head, _, where = (re.split(r"(?<!\\)\|", line) + [""] * 4)[1:4]
            numbers = re.findall(NUMBER, head)
            if ")-(" in head:
                first, last = re.findall(r"\d+", head)
                numbers = [f"({i})" for i in range(int(first), int(last) + 1)]
            if numbers:
                yield section.split()[0], numbers, where


INDEX = {(text, number, function) for text, numbers, where in index() for number in numbers
         for function in re.findall(r"`([^`]+)`", where)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_tag_stands_in_the_index(name):
    assert len(tags(name)) > 1 and not tags(name) - INDEX


def test_every_function_in_the_index_exists_and_has_the_tag():
    assert not INDEX - set().union(*map(tags, SCRIPTS))


@pytest.mark.parametrize("text, last", [("KW", 13), ("Ho", 26), ("report", 74)])
def test_the_index_has_every_number_once_in_order(text, last):
    numbers = [number for each, numbers, _ in index() if each == text for number in numbers if number[0] == "("]
    assert numbers == [f"({i})" for i in range(1, last + 1)]


def test_an_equation_without_a_function_says_so():
    for text, numbers, where in index():
        assert "`" in where or re.search(r"no code|slip|its logarithm", where), (text, numbers)


def test_slips_are_those_of_the_readme():
    rows = re.findall(r"^\| report([^|]*)\|", (ROOT / "README.md").read_text(), re.M)
    slips = {number for text, numbers, where in index() if "slip, see README" in where for number in numbers}
    assert slips == {number for row in rows for number in re.findall(r"\(\d+\)", row)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_tags_in_comments_have_one_form_and_end_the_comment(name):
    for line, comment in comments((ROOT / f"{name}.py").read_text()):
        if re.search(r"\b(KW|Ho|[Rr]eport)\W+\(", comment):
            assert re.search(rf"{TAG}(, {TAG})*$", comment) and "Report" not in comment, f"{name}.py:{line}"
