"""An expert stores only what differs from its parent: whole tensors, or products of a low rank."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_training import MODEL

from clustering.errors import UserError
from experts.verify import verify
from xelm import open_run
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import (
    check_checkpoint,
    load_parameters,
    read_for_inference,
    write_checkpoint,
    write_whole,
)
from xelm.models.difference import compressed, difference, reverted, store, write_difference
from xelm.models.low_rank import LOW_RANK, truncated
from xelm.models.parameters import by_path
from xelm.runs.compress import layers_of
from xelm.runs.options import AdoptOptions, CompressOptions

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def pair(parameters, tmp_path_factory):
    """A base, and a checkpoint that was trained from it with its first layer frozen."""
    folder, draw = tmp_path_factory.mktemp("pair"), np.random.default_rng(0)
    write_checkpoint(folder / "seed", MODEL, parameters)
    shutil.copytree(folder / "seed", folder / "tuned")
    tensors = load_file(folder / "seed" / WEIGHTS)
    for name, values in tensors.items():
        if "layers.0." not in name:
            tensors[name] = values + 0.1 * draw.normal(size=values.shape).astype(np.float32)
    save_file(tensors, folder / "tuned" / WEIGHTS, {"format": "pt"})
    return folder


def arrays(directory):
    return {p: np.asarray(a) for p, a in by_path(load_parameters(directory, MODEL)).items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for path, values in one.items():
        assert values.tobytes() == other[path].tobytes(), path


def test_only_tensors_that_differ_are_stored_and_the_composition_has_every_bit(pair, tmp_path):
    shutil.copytree(pair, tmp_path / "run")
    seed, tuned = tmp_path / "run/seed", tmp_path / "run/tuned"
    wanted, tensors = arrays(tuned), load_file(tuned / WEIGHTS)
    store(tuned, seed, tmp_path / "run/experts/a/v1")
    assert not tuned.exists()
    first = tmp_path / "run/experts/a/v1"
    own = load_file(first / WEIGHTS)
    assert set(own) == {name for name in tensors if "layers.0." not in name}
    assert sorted(p.name for p in first.iterdir()) == ["base.json", WEIGHTS]
    assert_same_bits(arrays(first), wanted)
    # A child of it that differs in one tensor, and a child of that: the chain of bases.
    write_whole(first, tmp_path / "run/child")
    changed = load_file(tmp_path / "run/child" / WEIGHTS)
    changed["model.layers.1.mlp.up_proj.weight"] *= np.float32(1.5)
    save_file(changed, tmp_path / "run/child" / WEIGHTS, {"format": "pt"})
    wanted = arrays(tmp_path / "run/child")
    second = tmp_path / "run/experts/b/v1"
    store(tmp_path / "run/child", first, second)
    assert list(load_file(second / WEIGHTS)) == ["model.layers.1.mlp.up_proj.weight"]
    assert_same_bits(arrays(second), wanted)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert_same_bits(arrays(tmp_path / "moved/experts/b/v1"), wanted)


def test_a_checkpoint_of_which_nearly_all_differs_stays_complete(pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair / "seed", other)
    tensors = load_file(other / WEIGHTS)
    tensors = {name: v if v.ndim == 1 else v + np.float32(1) for name, v in tensors.items()}
    save_file(tensors, other / WEIGHTS, {"format": "pt"})
    found = difference(other, pair / "seed")
    assert 0 < found.saved < 0.1  # the norms are equal
    store(other, pair / "seed", tmp_path / "experts/v1")
    assert check_checkpoint(tmp_path / "experts/v1") == MODEL
    assert (tmp_path / "experts/v1/config.json").is_file()


def test_reverted_layers_are_those_of_the_base(pair, tmp_path):
    shutil.copytree(pair, tmp_path / "run")
    seed, tuned = tmp_path / "run/seed", tmp_path / "run/tuned"
    write_difference(tmp_path / "run/v2", reverted(tuned, seed, [1]), "float32")
    came, tuned, seed = (arrays(folder) for folder in (tmp_path / "run/v2", tuned, seed))
    for path, values in came.items():
        if path.startswith("blocks/"):
            np.testing.assert_array_equal(values, seed[path])
        else:
            np.testing.assert_array_equal(values, tuned[path])
            assert (values != seed[path]).any()


def test_the_error_of_rank_r_is_the_root_of_the_tail_of_the_squares():
    # Eckart and Young.
    matrix = np.random.default_rng(0).normal(size=(9, 14))
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 4, 8):
        a, b, scale = truncated(matrix, rank=rank)
        assert (a.shape, b.shape, scale) == ((rank, 14), (9, rank), 1.0)
        error = np.linalg.norm(matrix - b @ a)
        assert error == pytest.approx(np.sqrt(np.square(values[rank:]).sum()), rel=1e-12)
        np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=1e-12)
    full = truncated(matrix, rank=99)
    np.testing.assert_allclose(full.b @ full.a, matrix, atol=1e-12)
    energy = np.square(values).cumsum() / np.square(values).sum()
    for share in (0.5, 0.9, 1.0):
        kept = len(truncated(matrix, energy=share).a)
        assert kept == np.count_nonzero(energy < share * (1 - 1e-12)) + 1
    assert len(truncated(matrix[:, :1] @ matrix[:1], rank=5).a) == 1  # no factors of nothing
    assert len(truncated(0 * matrix, energy=0.9).a) == 0


@pytest.mark.parametrize("rank", [2, 99])
def test_a_compressed_checkpoint_differs_by_the_tail_of_each_matrix(pair, tmp_path, rank):
    shutil.copytree(pair, tmp_path / "run")
    seed, tuned = tmp_path / "run/seed", tmp_path / "run/tuned"
    found = compressed(difference(tuned, seed), tuned, rank=rank, energy=None)
    write_difference(tmp_path / "run/v2", found, "float32")
    came, wanted, base = arrays(tmp_path / "run/v2"), arrays(tuned), arrays(seed)
    if rank == 99:  # factors of the full rank would be larger than the matrix
        assert not (tmp_path / "run/v2" / LOW_RANK).exists()
        assert_same_bits(came, wanted)
        return
    size = (tmp_path / "run/v2" / LOW_RANK).stat().st_size
    assert size < (tuned / WEIGHTS).stat().st_size / 3
    for path, values in came.items():
        if path.endswith("scale"):
            assert values.tobytes() == wanted[path].tobytes()
            continue
        layers = range(len(values)) if path.startswith("blocks/") else [...]
        for layer in layers:
            change = wanted[path][layer].astype(np.float64) - base[path][layer]
            tail = np.linalg.svd(change, compute_uv=False)[rank:]
            error = np.linalg.norm(wanted[path][layer].astype(np.float64) - values[layer])
            assert error == pytest.approx(np.sqrt(np.square(tail).sum()), rel=1e-4, abs=1e-6), path


def test_a_compressed_version_is_published_with_its_figures(copy):
    run = open_run(copy.directory)
    before = run.registry().expert("en-es")
    with pytest.raises(UserError, match=r"the models of this RUN have the layers 0-1; got '1-2'"):
        run.compress("en-es", CompressOptions(revert="1-2"))
    with pytest.raises(UserError, match=r"with rank 500 no matrix of .*en-es/v1 takes less than n"):
        run.compress("en-es", CompressOptions(rank=500))
    options = CompressOptions(rank=6)
    after = run.compress("en-es", options)
    assert (after.reference, after.parent, after.replaces) == ("en-es@v2", "seed", 1)
    assert after.made == {"by": "compress", "from": "en-es@v1", "rank": 6}
    assert (after.tokens, after.data, after.languages) == (
        *(before.tokens, before.data, before.languages),
    )
    own = after.evaluation["own"]["en"]
    assert own["present"] == before.evaluation["own"]["en"]["expert"]
    assert own["expert"] == pytest.approx(own["present"], rel=0.01)
    assert own["expert"] != own["present"]
    assert verify(copy.directory) == []
    assert [e.action for e in run.history("en-es")][-2:] == ["compress", "publish"]
    sizes = {e.version: e.bytes for e in run.experts() if e.name == "en-es"}
    assert sizes[2] < sizes[1] / 2
    # A mixture of the compressed expert, which shares the seed's arrays, and a complete one.
    ensemble, text = run.ensemble("uniform"), "en text"
    alone = [
        score_documents(
            ensemble.model,
            read_for_inference(
                run.registry().expert(name).directory(copy.directory), ensemble.model
            ),
            [np.asarray(ids) for ids in ensemble.tokenizer.encode([text])],
            **ensemble.reading,
        )[0]
        for name in ensemble.names
    ]
    wanted = -np.logaddexp(*alone).sum() + len(alone[0]) * np.log(2)
    assert ensemble.score([text]).nats[0] == pytest.approx(wanted, rel=1e-5)
    assert run.rollback("en-es").reference == "en-es@v1"


def test_an_adopted_checkpoint_with_frozen_layers_is_stored_as_its_difference(copy, tmp_path):
    run, given = open_run(copy.directory), tmp_path / "given"
    shutil.copytree(run.seed, given)
    tensors = load_file(given / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(1.001)
    save_file(tensors, given / WEIGHTS, {"format": "pt"})
    expert = run.adopt(given, ["pt"], options=AdoptOptions(name="portuguese"))
    directory = expert.directory(copy.directory)
    assert set(expert.sha256) == {"base.json", WEIGHTS, "centre.npz", "README.md"}
    assert list(load_file(directory / WEIGHTS)) == ["model.layers.1.mlp.up_proj.weight"]
    run.export("portuguese", tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / WEIGHTS)
    assert {n: v.tobytes() for n, v in whole.items()} == {
        n: v.tobytes() for n, v in tensors.items()
    }
    assert verify(copy.directory) == []


def test_options_of_compression_are_checked():
    assert layers_of("2, 4-5,4", 6) == (2, 4, 5)
    for text, line in {"a": "layers such as 4-7", "5-4": "layers 0-5; got", "6": "got '6'"}.items():
        with pytest.raises(UserError, match=line):
            layers_of(text, 6)
    for wrong, line in {
        (): "say how to compress",
        (("rank", 4), ("energy", 0.5)): "give a rank or an energy",
        (("rank", 0),): "a rank must be at least 1; got 0",
        (("energy", 1.5),): r"an energy must be above 0 and at most 1; got 1\.5",
    }.items():
        with pytest.raises(UserError, match=line):
            CompressOptions(**dict(wrong))
