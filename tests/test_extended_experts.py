"""An expert with more pieces than the seed, from `xelm grow --extend-vocabulary` to what others do
with it; the other experts stay as they were."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import write_corpus
from serving import served
from shared import needs_llama_cpp

from xelm import load_model, open_run
from xelm.data.vocabulary import key_of
from xelm.harness import Harness
from xelm.inference.vocabularies import choose
from xelm.models.parameters import NEW_ROWS
from xelm.runs import export, llama_cpp

pytestmark = pytest.mark.slow
PIECES = 40


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def grown(tmp_path_factory, tiny, xelm):
    """The tiny RUN before and after a language joined it, whose text has letters of its own."""
    folder = tmp_path_factory.mktemp("extended")
    corpus = write_corpus(folder / "corpus", ["eu"], 300, 1)
    table = str.maketrans("abcdefghijklmnopqrstuvwxyz", "աբգդեզէըթժիլխծկհձղճմյնշոչպ")
    text = (corpus / "eu.jsonl").read_text(encoding="utf-8")
    (corpus / "eu.jsonl").unlink()
    lines = [json.loads(line)["text"].translate(table) for line in text.splitlines()]
    for name, some in {"hy": lines[:200], "held/hy": lines[200:]}.items():
        path = corpus / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in some))
    held = corpus / "held"
    held.rename(folder / "held")
    held = folder / "held"
    for tag in ("en", "de", "es"):
        shutil.copy(tiny.held_out / f"{tag}.jsonl", held)
    run = folder / "RUN"
    shutil.copytree(tiny.directory, run)
    before = hashes(run / "experts")
    evaluated = xelm("evaluate", run, "--corpus", held, "--routing", "language,tfidf", "--json")
    command = ("grow", run, "--language", "hy", "--corpus", corpus, "--parent", "en-es")
    command = (*command, "--extend-vocabulary", PIECES)
    return SimpleNamespace(
        run=run,
        corpus=corpus,
        held=held,
        texts=lines[200:],
        before=before,
        evaluated=evaluated.json(),
        dry=xelm(*command, "--dry-run", "--json"),
        after_dry=hashes(run / "experts"),
        outcome=xelm(*command, "--json"),
        command=command,
    )


def test_a_dry_run_says_how_many_tokens_a_character_has(grown):
    assert grown.after_dry == grown.before
    assert "tokens a character; with 40 more pieces" in grown.dry.err
    grown.dry.json()


def test_the_expert_is_published_with_its_pieces(grown):
    record = grown.outcome.json()
    spelled = record["vocabulary"].pop("tokens_per_character")
    assert record["vocabulary"] == {"pieces": PIECES, "initialise": "focus", "text": "hy"}
    assert spelled[1] < 0.6 * spelled[0]
    run = open_run(grown.run)
    config = json.loads((grown.run / "experts/hy/v1/config.json").read_text())
    seed = json.loads((run.seed / "config.json").read_text())
    assert config == {**seed, "vocab_size": seed["vocab_size"] + PIECES}
    assert run.verify() == []


def test_other_experts_stay_as_they_were(grown, xelm):
    after = hashes(grown.run / "experts")
    assert {name: after[name] for name in grown.before} == grown.before
    found = xelm(
        "evaluate", grown.run, "--corpus", grown.held, "--routing", "language,tfidf", "--json"
    ).json()
    rows = {(r["system"], r["routing"], r["language"]): r for r in found["rows"]}
    compared = 0
    for row in grown.evaluated["rows"]:
        key = row["system"], row["routing"], row["language"]
        if row["routing"] != "tfidf" and row["language"] != "hy":
            assert rows[key]["nll"] == row["nll"] and rows[key]["tokens"] == row["tokens"], key
            compared += 1
    assert compared >= 12
    # Its own language is read in its pieces, by it and by the ensembles.
    alone, told, routed = (
        rows[key]
        for key in (("hy", None, "hy"), *(("ensemble", r, "hy") for r in ("language", "tfidf")))
    )
    assert alone["tokens"] == told["tokens"] < 0.6 * rows["seed", None, "hy"]["tokens"]
    assert told["nll"] == pytest.approx(alone["nll"], rel=1e-6)
    assert routed["tokens"] < 0.7 * rows["seed", None, "hy"]["tokens"]
    assert alone["nll"] < rows["seed", None, "hy"]["nll"]


def test_an_export_is_an_ordinary_checkpoint(grown, xelm, tmp_path):
    assert xelm("export", grown.run, "hy", "--out", tmp_path / "hy").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "hy"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hy"))
    run = open_run(grown.run)
    ours = run.ensemble("language").further[0].tokenizer
    text = grown.texts[0]
    ids = tokenizer(text)["input_ids"]
    assert ids == ours.begin(text)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    own = load_model(tmp_path / "hy", dtype="float32")
    np.testing.assert_allclose(own(jnp.asarray([ids]))[0], theirs, rtol=1e-3, atol=1e-4)


@needs_llama_cpp
def test_llama_cpp_itself_reads_the_expert_in_its_pieces(grown, xelm, tmp_path):
    outcome = xelm("export", grown.run, "hy", "--gguf", tmp_path / "a.gguf")
    assert outcome.code == 0, outcome.err
    assert re.search("the same ids of [0-9]+ texts and continues 8 prompts", outcome.out)


def test_a_gguf_file_is_compared_in_the_pieces_of_the_expert(grown, xelm, tmp_path, monkeypatch):
    """By what stands for llama.cpp and its converter: a file read in the seed's pieces is none."""
    run, asked = open_run(grown.run), []
    vocabulary = run.ensemble("language").further[0].vocabulary
    monkeypatch.setattr(llama_cpp, "find_converter", lambda given: ("convert",))
    monkeypatch.setattr(llama_cpp, "check_reader", lambda: None)
    monkeypatch.setattr(llama_cpp, "convert", lambda *given, **_: given[2].write_text("GGUF"))
    hy = load_model(run.registry().expert("hy").directory(run.directory), dtype="float32")

    def answers(tokenizer):
        def read(file, questions):
            asked.append(questions)
            continued = []
            for prompt in questions.prompts:
                likeliest = int(hy(jnp.asarray([prompt]))[0, -1].argmax())
                continued.append([likeliest])
            ids = [tokenizer.begin(text) for text in questions.texts]
            return llama_cpp.Answers(ids=ids, continuations=continued)

        return read

    monkeypatch.setattr(export, "_NEW_TOKENS", 1)
    command = ("export", grown.run, "hy", "--gguf")
    monkeypatch.setattr(llama_cpp, "read", answers(vocabulary.tokenizer))
    outcome = xelm(*command, tmp_path / "own.gguf")
    assert outcome.code == 0, outcome.err
    assert max(id for prompt in asked[0].prompts for id in prompt) >= vocabulary.base_size
    monkeypatch.setattr(llama_cpp, "read", answers(run.tokenizer()))
    refused = xelm(*command, tmp_path / "seed.gguf")
    assert refused.code == 2 and "llama.cpp makes other ids of" in refused.err
    assert not (tmp_path / "seed.gguf").exists()


