"""What goes wrong while sequences are continued: memory that is short anywhere, experts without
probabilities, and texts that are read no further. Whoever is not concerned goes on as if alone."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from test_engine import BUDGET, GREEDY, Letters, account, one, pool, prompt, request, texts_of

from clustering.errors import UserError
from xelm.data.text_format import TextFormat
from xelm.inference import blocks, decoder
from xelm.inference.engine import Engine
from xelm.inference.generation import Generator, generate
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.routers import Fixed, Posterior, uniform
from xelm.inference.teaching import teach

__all__ = ["one", "pool"]  # fixtures

FEW = replace(GREEDY, max_new_tokens=10)


def test_a_kept_text_can_be_continued_whose_memory_is_needed_for_that(one):
    """Memory for two: the ended text gives up its place to the one that begins as it does."""
    engine = Engine(account(one, 2), keep=1)
    first = engine.add(request(prompt(40), 0, FEW))
    engine.step()
    engine.remove(first)
    engine.add(request(prompt(30, 1), 0, FEW))
    engine.step()
    again = engine.add(request(prompt(40), 0, FEW))
    for _ in range(4):
        engine.step()
    assert texts_of(one, [prompt(40)], replace(FEW, max_new_tokens=4)) == [again.ids[40:]]


@pytest.fixture
def fails_at(monkeypatch):
    """A function after which the device is out of memory at the allocation with this number, and
    which returns a list of all so far."""
    extender, seen, failing = decoder._extender, [], [-1]

    def limited(name, call):
        def run(*arguments, **options):
            seen.append(name)
            if len(seen) - 1 == failing[0]:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return call(*arguments, **options)

        return run

    for name in ("empty_block", "row_of", "_put"):
        monkeypatch.setattr(blocks, name, limited(name, getattr(blocks, name)))
    monkeypatch.setattr(decoder, "_extender", lambda *given: limited("call", extender(*given)))

    def start(number):
        seen.clear()
        failing[0] = number
        return seen

    return start


@pytest.mark.parametrize(
    ("limited", "every"),
    [(True, 11), (False, 17), pytest.param(True, 1, marks=pytest.mark.slow)],
)
def test_out_of_memory_at_any_allocation_fails_one_text_at_most(one, fails_at, limited, every):
    own = account(one, 1000) if limited else one
    prompts = [prompt(20), prompt(70, 1), [*prompt(20), *prompt(50, 2)], prompt(25, 3)]
    few = replace(GREEDY, max_new_tokens=4)
    wanted = texts_of(one, prompts, few)

    def run():
        generator, failed = Generator(own, prompt_tokens=BUDGET, keep=2), []
        found = [generator.add(request(ids, 0, few)) for ids in prompts[:3]]
        for _ in range(200):
            if len(generator.running) < 2 and len(found) < len(prompts):
                found.append(generator.add(request(prompts[-1], 0, few)))
            generator.step()
            failed += generator.take_failed()
            if not generator.running and len(found) == len(prompts):
                break
        kept = generator.engine.decoders[0]
        kept.drop_kept()
        assert kept.bytes == 0
        return found, failed

    seen = fails_at(-1)
    assert run()[1] == []
    names = list(seen)
    assert set(names) == {"empty_block", "row_of", "_put", "call"}
    for number in range(0, len(names), every):
        fails_at(number)
        found, failed = run()
        assert len(failed) <= 1 and all(isinstance(error, MemoryError) for _, error in failed)
        gone = [continuation for continuation, _ in failed]
        for continuation, ids in zip(found, wanted):
            if continuation not in gone:
                assert list(continuation.detokenizer.ids) == ids, (number, names[number])
    if limited:
        assert isinstance(own.parameters, ParameterCache) and own.parameters.reserved == 0


@pytest.fixture(scope="module")
def broken(pool):
    """The pool whose second expert computes no numbers, as where one is too large for its dtype."""
    broken = jax.tree.map(lambda p: np.full_like(p, np.nan), pool.parameters[1])
    return replace(pool, parameters=[pool.parameters[0], broken])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("routing", ["uniform", "posterior"])
def test_an_expert_without_probabilities_is_an_error_of_its_texts_alone(
    broken, routing, temperature
):
    router = uniform(2) if routing == "uniform" else Posterior(prior=np.log([0.5, 0.5]))
    given = replace(broken, router=router)
    sampling = replace(FEW, temperature=temperature)
    generator, failed = Generator(given), []
    first = Fixed(weights=np.asarray([0.0, -np.inf]))
    good = generator.add(request(prompt(9), 0, sampling), first)
    bad = generator.add(request(prompt(12, 1), 0, sampling))
    while generator.running:
        generator.step()
        failed += generator.take_failed()
    message = "b: no probabilities (NaN or infinity) after 12 tokens"
    assert [(one, str(error)) for one, error in failed] == [(bad, message)]
    assert isinstance(failed[0][1], FloatingPointError)
    alone = replace(given, router=first)
    assert [list(good.detokenizer.ids)] == texts_of(alone, [prompt(9)], sampling)
    with pytest.raises(UserError, match=r"prompt 1: b: no probabilities \(NaN or infinity\)"):
        generate(given, [request(prompt(12, 1), 0, sampling)])


class Framing(Letters):
    text_format = TextFormat(start_id=1, end_id=2)


@pytest.mark.parametrize("routing", ["uniform", "posterior"])
def test_texts_are_not_scored_by_an_expert_without_probabilities(broken, routing):
    router = uniform(2) if routing == "uniform" else Posterior(prior=np.log([0.5, 0.5]))
    given = replace(broken, router=router, tokenizer=Framing())
    with pytest.raises(UserError, match=r"b: no probabilities \(NaN or infinity\) in document 1"):
        given.likelihoods([prompt(9)], [[7, 8]])


def test_nothing_is_taught_by_an_expert_without_probabilities(broken):
    given = replace(broken, tokenizer=Framing())
    with pytest.raises(UserError, match=r"the mixture: no probabilities .* in document 1"):
        teach(given, [np.asarray(prompt(9))], 3)


@dataclass(frozen=True)
class ByLength:
    """All weight has the second expert while a text has so many tokens, otherwise the first."""

    second: range
    experts: int = 2
    memory: float = 1.0

    def start(self, language):
        return np.ones(1)  # the start token is not counted

    def terms(self, before, ids):
        return np.ones((len(ids), 1))

    def needs_log_likelihoods(self, states):
        return np.zeros(len(states), bool)

    def log_weights(self, states, log_likelihoods):
        second = np.isin(states[:, 0].astype(int), self.second)
        with np.errstate(divide="ignore"):
            return np.log(np.stack([~second, second], axis=1).astype(float))

    def decided_by(self, states):
        return ["length"] * len(states)


def test_no_text_waits_for_one_that_its_expert_reads_no_more(pool):
    """Another text begins in the same way, but its expert has lost its weight there."""
    engine = Engine(replace(pool, router=ByLength(range(60, 1000))), prompt_tokens=BUDGET)
    first = engine.add(request(prompt(50)))
    while len(first.ids) < 100:
        engine.step()
    second = engine.add(request(first.ids[:90]), ByLength(range(0)))
    for _ in range(4):
        engine.step()
    assert second.new_tokens > 0


def test_a_prompt_without_tokens_is_refused(one):
    with pytest.raises(UserError, match="the prompt has no tokens, and nothing can follow it"):
        generate(one, [request([])])
