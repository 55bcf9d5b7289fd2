"""What a step computes: prompts in pieces, texts in blocks of few slots, beginnings read once, and
memory for the oldest first. Counts of tokens, slots and programs; never a clock."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hub_models import random_tokens

from clustering.errors import UserError
from xelm.inference import blocks, decoder, repetition
from xelm.inference.blocks import block_bytes, grouped
from xelm.inference.decoder import LEAST_SHARED, PIECES, Decoder
from xelm.inference.engine import Engine
from xelm.inference.ensemble import Ensemble
from xelm.inference.generation import Generator, check_prompt, generate
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.route import CONTEXT
from xelm.inference.routers import Posterior, uniform
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.models.config import ModelConfig
from xelm.models.parameters import for_inference, fresh_parameters

MODEL = ModelConfig(
    vocabulary_size=97,
    width=32,
    feedforward_width=48,
    layer_count=2,
    head_count=4,
    key_head_count=2,
    head_size=8,
    max_length=2048,
)
EXPERTS, BUDGET = 2, 64
GREEDY = SamplingParams(max_new_tokens=1000, temperature=0.0)


class Letters:
    end_ids = frozenset()

    def starts(self, ids):
        return 1

    def decode(self, ids):
        return "".join(chr(0x100 + int(number)) for number in ids)


@pytest.fixture(scope="module")
def pool():
    experts = [
        jax.tree.map(lambda p: np.asarray(4.0 * p), for_inference(fresh_parameters(MODEL, seed)))
        for seed in range(EXPERTS)
    ]
    return Ensemble(
        names=["a", "b"],
        model=MODEL,
        parameters=experts,
        router=uniform(EXPERTS),
        tokenizer=Letters(),  # ty: only what generating needs
    )


@pytest.fixture(scope="module")
def one(pool):
    """The pool of one expert."""
    return replace(pool, names=["a"], parameters=pool.parameters[:1], router=uniform(1))


@pytest.fixture
def calls(monkeypatch):
    """Rows, slots and columns of each call of a model."""
    found, call = [], Decoder._call

    def counted(self, block, unread, size, scored):
        found.append((len(block.texts), block.slots, size))
        return call(self, block, unread, size, scored)

    monkeypatch.setattr(Decoder, "_call", counted)
    return found


def prompt(length, seed=0):
    return random_tokens((length,), seed=seed).tolist()


def request(ids, number=0, sampling=GREEDY):
    return GenerationRequest(ids=ids, sampling=sampling, number=number)


def texts_of(pool, prompts, sampling):
    return [list(found.ids) for found in generate(pool, [request(p, 0, sampling) for p in prompts])]


def tokens_read(engine):
    return sum(each.tokens_read for each in engine.decoders.values())


@pytest.mark.parametrize("routing", ["uniform", pytest.param("posterior", marks=pytest.mark.slow)])
def test_a_long_prompt_is_read_in_pieces_while_others_draw_a_token_each_step(pool, routing):
    if routing == "posterior":
        pool = replace(pool, router=Posterior(prior=np.log([0.4, 0.6])))
    prompts = [prompt(9, 1), prompt(700, 2), prompt(5, 3)]
    engine = Engine(pool, prompt_tokens=BUDGET)
    short = [engine.add(request(ids)) for ids in (prompts[0], prompts[2])]
    engine.step()
    long, steps = engine.add(request(prompts[1])), 0
    while not long.new_tokens:
        before = tokens_read(engine)
        drawn = [sequence for sequence, *_ in engine.step()]
        steps += 1
        assert all(sequence in drawn for sequence in short)
        # Beside one token of each text by each expert, no more than the budget, but for a piece.
        assert tokens_read(engine) - before <= BUDGET + PIECES[0] + 3 * EXPERTS
    assert 700 * EXPERTS / BUDGET <= steps <= 700 * EXPERTS / PIECES[0] + 1
    for _ in range(4):
        engine.step()
    # All is what it is where each is generated alone and its prompt read at once.
    for sequence, ids in zip([short[0], long, short[1]], prompts):
        new = replace(GREEDY, max_new_tokens=sequence.new_tokens)
        assert texts_of(pool, [ids], new) == [sequence.ids[len(ids) :]]


def test_a_short_prompt_does_not_wait_for_a_long_one(one):
    engine = Engine(one, prompt_tokens=BUDGET)
    for _ in range(3):
        engine.add(request(prompt(4)))
    engine.step()
    engine.add(request(prompt(1500, 1)))
    engine.step()
    short = engine.add(request(prompt(20, 2)))
    engine.step()
    engine.step()
    assert short.new_tokens >= 1


def test_a_long_text_costs_short_ones_nothing_while_it_is_there_or_after(one, calls):
    """Blocks that a step computes: of 16 short texts alone, beside one of 1,500, and after it."""

    def step():
        calls.clear()
        engine.step()
        return sorted(calls)

    engine = Engine(one, prompt_tokens=40 * BUDGET)
    for number in range(16):
        engine.add(request(prompt(8, number)))
    engine.step()
    assert step() == [(16, 64, 1)]
    long = engine.add(request(prompt(1500, 99)))
    while not long.new_tokens:
        assert [call for call in step() if call[2] == 1] == [(16, 64, 1)]
    assert step() == [(1, 2048, 1), (16, 64, 1)]
    engine.remove(long)
    assert len(engine.sequences[0].ids) < 60 and step() == [(16, 64, 1)]


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        # Every block costs what its parameters do: without any, each text has the slots it needs.
        (0, [(64, "ab"), (128, "c"), (1024, "d")]),
        # 2 texts times 64 empty slots are cheaper than parameters of 128 slots.
        (128, [(128, "abc"), (1024, "d")]),
        (127, [(64, "ab"), (128, "c"), (1024, "d")]),
        (3 * 896, [(1024, "abcd")]),
    ],
)
def test_texts_share_a_block_where_its_empty_slots_are_fewer_bytes_than_parameters(
    parameters, wanted
):
    needed = {"a": 64, "b": 64, "c": 128, "d": 1024}
    found = [
        (slots, "".join(texts))
        for slots, texts in grouped(needed, lambda count: 2.0 * count, 2.0 * parameters)
    ]
    assert found == wanted


def test_texts_of_many_lengths_need_few_programs(one, calls):
    """Pieces are read in one shape for each number of slots, whoever else is there."""
    engine = Engine(one, prompt_tokens=BUDGET)
    draw = np.random.default_rng(0)
    for number in range(30):
        if len(engine.sequences) == 8:
            engine.remove(engine.sequences[int(draw.integers(8))])
        engine.add(request(prompt(int(draw.integers(1, 300)), number)))
        for _ in range(int(draw.integers(1, 4))):
            engine.step()
    pieces = {call for call in calls if call[2] > 1}
    tokens = {call for call in calls if call[2] == 1}
    assert {rows for rows, *_ in pieces} <= {1, 4} and {rows for rows, *_ in tokens} <= {1, 4, 8}
    assert len(pieces) <= 12 and len(tokens) <= 12


@pytest.mark.parametrize("routing", ["uniform", "posterior"])
def test_the_beginning_that_texts_share_is_read_once(pool, routing):
    if routing == "posterior":
        pool = replace(pool, router=Posterior(prior=np.log([0.4, 0.6])))
    begin = prompt(200)
    prompts = [begin, begin, [*begin, *prompt(30, 1)], [*begin[:150], *prompt(20, 2)]]
    engine = Engine(pool, prompt_tokens=BUDGET)
    sequences = [engine.add(request(ids)) for ids in prompts]
    while not all(sequence.new_tokens for sequence in sequences):
        engine.step()
    drawn = sum(sequence.new_tokens - 1 for sequence in sequences)
    new = 200 + 1 + (1 + 30) + (1 + 20)
    # A few of the end may be read again, rather than be waited for.
    assert 0 <= tokens_read(engine) - EXPERTS * (new + drawn) <= 3 * EXPERTS * LEAST_SHARED
    # And each is continued as it is alone.
    found, weights = engine.next_log_probabilities()
    for number, sequence in enumerate(engine.drawing):
        alone = Engine(pool)
        single = alone.add(request(sequence.ids))
        wanted, wanted_weights = alone.next_log_probabilities()
        np.testing.assert_allclose(found[sequence.row], wanted[single.row], atol=1e-4)
        np.testing.assert_allclose(weights[number], wanted_weights[0], atol=1e-4)


@pytest.mark.parametrize("routing", ["uniform", "posterior"])
def test_the_next_turn_of_a_chat_reads_only_what_is_new(pool, routing):
    if routing == "posterior":
        pool = replace(pool, router=Posterior(prior=np.log([0.4, 0.6])))
    engine = Engine(pool, prompt_tokens=BUDGET, keep=2)
    first = engine.add(request(prompt(100)))
    for _ in range(40):
        engine.step()
    engine.remove(first)
    before = tokens_read(engine)
    ids = [*first.ids, *prompt(20, 5)]
    second = engine.add(request(ids))
    while not second.new_tokens:
        distribution, weights = engine.next_log_probabilities()
        if second in engine.drawing:
            engine.append(second, int(np.argmax(distribution[second.row])))
    assert tokens_read(engine) - before <= EXPERTS * (20 + 2)
    alone = Engine(pool)
    single = alone.add(request(ids))
    wanted, wanted_weights = alone.next_log_probabilities()
    np.testing.assert_allclose(distribution[second.row], wanted[single.row], atol=1e-4)
    np.testing.assert_allclose(weights, wanted_weights, atol=1e-4)


def test_a_text_that_ends_is_kept_only_where_that_is_wanted(one):
    for keep, wanted in ((0, 0), (1, 1)):
        engine = Engine(one, keep=keep)
        for number in range(3):
            sequence = engine.add(request(prompt(40, number)))
            engine.step()
            engine.remove(sequence)
        kept = engine.decoders[0]
        assert kept.bytes == wanted * block_bytes(MODEL, 1, 64, "float32")


def account(pool, texts, slots=64):
    """The pool with memory for its parameters and so many texts of one block each."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pool.parameters[0]))
    size = max(size, 4 * MODEL.parameter_count)
    more = texts * block_bytes(MODEL, 1, slots, "float32")
    loaders = [lambda each=each: each for each in pool.parameters]
    return replace(pool, parameters=ParameterCache(loaders, device_bytes=size + more))


