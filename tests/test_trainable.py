"""What a training trains of a model: adapters, all layers but some, or all with a pull."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import CONFIG, MODEL, SOURCES, Interrupt, assert_same_bits, interrupt_at

from clustering.errors import UserError
from xelm.config import HeldOutConfig
from xelm.data.held_out import divide as hold_out
from xelm.models.adapters import Adapter, factors_of, merged
from xelm.models.config import TARGETS
from xelm.models.parameters import bind, by_path, fresh_parameters, graph
from xelm.settings import to_json, vary
from xelm.training.compiled import compile_steps, state_of
from xelm.training.metrics import best, read_metrics
from xelm.training.optimizer import optimizer
from xelm.training.sharding import make_mesh
from xelm.training.trainable import (
    check_trainable,
    completed,
    divide,
    frozen_layers,
    pulled,
    stacks,
    together,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from memory import step_bytes

LORA = vary(CONFIG, {"lora.rank": 4})
DEEP = replace(MODEL, layer_count=7)


def test_adapters_start_as_nothing_beside_frozen_weights(parameters):
    parameters = jax.tree.map(jnp.asarray, parameters)
    trained, fixed = divide(parameters, LORA, MODEL, 5)
    factors = factors_of(trained)
    assert list(factors) == list(TARGETS.values())
    a, b = factors["blocks/down"]
    assert (a.shape, b.shape) == ((2, 24, 4), (2, 4, 16))
    assert not np.asarray(b).any()
    assert 0.9 * 24**-0.5 < np.abs(a).max() <= 24**-0.5
    jax.tree.map(np.testing.assert_array_equal, fixed.frozen, parameters)
    again, other = divide(parameters, LORA, MODEL, 5)[0], divide(parameters, LORA, MODEL, 6)[0]
    jax.tree.map(np.testing.assert_array_equal, trained, again)
    assert (np.asarray(factors_of(other)["blocks/down"][0]) != np.asarray(a)).any()
    tokens = jnp.arange(4, 20)[None]
    shape = graph(MODEL, adapted=list(factors), scale=2.0)
    found = bind(shape, together(trained, fixed.frozen))(tokens)
    np.testing.assert_array_equal(found, bind(graph(MODEL), parameters)(tokens))


def test_frozen_layers_are_stacks_of_their_own():
    config = replace(CONFIG, frozen_layers="2-3,5")
    assert stacks(config, DEEP) == [
        (0, 2, False),
        (2, 4, True),
        (4, 5, False),
        (5, 6, True),
        (6, 7, False),
    ]
    parameters = fresh_parameters(DEEP, 0)
    trained, fixed = divide(parameters, config, DEEP)
    query = parameters["blocks"]["query"]["weight"]
    assert sorted(fixed.frozen["blocks"]) == ["1", "3"]
    np.testing.assert_array_equal(fixed.frozen["blocks"]["1"]["query"]["weight"], query[2:4])
    assert (trained["embedding"] == parameters["embedding"]).all()
    jax.tree.map(
        np.testing.assert_array_equal, completed(trained, parameters, config, DEEP), parameters
    )
    changed = jax.tree.map(lambda x: x + 1, trained)
    found = completed(changed, parameters, config, DEEP)["blocks"]["query"]["weight"]
    moved = [(np.asarray(found[n]) != np.asarray(query[n])).any() for n in range(7)]
    assert moved == [True, True, False, False, True, False, True]


def test_a_model_in_several_stacks_computes_the_same():
    config, tokens = replace(CONFIG, frozen_layers="middle"), jnp.arange(4, 20)[None]
    parameters = fresh_parameters(DEEP, 0)
    trained, fixed = divide(parameters, config, DEEP)
    assert frozen_layers(config, 7) == (2, 3, 4)
    whole = together(trained, fixed.frozen)
    found = bind(graph(DEEP, stacks=3), whole)(tokens)
    np.testing.assert_allclose(found, bind(graph(DEEP), parameters)(tokens), atol=1e-6)


@pytest.mark.parametrize("pull", [None, 0.0, 10.0])
def test_a_pull_takes_the_place_of_weight_decay(parameters, pull):
    used = optimizer(vary(CONFIG, {"optimizer.pull": pull, "optimizer.weight_decay": 0.5}))
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = used.update(zeros, used.init(parameters), parameters)
    decay = 0.5 if pull is None else 0.0
    up = parameters["blocks"]["up"]["weight"]
    np.testing.assert_allclose(updates["blocks"]["up"]["weight"], -decay * up, rtol=1e-6)


def test_a_pull_is_the_minimum_of_two_squares():
    config = vary(CONFIG, {"optimizer.pull": 3.0})
    x, start, rate = np.float32(5.0), np.float32(1.0), 0.5
    found = float(pulled(x, start, config, rate))
    assert found == pytest.approx((5 + 0.5 * 3 * 1) / (1 + 0.5 * 3))
    places = np.linspace(0, 6, 60001)
    cost = (places - 5) ** 2 / 2 + rate * 3 * (places - 1) ** 2 / 2
    assert found == pytest.approx(places[cost.argmin()], abs=1e-4)
    assert pulled(x, start, CONFIG, rate) == x


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lora.rank": 0}, r"lora\.rank must be at least 1; got 0"),
        ({"lora.alpha": 0}, r"lora\.alpha must be above 0; got 0"),
        ({"lora.targets": "q,w"}, "must be all, or some of q,k,v,o,gate,up,down; got q,w"),
        ({"frozen_layers": "4 to 7"}, "middle, or numbers such as 4-7 or 2,4-5; got 4 to 7"),
        ({"lora.rank": 4, "frozen_layers": "1"}, "adapters freeze all layers"),
        ({"lora.rank": 4, "optimizer.pull": 1.0}, r"lora\.rank and optimizer\.pull exclude"),
        ({"optimizer.pull": -1.0}, r"optimizer\.pull must be at least 0; got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        vary(CONFIG, changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lora.rank": 17}, "at most 16, the smaller dimension of blocks/query; got 17"),
        ({"frozen_layers": "1-2"}, "some of the layers 0 to 1 of this model, and not all; got 1-2"),
        ({"frozen_layers": "0-1"}, "and not all; got 0-1"),
        ({"frozen_layers": "middle"}, "and not all; got middle"),
    ],
)
def test_what_a_model_cannot_have_is_refused(changes, fault):
    with pytest.raises(UserError, match=fault):
        check_trainable(vary(CONFIG, changes), MODEL)


def test_what_is_trained_alone_has_masters_and_averages():
    mesh = make_mesh(CONFIG)
    with jax.set_mesh(mesh):
        states = {
            name: state_of(MODEL, vary(CONFIG, changes), mesh).saved
            for name, changes in {
                "all": {},
                "adapters": {"lora.rank": 4, "runtime.dtype": "bfloat16"},
                "frozen": {"frozen_layers": "1"},
            }.items()
        }
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
        for name, state in states.items()
    }
    inner = {"q": 16, "k": 16, "v": 16, "o": 16, "gate": 24, "up": 24, "down": 24}
    assert sizes["adapters"] == 2 * 4 * sum(16 + other for other in inner.values())
    assert sizes["all"] == MODEL.parameter_count
    layer = (MODEL.parameter_count - 48 * 16 - 16) // 2
    assert sizes["frozen"] == MODEL.parameter_count - layer
    for name, state in states.items():
        moments = [x.size for x in jax.tree.leaves(state.optimizer) if x.shape]
        assert sum(moments) == 2 * sizes[name]


@pytest.mark.slow
def test_adapters_are_trained_and_resumed_to_the_bit(trained, parameters, monkeypatch):
    held_out = hold_out(SOURCES, HeldOutConfig(share=0.2)).held_out
    config = vary(LORA, {"evaluation.every": 5})
    whole, metrics = trained(config, held_out=held_out)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.02
    assert sum(x.size for x in jax.tree.leaves(whole.parameters)) == 8 * 248
    with pytest.raises(Interrupt):
        interrupt_at(monkeypatch, 9)
        trained(config, "other", held_out=held_out)
    monkeypatch.undo()
    again, _ = trained(config, "other", held_out=held_out)
    assert_same_bits(whole, again)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_layers_keep_their_bits_and_the_others_move(dtype, tmp_path, parameters, trained):
    config = vary(CONFIG, {"frozen_layers": "1", "runtime.dtype": dtype})
    result, _ = trained(config)
    for path, leaf in by_path(result.parameters).items():
        before = np.asarray(by_path(parameters)[path])
        if path.startswith("blocks/"):
            np.testing.assert_array_equal(leaf[1], before[1])
            leaf, before = leaf[0], before[0]
        assert (np.asarray(leaf) != before).any(), path


@pytest.mark.slow
def test_a_huge_pull_stays_at_the_start_and_none_is_weight_decay(trained, parameters):
    strong, _ = trained(vary(CONFIG, {"optimizer.pull": 1e9}), "strong")
    weak, _ = trained(vary(CONFIG, {"optimizer.pull": 10.0}), "weak")
    free, _ = trained(vary(CONFIG, {"optimizer.pull": 0.0}), "free")

    def distance(result):
        squares = jax.tree.map(
            lambda a, b: float(((a - b) ** 2).sum()), result.parameters, parameters
        )
        return sum(jax.tree.leaves(squares)) ** 0.5

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), strong.parameters, parameters
    )
    assert 0.05 < distance(weak) / distance(free) < 0.9


@pytest.mark.slow
def test_a_pulled_training_is_resumed_to_the_bit(trained, monkeypatch):
    config = vary(CONFIG, {"optimizer.pull": 10.0, "frozen_layers": "0"})
    whole, _ = trained(config)
    with pytest.raises(Interrupt):
        interrupt_at(monkeypatch, 9)
        trained(config, "other")
    monkeypatch.undo()
    again, _ = trained(config, "other")
    assert_same_bits(whole, again)


@pytest.mark.slow
def test_the_loss_of_trained_adapters_is_that_of_the_merged_model(trained, parameters, tmp_path):
    """With the factor that is published: what was trained is what others read."""
    held_out = hold_out(SOURCES, HeldOutConfig(share=0.2)).held_out
    config = vary(LORA, {"lora.alpha": 3.0})
    result, _ = trained(config, held_out=held_out)
    own = best(read_metrics(tmp_path / "training" / "held_out.jsonl"))
    adapter = Adapter(scale=3 / 4, factors=factors_of(result.parameters))
    start = jax.tree.map(np.asarray, merged(jax.tree.map(jnp.asarray, parameters), adapter))
    trained(replace(CONFIG, tokens=128), "merged", start=start, held_out=held_out)
    first, *_ = read_metrics(tmp_path / "merged" / "held_out.jsonl")
    assert first["step"] == 0 and own["loss"] == pytest.approx(first["loss"], abs=1e-5)
    assert config.lora.scale == adapter.scale


@pytest.mark.slow
def test_trained_adapters_compute_what_the_merged_model_does(trained, parameters):
    result, _ = trained(LORA)
    parameters = jax.tree.map(jnp.asarray, parameters)
    adapter = Adapter(scale=2.0, factors=factors_of(result.parameters))
    tokens = jnp.arange(4, 20)[None]
    shape = graph(MODEL, adapted=list(adapter.factors), scale=2.0)
    found = bind(shape, together(result.parameters, parameters))(tokens)
    own = bind(graph(MODEL), merged(parameters, adapter))(tokens)
    np.testing.assert_allclose(found, own, atol=1e-5)
    assert np.abs(own - bind(graph(MODEL), parameters)(tokens)).max() > 0.01


@pytest.mark.slow
def test_memory_falls_by_the_compilers_account():
    model = replace(MODEL, width=128, feedforward_width=512, layer_count=4)
    used = {}
    for name, changes in {
        "all": {},
        "adapters": {"lora.rank": 4},
        "frozen": {"frozen_layers": "1-2"},
    }.items():
        config = vary(CONFIG, {**changes, "batch_size": 1})
        used[name] = step_bytes(model, config, make_mesh(config))
    # Weights, gradients and two averages are 16 bytes a parameter; frozen ones take 4.
    assert used["adapters"] < 0.45 * used["all"]
    assert used["frozen"] < 0.75 * used["all"]


@pytest.mark.parametrize(("changes", "products"), [({}, 1), ({"lora.rank": 4}, 0)])
def test_adapters_compute_no_gradient_of_the_output_head(changes, products):
    """Of all products in a step, none has the head's shape; a compiler may leave out what nobody
    uses, but not every one does."""
    model, config = replace(MODEL, vocabulary_size=96), vary(CONFIG, {**changes, "batch_size": 1})
    mesh = make_mesh(config)
    functions = compile_steps(model, config, mesh)
    batch = {
        key: jax.ShapeDtypeStruct((1, 17), jnp.int32, sharding=functions.batch_sharding)
        for key in ("tokens", "segments", "positions")
    }
    with jax.set_mesh(mesh):
        rates = jax.ShapeDtypeStruct((1,), jnp.float32)
        text = functions.step.lower(functions.state, batch, rates).as_text()
    of_its_shape = f"-> tensor<96x{model.width}xf32>"
    found = [line for line in text.splitlines() if "dot_general" in line and of_its_shape in line]
    assert len(found) == products


@pytest.mark.slow
def test_a_training_that_began_before_these_settings_existed_goes_on(trained):
    whole, _ = trained(replace(CONFIG, tokens=10 * 128))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 9)
        patch.setattr("xelm.training.trainer.to_json", _without_newer_settings)
        trained(replace(CONFIG, tokens=10 * 128), "other")
    again, _ = trained(replace(CONFIG, tokens=10 * 128), "other")
    assert_same_bits(whole, again)


def _without_newer_settings(config):
    found = to_json(config)
    for name in ("lora", "frozen_layers", "mixture", "expert_count", "experts_per_token"):
        found.pop(name, None)
    found.get("optimizer", {}).pop("pull", None)
    return found
