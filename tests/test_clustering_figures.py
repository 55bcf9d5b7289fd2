"""Figures show each language and cluster once, in one shared set of colours, on the axes given."""

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pytest
from matplotlib import colors, pyplot
from matplotlib.text import Text
from sklearn.manifold import ClassicalMDS
from test_language_codes import FLORES_200

from clustering import control, figures, geography, grouping, maps, tfidf, typology, uriel
from clustering.documents import Documents
from clustering.errors import UserError
from clustering.languages import canonical, english_name

LANGUAGES = ["en", "fr", "es", "de", "el", "bg", "ru", "tr"]


# Many of them in Europe, near each other.
_MANY = (
    *("en", "fr", "es", "de", "el", "bg", "ru", "tr", "nl", "da", "sv"),
    *("nb", "pl", "cs", "sk", "sl", "hr", "it", "pt", "ca", "gl"),
)


def tree(rule="pairs"):
    return typology.cluster(LANGUAGES, 3, rule=rule)


def of_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(10 * (i % 3), 10 * (i % 3) + 12, 30) for i in range(60)]
    languages = [("en", "en", "sw")[i % 3] for i in range(60)]
    together = Documents([list(zip(documents, languages))])
    return tfidf.cluster(together, tfidf.fit(documents, 40, dimensions=5), 3)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def texts(labels):
    return [label.get_text() for label in labels]


def test_the_tree_shows_every_language_at_its_cluster_colour():
    clustering = tree()
    ax = clustering.plot_tree()
    labels = texts(ax.get_yticklabels())
    assert sorted(labels) == sorted(figures._label(tag) for tag in clustering.languages)
    colours = figures.cluster_colours(list(clustering.clusters))
    drawn = [colors.to_hex(rgba) for rgba in ax.collections[-1].get_facecolors()]
    by_label = {figures._label(tag): tag for tag in clustering.languages}
    wanted = [colours[clustering.cluster_of(by_label[label])].lower() for label in labels]
    assert drawn == wanted
    joins = [colors.to_hex(rgba) for rgba in ax.collections[0].get_colors()]
    assert joins.count(figures.ABOVE) == len(clustering.clusters) - 1
    assert len(joins) == len(clustering.languages) - 1


def test_the_tree_of_one_language_draws():
    assert texts(typology.cluster(["en"], 1).plot_tree().get_yticklabels()) == ["English (en)"]


def test_the_heat_map_shows_the_distances():
    clustering = tree("single")
    ax = clustering.plot_distances()
    order = texts(ax.get_xticklabels())
    assert sorted(order) == sorted(LANGUAGES)
    np.testing.assert_array_equal(ax.images[0].get_array(), clustering.distances.of(order).values)


def test_the_composition_adds_up():
    clustering = of_documents()
    ax = clustering.plot_composition()
    ends = [patch.get_x() + patch.get_width() for patch in ax.patches]
    np.testing.assert_allclose(sorted(ends)[-3:], 1)
    assert texts(ax.get_yticklabels())[0].startswith("c0  (")


def test_narrow_shares_are_summed():
    shares = {"en": 0.9, "sw": 0.05} | {f"a{i}": 0.01 for i in range(5)}
    assert figures._pieces(shares)[:2] == [("en", 0.9), ("sw", 0.05)]
    assert figures._pieces(shares)[2] == ("+5", pytest.approx(0.05))


def test_given_axes_are_drawn_on_and_returned():
    clustering = tree()
    for draw in (clustering.plot_tree, clustering.plot_distances):
        _, ax = pyplot.subplots()
        assert draw(ax) is ax


def test_colours_follow_the_position_and_differ():
    names = [f"c{i}" for i in range(27)]
    colours = figures.cluster_colours(names)
    assert len(set(colours.values())) == 27
    assert figures.cluster_colours(names[:3]) == {name: colours[name] for name in names[:3]}


def test_a_picture_of_what_is_not_there_is_refused():
    plain = control.random_clusters(LANGUAGES, 3, random_seed=1)
    for draw in (plain.plot_tree, plain.plot_distances, plain.plot_composition):
        with pytest.raises(UserError, match="method 'random'"):
            draw()