def test_the_ensemble_reads_each_text_in_the_vocabulary_of_its_expert(grown):
    ensemble = open_run(grown.run).ensemble("tfidf")
    old = json.loads((grown.held / "es.jsonl").read_text().splitlines()[0])["text"]
    found = ensemble.score([grown.texts[0], old, grown.texts[1]])
    pool = ensemble.further[0]
    lengths = [len(pool.tokenizer.encode([t])[0]) + 1 for t in (grown.texts[0], grown.texts[1])]
    assert found.tokens[[0, 2]].tolist() == lengths
    assert found.tokens[1] == len(ensemble.tokenizer.encode([old])[0]) + 1
    # The models lie in memory once: in further pieces they have a few rows more.
    for number, name in enumerate(ensemble.names):
        plain, other = ensemble.parameters[number], pool.parameters[number]
        assert (NEW_ROWS in plain, NEW_ROWS in other) == (name == "hy", name != "hy")
        assert plain["embedding"] is other["embedding"]
        assert plain["blocks"][0]["query"]["weight"] is other["blocks"][0]["query"]["weight"]
    # A continuation of a text is scored in the pieces that its context chose.
    context, rest = grown.texts[0][:30], grown.texts[0][30:]
    whole = pool.tokenizer.encode_after(context, rest)
    after = ensemble.score([rest], contexts=[context])
    assert after.tokens.tolist() == [len(whole[0]) - whole[1] + 1]


