"""Routers of a RUN: what is fitted for them, kept, and fitted again when an expert joins."""

import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_corpus
from shared import documents_of, full

from clustering.errors import UserError
from clustering.identify import LONGEST
from xelm import open_run
from xelm.data.text_format import TextFormat
from xelm.inference.generation import generate
from xelm.inference.routers import OrMixture, uniform
from xelm.inference.routing import Routing
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.runs.fit import _beginnings, _some, identifier
from xelm.runs.make_router import make_router

TRAINED = ("de", "en", "es", "fr")
EXPERT_OF = {"en": "en-es", "es": "en-es", "de": "de-fr", "fr": "de-fr"}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("routers") / "RUN"
    shutil.copytree(tiny.directory, directory)
    return open_run(directory)


def decided(ensemble, texts):
    """The expert with most weight in each text, and that weight."""
    found = ensemble.score(texts).weights
    weights = np.stack([found[name] for name in ensemble.names], axis=1)
    return [ensemble.names[row.argmax()] for row in weights], weights.max(axis=1)


@pytest.mark.parametrize("routing", ["detected", "learned"])
def test_held_out_texts_go_to_the_experts_of_their_languages(run, tiny, routing):
    ensemble = run.ensemble(routing)
    for tag in TRAINED:
        names, weights = decided(ensemble, documents_of(tiny.held_out, tag))
        right = np.mean([name == EXPERT_OF[tag] for name in names])
        assert right >= 0.9 and weights.mean() > 0.7, (tag, right, weights.mean())


def test_what_was_fitted_is_kept(run, monkeypatch):
    first = run.ensemble("learned").router.otherwise.router
    run.ensemble("detected")
    kept = sorted(path.name for path in (run.directory / "routers").iterdir())
    assert [name.partition("-")[0] for name in kept] == ["languages", "learned", "novelty"]
    monkeypatch.setattr("xelm.runs.fit._some", None)  # nothing is read again
    again = run.ensemble("learned").router.otherwise.router
    np.testing.assert_array_equal(again.weights, first.weights)
    detected = run.ensemble("detected").router.otherwise.router
    assert detected.identifier.languages == tuple(run.languages)


def test_when_an_expert_joins_routers_know_its_language(xelm, copy, tmp_path):
    run = open_run(copy.directory)
    before = identifier(run)
    run.ensemble("learned")
    xelm("grow", copy.directory, "--language", "pt", "--corpus", copy.corpus)
    after = identifier(run)
    assert after.languages == (*before.languages, "pt")
    # The others stay as they are.
    np.testing.assert_array_equal(after.log_likelihoods[:, :-1], before.log_likelihoods)
    texts = documents_of(write_corpus(tmp_path / "new", ["pt"], documents=20, seed=1), "pt")
    for routing in ("detected", "learned"):
        names, _ = decided(run.ensemble(routing), texts)
        assert np.mean([name == "pt" for name in names]) >= 0.9
    # Those of before are gone.
    assert len(list((copy.directory / "routers").iterdir())) == 3


def with_documents(ids, count, empty=0):
    """The first documents of a language, and some that are empty."""
    ends = ids.ends[[*range(count), *[count - 1] * empty]]
    order = np.arange(count + empty)[::-1]
    hashes = np.asarray(ids.hashes[: len(order)])
    return replace(ids, ends=ends, bytes=ids.bytes[: len(order)], hashes=hashes, order=order)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("routing", ["detected", "learned"])
def test_a_run_with_few_documents_in_every_language_is_usable(
    copy, monkeypatch, capsys, routing, count
):
    run = open_run(copy.directory)
    few = {tag: [with_documents(ids, count)] for tag, ids in run.store().languages.items()}
    monkeypatch.setattr("xelm.runs.fit._languages", lambda run: few)
    ensemble = run.ensemble(routing)
    assert ensemble.generate("abc", max_new_tokens=2, temperature=0).weights
    told = [line for line in capsys.readouterr().err.splitlines() if "two documents" in line]
    if count == 1:  # nothing can be held out
        assert not isinstance(ensemble.router.otherwise, OrMixture)
        assert len(told) == 1 and told[0].startswith("0 of the languages that the experts of")
    else:
        assert isinstance(ensemble.router.otherwise, OrMixture) and not told
        assert identifier(run).temperature != LONGEST  # calibrated


