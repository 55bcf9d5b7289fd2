"""Routers: weights of a known text are those of the text as it grows; Bayes; the m largest."""

import numpy as np
import pytest

from clustering.errors import UserError
from clustering.identify import BUCKETS, Identifier
from clustering.vectoriser import Vectoriser
from xelm import cli
from xelm.evaluation.options import EVALUATED
from xelm.inference import routing
from xelm.inference.route import (
    Walk,
    keep_largest,
    log_likelihoods_along,
    mixture,
    states_along,
)
from xelm.inference.routers import (
    Abstaining,
    ByLanguage,
    Detected,
    OrMixture,
    Posterior,
    Tfidf,
    mixture_of,
    only,
    uniform,
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

TFIDF = Tfidf(vectoriser=VECTORISER, centres=CENTRES)
IDENTIFIER = Identifier(
    languages=("de", "el", "tr"),
    log_likelihoods=DRAW.normal(size=(BUCKETS, 3)).astype(np.float32),
    temperature=3.0,
)
PIECES = [chr(0x40 + number) * (number % 3 + 1) for number in range(VOCABULARY)]
ROUTERS = {
    "uniform": uniform(EXPERTS),
    "language": ByLanguage(experts=EXPERTS, serving={"de": 2, "el": 0}),
    "detected": Detected(
        experts=EXPERTS, identifier=IDENTIFIER, pieces=PIECES, serving={"de": 2, "el": 0, "tr": 2}
    ),
    "tfidf": TFIDF,
    "tfidf, warm": Tfidf(vectoriser=VECTORISER, centres=CENTRES, temperature=2.0),
    "tfidf, as the authors": Tfidf(vectoriser=VECTORISER, centres=CENTRES, distance_power=4.0),
    "posterior": Posterior(prior=PRIOR),
    "posterior, forgetful": Posterior(prior=PRIOR, memory=0.9),
    "abstaining": Abstaining(router=TFIDF, threshold=0.9, instead=Posterior(prior=PRIOR)),
    "language or posterior": ByLanguage(
        experts=EXPERTS, serving={"de": 2, "el": 0}, otherwise=Posterior(prior=PRIOR, memory=0.9)
    ),
    "language or abstaining": ByLanguage(
        experts=EXPERTS,
        serving={"de": 2},
        otherwise=Abstaining(router=TFIDF, threshold=0.9, instead=Posterior(prior=PRIOR)),
    ),
}


def along(router, ids=IDS, scores=SCORES, language=None):
    """Log weights before every token of a text."""
    return Walk(router, language, ids).decide(scores).log_weights


def at_language(name):
    return "de" if name == "language" else None


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_along_a_text_are_those_of_the_text_as_it_grows(name):
    router, language = ROUTERS[name], at_language(name)
    whole = along(router, language=language)
    state, evidence = router.start(language), np.zeros(EXPERTS)
    for position in range(TOKENS):
        asked = router.needs_log_likelihoods(state[None])[0]
        found = router.log_weights(state[None], evidence[None] * asked)[0]
        np.testing.assert_allclose(found, whole[position], atol=1e-9)
        new = IDS[position : position + 1]
        state = state + router.terms(IDS[:position], new)[0]
        evidence = router.memory * evidence + SCORES[:, position]


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_sum_to_one(name):
    weights = along(ROUTERS[name], language=at_language(name))
    assert weights.shape == (TOKENS, EXPERTS)
    np.testing.assert_allclose(np.exp(weights).sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_weight_knows_only_what_came_before(name):
    ids, scores = IDS.copy(), SCORES.copy()
    ids[12:], scores[:, 12:] = 0, -9.0
    other = along(ROUTERS[name], ids, scores, at_language(name))
    whole = along(ROUTERS[name], language=at_language(name))
    np.testing.assert_allclose(other[:13], whole[:13], atol=1e-9)


def test_a_state_is_left_as_it_was():
    state = TFIDF.start(None)
    states_along(TFIDF, state, IDS)
    assert not state.any()


def test_uniform_weighs_all_alike():
    np.testing.assert_allclose(np.exp(along(ROUTERS["uniform"], language=None)), 0.25)


def test_a_language_goes_to_the_expert_that_serves_it():
    weights = np.exp(along(ROUTERS["language"], language="de"))
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


def test_ids_that_no_text_becomes_say_nothing():
    ids = np.array([3, VOCABULARY, VOCABULARY + 7, 4])
    states = states_along(TFIDF, TFIDF.start(None), ids)
    np.testing.assert_array_equal(states[1], states[3])
    np.testing.assert_array_equal(states[4], states_along(TFIDF, states[0], ids[[0, 3]])[2])


def test_the_posterior_is_that_of_bayes():
    # prior 1/4, 3/4; the first token is 4 times as probable under the first, the next under
    # neither, the third has probability .5 and .1.
    likelihoods = np.array([[0.4, 0.2, 0.5], [0.1, 0.2, 0.1]])
    router = Posterior(prior=np.log([0.25, 0.75]))
    evidence = log_likelihoods_along(router, np.log(likelihoods))
    weights = np.exp(router.log_weights(np.zeros((4, 0)), evidence))
    wanted = [[1 / 4, 3 / 4], [4 / 7, 3 / 7], [4 / 7, 3 / 7], [20 / 23, 3 / 23]]
    np.testing.assert_allclose(weights, wanted)


def test_a_posterior_that_forgets_counts_what_lies_back_less():
    router = Posterior(prior=PRIOR, memory=0.9)
    found = along(router)
    for position in range(TOKENS):
        powers = 0.9 ** np.arange(position - 1, -1, -1)
        joint = PRIOR + SCORES[:, :position] @ powers
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


def test_what_is_detected_weighs_the_experts_by_their_languages():
    """An expert of two languages has the weights of both. The weight of a language that no expert
    serves is divided evenly among all."""
    for serving in ({"de": 2, "el": 0, "tr": 2}, {"de": 3, "el": 1}):
        router = Detected(experts=EXPERTS, identifier=IDENTIFIER, pieces=PIECES, serving=serving)
        found = np.exp(along(router))
        for position in (0, 1, 7, TOKENS - 1):
            text = "".join(PIECES[i] for i in IDS[:position])
            shares = np.exp(IDENTIFIER.log_probabilities(text))
            wanted = np.zeros(EXPERTS)
            for tag, share in zip(("de", "el", "tr"), shares):
                wanted += share * (
                    np.eye(EXPERTS)[serving[tag]] if tag in serving else np.full(EXPERTS, 0.25)
                )
            np.testing.assert_allclose(found[position], wanted, rtol=1e-5)


@pytest.mark.parametrize("inner", ["uniform", "detected", "tfidf", "posterior", "abstaining"])
def test_a_language_that_is_served_is_routed_by_whatever_the_router(inner):
    router = ByLanguage(experts=EXPERTS, serving={"de": 2}, otherwise=ROUTERS[inner])
    states = states_along(router, router.start("deu"), IDS)[:-1]
    assert not router.needs_log_likelihoods(states).any()
    found = np.exp(router.log_weights(states, np.zeros((TOKENS, EXPERTS))))
    np.testing.assert_array_equal(found, np.tile([0.0, 0.0, 1.0, 0.0], (TOKENS, 1)))
    assert router.decided_by(states) == ["language"] * TOKENS


@pytest.mark.parametrize("language", [None, "tr"])
@pytest.mark.parametrize("inner", ["uniform", "detected", "tfidf", "posterior", "abstaining"])
def test_without_a_language_that_is_served_the_other_router_decides(inner, language):
    other = ROUTERS[inner]
    router = ByLanguage(experts=EXPERTS, serving={"de": 2}, otherwise=other)
    np.testing.assert_array_equal(along(router, language=language), along(other))
    states = states_along(router, router.start(language), IDS)[:-1]
    names = other.decided_by(states_along(other, other.start(None), IDS)[:-1])
    assert router.decided_by(states) == names
    wanted = {"posterior", "tfidf"} if inner == "abstaining" else {inner}
    assert set(names) == wanted


def test_texts_with_and_without_a_language_are_routed_side_by_side():
    router = ByLanguage(experts=EXPERTS, serving={"de": 2}, otherwise=TFIDF)
    states = np.stack([router.start("de"), router.start(None), router.start("de")])
    found = np.exp(router.log_weights(states, np.zeros((3, EXPERTS))))
    np.testing.assert_allclose(found, [[0, 0, 1, 0], [0.25] * 4, [0, 0, 1, 0]])
    assert router.decided_by(states) == ["language", "tfidf", "language"]


def test_a_router_that_is_not_sure_leaves_it_to_the_posterior():
    sure = np.exp(along(TFIDF)).max(axis=1) >= 0.9
    assert 0 < sure.sum() < TOKENS
    found = along(ROUTERS["abstaining"])
    np.testing.assert_array_equal(found[sure], along(TFIDF)[sure])
    np.testing.assert_allclose(found[~sure], along(ROUTERS["posterior"])[~sure])
    states = states_along(TFIDF, TFIDF.start(None), IDS)[:-1]
    np.testing.assert_array_equal(ROUTERS["abstaining"].needs_log_likelihoods(states), ~sure)


def test_a_router_that_is_not_sure_leaves_it_to_the_model_behind_the_experts():
    router = Abstaining(router=TFIDF, threshold=0.9, instead=only(EXPERTS, EXPERTS + 1, "seed"))
    states = states_along(TFIDF, TFIDF.start(None), IDS)[:-1]
    assert not router.needs_log_likelihoods(states).any()
    found = np.exp(router.log_weights(states, np.zeros((TOKENS, EXPERTS + 1))))
    alone = np.exp(along(TFIDF))
    sure = alone.max(axis=1) >= 0.9
    np.testing.assert_array_equal(found[sure], np.pad(alone[sure], ((0, 0), (0, 1))))
    np.testing.assert_array_equal(found[~sure], np.tile(np.eye(5)[4], (sum(~sure), 1)))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold):
    with pytest.raises(UserError, match="a threshold must be between 0 and 1; got"):
        Abstaining(router=TFIDF, threshold=threshold, instead=Posterior(prior=PRIOR))


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


def test_weights_below_the_least_are_dropped_and_the_largest_never():
    weights = np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.005, 0.2, 0.095], [0.25, 0.25, 0.25, 0.25]])
    found = np.exp(keep_largest(np.log(weights), None, 0.15))
    np.testing.assert_allclose(found[0], np.array([0, 4, 2, 3]) / 9)
    np.testing.assert_allclose(found[1], np.array([7, 0, 2, 0]) / 9)
    both = np.exp(keep_largest(np.log(weights), 2, 0.15))
    np.testing.assert_allclose(both[0], np.array([0, 4, 0, 3]) / 7)
    high = np.exp(keep_largest(np.log(weights), None, 0.9))
    np.testing.assert_allclose(high[:2], [[0, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(high[2], weights[2])  # equals


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
    help_text = " ".join(subcommand("generate").format_help().split())
    assert f"--routing {{{','.join(routing.ROUTINGS)}}}" in help_text
    help_text = " ".join(subcommand("evaluate").format_help().split())
    assert f"routings to measure, of {', '.join(routing.ROUTINGS[:-1])};" in help_text
    assert f"(default: {', '.join(EVALUATED)})" in help_text


def subcommand(name):
    (commands,) = (action for action in cli.parser()._actions if action.choices)
    return commands.choices[name]


class Marked:
    """In place of `Novelty`: a text is outside while its last ids are large."""

    size = 1

    def terms(self, before, pieces, ids):
        return np.where(ids[:, None] >= 25, 1.0, -1.0)

    def outside(self, sums):
        return sums[:, 0] > 0


OR_MIXTURE = OrMixture(
    router=TFIDF,
    novelty=Marked(),  # pyright: ignore[reportArgumentType]
    pieces=PIECES,
    mixture=mixture_of(EXPERTS + 1),
)
WITH_SEED = np.concatenate([SCORES, np.log(DRAW.uniform(0.01, 1, (1, TOKENS)))])


def test_text_that_no_expert_is_for_is_mixed_and_other_text_is_not():
    found = along(OR_MIXTURE, scores=WITH_SEED)
    states = states_along(OR_MIXTURE, OR_MIXTURE.start(None), IDS)[:-1]
    outside = OR_MIXTURE.needs_log_likelihoods(states)
    assert 0 < outside.sum() < TOKENS
    assert np.isneginf(found[~outside, EXPERTS]).all()
    np.testing.assert_array_equal(found[~outside, :EXPERTS], along(TFIDF)[~outside])
    evidence = log_likelihoods_along(OR_MIXTURE.mixture, WITH_SEED)[:-1]
    wanted = np.exp(0.3 * evidence) / np.exp(0.3 * evidence).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(found[outside]), wanted[outside], rtol=1e-9)
    names = np.asarray(OR_MIXTURE.decided_by(states))
    np.testing.assert_array_equal(names, np.where(outside, "mixture", "tfidf"))


def test_a_text_that_grows_is_mixed_as_one_that_is_known():
    whole = along(OR_MIXTURE, scores=WITH_SEED)
    state, evidence = OR_MIXTURE.start(None), np.zeros(EXPERTS + 1)
    for position in range(TOKENS):
        found = OR_MIXTURE.log_weights(state[None], evidence[None])[0]
        np.testing.assert_allclose(found, whole[position], atol=1e-9)
        state = state + OR_MIXTURE.terms(IDS[:position], IDS[position : position + 1])[0]
        evidence = OR_MIXTURE.memory * evidence + WITH_SEED[:, position]


def test_a_given_language_that_nobody_serves_is_mixed_from_the_first_token_on():
    router = ByLanguage(experts=EXPERTS + 1, serving={"de": 0}, otherwise=OR_MIXTURE)
    states = states_along(router, router.start("sv"), IDS)
    assert router.needs_log_likelihoods(states).all()
    assert set(router.decided_by(states)) == {"mixture"}
    for language in (None, "de-AT"):
        assert not router.needs_log_likelihoods(
            states_along(router, router.start(language), IDS)[:1]
        ).any()
    # Experts of clusters of documents serve no language, and may all the same know this one.
    nobody = ByLanguage(experts=EXPERTS + 1, serving={}, otherwise=OR_MIXTURE)
    np.testing.assert_array_equal(nobody.start("sv"), nobody.start(None))
