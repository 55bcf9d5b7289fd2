"""A command that changes the registry is killed before each of its operations on files.

Whatever the moment, the RUN is whole, and the same command, run again, gives what it would have
given undisturbed.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
from killing import killed_everywhere
from shared import snapshot

from clustering.files import write_json
from experts import manifest
from experts.expert import Expert
from experts.registry import Registry
from experts.verify import hash_directory, verify
from xelm.models.checkpoint import README


def registry_of(files: dict[str, bytes]) -> dict:
    """registry.json without the times and the command lines of its history."""
    value = json.loads(files["registry.json"])
    for event in value["history"]:
        del event["time"], event["command"]
    for expert in value["experts"]:
        if "removed" in expert:
            expert["removed"] = "a time"
    return value


@pytest.fixture(scope="module")
def living(tiny, tmp_path_factory):
    """A RUN whose de-fr has a version 2, in training though written, and whose en-es has a grown
    child `pt`; neither was trained here."""
    run = tmp_path_factory.mktemp("living") / "RUN"
    shutil.copytree(tiny.directory, run)
    for folder in (run / ".locks", run / "routers"):
        shutil.rmtree(folder, ignore_errors=True)
    registry = Registry.load(run)
    shutil.copytree(run / "experts/en-es/v1", run / "experts/pt/v1")
    pt = Expert(name="pt", languages=("pt",), parent="en-es@v1", round=2)
    registry = registry.add(pt).publish(
        "pt", 1, sha256=hash_directory(run / "experts/pt/v1"), tokens=9
    )
    shutil.copytree(run / "experts/de-fr/v1", run / "experts/de-fr/v2")
    (run / "experts/de-fr/v2" / README).unlink()
    registry = registry.start("de-fr")
    registry.save(run)
    manifest.record_expert(run, registry.expert("pt"))
    (run / "train").mkdir(exist_ok=True)
    (run / "train/de-fr.failed.txt").write_text("worse")
    return run


@pytest.fixture(scope="module")
def finished(living, tmp_path_factory):
    """The same RUN without a version in training, and with two versions of en-es."""
    run = tmp_path_factory.mktemp("finished") / "RUN"
    shutil.copytree(living, run)
    registry = Registry.load(run).discard("de-fr").start("en-es")
    shutil.rmtree(run / "experts/de-fr/v2")
    shutil.copytree(run / "experts/en-es/v1", run / "experts/en-es/v2")
    hashes = hash_directory(run / "experts/en-es/v2")
    registry = registry.publish("en-es", 2, sha256=hashes, tokens=9)
    registry.save(run)
    manifest.record_expert(run, registry.expert("en-es"))
    assert verify(run) == []
    return run


def checked(template, folder, *command, between=None) -> Iterator[tuple[dict, dict]]:
    """What was found right after each kill, and the files of the undisturbed run. between: statuses
    that differ from those before, in a state between before and after."""
    assert verify(template) == []
    before = {e.reference: e.status for e in Registry.load(template).experts}
    *killed, whole = killed_everywhere(template, folder, *command)
    wanted = snapshot(folder / str(len(killed)))
    assert (whole["code"], whole["faults"]) == (0, [])
    assert len(killed) > 5  # the lock, and the replacement of a file, take as many
    for number, outcome in enumerate(killed):
        assert outcome["faults"] == [], (number, outcome)
        known = (before, before | (between or {}), whole["statuses"])
        assert outcome["statuses"] in known, (number, outcome)
        assert (outcome["again"], outcome["faults at last"]) == (0, []), (number, outcome)
        came = snapshot(folder / str(number))
        assert came.keys() == wanted.keys(), number
        assert registry_of(came) == registry_of(wanted), number
        others = came.keys() - {"registry.json"}
        assert [name for name in others if came[name] != wanted[name]] == [], number
        yield outcome, wanted


@pytest.mark.slow
def test_publishing(living, tmp_path):
    seen = list(checked(living, tmp_path, "publish", "RUN", "de-fr"))
    assert {found["statuses"]["de-fr@v2"] for found, _ in seen} == {"training", "published"}
    _, wanted = seen[-1]
    (event,) = registry_of(wanted)["history"][-1:]
    assert event["action"] == "publish" and "5.000 bits a byte in de" in event["refusal"]
    assert event["experts"] == {"de-fr@v1": "retired", "de-fr@v2": "published"}
    assert "train/de-fr.failed.txt" not in wanted


def test_rolling_back(finished, tmp_path):
    seen = list(checked(finished, tmp_path, "rollback", "RUN", "en-es", "--version", "1"))
    statuses = [found["statuses"] for found, _ in seen]
    assert {(each["en-es@v1"], each["en-es@v2"]) for each in statuses} == {
        ("retired", "published"),
        ("published", "retired"),
    }


@pytest.mark.slow
def test_retiring(finished, tmp_path):
    seen = list(checked(finished, tmp_path, "retire", "RUN", "en-es"))
    assert {found["statuses"]["en-es@v2"] for found, _ in seen} == {"published", "retired"}


@pytest.mark.slow
def test_restoring(finished, tmp_path):
    retired = tmp_path / "retired"
    shutil.copytree(finished, retired)
    Registry.load(finished).retire_expert("pt").save(retired)
    seen = list(checked(retired, tmp_path / "copies", "restore", "RUN", "pt"))
    assert {found["statuses"]["pt@v1"] for found, _ in seen} == {"published", "retired"}


@pytest.mark.slow
def test_renaming(finished, tmp_path):
    seen = list(checked(finished, tmp_path, "rename", "RUN", "en-es=western"))
    names = {
        frozenset(reference.partition("@")[0] for reference in found["statuses"])
        for found, _ in seen
    }
    assert names == {frozenset(["de-fr", "en-es", "pt"]), frozenset(["de-fr", "western", "pt"])}
    _, wanted = seen[-1]
    parents = {e["name"]: e["parent"] for e in registry_of(wanted)["experts"]}
    assert parents["pt"] == "western@v1"


@pytest.mark.slow
def test_discarding(finished, tmp_path):
    run = tmp_path / "growing"
    shutil.copytree(finished, run)
    registry = Registry.load(run)
    sv = Expert(name="sv", languages=("sv",), parent="en-es@v2", round=2)
    replace(registry, experts=(*registry.experts, sv)).save(run)
    shutil.copytree(run / "experts/en-es/v1", run / "experts/sv/v1")
    for name in ("train/sv/checkpoints/4/data", "corpus/sv/store.json", "train/sv.failed.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    seen = list(checked(run, tmp_path / "copies", "discard", "RUN", "sv"))
    assert {"sv@v1" in found["statuses"] for found, _ in seen} == {True, False}
    # A part of a checkpoint or of a text would be taken for the whole.
    there = snapshot(run)
    for folder in ("experts/sv/v1/", "train/sv/", "corpus/sv/"):
        whole = {name for name in there if name.startswith(folder)}
        left = [whole.intersection(found["files"]) for found, _ in seen]
        assert whole in left and set() in left
        assert all(names in (whole, set()) for names in left)
    _, wanted = seen[-1]
    assert not [name for name in wanted if "sv" in name.split("/")]


@pytest.mark.slow
def test_compressing(finished, tmp_path):
    """The gate, whose figures are set here, keeps the version back; it is published as above."""
    copies, name = tmp_path / "copies", "en-es@v3"
    *killed, whole = killed_everywhere(finished, copies, "compress", "RUN", "en-es", "--rank", "4")
    assert (whole["code"], whole["faults"], whole["statuses"][name]) == (2, [], "training")
    assert len(killed) > 10
    wanted = snapshot(copies / str(len(killed)))
    # The reason why it was kept back names the copy of the RUN.
    others = wanted.keys() - {"registry.json", "train/en-es.failed.txt"}
    for number, outcome in enumerate(killed):
        assert outcome["faults"] == [], (number, outcome)
        assert outcome["statuses"].get(name, "training") == "training"
        assert (outcome["again"], outcome["faults at last"]) == (2, []), (number, outcome)
        came = snapshot(copies / str(number))
        assert came.keys() == wanted.keys(), number
        assert [file for file in others if came[file] != wanted[file]] == [], number


@pytest.mark.slow
def test_branching(initialised, tiny, tmp_path):
    """Only that the hashes of the clusters are not recorded yet can be found in between."""
    template = tmp_path / "template"
    shutil.copytree(initialised[0], template)
    command = ("branch", "RUN", "--clusters", str(tiny.clusters))
    *killed, whole = killed_everywhere(template, tmp_path / "copies", *command)
    wanted = snapshot(tmp_path / "copies" / str(len(killed)))
    for number, outcome in enumerate(killed):
        found = {fault.split(": ", 1)[1] for fault in outcome["faults"]}
        assert found <= {f"clusters.{end}: no hash of it is recorded" for end in ("json", "npz")}
        assert (outcome["again"], outcome["faults at last"]) == (0, [])
        assert outcome["statuses"] in ({}, whole["statuses"])
        came = snapshot(tmp_path / "copies" / str(number))
        assert registry_of(came) == registry_of(wanted)
        assert {n: came[n] for n in came if n != "registry.json"} == {
            n: wanted[n] for n in wanted if n != "registry.json"
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt", "en-es"])
def test_removing(name, finished, tmp_path):
    """en-es has a child, for which a stub stays."""
    run = tmp_path / "RUN"
    shutil.copytree(finished, run)
    for file in (f"train/{name}.log", f"train/{name}/metrics.jsonl", f"logs/experts/{name}/v1/x"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("its")
    shutil.copytree(run / "corpus/train", run / "corpus/pt")
    (run / "results").mkdir(exist_ok=True)
    rows = [{"system": system, "nll": 1} for system in ("seed", "en-es", "pt")]
    write_json(run / "results/results.json", {"format": 1, "rows": rows, "summaries": rows})
    retired = {f"{name}@v{number}": "retired" for number in ((1,) if name == "pt" else (1, 2))}
    command = ("remove", "RUN", name, "--yes")
    seen = list(checked(run, tmp_path / "copies", *command, between=retired))
    # Published, then retired, then gone.
    states = {found["statuses"].get(f"{name}@v1", "gone") for found, _ in seen}
    assert states == ({"published", "retired", "gone"} if name == "pt" else {"retired"})
    _, wanted = seen[-1]
    left = [file for file in wanted if name in file.split("/") or file.startswith(f"train/{name}")]
    assert left == []
    tables = json.loads(wanted["results/results.json"])
    assert [row["system"] for row in tables["rows"]] == ["seed", *({"en-es", "pt"} - {name})]
    records = {e["name"]: e for e in registry_of(wanted)["experts"]}
    assert ("pt" in records, "en-es" in records) == (name == "en-es", True)
    hashes = json.loads(wanted["hashes.json"])["experts"]
    assert not [reference for reference in hashes if reference.startswith(f"{name}@")]
    if name == "en-es":
        assert "removed" in records["en-es"] and not records["en-es"]["data"]
        assert not [
            file for file in wanted if file.startswith(("corpus/train/en", "corpus/train/es"))
        ]
