"""Random requests that begin alike, repeat, are given up at any moment and lack memory: every text
is what it is alone, and all memory is free in the end."""

import random
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_ensemble import EXPERTS, PRIOR, Hesitant
from test_engine import MODEL, Letters

from xelm.inference.blocks import block_bytes
from xelm.inference.ensemble import Ensemble
from xelm.inference.generation import Generator
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.routers import Posterior, uniform
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.models.parameters import for_inference, fresh_parameters

ROUTERS = {
    "uniform": uniform(EXPERTS),
    "posterior": Posterior(prior=PRIOR),
    "hesitant": Hesitant(),
}
LOCAL = {"local_window": 24, "local_layers": (0,)}


class Ending(Letters):
    end_ids = frozenset([3])


def pool_with(router, shape):
    model = replace(MODEL, width=16, feedforward_width=24, head_count=2, key_head_count=1, **shape)
    experts = [
        jax.tree.map(lambda p: np.asarray(6.0 * p), for_inference(fresh_parameters(model, seed)))
        for seed in range(EXPERTS)
    ]
    return Ensemble(
        names=["a", "b", "c"],
        model=model,
        parameters=experts,
        router=router,
        tokenizer=Ending(),  # ty: only what generating needs
    )


def requests_by(draw, count):
    """Prompts at and beside the borders of blocks and pieces, many of which begin alike."""

    def ids(length):
        return [draw.randrange(4, MODEL.vocabulary_size) for _ in range(length)]

    begins = [ids(length) for length in (1, 20, 63, 64, 65, 130)]

    def request():
        begin = draw.choice(begins)
        begin = begin[: draw.choice([len(begin), len(begin), max(1, len(begin) // 2), 1])]
        sampling = SamplingParams(
            max_new_tokens=draw.choice([1, 2, 5, 20]),
            temperature=draw.choice([0.0, 0.1, 0.8, 1.3]),
            top_p=draw.choice([1.0, 0.95, 0.3]),
            top_k=draw.choice([None, 1, 5, 40, 80]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
            random_seed=draw.randrange(5),
        )
        more = ids(draw.choice([0, 0, 1, 5, 15, 16, 17, 47, 100, 190]))
        return GenerationRequest(ids=begin + more, sampling=sampling, number=draw.randrange(3))

    return [request() for _ in range(count)]


def alone(pool, request):
    generator = Generator(pool)
    continuation = generator.add(request)
    while generator.running:
        generator.step()
    return list(continuation.detokenizer.ids)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("routing", "shape", "blocks", "count"),
    [
        ("uniform", {}, 40, 32),
        pytest.param("uniform", {}, 40, 400, marks=slow),
        pytest.param("posterior", {}, 40, 400, marks=slow),
        pytest.param("posterior", {}, 1000, 400, marks=slow),
        pytest.param("hesitant", {}, 40, 400, marks=slow),
        pytest.param("uniform", LOCAL, 60, 400, marks=slow),
    ],
)
def test_whoever_comes_and_leaves_every_text_is_what_it_is_alone(routing, shape, blocks, count):
    """blocks: memory for so many blocks of 64 slots, where the largest text needs 24."""
    pool, draw = pool_with(ROUTERS[routing], shape), random.Random(0)
    requests = requests_by(draw, count // 4)
    wanted = [alone(pool, request) for request in requests]
    size = 4 * pool.model.parameter_count + blocks * block_bytes(pool.model, 1, 64, "float32")
    account = ParameterCache([lambda own=own: own for own in pool.parameters], device_bytes=size)
    generator = Generator(replace(pool, parameters=account), prompt_tokens=32, keep=4)
    sent, done, given_up, idle = 0, 0, 0, 0
    numbers = {}
    while sent < count or generator.running:
        while sent < count and len(generator.running) < 12 and draw.random() < 0.5:
            number = draw.randrange(len(requests))
            numbers[generator.add(requests[number])] = number
            sent += 1
        for continuation in list(generator.running.values()):
            if draw.random() < 0.01:
                generator.remove(continuation)
                given_up += 1
        found = generator.step()
        assert not generator.take_failed() and account.reserved <= size
        idle = 0 if found else idle + 1
        assert idle < 500
        for continuation, *_ in found:
            if continuation.finish_reason:
                done += 1
                assert list(continuation.detokenizer.ids) == wanted[numbers[continuation]]
    assert done + given_up == count and given_up
    for kept in generator.engine.decoders.values():
        assert not kept.texts
        kept.drop_kept()
        assert kept.bytes == 0
    assert account.reserved == 0
