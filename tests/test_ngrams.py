"""Texts clustered by their character n-grams, without a tokenizer."""

import gzip
import json

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from clustering import ngrams
from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.errors import UserError

SENTENCES = {
    "en": "the old man and the boy went down to the water where they waited for a boat",
    "de": "der alte mann und der junge gingen hinunter ans wasser und warteten auf ein schiff",
    "hi": "बूढ़ा आदमी और लड़का पानी के पास गए और वहाँ नाव की राह देखने लगे",
    "zh": "老人和孩子走到水边在那里等一条船来",
}


def texts(each=40):
    """Shuffled words of a sentence, or its characters where there are no spaces."""
    draw, found = np.random.default_rng(0), []
    for _ in range(each):
        for language, sentence in SENTENCES.items():
            parts = sentence.split() if " " in sentence else list(sentence)
            between = " " if " " in sentence else ""
            found.append((between.join(draw.permutation(parts)[:12]), language))
    return found


def test_ids_are_as_many_as_there_are_ngrams():
    sentences = ["Ab ab", "x", "", "नमस्ते दुनिया", "你好世界"]
    found = list(ngrams.ids(sentences))
    analyse = CountVectorizer(analyzer="char_wb", ngram_range=(1, 3)).build_analyzer()
    assert [len(ids) for ids in found] == [len(analyse(text)) for text in sentences]
    assert all(ids.dtype == np.int32 and (ids < ngrams.BUCKETS).all() for ids in found)
    # Upper and lower case are one, and what is there twice counts twice.
    distinct, times = np.unique(found[0], return_counts=True)
    assert len(distinct) == len(set(analyse(sentences[0]))) and set(times[times != 2]) == {4}


def test_many_texts_are_read_as_one_by_one(monkeypatch):
    several = [text for text, _ in texts(3)]
    alone = [next(ngrams.ids([text])) for text in several]
    monkeypatch.setattr(ngrams, "_TEXTS_AT_ONCE", 5)
    for one, other in zip(alone, ngrams.ids(iter(several)), strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(other))


def test_who_keeps_the_ids_of_one_text_keeps_no_others():
    assert all(found.base is None for found in ngrams.ids(text for text, _ in texts(3)))


def test_languages_of_every_script_fall_apart():
    found = ngrams.cluster(Documents([texts()]), 4)
    assert sorted(list(counts.items()) for counts in found.documents.values()) == sorted(
        [(language, 40)] for language in SENTENCES
    )
    assert found.parameters["terms"] == "characters" and found.parameters["longest"] == 3
    labels = found.assign(ngrams.ids(["they waited for the boy", "孩子在水边"]))
    names = [list(found.clusters)[label] for label in labels]
    assert names == [found.cluster_of("en"), found.cluster_of("zh")]


@pytest.fixture
def corpus(tmp_path):
    for language in SENTENCES:
        lines = [json.dumps({"text": text}) for text, tag in texts() if tag == language]
        with gzip.open(tmp_path / f"{language}.jsonl.gz", "wt") as file:
            file.write("\n".join([*lines, '{"text": ""}']))
    return tmp_path


def test_documents_of_a_corpus_are_clustered_without_a_run(xelm, corpus, tmp_path, undrawn):
    outcome = xelm(
        *("cluster", "--method", "tfidf", "--corpus", corpus, "-k", 3),
        *("--languages", "en,zho,hin", "--out", tmp_path / "out"),
    )
    assert outcome.code == 0, outcome.err
    assert "3 records were left out" in outcome.err  # of the languages that are read, once
    found = Clustering.load(tmp_path / "out")
    assert sorted(found.languages) == ["en", "hi", "zh"]
    assert sorted(counts.popitem()[1] for counts in map(dict, found.documents.values())) == [40] * 3
    in_order = Documents([_in_order("en", "zh", "hi")])
    assert found == ngrams.cluster(in_order, 3, made_from=found.made_from)


def _in_order(*languages):
    """As they are read: by the files' names."""
    return [(text, tag) for name in sorted(languages) for text, tag in texts() if tag == name]


def test_a_language_without_text_is_a_mistake(xelm, corpus, tmp_path):
    (corpus / "sw.jsonl").write_text('{"text": ""}\n')
    outcome = xelm(
        *("cluster", "--method", "tfidf", "--corpus", corpus, "-k", 2),
        *("--languages", "en,sw", "--out", tmp_path / "out"),
    )
    assert outcome.code == 2 and "no usable document in sw" in outcome.err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="k must be between 1 and 151 different"):
        ngrams.cluster(Documents([texts()]), 161)
