"""The README says what the program does."""

import re
import shlex
from pathlib import Path

import matplotlib
import pytest

from xelm.cli import parser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)


def test_help_in_the_readme_is_that_of_the_program(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert blocks("text")[0].rstrip() == parser().format_help().rstrip()


def commands():
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [part for line in lines for part in line.split("&&") if "xelm " in part]
    return [shlex.split(part, comments=True) for part in found]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:3]))
def test_every_command_in_the_readme_is_one_that_the_program_takes(words):
    name = words.index(next(word for word in words if word.endswith("xelm")))
    parser().parse_args(words[name + 1 :])


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