def test_a_server_counts_and_streams_in_the_vocabulary_of_the_expert(grown):
    run = open_run(grown.run)
    pool = run.ensemble("language").further[0]
    text = grown.texts[2][:24]
    with served(grown.run, "tfidf") as server:
        body = {"prompt": text, "max_tokens": 5, "temperature": 0, "logprobs": 1, "echo": True}
        alone = server.post({"model": "xelm:hy", **body}).json()
        assert alone["usage"]["prompt_tokens"] == len(pool.tokenizer.begin(text))
        wanted = pool.generate(text, language="hy", max_new_tokens=5, temperature=0.0)
        (choice,) = alone["choices"]
        assert choice["text"] == text + wanted.text
        assert choice["xelm"]["weights"] == {"hy": 1.0}
        names = choice["logprobs"]["tokens"]
        pieces = [pool.tokenizer.piece(token) for token in wanted.ids]
        assert names[-len(pieces) :] == pieces
        streamed = server.client().completions.create(
            model="xelm",
            prompt=text,
            max_tokens=5,
            temperature=0,
            stream=True,
            extra_body={"language": "hy"},
        )
        assert "".join(part.choices[0].text for part in streamed) == wanted.text
        # Two prompts of one request, in two vocabularies.
        old = json.loads((grown.held / "es.jsonl").read_text().splitlines()[0])["text"][:20]
        both = {"model": "xelm", **body, "prompt": [text, old], "echo": False}
        found = server.post(both).json()
        tokens = len(pool.tokenizer.begin(text)) + len(run.tokenizer().begin(old))
        assert found["usage"]["prompt_tokens"] == tokens


@pytest.mark.parametrize("routing", ["posterior", "learned"])
def test_a_server_reads_a_prompt_in_the_vocabulary_in_which_the_ensemble_does(grown, routing):
    """Also where models must read the prompt for that, by a router of log-likelihoods."""
    ensemble = open_run(grown.run).ensemble(routing)
    old = json.loads((grown.held / "es.jsonl").read_text().splitlines()[0])["text"][:20]
    texts = [grown.texts[0][:3], old, grown.texts[1][:10]]
    begun = [ensemble.tokenizer.begin(text) for text in texts]
    pools = choose(ensemble, begun, [None] * 3)
    (own,) = ensemble.further
    assert pools[0] is own and (routing == "posterior" or pools[1] is ensemble)
    body = {"model": "xelm", "prompt": texts, "max_tokens": 5, "temperature": 0}
    with served(grown.run, routing) as server:
        found = server.post({**body, "logprobs": 1, "echo": True}).json()
    lengths = [len(pool.tokenizer.begin(text)) for pool, text in zip(pools, texts)]
    assert found["usage"]["prompt_tokens"] == sum(lengths)
    for text, pool, choice in zip(texts, pools, found["choices"]):
        wanted = ensemble.generate(text, max_new_tokens=5, temperature=0.0)
        assert choice["text"] == text + wanted.text
        start, *ids = pool.tokenizer.begin(text)
        names = choice["logprobs"]["tokens"]
        new = [pool.tokenizer.piece(token) for token in wanted.ids]
        assert names[len(ids) :] == new or len(new) < 5
        (nats,) = pool.likelihoods([[start]], [ids]).nats
        assert -sum(choice["logprobs"]["token_logprobs"][: len(ids)]) == pytest.approx(nats, 1e-5)


