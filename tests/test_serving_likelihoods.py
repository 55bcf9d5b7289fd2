"""Log probabilities that the server tells: of prompts, of what it draws, and to the harness."""

import itertools
import json
import math
import threading
from types import SimpleNamespace

import lm_eval
import numpy as np
import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI
from serving import served
from shared import LANGUAGES, documents_of

from xelm import open_run
from xelm.data.tokenizer import Tokenizer
from xelm.harness import Harness
from xelm.inference import generation, prompt_scoring
from xelm.inference.work import finish
from xelm.serving import openai_prompts, openai_responses
from xelm.serving.models import ServedModels
from xelm.serving.openai_requests import ChatRequest, CompletionRequest


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def ensemble(chatty):
    return open_run(chatty).ensemble("detected")


def texts(tiny):
    return [documents_of(tiny.held_out, tag)[0][:30] for tag in LANGUAGES]


def long_text(tiny, ensemble):
    """A text that the models can read, longer than their rows in training."""
    whole = " ".join(documents_of(tiny.held_out, "de"))[:200]
    found = next(t for n in range(len(whole), 0, -1) if len(ids_of(ensemble, t := whole[:n])) < 60)
    assert 50 < len(ids_of(ensemble, found)) < ensemble.model.max_length == 2 * ensemble.window
    return found


def ids_of(ensemble, text):
    return ensemble.tokenizer.encode([text])[0]


