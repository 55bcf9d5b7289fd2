"""Packed rows against a naive packer; mixing in exact shares; no state but the step."""

import itertools

import numpy as np
import pytest

from clustering.errors import UserError
from xelm.data import rows as row_module
from xelm.data.rows import LanguageRows, LanguageShare, batches, sampling_shares
from xelm.data.store import TokenizedLanguage, shuffled
from xelm.data.text_format import TextFormat
from xelm.training.step import target_weights
from xelm.training_config import TrainConfig

START, END = 1, 2
LENGTHS = {"de": [5, 1, 17, 3, 0, 40, 2, 2, 9], "el": [12, 4, 4, 30], "sw": [1]}


def language_ids(language: str) -> TokenizedLanguage:
    """Every token of every language is another number, so that each can be told apart."""
    lengths = LENGTHS[language]
    base = 10 + 1000 * list(LENGTHS).index(language)
    order, stream_ends = shuffled(language, np.asarray(lengths))
    return TokenizedLanguage(
        language=language,
        ids=np.arange(base, base + sum(lengths), dtype=np.uint16),
        ends=np.cumsum(lengths),
        bytes=np.asarray(lengths),
        hashes=np.asarray([[97 * n % 13, n] for n in range(len(lengths))], np.uint64),
        order=order,
        stream_ends=stream_ends,
    )


def source(language: str, share: float = 1.0, documents=None) -> LanguageShare:
    return LanguageShare(ids=language_ids(language), share=share, documents=documents)


def rows_of(
    found: LanguageShare, length: int, seed: int = 0, start_id: int | None = START
) -> LanguageRows:
    config = TrainConfig(tokens=1, sequence_length=length, random_seed=seed)
    return LanguageRows(found, config, TextFormat(start_id=start_id, end_id=END))


def naive_rows(rows: LanguageRows, length: int):
    """The same rows token by token, from the order of the documents."""
    stream = []
    for number, document in enumerate(rows.order):
        framed = [*rows.text_format.start_ids, *rows.ids.document(document), END]
        stream += [(token, number, column) for column, token in enumerate(framed)]
    for begin in range(0, len(stream) - 1, length):
        part = stream[begin : begin + length + 1]
        first = part[0][1]
        tokens = [token for token, _, _ in part]
        segments = [number - first + 1 for _, number, _ in part]
        positions = [column - (part[0][2] if number == first else 0) for _, number, column in part]
        padding = [0] * (length + 1 - len(part))
        yield tokens + padding, segments + padding, positions + padding


@pytest.mark.parametrize("start_id", [START, None])
@pytest.mark.parametrize("documents", [None, np.array([0])])
@pytest.mark.parametrize("length", [1, 4, 7, 16, 200])
@pytest.mark.parametrize("language", LENGTHS)
def test_rows_are_those_of_a_naive_packer(language, length, documents, start_id):
    rows = rows_of(source(language, documents=documents), length, start_id=start_id)
    wanted = list(naive_rows(rows, length))
    assert len(rows) == len(wanted)
    for number, (tokens, segments, positions) in enumerate(wanted):
        row = rows[number]
        assert row["tokens"].tolist() == tokens
        assert row["segments"].tolist() == segments
        assert row["positions"].tolist() == positions


@pytest.mark.parametrize("length", [1, 4, 7, 16, 200])
@pytest.mark.parametrize("language", LENGTHS)
def test_every_token_and_every_end_is_a_target_once_a_pass(language, length):
    rows = rows_of(source(language), length)
    targets = []
    for number in range(len(rows)):
        row = rows[number]
        targets += row["tokens"][1:][target_weights(row["segments"])].tolist()
    ids = language_ids(language)
    assert sorted(targets) == sorted([*ids.ids.tolist(), *[END] * len(ids)])


def test_a_target_follows_its_own_document():
    rows = rows_of(source("de"), 7)
    document_of = {
        int(token): number for number in range(len(rows.ids)) for token in rows.ids.document(number)
    }
    seen = 0
    for number in range(len(rows)):
        row = rows[number]
        for before, target, counts in zip(
            row["tokens"], row["tokens"][1:], target_weights(row["segments"])
        ):
            if counts and before >= 10 and target >= 10:
                assert document_of[int(before)] == document_of[int(target)]
                seen += 1
    # All but the first token of each document follow another of the same.
    assert seen == sum(max(0, length - 1) for length in LENGTHS["de"])


