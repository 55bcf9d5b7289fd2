"""An ensemble that generates: the same mixture of probabilities as where a text is scored, token
by token, for sequences that come and go."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_ensemble import (
    EXPERTS,
    PROMPT,
    along,
    documents_of,
    ensemble_of,
    forward_of,
    plain_scorer,
    random_experts,
    routers_of,
    scored,
)

from clustering.errors import UserError
from xelm import open_run
from xelm.inference.blocks import LEAST_SLOTS, block_bytes
from xelm.inference.decoder import PIECES, ROWS, Decoder, _next_of
from xelm.inference.engine import Engine
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.route import mixture
from xelm.inference.routing import RoutingLimits
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.models.checkpoint import read_config

LONGEST = PIECES[-1]


@pytest.fixture(scope="module")
def run(tiny):
    return open_run(tiny.directory)


@pytest.fixture(scope="module")
def model(run):
    return read_config(run.seed)


@pytest.fixture(scope="module")
def experts(model):
    return random_experts(model)


@pytest.fixture(scope="module")
def routers(run):
    return routers_of(run)


@pytest.fixture(scope="module")
def ensemble(run, model, experts):
    return ensemble_of(run, model, experts)


@pytest.fixture(scope="module")
def documents(run):
    return documents_of(run)


@pytest.fixture(scope="module")
def alone(model):
    return plain_scorer(model)


def test_experts_that_do_not_all_fit_are_brought_once_a_step(ensemble, experts):
    """Not each at every step, as when the one asked longest ago leaves and is asked next."""
    loaded = []

    def load(number):
        loaded.append(number)
        return experts[number]

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(experts[0]))
    loaders = [functools.partial(load, number) for number in range(EXPERTS)]
    caches = EXPERTS * block_bytes(ensemble.model, 1, LEAST_SLOTS, "float32")
    held = ParameterCache(loaders, device_bytes=(EXPERTS - 1) * size + caches, host_bytes=0)
    few = replace(ensemble, parameters=held)
    said = few.generate(PROMPT, max_new_tokens=9, temperature=0.0)
    assert said.ids == ensemble.generate(PROMPT, max_new_tokens=9, temperature=0.0).ids
    assert len(said.ids) == 9 and len(loaded) <= EXPERTS + 8


def test_texts_read_in_pieces_have_the_scores_of_the_whole(model, experts, documents):
    """Three of unequal length, in pieces of unequal length, one of which enters late in the place
    of another; texts move to larger blocks on the way."""
    texts = [[1, *ids.tolist()] for ids in (documents[4][:27], documents[3], documents[8])]
    wanted = scored(model, experts[0], [np.asarray(text[1:]) for text in texts], length=128)
    reader = Decoder(model, lambda: experts[0])
    rows = {0: reader.open(texts[0][:1])}
    gone = reader.open(documents[7][:1].tolist())
    reader.read({gone: documents[7].tolist(), rows[0]: texts[0][:1]}, scored=True)
    reader.close(gone)
    rows[1], rows[2] = reader.open(texts[1][:1]), reader.open(texts[2][:1])
    cuts = {0: (1, 6, 7, 7, 28), 1: (0, 2, 3, 4, 8), 2: (0, 0, 60, 60, len(texts[2]))}
    for piece in range(4):
        parts = {
            rows[number]: texts[number][cut[piece] : cut[piece + 1]] for number, cut in cuts.items()
        }
        together = [parts] if piece % 2 else [{row: ids} for row, ids in parts.items()]
        for some in together:
            reader.read(some, scored=True)
    for number, text in rows.items():
        assert text.ids == texts[number] and np.isnan(text.scores[0])
        np.testing.assert_allclose(text.scores[1:], wanted[number][:-1], atol=1e-4)
        assert following(text)[2] == pytest.approx(wanted[number][-1], abs=1e-4)


def following(text):
    """Log probabilities of the id after all that was read of a text."""
    return jax.nn.log_softmax(text.block.logits[text.index])


@pytest.mark.slow
def test_many_texts_read_together_and_apart_are_what_they_are_alone(model, experts):
    """Twenty that come, grow by pieces of any length in any company, and go."""
    draw = np.random.default_rng(3)
    texts = [[1, *draw.integers(4, 90, draw.integers(5, 60)).tolist()] for _ in range(20)]
    wanted = scored(model, experts[0], [np.asarray(text[1:]) for text in texts], length=64)
    reader, rows = Decoder(model, lambda: experts[0]), {}
    waiting = list(range(len(texts)))
    while waiting or rows:
        while waiting and (len(rows) < 3 or draw.random() < 0.6):
            number = waiting.pop()
            rows[number] = reader.open(texts[number])
        part = [number for number in rows if draw.random() < draw.choice([0.1, 0.5, 1.0])]
        most, pieces = draw.choice([1, 1, 8, 40]), {}
        for number in part:
            begun = len(rows[number].ids)
            pieces[rows[number]] = texts[number][begun : begun + draw.integers(0, most + 1)]
        reader.read(pieces, scored=True)
        for number in [n for n in rows if len(rows[n].ids) == len(texts[n])]:
            text = rows.pop(number)
            scores = [*text.scores[1:], following(text)[2]]
            np.testing.assert_allclose(scores, wanted[number], atol=1e-4)
            reader.close(text)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        (PIECES, {2: 16, 16: 16, 17: 16, 47: 16, 48: 64, 64: 64, 191: 64, 192: 256, 999: 256}),
        (ROWS, {1: 1, 2: 1, 3: 4, 4: 4, 8: 4, 11: 4, 12: 16, 16: 16, 47: 16, 48: 64, 99: 64}),
    ],
)
def test_no_more_than_a_third_is_read_beside_what_is_asked(sizes, counts):
    assert {count: _next_of(count, sizes) for count in counts} == counts


@pytest.mark.parametrize(
    "length",
    [
        2 * LONGEST + 40,
        pytest.param(LONGEST, marks=pytest.mark.slow),
        pytest.param(LONGEST + 1, marks=pytest.mark.slow),
    ],
)
def test_long_texts_are_read_in_chunks(model, experts, length):
    """Beyond `max_length` too: of a model with rotary positions."""
    draw = np.random.default_rng(0)
    longer = replace(model, max_length=4 * LONGEST)
    texts = [[1, *draw.integers(4, 90, length - 1).tolist()], [1, 5, 7]]
    reader = Decoder(longer, lambda: experts[0])
    rows = [reader.open(text) for text in texts]
    reader.read(dict(zip(rows, texts)), scored=True)
    ids = [np.asarray(text[1:]) for text in texts]
    wanted = scored(longer, experts[0], ids, length=4 * LONGEST)
    for row, scores in zip(rows, wanted):
        np.testing.assert_allclose(row.scores[1:], scores[:-1], atol=2e-4)


@pytest.mark.parametrize(
    ("routing", "top_m", "least"),
    [("language", None, 0.0), ("forgetful", None, 0.0), ("hesitant", None, 0.0)]
    + [(name, None, 0.25) for name in ("tfidf", "posterior", "abstaining", "hesitant")]
    + [("abstaining", m, 0.0) for m in (None, 1)]
    + [(name, m, 0.0) for name in ("uniform", "tfidf", "posterior") for m in (None, 1, 2)],
)
def test_generating_gives_the_probabilities_of_scoring(ensemble, routers, routing, top_m, least):
    """For two prompts of unequal length side by side, and one that comes when they are under way
    and goes before they end."""
    router = routers[routing]
    limits = RoutingLimits(top_m=top_m, least_weight=least)
    engine = Engine(replace(ensemble, router=router, limits=limits))
    languages = ("en", "de", "en")
    prompts = [ensemble.tokenizer.begin(prompt) for prompt in (PROMPT, "hgf", "cd fe ab")]
    texts = [
        engine.add(GenerationRequest(ids=ids, sampling=SamplingParams(), language=language))
        for ids, language in zip(prompts[:2], languages)
    ]
    given = {0: [], 1: [], 2: []}
    for step in range(12):
        if step == 4:
            more = {"ids": prompts[2], "language": languages[2]}
            texts.append(engine.add(GenerationRequest(sampling=SamplingParams(), **more)))
        if step == 9:
            engine.remove(texts[2])
        distribution, weights = engine.next_log_probabilities()
        rows = [text.row for text in engine.sequences]
        assert len(set(rows)) == len(rows)
        np.testing.assert_allclose(np.exp(distribution)[rows].sum(axis=1), 1.0, rtol=1e-5)
        for text, spoken in zip(engine.sequences, weights):
            likely = np.asarray(distribution[text.row])
            given[texts.index(text)].append((likely.max(), spoken))
            engine.append(text, int(likely.argmax()))
    for number, (text, language) in enumerate(zip(texts, languages)):
        ids = np.asarray(text.ids[1:])
        assert len(ids) == len(prompts[number]) - 1 + len(given[number])
        scores = np.stack([scored(ensemble.model, p, [ids])[0] for p in ensemble.parameters])
        scores = scores[:, :-1]
        wanted = along(router, language, ids, scores, top_m, least)
        for position, (value, weights) in enumerate(given[number], len(prompts[number]) - 1):
            np.testing.assert_allclose(weights, np.exp(wanted[position]), atol=1e-4)
            expected = mixture(wanted[position : position + 1], scores[:, position : position + 1])
            assert value == pytest.approx(expected[0], abs=1e-4)


def test_temperature_zero_takes_the_most_probable_token_each_time(ensemble, alone, experts):
    said = ensemble.generate(PROMPT, max_new_tokens=8, temperature=0.0)
    ids = ensemble.tokenizer.encode([PROMPT])[0]
    forward = forward_of(ensemble.model)
    for token in said.ids:
        tokens = np.pad([1, *ids], (0, 63 - len(ids)))[None]
        rows = [jax.nn.softmax(forward(p, tokens)[0, len(ids)]) for p in experts]
        mixed = np.mean(rows, axis=0)
        assert token == mixed.argmax()
        ids.append(token)
    assert len(said.ids) == 8 or mixed.argmax() == 2


def test_generation_is_decided_by_its_seed(ensemble):
    def say(seed):
        return ensemble.generate(
            PROMPT, max_new_tokens=12, temperature=1.5, top_p=1.0, random_seed=seed
        )

    assert say(0) == say(0)
    assert len({tuple(say(seed).ids) for seed in range(4)}) == 4


def test_a_tiny_nucleus_is_the_most_probable_token(ensemble):
    greedy = ensemble.generate(PROMPT, max_new_tokens=8, temperature=0.0)
    narrow = ensemble.generate(PROMPT, max_new_tokens=8, temperature=1.5, top_p=1e-6, random_seed=3)
    assert narrow.ids == greedy.ids


def test_the_text_is_that_of_the_new_ids(ensemble):
    # A letter for each id: of single bytes, of which this vocabulary has many, not all is text.
    letters = SimpleNamespace(
        begin=ensemble.tokenizer.begin,
        decode=lambda ids: "".join(chr(0x100 + number) for number in ids),
        end_ids=frozenset(),
        starts=ensemble.tokenizer.starts,
    )
    spelt = replace(ensemble, tokenizer=letters)
    said = spelt.generate(PROMPT, max_new_tokens=40, temperature=1.0, random_seed=1)
    assert len(said.ids) == len(said.text) == 40
    assert said.text == letters.decode(said.ids)
    assert sum(said.weights.values()) == pytest.approx(1.0)


def test_the_end_token_ends_the_text(ensemble, model, experts):
    # Experts that always end: the head of the end token lies along whatever the states are.
    ending = [jax.tree.map(np.zeros_like, p) for p in experts]
    for parameters in ending:
        parameters["embedding"] = np.zeros_like(parameters["embedding"])
        parameters["embedding"][:, 0] = -1.0
        parameters["embedding"][2, 0] = 50.0
        parameters["norm"] = {"scale": np.full_like(parameters["norm"]["scale"], -1.0)}
    said = replace(ensemble, parameters=ending).generate(PROMPT, temperature=0.0, max_new_tokens=9)
    assert (said.ids, said.text) == ([], "")


def test_as_many_tokens_are_new_as_asked_for(ensemble):
    said = ensemble.generate(PROMPT, max_new_tokens=5, temperature=1.0, top_p=1.0, random_seed=0)
    assert len(said.ids) == 5 and said.text


def test_a_prompt_without_room_for_an_answer_is_a_users_mistake(ensemble, model):
    prompt = "abcdefgh " * 30
    tokens = len(ensemble.tokenizer.encode([prompt])[0])
    with pytest.raises(
        UserError, match=f"the prompt has {tokens} tokens, .*; got max_new_tokens=7"
    ):
        ensemble.generate(prompt, max_new_tokens=7)
    room = model.max_length - 7 - 1
    ids = ensemble.tokenizer.encode([prompt])[0][:room]
    fits = ensemble.tokenizer.decode(ids)
    assert len(ensemble.tokenizer.encode([fits])[0]) == room
    ensemble.generate(fits, max_new_tokens=7)
    with pytest.raises(UserError, match="space for 7 new ones; got max_new_tokens=8"):
        ensemble.generate(fits, max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0 and at most 1000; got -0.1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1; got 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(ensemble, options, fault):
    with pytest.raises(UserError, match=fault):
        ensemble.generate(PROMPT, **options)
