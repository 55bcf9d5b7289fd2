"""Prompts that are only scored, or read to choose a vocabulary, are read in pieces between steps:
the values are those of prompts that are read at once. Counts of tokens; never a clock."""

import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from serving import served, until
from small_vocabularies import TEXTS, several
from test_engine import BUDGET, MODEL, pool, prompt  # noqa: F401

from xelm import open_run
from xelm.data.text_format import TextFormat
from xelm.inference.decoder import PIECES
from xelm.inference.engine import Engine
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.piecewise import PiecewiseScorer
from xelm.inference.prompt_scoring import score_prompts
from xelm.inference.routers import Posterior
from xelm.inference.routing import Routing
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.scoring import (
    final_states,
    score_documents,
    states_and_scores,
    target_log_probabilities,
)
from xelm.inference.vocabularies import Choice, choose
from xelm.inference.work import finish
from xelm.serving.batch import Failed, Finished, PromptScored, Request
from xelm.serving.limits import Limits
from xelm.serving.models import open_served_models
from xelm.serving.scheduler import Scheduler, ShuttingDown
from xelm.serving.scoring_queue import NoMemory, ScoringJob, ScoringQueue


def in_steps(scorer, work, most):
    """The result of some work, and the number of tokens that it read in each step."""
    steps = []
    while True:
        before, scorer.allowance.left = scorer.tokens_read, most
        try:
            next(work)
        except StopIteration as end:
            return end.value, [*steps, scorer.tokens_read - before]
        steps.append(scorer.tokens_read - before)


@pytest.mark.parametrize("measure", [target_log_probabilities, final_states, states_and_scores])
@pytest.mark.parametrize(
    ("start_id", "window", "stride"), [(1, 2048, None), (None, 2048, 1024), (None, 300, 150)]
)
def test_a_text_that_is_read_in_pieces_has_the_scores_of_one_read_at_once(
    pool,  # noqa: F811
    measure,
    start_id,
    window,
    stride,
):
    form = TextFormat(start_id=start_id, end_id=2, mask_id=None)
    options = {"text_format": form, "context_length": window, "stride": stride, "measure": measure}
    texts = [np.asarray(prompt(length, length), np.int64) for length in (5, 700, 0, 30, 65)]
    wanted = score_documents(MODEL, pool.parameters[0], texts, **options)
    scorer = PiecewiseScorer()
    work = scorer(MODEL, lambda: pool.parameters[0], texts, **options)
    found, steps = in_steps(scorer, work, BUDGET)
    for own, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)
    assert max(steps) <= BUDGET + PIECES[0] and len(steps) > 700 / BUDGET
    assert scorer.bytes == 0


@pytest.mark.parametrize("routing", ["uniform", "posterior"])
def test_a_prompt_that_is_scored_in_pieces_has_the_log_probabilities_of_one_read_at_once(
    pool,  # noqa: F811
    routing,
):
    if routing == "posterior":
        pool = replace(pool, router=Posterior(prior=np.log([0.4, 0.6])))
    pool = replace(pool, tokenizer=Framing())
    given = pool, [prompt(500, 1), prompt(9, 2)], [pool.router] * 2, [None] * 2, 3
    scorer = PiecewiseScorer()
    found, steps = in_steps(scorer, score_prompts(*given, scorer), BUDGET)
    assert max(steps) <= BUDGET + PIECES[0]
    for own, other in zip(found, finish(score_prompts(*given)), strict=True):
        assert [t.token for t in own.tokens] == [t.token for t in other.tokens]
        for values in ("log_probability", "top"):
            one, two = ([getattr(t, values) for t in each.tokens[1:]] for each in (own, other))
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([*own.weights.values()], [*other.weights.values()], rtol=1e-4)


class Framing:
    text_format = TextFormat(start_id=1, end_id=2, mask_id=None)

    def starts(self, ids):
        return 1


