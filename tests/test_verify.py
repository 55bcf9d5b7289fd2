"""Verifying a RUN: every byte that the registry vouches for, and nothing beside it."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clustering.errors import UserError
from clustering.files import read_arrays, sha256, write_arrays
from experts import manifest
from experts.expert import Expert
from experts.lock import update
from experts.registry import Registry
from experts.verify import hash_directory, verify
from xelm import open_run
from xelm.runs.fit import learned


@pytest.fixture
def run(tmp_path):
    """A RUN of a seed, one published expert in two versions and one in training."""
    experts = (Expert(name="a", languages=("en",)), Expert(name="b", languages=("fr",)))
    for folder in ("seed", "experts/a/v1", "experts/a/v2", "experts/b/v1"):
        (tmp_path / folder / "tokens").mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_text(folder)
        (tmp_path / folder / "tokens/vocab.json").write_text("{}")
    registry = Registry(seed_sha256=hash_directory(tmp_path / "seed"), experts=experts)
    registry = registry.publish("a", 1, sha256=hash_directory(tmp_path / "experts/a/v1"), tokens=1)
    registry = registry.start("a").publish(
        "a", 2, sha256=hash_directory(tmp_path / "experts/a/v2"), tokens=1
    )
    registry.save(tmp_path)
    for version in (1, 2):
        manifest.record_expert(tmp_path, registry.expert("a", version))
    return tmp_path


def _found(run) -> list[tuple[str, str]]:
    return [(fault.kind, fault.file) for fault in verify(run)]


def test_a_sound_run_has_no_faults(run):
    assert verify(run) == []


def test_hashes_are_those_of_the_bytes_by_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_directory(tmp_path) == {
        "a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "sub/b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }


@pytest.mark.parametrize("folder", ["seed", "experts/a/v2", "experts/a/v1"])
def test_missing_changed_and_unknown_files_are_named(run, folder):
    (run / folder / "model.safetensors").write_text("other")
    (run / folder / "tokens/vocab.json").unlink()
    (run / folder / "modeling.py").write_text("print('ran')")
    assert _found(run) == [
        ("changed", f"{folder}/model.safetensors"),
        ("unknown", f"{folder}/modeling.py"),
        ("missing", f"{folder}/tokens/vocab.json"),
    ]


def test_a_change_of_one_byte_is_told_with_both_hashes(run):
    (run / "seed/model.safetensors").write_text("sead")
    fault = str(verify(run)[0])
    assert Registry.load(run).seed_sha256["model.safetensors"] in fault
    assert hash_directory(run / "seed")["model.safetensors"] in fault


def test_what_is_in_training_may_change(run):
    (run / "experts/b/v1/model.safetensors").write_text("a later step")
    assert verify(run) == []


def test_a_retired_version_may_be_deleted_but_a_published_one_may_not(run):
    for version in ("v1", "v2"):
        (run / f"experts/a/{version}").rename(run / f"moved-{version}")
    assert _found(run) == [
        ("missing", "experts/a/v2/model.safetensors"),
        ("missing", "experts/a/v2/tokens/vocab.json"),
    ]


def test_a_path_out_of_the_run_is_a_fault_and_is_not_read(run):
    value = json.loads((run / "registry.json").read_text())
    value["experts"][0]["path"] = "../elsewhere"
    (run / "registry.json").write_text(json.dumps(value))
    assert _found(run) == [("broken", "registry.json")]
    assert "path must lie inside the RUN; got '../elsewhere'" in str(verify(run)[0])


def test_a_link_to_a_directory_is_a_fault(run):
    (run / "elsewhere").mkdir()
    (run / "experts/a/v2/link").symlink_to(run / "elsewhere", target_is_directory=True)
    assert _found(run) == [("broken", "experts/a/v2")]


def test_a_link_that_leads_nowhere_is_a_missing_file(run):
    (run / "seed/model.safetensors").unlink()
    (run / "seed/model.safetensors").symlink_to(run / "nowhere")
    assert _found(run) == [("missing", "seed/model.safetensors")]


def test_a_directory_that_is_not_there_has_no_hashes(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        hash_directory(tmp_path / "none")


def test_what_cannot_be_read_is_a_fault_and_does_not_end_the_search(run, monkeypatch):
    def unreadable(path):
        if path.name == "model.safetensors":
            raise UserError(f"{path} cannot be read: Permission denied")
        return sha256(path)

    monkeypatch.setattr("experts.verify.sha256", unreadable)
    (run / "seed/tokens/vocab.json").write_text("other")
    assert _found(run)[:2] == [
        ("broken", "seed/model.safetensors"),
        ("changed", "seed/tokens/vocab.json"),
    ]
    assert len(_found(run)) == 4


def test_a_directory_without_a_registry_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is no RUN"):
        verify(tmp_path)


# What inference reads beside seed and experts


@pytest.fixture
def whole(run):
    """The RUN with a dense baseline, a router and a vectoriser, all recorded."""
    for name in ("dense/model.safetensors", "routers/learned-abc.npz", "vectoriser.npz"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    manifest.record(run, ["dense", "routers", "vectoriser.npz"])
    return run


def test_all_that_is_recorded_is_sound(whole):
    assert verify(whole) == []
    assert list(manifest.recorded(whole)) == [
        *("dense/model.safetensors", "routers/learned-abc.npz", "vectoriser.npz")
    ]


@pytest.mark.parametrize(
    "name", ["dense/model.safetensors", "routers/learned-abc.npz", "vectoriser.npz"]
)
def test_what_was_changed_is_named_and_no_later_command_vouches_for_it(whole, name):
    (whole / name).write_text("zeros")
    assert _found(whole) == [("changed", name)]
    manifest.record(whole, ["dense", "routers", "vectoriser.npz"])
    assert _found(whole) == [("changed", name)]
    manifest.record(whole, [name], again=True)  # by the command that wrote it anew
    assert _found(whole) == []


def test_what_nobody_recorded_is_named(whole):
    (whole / "routers/other.npz").write_text("")
    (whole / "clusters.json").write_text("{}")
    assert _found(whole) == [("unknown", "clusters.json"), ("unknown", "routers/other.npz")]


def test_what_is_gone_is_named_but_for_routers_which_are_fitted_again(whole):
    for name in ("dense/model.safetensors", "routers/learned-abc.npz"):
        (whole / name).unlink()
    assert _found(whole) == [("missing", "dense/model.safetensors")]


def test_a_deleted_file_stays_missing_when_later_commands_record_others(whole):
    (whole / "vectoriser.npz").unlink()
    (whole / "dense/model.safetensors").unlink()
    manifest.record(whole, ["routers"], again=True)
    manifest.record(whole, ["dense", "vectoriser.npz"])  # by commands that find their work done
    assert _found(whole) == [
        ("missing", "dense/model.safetensors"),
        ("missing", "vectoriser.npz"),
    ]
    (whole / "dense/model-00001-of-00001.safetensors").write_text("trained again")
    manifest.record(whole, ["dense"], again=True)
    assert _found(whole) == [("missing", "vectoriser.npz")]


@pytest.mark.parametrize("name", ["experts/evil", "experts/a/v7", "experts/loose.bin"])
def test_an_expert_that_is_not_registered_is_named(run, name):
    (run / name).mkdir()
    assert _found(run) == [("unknown", name)]


def test_what_a_version_in_training_is_written_into_is_no_stranger(run):
    (run / "experts/b/.v1.partial").mkdir()
    assert _found(run) == []
    (run / "experts/a/.v2.partial").mkdir()
    assert _found(run) == [("unknown", "experts/a/.v2.partial")]


@pytest.mark.parametrize(
    "name", ["experts/a/v2", "experts/a", "seed/model.safetensors", "vectoriser.npz"]
)
def test_what_leads_out_of_the_run_is_named_though_its_bytes_are_right(
    whole, tmp_path_factory, name
):
    outside = tmp_path_factory.mktemp("outside") / "moved"
    (whole / name).rename(outside)
    (whole / name).symlink_to(outside)
    assert _found(whole) == [("link", name)]
    assert str(outside) in str(verify(whole)[0])


def test_a_damaged_manifest_is_a_fault(whole):
    (whole / "hashes.json").write_text('{"format": 1, "files": {"../x": "y"}}')
    assert _found(whole) == [("broken", "hashes.json")]


def test_a_run_as_the_commands_leave_it_is_sound_and_whatever_is_changed_is_named(xelm, copy):
    run = copy.directory
    open_run(run).ensemble()  # whose router is fitted now
    assert xelm("verify", run).out == f"{run}: every file that inference reads is unchanged\n"
    (router,) = (run / "routers").glob("learned-*.npz")
    arrays = read_arrays(router)
    write_arrays(router, arrays | {"weights": -arrays["weights"]})
    arrays = read_arrays(run / "vectoriser.npz")
    write_arrays(run / "vectoriser.npz", arrays | {"idf": 2 * arrays["idf"]})
    weights = load_file(run / "dense/model.safetensors")
    save_file({name: 0 * w for name, w in weights.items()}, run / "dense/model.safetensors")
    (run / "experts/evil/v1").mkdir(parents=True)
    faults = xelm("verify", run, "--json")
    assert faults.code == 2
    assert [fault.split(": ")[:2] for fault in json.loads(faults.out)] == [
        ["unknown", "experts/evil"],
        ["changed", "dense/model.safetensors"],
        ["changed", f"routers/{router.name}"],
        ["changed", "vectoriser.npz"],
    ]


@pytest.mark.parametrize("key", ["languages", "cluster", "parent", "tokens"])
def test_a_record_of_a_published_expert_that_was_changed_is_named(xelm, copy, key):
    run = copy.directory
    value = json.loads((run / "registry.json").read_text())
    one, other = value["experts"]
    if key in ("languages", "cluster"):
        one[key], other[key] = other[key], one[key]
    elif key == "parent":
        one["parent"], one["round"] = other["name"] + "@v1", 2
    else:
        one["tokens"] += 1
    (run / "registry.json").write_text(json.dumps(value))
    named = [one, other] if key in ("languages", "cluster") else [one]
    assert [str(fault) for fault in verify(run)] == [
        f"changed: registry.json: the record of {expert['name']}@v1 changed after it was published"
        for expert in named
    ]


def test_rolling_back_and_keys_of_others_do_not_change_what_was_published(run):
    update(run, lambda registry: registry.rollback("a"), "rollback")
    assert verify(run) == []
    value = json.loads((run / "registry.json").read_text())
    value["experts"][0]["note"] = "of somebody's own"
    (run / "registry.json").write_text(json.dumps(value))
    assert verify(run) == []
    value["experts"][0]["languages"] = ["fr"]
    (run / "registry.json").write_text(json.dumps(value))
    assert _found(run) == [("changed", "registry.json")]


def test_a_published_version_without_a_recorded_digest_is_named(xelm, copy):
    hashes = copy.directory / "hashes.json"
    value = json.loads(hashes.read_text())
    assert set(value["experts"]) == {"de-fr@v1", "en-es@v1"}
    manifest.record(copy.directory, ["run.json"], again=True)  # which keeps them
    assert json.loads(hashes.read_text()) == value
    del value["experts"]
    hashes.write_text(json.dumps(value))
    assert [fault.file for fault in verify(copy.directory)] == ["registry.json"] * 2


def test_a_router_that_was_changed_is_fitted_again(xelm, copy):
    open_run(copy.directory).ensemble()
    (path,) = (copy.directory / "routers").glob("learned-*.npz")
    before = path.read_bytes()
    arrays = read_arrays(path)
    write_arrays(path, arrays | {"weights": -arrays["weights"]})
    outcome = xelm("generate", copy.directory, "a", "--max-new-tokens", 1)
    assert "is not as it was recorded; it is fitted again" in outcome.err
    assert path.read_bytes() == before and verify(copy.directory) == []


@pytest.mark.parametrize("at", ["sha256", "write_json", "Path.replace"])
def test_a_fit_that_was_killed_leaves_no_router_that_nobody_recorded(copy, monkeypatch, at):
    def kill(*arguments, **options):
        raise KeyboardInterrupt

    shutil.rmtree(copy.directory / "routers", ignore_errors=True)
    run = open_run(copy.directory)
    experts = run.registry().published()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"experts.manifest.{at}", kill)
        learned(run, experts)
    assert verify(copy.directory) == [] and not list(copy.directory.glob("routers/*"))
    wanted = learned(run, experts).weights
    (path,) = (copy.directory / "routers").glob("learned-*.npz")
    assert verify(copy.directory) == []
    assert not list((copy.directory / "train").glob("*routers+*"))
    # What was killed between the two in versions before this one is fitted again.
    value = json.loads((copy.directory / "hashes.json").read_text())
    del value["files"][f"routers/{path.name}"]
    (copy.directory / "hashes.json").write_text(json.dumps(value))
    assert [fault.kind for fault in verify(copy.directory)] == ["unknown"]
    np.testing.assert_array_equal(learned(run, experts).weights, wanted)
    assert verify(copy.directory) == []
