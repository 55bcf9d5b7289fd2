"""Every command explains its options and prints JSON for machines; configurations can be seen."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from xelm import cli
from xelm.cli import parser
from xelm.commands import COMMANDS
from xelm.commands.options import given_fields
from xelm.config import RunConfig
from xelm.inference.routing import Routing
from xelm.inference.sampling_params import SamplingParams
from xelm.presets import PRESETS
from xelm.settings import from_json, to_json


def actions(command):
    """Its options and arguments."""
    subparsers = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in subparsers.choices[command]._actions if a.dest != "help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command):
    for action in actions(command):
        text = action.help or ""
        assert len(text.split()) > 2 or action.dest == "json", (action.dest, text)
        first = text.split()[0]
        assert first not in ("of", "that", "with", "to", "holds", "after", "(default:"), text


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "serve"])
def test_every_command_that_ends_prints_json_if_asked(command):
    assert "json" in [action.dest for action in actions(command)]


def test_generate_has_an_option_for_every_field_that_it_fills():
    found = {action.dest for action in actions("generate")}
    for kind in (Routing, SamplingParams):
        assert {f"{kind.__name__}.{field.name}" for field in fields(kind)} - found == set()


def test_an_option_says_what_its_field_says():
    found = {a.option_strings[0]: a for a in actions("generate") if a.option_strings}
    assert found["--abstain"].help == (
        "threshold: where no expert has a larger weight, --abstain-to decides instead of the "
        "router (default: the router always decides)"
    )
    assert found["--least-weight"].help.endswith("(default: 0.001)")
    assert found["--top-k"].help == (
        "number of most probable tokens to sample from (default: that of the seed's "
        "generation_config.json, or else all)"
    )
    assert found["--abstain-to"].choices == ("posterior", "seed", "dense")


def test_only_options_that_are_given_replace_defaults():
    arguments = ["--routing", "fixed", "--weights", "en=.7,de=.3", "--repetition-penalty", "1.2"]
    options = parser().parse_args(["generate", "RUN", "a", *arguments, "--stop", "x", "--stop", ""])
    weights = {"en": 0.7, "de": 0.3}
    assert given_fields(options, Routing) == {"name": "fixed", "weights": weights}
    wanted = {"repetition_penalty": 1.2, "stop": ("x", "")}
    assert given_fields(options, SamplingParams) == wanted


def test_presets_are_listed(xelm):
    lines = xelm("config").out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert lines[1].startswith("tiny        About 2 M parameters for corpora of some 10 MB")
    assert list(xelm("config", "--json").json()) == list(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_is_shown_whole_and_explained(xelm, preset):
    shown = xelm("config", preset, "--set", "experts.tokens=5e6").out
    config = from_json(RunConfig, yaml.safe_load(shown))
    assert config.experts.tokens == 5_000_000
    wanted = to_json(PRESETS[preset]())
    assert to_json(config) == wanted | {"experts": wanted["experts"] | {"tokens": 5_000_000}}
    assert xelm("config", preset, "--json").json() == wanted
    # Below each explanation its value.
    lines = shown.splitlines()
    place = lines.index("  tokens: 5000000")
    assert lines[place - 1].startswith("  # ")


def test_the_configuration_of_a_run_is_shown(xelm, tiny):
    found = xelm("config", tiny.directory, "--json").json()
    assert found["experts"]["tokens"] == 4096
    outcome = xelm("config", "tinny")
    assert outcome.code == 2 and "neither a preset (quickstart, tiny, small, hub)" in outcome.err


@pytest.mark.parametrize(
    "setting",
    [
        *("seed.tokens=7", "model.width=64", "model_type=xglm"),
        *("tokenizer_exponent=1", "tokenizer_algorithm=unigram"),
    ],
)
def test_a_setting_that_a_given_seed_makes_no_use_of_is_refused(xelm, tiny, tmp_path, setting):
    outcome = xelm(
        *("init", tmp_path / "RUN", "--corpus", tiny.corpus, "--seed", tiny.directory / "seed"),
        *("--set", setting),
    )
    assert outcome.code == 2 and f"{setting} has no effect on a given seed" in outcome.err
    assert not (tmp_path / "RUN").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--languages", "de,fr", "--exclude", "it", "-k", "2"], "it cannot be excluded"),
        (["--method", "by-hand", "--groups", "groups.yaml"], "'größe' cannot name an expert"),
        (["--method", "by-hand", "--groups", "dense.yaml"], "'dense' cannot name an expert"),
    ],
)
def test_clusters_that_branching_would_refuse_are_not_written(
    xelm, tmp_path, monkeypatch, options, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "groups.yaml").write_text("größe: [de, fr]\n", encoding="utf-8")
    (tmp_path / "dense.yaml").write_text("dense: [de, fr]\n")
    outcome = xelm("cluster", *options, "--out", "clusters")
    assert outcome.code == 2 and said in outcome.err
    assert not (tmp_path / "clusters").exists()


def test_some_languages_of_a_corpus_can_be_evaluated(xelm, copy):
    found = xelm(
        *("evaluate", copy.directory, "--corpus", copy.held_out, "--languages", "deu,en"),
        *("--routing", "language", "--calibration-tokens", 0, "--json"),
    )
    assert {row["language"] for row in found.json()["rows"]} == {"de", "en"}
    refused = xelm("evaluate", copy.directory, "--corpus", copy.held_out, "--languages", "sv")
    assert refused.code == 2 and "sv" in refused.err


def test_weights_by_hand_have_no_least_weight(xelm, tiny):
    outcome = xelm(
        *("generate", tiny.directory, "a", "--routing", "fixed", "--weights", "en-es=1"),
        *("--least-weight", 0.2),
    )
    assert outcome.code == 2 and "--least-weight has no effect on fixed weights" in outcome.err


def test_results_for_machines(xelm, copy, tmp_path):
    """Commands whose JSON no other test reads."""
    run = copy.directory
    assert xelm("report", run, "--json").json() == {"report": str(run / "results/report.html")}
    merged = xelm("merge", run, "--out", tmp_path / "merged", "--json").json()
    weights = {"de-fr@v1": 0.5, "en-es@v1": 0.5}
    assert merged == {"out": str(tmp_path / "merged"), "weights": weights}
    branched = xelm("branch", run, "--clusters", copy.clusters, "--json").json()
    assert {e["name"]: e["status"] for e in branched} == dict.fromkeys(
        ["de-fr", "en-es"], "published"
    )
    trained = xelm("train", run, "--all", "--json").json()
    assert {each["state"] for each in trained} == {"done"}
    init = xelm(
        *("init", tmp_path / "OTHER", "--corpus", copy.corpus, "--seed", run / "seed", "--json"),
        *("--preset", "quickstart", "--languages", "de", "--set", "experts.sequence_length=32"),
        *("--set", "grow.sequence_length=32"),
    ).json()
    assert init["languages"]["de"]["documents"] == 60
    states = xelm("features", run, "--documents", 2, "--out", tmp_path / "s.npz", "--json").json()
    assert states["languages"] == ["de", "en", "es", "fr", "pt"]


QUIET = """
import socket, sys
def refuse(*arguments, **options):
    print("a host was looked up:", arguments[:2], file=sys.stderr)
    raise OSError("no network")
socket.getaddrinfo = refuse
from xelm.process import prepare
prepare()
import datasets
assert len(datasets.load_dataset("json", data_files=sys.argv[1], split="train")) == 1
"""


def test_reading_a_file_asks_no_host(tmp_path):
    """The datasets library counts who loads what, at a host, unless it is told not to."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path / "a.jsonl")],
        env={**environment, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a host was looked up" not in done.stderr


def test_a_command_leaves_nothing_to_the_next_in_the_same_process():
    first = cli._parsed(["train", "RUN", "--all"])
    first.settings.append("experts.tokens=7")
    first.names.append("sv")
    second = cli._parsed(["train", "RUN", "--all"])
    assert second.settings == [] and second.names == []
