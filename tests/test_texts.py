"""What the tokenizer cannot spell, exact copies, and text that was trained on: told and marked."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from shared import SEED, documents_of, snapshot
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clustering.files import write_json
from experts.grow import grow
from experts.lock import update
from xelm.data import tokenizer as tokenizers
from xelm.data.contents import contents_of
from xelm.data.coverage import Coverage, CoverageCounts
from xelm.data.duplicates import copies, fingerprints, overlap
from xelm.data.held_out import held_out
from xelm.evaluation.options import EvaluationOptions
from xelm.evaluation.report.verdict import compare, verdict
from xelm.runs.evaluate import evaluate
from xelm.runs.report import read
from xelm.runs.run import open_run
from xelm.runs.text import tokenise

ARMENIAN = "աբգդեզէըթժիլխծկհձղճմյնշոչպջռսվտրցւփքօֆ"


def armenian(documents: int) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices(ARMENIAN, k=draw.randint(2, 7))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=25)) for _ in range(documents)]


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def latin_only(texts, size=300):
    """A unigram tokenizer of the letters in some texts, without bytes to fall back on."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, unk_token="<unk>", special_tokens=special)
    made.train_from_iterator(texts, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def unspellable(xelm, tiny, tmp_path_factory):
    """A RUN with one expert for each of English and Armenian, whose seed has Latin letters only,
    and its held-out text."""
    folder = tmp_path_factory.mktemp("unspellable")
    texts = armenian(66)
    for part, corpus in (("train", tiny.corpus), ("valid", tiny.held_out)):
        write(folder / part / "hy.jsonl", texts[:60] if part == "train" else texts[60:])
        for tag in ("de", "en"):
            shutil.copy(corpus / f"{tag}.jsonl", folder / part)
    shutil.copytree(tiny.directory / "seed", folder / "seed")
    for path in (folder / "seed").glob("tokenizer*"):
        path.unlink()
    texts = [text for tag in ("de", "en") for text in documents_of(tiny.corpus, tag)]
    latin_only(texts).save_pretrained(folder / "seed")
    seed = ["--seed", folder / "seed", *SEED[2:]]
    for part in (
        "experts.tokens=2048",
        "experts.batch_size=4",
        "experts.runtime.accumulation_steps=1",
    ):
        seed += ["--set", part]
    seed += ["--set", "experts.runtime.mesh_data=1", "--set", "dense_batch_size=4"]
    made = xelm("init", folder / "RUN", "--corpus", folder / "train", *seed)
    assert made.code == 0, made.err
    (folder / "families.yaml").write_text("hy: [hy]\nlatin: [de, en]\n")
    by_hand = ("--method", "by-hand", "--groups", folder / "families.yaml")
    found = xelm("cluster", *by_hand, "--out", folder / "clusters")
    assert found.code == 0, found.err
    assert xelm("branch", folder / "RUN", "--clusters", folder / "clusters").code == 0
    trained = xelm("train", folder / "RUN", "--all")
    assert trained.code == 0, trained.err
    return folder, made


@pytest.mark.slow
def test_a_language_that_the_tokenizer_cannot_spell_is_told(unspellable):
    folder, made = unspellable
    texts = open_run(folder / "RUN").store().record["languages"]
    assert texts["hy"]["unknown_characters"] == texts["hy"]["visible_characters"] > 5000
    assert texts["en"]["unknown_characters"] == 0
    (line,) = [line for line in made.out.splitlines() if line.startswith("hy ")]
    assert "100.0%?" in line
    assert "characters unknown to the tokenizer: hy 100.0%." in made.err


@pytest.mark.slow
def test_its_figures_are_marked_in_no_mean_and_never_the_best(unspellable, xelm):
    folder, _ = unspellable
    arguments = ("evaluate", folder / "RUN", "--corpus", folder / "valid", "--routing", "language")
    outcome = xelm(*arguments)
    assert outcome.code == 0, outcome.err
    record = json.loads((folder / "RUN" / "results" / "results.json").read_text())
    rows = {(row["system"], row["language"]): row for row in record["rows"]}
    assert rows["seed", "hy"]["marks"] == "?" and rows["seed", "en"]["marks"] == ""
    assert record["texts"]["hy"]["unknown_share"] == 1.0
    # Lower than of any language that it can spell, which is why it says nothing.
    known = [rows["latin", tag]["bits_per_byte"] for tag in ("de", "en")]
    assert rows["hy", "hy"]["bits_per_byte"] < min(known)
    assert [set(each["languages"]) for each in record["summaries"] if each["system"] == "seed"] == [
        {"de", "en"}
    ]
    assert all("hy" not in each["languages"] for each in record["summaries"])
    table = outcome.out.splitlines()
    assert any(line.startswith("mean of 2 ") for line in table)
    (by_expert,) = [line for line in table if line.startswith("hy ") and "?" not in line]
    assert "*" not in by_expert
    assert "characters unknown to the tokenizer: hy 100.0%." in outcome.err
    facts = read(open_run(folder / "RUN"))
    comparison = compare(facts)
    assert comparison is not None and set(comparison.languages) == {"de", "en"}
    assert "does not know the characters of Armenian (hy) 100 %".replace(" %", "%") in " ".join(
        verdict(facts, comparison)
    )
    assert xelm("report", folder / "RUN").code == 0
    page = (folder / "RUN" / "results" / "report.html").read_text()
    assert "100.0%?" in page and "Scores marked ? mean nothing" in page


@pytest.mark.parametrize(
    ("model", "trainer", "wanted"),
    [
        # Twelve letters are no "a", of which four words are one unknown token each.
        (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer, (12, 0)),
        # It has neither an unknown token nor bytes, and leaves out what it does not know.
        (models.BPE(), trainers.BpeTrainer, (12, 0)),
        (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer, (12, 0)),
    ],
    ids=["WordPiece", "BPE that drops", "words"],
)
def test_unknown_characters_are_counted_whatever_the_vocabulary_makes_of_them(
    model, trainer, wanted
):
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(["salt and sea"], trainer(special_tokens=["[UNK]", "</s>"]))
    hub = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    tokenizer = tokenizers.Tokenizer(hub)
    texts = ["salt", "and բար ծով sea աղտ մեղ"]
    (plain, mixed) = Coverage(tokenizer).count(texts, tokenizer.encode(texts))
    assert CoverageCounts(*plain.tolist()) == CoverageCounts(4, 4, 0, 0)
    assert CoverageCounts(*mixed.tolist()) == CoverageCounts(23, 18, *wanted)


def test_parts_of_characters_are_counted_in_bytes_of_both_kinds(tiny):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["sea"], trainers.BpeTrainer(initial_alphabet=alphabet))
    made.add_special_tokens(["</s>"])
    byte_level = tokenizers.Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    )
    texts = ["sea \n", "ծ"]
    for tokenizer in (byte_level, open_run(tiny.directory).tokenizer()):
        found = Coverage(tokenizer).count(texts, tokenizer.encode(texts))
        assert found[:, 2].tolist() == [0, 0]
        assert found[:, 3].tolist() == [0, 2]  # two bytes of UTF-8; a line's end is a character


