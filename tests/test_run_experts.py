"""Experts of a RUN through the command line: growing, merging, verifying, rolling back."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import write_corpus
from safetensors.numpy import load_file
from shared import LANGUAGES, NAMES, full, snapshot, without_routers
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.grow import grow
from experts.lock import update
from experts.registry import Registry
from xelm import load_model, open_run
from xelm.runs.nearest import nearest_expert
from xelm.training.metrics import MetricsLog, read_metrics


@pytest.fixture(scope="module")
def grown(xelm, tiny, tmp_path_factory):
    """The tiny RUN with Portuguese, and what `grow` said."""
    directory = tmp_path_factory.mktemp("grown") / "RUN"
    shutil.copytree(tiny.directory, directory)
    settings = ("--set", "grow.runtime.keep_checkpoints=3")
    outcome = xelm("grow", directory, "--language", "por", "--corpus", tiny.corpus, *settings)
    assert outcome.code == 0, outcome.err
    return directory, outcome


def test_growing_leaves_every_other_file_as_it_was(grown, tiny):
    before, after = (without_routers(snapshot(run)) for run in (tiny.directory, grown[0]))
    assert {name for name in after if after[name] != before.get(name)} == {
        "registry.json",
        "hashes.json",  # which has a digest of the new record
        *(name for name in after if name.startswith(("experts/pt/v1/", "corpus/pt/"))),
    }
    assert before.keys() <= after.keys()
    assert {"experts/pt/v1/model.safetensors", "experts/pt/v1/README.md"} <= after.keys()


def test_the_child_starts_from_the_nearest_relative_a_round_later(grown, tiny):
    registry = Registry.load(grown[0])
    child = registry.expert("pt")
    assert child.languages == ("pt",) and child.cluster is None and child.round == 2
    parent = registry.expert(child.parent.partition("@")[0])
    assert "es" in parent.languages  # of en, de, es and fr, the nearest to Portuguese
    assert grown[1].out == (f"pt@v1 from {parent.reference}, round 2, {child.tokens:,} tokens\n")
    card = (grown[0] / child.path / "README.md").read_text()
    assert "serves es, the nearest language" in card and "grow.runtime.keep_checkpoints=3" in card
    assert {e.reference: e for e in Registry.load(tiny.directory).experts} == {
        e.reference: e for e in registry.experts if e.name != "pt"
    }


def test_the_child_sees_the_donors_in_their_share(grown):
    run = open_run(grown[0])
    child = run.registry().expert("pt")
    metrics = read_metrics(child.directory(run.directory) / "metrics.jsonl")
    assert metrics[-1]["step"] == 1024 // 128
    seen = metrics[-1]["language_tokens"]
    donors = run.registry().expert(child.parent.partition("@")[0]).languages
    assert set(seen) == {"pt", *donors}
    share = run.config.donor_share
    assert seen["pt"] / child.tokens == pytest.approx(1 - share, abs=0.03)
    for language in donors:
        assert seen[language] / child.tokens == pytest.approx(share / len(donors), abs=0.03)


def test_the_child_began_where_its_parent_ended(grown):
    """One short training moves weights by at most the sum of its rates."""
    run = open_run(grown[0])
    child = run.registry().expert("pt")
    parent = run.registry().expert(child.parent.partition("@")[0])
    weights = [load_file(e.directory(run.directory) / "model.safetensors") for e in (child, parent)]
    seed = load_file(run.seed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (
        np.abs(weights[0][name] - weights[1][name]).max()
        < np.abs(weights[0][name] - seed[name]).max()
    )
    # Before its first step it is as good on held-out text as the parent is by the gate's measure.
    lines = (child.directory(run.directory) / "held_out.jsonl").read_text().splitlines()
    first, found = json.loads(lines[0]), child.evaluation["own"]["pt"]
    assert first["step"] == 0
    assert first["bits_per_byte"]["pt"] == pytest.approx(found["parent"], rel=1e-3)
    assert first["bits_per_byte"]["pt"] != pytest.approx(found["seed"], rel=1e-2)


def test_what_grows_from_whom_is_told_and_kept(grown):
    said = "serves es, the nearest language by mixture, at distance "
    parent = open_run(grown[0]).registry().expert("pt").parent.partition("@")[0]
    assert f"pt grows from {parent}, which {said}" in grown[1].err
    assert (Registry.load(grown[0]).expert("pt").reason or "").startswith(said)


def test_nearest_and_growing_are_of_one_mind_also_after_growing(xelm, grown):
    run = open_run(grown[0])
    for language in ("it", "gl", "nl", "kok"):
        listed = xelm("nearest", language, "--run", grown[0], "--json").json()
        assert {row["language"] for row in listed} == {*LANGUAGES, "pt"}
        expert, reason, _ = nearest_expert(run, language)
        assert listed[0]["expert"] == expert.reference
        assert f"serves {listed[0]['language']}, " in reason
    assert nearest_expert(run, "gl")[0].name == "pt"
    served = next(row for row in listed if row["language"] == "pt")
    assert served["tokens"] == run.store("pt").record["languages"]["pt"]["tokens"]


def test_nearest_and_growing_are_of_one_mind_with_the_same_corpus(xelm, copy, tmp_path):
    # Half of it looks like Spanish, and so its parent is by subwords.
    write_corpus(tmp_path / "other", ["nl"], documents=60, seed=0)
    parts = (copy.corpus / "es.jsonl", tmp_path / "other" / "nl.jsonl")
    (tmp_path / "sv.jsonl").write_text("".join(path.read_text() for path in parts))
    for by in ("mixture", "subwords", "genealogy"):
        options = ("--corpus", tmp_path / "sv.jsonl", "--by", by)
        listed = xelm("nearest", "sv", "--run", copy.directory, *options, "--json").json()
        assert {row["language"] for row in listed} == set(LANGUAGES)
        told = xelm("grow", copy.directory, "--language", "sv", *options, "--dry-run").out
        assert f"sv@v1 would start from {listed[0]['expert']}; nothing was changed" in told
    # Without --corpus, both take the text in the RUN's corpus that the RUN was not made of.
    listed = xelm("nearest", "pt", "--run", copy.directory, "--by", "subwords", "--json").json()
    parent = nearest_expert(open_run(copy.directory), "pt", "subwords", copy.corpus)
    assert listed[0]["expert"] == parent.expert.reference
    assert listed[0]["subwords"]["coverage"] == 1


def test_a_served_language_without_data_does_not_stop_the_next(copy):
    update(copy.directory, lambda r: grow(r, "kok", "de-fr", reason="named by hand"), "grow")
    done = {"sha256": {"model.safetensors": "a" * 64}, "tokens": 1}
    update(copy.directory, lambda r: r.publish("kok", 1, **done), "publish")
    run = open_run(copy.directory)
    parent = nearest_expert(run, "pt", "typology")
    assert "es" in parent.expert.languages
    assert parent.warnings == ("typology knows nothing of how near pt is to kok: not considered",)
    assert nearest_expert(run, "mr").expert.name == "kok"  # Indo-Aryan both


def test_growing_again_is_refused_and_changes_nothing(xelm, grown):
    before = snapshot(grown[0])
    outcome = xelm("grow", grown[0], "--language", "pt")
    assert (outcome.code, outcome.err) == (
        2,
        "xelm: 'pt' is served already, by pt@v1 (published); to train it on more text: xelm train "
        "RUN pt --again --corpus MORE\n",
    )
    assert snapshot(grown[0]) == before


def test_an_interrupted_growing_goes_on_to_the_same_child(xelm, grown, copy):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    command = ("grow", copy.directory, "--language", "pt", "--corpus", copy.corpus)
    with pytest.MonkeyPatch.context() as patch:
        write = MetricsLog.write
        patch.setattr(
            MetricsLog, "write", lambda s, x: interrupt() if x["step"] == 6 else write(s, x)
        )
        assert xelm(*command).code == 130
    assert "pt" in [e.name for e in Registry.load(copy.directory).training()]
    other = xelm(*command, "--parent", "de-fr")
    assert other.code == 2 and "pt@v1 is in training already, from en-es@v1" in other.err
    done = xelm(*command)
    assert done.out == grown[1].out
    for name in ("model.safetensors", "centre.npz", "config.json"):
        path = Path("experts/pt/v1") / name
        assert (copy.directory / path).read_bytes() == (grown[0] / path).read_bytes()
    assert (
        "serves es, the nearest language"
        in (copy.directory / "experts/pt/v1/README.md").read_text()
    )


def test_a_language_without_typology_grows_from_the_parent_that_is_named(xelm, copy, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    shutil.copy(copy.corpus / "pt.jsonl", corpus / "tlh.jsonl")
    command = ("grow", copy.directory, "--language", "tlh", "--corpus", corpus)
    refused = xelm(*command, "--by", "typology")
    assert refused.code == 2
    assert "typology knows nothing of how near tlh is" in refused.err
    assert refused.err.splitlines()[-1].endswith("; name an expert to grow from with --parent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        assert xelm(*command, "--parent", "de-fr").code == 2
    # Begun with that parent, it goes on without its name.
    done = xelm(*command)
    assert done.out.startswith("tlh@v1 from de-fr@v1, round 2"), done.err
    card = (copy.directory / "experts/tlh/v1/README.md").read_text()
    assert "named by hand" in card


def test_a_cluster_in_training_is_not_taken_for_a_child(xelm, initialised, tiny, tmp_path, undrawn):
    """A cluster of one language bears its name, as a grown expert would."""
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("cluster", "-k", 4, "--languages", ",".join(LANGUAGES), "--out", tmp_path / "clusters")
    xelm("branch", tmp_path / "RUN", "--clusters", tmp_path / "clusters")
    assert xelm("train", tmp_path / "RUN", "en").code == 0
    before = snapshot(tmp_path / "RUN")
    outcome = xelm("grow", tmp_path / "RUN", "--language", "de", "--corpus", tiny.corpus)
    assert outcome.code == 2
    assert "'de' is served already, by de@v1 (training)" in outcome.err
    assert snapshot(tmp_path / "RUN") == before


# Checkpoints


def test_exported_experts_load_in_transformers_with_the_same_logits(grown):
    run = open_run(grown[0])
    tokens = np.random.default_rng(0).integers(4, 384, (2, 30))
    for expert in run.registry().published():
        directory = expert.directory(run.directory)
        reference = AutoModelForCausalLM.from_pretrained(directory).eval()
        with torch.no_grad():
            wanted = reference(torch.tensor(tokens)).logits.numpy()
        logits = load_model(directory)(jnp.asarray(tokens))
        np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-4)
        assert (
            AutoTokenizer.from_pretrained(directory)("ab")["input_ids"]
            == (AutoTokenizer.from_pretrained(run.seed)("ab")["input_ids"])
        )


def test_merging_averages_the_published_experts(xelm, tiny, tmp_path):
    outcome = xelm("merge", tiny.directory, "--out", tmp_path / "merged")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'merged'}\n")
    experts = [load_file(tiny.directory / f"experts/{name}/v1/model.safetensors") for name in NAMES]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        wanted = (experts[0][name].astype(np.float64) + experts[1][name]) / 2
        np.testing.assert_array_equal(tensor, wanted.astype(np.float32))
    assert load_model(tmp_path / "merged").config == load_model(tiny.directory / "seed").config
    again = xelm("merge", tiny.directory, "en-es", "--out", tmp_path / "merged")
    assert again.code == 2 and "nothing is overwritten" in again.err


def test_verify_finds_one_changed_byte(xelm, copy):
    fine = xelm("verify", copy.directory)
    assert fine.code == 0 and "every file that inference reads is unchanged" in fine.out
    path = copy.directory / "experts/de-fr/v1/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = xelm("verify", copy.directory)
    assert outcome.code == 2 and outcome.out == ""
    assert "changed: experts/de-fr/v1/model.safetensors: wanted sha256" in outcome.err
    faults = xelm("verify", copy.directory, "--json")
    assert faults.code == 2 and len(json.loads(faults.out)) == 1


def test_rolling_back_publishes_the_earlier_version_and_touches_no_weights(xelm, copy):
    update(copy.directory, lambda registry: registry.start("de-fr", parent="de-fr@v1"), "train")
    assert xelm("train", copy.directory, "de-fr").code == 0
    before = without_routers(snapshot(copy.directory))
    registry = Registry.load(copy.directory)
    assert [(e.version, e.status) for e in registry.versions("de-fr")] == [
        (1, "retired"),
        (2, "published"),
    ]
    outcome = xelm("rollback", copy.directory, "de-fr")
    assert (outcome.code, outcome.out) == (0, "published: de-fr@v1\n")
    after = without_routers(snapshot(copy.directory))
    # hashes.json may have those of routers, which are fitted again.
    changed = {name for name in after if after[name] != before[name]}
    assert changed - {"hashes.json"} == {"registry.json"}
    assert xelm("rollback", copy.directory, "de-fr", "--version", 2).out == "published: de-fr@v2\n"
    again = without_routers(snapshot(copy.directory))
    changed = {name for name in again if again[name] != before[name]}
    assert changed - {"hashes.json"} == {"registry.json"}
    assert Registry.load(copy.directory).experts == registry.experts
    assert xelm("verify", copy.directory).code == 0


def test_weights_are_read_as_safetensors_alone(tiny):
    for path in [*tiny.directory.rglob("*.safetensors")]:
        with safetensors.safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
    suffixes = {path.suffix for path in tiny.directory.rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin", ".py"}
