"""The gate before publication: figures on held-out text, refusals, and ways past them."""

import json
from dataclasses import replace

import pytest

from clustering.errors import UserError
from experts.expert import Expert
from experts.registry import Registry
from experts.verify import verify
from xelm.api import open_run
from xelm.runs import gate
from xelm.runs.gate import evaluate_held_out
from xelm.runs.shares import expert_text
from xelm.settings import override, to_json
from xelm.training.metrics import HELD_OUT, best, read_metrics, trained_tokens

GROWN = "pt"
HARMFUL = ("--set", "grow.optimizer.learning_rate=.3")
"""A rate that is far too much."""


def grow(xelm, run, *options):
    return xelm("grow", run.directory, "--language", GROWN, "--corpus", run.corpus, *options)


def test_figures_of_a_published_expert_are_those_of_xelm_evaluate(copy, tmp_path):
    run, folder = open_run(copy.directory), tmp_path / "text"
    folder.mkdir()
    for expert in run.registry().published():
        held_out = expert_text(run, expert).held_out
        for source in held_out:
            tag = source.ids.language
            lines = (copy.corpus / f"{tag}.jsonl").read_text().splitlines()
            (folder / f"{tag}.jsonl").write_text(
                "".join(f"{lines[number]}\n" for number in source.documents)
            )
        results = run.evaluate(folder, languages=list(expert.languages))
        assert all(text.exact == text.near == 0 for text in results.texts.values())
        rows = {(row.system, row.language): row for row in results.rows}
        assert set(expert.evaluation["own"]) == set(expert.languages)
        for tag, found in expert.evaluation["own"].items():
            assert found["documents"] == 8 == rows["seed", tag].documents
            assert found["expert"] == pytest.approx(rows[expert.name, tag].bits_per_byte, rel=1e-5)
            assert found["seed"] == pytest.approx(rows["seed", tag].bits_per_byte, rel=1e-5)
            assert found["parent"] == found["seed"]  # it is the seed
        card = (expert.directory(run.directory) / "README.md").read_text()
        for tag, found in expert.evaluation["own"].items():
            assert f"| held-out text in {tag} | {found['expert']:.3f} bits a byte (the seed" in card


def test_an_expert_that_is_worse_is_kept_back_with_its_figures_and_published_by_name(
    xelm, copy, monkeypatch
):
    def measure(*given):
        found = evaluate_held_out(*given)
        for figures in found["own"].values():
            figures["expert"] = 1.02 * figures["parent"]
        return found

    monkeypatch.setattr("xelm.runs.publish.evaluate_held_out", measure)
    run = open_run(copy.directory)
    before = run.registry()
    refused = grow(xelm, copy, "--tokens", "512")
    assert refused.code == 2
    assert f"{GROWN}@v1 is not published: on held-out text it has" in refused.err
    assert f"xelm publish {copy.directory} {GROWN}" in refused.err
    # Nothing else has changed, and nothing is served.
    registry = run.registry()
    assert registry.published() == before.published()
    (kept,) = [expert for expert in registry.experts if expert not in before.experts]
    assert (kept.status, kept.directory(run.directory).is_dir()) == ("training", True)
    (state,) = [e for e in xelm("status", copy.directory, "--json").json() if e["name"] == GROWN]
    assert (state["state"], "is not published" in state["note"]) == ("kept back", True)
    assert verify(run.directory) == []
    assert xelm("status", copy.directory).out.splitlines()[-1] == f"{GROWN}: {state['note']}"
    # Again: nothing is trained again, and the answer is the same.
    assert grow(xelm, copy).err.splitlines()[-1] == refused.err.splitlines()[-1]
    other = grow(xelm, copy, "--tokens", "64")
    publishing = f"xelm publish {copy.directory} {GROWN}, or give it up with: xelm discard"
    assert f"{GROWN}@v1 is trained, and the gate keeps it back; publish it with: {publishing}" in (
        other.err
    )
    published = xelm("publish", copy.directory, GROWN)
    assert (published.code, published.out) == (0, f"published: {GROWN}@v1\n")
    assert verify(run.directory) == []
    expert = run.registry().expert(GROWN)
    assert expert.status == "published" and set(expert.evaluation["own"]) == {GROWN}
    assert "grow.tokens=512" in (expert.directory(run.directory) / "README.md").read_text()
    assert not run.failure(GROWN).exists()
    event = run.history()[-1]
    assert (event.action, event.experts) == ("publish", {f"{GROWN}@v1": "published"})
    assert "bits a byte in pt, and en-es@v1" in event.facts["refusal"]
    done = run.registry()
    again = xelm("publish", copy.directory, GROWN)
    assert (again.code, again.out) == (0, f"published: {GROWN}@v1\n")
    assert run.registry() == done
    run.retire(GROWN)
    retired = xelm("publish", copy.directory, GROWN)
    assert retired.code == 2
    assert "has no version that is trained and not published; it has v1 (retired)" in retired.err


FIGURES = {"own": {"sv": {"documents": 5, "expert": 4.3, "parent": 4.2, "seed": 4.5}}}


