"""A router that compares log-likelihoods compares what each model gives to the same text in its own
vocabulary, wherever it decides: before and along a text that is scored, and in generation."""

from dataclasses import replace

import numpy as np
import pytest
from small_vocabularies import NAMES, SERVING, TEXTS, several

from xelm.data.text_format import TextFormat
from xelm.inference.decoder import Decoder
from xelm.inference.engine import Engine
from xelm.inference.prompt_scoring import score_ends
from xelm.inference.route import Walk, routing_mask
from xelm.inference.routers import Posterior, uniform
from xelm.inference.running import GenerationRequest, SpelledSequence
from xelm.inference.scoring import in_own_vocabularies, score_documents
from xelm.inference.spelling import spell
from xelm.inference.vocabularies import choose
from xelm.inference.work import finish

PRIOR = np.log([0.5, 0.2, 0.3])
# Models of random parameters differ by hundreds of nats; these weights still tell them apart.
BAYES = Posterior(prior=PRIOR, sharpness=0.01)
FORGETFUL = Posterior(prior=PRIOR, memory=0.8, sharpness=0.05)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return several(tmp_path_factory.mktemp("own"))


def pool_of(ensemble, name):
    return next((pool for pool in ensemble.further if SERVING[name] in pool.owners), ensemble)


def log_likelihood(one, ids) -> float:
    """What a model alone gives to ids of its vocabulary, after the first."""
    return -one.likelihoods([ids[:1]], [ids[1:]]).nats[0]


def of_segmentations(made, text: str) -> np.ndarray:
    """What each model alone, which segments the text by its own tokenizer, gives to it."""
    models = [made.alone(name) for name in NAMES]
    return np.asarray([log_likelihood(one, one.tokenizer.begin(text)) for one in models])


def posterior(log_likelihoods: np.ndarray) -> np.ndarray:
    values = PRIOR + BAYES.sharpness * log_likelihoods
    powers = np.exp(values - values.max())
    return powers / powers.sum()


@pytest.mark.parametrize("read_as", NAMES)
def test_the_posterior_of_a_prompt_compares_each_experts_own_segmentation(made, read_as):
    """In whichever vocabulary the ensemble reads the prompt."""
    pool = pool_of(made.ensemble(BAYES), read_as)
    for name in NAMES:
        text = TEXTS[name][2][:12]
        engine = Engine(pool)
        prompt = GenerationRequest(ids=pool.tokenizer.begin(text), sampling=pool.sampling)
        engine.add(prompt, BAYES)
        _, weights = engine.next_log_probabilities()
        wanted = posterior(of_segmentations(made, text))
        np.testing.assert_allclose(weights[0], wanted, rtol=1e-4)
        assert wanted.min() > 1e-4


def test_a_text_is_read_in_the_vocabulary_of_the_expert_that_gives_most_to_it(made):
    ensemble = made.ensemble(Posterior(prior=uniform(3).weights))
    for text in (TEXTS[name][number][:20] for name in NAMES for number in (3, 4, 5)):
        best = NAMES[int(of_segmentations(made, text).argmax())]
        (chosen,) = choose(ensemble, [ensemble.tokenizer.begin(text)], [None])
        assert chosen is pool_of(ensemble, best)
        tokens = len(made.alone(best).tokenizer.begin(text))
        assert ensemble.score([text]).tokens[0] == tokens


