"""Distances and clusters of languages are the authors', and go on where theirs stop."""

import importlib.metadata
import math

import numpy as np
import pytest

from clustering import typology, uriel
from clustering.errors import UserError

CODES = "en:eng fr:fra es:spa de:deu el:ell bg:bul ru:rus tr:tur ar:ara vi:vie zh:zho hi:hin sw:swa"
CODES += " ur:urd ja:jpn ko:kor"
PAPER, ISO = zip(*(pair.split(":") for pair in CODES.split()), strict=True)
PAIRS = {
    "en-es": 0.158639,
    "de-el": 0.201993,
    "ja-ko": 0.202199,
    "hi-ur": 0.258367,
    "bg-ru": 0.272189,
    "fr-ar": 0.304174,
    "tr-zh": 0.460374,
    "vi-sw": 0.576178,
}


def reference_vectors(codes):
    """lang2vec.get_features(codes, "syntax_average", minimal=True), "--" for missing values."""
    file = importlib.metadata.distribution("lang2vec").locate_file(
        "lang2vec/data/feature_averages.npz"
    )
    with np.load(str(file)) as data:
        columns = [i for i, name in enumerate(data["feats"]) if name.startswith("S_")]
        rows = [list(data["langs"]).index(code) for code in codes]
        values = data["data"][rows][:, columns, 0].tolist()
    kept = [
        i for i in range(len(columns)) if {row[i] for row in values} not in ({0.0}, {1.0}, {-1.0})
    ]
    return [["--" if row[i] == -1.0 else row[i] for i in kept] for row in values]


def reference_distance(a, b):
    both = sum(x * y for x, y in zip(a, b, strict=True) if x != "--" and y != "--")
    return 1 - both / math.sqrt(
        sum(x * x for x in a if x != "--") * sum(y * y for y in b if y != "--")
    )


def test_distances_are_the_authors():
    distances = typology.distances(PAPER)
    for pair, value in PAIRS.items():
        assert distances.between(*pair.split("-")) == pytest.approx(value, abs=1e-6)


def test_every_distance_equals_a_computation_by_hand():
    vectors = reference_vectors(ISO)
    wanted = [[reference_distance(a, b) for b in vectors] for a in vectors]
    distances = typology.distances(PAPER).values
    np.testing.assert_allclose(distances, wanted, rtol=0, atol=1e-12)
    assert (distances == distances.T).all()
    assert (np.diag(distances) == 0).all()


def test_eight_and_four_clusters_are_the_authors():
    eight = typology.cluster(PAPER, 8)
    assert set(eight.clusters) == set(PAIRS)
    four = {frozenset(members) for members in typology.cluster(PAPER, 4).clusters.values()}
    assert four == {
        frozenset(names.split())
        for names in ("en es bg ru", "de el fr ar", "ja ko tr zh", "hi ur vi sw")
    }


def test_the_parents_of_the_papers_new_languages_are_the_nearest():
    # X-ELM section 5: az from tr, he from ar, pl from ru, sv from en.
    for language, parent in {"az": "tr", "he": "ar", "pl": "ru", "sv": "en"}.items():
        ranked = typology.distances([language, *PAPER]).relatives(language)
        assert ranked[0].language == parent
        apart = [relative.distance for relative in ranked]
        assert apart == sorted(apart)
        assert len(ranked) == len(PAPER)


def test_a_distance_depends_on_who_else_is_given():
    alone = typology.distances(["en", "de", "ja"]).between("en", "de")
    among = typology.distances(PAPER).between("en", "de")
    assert abs(alone - among) > 0.01


def test_one_language_and_languages_without_a_difference_are_at_no_distance():
    assert typology.distances(["en"]).values.tolist() == [[0.0]]
    assert typology.cluster(["en"], 1).clusters == {"en": ("en",)}
    # URIEL knows one Portuguese.
    assert typology.distances(["pt-BR", "pt-PT"]).values.tolist() == [[0, 0], [0, 0]]


