"""Training: the losses it had, one compilation, and languages in their shares."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_training import (
    CONFIG,
    GOLDEN,
    MODEL,
    SHARES,
    SOURCES,
    losses,
    source,
)

from xelm.settings import vary
from xelm.training.compiled import compile_steps
from xelm.training.sharding import make_mesh


def test_the_losses_are_those_recorded(trained):
    _, metrics = trained()
    np.testing.assert_allclose(losses(metrics), GOLDEN, atol=1e-4)


def test_training_changes_what_it_returns_and_not_what_it_was_given(trained, parameters, capsys):
    before = jax.tree.map(np.copy, parameters)
    result, _ = trained(replace(CONFIG, tokens=128))
    assert "on a CPU" not in capsys.readouterr().err  # float32 is the right dtype there
    jax.tree.map(np.testing.assert_array_equal, parameters, before)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), result.parameters, before)
    assert all(jax.tree.leaves(changed))


def test_gradients_are_clipped_and_their_norm_before_that_is_told(trained, parameters):
    # Far below Adam's epsilon, so that next to nothing is left to move by.
    config = vary(
        CONFIG, {"tokens": 3 * 128, "optimizer.clip_norm": 1e-14, "optimizer.weight_decay": 0.0}
    )
    result, metrics = trained(config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), result.parameters, parameters
    )
    assert all(line["grad_norm"] > 0.1 for line in metrics)


def test_what_can_be_learned_is_learned(trained):
    # The next token follows from the last two but for the first of each document: nothing else to
    # know. ln 48 = 3.87 at first.
    config = vary(
        CONFIG,
        {"tokens": 150 * 128, "optimizer.learning_rate": 2e-2, "runtime.checkpoint_every": 1000},
    )
    _, metrics = trained(config)
    assert metrics[-1]["loss"] < 0.7


def test_accumulated_parts_make_the_update_of_the_whole_batch(trained):
    # Few documents: the last row of each pass is padded, so that parts have unequal targets.
    sources = [source(language, documents=5) for language in SHARES]
    config = replace(CONFIG, tokens=6 * 128)
    whole, metrics = trained(config, "whole", sources)
    parts, other = trained(vary(config, {"runtime.accumulation_steps": 4}), "parts", sources)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.parameters, parts.parameters
    )
    np.testing.assert_allclose(losses(metrics), losses(other), atol=1e-5)
    assert whole.language_tokens == parts.language_tokens


def test_trainings_of_one_shape_share_one_compiled_step(trained):
    ours = vary(CONFIG, {"optimizer.clip_norm": 0.75})  # of no other test
    for changes in (
        {"tokens": 3 * 128},
        {
            "tokens": 5 * 128,
            "optimizer.learning_rate": 1e-2,
            "optimizer.schedule": "wsd",
            "random_seed": 3,
        },
        {
            "tokens": 2 * 128,
            "runtime.log_every": 2,
            "runtime.checkpoint_every": 1,
            "data.sampling_exponent": 1.0,
        },
    ):
        trained(vary(ours, changes), folder=str(changes["tokens"]))
    compiled = compile_steps(MODEL, ours, make_mesh(ours))
    assert (compiled.step._cache_size(), compiled.create[0]._cache_size()) == (1, 1)


def test_rematerialisation_changes_no_loss(trained):
    _, metrics = trained(vary(CONFIG, {"runtime.rematerialise": True}))
    np.testing.assert_allclose(losses(metrics), GOLDEN, atol=1e-5)


def test_languages_are_seen_in_their_shares_and_counted(trained):
    result, metrics = trained(vary(CONFIG, {"tokens": 100 * 128, "runtime.checkpoint_every": 1000}))
    assert result.tokens == sum(result.language_tokens.values()) == metrics[-1]["tokens"]
    assert metrics[-1]["language_tokens"] == result.language_tokens
    # Documents are of one length, so shares of rows are shares of tokens.
    for language, share in SHARES.items():
        assert result.language_tokens[language] / result.tokens == pytest.approx(share, rel=0.01)
    # Of 24 tokens to predict, one starts a document and is no target.
    assert result.tokens == pytest.approx(100 * 128 * 24 / 25, rel=0.01)


def test_texts_of_one_language_in_several_stores_add_up(trained):
    first, second, third = SOURCES
    again = replace(second, ids=replace(second.ids, language=first.ids.language))
    config = vary(CONFIG, {"tokens": 100 * 128, "runtime.checkpoint_every": 1000})
    result, _ = trained(config, sources=[first, again, third])
    assert set(result.language_tokens) == {first.ids.language, third.ids.language}
    shares = {language: count / result.tokens for language, count in result.language_tokens.items()}
    assert shares[first.ids.language] == pytest.approx(first.share + second.share, rel=0.01)
    assert shares[third.ids.language] == pytest.approx(third.share, rel=0.01)


def test_metrics_say_what_happened(trained):
    _, metrics = trained()
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert all(line["skipped"] == 0 and "utilisation" not in line for line in metrics)
    assert metrics[0]["learning_rate"] == pytest.approx(3e-3)  # one step of warm-up
    assert metrics[-1]["learning_rate"] == pytest.approx(3e-4, rel=1e-3)
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in metrics)
    assert all(0 < line["data_share"] < 1 and line["steps"] == 20 for line in metrics)
