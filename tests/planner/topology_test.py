"""Names of topologies: what they mean, and what is said of those that do not exist."""

import math

import pytest

from easylm_jax.chips import CHIPS, find_chip
from easylm_jax.planner import topology
from easylm_jax.planner.topology import devices, parse_topology, slice_shapes


@pytest.mark.parametrize(
    "name, chip, num_chips",
    [
        ("v5p:8x16x16", "v5p", 2048),
        ("v5:8x16x16", "v5p", 2048),
        ("v5e:16x16@2", "v5e", 512),
        ("v4:2x2x1", "v4", 4),
        ("v6e:1x1", "v6e", 1),
        ("cpu:8", "cpu", 8),
        ("a100:2048", "a100", 2048),
    ],
)
def test_names(name, chip, num_chips):
    found = parse_topology(name)
    assert (found.chip.name, found.num_chips) == (chip, num_chips)
    assert parse_topology(str(found)) == found
    assert found.can_compile == (chip != "a100")


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5p:16x16x8", "there is no TPU slice v5p:16x16x8; nearest to it: v5p:8x16x16"),
        ("v5p:16x8x4", "nearest to it: v5p:4x8x16, v5p:8x8x8"),
        ("v5e:16x32", "nearest to it: v5e:16x16, v5e:8x16"),
        ("v5e:3x3", "nearest to it: v5e:2x4"),
        ("v5p:256", "nearest to it: v5p:4x8x8"),
        ("v5x:4x4", "there is no chip 'v5x'; near it: v5"),
        ("v5e", "write CHIP:SIZE or CHIP:SIZE@SLICES, such as v5e:16x16"),
        ("v5e:4x4@0", "write CHIP:SIZE"),
        ("cpu:two", "such as cpu:8"),
        ("a100:0", "such as a100:8"),
    ],
)
def test_what_does_not_exist_gets_one_sentence_with_the_nearest(name, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


def test_slices_are_what_the_documentation_lists():
    assert [math.prod(s) for s in slice_shapes("v5e")] == [1, 4, 8, 16, 32, 64, 128, 256]
    # From the tables of v4 and v5p: some of each, the largest, and one beyond it.
    v4, v5p = slice_shapes("v4"), slice_shapes("v5p")
    assert {(2, 2, 1), (2, 4, 4), (4, 4, 8), (12, 12, 24), (8, 16, 16), (16, 16, 16)} <= set(v4)
    assert {(4, 4, 92), (8, 12, 20), (16, 16, 24)} <= set(v5p)
    assert (16, 16, 24) not in v4 and (16, 20, 28) not in v5p
    assert all(list(s) == sorted(s) for s in v5p if math.prod(s) >= 64)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2@2", "v5p:2x2x2", "v6e:1x1"])
def test_there_is_one_described_device_per_chip_of_the_kind_in_the_table(name):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e .[plan]")
    found = parse_topology(name)
    described = devices(found)
    assert len(described) == found.num_chips
    assert {find_chip(d.device_kind) for d in described} == {found.chip}


def test_what_cannot_be_compiled_for_says_why(monkeypatch):
    with pytest.raises(ValueError, match="nothing can be compiled for h100:8 .* --no_compile"):
        devices(parse_topology("h100:8"))
    with pytest.raises(ValueError, match="cpu:9 needs 9 CPU devices, but this process has 8"):
        devices(parse_topology("cpu:9"))
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e \.\[plan\]"):
        devices(parse_topology("v5e:2x2"))


def test_the_longest_kind_wins():
    assert find_chip("TPU v5 lite") is CHIPS["v5e"] and find_chip("TPU v5") is CHIPS["v5p"]
    assert find_chip("NVIDIA H100 PCIe") is CHIPS["h100_pcie"] and find_chip("unheard of") is None
