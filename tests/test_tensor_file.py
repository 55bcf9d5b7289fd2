"""Files of weights, written one tensor after the other."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_training import MODEL

from clustering import hub_files
from clustering.hub_files import INDEX, WEIGHTS
from xelm.models import weights
from xelm.models.adapters import Adapter
from xelm.models.checkpoint import (
    load_parameters,
    read_config,
    write_adapted,
    write_checkpoint,
    write_whole,
)
from xelm.models.parameters import fresh_parameters
from xelm.models.tensor_file import TensorKind, write_tensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "a": np.full((), 2, np.float64),
    "odd": np.arange(3).astype(jnp.bfloat16),
    "none": np.zeros((0, 4), np.float16),
}
KINDS = {name: TensorKind.of(str(a.dtype), a.shape) for name, a in TENSORS.items()}


def test_files_are_read_by_the_library_as_they_were_written(tmp_path):
    write_tensors(tmp_path, KINDS, TENSORS.values())
    found = load_file(tmp_path / WEIGHTS)
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in TENSORS.items()
    }
    with safe_open(tmp_path / WEIGHTS, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert TensorKind.stored(file.get_slice("odd")) == KINDS["odd"]
        assert TensorKind.stored(file.get_slice("a")) == KINDS["a"]


def test_the_file_is_the_librarys_bit_for_bit(tmp_path):
    """So that experts published before and now have the same hashes for the same weights."""
    tensors = TENSORS | {"é": np.ones(2, np.float32), "blocks.1": np.zeros((2, 2), np.float32)}
    kinds = {name: TensorKind.of(str(a.dtype), a.shape) for name, a in tensors.items()}
    write_tensors(tmp_path, kinds, tensors.values())
    contiguous = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_weights_beyond_the_size_of_a_file_go_into_several(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_files, "SHARD_BYTES", 30)
    write_tensors(tmp_path, KINDS, TENSORS.values())
    assert (tmp_path / INDEX).exists()
    parts = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert [sorted(part) for part in parts] == [["b"], ["a", "none", "odd"]]


def test_a_tensor_of_another_kind_than_was_said_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"b must be .*F32.*; got float32 \(2, 3\)"):
        write_tensors(tmp_path, KINDS, [np.ones((2, 3), np.float32)])


class Held:
    """How many of the arrays that a function returned were there at once, at most."""

    def __init__(self, function):
        self._function, self._alive = function, []
        self.count, self.most = 0, 0

    def __call__(self, *arguments):
        array = np.array(self._function(*arguments))  # with memory of its own
        self._alive = [each for each in self._alive if each() is not None] + [weakref.ref(array)]
        self.count, self.most = self.count + 1, max(self.most, len(self._alive))
        return array


def test_one_tensor_is_held_at_a_time(tmp_path):
    made = Held(lambda: np.ones((4, 4), np.float32))
    kinds = {str(n): TensorKind("F32", (4, 4)) for n in range(20)}
    write_tensors(tmp_path, kinds, (made() for _ in range(20)))
    assert (made.count, made.most) == (20, 1)


def test_a_model_is_written_and_composed_tensor_by_tensor(tmp_path, monkeypatch):
    """Neither the writing of a trained model nor the composition of one that is an adapter of
    another holds two tensors on the host."""
    made = Held(weights.join)
    monkeypatch.setattr(weights, "join", made)
    parameters = fresh_parameters(MODEL, 0)
    write_checkpoint(tmp_path / "seed", MODEL, parameters)
    assert made.count > 15 and made.most == 1
    draw = np.random.default_rng(0)
    a, b = (draw.normal(size=(2, 16, 2)).astype(np.float32) for _ in range(2))
    adapter = Adapter(scale=0.5, factors={"blocks/query": (a, b.mT)})
    write_adapted(tmp_path / "adapted", tmp_path / "seed", adapter)
    read = Held(weights.whole_tensor)
    monkeypatch.setattr(weights, "whole_tensor", read)
    write_whole(tmp_path / "adapted", tmp_path / "whole")
    assert read.count == made.count and read.most == 1
    found = load_parameters(tmp_path / "whole", read_config(tmp_path / "whole"))
    wanted = parameters["blocks"]["query"]["weight"] + 0.5 * a @ b.mT
    np.testing.assert_allclose(found["blocks"]["query"]["weight"], wanted, atol=1e-6)
    assert (tmp_path / "whole" / "config.json").read_text() == (
        tmp_path / "seed" / "config.json"
    ).read_text()
