"""Checkpoints of the Hub in and out: several files, dtypes, shards, and what does not match."""

import copy
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hub_models import CONFIGS, FAMILIES, auto_model, random_model, random_tokens, saved
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel, LlamaModel

from clustering import hub_files
from clustering.errors import UserError
from xelm.models import weights
from xelm.models.checkpoint import (
    check_checkpoint,
    copy_checkpoint,
    load_model,
    load_parameters,
    read_config,
    save_model,
    write_checkpoint,
)
from xelm.models.config import ModelConfig
from xelm.models.families import family
from xelm.models.parameters import by_path, parameters_of, shapes, stacked
from xelm.models.weights import (
    GATHERED_BYTES,
    Weights,
    gathered_rows,
    stored_tensors,
    write_weights,
)
from xelm.training.sharding import parameter_shardings

INDEX = "model.safetensors.index.json"
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
logits_of = nnx.jit(lambda model, tokens: model(tokens))


def assert_equal_trees(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def change(directory, edit):
    """Edits the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path):
    return saved(CONFIGS["llama-grouped"], tmp_path / "hub").directory


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_half_precision_are_widened_and_narrowed_exactly(dtype, tmp_path):
    model = random_model(CONFIGS["gpt2"]).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hub")
    wide = load_model(tmp_path / "hub")
    table = model.transformer.wte.weight.detach().float().numpy()
    np.testing.assert_array_equal(wide.embedding[...], table)
    same = load_model(tmp_path / "hub", dtype=dtype)
    save_model(same, tmp_path / "out", like=tmp_path / "hub")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hub", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize("name", FAMILIES)
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
    assert len(reads["embedding"]) == len(reads["blocks/up/weight"]) == 4
    assert_equal_trees(spread, load_parameters(directory, config))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, spread, shardings))


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "xlm-roberta"])
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
from xelm.config import RuntimeConfig, TrainConfig

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


# Files as older or other versions wrote them, and as people edit them.
EDITED = {
    "llama-grouped": [
        {"rope_parameters": None, "rope_theta": 300.0},
        {"rope_parameters": None, "rope_theta": 300.0, "rope_scaling": LINEAR},
        {"rope_scaling": LINEAR},
        {"rms_norm_eps": None, "rope_parameters": None},
        {"hidden_act": "gelu_new"},
    ],
    "mistral-local": [
        {"sliding_window": None},
        {"layer_types": ["full_attention"] * 3},
    ],
    "qwen2-partly-local-tied": [
        {"layer_types": None, "max_window_layers": 2},
        {"layer_types": None, "use_sliding_window": False},
        {"layer_types": None, "sliding_window": None},
    ],
    "qwen3": [{"rope_parameters": None, "rope_scaling": {**YARN, "type": "yarn"}}],
    "gemma2": [
        {"layer_types": None, "rope_parameters": None, "rope_theta": 50.0},
        {"attn_logit_softcapping": None, "query_pre_attn_scalar": 7},
    ],
    "gemma3": [
        {"layer_types": None, "sliding_window_pattern": 3, "rope_parameters": None},
        {"rope_parameters": None, "rope_theta": 5e4, "rope_local_base_freq": 70.0},
        {"rope_parameters": None, "rope_theta": 5e4, "rope_scaling": LINEAR},
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ],
    "xglm": [{"scale_embedding": False}, {"activation_function": "relu"}],
    "bloom": [{"hidden_size": None, "n_embed": 36}],
    "gpt2": [{"n_embd": None, "hidden_size": 36}, {"activation_function": "relu"}],
    "bert": [{"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}],
    "xlm-roberta": [{"layer_norm_eps": 1e-3}],
    "modernbert": [
        {"layer_types": None, "global_attn_every_n_layers": 2, "rope_parameters": None},
        {"rope_parameters": None, "global_rope_theta": 50.0, "local_rope_theta": 30.0},
    ],
}


@pytest.mark.parametrize(
    ("name", "edit"), [(name, edit) for name, edits in EDITED.items() for edit in edits]
)
def test_other_ways_to_write_a_config_mean_what_they_mean_to_transformers(name, edit, tmp_path):
    pair = saved(CONFIGS[name], tmp_path / "hub")
    path = pair.directory / "config.json"
    edited = {**json.loads(path.read_text()), **edit}
    # None takes an entry out, save where null itself has a meaning.
    kept = ("sliding_window", "attn_logit_softcapping")
    edited = {key: value for key, value in edited.items() if value is not None or key in kept}
    path.write_text(json.dumps(edited))
    reference = auto_model(pair.directory)
    tokens = random_tokens((1, 40))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    logits = logits_of(load_model(pair.directory), tokens)
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "edit", "fault"),
    [
        ("llama-grouped", {"hidden_act": "mish"}, "hidden_act must be silu or .*; .* has mish"),
        ("llama-grouped", {"rope_parameters": {**LINEAR, "rope_type": "longrope"}}, "rope_type"),
        ("llama-grouped", {"hidden_size": "32"}, "hidden_size.*expected int, got str"),
        ("llama-grouped", {"num_attention_heads": 3}, "multiple"),
        ("llama-grouped", {"model_type": "t5"}, "'t5' is not known; known: llama, mistral"),
        ("llama-grouped", {"model_type": None}, "model_type None is not known"),
        ("llama-grouped", {"model_type": ["llama"]}, "is not known"),
        ("llama-grouped", {"quantization_config": "gptq"}, "quantised weights are not supported"),
        ("ministral", {"head_dim": None}, "head_dim must be a number"),
        ("xlm-roberta", {"pad_token_id": None}, "pad_token_id must be a number"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types"),
        ("xglm", {"pad_token_id": 5}, "pad_token_id must be None or 0 or 1"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ("bert", {"position_embedding_type": "relative_key"}, "must be absolute"),
        ("xlm-roberta", {"hidden_act": "relu"}, "hidden_act must be gelu"),
        ("modernbert", {"classifier_activation": "relu"}, "classifier_activation must be gelu"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(name, edit, fault, tmp_path):
    config = CONFIGS[name].to_dict() | edit
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=fault):
        read_config(tmp_path)


def test_a_tied_head_of_its_own_is_refused(tmp_path):
    directory = saved(CONFIGS["llama-one-key-head-tied"], tmp_path / "hub").directory
    config = read_config(directory)
    wanted = load_parameters(directory, config)
    table = {}

    def add(tensors):
        table["head"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"] = table["head"]

    change(directory, add)
    assert_equal_trees(load_parameters(directory, config), wanted)
    table["head"][77, 3] += 1e-3
    change(directory, lambda tensors: tensors.update({"lm_head.weight": table["head"]}))
    with pytest.raises(UserError, match=r"lm_head\.weight is not the same as model.embed"):
        check_checkpoint(directory)


def test_all_that_does_not_match_is_told_at_once_and_five_of_it_named(llama):
    def edit(tensors):
        for layer in range(3):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
            tensors[f"model.layers.{layer}.mlp.side_proj.weight"] = np.zeros(2, np.float32)
        tensors["model.norm.weight"] = np.zeros(7, np.float32)

    change(llama, edit)
    for look in (check_checkpoint, load_model):
        with pytest.raises(UserError) as caught:
            look(llama)
        assert str(caught.value) == (
            f"{llama} does not match its config.json: "
            "missing model.layers.0.mlp.up_proj.weight; "
            "missing model.layers.1.mlp.up_proj.weight; "
            "missing model.layers.2.mlp.up_proj.weight; "
            "unknown model.layers.0.mlp.side_proj.weight; "
            "unknown model.layers.1.mlp.side_proj.weight (and 2 more)"
        )


def test_a_tensor_of_another_shape_is_told_with_both(llama):
    change(llama, lambda tensors: tensors.update({"model.norm.weight": np.zeros(7, np.float32)}))
    with pytest.raises(
        UserError, match=r"model.norm.weight has shape \(7,\), config.json says \(32,\)"
    ):
        check_checkpoint(llama)


def test_quantised_weights_are_refused(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    change(llama, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    with pytest.raises(UserError, match=f"{name} has values of type I8"):
        check_checkpoint(llama)
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised weights are not supported"):
        read_config(llama)


def test_pickles_are_refused_with_the_ways_out(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match="can run code and are not read") as caught:
        load_model(llama)
    fetch = f"hf download OWNER/NAME --include '*.safetensors' --local-dir {llama}"
    convert = f"AutoModelForCausalLM as M; M.from_pretrained('{llama}').save_pretrained('{llama}')"
    assert fetch in str(caught.value) and convert in str(caught.value)


def test_one_file_of_weights_comes_before_an_index_as_in_transformers(tmp_path):
    """Of a directory in which both were left, by a conversion or an upload."""
    directory = saved(CONFIGS["llama-grouped"], tmp_path / "hub").directory
    wanted = auto_model(directory).state_dict()["model.norm.weight"].numpy()
    other = load_file(directory / "model.safetensors")
    other["model.norm.weight"] = other["model.norm.weight"] + 1
    save_file(other, directory / "old.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "old.safetensors")}
    (directory / INDEX).write_text(json.dumps(index))
    assert np.array_equal(auto_model(directory).state_dict()["model.norm.weight"].numpy(), wanted)
    np.testing.assert_array_equal(load_model(directory).norm.scale[...], wanted)
    copy_checkpoint(directory, tmp_path / "copy", lambda folder: None)
    assert not (tmp_path / "copy" / INDEX).exists()


@pytest.mark.parametrize("kinds", [["full_attention"] * 3, None], ids=["all", "null"])
def test_mistral_with_layer_types_is_a_ministral(kinds, tmp_path):
    """transformers choose the family by the key alone, whatever stands there."""
    directory = saved(CONFIGS["mistral-local"], tmp_path / "hub").directory
    source = json.loads((directory / "config.json").read_text()) | {"layer_types": kinds}
    (directory / "config.json").write_text(json.dumps(source))
    reference = auto_model(directory)
    assert type(reference).__name__ == "MinistralForCausalLM"
    assert read_config(directory).local_layers == (() if kinds else (0, 1, 2))
    save_model(load_model(directory), tmp_path / "out")
    assert type(auto_model(tmp_path / "out")).__name__ == "MinistralForCausalLM"
    tokens = random_tokens((1, 40))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(load_model(directory), tokens), wanted, atol=1e-4)


def test_an_adapter_beside_the_weights_is_refused(llama):
    """transformers would apply it, where peft is installed."""
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"has an adapter .* merge the two"):
        load_model(llama)


@pytest.mark.parametrize(
    ("name", "value"),
    [("configuration_files", ["config.5.0.0.json"]), ("transformers_weights", "a.safetensors")],
)
def test_settings_by_which_transformers_read_other_files_are_refused(name, value, llama):
    source = json.loads((llama / "config.json").read_text()) | {name: value}
    (llama / "config.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match=f"{name} is not read"):
        load_model(llama)


def test_a_loaded_model_is_saved_with_what_lay_beside_it_in_its_dtype(tmp_path):
    model = random_model(CONFIGS["qwen3"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "additional_chat_templates").mkdir()
    beside = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "LICENSE": "terms",
        "Notice.txt": "Whose it is.",
    }
    for file, text in beside.items():
        (tmp_path / "hub" / file).write_text(text)
    (tmp_path / "hub" / "modeling.py").write_text("print('ran')")
    loaded = load_model(tmp_path / "hub")
    assert loaded.embedding.dtype == jnp.float32  # as CPUs compute
    save_model(loaded, tmp_path / "out")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hub", "out"))
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    assert {file: (tmp_path / "out" / file).read_text() for file in beside} == beside
    assert not (tmp_path / "out" / "modeling.py").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    save_model(loaded, tmp_path / "wide", dtype="float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in wide.values()} == {"float32"}
    (tmp_path / "hub" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"loaded from, has no tokenizer\.json any more"):
        save_model(loaded, tmp_path / "again")


def test_models_that_differ_in_where_they_lie_share_one_program(llama, tmp_path):
    copy_checkpoint(llama, tmp_path / "copy", lambda folder: None)
    counted = []

    @nnx.jit
    def first(model):
        counted.append(model)
        return model.embedding[0]

    for directory in (llama, tmp_path / "copy"):
        first(load_model(directory))
    assert len(counted) == 1


def test_a_checkpoint_of_another_shape_is_not_the_likeness_of_a_model(llama, tmp_path):
    other = saved(CONFIGS["llama3"], tmp_path / "other").directory
    with pytest.raises(UserError, match=r"other is of another shape: model\.head_size=12"):
        save_model(load_model(llama), tmp_path / "out", like=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("place", [(0, 0), (9, 6)])
def test_a_value_that_is_no_number_is_found_wherever_it_is(
    value, dtype, place, tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "VALUES_CHECKED", 21)  # three rows, and one in the last part
    most = float(jnp.finfo(dtype).max)
    tensors = {
        "a": np.full((10, 7), most, dtype),
        "b": np.asarray(most, dtype),
        "c": np.zeros((0, 3), dtype),
        "d": np.arange(5),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    assert weights.tensor_without_numbers(file) is None
    tensors["a"][place] = value
    save_file(tensors, file)
    assert weights.tensor_without_numbers(file) == "a"
    save_file({"b": np.asarray(value, dtype)}, file)
    assert weights.tensor_without_numbers(file) == "b"
    file.write_bytes(file.read_bytes()[:-1])
    assert weights.tensor_without_numbers(file) is None  # the hash tells


def test_values_beyond_the_range_of_float16_are_not_written_as_such(llama, tmp_path):
    change(llama, lambda tensors: tensors["model.norm.weight"].__setitem__(3, 1e5))
    with pytest.raises(UserError, match=r"model\.norm\.weight has values beyond .* float16"):
        save_model(load_model(llama), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_saved_without_its_tied_head_is_read(tmp_path):
    model = random_model(CONFIGS["llama-one-key-head-tied"])
    model.save_pretrained(tmp_path / "whole")
    bare = LlamaModel(model.config)
    bare.load_state_dict(model.model.state_dict())
    bare.save_pretrained(tmp_path / "bare")
    config = read_config(tmp_path / "bare")
    assert_equal_trees(
        load_parameters(tmp_path / "bare", config), load_parameters(tmp_path / "whole", config)
    )


def test_old_names_of_norms_in_bert_are_read(tmp_path):
    directory = saved(CONFIGS["bert"], tmp_path / "hub").directory
    config = read_config(directory)
    wanted = load_parameters(directory, config)

    def edit(tensors):
        for name in [n for n in tensors if "LayerNorm" in n]:
            older = name.replace("weight", "gamma").replace("bias", "beta")
            tensors[older] = tensors.pop(name)

    change(directory, edit)
    assert_equal_trees(load_parameters(directory, config), wanted)


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_copies_that_encoders_carry_are_compared(name, tmp_path):
    directory = saved(CONFIGS[name], tmp_path / "hub").directory
    config = read_config(directory)
    wanted = load_parameters(directory, config)
    head, body = ("cls.predictions", "bert") if name == "bert" else ("lm_head", "roberta")
    bias = f"{head}.decoder.bias"

    def add(tensors):
        table = tensors[f"{body}.embeddings.word_embeddings.weight"]
        tensors[f"{head}.decoder.weight"] = table.copy()
        tensors[bias] = tensors[f"{head}.bias"].copy()

    change(directory, add)
    assert_equal_trees(load_parameters(directory, config), wanted)
    change(directory, lambda tensors: tensors.update({bias: tensors[bias] + 1}))
    with pytest.raises(UserError, match=f"{bias} is not the same as {head}.bias"):
        check_checkpoint(directory)


def test_files_of_weights_alone_are_copied_and_the_dtype_said_once(llama, tmp_path):
    (llama / "consolidated.safetensors").write_bytes(b"another twelve gigabytes")
    source = json.loads((llama / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (llama / "config.json").write_text(json.dumps(source))
    (llama / "tokenizer.json").write_text("{}")
    copy_checkpoint(llama, tmp_path / "copy", lambda folder: None)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"} | (
        {"generation_config.json"} & {path.name for path in llama.iterdir()}
    )
    save_model(load_model(llama), tmp_path / "out", like=llama)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "float32" and "torch_dtype" not in written


def test_an_index_that_names_files_elsewhere_is_refused(llama, tmp_path):
    """Copied, they would be written elsewhere, too."""
    (llama / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "../stolen.safetensors"}
    (llama / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "stolen.safetensors").write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"names files elsewhere: \.\./stolen\.safetensors"):
        copy_checkpoint(llama, tmp_path / "copy" / "seed", lambda folder: None)
    assert not (tmp_path / "copy").exists()


def test_an_encoder_without_its_head_is_refused_with_one_that_has_it(tmp_path):
    BertModel(CONFIGS["bert"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing .*cls\.predictions") as caught:
        check_checkpoint(tmp_path)
    assert "hf download google-bert/bert-base-multilingual-cased" in str(caught.value)


@pytest.mark.parametrize("name", ["llama-grouped", "xglm"])
def test_a_config_is_made_afresh_where_that_says_all(name, tmp_path):
    directory = saved(CONFIGS[name], tmp_path / "hub").directory
    model = load_model(directory)
    write_checkpoint(tmp_path / "out", model.config, parameters_of(model))
    assert read_config(tmp_path / "out") == model.config
    assert_equal_trees(parameters_of(load_model(tmp_path / "out")), parameters_of(model))
    kind = CONFIGS[name].model_type
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind


def test_weights_that_were_not_fetched_are_named(llama):
    weights = llama / "model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 123\n")
    with pytest.raises(UserError, match="is a pointer of git-lfs: fetch the weights"):
        check_checkpoint(llama)
    weights.rename(llama / "other.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json names model-00002.*, which is missing"):
        check_checkpoint(llama)


def test_a_model_that_no_fresh_config_describes_wants_one_to_be_like(tmp_path):
    model = load_model(saved(CONFIGS["bloom"], tmp_path / "hub").directory)
    with pytest.raises(UserError, match="such as the one it was loaded from, with like="):
        write_checkpoint(tmp_path / "out", model.config, parameters_of(model))
    with pytest.raises(UserError, match="fresh models are made as llama, xglm; got bloom"):
        write_checkpoint(tmp_path / "out", model.config, parameters_of(model), model_type="bloom")
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_computes_on_padded_text_in_bfloat16(llama):
    tokens = jnp.asarray(random_tokens((1, 5)))
    padded = jnp.concatenate([jnp.zeros((1, 3), int), tokens], axis=1)
    model = load_model(llama, dtype="bfloat16")
    mask = jnp.asarray([[0] * 3 + [1] * 5])
    positions = jnp.asarray([[0] * 3 + [*range(5)]])
    np.testing.assert_allclose(model(padded, mask, positions)[:, 3:], model(tokens), atol=0.05)