@pytest.mark.parametrize("count", [1, 2, 5, 9, 10, 25])
def test_documents_are_held_out_of_few_and_of_many(run, count):
    ids = with_documents(run.store().languages["de"], count, empty=1)
    held, rest = (list(_some(ids, ids.order, held_out=out)) for out in (True, False))
    assert len(held) == {1: 0, 25: 2}.get(count, 1)
    assert len(held) + len(rest) == count and all(map(len, held + rest))


def test_one_expert_alone_is_always_asked(run):
    (expert, _) = run.registry().published()
    router = make_router(run, [expert], Routing(name="learned"))
    assert router.log_weights(router.start(None)[None], np.zeros((1, 1))).tolist() == [[0.0]]


def test_fixed_weights_are_those_given(run):
    found = run.ensemble(Routing(name="fixed", weights={"de-fr": 3, "en-es": 1}))
    scores = found.score(["abc"]).weights
    assert {name: weight.tolist() for name, weight in scores.items()} == {
        "de-fr": [pytest.approx(0.75)],
        "en-es": [pytest.approx(0.25)],
    }


def nats_of(run, directory, texts):
    """By one checkpoint alone."""
    tokenizer, model = run.tokenizer(), read_config(run.seed)
    scores = score_documents(
        model,
        read_for_inference(directory, model),
        [np.asarray(ids) for ids in tokenizer.encode(texts)],
        text_format=tokenizer.text_format,
        context_length=run.config.experts.sequence_length,
    )
    return [-found.sum() for found in scores]


@pytest.mark.parametrize("name", ["seed", "dense"])
def test_who_abstains_always_is_the_model_that_it_leaves_it_to(run, tiny, name):
    texts = documents_of(tiny.held_out, "de")[:4]
    ensemble = run.ensemble(Routing(name="uniform", abstain=0.9, abstain_to=name))
    assert ensemble.names == ["de-fr", "en-es", name]
    directory = run.seed if name == "seed" else run.dense
    found = ensemble.score(texts)
    np.testing.assert_allclose(found.nats, nats_of(run, directory, texts), rtol=1e-5)
    np.testing.assert_array_equal(found.weights[name], 1.0)
    said = ensemble.generate(texts[0], max_new_tokens=4)
    assert said.weights == {"de-fr": 0.0, "en-es": 0.0, name: 1.0}


def test_who_abstains_never_or_always_is_one_of_the_two_routers(run, tiny):
    texts = documents_of(tiny.held_out, "de")[:4]
    for threshold, same in ((0.0, "tfidf"), (1.0, "posterior")):
        found = run.ensemble(Routing(name="tfidf", abstain=threshold)).score(texts)
        np.testing.assert_allclose(found.nats, run.ensemble(same).score(texts).nats, rtol=1e-6)


@pytest.mark.parametrize("routing", ["tfidf", "posterior"])
def test_weights_that_are_decided_once_are_those_after_the_prompt(run, tiny, routing):
    text = documents_of(tiny.held_out, "de")[0]
    once = run.ensemble(Routing(name=routing, route_per="prompt"))
    said = once.generate(text, max_new_tokens=5, temperature=0)
    first = run.ensemble(routing).generate(text, max_new_tokens=1, temperature=0)
    assert said.weights == pytest.approx(first.weights)
    each = run.ensemble(routing).generate(text, max_new_tokens=5, temperature=0)
    assert each.weights != pytest.approx(first.weights)


