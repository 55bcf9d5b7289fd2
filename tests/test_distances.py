"""Distances by any measure: symmetric, covered, weighed together; families and places of URIEL."""

import dataclasses

import numpy as np
import pytest

from clustering import features, genealogy, geography, grouping, typology, uriel
from clustering.distances import Distances, combine
from clustering.errors import UserError

LANGUAGES = ("en", "de", "fr", "hi", "ja", "eu")


def measured(values, coverage=None, tags=("en", "de", "fr"), measure="a test"):
    values = np.asarray(values, float)
    coverage = np.ones_like(values) if coverage is None else np.asarray(coverage, float)
    return Distances(measure=measure, languages=tags, values=values, coverage=coverage)


THREE = measured([[0, 0.2, 0.4], [0.2, 0, 0.3], [0.4, 0.3, 0]])


def test_relatives_come_nearest_first_with_their_coverage():
    half = [[1, 0.5, 1], [0.5, 1, 1], [1, 1, 1]]
    distances = measured(THREE.values, half)
    assert distances.relatives("de") == [("en", 0.2, 0.5), ("fr", 0.3, 1.0)]
    assert distances.between("eng", "fra") == 0.4
    with pytest.raises(UserError, match="sw is not among the languages of this measure: en, de"):
        distances.relatives("sw")


def test_a_choice_of_languages_keeps_their_distances():
    some = THREE.of(["fr", "en"])
    assert (some.languages, some.between("fr", "en")) == (("fr", "en"), 0.4)
    assert some.of(["fr", "en"]) == some != THREE


def with_gaps(*pairs, of=THREE):
    """The distances without those of some pairs."""
    values, known = of.values.copy(), np.ones_like(of.values)
    for one, other in pairs:
        i, j = of.languages.index(one), of.languages.index(other)
        values[i, j] = values[j, i] = np.nan
        known[i, j] = known[j, i] = 0.0
    return measured(values, known, of.languages)


def test_pairs_of_which_nothing_is_known_are_named_where_all_are_wanted():
    assert THREE.complete() is THREE
    with pytest.raises(UserError, match=r"a test knows nothing of en-de$"):
        with_gaps(("en", "de")).complete()
    alone = THREE.of(["en", "de"]).spread(["en", "de", "fr"])
    with pytest.raises(UserError, match=r"a test knows nothing of fr$"):
        alone.complete()
    with pytest.raises(UserError, match=r"a test knows nothing of fr$"):
        grouping.cluster(alone, 2)


def test_an_unknown_distance_comes_last_and_has_no_coverage():
    near = with_gaps(("en", "fr")).relatives("en")
    assert near[0] == ("de", 0.2, 1.0)
    assert (near[1].language, near[1].coverage) == ("fr", 0.0) and np.isnan(near[1].distance)
    with pytest.raises(ValueError, match="coverage must be 0 where a distance is NaN"):
        measured(with_gaps(("en", "fr")).values)


def test_languages_that_a_measure_does_not_have_are_at_unknown_distances():
    wider = THREE.spread(["fr", "sw", "en"])
    assert wider.languages == ("fr", "sw", "en") and wider.between("fr", "en") == 0.4
    assert np.isnan(wider.between("sw", "en")) and wider.between("sw", "sw") == 0.0
    assert wider.coverage.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_languages_with_most_gaps_are_left_out_until_there_is_none():
    assert THREE.without_gaps() == (THREE, ())
    four = measured(np.ones((4, 4)) - np.eye(4), tags=("en", "de", "fr", "sw"))
    gaps = with_gaps(("sw", "en"), ("sw", "de"), ("fr", "de"), of=four)
    kept, left_out = gaps.without_gaps()
    assert (kept.languages, left_out) == (("fr", "sw"), ("en", "de"))
    assert kept.complete().between("sw", "fr") == 1.0
    little = dataclasses.replace(
        gaps, coverage=gaps.coverage * [[1], [1], [1], [0.5]] * [1, 1, 1, 0.5]
    )
    assert little.without_gaps()[1] == ("de", "sw")


