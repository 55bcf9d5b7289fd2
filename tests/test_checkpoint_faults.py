"""Checkpoints that are not as their config.json says, or not safe: refused, with the way out."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hub_models import CONFIGS, INDEX, assert_equal_trees, change, saved
from safetensors.numpy import save_file
from transformers import AutoModel

from clustering.errors import UserError
from xelm.models import weights
from xelm.models.checkpoint import (
    check_checkpoint,
    copy_checkpoint,
    load_model,
    load_parameters,
    read_config,
)


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


def test_an_adapter_beside_the_weights_is_refused(llama):
    """transformers would apply it, where peft is installed."""
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"has an adapter .* merge the two"):
        load_model(llama)


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


def test_an_index_that_names_files_elsewhere_is_refused(llama, tmp_path):
    """Copied, they would be written elsewhere, too."""
    (llama / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "../stolen.safetensors"}
    (llama / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "stolen.safetensors").write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"names files elsewhere: \.\./stolen\.safetensors"):
        copy_checkpoint(llama, tmp_path / "copy" / "seed", lambda folder: None)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("name", "head", "instead"),
    [
        ("bert", r"cls\.predictions", "hf download google-bert/bert-base-multilingual-cased"),
        ("roberta", r"lm_head\.dense", "hf download FacebookAI/roberta-base"),
        ("eurobert", r"lm_head\.weight", "hf download EuroBERT/EuroBERT-210m"),
        ("qwen3", r"lm_head\.weight", "Take the language model that it was made from"),
    ],
)
def test_a_model_without_its_head_is_refused_with_what_to_take_instead(
    name, head, instead, tmp_path
):
    AutoModel.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"missing .*{head}") as caught:
        check_checkpoint(tmp_path)
    assert instead in str(caught.value) and "\n" not in str(caught.value)


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
