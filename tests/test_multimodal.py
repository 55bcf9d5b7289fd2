"""Models that read images too: their text model is read alone, and written as one."""

import json

import numpy as np
import pytest
import torch
import transformers as hub
from flax import nnx
from hub_models import GEMMA, LLAMA, assert_equal_trees, random_tokens
from safetensors.numpy import load_file, save_file

from clustering.errors import UserError
from xelm.models.checkpoint import (
    copy_checkpoint,
    load_model,
    read_config,
    read_hub_config,
    save_model,
    stored_dtype,
)
from xelm.models.foreign import check_adapter, copy_adapter, copy_foreign, faults_of
from xelm.models.parameters import parameters_of

_VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
CONFIGS = {
    "gemma3": hub.Gemma3Config(
        text_config={**GEMMA, "sliding_window_pattern": 2, "max_position_embeddings": 300},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        eos_token_id=[2, 5],
    ),
    "mistral3": hub.Mistral3Config(
        text_config={**LLAMA, "model_type": "ministral3", "head_dim": 12, "sliding_window": 9},
        vision_config=_VISION | {"model_type": "pixtral", "head_dim": 8},
        tie_word_embeddings=False,
    ),
}
TEXT = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "mistral3": ("ministral3", "Ministral3ForCausalLM"),
}
NAMES = ("gemma3", pytest.param("mistral3", marks=pytest.mark.slow))
TOKENS = random_tokens((1, 40))
logits_of = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def whole(name, tmp_path_factory):
    """The directory of a random model that reads images, and its logits for a text."""
    directory = tmp_path_factory.mktemp(name) / "hub"
    torch.manual_seed(0)
    model = hub.AutoModelForImageTextToText.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory, logits_of_transformers(model)


def logits_of_transformers(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_the_text_model_has_the_logits_of_the_whole_model(whole):
    directory, wanted = whole
    model = load_model(directory)
    np.testing.assert_allclose(logits_of(model, TOKENS), wanted, atol=1e-4, rtol=1e-4)


def check_text_model(name, whole, directory):
    """Asserts that a directory has the text model of another one, bit for bit, and no more."""
    source, wanted = whole
    written = json.loads((directory / "config.json").read_text())
    model_type, architecture = TEXT[name]
    assert (written["model_type"], written["architectures"]) == (model_type, [architecture])
    stored, tensors = (load_file(d / "model.safetensors") for d in (source, directory))
    assert sum(t.size for t in tensors.values()) == read_config(source).parameter_count
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(values, stored[f"language_model.{tensor}"], tensor)
    loaded = hub.AutoModelForCausalLM.from_pretrained(directory)
    assert type(loaded).__name__ == architecture
    np.testing.assert_allclose(logits_of_transformers(loaded.eval()), wanted, atol=1e-5, rtol=1e-5)


def test_a_seed_is_the_text_model_alone(name, whole, tmp_path):
    copy_checkpoint(whole[0], tmp_path / "seed", lambda folder: None)
    check_text_model(name, whole, tmp_path / "seed")
    assert read_config(tmp_path / "seed") == read_config(whole[0])


def test_a_saved_model_is_the_text_model_alone(name, whole, tmp_path):
    save_model(load_model(whole[0]), tmp_path / "out")
    check_text_model(name, whole, tmp_path / "out")


def test_an_adopted_model_is_the_text_model_alone(name, whole, tmp_path):
    assert faults_of(whole[0], read_config(whole[0])) == []
    copy_foreign(whole[0], tmp_path / "own", whole[0])
    check_text_model(name, whole, tmp_path / "own")
    copy_foreign(whole[0], tmp_path / "half", whole[0], dtype="bfloat16")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == stored_dtype(tmp_path / "half") == "bfloat16"


def test_both_ways_to_name_tensors_are_read(name, whole, tmp_path):
    """transformers writes the older one, and names tensors by the newer one in memory."""
    tensors = load_file(whole[0] / "model.safetensors")
    newer = {
        tensor.replace("language_model.lm_head", "lm_head")
        .replace("language_model.model", "model.language_model")
        .replace("vision_tower", "model.vision_tower")
        .replace("multi_modal", "model.multi_modal"): values
        for tensor, values in tensors.items()
    }
    assert not newer.keys() & tensors.keys()
    save_file(newer, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    found, wanted = (parameters_of(load_model(d)) for d in (tmp_path, whole[0]))
    assert_equal_trees(found, wanted)


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
def test_the_text_model_has_the_special_ids_of_the_whole_model(name, whole):
    config = read_hub_config(whole[0])
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 5])


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights are not supported"),
        ({"text_config": {"final_logit_softcapping": 3.0}}, "final_logit_softcapping must be None"),
        ({"text_config": {"model_type": "t5"}}, "'t5' is not known"),
    ],
)
def test_what_the_text_model_would_lack_is_refused(name, whole, edit, fault, tmp_path):
    config = json.loads((whole[0] / "config.json").read_text())
    for key, value in edit.items():
        config[key] = {**config.get(key, {}), **value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=fault):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
@pytest.mark.parametrize("tied", [True, False])
def test_the_setting_of_the_whole_model_decides_whether_the_head_is_tied(
    name, whole, tied, tmp_path
):
    config = json.loads((whole[0] / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = not tied
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    assert read_config(tmp_path).tie_embeddings == tied


@pytest.mark.parametrize("name", ["mistral3"], indirect=True)
@pytest.mark.slow
def test_a_head_is_tied_where_nothing_says_so_unless_it_is_stored(name, whole, tmp_path):
    """As transformers decides. Settings of older checkpoints leave it out."""
    config = json.loads((whole[0] / "config.json").read_text())
    for place in (config, config["text_config"]):
        place.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).tie_embeddings
    (tmp_path / "model.safetensors").write_bytes((whole[0] / "model.safetensors").read_bytes())
    assert not read_config(tmp_path).tie_embeddings
    model = hub.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    wanted = logits_of_transformers(model)
    found = logits_of(load_model(tmp_path), TOKENS)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
@pytest.mark.parametrize("start", ["model.language_model", "language_model.model"])
def test_an_adapter_of_the_whole_model_fits_the_text_model(name, whole, start, tmp_path):
    save_model(load_model(whole[0]), tmp_path / "text")
    draw, module = np.random.default_rng(0), "layers.1.self_attn.o_proj"
    factors = {"A": draw.normal(size=(2, 48)), "B": draw.normal(size=(32, 2))}
    (tmp_path / "lora").mkdir()
    save_file(
        {
            f"base_model.model.{start}.{module}.lora_{which}.weight": values.astype(np.float32)
            for which, values in factors.items()
        },
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": True}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(described))
    assert check_adapter(tmp_path / "lora", tmp_path / "text") == "LoRA of rank 2 on o_proj"
    copy_adapter(tmp_path / "lora", tmp_path / "own", tmp_path / "text")
    found, base = (
        parameters_of(load_model(tmp_path / name))["blocks"]["output"]["weight"]
        for name in ("own", "text")
    )
    change = (factors["B"] @ factors["A"]).T
    np.testing.assert_allclose(found[1] - base[1], change, atol=1e-4)
    np.testing.assert_array_equal(found[0], base[0])
