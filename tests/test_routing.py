"""Routers: weights of a known text are those of the text as it grows; Bayes; the m largest."""

import numpy as np
import pytest

from clustering.errors import UserError
from clustering.vectoriser import Vectoriser
from xelm.inference import routing
from xelm.inference.routing import (
    ByLanguage,
    Posterior,
    Tfidf,
    Uniform,
    keep_largest,
    mixture,
    states_along,
    weights_along,
)

EXPERTS, TOKENS, VOCABULARY, DIMENSIONS = 4, 30, 50, 6
DRAW = np.random.default_rng(0)
VECTORISER = Vectoriser(
    idf=DRAW.uniform(1, 5, VOCABULARY).astype(np.float32),
    projection=DRAW.normal(size=(VOCABULARY, DIMENSIONS)).astype(np.float32),
)
CENTRES = DRAW.normal(size=(EXPERTS, DIMENSIONS))
PRIOR = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
IDS = DRAW.integers(0, VOCABULARY, TOKENS)
SCORES = np.log(DRAW.uniform(0.01, 1, (EXPERTS, TOKENS)))

ROUTERS = {
    "uniform": Uniform(experts=EXPERTS),
    "language": ByLanguage(experts=EXPERTS, serving={"de": 2, "el": 0}),
    "tfidf": Tfidf(vectoriser=VECTORISER, centres=CENTRES),
    "tfidf, warm": Tfidf(vectoriser=VECTORISER, centres=CENTRES, temperature=2.0),
    "tfidf, as the authors": Tfidf(vectoriser=VECTORISER, centres=CENTRES, distance_power=4.0),
    "posterior": Posterior(prior=PRIOR),
}


