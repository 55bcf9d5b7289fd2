"""An ensemble of which two experts have pieces of their own, each other ones: what is read in the
pieces of one, by it, by the other, and by a model that has neither."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_vocabularies import NAMES, PIECES, SERVING, TEXTS, several

from xelm.inference import ensemble as ensembles
from xelm.inference.engine import Engine
from xelm.inference.routers import ByLanguage, Fixed, Posterior, only, uniform
from xelm.inference.running import GenerationRequest
from xelm.inference.vocabularies import Choice, choose, loader
from xelm.inference.work import finish
from xelm.models.parameters import NEW_ROWS
from xelm.models.vocabulary_rows import resized


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return several(tmp_path_factory.mktemp("several"))


def every(pool, ids, router):
    """Probabilities of all tokens of the vocabulary after each id but the last, [T, V]."""
    engine, found = Engine(pool), []
    text = engine.add(GenerationRequest(ids=ids[:1], sampling=pool.sampling), router)
    for token in ids[1:]:
        distribution, _ = engine.next_log_probabilities()
        found.append(np.exp(np.asarray(distribution[text.row], np.float64)))
        engine.append(text, token)
    return np.asarray(found)


@pytest.mark.parametrize("language", NAMES)
def test_probabilities_sum_to_one_over_the_vocabulary_that_a_text_is_read_in(made, language):
    ensemble = made.ensemble(uniform(3))
    pool = next((p for p in ensemble.further if SERVING[language] in p.owners), ensemble)
    ids = pool.tokenizer.begin(TEXTS[language][0])[:20]
    assert (max(ids) >= made.model.vocabulary_size) == (language != "en")
    routers = [*(only(n, 3, "fixed") for n in range(3)), Fixed(weights=np.log([0.2, 0.5, 0.3]))]
    parts = [every(pool, ids, router) for router in routers]
    for found in parts:
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    mixed = 0.2 * parts[0] + 0.5 * parts[1] + 0.3 * parts[2]
    np.testing.assert_allclose(parts[3], mixed, rtol=1e-4, atol=1e-9)
    # A model that lacks the pieces never gives one; the owner is what it is alone, to the last bit.
    for number, name in enumerate(NAMES):
        new = parts[number][:, made.model.vocabulary_size :]
        assert (new.sum() > 0) == (name == language != "en")
    one = made.alone(language)
    np.testing.assert_array_equal(parts[SERVING[language]], every(one, ids, one.router))


@pytest.mark.slow
def test_each_text_is_read_and_continued_as_by_the_expert_of_its_language(made):
    ensemble = made.ensemble(ByLanguage(experts=3, serving=SERVING, otherwise=uniform(3)))
    some = [TEXTS[name][1][:24] for name in NAMES]
    scores = ensemble.score(some, list(NAMES))
    found = ensemble.generate_batch(some, languages=list(NAMES))
    for number, name in enumerate(NAMES):
        one = made.alone(name)
        wanted, text = one.score([some[number]]), one.generate(some[number])
        assert (scores.nats[number], scores.tokens[number]) == (wanted.nats[0], wanted.tokens[0])
        assert found[number].ids == text.ids and found[number].text == text.text
        assert found[number].weights == {other: float(other == name) for other in NAMES}
    # Of one text in several vocabularies, the fewest tokens are those of its own.
    counts = [ensemble.score([some[1]], [name]).tokens[0] for name in NAMES]
    assert counts[1] < min(counts[0], counts[2])


@pytest.mark.slow
def test_prompts_of_several_vocabularies_are_chosen_together_as_one_by_one(made):
    ensemble = made.ensemble(Posterior(prior=uniform(3).weights))
    prompts = [ensemble.tokenizer.begin(TEXTS[name][n][:20]) for name in NAMES for n in (2, 3)]
    choice = Choice(ensemble, prompts, [None] * 6)
    assert choice.reads
    together = finish(choice.decide())
    one_by_one = [choose(ensemble, [prompt], [None])[0] for prompt in prompts]
    assert all(a is b for a, b in zip(together, one_by_one))
    # A language that is stated decides, and no model reads.
    told = replace(ensemble, router=ByLanguage(experts=3, serving=SERVING, otherwise=uniform(3)))
    choice = Choice(told, prompts, ["en", "en", "hy", "hy", "ta", "ta"])
    assert not choice.reads
    chosen = finish(choice.decide())
    assert [pool.owners for pool in chosen] == [(), (), [1], [1], [2], [2]]


def test_masks_are_filled_in_the_vocabulary_of_the_expert(made, monkeypatch):
    ensemble = made.ensemble(ByLanguage(experts=3, serving=SERVING, otherwise=uniform(3)))
    monkeypatch.setattr(ensembles, "fill", lambda pool, text, count, language: pool.owners)
    found = [ensemble.fill(TEXTS[name][0], language=name) for name in NAMES]
    assert found == [(), [1], [2]]


def test_all_vocabularies_share_the_arrays_of_the_models(made):
    ensemble = made.ensemble(uniform(3))
    pools = (ensemble, *ensemble.further)
    leaves = [leaf for p in pools for n in range(3) for leaf in jax.tree.leaves(p.parameters[n])]
    total = sum({id(leaf): leaf.nbytes for leaf in leaves}.values())
    whole = sum(leaf.nbytes for name in NAMES for leaf in jax.tree.leaves(made.full[name]))
    rows = 4 * made.model.width * 2 * sum(PIECES.values())  # of two models for each vocabulary
    assert total == whole + rows


def test_a_vocabulary_of_models_as_they_are_stored_is_loaded_at_once(made):
    """As evaluation does, which has one model in memory at a time."""
    pool = made.own["hy"]
    load = loader(lambda shape: made.full["ta"], made.model, made.own["ta"], pool)
    found = load()
    assert found["embedding"] is made.full["ta"]["embedding"]
    assert found[NEW_ROWS].shape == (PIECES["hy"], made.model.width)
    assert loader(lambda shape: shape, made.model, pool, pool)() == resized(made.model, pool.size)