def test_a_vocabulary_that_is_chosen_in_pieces_is_the_one_that_is_chosen_at_once(
    tmp_path,
):
    made = several(tmp_path)
    router = Posterior(prior=np.log(np.full(3, 1 / 3)))
    ensemble = made.ensemble(router)
    texts = [text for some in TEXTS.values() for text in some[6:8]]
    prompts = [ensemble.tokenizer.begin(text) for text in texts]
    languages = [None] * len(prompts)
    choice, scorer = Choice(ensemble, prompts, languages), PiecewiseScorer()
    assert choice.reads
    found, steps = in_steps(scorer, choice.decide(scorer), PIECES[0])
    wanted = choose(ensemble, prompts, languages)
    assert len({id(one) for one in wanted}) > 1
    assert [id(one) for one in found] == [id(one) for one in wanted]
    assert max(steps) <= 2 * PIECES[0] and len(steps) > 3


def loaders_of(pool):  # noqa: F811
    return [partial(pool.parameters.__getitem__, number) for number in range(2)]


def job(pool, length, queue, ends, memory=None):  # noqa: F811
    """A job in a queue that scores a prompt of so many tokens."""
    given = pool, [prompt(length, length)], [pool.router], [None], 0
    made = ScoringJob(
        begin=partial(score_prompts, *given),
        tokens=length,
        done=lambda result: ends.append(length),
        failed=lambda error: ends.append(error),
        memory=memory,
    )
    queue.add(made)
    return made


def test_a_short_prompt_is_not_scored_after_a_long_one(pool):  # noqa: F811
    pool, queue, ends = replace(pool, tokenizer=Framing()), ScoringQueue(), []
    job(pool, 1500, queue, ends)
    queue.advance(BUDGET)
    job(pool, 20, queue, ends)
    for _ in range(6):
        assert 0 < queue.advance(BUDGET) <= BUDGET + 2 * PIECES[0]
    assert ends == [20] and len(queue) == 1
    while len(queue):
        queue.advance(BUDGET)
    assert ends == [20, 1500]


def test_whoever_leaves_while_a_prompt_is_read_leaves_no_memory_behind(pool):  # noqa: F811
    memory = ParameterCache(loaders_of(pool))
    pool = replace(pool, tokenizer=Framing(), parameters=memory)
    queue, ends = ScoringQueue(), []
    left = job(pool, 1500, queue, ends, memory)
    queue.advance(BUDGET)
    assert memory.reserved > 0
    queue.remove(left)
    assert memory.reserved == 0 and not len(queue) and ends == []


def test_prompts_for_which_there_is_no_memory_wait_and_fail_where_they_never_fit(pool):  # noqa: F811
    size = MODEL.parameter_count * 4
    slot = 2 * MODEL.layer_count * MODEL.key_head_count * MODEL.head_size * 4
    # One prompt of 1,000 tokens beside a model, but not two.
    memory = ParameterCache(loaders_of(pool), device_bytes=size + 1500 * slot, host_bytes=1e9)
    pool = replace(pool, tokenizer=Framing(), parameters=memory)
    queue, ends = ScoringQueue(), []
    for length in (1000, 900, 1900):
        job(pool, length, queue, ends, memory)
    for _ in range(2000):
        queue.advance(BUDGET)
    *scored, refused = ends
    assert sorted(scored) == [900, 1000] and isinstance(refused, NoMemory)
    assert "1900 tokens take more memory than" in str(refused)
    assert memory.reserved == 0


def request(scheduler, events, ids, **changes):
    given = {
        "model": "xelm",
        "ids": ids,
        "sampling": SamplingParams(max_new_tokens=40, temperature=0.0, random_seed=0),
        "on_event": events.append,
        "deadline": time.monotonic() + 300,
    }
    return Request(**{**given, **changes})


