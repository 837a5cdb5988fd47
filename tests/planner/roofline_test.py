"""The roofline against sums by hand and against published runs."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from easylm_jax.chips import CHIPS
from easylm_jax.config import from_config_dict
from easylm_jax.mesh import make_mesh, parse_mesh
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import num_params
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.plan import as_text, case_of, make_plan
from easylm_jax.planner import roofline as module
from easylm_jax.planner.case import Case
from easylm_jax.planner.roofline import all_reduced, bandwidth_along, roofline, traffics
from easylm_jax.planner.topology import devices, parse_topology
from easylm_jax.train import TrainConfig

SPLASH = AttentionConfig(implementation="splash")
ROOT = Path(__file__).parents[2]
ONE = dict(replica=1, fsdp=1, sequence=1, tensor=1)


def make_case(name="llama_7b", *, rows=1024, mesh="1,-1,1,1", micro=1, seq_len=2048, **changes):
    model = preset(name, **dict(dtype="bfloat16", remat="full", attention=SPLASH) | changes)
    return Case(model, OptimConfig(), rows, seq_len, micro, mesh)


def sent(case, sizes, *whole):
    return {(t.axis, t.what.split(",")[0]): t.num_bytes for t in traffics(case, sizes, *whole)}


def test_llama_65b_on_2048_a100_and_other_published_runs():
    """LLaMA-65B took 380 tokens/s per chip; nothing was fitted to the three runs. (Its software
    sent four all-reduces a layer along tensor where ours sends seven.)"""
    paper = make_case("llama_65b", rows=2048, mesh="1,256,1,8", remat="linear_outputs")
    estimate = roofline(paper, parse_topology("a100:2048"))
    assert estimate.tokens_per_s_per_chip == pytest.approx(380, rel=0.08)
    assert estimate.mfu == pytest.approx(0.485, rel=0.08)
    policy = "q:keep,k:keep,v:keep,attention_out:keep,attention_lse:keep"
    for name, topology, mfu in (
        ("llama2_7b", "v5p:4x8x8", 0.612),
        ("llama2_70b", "v5p:8x8x8", 0.659),
    ):
        case = make_case(name, seq_len=4096, remat=policy)
        assert roofline(case, parse_topology(topology)).mfu == pytest.approx(mfu, rel=0.08)


def test_flops_full_remat_is_four_passes_over_the_layers():
    case = make_case(vocab_size=32, remat="full", num_layers=2)
    estimate = roofline(case, parse_topology("v5e:4x4"))
    layers = num_params(preset("llama_7b", vocab_size=32, num_layers=2)) - 2 * 32 * 4096 - 5 * 4096
    attention = 6 * 2 * 4096 * 2048
    expected = (6 * (layers + 32 * 4096) + attention) * 2**21
    assert estimate.flops_per_step == pytest.approx(expected)
    # `down` of the repeated pass is not needed again
    again = 2 * (layers - 2 * 4096 * 11_008) + attention / 3
    assert estimate.hardware_flops - estimate.flops_per_step == pytest.approx(again * 2**21)


def test_bytes_sent_by_hand():
    case = make_case(rows=64, remat="linear_outputs_and_attention", micro=2)
    n = num_params(preset("llama_7b"))
    fsdp = sent(case, dict(replica=1, fsdp=16, sequence=1, tensor=1))
    assert fsdp == {
        ("fsdp", "weights"): 2 * 2 * 2 * n * 15 / 16,  # two passes, two bytes, two micro-batches
        ("fsdp", "gradients"): 2 * 4 * n * 15 / 16,
    }
    both = sent(case, dict(replica=4, fsdp=4, sequence=1, tensor=1))
    assert both[("replica", "gradients")] == 2 * 4 * n / 4 * 3 / 4  # once a step
    tensor = sent(case, dict(replica=1, fsdp=4, sequence=1, tensor=4))
    stream = 2 * 64 * 2048 * 4096 / 4  # bytes of the stream of a chip's rows
    # all-reduces, each of which sends 2 * 3/4 of the stream: two a layer forward, five backward
    # (q, k, v, gate, up), and three of the embedding and the head
    assert tensor[("tensor", "activations")] == (32 * 7 + 3) * 2 * 3 / 4 * stream
    assert tensor[("fsdp", "weights")] == 2 * 2 * 2 * n / 4 * 3 / 4


def test_a_torus_axis_has_both_its_links_and_an_open_line_half():
    v5p, v5e = parse_topology("v5p:4x8x8"), parse_topology("v5e:4x4")
    per_dim = v5p.chip.ici_bandwidth / 3
    assert bandwidth_along("fsdp", ONE | dict(fsdp=256), v5p) == pytest.approx(3 * per_dim)
    split = ONE | dict(fsdp=64, tensor=4)
    assert bandwidth_along("fsdp", split, v5p) == pytest.approx(2 * per_dim)
    assert bandwidth_along("tensor", split, v5p) == pytest.approx(per_dim)
    assert bandwidth_along("fsdp", ONE | dict(fsdp=16), v5e) == v5e.chip.ici_bandwidth / 2


def test_slices_meet_on_the_slow_network():
    one = roofline(make_case(rows=1024), parse_topology("v5e:16x16"))
    case = make_case(rows=2048, mesh="1,256,1,1@2,1,1,1")
    two = roofline(case, parse_topology("v5e:16x16@2"))
    assert one.dcn_s == 0 and two.ici_s == pytest.approx(one.ici_s)
    gradients = 4 * num_params(preset("llama_7b")) / 256
    assert two.dcn_s == pytest.approx(gradients / parse_topology("v5e:16x16").chip.dcn_bandwidth)
    assert two.step_s == pytest.approx(one.step_s + two.dcn_s)
    assert roofline(dataclasses.replace(case, mesh="2,256,1,1"), parse_topology("v5e:16x16@2")) == (
        two
    )


def test_gpus_share_their_nodes_cards():
    """The eight of a node fetch an eighth each of what comes from other nodes."""
    chip = parse_topology("h100:16").chip
    pure = roofline(make_case(rows=16), parse_topology("h100:16"))
    in_node = roofline(make_case(rows=16), parse_topology("h100:8"))
    assert in_node.dcn_s == 0 and in_node.ici_s > 0
    n = num_params(preset("llama_7b"))
    assert pure.dcn_s == pytest.approx((2 * 2 + 4) * n * 15 / 16 / 8 / chip.dcn_bandwidth)


@pytest.mark.parametrize(
    "plain, mesh", [("2,8,1,1", "1,8,1,1@2,1,1,1"), ("1,16,1,1", "fsdp:8@fsdp:2")]
)
@pytest.mark.parametrize("topology", ["h100:16", "h100:8@2"])
def test_gpu_nodes_are_the_same_machine_however_they_are_written(plain, mesh, topology):
    want = roofline(make_case(rows=16, mesh=plain), parse_topology("h100:16"))
    assert want.dcn_s > 0
    assert roofline(make_case(rows=16, mesh=mesh), parse_topology(topology)) == want


def test_sizes_across_slices_that_there_are_not_is_one_sentence_with_the_mesh_as_written():
    with pytest.raises(ValueError, match=r"'1,128,1,1@2,1,1,1' does not fit v5e:16x16; .* to 1,"):
        roofline(make_case(mesh="1,128,1,1@2,1,1,1"), parse_topology("v5e:16x16"))


def test_a_step_is_never_faster_than_its_products_and_no_speed_is_one_sentence():
    for mesh in ("1,-1,1,1", "16,-1,1,1", "1,-1,1,16"):
        estimate = roofline(make_case(mesh=mesh), parse_topology("v5e:16x16"))
        assert estimate.step_s > estimate.compute_s
        efficiency, _ = module.EFFICIENCY["v5e"]
        assert estimate.mfu < efficiency
        assert estimate.mfu == pytest.approx(
            estimate.flops_per_step / estimate.step_s / 256 / 197e12
        )
    with pytest.raises(ValueError, match=r"cpu.*bench"):
        roofline(make_case(), parse_topology("cpu:8"))


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_every_chip_has_an_estimate_or_one_sentence(name):
    chip = CHIPS[name]
    size = {0: "8", 2: "4x4", 3: "4x4x4"}[chip.ici_dims]
    topology = parse_topology(f"{name}:{size}")
    case = make_case(rows=64)
    if chip.peak_flops and chip.ici_bandwidth:
        assert 0 < roofline(case, topology).mfu < 1
        return
    with pytest.raises(
        ValueError, match=f"no roofline for {topology}: the .* is not in chips.py"
    ) as error:
        roofline(case, topology)
    assert as_text(make_plan(case, topology, compiles=False)).endswith(str(error.value))
    if chip.peak_flops:  # one chip sends nothing
        one = parse_topology(":".join((name, size.replace("4", "1").replace("8", "1"))))
        assert 0 < roofline(case, one).mfu < 1


def test_a_3d_slice_is_a_torus_only_if_every_dim_is_a_multiple_of_four():
    """docs.cloud.google.com/tpu/docs/v4, v5p."""
    for shape, closed in (("2x4x4", False), ("2x2x4", False), ("4x4x4", True), ("4x8x8", True)):
        topology = parse_topology(f"v4:{shape}")
        got = bandwidth_along("fsdp", ONE | dict(fsdp=topology.num_chips), topology)
        assert got == topology.chip.ici_bandwidth * (1.0 if closed else 0.5)


@pytest.mark.parametrize("mesh", ["1,16,1,16", "1,64,4,1", "4,1,1,64", "1,256,1,1"])
def test_mesh_axes_take_the_torus_dims_that_jax_gives_them(mesh):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e .[plan]")
    topology = parse_topology("v5p:4x4x16")
    grid = make_mesh(mesh, devices(topology)).devices
    taken = module._torus_dims(topology.shape, parse_mesh(mesh, 256))
    for place, axis in enumerate(ONE):
        line = np.moveaxis(grid, place, 0).reshape(grid.shape[place], -1)[:, 0]
        dims = np.flatnonzero(np.ptp([device.coords for device in line], axis=0))
        assert taken.get(axis, ()) == tuple(dims.tolist())


def pods():
    spec = importlib.util.spec_from_file_location("pod", ROOT / "configs" / "llama_pod.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.PODS:
        plan = json.loads((ROOT / "experiments" / "pod_plans" / f"{name}.json").read_text())
        case = case_of(from_config_dict(TrainConfig, module.get_config(name)))
        yield case, parse_topology(plan["topology"]), plan["collectives"]


def test_pods_send_what_the_compiler_says():
    """Gradients summed whole or scattered along fsdp, and the ring: against compiled programs."""
    for case, topology, collectives in pods():
        sizes = parse_mesh(case.mesh, topology.num_chips)
        whole = all_reduced(case.model, sizes, topology).summed
        reduced = [c for c in collectives if c["dtype"] == "f32" and c["axes"] == "fsdp"]
        got = sum(c["bytes"] for c in reduced if c["kind"] == "all-reduce") / case.micro_batches / 4
        assert got == pytest.approx(whole, abs=0.02 * num_params(case.model))
        along = [t for t in traffics(case, sizes) if t.axis == "sequence" and t.what != "gradients"]
        permuted = [c for c in collectives if c["axes"] == "sequence" and "permute" in c["kind"]]
        assert sum(t.num_bytes for t in along) == pytest.approx(
            sum(c["sent_bytes"] for c in permuted), rel=0.01
        )


@pytest.mark.parametrize(
    "topology, fsdp, kernels",
    [
        # Single reduce-scatters by libtpu 0.0.42.1: which of 65B's it turned into all-reduces.
        ("v5p:8x16x16", 8, ()),  # one dim
        ("v5p:8x16x16", 128, ("mlp",)),
        ("v5p:8x16x16", 2048, ("all",)),
        ("v5p:2x4x4", 16, ()),
        ("v6e:16x16", 256, ("all",)),
        ("v6e:16x16", 16, ()),
        ("v5e:8x16", 128, ("mlp",)),
        ("a100:256", 256, ()),
    ],
)
def test_which_gradients_the_tpu_compiler_sums_whole(topology, fsdp, kernels):
    model = preset("llama_65b")
    sizes = {"mlp": 80 * 3 * 8192 * 22_016, "all": num_params(model)}
    want = sum(sizes[name] for name in kernels)
    got = all_reduced(model, ONE | dict(fsdp=fsdp), parse_topology(topology))
    assert got == (want if fsdp == 2048 else 0, want)
    case = make_case("llama_65b", rows=2048)
    bytes_sent = sent(case, ONE | dict(fsdp=fsdp), got)
    share = (fsdp - 1) / fsdp
    assert bytes_sent[("fsdp", "gradients")] == 4 * (num_params(model) + want) * share
    assert bytes_sent[("fsdp", "weights")] == 2 * 2 * (num_params(model) + got.gathered) * share


def test_columns_are_those_of_a_chip():
    """65B's MLP has 43 x 4 tiles of 128 columns, and on each of 16 chips 11."""
    sizes = ONE | dict(fsdp=128, tensor=16)
    assert all_reduced(preset("llama_65b"), sizes, parse_topology("v5p:8x16x16")) == (0, 0)


