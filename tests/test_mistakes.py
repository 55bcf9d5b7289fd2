"""A user's mistake is one clear line and exit code 2, and nothing is changed."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shared import SEED, snapshot

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    """Everything under a folder, empty folders and locks too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


MISTAKES = [
    # Clusters
    ("cluster -k 2 --languages en,de,klingonish --out new", "unknown language code 'klingonish'"),
    ("cluster -k 4 --languages en,de,es --out new", "k must be between 1 and 3 languages; got 4"),
    ("cluster -k 0 --languages en,de,es --out new", "k must be between 1 and 3 languages; got 0"),
    ("cluster -k 1 --languages en,tlh --out new", "typology knows nothing of tlh"),
    ("cluster -k 2 --languages en,eng,de --out new", "more than once: en (as en, eng)"),
    ("cluster -k 2 --method random --languages en --out new", "k must be between 1 and 1"),
    ("cluster -k 2 --out new", "name the languages with --languages, --corpus or --run"),
    (
        "generate run abc --model merges/none",
        "run has no model 'merges/none'; known: seed, dense, de-fr, en-es",
    ),
    ("cluster -k 2 --method tfidf --run run --corpus corpus --out new", "not both"),
    ("cluster -k 2 --method updates --out new", "the measure updates needs --updates"),
    ("cluster -k 2 --method states+table --out new", "the measure table needs --table"),
    ("cluster -k 2 --method losses --languages en,de --out new", "the measure losses needs --run"),
    ("cluster -k 2 --method tfidf --out new", "name a RUN with --run, or text with --corpus"),
    (
        "cluster -k 2 --method tfidf --run run --languages de,tr --out new",
        "run/corpus/train has no text in tr",
    ),
    ("cluster -k 2 --method tfidf --run run --exclude de --out new", "--exclude goes with"),
    ("cluster -k 2 --method random --languages en,de --rule single --out new", "--rule goes with"),
    ("cluster -k 999 --method tfidf --run run --out new", "k must be between 1 and 240 different"),
    ("cluster -k 2 --corpus missing --out new", "corpus missing does not exist"),
    ("cluster -k 2 --corpus odd --out new", "unknown language code 'klingonish'"),
    ("cluster -k 2 --languages en,de --out clusters", "exists already; choose another folder"),
    ("cluster -k 2 --languages en,klingonish --out clusters", "exists already; choose another"),
    ("cluster -k 2 --languages en,de --out file/new", "file"),
    ("cluster --languages en,de --out new", "give the number of clusters with -k, or -k auto"),
    (
        "cluster -k auto --languages en,de,fr --out new",
        "k can be chosen for four languages or more",
    ),
    ("cluster -k 2 --languages en,de --out ''", "--out is empty; name a directory"),
    ("cluster -k 2 --languages en,de --random-seed 1 --out new", "goes with --method random or"),
    ("cluster -k 2 --method random --languages en,de --random-seed -1 --out new", "got -1"),
    (
        "cluster -k 2 --languages en,de --corpus corpus --out new",
        "--corpus goes with mixture or words or",
    ),
    ("cluster --method by-hand --groups doubled.yaml --out new", "names a cluster twice: a"),
    ("nearest en --languages de --table text.csv", "--table goes with table"),
    ("cluster -k auto --method random --languages en,de --out new", "needs a number of clusters"),
    ("cluster -k 2 --method unknown --out new", "unknown method 'unknown'; there are mixture,"),
    (
        "cluster -k 2 --method typology:much --languages en,de --out new",
        "a number wanted for the weight of typology; got 'much'",
    ),
    (
        "cluster -k 2 --method typology:0 --languages en,de --out new",
        "weights must be above zero; got 0 for typology",
    ),
    (
        "cluster -k 2 --method typology+typology --languages en,de --out new",
        "each measure once; got typology+typology",
    ),
    (
        "cluster -k 2 --method typology+tfidf --languages en,de --out new",
        "tfidf cannot be mixed with other methods; got typology+tfidf",
    ),
    ("cluster -k 2 --method table --languages en,de --out new", "table needs --table"),
    ("cluster -k 2 --method words --languages en,de --out new", "words needs --corpus or --run"),
    ("cluster -k 2 --method subwords --languages en,de --out new", "subwords needs --run"),
    ("cluster -k 2 --method names --languages en,de --out new", "names needs --tagged"),
    ("cluster -k 2 --method names --tagged empty --out new", "empty has no tagged text"),
    ("cluster -k 2 --method subwords --run run --languages de,tr --out new", "nothing of tr"),
    ("cluster -k 2 --method words --run run --languages de,tr --out new", "nothing of tr"),
    ("cluster -k 2 --method words --languages en,de --table x.csv --out new", "--table goes with"),
    ("cluster -k 2 --method table --features geo --out new", "--features goes with"),
    ("cluster -k 2 --method table --table missing.csv --out new", "missing.csv does not exist"),
    ("cluster -k 2 --method table --table text.csv --out new", "text.csv:2, b: must be a number"),
    ("cluster -k 2 --languages en,de --balance tokens --out new", "goes with --rule balanced"),
    (
        "cluster -k 2 --languages en,de --rule balanced --balance tokens --out new",
        "needs the tokens of a RUN; name it with --run",
    ),
    ("cluster --method by-hand --out new", "name it with --groups"),
    ("cluster --method by-hand --groups missing.yaml --out new", "missing.yaml does not exist"),
    ("cluster --method by-hand --groups text.csv --out new", "must have lines such as 'slavic:"),
    ("cluster --method by-hand --groups twice.yaml --out new", "more than once: en (as en, eng)"),
    ("cluster --method by-hand --groups broken.yaml --out new", "broken.yaml is not YAML: "),
    (
        "cluster -k 2 --method by-hand --groups x.yaml --out new",
        "-k and --languages go with other methods",
    ),
    ("cluster -k 2 --languages en,de --features nothing --out new", "unknown feature set"),
    ("cluster -k 2 --languages en,de --only S_NOTHING --out new", "has no feature S_NOTHING"),
    # Relatives
    ("nearest klingonish --languages en,de", "unknown language code 'klingonish'"),
    ("nearest en", "name the languages with --languages, --corpus or --run"),
    ("nearest en --languages eng", "no language to compare en with"),
    ("nearest en --languages de --by nothing", "unknown measure 'nothing'"),
    ("nearest en --languages de --by ,", "--by: names separated by commas wanted; got ','"),
    # Making a RUN
    ("init new --corpus missing", "corpus missing does not exist"),
    ("init new --corpus empty", "empty has no corpus file"),
    ("init new --corpus corpus --seed seeded/seed --set model.width=8", "is used as it is"),
    ("init new --corpus odd", "unknown language code 'klingonish'"),
    ("init new --corpus hf://owner/texts", "name the languages to take from hf://owner/texts "),
    ("init new --corpus corpus --languages de,tr", "corpus has no file of tr"),
    ("init new --corpus corpus --languages ''", "--languages: names separated by commas wanted"),
    ("init new --corpus corpus --languages ,", "--languages: names separated by commas wanted"),
    ("evaluate run --corpus corpus --routing ,", "--routing: names separated by commas wanted"),
    ("init new --corpus corpus --set experts.tokens", "a setting is NAME=VALUE"),
    (
        "init new --corpus corpus --set experts.token=3",
        "there is no setting 'experts.token'; the nearest is experts.tokens",
    ),
    *(
        (f"init new --corpus corpus --set {name}=3", f"setting {name!r}; the nearest is {nearest}")
        for name, nearest in (
            ("nothing", "gate.others"),
            ("experts.learning_rate", "experts.optimizer.learning_rate"),
            ("seed.optimizer", "seed.optimizer.name"),
            ("grow.optimizer.dtype", "grow.runtime.dtype"),
            ("seed.optimizer.schedule.x", "seed.optimizer.schedule"),
        )
    ),
    (
        "init new --corpus corpus --set experts.tokens=many",
        "'experts.tokens=many': wanted a whole number",
    ),
    (
        "init new --corpus corpus --set experts.tokens=1.5",
        "'experts.tokens=1.5': wanted a whole number",
    ),
    ("init new --corpus corpus --set experts.tokens=-1", "tokens must be at least 1; got -1"),
    ("init new --corpus corpus --set seed.runtime.dtype=float64", "wanted float32 or bfloat16"),
    ("init new --corpus corpus --set seed.runtime.rematerialise=1", "wanted true or false"),
    (
        "init new --corpus corpus --set seed.tokens=null",
        "'seed.tokens=null': wanted a whole number",
    ),
    ("init new --corpus corpus --set model.head_size=31", "head_size must be even"),
    ("init new --corpus corpus --set donor_share=1", "donor_share must be in 0..1, below 1"),
    ("init new --corpus corpus --preset hub", "give a seed checkpoint with --seed"),
    ("init new --corpus corpus --seed missing", "there is no directory missing"),
    ("init new --corpus corpus --seed empty", "empty is not a model checkpoint"),
    ("init new --corpus corpus --seed bare", "has no weights: model.safetensors is missing"),
    ("init new --corpus corpus --seed pickled", "its .bin files can run code and are not read"),
    ("init new --corpus corpus --seed damaged", "damaged/model.safetensors is not readable"),
    ("init new --corpus corpus --seed foreign", "model_type .*t5"),
    ("init new --corpus corpus --seed shrunk", "model.norm.weight has shape (7,)"),
    (
        "init new --corpus corpus --seed wordless",
        "wordless has no tokenizer; wanted tokenizer.json",
    ),
    (
        "init new --corpus corpus --seed worded",
        "worded/config.json: Field 'hidden_size' expected int, got str",
    ),
    ("init new --corpus corpus --seed uneven", "uneven/config.json: head_count must be a multiple"),
    ("init new --corpus corpus --seed no-object", "no-object/config.json must be a JSON object"),
    (
        "init new --corpus corpus --seed no-index",
        "no-index/model.safetensors.index.json is not JSON",
    ),
    (
        "init new --corpus corpus --seed no-map",
        'safetensors.index.json must have a "weight_map"',
    ),
    (
        "init new --corpus corpus --set model_type=xglm",
        "xglm does not go with model.norm=rms (wanted layer)",
    ),
    (
        "init new --corpus corpus --set model.max_length=128",
        "seed.sequence_length and experts.sequence_length and grow.sequence_length must be at most "
        "the model's max_length, 128; got 256 and 256 and 256 (add --set seed.sequence_length=128 "
        "--set experts.sequence_length=128 --set grow.sequence_length=128)",
    ),
    (
        "init new --corpus corpus --set experts.lora.rank=999",
        "experts.lora.rank must be at most 128, the smaller dimension of",
    ),
    (
        "init new --corpus corpus --seed run/seed --set grow.sequence_length=32 --set "
        "experts.sequence_length=32 --set grow.frozen_layers=0-2",
        "grow.frozen_layers must be some of the layers 0 to 1 of this model",
    ),
    (
        "init new --corpus corpus --seed run/seed --set experts.sequence_length=65",
        "experts.sequence_length and grow.sequence_length must be at most the model's max_length, "
        "64; got 65 and 1024 (add --set experts.sequence_length=64 --set grow.sequence_length=64)",
    ),
    ("init new --corpus corpus --clusters missing", "missing/clusters.json does not exist"),
    ("init new --corpus corpus --clusters clusters", "not in the RUN: es, fr"),
    ("init new --corpus corpus --clusters clusters --dry-run", "not in the RUN: es, fr"),
    ("init file --corpus corpus", "file is a file; give a new or empty directory"),
    ("init clusters --corpus corpus", "clusters exists and is no RUN"),
    (
        "init run --corpus corpus",
        "run was begun with other settings: model.vocabulary_size was 384",
    ),
    *[
        (command, "init of unfinished did not finish; run the same xelm init again")
        for command in (
            "cluster -k 2 --method tfidf --run unfinished --out new",
            "nearest en --run unfinished",
            "branch unfinished --clusters clusters",
            "train unfinished --dense",
            "grow unfinished --language pt --corpus corpus",
            "evaluate unfinished --corpus corpus",
            "generate unfinished x",
            "merge unfinished --out new",
            "rollback unfinished de-fr",
            "report unfinished",
            "verify unfinished",
        )
    ],
    # What is no RUN, or of tomorrow
    *[
        (command.format(run), message)
        for command in (
            "branch {} --clusters clusters",
            "train {} --all",
            "grow {} --language pt",
            "evaluate {} --corpus corpus",
            "generate {} x",
            "merge {} --out new",
            "rollback {} de-fr",
            "report {}",
        )
        for run, message in (
            ("missing", "missing"),
            ("empty", "empty is no RUN"),
            ("newer-run.json", "run.json is of format 99, this xelm reads up to 3; upgrade xelm"),
            ("half", "half/run.json lacks"),
        )
    ],
    *[
        (f"{command} newer-registry.json {options}", "registry.json is of format 99")
        for command, options in (
            ("train", "--all"),
            ("grow", "--language pt --corpus corpus"),
            ("evaluate", "--corpus corpus"),
            ("generate", "x"),
            ("merge", "--out new"),
            ("rollback", "de-fr"),
            ("verify", ""),
        )
    ],
    ("verify empty", "empty is no RUN"),
    ("verify missing", "missing is no RUN"),
    ("branch run --clusters newer-clusters.json", "clusters.json is of format 99"),
    # Experts
    ("branch run --clusters missing", "missing/clusters.json does not exist"),
    ("branch seeded --clusters missing", "missing/clusters.json does not exist"),
    ("train run", "name the experts to train, or give --all or --dense"),
    ("train run nobody", "no expert 'nobody'"),
    ("train run --dense nobody", "no expert 'nobody'"),
    ("train seeded --all", "seeded has no clusters yet; run: xelm branch seeded --clusters DIR"),
    (
        "train growing pt",
        "pt is a grown expert; resume its training with: xelm grow growing --language pt",
    ),
    ("train run de-fr nobody", "no expert 'nobody'"),
    ("rollback run nobody", "no expert 'nobody'"),
    ("rollback run de-fr", "has no version to go back to"),
    ("rollback run de-fr --version 7", "7"),
    ("merge run de-fr nobody --out new", "no expert 'nobody'"),
    ("merge seeded --out new", "no published expert"),
    ("merge run --out run/seed", "exists already; nothing is overwritten"),
    # Growing
    ("grow run --language sw --corpus ''", "--corpus is empty; name a folder or file of text"),
    ("evaluate run --corpus ''", "--corpus is empty; name a folder or file of text"),
    ("grow run --language klingonish", "unknown language code 'klingonish'"),
    ("grow run --language de --corpus corpus", "'de' is served already"),
    ("grow run --language deu --parent en-es --corpus corpus", "'de' is served already"),
    ("grow run --language sw --corpus corpus", "corpus has no file of sw"),
    ("grow run --language sw --corpus missing", "corpus missing does not exist"),
    ("grow run --language sw --parent nobody --corpus corpus", "no expert 'nobody'"),
    ("grow run --language tlh --corpus corpus", "corpus has no file of tlh"),
    (
        "grow run --language tlh --corpus corpus --by typology",
        "typology knows nothing of how near tlh is to any language served; name an expert",
    ),
    ("grow run --language sw --corpus corpus --by kinship", "unknown measure 'kinship'"),
    *(
        (
            f"grow run --language sw --corpus corpus --parent en-es --by genealogy{dry}",
            "--by genealogy chooses a parent, and --parent en-es names one",
        )
        for dry in ("", " --dry-run")
    ),
    ("grow seeded --language pt", "has no published expert to grow from"),
    # Asking
    ("evaluate run --corpus missing", "corpus missing does not exist"),
    ("evaluate run --corpus corpus --routing oracle", "routing must be one of .*'oracle'"),
    ("evaluate run --corpus corpus --top-m 0", "top_m must be between 1 and 2 experts; got 0"),
    ("evaluate run --corpus corpus --max-documents 0", "max_documents must be at least 1; got 0"),
    ("evaluate run --corpus corpus --router-temperature 0", "above 0; got 0.0 and"),
    ("generate run \udcff", "an argument is not UTF-8: '\\udcff'"),
    ("generate seeded x", "seeded has no published expert yet; run: xelm train seeded --all"),
    ("generate run x --top-m 3", "top_m must be between 1 and 2 experts; got 3"),
    ("generate run x --routing language", "needs the language of the text; give --language"),
    ("generate run x --routing language --language tr", "no expert serves 'tr'"),
    ("generate run x --temperature -1", "temperature must be at least 0"),
    ("generate run x --top-p 0", "top_p must be above 0"),
    ("generate run x --routing fixed --weights a=1 --language en", "no effect on fixed weights"),
    ("generate run x --routing posterior --router-temperature 1", "goes with routing tfidf"),
    ("evaluate run --corpus corpus --routing language --router-temperature 1", "not evaluated"),
    ("generate run x --max-new-tokens 100", "new ones; got max_new_tokens=100"),
]


