"""The mesh grammar, and what its errors tell. Numbers on meshes are step_test's."""

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from easylm_jax.mesh import AXES, check_divides, make_mesh, parse_mesh


@pytest.mark.parametrize(
    "spec, devices, sizes",
    [
        ("1,-1,1,1", 8, (1, 8, 1, 1)),
        ("2,-1,1,2", 8, (2, 2, 1, 2)),
        ("-1,1,1,1", 1, (1, 1, 1, 1)),
        ("1, 2, 2, 2", 8, (1, 2, 2, 2)),
        ("fsdp:-1,tensor:4", 256, (1, 64, 1, 4)),
        ("tensor:4, fsdp:-1", 8, (1, 2, 1, 4)),
        ("replica:8", 8, (8, 1, 1, 1)),
        ("!1,-1,1,1", 8, (1, 8, 1, 1)),
        ("!sequence:-1", 8, (1, 1, 8, 1)),
        ("1,-1,1,1@2,1,1,1", 16, (2, 8, 1, 1)),
        ("fsdp:-1,tensor:2@replica:2,fsdp:2", 32, (2, 8, 1, 2)),
        ("!1,2,1,1@replica:-1", 6, (3, 2, 1, 1)),
    ],
)
def test_the_grammar_of_easylm(spec, devices, sizes):
    parsed = parse_mesh(spec, devices)
    assert tuple(parsed) == AXES and tuple(parsed.values()) == sizes


@pytest.mark.parametrize(
    "spec",
    ["", "8", "1,-1,1", "1,1,1,1,8", "1,0,1,8", "1,-2,1,4", "1,x,1,1", "dp:8", "fsdp:", "fsdp:2:4"]
    + ["fsdp:4,8", "fsdp:2,fsdp:4", "!!1,-1,1,1", "fsdp:-1,mp:1"]
    + ["fsdp:-1@", "@replica:2", "fsdp:-1@replica:2@replica:2", "1,-1,1,1@!2,1,1,1"],
)
def test_what_is_not_understood_is_told_the_grammar(spec):
    with pytest.raises(
        ValueError, match="mesh .* is not understood; write four sizes replica,fsdp"
    ):
        parse_mesh(spec, 8)


def test_sizes_must_multiply_to_the_number_of_devices():
    with pytest.raises(ValueError, match="needs 4 devices, but there are 8.*must be 8"):
        parse_mesh("1,4,1,1", 8)
    with pytest.raises(ValueError, match="needs a multiple of 3 devices, but there are 8"):
        parse_mesh("1,-1,1,3", 8)
    with pytest.raises(ValueError, match="2 sizes of -1; only one can be inferred"):
        parse_mesh("1,-1,-1,1", 8)
    with pytest.raises(ValueError, match="2 sizes of -1; only one can be inferred"):
        parse_mesh("fsdp:-1@replica:-1", 8)
    with pytest.raises(ValueError, match="needs a multiple of 6 devices, but there are 8"):
        parse_mesh("fsdp:-1,tensor:2@replica:3", 8)


def test_a_mesh_holds_every_device_once():
    mesh = make_mesh("2,-1,1,2")
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 2, 1, 2)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert make_mesh("1,2,1,1", jax.devices()[:2]).size == 2
    assert make_mesh("2,2,1,2@1,1,1,1") == mesh  # one part is all of them, on a CPU too


@pytest.fixture(scope="module")
def two_slices():
    """32 TPUs in two slices, which no machine here has: shapes and places without hardware."""
    pytest.importorskip("libtpu")
    here = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    here |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in here.items():
            patch.setenv(name, value)
        return topologies.get_topology_desc(
            platform="tpu", topology_name="v5e:4x4", num_slices=2
        ).devices


def test_sizes_after_the_at_lie_across_slices_and_the_others_within(two_slices):
    def slices(spec: str) -> np.ndarray:
        mesh = make_mesh(spec, two_slices)
        assert set(mesh.devices.flat) == set(two_slices)
        return np.vectorize(lambda device: device.slice_index)(mesh.devices)

    replicas = slices("1,-1,1,1@2,1,1,1")
    assert replicas.shape == (2, 16, 1, 1)
    assert (replicas[0] == 0).all() and (replicas[1] == 1).all()
    fsdp = slices("fsdp:4,tensor:-1@fsdp:2")
    assert fsdp.shape == (1, 8, 1, 4)
    assert (fsdp[0, :4] == 0).all() and (fsdp[0, 4:] == 1).all()


def test_parts_that_are_not_there_are_told_how_many_are(two_slices):
    with pytest.raises(ValueError, match="4 parts of 8 .* there are 2 slices of 16 .* multiply to"):
        make_mesh("fsdp:-1@replica:4", two_slices)
    with pytest.raises(ValueError, match="across the 2 TPU slices; .* such as 'fsdp:-1@replica:2'"):
        make_mesh("1,-1,1,1", two_slices)
    with pytest.raises(ValueError, match="2 parts of 4 .* there are 1 processes of 8 .* leave"):
        make_mesh("fsdp:-1@replica:2")


def test_batches_that_do_not_split_are_refused_with_what_fits():
    mesh = make_mesh("2,2,2,1")
    check_divides(mesh.shape, num_kv_heads=8, rows=12, seq_len=10)
    with pytest.raises(
        ValueError, match="10 rows .* replica x fsdp = 4; 2 are left over; use 8 or 12"
    ):
        check_divides(mesh.shape, num_kv_heads=8, rows=10, seq_len=10)
    with pytest.raises(ValueError, match="3 rows .*; 3 are left over; use 4 or 8"):
        check_divides(mesh.shape, num_kv_heads=8, rows=3, seq_len=10)
    with pytest.raises(ValueError, match="rows of 11 tokens do not split over sequence = 2"):
        check_divides(mesh.shape, num_kv_heads=8, rows=12, seq_len=11)


def test_heads_that_do_not_split_are_refused_with_what_fits():
    """The kernels alone would split: 6 heads of width 8 are 48 columns, a multiple of 4."""
    mesh = make_mesh("1,2,1,4")
    with pytest.raises(
        ValueError, match="num_kv_heads = 6 do not split .* tensor = 4; use tensor = 2"
    ):
        check_divides(mesh.shape, num_kv_heads=6, rows=2, seq_len=10)
