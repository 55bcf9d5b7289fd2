"""Tables of a user's own: read as they are, refused by line where they cannot be."""

import math

import numpy as np
import pytest

from clustering import table
from clustering.errors import UserError

TABLE = """language,tones,cases,order
eng,0,2,1
de,0,4,
th,5,0,1
swh,0,?,3
"""


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "traits.csv"
    target.write_text(TABLE)
    return target


def test_a_table_is_read_with_its_gaps(path):
    tags, values, names = table.read(path)
    assert (tags, names) == (("en", "de", "th", "sw"), ("tones", "cases", "order"))
    wanted = [[0, 2, 1], [0, 4, math.nan], [5, 0, 1], [0, math.nan, 3]]
    np.testing.assert_array_equal(values, wanted)


def test_distances_are_mean_differences_over_what_is_known_of_both(path):
    found = table.distances(path)
    assert found.measure == "traits"
    assert found.between("en", "de") == pytest.approx((0 + 2 / 4) / 2)
    assert found.between("en", "th") == pytest.approx((1 + 2 / 4 + 0) / 3)
    assert found.between("de", "sw") == 0.0  # no tones in either, and nothing else known of both
    assert found.coverage[0, 1] == pytest.approx(2 / 3)
    assert found.coverage[1, 3] == pytest.approx(1 / 3)
    assert list(found.made_from) == ["traits.csv"]


def test_some_languages_and_some_features(path):
    found = table.distances(path, ["th", "en"], only=["cases", "tones"])
    assert found.languages == ("th", "en")
    assert found.between("en", "th") == 1.0
    assert table.distances(path, ["th", "fr", "en"]).without_gaps()[1] == ("fr",)
    with pytest.raises(UserError, match=r"traits.csv has no line for fr, ja"):
        table.distances(path, ["fr", "ja"])
    with pytest.raises(UserError, match=r"traits.csv has no feature case; did you mean cases"):
        table.distances(path, only=["case"])


def test_a_pair_with_no_feature_in_common_is_at_an_unknown_distance(path):
    found = table.distances(path, only=["cases", "order"], languages=["en", "de", "sw"])
    with pytest.raises(UserError, match=r"traits knows nothing of de-sw$"):
        found.complete()
    assert found.coverage[1, 2] == 0.0


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_and_a_byte_order_mark(tmp_path, delimiter):
    other = tmp_path / "traits.csv"
    other.write_text("\ufeff" + TABLE.replace(",", delimiter) + "\n\n", encoding="utf-8")
    assert table.read(other)[0] == ("en", "de", "th", "sw")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have a header"),
        ("language\nen\n", "must have a header"),
        ("language,a\n", "has no line after the header"),
        ("en,1,2\nde,2,3\n", r"have a header with the names of features; got \['en', '1', '2'\]"),
        ("language,a,\nen,1,2\n", "must have a header"),
        ("language,a\nen,1\nde,SVO\n", r":3, a: must be a number, .*; got 'SVO'"),
        ("language,a\nen,inf\n", r":2, a: must be a number, .*; got 'inf'"),
        ("language,a,b\nen,1\n", r":2: the header has 3 columns; got 2"),
        ("language,a,a\nen,1,2\n", "has several columns a"),
        ("language,a\nen,1\neng,2\n", r"languages are given more than once: en \(as en, eng\)"),
        ("language,a\njp,1\n", r"unknown language code 'jp'; did you mean ja"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_a_line(tmp_path, text, said):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"bad.csv.*{said}"):
        table.read(path)


def test_a_table_that_is_no_text_or_not_there(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bad.csv is not UTF-8"):
        table.read(path)
    with pytest.raises(UserError, match=r"none.csv does not exist"):
        table.read(tmp_path / "none.csv")
