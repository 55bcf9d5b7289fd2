"""The scheduler: requests that run, wait, fail or are cancelled; limits; metrics."""

import asyncio
import socket
import threading
import time
from functools import partial

import httpx
import numpy as np
import openai
import pytest
from serving import served, until
from shared import LANGUAGES, documents_of

from xelm import open_run
from xelm.inference.engine import Engine
from xelm.inference.routing import Routing
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.sequence import Detokenizer
from xelm.serving import batch as batch_module
from xelm.serving.batch import Failed, Finished, PromptScored, Request, TextDelta
from xelm.serving.limits import Limits
from xelm.serving.models import open_served_models
from xelm.serving.scheduler import QueueFull, Scheduler, ShuttingDown

PROMPT = "abc de"


def german(tiny):
    return documents_of(tiny.held_out, "de")[0][:20]


@pytest.mark.slow
def test_a_full_queue_refuses_and_what_was_taken_is_done(chatty, slow):
    limits = Limits(max_sequences=2, max_waiting=3)
    with served(chatty, limits=limits) as found:
        body = {"model": "xelm", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}

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
        assert "a request may have 5 sequences, prompts times n; got 6" in never.text
        assert found.post(body | {"n": 5, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_disconnects_frees_its_place(chatty, slow, stream):
    slow["seconds"] = (
        0.3  # all steps would take longer than a busy machine keeps the client waiting
    )
    with served(chatty, limits=Limits(max_sequences=1, max_waiting=4)) as found:
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 50, "stream": stream}
        body |= {"temperature": 0}  # drawn tokens may end the text at once
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with httpx.stream("POST", f"{found.url}/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()  # held: to let go of it closes the connection
                    next(lines)
                    until(lambda: found.scheduler.running == 1)
                    raise httpx.ReadTimeout("enough")
            httpx.post(f"{found.url}/v1/completions", json=body, timeout=0.5)
        until(lambda: found.scheduler.running == 0, seconds=2.0)  # not after fifty steps
        assert found.post(body | {"max_tokens": 1, "stream": False}).status_code == 200


def test_metrics_count_clients_that_disconnect(chatty, slow):
    with served(chatty) as found:
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 50, "stream": True}
        body |= {"temperature": 0}
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


@pytest.mark.slow
def test_a_client_that_disconnects_leaves_the_queue(chatty, slow):
    with served(chatty, limits=Limits(max_sequences=1, max_waiting=4)) as found:
        url = f"{found.url}/v1/completions"
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        first = threading.Thread(target=found.post, args=(body,))
        first.start()
        until(lambda: found.scheduler.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.3)
        until(lambda: found.scheduler.waiting == 0, seconds=1.0)
        assert found.scheduler.running == 1
        first.join()


def test_time_is_limited(chatty, slow):
    with served(chatty, limits=Limits(max_sequences=1, max_seconds=0.5)) as found:
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 50, "temperature": 0}
        found.post(body | {"max_tokens": 1})  # compiled
        answer = found.post(body).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 1 <= answer["usage"]["completion_tokens"] < 20


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Engine, "step"), (Engine, "add"), (Detokenizer, "add")],
)
def test_what_fails_fails_what_is_under_way_and_nothing_later(
    server, monkeypatch, capfd, owner, name
):
    failing, right = [True], getattr(owner, name)

    def sometimes(*given, **more):
        if failing:
            failing.clear()
            raise RuntimeError("a step failed")
        return right(*given, **more)

    monkeypatch.setattr(owner, name, sometimes)
    body = {"model": "xelm", "prompt": PROMPT, "max_tokens": 3}
    refused = server.post(body)
    assert refused.status_code == 500
    assert refused.json()["error"]["message"] == "generation failed; try again"
    assert server.post(body).status_code == 200
    assert "a step failed" in capfd.readouterr().err


def test_what_fails_does_not_fail_what_waits(chatty, monkeypatch, capfd):
    right, failing = Engine.step, [True]
    with served(chatty, limits=Limits(max_sequences=1)) as found:

        def step(self, *given):
            if failing:
                until(lambda: found.scheduler.waiting == 1)
                failing.clear()
                raise RuntimeError("a step failed")
            return right(self, *given)

        monkeypatch.setattr(Engine, "step", step)
        body = {"model": "xelm:seed", "prompt": PROMPT, "max_tokens": 3}
        statuses: list[int] = []
        posts = [
            threading.Thread(target=lambda: statuses.append(found.post(body).status_code))
            for _ in range(2)
        ]
        for post in posts:
            post.start()
        for post in posts:
            post.join()
    assert sorted(statuses) == [200, 500]
    assert "a step failed" in capfd.readouterr().err


def test_only_weights_that_round_to_zero_are_left_out_of_an_answer():
    found = batch_module._weights_by_name(["a", "b", "c"], np.array([0.99966, 0.0003, 0.00004]))
    assert found == {"a": 0.9997, "b": 0.0003}


def test_metrics_count_requests_and_contain_no_text(chatty, tiny, capfd):
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
        assert float(lines['xelm_sequences{state="running"}']) == 0
        assert float(lines['xelm_models_loaded{place="device"}']) >= 1
        assert secret not in text and "made up" not in text
    said = capfd.readouterr()
    assert secret not in said.out + said.err


@pytest.mark.slow
def test_sequences_join_and_leave_without_a_trace(server, tiny):
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


def request_for(scheduler, events, **changes):
    ids = scheduler.models.ensemble.tokenizer.begin(PROMPT)
    given = {
        "model": "xelm",
        "ids": ids,
        "sampling": SamplingParams(max_new_tokens=4, temperature=0.0),
    }
    given |= {"on_event": events.append, "deadline": time.monotonic() + 60}
    return Request(**{**given, **changes})


