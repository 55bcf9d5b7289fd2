"""An expert is removed for good: its files, its text, its part of the routers and the tables."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_lifecycle import EVALUATION

from clustering.errors import UserError
from clustering.files import write_json
from clustering.identify import Identifier
from experts import manifest
from experts.grow import grow
from experts.lock import record
from experts.registry import Registry
from experts.verify import hash_directory, verify
from xelm import open_run
from xelm.data.store import open_store
from xelm.runs.combined import made_of
from xelm.runs.evaluate import _background
from xelm.runs.fit import learned
from xelm.runs.jobs import expert_job


def write_store(train, folder):
    """A store with the French text as that of the language that the folder is named after."""
    folder.mkdir()
    tag, record = folder.name, json.loads((train / "store.json").read_text())
    for part in ("languages", "origins"):
        record[part] = {tag: record[part]["fr"]}
    write_json(folder / "store.json", record | {"languages_wanted": [tag]})
    for file in train.glob("fr.*"):
        shutil.copy(file, folder / file.name.replace("fr.", f"{tag}.", 1))


@pytest.fixture
def grown(copy):
    """The tiny RUN with a grown expert `pt`, which is the weights of en-es, and tables of an
    evaluation."""
    run = copy.directory
    shutil.rmtree(run / "routers", ignore_errors=True)
    shutil.copytree(run / "experts/en-es/v1", run / "experts/pt/v1")
    write_store(run / "corpus/train", run / "corpus/pt")
    hashes = hash_directory(run / "experts/pt/v1")
    data = {"pt": [{"text": "pt", "corpus": "/their/text", "sources": None}]}
    registry = grow(Registry.load(run), "pt", "en-es", corpora=("pt",))
    registry = registry.publish(
        "pt", 1, sha256=hashes, tokens=512, evaluation=EVALUATION, data=data
    )
    registry.save(run)
    manifest.record_expert(run, registry.expert("pt"))
    systems = ("seed", "dense", "en-es", "de-fr", "pt", "ensemble")
    rows = [{"system": system, "routing": None, "nll": 1.5} for system in systems]
    write_json(run / "results/results.json", {"format": 1, "rows": rows, "summaries": rows})
    for file in ("train/pt.log", "train/pt.failed.txt", "logs/experts/pt/v1/x"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("its")
    assert verify(run) == []
    return run


def test_a_removed_expert_leaves_no_file_and_no_record(xelm, grown):
    others = hash_directory(grown / "experts/en-es") | hash_directory(grown / "seed")
    planned = xelm("remove", grown, "pt", "--dry-run", "--json").json()
    assert planned["versions"] == ["pt@v1"] and not planned["done"]
    assert "experts/pt/v1, with its weights, centre and card" in planned["deleted"]
    assert "corpus/pt" in planned["deleted"] and (grown / "corpus/pt").exists()
    assert "/their/text: the text itself, outside the RUN" in planned["remains"]
    assert not [line for line in planned["remains"] if line.startswith(("seed", "dense"))]
    done = xelm("remove", grown, "pt", "--yes", "--json").json()
    assert done == planned | {"done": True}
    left = [path for path in grown.rglob("*") if path.name.split(".")[0] == "pt"]
    assert [path for path in left if ".locks" not in path.parts] == []
    registry = Registry.load(grown)
    assert [e.reference for e in registry.experts] == ["en-es@v1", "de-fr@v1"]
    event = registry.history[-1]
    assert (event.action, event.experts) == ("remove", {"pt@v1": None})
    assert not {"pt@v1"} & set(manifest.recorded_experts(grown))
    tables = json.loads((grown / "results/results.json").read_text())
    assert [row["system"] for row in tables["rows"]] == [
        "seed",
        "dense",
        "en-es",
        "de-fr",
        "ensemble",
    ]
    assert tables["removed"] == ["pt"]
    assert verify(grown) == []
    assert others == hash_directory(grown / "experts/en-es") | hash_directory(grown / "seed")
    before = (grown / "registry.json").read_bytes()
    assert xelm("remove", grown, "pt", "--yes").out == "pt was removed already\n"
    assert (grown / "registry.json").read_bytes() == before
    fresh = grow(registry, "pt", "en-es")
    assert fresh.expert("pt").reference == "pt@v1"


def test_of_a_removed_parent_a_stub_without_its_data_stays(xelm, grown):
    done = xelm("remove", grown, "en-es", "--yes", "--json").json()
    assert "corpus/train, the text in en es" in done["deleted"]
    remains = "\n".join(done["remains"])
    assert "pt@v1: descends from en-es@v1" in remains and "--again --from seed" in remains
    for what in ("seed, tokenizer: trained on text in en es", "dense: trained on", "vectoriser"):
        assert what in remains
    registry = Registry.load(grown)
    stub = registry.expert("en-es", 1)
    assert stub.removed and stub.status == "retired" and stub.sha256
    assert (stub.data, stub.evaluation, stub.settings, stub.reason) == (None,) * 4
    assert registry.expert("pt").parent == "en-es@v1" and not (grown / "experts/en-es").exists()
    assert verify(grown) == []
    run = open_run(grown)
    assert list(run.store().languages) == ["de", "fr"]
    assert not list((grown / "corpus/train").glob("en.*"))
    assert len(run.store().languages["de"]) == 60
    assert [each.status for each in run.experts() if each.name == "en-es"] == ["removed"]
    for refused in (
        lambda: run.restore("en-es"),
        lambda: run.rollback("en-es", 1),
        lambda: registry.in_use("en-es"),
        lambda: grow(registry, "ca", "en-es"),
    ):
        with pytest.raises(UserError, match=r"en-es@v1 was removed on 20\d\d-\d\d-\d\d$"):
            refused()
    assert run.remove("en-es").versions == ()
    # Once no other descends from it, the stub goes too.
    run.remove("pt")
    assert [e.reference for e in Registry.load(grown).experts] == ["de-fr@v1"]
    assert verify(grown) == []


def test_a_child_is_trained_again_after_its_parent_was_removed(xelm, grown):
    """From the seed, as `remove` says, and on no text of the parent, which is gone."""
    write_store(grown / "corpus/train", grown / "corpus/ca")
    registry = grow(Registry.load(grown), "ca", "pt", corpora=("ca",))
    registry.publish("ca", 1, sha256={"x": "1" * 64}, tokens=1).save(grown)
    remains = xelm("remove", grown, "pt", "--yes", "--json").json()["remains"]
    assert any("xelm train" in line and "ca --again --from seed" in line for line in remains)
    run = open_run(grown)
    again = run.registry().start("ca", parent="seed").expert("ca", 2)
    job = expert_job(run, again)
    assert (again.donor, [s.ids.language for s in job.text.sources]) == ("pt@v1", ["ca"])


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda r: r, "nobody", "there is no expert 'nobody'; known: de-fr, en-es, pt"),
        (lambda r: r.retire_expert("pt").retire_expert("en-es"), "de-fr", "de-fr is the last publ"),
        (lambda r: grow(r, "ca", "pt"), "ca", "ca was never published; give it up with: xelm disc"),
        (lambda r: grow(r, "ca", "pt"), "pt", "ca@v1 is in training, and needs pt; finish it, or"),
    ],
)
def test_what_cannot_be_removed_is_refused(change, name, message, xelm, grown):
    change(Registry.load(grown)).save(grown)
    before = (grown / "registry.json").read_bytes()
    outcome = xelm("remove", grown, name, "--yes")
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert (grown / "registry.json").read_bytes() == before


def test_a_removal_is_confirmed(xelm, grown, monkeypatch):
    outcome = xelm("remove", grown, "pt")
    assert outcome.code == 2 and "pt is deleted for good; give --yes" in outcome.err
    for answer, code in (("no\n", 2), ("pt\n", 0)):
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdin.readline", lambda answer=answer: answer, raising=False)
        outcome = xelm("remove", grown, "pt")
        assert outcome.code == code and "Type pt to delete it for good: " in outcome.err
        assert (grown / "experts/pt").exists() == (code == 2)


def test_a_base_of_another_expert_is_not_removed(xelm, grown):
    from xelm.models.stored import write_base

    child = grown / "experts/pt/v1"
    write_base(child, child, grown / "experts/en-es/v1")
    outcome = xelm("remove", grown, "en-es", "--yes")
    assert outcome.code == 2
    assert "pt@v1 stores only what differs from en-es@v1, and cannot be read without" in outcome.err
    assert (grown / "experts/en-es/v1/model.safetensors").exists()


def test_pushes_and_models_that_were_made_of_it_are_among_what_remains(grown):
    record(grown, "push", ["pt@v1"], {"to": "jane/pt", "commit": "a" * 40})
    record(grown, "push", ["en-es@v1"], {"to": "jane/en", "commit": "b" * 40})
    records = {
        "merges/a/merge.json": {"format": 1, "sources": [{"name": "pt@v1"}, {"name": "seed"}]},
        "merges/b/merge.json": {"format": 1, "sources": [{"name": "en-es@v1"}]},
        "students/c/recipe.json": {"format": 1, "made_of": ["de-fr@v1", "pt@v1"]},
    }
    for file, value in records.items():
        write_json(grown / file, value)
    manifest.record(grown, ["merges", "students"])
    remains = "\n".join(open_run(grown).plan_removal("pt").remains)
    assert "merges/a: made of it" in remains and "students/c: made of it" in remains
    assert "merges/b" not in remains
    assert "jane/pt: pushed there as commit aaaaaaaaaaaa" in remains and "jane/en" not in remains


def test_what_was_made_of_an_expert_is_known_when_that_is_renamed(grown):
    run = open_run(grown)
    for model, of in {"merges/a": "pt@v1", "mixes/b": "en-es@v1"}.items():
        file, key = ("merge.json", "sources") if model == "merges/a" else ("recipe.json", "made_of")
        value = [{"name": of}, {"name": "seed"}] if key == "sources" else [of, "de-fr@v1"]
        write_json(grown / model / file, {"format": 1, key: value})
        record(grown, "merge", (), {"model": model})
    manifest.record(grown, ["merges", "mixes"])
    record(grown, "push", ["pt@v1"], {"to": "jane/pt", "commit": "a" * 40})
    for names in ({"pt": "x"}, {"x": "portuguese"}, {"en-es": "pt"}):
        run.rename(names)
    found = {name: made_of(run, run.registry(), name) for name in run.combined()}
    assert found == {"merges/a": ("portuguese@v1", "seed"), "mixes/b": ("pt@v1", "de-fr@v1")}
    write_json(grown / "mixes/c/recipe.json", {"format": 1, "made_of": ["pt@v1"]})
    record(grown, "mix", (), {"model": "mixes/c"})  # of the expert that has the name now
    assert made_of(run, run.registry(), "mixes/c") == ("pt@v1",)
    remains = "\n".join(run.plan_removal("portuguese").remains)
    assert "merges/a: made of it" in remains and "mixes/b" not in remains
    assert "jane/pt: pushed there as commit aaaaaaaaaaaa" in remains
    assert "train/pt.log" not in run.plan_removal("portuguese").deleted  # the name is another's
    run.rename({"pt": "en-es"})
    assert "train/pt.log" in run.plan_removal("portuguese").deleted
    run.rename({"en-es": "pt"})
    # Languages that they were trained on, which their transfer gap is told by.
    write_json(grown / "students/d/recipe.json", {"format": 1, "made_of": ["portuguese@v1"]})
    manifest.record(grown, ["mixes", "students"])
    trained = _background(run, run.registry().published(), []).trained
    assert {*trained["merges/a"]} == {"pt", "en", "es"}  # its parent's too
    for name in ("mixes/b", "mixes/c", "students/d"):  # which read the text of dense
        assert {*trained[name]} == {"en", "es", "de", "fr"}


def test_a_language_leaves_the_identifier_and_others_stay_to_the_bit(grown):
    draw = np.random.default_rng(0)
    table = draw.normal(size=(8, 3)).astype(np.float32)
    whole = Identifier(languages=("en", "pt", "de"), log_likelihoods=table)
    less = whole.without(["pt"])
    assert less.languages == ("en", "de")
    assert np.array_equal(less.log_likelihoods, table[:, [0, 2]])
    more = less.joined(replace(whole, languages=("pt",), log_likelihoods=table[:, [1]]))
    assert more.languages == ("en", "de", "pt")
    assert np.array_equal(more.log_likelihoods, table[:, [0, 2, 1]])
    # Of a RUN without its text, from which it cannot be fitted again.
    shutil.rmtree(grown / "corpus/train")
    (grown / "routers").mkdir()
    whole.save(grown / "routers/languages-a.npz")
    manifest.record(grown, ["routers"])
    open_run(grown).remove("pt")
    (kept,) = (grown / "routers").glob("languages-*.npz")
    assert Identifier.load(kept).languages == ("en", "de") and verify(grown) == []


def test_the_learned_router_loses_a_column_and_others_stay_to_the_bit(grown):
    run = open_run(grown)
    before = learned(run, run.registry().published())
    names = [expert.name for expert in run.registry().published()]
    assert names == ["de-fr", "en-es", "pt"]
    run.remove("pt")
    (file,) = (grown / "routers").glob("learned-*.npz")
    after = learned(run, run.registry().published())
    assert np.array_equal(after.weights, before.weights[:, :2]) and before.weights.any()
    assert np.array_equal(after.bias, before.bias[:2])
    assert "pt@v1" not in str(np.load(file)["experts"].tolist()) and verify(grown) == []


def test_languages_are_dropped_from_a_store_and_the_rest_stays(tiny, tmp_path):
    from xelm.data.store_writer import drop_languages

    folder = tmp_path / "train"
    shutil.copytree(tiny.directory / "corpus/train", folder)
    assert drop_languages(folder, ["es", "pt"]) == ["es"]
    store, before = open_store(folder), open_store(tiny.directory / "corpus/train")
    assert list(store.languages) == [tag for tag in before.languages if tag != "es"]
    assert np.array_equal(store.languages["de"].ids, before.languages["de"].ids)
    assert "es" not in {*store.record["origins"], *store.record["languages_wanted"]}
    assert drop_languages(folder, ["es"]) == []