def test_the_map_has_each_language_at_its_place_in_its_colour():
    clustering = typology.cluster(LANGUAGES, 3)
    ax = clustering.plot_map()
    points = ax.collections[-1]
    north, east = geography.coordinates(LANGUAGES).T
    np.testing.assert_allclose(points.get_offsets(), np.stack([east, north], axis=1))
    colours = figures.cluster_colours(list(clustering.clusters))
    wanted = [colours[clustering.cluster_of(tag)].lower() for tag in LANGUAGES]
    assert [colors.to_hex(rgba) for rgba in points.get_facecolors()] == wanted
    assert {text.get_text() for text in ax.texts} == {english_name(tag) for tag in LANGUAGES}
    (west, right), (south, top) = ax.get_xlim(), ax.get_ylim()
    assert west < east.min() and east.max() < right and south < north.min() and north.max() < top


def test_the_map_tells_whom_it_lacks():
    clustering = control.by_hand({"a": ["en", "tlh"], "b": ["x-klingon"]})
    ax = clustering.plot_map()
    assert ax.get_title(loc="left") == "not on the map: x-klingon"
    assert len(ax.collections[-1].get_offsets()) == 2
    with pytest.raises(UserError, match="URIEL has no place for any of these languages"):
        control.by_hand({"b": ["x-klingon"]}).plot_map()


def test_labels_do_not_cover_each_other():
    ax = control.by_hand({"a": _MANY}).plot_map()
    ax.figure.draw_without_rendering()
    assert_apart(ax)
    assert len(ax.texts) >= 0.8 * len(_MANY)


def assert_apart(ax):
    """No label covers another; lines to labels may cross."""
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    for at, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:at]) == 0


def test_a_map_of_two_hundred_languages_is_large_enough_to_name_each():
    clustering = control.random_clusters(FLORES_200, 12, 0)
    ax = clustering.plot_map()
    ax.figure.draw_without_rendering()
    assert {text.get_text() for text in ax.texts} == set(clustering.languages)
    assert ax.get_title(loc="left") == ""
    assert_apart(ax)
    few = control.by_hand({"a": ["en", "mi", "fj", "sm"]}).plot_map()
    assert ax.figure.get_figwidth() > 1.8 * few.figure.get_figwidth()


def test_a_legend_of_many_clusters_leaves_the_map_its_room():
    """Forty names below each other would make the map a thumbnail beside them."""
    tags = [tag for tag in map(canonical, FLORES_200) if tag in uriel.known([tag], "geo")]
    clusters = {f"c{n}": tags[n::40] for n in range(40)}
    ax = control.by_hand(clusters).plot_map()
    figure = ax.figure.get_figure(root=True)
    figure.draw_without_rendering()
    legend = ax.get_legend()
    assert legend is not None and len(legend.get_texts()) == 40
    assert legend.get_window_extent().height <= figure.bbox.height
    assert ax.get_window_extent().width > 0.6 * figure.bbox.width


def test_the_plane_keeps_distances_that_a_plane_can_have():
    corners = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
    apart = np.linalg.norm(corners[:, None] - corners, axis=-1)
    points, shown = maps.scaled(apart)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points, axis=-1), apart, atol=1e-9)
    assert shown == pytest.approx(1.0)
    wanted = ClassicalMDS(n_components=2, metric="precomputed").fit_transform(apart)
    np.testing.assert_allclose(np.abs(points), np.abs(wanted), atol=1e-9)
    assert maps.scaled(np.zeros((1, 1)))[1] == 1.0
    shown = maps.scaled(np.ones((5, 5)) - np.eye(5))[1]
    assert shown == pytest.approx(0.5)  # five corners as far from each other need four dimensions
    ax = tree().plot_plane()
    assert len(ax.collections[-1].get_offsets()) == len(LANGUAGES)


def test_sizes_are_of_languages_tokens_or_documents():
    def bars(clustering):
        return [bar.get_width() for bar in clustering.plot_sizes().patches]

    assert bars(tree()) == [len(members) for members in tree().clusters.values()]
    measured = typology.distances(LANGUAGES)
    tokens = dict(zip(LANGUAGES, range(1, 9)))
    by_tokens = grouping.cluster(measured, 2, rule="balanced", sizes=tokens)
    assert bars(by_tokens) == [sum(tokens[t] for t in m) for m in by_tokens.clusters.values()]
    found = of_documents()
    assert found.documents is not None
    assert bars(found) == [sum(counts.values()) for counts in found.documents.values()]


def test_the_heat_map_follows_the_tree():
    clustering = tree("average")
    rows = texts(clustering.plot_distances().get_yticklabels())
    leaves = texts(clustering.plot_tree().get_yticklabels())
    assert rows == leaves[::-1]
    order = [label.rpartition("(")[2].rstrip(")") for label in rows]
    for members in clustering.clusters.values():
        places = sorted(order.index(tag) for tag in members)
        assert places == list(range(places[0], places[0] + len(members)))