@pytest.mark.parametrize("routing", ["tfidf", "posterior"])
def test_a_text_behind_a_context_is_scored_with_what_the_router_heard_of_it(run, tiny, routing):
    context, text = documents_of(tiny.held_out, "de")[:2]
    context, text = context.split(" ", 3)[:3], text.split(" ", 4)[:4]
    context, text = " ".join(context), " ".join(text)
    tokenizer = run.tokenizer()
    ids = [tokenizer.encode([part])[0] for part in (context, text)]
    for route_per in ("token", "prompt", "sequence"):
        ensemble = run.ensemble(Routing(name=routing, route_per=route_per))
        found = ensemble.score([" " + text], contexts=[context])
        assert found.tokens.tolist() == [len(ids[1]) + 1]
        if route_per == "token":  # the chain rule
            whole = ensemble.score([context + " " + text]).nats[0]
            part = run.ensemble(routing).score([context])
            assert tokenizer.encode([context + " " + text])[0] == ids[0] + ids[1]
            end = _end(run, routing, ids[0])
            assert found.nats[0] == pytest.approx(whole - part.nats[0] + end, rel=1e-5)
        else:  # one mixture with the same weights throughout
            weights = {name: weight[0] for name, weight in found.weights.items()}
            fixed = run.ensemble(Routing(name="fixed", weights=weights))
            wanted = fixed.score([" " + text], contexts=[context])
            assert found.nats[0] == pytest.approx(wanted.nats[0], rel=1e-5)


def _end(run, routing, ids):
    """-log p of the end of a text of these ids."""
    ensemble = run.ensemble(routing)
    text = ensemble.tokenizer.decode(ids)
    scores = ensemble.score([""], contexts=[text])
    assert scores.tokens.tolist() == [1]
    return scores.nats[0]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"name": "uniform", "memory": 0.5}, "memory goes with routing posterior"),
        ({"name": "tfidf", "weights": {"a": 1}}, "weights goes with routing fixed; got tfidf"),
        ({"name": "tfidf", "distance_power": 0.0}, "a distance power above 0; got 0.1 and 0.0"),
        ({"name": "fixed"}, "fixed routing needs weights of experts"),
        ({"name": "fixed", "weights": {"xx": 1}}, "no published expert 'xx' to weigh; there"),
        ({"name": "fixed", "weights": {"de-fr": -1}}, "at least 0 .*; got de-fr=-1"),
        ({"name": "posterior", "abstain": 0.5}, "abstaining goes with other routings"),
        ({"name": "tfidf", "least_weight": 1.0}, "at least 0 and below 1; got 1.0"),
        ({"name": "tfidf", "abstain_to": "seed"}, "abstain_to has no effect without abstain"),
        ({"name": "tfidf", "abstain": 0.5, "abstain_to": "me"}, "to one of .*; got 'me'"),
        ({"name": "tfidf", "route_per": "word"}, "route_per must be one of .*; got 'word'"),
        ({"name": "tfidf", "abstain": 1.5}, "abstain must be between 0 and 1; got 1.5"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, options, fault):
    with pytest.raises(UserError, match=fault):
        run.ensemble(Routing(**options))


def test_abstaining_to_a_model_that_is_not_there_is_refused(copy):
    shutil.rmtree(copy.directory / "dense")
    with pytest.raises(UserError, match="has no dense baseline to abstain to; train one"):
        open_run(copy.directory).ensemble(Routing(name="tfidf", abstain=0.5, abstain_to="dense"))


def test_equal_weights_are_the_prior(run):
    router = make_router(run, run.registry().published(), Routing(name="posterior"))
    np.testing.assert_array_equal(router.otherwise.prior, uniform(2).weights)


def test_a_run_that_cannot_be_written_to_is_asked_all_the_same(copy, capsys, monkeypatch):
    shutil.rmtree(copy.directory / "routers", ignore_errors=True)  # of other tests
    monkeypatch.setattr("clustering.files.os.replace", full)
    assert open_run(copy.directory).ensemble("learned").router is not None
    assert "the disk is full" in (said := capsys.readouterr().err)
    assert said.endswith("it is fitted each time\n")


