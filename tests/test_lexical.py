"""Overlap of words, n-grams, subwords and names."""

from collections import Counter

import numpy as np
import pytest

from clustering import lexical
from clustering.errors import UserError


def test_words_are_those_of_unicode_in_any_script():
    found = lexical.words(
        ["The cat, the CAT's 3 mats.", "नमस्ते दुनिया", "他们来了", "Straße STRASSE"]
    )
    assert found["the"] == 2 and found["cat"] == found["cat's"] == 1
    assert "3" not in found and "," not in found
    assert found["नमस्ते"] == found["दुनिया"] == 1  # not torn at its vowel signs
    assert [found[word] for word in "他们来了"] == [1, 1, 1, 1]
    assert found["strasse"] == 2


def test_n_grams_know_where_words_begin_and_end():
    found = lexical.characters(["ab ab c"], longest=2)
    assert found == {"a": 2, "b": 2, "_a": 2, "ab": 2, "b_": 2, "c": 1, "_c": 1, "c_": 1}


def test_subwords_are_counted_over_documents():
    found = lexical.subwords([np.array([3, 1, 3]), np.array([], int), np.array([1], np.uint16)])
    assert found == {1: 2, 3: 2}


def test_distance_is_the_share_of_text_not_in_common():
    counts = {"en": Counter(a=3, b=1), "de": Counter(a=1, c=1), "ja": Counter(d=5)}
    found = lexical.text_distances(counts, "words", {"corpus": "x"})
    assert found.between("en", "de") == pytest.approx(1 - 0.5)
    assert found.between("en", "ja") == 1.0
    assert found.parameters["units"] == {"en": [4, 2], "de": [2, 2], "ja": [5, 1]}
    assert (found.measure, found.made_from) == ("words", {"corpus": "x"})
    # Twice the text of the same kind is the same language.
    twice = {**counts, "en": Counter(a=6, b=2)}
    np.testing.assert_array_equal(lexical.text_distances(twice, "words").values, found.values)


def test_distance_of_types_does_not_count_how_often():
    counts = {"en": Counter(a=9, b=1, c=1), "de": Counter(a=1, d=7)}
    assert lexical.type_distances(counts, "names").between("en", "de") == pytest.approx(1 - 1 / 4)


def test_distances_of_many_are_those_of_each_pair():
    draw = np.random.default_rng(0)
    tags = ["en", "de", "fr", "ja", "sw"]
    counts = {tag: Counter(draw.integers(0, 40, 60).tolist()) for tag in tags}
    for measure in (lexical.text_distances, lexical.type_distances):
        every = measure(counts, "subwords")
        for one in tags:
            for other in tags:
                if one != other:
                    pair = measure({one: counts[one], other: counts[other]}, "subwords")
                    assert every.between(one, other) == pytest.approx(pair.between(one, other))


def test_a_language_without_any_is_named():
    counts = {"en": Counter(a=1), "de": Counter(), "sw": Counter()}
    with pytest.raises(UserError, match="no words found in the text of de, sw"):
        lexical.text_distances(counts, "words")
