"""The compiled step: against counts by hand, for a described TPU slice and for this machine."""

import dataclasses

import pytest

from easylm_jax.mesh import parse_mesh
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import num_params
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.planner.case import Case
from easylm_jax.planner.compiled import compile_step, out_of_memory
from easylm_jax.planner.topology import parse_topology

MODEL = preset(
    "debug", dtype="bfloat16", remat="full", attention=AttentionConfig(block_q=64, block_k=64)
)
CASE = Case(MODEL, OptimConfig(), batch_size=16, seq_len=128, micro_batches=1, mesh="1,-1,1,1")


def state_bytes(case, num_chips):
    """Of one chip: parameters and two moments in float32, all but the norms split over fsdp x
    tensor; five arrays of the batch."""
    model, sizes = case.model, parse_mesh(case.mesh, num_chips)
    norms = (2 * model.num_layers + 1) * model.d_model
    split = (num_params(model) - norms) / (sizes["fsdp"] * sizes["tensor"])
    rows = case.batch_size / (sizes["replica"] * sizes["fsdp"])
    return 12 * (norms + split) + 20 * rows * case.seq_len / sizes["sequence"]


def test_arguments_on_cpu_devices_are_the_state_and_the_batch():
    case = dataclasses.replace(CASE, mesh="1,2,2,2")
    got = compile_step(case, parse_topology("cpu:8"))
    assert got.arguments == pytest.approx(state_bytes(case, 8), rel=0.01)
    assert got.outputs - got.aliased < 4096  # the state is donated: only metrics are new
    parts = got.arguments + got.outputs - got.aliased + got.temporaries + got.program_bytes
    assert got.peak_bytes == parts and got.temporaries > 0


def test_every_parameter_is_gathered_in_each_pass_and_its_gradient_summed():
    """By hand, on CPU in float32: 3 gathers of a layer's weights under `full` (forward, again,
    backward), or 2 where XLA keeps one of them; gradients are summed over all eight devices."""
    model = dataclasses.replace(MODEL, dtype="float32")
    got = compile_step(dataclasses.replace(CASE, model=model), parse_topology("cpu:8"))
    layers = num_params(model) - 2 * model.vocab_size * model.d_model
    in_loop = [c for c in got.collectives if c.times == model.num_layers]
    gathered = sum(c.bytes * c.times for c in in_loop if c.kind == "all-gather")
    assert gathered == pytest.approx(3 * 4 * layers, rel=0.35)
    assert gathered >= 2 * 4 * (layers - 5 * model.d_model)
    summed = [c for c in in_loop if c.kind in ("all-reduce", "reduce-scatter")]
    assert sum(c.bytes * c.times for c in summed) == pytest.approx(4 * layers, rel=0.35)
    assert {c.axes for c in in_loop} == {("fsdp",)}


def tpu():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e .[plan]")


# Every array splits into whole tiles of 8 x 128, so that nothing is padded.
WIDE = dataclasses.replace(MODEL, d_model=512, d_ff=1024, head_dim=128)
ON_V5E = dataclasses.replace(CASE, model=WIDE, mesh="4,4,1,1")


@pytest.fixture(scope="module")
def on_v5e():
    tpu()
    return compile_step(ON_V5E, parse_topology("v5e:4x4"))


def test_a_tiny_model_compiles_for_sixteen_v5e_chips(on_v5e):
    assert not on_v5e.ran_out_of_memory
    assert on_v5e.arguments == pytest.approx(state_bytes(ON_V5E, 16), rel=0.02)


def test_weights_travel_in_bfloat16_and_gradients_of_layers_in_float32(on_v5e):
    """Each layer's weights, in bfloat16, at least once a pass; their gradient, in float32."""
    layers = num_params(WIDE) - 2 * WIDE.vocab_size * WIDE.d_model
    along = [c for c in on_v5e.collectives if c.axes == ("fsdp",) and c.bytes * c.times > 4096]
    forward = [c for c in along if "backward" not in c.where and c.times > 1]
    assert {c.dtype for c in forward} == {"bf16"}
    assert sum(c.sent_bytes for c in forward) >= 0.98 * 2 * layers * 3 / 4
    gradients = [c for c in along if c.dtype == "f32" and c.times > 1]
    assert sum(c.sent_bytes for c in gradients) >= 0.98 * 4 * layers * 3 / 4


def test_running_out_of_memory_is_an_answer():
    tpu()
    topology = parse_topology("v5e:4x4")
    case = dataclasses.replace(ON_V5E, batch_size=2**18, micro_batches=2)
    got = compile_step(case, topology)
    assert got.ran_out_of_memory and got.peak_bytes > topology.chip.hbm_bytes


@pytest.mark.parametrize(
    "message, peak, arguments",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. "
            "Exceeded hbm capacity by 4.5G.\n\nTotal hbm usage >= 12.13G:\n    reserved        "
            "258.00M \n    program           2.27M \n    arguments         7.5G \n",
            20.25,
            7.5,
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (186.5G) "
            "exceeds available HBM (15.75G).",
            186.5,
            0,
        ),
    ],
)
def test_the_bytes_in_the_compilers_refusal(message, peak, arguments):
    got = out_of_memory(message, compile_s=1.0)
    assert (got.peak_bytes, got.arguments) == (peak * 2**30, arguments * 2**30)


def test_a_mesh_that_divides_neither_heads_nor_rows_is_an_error():
    for spec, words in (("1,1,1,8", "num_kv_heads = 2"), ("1,1,8,1", None), ("8,1,1,1", None)):
        case = dataclasses.replace(CASE, mesh=spec, seq_len=100 if spec == "1,1,8,1" else 128)
        case = dataclasses.replace(case, batch_size=12 if spec == "8,1,1,1" else 16)
        with pytest.raises(ValueError, match=words or "do not split over"):
            compile_step(case, parse_topology("cpu:8"))


def test_a_mesh_that_the_torus_does_not_have_is_an_error():
    tpu()
    with pytest.raises(ValueError, match="does not fit the physical topology"):
        compile_step(dataclasses.replace(CASE, mesh="2,8,1,1"), parse_topology("v5e:4x4"))
