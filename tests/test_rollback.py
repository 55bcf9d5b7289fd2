"""Rolling back: the version in use before is in use again, and nothing is lost."""

import pytest

from clustering.errors import UserError
from experts.expert import Expert
from experts.grow import grow
from experts.lock import record, update
from experts.registry import Registry


def _with_versions(count: int) -> Registry:
    registry = Registry(
        seed_sha256={"x": "f" * 64},
        experts=(Expert(name="a", languages=("en",)), Expert(name="b", languages=("fr",))),
    ).publish("a", 1, sha256={"x": "1" * 64}, tokens=1)
    for version in range(2, count + 1):
        registry = registry.start("a").publish(
            "a", version, sha256={"x": str(version) * 64}, tokens=version
        )
    return registry


def _statuses(registry: Registry) -> list[str]:
    return [expert.status for expert in registry.versions("a")]


def test_the_version_before_is_published_again():
    before = _with_versions(3)
    after = before.rollback("a")
    assert _statuses(after) == ["retired", "published", "retired"]
    assert after.expert("a").sha256 == {"x": "2" * 64}
    assert after.expert("a", 3).sha256 == {"x": "3" * 64}
    assert after.experts[1] is before.experts[1]
    assert _statuses(after.rollback("a")) == ["published", "retired", "retired"]


def test_a_version_can_be_named_and_the_newer_can_come_back():
    before = _with_versions(3)
    back = before.rollback("a", 1)
    assert _statuses(back) == ["published", "retired", "retired"]
    assert back.rollback("a", 3) == before


def test_a_version_that_is_in_use_already_changes_nothing():
    before = _with_versions(3)
    assert before.rollback("a", 3) == before


def test_a_version_that_was_rolled_back_is_not_gone_back_to():
    registry = _with_versions(2).rollback("a")
    registry = registry.start("a").publish("a", 3, sha256={"x": "3" * 64}, tokens=3)
    assert registry.rollback("a").expert("a").version == 1


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("a", None, r"no version to go back to; it has v1 \(published\), v2 \(training\)"),
        ("b", None, r"no version to go back to; it has v1 \(training\)"),
        ("a", 2, "a@v2 is training; only a version published before"),
        ("a", 9, "no version 9"),
        ("c", None, "no expert 'c'; known: a, b"),
    ],
)
def test_there_is_one_clear_line_where_nothing_can_come_back(name, version, message):
    with pytest.raises(UserError, match=message):
        _with_versions(1).start("a").rollback(name, version)


def test_a_version_given_up_in_training_cannot_come_back():
    with pytest.raises(UserError, match="a@v2 is retired; only"):
        _with_versions(1).start("a").retire("a", 2).rollback("a", 2)


def test_where_no_version_is_in_use_one_has_to_be_named():
    unused = _with_versions(3).retire("a", 3)
    with pytest.raises(UserError, match=r"no version to go back to; it has v1 \(retired\), v2"):
        unused.rollback("a")
    assert unused.rollback("a", 3) == _with_versions(3)


def test_an_expert_does_not_come_back_where_another_serves_its_language_by_now():
    retired = _with_versions(1).publish("b", 1, sha256={"x": "b" * 64}, tokens=1).retire_expert("a")
    held = "a@v1 cannot come back: 'en' is held by"
    training = grow(retired, "en", "b", "english")
    give_up = rf"{held} english@v1 \(training\) by now; give it up first with: xelm discard RUN eng"
    with pytest.raises(UserError, match=give_up):
        training.restore("a")
    grown = training.publish("english", 1, sha256={"x": "e" * 64}, tokens=1)
    retire = rf"{held} english@v1 \(published\) by now; take it out of use first with: xelm ret"
    for back in (grown.restore, lambda name: grown.rollback(name, 1)):
        with pytest.raises(UserError, match=retire):
            back("a")
    swapped = grown.retire_expert("english").restore("a")
    assert swapped.for_language("en").reference == "a@v1"
    with pytest.raises(UserError, match=r"english@v1 cannot come back: 'en' is held by a@v1"):
        swapped.restore("english")
    # Another name changes nothing of that.
    with pytest.raises(UserError, match="former@v1 cannot come back"):
        grown.rename({"a": "former"}).restore("former")


def test_an_expert_of_a_language_that_joined_another_comes_back_after_that_is_rolled_back():
    registry = _with_versions(1).publish("b", 1, sha256={"x": "b" * 64}, tokens=1)
    joined = registry.retire_expert("b").start("a", languages=("en", "fr"), joined=("fr",))
    joined = joined.publish("a", 2, sha256={"x": "2" * 64}, tokens=1)
    way = r"'fr' is held by a@v2 \(published\) by now; go back to a version of it without 'fr'"
    with pytest.raises(UserError, match=way + " first with: xelm rollback RUN a --version 1"):
        joined.restore("b")
    assert joined.rollback("a", 1).restore("b").for_language("fr").reference == "b@v1"


def test_a_version_with_a_language_that_left_the_expert_does_not_come_back_beside_another():
    """A language joined with version 2, which was rolled back, and got an expert of its own."""
    joined = _with_versions(1).start("a", languages=("en", "sv"), joined=("sv",))
    joined = joined.publish("a", 2, sha256={"x": "2" * 64}, tokens=1)
    alone = grow(joined.rollback("a"), "sv", "a").publish("sv", 1, sha256={"x": "5" * 64}, tokens=1)
    with pytest.raises(UserError, match="a@v2 cannot come back: 'sv' is held by sv@v1"):
        alone.rollback("a", 2)
    assert alone.retire_expert("sv").rollback("a", 2).for_language("sv").reference == "a@v2"


def test_a_rollback_that_is_run_again_goes_no_further(tmp_path):
    _with_versions(3).save(tmp_path)

    def rolled(version=None):
        after = update(tmp_path, lambda r: r.rollback("a", version), "rollback")
        return after.expert("a").version

    assert [rolled(), rolled(), rolled()] == [2, 2, 2]
    registry = Registry.load(tmp_path)
    assert [event.action for event in registry.history] == ["rollback"]
    # What is pushed or renamed in between changes no version.
    record(tmp_path, "push", ["a@v2"], {"to": "jane/a", "commit": "0"})
    assert rolled() == 2
    assert rolled(1) == 1
    # A version that was published since then can be rolled back.
    update(tmp_path, lambda r: r.rollback("a", 3), "publish")
    assert rolled() == 2