def test_what_was_damaged_is_fitted_again(copy, capsys):
    run = open_run(copy.directory)
    wanted = run.ensemble("learned").router.otherwise.router.weights
    (kept,) = (copy.directory / "routers").glob("learned-*.npz")
    kept.write_bytes(kept.read_bytes()[:-200])
    found = run.ensemble("learned").router.otherwise.router.weights
    np.testing.assert_array_equal(found, wanted)
    assert "it is fitted again" in capsys.readouterr().err
    np.testing.assert_array_equal(run.ensemble("learned").router.otherwise.router.weights, wanted)


def test_text_in_a_language_that_nobody_serves_is_mixed_from_all_models(run, tmp_path):
    """In letters of all the languages, which follow each other as in none: told by both routers
    that look at the text, and it costs what a posterior over all models does."""
    draw, letters = (
        np.random.default_rng(0),
        sorted("äçéñößabcdefghijklmnopqrstuvwxyz"),
    )
    text = " ".join("".join(draw.choice(letters, 5)) for _ in range(20))
    for routing in ("learned", "detected"):
        ensemble = run.ensemble(routing)
        assert list(ensemble.names) == ["de-fr", "en-es", "seed", "dense"]
        found = ensemble.score([text])
        assert found.routing == ["mixture"], routing
        assert min(weights[0] for weights in found.weights.values()) > 0.05
        said = ensemble.generate(text[:20], max_new_tokens=3, temperature=0.0)
        assert sum(said.weights.values()) == pytest.approx(1.0)


