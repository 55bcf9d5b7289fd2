"""What the server makes of HTTP itself: faults in JSON, content types, hosts, origins, fields."""

import json
import shutil

import httpx
import pytest
from pydantic import ValidationError
from serving import served
from shared import documents_of

from clustering.errors import UserError
from xelm import open_run
from xelm.serving import openai_prompts
from xelm.serving.openai_requests import IGNORED, ChatRequest, CompletionRequest, fault
from xelm.serving.origins import LOOPBACK, check_origins

BODY = {"model": "xelm", "prompt": "abc", "max_tokens": 1}
ORIGIN = "https://page.example"


def error_of(answer):
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/healthz/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_what_is_not_there_is_told_in_json(server, method, path, status):
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert error_of(answer)["type"] == (
        "not_found_error" if status == 404 else "invalid_request_error"
    )


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("application/json", 200),
        ("Application/JSON", 200),
        ("application/json; charset=UTF-8", 200),
        ('APPLICATION/JSON;CHARSET="utf-8"', 200),
        ("application/json; charset=latin-1", 415),
        ("text/plain", 415),
        ("", 415),
    ],
)
def test_a_content_type_is_read_in_any_case(server, given, status):
    answer = server.post(BODY, headers={"content-type": given})
    assert answer.status_code == status
    if status != 200:
        assert f"got Content-Type {given!r}" in error_of(answer)["message"]


def test_a_fault_of_the_server_is_told_in_json(server, monkeypatch, caplog):
    monkeypatch.setattr(openai_prompts, "check_prompt", lambda *given: 1 / 0)
    answer = server.post(BODY)
    assert answer.status_code == 500 and error_of(answer)["type"] == "server_error"
    assert "division" not in answer.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("elsewhere.example", False),
        ("localhost.elsewhere.example", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_names_of_this_machine_are_answered_without_a_key(local, host, known):
    answer = httpx.get(f"{local.url}/v1/models", headers={"host": host})
    assert answer.status_code == (200 if known else 400)
    if not known:
        assert f"does not answer under the host {host!r}" in error_of(answer)["message"]


@pytest.fixture(scope="module")
def local(chatty):
    with served(chatty, hosts=LOOPBACK, origins=[ORIGIN]) as found:
        yield found


def test_pages_of_the_origins_given_may_ask_and_no_others(local, server):
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    url = f"{local.url}/v1/completions"
    allowed = httpx.options(url, headers={"Origin": ORIGIN, **asked})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    other = httpx.options(url, headers={"Origin": "https://other.example", **asked})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    assert "origin" in error_of(other)["message"]
    for body, status in ((BODY, 200), (BODY | {"model": "none"}, 404), ({}, 400)):
        answer = local.post(body, headers={"Origin": ORIGIN})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert (
        "access-control-allow-origin"
        not in local.post(BODY, headers={"Origin": "https://other.example"}).headers
    )
    assert (
        "access-control-allow-origin" not in server.post(BODY, headers={"Origin": ORIGIN}).headers
    )


@pytest.mark.parametrize("header", ["x-stainless-lang", "openai-organization", "authorization"])
def test_pages_of_the_origins_given_may_send_any_header(local, header):
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": f"content-type,{header}",
    }
    allowed = httpx.options(f"{local.url}/v1/completions", headers=asked)
    assert allowed.status_code == 200
    assert header in allowed.headers["access-control-allow-headers"]


def test_an_origin_is_a_scheme_and_a_host():
    check_origins(["http://localhost:3000", "https://a.example"], key=False)
    check_origins(["*"], key=True)
    with pytest.raises(UserError, match="lets every web page use this server"):
        check_origins(["*"], key=False)
    for origin in ("example.org", "https://example.org/", "null", "https://", "", "http://[::1"):
        with pytest.raises(UserError, match="an origin is a scheme and a host"):
            check_origins([origin], key=True)


