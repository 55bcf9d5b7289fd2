"""One endpoint over many experts: OpenAI's own client, unchanged, and what must not happen."""

import json
import re

import httpx
import openai
import pytest
from pydantic import ValidationError
from serving import served
from shared import LANGUAGES, NAMES, documents_of

from clustering.errors import UserError
from xelm import Routing, open_run
from xelm.inference.sampling_params import SamplingParams
from xelm.serving.openai_requests import ChatRequest, CompletionRequest
from xelm.serving.origins import LOOPBACK
from xelm.serving.server import read_key


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
        alone = run.ensemble(Routing(name="fixed", weights={name: 1.0}))
        wanted = alone.generate(prompt, max_new_tokens=8, temperature=0)
        assert answer.choices[0].text == wanted.text
        assert answer.choices[0].model_extra["xelm"]["weights"] == {name: 1.0}
    seed = run.ensemble(
        Routing(name="fixed", weights={"en-es": 1.0}, abstain=1.0, abstain_to="seed")
    )
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
    assert answer.usage.completion_tokens <= SamplingParams().max_new_tokens


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
            "temperature must be at least 0 and at most 1000; got -1",
        ),
        (b'{"model": "xelm", "prompt": "a", "temperature": NaN}', 400, "finite number; got nan"),
        (
            {"model": "xelm", "prompt": "a", "top_p": 0},
            400,
            "top_p must be above 0 and at most 1; got 0",
        ),
        ({"model": "xelm", "prompt": "a", "max_tokens": -1}, 400, "max_tokens: Input should be"),
        (
            {"model": "xelm", "prompt": "a", "max_tokens": 9999},
            400,
            "leaves this model of 64 space",
        ),
        ({"model": "xelm", "prompt": "ab " * 100, "max_tokens": 4}, 400, "leaves this model of 64"),
        ({"model": "xelm", "prompt": "a", "n": 99}, 400, "n: Input should be less than or equal"),
        (
            {"model": "xelm", "prompt": "a", "stop": ["x"] * 17},
            400,
            "stop: wanted a text or at most",
        ),
        (
            {"model": "xelm", "prompt": "a", "stop": ""},
            400,
            "stop must be strings that are not empty",
        ),
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
            {"model": "xelm", "prompt": "a", "logprobs": -1},
            400,
            "logprobs: Input should be greater than or equal to 0; got -1",
        ),
        ({"model": "xelm", "prompt": "a", "echo": "perhaps"}, 400, "echo: Input should be a valid"),
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
    assert str(server.scheduler.models.ensemble.tokenizer.hub.name_or_path) not in answer.text


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
        wanted = {"language": "de", "language_from": "request", "router": "language"}
        assert told == {**wanted, "weights": {"de-fr": 1.0}}
        alone = found.post(body | {"model": "xelm:en-es"}).json()["choices"][0]["xelm"]
        assert alone["weights"] == {"en-es": 1.0}


@pytest.mark.parametrize("routing", ["learned", "detected", "uniform"])
def test_a_language_that_is_told_is_routed_by_and_named(chatty, tiny, routing):
    """German text said to be Spanish, by each endpoint, streamed too, and said to be Swedish."""
    chat = {"messages": [{"role": "user", "content": german(tiny)}]}
    with served(chatty, routing) as found:

        def told(language, path="/v1/completions", **more):
            body = {"model": "xelm", "max_tokens": 3, "temperature": 0, **more}
            body |= chat if path.endswith("chat/completions") else {"prompt": german(tiny)}
            body |= {} if language is None else {"language": language}
            answer = found.post(body, path)
            if not more:
                return answer.json()["choices"][0]["xelm"]
            pieces = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            return next(p for p in reversed(pieces) if "xelm" in p["choices"][0])["choices"][0][
                "xelm"
            ]

        for path in ("/v1/completions", "/v1/chat/completions"):
            for more in ({}, {"stream": True}):
                spanish = told("spa", path, **more)
                by = {"language": "es", "language_from": "request", "router": "language"}
                assert spanish == {**by, "weights": {"en-es": 1.0}}
                heard = told(None, path, **more)
                by = {"language": "de", "language_from": "detector", "router": routing}
                assert {k: v for k, v in heard.items() if k != "weights"} == by
        nobody = told("sv")
        mixed = routing in ("learned", "detected")  # which notice what nobody serves
        by = {"language": "sv", "language_from": "request"}
        by |= {"router": "mixture" if mixed else routing}
        assert {k: v for k, v in nobody.items() if k != "weights"} == by
        assert (
            {"seed", "dense"} <= set(nobody["weights"])
            if mixed
            else (nobody["weights"] == told(None)["weights"])
        )
        # Counted by languages that are known here, however many tags requests make up.
        for made_up in ("sv", "ja", "en-ZW", "x-a"):
            told(made_up)
        text = httpx.get(f"{found.url}/metrics").text
        labels = set(re.findall(r'xelm_routing_weight_total\{language="([^"]*)"', text))
        assert labels <= {"de", "es", "en", "other"} and {"de", "es", "other"} <= labels
        refused = found.post({"model": "xelm", "prompt": "a", "language": "nonsense!"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "language"


def test_only_who_has_the_key_is_answered(chatty, tmp_path, monkeypatch):
    with served(chatty, key="sesame") as found:
        right = found.client("sesame")
        assert right.completions.create(model="xelm", prompt="a", max_tokens=1).choices
        for wrong in ("sesam", "sesamee", "ѕesame"):
            headers = {"authorization": f"Bearer {wrong}".encode()}
            for path in ("/v1/models", "/metrics", "/v1/models/xelm"):
                answer = httpx.get(found.url + path, headers=headers)
                assert answer.status_code == 401, path
        with pytest.raises(openai.AuthenticationError, match="requires its API key"):
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
    for key in ("clé".encode(), b"\xff\xfe", b"one\ntwo"):
        (tmp_path / "key").write_bytes(key)
        with pytest.raises(UserError, match="has characters that no header can have: use ASCII"):
            read_key(tmp_path / "key")
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="contains no API key: it is empty"):
        read_key(tmp_path / "key")


def test_names_that_are_resolved_to_this_machine_are_not_answered(chatty):
    with served(chatty, hosts=LOOPBACK) as found:
        assert httpx.get(f"{found.url}/v1/models").status_code == 200
        headers = {"host": "elsewhere.example"}
        assert httpx.get(f"{found.url}/v1/models", headers=headers).status_code == 400
