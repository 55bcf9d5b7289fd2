"""The ensemble: a mixture of probabilities, whose weights and scores are those by hand."""

from dataclasses import replace

import numpy as np
import pytest
from small_ensemble import (
    EXPERTS,
    LENGTH,
    PROMPT,
    along,
    documents_of,
    ensemble_of,
    plain_scorer,
    random_experts,
    routers_of,
    scored,
)

from clustering.errors import UserError
from xelm import open_run
from xelm.data.text_format import TextFormat
from xelm.inference.routers import Fixed, uniform
from xelm.inference.routing import Routing, RoutingLimits
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import read_config, read_for_inference


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
