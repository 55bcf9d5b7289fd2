"""`xelm train --again`: the next version of an expert, and nothing else touched."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_corpus
from shared import snapshot, without_routers

from experts.registry import Registry
from experts.verify import verify
from xelm.api import open_run
from xelm.data.held_out import held_out
from xelm.runs import fit
from xelm.training.metrics import MetricsLog, read_metrics

COPIES = 7
"""Documents of the further corpus that the first version knows."""
NEW = 40


@pytest.fixture(scope="module")
def more(tiny, tmp_path_factory):
    """Folder with further Portuguese, some of which is known, and further Spanish."""
    folder = write_corpus(tmp_path_factory.mktemp("more") / "text", ["pt", "es"], NEW, seed=5)
    known = (tiny.corpus / "pt.jsonl").read_text().splitlines(keepends=True)[:COPIES]
    with (folder / "pt.jsonl").open("a") as file:
        file.writelines(known)
    return folder


@pytest.fixture(scope="module")
def grown(xelm, tiny, tmp_path_factory):
    """The tiny RUN with Portuguese."""
    directory = tmp_path_factory.mktemp("first") / "RUN"
    shutil.copytree(tiny.directory, directory)
    command = ("grow", directory, "--language", "pt", "--corpus", tiny.corpus)
    assert xelm(*command, "--tokens", 512).code == 0
    open_run(directory).ensemble("detected")  # what is fitted once is there
    return directory


@pytest.fixture(scope="module")
def second(xelm, grown, more, tmp_path_factory):
    """The same with version 2 of Portuguese, and what the command said."""
    directory = tmp_path_factory.mktemp("second") / "RUN"
    shutil.copytree(grown, directory)
    outcome = xelm("train", directory, "pt", "--again", "--corpus", more)
    assert outcome.code == 0, outcome.err
    return directory, outcome


def test_version_2_goes_on_from_version_1_on_the_text_of_both(second, more):
    run, outcome = open_run(second[0]), second[1]
    expert, before = run.registry().expert("pt"), run.registry().expert("pt", 1)
    assert (expert.reference, expert.parent, expert.round) == ("pt@v2", "pt@v1", 2)
    assert (expert.status, before.status, expert.replaces) == ("published", "retired", 1)
    assert (before.corpora, expert.corpora) == (("pt",), ("pt", "pt-v2"))
    assert expert.donor == before.parent == "en-es@v1"
    assert expert.settings == before.settings == {"grow.tokens": 512}
    assert outcome.out == f"pt@v2 from pt@v1, {expert.tokens:,} tokens\n"
    # Copies of what is known are left out, and counted.
    assert len(run.store("pt-v2").languages["pt"]) == NEW
    assert run.store("pt-v2").record["known"] == {"pt": COPIES}
    assert f"exact copies of documents of the text before (pt {COPIES}); left out" in outcome.err
    seen = read_metrics(expert.directory(run.directory) / "metrics.jsonl")[-1]["language_tokens"]
    assert set(seen) == {"pt", "en", "es"}
    assert seen["pt"] / sum(seen.values()) == pytest.approx(1 - run.config.donor_share, abs=0.05)
    assert verify(run.directory) == []


def test_the_documents_held_out_before_stay_held_out(second):
    run = open_run(second[0])
    text = fit.expert_text(run, run.registry().expert("pt"))
    first, new = (run.store(name).languages["pt"] for name in ("pt", "pt-v2"))
    away = {s.ids.directory.name: np.asarray(s.documents).tolist() for s in text.held_out}
    assert away == {
        "pt": held_out(first, run.config.held_out).tolist(),
        "pt-v2": held_out(new, run.config.held_out).tolist(),
    }
    hashes = {h.tobytes() for h in first.hashes[away["pt"]]}
    trained = [s.ids.hashes[n] for s in text.sources for n in np.asarray(s.documents)]
    assert not hashes & {h.tobytes() for h in trained}
    # Both texts are read equally often.
    tokens = [source.tokens for source in text.sources]
    shares = [source.share for source in text.sources]
    assert shares[0] / shares[1] == pytest.approx(tokens[0] / tokens[1], rel=0.1)
    assert sum(shares) == pytest.approx(1)


def test_other_experts_keep_their_files_records_and_rows(grown, second):
    before, after = (without_routers(snapshot(run)) for run in (grown, second[0]))
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        "registry.json",
        "hashes.json",
        *(name for name in after if name.startswith(("experts/pt/v2/", "corpus/pt-v2/"))),
    }
    assert before.keys() <= after.keys()
    old, new = (Registry.load(run) for run in (grown, second[0]))
    assert [e for e in new.experts if e.name != "pt"] == [e for e in old.experts if e.name != "pt"]
    rows = [fit.identifier(open_run(run), keep=False) for run in (grown, second[0])]
    own = rows[0].languages.index("pt")
    others = [number for number in range(len(rows[0].languages)) if number != own]
    assert (rows[0].log_likelihoods[:, others] == rows[1].log_likelihoods[:, others]).all()
    assert (rows[0].log_likelihoods[:, own] != rows[1].log_likelihoods[:, own]).any()


@pytest.mark.slow
def test_rolling_back_brings_the_bytes_and_figures_of_before(xelm, tiny, grown, second, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(second[0], run)
    assert xelm("rollback", run, "pt").out == "published: pt@v1\n"
    before, after = (without_routers(snapshot(each)) for each in (grown, run))
    assert {name for name in before if after[name] != before[name]} == {
        "registry.json",
        "hashes.json",
    }
    rows = []
    for directory in (grown, run, second[0]):
        shutil.copytree(directory, tmp_path / "evaluated")
        opened = open_run(tmp_path / "evaluated")
        found = opened.evaluate(tiny.corpus, languages=["pt", "en"])
        rows.append({(r.system, r.language): r.bits_per_byte for r in found.rows})
        shutil.rmtree(tmp_path / "evaluated")
    assert rows[0] == rows[1] != rows[2]
    assert xelm("rollback", run, "pt", "--version", 2).out == "published: pt@v2\n"
    assert open_run(run).registry().experts == open_run(second[0]).registry().experts


def test_rows_are_not_read_in_the_order_of_the_version_before(second):
    run = open_run(second[0])
    seeds = [fit_seed(run, version) for version in (1, 2)]
    assert seeds[1] == seeds[0] + 1000
    assert fit_seed(run, 1, "en-es") == run.config.experts.random_seed


def fit_seed(run, version, name="pt"):
    from xelm.runs.jobs import expert_job

    return expert_job(run, run.registry().expert(name, version)).config.random_seed


def stop(*arguments, **options):
    raise KeyboardInterrupt


MOMENTS = {
    "tokenised": "xelm.runs.again.check_language",
    "before the registry": "xelm.runs.again.update",
    "before training": "xelm.runs.train.train_checkpoints",
    "step 3": None,
    "trained": "xelm.runs.train.publish",
    "before publication": "xelm.runs.publish.update",
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.slow
def test_what_was_killed_goes_on_to_the_same_weights(
    xelm, grown, second, more, moment, tmp_path, monkeypatch
):
    run = tmp_path / "RUN"
    shutil.copytree(grown, run)
    command = ("train", run, "pt", "--again", "--corpus", more)
    with monkeypatch.context() as patch:
        if MOMENTS[moment] is None:
            write = MetricsLog.write
            patch.setattr(
                MetricsLog, "write", lambda s, x: stop() if x["step"] == 3 else write(s, x)
            )
        else:
            patch.setattr(MOMENTS[moment], stop)
        assert xelm(*command).code == 130
    registry = open_run(run).registry()
    assert registry.expert("pt").reference == "pt@v1"
    if registry.training():
        assert "go on without --corpus" in xelm(*command[:-1], run / "corpus").err
        other = xelm(*command, "--tokens", 256)
        assert "pt@v2 is in training already, with grow.tokens=512; got 256" in other.err
        assert "go on without --from" in xelm(*command, "--from", "seed").err
    else:
        refused = xelm(*command[:-2])
        assert refused.code == 2 and "was tokenised for a version of pt that has not" in refused.err
    assert xelm(*(command[:-2] if registry.training() else command)).code == 0
    for file in (second[0] / "experts/pt/v2").iterdir():
        if file.name not in ("metrics.jsonl", "README.md"):  # with speeds, and with their hash
            assert (run / "experts/pt/v2" / file.name).read_bytes() == file.read_bytes()
    assert verify(run) == []


def test_a_version_given_up_leaves_the_one_before_in_use(xelm, grown, more, tmp_path, monkeypatch):
    run = tmp_path / "RUN"
    shutil.copytree(grown, run)
    before = snapshot(run)
    command = ("train", run, "pt", "--again", "--corpus", more)
    with monkeypatch.context() as patch:
        patch.setattr("xelm.runs.again.update", stop)
        assert xelm(*command).code == 130
    text = run / "corpus/pt-v2"
    assert xelm("discard", run, "pt").out.startswith(f"discarded: {text}, the text of")
    assert snapshot(run) == before
    assert "not in training" in xelm("discard", run, "pt").err
    with monkeypatch.context() as patch:
        patch.setattr("xelm.runs.train.publish", stop)
        assert xelm(*command).code == 130
    assert (run / "experts/pt/v2").exists() and (run / "corpus/pt-v2").exists()
    assert xelm("discard", run, "pt").out.startswith("discarded: pt@v2")
    assert open_run(run).registry().experts == open_run(grown).registry().experts
    after = snapshot(run)
    assert {name for name in before | after if after.get(name) != before.get(name)} == {
        "registry.json"  # with its history
    }


@pytest.mark.slow
def test_the_expert_of_a_cluster_may_have_more_text_than_the_run(xelm, grown, more, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(grown, run)
    command = ("train", run, "en-es", "--again", "--corpus", more, "--from", "seed")
    planned = xelm(*command, "--dry-run", "--json").json()
    v1 = open_run(run).registry().expert("en-es")
    assert snapshot(run) == snapshot(grown)
    outcome = xelm(*command, "--set", "gate.worse=null")
    assert outcome.code == 0, outcome.err
    opened = open_run(run)
    v2 = opened.registry().expert("en-es")
    assert (v2.reference, v2.parent, v2.round, v2.corpora) == (
        "en-es@v2",
        "seed",
        1,
        ("en-es-v2",),
    )
    # The budget is that of version 1, whose part of all tokens was about a half.
    assert v2.settings is not None and v1.evaluation is not None
    tokens = v2.settings["experts.tokens"]
    assert planned["trainings"][0]["tokens"] == tokens == pytest.approx(2048, abs=128)
    assert (
        planned["trainings"][0]["steps"]
        == read_metrics(v1.directory(run) / "metrics.jsonl")[-1]["steps"]
    )
    seen = read_metrics(v2.directory(run) / "metrics.jsonl")[-1]["language_tokens"]
    assert set(seen) == {"en", "es"}
    assert set(opened.store("en-es-v2").languages) == {"es"}
    own = (v2.evaluation or {})["own"]
    assert {"expert", "parent", "seed", "present", "documents"} == set(own["es"])
    assert own["es"]["documents"] == 8 + 8 and own["en"]["documents"] == 8
    assert own["en"]["present"] == v1.evaluation["own"]["en"]["expert"]
    # An evaluation finds the further text in what was trained on.
    results = opened.evaluate(more, languages=["es"])
    assert results.texts["es"].exact == NEW - 8
    assert opened.stores(["es"]).keys() == {"train", "en-es-v2"}


def test_a_worse_version_from_the_seed_does_not_replace_the_one_in_use(xelm, grown, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(grown, run)
    # One step from the seed is less than version 1 has learned.
    refused = xelm("train", run, "en-es", "--again", "--from", "seed", "--tokens", "128")
    assert refused.code == 2
    assert "en-es@v2 is not published: on held-out text it has" in refused.err
    assert "and en-es@v1" in refused.err
    assert open_run(run).registry().expert("en-es").reference == "en-es@v1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nl", "--again"), "there is no expert 'nl'; known: de-fr, en-es, pt"),
        (("pt", "de-fr", "--again"), "--again trains the next version of one expert; name it"),
        (("--again", "--all"), "--again trains the next version of one expert; name it alone"),
        (("pt", "--again", "--jobs", "2"), "--again trains in this process"),
        (("pt", "--corpus", "x"), "--corpus goes with --again"),
        (("pt", "--from", "seed"), "--from goes with --again"),
        (("pt", "--tokens", "9"), "--tokens goes with --again"),
        (("pt", "--passes", "1"), "--passes goes with --again"),
        (("pt", "--workers", "2"), "--workers goes with --again"),
        (("--rounds", "1,2", "--workers", "2"), "--workers goes with --again"),
        (("pt", "--text-field", "body"), "--text-field goes with --corpus"),
        (("pt", "--again", "--text-field", "body"), "--text-field goes with --corpus"),
        (("pt", "--again", "--workers", "2"), "--workers goes with --corpus: without more text"),
        (("pt", "--again", "--rounds", "1,2"), "--again trains the next version of one expert;"),
        (("pt", "--again", "--dense"), "--again trains the next version of one expert; name it"),
        (("pt", "--again", "--hosts"), "--again trains the next version of one expert; name it"),
        (("pt", "--again", "--engine", "ray"), "--again trains in this process"),
        (("pt", "--again", "--corpus", "nothing"), "corpus nothing does not exist"),
        (("pt", "--again", "--from", "nl@v1"), "there is no expert 'nl'"),
        (("pt", "--again", "--from", "first"), "'first' names no version of an expert"),
        (("pt", "--again", "--from", "pt@v9"), "expert 'pt' has no version 9"),
        (
            ("pt", "--again", "--set", "experts.tokens=9"),
            "here grow.NAME, donor_share, kept_share and gate.NAM",
        ),
        (("en-es", "--again", "--set", "donor_share=0"), "here experts.NAME and gate.NAME may be"),
        (("pt", "--again", "--tokens", "1", "--set", "grow.max_passes=.001"), "one step passes ov"),
    ],
)
def test_mistakes_are_one_clear_line_and_change_nothing(xelm, grown, arguments, message):
    before = snapshot(grown)
    outcome = xelm("train", grown, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err.splitlines()[-1]
    assert snapshot(grown) == before


def test_text_that_is_all_known_or_in_another_language_is_refused(xelm, grown, tiny, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(grown, run)
    before = snapshot(run)
    known = xelm("train", run, "pt", "--again", "--corpus", tiny.corpus)
    assert known.code == 2
    assert "every document of the corpus in pt is known already: it has 60 copies" in known.err
    (tmp_path / "wrong").mkdir()
    shutil.copy(tiny.corpus / "de.jsonl", tmp_path / "wrong/pt.jsonl")
    for command in (("train", run, "pt", "--again"), ("grow", run, "--language", "sv")):
        corpus = tmp_path / "wrong"
        if command[0] == "grow":
            (corpus / "pt.jsonl").rename(corpus / "sv.jsonl")
        wrong = xelm(*command, "--corpus", corpus)
        assert wrong.code == 2
        assert f"% of {corpus} looks like de, and should be " in wrong.err.splitlines()[-1]
        assert snapshot(run) == before


def test_a_part_in_another_language_is_a_warning_with_its_share(xelm, grown, tiny, tmp_path):
    run, folder = tmp_path / "RUN", write_corpus(tmp_path / "mixed", ["pt"], 40, seed=9)
    shutil.copytree(grown, run)
    german = (tiny.corpus / "de.jsonl").read_text().splitlines(keepends=True)[:40]
    with (folder / "pt.jsonl").open("a") as file:
        file.writelines(german)
    outcome = xelm("train", run, "pt", "--again", "--corpus", folder, "--dry-run")
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert line.endswith(f"% of {folder} looks like de, and should be pt")
    assert 40 <= int(line.removeprefix("warning: ").partition("%")[0]) <= 50


def test_versions_of_clusters_of_documents_have_the_text_of_their_cluster(
    xelm, initialised, more, tmp_path, undrawn
):
    run = tmp_path / "RUN"
    shutil.copytree(initialised[0], run)
    clusters = tmp_path / "clusters"
    options = ("--method", "tfidf", "--run", run, "-k", 2, "--out", clusters)
    assert xelm("cluster", *options).code == 0
    assert xelm("branch", run, "--clusters", clusters).code == 0
    name = open_run(run).untrained()[0]
    assert xelm("train", run, name).code == 0
    refused = xelm("train", run, name, "--again", "--corpus", more)
    assert refused.code == 2 and f"{name} is the expert of a cluster of documents" in refused.err
    again = xelm("train", run, name, "--again", "--tokens", 512, "--set", "gate.worse=null")
    assert again.code == 0, again.err
    v1, v2 = (open_run(run).registry().expert(name, version) for version in (1, 2))
    assert (v2.documents, v2.parent, v2.corpora) == (v1.documents, f"{name}@v1", None)
    assert v1.data == v2.data


def test_a_donor_may_be_renamed(xelm, second, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(second[0], run)
    open_run(run).rename({"en-es": "western"})
    expert = open_run(run).registry().expert("pt")
    assert (expert.donor, expert.parent) == ("western@v1", "pt@v1")
    assert verify(run) == []
    assert fit_seed(run=open_run(run), version=2) == fit_seed(open_run(second[0]), 2)


def test_versions_differ_by_their_text_figures_and_parent(xelm, second):
    found = xelm("diff", second[0], "pt@v1", "pt@v2", "--json").json()["differences"]
    values = {each["name"]: (each["first"], each["second"]) for each in found}
    assert values["parent"] == ("en-es@v1", "pt@v1")
    assert values["corpora"] == ("pt", "pt pt-v2")
    assert values["data.pt.pt-v2.documents"] == (None, NEW - 8)
    assert "data.pt.pt.documents" not in values and "settings.grow.tokens" not in values
    assert values["bits a byte in pt"][0] > values["bits a byte in pt"][1]


def test_the_python_api_does_the_same(xelm, grown, more, second, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(grown, run)
    expert = open_run(run).train_again("pt", more)
    assert expert.reference == "pt@v2"
    name = "model.safetensors"
    wanted = open_run(second[0]).registry().expert("pt").sha256[name]
    assert expert.sha256[name] == wanted


def test_the_record_says_what_it_was_trained_on(second, more, tiny):
    run = open_run(second[0])
    expert = run.registry().expert("pt")
    assert expert.data is not None and list(expert.data) == ["pt", "en", "es"]
    first, new = expert.data["pt"]
    assert (first["text"], new["text"]) == ("pt", "pt-v2")
    assert new["corpus"] == str(more) and first["corpus"] == str(tiny.corpus)
    assert (new["files"], new["documents"], new["held_out"]) == (1, NEW - 8, 8)
    assert new["sources"] == [{"source": str(more), "files": 1, "read": NEW + COPIES, "card": None}]
    ids = run.store("pt-v2").languages["pt"]
    kept = np.setdiff1d(np.arange(NEW), held_out(ids, run.config.held_out))
    assert new["tokens"] == ids.lengths[kept].sum() and new["bytes"] == ids.bytes[kept].sum()
    card = (expert.directory(run.directory) / "README.md").read_text()
    assert f"| pt: {more.name} | no data card |" in card.splitlines()
    assert json.loads((run.directory / "registry.json").read_text())["experts"][-1]["data"]
    assert Path(more / "pt.jsonl").exists()