def test_down_has_its_own_columns_where_a_chip_gets_whole_tiles_of_them():
    """[22016, 8192] split into [22016, 128] is laid out by its 8,192 columns: scattered."""
    got = all_reduced(preset("llama_65b"), ONE | dict(fsdp=64), parse_topology("v5p:8x8x8"))
    assert got.summed == 80 * 2 * 8192 * 22_016  # gate and up alone


def test_what_attention_sends_along_sequence_by_hand():
    """Eight parts of a row; a chip has 2,048 tokens. All of it as compiled for v5e:2x4."""
    sizes = ONE | dict(sequence=8)
    part = 2 * 2048 * 4096  # bytes of q, of k or of v on a chip
    for remat, passes in (("none", 2), ("full", 3)):
        sent_by = {}
        for across in ("gather", "ring", "all_to_all"):
            attention = AttentionConfig(across_sequence=across)
            model = dict(remat=remat, attention=attention, num_layers=1)
            case = make_case(rows=1, seq_len=16_384, **model)
            sent_by[across] = [t.num_bytes for t in traffics(case, sizes) if t.what != "gradients"]
        assert sent_by["gather"] == [passes * 7 * 2 * part]
        assert sent_by["all_to_all"] == [passes * 4 * part * 7 / 8]
        # Forward, again under `full`, and backward: 7 turns; gradients, 8 in float32 and one home.
        assert sent_by["ring"] == [(7 * passes + 8 * 2 + 1) * 2 * part, passes * 4 * part]


def test_with_dropout_replicas_meet_in_every_micro_batch():
    sizes = ONE | dict(replica=4)
    once, each = (
        sent(make_case(micro=2, embedding_dropout=rate), sizes)[("replica", "gradients")]
        for rate in (0.0, 0.1)
    )
    assert each == 2 * once


def test_a_window_is_counted_alike_for_the_model_and_for_the_hardware():
    attention = dataclasses.replace(SPLASH, sliding_window=4096)
    case = make_case("mistral_7b", seq_len=32_768, remat="none", attention=attention)
    estimate = roofline(case, parse_topology("v5e:16x16"))
    assert estimate.hardware_flops == pytest.approx(estimate.flops_per_step)
    assert estimate.flops_per_step / case.tokens_per_step == pytest.approx(48.7e9, rel=1e-3)
