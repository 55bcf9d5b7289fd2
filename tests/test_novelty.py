"""Novelty: text in languages that nobody knows is told from text in those that are known."""

import numpy as np
import pytest

from clustering import identify, novelty
from clustering.errors import UserError

LETTERS = {"a": "abcde", "b": "defgh", "c": "ghijk", "d": "jklmn", "e": "mnopa"}
"""Letters of made-up languages, each of which shares some with two others."""
OTHER = "acegikmo"
"""Letters of a language that is a little like all of these and much like none."""
PIECES = [chr(ord("a") + number) for number in range(16)]


def texts(letters, count, seed, length=60):
    """Each letter is followed by one of the next two of its alphabet, mostly."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        place, ids = 0, []
        for step in draw.choice([1, 2, 3], length, p=[0.6, 0.3, 0.1]):
            place = (place + step) % len(letters)
            ids.append(PIECES.index(letters[place]))
        found.append(np.asarray(ids))
    return found


@pytest.fixture(scope="module")
def identifier():
    return identify.fit(
        {
            tag: ["".join(PIECES[i] for i in ids) for ids in texts(letters, 40, 0)]
            for tag, letters in LETTERS.items()
        }
    )


def fitted(identifier, known):
    return novelty.fit(
        identifier,
        known,
        PIECES,
        {tag: texts(LETTERS[tag], 40, 0) for tag in known},
        {tag: texts(letters, 20, 1) for tag, letters in LETTERS.items()},
    )


def outside(found, ids):
    """Whether a text counts as unknown after each of its ids."""
    terms = found.terms("", [PIECES[i] for i in ids], ids)
    return found.outside(np.cumsum(terms, axis=0))


def test_a_language_that_nobody_knows_is_noticed_and_known_ones_are_not_mistaken(identifier):
    found = fitted(identifier, list(LETTERS))
    assert np.mean([outside(found, ids)[30] for ids in texts(OTHER, 50, 2)]) >= 0.9
    for letters in LETTERS.values():
        known = [outside(found, ids)[novelty.SHORT :].mean() for ids in texts(letters, 20, 3)]
        assert np.mean(known) <= 0.05


def test_so_many_known_texts_count_as_unknown_as_the_shares_say(identifier):
    """The thresholds are made of held-out texts in known languages alone."""
    found = fitted(identifier, list(LETTERS))
    held_out = {tag: texts(letters, 20, 1) for tag, letters in LETTERS.items()}
    sums, _ = novelty.beginnings(found, PIECES, held_out)
    is_short = sums[:, -1] < 10
    for shares in ((0.5, 0.1), (0.3, 0.0)):
        mixed = found.with_thresholds(sums, 10, shares).outside(sums)
        # By either of two margins: at least by one, at most by both.
        for rows, share in ((is_short, shares[0]), (~is_short, shares[1])):
            assert share - 0.02 <= mixed[rows].mean() <= 2 * share
    # The shipped shares: a short text counts as unknown much sooner than a longer one.
    short = sums[:, -1] < novelty.SHORT
    mixed = found.outside(sums)
    assert mixed[short].mean() > 0.1 and mixed[~short].mean() <= 2 * novelty.MOST_FALSE[1]


def test_a_language_that_is_taught_is_known_from_then_on(identifier):
    """As one that an expert is grown for: outside before, inside after."""
    before, after = fitted(identifier, list("abcd")), fitted(identifier, list("abcde"))
    for found, low, high in ((before, 0.8, 1.0), (after, 0.0, 0.05)):
        share = np.mean([outside(found, ids)[40] for ids in texts(LETTERS["e"], 50, 4)])
        assert low <= share <= high


def test_sums_of_a_text_are_those_of_the_text_as_it_grows(identifier):
    found = fitted(identifier, list(LETTERS))
    (ids,) = texts(OTHER, 1, 5)
    whole = found.terms("", [PIECES[i] for i in ids], ids)
    for place in range(len(ids)):
        before = "".join(PIECES[i] for i in ids[:place])
        one = found.terms(before, [PIECES[ids[place]]], ids[place : place + 1])
        np.testing.assert_allclose(one[0], whole[place], atol=1e-9)


def test_of_no_text_nothing_is_said(identifier):
    found = fitted(identifier, list(LETTERS))
    assert not found.outside(np.zeros((1, found.size)))[0]


def test_what_was_fitted_is_the_same_each_time_and_after_loading(identifier, tmp_path):
    found, again = fitted(identifier, list(LETTERS)), fitted(identifier, list(LETTERS))
    found.save(tmp_path / "novelty.npz")
    loaded = novelty.Novelty.load(tmp_path / "novelty.npz", identifier)
    for other in (again, loaded):
        np.testing.assert_array_equal(other.weights, found.weights)
        np.testing.assert_array_equal(other.expected, found.expected)
        np.testing.assert_array_equal(other.thresholds, found.thresholds)
        assert other.short == found.short == novelty.SHORT
    (tmp_path / "novelty.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"novelty\.npz"):
        novelty.Novelty.load(tmp_path / "novelty.npz", identifier)


def test_too_few_languages_are_refused(identifier):
    with pytest.raises(ValueError, match="at least 3 languages; got a, b"):
        fitted(identifier, ["a", "b"])
