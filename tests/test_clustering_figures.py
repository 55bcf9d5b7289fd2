"""Figures show each language and cluster once, in one shared set of colours, on the axes given."""

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pytest
from matplotlib import colors, pyplot

from clustering import control, figures, tfidf, typology
from clustering.errors import UserError

LANGUAGES = ["en", "fr", "es", "de", "el", "bg", "ru", "tr"]


def tree(balanced=True):
    return typology.cluster(LANGUAGES, 3, balanced=balanced)


def of_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(10 * (i % 3), 10 * (i % 3) + 12, 30) for i in range(60)]
    languages = [("en", "en", "sw")[i % 3] for i in range(60)]
    return tfidf.cluster(documents, languages, tfidf.fit(documents, 40, dimensions=5), 3)


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
    assert joins.count(figures._ABOVE) == len(clustering.clusters) - 1
    assert len(joins) == len(clustering.languages) - 1


def test_the_tree_of_one_language_draws():
    assert texts(typology.cluster(["en"], 1).plot_tree().get_yticklabels()) == ["English (en)"]


def test_the_heat_map_is_in_cluster_order():
    clustering = tree(balanced=False)
    ax = clustering.plot_distances()
    order = [tag for members in clustering.clusters.values() for tag in members]
    assert texts(ax.get_xticklabels()) == order
    index = [clustering.languages.index(tag) for tag in order]
    np.testing.assert_array_equal(
        ax.images[0].get_array(), clustering.distances[np.ix_(index, index)]
    )


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
