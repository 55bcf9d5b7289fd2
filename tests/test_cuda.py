"""Programs as they are lowered for CUDA, which needs no GPU: what other tests see of programs for
CPUs need not hold there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROGRAM = """
import functools, json
from dataclasses import replace
import jax
import jax.numpy as jnp
import numpy as np
from small_training import CONFIG, MODEL
from xelm.models.cache import empty_cache
from xelm.models.parameters import bind, for_inference, inference_graph, shapes
from xelm.models.target import GIB, Target
from xelm.settings import vary
from xelm.training.compiled import compile_steps
from xelm.training.sharding import make_mesh

GPU = Target("gpu", 16 * GIB)

def step(dtype="bfloat16", rematerialise=False, **changes):
    model = replace(MODEL, head_size=64, **changes)
    config = vary(CONFIG, {"runtime.dtype": dtype, "runtime.rematerialise": rematerialise})
    mesh = make_mesh(config)
    functions = compile_steps(model, config, mesh, GPU)
    shape = config.batch_size, config.sequence_length + 1
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = dict.fromkeys(("tokens", "segments", "positions"), ids)
    with jax.set_mesh(mesh):
        traced = functions.step.trace(functions.state, batch, np.zeros(1, np.float32))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

def decode(rows, tokens, slots=128):
    model = replace(MODEL, head_size=64, layer_count=3)
    network = inference_graph(model, "bfloat16", target=GPU)

    @functools.partial(jax.jit, donate_argnums=3)
    def extend(parameters, tokens, counts, cache):
        hidden, longer = bind(network, parameters).extend(tokens, counts, cache)
        return bind(network, parameters).logits(hidden[:, -1]), longer

    half = lambda p: jax.tree.map(lambda a: a.astype(jnp.bfloat16), for_inference(p))
    ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    cache = jax.eval_shape(lambda: empty_cache(model, rows, slots, "bfloat16"))
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    traced = extend.trace(jax.eval_shape(half, shapes(model)), ids, counts, cache)
    return traced.lower(lowering_platforms=("cuda",)).as_text()

print(json.dumps({
    "step": step(),
    "step with less memory": step(rematerialise=True),
    "step in float32": step("float32"),
    "step with a cap": step(attention_cap=2.0),
    "step with windows": step(local_window=8, local_layers=(0,)),
    "one row": decode(1, 1),
    "rows": decode(4, 1),
    "prompt": decode(1, 16),
}))
"""


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """The texts of programs lowered for CUDA, where the package that brings cuDNN is stood in for
    by one that only says its version."""
    folder = tmp_path_factory.mktemp("cuda")
    plugin = folder / "jax_cuda13_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").touch()
    (plugin / "_versions.py").write_text("def cudnn_get_version():\n    return 91200\n")
    (folder / "program.py").write_text(PROGRAM)
    paths = [str(folder), str(TESTS), str(TESTS.parent)]
    ended = subprocess.run(
        [sys.executable, folder / "program.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(ended.stdout)


def kernels(program):
    """cuDNN's kernels that a program calls, sorted: backward or forward, and window (0: none)."""
    calls = re.findall(
        r"@__cudnn\$fmha\w*Softmax(Backward)?\(.*?sliding_window_length\\22: (\d+)", program
    )
    return sorted(("backward" if back else "forward", int(window)) for back, window in calls)


@pytest.mark.parametrize("name", ["step", "step with less memory"])
def test_the_step_attends_by_cudnn_and_keeps_the_results_for_its_gradients(lowered, name):
    assert kernels(lowered[name]) == [("backward", 0), ("forward", 0)]


def test_cudnn_is_asked_for_windows_in_local_layers(lowered):
    assert kernels(lowered["step with windows"]) == [
        *[("backward", 0), ("backward", 8), ("forward", 0), ("forward", 8)],
    ]


@pytest.mark.parametrize("name", ["step in float32", "step with a cap"])
def test_what_cudnn_does_not_compute_is_computed_in_blocks(lowered, name):
    assert "cudnn" not in lowered[name]


@pytest.mark.parametrize("name", ["one row", "rows", "prompt"])
def test_reading_tokens_makes_no_copy_of_a_cache(lowered, name):
    """Of each array of the cache, only a scatter into its own memory is asked for."""
    program = lowered[name]
    rows = 4 if name == "rows" else 1
    shape = rf"tensor<{rows}x\d+x128x64xbf16>"
    (head,) = re.findall(r"func.func public @main\((.*)", program)
    assert len(re.findall(rf"{shape} {{[^}}]*tf.aliasing_output", head)) == 6
    # An operation ends with the type of its result, a scatter after the braces of its function.
    made = re.findall(rf"^ *(\S+) .*{shape}$", program, re.MULTILINE)
    assert made == ["})"] * 6 and program.count('"stablehlo.scatter"') >= 6