def test_a_server_reads_no_more_of_a_scored_prompt_between_two_steps_than_its_budget(
    chatty, monkeypatch
):
    opener = partial(open_served_models, open_run(chatty), Routing(name="posterior"))
    models, budget = opener(), 16
    tokenizer = models.ensemble.tokenizer
    ids = tokenizer.begin("abc de fgh " * 3)[:50]
    limits = Limits(prompt_tokens_per_step=budget)
    scheduler = Scheduler(models, limits, lambda call: call())
    read, between, drawn, events = [0], [], threading.Event(), []
    advance, step = ScoringQueue.advance, Engine.step

    def counted(self, tokens):
        before = sum(job.scorer.tokens_read for job in self._jobs)
        jobs = list(self._jobs)
        found = advance(self, tokens)
        read[0] += sum(job.scorer.tokens_read for job in jobs) - before
        return found

    def stepped(self, *given):
        found = step(self, *given)
        if found:
            drawn.set()
        between.append(read[0])
        read[0] = 0
        return found

    monkeypatch.setattr(ScoringQueue, "advance", counted)
    monkeypatch.setattr(Engine, "step", stepped)
    running = request(
        scheduler, deltas := [], tokenizer.begin("abc"), sampling=SamplingParams(max_new_tokens=60)
    )
    scored = {"alternatives": 1, "scores_prompt": True, "generates": False}
    scheduler.submit([running])
    scheduler.start()
    assert drawn.wait(120)
    scheduler.submit([request(scheduler, events, ids, **scored)])
    until(lambda: len(events) == 2, 120)
    scheduler.close()
    assert [type(event) for event in events] == [PromptScored, Finished]
    assert not any(isinstance(event, Failed) for event in deltas)
    some = [count for count in between if count]
    assert max(some) <= budget + PIECES[0]
    # Each of the experts read it, and those behind them that have weight.
    experts = models.ensemble.router.experts
    assert len(some) >= experts * len(ids) / (budget + PIECES[0])
    whole = finish(score_prompts(models.ensemble, [ids], [models.ensemble.router], [None], 1))
    np.testing.assert_allclose(
        [t.log_probability for t in events[0].likelihoods[1:]],
        [t.log_probability for t in whole[0].tokens[1:]],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_call_that_is_given_up_reads_no_further(chatty):
    opener = partial(open_served_models, open_run(chatty), Routing(name="uniform"))
    scheduler = Scheduler(opener(), Limits(), lambda call: call())
    closed, begun = threading.Event(), threading.Event()

    def endless(scorer):
        try:
            while True:
                begun.set()
                scorer.allowance.left -= 1
                yield
        finally:
            closed.set()

    scheduler.start()
    future = scheduler.call(endless, tokens=9)
    assert begun.wait(60)
    assert future.cancel()
    assert closed.wait(60)
    until(lambda: not len(scheduler._scoring))
    # At the end, whoever still waits is told so.
    begun.clear()
    left = scheduler.call(endless, tokens=9)
    assert begun.wait(60)
    scheduler.close()
    with pytest.raises(ShuttingDown):
        left.result(60)


def test_a_client_that_leaves_while_its_prompt_is_scored_stops_nobody(chatty, monkeypatch):
    with served(chatty, limits=Limits(prompt_tokens_per_step=16)) as found:
        body = {"model": "xelm", "prompt": "abc de fgh", "max_tokens": 3, "temperature": 0}
        wanted = found.post(body).json()["choices"][0]["text"]
        held, advance = threading.Event(), ScoringQueue.advance

        def nothing(self, tokens):
            held.set()
            return advance(self, -1)

        monkeypatch.setattr(ScoringQueue, "advance", nothing)
        client = found.client(timeout=1.0)
        with pytest.raises(Exception, match="timed out"):
            client.completions.create(**body, echo=True, logprobs=1)
        assert held.is_set()
        until(lambda: found.scheduler.running == 0)
        assert not len(found.scheduler._scoring)
        monkeypatch.setattr(ScoringQueue, "advance", advance)
        assert found.post(body).json()["choices"][0]["text"] == wanted
