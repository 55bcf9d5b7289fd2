"""The ensemble: a mixture of probabilities, the same whether a text is scored or generated."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from clustering.errors import UserError
from xelm import open_run
from xelm.data.text_format import TextFormat
from xelm.inference.decoder import PIECES, ROWS, Decoder, _next_of
from xelm.inference.engine import Engine, GenerationRequest
from xelm.inference.ensemble import Ensemble
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.route import Walk, mixture
from xelm.inference.routers import Abstaining, ByLanguage, Fixed, Posterior, Tfidf, uniform
from xelm.inference.routing import Routing, RoutingLimits
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.models.parameters import bind, for_inference, fresh_parameters, inference_graph

EXPERTS, LENGTH = 3, 32
PRIOR = np.log(np.array([0.2, 0.5, 0.3]))
PROMPT = "abcd efg"
LONGEST = PIECES[-1]


@pytest.fixture(scope="module")
def run(tiny):
    return open_run(tiny.directory)


@pytest.fixture(scope="module")
def model(run):
    return read_config(run.seed)


@pytest.fixture(scope="module")
def experts(model):
    """Parameters of experts that disagree: random, and far from the small values of a beginning."""
    return [
        jax.tree.map(lambda p: np.asarray(4.0 * p), for_inference(fresh_parameters(model, seed)))
        for seed in range(EXPERTS)
    ]


@pytest.fixture(scope="module")
def routers(run):
    vectoriser = run.vectoriser()
    centres = np.random.default_rng(0).normal(size=(EXPERTS, vectoriser.dimensions)) / 3
    return {
        "uniform": uniform(EXPERTS),
        "language": ByLanguage(experts=EXPERTS, serving={"en": 1, "de": 0}),
        "tfidf": Tfidf(vectoriser=vectoriser, centres=centres, temperature=0.3),
        "posterior": Posterior(prior=PRIOR),
        "forgetful": Posterior(prior=PRIOR, memory=0.8),
        # Of the positions that TF-IDF is not sure of, which some are.
        "abstaining": Abstaining(
            router=Tfidf(vectoriser=vectoriser, centres=centres, temperature=0.3),
            threshold=0.45,
            instead=Posterior(prior=PRIOR),
        ),
        # Experts that have read a text without being asked what they think read it again.
        "hesitant": Hesitant(),
    }


BAYES = Posterior(prior=PRIOR)


class Hesitant:
    """Needs log-likelihoods at every third token; otherwise one expert has all weight, in turn."""

    memory, experts = 0.9, EXPERTS

    def start(self, language):
        return np.zeros(1)

    def terms(self, before, ids):
        return np.ones((len(ids), 1))

    def needs_log_likelihoods(self, states):
        return states[:, 0] % 3 == 0

    def log_weights(self, states, log_likelihoods):
        with np.errstate(divide="ignore"):
            alone = np.log(np.eye(EXPERTS)[states[:, 0].astype(int) % EXPERTS])
        return np.where(
            self.needs_log_likelihoods(states)[:, None],
            BAYES.log_weights(states, log_likelihoods),
            alone,
        )

    def decided_by(self, states):
        return ["posterior" if asks else "alone" for asks in self.needs_log_likelihoods(states)]


def along(router, language, ids, scores, top_m=None, least=0.0):
    """Log weights before every token of a text."""
    limits = RoutingLimits(top_m=top_m, least_weight=least)
    return Walk(router, language, ids).decide(scores, limits).log_weights


@pytest.fixture(scope="module")
def ensemble(run, model, experts, routers):
    return Ensemble(
        names=["a", "b", "c"],
        model=model,
        parameters=experts,
        router=routers["uniform"],
        tokenizer=run.tokenizer(),
        context_length=LENGTH,
    )


@pytest.fixture(scope="module")
def documents(run):
    """Real documents: short, long beyond the window, of no and of one token."""
    found = run.store().languages["de"]
    whole = np.concatenate([found.document(number) for number in range(6)]).astype(np.int64)
    lengths = (0, 1, 2, 7, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 100, 5, 0, 1)
    return [whole[number : number + length] for number, length in enumerate(lengths)]


def forward_of(model):
    """Logits of the plain model, compiled."""

    @jax.jit
    def forward(parameters, tokens):
        network = bind(inference_graph(model), parameters)
        return network.logits(network.hidden(tokens))

    return forward


@pytest.fixture(scope="module")
def alone(model):
    """A function: log probabilities of a document's tokens and end, by the plain model."""
    forward = forward_of(model)

    def score(parameters, ids, window=10**9):
        framed = np.array([1, *ids, 2])
        scores = []
        for begin in range(0, len(framed) - 1, window):
            part = framed[begin : begin + window + 1]
            # Padded behind, where it changes nothing, so that few shapes are compiled.
            padded = np.pad(part[:-1], (0, -(len(part) - 1) % 64))
            logits = np.asarray(forward(parameters, padded[None])[0], np.float64)
            found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            scores.append(found[np.arange(len(part) - 1), part[1:]])
        return np.concatenate(scores)

    return score


