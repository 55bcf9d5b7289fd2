"""One endpoint over many experts: OpenAI's own client, unchanged, and what must not happen."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import ValidationError
from serving import served
from shared import LANGUAGES, NAMES, documents_of

from clustering.errors import UserError
from experts.registry import Registry
from xelm import open_run
from xelm.inference.sampling import Sampling
from xelm.runs.routers import Routing
from xelm.serving import app as app_module
from xelm.serving import desk as desk_module
from xelm.serving.app import Limits
from xelm.serving.desk import Busy, Closed, Ended, Failed, Piece, Ticket
from xelm.serving.offer import open_offer
from xelm.serving.protocol import ChatRequest, CompletionRequest
from xelm.serving.server import read_key

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPT = "abc de"


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """The tiny RUN, whose tokenizer has a template for chats."""
    directory = tmp_path_factory.mktemp("serving") / "RUN"
    shutil.copytree(tiny.directory, directory)
    (directory / "seed" / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def server(chatty):
    with served(chatty) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def ensemble(chatty):
    return open_run(chatty).ensemble("detected")


def german(tiny):
    return documents_of(tiny.held_out, "de")[0][:20]


def test_the_official_client_completes_as_the_ensemble_generates(client, ensemble, tiny):
    prompt = german(tiny)
    for options in ({"temperature": 0.0}, {"temperature": 1.3, "seed": 7, "top_p": 0.8}):
        answer = client.completions.create(model="xelm", prompt=prompt, max_tokens=12, **options)
        ours = {**options, "random_seed": options.pop("seed", 0)}
        ours.pop("seed", None)
        wanted = ensemble.generate(prompt, max_new_tokens=12, **ours)
        (choice,) = answer.choices
        assert choice.text == wanted.text
        assert answer.usage.completion_tokens == len(wanted.ids) + (choice.finish_reason == "stop")
        assert answer.usage.prompt_tokens == len(ensemble.tokenizer.begin(prompt))
        told = choice.model_extra["xelm"]
        assert told["language"] == "de"
        for name, weight in wanted.weights.items():
            assert told["weights"].get(name, 0.0) == pytest.approx(weight, abs=1e-3)


def test_each_model_can_be_asked_alone(client, chatty, tiny):
    run, prompt = open_run(chatty), german(tiny)
    names = [model.id for model in client.models.list()]
    assert names == ["xelm", *(f"xelm:{name}" for name in sorted(NAMES)), "xelm:seed", "xelm:dense"]
    assert client.models.retrieve("xelm:en-es").model_extra["version"] == "en-es@v1"
    for name in NAMES:
        answer = client.completions.create(
            model=f"xelm:{name}", prompt=prompt, max_tokens=8, temperature=0
        )
        alone = run.ensemble("fixed", weights={name: 1.0})
        wanted = alone.generate(prompt, max_new_tokens=8, temperature=0)
        assert answer.choices[0].text == wanted.text
        assert answer.choices[0].model_extra["xelm"]["weights"] == {name: 1.0}
    seed = run.ensemble("fixed", weights={"en-es": 1.0}, abstain=1.0, abstain_to="seed")
    assert seed.names[-1] == "seed"
    answer = client.completions.create(
        model="xelm:seed", prompt=prompt, max_tokens=8, temperature=0
    )
    assert answer.choices[0].model_extra["xelm"]["weights"] == {"seed": 1.0}


def test_a_stream_is_the_answer_in_pieces(client, tiny):
    asked = {
        "model": "xelm",
        "prompt": german(tiny),
        "max_tokens": 12,
        "seed": 1,
        "temperature": 2.0,
    }
    whole = client.completions.create(**asked)
    parts = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *pieces, usage = parts
    assert "".join(part.choices[0].text for part in pieces) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(pieces) > 3  # more than one, indeed
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({part.id for part in parts}) == 1
    told = pieces[-1].choices[0].model_extra["xelm"]
    assert told == whole.choices[0].model_extra["xelm"]
    for part in pieces:
        assert sum(part.choices[0].model_extra["xelm"]["weights"].values()) == pytest.approx(
            1.0, abs=0.01
        )


def test_chats_by_the_template(client, ensemble, tiny):
    words = german(tiny)
    messages = [
        {"role": "system", "content": words},
        {"role": "user", "content": [{"type": "text", "text": words}]},
    ]
    asked = {"model": "xelm", "messages": messages, "max_completion_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    plain = [{"role": "system", "content": words}, {"role": "user", "content": words}]
    ensemble.tokenizer.hub.chat_template = TEMPLATE
    wanted = ensemble.generate(plain, max_new_tokens=10, temperature=0)
    assert whole.choices[0].message.content == wanted.text
    assert whole.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted.text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_several_prompts_and_choices_come_in_order(client, ensemble, tiny):
    prompts = [documents_of(tiny.held_out, tag)[0][:15] for tag in LANGUAGES]
    answer = client.completions.create(
        model="xelm", prompt=prompts, n=2, max_tokens=6, temperature=0
    )
    assert [choice.index for choice in answer.choices] == list(range(8))
    for place, prompt in enumerate(prompts):
        wanted = ensemble.generate(prompt, max_new_tokens=6, temperature=0)
        for choice in answer.choices[2 * place : 2 * place + 2]:
            assert choice.text == wanted.text
    warm = client.completions.create(
        model="xelm", prompt=prompts[0], n=4, max_tokens=12, temperature=2, seed=1
    )
    assert len({choice.text for choice in warm.choices}) > 1


def test_a_prompt_may_be_ids(client, ensemble, tiny):
    ids = ensemble.tokenizer.encode([german(tiny)])[0]
    by_text = client.completions.create(
        model="xelm", prompt=german(tiny), max_tokens=6, temperature=0
    )
    for prompt in (ids, [ensemble.tokenizer.start_id, *ids], [ids]):
        by_ids = client.completions.create(model="xelm", prompt=prompt, max_tokens=6, temperature=0)
        assert by_ids.choices[0].text == by_text.choices[0].text


def test_what_is_not_said_is_as_the_seed_asks_and_differs_each_time(client, tiny):
    texts = {
        client.completions.create(model="xelm", prompt=german(tiny)).choices[0].text
        for _ in range(3)
    }
    assert len(texts) > 1
    answer = client.completions.create(model="xelm", prompt=german(tiny), temperature=0)
    assert answer.usage.completion_tokens <= Sampling().max_new_tokens


def test_stops_end_the_text(client, ensemble, tiny):
    asked = {"model": "xelm:de-fr", "prompt": german(tiny), "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[3:5]
    cut = client.completions.create(**asked, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    assert client.completions.create(**asked, stop=["~~", stop]).choices[0].text == cut.text


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "nobody", "prompt": "a"}, 404, "there is no model 'nobody'; there are: xelm, "),
        ({"prompt": "a"}, 400, "model is missing"),
        ({"model": "xelm"}, 400, "prompt is missing"),
        (
            {"model": "xelm", "prompt": "a", "temperature": -1},
            400,
            "temperature at least 0; got -1",
        ),
        (b'{"model": "xelm", "prompt": "a", "temperature": NaN}', 400, "finite number; got nan"),
        ({"model": "xelm", "prompt": "a", "top_p": 0}, 400, "top_p above 0 and at most 1; got 0"),
        ({"model": "xelm", "prompt": "a", "max_tokens": 0}, 400, "max_tokens: Input should be"),
        ({"model": "xelm", "prompt": "a", "max_tokens": 9999}, 400, "leaves this model of 64 room"),
        ({"model": "xelm", "prompt": "ab " * 100, "max_tokens": 4}, 400, "leaves this model of 64"),
        ({"model": "xelm", "prompt": "a", "n": 99}, 400, "n: Input should be less than or equal"),
        (
            {"model": "xelm", "prompt": "a", "stop": ["x"] * 5},
            400,
            "stop: wanted a text or at most",
        ),
        ({"model": "xelm", "prompt": "a", "stop": ""}, 400, "stop strings that are not empty"),
        ({"model": "xelm", "prompt": "a", "stop": "x" * 400_000}, 400, "of at most 256 characters"),
        ({"model": "xelm", "prompt": "a" * 100_000}, 400, "a prompt of 100,000 characters is long"),
        (
            {"model": "xelm", "prompt": "a", "response_format": {"type": "json_object"}},
            400,
            "response_format: Input should be 'text'",
        ),
        ({"model": "xelm", "prompt": {"a": 1}}, 400, "prompt: wanted a text, a list of ids, or"),
        ({"model": "xelm", "prompt": []}, 400, "prompt: wanted a text, a list of ids, or at most"),
        ({"model": "xelm", "prompt": [10**9]}, 400, "special token, 1000000000, for which"),
        ({"model": "xelm", "prompt": [-1]}, 400, "prompt: wanted a text, a list of ids"),
        (
            {"model": "xelm", "prompt": "a", "logprobs": 5},
            400,
            "logprobs: Input should be 0; got 5",
        ),
        ({"model": "xelm", "prompt": "a", "echo": True}, 400, "echo: Input should be False"),
        ({"model": "xelm", "prompt": "a", "language": "xx-yy-zz"}, 400, "unknown language code"),
        (b'{"model": "xelm", "prompt": "\xff\xfe"}', 400, "invalid unicode code point"),
        (b'{"model": "xelm", "prompt": "\\ud800"}', 400, "Invalid JSON"),
        (b'{"model": "xelm", "prompt": ', 400, "Invalid JSON"),
        (b"[1, 2]", 400, "Input should be an object"),
        ({"model": "xelm", "prompt": "a", "stop": ["x"] * 2_000_000}, 413, "may have 4,194,304"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_a_bad_request_is_refused_in_a_line(server, body, status, message):
    answer = server.post(body)
    error = answer.json()["error"]
    assert answer.status_code == status and message in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert str(server.desk.offer.ensemble.tokenizer.hub.name_or_path) not in answer.text


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (CompletionRequest, '"prompt": [-1'),
        (CompletionRequest, '"prompt": [[]'),
        (CompletionRequest, '"prompt": "a", "stop": [1'),
        (ChatRequest, '"messages": [{}'),
    ],
)
def test_of_a_million_faults_a_few_are_kept(kind, part):
    last = part[part.rindex("[") + 1 :] if not part.endswith("[]") else "[]"
    with pytest.raises(ValidationError) as refused:
        kind.model_validate_json(f'{{"model": "xelm", {part}' + f", {last}" * 100_000 + "]}")
    assert refused.value.error_count() < 10


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: wanted a list of messages with a role and a content of text; got []"),
        ([{"role": "tool", "content": "x"}], "roles are system, user and assistant; got 'tool'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages: wanted a list of"),
    ],
)
def test_a_bad_chat_is_refused_in_a_line(server, messages, message):
    body = {"model": "xelm", "messages": messages}
    answer = server.post(body, "/v1/chat/completions")
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_other_mistakes_of_http(server):
    assert httpx.get(f"{server.url}/nothing").status_code == 404
    answer = httpx.get(f"{server.url}/v1/completions")
    assert answer.status_code == 405 and "Method Not Allowed" in answer.json()["error"]["message"]
    plain = httpx.post(f"{server.url}/v1/completions", content=b"{}")
    assert plain.status_code == 415
    assert httpx.get(f"{server.url}/v1/models/xelm:none").status_code == 404


def test_an_empty_prompt_begins_a_text(client):
    answer = client.completions.create(model="xelm", prompt="", max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens == 1 and answer.usage.completion_tokens >= 1
    assert answer.choices[0].model_extra["xelm"]["language"] is None


def test_without_a_template_there_are_no_chats(tiny):
    with served(tiny.directory) as found:
        body = {"model": "xelm", "messages": [{"role": "user", "content": "a"}]}
        answer = found.post(body, "/v1/chat/completions")
        assert answer.status_code == 400
        wanted = "the seed has no chat template; use /v1/completions"
        assert answer.json()["error"]["message"] == wanted


def test_a_router_that_must_be_told_the_language(chatty, tiny):
    with served(chatty, "language") as found:
        body = {"model": "xelm", "prompt": german(tiny), "max_tokens": 4}
        refused = found.post(body)
        assert refused.status_code == 400
        assert "needs the language of the text" in refused.json()["error"]["message"]
        told = found.post(body | {"language": "deu"}).json()["choices"][0]["xelm"]
        assert told == {"language": "de", "weights": {"de-fr": 1.0}}
        alone = found.post(body | {"model": "xelm:en-es"}).json()["choices"][0]["xelm"]
        assert alone["weights"] == {"en-es": 1.0}


def test_only_who_has_the_key_is_answered(chatty, tmp_path, monkeypatch):
    with served(chatty, key="sesame") as found:
        right = found.client("sesame")
        assert right.completions.create(model="xelm", prompt="a", max_tokens=1).choices
        for wrong in ("sesam", "sesamee", "ѕesame"):
            headers = {"authorization": f"Bearer {wrong}".encode()}
            for path in ("/v1/models", "/metrics", "/v1/models/xelm"):
                answer = httpx.get(found.url + path, headers=headers)
                assert answer.status_code == 401, path
        with pytest.raises(openai.AuthenticationError, match="wants its API key"):
            found.client("sesam").completions.create(model="xelm", prompt="a")
        assert httpx.get(f"{found.url}/v1/models").status_code == 401
        assert httpx.get(f"{found.url}/healthz").status_code == 200
        assert httpx.get(f"{found.url}/").status_code == 200
    monkeypatch.delenv("XELM_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("XELM_API_KEY", "from the environment")
    assert read_key(None) == "from the environment"
    (tmp_path / "key").write_text("from a file\n")
    assert read_key(tmp_path / "key") == "from a file"
    (tmp_path / "key").write_text("clé")
    with pytest.raises(UserError, match="has characters that no header can: use ASCII"):
        read_key(tmp_path / "key")
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="holds no API key: it is empty"):
        read_key(tmp_path / "key")


def test_names_that_are_resolved_to_this_machine_are_not_answered(chatty):
    with served(chatty, hosts=app_module.LOOPBACK) as found:
        assert httpx.get(f"{found.url}/v1/models").status_code == 200
        headers = {"host": "elsewhere.example"}
        assert httpx.get(f"{found.url}/v1/models", headers=headers).status_code == 400


@pytest.fixture
def slow(monkeypatch):
    """Steps that take their time, so that texts are still under way; how long is at ["seconds"]."""
    step, pace = desk_module.Engine.step, {"seconds": 0.05}

    def slowed(self):
        time.sleep(pace["seconds"])
        return step(self)

    monkeypatch.setattr(desk_module.Engine, "step", slowed)
    return pace


def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_full_queue_refuses_and_what_was_taken_is_done(chatty, slow):
    limits = Limits(texts=2, waiting=3)
    with served(chatty, limits=limits) as found:
        body = {"model": "xelm", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}

        async def ask():
            async with httpx.AsyncClient(timeout=60) as http:
                url = f"{found.url}/v1/completions"
                return await asyncio.gather(*(http.post(url, json=body) for _ in range(9)))

        answers = asyncio.run(ask())
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200] * 5 + [429] * 4
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        texts = {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}
        assert len(texts) == 1
        # More than there will ever be places for: no use in trying again.
        never = found.post(body | {"n": 6})
        assert never.status_code == 400
        assert "a request may have 5 texts here, prompts times n; got 6" in never.text
        assert found.post(body | {"n": 5, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_whoever_leaves_frees_the_place(chatty, slow, stream):
    with served(chatty, limits=Limits(texts=1, waiting=4)) as found:
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 50, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with httpx.stream("POST", f"{found.url}/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
                    until(lambda: found.desk.running == 1)
                    raise httpx.ReadTimeout("enough")
            httpx.post(f"{found.url}/v1/completions", json=body, timeout=0.5)
        until(lambda: found.desk.running == 0, seconds=2.0)  # not after fifty steps
        assert found.post(body | {"max_tokens": 1, "stream": False}).status_code == 200


def test_metrics_know_who_left(chatty, slow):
    with served(chatty) as found:
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 50, "stream": True}
        with httpx.stream("POST", f"{found.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        with socket.create_connection(("127.0.0.1", int(found.url.rsplit(":", 1)[1]))) as half:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
            half.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())

        def told():
            text = httpx.get(f"{found.url}/metrics").text
            return dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")

        gone = 'xelm_requests_total{model="%s",status="499"}'
        until(lambda: told().get(gone % "xelm:seed") == told().get(gone % "unknown") == "1.0")
        assert not [name for name in told() if "_requests_total" in name and "499" not in name]
        assert float(told()['xelm_tokens_total{kind="completion"}']) >= 1


def test_whoever_leaves_the_queue_is_not_served(chatty, slow):
    with served(chatty, limits=Limits(texts=1, waiting=4)) as found:
        url = f"{found.url}/v1/completions"
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        first = threading.Thread(target=found.post, args=(body,))
        first.start()
        until(lambda: found.desk.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.3)
        until(lambda: found.desk.waiting == 0, seconds=1.0)
        assert found.desk.running == 1
        first.join()


def test_time_is_limited(chatty, slow):
    with served(chatty, limits=Limits(texts=1, seconds=0.5)) as found:
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 50, "temperature": 0}
        found.post(body | {"max_tokens": 1})  # compiled
        answer = found.post(body).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 1 <= answer["usage"]["completion_tokens"] < 20


@pytest.mark.parametrize(
    ("where", "name"), [("Engine", "step"), ("Engine", "add"), ("Reply", "add")]
)
def test_what_fails_fails_what_is_under_way_and_nothing_later(
    server, monkeypatch, capfd, where, name
):
    place, failing = getattr(desk_module, where), [True]
    right = getattr(place, name)

    def sometimes(*given, **more):
        if failing:
            failing.clear()
            raise RuntimeError("a step failed")
        return right(*given, **more)

    monkeypatch.setattr(place, name, sometimes)
    body = {"model": "xelm", "prompt": PROMPT, "max_tokens": 3}
    refused = server.post(body)
    assert refused.status_code == 500
    assert refused.json()["error"]["message"] == "continuing failed; try again"
    assert server.post(body).status_code == 200
    assert "a step failed" in capfd.readouterr().err


def test_metrics_count_what_was_asked_and_tell_nothing_of_it(chatty, tiny, capfd):
    with served(chatty) as found:
        secret = german(tiny)
        body = {"model": "xelm", "prompt": secret, "max_tokens": 5, "temperature": 0}
        used = [found.post(body).json()["usage"] for _ in range(2)]
        found.post(body | {"language": "sv", "model": "xelm"})
        found.post({"model": "made up", "prompt": secret})
        text = httpx.get(f"{found.url}/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert float(lines['xelm_requests_total{model="xelm",status="200"}']) == 2
        assert float(lines['xelm_requests_total{model="unknown",status="404"}']) == 1
        read = sum(usage["prompt_tokens"] for usage in used)
        drawn = sum(usage["completion_tokens"] for usage in used)
        assert float(lines['xelm_tokens_total{kind="prompt"}']) == read
        assert float(lines['xelm_tokens_total{kind="completion"}']) == drawn
        weights = {k: float(v) for k, v in lines.items() if k.startswith("xelm_routing_weight")}
        assert sum(weights.values()) == pytest.approx(drawn, abs=0.05)
        assert all('language="de"' in key for key in weights)
        assert float(lines["xelm_first_token_seconds_count"]) == 2
        assert float(lines["xelm_request_seconds_count"]) == 2
        assert float(lines["xelm_routing_entropy_bits_count"]) == 2
        assert float(lines['xelm_texts{state="running"}']) == 0
        assert float(lines['xelm_models_held{place="device"}']) >= 1
        assert secret not in text and "made up" not in text
    said = capfd.readouterr()
    assert secret not in said.out + said.err


def test_texts_join_and_leave_without_a_trace(server, ensemble, tiny):
    """Thirty requests at once, of different lengths and models: each as if it were alone."""
    documents = [
        documents_of(tiny.held_out, tag)[n][: 8 + n] for n in range(5) for tag in LANGUAGES
    ]
    models = ("xelm", "xelm:en-es", "xelm:de-fr")

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(
                *(
                    client.completions.create(
                        model=models[number % 3],
                        prompt=prompt,
                        max_tokens=4 + number % 7,
                        temperature=0,
                    )
                    for number, prompt in enumerate(documents)
                )
            )

    together = [answer.choices[0].text for answer in asyncio.run(ask())]
    client = server.client()
    for number, prompt in enumerate(documents):
        alone = client.completions.create(
            model=models[number % 3], prompt=prompt, max_tokens=4 + number % 7, temperature=0
        )
        assert together[number] == alone.choices[0].text


def ticket(desk, events, **changes):
    ids = desk.offer.ensemble.tokenizer.begin(PROMPT)
    given = {"model": "xelm", "ids": ids, "sampling": Sampling(max_new_tokens=4, temperature=0.0)}
    given |= {"tell": events.append, "until": time.monotonic() + 60}
    return Ticket(**{**given, **changes})


def test_a_desk_tells_everything_in_order(chatty):
    opener = partial(open_offer, open_run(chatty), Routing(name="detected"))
    desk = desk_module.Desk(opener(), most_texts=2, most_waiting=1, post=lambda call: call())
    events = []
    with pytest.raises(Busy):
        desk.submit([ticket(desk, events) for _ in range(4)])
    late = ticket(desk, gone := [], until=time.monotonic() - 1)
    desk.submit([late, ticket(desk, events), ticket(desk, lost := [], model="xelm:lost")])
    desk.start()
    until(lambda: events and isinstance(events[-1], Ended) and lost and gone)
    *pieces, end = events
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert end.tokens <= 4
    assert gone == [Failed(503, "its time was up while it waited")]
    assert lost == [Failed(404, "there is no model 'xelm:lost' any more")]
    desk.close()
    assert not desk.alive
    with pytest.raises(Closed):
        desk.submit([ticket(desk, events)])


def test_what_is_published_is_picked_up_and_nobody_is_dropped(chatty, tmp_path, slow, xelm, capfd):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    registry = directory / "registry.json"
    earlier = registry.read_bytes()
    assert xelm("grow", directory, "--language", "pt").code == 0
    later = registry.read_bytes()
    registry.write_bytes(earlier)
    with served(directory) as found:
        before = found.desk.offer
        client = found.client()
        client.completions.create(model="xelm:de-fr", prompt=PROMPT, max_tokens=2)  # compiled
        slow["seconds"] = 0.5
        stream = client.completions.create(
            model="xelm:de-fr", prompt=PROMPT, max_tokens=40, temperature=0, stream=True
        )
        pieces = [next(stream).choices[0].text]
        registry.write_bytes(later)
        found.watch.look()
        assert found.desk.offer is not before
        names = [model.id for model in client.models.list()]
        assert "xelm:pt" in names
        answer = client.completions.create(
            model="xelm:pt", prompt=PROMPT, max_tokens=2, temperature=0
        )
        assert answer.choices[0].model_extra["xelm"]["weights"] == {"pt": 1.0}
        # The one that began before goes on to its end, by the experts it began with.
        assert found.desk.running == 1
        slow["seconds"] = 0
        pieces += [part.choices[0].text for part in stream]
        again = client.completions.create(
            model="xelm:de-fr", prompt=PROMPT, max_tokens=40, temperature=0
        )
        assert "".join(pieces) == again.choices[0].text
        # Parameters that stay are there once, and nothing of the earlier offer is kept.
        until(lambda: len(found.desk._tables) == 1)
        held = found.desk.offer.ensemble.parameters.on_device
        assert len(held) == len(set(held))
        assert "now serving de-fr@v1, en-es@v1, pt@v1" in capfd.readouterr().err


def test_a_broken_expert_is_refused_until_it_is_whole(chatty, tmp_path, xelm, capfd, monkeypatch):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    with served(directory) as found:
        before = found.desk.offer
        asked = {"model": "xelm:de-fr", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        said = found.post(asked).json()["choices"][0]["text"]
        # A new version whose file is not what the registry says.
        assert xelm("grow", directory, "--language", "pt").code == 0
        file = directory / "experts" / "pt" / "v1" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 0xFF
        file.write_bytes(content)
        found.watch.look()
        assert found.desk.offer is before
        assert found.post(asked).json()["choices"][0]["text"] == said
        refusal = capfd.readouterr().err
        # Looked at again after a while, without a word; taken up when it is whole.
        found.watch.look()
        assert found.desk.offer is before
        monkeypatch.setattr(found.watch, "_again", 0.0)
        found.watch.look()
        assert found.desk.offer is before and capfd.readouterr().err == ""
        content[-5] ^= 0xFF
        file.write_bytes(content)
        monkeypatch.setattr(found.watch, "_again", 0.0)
        found.watch.look()
        assert "pt" in found.desk.offer.versions
        before = found.desk.offer
        assert "the changed registry is refused: pt@v1: changed: experts/pt/v1/model" in refusal
        # A registry that cannot be read at all.
        (directory / "registry.json").write_text("{")
        found.watch.look()
        assert found.desk.offer is before
        assert found.post(asked).status_code == 200
        text = httpx.get(f"{found.url}/metrics").text
        assert 'xelm_reloads_total{result="refused"} 2.0' in text


def test_a_new_version_and_rolling_it_back_are_picked_up(chatty, tmp_path, xelm):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    with served(directory) as found:
        asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}

        def said(model):
            return found.post(asked | {"model": model}).json()["choices"][0]["text"]

        before, first, other = found.desk.offer, said("xelm:de-fr"), said("xelm:en-es")
        assert first != other
        os.utime(directory / "registry.json")  # touched, and nothing else
        found.watch.look()
        assert found.desk.offer is before
        # A version that is en-es by its weights.
        registry = Registry.load(directory)
        shutil.copytree(directory / "experts/en-es/v1", directory / "experts/de-fr/v2")
        hashes = registry.expert("en-es").sha256
        registry.start("de-fr").publish("de-fr", 2, sha256=hashes, tokens=1).save(directory)
        found.watch.look()
        assert found.desk.offer.versions["de-fr"] == "de-fr@v2" and said("xelm:de-fr") == other
        assert xelm("rollback", directory, "de-fr").code == 0
        found.watch.look()
        assert found.desk.offer.versions == before.versions and said("xelm:de-fr") == first


def test_the_command_serves_and_stops_in_peace(chatty, tmp_path):
    """From outside: SIGTERM while a request runs, which is answered to its end."""
    environment = {**os.environ, "XELM_API_KEY": "k"}
    command = [sys.executable, "-m", "xelm", "serve", str(chatty), "--port", "0"]
    with subprocess.Popen(
        [*command, "--routing", "uniform"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("listening on "):
                break
        url = lines[-1].split()[-1]
        assert lines[-2].startswith("serving xelm, xelm:")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        stream = client.completions.create(
            model="xelm", prompt=PROMPT, max_tokens=40, stream=True, temperature=0
        )
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert first.id == rest[-1].id
        assert process.wait(timeout=60) == 0
        assert process.stderr.read().splitlines()[-1] == "stopped"


@pytest.mark.slow
def test_under_load_nothing_comes_back_that_was_not_asked_for(tiny):
    load = Path(__file__).parent.parent / "benchmarks" / "load.py"
    options = ("--clients", "16", "--seconds", "10", "--warm", "5")
    options += ("--characters", "30", "--tokens", "12")
    command = [sys.executable, str(load), str(tiny.directory), str(tiny.held_out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not asked for: 0" in done.stdout


def test_what_cannot_be_served_is_told_at_once(xelm, tiny, tmp_path):
    busy = socket.create_server(("127.0.0.1", 0))
    port = busy.getsockname()[1]
    refused = xelm("serve", tiny.directory, "--port", port)
    assert refused.code == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in refused.err
    busy.close()
    for options, message in (
        (("--port", 99999), "a port is between 0 and 65535; got 99999"),
        (("--max-texts", 0), "the limit of texts must be at least 1; got 0"),
        (("--max-seconds", "nan"), "the limit of seconds must be above 0; got nan"),
        (("--top-m", 9), "top_m must be between 1 and 2 experts; got 9"),
        (("--api-key-file", tmp_path / "none"), "none: No such file or directory"),
    ):
        refused = xelm("serve", tiny.directory, "--port", 0, *options)
        assert refused.code == 2 and message in refused.err
        assert len(refused.err.strip().splitlines()) == 1
    directory = tmp_path / "RUN"
    shutil.copytree(tiny.directory, directory)
    registry = json.loads((directory / "registry.json").read_text())
    registry["experts"] = []
    (directory / "registry.json").write_text(json.dumps(registry))
    refused = xelm("serve", directory, "--port", 0)
    assert refused.code == 2 and "has no published expert yet; run: xelm train" in refused.err
