"""Apertus: constants beside its weights, and parameters of its activation."""

import numpy as np
import pytest
from hub_models import CONFIGS, change, saved
from safetensors.numpy import load_file

from clustering.errors import UserError
from experts.merge import Source, merge
from xelm.models.checkpoint import load_model, read_config, save_model
from xelm.models.difference import difference, store
from xelm.models.parameters import matrices, shapes


@pytest.fixture
def directory(tmp_path):
    return saved(CONFIGS["apertus"], tmp_path / "hub").directory


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (None, "missing model.layers.1.mlp.act_fn.beta"),
        (np.float32(0.25), "act_fn.beta must be 0.5 in this family; got 0.25"),
        (np.full((1,), 0.5, np.float32), "act_fn.beta must be 0.5"),
    ],
)
def test_a_constant_that_is_another_one_is_refused(values, fault, directory):
    name = "model.layers.1.mlp.act_fn.beta"

    def edit(tensors):
        tensors.pop(name)
        if values is not None:
            tensors[name] = np.asarray(values)

    load_model(directory)
    change(directory, edit)
    with pytest.raises(UserError, match=fault):
        load_model(directory)


def test_a_constant_in_bfloat16_is_the_rounded_one(directory, tmp_path):
    save_model(load_model(directory), tmp_path / "out", dtype="bfloat16")
    load_model(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.act_fn.eps"]
    assert found.dtype == "bfloat16" and found == found.dtype.type(-1e-6)


def test_constants_are_no_difference(directory, tmp_path):
    save_model(load_model(directory), tmp_path / "other")
    change(tmp_path / "other", lambda tensors: tensors["model.norm.weight"].__imul__(2))
    found = difference(tmp_path / "other", directory)
    assert found is not None and list(found.tensors) == ["model.norm.weight"]
    store(tmp_path / "other", directory, tmp_path / "stored")
    assert list(load_file(tmp_path / "stored" / "model.safetensors")) == ["model.norm.weight"]
    assert read_config(tmp_path / "stored") == read_config(directory)


def test_weight_decay_and_low_precision_are_for_matrices_and_not_for_the_activation(directory):
    found = matrices(shapes(read_config(directory)))["blocks"]
    assert found["up"]["weight"] and not any(found["xielu"].values())


def test_a_merge_averages_the_activation_and_keeps_the_constants(directory, tmp_path):
    save_model(load_model(directory), tmp_path / "other")
    name = "model.layers.1.mlp.act_fn"
    change(tmp_path / "other", lambda tensors: tensors[f"{name}.alpha_n"].__iadd__(1))
    sources = [Source("one", directory), Source("other", tmp_path / "other")]
    merge(sources, tmp_path / "merged", weights=[1, 3])
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "merged"))
    np.testing.assert_allclose(after[f"{name}.alpha_n"], before[f"{name}.alpha_n"] + 0.75)
    assert after[f"{name}.beta"] == np.float32(0.5) and after[f"{name}.beta"].shape == ()
    assert load_model(tmp_path / "merged").config == read_config(directory)