def test_texts_for_which_there_is_no_memory_wait_for_older_ones(one):
    few, sampling = account(one, 2), replace(GREEDY, max_new_tokens=6)
    prompts = [prompt(20, number) for number in range(4)]
    generator = Generator(few, prompt_tokens=BUDGET)
    found = [generator.add(request(ids, 0, sampling)) for ids in prompts]
    order = []
    while generator.running:
        for continuation, *_ in generator.step():
            if continuation.finish_reason:
                order.append(found.index(continuation))
        assert not generator.take_failed()
        assert few.parameters.reserved <= 2 * block_bytes(MODEL, 1, 64, "float32")
    assert sorted(order) == [0, 1, 2, 3] and order[0] == 0
    assert few.parameters.reserved == 0
    assert [list(one.detokenizer.ids) for one in found] == texts_of(one, prompts, sampling)


def test_the_text_that_came_last_gives_way_to_one_that_grows(one):
    """Memory for three blocks of 64 slots: the older text needs two of them after 63 tokens."""
    few, sampling = account(one, 3), replace(GREEDY, max_new_tokens=30)
    prompts = [prompt(50, 1), prompt(20, 2)]
    generator = Generator(few, prompt_tokens=BUDGET)
    found = [generator.add(request(ids, 0, sampling)) for ids in prompts]
    while generator.running:
        generator.step()
        assert not generator.take_failed()
    assert [list(one.detokenizer.ids) for one in found] == texts_of(one, prompts, sampling)