def test_only_the_documents_that_were_chosen_are_seen():
    chosen = np.array([6, 2, 0])
    rows = rows_of(source("de", documents=chosen), 8)
    seen = {int(t) for r in range(len(rows)) for t in rows[r]["tokens"]} - {0, START, END}
    ids = language_ids("de")
    assert seen == {int(token) for number in chosen for token in ids.document(number)}
    assert rows.tokens == sum(LENGTHS["de"][number] + 2 for number in chosen)


def test_documents_are_shuffled_by_the_language_and_rows_by_the_seed_too():
    order, _ = shuffled("de", np.full(50, 3))
    assert sorted(order) == list(range(50)) != order.tolist()
    assert order.tolist() == shuffled("de", np.full(50, 7))[0].tolist()
    assert order.tolist() != shuffled("el", np.full(50, 3))[0].tolist()
    seeds = {rows_of(source(tag), 8, seed).row_seed for tag in LENGTHS for seed in (0, 1)}
    assert len(seeds) == 2 * len(LENGTHS)
    assert rows_of(source("de"), 8, 1).row_seed == rows_of(source("de"), 9, 1).row_seed


def mixed(shares: dict[str, float], *, steps=40, batch_size=5, seed=0, first_step=0, length=6):
    config = TrainConfig(
        tokens=steps * batch_size * length,
        batch_size=batch_size,
        sequence_length=length,
        random_seed=seed,
    )
    assert config.steps == steps
    sources = [source(language, share) for language, share in shares.items()]
    text_format = TextFormat(start_id=START, end_id=END)
    return list(batches(sources, config, text_format, first_step=first_step))


SHARES = {"de": 0.5, "el": 0.3, "sw": 0.2}


def test_batches_have_the_shape_asked_for():
    found = mixed(SHARES, steps=3)
    assert len(found) == 3
    for batch in found:
        for name in ("tokens", "segments", "positions"):
            assert batch[name].shape == (5, 7)
            assert batch[name].dtype == np.int32
        assert batch["language"].shape == (5,)


@pytest.mark.parametrize(
    "shares",
    [(1.0, 1.0, 1.0), (5.0, 3.0, 2.0), (0.61803, 0.2, 0.18197), (0.001, 0.332, 0.667)],
)
@pytest.mark.parametrize(("batch_size", "slack"), [(4, 2.0), (2, 3.0)])
def test_sources_have_their_shares_at_every_moment(shares, batch_size, slack):
    chosen = row_module._Interleaved(shares, 20_000, batch_size, random_seed=0)
    order = np.array([chosen[index][0] for index in range(20_000)])
    for index, share in enumerate(shares):
        due = np.arange(1, len(order) + 1) * share / sum(shares)
        # However long the training: a row or two ahead or behind, and no more.
        assert np.abs(np.cumsum(order == index) - due).max() <= slack


def test_small_batches_have_other_languages_together_each_time():
    """Equal shares once came round in a cycle: four of sixteen languages met no other."""

    def order_of(random_seed, batch_size=4):
        chosen = row_module._Interleaved([1.0] * 16, 4000, batch_size, random_seed)
        return np.array([chosen[index][0] for index in range(4000)])

    order = order_of(0)
    met = {(a, b) for batch in order.reshape(-1, 4) for a in batch for b in batch}
    assert len(met) == 16 * 16
    # Four of them have each once, and so has every batch that is large enough.
    assert (np.sort(order.reshape(-1, 16), axis=1) == np.arange(16)).all()
    assert order.tolist() != order_of(1).tolist()
    assert (np.sort(order_of(0, 20)[:32].reshape(2, 16), axis=1) == np.arange(16)).all()


def test_languages_have_exactly_their_shares_of_the_rows():
    order = np.concatenate([batch["language"] for batch in mixed(SHARES)])
    assert np.bincount(order).tolist() == [100, 60, 40]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_one_source_is_taken_in_order_and_none_is_skipped(batch_size):
    interleaved = row_module._Interleaved([0.7, 0.2, 0.1], 1000, batch_size, random_seed=0)
    chosen = [interleaved[index] for index in range(1000)]
    for source_index, count in enumerate((700, 200, 100)):
        assert [at for found, at in chosen if found == source_index] == list(range(count))


@pytest.mark.parametrize("first_step", [1, 17, 39, 40])
def test_a_batch_does_not_depend_on_where_the_iteration_starts(first_step):
    whole, part = mixed(SHARES), mixed(SHARES, first_step=first_step)
    assert len(part) == 40 - first_step
    for wanted, found in zip(whole[first_step:], part, strict=True):
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


