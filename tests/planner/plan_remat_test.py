"""The plan's numbers against the traced program, the compiled program and the MFU formula."""

import dataclasses
import json
import math

import jax
import pytest

from easylm_jax import plan
from easylm_jax.metrics import flops_per_token
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.models.presets import PRESETS, preset
from easylm_jax.models.remat import NAMES, POLICIES
from easylm_jax.planner import remat

B, T = 1, 32
SIZE = dict(batch=B, seq_len=T)
CONFIG = LlamaConfig(
    vocab_size=32,
    d_model=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    d_ff=112,
    max_seq_len=T,
    attention=AttentionConfig(block_q=16, block_k=16),
)
MAPS = ("q:keep,down:keep", "o:offload,gate:keep,attention_lse:keep,attention_out:keep")


def test_forward_flops_are_a_third_of_what_mfu_counts():
    for name in ("llama_7b", "llama3_8b", "qwen2_0.5b"):
        config = preset(name)
        fields = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "d_model", "d_ff")
        sizes = {field: getattr(config, field) for field in fields}
        counted = flops_per_token(**sizes, vocab_size=0, seq_len=512)["causal"] * 3 * 512
        layer = sum(remat.forward_flops(config, batch=3, seq_len=512).values())
        assert 3 * config.num_layers * layer == pytest.approx(counted, rel=1e-12), name


def test_a_window_is_counted_pair_by_pair():
    window = 5
    config = dataclasses.replace(CONFIG, attention=AttentionConfig(sliding_window=window))
    pairs = sum(min(t + 1, window) for t in range(T)) - min(window, T) / 2  # half the diagonal
    got = remat.forward_flops(config, **SIZE)["attention"]
    assert got == pytest.approx(4 * 4 * 24 * pairs, rel=0.02)


def backward_work(policy):
    """FLOPs of the linear layers, and the number of attention loops, in a layer's backward pass."""
    config = dataclasses.replace(CONFIG, remat=policy)
    traced = jax.make_jaxpr(remat.gradient(config))(*remat._shapes(config, B, T))
    layers = [e for e in traced.eqns if e.primitive.name == "scan" and e.params["reverse"]]
    return count(layers[-1].params["jaxpr"].jaxpr)


def count(jaxpr):
    flops, loops = 0, 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[dim] for dim in contracted)
            flops += 2 * depth * eqn.outvars[0].aval.size
        elif eqn.primitive.name == "while":
            loops += 1
        for inner in map(lambda p: getattr(p, "jaxpr", p), eqn.params.values()):
            if hasattr(inner, "eqns") and eqn.primitive.name != "while":
                inner_flops, inner_loops = count(inner)
                flops, loops = flops + inner_flops, loops + inner_loops
    return flops, loops


@pytest.mark.parametrize("policy", [*POLICIES, *MAPS])
def test_recomputed_flops_are_those_that_the_backward_pass_has_beyond_its_own(policy):
    own_flops, own_loops = backward_work("none")
    flops, loops = backward_work(policy)
    again = remat.recomputed_flops(CONFIG, policy, **SIZE)
    assert loops - own_loops == ("attention" in again)
    assert flops - own_flops == sum(again.values()) - again.get("attention", 0)


@pytest.mark.parametrize("policy", ["full", "linear_outputs"])
def test_each_further_layer_costs_the_compiled_program_what_a_layer_keeps(policy):
    temporary = {}
    for num_layers in (4, 8):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        temporary[num_layers] = remat.compiled_memory(config, policy, **SIZE).temporary
    kept = remat.saved_bytes(remat.saved_arrays(CONFIG, policy, **SIZE))
    assert temporary[8] - temporary[4] == pytest.approx(4 * kept, rel=0.02)


@pytest.mark.slow
def test_a_7b_block_needs_least_memory_under_full_and_most_under_none():
    config = preset("llama_7b", num_layers=2, vocab_size=512, dtype="bfloat16")
    peaks = [
        remat.compiled_memory(config, policy, batch=1, seq_len=2048).peak
        for policy in ("full", "attention_only", "linear_outputs", "none")
    ]
    assert peaks == sorted(peaks)
    assert min(b - a for a, b in zip(peaks, peaks[1:], strict=False)) > 16 * 2**20


def run(*args):
    plan.remat_main(args)


@pytest.fixture
def instant_compile(monkeypatch):
    memory = remat.Memory(3 * remat.MIB, 5 * remat.MIB, 7 * remat.MIB)
    monkeypatch.setattr(remat, "compiled_memory", lambda *args, **kwargs: memory)


def test_the_command_prints_aligned_tables_and_the_same_as_json(capsys, instant_compile):
    arguments = ("--remat", "--model=debug", "--seq_len=4096", "--policies", "v:keep,up:offload")
    run(*arguments)
    blocks = capsys.readouterr().out.split("\n\n")
    kept, again = (block.splitlines() for block in blocks[1:3])
    assert len({len(line) for line in kept}) == 1
    assert kept[0].split()[-13:-11] == ["MiB", "input"]
    columns = ["input", *NAMES, "rest", "device"]
    cells = dict(zip(columns, kept[-1].split()[1:], strict=True))
    # bfloat16: 4096 tokens of width 64 for the input, 2 x 16 for v, and 128 for up.
    assert (cells["input"], cells["v"], cells["up"]) == ("0.5", "0.2", "1.0h")
    assert cells["q"] == cells["rest"] == "." and cells["device"] == "0.8"
    # By hand: 2 x 4096 x 28,672 weights again and 4 x 4096^2 / 2 x 64 for attention, of 2.45e9.
    assert again[2].split() == "full 2.4 97.3% 3 15 q k v o gate up attention".split()

    run(*arguments, "--json")
    report = json.loads(capsys.readouterr().out)
    names = [row["policy"] for row in report["policies"]]
    assert names == ["none", *POLICIES, "v:keep,up:offload"]
    assert report["policies"][-1]["peak"] == 15 * remat.MIB


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model=llama_8b"], "unknown model 'llama_8b'; near it: "),
        (["--policies", "linear"], "unknown remat policy 'linear'; near it: linear_outputs"),
        (["--config=configs/none.py:7b"], "there is no file configs/none.py"),
    ],
)
def test_a_wrong_name_gets_one_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        run("--remat", *arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_models_come_from_presets_short_names_and_config_files():
    assert plan.load_model("7b", None) == PRESETS["llama_7b"]
    assert plan.load_model("debug", None) == PRESETS["debug"]
    model = plan.load_model(None, "configs/llama_pretrain.py:13b")
    assert dataclasses.replace(model, remat="full", dtype="float32") == preset(
        "llama_13b", remat="full"
    )
