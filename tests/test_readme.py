"""The README says what the program does."""

import re
import shlex
from pathlib import Path

import matplotlib
import pytest

from xelm.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md")


def blocks(kind, page=README):
    return re.findall(rf"```{kind}\n(.*?)```", page, re.S)


def test_help_in_the_readme_is_that_of_the_program(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert blocks("text")[0].rstrip() == parser().format_help().rstrip()


def commands(page=README):
    lines = "\n".join(blocks("(?:ba)?sh", page)).replace("\\\n", " ").splitlines()
    found = [part for line in lines for part in line.split("&&") if "xelm " in part]
    return [shlex.split(part, comments=True) for part in found]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:3]))
def test_every_command_in_the_readme_is_one_that_the_program_takes(words):
    name = words.index(next(word for word in words if word.endswith("xelm")))
    parser().parse_args(words[name + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_in_a_page_is_one_that_the_program_takes(page):
    known = parser()
    for words in commands(page.read_text(encoding="utf-8")):
        name = next((n for n, word in enumerate(words) if word.endswith("xelm")), None)
        if name is not None and words[name + 1 :] and words[0] != "pip":
            known.parse_args(words[name + 1 :])


def test_the_readme_shows_every_job():
    verbs = {words[1] for words in commands()}
    assert {"quickstart", "cluster", "init", "branch", "train", "grow", "generate"} <= verbs


def test_the_first_python_example_runs_as_it_stands(capsys, tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    example = blocks("python")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert "8 languages, 4 clusters" in capsys.readouterr().out
    assert (tmp_path / "tree.png").stat().st_size > 10_000
