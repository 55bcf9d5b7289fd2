"""The registry: records, invariants, transitions, and what reaches the disk."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clustering.errors import UserError
from experts.expert import Expert, parse_reference, stays_inside
from experts.grow import grow
from experts.registry import FILE_NAME, Registry

ROOT = Path(__file__).parent.parent
A, B, C = "a" * 64, "b" * 64, "c" * 64


def _expert(name: str, **fields) -> Expert:
    published = {"status": "published", "sha256": {"model.safetensors": A}, "languages": ("en",)}
    return Expert(name=name, **(published | fields))


def _registry(*experts: Expert) -> Registry:
    return Registry(seed_sha256={"model.safetensors": C}, experts=experts)


def _child(name: str, parent: Expert, **fields) -> Expert:
    return _expert(name, parent=parent.reference, round=parent.round + 1, **fields)


def test_registry_json_has_the_documented_form(tmp_path):
    expert = _expert("romance", languages=("fr", "es"), cluster="romance", tokens=7)
    _registry(expert).save(tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text()) == {
        "format": 1,
        "seed": {"path": "seed", "sha256": {"model.safetensors": C}},
        "experts": [
            {
                "name": "romance",
                "version": 1,
                "parent": "seed",
                "round": 1,
                "languages": ["fr", "es"],
                "cluster": "romance",
                "documents": None,
                "path": "experts/romance/v1",
                "sha256": {"model.safetensors": A},
                "tokens": 7,
                "status": "published",
                "replaces": None,
                "reason": None,
                "settings": None,
                "evaluation": None,
                "published_as": None,
                "corpora": None,
                "donor": None,
                "data": None,
                "made": None,
                "vocabulary": None,
                "stored": None,
            }
        ],
        "history": [],
    }


def test_the_repr_of_a_registry_is_one_line():
    old = _expert("en", status="retired")
    assert repr(_registry(old, _expert("en", version=2), _expert("fr"))) == (
        "<Registry of 3 expert versions: 2 published, 1 retired>"
    )
    assert repr(_registry()) == "<Registry of 0 expert versions>"


def test_a_saved_registry_loads_equal(tmp_path):
    registry = _registry(
        _expert("a", replaces=None),
        _expert("b", cluster="b", languages=(), documents={"en": 3}, status="training"),
    )
    registry = registry.start("a").publish("a", 2, sha256={"model.safetensors": B}, tokens=5)
    registry.save(tmp_path)
    assert Registry.load(tmp_path) == registry


def test_keys_of_others_survive_a_change(tmp_path):
    value = _registry(_expert("a")).to_json()
    value |= {"owner": "us"}
    value["seed"] |= {"hub": "facebook/xglm-564M"}
    value["experts"][0] |= {"notes": ["kept"]}
    (tmp_path / FILE_NAME).write_text(json.dumps(value))
    Registry.load(tmp_path).add(_expert("b")).save(tmp_path)
    after = json.loads((tmp_path / FILE_NAME).read_text())
    assert (after["owner"], after["seed"]["hub"], after["experts"][0]["notes"]) == (
        "us",
        "facebook/xglm-564M",
        ["kept"],
    )


def test_keys_beside_the_documented_ones_may_be_absent_on_disk(tmp_path):
    value = _registry(_expert("a")).to_json()
    for key in ("cluster", "documents", "replaces"):
        del value["experts"][0][key]
    (tmp_path / FILE_NAME).write_text(json.dumps(value))
    assert Registry.load(tmp_path) == _registry(_expert("a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": "1"}, "experts[0]: 'round' should be int; got '1'"),
        ({"version": True}, "experts[0]: 'version' should be int; got True"),
        ({"languages": "en"}, "experts[0]: 'languages' should be list; got 'en'"),
        ({"languages": [1]}, "experts[0]: 0 should be str; got 1"),
        ({"sha256": {"x": 1}}, "experts[0]: 'x' should be str; got 1"),
        ({"cluster": 3}, "experts[0]: 'cluster' should be str; got 3"),
        ({"documents": {"en": "3"}}, "experts[0]: documents: 'en' should be int; got '3'"),
        ({"path": "../../etc"}, "path must lie inside the RUN; got '../../etc'"),
        ({"path": "/etc"}, "path must lie inside the RUN; got '/etc'"),
        ({"sha256": {"../x": A}}, "the file '../x' leaves its directory"),
        ({"sha256": {"x": "12"}}, "'x' has the sha256 '12'"),
        ({"status": "done"}, "status must be one of training, published, retired; got 'done'"),
    ],
)
def test_a_broken_record_on_disk_is_a_users_mistake_that_names_it(tmp_path, change, message):
    value = _registry(_expert("a")).to_json()
    value["experts"][0] |= change
    (tmp_path / FILE_NAME).write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        Registry.load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / FILE_NAME) in str(caught.value)


@pytest.mark.parametrize("gone", ["seed", "experts"])
def test_a_registry_without_its_keys_is_a_users_mistake(tmp_path, gone):
    value = _registry().to_json()
    del value[gone]
    (tmp_path / FILE_NAME).write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"lacks '{gone}'"):
        Registry.load(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps(_registry().to_json() | {"format": 2}))
    with pytest.raises(UserError, match="format 2"):
        Registry.load(tmp_path)


@pytest.mark.parametrize("name", ["pt-BR", "zh_Hant", "v1.2", "0", "_x", "a" * 100])
def test_safe_names_are_accepted(name):
    assert _expert(name).path == f"experts/{name}/v1"


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-rf", "a/b", "..", "a b", "a\n", "é", "a@v1", "a" * 101, "a\\b"]
)
def test_unsafe_names_are_refused(name):
    with pytest.raises(UserError, match="cannot name an expert"):
        _expert(name)


@pytest.mark.parametrize("name", ["seed", "dense", "ensemble", "Seed"])
def test_names_of_other_systems_are_refused(name):
    with pytest.raises(UserError, match="cannot name an expert"):
        _expert(name)


@pytest.mark.parametrize(
    "path", ["", "/a", "a/", "a//b", "./a", "a/..", "..", "a\\b", "C:a", "a\0"]
)
def test_paths_that_could_leave_are_seen(path):
    assert not stays_inside(path)
    assert stays_inside("a/b.c/..d")


def test_a_reference_reads_back():
    assert parse_reference(_expert("a.b", version=12).reference) == ("a.b", 12)
    for wrong in ("a", "a@1", "a@v0", "a@v1@v1", "@v1", "a@v01"):
        with pytest.raises(UserError, match="NAME@v1"):
            parse_reference(wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"languages": ()}, "neither languages nor documents"),
        ({"languages": ("en", "en")}, "twice"),
        ({"languages": ("en us",)}, "spaces"),
        ({"sha256": {}}, "published without hashes"),
        ({"version": 0}, "are impossible"),
        ({"tokens": -1}, "are impossible"),
        ({"parent": "b"}, "parent must be"),
        ({"replaces": 1}, "cannot replace version 1"),
    ],
)
def test_an_impossible_expert_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        _expert("a", **fields)


def test_experts_that_do_not_fit_together_are_refused():
    a = _expert("a")
    for experts, message in [
        ((a, a), "a@v1 is listed 2 times"),
        ((a, _expert("A")), "only in case"),
        ((a, _expert("b", path=a.path)), "share the path"),
        ((_child("b", a),), "has the unknown parent a@v1"),
        ((a, replace(_child("b", a), round=3)), "b@v1 from a@v1 is of round 2; got 3"),
        (
            (_expert("a", status="training", sha256={}), _child("b", a)),
            "a@v1, which has no weights",
        ),
        ((_expert("a", round=2),), "a@v1 from seed is of round 1; got 2"),
        ((a, _expert("b", parent="b@v1")), "b@v1 cannot descend from b@v1"),
    ]:
        with pytest.raises(UserError, match=message):
            _registry(*experts)


def test_published_is_the_newest_of_each_name_by_round_and_name():
    z, b = _expert("z"), _expert("b")
    a = _child("a", z)
    newer = _expert("z", version=2)
    registry = _registry(
        a, newer, z, b, _expert("c", status="training"), _expert("d", status="retired")
    )
    assert registry.published() == (b, newer, a)
    assert [expert.name for expert in registry.training()] == ["c"]


def test_expert_without_a_version_is_the_published_one():
    registry = _registry(_expert("a")).start("a")
    assert registry.expert("a").version == 1
    assert registry.expert("a", 2).status == "training"
    assert registry.publish("a", 2, sha256={"x": B}, tokens=1).expert("a").version == 2


def test_an_unknown_expert_is_answered_with_the_known_ones():
    registry = _registry(_expert("romance"), _expert("baltic"))
    with pytest.raises(UserError, match="'slavic'; known: baltic, romance"):
        registry.expert("slavic")
    with pytest.raises(UserError, match=r"no version 7; it has v1 \(published\)"):
        registry.expert("baltic", 7)


def test_the_latest_round_serves_a_language():
    old = _expert("slavic", languages=("ru", "pl"))
    new = _child("pl", old, languages=("pl",))
    registry = _registry(old, new)
    assert registry.for_language("pl") is new
    assert registry.for_language("rus") is old  # another code of the same language
    with pytest.raises(UserError, match="serves 'sw'; served: pl, ru"):
        registry.for_language("sw")


def test_an_expert_in_training_serves_nothing():
    with pytest.raises(UserError, match="served: none"):
        _registry(_expert("a", status="training")).for_language("en")


def test_publishing_a_new_version_retires_the_old_and_leaves_others_alone():
    other = _expert("b")
    before = _registry(_expert("a", cluster="a"), other).start("a")
    after = before.publish("a", 2, sha256={"model.safetensors": B}, tokens=9)
    assert [(e.reference, e.status) for e in after.experts] == [
        ("a@v1", "retired"),
        ("b@v1", "published"),
        ("a@v2", "published"),
    ]
    assert after.experts[1] is other
    assert after.expert("a", 1).sha256 == {"model.safetensors": A}
    assert (after.expert("a").tokens, after.expert("a").replaces, after.expert("a").cluster) == (
        9,
        1,
        "a",
    )
    assert before.expert("a", 1).status == "published"


def test_publishing_twice_is_publishing_once_and_other_bytes_are_refused():
    registry = _registry(_expert("a", status="training", sha256={}))
    once = registry.publish("a", 1, sha256={"x": B}, tokens=1)
    assert once.publish("a", 1, sha256={"x": B}, tokens=1) is once
    with pytest.raises(UserError, match="a@v1 is published and never changes"):
        once.publish("a", 1, sha256={"x": C}, tokens=1)
    with pytest.raises(UserError, match="retired and never changes"):
        once.retire("a", 1).publish("a", 1, sha256={"x": B}, tokens=1)


def test_a_new_version_starts_where_the_old_did_or_goes_on_from_it():
    root = _expert("root")
    registry = _registry(root, _child("a", root))
    again = registry.start("a").expert("a", 2)
    assert (again.parent, again.round, again.languages) == ("root@v1", 2, ("en",))
    of_documents = _registry(_expert("a", cluster="a", documents={"en": 3})).start("a")
    assert of_documents.expert("a", 2).documents == {"en": 3}
    onward = registry.start("a", parent="a@v1").expert("a", 2)
    assert (onward.parent, onward.round) == ("a@v1", 2)
    with pytest.raises(UserError, match="a@v2 is in training already"):
        registry.start("a").start("a")


_DIE_WHILE_SAVING = """
import os, signal, sys
from experts.expert import Expert
from experts.registry import Registry

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

