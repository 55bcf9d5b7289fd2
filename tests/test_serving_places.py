"""Who is served, who waits and who has left: places, limits, the desk, metrics."""

import asyncio
import socket
import threading
import time
from functools import partial

import httpx
import openai
import pytest
from serving import served, until
from shared import LANGUAGES, documents_of

from xelm import open_run
from xelm.inference import generation
from xelm.inference.routing import Routing
from xelm.inference.sampling_params import SamplingParams
from xelm.serving import desk as desk_module
from xelm.serving.desk import Busy, Closed, Ended, Failed, Piece, Read, Ticket
from xelm.serving.limits import Limits
from xelm.serving.offer import open_offer

PROMPT = "abc de"


def german(tiny):
    return documents_of(tiny.held_out, "de")[0][:20]


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
    ("where", "name"), [("Engine", "step"), ("Engine", "add"), ("Detokenizer", "add")]
)
def test_what_fails_fails_what_is_under_way_and_nothing_later(
    server, monkeypatch, capfd, where, name
):
    place, failing = getattr(generation, where), [True]
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
        found.post(body | {"language": "xx-yy-zz"})  # refused
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


def test_texts_join_and_leave_without_a_trace(server, tiny):
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
    given = {
        "model": "xelm",
        "ids": ids,
        "sampling": SamplingParams(max_new_tokens=4, temperature=0.0),
    }
    given |= {"tell": events.append, "until": time.monotonic() + 60}
    return Ticket(**{**given, **changes})


def test_prompts_that_are_being_scored_count_as_running(chatty, monkeypatch):
    opener = partial(open_offer, open_run(chatty), Routing(name="detected"))
    desk = desk_module.Desk(opener(), most_texts=2, most_waiting=0, post=lambda call: call())
    score, begun, go_on = desk_module.score_prompts, threading.Event(), threading.Event()

    def held(*given):
        begun.set()
        assert go_on.wait(60)
        return score(*given)

    monkeypatch.setattr(desk_module, "score_prompts", held)
    scored = {"alternatives": 1, "scores_prompt": True, "draws": False}
    events = []
    desk.submit([ticket(desk, events, **scored) for _ in range(2)])
    desk.start()
    assert begun.wait(60)
    assert desk.running == 2
    with pytest.raises(Busy):
        desk.submit([ticket(desk, [])])
    go_on.set()
    until(lambda: len(events) == 4 and desk.running == 0)
    assert [type(event) for event in events] == [Read, Ended] * 2
    desk.close()


def test_prompts_are_scored_in_smaller_parts_while_others_are_continued(chatty, monkeypatch):
    opener = partial(open_offer, open_run(chatty), Routing(name="detected"))
    desk = desk_module.Desk(opener(), most_texts=9, most_waiting=0, post=lambda call: call())
    score, parts, now = desk_module.score_prompts, [], time.monotonic()
    ids = desk.offer.ensemble.tokenizer.begin(PROMPT)

    def noted(ensemble, limits, texts, *given):
        parts.append(len(texts))
        if len(parts) == 1:  # between two parts whoever has left or is late is looked at
            left.cancelled, late.until = True, now - 1
        return score(ensemble, limits, texts, *given)

    monkeypatch.setattr(desk_module, "score_prompts", noted)
    monkeypatch.setattr(desk_module, "TOKENS_SCORED_BESIDE", 2 * len(ids))
    scored = {"alternatives": 1, "scores_prompt": True, "draws": False}
    one, two, left, late, last = (ticket(desk, [], **scored) for _ in range(5))
    gone = []
    late.tell = gone.append
    last.tell = (ends := []).append
    desk.submit(
        [ticket(desk, [], sampling=SamplingParams(max_new_tokens=50)), one, two, left, late]
    )
    desk.submit([last])
    desk.start()
    until(lambda: any(isinstance(event, Ended) for event in ends), seconds=30)
    desk.close()
    assert parts == [2, 1] and gone == [Failed(503, desk_module.LATE)]


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