def scored(model, parameters, documents, length=LENGTH):
    return score_documents(
        model,
        parameters,
        documents,
        text_format=TextFormat(start_id=1, end_id=2),
        context_length=length,
    )


def test_scores_are_those_of_the_model_on_each_document_alone(model, experts, documents, alone):
    found = scored(model, experts[0], documents)
    assert [len(scores) for scores in found] == [len(ids) + 1 for ids in documents]
    for ids, scores in zip(documents, found):
        np.testing.assert_allclose(scores, alone(experts[0], ids, LENGTH), atol=1e-4)


def test_a_document_within_the_window_is_read_as_a_whole(model, experts, documents, alone):
    # The one that just fits, with its end, and the first that does not.
    fits, beyond = documents[4], documents[5]
    (whole, cut) = scored(model, experts[0], [fits, beyond])
    np.testing.assert_allclose(whole, alone(experts[0], fits), atol=1e-4)
    np.testing.assert_allclose(cut[:-1], alone(experts[0], beyond)[:-1], atol=1e-4)
    assert abs(cut[-1] - alone(experts[0], beyond)[-1]) > 1e-3


def test_neighbours_in_a_batch_do_not_matter(model, experts, documents):
    together = scored(model, experts[0], documents * 3)
    for number, ids in enumerate(documents):
        (single,) = scored(model, experts[0], [ids])
        for copy in range(3):
            np.testing.assert_allclose(together[number + copy * len(documents)], single, atol=1e-5)


def test_progress_counts_every_predicted_token(model, experts, documents):
    told = []
    score_documents(
        model,
        experts[0],
        documents,
        text_format=TextFormat(start_id=1, end_id=2),
        context_length=LENGTH,
        progress=told.append,
    )
    assert sum(told) == sum(len(ids) + 1 for ids in documents)
    assert scored(model, experts[0], []) == []


def texts(ensemble, documents):
    return [ensemble.tokenizer.decode(ids) for ids in documents if len(ids)] + [""]


def test_one_expert_equals_the_plain_model(ensemble, documents, alone, routers):
    found = texts(ensemble, documents)
    ids = ensemble.tokenizer.encode(found)
    for parameters in ensemble.parameters:
        one = replace(ensemble, names=["a"], parameters=[parameters], router=uniform(1)).score(
            found
        )
        wanted = [-alone(parameters, document, LENGTH).sum() for document in ids]
        np.testing.assert_allclose(one.nats, wanted, rtol=1e-4)
        assert one.tokens.tolist() == [len(document) + 1 for document in ids]
        np.testing.assert_allclose(one.weights["a"], 1.0)


