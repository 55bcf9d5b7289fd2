"""Which token comes next: the laws of drawing, and what a checkpoint asks for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from clustering.errors import UserError
from xelm.inference.sampling import (
    likeliest,
    penalised,
    read_sampling_params,
    sample,
)
from xelm.inference.sampling_params import SamplingParams

PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


def drawn(rows, sampling, step=0):
    """Each row of its own number."""
    count = len(rows)
    return np.asarray(sample(rows, [sampling] * count, [step] * count, range(count)))


def frequencies(**settings):
    """Shares of the five tokens in 4,000 draws, each from a row of its own."""
    rows = jnp.log(jnp.tile(jnp.asarray(PROBABILITIES, jnp.float32), (4000, 1)))
    found = drawn(rows, SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **settings}))
    return np.bincount(found, minlength=5) / 4000


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.75}, [1, 2, 3]),
        ({"top_p": 1e-6}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        # .4 of the .85 that three have is less than half, .7 more.
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities_from_those_kept(settings, kept):
    wanted = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0)
    np.testing.assert_allclose(frequencies(**settings), wanted / wanted.sum(), atol=0.025)


def test_a_large_vocabulary_is_drawn_from_as_it_is_distributed():
    """Over blocks, the last of which is not full, and some of which have nothing."""
    draw = np.random.default_rng(2)
    chances = draw.gamma(0.3, size=1000)
    chances[256:512] = 0
    chances[900:] = 0
    chances /= chances.sum()
    with np.errstate(divide="ignore"):
        row = jnp.log(jnp.asarray(chances, jnp.float32))
    found = np.concatenate(
        [
            drawn(jnp.tile(row, (4000, 1)), SamplingParams(temperature=1.0, top_p=1.0), step)
            for step in range(5)
        ]
    )
    assert chances[found].all()
    # Twenty groups of about equal probability; a statistic above 43.8 has a chance of .001.
    group = np.minimum((np.cumsum(chances) * 20).astype(int), 19)
    wanted = np.bincount(group, chances, minlength=20) * len(found)
    counted = np.bincount(group[found], minlength=20)
    assert ((counted - wanted) ** 2 / wanted).sum() < 43.8


def test_no_token_is_drawn_where_there_are_no_probabilities():
    rows = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (5, 300)))
    rows = rows.at[0].set(jnp.nan).at[2].set(-jnp.inf)
    for settings in ({"temperature": 0.0}, {"top_p": 1.0}, {"top_p": 0.5}, {"top_k": 7}):
        found = drawn(rows, SamplingParams(**settings))
        np.testing.assert_array_equal(found == -1, [True, False, True, False, False])
        assert (found < 300).all()


def test_temperature_is_a_power():
    wanted = PROBABILITIES**2
    np.testing.assert_allclose(frequencies(temperature=0.5), wanted / wanted.sum(), atol=0.025)
    np.testing.assert_array_equal(frequencies(temperature=0.0), [0, 1, 0, 0, 0])


def test_draws_differ_by_seed_and_step_and_not_otherwise():
    rows = jnp.zeros((1, 1000))

    def draw(seed, step):
        return int(drawn(rows, SamplingParams(random_seed=seed), step)[0])

    assert draw(0, 0) == draw(0, 0)
    assert len({draw(0, 0), draw(1, 0), draw(0, 1), draw(2**40, 0)}) == 4


def test_every_row_is_drawn_by_its_own_settings():
    """Greedy ones among others, of any number and step."""
    logits = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    logits = np.asarray(jax.nn.log_softmax(logits))
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=2.0, top_p=1.0, random_seed=5),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.5, top_p=0.4, random_seed=9),
    ]
    steps, numbers = [3, 1, 4, 1], [0, 2, 0, 7]
    together = np.asarray(sample(jnp.asarray(logits), settings, steps, numbers))
    assert together[0] == logits[0].argmax()
    for row in range(4):
        (single,) = sample(
            jnp.asarray(logits[row : row + 1]),
            settings[row : row + 1],
            steps[row : row + 1],
            numbers[row : row + 1],
        )
        assert together[row] == single


@pytest.mark.parametrize("size", [50, 1000])
def test_what_a_row_draws_does_not_depend_on_the_settings_of_others(size):
    """Cold rows, most of whose tokens have no chance at all, and others which look for what they
    keep among few or many tokens."""
    pairs = [(None, 1.0), (None, 0.9), (None, 0.3), (5, 1.0), (100, 1.0), (30, 0.9), (300, 0.95)]
    settings = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for top_k, top_p in pairs
        for temperature in (1.0, 0.1)
    ]
    settings.append(SamplingParams(temperature=0.0, top_k=700))
    count = len(settings)
    for step in range(12):
        rows = jax.random.normal(jax.random.key(step), (count, size))
        rows = jax.nn.log_softmax(rows * (1 + step % 3))
        together = sample(rows, settings, [step] * count, range(count))
        for number in range(step % 4, count, 4):
            own = slice(number, number + 1)
            (alone,) = sample(rows[own], settings[own], [step], [number])
            assert together[number] == alone, settings[number]


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_the_hottest_draw_takes_all_alike(top_p):
    chances = np.full(1000, 1 / 1000)
    rows = jnp.log(jnp.asarray(np.arange(1, 1001) / 500500, jnp.float32))
    sampling = SamplingParams(temperature=1000.0, top_p=top_p)
    found = drawn(jnp.tile(rows, (2000, 1)), sampling)
    kept = np.where(np.arange(1000) >= 1000 * (1 - top_p), chances, 0) / top_p
    assert not unlikely(found, kept)


@pytest.mark.parametrize("temperature", [1e-4, 1e-10, 1e-30, 2e-38, 1e-42])
def test_the_coldest_draw_is_the_largest(temperature):
    rows = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (4, 500)))
    rows = rows.at[:, :3].set(-jnp.inf)
    for top_p in (1.0, 0.9):
        sampling = SamplingParams(temperature=temperature, top_p=top_p)
        np.testing.assert_array_equal(drawn(rows, sampling), rows.argmax(axis=1))


@pytest.mark.parametrize(
    "settings", [{"top_k": 1, "top_p": 1.0}, {"top_p": 1e-9}, {"top_p": 1e-39}, {"top_p": 1e-46}]
)
@pytest.mark.parametrize("count", [1, 4])
def test_the_last_that_is_kept_is_kept_however_it_is_rounded(settings, count):
    """One token alone: if what is compared were rounded otherwise than the threshold, none."""
    for number in range(20):
        rows = 2 * jax.random.normal(jax.random.key(number), (count, 128))
        rows = jax.nn.log_softmax(rows)
        sampling = SamplingParams(temperature=0.7 + 0.01 * number, **settings)
        np.testing.assert_array_equal(drawn(rows, sampling), rows.argmax(axis=1))


def kept_by_sorting(row, top_k, top_p):
    """Probabilities of the tokens that are kept, with those equal to the last, by sorting."""
    order = np.sort(row)[::-1].astype(np.float64)
    chances = np.exp(order)
    if top_k is not None:
        chances = np.where(order >= order[top_k - 1], chances, 0)
    chances /= chances.sum()
    last = order[np.searchsorted(np.cumsum(chances), top_p * (1 - 1e-7))]
    kept = np.where(row >= last, np.exp(row.astype(np.float64)), 0)
    return kept / kept.sum()


def unlikely(found, chances):
    """Whether draws of tokens disagree with their chances: twenty groups of about equal chance, the
    likeliest first, and a statistic (chi squared) above 43.8, which has a chance of .001."""
    order = np.argsort(-chances, kind="stable")
    group = np.empty(len(chances), int)
    group[order] = np.minimum((np.cumsum(chances[order]) * 20).astype(int), 19)
    wanted = np.bincount(group, chances, minlength=20) * len(found)
    counted = np.bincount(group[found], minlength=20)
    some = wanted > 0
    return bool(((counted - wanted)[some] ** 2 / wanted[some]).sum() > 43.8)


@pytest.mark.parametrize(
    ("size", "top_k", "top_p"),
    [
        (2000, None, 0.9),
        (2000, None, 0.3),
        (20_000, None, 0.005),
        (20_000, 40, 1.0),
        (2000, 40, 0.7),
        (2000, 300, 0.9),
        (2000, 1999, 0.95),
    ],
)
def test_what_is_drawn_from_a_large_vocabulary_is_what_sorting_keeps(size, top_k, top_p):
    """Equal probabilities among them; some keep fewer tokens than are sorted, some more."""
    logits = np.random.default_rng(1).normal(size=size).astype(np.float32).round(2)
    row = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    chances = kept_by_sorting(row, top_k, top_p)
    sampling = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    rows = jnp.tile(row, (300, 1))
    found = np.concatenate([drawn(rows, sampling, step) for step in range(4)])
    assert chances[found].all()
    assert not unlikely(found, chances)


def test_rows_keep_what_their_own_settings_say():
    """Beside rows that keep everything, and rows that keep more than are sorted."""
    logits = np.random.default_rng(3).normal(size=2000).astype(np.float32)
    row = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    pairs = [(None, 1.0), (20, 1.0), (None, 0.5), (700, 0.6), (1, 0.1)]
    samplings = [SamplingParams(temperature=1.0, top_k=k, top_p=p) for k, p in pairs] * 200
    rows = jnp.tile(row, (len(samplings), 1))
    draws = [
        np.asarray(sample(rows, samplings, [step] * len(samplings), range(len(samplings))))
        for step in range(4)
    ]
    found = np.concatenate(draws).reshape(-1, len(pairs))
    for column, (top_k, top_p) in enumerate(pairs):
        chances = kept_by_sorting(row, top_k, top_p)
        assert chances[found[:, column]].all()
        assert not unlikely(found[:, column], chances)


@pytest.mark.parametrize("size", [5, 256, 257, 1000, 20_000])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_likeliest_are_those_that_sorting_finds_first(size, count):
    """Of equal ones the first, in whatever blocks they lie."""
    count = min(size, count)
    values = np.random.default_rng(0).integers(0, 200, (3, size)).astype(np.float32)
    values[0, -1], values[1] = 500, 7
    found = likeliest(jnp.asarray(values), np.zeros(3, int), count)
    for row, one in zip(values, found):
        order = np.argsort(-row, kind="stable")[:count]
        assert one.top == tuple(zip(order.tolist(), row[order].tolist()))
        assert one.log_probability == row[0]
    greedy = drawn(jnp.asarray(values), SamplingParams(temperature=0.0))
    np.testing.assert_array_equal(greedy, values.argmax(axis=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 7, "top_p": 1.0},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.6, "repetition_penalty": 1.7},
    ],
)
def test_the_kept_tokens_are_those_of_transformers(settings):
    """Drawn often, each token as often as transformers' own chain of processors says."""
    logits = 2 * np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32)
    seen = [3, 5, 8, 13]
    sampling = SamplingParams(**settings)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            TemperatureLogitsWarper(sampling.temperature),
            TopKLogitsWarper(sampling.top_k or 40),
            TopPLogitsWarper(sampling.top_p),
        ]
    )
    wanted = torch.softmax(chain(torch.tensor([seen]), torch.tensor(logits)), dim=-1)[0].numpy()
    mask = np.isin(np.arange(40), seen)[None]
    penalty = jnp.full(1, sampling.repetition_penalty)
    found = penalised(jnp.asarray(logits), jnp.asarray(mask), penalty)
    rows = jnp.tile(jax.nn.log_softmax(found), (20_000, 1))
    shares = np.bincount(drawn(rows, sampling), minlength=40) / 20_000
    assert (shares[wanted == 0] == 0).all()
    np.testing.assert_allclose(shares, wanted, atol=0.015)