def test_fitting_holds_no_sums_of_whole_documents(run):
    """A few beginnings of a long document are kept, and none is a view of a larger array."""
    vectoriser, size = run.vectoriser(), 200_000
    document = np.resize(np.arange(50), size)
    tracemalloc.start()
    kept = [_beginnings(vectoriser, document, np.random.default_rng(n)) for n in range(3)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All sums along it have so many bytes.
    assert peak < 8 * size * vectoriser.dimensions / 4
    assert sum(part.nbytes if part.base is None else part.base.nbytes for part in kept) < 10_000
    # They are the sums of the beginnings.
    lengths = [*np.random.default_rng(0).integers(1, size + 1, 2)]
    whole = vectoriser.terms(document[: max(lengths)]).sum(axis=0)
    np.testing.assert_allclose(kept[0][-1], whole, rtol=1e-9)


def test_a_language_of_one_long_document_is_known_by_its_beginning():
    class Two:
        lengths = np.asarray([25, 25])

        def document(self, number):
            return np.arange(50)[number * 25 : number * 25 + 25]

    found = _some(Two(), np.arange(1), tokens=10, held_out=False)
    assert [part.tolist() for part in found] == [list(range(10))]
    # The last of ten is held out, and counts for nothing elsewhere.
    held_out = [len(part) for part in _some(Two(), np.arange(20) % 2, tokens=60, held_out=True)]
    assert held_out == [25, 25]


def test_the_command_line_has_every_option(xelm, run):
    options = ["--max-new-tokens", "2", "--json"]
    fixed = ["--routing", "fixed", "--weights", "de-fr=1"]
    for arguments in (
        ["--routing", "detected", "--language", "de", "--route-per", "prompt"],
        ["--routing", "learned", "--abstain", "0.9", "--abstain-to", "seed"],
        ["--routing", "posterior", "--memory", "0.9"],
        ["--routing", "tfidf", "--distance-power", "4", "--top-m", "1"],
        fixed,
    ):
        found = xelm("generate", run.directory, "abcd", *arguments, *options).json()
        assert sum(found["weights"].values()) == pytest.approx(1.0)
    assert found["weights"] == {"de-fr": 1.0, "en-es": 0.0}
    outcome = xelm("generate", run.directory, "abcd", *fixed[:-1], "de-fr")
    assert outcome.code == 2
    assert "weights such as en=.7,de=.3 wanted; got 'de-fr'" in outcome.err


@pytest.mark.parametrize("routing", ["learned", "tfidf", "posterior"])
def test_a_language_that_is_told_is_routed_by(run, tiny, routing):
    """French text that is said to be English goes to the expert for English."""
    text, ensemble = documents_of(tiny.held_out, "fr")[0], run.ensemble(routing)
    found = ensemble.score([text, text, text], ["en", None, "sv"])
    mixed = routing == "learned"  # the default notices what nobody serves, and is told it here
    assert list(found.routing) == ["language", routing, "mixture" if mixed else routing]
    assert found.weights["en-es"][0] == 1.0
    assert (found.nats[1] == found.nats[2]) != mixed
    said = ensemble.generate(text[:20], max_new_tokens=2, language="eng_Latn")
    assert (said.routing, said.weights["en-es"]) == ("language", 1.0)
    assert ensemble.generate(text[:20], max_new_tokens=2).routing == routing


@pytest.mark.parametrize("memory", [1.0, 0.9])
def test_a_template_and_a_system_prompt_do_not_move_the_posterior(copy, memory):
    """English ones, around what a German user says: the evidence is that of the user's tokens."""
    english, german = (documents_of(copy.held_out, tag)[0].split() for tag in ("en", "de"))
    template = " ".join(english[:4]) + " {% for m in messages %}{{ m['content'] }} {% endfor %}"
    template += " ".join(english[4:8])
    (copy.directory / "seed" / "chat_template.jinja").write_text(template)
    ensemble = open_run(copy.directory).ensemble(Routing(name="posterior", memory=memory))
    messages = [
        {"role": "system", "content": " ".join(english[8:12])},
        {"role": "user", "content": " ".join(german[:4])},
    ]
    ids, mask = ensemble.tokenizer.chat(messages)
    assert mask is not None and 0 < sum(mask) < len(ids) / 2
    said = ensemble.generate(messages, max_new_tokens=1, temperature=0.0)
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0)
    (whole,) = generate(ensemble, [GenerationRequest(ids=ids, sampling=sampling)])
    assert said.weights["de-fr"] > 0.5 and whole.weights["en-es"] > 0.5
    evidence = []
    for parameters in (ensemble.parameters[number] for number in range(2)):
        (scores,) = score_documents(
            ensemble.model,
            parameters,
            [np.asarray(ids)],
            text_format=TextFormat(start_id=None, end_id=2),
            context_length=ensemble.model.max_length,
        )
        counted = scores[:-1][np.asarray(mask)]
        evidence.append(counted @ memory ** np.arange(len(counted) - 1, -1, -1))
    wanted = np.exp(evidence - np.max(evidence))
    assert said.weights["de-fr"] == pytest.approx(wanted[0] / wanted.sum(), abs=1e-4)


def test_the_router_that_abstains_says_to_whom(run):
    ensemble = run.ensemble(Routing(name="uniform", abstain=0.9, abstain_to="seed"))
    assert ensemble.score(["abcd"]).routing == ["seed"]
    assert run.ensemble(Routing(name="uniform", abstain=0.9)).score(["abcd"]).routing == [
        "posterior"
    ]


def test_a_language_that_nobody_serves_is_told_of(xelm, run):
    asked = ("generate", run.directory, "abcd", "--max-new-tokens", "2", "--json", "--language")
    served = xelm(*asked, "de")
    assert (served.json()["routing"], served.json()["weights"]["de-fr"]) == ("language", 1.0)
    assert "no expert serves" not in served.err
    other = xelm(*asked, "sv")
    routing = other.json()["routing"]
    assert routing in ("learned", "mixture")
    assert f"no expert serves sv: routed by {routing} instead" in other.err
    refused = xelm(*asked, "sv", "--routing", "language")
    assert refused.code == 2 and "no expert serves 'sv'; served: de, en" in refused.err