@pytest.mark.parametrize("routing", ["uniform", "language", "tfidf", "posterior"])
@pytest.mark.parametrize("top_m", [None, 1, 2])
def test_equal_experts_are_one_of_them(ensemble, experts, documents, routers, routing, top_m):
    found = texts(ensemble, documents)
    equal = replace(
        ensemble,
        parameters=[experts[1]] * EXPERTS,
        router=routers[routing],
        limits=RoutingLimits(top_m=top_m),
    )
    one = replace(ensemble, names=["b"], parameters=experts[1:2], router=uniform(1))
    languages = ["en"] * len(found)
    np.testing.assert_allclose(equal.score(found, languages).nats, one.score(found).nats, rtol=1e-5)
    if top_m is None:
        options = {"max_new_tokens": 6, "temperature": 0.0}
        said = equal.generate(PROMPT, language="en", **options)
        assert said.ids == one.generate(PROMPT, **options).ids


def test_hard_weights_are_that_expert(ensemble, experts, documents, routers):
    found = texts(ensemble, documents)
    hard = replace(ensemble, router=routers["language"]).score(found, ["de", "en"] * 5 + ["de"])
    for expert, name, language in ((0, "a", "de"), (1, "b", "en")):
        one = replace(ensemble, names=[name], parameters=[experts[expert]], router=uniform(1))
        mine = slice(0, None, 2) if language == "de" else slice(1, None, 2)
        np.testing.assert_allclose(hard.nats[mine], one.score(found).nats[mine], rtol=1e-5)
        np.testing.assert_array_equal(hard.weights[name][mine], 1.0)
    np.testing.assert_array_equal(hard.weights["c"], 0.0)


@pytest.mark.parametrize("routing", ["uniform", "tfidf", "posterior", "abstaining"])
@pytest.mark.parametrize("top_m", [None, 1, 2])
def test_the_score_is_the_explicit_sum(ensemble, documents, routers, routing, top_m):
    found = texts(ensemble, documents)
    ids = [np.asarray(x, np.int64) for x in ensemble.tokenizer.encode(found)]
    scores = replace(ensemble, router=routers[routing], limits=RoutingLimits(top_m=top_m)).score(
        found
    )
    by_expert = [scored(ensemble.model, p, ids) for p in ensemble.parameters]
    for number, document in enumerate(ids):
        logs = np.stack([found[number] for found in by_expert]).astype(np.float64)
        weights = np.exp(along(routers[routing], None, np.append(document, 2), logs))
        if top_m is not None:
            weakest = np.argsort(-weights, axis=1, kind="stable")[:, top_m:]
            np.put_along_axis(weights, weakest, 0.0, axis=1)
            weights /= weights.sum(axis=1, keepdims=True)
        nats = -np.log((weights * np.exp(logs.T)).sum(axis=1)).sum()
        assert scores.nats[number] == pytest.approx(nats, rel=1e-6)
        mean = weights.mean(axis=0)
        assert [scores.weights[n][number] for n in "abc"] == pytest.approx(mean, abs=1e-6)


def test_as_many_languages_and_contexts_are_wanted_as_texts(ensemble):
    with pytest.raises(UserError, match="as many contexts as texts, 2; got 1"):
        ensemble.score(["a", "b"], contexts=["c"])
    with pytest.raises(UserError, match="as many languages as texts, 1; got 2"):
        ensemble.generate_batch(["a"], languages=["en", "de"])


def test_experts_that_do_not_all_fit_are_brought_once_a_step(ensemble, experts):
    """Not each at every step, as when the one asked longest ago leaves and is asked next."""
    loaded = []

    def load(number):
        loaded.append(number)
        return experts[number]

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(experts[0]))
    loaders = [functools.partial(load, number) for number in range(EXPERTS)]
    held = ParameterCache(loaders, device_bytes=(EXPERTS - 1) * size, host_bytes=0)
    few = replace(ensemble, parameters=held)
    said = few.generate(PROMPT, max_new_tokens=9, temperature=0.0)
    assert said.ids == ensemble.generate(PROMPT, max_new_tokens=9, temperature=0.0).ids
    assert len(said.ids) == 9 and len(loaded) <= EXPERTS + 8