def test_the_rows_of_a_longer_training_begin_with_those_of_a_shorter():
    for short, long in zip(mixed(SHARES, steps=10), mixed(SHARES, steps=30)):
        np.testing.assert_array_equal(short["tokens"], long["tokens"])


def test_another_seed_gives_other_batches_of_the_same_rows():
    def all_tokens(seed):
        return np.concatenate([batch["tokens"] for batch in mixed({"el": 1.0}, seed=seed, steps=8)])

    assert np.array_equal(all_tokens(0), all_tokens(0))
    assert not np.array_equal(all_tokens(0), all_tokens(1))
    assert set(all_tokens(0).ravel().tolist()) == set(all_tokens(1).ravel().tolist())


def test_the_order_of_a_language_does_not_depend_on_who_else_takes_part():
    """Experts and the dense baseline go through a language in one order."""

    def rows_of_greek(shares):
        batches = mixed(shares)
        index = list(shares).index("el")
        rows = np.concatenate([batch["tokens"][batch["language"] == index] for batch in batches])
        return rows[:20]

    alone = rows_of_greek({"el": 1.0})
    np.testing.assert_array_equal(rows_of_greek({"de": 0.5, "el": 0.3, "sw": 0.2}), alone)
    np.testing.assert_array_equal(rows_of_greek({"el": 0.3, "sw": 0.2}), alone)


def test_each_pass_sees_every_row_once_in_an_order_of_its_own():
    count = len(rows_of(source("el"), 6))
    found = mixed({"el": 1.0}, steps=4 * count, batch_size=1)
    rows = [tuple(batch["tokens"][0].tolist()) for batch in found]
    passes = [rows[first : first + count] for first in range(0, 4 * count, count)]
    assert len(set(passes[0])) == count
    for one, other in itertools.pairwise(passes):
        assert set(one) == set(other)
        assert one != other


def test_a_source_without_documents_is_refused():
    config = TrainConfig(tokens=4, batch_size=1, sequence_length=4)
    with pytest.raises(ValueError, match="no document to train on in de"):
        batches(
            [source("de", documents=np.array([], int))],
            config,
            TextFormat(start_id=START, end_id=END),
        )


def test_shares_are_tokens_to_the_exponent():
    tokens = {"de": 1000, "sw": 10}
    assert sampling_shares(tokens, 1.0) == {"de": 1000 / 1010, "sw": 10 / 1010}
    assert sampling_shares(tokens, 0.0) == {"de": 0.5, "sw": 0.5}
    assert sampling_shares(tokens, 0.5)["de"] == pytest.approx(10 / 11)


def test_no_language_is_passed_over_too_often():
    tokens = {"de": 1_000_000, "el": 50_000, "sw": 10_000, "hi": 300_000}
    # UniMax by hand: sw may have 40,000 and el 200,000 of 1,200,000; the others share the rest.
    found = sampling_shares(tokens, 0.0, budget=1_200_000, max_passes=4)
    wanted = {"de": 480_000, "el": 200_000, "sw": 40_000, "hi": 480_000}
    assert {tag: round(share * 1_200_000) for tag, share in found.items()} == wanted
    # What one may not have goes to the others in their proportion, which may fill up another.
    found = sampling_shares(tokens, 0.5, budget=2_600_000, max_passes=4)
    assert found["sw"] * 2_600_000 == pytest.approx(40_000)
    assert found["el"] * 2_600_000 == pytest.approx(200_000)
    assert found["de"] / found["hi"] == pytest.approx((10 / 3) ** 0.5)
    assert sum(found.values()) == pytest.approx(1)
    assert list(found) == list(tokens)
    plain = sampling_shares(tokens, 0.3)
    assert sampling_shares(tokens, 0.3, budget=1000, max_passes=4) == plain
    # Exactly enough is enough, whatever rounding makes of it.
    odd = {"a": 977_327_982, "b": 3_141_592_653, "c": 2_718_281}
    whole = sampling_shares(odd, 0.3, budget=sum(odd.values()), max_passes=1)
    assert whole == pytest.approx({tag: n / sum(odd.values()) for tag, n in odd.items()})
    with pytest.raises(UserError, match="2 passes over 1,360,000 tokens are fewer than"):
        sampling_shares(tokens, 0.0, budget=3_000_000, max_passes=2)