def test_the_harness_reads_each_text_in_the_vocabulary_in_which_the_ensemble_does(grown):
    old = json.loads((grown.held / "es.jsonl").read_text().splitlines()[0])["text"]
    texts = [grown.texts[0][:16], old[:16], grown.texts[1][:16]]
    rests = [grown.texts[0][16:26], old[16:26], grown.texts[1][16:26]]
    ensemble = open_run(grown.run).ensemble("learned")
    (own,) = ensemble.further
    pools = choose(ensemble, [ensemble.tokenizer.begin(text) for text in texts], [None] * 3)
    assert pools[0] is own and pools[1] is ensemble and pools[2] is own
    harness = Harness(str(grown.run))
    requests = [SimpleNamespace(args=pair) for pair in zip(texts, rests)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for text, rest, pool, (value, _) in zip(texts, rests, pools, found):
        # Spaces at its end belong to the continuation.
        context, ids = pool.tokenizer.begin(text.rstrip()), pool.tokenizer.begin(text + rest)
        after = pool.likelihoods([context], [ids[len(context) :]])
        assert value == pytest.approx(-after.nats[0], rel=1e-5)
    wholes = [SimpleNamespace(args=(text,)) for text in texts]
    rolling = harness.loglikelihood_rolling(wholes, disable_tqdm=True)
    for text, pool, value in zip(texts, pools, rolling):
        start, *ids = pool.tokenizer.begin(text)
        assert value == pytest.approx(-pool.likelihoods([[start]], [ids]).nats[0], rel=1e-5)
    options = {"max_gen_toks": 6, "do_sample": False, "until": []}
    prompts = [SimpleNamespace(args=(text, dict(options))) for text in texts]
    continued = harness.generate_until(prompts, disable_tqdm=True)
    wanted = [ensemble.generate(t, max_new_tokens=6, temperature=0.0).text for t in texts]
    assert continued == wanted
    # One model alone reads in its own.
    alone = Harness(str(grown.run), model="hy")
    ((value, _),) = alone.loglikelihood(requests[:1], disable_tqdm=True)
    context = own.tokenizer.begin(texts[0].rstrip())
    ids = own.tokenizer.begin(texts[0] + rests[0])
    after = open_run(grown.run).model("hy").likelihoods([context], [ids[len(context) :]])
    assert value == pytest.approx(-after.nats[0], rel=1e-5)


def test_further_versions_and_children_keep_the_vocabulary(grown, xelm, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(grown.run, run)
    more = write_corpus(tmp_path / "more", ["pt"], 60, 3)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in grown.texts[:50])
    (more / "hy.jsonl").write_text(lines)
    again = xelm("train", run, "hy", "--again", "--corpus", more, "--set", "gate.worse=null")
    assert again.code == 0, again.err
    first, second = (run / f"experts/hy/v{version}" for version in (1, 2))
    assert key_of(first) == key_of(second) != key_of(run / "seed")
    refused = xelm(
        "grow",
        run,
        "--language",
        "et",
        "--parent",
        "hy",
        "--corpus",
        more,
        "--extend-vocabulary",
        5,
    )
    assert refused.code == 2
    assert "the vocabulary of hy@v2 is extended already" in refused.err
    assert not (run / "corpus" / "et").exists()
    assert "merge" in xelm("merge", run, "hy", "en-es", "--name", "x").err


def test_a_version_from_elsewhere_has_the_vocabulary_of_its_weights(grown, xelm, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(grown.run, run)
    pieces = open_run(run).registry().expert("hy").vocabulary
    assert pieces and pieces["pieces"] == PIECES
    assert xelm("export", run, "hy", "--out", tmp_path / "own").code == 0
    for directory, vocabulary in ((tmp_path / "own", pieces), (run / "seed", None)):
        name = ("--name", "hy", "--parent", "hy") if vocabulary else ("--name", "hy")
        adopted = xelm("adopt", run, "--checkpoint", directory, *name)
        expert = open_run(run).registry().unfinished("hy") if not vocabulary else None
        expert = expert or open_run(run).registry().expert("hy")
        assert expert.vocabulary == vocabulary and expert.made["from"] == str(directory)
        assert adopted.code == (0 if vocabulary else 2), adopted.err
    assert "hy@v3 is not published" in adopted.err  # it has no pieces for this text


def test_a_child_keeps_its_pieces_when_its_parent_was_removed(grown, xelm, tmp_path):
    run, corpus = tmp_path / "RUN", write_corpus(tmp_path / "et", ["et"], 40, 5)
    shutil.copytree(grown.run, run)
    few = ("--tokens", 256, "--set", "gate.worse=null")
    for command in (
        ("grow", run, "--language", "et", "--parent", "hy", "--corpus", corpus, *few),
        ("remove", run, "hy", "--yes"),
        ("train", run, "et", "--again", "--from", "seed", *few),
        ("verify", run),
    ):
        found = xelm(*command)
        assert found.code == 0, found.err
    first, second = (run / f"experts/et/v{version}" for version in (1, 2))
    assert not (run / "corpus/hy").exists()
    assert key_of(first) == key_of(second) != key_of(run / "seed")


def test_a_version_does_not_start_from_pieces_that_its_expert_has_not(grown, xelm):
    before = hashes(grown.run)
    refused = xelm("train", grown.run, "en-es", "--again", "--from", "hy@v1")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "hy@v1 has more pieces than the seed, and en-es@v1 does not have these" in refused.err
    assert hashes(grown.run) == before


def test_an_expert_that_has_more_pieces_than_its_parent_is_not_compressed(grown, xelm):
    before = hashes(grown.run / "experts")
    for how in (("--revert", 0), ("--rank", 2)):
        refused = xelm("compress", grown.run, "hy", *how)
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert "has pieces that en-es@v1, its parent, has not; train a next" in refused.err
    assert hashes(grown.run / "experts") == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--extend-vocabulary", 0), "--extend-vocabulary must be at least 1; got 0"),
        (("--initialise", "mean"), "--initialise goes with --extend-vocabulary"),
        (("--extend-vocabulary", 99999), "the text has "),
    ],
)
def test_what_cannot_be_extended_is_refused(grown, xelm, options, why):
    corpus = grown.corpus / "et"
    if not corpus.exists():
        write_corpus(corpus, ["et"], 30, 5)
    found = xelm("grow", grown.run, "--language", "et", "--corpus", corpus, *options)
    assert found.code == 2 and why in found.err and "Traceback" not in found.err
    assert all(expert.name != "et" for expert in open_run(grown.run).registry().experts)