def test_no_texts_have_no_scores(ensemble):
    scores = ensemble.score([])
    assert scores.nats.shape == scores.tokens.shape == (0,)
    assert {name: weights.shape for name, weights in scores.weights.items()} == {
        "a": (0,),
        "b": (0,),
        "c": (0,),
    }


def test_an_expert_without_weight_is_not_asked(ensemble, experts, routers):
    class Refusing(list):
        def __getitem__(self, index):
            assert index == 1, f"expert {index} was asked"
            return list.__getitem__(self, index)

    hard = replace(ensemble, parameters=Refusing(experts), router=routers["language"])
    one = replace(ensemble, names=["b"], parameters=experts[1:2], router=uniform(1))
    texts = ["abc abc", "defg"]
    np.testing.assert_allclose(hard.score(texts, ["en"] * 2).nats, one.score(texts).nats, rtol=1e-5)
    said = hard.generate(PROMPT, max_new_tokens=3, temperature=0.0, language="en")
    assert said.ids == one.generate(PROMPT, max_new_tokens=3, temperature=0.0).ids
    assert said.weights == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_texts_read_in_pieces_have_the_scores_of_the_whole(model, experts, documents):
    """Three of unequal length, in pieces of unequal length, one of which enters late in the place
    of another; more rows and slots are made on the way."""
    texts = [np.concatenate([[1], ids]) for ids in (documents[4][:27], documents[3], documents[8])]
    wanted = scored(model, experts[0], [text[1:] for text in texts], length=128)
    reader = Decoder(model, lambda: experts[0])
    rows = {0: reader.allocate()}
    gone = reader.allocate()
    reader.read({gone: documents[7], rows[0]: texts[0][:1]})
    reader.free(gone)
    rows[1] = reader.allocate()
    assert rows[1] == gone
    rows[2] = reader.allocate()
    cuts = {0: (1, 6, 7, 7, 28), 1: (0, 2, 3, 4, 8), 2: (0, 0, 60, 60, len(texts[2]))}
    found = {row: [] for row in rows.values()}
    for piece in range(4):
        parts = {
            rows[number]: texts[number][cut[piece] : cut[piece + 1]] for number, cut in cuts.items()
        }
        together = [parts] if piece % 2 else [{row: ids} for row, ids in parts.items()]
        for some in together:
            for row, scores in reader.read(some, scored=True).items():
                found[row].append(scores)
    following = jax.nn.log_softmax(reader.logits)
    for number, row in rows.items():
        scores = np.concatenate(found[row])
        if number:  # the first of the others was read above
            assert np.isnan(scores[0])
            scores = scores[1:]
        np.testing.assert_allclose(scores, wanted[number][:-1], atol=1e-4)
        assert following[row, 2] == pytest.approx(wanted[number][-1], abs=1e-4)


@pytest.mark.slow
def test_many_texts_read_together_and_apart_are_what_they_are_alone(model, experts):
    """Twenty that come, grow by pieces of any length in any company, and go."""
    draw = np.random.default_rng(3)
    texts = [np.append(1, draw.integers(4, 90, draw.integers(5, 60))) for _ in range(20)]
    wanted = scored(model, experts[0], [text[1:] for text in texts], length=64)
    reader, rows, found = Decoder(model, lambda: experts[0]), {}, [[] for _ in texts]
    waiting = list(range(len(texts)))
    while waiting or rows:
        while waiting and (len(rows) < 3 or draw.random() < 0.6):
            rows[waiting.pop()] = reader.allocate()
        part = [number for number in rows if draw.random() < draw.choice([0.1, 0.5, 1.0])]
        begun = {number: int(reader.lengths[rows[number]]) for number in part}
        most = draw.choice([1, 1, 8, 40])
        pieces = {
            rows[number]: texts[number][begun[number] : begun[number] + draw.integers(0, most + 1)]
            for number in part
        }
        for number, scores in zip(part, reader.read(pieces, scored=True).values()):
            found[number].append(scores)
        following = jax.nn.log_softmax(reader.logits)[:, 2]
        for number in [n for n in rows if reader.lengths[rows[n]] == len(texts[n])]:
            scores = np.append(np.concatenate(found[number])[1:], following[rows[number]])
            np.testing.assert_allclose(scores, wanted[number], atol=1e-4)
            reader.free(rows.pop(number))


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
    texts = [np.append(1, draw.integers(4, 90, length - 1)), np.array([1, 5, 7])]
    reader = Decoder(longer, lambda: experts[0])
    rows = [reader.allocate(), reader.allocate()]
    found = reader.read(dict(zip(rows, texts)), scored=True)
    wanted = scored(longer, experts[0], [text[1:] for text in texts], length=4 * LONGEST)
    for row, scores in zip(rows, wanted):
        np.testing.assert_allclose(found[row][1:], scores[:-1], atol=2e-4)


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
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1; got 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(ensemble, options, fault):
    with pytest.raises(UserError, match=fault):
        ensemble.generate(PROMPT, **options)