@pytest.fixture(scope="module")
def seen():
    """What the test below found last in `place`, so that it is read once a command, not twice."""
    return {}


@pytest.mark.parametrize(
    ("command", "message"), MISTAKES, ids=[ascii(c)[1:-1] for c, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_changes_nothing(
    xelm, place, seen, monkeypatch, command, message
):
    monkeypatch.chdir(place)
    before, there = seen.pop("last", None) or (snapshot(place), names(place))
    outcome = xelm(*shlex.split(command))
    after, here = snapshot(place), names(place)
    shutil.rmtree("new", ignore_errors=True)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("xelm: ") and outcome.err.count("\n") == 1, outcome.err
    for part in message.split(".*"):
        assert part in outcome.err
    assert after == before
    # Locks stay in a RUN, and nowhere else.
    locks = {f"{path.parent.name}/.locks" for path in place.glob("*/run.json")}
    more = [name for name in here if name not in there]
    assert [name for name in more if "/".join(name.split("/")[:2]) not in locks] == []
    seen["last"] = after, here


UNUSABLE = [
    (b'{"body": "a"}\n', 'no "text" (1, first at de.jsonl:1)'),
    ('{"text": "a"}\n'.encode("utf-16"), "UTF-16; wanted UTF-8 (1, first at de.jsonl)"),
    ('{"text": "ä"}\n'.encode("latin-1"), "bytes that are not UTF-8 (1, first at de.jsonl:1"),
    (
        b'{"text": "a", "lang": "klingonish"}\n',
        "unknown language (1, first at de.jsonl:1 'klingonish')",
    ),
    (
        b'{"text": "a", "lang": "sw"}\n',
        "language sw, which was not requested (1, first at de.jsonl:1)",
    ),
]


@pytest.mark.parametrize("options", [[], SEED], ids=["fresh", "seed"])
@pytest.mark.parametrize(
    ("content", "reason"), UNUSABLE, ids=["key", "UTF-16", "Latin-1", "unknown", "other"]
)
def test_a_corpus_without_usable_documents_says_what_was_left_out(
    xelm, place, monkeypatch, tmp_path, options, content, reason
):
    monkeypatch.chdir(place)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "de.jsonl").write_bytes(content)
    outcome = xelm("init", tmp_path / "new", "--corpus", tmp_path / "corpus", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert "no usable document in de; " in outcome.err and reason in outcome.err
    assert outcome.err.splitlines()[-1].startswith("xelm: ")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "unknown",
        "cluster -k two --out new",
        "init",
        "init new",
        "init new --corpus corpus --preset unknown",
        "generate run x --routing unknown",
        "generate run x --temperature warm",
        "init new --corpus corpus --workers 0",
    ],
)
def test_a_command_that_cannot_be_parsed_names_its_help_in_one_line(
    xelm, place, monkeypatch, command
):
    monkeypatch.chdir(place)
    there = names(place)
    outcome = xelm(*shlex.split(command))
    assert outcome.code == 2 and outcome.out == ""
    verb = " ".join(["xelm", *command.split()[:1]])
    assert outcome.err.startswith("xelm: ") and outcome.err.count("\n") == 1
    assert outcome.err.endswith(("; see xelm --help\n", f"; see {verb} --help\n"))
    assert names(place) == there