def test_a_prompt_alone_is_scored_as_by_the_ensemble(client, ensemble, tiny):
    prompts = [ensemble.tokenizer.encode([text])[0] for text in texts(tiny)]
    start = ensemble.tokenizer.start_id
    wanted = ensemble.likelihoods([[start]] * 4, prompts)
    asked = {"model": "xelm", "max_tokens": 0, "echo": True, "logprobs": 3}
    by_text = client.completions.create(prompt=texts(tiny), **asked)
    by_ids = client.completions.create(prompt=[[start, *ids] for ids in prompts], **asked)
    assert by_text.usage.completion_tokens == 0
    for n, (one, other) in enumerate(zip(by_text.choices, by_ids.choices)):
        assert one.finish_reason == "length" and one.text == texts(tiny)[n]
        found = one.logprobs
        assert len(found.tokens) == len(prompts[n]) == len(found.top_logprobs)
        assert -sum(found.token_logprobs) == pytest.approx(wanted.nats[n], rel=1e-5)
        # What was put first is not repeated; what was given is, and follows nothing.
        assert other.logprobs.token_logprobs[0] is None and other.logprobs.top_logprobs[0] is None
        np.testing.assert_allclose(other.logprobs.token_logprobs[1:], found.token_logprobs)
        assert other.logprobs.tokens[1:] == found.tokens
        greedy = all(a == max(t.values()) for a, t in zip(found.token_logprobs, found.top_logprobs))
        assert greedy == wanted.greedy[n]
        for own, name, top in zip(found.token_logprobs, found.tokens, found.top_logprobs):
            assert top[name] == own and 3 <= len(top) <= 4
            assert sum(map(math.exp, top.values())) < 1.00001
        weights = one.model_extra["xelm"]["weights"]
        assert sum(weights.values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("routing", ["learned", "posterior", "uniform"])
def test_every_router_weighs_a_prompt_as_the_ensemble_does(chatty, tiny, routing):
    ensemble = open_run(chatty).ensemble(routing)
    given = [*texts(tiny)[:3], long_text(tiny, ensemble)]
    prompts = [ensemble.tokenizer.encode([text])[0] for text in given]
    start = ensemble.tokenizer.start_id
    body = {"model": "xelm", "max_tokens": 0, "echo": True, "logprobs": 0, "prompt": given}
    with served(chatty, routing) as found:
        for language in (None, "es"):
            wanted = ensemble.likelihoods([[start]] * 4, prompts, [language] * 4)
            choices = found.post(body | {"language": language}).json()["choices"]
            nats = [-sum(choice["logprobs"]["token_logprobs"]) for choice in choices]
            np.testing.assert_allclose(nats, wanted.nats, rtol=1e-5)
            # "language", or for some texts "mixture", which the ensemble decides, too.
            begun = [[start, *ids] for ids in prompts]
            scored = finish(
                prompt_scoring.score_prompts(
                    ensemble, begun, [ensemble.router] * 4, [language] * 4, 0
                )
            )
            deciding = [one.router for one in scored]
            assert [choice["xelm"]["router"] for choice in choices] == deciding
            assert set(deciding) <= {"language"} if language else routing in deciding


def test_what_is_drawn_is_scored_as_it_is_read_again(client, ensemble, tiny):
    ids = [ensemble.tokenizer.start_id, *ensemble.tokenizer.encode([texts(tiny)[1]])[0]]
    for options in ({"temperature": 0}, {"temperature": 1.5, "seed": 3, "top_p": 0.9}):
        asked = {"model": "xelm", "prompt": ids, "max_tokens": 8, "logprobs": 5, **options}
        (drawn,) = client.completions.create(**asked).choices
        (echoed,) = client.completions.create(**asked, echo=True).choices
        found = drawn.logprobs
        assert echoed.text.endswith(drawn.text) and len(echoed.text) > len(drawn.text)
        assert echoed.logprobs.tokens[len(ids) :] == found.tokens
        assert len(found.tokens) == 8 or drawn.finish_reason == "stop"
        again = [*ids, *open_ids(ensemble, found.tokens)]
        (read,) = client.completions.create(
            model="xelm", prompt=again, max_tokens=0, echo=True, logprobs=5
        ).choices
        np.testing.assert_allclose(
            found.token_logprobs, read.logprobs.token_logprobs[len(ids) :], atol=1e-4
        )
        if not options["temperature"]:
            likeliest = [max(top, key=top.get) for top in found.top_logprobs]
            assert likeliest == found.tokens


def open_ids(ensemble, names):
    """The ids of tokens by their names."""
    from xelm.serving.openai_responses import TokenNames

    name = TokenNames(ensemble.tokenizer)
    known = {name(id)[0]: id for id in range(ensemble.tokenizer.size)}
    return [known[one] for one in names]


def test_a_stream_has_the_log_probabilities_of_the_whole(client, tiny):
    asked = {"model": "xelm", "prompt": texts(tiny)[0], "max_tokens": 8, "temperature": 0}
    asked |= {"logprobs": 2, "echo": True}
    (whole,) = client.completions.create(**asked).choices
    pieces = [part.choices[0] for part in client.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[0].text == texts(tiny)[0]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(piece.logprobs, name) for piece in pieces if piece.logprobs]
        assert list(itertools.chain(*parts)) == getattr(whole.logprobs, name)
    assert whole.logprobs.text_offset == sorted(whole.logprobs.text_offset)
    for offset, name in zip(whole.logprobs.text_offset, whole.logprobs.tokens):
        if not name.startswith("<"):
            assert whole.text[offset:].startswith(name.lstrip(" ") if offset == 0 else name)


def test_an_echo_without_log_probabilities_is_the_prompt(client, tiny):
    asked = {"model": "xelm", "prompt": texts(tiny)[0], "temperature": 0, "echo": True}
    (plain,) = client.completions.create(**asked, max_tokens=0).choices
    assert plain.text == texts(tiny)[0] and plain.logprobs is None
    (whole,) = client.completions.create(**asked, max_tokens=4).choices
    pieces = client.completions.create(**asked, max_tokens=4, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text
    assert whole.text.startswith(texts(tiny)[0]) and len(whole.text) > len(plain.text)


def test_where_nothing_is_routed_router_and_weights_are_null(server):
    body = {"model": "xelm", "prompt": "abc de", "max_tokens": 0}
    nothing = server.post(body).json()["choices"][0]["xelm"]
    assert nothing["router"] is None and nothing["weights"] is None
    streamed = server.post(body | {"stream": True}).text
    assert '"router": null, "weights": null' in streamed
    read = server.post(body | {"echo": True, "logprobs": 0}).json()["choices"][0]["xelm"]
    assert read["router"] and sum(read["weights"].values()) == pytest.approx(1, abs=0.01)
    start = server.scheduler.models.ensemble.tokenizer.start_id
    alone = body | {"prompt": [start], "echo": True, "logprobs": 0}
    assert server.post(alone).json()["choices"][0]["xelm"]["router"] is None


def test_log_probabilities_of_a_request_are_limited(server, monkeypatch):
    monkeypatch.setattr(openai_prompts, "MOST_LOG_PROBABILITIES", 2 * 4 * 3)
    body = {"model": "xelm", "prompt": [[5, 6, 7, 8]] * 2, "echo": True, "max_tokens": 0}
    assert server.post(body | {"logprobs": 2}).status_code == 200
    for more in ({"logprobs": 3}, {"logprobs": 2, "max_tokens": 1}, {"logprobs": 2, "n": 2}):
        answer = server.post(body | more)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "logprobs"
        assert "a request may ask for 24 log probabilities" in answer.json()["error"]["message"]
    assert server.post(body | {"max_tokens": 30}).status_code == 200  # none are wanted


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bodies_with_log_probabilities_are_not_built_in_the_event_loop(server, monkeypatch, stream):
    threads, build = set(), openai_responses.ResponseBodies._logprobs

    def noted(*given):
        threads.add(threading.current_thread().name)
        return build(*given)

    monkeypatch.setattr(openai_responses.ResponseBodies, "_logprobs", noted)
    body = {"model": "xelm", "prompt": "abc de", "echo": True, "max_tokens": 0, "logprobs": 1}
    assert server.post(body | {"stream": stream}).status_code == 200
    assert threads and all(name.startswith("AnyIO worker") for name in threads)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_nothing_that_grows_with_a_request_runs_in_the_event_loop(server, monkeypatch, stream):
    """Parsing, tokenising, looking at every id, detecting the language, and building the echo."""
    ran: dict[str, set[str]] = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def noted(*given, **options):
            ran.setdefault(name, set()).add(threading.current_thread().name)
            return original(*given, **options)

        monkeypatch.setattr(owner, name, noted)

    for name in ("encode", "begin", "decode", "chat"):
        watch(Tokenizer, name)
    watch(CompletionRequest, "model_validate_json")
    watch(ChatRequest, "model_validate_json")
    watch(ServedModels, "language_of")
    watch(openai_prompts, "canonical")
    watch(openai_prompts, "fault")
    watch(openai_prompts, "check_prompt")
    text = "abc de " * 4
    body = {"model": "xelm", "echo": True, "max_tokens": 0, "stream": stream, "language": "de"}
    assert server.post(body | {"prompt": text}).status_code == 200
    body |= {
        "language": None,
        "prompt": [server.scheduler.models.ensemble.tokenizer.start_id, 5, 6],
    }
    assert server.post(body | {"logprobs": 0}).status_code == 200
    chat = {"model": "xelm", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    assert server.post(chat | {"stream": stream}, "/v1/chat/completions").status_code == 200
    assert server.post({"model": "xelm", "prompt": text, "max_tokens": "1"}).status_code == 400
    named = {"encode", "begin", "decode", "chat", "model_validate_json"}
    named |= {"language_of", "canonical", "fault", "check_prompt"}
    assert named <= set(ran)
    for name, threads in ran.items():
        assert all(thread.startswith(("AnyIO worker", "scheduler")) for thread in threads), name


def test_a_prompt_is_tokenised_and_checked_once(server, monkeypatch):
    encoded, checked = [], []
    encode, check = Tokenizer.encode, openai_prompts.check_prompt

    def encode_noted(self, texts):
        encoded.extend(texts)
        return encode(self, texts)

    def check_noted(*given):
        checked.append(given)
        check(*given)

    monkeypatch.setattr(Tokenizer, "encode", encode_noted)
    for module in (openai_prompts, generation):
        monkeypatch.setattr(module, "check_prompt", check_noted)
    body = {"model": "xelm", "prompt": "abc de", "echo": True, "logprobs": 0, "max_tokens": 1}
    (choice,) = server.post(body).json()["choices"]
    assert choice["text"].startswith("abc de")
    assert (encoded.count("abc de"), len(checked)) == (1, 1)


def test_chats_have_them_too(client, tiny):
    messages = [{"role": "user", "content": texts(tiny)[1]}]
    asked = {"model": "xelm", "messages": messages, "max_tokens": 6, "temperature": 0}
    (whole,) = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices
    found = whole.logprobs.content
    assert found and all(token.top_logprobs[0].logprob == token.logprob for token in found)
    assert all(len(token.top_logprobs) == 2 for token in found)
    assert all(t.token in (bytes(t.bytes).decode(), f"<0x{t.bytes[0]:02X}>") for t in found)
    parts = client.chat.completions.create(**asked, logprobs=True, stream=True)
    told = [part.choices[0].logprobs for part in parts]
    streamed = [token for some in told if some for token in some.content]
    assert [t.logprob for t in streamed] == [t.logprob for t in found]
    assert all(t.top_logprobs == [] for t in streamed)
    (none,) = client.chat.completions.create(**asked).choices
    assert none.logprobs is None


def test_alternatives_are_limited_and_go_with_log_probabilities(server):
    body = {"model": "xelm", "prompt": "a", "logprobs": 21}
    assert server.post(body).json()["error"]["param"] == "logprobs"
    chat = {"model": "xelm", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}
    error = server.post(chat, "/v1/chat/completions").json()["error"]
    assert "top_logprobs: goes with logprobs=true" in error["message"]


@pytest.fixture(scope="module")
def task(tiny, tmp_path_factory):
    """Which of two continuations a text has: nine of them, in four languages."""
    folder, rows = tmp_path_factory.mktemp("task"), []
    for number in range(9):
        document = documents_of(tiny.held_out, LANGUAGES[number % 4])[number // 4]
        other = documents_of(tiny.held_out, LANGUAGES[number % 4])[5]
        choices = [document[20:30], other[20:30]]
        rows.append({"context": document[:20], "choices": choices, "label": number % 2})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


OPTIONS = {
    "ids": {"add_bos_token": True},
    "batches of ids": {"add_bos_token": True, "batch_size": 4},
    "side by side": {"add_bos_token": True, "num_concurrent": 4},
    "texts": {"tokenized_requests": False},
}


def over_http(server, directory, **options):
    """`lm_eval --model local-completions`, about this server."""
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="xelm",
        tokenizer=str(directory / "seed"),
        tokenizer_backend="huggingface",
        # It keeps a token free, and its last one is predicted and not read. Before text the server
        # puts the token that starts it.
        max_length=Harness(str(directory), "detected").max_length
        + (2 if options.get("tokenized_requests", True) else 1),
        max_retries=1,
        **options,
    )


def cut_between_words(harness, context, continuation):
    """A request that the client shortens between two words, and the request that is left. (Cut
    within a word, the text that it sends would have other tokens.)"""
    tokenizer, kept = harness.ensemble.tokenizer, harness.max_length
    words = context.split()
    for last in range(len(words), 0, -1):
        context = " ".join(words[:last])
        (ids,) = tokenizer.encode([context + continuation])
        left = tokenizer.decode(ids[-kept:])
        if len(ids) > kept and tokenizer.encode([left])[0] == ids[-kept:]:
            pairs = (context, continuation), (left.removesuffix(continuation), continuation)
            return [SimpleNamespace(args=pair) for pair in pairs]
    raise AssertionError("no context is cut between two words")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_harness_finds_the_same_likelihoods_over_http(chatty, server, tiny, options):
    documents = [documents_of(tiny.held_out, tag)[n] for n in range(2) for tag in LANGUAGES]
    requests = [SimpleNamespace(args=(text[:20], text[20:30])) for text in documents]
    ensemble = Harness(str(chatty), "detected")
    likeliest = ensemble.generate_until([SimpleNamespace(args=("ab", {"max_gen_toks": 3}))])
    requests.append(SimpleNamespace(args=("ab", likeliest[0])))
    # Longer than the rows in training.
    long = left = SimpleNamespace(args=(" ".join(documents), documents[0][:12]))
    if not options.get("tokenized_requests", True):
        long, left = cut_between_words(ensemble, *long.args)
    wanted = ensemble.loglikelihood([*requests, left], disable_tqdm=True)
    over = over_http(server, chatty, **options)
    found = over.loglikelihood([*requests, long], disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in wanted], rtol=1e-4)
    assert [bool(b) for _, b in found] == [b for _, b in wanted]
    assert {bool(b) for _, b in found} == {True, False}


def test_the_harness_reads_whole_texts_over_http_in_the_same_windows(chatty, server, tiny):
    wholes = [" ".join(documents_of(tiny.held_out, tag)[:3]) for tag in LANGUAGES]
    requests = [SimpleNamespace(args=(whole,)) for whole in wholes]
    ensemble = Harness(str(chatty), "detected")
    assert min(len(ensemble.tok_encode(r.args[0])) for r in requests) > 2 * ensemble.max_length
    wanted = ensemble.loglikelihood_rolling(requests, disable_tqdm=True)
    # With `add_bos_token` it would put the token before a text that has it already.
    over = over_http(server, chatty, add_bos_token=False)
    found = over.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("alternatives", [0, 3])
def test_a_long_prompt_is_scored_in_pieces_with_equal_values(
    ensemble, tiny, monkeypatch, alternatives
):
    """What is as wide as the vocabulary has the rows of a piece, however long the prompt is."""
    ids = [ensemble.tokenizer.start_id, *ids_of(ensemble, long_text(tiny, ensemble))]
    sizes, likeliest = [], prompt_scoring.likeliest

    def noted(mixture, *given):
        sizes.append(mixture.shape)
        return likeliest(mixture, *given)

    monkeypatch.setattr(prompt_scoring, "likeliest", noted)

    def scored():
        given = [ids], [ensemble.router], [None], alternatives
        return finish(prompt_scoring.score_prompts(ensemble, *given))[0].tokens[1:]

    whole = scored()
    assert sizes == [(64, ensemble.model.vocabulary_size)]
    monkeypatch.setattr(prompt_scoring, "PIECES", (16,))
    sizes.clear()
    pieces = scored()
    assert sizes == [(16, ensemble.model.vocabulary_size)] * 4
    assert [(t.token, [n for n, _ in t.top]) for t in pieces] == [
        (t.token, [n for n, _ in t.top]) for t in whole
    ]
    np.testing.assert_allclose(
        [t.log_probability for t in pieces], [t.log_probability for t in whole], rtol=1e-6
    )


@pytest.mark.slow
def test_the_harness_finds_the_same_figures_of_a_task_over_http(chatty, server, task):
    def figures(model):
        found = lm_eval.simple_evaluate(model=model, tasks=[dict(task)], bootstrap_iters=0)
        return {name: found["results"]["tiny"][name] for name in ("acc,none", "acc_norm,none")}

    wanted = figures(Harness(str(chatty), "detected"))
    assert figures(over_http(server, chatty, add_bos_token=True)) == wanted
    assert 0 < wanted["acc,none"] < 1