def test_texts_of_two_pools_with_one_memory_do_not_wait_for_each_other(one):
    """Each has what the other needs to grow; in the end both have grown."""
    few, sampling = account(one, 3), replace(GREEDY, max_new_tokens=30)
    prompts = [prompt(50, 1), prompt(50, 2)]
    generators = [Generator(few, prompt_tokens=BUDGET) for _ in prompts]
    found = [g.add(request(ids, 0, sampling)) for g, ids in zip(generators, prompts)]
    for _ in range(100):
        for generator in generators:
            generator.step()
            assert not generator.take_failed()
    assert [list(one.detokenizer.ids) for one in found] == texts_of(one, prompts, sampling)


def test_a_text_that_no_longer_fits_alone_fails_with_figures(one):
    generator = Generator(account(one, 2), prompt_tokens=BUDGET)
    generator.add(request(prompt(50), 0, replace(GREEDY, max_new_tokens=100)))
    failed = []
    while generator.running:
        generator.step()
        failed += generator.take_failed()
    message = "the keys and values of 65 tokens, by each expert that reads them, take more than the"
    assert len(failed) == 1 and str(failed[0][1]).startswith(message)


def test_a_text_that_can_never_fit_is_refused_with_figures(one):
    few = account(one, 2)
    check_prompt(few, prompt(20), 60)
    with pytest.raises(UserError, match=r"values of 220 tokens take 0\.00 GB of memory; beside"):
        check_prompt(few, prompt(20), 200)


