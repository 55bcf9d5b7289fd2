"""Checkpoints of the Hub, loaded, copied and saved: dtypes, older names, what lies beside them."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hub_models import (
    CONFIGS,
    INDEX,
    assert_equal_trees,
    auto_model,
    change,
    random_model,
    random_tokens,
    saved,
)
from safetensors.numpy import load_file, save_file
from small_training import MODEL
from transformers import LlamaModel

from clustering.errors import UserError
from xelm.models import parameters
from xelm.models.checkpoint import (
    copy_checkpoint,
    load_model,
    load_parameters,
    read_config,
    save_model,
    write_checkpoint,
)
from xelm.models.parameters import parameters_of


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


def test_one_file_of_weights_comes_before_an_index_as_in_transformers(tmp_path):
    """A conversion or an upload may leave both in a directory."""
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


@pytest.mark.parametrize("name", ["llama-grouped", "xglm"])
def test_a_config_is_made_afresh_where_that_says_all(name, tmp_path):
    directory = saved(CONFIGS[name], tmp_path / "hub").directory
    model = load_model(directory)
    write_checkpoint(tmp_path / "out", model.config, parameters_of(model))
    assert read_config(tmp_path / "out") == model.config
    assert_equal_trees(parameters_of(load_model(tmp_path / "out")), parameters_of(model))
    kind = CONFIGS[name].model_type
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind


def test_a_model_that_no_fresh_config_describes_wants_one_to_be_like(tmp_path):
    model = load_model(saved(CONFIGS["bloom"], tmp_path / "hub").directory)
    with pytest.raises(UserError, match="such as the one it was loaded from, with like="):
        write_checkpoint(tmp_path / "out", model.config, parameters_of(model))
    with pytest.raises(UserError, match="fresh models are made as llama, mixtral, xglm; got bloom"):
        write_checkpoint(tmp_path / "out", model.config, parameters_of(model), model_type="bloom")
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_computes_on_padded_text_in_bfloat16(llama):
    tokens = jnp.asarray(random_tokens((1, 5)))
    padded = jnp.concatenate([jnp.zeros((1, 3), int), tokens], axis=1)
    model = load_model(llama, dtype="bfloat16")
    mask = jnp.asarray([[0] * 3 + [1] * 5])
    positions = jnp.asarray([[0] * 3 + [*range(5)]])
    np.testing.assert_allclose(model(padded, mask, positions)[:, 3:], model(tokens), atol=0.05)


def test_a_model_is_traced_once_for_all_that_is_asked_of_its_shape(monkeypatch):
    config = replace(MODEL, width=48)
    first = parameters.shapes(config)
    monkeypatch.setattr(parameters, "Transformer", None)  # no second model can be made
    assert parameters.shapes(config)["embedding"] == first["embedding"]
    adapted = parameters.graph(config, adapted=["blocks/query"])
    assert adapted != parameters.graph(config)
    first.clear()
    assert (
        parameters.shapes(config)["blocks"].keys()
        == parameters.logical_axes(config)["blocks"].keys()
    )
    assert "lora_a" not in parameters.shapes(config)["blocks"]["query"]