DONE = {"model", "n", "stream", "stream_options", "temperature", "top_p", "seed", "stop"}
DONE |= {"max_tokens", "prompt", "messages", "max_completion_tokens", "parallel_tool_calls"}
DONE |= {"echo", "logprobs", "top_logprobs"}
"""Fields of OpenAI's that do here what they do there."""
CHAT = {"model": "xelm", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 1}
OTHERS = {
    "best_of": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_object"},
    "verbosity": "low",
    "modalities": ["audio"],
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "function_call": {"name": "f"},
}
"""Values that would change the answer; of all other fields any value would."""


def fields_of_openai():
    import typing

    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    for kind, module in (
        (CompletionRequest, completion_create_params),
        (ChatRequest, chat_create_params),
    ):
        hints = typing.get_type_hints(module.CompletionCreateParamsNonStreaming)
        yield from ((kind, name) for name in sorted(hints))


@pytest.mark.parametrize(
    ("kind", "name"), list(fields_of_openai()), ids=lambda value: getattr(value, "__name__", value)
)
def test_every_field_of_openai_is_done_or_refused_by_name(server, kind, name):
    if name in DONE:
        assert name in kind.model_fields
        return
    path = "/v1/completions" if kind is CompletionRequest else "/v1/chat/completions"
    body = (BODY if kind is CompletionRequest else CHAT) | {name: OTHERS.get(name, "x")}
    answer = server.post(body, path)
    if name in IGNORED:
        assert answer.status_code == 200
        return
    assert answer.status_code == 400 and error_of(answer)["param"] == name
    assert name in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"made_up": 1}, "made_up is not supported; leave it out"),
        (
            {"presence_penalty": 0.5},
            "presence_penalty is not supported; leave it out or give 0; got 0.5",
        ),
        ({"stream_options": {"chunk": 1}}, "stream_options.chunk is not supported; leave it out"),
        ({"presence_penalty": 0.0, "frequency_penalty": 0, "best_of": 1, "suffix": ""}, None),
        (
            {"made_up": None, "logit_bias": {}, "user": "me", "response_format": {"type": "text"}},
            None,
        ),
    ],
)
def test_what_is_asked_for_anyway_is_no_fault(server, more, message):
    answer = server.post(BODY | more)
    if message is None:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 400 and error_of(answer)["message"] == message


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((CompletionRequest, "prompt", value) for value in ([True], [1.0], [[1, True]])),
        *((CompletionRequest, "logprobs", value) for value in (True, 1.0, "1")),
        *((CompletionRequest, "echo", value) for value in ("true", 1)),
        *((CompletionRequest, "best_of", value) for value in (True, 1.0)),
        *((ChatRequest, "logprobs", value) for value in ("true", 1)),
        (ChatRequest, "top_logprobs", True),
        (ChatRequest, "max_completion_tokens", True),
        *(
            (kind, field, value)
            for kind in (CompletionRequest, ChatRequest)
            for field, value in (
                ("max_tokens", True),
                ("max_tokens", "1"),
                ("n", True),
                ("top_k", True),
                ("seed", True),
                ("seed", 1.0),
                ("stream", "true"),
                ("stream", 1),
                ("stream_options", {"include_usage": "true"}),
                ("temperature", True),
                ("temperature", "1"),
                ("top_p", True),
                ("repetition_penalty", True),
                ("presence_penalty", False),
                ("min_tokens", 0.0),
                ("ignore_eos", 0),
                ("ignore_eos", 0.0),
            )
        ),
    ],
)
def test_a_value_of_another_json_type_is_refused(kind, field, value):
    body = (BODY if kind is CompletionRequest else CHAT) | {field: value}
    with pytest.raises(ValidationError) as refused:
        kind.model_validate_json(json.dumps(body))
    message, param = fault(refused.value)
    assert param == field and message.startswith(field) and "got" in message


