"""The roofline against sums by hand and against published runs."""

import dataclasses

import pytest

from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import num_params
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.planner import roofline as module
from easylm_jax.planner.case import Case
from easylm_jax.planner.roofline import roofline, torus_bandwidth, traffics
from easylm_jax.planner.topology import parse_topology

SPLASH = AttentionConfig(implementation="splash")


def make_case(name="llama_7b", *, rows=1024, mesh="1,-1,1,1", micro=1, seq_len=2048, **changes):
    model = preset(name, **dict(dtype="bfloat16", remat="full", attention=SPLASH) | changes)
    return Case(model, OptimConfig(), rows, seq_len, micro, mesh)


def sent(case, sizes):
    return {(t.axis, t.what.split(",")[0]): t.num_bytes for t in traffics(case, sizes)}


def test_llama_65b_on_2048_a100_and_other_published_runs():
    """LLaMA-65B took 380 tokens/s per chip; nothing was fitted to the three runs."""
    paper = make_case("llama_65b", rows=2048, mesh="1,256,1,8", remat="linear_outputs")
    estimate = roofline(paper, parse_topology("a100:2048"))
    assert estimate.tokens_per_s_per_chip == pytest.approx(380, rel=0.03)
    assert estimate.mfu == pytest.approx(0.485, rel=0.03)
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
    # two all-reduces a layer in each direction, each of which sends 2 * 3/4 of the stream
    assert tensor[("tensor", "activations")] == 32 * 4 * 2 * 3 / 4 * stream
    assert tensor[("fsdp", "weights")] == 2 * 2 * 2 * n / 4 * 3 / 4


def test_a_torus_axis_has_both_its_links_and_an_open_line_half():
    v5p, v5e = parse_topology("v5p:4x8x8"), parse_topology("v5e:4x4")
    one = dict(replica=1, fsdp=1, sequence=1, tensor=1)
    per_dim = v5p.chip.ici_bandwidth / 3
    assert torus_bandwidth("fsdp", one | dict(fsdp=256), v5p) == pytest.approx(3 * per_dim)
    split = one | dict(fsdp=64, tensor=4)
    assert torus_bandwidth("fsdp", split, v5p) == pytest.approx(2 * per_dim)
    assert torus_bandwidth("tensor", split, v5p) == pytest.approx(per_dim)
    assert torus_bandwidth("fsdp", one | dict(fsdp=16), v5e) == v5e.chip.ici_bandwidth / 2


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
