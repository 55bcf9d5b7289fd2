"""Versions that commands have prepared come into the registry only if they still may."""

import pytest

from clustering.errors import UserError
from experts.adopt import adopt
from experts.begin import begin
from experts.expert import Expert
from experts.grow import grow
from experts.registry import Registry

HASHES = {"model.safetensors": "a" * 64}


@pytest.fixture
def registry():
    first = Registry(seed_sha256={}).add(Expert(name="en-es", languages=("en", "es")))
    first = grow(first.publish("en-es", 1, sha256=HASHES, tokens=1), "pt", "en-es")
    return first.publish("pt", 1, sha256=HASHES, tokens=1)


def test_what_is_in_the_registry_already_stays_as_it_is(registry):
    new = grow(registry, "uk", "pt").expert("uk")
    once = begin(registry, new)
    assert once.experts == (*registry.experts, new)
    assert begin(once, new) == once


@pytest.mark.parametrize("by", ["grow", "join", "adopt"])
def test_a_language_that_another_command_began_to_serve_meanwhile_is_refused(registry, by):
    prepared = {
        "grow": lambda: grow(registry, ["uk", "be"], "pt").experts[-1],
        "join": lambda: registry.start("pt", languages=("pt", "uk"), joined=("uk",)).experts[-1],
        "adopt": lambda: adopt(registry, ["uk", "be"], made={"by": "adopt"}).experts[-1],
    }[by]()
    meanwhile = grow(registry, "uk", "en-es")
    with pytest.raises(UserError, match=r"'uk' is served already, by uk@v1 \(training\)"):
        begin(meanwhile, prepared)
    assert begin(registry, prepared).experts[-1] == prepared


def test_the_languages_of_the_version_in_use_are_its_own(registry):
    again = registry.start("pt", parent="pt@v1").experts[-1]
    assert begin(registry, again).unfinished("pt") == again


def test_a_parent_that_was_removed_meanwhile_is_refused(registry):
    child = grow(registry, "uk", "pt").expert("uk")
    registry = grow(registry, "ca", "pt").publish("ca", 1, sha256=HASHES, tokens=1)
    registry = registry.retire_expert("pt").remove("pt", "2026-11-30T08:00:00+00:00")
    with pytest.raises(UserError, match="pt@v1 was removed on 2026-11-30"):
        begin(registry, child)
