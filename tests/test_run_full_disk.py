"""A full disk leaves a RUN as it was."""

import os
import shutil
from pathlib import Path

import pytest
from shared import full, snapshot

from experts.lock import update
from experts.registry import Registry
from xelm.data import store_writer
from xelm.models import checkpoint, weights
from xelm.training.metrics import MetricsLog


@pytest.mark.parametrize(("module", "fails"), [(weights, "write_tensors"), (checkpoint, "flush")])
def test_a_full_disk_leaves_no_half_expert(xelm, initialised, tiny, tmp_path, module, fails):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("branch", tmp_path / "RUN", "--clusters", tiny.clusters)
    command = ("train", tmp_path / "RUN", "de-fr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, fails, full)
        outcome = xelm(*command)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    target = tmp_path / "RUN" / "experts" / "de-fr" / "v1"
    assert last == f"xelm: cannot write {target}: No space left on device; nothing was changed"
    assert not list((tmp_path / "RUN" / "experts").rglob("*")) or not list(
        (tmp_path / "RUN" / "experts" / "de-fr").iterdir()
    )
    assert Registry.load(tmp_path / "RUN").published() == ()
    # With room again, the training is not done again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        assert xelm(*command).code == 0
    path = Path("experts/de-fr/v1/model.safetensors")
    assert (tmp_path / "RUN" / path).read_bytes() == (tiny.directory / path).read_bytes()


def test_a_full_disk_leaves_the_registry_as_it_was(xelm, copy):
    update(copy.directory, lambda registry: registry.start("de-fr", parent="de-fr@v1"), "train")
    assert xelm("train", copy.directory, "de-fr").code == 0
    before = snapshot(copy.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = xelm("rollback", copy.directory, "de-fr")
    assert outcome.code == 2
    assert outcome.err == (
        f"xelm: {copy.directory / 'registry.json'} was not written: the disk is full; "
        "nothing was changed\n"
    )
    assert snapshot(copy.directory) == before


def test_a_full_disk_leaves_no_half_corpus_and_no_half_results(xelm, copy):
    for store in (copy.directory / "corpus").glob("evaluation-*"):
        shutil.rmtree(store)  # that another test made, and that would be taken as it is
    before = snapshot(copy.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer._LanguageWriter, "add", full)
        outcome = xelm("evaluate", copy.directory, "--corpus", copy.held_out)
    assert outcome.code == 2
    assert "cannot write" in outcome.err and str(copy.directory / "corpus") in outcome.err
    assert snapshot(copy.directory) == before


def test_a_full_disk_while_merging_leaves_nothing(xelm, tiny, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = xelm("merge", tiny.directory, "--out", tmp_path / "merged")
    assert outcome.code == 2
    assert str(tmp_path / "merged") in outcome.err
    assert not list(tmp_path.rglob("*.safetensors"))
