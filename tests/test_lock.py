"""Locks: commands that meet in one RUN lose nothing and wait for nobody who is dead."""

import subprocess
import sys
from pathlib import Path

import pytest

from clustering.errors import UserError
from experts.expert import Expert
from experts.lock import locked, update
from experts.registry import FILE_NAME, Registry

ROOT = Path(__file__).parent.parent
EMPTY = Registry(seed_sha256={"model.safetensors": "c" * 64})

_HOLD = """
import sys
from experts.lock import locked

with locked(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""

_ADD = """
import sys
from experts.expert import Expert
from experts.lock import update

print("ready", flush=True)
sys.stdin.readline()
for number in range(30):
    expert = Expert(name=f"{sys.argv[2]}{number}", languages=("en",))
    update(sys.argv[1], lambda registry: registry.add(expert), "grow")
"""


def _start(program: str, *arguments) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_two_processes_that_update_at_once_lose_nothing(tmp_path):
    EMPTY.save(tmp_path)
    with _start(_ADD, tmp_path, "left") as left, _start(_ADD, tmp_path, "right") as right:
        assert (_line(left), _line(right)) == ("ready\n", "ready\n")
        for process in (left, right):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
    assert (left.returncode, right.returncode) == (0, 0)
    names = [expert.name for expert in Registry.load(tmp_path).experts]
    assert sorted(names) == sorted(
        f"{side}{number}" for side in ("left", "right") for number in range(30)
    )


def test_the_second_command_learns_who_holds_the_lock_and_gets_it_when_the_first_is_killed(
    tmp_path,
):
    with _start(_HOLD, tmp_path, "train-a") as holder:
        assert _line(holder) == "held\n"
        with pytest.raises(UserError) as caught, locked(tmp_path, "train-a"):
            pass
        message = str(caught.value)
        assert f"by process {holder.pid} on " in message
        assert " since 2" in message and "-c" in message and "wait until it ends" in message
        assert "\n" not in message
        with locked(tmp_path, "train-b"), locked(tmp_path):
            pass  # other things in the RUN are free
        holder.kill()
        holder.wait()
    with locked(tmp_path, "train-a"):
        pass


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path):
        pass
    assert [path.name for path in (tmp_path / ".locks").iterdir() if path.suffix == ".txt"] == []


def test_the_lock_excludes_its_own_process_too(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass


def test_waiting_ends(tmp_path):
    EMPTY.save(tmp_path)
    with locked(tmp_path), pytest.raises(UserError, match="in use"):
        update(tmp_path, lambda registry: registry, "grow", wait_seconds=0.1)


def test_a_change_that_fails_or_changes_nothing_leaves_the_file_alone(tmp_path):
    EMPTY.save(tmp_path)
    before = (tmp_path / FILE_NAME).stat()
    assert update(tmp_path, lambda registry: registry, "grow") == EMPTY
    with pytest.raises(UserError, match="no expert 'x'"):
        update(tmp_path, lambda registry: registry.retire("x", 1), "retire")
    assert (tmp_path / FILE_NAME).stat().st_ino == before.st_ino
    assert update(
        tmp_path, lambda registry: registry.add(Expert(name="a", languages=("en",))), "grow"
    ).experts
    assert Registry.load(tmp_path).experts[0].name == "a"


def test_a_missing_run_is_not_made(tmp_path):
    with pytest.raises(UserError, match="there is no RUN"), locked(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()


def test_a_run_that_cannot_be_written_is_a_users_mistake(tmp_path):
    (tmp_path / ".locks").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be locked for writing"), locked(tmp_path):
        pass


def test_a_lock_stays_in_its_folder(tmp_path):
    with pytest.raises(UserError, match="cannot name a lock"), locked(tmp_path, "../out"):
        pass
    with locked(tmp_path, "train-" + "a" * 100):  # the longest name of an expert
        pass
