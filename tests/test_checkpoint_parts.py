"""Weights in several files, on several devices and hosts: read once, gathered within a bound."""

import copy
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from hub_models import (
    CONFIGS,
    FAMILIES,
    INDEX,
    assert_equal_trees,
    by_speed,
    random_model,
    saved,
)
from jax.sharding import AxisType
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from clustering import hub_files
from clustering.errors import UserError
from xelm.models import weights
from xelm.models.checkpoint import load_model, load_parameters, read_config, save_model
from xelm.models.config import ModelConfig
from xelm.models.families import family
from xelm.models.parameters import by_path, shapes, stacked
from xelm.models.weights import (
    GATHERED_BYTES,
    Weights,
    gathered_rows,
    stored_tensors,
    write_weights,
)
from xelm.training.sharding import parameter_shardings


def test_weights_in_several_files_are_those_in_one(tmp_path):
    model = random_model(CONFIGS["llama-grouped"])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / INDEX).exists()
    config = read_config(tmp_path / "one")
    assert_equal_trees(
        load_parameters(tmp_path / "many", config), load_parameters(tmp_path / "one", config)
    )


def test_large_models_are_written_in_files_that_transformers_loads(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_files, "SHARD_BYTES", 20_000)
    model = load_model(llama)
    save_model(model, tmp_path / "out", like=llama)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(names) > 2 and sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == 4 * model.config.parameter_count
    for name in names:
        tensors = load_file(tmp_path / "out" / name)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", by_speed(FAMILIES))
def test_every_shard_holds_its_part_and_is_read_once(name, tmp_path, monkeypatch):
    even = copy.deepcopy(CONFIGS[name])
    even.vocab_size = 96
    directory = saved(even, tmp_path / "hub").directory
    config = read_config(directory)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    shardings = parameter_shardings(config, mesh)
    reads = count_reads(monkeypatch)
    spread = load_parameters(directory, config, shardings)
    # Every shard once, however many devices hold it, and never the whole of a spread table.
    for path, places in reads.items():
        assert len(places) == len(set(places)) <= 4, path
    each = [f"expert_{number}/" for number in range(config.expert_count)] or [""]
    for path in ("embedding", *(f"blocks/{one}up/weight" for one in each)):
        assert len(reads[path]) == 4, path
    assert_equal_trees(spread, load_parameters(directory, config))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, spread, shardings))


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "xlm-roberta"])
@pytest.mark.slow
def test_what_several_hosts_hold_is_gathered_layer_by_layer_and_never_beyond_the_bound(
    name, tmp_path, monkeypatch
):
    even = copy.deepcopy(CONFIGS[name])
    even.vocab_size = 96
    directory = saved(even, tmp_path / "hub").directory
    config, kind = read_config(directory), family(even.model_type)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    spread = by_path(load_parameters(directory, config, parameter_shardings(config, mesh)))
    whole = by_path(load_parameters(directory, config))
    wanted = dict(stored_tensors(kind, config, whole, "float32"))
    largest = max(array.nbytes for array in wanted.values())
    gathered = []

    def gather(part, *, tiled):
        gathered.append(part.shape)
        return np.asarray(part)

    monkeypatch.setattr(weights, "_on_other_hosts", lambda array: True)
    monkeypatch.setattr(weights.multihost_utils, "process_allgather", gather)
    for bound in (largest, 2048):
        monkeypatch.setattr(weights, "GATHERED_BYTES", bound)
        gathered.clear()
        found = dict(stored_tensors(kind, config, spread, "float32"))
        assert_equal_trees(found, wanted)
        assert 4 * max(map(np.prod, gathered)) <= bound
        assert 4 * sum(map(np.prod, gathered)) == sum(array.nbytes for array in found.values())
    # Of one parameter several parts, and of what is stacked a layer at a time.
    assert len(gathered) > len(wanted)
    deepest = max(len(array.shape) for array in spread.values())
    assert deepest == 3 > max(map(len, gathered))


def test_values_beyond_the_range_of_float16_are_refused_where_they_are_gathered(llama, monkeypatch):
    flat = by_path(load_parameters(llama, read_config(llama)))
    monkeypatch.setattr(weights, "_on_other_hosts", lambda array: True)
    monkeypatch.setattr(weights.multihost_utils, "process_allgather", lambda part, tiled: part)
    flat["norm/scale"] = flat["norm/scale"].at[0].set(1e6)
    with pytest.raises(UserError, match=r"model\.norm\.weight has values beyond .* float16"):
        dict(stored_tensors(family("llama"), read_config(llama), flat, "float16"))


def test_no_part_of_a_model_of_22_billion_parameters_is_gathered_beyond_the_bound():
    config = ModelConfig(
        **{"vocabulary_size": 128_000, "width": 6144, "feedforward_width": 16_384},
        **{"layer_count": 54, "head_count": 48, "key_head_count": 8, "head_size": 128},
        max_length=32_768,
    )
    leaves = by_path(shapes(config))
    assert sum(leaf.size for leaf in leaves.values()) > 2e10
    assert max(4 * leaf.size for leaf in leaves.values()) > 80 * GATHERED_BYTES
    for path, leaf in leaves.items():
        shape = leaf.shape[1:] if stacked(path) else leaf.shape
        parts = list(gathered_rows(shape, 4 * math.prod(shape)))
        rows = [row for part in parts for row in range(part.start, part.stop)]
        assert rows == list(range(shape[0])), path
        row = 4 * math.prod(shape[1:])
        assert max(part.stop - part.start for part in parts) * row <= GATHERED_BYTES, path


def count_reads(monkeypatch):
    """Parameter -> the parts of it that were read."""
    found, part = {}, Weights.part

    def counted(self, path, ranges, dtype):
        found.setdefault(path, []).append(tuple(ranges))
        return part(self, path, ranges, dtype)

    monkeypatch.setattr(Weights, "part", counted)
    return found


PEAK = """
import sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from xelm.models.checkpoint import load_parameters, read_config
from xelm.models.parameters import shapes
from xelm.training.sharding import make_mesh, parameter_shardings
from xelm.training_config import RuntimeConfig, TrainConfig

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

directory, fsdp = sys.argv[1], int(sys.argv[2])
config = read_config(directory)
mesh = make_mesh(TrainConfig(tokens=1, runtime=RuntimeConfig(mesh_data=1, mesh_fsdp=fsdp)))
shardings = parameter_shardings(config, mesh)
jnp.zeros(4).block_until_ready()
peak, before, done = 0, anonymous(), False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
parameters = load_parameters(directory, config, shardings)
jax.block_until_ready(parameters)
done = True
watcher.join()
size = sum(x.nbytes for x in jax.tree.leaves(parameters))
print((peak - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_loading_takes_less_than_a_third_more_memory_than_the_model(fsdp, tmp_path):
    config = CONFIGS["llama-grouped"].to_dict() | {
        **{"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        # Half of it one table, as in small multilingual models.
        **{"vocab_size": 49_152, "architectures": ["LlamaForCausalLM"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_config(tmp_path)
    ones = {path: np.ones(leaf.shape, np.float32) for path, leaf in by_path(shapes(shape)).items()}
    kind = family("llama")
    tensors = stored_tensors(kind, shape, ones, "float32")
    write_weights(tmp_path, kind, shape, ones, "float32", tensors)
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(fsdp)],
        capture_output=True,
        text=True,
        check=True,
    )
    # The model itself is in the same memory on a CPU.
    assert 0.9 < float(out.stdout) < 1.3, out.stdout