def test_a_gap_in_one_of_several_measures_is_neither_near_nor_far():
    # de is .25 from the others on average once the largest is 1, fr .875; the farther counts.
    gap = with_gaps(("de", "fr"), of=measured([[0, 0.2, 0.8], [0.2, 0, 0.5], [0.8, 0.5, 0]]))
    both = combine([(gap, 1.0), (THREE, 1.0)])
    assert both.between("de", "fr") == pytest.approx((1.0 + 0.3 / 0.4) / 2)
    assert both.coverage[1, 2] == 0.5 and both.coverage[0, 2] == 1.0
    # Of a language of which nothing is known, what is known of the other counts, or of all pairs.
    alone = combine([(THREE.spread(["en", "de", "fr", "sw"]), 1.0)])
    assert np.isnan(alone.between("en", "sw")) and alone.coverage[3].tolist() == [0, 0, 0, 0]
    steady = measured(np.ones((4, 4)) - np.eye(4), tags=("en", "de", "fr", "sw"))
    filled = combine([(THREE.spread(steady.languages), 1.0), (steady, 1.0)])
    assert filled.between("sw", "fr") == pytest.approx((0.35 / 0.4 + 1) / 2)
    assert filled.between("sw", "de") == pytest.approx((0.3 / 0.4 + 1) / 2)
    # A measure that knows no pair at all has no say.
    silent = THREE.of(["en"]).spread(["en", "de", "fr"])
    np.testing.assert_allclose(combine([(silent, 9.0), (THREE, 1.0)]).values, THREE.values / 0.4)


@pytest.mark.parametrize(
    "values",
    [[[0, 1], [2, 0]], [[0, -1], [-1, 0]], [[1, 1], [1, 0]], [[0, 1, 1]] * 3, [[0, np.inf]] * 2],
)
def test_what_is_no_distance_is_refused(values):
    with pytest.raises(ValueError, match=r"symmetric|negative|finite"):
        measured(values, np.ones_like(values), ("en", "de"))


def test_measures_are_weighed_after_their_largest_is_one():
    far = measured([[0, 8, 2], [8, 0, 4], [2, 4, 0]], np.full((3, 3), 0.5), measure="another")
    both = combine([(THREE, 3.0), (far, 1.0)])
    wanted = 0.75 * THREE.values / 0.4 + 0.25 * far.values / 8
    np.testing.assert_allclose(both.values, wanted)
    np.testing.assert_allclose(both.coverage, 0.875)
    assert both.measure == "0.75 a test + 0.25 another"
    np.testing.assert_allclose(combine([(THREE, 2.0)]).values, THREE.values / 0.4)
    turned = combine([(THREE, 3.0), (far.of(["fr", "de", "en"]), 1.0)])
    np.testing.assert_allclose(turned.values, wanted)


def test_measures_that_do_not_go_together_are_refused():
    other = dataclasses.replace(THREE, languages=("en", "de", "sw"), measure="another")
    with pytest.raises(UserError, match="a test and another have different languages: fr, sw"):
        combine([(THREE, 1.0), (other, 1.0)])
    for weights in ([0.0], [-1.0]):
        with pytest.raises(UserError, match="weights must not be negative nor all zero"):
            combine([(THREE, weight) for weight in weights])


def test_coverage_of_typology_is_the_share_of_features_known_of_both():
    distances = typology.distances(["en", "sw", "de"], "syntax_wals")
    values, _ = typology.uriel.features(["en", "sw", "de"], "syntax_wals")
    kept = ~np.isnan(values[:, features.varying(values)])
    np.testing.assert_allclose(distances.coverage[0, 1], (kept[0] & kept[1]).mean())
    np.testing.assert_allclose(np.diagonal(distances.coverage), kept.mean(axis=1))
    assert distances.parameters["features_that_vary"] == kept.shape[1]


def test_chosen_features_alone_are_compared():
    orders = ["S_SVO", "S_SOV", "S_VSO"]
    distances = typology.distances(["en", "fr", "ja"], "syntax_knn", only=orders)
    assert distances.between("en", "fr") < distances.between("en", "ja")
    assert distances.parameters["features_that_vary"] <= 3
    with pytest.raises(UserError, match="syntax_knn has no feature S_SVOO; did you mean S_SVO"):
        typology.distances(["en", "fr"], "syntax_knn", only=["S_SVOO"])


def test_gower_is_the_mean_of_scaled_differences_over_what_both_have():
    table = np.array([[0.0, 10.0, 1.0], [4.0, np.nan, 1.0], [2.0, 30.0, np.nan]])
    found = features.gower(table)
    # The last does not vary, so nothing is learned from it.
    np.testing.assert_allclose(found[0, 1], 1.0)
    np.testing.assert_allclose(found[0, 2], (0.5 + 1.0) / 2)
    np.testing.assert_allclose(found[1, 2], 0.5)
    apart = np.array([[1.0, np.nan], [np.nan, 2.0], [0.0, 0.0]])
    assert np.isnan(features.gower(apart)[0, 1])
    np.testing.assert_array_equal(features.gower(apart[:2]), np.zeros((2, 2)))


