"""Experts on the device: those asked last, within the memory that was given."""

import numpy as np
import pytest

from xelm.inference.parameter_cache import Overlay, ParameterCache

COUNT, BYTES = 4, 400


@pytest.fixture
def loaded():
    """Numbers of the experts that were read from disk, in order."""
    return []


def cache(loaded, **room):
    def load(number):
        loaded.append(number)
        return {"weight": np.full(BYTES // 4, number, np.float32)}

    return ParameterCache([lambda n=n: load(n) for n in range(COUNT)], **room)


def value(parameters):
    return int(parameters["weight"][0])


def test_nothing_is_read_before_it_is_asked_for_and_then_once(loaded):
    held = cache(loaded)
    assert len(held) == COUNT and loaded == []
    assert [value(held[2]), value(held[2]), value(held[-1])] == [2, 2, 3]
    assert loaded == [2, 3]
    with pytest.raises(IndexError):
        held[COUNT]


def test_the_one_asked_longest_ago_leaves_for_the_host_and_then_for_the_disk(loaded):
    held = cache(loaded, device_bytes=2 * BYTES, host_bytes=BYTES)
    assert [value(held[n]) for n in (0, 1, 0, 2)] == [0, 1, 0, 2]
    assert (held.on_device, held.on_host) == ((0, 2), (1,))
    assert value(held[3]) == 3
    # The host has room for one: 1 was there longest.
    assert (held.on_device, held.on_host) == ((2, 3), (0,))
    assert value(held[0]) == 0 and loaded == [0, 1, 2, 3]
    assert (held.on_device, held.on_host) == ((3, 0), (2,))
    assert value(held[1]) == 1 and loaded == [0, 1, 2, 3, 1]


def test_an_expert_larger_than_all_room_is_there_alone(loaded):
    held = cache(loaded, device_bytes=BYTES - 1, host_bytes=BYTES - 1)
    assert [value(held[n]) for n in (0, 1, 0)] == [0, 1, 0]
    assert (held.on_device, held.on_host, loaded) == ((0,), (), [0, 1, 0])


def test_one_that_cannot_be_read_leaves_the_others_where_they_are(loaded):
    held = cache(loaded, device_bytes=2 * BYTES)
    held._loaders[3] = lambda: 1 / 0
    assert [value(held[n]) for n in (0, 1)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        held[3]
    assert held.on_device == (0, 1)


def test_what_others_share_is_read_once_and_leaves_when_they_do(loaded):
    held = cache(loaded, device_bytes=3 * BYTES)
    assert [value(held[n]) for n in (0, 1)] == [0, 1]

    def load(name):
        loaded.append(name)
        return {"weight": np.full(BYTES // 4, 7, np.float32)}

    other = held.with_experts([lambda: load(1), lambda: load("new")], [1, "new"])
    assert [value(other[n]) for n in (0, 1)] == [1, 7]
    assert loaded == [0, 1, "new"] and held.on_device == other.on_device == (0, 1, "new")
    other.evict_others(held)
    assert held.on_device == (0, 1, "new")
    other.evict_others()
    assert held.on_device == (1, "new")
    assert value(held[0]) == 0 and loaded == [0, 1, "new", 0]


def test_a_model_shares_its_base_and_that_of_its_base(loaded):
    def load(name, key):
        loaded.append(name)
        return {key: np.full(BYTES // 4, 1, np.float32)}

    adapter = Overlay(
        base_name="base",
        base=lambda: load("base", "weight"),
        part=lambda: load("adapter", "factor"),
    )
    rows = Overlay(base_name="adapter", base=adapter, part=lambda: load("rows", "new_rows"))
    held = ParameterCache([rows], names=["rows"], device_bytes=3 * BYTES, host_bytes=0)
    plain = held.with_experts([adapter], ["adapter"])
    assert set(held[0]) == {"weight", "factor", "new_rows"} and set(plain[0]) == {
        "weight",
        "factor",
    }
    assert held[0]["weight"] is plain[0]["weight"] and held[0]["factor"] is plain[0]["factor"]
    assert loaded == ["base", "adapter", "rows"]
    plain.evict_others(held)
    assert set(held.on_device) == {"base", "adapter", "rows"}
    plain.evict_others()
    assert set(held.on_device) == {"base", "adapter"}
    # What is read is never thrown out for its own parts, however little memory there is.
    small = ParameterCache([rows], names=["rows"], device_bytes=BYTES, host_bytes=0)
    assert set(small[0]) == {"weight", "factor", "new_rows"} == set(small[0])
    assert set(small.on_device) == {"base", "adapter", "rows"}