def test_the_ensemble_of_a_run_is_its_published_experts(run, alone):
    opened = run.ensemble("language")
    registry = run.registry()
    assert opened.names == [expert.name for expert in registry.published()]
    text = run.tokenizer().decode(run.store().languages["de"].document(0)[:20])
    ids = run.tokenizer().encode([text])[0]
    expert = registry.for_language("de")
    parameters = read_for_inference(expert.directory(run.directory), read_config(run.seed))
    nats = opened.score([text], ["de"]).nats[0]
    assert nats == pytest.approx(-alone(parameters, np.array(ids)).sum(), rel=1e-5)


def test_an_ensemble_shows_its_models_routing_and_dtype(run, ensemble):
    found = repr(run.ensemble("tfidf", top_m=1))
    assert found == "Ensemble(de-fr, en-es; routing='tfidf', dtype='float32')"
    assert repr(ensemble) == "Ensemble(a, b, c; routing='Fixed', dtype='float32')"


@pytest.mark.parametrize("top_m", [0, 3])
def test_more_experts_than_there_are_cannot_be_asked(run, top_m):
    with pytest.raises(UserError, match=f"top_m must be between 1 and 2 experts; got {top_m}"):
        run.ensemble("uniform", top_m=top_m)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_router_without_warmth_is_refused(run, temperature):
    with pytest.raises(UserError, match="wants a temperature and a distance power above 0; got"):
        run.ensemble(Routing(name="tfidf", temperature=temperature))


@pytest.mark.parametrize("routing", ["language", "uniform", "posterior"])
def test_a_temperature_without_tfidf_is_refused(run, routing):
    with pytest.raises(UserError, match=f"goes with routing tfidf; got {routing}"):
        run.ensemble(Routing(name=routing, temperature=0.5))


def test_an_unknown_routing_is_refused_by_name(run):
    with pytest.raises(UserError, match=r"routing must be one of .*; got 'oracle'"):
        run.ensemble("oracle")


class Noted(list):
    """Parameters that note which of them are read."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.read = set()

    def __getitem__(self, model):
        self.read.add(model)
        return super().__getitem__(model)


@pytest.mark.parametrize(("shares", "read"), [((0, 1, 0), {1}), ((0.5, 0, 0.5), {0, 2})])
def test_likelihoods_are_of_models_with_weight_and_no_other_is_loaded(
    ensemble, experts, alone, shares, read
):
    with np.errstate(divide="ignore"):
        router = Fixed(weights=np.log(shares))
    noted = Noted(experts)
    mixed = replace(ensemble, router=router, parameters=noted)
    text = ensemble.tokenizer.encode([PROMPT])[0]
    found = mixed.likelihoods([[1, *text[:2]], [1]], [text[2:], text])
    assert noted.read == read
    scores = np.stack([alone(parameters, text)[:-1] for parameters in experts])
    wanted = np.log(np.asarray(shares) @ np.exp(scores))
    np.testing.assert_allclose(found.nats, [-wanted[2:].sum(), -wanted.sum()], rtol=1e-5)