def lineage(language):
    """Names of the groups of a language in URIEL, from the family down."""
    values, names = uriel.features([language], "fam")
    return [names[i].removeprefix("F_").replace("_", " ") for i in np.flatnonzero(values[0] > 0)]


def test_families_are_nested():
    distances = genealogy.distances(LANGUAGES)
    assert [near.language for near in distances.relatives("en")[:3]] == ["de", "hi", "fr"]
    assert distances.between("en", "ja") == 1.0  # of different families
    # Basque has no ancestors in URIEL: nothing is known of how far it is.
    assert {near.coverage for near in distances.relatives("eu")} == {0.0}
    assert all(np.isnan(near.distance) for near in distances.relatives("eu"))
    assert distances.parameters["without_ancestors"] == ["eu"]
    german, english = lineage("de"), lineage("en")
    assert german[:2] == english[:2] == ["Indo-European", "Germanic"]
    shared = len(set(german) & set(english))
    wanted = 1 - 2 * shared / (len(german) + len(english))
    assert distances.between("de", "en") == pytest.approx(wanted)


# What URIEL files under a member or the macrolanguage alone.
LINEAGES = {
    "zh": "Mandarinic",
    "qu": "Quechuan",
    "quy": "Quechuan",
    "nn": "North Germanic",
    "nb": "North Germanic",
    "no": "North Germanic",
    "lv": "Eastern Baltic",
    "et": "Finnic",
    "sq": "Albanian",
    "gn": "Tupi-Guarani Subgroup I",
    "az": "West Oghuz",
    "mg": "Malagasic",
}


def test_a_lineage_is_the_fullest_that_uriel_has_under_any_code_of_the_language():
    for tag, group in LINEAGES.items():
        assert group in lineage(tag), tag
    assert genealogy.distances(["quy", "qu", "es"]).relatives("quy")[0].distance < 0.3
    norwegian = genealogy.distances(["nb", "nn"])
    assert not norwegian.values.any() and (norwegian.coverage == 1).all()


def test_places_are_found_again_from_their_distances():
    # Glottolog's points: latitude, longitude.
    known = {"de": (48.65, 12.47), "fr": (48.0, 2.0), "ja": (35.0, 135.0)}
    np.testing.assert_allclose(geography.coordinates(list(known)), [*known.values()], atol=0.1)
    paris_to_bavaria, to_japan = (
        geography.distances(["fr", *others]).between("fr", others[0]) * 20_015.0
        for others in (["de"], ["ja"])
    )
    assert 700 < paris_to_bavaria < 850
    assert 9_500 < to_japan < 10_000


def test_distances_of_a_few_are_shown_and_of_many_named():
    lines = repr(THREE).splitlines()
    assert lines[0] == "a test: distances of 3 languages"
    assert lines[3].split() == ["de", "0.200", "0.000", "0.300"]
    many = typology.distances(
        ["en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl", "cs", "ru", "bg"]
    )
    assert repr(many) == "typology: distances of 13 languages"


def test_clusters_name_languages_of_which_little_is_known():
    shown = str(typology.cluster(["kk", "tr", "uz", "ru", "en"], 2))
    assert "less than half of the features known: kk (" in shown
    # What fills the gaps is predicted, not known.
    filled = str(typology.cluster(["kk", "tr", "uz"], 2, features="syntax_knn"))
    assert "less than half of the features known: kk (" in filled


def test_features_drawn_anew_pass_over_draws_that_say_nothing(monkeypatch):
    from xelm.runs import distances as by_name

    asked = []

    def measured(spec, languages, sources):
        asked.append(sources.resample)
        if sources.resample in (1, 2):
            raise UserError("nothing in common")
        return THREE

    monkeypatch.setattr(by_name, "measured", measured)
    assert len(list(by_name.resampled("typology", ["en"], by_name.Sources(), 3))) == 3
    assert asked == [0, 1, 2, 3, 4]
    assert list(by_name.resampled("genealogy", ["en"], by_name.Sources(), 3)) == []


def test_distances_with_gaps_equal_their_copies():
    gaps = THREE.spread(["fr", "sw", "en"])
    assert np.isnan(gaps.values).any()
    assert gaps == THREE.spread(["fr", "sw", "en"]) != THREE.spread(["fr", "hi", "en"])