def write(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return read_sampling_params(folder)


def test_a_checkpoint_without_wishes_is_sampled_by_our_defaults(tmp_path):
    assert read_sampling_params(tmp_path) == (SamplingParams(), [])
    assert write(tmp_path, eos_token_id=[2, 5], transformers_version="5.0") == (
        SamplingParams(),
        [],
    )


def test_a_checkpoints_wishes_are_honoured(tmp_path):
    asked = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    found, ignored = write(tmp_path, **asked)
    assert found == SamplingParams(temperature=0.6, top_k=20, top_p=1.0, repetition_penalty=1.1)
    assert ignored == []
    assert write(tmp_path, do_sample=False, temperature=0.6)[0].temperature == 0
    # Of transformers, where the file draws and says nothing of these.
    assert write(tmp_path, do_sample=True)[0] == SamplingParams(
        temperature=1.0, top_k=50, top_p=1.0
    )
    assert write(tmp_path, max_new_tokens=7, top_k=0)[0] == SamplingParams(max_new_tokens=7)


def test_wishes_that_are_not_honoured_are_named(tmp_path):
    assert write(tmp_path, num_beams=4, typical_p=0.5)[1] == ["num_beams", "typical_p"]
    with pytest.raises(UserError, match=r"generation_config.json: temperature must be at least 0"):
        write(tmp_path, temperature=-1)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config.json must be a JSON object; got \[\]"):
        read_sampling_params(tmp_path)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"temperature": float("nan")}, "temperature must be at least 0 and at most 1000; got nan"),
        ({"temperature": 1e39}, "temperature must be at least 0 and at most 1000; got 1e"),
        ({"repetition_penalty": 1e39}, "penalty must be at least 0.001 and at most 1000; got 1e"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0, "max_new_tokens": -1}, "max_new_tokens .* got -1; top_p must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be at least 0.001 and .* got 0.0"),
        ({"stop": ("",)}, "stop must be strings that are not empty"),
    ],
)
def test_values_that_mean_nothing_are_refused(settings, fault):
    with pytest.raises(UserError, match=fault):
        SamplingParams(**settings)
