"""The search with a compiler that only pretends."""

import time

import pytest

from easylm_jax.mesh import parse_mesh
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.planner import memory
from easylm_jax.planner import search as module
from easylm_jax.planner.case import Case
from easylm_jax.planner.compiled import Compiled
from easylm_jax.planner.search import candidates, meshes, search, what_would_fit
from easylm_jax.planner.topology import parse_topology

SPLASH = AttentionConfig(implementation="splash")


def make_case(name="llama_7b", *, rows=2048, seq_len=2048, mesh="1,-1,1,1", remat="full"):
    model = preset(name, dtype="bfloat16", remat=remat, attention=SPLASH)
    return Case(model, OptimConfig(), rows, seq_len, 1, mesh)


def compiled(gib):
    return Compiled(
        peak_bytes=round(gib * 2**30),
        arguments=0,
        program_bytes=0,
        compile_s=0.0,
        ran_out_of_memory=gib > 15.75,
    )


def test_the_fastest_that_the_compiler_confirms():
    asked = []

    def fake(case, topology):
        asked.append(case)
        return compiled(20 if len(asked) in (1, 3) else 15)

    topology = parse_topology("v5e:16x16")
    found = search(make_case(), topology, compile=fake, keep=2)
    assert [c.case for c in found] == [asked[1], asked[3]] and len(asked) == 4
    speeds = [c.estimate.step_s for c in found]
    assert speeds == sorted(speeds) and all(c.compiled.peak_bytes < 16e9 * 1.05 for c in found)
    rivals = [c for c in candidates(make_case(), topology) if c.case not in asked]
    for rival in rivals:  # none that fits was faster than the ones compiled
        fits = rival.parts.total <= (1 - module.RESERVE) * topology.chip.hbm_bytes
        assert not fits or rival.estimate.step_s >= speeds[-1]


def test_what_the_compiler_refused_is_not_recommended():
    topology, case = parse_topology("v5e:16x16"), make_case(rows=256)
    asked = {}

    def fake(case, topology):
        need = 1.2 * memory.estimate(case, parse_mesh(case.mesh, 256)).total / 2**30
        asked[case] = max(need, 15.8)
        return compiled(asked[case])

    with pytest.raises(ValueError) as error:
        search(case, topology, compile=fake, keep=3)
    sentence = str(error.value)
    assert "the 6 settings that look fastest do not fit into 15.75 GiB" in sentence
    rest = [c for c in candidates(case, topology) if f"; {c} would" in sentence]
    assert len(rest) == 1 and rest[0].case not in asked
    most = max(
        need * 2**30 / memory.estimate(c, parse_mesh(c.mesh, 256)).total
        for c, need in asked.items()
    )
    assert rest[0].parts.total * most <= 15.75 * 2**30  # also if it needs as much more
    everything = dict.fromkeys((c.case for c in candidates(case, topology)), 17.0 * 2**30)
    assert "no other mesh divides" in what_would_fit(case, topology, everything)


def test_a_case_that_the_compiler_refused_is_told_the_bytes_of_the_compiler():
    """By the estimate it fits; and written otherwise it is still the same case."""
    topology, case = parse_topology("v5e:16x16"), make_case(rows=256, remat="nothing_saveable")
    assert memory.estimate(case, parse_mesh(case.mesh, 256)).total < topology.chip.hbm_bytes
    sentence = what_would_fit(case, topology, {case: 17.2 * 2**30})
    assert sentence.startswith("about 17.2 GiB with mesh 1,-1,1,1, remat nothing_saveable")
    assert "mesh 1,256,1,1, remat full, micro_batches 1" not in sentence


@pytest.mark.parametrize("name", ["v5p:8x16x16", "v5e:16x16@2", "a100:64"])
def test_every_mesh_is_one_that_the_step_accepts(name):
    topology = parse_topology(name)
    case = make_case("llama2_70b", rows=1024, seq_len=32_768)
    found = meshes(case, topology)
    assert len(found) == len(set(found)) > 3
    for mesh in found:
        sizes = parse_mesh(mesh, topology.num_chips)
        assert 1024 % (sizes["replica"] * sizes["fsdp"]) == 0 and 8 % sizes["tensor"] == 0
        assert sizes["replica"] % topology.num_slices == 0 and 8192 % sizes["fsdp"] == 0
        if topology.chip.ici_dims == 0:
            assert sizes["tensor"] <= 8
    some = [parse_mesh(mesh, topology.num_chips) for mesh in found]
    assert any(sizes["sequence"] > 1 for sizes in some)


def test_short_rows_are_split_where_nothing_else_fits():
    topology = parse_topology("v5p:4x4x4")
    case = make_case("llama_33b", rows=8, seq_len=8192)
    for found in search(case, topology, compile=lambda *_: compiled(15)):
        sizes = parse_mesh(found.case.mesh, 64)
        assert sizes["sequence"] > 1 and 8 % (sizes["replica"] * sizes["fsdp"]) == 0
    for found in search(
        make_case(rows=64, seq_len=8192), topology, compile=None, keep=10_000
    ):  # all that fit
        assert parse_mesh(found.case.mesh, 64)["sequence"] == 1


def test_65b_on_2048_chips_is_searched_in_seconds():
    started = time.process_time()
    case = make_case("llama_65b", remat="none")
    topology = parse_topology("v5p:8x16x16")
    found = search(case, topology, compile=lambda *_: compiled(15), keep=3)
    assert time.process_time() - started < 5
    assert len(found) == 3 and found[0].estimate.mfu > 0.5


def test_what_would_fit_does_and_says_when_nothing_does():
    topology = parse_topology("v5e:16x16")
    case = make_case(remat="linear_outputs_and_attention")
    sentence = what_would_fit(case, topology, {})
    would = next(c for c in candidates(case, topology) if f"{c}" in sentence)
    assert (
        would.parts.total
        < topology.chip.hbm_bytes
        < memory.estimate(case, parse_mesh(case.mesh, 256)).total
    )
    assert "\n" not in sentence and case.model.remat in sentence
    nothing = what_would_fit(make_case("llama_65b"), parse_topology("v5e:4x4"), {})
    assert "nor is any other sure to" in nothing and "more chips" in nothing
    odd = what_would_fit(make_case("llama_65b", rows=7), parse_topology("v5e:4x4"), {})
    assert "divides" in odd or "nor is any other sure to" in odd