def test_a_child_in_training_stays_on_its_corpus(xelm, place, tiny, monkeypatch, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("xelm.runs.train.train_checkpoints", interrupt)
    shutil.copytree(place / "run", tmp_path / "RUN")
    shutil.copytree(tiny.corpus, tmp_path / "other")
    (tmp_path / "other" / "pt.jsonl").write_bytes((tiny.corpus / "es.jsonl").read_bytes())
    command = ["grow", tmp_path / "RUN", "--language", "pt"]
    assert xelm(*command, "--corpus", tiny.corpus).code == 130
    refused = xelm(*command, "--corpus", tmp_path / "other")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"pt@v1 is in training already, on {tiny.corpus.resolve()}; " in refused.err
    # A dry run tells of the training that has begun, or refuses as the training does.
    dry = xelm(*command, "--corpus", tmp_path / "other", "--dry-run")
    assert (dry.code, dry.out, dry.err) == (2, "", refused.err)
    for options, said in (
        (["--parent", "de-fr"], "pt@v1 is in training already, from en-es@v1; go on with"),
        (["--by", "genealogy"], "the nearest language by mixture, at distance"),
    ):
        for more in ([], ["--dry-run"]):
            refused = xelm(*command, *options, *more)
            assert refused.code == 2 and said in refused.err
    for options in ([], ["--corpus", tiny.corpus], ["--parent", "en-es"], ["--by", "mixture"]):
        assert xelm(*command, *options, "--dry-run").code == 0
        assert xelm(*command, *options).code == 130


def test_branching_on_other_clusters_is_refused(xelm, place, monkeypatch, tmp_path, undrawn):
    monkeypatch.chdir(place)
    languages = "en,de,es,fr"
    for name, k in (("three", 3), ("same", 2)):
        made = xelm("cluster", "-k", k, "--languages", languages, "--out", tmp_path / name)
        assert made.code == 0
    xelm("cluster", "-k", 2, "--languages", "en,de,es", "--out", tmp_path / "fewer")
    xelm("cluster", "-k", 2, "--languages", "en,de,es,fr,pt", "--out", tmp_path / "more")
    before = snapshot(place)
    for name, message in {
        "three": "this RUN was branched on other clusters",
        "fewer": "different languages (not in the clusters: fr); cluster those of the corpus",
        "more": "clusters and RUN have different languages (not in the RUN: pt)",
    }.items():
        outcome = xelm("branch", "run", "--clusters", tmp_path / name)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err and outcome.err.count("\n") == 1
    assert xelm("branch", "run", "--clusters", tmp_path / "same").code == 0
    assert snapshot(place) == before


def test_clusters_of_another_runs_documents_are_refused(
    xelm, place, monkeypatch, tmp_path, undrawn
):
    monkeypatch.chdir(place)
    made = xelm("cluster", "-k", 2, "--method", "tfidf", "--run", "run", "--out", tmp_path / "c")
    assert made.code == 0, made.err
    shutil.copytree("seeded", tmp_path / "other")
    vectors = np.load(tmp_path / "other" / "vectoriser.npz")
    np.savez(
        tmp_path / "other" / "vectoriser.npz",
        idf=vectors["idf"],
        projection=-vectors["projection"],
    )
    before = snapshot(tmp_path / "other")
    outcome = xelm("branch", tmp_path / "other", "--clusters", tmp_path / "c")
    assert (outcome.code, outcome.out) == (2, "")
    assert "made with other vectors than the RUN's" in outcome.err
    assert snapshot(tmp_path / "other") == before


_HOLD = """
import sys
from experts.lock import locked

with locked(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("command", "lock"),
    [
        ("train seeded de-fr", "train-de-fr"),
        ("train seeded --dense", "train-dense"),
        ("branch seeded --clusters clusters", "branch"),
        ("grow run --language pt", "train-pt"),
        ("init seeded --corpus corpus", "init"),
    ],
)
def test_two_commands_at_once_are_refused(xelm, place, monkeypatch, command, lock):
    monkeypatch.chdir(place)
    if command.startswith("train"):
        monkeypatch.chdir(place)
        shutil.copytree("seeded", "branched", dirs_exist_ok=True)
        assert xelm("branch", "branched", "--clusters", "clusters").code == 0
        command = command.replace("seeded", "branched")
    run = command.split()[1]
    before = snapshot(place)
    arguments = [sys.executable, "-c", _HOLD, run, lock]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        outcome = xelm(*shlex.split(command))
    # The training of experts ends with a table of what is done, whatever failed.
    assert outcome.code == 2 and bool(outcome.out) == ("de-fr" in command)
    assert outcome.err.count("\n") == 1
    assert f"{run} is in use ({lock}) by process {holder.pid}" in outcome.err
    assert snapshot(place) == before
    shutil.rmtree(place / "branched", ignore_errors=True)


def test_a_run_of_a_version_with_other_fields_is_named(xelm, place, tmp_path):
    shutil.copytree(place / "seeded", tmp_path / "old")
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    record["config"]["model"]["rope_theta"] = 1e4
    (tmp_path / "old" / "run.json").write_text(json.dumps(record | {"xelm": "0.0.1"}))
    outcome = xelm("train", tmp_path / "old", "--dense")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "old/run.json, made by xelm 0.0.1: model has no field rope_theta" in outcome.err


def test_a_run_of_an_earlier_format_is_refused(xelm, place, tmp_path):
    shutil.copytree(place / "seeded", tmp_path / "old")
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    (tmp_path / "old" / "run.json").write_text(json.dumps(record | {"format": 1, "xelm": "0.0.1"}))
    outcome = xelm("train", tmp_path / "old", "--dense")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "run.json is of format 1, of xelm 0.0.1, and this xelm reads format 3" in outcome.err
