"""Growing: a child record one round later, and nothing else touched."""

import math

import pytest

from clustering.errors import UserError
from experts import lock, manifest
from experts.expert import Expert
from experts.grow import choose_parent, grow
from experts.registry import Registry
from experts.verify import hash_directory, verify


def _registry() -> Registry:
    return Registry(
        seed_sha256={"model.safetensors": "c" * 64},
        experts=(
            _published("slavic", "ru", "bg"),
            _published("romance", "fr", "es"),
            Expert(name="baltic", languages=("lt",), cluster="baltic"),
        ),
    )


def _published(name: str, *languages: str) -> Expert:
    hashes = {"model.safetensors": "a" * 64}
    return Expert(name=name, languages=languages, cluster=name, status="published", sha256=hashes)


def test_a_child_joins_one_round_later():
    grown = grow(_registry(), "pl", "slavic")
    assert grown.experts[-1] == Expert(name="pl", languages=("pl",), parent="slavic@v1", round=2)
    assert grown.experts[-1].cluster is None


def test_any_code_of_a_language_means_that_language():
    assert grow(_registry(), "pol", "slavic") == grow(_registry(), "pl", "slavic")
    with pytest.raises(UserError, match="served already"):
        grow(_registry(), "rus", "slavic")
    assert choose_parent(_registry(), [("rus", 0.1)])[0].name == "slavic"


def test_growing_leaves_every_other_record_the_same_object():
    before = _registry()
    after = grow(before, "pl", "slavic@v1", name="polish")
    assert len(after.experts) == len(before.experts) + 1
    assert all(old is new for old, new in zip(before.experts, after.experts, strict=False))
    assert after.seed_sha256 is before.seed_sha256


def test_growing_leaves_every_other_byte_of_the_run(tmp_path):
    seed, slavic = tmp_path / "seed", tmp_path / "experts/slavic/v1"
    for directory, content in ((seed, b"seed"), (slavic, b"slavic")):
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(content)
    registry = Registry(
        seed_sha256=hash_directory(seed), experts=(Expert(name="slavic", languages=("ru",)),)
    )
    registry.publish("slavic", 1, sha256=hash_directory(slavic), tokens=3).save(tmp_path)
    record = Registry.load(tmp_path).expert("slavic").to_json()
    before = hash_directory(tmp_path)

    lock.update(tmp_path, lambda registry: grow(registry, "pl", "slavic"), "grow")
    child = tmp_path / "experts/pl/v1"
    child.mkdir(parents=True)
    (child / "model.safetensors").write_bytes(b"polish")
    hashes = hash_directory(child)
    lock.update(
        tmp_path, lambda registry: registry.publish("pl", 1, sha256=hashes, tokens=5), "publish"
    )

    after = hash_directory(tmp_path)
    others = [file for file in before if file != "registry.json"]
    assert others == ["experts/slavic/v1/model.safetensors", "seed/model.safetensors"]
    assert {file: after[file] for file in others} == {file: before[file] for file in others}
    assert Registry.load(tmp_path).expert("slavic").to_json() == record
    for expert in Registry.load(tmp_path).published():
        manifest.record_expert(tmp_path, expert)
    assert verify(tmp_path) == []


def test_a_grandchild_is_of_round_three():
    grown = grow(_registry(), "pl", "slavic").publish("pl", 1, sha256={"x": "b" * 64}, tokens=1)
    grandchild = grow(grown, "csb", "pl").experts[-1]
    assert (grandchild.parent, grandchild.round) == ("pl@v1", 3)


def test_the_child_of_the_seed_is_of_round_one():
    assert grow(_registry(), "eu", "seed").experts[-1].round == 1


def test_growing_again_while_in_training_changes_nothing():
    grown = grow(_registry(), "pl", "slavic")
    assert grow(grown, "pl", "slavic") is grown
    assert grow(grown, "pl", "slavic@v1") is grown


@pytest.mark.parametrize(
    ("language", "parent", "name", "message"),
    [
        ("ru", "slavic", None, r"'ru' is served already, by slavic@v1 \(published\)"),
        ("lt", "slavic", None, r"'lt' is served already, by baltic@v1 \(training\)"),
        ("lv", "baltic", None, "baltic@v1 is training; only a published expert"),
        ("pl", "germanic", None, "no expert 'germanic'; known: baltic, romance, slavic"),
        ("pl", "slavic@v3", None, "no version 3"),
        ("pl", "slavic@3", None, "NAME@v1"),
        ("pl", "slavic", "romance", "'romance' is taken by an expert of other languages"),
        ("pl", "slavic", "../pl", "cannot name an expert"),
    ],
)
def test_growing_is_refused_in_one_line(language, parent, name, message):
    with pytest.raises(UserError, match=message):
        grow(_registry(), language, parent, name)


def test_growing_from_another_parent_while_in_training_is_refused():
    with pytest.raises(UserError, match="served already, by pl@v1"):
        grow(grow(_registry(), "pl", "slavic"), "pl", "romance")


def test_a_language_given_up_can_be_grown_again_as_the_next_version():
    given_up = grow(_registry(), "pl", "slavic").retire("pl", 1)
    again = grow(given_up, "pl", "romance").experts[-1]
    assert (again.reference, again.parent, again.round) == ("pl@v2", "romance@v1", 2)


def test_the_nearest_served_relative_gives_the_parent():
    registry = _registry()
    ranked = [("es", math.nan), ("lt", 0.05), ("cs", 0.1), ("fr", 0.5), ("bg", 0.3), ("ru", 0.3)]
    expert, language, distance = choose_parent(registry, ranked)
    assert (expert.name, language, distance) == ("slavic", "bg", 0.3)


def test_a_grown_expert_of_a_later_round_is_the_parent_of_its_own_language():
    registry = _registry().add(
        Expert(
            name="ru2",
            languages=("ru",),
            parent="slavic@v1",
            round=2,
            status="published",
            sha256={"x": "b" * 64},
        )
    )
    assert choose_parent(registry, [("ru", 0.1)])[0].name == "ru2"


def test_no_known_relative_is_a_users_mistake():
    with pytest.raises(UserError, match="Relatives: lt, cs; served: bg, es, fr, ru"):
        choose_parent(_registry(), [("lt", 0.05), ("cs", 0.1)])