def test_out_of_memory_fails_the_text_that_needs_most_and_no_other(one, monkeypatch):
    extender = decoder._extender

    def limited(model, dtype):
        extend = extender(model, dtype)

        def run(parameters, tokens, counts, cache, logits, *, scored):
            if cache.keys[0].shape[2] > 256:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return extend(parameters, tokens, counts, cache, logits, scored=scored)

        return run

    monkeypatch.setattr(decoder, "_extender", limited)
    sampling = replace(GREEDY, max_new_tokens=20)
    prompts = [prompt(20, 1), prompt(600, 2), prompt(30, 3)]
    generator, failed = Generator(one, prompt_tokens=BUDGET), []
    found = [generator.add(request(ids, 0, sampling)) for ids in prompts]
    while generator.running:
        generator.step()
        failed += generator.take_failed()
    assert [continuation for continuation, _ in failed] == [found[1]]
    assert str(failed[0][1]) == "the device is out of memory (600 tokens)"
    monkeypatch.setattr(decoder, "_extender", extender)
    wanted = texts_of(one, [prompts[0], prompts[2]], sampling)
    assert [list(each.detokenizer.ids) for each in (found[0], found[2])] == wanted


def test_a_step_looks_at_new_ids_alone(one, monkeypatch):
    """However long the text is: routers get its end, and penalties what was added."""

    class Counting(type(one.router)):
        __slots__ = ()

        def terms(self, before, ids):
            seen.append((len(before), len(ids)))
            return super().terms(before, ids)

    seen, added = [], []

    add = repetition._added

    def counted(table, part):
        added.append(len(part))
        return add(table, part)

    monkeypatch.setattr(repetition, "_added", counted)
    engine = Engine(replace(one, router=Counting(weights=np.zeros(1))))
    engine.add(request(prompt(900), 0, replace(GREEDY, repetition_penalty=1.3)))
    engine.step()
    assert seen == [(0, 899)] and added == [1024]
    del seen[:], added[:]
    for _ in range(3):
        engine.step()
    assert seen == [(CONTEXT, 1)] * 3 and added == [1] * 3


def test_pieces_behind_long_texts_are_small_and_cost_more(one):
    reader = Decoder(MODEL, lambda: one.parameters[0])
    text = reader.open(prompt(2000))
    assert reader.piece(text, 2000) == PIECES[-1]
    costs = []
    for length in (0, 200, 1900):
        text.ids = prompt(length)
        costs.append(reader.cost(text))
    assert costs == sorted(costs) and costs[0] >= 1 and costs[2] > 4 * costs[0]
    text.ids = prompt(2000) * 3
    assert reader.piece(text, 2000) == PIECES[-2]
    assert blocks.slots_for(len(text.ids)) * PIECES[-1] > decoder.SCORES_A_PIECE