@pytest.mark.parametrize(
    ("parent", "changes", "settings", "fault"),
    [
        ("de@v1", {}, [], "4.300 bits a byte in sv, and de@v1 4.200 (+2.4%, at most +1.0% wanted)"),
        ("de@v1", {}, ["gate.worse=.03"], None),
        ("de@v1", {}, ["gate.worse=null"], None),
        ("de@v1", {"parent": 5.0, "seed": 4.2}, [], "and seed 4.200 (+2.4%, at most +1.0% wanted)"),
        ("seed", {"parent": 4.5}, [], None),
        ("de@v1", {"expert": float("nan")}, [], "nan bits a byte in sv, and de@v1 4.200"),
    ],
)
def test_the_gate_compares_with_the_parent_and_the_seed(
    parent, changes, settings, fault, tiny, tmp_path
):
    run = open_run(tiny.directory)
    config = override(run.config, settings)
    run = replace(run, directory=tmp_path, record={**run.record, "config": to_json(config)})
    (tmp_path / "train").mkdir()
    Registry(seed_sha256={}).save(tmp_path)
    expert = Expert(name="sv", languages=("sv",), parent=parent, round=1 + (parent != "seed"))
    figures = {"own": {"sv": FIGURES["own"]["sv"] | changes}}
    if fault is None:
        gate.check_gate(run, expert, figures)
        return
    with pytest.raises(UserError) as raised:
        gate.check_gate(run, expert, figures)
    assert fault in str(raised.value)
    assert (tmp_path / "train" / "sv.failed.txt").read_text() == str(raised.value)


@pytest.mark.parametrize(
    ("settings", "made", "refused"),
    [
        ([], None, True),
        (["held_out.share=0"], None, False),
        (["gate.worse=null"], None, False),
        ([], {"by": "adopt"}, False),
    ],
)
def test_an_expert_that_cannot_be_measured_is_not_published_unless_that_was_chosen(
    settings, made, refused, tiny, tmp_path
):
    run = open_run(tiny.directory)
    config = override(run.config, settings)
    run = replace(run, directory=tmp_path, record={**run.record, "config": to_json(config)})
    Registry(seed_sha256={}).save(tmp_path)
    expert = Expert(name="sv", languages=("sv",), parent="de@v1", round=2, made=made)
    found = gate.refusal_of(run, expert, {"own": {}})
    few = "it has so few documents in sv that none is held out, and so nothing says that it is no"
    assert found == (f"{few} worse than de@v1 (give more text)" if refused else None)


def test_other_languages_are_compared_where_the_gate_asks_for_them(xelm, copy):

    forgets = grow(xelm, copy, *HARMFUL, "--set", "gate.worse=null", "--set", "gate.others=0")
    assert forgets.code == 2, forgets.out
    assert (
        "bits a byte in de, and en-es@v1" in forgets.err and "bits a byte in pt" not in forgets.err
    )
    published = xelm("publish", copy.directory, GROWN)
    assert published.code == 0
    evaluation = open_run(copy.directory).registry().expert(GROWN).evaluation
    assert set(evaluation) == {"own"}  # those of the RUN's own settings


def test_tokens_of_an_expert_are_those_of_its_best_weights(tmp_path):
    for name, lines in {
        "metrics.jsonl": [{"step": 5, "tokens": 50}, {"step": 10, "tokens": 100}],
        "held_out.jsonl": [
            {"step": 0, "tokens": 0, "loss": 1.0},
            {"step": 4, "tokens": 40, "loss": 2.0},
            {"step": 8, "tokens": 80, "loss": 3.0},
        ],
    }.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trained_tokens(tmp_path) == 40
    (tmp_path / "held_out.jsonl").write_text("")
    assert trained_tokens(tmp_path) == read_metrics(tmp_path / "metrics.jsonl")[-1]["tokens"]


@pytest.mark.slow
def test_from_25_sentences_no_worse_expert_is_published(xelm, copy, tmp_path):
    """Forty passes learn them by heart; what is published is from before that."""
    text = tmp_path / "few"
    text.mkdir()
    lines = (copy.corpus / f"{GROWN}.jsonl").read_text().splitlines()[:25]
    (text / f"{GROWN}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    rate = ("--set", "grow.optimizer.learning_rate=2e-2")
    outcome = xelm(
        "grow", copy.directory, "--language", GROWN, "--corpus", text, "--passes", 40, *rate
    )
    run = open_run(copy.directory)
    measured = read_metrics(run.registry().expert(GROWN).directory(run.directory) / HELD_OUT)
    assert outcome.code == 0, outcome.err
    expert = run.registry().expert(GROWN)
    assert expert.settings == {"grow.passes": 40.0, "grow.optimizer.learning_rate": 0.02}
    assert expert.evaluation is not None
    found = expert.evaluation["own"][GROWN]
    assert found["documents"] == 5 and found["expert"] < min(found["parent"], found["seed"])
    assert expert.tokens == best(measured)["tokens"] < measured[-1]["tokens"]
    assert measured[-1]["loss"] > best(measured)["loss"]
