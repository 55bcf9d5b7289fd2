"""Averages of checkpoints: identities, arithmetic, refusals, and what is left on disk."""

import errno
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from clustering import hub_files
from clustering.errors import UserError
from clustering.files import sha256
from experts import merge
from experts.merge import Source

ROOT = Path(__file__).parent.parent
CONFIG = {"model_type": "llama", "num_attention_heads": 4, "transformers_version": "5.0"}


def average(paths, out, **options):
    """The linear mean unless options say otherwise."""
    return merge.merge([Source(str(path), Path(path)) for path in paths], out, **options)


def _save(directory: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


def _tree(seed: int) -> dict[str, np.ndarray]:
    """One tensor of each kind a checkpoint may hold, of odd sizes: alignment is at stake."""
    draw = np.random.default_rng(seed)
    return {
        "f64": draw.normal(size=(3,)),
        "f32": draw.normal(size=(5, 3, 2)).astype(np.float32),
        "f16": draw.normal(size=(3, 1)).astype(np.float16),
        "bf16": draw.normal(size=(7, 3)).astype(ml_dtypes.bfloat16),
        "scalar": draw.normal(size=()).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "ids": np.arange(5),
        "mask": np.array([True, False, True]),
    }


def _load(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def _bytes(tree: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in sorted(tree.items())
    }


@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.7], [3, 0, 1e-9]])
def test_the_average_of_equal_trees_is_the_tree_bit_for_bit(tmp_path, weights):
    tree = _tree(0) | {
        "odd": np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38], np.float32),
        "payload": np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32),
        "tiny": np.array([-0.0, 1e-40, 3e38], ml_dtypes.bfloat16),
    }
    paths = [_save(tmp_path / name, tree) for name in "abc"]
    out = average(paths, weights=weights, out=tmp_path / "out")
    assert _bytes(_load(out)) == _bytes(tree)


def test_values_that_all_share_keep_their_bits_beside_values_that_differ(tmp_path):
    shared = [-0.0, -np.inf, np.nan, 0.1]
    paths = [_save(tmp_path / str(x), {"w": np.array([*shared, x])}) for x in (1.0, 2.0, 6.0)]
    result = _load(average(paths, out=tmp_path / "out"))["w"]
    assert result.tobytes() == np.array([*shared, 3.0]).tobytes()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_are_the_weighted_mean_rounded_once(tmp_path, dtype):
    draw = np.random.default_rng(1)
    arrays = [draw.normal(size=(7, 4)).astype(dtype) for _ in range(3)]
    paths = [_save(tmp_path / str(i), {"w": array}) for i, array in enumerate(arrays)]
    mean = (
        1 * arrays[0].astype(float) + 2 * arrays[1].astype(float) + 5 * arrays[2].astype(float)
    ) / 8
    result = _load(average(paths, weights=[1, 2, 5], out=tmp_path / "out"))["w"]
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, mean.astype(dtype))


def test_small_differences_are_not_lost_in_the_stored_dtype(tmp_path):
    """256 + 1 is 256 in bfloat16, so a sum in that dtype would stand still."""
    values = [256.0, 2.0, 2.0, 2.0]
    paths = [
        _save(tmp_path / str(i), {"w": np.array([v], ml_dtypes.bfloat16)})
        for i, v in enumerate(values)
    ]
    assert float(_load(average(paths, out=tmp_path / "out"))["w"][0]) == 65.5


def test_one_checkpoint_averages_to_itself_and_a_weight_of_zero_is_left_out(tmp_path):
    a, b = _tree(1), _tree(2) | {"f32": np.full((5, 3, 2), np.inf, np.float32)}
    paths = [_save(tmp_path / "a", a), _save(tmp_path / "b", b)]
    assert _bytes(_load(average(paths[:1], out=tmp_path / "one"))) == _bytes(a)
    assert _bytes(_load(average(paths, weights=[2, 0], out=tmp_path / "two"))) == _bytes(a)


