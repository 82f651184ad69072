"""README.md and docs/math.md are checked against the source and the results."""

import ast
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import compare
import ddpm
import vae

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"vae": vae, "ddpm": ddpm, "compare": compare}
PAGES = ("README.md", "docs/math.md")
SOURCES = ("vae.py", "ddpm.py", "common.py", "compare.py")
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in PAGES + SOURCES}
MATH = TEXTS["docs/math.md"]
SOURCE = "\n".join(TEXTS[name] for name in SOURCES)


def test_the_readme_is_short():
    assert len(TEXTS["README.md"]) <= 9000


def test_the_readme_shows_the_sampler_as_it_is():
    lines = re.search(r"```python\n(.*?)```", TEXTS["README.md"], re.S)[1]
    assert textwrap.indent(lines, 8 * " ") in TEXTS["ddpm.py"]


# ---- what the pages name


@pytest.mark.parametrize("page", PAGES)
def test_commands_flags_functions_and_files_exist(page):
    command = r"(?:python|torchrun) [^`\n]*?\b(vae|ddpm|compare)\.py\b(?! -h)([^#`\n|&)]*)"
    for script, flags in re.findall(command, TEXTS[page]):
        SCRIPTS[script].parse(shlex.split(flags))
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if "torchrun" not in span]
    for flag in re.findall(r"--[a-z][\w-]*", " ".join(spans)):
        assert f'"{flag}"' in SOURCE, flag
    names = {span.partition("(")[0] for span in spans if re.match(r"[\w./]+(\(.*\))?$", span)}
    names |= set(re.findall(r"\b(?:vae|ddpm|common|compare)\.\w+", TEXTS[page]))
    for name in names:
        # The base name, for files that a script writes.
        short = re.escape(name.rstrip("/").rpartition("/")[2])
        word = rf"\b{short}\b|(def|class) {short.rpartition('.')[2]}\b"
        assert (ROOT / name).exists() or re.search(word, SOURCE), name


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    link = r'(?:\]\(|(?:src|href)=")(?!http)([^)"#]*)#?([\w-]*)'
    for path, anchor in re.findall(link, TEXTS[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        heading = f"# {anchor.replace('-', ' ')}"
        assert not anchor or heading in target.read_text("utf-8").lower(), anchor


# ---- the equations


def functions():
    """(name, node, code) of each file, class and function, as `DDPM.loss`."""
    for script in SCRIPTS:
        lines = TEXTS[f"{script}.py"].splitlines(keepends=True)
        tree = ast.parse("".join(lines))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for owner in tree, *classes:
            name = getattr(owner, "name", "")
            yield name or f"{script}.py", owner, ""
            for node in owner.body:
                if isinstance(node, ast.FunctionDef):
                    code = "".join(lines[node.lineno : node.end_lineno])
                    yield f"{name}.{node.name}".strip("."), node, code


def test_equations_stand_above_the_lines_that_compute_them():
    parts = re.findall(r"^### (\d+)\. (.*?)(?=^##|\Z)", MATH, re.M | re.S)
    assert [int(number) for number, _ in parts] == list(range(1, 12))
    for _, part in parts:
        formulas = re.findall(r"\n\n\$\$\n(.*?)\n\$\$\n\n", part, re.S)
        snippets = re.findall(r"`([\w.]+)`[^`]*?:\n\n```python\n(.*?)```", part, re.S)
        assert formulas and snippets and len(snippets) == part.count("```python"), part
        assert not re.search(r"\\[^A-Za-z]", "".join(formulas))  # Markdown eats it
        for function, snippet in snippets:
            assert [1 for f, _, code in functions() if f == function and snippet in code], snippet


NUMBER = r"(?:appendix [A-Z]|Algorithm \d|\(\d+\)(?:-\(\d+\))?)"
TAG = rf"\b(KW|Ho|report),? ({NUMBER}(?:(?:,| and) {NUMBER})*)"
COMMENT = r"(?:^ *|  )# (.*)"


def equations(text):
    """("Ho", "(4)") of each tag in a text; (1)-(3) are three."""
    for paper, numbers in re.findall(TAG, " ".join(text.split())):
        for number in re.findall(NUMBER, numbers):
            ends = [int(end) for end in re.findall(r"\((\d+)\)", number)]
            every = [f"({n})" for n in range(ends[0], ends[-1] + 1)] if ends else [number]
            yield from ((paper, each) for each in every)


ROWS = re.findall(r"^\| ((?:KW|Ho|report) [^|]*) \| ([^|]*) \|$", MATH, re.M)


def test_the_index_and_the_tags_in_the_source_agree():
    index = set()
    for head, cell in ROWS:
        if not head.startswith("report"):
            for name in re.findall("`(.*?)`", cell):
                index |= {(*each, name) for each in equations(head)}
    tags = set()
    for name, node, code in functions():
        for text in ast.get_docstring(node) or "", *re.findall(COMMENT, code, re.M):
            tags |= {(*each, name) for each in equations(text)}
    assert not index ^ tags


def test_the_reports_equations_are_only_in_the_index_and_their_functions_exist():
    assert "report (" not in SOURCE
    known = {name for name, _, _ in functions()}
    named = {name for head, cell in ROWS if head[0] == "r" for name in re.findall("`(.*?)`", cell)}
    assert len(named) > 15 and named <= known


def test_the_index_lists_every_equation_once():
    found = [each for head, _ in ROWS for each in equations(head) if "(" in each[1]]
    every = {"KW": 24, "Ho": 26, "report": 74}.items()
    assert sorted(found) == sorted((p, f"({n + 1})") for p, last in every for n in range(last))


def test_a_tag_ends_its_comment():
    for comment in re.findall(COMMENT, SOURCE, re.M):
        if re.search(TAG, comment):
            assert re.search(rf"{TAG}(, {TAG})*$", comment), comment


# ---- the numbers


def numbers(text):
    """(number, half of its last digit) in a text; 54 % is 0.54, 2-D is none."""
    number = r"(?<!\w)(-?\d[\d,]*)\.?(\d*) ?(%?)(?![\w-])"
    for whole, decimals, percent in re.findall(number, text):
        scale = 0.01 if percent else 1
        value = float(f"{whole.replace(',', '')}.{decimals}")
        yield scale * value, 0.5001 * scale * 10 ** -len(decimals)


def test_numbers_of_the_readme_are_those_of_the_results():
    results = json.loads((ROOT / "figures/results.json").read_text("utf-8"))
    claims = {claim["claim"]: claim for claim in results["claims"]}
    rows = results["rows"] | claims
    found = set()
    for table in re.findall(r"(?:^\|.*\n)+", TEXTS["README.md"], re.M):
        table = re.sub(r"\]\(.*?\)|[\[*`]", "", table)  # links and bold type
        lines = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines()]
        for name, *cells in lines:
            found.add(name)
            row = rows.get(name, {})
            for column, cell in zip(lines[0][1:], cells, strict=True) if row else ():
                known = row.get("measured", row.get(column))
                known = f"{known:.9f}" if isinstance(known, float) else str(known)
                for number, half in numbers(cell):
                    right = any(abs(number - n) <= half for n, _ in numbers(known))
                    assert right, f"README.md: {name}, {column}: {cell}, not {known}"
            assert row.get("verdict", "") in cells or name not in claims, name
    assert found >= {*compare.RUNS, *claims}
