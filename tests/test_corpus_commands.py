"""Commands on corpora as people have them: told what was read, recorded, and read again alike."""

import gzip
import json
import shutil

import pytest
from shared import SEED, documents_of

from xelm.runs.run import open_run

RECORDS = {"de": ["Der alte Mann", "und das Meer"], "sw": ["Habari ya asubuhi", "Habari"]}


@pytest.fixture
def described(tmp_path, place, monkeypatch):
    """A description of text whose fields and names are not those that xelm knows, beside a seed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run" / "seed", tmp_path / "run" / "seed")
    for tag, texts in RECORDS.items():
        path = tmp_path / "text" / f"lang-{tag}" / "part.json.gz"
        path.parent.mkdir(parents=True)
        lines = [json.dumps({"body": text}) for text in texts]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "text" / "README.md").write_text("about")
    (tmp_path / "map.yaml").write_text("lang-de: de\nlang-sw: swh\n")
    (tmp_path / "corpus.yaml").write_text(
        "sources: [text]\ntext_field: body\nlanguages: {lang-de: de, lang-sw: swh}\n"
    )
    return tmp_path


OPTIONS = ("text", "--text-field", "body", "--language-map", "map.yaml")


@pytest.mark.parametrize("corpus", [("corpus.yaml",), OPTIONS], ids=["description", "options"])
def test_a_run_records_how_its_corpus_is_read_and_reads_it_so_again(
    xelm, described, corpus, undrawn
):
    outcome = xelm("init", "new", "--corpus", *corpus, *SEED)
    assert outcome.code == 0, outcome.err
    counts = open_run("new").store().record["languages"]
    assert {tag: count["documents"] for tag, count in counts.items()} == {"de": 2, "sw": 2}
    told = [" ".join(line.split()) for line in outcome.err.splitlines()]
    assert "text/lang-de/part.json.gz de 2 0".removeprefix("text/") in told
    assert "lang-sw/part.json.gz sw 2 0" in told
    assert "1 file of an unknown format was skipped: README.md" in told
    options = {"text_field": "body", "languages": {"lang-de": "de", "lang-sw": "swh"}}
    source = {"path": str(described / "text"), **options}
    assert open_run("new").record["corpus"] == {"sources": [source]}
    for name in ("corpus.yaml", "map.yaml"):  # no longer needed
        (described / name).unlink()
    (described / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(described / "elsewhere")
        command = ("cluster", "--method", "words", "-k", 1, "--run", described / "new")
        assert xelm(*command, "--out", "out").code == 0
        outcome = xelm("nearest", "de", "--by", "words", "--run", described / "new", "--json")
    assert [found["language"] for found in json.loads(outcome.out)] == ["sw"]


def test_growing_reads_the_corpus_of_the_run_as_it_was_described(xelm, copy, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("xelm.runs.train.train_checkpoints", interrupt)
    text = copy.directory.parent / "text"
    text.mkdir()
    lines = [json.dumps({"body": text}) for text in documents_of(copy.corpus, "pt")]
    (text / "papers.jsonl").write_text("\n".join(lines))
    source = {"path": str(text), "text_field": "body", "languages": {"papers": "pt"}}
    record = json.loads((copy.directory / "run.json").read_text())
    record["corpus"] = {"sources": [source]}
    (copy.directory / "run.json").write_text(json.dumps(record))
    outcome = xelm("grow", copy.directory, "--language", "pt", "--parent", "en-es")
    assert outcome.code == 130, outcome.err
    store = open_run(copy.directory).store("pt")
    assert len(store.languages["pt"]) == len(lines)
    assert store.record["corpus"] == {"sources": [source]}
    refused = xelm("grow", copy.directory, "--language", "pt", "--corpus", copy.corpus)
    assert refused.code == 2 and f"in training already, on {text}; " in refused.err


@pytest.mark.parametrize("verb", ["init new", "evaluate run"])
def test_options_of_a_corpus_that_cannot_be_read_are_one_line(xelm, place, monkeypatch, verb):
    monkeypatch.chdir(place)
    for options, message in {
        ("--language-map", "missing.yaml"): "missing.yaml cannot be read: No such file",
        ("--language-map", "text.csv"): "text.csv must have lines such as 'als: gsw'",
        ("--text-field", "nothing"): "the corpus has no usable document in ",
    }.items():
        outcome = xelm(
            *verb.split(), "--corpus", "corpus", *options, *(SEED if "new" in verb else ())
        )
        assert outcome.code == 2 and message in outcome.err.splitlines()[-1], outcome.err
        shutil.rmtree("new", ignore_errors=True)