def along(router, ids=IDS, scores=SCORES, language="de"):
    return weights_along(router, router.start(language), ids, scores)


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_along_a_text_are_those_of_the_text_as_it_grows(name):
    router = ROUTERS[name]
    whole, state = along(router), router.start("de")
    for position in range(TOKENS):
        found = router.log_weights(state[None])[0]
        np.testing.assert_allclose(found, whole[position], atol=1e-9)
        new = slice(position, position + 1)
        state = states_along(router, state, IDS[new], SCORES[:, new])[-1]


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_sum_to_one(name):
    weights = along(ROUTERS[name])
    assert weights.shape == (TOKENS, EXPERTS)
    np.testing.assert_allclose(np.exp(weights).sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_weight_knows_only_what_came_before(name):
    ids, scores = IDS.copy(), SCORES.copy()
    ids[12:], scores[:, 12:] = 0, -9.0
    other = along(ROUTERS[name], ids, scores)
    np.testing.assert_allclose(other[:13], along(ROUTERS[name])[:13], atol=1e-9)


def test_a_state_is_left_as_it_was():
    router = ROUTERS["tfidf"]
    state = router.start(None)
    states_along(router, state, IDS, None)
    assert not state.any()


def test_uniform_weighs_all_alike():
    np.testing.assert_allclose(np.exp(along(ROUTERS["uniform"], language=None)), 0.25)


def test_a_language_goes_to_the_expert_that_serves_it():
    weights = np.exp(along(ROUTERS["language"]))
    np.testing.assert_array_equal(weights, np.tile([0.0, 0.0, 1.0, 0.0], (TOKENS, 1)))


@pytest.mark.parametrize("code", ["de", "deu", "ger", "DE"])
def test_any_code_of_a_language_finds_its_expert(code):
    assert (along(ROUTERS["language"], language=code).argmax(axis=1) == 2).all()


@pytest.mark.parametrize(
    ("language", "message"),
    [
        (None, "needs the language of the text; give --language"),
        ("tr", "no expert serves 'tr'; served: de, el. Grow one"),
        ("klingonish", "unknown language code 'klingonish'"),
    ],
)
def test_a_language_that_nobody_serves_is_a_users_mistake(language, message):
    with pytest.raises(UserError, match=message):
        ROUTERS["language"].start(language)


@pytest.mark.parametrize("power", [2.0, 4.0])
@pytest.mark.parametrize("temperature", [0.1, 1.5])
def test_tfidf_weights_fall_with_the_distance_of_the_prefix(power, temperature):
    router = Tfidf(
        vectoriser=VECTORISER, centres=CENTRES, temperature=temperature, distance_power=power
    )
    found = np.exp(along(router))
    for position in range(TOKENS):
        summed = sum(
            (np.float64(VECTORISER.idf[t]) * VECTORISER.projection[t] for t in IDS[:position]),
            np.zeros(DIMENSIONS),
        )
        unit = summed / np.linalg.norm(summed) if position else summed
        weights = np.exp(-(np.linalg.norm(CENTRES - unit, axis=1) ** power) / temperature)
        if position == 0:  # nothing is known yet
            weights = np.ones(len(CENTRES))
        np.testing.assert_allclose(found[position], weights / weights.sum(), atol=1e-6)


def test_tokens_that_the_vectoriser_never_saw_leave_the_weights_as_they_are():
    projection = VECTORISER.projection.copy()
    projection[7] = 0.0
    router = Tfidf(
        vectoriser=Vectoriser(idf=VECTORISER.idf, projection=projection), centres=CENTRES
    )
    found = along(router, np.array([7, 7, 7]), SCORES[:, :3])
    np.testing.assert_array_equal(found, np.tile(found[0], (3, 1)))


def test_the_posterior_is_that_of_bayes():
    # prior 1/4, 3/4; the first token is 4 times as probable under the first, the next under
    # neither, the third has probability .5 and .1.
    likelihoods = np.array([[0.4, 0.2, 0.5], [0.1, 0.2, 0.1]])
    router = Posterior(prior=np.log([0.25, 0.75]))
    states = states_along(router, router.start(None), np.array([5, 6, 7]), np.log(likelihoods))
    weights = np.exp(router.log_weights(states))
    wanted = [[1 / 4, 3 / 4], [4 / 7, 3 / 7], [4 / 7, 3 / 7], [20 / 23, 3 / 23]]
    np.testing.assert_allclose(weights, wanted)


def test_a_posterior_that_forgets_counts_what_lies_back_less():
    router = Posterior(prior=PRIOR, memory=0.9)
    found = along(router)
    for position in range(TOKENS):
        powers = 0.9 ** np.arange(position - 1, -1, -1)
        joint = 0.9**position * PRIOR + SCORES[:, :position] @ powers
        weights = np.exp(joint - joint.max())
        np.testing.assert_allclose(np.exp(found[position]), weights / weights.sum(), rtol=1e-9)


@pytest.mark.parametrize("memory", [0.0, 1.1, float("nan")])
def test_a_memory_that_means_nothing_is_refused(memory):
    with pytest.raises(UserError, match="a memory must be above 0 and at most 1; got"):
        Posterior(prior=PRIOR, memory=memory)


def test_under_the_posterior_the_mixture_is_the_evidence_of_the_whole_text():
    weights = along(ROUTERS["posterior"])
    evidence = np.log(np.sum(np.exp(PRIOR + SCORES.sum(axis=1))))
    assert mixture(weights, SCORES).sum() == pytest.approx(evidence, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_largest_weights_are_kept_and_normalised(count):
    weights = np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.2, 0.1]])
    with np.errstate(divide="ignore"):
        kept = np.exp(keep_largest(np.log(weights), count))
    for row, wanted in zip(kept, weights):
        largest = np.sort(wanted)[::-1][:count]
        np.testing.assert_allclose(np.sort(row)[::-1][:count], largest / largest.sum())
        assert (row > 0).sum() == count
        assert set(np.flatnonzero(row)) == set(np.argsort(-wanted)[:count])


def test_of_equal_weights_the_first_are_kept():
    kept = np.exp(keep_largest(np.log(np.full((3, 4), 0.25)), 2))
    np.testing.assert_allclose(kept, np.tile([0.5, 0.5, 0.0, 0.0], (3, 1)))


@pytest.mark.parametrize("count", [None, 4, 9])
def test_all_weights_are_kept_where_there_are_no_more(count):
    weights = along(ROUTERS["tfidf"])
    np.testing.assert_array_equal(keep_largest(weights, count), weights)


def test_one_row_of_weights_is_treated_as_one_of_many():
    weights = along(ROUTERS["tfidf"])
    for row in weights:
        np.testing.assert_array_equal(keep_largest(row, 2), keep_largest(row[None], 2)[0])


def test_a_mixture_is_the_sum_of_weighted_probabilities():
    weights = DRAW.dirichlet(np.ones(EXPERTS), TOKENS)
    wanted = np.log((weights * np.exp(SCORES.T)).sum(axis=1))
    np.testing.assert_allclose(mixture(np.log(weights), SCORES), wanted, rtol=1e-12)


def test_the_command_line_offers_every_router():
    from xelm.commands import asking

    assert tuple(routing.ROUTINGS) == asking.ROUTINGS