def test_the_file_is_one_that_transformers_takes_and_others_may_read(tmp_path):
    out = average([_save(tmp_path / name, _tree(3)) for name in "ab"], out=tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {(out / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def test_a_sharded_checkpoint_averages_like_a_whole_one(tmp_path):
    a, b = _tree(1), _tree(1) | {"f32": _tree(2)["f32"]}
    whole = [_save(tmp_path / "a", a), _save(tmp_path / "b", b)]
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(b)}
    for shard in sorted(set(weight_map.values())):
        save_file({name: b[name] for name in b if weight_map[name] == shard}, sharded / shard)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = average(whole, out=tmp_path / "expected")
    result = average([sharded, whole[0]], out=tmp_path / "result")
    assert sorted(file.name for file in result.iterdir()) == [
        "config.json",
        "merge.json",
        "model.safetensors",
    ]
    assert (result / "model.safetensors").read_bytes() == (
        expected / "model.safetensors"
    ).read_bytes()


def test_a_shard_elsewhere_is_not_read(tmp_path):
    _save(tmp_path / "a", _tree(1))
    _save(tmp_path / "b", _tree(1))
    (tmp_path / "b/model.safetensors").unlink()
    no_map = 'must have a "weight_map" of tensors to files; got '
    for weight_map, message in (
        ({"f32": "../a/model.safetensors"}, r"names files elsewhere: \.\./a/model\.safetensors"),
        ({"f32": 1}, no_map),
        (["f32"], no_map),
        ({}, no_map),
    ):
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / "b/model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=message):
            average([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out")


def test_a_large_average_is_written_in_files_that_are_no_larger_than_one_may_be(
    tmp_path, monkeypatch
):
    """No more than one of them is held."""
    paths = [_save(tmp_path / name, _tree(seed)) for seed, name in enumerate("ab")]
    whole = load_file(average(paths, out=tmp_path / "one") / "model.safetensors")
    held, most = set(), []
    tensor, save = merge._Combination.tensor, merge.save_file

    def made(combination, name):
        held.add(name)
        most.append(len(held))
        return tensor(combination, name)

    def saved(tensors, *options):
        assert tensors.keys() == held
        held.clear()
        return save(tensors, *options)

    monkeypatch.setattr(hub_files, "SHARD_BYTES", 100)
    monkeypatch.setattr(merge._Combination, "tensor", made)
    monkeypatch.setattr(merge, "save_file", saved)
    out = average(paths, out=tmp_path / "many")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 1 and sorted(set(index["weight_map"].values())) == names
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert max(most) < len(whole)
    parts = [load_file(out / name) for name in names]
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 100
    found = {name: tensor for part in parts for name, tensor in part.items()}
    assert found.keys() == whole.keys()
    assert all(found[name].tobytes() == whole[name].tobytes() for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    again = average([out, out], out=tmp_path / "again")  # and read as any other
    assert again == tmp_path / "again"


def test_terms_and_templates_come_along(tmp_path):
    paths = [_save(tmp_path / name, _tree(1)) for name in "ab"]
    (paths[0] / "LICENSE").write_text("terms")
    (paths[0] / "additional_chat_templates").mkdir()
    (paths[0] / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    out = average(paths, out=tmp_path / "out")
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"


def test_configuration_and_tokenizer_of_the_first_come_along_and_code_does_not(tmp_path):
    paths = [_save(tmp_path / name, _tree(1)) for name in "ab"]
    for number, path in enumerate(paths):
        (path / "tokenizer.json").write_text(f'{{"model": {{"vocab": {{"a": 0}}}}, "n": {number}}}')
    for name in (
        "sentencepiece.bpe.model",
        "tokenizer_bad.py",
        "optimizer.bin",
        "CARD.md",
    ):
        (paths[0] / name).write_text("first " + name)
        (paths[1] / name).write_text("second " + name)
    out = average(paths, weights=[1, 3], out=tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "merge.json",
        "model.safetensors",
        "sentencepiece.bpe.model",
        "tokenizer.json",
    ]
    assert json.loads((out / "tokenizer.json").read_text())["n"] == 0
    sources = json.loads((out / "merge.json").read_text())["sources"]
    assert [source["weight"] for source in sources] == [0.25, 0.75]
    assert sources[1]["path"] == str(paths[1])
    assert sources[1]["sha256"] == {"model.safetensors": sha256(paths[1] / "model.safetensors")}


def test_the_first_five_differences_are_named(tmp_path):
    many = {f"layer.{i}": np.zeros((2, 2), np.float32) for i in range(9)}
    other = {f"layer.{i}": np.zeros((2, 3) if i == 1 else (2, 2), np.float32) for i in range(1, 9)}
    other |= {"layer.2": np.zeros((2, 2), np.float16), "layer.3": np.zeros(4, np.float32)}
    other |= {f"new.{i}": np.zeros(1, np.float32) for i in range(3)}
    paths = [_save(tmp_path / "a", many), _save(tmp_path / "b", other)]
    with pytest.raises(UserError) as caught:
        average(paths, out=tmp_path / "out")
    message = str(caught.value)
    a, b = paths
    for fault in (
        f"layer.0 is F32[2, 2] in {a} and missing in {b}",
        f"layer.1 is F32[2, 2] in {a} and F32[2, 3] in {b}",
        f"layer.2 is F32[2, 2] in {a} and F16[2, 2] in {b}",
        f"layer.3 is F32[2, 2] in {a} and F32[4] in {b}",
        f"new.0 is missing in {a} and F32[1] in {b}",
    ):
        assert fault in message
    assert message.endswith("; and 2 more")
    assert "new.1" not in message
    assert not (tmp_path / "out").exists()


def test_other_configurations_are_refused_but_another_writer_is_not(tmp_path):
    paths = [
        _save(tmp_path / "a", _tree(1)),
        _save(tmp_path / "b", _tree(2), num_attention_heads=8),
        _save(tmp_path / "c", _tree(2), transformers_version="4.1", rope_parameters={}),
    ]
    with pytest.raises(UserError, match=r"num_attention_heads is 4 in .*a and 8 in .*b"):
        average(paths[:2], out=tmp_path / "out")
    assert average([paths[0], paths[2]], out=tmp_path / "out") == tmp_path / "out"


def test_whole_numbers_that_differ_have_no_average(tmp_path):
    paths = [_save(tmp_path / name, {"ids": np.array([i])}) for i, name in enumerate("ab")]
    with pytest.raises(UserError, match="ids has integers that differ"):
        average(paths, out=tmp_path / "out")


def test_dtypes_that_numpy_lacks_are_refused(tmp_path):
    path = _save(tmp_path / "a", {"w": np.ones(2, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(UserError, match="w has the dtype F8_E4M3, which cannot be merged"):
        average([path], out=tmp_path / "out")


def test_values_that_are_not_finite_do_not_spread(tmp_path):
    values = (1.0, np.nan)
    paths = [_save(tmp_path / str(v), {"w": np.array([0.5, v], np.float32)}) for v in values]
    with pytest.raises(UserError, match="w has values that are not finite"):
        average(paths, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "one weight for each of 2 models; got 1"),
        ([2, -1], "not be negative nor all zero; got 2, -1"),
        ([0, 0], "nor all zero"),
        ([1, np.nan], "weights must be finite; got 1, nan"),
    ],
)
def test_impossible_weights_are_refused(tmp_path, weights, message):
    paths = [_save(tmp_path / name, _tree(1)) for name in "ab"]
    with pytest.raises(UserError, match=message):
        average(paths, weights=weights, out=tmp_path / "out")


def test_what_is_no_checkpoint_is_a_users_mistake(tmp_path):
    good = _save(tmp_path / "good", _tree(1))
    bad = _save(tmp_path / "bad", _tree(1))
    with pytest.raises(UserError, match="linear merges 1 or more models; got 0"):
        average([], out=tmp_path / "out")
    (bad / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"bad/model.safetensors cannot be read as safetensors"):
        average([good, bad], out=tmp_path / "out")
    (bad / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"bad has no weights: model.safetensors is missing"):
        average([good, bad], out=tmp_path / "out")
    (bad / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json does not exist"):
        average([good, bad], out=tmp_path / "out")


def test_weights_that_are_there_are_not_overwritten(tmp_path):
    paths = [_save(tmp_path / name, _tree(i)) for i, name in enumerate("ab")]
    before = (paths[1] / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="nothing is overwritten"):
        average(paths[:1], out=paths[1])
    assert (paths[1] / "model.safetensors").read_bytes() == before
    (paths[1] / "model.safetensors").rename(paths[1] / "model.safetensors.index.json")
    with pytest.raises(UserError, match="nothing is overwritten"):
        average(paths[:1], out=paths[1])


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
        (merge, "save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_is_one_clear_line_and_leaves_no_weights(
    tmp_path, monkeypatch, module, function, error
):
    def fail(*arguments, **options):
        raise error

    path = _save(tmp_path / "a", _tree(1))
    monkeypatch.setattr(merge, "write_json", lambda path, value: path.parent.mkdir())
    monkeypatch.setattr(module, function, fail)
    with pytest.raises(UserError, match=r"was not written: .*No space left on device") as caught:
        average([path], out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]  # nothing half-written


@pytest.mark.parametrize("method", ["linear", "ties", "dare-ties", "model-stock"])
def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path, method):
    draw = np.random.default_rng(0)
    tensors, shape = 64, (64, 64)
    paths = [
        _save(
            tmp_path / str(i),
            {str(name): draw.normal(size=shape).astype(np.float32) for name in range(tensors)},
        )
        for i in range(8)
    ]
    tracemalloc.start()
    try:
        options = merge.MergeOptions(method=method)
        base = Source("base", paths[0]) if merge.METHODS[method].has_base else None
        average(paths, out=tmp_path / "out", options=options, base=base)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1.5 * tensors * math.prod(shape) * 4  # of the eight, one and a little


_DIE_BEFORE_REPLACING = """
import os, signal, sys
from pathlib import Path
from experts import merge

replace = os.replace
def die(source, target):
    if str(target).endswith("model.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = die
merge.merge([merge.Source("a", Path(sys.argv[1]))], sys.argv[2])
"""


def test_a_merge_that_is_killed_leaves_no_weights_and_can_be_run_again(tmp_path):
    path, out = _save(tmp_path / "a", _tree(1)), tmp_path / "out"
    died = subprocess.run(
        [sys.executable, "-c", _DIE_BEFORE_REPLACING, path, out], cwd=ROOT, check=False
    )
    assert died.returncode == -9
    assert not (out / "model.safetensors").exists()
    assert _bytes(_load(average([path], out=out))) == _bytes(_tree(1))
    assert list(out.glob(".*")) == []