@pytest.mark.parametrize("router", [BAYES, FORGETFUL], ids=["all", "forgetful"])
@pytest.mark.parametrize("read_as", NAMES)
def test_each_further_token_is_spelled_by_itself_in_scoring_as_in_generation(made, read_as, router):
    pool = pool_of(made.ensemble(router), read_as)
    text, rest = TEXTS["hy"][6][:12], TEXTS[read_as][7][:12]
    known = pool.tokenizer.begin(text)
    ids = np.asarray([*known, *pool.tokenizer.encode([rest])[0]])
    engine, found = Engine(pool), []
    running = engine.add(GenerationRequest(ids=known, sampling=pool.sampling), router)
    for token in [*ids[len(known) :].tolist(), None]:
        found.append(engine.next_log_probabilities()[1][0])
        if token is not None:
            engine.append(running, token)
    walk = Walk(router, None, ids, np.arange(len(known), len(ids) + 1), ids != ids[0])
    (scores,) = finish(
        in_own_vocabularies(pool, [walk], [ids], [_own_scores(pool, ids)], _reading(pool))
    )
    along = walk.decide(scores[:, : len(ids)], pool.limits).log_weights
    np.testing.assert_allclose(found, np.exp(along), rtol=1e-3, atol=1e-6)
    if router.memory == 1:
        last = []
        for name in NAMES:
            one = made.alone(name)
            spelled = ids[len(known) :]
            if name != read_as and pool.vocabulary is not None:
                spelled = pool.vocabulary.expand(spelled)
            prompt = known if name == read_as else one.tokenizer.begin(text)
            last.append(log_likelihood(one, [*prompt, *spelled.tolist()]))
            assert max(prompt) >= made.model.vocabulary_size or name != "hy"
        np.testing.assert_allclose(found[-1], posterior(np.asarray(last)), rtol=1e-3)
    # What a server tells of a prompt's tokens is by the same weights.
    (one,) = finish(score_ends(pool, [ids], [replace_positions(walk, len(ids))], 1))
    mean = np.exp(along[:-1]).mean(axis=0)
    np.testing.assert_allclose([one.weights[name] for name in NAMES], mean, rtol=1e-3, atol=1e-6)


def replace_positions(walk, end):
    walk.positions = walk.positions[walk.positions < end]
    return walk


def _reading(pool):
    return pool.reading | {"text_format": replace(pool.tokenizer.text_format, start_id=None)}


def _own_scores(pool, ids):
    """The scores of all models in the vocabulary of a pool."""
    found = [
        score_documents(pool.model, pool.parameters[model], [ids], **_reading(pool))[0]
        for model in range(len(NAMES))
    ]
    return np.stack(found).astype(float)


def test_an_expert_without_pieces_of_its_own_is_compared_as_before_to_the_last_bit(made):
    ensemble = made.ensemble(BAYES)
    assert sorted(ensemble.own) == [1, 2]
    ids = np.asarray(ensemble.tokenizer.begin(TEXTS["en"][8]))
    scores = _own_scores(ensemble, ids)
    walk = Walk(BAYES, None, ids, np.asarray([len(ids)]), routing_mask(ensemble.tokenizer, ids))
    (found,) = finish(in_own_vocabularies(ensemble, [walk], [ids], [scores], _reading(ensemble)))
    np.testing.assert_array_equal(found[0], scores[0])
    assert (found[1:] != scores[1:]).any(axis=1).all()
    # Where nobody has other pieces, nothing is read a second time.
    alone = replace(ensemble, own={}, further=())
    assert finish(in_own_vocabularies(alone, [walk], [ids], [scores], {}))[0] is scores


def test_a_chats_mask_divides_the_pieces(made):
    """Of a prompt of which the router goes by the end alone."""
    pool, own = made.ensemble(BAYES), made.own["hy"]
    ids = np.asarray(pool.tokenizer.begin(TEXTS["hy"][9][:20]))
    mask = np.arange(len(ids)) >= 7
    spelled = spell(ids, None, own, len(ids), mask)
    sides = np.asarray([mask[place] for place in spelled.places])
    parts = [own.expand(spelled.ids[sides == side]).tolist() for side in (False, True)]
    assert parts == [ids[:7].tolist(), ids[7:].tolist()]


@pytest.mark.parametrize("pieces", [[7], [1] * 60, [3, 50, 2, 90, 1]])
def test_a_spelling_longer_than_the_model_reads_is_read_in_windows(made, pieces):
    model, parameters, longest = made.model, made.full["en"], 16
    ids = np.random.default_rng(0).integers(4, 300, sum(pieces)).tolist()
    decoder = Decoder(model, lambda: parameters)
    one, text = SpelledSequence(), None
    for size in pieces:
        one.add(ids[len(one.ids) :][:size], range(size), size)
        while len(one.scores) < len(one.ids):
            if text is not None and len(text.ids) == longest:
                one.slide(longest)
                decoder.close(text)
                text = None
            text = text or decoder.open(one.window, scored=True)
            unread = one.window[len(text.ids) : longest]
            decoder.read({text: unread}, scored=True)
            one.take_scores(text.scores)
    assert one.ids == ids and len(text.ids) <= longest
    found = one.scores
    (wanted,) = score_documents(
        model,
        parameters,
        [np.asarray(ids)],
        text_format=TextFormat(start_id=None, end_id=2),
        context_length=longest - 1,
        stride=longest - longest // 2,
    )
    np.testing.assert_allclose(found[1:], wanted[1:-1], atol=1e-4)
