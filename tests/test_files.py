"""Files are written whole or not at all, and never run code."""

import errno
import json
import os

import numpy as np
import pytest

from clustering import files
from clustering.errors import UserError


def test_json_comes_back_as_written(tmp_path):
    value = {"format": 1, "name": "Ελληνικά", "numbers": [1, 0.1, None]}
    files.write_json(tmp_path / "new" / "a.json", value)
    assert files.read_json(tmp_path / "new" / "a.json") == value
    assert "Ελληνικά" in (tmp_path / "new" / "a.json").read_text(encoding="utf-8")


def test_arrays_come_back_bit_for_bit_and_equal_arrays_give_equal_bytes(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(["en", "es"])}
    files.write_arrays(tmp_path / "a.npz", arrays)
    files.write_arrays(tmp_path / "b.npz", arrays)
    read = files.read_arrays(tmp_path / "a.npz")
    assert list(read) == ["a", "b"]
    for name in arrays:
        assert read[name].dtype == arrays[name].dtype
        np.testing.assert_array_equal(read[name], arrays[name])
    assert files.sha256(tmp_path / "a.npz") == files.sha256(tmp_path / "b.npz")


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"format": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"a\.json was not written: the disk is full; nothing was changed"
    ):
        files.write_json(path, {"format": 2})
    with pytest.raises(UserError, match="disk is full"):
        files.write_arrays(tmp_path / "a.npz", {"a": np.zeros(3)})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads(path.read_text()) == {"format": 1}


def test_a_folder_is_on_disk_with_every_file_in_it(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    files.flush(tmp_path)
    assert sorted(flushed[:-1]) == sorted(path.stat().st_ino for path in tmp_path.iterdir())
    assert flushed[-1] == tmp_path.stat().st_ino


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a" / "b.json", tmp_path / "a" / "b" / "c.json"):
        with pytest.raises(UserError, match="a file is in the place of a folder"):
            files.write_json(path, {"format": 1})
    with pytest.raises(UserError, match="a folder is in the place of the file"):
        files.write_json(tmp_path, {"format": 1})


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path, monkeypatch):
    def fail(source, target):
        raise RuntimeError("stopped")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        files.write_json(tmp_path / "a.json", {"format": 1})
    assert os.listdir(tmp_path) == []


def test_a_file_is_readable_by_others_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        files.write_json(tmp_path / "a.json", {"format": 1})
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "is of format 2, this xelm reads up to 1; upgrade xelm"),
        ('{"format": 1', "is not JSON"),
        ("[1]", r"must be a JSON object; got \[1\]"),
        ('{"format": true}', 'a "format" number'),
        ('{"clusters": {}}', 'a "format" number'),
    ],
)
def test_json_of_another_format_or_none_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        files.read_json(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path):
    for read in (files.read_json, files.read_object, files.read_arrays, files.sha256):
        with pytest.raises(UserError, match=r"nowhere\.x does not exist"):
            read(tmp_path / "nowhere.x")


def test_not_a_number_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"format": 1, "value": float("nan")})
    assert os.listdir(tmp_path) == []


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_pickles_are_neither_written_nor_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Python objects in bad"):
        files.write_arrays("a.npz", {"bad": np.array([{}], dtype=object)})
    np.savez("pickled.npz", a=np.array([_Bomb()], dtype=object))
    # What pickle makes of a call of os.mkdir("exploded"), written by hand.
    (tmp_path / "plain.npz").write_bytes(b"cos\nmkdir\n(S'exploded'\ntR.")
    np.save("single.npy", np.zeros(3))
    for name in ("pickled.npz", "plain.npz", "single.npy"):
        with pytest.raises(UserError, match=r"is not an \.npz of plain arrays"):
            files.read_arrays(name)
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_archive_is_refused_wherever_the_damage_is(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(99) % 7)
    content = (tmp_path / "a.npz").read_bytes()
    refused = 0
    for place, byte in enumerate(content):
        damaged = content[:place] + bytes([byte ^ 255]) + content[place + 1 :]
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            files.read_arrays(tmp_path / "b.npz")  # nothing depends on a few bytes
        except UserError as error:
            assert "None" not in str(error)
            refused += 1
    assert refused > len(content) / 2


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
