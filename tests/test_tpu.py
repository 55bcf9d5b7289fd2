"""The step compiled for TPUs, by their own compiler and without one: what the other tests see of
programs for CPUs need not hold there. Needs libtpu (`pip install xelm[tpu]`)."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from small_training import CONFIG, MODEL
from test_meshes import AXES, ENCODER, batch_of, collectives, crossing

from xelm.models.cache import empty_cache
from xelm.models.parameters import bind, for_inference, inference_graph, shapes
from xelm.models.target import target_of
from xelm.settings import vary
from xelm.training.compiled import compile_steps

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

LENGTH = 1024
SMALL = {"runtime.dtype": "bfloat16", "runtime.moments_dtype": "bfloat16"}


@pytest.fixture
def chips(monkeypatch):
    """The chips of a v5e slice, none of which exists."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no machine of Google to ask
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices


@pytest.fixture
def step_on(chips):
    """A function that compiles a step for a mesh of chips of a v5e slice."""
    all_chips = chips

    def compiled(mesh, model, length=CONFIG.sequence_length, **changes):
        chips = np.asarray(all_chips[: np.prod(mesh)]).reshape(mesh)
        devices = Mesh(chips, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        rows = mesh[1] * mesh[2]
        config = vary(CONFIG, {"batch_size": rows, "sequence_length": length, **changes})
        functions = compile_steps(model, config, devices)
        batch = {
            name: jax.ShapeDtypeStruct(
                (mesh[0] * rows, *array.shape[1:]), array.dtype, sharding=functions.batch_sharding
            )
            for name, array in batch_of(model, 0, 0, length).items()
        }
        rates = jax.ShapeDtypeStruct((mesh[0],), jnp.float32)
        with jax.set_mesh(devices):
            return functions.step.lower(functions.state, batch, rates).compile()

    return compiled


@pytest.mark.parametrize("model", [MODEL, ENCODER], ids=["decoder", "encoder"])
def test_nothing_passes_between_experts(step_on, model):
    compiled = step_on((2, 1, 2, 2), model)
    assert len(collectives(compiled)) > 3  # within experts
    assert crossing(compiled, 2) == []


@pytest.mark.parametrize("data", [1, 4])
def test_each_chip_attends_for_its_own_rows(step_on, data):
    """As in test_meshes; sums that begin with zeros were once of the rows of all."""
    model = replace(MODEL, head_size=24, max_length=LENGTH)
    compiled = step_on((1, data, 16 // data, 1), model, LENGTH, **{"runtime.rematerialise": True})
    found = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    shapes = {tuple(map(int, each.split(","))) for each in found}
    of_heads = [np.prod(shape) for shape in shapes if shape[-1] == 24]
    assert max(of_heads) == model.layer_count * model.head_count * LENGTH * 24


def test_each_chip_has_a_kernel_for_its_own_rows_and_heads(step_on):
    """Of four rows and four heads of 64, over data 2 x fsdp 2 x tensor 2: one row, two heads."""
    model = replace(MODEL, head_size=64, head_count=4, key_head_count=4, max_length=LENGTH)
    program = step_on((1, 2, 2, 2), model, LENGTH).as_text()
    kernels = re.findall(r"%\S*attention_(forward|backward)\S* = \(?f32\[([\d,]+)\]", program)
    assert {name for name, _ in kernels} == {"forward", "backward"}
    assert {shape for _, shape in kernels} == {f"1,{LENGTH},128"}


def test_less_is_kept_and_needed_in_bfloat16(step_on):
    model = replace(MODEL, width=256, feedforward_width=1024, vocabulary_size=4096, layer_count=4)
    kept, needed = [], []
    for changes in (
        {},
        {"runtime.dtype": "bfloat16"},
        SMALL,
        {**SMALL, "optimizer.name": "adafactor"},
    ):
        used = step_on((1, 1, 1, 1), model, **changes).memory_analysis()
        kept.append(used.argument_size_in_bytes / model.parameter_count)
        needed.append(used.peak_memory_in_bytes / model.parameter_count)
    assert kept == pytest.approx([12, 12, 8, 6], rel=0.05)
    # And gradients, of which two bytes are spared.
    assert needed[1] < needed[0] - 1 and needed[2] < needed[1] - 3 and needed[3] < needed[2] - 1


@pytest.mark.parametrize("head_size", [64, 128])
def test_a_decoding_step_copies_no_cache(chips, head_size):
    """Written by a scatter, keys and values were each brought into another layout and back."""
    model = replace(MODEL, head_size=head_size, head_count=4, key_head_count=4, max_length=LENGTH)
    place, rows = SingleDeviceSharding(chips[0]), 32
    network = inference_graph(model, "bfloat16", target=target_of(chips[:1]))

    def step(parameters, tokens, counts, cache):
        states, longer = bind(network, parameters).extend(tokens, counts, cache)
        return states, longer

    arguments = (
        jax.eval_shape(for_inference, shapes(model)),
        jnp.zeros((rows, 1), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jax.eval_shape(lambda: empty_cache(model, rows, LENGTH, "bfloat16")),
    )
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments
    )
    program = jax.jit(step, donate_argnums=3).lower(*arguments).compile().as_text()
    size = rows * 4 * LENGTH * head_size
    # Asynchronous copies between two kinds of memory have other names.
    found = re.findall(r"= (?:bf16|f32)\[([\d,]+)\]\S* (copy|transpose)\(", program)
    whole = [each for each, _ in found if np.prod([*map(int, each.split(","))]) >= size]
    assert whole == []
