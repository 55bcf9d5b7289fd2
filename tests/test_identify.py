"""Languages by n-grams of characters: sums that agree however a text is cut, and that tell them."""

import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from clustering import identify
from clustering.errors import UserError

TAGS = ("ar", "bg", "de", "en", "es", "fr", "hi", "ja", "ko", "ru", "sv", "sw", "tr", "ur", "zh")
TEXT = "Wer ist's? 你好 – नमस्ते"


def sample(part, tag):
    lines = (files("xelm") / "sample" / part / f"{tag}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in lines.splitlines()]


@pytest.fixture(scope="module")
def fitted():
    return identify.fit({tag: sample("train", tag) for tag in TAGS})


def test_sums_are_those_of_counted_n_grams():
    texts = {"aa": ["abab", "ba"], "bb": ["bcd"]}
    found = identify.fit(texts)
    # "abab": a2 b2 ab2 ba1 aba1 bab1 abab1, "ba": b1 a1 ba1.
    grams = {"a": 3, "b": 3, "ab": 2, "ba": 2, "aba": 1, "bab": 1, "abab": 1}
    total = 13 + 0.5 * identify.BUCKETS
    for asked in ("aba", "ab", "zz", ""):
        wanted = 0.0
        for length in range(1, 5):
            for start in range(len(asked) - length + 1):
                count = grams.get(asked[start : start + length], 0)
                wanted += np.log((count + 0.5) / total)
        assert found.terms("", [asked])[0, 0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        ("", "a"),
        ("ab", "çdé"),
        ("wxyz", "日本語です"),
        ("abc", ""),
        ("", "\ud800q"),
        ("a", "b" * 32),
    ],
)
def test_a_single_piece_is_as_a_piece_among_others(fitted, before, piece):
    alone = fitted.terms(before, [piece])
    first, _ = fitted.terms(before, [piece, "z"])
    np.testing.assert_allclose(alone[0], first, rtol=1e-9, atol=1e-9)


def test_a_text_in_pieces_is_the_text(fitted):
    (whole,) = fitted.terms("", [TEXT])
    pieces = [TEXT[:1], "", TEXT[1:7], TEXT[7:8], TEXT[8:]]
    terms = fitted.terms("", pieces)
    assert terms.shape == (5, len(TAGS)) and not terms[1].any()
    np.testing.assert_allclose(terms.sum(axis=0), whole, rtol=1e-12)
    for cut in range(len(TEXT)):
        (first,), (rest,) = fitted.terms("", [TEXT[:cut]]), fitted.terms(TEXT[:cut], [TEXT[cut:]])
        np.testing.assert_allclose(first + rest, whole, rtol=1e-12)


def test_held_out_texts_are_found_in_their_languages(fitted):
    shares = []
    for number, tag in enumerate(TAGS):
        guesses = [fitted.log_probabilities(text).argmax() for text in sample("valid", tag)]
        shares.append(np.mean(np.asarray(guesses) == number))
    assert np.mean(shares) > 0.95 and min(shares) > 0.8, dict(zip(TAGS, shares))


def test_probabilities_are_even_before_anything_is_read(fitted):
    np.testing.assert_allclose(np.exp(fitted.log_probabilities("")), 1 / len(TAGS))


def test_calibrated_probabilities_are_as_often_right_as_they_say(fitted):
    """The texts are beginnings of held-out ones, a few characters long."""
    halves = [{}, {}]
    for tag in TAGS:
        begins = [text[: 3 + n % 9] for n, text in enumerate(sample("valid", tag))]
        halves[0][tag], halves[1][tag] = begins[::2], begins[1::2]
    calibrated = fitted.calibrated(halves[0])
    assert calibrated.temperature > 1

    def error(identifier):
        """Expected calibration error over ten bins of the largest probability."""
        rows = [
            (tag, np.exp(identifier.log_probabilities(text)))
            for tag, texts in halves[1].items()
            for text in texts
        ]
        sure = np.asarray([p.max() for _, p in rows])
        right = np.asarray([TAGS[p.argmax()] == tag for tag, p in rows])
        bins = np.minimum((sure * 10).astype(int), 9)
        gaps = [abs((sure - right)[bins == b].sum()) for b in range(10)]
        return sum(gaps) / len(rows)

    assert error(calibrated) < 0.6 * error(replace(fitted, temperature=1.0))


def test_a_new_language_leaves_the_others_as_they_are(fitted):
    more = identify.fit({tag: sample("train", tag) for tag in (*TAGS[:3], "pl")})
    np.testing.assert_array_equal(more.log_likelihoods[:, :3], fitted.log_likelihoods[:, :3])


def test_it_comes_back_from_a_file(fitted, tmp_path):
    fitted.save(tmp_path / "languages.npz")
    found = identify.Identifier.load(tmp_path / "languages.npz")
    assert (found.languages, found.temperature) == (TAGS, fitted.temperature)
    np.testing.assert_array_equal(found.log_likelihoods, fitted.log_likelihoods)
    np.savez(tmp_path / "other.npz", languages=np.asarray(TAGS))
    with pytest.raises(UserError, match=r"other.npz is damaged: it lacks 'log_likelihoods'"):
        identify.Identifier.load(tmp_path / "other.npz")


def test_a_language_without_text_is_a_users_mistake():
    with pytest.raises(UserError, match="there is no text in 'sw' to identify it by"):
        identify.fit({"en": ["abc"], "sw": [""]})