def test_a_float_may_be_an_integer():
    floats = ("temperature", "top_p", "repetition_penalty", "presence_penalty", "min_p")
    given = dict.fromkeys(floats[:3], 1) | dict.fromkeys(floats[3:], 0)
    asked = CompletionRequest.model_validate_json(json.dumps(BODY | given))
    assert [getattr(asked, name) for name in floats[:3]] == [1.0] * 3


def test_a_type_that_is_wrong_is_answered_with_the_name_of_the_field(server):
    for more in ({"logprobs": True}, {"max_tokens": True}, {"prompt": [True]}, {"echo": "true"}):
        (name,) = more
        answer = server.post(BODY | more)
        assert answer.status_code == 400 and error_of(answer)["param"] == name


def test_an_answer_may_be_sent_back_as_a_message(server):
    said = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    body = CHAT | {"messages": [*CHAT["messages"], said | {"tool_calls": None}, *CHAT["messages"]]}
    assert server.post(body, "/v1/chat/completions").status_code == 200
    named = CHAT | {"messages": [{"role": "user", "content": "abc", "name": "me"}]}
    answer = server.post(named, "/v1/chat/completions")
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "messages.0.name is not supported; leave it out"


def test_a_router_hears_what_the_user_says_and_no_system_prompt(server, chatty, tiny):
    english, german = (documents_of(tiny.held_out, tag)[0] for tag in ("en", "de"))
    said = {"role": "user", "content": german[:15]}
    system = {"role": "system", "content": english[:30]}
    short = {"max_tokens": 1, "temperature": 0, "model": "xelm"}

    def asked(*messages):
        answer = server.post(short | {"messages": messages}, "/v1/chat/completions").json()
        return answer["choices"][0]["xelm"]

    alone, behind = asked(said), asked(system, said)
    assert behind["language"] == alone["language"] == "de"
    assert behind["weights"] == alone["weights"] and alone["weights"]["de-fr"] > 0.9
    assert asked(system)["language"] == "en"  # where the user says nothing
    ensemble = open_run(chatty).ensemble("detected")
    ours = ensemble.generate([system, said], max_new_tokens=1, temperature=0)
    assert ours.weights["de-fr"] == pytest.approx(behind["weights"]["de-fr"], abs=1e-3)


def test_values_for_a_chat_template_are_given_to_it_or_refused(chatty, tmp_path):
    directory = tmp_path / "RUN"
    shutil.copytree(chatty, directory)
    (directory / "seed" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %}a b c d{% endif %}"
        "{{ reasoning_effort }}{{ bos_token }}{% if tools %}t{% endif %}"
        "{% if not today is defined %}{% set today = 'e' %}{% endif %}{{ today }}"
        "{% set mine = 'f' %}{% generation %}{{ mine }}{% endgeneration %}{# comment #}"
        "{{ raise_exception('a b c d') if add_generation_prompt is not defined }}"
    )
    with served(directory) as found:

        def post(**more):
            return found.post(CHAT | more, "/v1/chat/completions")

        plain = post().json()["usage"]["prompt_tokens"]
        off = post(chat_template_kwargs={"enable_thinking": False}).json()["usage"]
        assert off["prompt_tokens"] > plain
        other = post(chat_template_kwargs={"today": "a b c d"}).json()["usage"]
        assert other["prompt_tokens"] > plain
        assert post(reasoning_effort="low").json()["usage"]["prompt_tokens"] > plain
        for more, name in (
            ({"chat_template_kwargs": {"made_up": 1}}, "made_up"),
            *(
                ({"chat_template_kwargs": {"enable_thinking": False, name: 1}}, name)
                for name in (
                    *("tokenize", "loop", "m", "messages", "conversation", "content", "mine"),
                    *("bos_token", "tools", "documents", "add_generation_prompt", "comment"),
                    *("raise_exception", "defined", "for", ""),
                )
            ),
        ):
            error = error_of(post(**more))
            assert error["param"] == "chat_template_kwargs"
            assert f"the seed's chat template does not use {name!r}" in error["message"]