registry = Registry.load(sys.argv[1]).add(Expert(name="late", languages=("pl",)))
setattr(os, sys.argv[2], die)
registry.save(sys.argv[1])
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_saving_leaves_the_old_registry(tmp_path, moment):
    _registry(_expert("a")).save(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()
    died = subprocess.run(
        [sys.executable, "-c", _DIE_WHILE_SAVING, tmp_path, moment], cwd=ROOT, check=False
    )
    assert died.returncode == -9
    assert len(os.listdir(tmp_path)) == 2  # what it had begun to write is there, under another name
    assert (tmp_path / FILE_NAME).read_bytes() == before
    Registry.load(tmp_path).add(_expert("b")).save(tmp_path)
    assert [expert.name for expert in Registry.load(tmp_path).experts] == ["a", "b"]


def test_a_new_version_of_a_grown_expert_keeps_its_settings_and_the_reason_for_its_parent():
    seed = Expert(name="slavic", languages=("ru",))
    registry = Registry(seed_sha256={"x": A}, experts=(seed,))
    registry = registry.publish("slavic", 1, sha256={"x": A}, tokens=1)
    registry = grow(registry, "pl", "slavic", reason="near", settings={"grow.tokens": 7})
    registry = registry.publish("pl", 1, sha256={"x": B}, tokens=7)
    again, elsewhere = registry.start("pl"), registry.start("pl", parent="seed")
    assert again.expert("pl", 2).settings == elsewhere.expert("pl", 2).settings
    assert again.expert("pl", 2).settings == {"grow.tokens": 7}
    assert (again.expert("pl", 2).reason, elsewhere.expert("pl", 2).reason) == ("near", None)