def test_exact_copies_are_counted_and_left_out_unless_kept(xelm, place, tmp_path):
    texts = documents_of(place / "corpus", "de")
    # The same words in other lines, as of verse, are another document.
    texts.append(texts[5].replace(" ", "\n"))
    again = [texts[3], texts[5], texts[3]]
    write(tmp_path / "corpus" / "de.jsonl", [*texts[:10], *again[:2], *texts[10:], again[2]])
    shutil.copy(place / "corpus" / "en.jsonl", tmp_path / "corpus")
    seed = ["--seed", place / "run" / "seed", *SEED[2:]]
    made = xelm("init", tmp_path / "RUN", "--corpus", tmp_path / "corpus", *seed)
    assert made.code == 0, made.err
    assert "3 documents are exact copies of earlier ones (de 3); left out" in made.err
    store = open_run(tmp_path / "RUN").store()
    assert store.record["languages"]["de"]["duplicates"] == 3
    wanted = open_run(place / "run").tokenizer().encode(texts)
    assert [store.languages["de"].document(n).tolist() for n in range(len(texts))] == wanted
    assert len(store.languages["de"]) == len(texts)
    prints = store.fingerprints()["de"]
    np.testing.assert_array_equal(prints.signatures, fingerprints(texts).signatures)
    options = (tmp_path / "kept", "--corpus", tmp_path / "corpus", *seed, "--keep-duplicates")
    assert "(de 3); kept" in xelm("init", *options).err
    kept = open_run(tmp_path / "kept").store()
    assert len(kept.languages["de"]) == len(texts) + 3
    assert kept.record["languages"]["de"]["duplicates"] == 3
    other = xelm("init", *options[:-1])
    assert other.code == 2 and "was begun with --keep-duplicates" in other.err


