"""The benchmarks have the options that the docs call them with, and the experiments on real text
divide the languages as they say."""

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cheap_experts
import reproduce
import systems
import trials

ROOT = Path(__file__).parents[1]
BENCHMARKS = {
    path.stem: text
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if "def main(" in (text := path.read_text(encoding="utf-8"))
}


def commands():
    """Name and arguments of each benchmark that a page of the docs, or its own docstring, calls."""
    pages = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))]
    for text in [*pages, *BENCHMARKS.values()]:
        text = re.sub(r"\\\n\s*", " ", text)
        for name, rest in re.findall(r"python\s+benchmarks/(\w+)\.py([^`\n#]*(?:\n +\[.*)?)", text):
            yield name, re.sub(r"[\[\]]", " ", rest).split()


def options_of(name, monkeypatch, capsys):
    """The options that a benchmark has, by what it prints for --help."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_have_the_options_that_their_commands_have(name, monkeypatch, capsys):
    known = options_of(name, monkeypatch, capsys)
    called = [words for other, words in commands() if other == name]
    assert called, f"nothing says how {name}.py is called"
    wanted = {word for words in called for word in words if re.match(r"--?[a-z]", word)}
    assert wanted <= known


def test_commands_call_benchmarks_that_there_are():
    assert {name for name, _ in commands()} <= set(BENCHMARKS)


@pytest.mark.parametrize("system", [s for s in reproduce.SYSTEMS if not s.startswith("tfidf")])
def test_every_system_has_every_language_once(system):
    clusters = systems.clusters_of(None, system, repetition=0).clusters
    members = [tag for tags in clusters.values() for tag in tags]
    assert sorted(members) == sorted(systems.LANGUAGES)
    assert len(clusters) == int(system.rpartition("-k")[2])


def test_every_system_has_settings_that_are_searched_for():
    kinds = {systems.kind_of(system) for system in ("dense", *reproduce.SYSTEMS)}
    assert kinds == set(reproduce.TUNED)
    assert all(systems.kind_of(system) == kind for kind, system in reproduce.TUNED.items())


def test_random_clusters_differ_between_repetitions():
    first, second = (systems.clusters_of(None, "random-k8", r).clusters for r in (0, 1))
    assert set(first.values()) != set(second.values())


def test_an_interval_is_that_of_students_t():
    # 1.96 in the limit; 4.303 with two degrees of freedom. The standard error is 1 / sqrt(3).
    assert trials.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert trials.interval([1.5]) == "1.500"


def test_a_line_that_was_not_written_whole_is_measured_again(tmp_path):
    trials.add(tmp_path / "results.jsonl", {"arm": "full"})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"arm": "lora')
    assert trials.read(tmp_path / "results.jsonl") == [{"arm": "full"}]


def test_cheap_experts_are_compared_over_the_random_seeds_that_have_every_expert():
    def line(expert, arm, random_seed, bits):
        figures = {
            "own": {"de": {"expert": bits, "parent": 3.0, "seed": 3.0}},
            "others": {"sw": {"expert": bits + 2, "parent": 4.0}},
        }
        sizes = {"bytes": 2_000_000, "trained": 500_000, "step_bytes": 30_000_000}
        trial = {"expert": expert, "arm": arm, "random_seed": random_seed}
        return {**trial, **sizes, "figures": figures}

    lines = [line("a", "full", 0, 2.0), line("b", "full", 0, 2.2), line("a", "full", 1, 9.0)]
    table = cheap_experts.table(lines, ["full", "lora-4"]).splitlines()
    assert table[2:] == [
        "| seed | - | - | - | 3.000 | 4.000 | 0 |",
        "| full | 2.00 | 0.500 | 30.0 | 2.100 | 4.100 | 0.100 |",
        "",
        "random seeds: 1; experts: a, b",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("unserved RUN TEXT --tokens 200", "| mean of 4 served |"),
        ("unusual_text RUN TEXT --tokens 200", "| capitals |"),
        (
            "routing RUN TEXT --documents 2 --naive 128",
            "| several languages, one text not served |",
        ),
        ("language_check --run RUN --corpus TEXT", "pt             no   "),
        ("merging RUN --corpus TEXT --documents 1", "| model-stock |"),
        (
            "cheap_experts RUN OUT --experts en-es --seeds 2 --arms full,lora-2,frozen-0,svd-2",
            "random seeds: 2; experts: en-es",
        ),
        ("first_batch --documents 1e3", "| 1,000 |"),
        ("checking --width 64", "| SHA-256 of the file |"),
    ],
)
def test_benchmarks_go_on_to_the_end_of_their_tables(command, row, copy, monkeypatch, capsys):
    name, *arguments = command.split()
    places = {"RUN": copy.directory, "TEXT": copy.corpus, "OUT": copy.directory.parent / "out"}
    monkeypatch.setattr(sys, "argv", [name, *(str(places.get(each, each)) for each in arguments)])
    importlib.import_module(name).main()
    assert row in capsys.readouterr().out