def test_macrolanguages_resolve_to_the_code_with_most_observed_features():
    codes = uriel.codes_with_data(["sw", "zh", "az", "fa", "ar", "fil", "ku", "nn", "dik"])
    assert codes == {
        "nn": "nor",
        "dik": "din",
        "sw": "swa",
        "zh": "zho",
        "az": "aze",
        "fa": "fas",
        "ar": "ara",
        "fil": "tgl",
        "ku": "kur",
    }
    assert typology.distances(["cmn", "ja"]).parameters["uriel_codes"] == {
        "zh": "zho",
        "ja": "jpn",
    }
    # Filled sets have values of every code; those that rest on observations are taken.
    filled = uriel.codes_with_data(["nn", "az", "qu", "kok"], "syntax_knn")
    assert filled == {"nn": "nor", "az": "aze", "qu": "que", "kok": "kok"}
    ancestors = uriel.codes_with_data(["nn", "az", "qu", "zh", "eu"], "fam")
    assert ancestors == {"nn": "nor", "az": "azj", "qu": "quz", "zh": "cmn"}


def test_a_language_without_data_does_not_change_the_distances_of_the_others():
    alone, among = typology.distances(PAPER), typology.distances([*PAPER, "kok"])
    assert among.of(PAPER).values.tolist() == alone.values.tolist()
    assert np.isnan(among.between("kok", "en")) and among.coverage[-1, -1] == 0.0


def test_coverage_of_filled_sets_is_that_of_what_was_observed():
    filled = typology.distances(["kk", "kok", *PAPER], "syntax_knn")
    gaps = typology.distances(["kk", "kok", *PAPER], "syntax_average")
    assert not np.isnan(filled.values).any() and not filled.coverage[1].any()
    assert filled.coverage[0] == pytest.approx(gaps.coverage[0], abs=0.05)
    assert 0.05 < filled.coverage[0, 2] < 0.15


def test_languages_without_data_are_all_named():
    with pytest.raises(
        UserError,
        match=r"nothing of szl, kok in syntax_average; the sets _knn have no gaps.*by hand",
    ):
        typology.cluster(["en", "szl", "de", "kok"], 2)
    left = typology.cluster(["en", "szl", "de", "es"], 2, exclude=["szl"])
    assert left.unassigned == ("szl",)
    assert left.languages == ("en", "de", "es")


def test_pairs_without_a_common_feature_are_refused(monkeypatch):
    values = np.array([[1, np.nan, 1.0], [np.nan, 1.0, 0.5], [0.0, 0.0, np.nan]])
    monkeypatch.setattr(uriel, "features", lambda *_: (values[:, :2], ("a", "b")))
    assert np.isnan(typology.distances(["en", "de", "sw"]).between("en", "de"))
    with pytest.raises(
        UserError, match=r"typology knows nothing of en-de, en-sw, de-sw in .* by hand$"
    ):
        typology.cluster(["en", "de", "sw"], 2)


def test_an_unknown_feature_set_is_refused():
    with pytest.raises(UserError, match=r"unknown feature set 'syntax'; .*, geo$"):
        typology.cluster(["en", "tlh"], 1, features="syntax")


def test_excluding_every_language_is_refused():
    with pytest.raises(UserError, match=r"every language is excluded: fr, de, en$"):
        typology.cluster(["en", "de", "fr"], 2, exclude=["fr", "deu", "en"])


def test_k_out_of_range_is_refused():
    for k in (0, 20):
        with pytest.raises(UserError, match=f"k must be between 1 and 16 languages; got {k}"):
            typology.cluster(PAPER, k)


def test_feature_sets_join_and_missing_values_are_nan():
    both, names = uriel.features(["en", "sw"], "syntax_average+phonology_average")
    syntax, syntax_names = uriel.features(["en", "sw"])
    np.testing.assert_array_equal(both[:, : syntax.shape[1]], syntax)
    assert len(names) == both.shape[1] > len(syntax_names) == 103
    assert np.isnan(syntax).any()
    assert np.nanmin(both) >= 0
    assert np.nanmax(both) <= 1
    with pytest.raises(UserError, match="unknown feature set 'syntax'; there are syntax_wals"):
        uriel.features(["en"], "syntax")


REGIONAL = {
    "inventory_phoible_aa": "ha",
    "inventory_phoible_gm": "aa",
    "inventory_phoible_saphon": "gn",
    "inventory_phoible_spa": "ko",
    "inventory_phoible_ph": "ar",
    "inventory_phoible_ra": "ta",
    "inventory_phoible_upsid": "ru",
}


@pytest.mark.parametrize("name", sorted(uriel.FEATURE_SETS))
def test_every_named_feature_set_can_be_read(name):
    # PHOIBLE's parts are of one region each.
    values, names = uriel.features(["ru" if "phoible" not in name else REGIONAL[name]], name)
    assert values.shape == (1, len(names))
    assert not np.isnan(values).all()
    assert uriel.made_from(name)["lang2vec"]