def test_prompts_that_are_being_scored_count_as_running(chatty, monkeypatch):
    opener = partial(open_served_models, open_run(chatty), Routing(name="detected"))
    scheduler = Scheduler(opener(), Limits(max_sequences=2, max_waiting=0), lambda call: call())
    score, begun, go_on = batch_module.score_prompts, threading.Event(), threading.Event()

    def held(*given):
        begun.set()
        assert go_on.wait(60)
        return (yield from score(*given))

    monkeypatch.setattr(batch_module, "score_prompts", held)
    scored = {"alternatives": 1, "scores_prompt": True, "generates": False}
    events = []
    scheduler.submit([request_for(scheduler, events, **scored) for _ in range(2)])
    scheduler.start()
    assert begun.wait(60)
    assert scheduler.running == 2
    with pytest.raises(QueueFull):
        scheduler.submit([request_for(scheduler, [])])
    with pytest.raises(QueueFull):
        scheduler.call(naming)
    go_on.set()
    until(lambda: len(events) == 4 and scheduler.running == 0)
    assert [type(event) for event in events] == [PromptScored, Finished] * 2
    scheduler.close()


def naming(_):
    """A computation that pauses once, and says in which thread it goes on."""
    yield
    return threading.current_thread().name


def failing(_):
    yield
    return 1 // 0


def test_prompts_are_scored_in_smaller_parts_while_others_are_continued(chatty, monkeypatch):
    opener = partial(open_served_models, open_run(chatty), Routing(name="detected"))
    models, score, parts, now = opener(), batch_module.score_prompts, [], time.monotonic()
    ids = models.ensemble.tokenizer.begin(PROMPT)
    limits = Limits(max_sequences=9, max_waiting=0, prompt_tokens_per_step=2 * len(ids))
    scheduler = Scheduler(models, limits, lambda call: call())

    def noted(*given):
        parts.append(len(given[1]))
        return later(*given)

    def later(*given):
        # Nothing is read yet. Before the next step whoever has left or is late is looked at.
        left.cancelled, late.deadline = True, now - 1
        yield
        return (yield from score(*given))

    monkeypatch.setattr(batch_module, "score_prompts", noted)
    drawing = threading.Event()
    scored = {"alternatives": 1, "scores_prompt": True, "generates": False}
    one, two, left, late, last = (request_for(scheduler, [], **scored) for _ in range(5))
    gone = []
    late.on_event = gone.append
    last.on_event = (ends := []).append
    scheduler.submit(
        [
            request_for(
                scheduler,
                [],
                sampling=SamplingParams(max_new_tokens=50),
                on_event=lambda event: drawing.set(),
            ),
        ]
    )
    scheduler.start()
    assert drawing.wait(60)
    with scheduler._changed:  # all of them come between two steps
        scheduler._queue += [one, two, left, late, last]
    until(lambda: any(isinstance(event, Finished) for event in ends), seconds=30)
    scheduler.close()
    assert parts == [2, 2, 1] and gone == [Failed(503, batch_module.LATE)]


def test_a_request_whose_prompt_is_not_read_in_time_fails(chatty):
    models = open_served_models(open_run(chatty), Routing(name="detected"))
    scheduler = Scheduler(models, Limits(), lambda call: call())  # whose thread does not run
    (batch,) = scheduler._batches
    for seconds in (60, -1):
        batch.add(request_for(scheduler, [], deadline=time.monotonic() + seconds))
    batch.remove_abandoned()
    assert [event for _, event in scheduler._events] == [Failed(503, batch_module.LATE)]
    assert len(batch) == 1
    # Where its text has begun, it ends with the next token.
    batch.step()
    batch.requests[0].deadline = time.monotonic() - 1
    batch.remove_abandoned()
    assert len(batch) == 1
    batch.close()


def test_the_scheduler_delivers_all_events_in_order(chatty):
    opener = partial(open_served_models, open_run(chatty), Routing(name="detected"))
    scheduler = Scheduler(opener(), Limits(max_sequences=2, max_waiting=1), lambda call: call())
    events = []
    with pytest.raises(QueueFull):
        scheduler.submit([request_for(scheduler, events) for _ in range(4)])
    late = request_for(scheduler, gone := [], deadline=time.monotonic() - 1)
    scheduler.submit(
        [
            late,
            request_for(scheduler, events),
            request_for(scheduler, lost := [], model="xelm:lost"),
        ]
    )
    scheduler.start()
    until(lambda: events and isinstance(events[-1], Finished) and lost and gone)
    *pieces, end = events
    assert all(isinstance(piece, TextDelta) for piece in pieces)
    assert end.tokens <= 4
    assert gone == [Failed(503, "the time limit passed while the request waited")]
    assert lost == [Failed(404, "the model 'xelm:lost' is no longer served")]
    scored = {"alternatives": 1, "scores_prompt": True, "generates": False}
    scheduler.submit([request_for(scheduler, unscored := [], model="xelm:lost", **scored)])
    until(lambda: unscored)
    assert unscored == lost
    # What has models read is called in its thread, where they belong, and raises here.
    assert scheduler.call(naming).result(60) == "scheduler"
    with pytest.raises(ZeroDivisionError):
        scheduler.call(failing).result(60)
    scheduler.close()
    assert not scheduler.alive
    with pytest.raises(ShuttingDown):
        scheduler.submit([request_for(scheduler, events)])
    with pytest.raises(ShuttingDown):
        scheduler.call(naming)