def test_evaluating_on_the_training_text_is_told_and_marked(xelm, copy):
    arguments = ("evaluate", copy.directory, "--corpus", copy.corpus, "--routing", "language")
    outcome = xelm(*arguments, "--max-documents", 20)
    assert outcome.code == 0, outcome.err
    run = open_run(copy.directory)
    kept = {  # of the first twenty documents, those that were trained on
        tag: 20 - int((held_out(ids, run.config.held_out) < 20).sum())
        for tag, ids in run.store().languages.items()
    }
    assert sum(kept.values()) < 80 and set(kept) == {"de", "en", "es", "fr"}
    assert f"de {kept['de'] / 20:.1%}" in outcome.err and "not of held-out text" in outcome.err
    record = json.loads((copy.directory / "results" / "results.json").read_text())
    found = {
        tag: (text["compared"], text["exact"], text["near"])
        for tag, text in record["texts"].items()
    }
    assert found == {**{tag: (20, n, 0) for tag, n in kept.items()}, "pt": (20, 0, 0)}
    marks = {row["language"]: row["marks"] for row in record["rows"]}
    assert marks == {**dict.fromkeys(("de", "en", "es", "fr"), "!"), "pt": ""}
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("mean of 4  ")][:1]
    assert line.endswith("!")
    facts = read(open_run(copy.directory))
    said = verdict(facts, compare(facts))
    assert said[0].startswith("These figures are not of held-out text")
    assert said[1].startswith("On text that was trained on, the ensemble is ")
    text = facts.texts["de"]
    partly = replace(facts, texts=facts.texts | {"de": replace(text, exact=0, near=0)})
    assert verdict(partly, compare(partly))[1].startswith(
        "On text that was trained on in 3 of 4 languages, the ensemble is "
    )
    assert xelm("report", copy.directory).code == 0
    page = (copy.directory / "results" / "report.html").read_text()
    assert "These figures are not of held-out text" in page and f"{kept['de'] / 20:.1%}!" in page


def test_what_a_grown_expert_was_trained_on_counts_too(xelm, copy):
    grown = xelm("grow", copy.directory, "--language", "pt", "--corpus", copy.corpus)
    assert grown.code == 0, grown.err
    options = EvaluationOptions(routings=["language"], max_documents=10)
    results = evaluate(open_run(copy.directory), copy.corpus, options, save=False)
    assert results.texts["pt"].exact == 9  # one of the first ten is held out


def test_text_of_a_growth_that_never_began_was_not_trained_on(xelm, copy):
    run = open_run(copy.directory)
    tokenise(run, contents_of(copy.corpus, ["pt"]), "pt")
    options = EvaluationOptions(routings=["language"], max_documents=10)
    assert evaluate(run, copy.corpus, options, save=False).texts["pt"].exact == 0
    update(copy.directory, lambda registry: grow(registry, "pt", "en-es"), "grow")
    assert evaluate(run, copy.corpus, options, save=False).texts["pt"].exact == 9


def test_near_copies_are_found_and_other_text_is_not(tiny):
    texts = documents_of(tiny.corpus, "en")
    changed = [text[:-1].upper() for text in texts]
    found = overlap(fingerprints(changed), [fingerprints(texts)])
    assert not found.exact.any() and found.near.all()
    other = overlap(fingerprints(documents_of(tiny.held_out, "en")), [fingerprints(texts)])
    assert not other.exact.any() and not other.near.any()
    # Other white space makes a near copy; half of a document is another.
    spaced = overlap(fingerprints([texts[7].replace(" ", "\n")]), [fingerprints(texts)])
    assert spaced.exact.tolist() == [False] and spaced.near.tolist() == [True]
    half = overlap(fingerprints([texts[7][: len(texts[7]) // 2]]), [fingerprints(texts)])
    assert not half.exact.any() and not half.near.any()


def test_short_documents_have_fingerprints_too():
    texts = ["", "a", "ab", "a", "meer", "Meer"]
    prints = fingerprints(texts)
    assert copies(prints.hashes).tolist() == [False, False, False, True, False, False]
    assert (prints.signatures[4] == prints.signatures[5]).all()
    assert not (prints.signatures[1] == prints.signatures[2]).any()


def test_where_the_training_text_is_missing_nothing_is_said_of_it(xelm, copy):
    shutil.rmtree(copy.directory / "corpus" / "train")
    arguments = ("evaluate", copy.directory, "--corpus", copy.corpus, "--routing", "language")
    outcome = xelm(*arguments, "--max-documents", 5)
    assert outcome.code == 0, outcome.err
    assert f"is unknown: {copy.directory / 'corpus' / 'train'} is missing" in outcome.err
    found = json.loads((copy.directory / "results" / "results.json").read_text())["texts"]["de"]
    assert found["trained_share"] is None and found["compared"] is None


def test_a_store_with_other_signatures_is_opened_and_what_was_trained_on_is_unknown(xelm, copy):
    folder = copy.directory / "corpus" / "train"
    record = json.loads((folder / "store.json").read_text())
    del record["fingerprints"]
    for counts in record["languages"].values():
        for name in (*CoverageCounts._fields, "duplicates"):
            del counts[name]
    write_json(folder / "store.json", record)
    for path in folder.glob("*.signatures"):
        path.unlink()
    before = snapshot(folder)
    arguments = ("evaluate", copy.directory, "--corpus", copy.corpus, "--routing", "language")
    outcome = xelm(*arguments, "--max-documents", 5)
    assert outcome.code == 0, outcome.err
    assert "whether this text was trained on is unknown" in outcome.err
    found = json.loads((copy.directory / "results" / "results.json").read_text())["texts"]["de"]
    assert found["trained_share"] is None and found["unknown_share"] == 0.0
    assert snapshot(folder) == before
